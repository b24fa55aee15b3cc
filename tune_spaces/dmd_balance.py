"""How fast generator and fake score learn in a refinement."""

from tune_spaces.space import Changes, Choice, Space, Uniform, Values, first_stage

_LATE = 0.99
"""Adam's second beta."""
_PLAYERS = ("student", "fake_score")


def space(recipe: Values, stage: str = "") -> Space:
    """Learning rates of both, how often the fake score moves for each move of the generator, and its momentum.

    Raises:
        ValueError: no stage of the recipe refines by distribution matching.
    """
    name = first_stage(recipe, stage, lambda one: one["objective"]["name"] == "dmd", "objective dmd")
    return Space(
        stage=name,
        parameters={
            "student": Uniform(low=1e-5, high=1e-3, log=True),
            "fake_score": Uniform(low=1e-5, high=2e-3, log=True),
            "update_ratio": Choice(values=[1, 2, 3, 5]),
            "momentum": Choice(values=[0.0, 0.5, 0.9]),
        },
        changes=lambda values: _changes(name, values),
        baselines={"hand-set": {}},
        in_parameters=lambda values: values or _own(recipe["stages"][name]),
    )


def _own(stage: Values) -> Values:
    """What the recipe has; no momentum where the two players' differ."""
    players = [stage["optimizers"][player] for player in _PLAYERS]
    (first, last), other = (tuple(player["betas"]) for player in players)
    same = {"momentum": first} if (first, last) == other and last == _LATE else {}
    rates = {name: player["learning_rate"] for name, player in zip(_PLAYERS, players, strict=True)}
    return {**rates, **same, "update_ratio": stage["objective"]["update_ratio"]}


def _changes(stage: str, values: Values) -> Changes:
    changes: Changes = {}
    for player in _PLAYERS:
        if player in values:
            changes[f"stages.{stage}.optimizers.{player}.learning_rate"] = values[player]
        if "momentum" in values:
            changes[f"stages.{stage}.optimizers.{player}.betas"] = [values["momentum"], _LATE]
    if "update_ratio" in values:
        changes[f"stages.{stage}.objective.update_ratio"] = values["update_ratio"]
    return changes
