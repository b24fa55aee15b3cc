"""Every draw of every space is an allowed recipe; schedules are stored times; baselines are what they are called."""

import math
from random import Random
from typing import Any

import pytest
import torch

from hd_core.times import positions
from hd_core.types import Condition
from pipelines.recipe import Recipe, load, override
from pipelines.tuning.work import chained
from tune_spaces import SPACES, sfd_schedule
from tune_spaces.space import Choice, Integer, Uniform

DIGITS = load("digits")
MEANFLOW = load("digits", ["stages.sketch.objective={name: meanflow}"])
CASES: dict[str, tuple[Recipe, str]] = {
    "awd_weighting": (DIGITS, "refine"),
    "dmd_balance": (DIGITS, "refine"),
    "meanflow_sampler": (MEANFLOW, "sketch"),
    "sfd_schedule": (DIGITS, "sfd_2"),
}


@pytest.mark.parametrize("name", SPACES)
def test_every_draw_is_an_allowed_recipe(name: str):
    recipe, stage = CASES[name]
    space = SPACES[name](recipe.to_dict(), "")
    assert space.stage == stage
    recipe = chained(recipe, stage)
    seen = {override(recipe, space.overrides(space.draw(str(seed)))).fingerprint for seed in range(40)}
    assert len(seen) > 30
    for values in space.baselines.values():
        override(recipe, space.overrides(values))
    assert space.overrides(space.baselines["hand-set"]) == {}
    assert space.draw("one") == space.draw("one") != space.draw("two")


@pytest.mark.parametrize("name", SPACES)
def test_every_parameter_changes_the_recipe(name: str):
    recipe, stage = CASES[name]
    space, recipe = SPACES[name](recipe.to_dict(), ""), chained(recipe, stage)
    for parameter, distribution in space.parameters.items():
        values = space.draw("base") | ({"afs": True, "teacher_steps": 2} if name == "sfd_schedule" else {})
        found: set[str] = set()
        for chance in range(12):
            changed = {**values, parameter: distribution.draw(Random(chance))}
            found.add(override(recipe, space.overrides(changed)).fingerprint)
        assert len(found) > 1, parameter


BETAS = "betas: [0.5, 0.99]"
SAID = {
    "awd_weighting": [],
    "dmd_balance": [f"stages.refine.optimizers.{player}={{{BETAS}}}" for player in ("student", "fake_score")],
    "meanflow_sampler": ["stages.sketch.objective={name: meanflow, equal_share: 0.6, full_share: 0.1}"],
}


@pytest.mark.parametrize(("name", "settings"), SAID.items())
def test_the_recipe_itself_can_be_said_as_a_draw(name: str, settings: list[str]):
    """So that a sampler can learn from its score."""
    recipe = load("digits", settings)
    space, recipe = SPACES[name](recipe.to_dict(), ""), chained(recipe, CASES[name][1])
    said = space.as_draw(space.baselines["hand-set"])
    assert said is not None and override(recipe, space.overrides(said)) == recipe


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("awd_weighting", "stages.refine.objective.adversarial.weight=5.0"),
        ("awd_weighting", "stages.refine.discriminator.heads=1"),
        ("dmd_balance", "stages.refine.optimizers.student.betas=[0.9, 0.95]"),
        ("sfd_schedule", "seed=1"),
    ],
)
def test_what_lies_outside_of_a_space_is_no_draw(name: str, setting: str):
    space = SPACES[name](load("digits", [setting]).to_dict(), "")
    assert space.as_draw({}) is None


@pytest.mark.parametrize("stage", ["sfd_2", "sfd_3"])
def test_named_schedules_are_draws(stage: str):
    space = SPACES["sfd_schedule"](DIGITS.to_dict(), stage)
    for name, values in space.baselines.items():
        said = space.as_draw(values)
        assert said is None if name == "hand-set" else said and space.overrides(said) == space.overrides(values)


def test_only_what_is_drawn_is_changed():
    space = SPACES["awd_weighting"](DIGITS.to_dict(), "")
    assert space.overrides({}) == {}
    assert space.overrides({"weight": 0.3, "layers": "last"}) == {
        "stages.refine.objective.adversarial.weight": 0.3,
        "stages.refine.discriminator.layers": [3],
    }


# Schedules


def walk_of(values: dict[str, Any], stage: str = "sfd_3") -> tuple[list[float], list[int], Recipe]:
    space = SPACES["sfd_schedule"](DIGITS.to_dict(), stage)
    recipe = override(chained(DIGITS, stage), space.overrides(values))
    grid = recipe.stages[stage].objective.sampling_grid()
    return grid.tolist(), positions(recipe.precompute.grid.times(recipe.precompute.intervals), grid), recipe


def test_a_schedule_is_a_choice_of_stored_times():
    gaps = {"gap_0": math.log(2), "gap_1": 0.0, "gap_2": 0.0, "gap_3": 9.0}
    times, places, recipe = walk_of({**gaps, "tail": 0, "afs": False})
    assert recipe.precompute.intervals == 48 and places == [0, 24, 36, 48]
    assert times == pytest.approx([1, 0.5, 0.25, 0])
    _, places, recipe = walk_of({**gaps, "tail": 2, "afs": False})
    assert places[-1] == 46
    _, places, recipe = walk_of({**dict.fromkeys(gaps, 0.0), "tail": 0, "afs": True})
    assert places == [0, 12, 24, 36, 48]
    objective = recipe.stages["sfd_3"].objective
    assert objective.name == "sfd" and objective.afs and objective.intervals == 4


def test_schedules_share_one_set_of_trajectories_but_those_whose_teacher_takes_few_steps():
    space, recipe = SPACES["sfd_schedule"](DIGITS.to_dict(), "sfd_2"), chained(DIGITS, "sfd_2")
    drawn = [space.draw(str(seed)) for seed in range(20)]
    made = [str(override(recipe, space.overrides(values)).precompute) for values in drawn]
    shared = {one for one, values in zip(made, drawn, strict=True) if not space.alone(values)}
    assert len(shared) == 1 and len(set(made)) == 1 + sum(map(space.alone, drawn)) < 21


@pytest.mark.parametrize(("afs", "points"), [(False, 7), (True, 10)])
def test_a_teacher_of_few_steps_walks_through_the_students_times(afs: bool, points: int):
    gaps = {"gap_0": 1.0, "gap_1": 0.0, "gap_2": -1.0}
    values = {**gaps, "tail": 1, "afs": afs, "teacher_steps": 3, "teacher_solver": "heun"}
    times, places, recipe = walk_of(values, "sfd_2")
    assert len(recipe.precompute.grid.times(recipe.precompute.intervals)) == points
    assert places == list(range(0, points, 3)) and recipe.precompute.solver == "heun"
    assert times[0] == 1 and times[-1] == pytest.approx(1 / 48)
    alike = walk_of({**values, "teacher_steps": "stored"}, "sfd_2")[0]
    assert times == pytest.approx(alike)


def test_baselines_are_the_named_grids():
    space = SPACES["sfd_schedule"](DIGITS.to_dict(), "sfd_2")
    stored = torch.linspace(1, 0, 49, dtype=torch.float64)
    places = {title: values["places"] for title, values in space.baselines.items() if values}
    assert places["equal steps of t"] == [0, 24, 48]
    sigma = (80 ** (1 / 7) / 2 + 0.002 ** (1 / 7) / 2) ** 7
    nearest = int((stored - sigma / (1 + sigma)).abs().argmin())
    assert places["polynomial, rho 7"] == [0, nearest, 48]
    assert places["arctan, data std 0.5"] == [0, 32, 48]
    assert len(places) == 8 and len(sfd_schedule.RHOS) == 5
    assert not any(values["afs"] or space.alone(values) for name, values in space.baselines.items() if values)


def test_programmed_schedules_are_stored_times_and_good_ones():
    stored = torch.linspace(1, 0, 49, dtype=torch.float64)
    std, noise = 0.5, torch.randn(64, 1, 2, 2, dtype=torch.float64)

    def scale(t: torch.Tensor) -> torch.Tensor:
        return ((1 - t) ** 2 * std**2 + t**2).sqrt()

    def velocity(x: torch.Tensor, t: torch.Tensor, _condition: Condition) -> torch.Tensor:
        t = t.reshape(-1, 1, 1, 1)
        return x * (t - (1 - t) * std**2) / scale(t) ** 2

    states = [noise * scale(t) for t in stored]
    found = sfd_schedule.programmed(2, velocity, states, stored, Condition())
    assert list(found) == ["GITS, gamma 0.9", "GITS, gamma 1", "GITS, gamma 1.15", "OSS"]
    for values in found.values():  # arctan is the best for Gaussian data: [0, 32, 48]
        first, middle, last = values["places"]
        assert (first, last) == (0, 48) and 24 <= middle <= 38 and not values["afs"]


# Mistakes


def test_a_recipe_without_such_a_stage_is_refused():
    for name, message in (
        ("meanflow_sampler", "no stage of the recipe has objective meanflow"),
        ("awd_weighting", "stage sketch has no adversarial term .*; of this recipe refine has"),
        ("dmd_balance", "the recipe has no stage 'refin'; it has sketch, refine"),
    ):
        asked = {"awd_weighting": "sketch", "dmd_balance": "refin"}.get(name, "")
        with pytest.raises(ValueError, match=message):
            SPACES[name](DIGITS.to_dict(), asked)


def test_a_student_of_any_number_of_steps_has_no_one_schedule():
    recipe = load("digits", ["stages.sfd_2.objective.step_counts=[1, 2]"])
    with pytest.raises(ValueError, match="stage sfd_2 trains for several numbers of steps"):
        SPACES["sfd_schedule"](recipe.to_dict(), "sfd_2")


def test_ranges_are_checked():
    for make, message in (
        (lambda: Uniform(low=1, high=1), "low below high; given 1 and 1"),
        (lambda: Uniform(low=0, high=1, log=True), "a logarithmic range lies above 0; given 0"),
        (lambda: Integer(low=3, high=2), "low below high; given 3 and 2"),
        (lambda: Choice(values=[1]), r"at least two values; given \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_draws_lie_in_their_ranges():
    chance = Random(0)
    log = [Uniform(low=1e-3, high=1e3, log=True).draw(chance) for _ in range(400)]
    assert min(log) >= 1e-3 and max(log) <= 1e3 and 0.35 < sum(value < 1 for value in log) / 400 < 0.65
    assert {Integer(low=1, high=3).draw(chance) for _ in range(60)} == {1, 2, 3}
