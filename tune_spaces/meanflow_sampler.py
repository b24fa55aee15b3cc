"""At which pairs of times a sketch learns."""

from tune_spaces.space import Changes, Space, Uniform, Values, first_stage


def space(recipe: Values, stage: str = "") -> Space:
    """Shares of rows that repeat the teacher or go from noise to data, where the others lie, and the loss's power.

    Raises:
        ValueError: no stage of the recipe is a sketch by MeanFlow's identity.
    """
    name = first_stage(recipe, stage, lambda one: one["objective"]["name"] == "meanflow", "objective meanflow")
    return Space(
        stage=name,
        parameters={
            "equal_share": Uniform(low=0.0, high=0.9),
            "full_part": Uniform(low=0.0, high=1.0),
            "times.t_mean": Uniform(low=-1.5, high=1.5),
            "times.t_std": Uniform(low=0.5, high=1.6),
            "power": Uniform(low=0.0, high=1.5),
        },
        changes=lambda values: _changes(name, values),
        baselines={"hand-set": {}},
        in_parameters=lambda values: values or _own(recipe["stages"][name]["objective"]),
    )


def _own(objective: Values) -> Values:
    left = 1 - objective["equal_share"]
    times = {f"times.{key}": value for key, value in objective["times"].items()}
    return {**objective, **times, "full_part": objective["full_share"] / left if left else 0.0}


def _changes(stage: str, values: Values) -> Changes:
    """``full_part`` is the share of the rows that remain beside ``equal_share``, so that both fit for any draw."""
    plain = {key: value for key, value in values.items() if key != "full_part"}
    if "full_part" in values:
        plain["full_share"] = values["full_part"] * (1 - values["equal_share"])
    return {f"stages.{stage}.objective.{key}": value for key, value in plain.items()}
