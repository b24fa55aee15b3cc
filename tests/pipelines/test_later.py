"""Numbers that change while a stage trains: from their iteration on they hold, and before it nothing knows of them."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hd_core.objectives.dmd import DMD
from hd_core.objectives.meanflow import MeanFlow
from pipelines.curve import Curve
from pipelines.plan import plan
from pipelines.recipe import Recipe, from_dict, load
from pipelines.run import Run
from pipelines.stages import StageConfig, StageJob
from tests.pipelines import tiny

RECIPE = """\
seed: 5
data: {held_out: 1697}
precompute: {num_samples: 32, shard_rows: 32, intervals: 4, batch_size: 32}
stages:
  refine:
    objective: {name: dmd, update_ratio: 2, adversarial: {weight: 0.1}}
    num_steps: 6
    batch_size: 8
    log_every: 1
    checkpoint_every: 2
    discriminator: {layers: [1, 3], width: 16, heads: 2}
"""
STILL = {f"optimizers.{player}.learning_rate": 1e-30 for player in ("student", "fake_score", "discriminator")}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return tiny.prepared_run(tmp_path_factory.mktemp("later"), RECIPE)


def job_of(run: Run, folder: Path, later: Mapping[int, Mapping[str, float]], **changes: Any) -> StageJob:
    job = run.job("refine")
    stage = replace(job.stage, later={step: dict(values) for step, values in later.items()}, **changes)
    return replace(job, stage=stage, folder=str(folder))


def trained(job: StageJob) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Its weights without the average's slowness, and its curve without the clock."""
    trainer = tiny.trained(job)
    weights = {
        f"{name}/{key}": tensor.clone()
        for name, player in trainer.state.players.items()
        for key, tensor in player.network.state_dict().items()
    }
    lines = [{key: value for key, value in line.items() if key != "seconds"} for line in Curve.read(job.curve)]
    return weights, lines


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_before_its_iteration_nothing_differs_and_from_it_on_all_does(run: Run, tmp_path: Path):
    base, curve = trained(job_of(run, tmp_path / "base", {}))
    found, other = trained(job_of(run, tmp_path / "other", {2: {"objective.adversarial.weight": 5.0}}))
    assert other[:2] == curve[:2] and all(a != b for a, b in zip(other[2:], curve[2:], strict=True))
    assert not same(found, base)


def test_players_move_at_the_rates_of_the_moment(run: Run, tmp_path: Path):
    """What no longer moves is what a training of three iterations leaves."""
    short, _ = trained(job_of(run, tmp_path / "short", {}, num_steps=3))
    still, _ = trained(job_of(run, tmp_path / "still", {3: STILL}))
    moving = [key for key in short if "parametrizations" not in key]  # spectral norm's estimates move by themselves
    assert len(moving) > 50 and all(torch.allclose(short[key], still[key], rtol=0, atol=1e-12) for key in moving)


def test_what_does_not_change_changes_nothing(run: Run, tmp_path: Path):
    base, curve = trained(job_of(run, tmp_path / "base", {}))
    found, other = trained(job_of(run, tmp_path / "same", {2: {"objective.update_ratio": 2.0, "ema_decay": 0.99}}))
    assert same(found, base) and other == curve


def test_the_average_follows_the_decay_of_the_moment(run: Run, tmp_path: Path):
    job = job_of(run, tmp_path / "decay", {5: {"ema_decay": 0.0}})
    weights, _ = trained(job)
    average = load_file(job.weights)
    assert all(torch.equal(average[key], weights[f"student/{key}"]) for key in average)


def test_a_kill_between_two_changes_leaves_no_trace(run: Run, tmp_path: Path):
    later = {1: {"objective.adversarial.weight": 0.5}, 4: {"optimizers.student.learning_rate": 1e-3}}
    whole, curve = trained(job_of(run, tmp_path / "whole", later))
    job = job_of(run, tmp_path / "killed", later)
    trainer = tiny.trainer_of(job)

    def dies(step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt

    trainer.watch = replace(trainer.watch, progress=dies)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert list(job.checkpoints.glob("step-00000004*"))
    found, other = trained(job)
    assert same(found, whole) and other == curve


def test_changes_add_up_in_order():
    objective = {"name": "dmd", "update_ratio": 2}
    stage = recipe_of({5: {"objective.update_ratio": 3}, 2: {"ema_decay": 0.5, "objective.update_ratio": 1}}, objective)
    seen = [
        (one.ema_decay, one.objective.update_ratio) for one in map(stage.at, range(8)) if isinstance(one.objective, DMD)
    ]
    assert seen == [(0.99, 2)] * 2 + [(0.5, 1)] * 3 + [(0.5, 3)] * 3
    assert [steps for steps, _ in stage.spans()] == [2, 3, 3]
    assert [one for _, one in stage.spans()] == [stage.at(0), stage.at(2), stage.at(5)]


def test_numbers_that_are_checked_together_change_together():
    objective = {"name": "meanflow", "equal_share": 0.1, "full_share": 0.8}
    found = recipe_of({4: {"objective.equal_share": 0.7, "objective.full_share": 0.2}}, objective).at(4).objective
    assert isinstance(found, MeanFlow) and (found.equal_share, found.full_share) == (0.7, 0.2)


def recipe_of(later: Mapping[Any, Any], objective: Mapping[str, Any]) -> StageConfig:
    return recipe_with(later, objective).stages["refine"]


def recipe_with(later: Mapping[Any, Any], objective: Mapping[str, Any], **stage: Any) -> Recipe:
    return from_dict(
        {"name": "x", "stages": {"refine": {"objective": objective, "num_steps": 8, "later": later, **stage}}}
    )


def test_a_recipe_keeps_it_and_is_another_for_it(tmp_path: Path):
    written = "{4: {objective.adversarial.weight: 1e-1, optimizers.student.learning_rate: 0.001}}"
    recipe = load("digits", [f"stages.refine.later={written}"])
    assert recipe.stages["refine"].later == {
        4: {"objective.adversarial.weight": 0.1, "optimizers.student.learning_rate": 0.001}
    }
    assert from_dict(recipe.to_dict()) == recipe and recipe.fingerprint != load("digits").fingerprint
    assert "later" in asdict(recipe.stages["refine"])


def test_a_plan_counts_the_calls_of_each_part(tmp_path: Path):
    def calls(later: Mapping[int, Mapping[str, float]]) -> int:
        recipe = tiny.tiny_recipe(
            tmp_path, "stages.refine.objective.update_ratio=4", f"stages.refine.later={dict(later)}"
        )
        return next(item.calls for item in plan(recipe, tmp_path / "none") if item.phase == "refine")

    rows, often, seldom = 16, calls({}), calls({1: {"objective.update_ratio": 1.0}})
    assert often % (4 * rows) == 0 and (seldom - often) % (3 * rows) == 0 and seldom > often


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ({0: {"ema_decay": 0.5}}, "iterations lie between 0 and num_steps (8); given 0"),
        ({8: {"ema_decay": 0.5}}, "given 8"),
        ({4: {"batch_size": 3}}, "'batch_size' cannot change while a stage trains; numbers of objective, optimizers,"),
        ({4: {"objective.weight": 3}}, "'objective.weight' names no number of the stage; there are name, update_ratio"),
        ({4: {"objective.update_ratio.x": 3}}, "'objective.update_ratio.x' names no number of the stage"),
        ({4: {"objective.grid.knots": 3}}, "'objective.grid.knots' is no number"),
        ({4: {"objective.afs": 1}}, "'objective.afs' is no number"),
        ({4: {"objective.update_ratio": 1.5}}, "'objective.update_ratio' is a whole number; given 1.5"),
        ({4: {"objective.update_ratio": 0}}, "update_ratio must be at least 1"),
        ({4: {"objective.adversarial.weight": 0}}, "from 4 on the objective would have other players"),
        ({4: {"objective.regression_weight": 0.1}}, "from 4 on the objective would have other needs"),
        ({4: {"objective.intervals": 2}}, "from 4 on the objective would have other steps"),
        ({"soon": {"ema_decay": 0.5}}, "stages.refine.later.soon: must be a whole number"),
        ({4: {"ema_decay": "much"}}, "stages.refine.later.4.ema_decay: must be a number; given 'much'"),
        ({4: 3}, "stages.refine.later.4: must be a mapping; given 3"),
    ],
)
def test_mistakes_are_told(later: Mapping[Any, Any], message: str):
    with pytest.raises(ValueError) as refused:
        recipe_of(later, {"name": "dmd"})
    assert message in str(refused.value) and len(str(refused.value).splitlines()) == 1
