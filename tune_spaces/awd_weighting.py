"""How a refinement weighs its discriminator, and what that looks at."""

from typing import Any

from tune_spaces.space import Changes, Choice, Space, Uniform, Values, first_stage


def space(recipe: Values, stage: str = "") -> Space:
    """Weight or gradient ratio, arm, heads, temperature, tapped layers, the time it looks at, and R1.

    Raises:
        ValueError: no stage of the recipe has an adversarial term.
    """
    name = first_stage(recipe, stage, _is_adversarial, "adversarial term (objective.adversarial.weight above 0)")
    layers: list[int] = list(recipe["stages"][name]["discriminator"]["layers"])
    subsets = {"all": layers, "last": layers[-1:], "first": layers[:1]}
    return Space(
        stage=name,
        parameters={
            "weighting": Choice(values=["fixed", "matched"]),
            "weight": Uniform(low=0.02, high=2.0, log=True),
            "arm": Choice(values=["adaptive", "pooled", "token_logits", "uniform"]),
            "heads": Choice(values=[2, 4, 8]),
            "temperature": Uniform(low=0.25, high=4.0, log=True),
            "layers": Choice(values=list(subsets) if len(layers) > 1 else ["all", "last"]),
            "time_mean": Uniform(low=-2.5, high=0.5),
            "r1_weight": Choice(values=[0.0, 0.1, 1.0]),
        },
        changes=lambda values: _changes(name, subsets, values),
        baselines={"hand-set": {}},
        in_parameters=lambda values: values or _own(recipe["stages"][name]),
    )


def _own(stage: Values) -> Values:
    return {**stage["objective"]["adversarial"], **stage["discriminator"], "layers": "all"}


def _is_adversarial(stage: Values) -> bool:
    adversarial: Values = stage["objective"].get("adversarial") or {}
    return bool(adversarial.get("weight"))


def _changes(stage: str, subsets: dict[str, list[int]], values: Values) -> Changes:
    where: dict[str, Any] = {
        **dict.fromkeys(("weighting", "weight", "time_mean", "r1_weight"), "objective.adversarial"),
        **dict.fromkeys(("arm", "heads", "temperature", "layers"), "discriminator"),
    }
    plain = {**values, **({"layers": subsets[values["layers"]]} if "layers" in values else {})}
    return {f"stages.{stage}.{where[key]}.{key}": value for key, value in plain.items()}
