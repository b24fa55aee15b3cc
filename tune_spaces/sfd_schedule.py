"""At which times an SFD student steps, and how closely its teacher follows between them.

A schedule is a choice among the times of one fine grid (`hd_core.schedules`), so that one set of trajectories serves
every schedule whose teacher walks that grid. A teacher of few steps between two of the student's times, the K of the
paper, walks a grid that is the schedule's own.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from hd_core.schedules import Places, arctan, euler_costs, from_gaps, gits, log_snr, nearest, oss, polynomial, to_gaps
from hd_core.times import GridConfig
from hd_core.types import Condition, Grid, Images, Velocity
from tune_spaces.space import Changes, Choice, Distribution, Space, Uniform, Values, first_stage

FINE = 48
"""Intervals of the fine grid at least."""
STORED = "stored"
"""The teacher walks the fine grid."""
TEACHER_STEPS = (STORED, 2, 3, 4)
SOLVERS = ("heun", "ipndm_2", "dpmpp_2m", "dpmpp_3m")
RHOS = (3, 5, 7, 9, 11)
GAMMAS = (0.9, 1.0, 1.15)
_DATA_STD = 0.5


def space(recipe: Values, stage: str = "") -> Space:
    """Free times, where the walk ends, whether its first step is analytical, and the teacher's steps and solver between
    two of the times, at the stage's number of calls.

    Raises:
        ValueError: no stage of the recipe is SFD's by stored trajectories, or it is told its number of steps.
    """
    name = first_stage(recipe, stage, _fits, "objective sfd that follows stored trajectories")
    objective: Values = recipe["stages"][name]["objective"]
    if objective["step_counts"]:
        raise ValueError(
            f"stage {name} trains for several numbers of steps, each with times of its own: take one of them"
        )
    calls = objective["intervals"] - objective["afs"]
    stored = _stored(recipe["precompute"])
    gaps: dict[str, Distribution] = {f"gap_{i}": Uniform(low=-2.5, high=2.5) for i in range(calls + 1)}
    choices: dict[str, Distribution] = {
        "tail": Choice(values=[0, 1, 2]),
        "afs": Choice(values=[False, True]),
        "teacher_steps": Choice(values=TEACHER_STEPS),
        "teacher_solver": Choice(values=SOLVERS),
    }
    return Space(
        stage=name,
        parameters={**gaps, **choices},
        changes=lambda values: _changes(name, calls, stored, values),
        always={"precompute.intervals": len(stored) - 1},
        baselines={
            "hand-set": {},
            **{title: {"places": places, "afs": False} for title, places in baselines(calls, stored).items()},
        },
        from_trajectories=partial(programmed, calls),
        alone=lambda values: values.get("teacher_steps", STORED) != STORED,
        in_parameters=partial(_in_parameters, calls),
    )


def programmed(
    steps: int, velocity: Velocity, states: Sequence[Images], times: Grid, condition: Condition
) -> dict[str, Values]:
    """The schedules of GITS, at some discounts, and of OSS."""
    costs = euler_costs(velocity, states, times, condition)
    found = {f"GITS, gamma {gamma:g}": gits(costs, steps, gamma) for gamma in GAMMAS}
    found["OSS"] = oss(velocity, states, times, condition, steps)
    return {title: {"places": places, "afs": False} for title, places in found.items()}


def baselines(steps: int, stored: Grid) -> dict[str, Places]:
    """Named schedules of so many steps, each at the nearest stored times."""
    points = len(stored)
    rhos = {f"polynomial, rho {rho}": nearest(polynomial(steps, rho), stored) for rho in RHOS}
    others = {"log-SNR": log_snr(steps), f"arctan, data std {_DATA_STD}": arctan(steps, _DATA_STD)}
    return {
        "equal steps of t": from_gaps([0.0] * steps, points),
        **rhos,
        **{name: nearest(times, stored) for name, times in others.items()},
    }


def _fits(stage: Values) -> bool:
    return stage["objective"]["name"] == "sfd" and stage["objective"]["taught_by"] == "teacher"


def _stored(precompute: Values) -> Grid:
    """The fine grid: the recipe's own, subdivided until it is fine."""
    given: int = precompute["intervals"]
    return _grid(precompute["grid"]).times(given * math.ceil(FINE / given))


def _grid(settings: Mapping[str, Any]) -> GridConfig:
    return GridConfig(**{**settings, "betas": tuple(settings["betas"]), "knots": tuple(settings["knots"])})


def places_of(values: Values, calls: int, points: int) -> Places:
    """The places of a draw: its own, or those of its gaps, which leave out what is behind the walk's end."""
    if "places" in values:
        return list(values["places"])
    steps = calls + values["afs"]
    return from_gaps([values[f"gap_{i}"] for i in range(steps)], points - values["tail"])


def _in_parameters(calls: int, values: Values) -> Values:
    """Places, as a draw of gaps; what such a draw leaves open is the first of its choices."""
    if "places" not in values:
        return values
    gaps = [*to_gaps(values["places"]), *[0.0] * (calls + 1)][: calls + 1]
    named = {f"gap_{i}": gap for i, gap in enumerate(gaps)}
    return {**named, "tail": 0, "afs": values["afs"], "teacher_steps": STORED, "teacher_solver": SOLVERS[0]}


def _changes(stage: str, calls: int, stored: Grid, values: Values) -> Changes:
    places = places_of(values, calls, len(stored))
    times: list[float] = stored[places].tolist()
    grid = {"kind": "uniform", "t_max": times[0], "t_min": times[-1], "knots": times[1:-1]}
    intervals, start = len(places) - 1, f"stages.{stage}.objective"
    changes: Changes = {f"{start}.intervals": intervals, f"{start}.afs": values["afs"], f"{start}.grid": grid}
    if (steps := values.get("teacher_steps", STORED)) != STORED:
        changes |= {"precompute.grid": grid, "precompute.intervals": steps * intervals}
        changes["precompute.solver"] = values["teacher_solver"]
    return changes
