"""When a stage is stopped: each sign alone, patience, replay; then real stages that stop, or are told not to."""

import json
import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines import recipe as recipes
from pipelines.artifacts import file_hash
from pipelines.curve import Curve
from pipelines.group import Group
from pipelines.recipe import Recipe
from pipelines.stability import Collapsed, StopConfig, StopRule
from pipelines.stages import StageJob
from pipelines.trainer import StageTrainer, Watch
from tests.pipelines import tiny

Point = dict[str, float]


def sees(rule: StopRule, *points: Point) -> list[str | None]:
    return [rule.see(point) for point in points]


def gap(real: float, fake: float) -> Point:
    return {"real_logit": real, "fake_logit": fake}


def norms(count: int, value: float = 1.0) -> list[Point]:
    return [{"gradient_norm/student": value}] * count


@dataclass(frozen=True)
class Sign:
    """Points up to one that is just within a limit, and one just past it."""

    limit: str
    value: float
    before: list[Point]
    fine: Point
    wrong: Point
    words: tuple[str, ...]
    patient: bool = True


SIGNS = {
    "gap": Sign(
        "max_logit_gap",
        4.0,
        [],
        gap(3, -1),
        gap(3, -1.01),
        ("discriminator has run away", "3.0 on real", "-1.0 on fake"),
    ),
    "entropy": Sign(
        "min_token_entropy", 0.1, [], {"token_entropy": 0.1}, {"token_entropy": 0.099}, ("single token", "0.099")
    ),
    "norm": Sign(
        "max_gradient_growth",
        10.0,
        [*norms(6, 0.5), *norms(6, 0.7)],
        {"gradient_norm/student": 6.9},
        {"gradient_norm/student": 7.1},
        ("gradient norm is 7.1", "median of 0.7"),
    ),
    "diversity": Sign(
        "min_diversity",
        0.5,
        [{"probe/diversity": value} for value in (0.3, 0.8, 0.6)],
        {"probe/diversity": 0.4},
        {"probe/diversity": 0.39},
        ("alike", "0.39", "0.80"),
        patient=False,
    ),
    "lag": Sign(
        "max_fake_score_lag",
        0.2,
        [],
        {"probe/fake_score_lag": 0.2},
        {"probe/fake_score_lag": 0.21},
        ("fake score lags", "1.21 times"),
        patient=False,
    ),
}
OFF = {"max_logit_gap": 0.0, "min_token_entropy": 0.0, "max_gradient_growth": 0.0} | {
    "min_diversity": 0.0,
    "max_fake_score_lag": 0.0,
}


@pytest.fixture(params=SIGNS)
def sign(request: pytest.FixtureRequest) -> Sign:
    return SIGNS[request.param]


def rule_of(sign: Sign, **changes: Any) -> StopRule:
    """A rule that looks at one sign only."""
    return StopRule(StopConfig(**{**OFF, sign.limit: sign.value, "patience": 3, **changes}))


class TestRule:
    def test_the_limit_itself_is_fine(self, sign: Sign):
        assert not any(sees(rule_of(sign), *sign.before, *[sign.fine] * 5))

    def test_past_the_limit_it_stops_and_names_sign_and_numbers(self, sign: Sign):
        needed = 3 if sign.patient else 1
        found = sees(rule_of(sign), *sign.before, *[sign.wrong] * needed)
        assert not any(found[:-1])
        assert found[-1] is not None and all(word in found[-1] for word in sign.words), found[-1]
        assert "\n" not in found[-1]

    def test_a_good_point_between_starts_the_count_anew(self, sign: Sign):
        if sign.patient:
            found = sees(rule_of(sign), *sign.before, *[sign.wrong, sign.wrong, sign.fine] * 3)
            assert not any(found)

    def test_points_that_do_not_tell_of_it_are_not_between(self, sign: Sign):
        found = sees(rule_of(sign), *sign.before, *[sign.wrong, {"loss/matching": 1.0}] * 3)
        assert any(found)

    def test_0_switches_it_off(self, sign: Sign):
        assert not any(sees(rule_of(sign, **{sign.limit: 0.0}), *sign.before, *[sign.wrong] * 9))

    def test_others_limits_do_not_concern_it(self, sign: Sign):
        """Every limit but its own at its strictest."""
        strict = StopConfig(
            **{**{name: 1e9 if name.startswith("min") else 1e-9 for name in OFF}, sign.limit: 0.0, "patience": 1}
        )
        assert not any(sees(StopRule(strict), *sign.before, *[sign.wrong] * 9))

    def test_disabled_it_never_stops_but_still_counts(self, sign: Sign):
        rule = rule_of(sign, enabled=False)
        assert not any(sees(rule, *sign.before, *[sign.wrong] * 9))
        rule.config = replace(rule.config, enabled=True)
        assert rule.see(sign.wrong)

    def test_a_large_norm_does_not_raise_the_median(self):
        rule = rule_of(SIGNS["norm"], patience=30)
        found = sees(rule, *norms(12), *norms(40, 20.0))
        assert found.index("the student's gradient norm is 20, after a median of 1: set max_grad_norm") == 12 + 29

    def test_a_norm_needs_a_history(self):
        assert not any(sees(rule_of(SIGNS["norm"], patience=1), *norms(9), *norms(1, 1e9)))

    def test_a_fake_side_ahead_is_no_runaway(self):
        assert not any(sees(rule_of(SIGNS["gap"]), *[gap(-100, 100)] * 9))

    @pytest.mark.parametrize("cut", [1, 7, 23, 40, 59])
    def test_a_history_replayed_after_a_resume_decides_the_same(self, cut: int):
        source = random.Random(1)
        points: list[Point] = []
        for step in range(60):
            points.append(gap(source.uniform(0, 8), 0) | {"token_entropy": source.uniform(0.05, 0.2)})
            points[-1] |= {"gradient_norm/student": math.exp(source.gauss(0, 2))}
            if step % 5 == 4:
                points[-1] |= {"probe/diversity": source.uniform(0.3, 1), "probe/fake_score_lag": source.random()}
        limits = {sign.limit: sign.value for sign in SIGNS.values()} | {"max_fake_score_lag": 0.9}
        config = StopConfig(**{**limits, "patience": 2})
        whole = sees(StopRule(config), *points)
        resumed = StopRule(config)
        sees(resumed, *points[:cut])
        assert sees(resumed, *points[cut:]) == whole[cut:]
        said = [sign for sign in SIGNS.values() if any(sign.words[0] in text for text in whole if text)]
        assert len(said) >= 4 and None in whole

    @pytest.mark.parametrize("name", OFF)
    def test_negative_limits_are_refused_by_name(self, name: str):
        with pytest.raises(ValueError, match=f"{name} must not be negative; 0 switches it off; given -1"):
            StopConfig(**{name: -1.0})  # pyright: ignore[reportArgumentType]

    def test_patience_is_at_least_1(self):
        with pytest.raises(ValueError, match="patience must be at least 1; given 0"):
            StopConfig(patience=0)


# Stages

RECIPE = """\
seed: 5
data: {held_out: 1697}
stages:
  refine:
    objective: {name: dmd, update_ratio: 2}
    num_steps: 5
    batch_size: 4
    log_every: 1
    checkpoint_every: 1
    probe: {every: 2, num_samples: 20}
    discriminator: {layers: [1, 3], width: 16, heads: 2}
"""
LOOKS_AT_NOTHING = "stages.refine.stop.min_token_entropy=1.5"
"""No discriminator looks at that many tokens: the sign is there from the first point on."""
PATIENCE = "stages.refine.stop.patience=3"


def recipe_in(folder: Path, *settings: str) -> Recipe:
    (folder / "small.yaml").write_text(RECIPE)
    return recipes.load(str(folder / "small.yaml"), settings)


def job_in(folder: Path, *settings: str) -> StageJob:
    run = tiny.open_run(recipe_in(folder, *settings), folder / "run")
    run.write_images()
    return run.job("refine")


def train(job: StageJob) -> StageJob:
    trainer = StageTrainer(job, Group(), Watch())
    trainer.restore()
    trainer.run()
    return job


def command(folder: Path, *settings: str) -> Any:
    options = [part for setting in settings for part in ("--set", setting)]
    arguments = ("--run-dir", folder / "run", *tiny.UNTRACKED, *options)
    return tiny.hdistill("train", folder / "small.yaml", *arguments, "--stage", "refine")


@pytest.fixture
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.process.available_cpus", lambda: 1)


def test_training_that_collapses_ends_with_1_keeps_what_it_has_and_goes_on_when_told(
    tmp_path: Path, without_ray: None, _one_thread: None
):
    recipe_in(tmp_path)
    folder = tmp_path / "run" / "stages" / "refine"
    result = command(tmp_path, LOOKS_AT_NOTHING, PATIENCE)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: stage refine was stopped at step 3: the discriminator looks at a single token")
    assert "--set stages.refine.stop.enabled=false" in line and ".." not in line
    assert f"The best weights so far, of step 2, are in {folder / 'student-best.safetensors'}." in line
    assert (folder / "student-best.safetensors").is_file()
    assert json.loads((folder / "best.json").read_text())["step"] == 2
    assert sorted(path.name for path in (folder / "checkpoints").glob("*.json"))[-1] == "step-00000002.json"
    assert not (folder / "student.safetensors").exists() and not (folder / "stage.json").exists()
    again = command(tmp_path, LOOKS_AT_NOTHING, PATIENCE)
    assert again.exit_code == 1 and again.stderr == result.stderr

    through = command(tmp_path, LOOKS_AT_NOTHING, "stages.refine.stop.enabled=false")
    assert through.exit_code == 0, through.output
    never = train(job_in(tmp_path / "run", "stages.refine.stop.enabled=false"))
    assert file_hash(folder / "student.safetensors") == file_hash(never.weights)


def test_before_the_first_probe_there_are_no_best_weights_to_speak_of(tmp_path: Path):
    job = job_in(tmp_path, LOOKS_AT_NOTHING, "stages.refine.stop.patience=1")
    with pytest.raises(Collapsed, match=r"stopped at step 1: the discriminator looks at a single token") as caught:
        train(job)
    assert "None" not in str(caught.value) and "best weights" not in str(caught.value)


def test_a_resumed_stage_stops_where_it_would_have_stopped(tmp_path: Path):
    """Two of three bad points come from before the stop; the third is seen after it."""
    job = job_in(tmp_path, LOOKS_AT_NOTHING, PATIENCE)
    first = StageTrainer(job, Group(), Watch(logged=_interrupt_at(2)))
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert [line["step"] for line in Curve.read(job.curve)] == [1, 2]
    with pytest.raises(Collapsed, match="stopped at step 3: "):
        train(job)


def _interrupt_at(step: int) -> Any:
    def logged(at: int, _values: Point) -> None:
        if at == step:
            raise KeyboardInterrupt

    return logged


# Several workers


@dataclass
class Board:
    """Where workers that run in a thread each show one another what they have."""

    size: int
    shown: list[Any] = field(init=False)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.shown, self.barrier = [None] * self.size, threading.Barrier(self.size, timeout=60)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.shown[rank] = value
        self.barrier.wait()
        found = list(self.shown)
        self.barrier.wait()  # nobody shows anything new before all have looked
        return found


@dataclass(frozen=True, kw_only=True)
class Threads(Group):
    board: Board

    def average(self, tensors: list[Tensor]) -> None:
        shown = self.board.gather(self.rank, [tensor.clone() for tensor in tensors])
        for tensor, *parts in zip(tensors, *shown, strict=True):
            tensor.copy_(torch.stack(parts).mean(0))

    def first(self, found: Exception | None) -> Exception | None:
        return next(filter(None, self.board.gather(self.rank, found)), None)

    def wait(self) -> None:
        self.board.gather(self.rank, None)


def test_all_workers_stop_at_the_same_step_with_the_same_words(tmp_path: Path):
    """Only the first one watches."""
    job, board = job_in(tmp_path, LOOKS_AT_NOTHING, PATIENCE), Board(2)
    trainers = [StageTrainer(job, Threads(rank=rank, size=2, board=board), Watch()) for rank in range(2)]

    def run(trainer: StageTrainer) -> str:
        torch.set_num_threads(1)
        with pytest.raises(Collapsed) as caught:
            trainer.run()
        return str(caught.value)

    with ThreadPoolExecutor(2) as threads:
        said = list(threads.map(run, trainers))
    assert said[0] == said[1] and "stopped at step 3" in said[0]
    assert [trainer.state.step for trainer in trainers] == [3, 3]
    assert trainers[1].probe is None and trainers[1].best is None
