"""Sweeps: what a trial is, how it goes on, who is told of it, and how its result is judged."""

import dataclasses
import io
import json
import math
import os
import signal
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from rich.console import Console
from scipy import stats

from pipelines.artifacts import read_json, write_json
from pipelines.recipe import Recipe, load
from pipelines.tuning import samplers, schedulers
from pipelines.tuning import search as searching
from pipelines.tuning.attempt import perform
from pipelines.tuning.config import SearchConfig
from pipelines.tuning.importance import importances
from pipelines.tuning.results import Candidate, Interval, candidates, finalists, judged
from pipelines.tuning.samplers import words
from pipelines.tuning.search import Stopped
from pipelines.tuning.sharing import prepare
from pipelines.tuning.spaces import find_space
from pipelines.tuning.sweep import Sweep, SweepConfig
from pipelines.tuning.sweep_report import SweepReport, costs_of
from pipelines.tuning.times import Times
from pipelines.tuning.training import TrialRun
from pipelines.tuning.trial import Trial, TrialFile, stored, stored_trials
from pipelines.tuning.work import METRICS, Work
from tests.pipelines.tiny import UNTRACKED, hdistill, tiny_recipe, tree, write_recipe
from tune_spaces.space import Choice, Integer, Space, Uniform

BATCH = "stages.sfd_2.batch_size"
RATE = "stages.sfd_2.optimizers.student.learning_rate"
WEIGHT = Uniform(low=1e-4, high=1e-2, log=True)


def space_of(**parameters: Any) -> Space:
    return Space(stage="sfd_2", parameters=parameters or {RATE: WEIGHT}, changes=dict, baselines={"hand-set": {}})


def work_of(folder: Path, *settings: str, **known: Any) -> Work:
    folder.mkdir(exist_ok=True)
    recipe = tiny_recipe(folder, "track.enabled=false", "stages.sfd_2.checkpoint_every=1", *settings)
    told: dict[str, Any] = {"space": space_of(), "num_samples": 50, "rungs": 4, **known}
    return Work(sweep=folder / "sweep", recipe=recipe, **told)


def trial_of(work: Work, rate: float = 1e-3, **known: Any) -> Trial:
    told: dict[str, Any] = {"kind": "search", "values": {RATE: rate}, "changes": {RATE: rate}, **known}
    return Trial(**{"seed": work.recipe.seed, **told})


class Ears:
    """Hears points, and stops the trial after some."""

    def __init__(self, until: int = 99, error: type[Exception] = Stopped) -> None:
        self.points: list[tuple[int, float]] = []
        self._until, self._error = until, error

    def __call__(self, step: int, score: float) -> None:
        self.points.append((step, score))
        if len(self.points) >= self._until:
            raise self._error


# One trial


def test_a_trial_is_trained_scored_and_told_in_order(tmp_path: Path):
    work, ears = work_of(tmp_path), Ears()
    trial = perform(work, trial_of(work), ears)
    assert trial.state == "done" and trial.lives == 1 and trial.seconds > 0
    assert [step for step, _ in ears.points] == [1, 2, 3, 4] == [int(step) for step, _ in trial.points]
    assert trial.score == ears.points[-1][1] == pytest.approx(trial.points[-1][1])
    assert all(0 < score < 1000 for _, score in ears.points)


def test_a_trial_leaves_nothing_of_its_data_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[weakref.ref[TrialRun]] = []
    monkeypatch.setattr(TrialRun, "points", lambda run: made.append(weakref.ref(run)) or [[1, 2.0]])
    perform(work_of(tmp_path), trial_of(work_of(tmp_path)), Ears())
    assert made and not any(run() for run in made)


def test_a_finished_trial_is_only_read(tmp_path: Path):
    work = work_of(tmp_path)
    first = perform(work, trial_of(work), Ears())
    before, again = tree(work.sweep), Ears()
    assert perform(work, trial_of(work), again) == first
    assert again.points == [(4, first.score)]
    assert tree(work.sweep) == before


def test_a_killed_trial_goes_on_and_ends_as_if_nothing_had_been(tmp_path: Path):
    work = work_of(tmp_path)
    whole = perform(dataclasses.replace(work, sweep=tmp_path / "other"), trial_of(work), Ears())
    with pytest.raises(OSError):
        perform(work, trial_of(work), Ears(2, OSError))
    left = TrialFile(work.sweep, trial_of(work)).trial
    assert left.state == "running" and len(left.points) == 2
    ears = Ears()
    trial = perform(work, trial_of(work), ears)
    assert trial.points == whole.points and trial.lives == 2
    assert [step for step, _ in ears.points] == [1, 2, 3, 4]  # who listens is told all of it
    weights = [
        folder / "trials" / trial.key / "stages" / "sfd_2" / "stage.json" for folder in (work.sweep, tmp_path / "other")
    ]
    assert len({read_json(path)["sha256"] for path in weights}) == 1


def test_a_trial_of_its_own_fault_fails_and_is_told_as_the_worst(tmp_path: Path):
    work, ears = work_of(tmp_path), Ears()
    trial = perform(work, trial_of(work, changes={BATCH: 1000}), ears)
    assert trial.state == "failed" and "precompute.num_samples" in trial.mistake and trial.score is None
    assert ears.points == [(4, math.inf)]


@pytest.fixture(scope="module")
def by_seed(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[float]]]:
    """The points of one setting at two seeds, each trained by itself."""
    work = work_of(tmp_path_factory.mktemp("by_seed"), rungs=2)
    return [perform(work, trial_of(work, seed=seed), Ears()).points for seed in (3, 1_000_003)]


@pytest.mark.parametrize("killed_after", [0, 1])
def test_a_score_may_be_the_mean_of_several_trainings(tmp_path: Path, by_seed: list[Any], killed_after: int):
    work = work_of(tmp_path, rungs=2, score_seeds=2)
    if killed_after:
        with pytest.raises(OSError):
            perform(work, trial_of(work), Ears(killed_after, OSError))
    ears = Ears()
    trial = perform(work, trial_of(work), ears)
    means = [[step, (score + other) / 2] for (step, score), (_, other) in zip(*by_seed, strict=True)]
    assert trial.points == [pytest.approx(point) for point in means] and trial.lives == 1 + bool(killed_after)
    assert [list(point) for point in ears.points] == trial.points and by_seed[0] != by_seed[1]
    assert len(list((work.sweep / "shared").iterdir())) == 2
    final = perform(work, trial_of(work, kind="final", seed=4), Ears())
    assert final.row and not list((work.sweep / "trials" / final.key).glob("seed-*"))


def test_a_score_that_is_never_reported_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METRICS, "probe/nothing", "min")
    work = work_of(tmp_path, metric="probe/nothing")
    trial = perform(work, trial_of(work), Ears())
    assert trial.state == "failed" and "probe/nothing was never reported by stage sfd_2" in trial.mistake


def test_trials_share_what_comes_before_and_only_that(tmp_path: Path):
    work = work_of(tmp_path)
    recipes = [work.trial_recipe({RATE: rate}, 3, final=False) for rate in (1e-3, 2e-3)]
    assert work.shared_folder(recipes[0]) == work.shared_folder(recipes[1])
    for changes, seed in (({"precompute.intervals": 8}, 3), ({}, 4)):
        assert work.shared_folder(work.trial_recipe(changes, seed, final=False)) != work.shared_folder(recipes[0])
    later = dataclasses.replace(work, space=dataclasses.replace(work.space, stage="refine"))
    sketch, refine = ({f"stages.{stage}.num_steps": 3} for stage in ("sketch", "refine"))
    made = [later.shared_folder(later.trial_recipe(one, 3, final=False)) for one in ({}, refine, sketch)]
    assert made[0] == made[1] != made[2]


def test_what_is_shared_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    work = dataclasses.replace(work_of(tmp_path), space=dataclasses.replace(space_of(), stage="refine"))
    changes = [{"stages.refine.objective.update_ratio": ratio} for ratio in (1, 2)]
    first = perform(work, trial_of(work, values={}, changes=changes[0]), Ears())
    (shared,) = (work.sweep / "shared").iterdir()
    assert (shared / "stages" / "sketch" / "student.safetensors").is_file() and (shared / "trajectories").is_dir()
    before = tree(shared)
    monkeypatch.setattr("pipelines.tuning.sharing._make_shared", None)
    second = perform(work, trial_of(work, values={}, changes=changes[1]), Ears())
    assert tree(shared) == before and second.score != first.score
    assert not (work.sweep / "trials" / first.key / "trajectories").exists()


def test_a_trial_with_trajectories_of_its_own_shares_nothing_and_leaves_none(tmp_path: Path):
    space = dataclasses.replace(space_of(), alone=lambda values: values[RATE] > 1e-3)
    work = work_of(tmp_path, space=space)
    intervals = {"precompute.intervals": 2}
    trial = perform(work, trial_of(work, 2e-3, changes={RATE: 2e-3, **intervals}), Ears())
    assert trial.state == "done" and not (work.sweep / "shared").exists()
    assert not list((work.sweep / "trials").rglob("*.parquet"))
    shared = perform(work, trial_of(work, 1e-3, changes={RATE: 1e-3, **intervals}), Ears())
    assert shared.state == "done" and list((work.sweep / "shared").rglob("*.parquet"))


def test_what_sharing_saves_is_counted_by_what_is_shared(tmp_path: Path):
    space = dataclasses.replace(space_of(), alone=lambda values: values[RATE] > 1e-2)
    work = work_of(tmp_path, space=space)
    rates = (1e-3, 2e-3, 3e-3, 2e-2)
    trials = [ended(work, rate, 1.0) for rate in rates] + [
        trial_of(work, 1e-3, kind="final", seed=seed) for seed in (4, 4, 5)
    ]
    for seed, seconds in ((3, 10.0), (4, 100.0), (5, 1000.0)):
        folder = work.shared_folder(work.trial_recipe({}, seed, final=seed != 3))
        write_json(folder / "ready.json", {"seconds": seconds})
    broken = trial_of(work, changes={BATCH: 1000}, state="failed")
    costs = costs_of(work, {"trials": 5.0, "sessions": 1}, [*trials, broken], 2)
    assert costs["saved"] == 2 * 10 + 100 and costs["shared"] == 1110


def test_a_shared_file_that_was_damaged_is_made_again_by_the_next_session(tmp_path: Path):
    work = work_of(tmp_path, "precompute.num_actors=0")
    recipe, console = work.trial_recipe({}, 3, final=False), Console(quiet=True)
    folder = work.shared_folder(recipe)
    shared = prepare(work, recipe, console, folder)
    shard = next((shared / "trajectories").glob("*.parquet"))
    before = shard.read_bytes()
    shard.write_bytes(b"torn")
    prepare(work, recipe, console, folder)
    assert shard.read_bytes() == b"torn"  # a trial trusts what is ready
    prepare(work, recipe, console, folder, check=True)
    assert shard.read_bytes() == before


def test_processes_that_die_again_and_again_end_the_command_and_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def dying(work: Work, trials: list[Trial], _rooms: object, done: Any) -> None:
        done(TrialFile(work.sweep, trials[0]).write(mistake="its process died 4 times; the last time: memory"))

    monkeypatch.setattr("pipelines.tuning.sweep.perform_all", dying)
    monkeypatch.setattr("pipelines.tuning.sweep.Rooms", lambda *_: None)
    recipe = write_recipe(tmp_path)
    command = ("tune", "dmd_balance", recipe, "--run-dir", tmp_path / "sweep", *UNTRACKED, "--samples", 50)
    result = hdistill(*command, "--set", "precompute.num_actors=0")
    assert result.exit_code == 1 and "died 4 times; the last time: memory. All that has ended is kept" in result.output
    assert [one.state for one in stored_trials(tmp_path / "sweep")] == ["running"]


def test_a_final_trial_is_measured_on_held_out_images_at_its_own_seed(tmp_path: Path):
    work = work_of(tmp_path)
    trials = [perform(work, trial_of(work, kind="final", seed=seed), Ears(1)) for seed in (4, 5)]
    assert all(trial.state == "done" and trial.row and not trial.points for trial in trials)
    rows = [trial.row or {} for trial in trials]
    assert [row["nfe"] for row in rows] == [2, 2] and rows[0]["fid"] != rows[1]["fid"]
    assert rows[0]["num_samples"] == 200 and len({trial.key for trial in trials}) == 2


def test_a_score_needs_a_training(tmp_path: Path):
    with pytest.raises(ValueError, match="at least 1 training behind it; given 0"):
        work_of(tmp_path, score_seeds=0)


def test_only_probes_may_score(tmp_path: Path):
    with pytest.raises(ValueError, match="cannot be scored by 'loss': choose one of probe/fid, probe/diversity"):
        work_of(tmp_path, metric="loss")


# Spaces


def test_a_space_of_ones_own(tmp_path: Path):
    recipe = tiny_recipe(tmp_path)
    (tmp_path / "own.yaml").write_text(
        f"stage: sfd_2\nparameters:\n  {RATE}: {{low: 0.001, high: 0.1, log: true}}\n"
        f"  {BATCH}: {{low: 4, high: 16, whole: true}}\n  stages.sfd_2.student.kind: {{values: [full, lora]}}\n"
    )
    space = find_space(str(tmp_path / "own.yaml"), recipe, "")
    assert space.stage == "sfd_2" and list(space.baselines) == ["hand-set"]
    assert space.parameters == {
        RATE: Uniform(low=0.001, high=0.1, log=True),
        BATCH: Integer(low=4, high=16),
        "stages.sfd_2.student.kind": Choice(values=["full", "lora"]),
    }
    rate = recipe.stages["sfd_2"].optimizers.student.learning_rate
    assert space.in_parameters({}) == {RATE: rate, BATCH: 16, "stages.sfd_2.student.kind": "full"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "parameters: {stages.sfd_4.batch: {low: 1, high: 2}}",
            r"does not fit the recipe: unknown key 'stages.sfd_4.batch'",
        ),
        (
            "parameters: {stages.sfd_2.batch_size: {low: 1, high: 2}}",
            "unknown key 'sfd_2'.*Keys of stages: sfd_4 .what does not lead to the stage that is scored is left out",
        ),
        ("parameters: {seed: {low: 2, high: 1}}", "seed: a range needs low below high"),
        ("parameters: {seed: 3}", "seed must be {low: NUMBER, high: NUMBER}.*given 3"),
        ("parameters: {seed: {low: a, high: b}}", "seed: could not convert"),
        ("parameters: {}", "holds stage and parameters"),
        ("stage: sfd_3\nparameters: {seed: {low: 1, high: 2}}", "there is no stage 'sfd_3' .did you mean"),
        ("[1]", "must hold a mapping"),
    ],
)
def test_mistakes_in_a_space_file(tmp_path: Path, text: str, message: str):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        find_space(str(tmp_path / "own.yaml"), tiny_recipe(tmp_path), "")


def test_an_unknown_space_names_the_nearest(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"unknown space 'sfd_schedul' .did you mean 'sfd_schedule'.*Known: awd_weighting"
    ):
        find_space("sfd_schedul", tiny_recipe(tmp_path), "")
    with pytest.raises(ValueError, match=r"space file .*none.yaml does not exist"):
        find_space(str(tmp_path / "none.yaml"), tiny_recipe(tmp_path), "")


# Sampler and scheduler


def test_choices_travel_through_optuna(tmp_path: Path):
    choice = Choice(values=[[1, 3], None, True, 1, "last"])
    work = work_of(tmp_path, space=space_of(a=choice, b=WEIGHT, c=Integer(low=1, high=3)))
    for value in choice.values:
        told = words(work, {"a": value, "b": 0.001, "c": 2})
        assert samplers.drawn(work, told) == {"a": value, "b": 0.001, "c": 2}
        assert type(samplers.drawn(work, told)["a"]) is type(value)


def ended(work: Work, rate: float, *scores: float, state: Any = "done") -> Trial:
    return trial_of(work, rate, state=state, points=[[step + 1, score] for step, score in enumerate(scores)])


def test_a_search_that_goes_on_begins_with_what_was_interrupted_and_knows_what_has_ended(tmp_path: Path):
    work = work_of(tmp_path)
    over = [ended(work, 10 ** -(2 + number / 10), 5.0 + number) for number in range(5)]
    left = [trial_of(work, 3e-3), trial_of(work, 4e-3)]
    searcher = samplers.make_searcher(work, SearchConfig(seed=3), left, over)
    assert [searcher.suggest(name)[RATE] for name in "ab"] == [3e-3, 4e-3]
    known = [one for one in searcher._ot_study.trials if one.state.is_finished()]
    assert [(one.params[RATE], one.value) for one in known] == [(one.values[RATE], one.score) for one in over]
    fresh = samplers.make_searcher(work, SearchConfig(seed=3), [], [])
    assert searcher.suggest("c")[RATE] != fresh.suggest("a")[RATE]  # it does not draw its first ones again


def test_a_search_learns_from_baselines_that_its_parameters_can_say(tmp_path: Path):
    work = work_of(tmp_path)
    scored = [ended(work, 10 ** -(2 + number / 10), 5.0 + number) for number in range(2)]
    said = [dataclasses.replace(one, kind="baseline") for one in scored]
    unsaid = dataclasses.replace(said[0], values={"places": [0, 1]})
    failed = dataclasses.replace(said[0], state="failed")
    chance = dataclasses.replace(said[0], kind="random")
    told = searching.baselines_as_draws(work, [*said, unsaid, failed, chance])
    assert told == said
    searcher = samplers.make_searcher(work, SearchConfig(seed=3), [], [ended(work, 1e-3, 4.0)], told)
    assert [one.value for one in searcher._ot_study.trials] == [5.0, 6.0, 4.0]


def test_a_search_by_tpe_finds_what_is_good(tmp_path: Path):
    work = work_of(tmp_path)
    searcher = samplers.make_searcher(work, SearchConfig(seed=0), [], [])
    drawn: list[float] = []
    for number in range(40):
        rate = searcher.suggest(str(number))[RATE]
        drawn.append(rate)
        searcher.on_trial_complete(str(number), {"score": abs(math.log10(rate) + 3.2)})
    assert np.mean([abs(math.log10(rate) + 3.2) for rate in drawn[-10:]]) < 0.25
    assert np.mean([abs(math.log10(rate) + 3.2) for rate in drawn[:10]]) > 0.4


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_a_scheduler_that_is_told_anew_decides_as_one_that_has_seen_all(tmp_path: Path, scheduler: Any):
    work, config = work_of(tmp_path), SearchConfig(scheduler=scheduler)
    over = [
        ended(work, 1e-3 + number / 1e4, 9.0 - number, 8.0 - number, 7.0 - number, 6.0 - number) for number in range(6)
    ]
    told, fresh = schedulers.make_scheduler(work, config, over), schedulers.make_scheduler(work, config, [])
    for name, score, expected in (("bad", 30.0, "STOP"), ("good", 0.1, "CONTINUE")):
        assert decision(told, name, score) == expected
    assert decision(fresh, "bad", 30.0) == "CONTINUE"


def trial_named(key: str) -> Any:
    return type("Named", (), {"key": key})()


def decision(scheduler: Any, name: str, score: float) -> str:
    trial = schedulers._Ended(trial_named(name))
    others = schedulers._NoOthers()
    scheduler.on_trial_add(others, trial)
    return scheduler.on_trial_result(
        others, trial, {"step": 1, "score": score, "training_iteration": 1, "time_total_s": 1}
    )


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"slots": 0}, "at least one trial must run at a time; given 0"),
        ({"num_trials": -1}, "must not be negative"),
        ({"cpus": 0}, "cpus positive"),
    ],
)
def test_mistakes_in_a_search(known: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        SearchConfig(**known)


# Judging


def test_an_interval_over_seeds_is_students():
    values = [3.1, 3.4, 2.9, 3.3]
    low, high = stats.ttest_1samp(values, 0).confidence_interval()
    found = Interval.of(values)
    assert found.mean == pytest.approx(np.mean(values)) and found.half == pytest.approx((high - low) / 2)
    assert Interval.of([2.0]) == Interval(mean=2.0, half=None) and Interval.of([2.0]).is_zero
    assert not found.is_zero and Interval.of([-1.0, 1.2]).is_zero
    with pytest.raises(ValueError):
        Interval.of([])


def test_finalists_are_compared_with_the_recipe_seed_by_seed(tmp_path: Path):
    work = work_of(tmp_path)

    def at(name: str, kind: str, fids: dict[int, float], **changes: Any) -> tuple[Candidate, list[Trial]]:
        known = {"changes": changes, "state": "done"}
        found = trial_of(work, kind=kind, points=[[4, 7.0]], **known)
        finals = [
            trial_of(work, kind="final", seed=seed, row={"fid": fid, "nfe": 2}, **known) for seed, fid in fids.items()
        ]
        return Candidate(name=name, trial=found), finals

    found = judged(
        [
            at("hand-set = equal", "baseline", {1: 4.0, 2: 5.0, 3: 6.0}),
            at("search, best", "search", {1: 3.8, 2: 4.7, 3: 5.8}, a=1),
            at("other", "baseline", {1: 9.0, 2: 9.0}, a=2),
            at("failed", "search", {}, a=3),
        ]
    )
    assert [one.name for one in found] == ["search, best", "hand-set = equal", "other"]
    assert [one.kind for one in found] == ["search", "baseline", "baseline"]
    best, own, _ = found
    assert best.changes == {"a": 1} and best.at_search == 7.0
    assert own.against is None and best.against and best.against.mean == pytest.approx(-0.7 / 3)
    differences = [-0.2, -0.3, -0.2]
    assert (
        best.against.half == pytest.approx(stats.sem(differences) * stats.t.ppf(0.975, 2)) and not best.against.is_zero
    )
    assert best.score.half and best.score.half > 2  # the spread of seeds alone would have hidden it


@pytest.mark.parametrize(
    ("first", "own", "sentence"),
    [
        ({1: 3.0, 2: 3.9, 3: 5.0}, {1: 4.0, 2: 5.0, 3: 6.0}, "a gain beyond the spread of seeds"),
        ({1: 3.0, 2: 5.1, 3: 5.0}, {1: 4.0, 2: 5.0, 3: 6.0}, "cannot be told from no gain"),
        ({1: 3.0}, {1: 4.0}, "One seed says nothing about another"),
        ({1: 5.0, 2: 5.0}, {1: 4.0, 2: 4.1}, "Nothing that was tried is better"),
        ({1: 5.0, 2: 5.0}, {}, "not compared with the recipe as it is"),
    ],
)
def test_a_sweep_says_what_it_may(tmp_path: Path, first: dict[int, float], own: dict[int, float], sentence: str):
    work = work_of(tmp_path)
    searched = ended(work, 2e-3, 3.0)
    base = trial_of(work, kind="baseline", name="hand-set", values={}, changes={}, state="done", points=[[4, 4.0]])

    def at(trial: Trial, fids: dict[int, float]) -> list[Trial]:
        final = dataclasses.replace(trial, kind="final", points=[])
        return [dataclasses.replace(final, seed=seed, row={"fid": fid, "nfe": 2}) for seed, fid in fids.items()]

    finals = [
        (Candidate(name="hand-set", trial=base), at(base, own)),
        (Candidate(name="search, best", trial=searched), at(searched, first)),
    ]
    costs: dict[str, float] = dict.fromkeys(("wall", "work", "slots", "ideal", "shared", "saved"), 1.0)
    report = SweepReport.of(work, "own", [base, searched], [base], finals, costs)
    lineage = report.lineage(tmp_path, work.recipe).replace("\n# ", " ")
    assert sentence in " ".join(report.verdict()) and sentence in lineage and "Left out" not in lineage
    best = base if own and np.mean(list(own.values())) < np.mean(list(first.values())) else searched
    assert report.winner.changes == best.changes and report.winner.trial == best.key


def test_finalists_are_all_baselines_and_the_best_that_were_trained_to_their_end(tmp_path: Path):
    work = work_of(tmp_path)
    base = trial_of(work, 1.0, kind="baseline", name="hand-set", state="done", points=[[4, 9.0]])
    same = dataclasses.replace(base, name="equal")
    drawn = [ended(work, 1e-3 * (number + 1), 5.0 - number) for number in range(4)]
    early = ended(work, 9e-3, 0.1, state="stopped")
    chance = dataclasses.replace(ended(work, 8e-3, 2.5), kind="random")
    found = finalists(candidates([base, *drawn, early, chance], [base, same]), "min", 2)
    assert [one.name for one in found] == ["hand-set = equal", "search, best", "search, 2nd", "random, best"]
    assert [one.trial.score for one in found] == [9.0, 2.0, 3.0, 2.5]
    worst = finalists([Candidate(name="x", trial=one) for one in drawn], "max", 1)
    assert [one.trial.score for one in worst] == [5.0]


def test_importance_finds_the_parameter_that_matters(tmp_path: Path):
    parameters = {
        "matters": Uniform(low=0, high=1),
        "not": Uniform(low=0, high=1),
        "layers": Choice(values=[[1], [1, 3]]),
    }
    work = work_of(tmp_path, space=space_of(**parameters))
    trials = []
    for number in range(30):
        values = work.space.draw(str(number))
        score = 10 * values["matters"] + 0.1 * values["not"]
        trials.append(trial_of(work, values=values, changes=values, state="done", points=[[4, score]]))
    found = importances(work, trials)
    assert next(iter(found)) == "matters" and found["matters"] > 0.8 and sum(found.values()) == pytest.approx(1)
    assert importances(work, trials[:4]) == {}


# Whole sweeps, on Ray


TUNE = ("--samples", 50, "--seeds", 1, "--finalists", 1, "--slots", 2)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_from_end_to_end_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    recipe, folder = write_recipe(tmp_path), tmp_path / "runs" / "sweep"
    command = ("tune", "dmd_balance", recipe, "--run-dir", folder, *TUNE, "--scheduler", "asha", "--random", 1)
    result = hdistill(*command, "--trials", 3)
    assert result.exit_code == 0, result.output
    trials = stored_trials(folder)
    kinds = {kind: sum(one.kind == kind for one in trials) for kind in ("baseline", "search", "random", "final")}
    assert kinds["baseline"] == 1 and kinds["search"] == 3 and kinds["random"] == 1 and kinds["final"] in (2, 3)
    assert all(one.state in ("done", "stopped") and one.lives == 1 for one in trials)
    assert len(list((folder / "shared").iterdir())) == 2  # of the search, and of the finalists' one seed
    found = json.loads((folder / "sweep_report.json").read_text())
    winner = load(str(folder / "winner.yaml"))
    assert winner.seed == 3 and list(winner.stages) == ["sketch", "refine", "sfd_2", "sfd_4"]
    for key, value in found["winner"]["changes"].items():
        assert at(winner, key) == (tuple(value) if isinstance(value, list) else value)
    assert "# Found by `hdistill tune dmd_balance tiny`" in (folder / "winner.yaml").read_text()
    assert (folder / "sweep.html").stat().st_size > 50_000 and not list(folder.glob("ray-*"))

    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'tiny'")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1 and len(runs) == 1 + len(trials)
    by_key = {run.data.tags["trial"]: run for run in runs if "trial" in run.data.tags}
    for trial in (one for one in trials if one.kind != "final"):
        run = by_key[trial.key]
        assert run.data.metrics["score"] == pytest.approx(trial.score) and run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id

    before = {one.key: one for one in trials}
    again = hdistill(*command, "--trials", 3)
    assert again.exit_code == 0 and {one.key: one for one in stored_trials(folder)} == before
    more = hdistill(*command, "--trials", 4)
    assert more.exit_code == 0, more.output
    after = {one.key: one for one in stored_trials(folder)}
    assert sum(one.kind == "search" for one in after.values()) == 4
    assert {key: after[key] for key in before} == before
    assert len(client.search_runs([experiment.experiment_id])) == 1 + len(after)

    other = hdistill(
        "tune",
        "awd_weighting",
        recipe,
        "--run-dir",
        folder,
        *TUNE,
        "--set",
        "stages.refine.objective.adversarial.weight=0.1",
    )
    assert (
        other.exit_code == 2
        and "was made from other inputs" in other.output
        and "space: dmd_balance there" in other.output
    )


def at(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_schedules_are_compared_with_those_that_are_programmed(tmp_path: Path):
    recipe, folder = write_recipe(tmp_path), tmp_path / "sweep"
    command = ("tune", "sfd_schedule", recipe, "--run-dir", folder, *UNTRACKED, "--trials", 1, *TUNE)
    result = hdistill(
        *command,
        "--set",
        "precompute.intervals=2",
        "--stage",
        "sfd_2",
        "--set",
        "stages.sfd_4.objective={name: mean_velocity}",
    )
    assert result.exit_code == 0, result.output
    names = {one.name for one in stored_trials(folder) if one.kind == "baseline"}
    called = " ".join(one["name"] for one in json.loads((folder / "sweep_report.json").read_text())["finalists"])
    assert "hand-set" in names
    for name in ("equal steps of t", "polynomial, rho 7", "log-SNR", "arctan", "GITS, gamma 1.15", "OSS"):
        assert name in called
    assert load(str(folder / "winner.yaml")).stages["sfd_2"].objective.name == "sfd"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_trial_whose_process_dies_goes_on(tmp_path: Path):
    driver, mark, sweep = os.getpid(), tmp_path / "killed", tmp_path / "sweep"

    def kill_at_the_second_point() -> None:
        while not any(len(json.loads(file.read_text())["points"]) > 1 for file in sweep.glob("trials/*/trial.json")):
            time.sleep(0.005)
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def changes(values: Any) -> dict[str, Any]:
        if os.getpid() != driver and not mark.exists():
            threading.Thread(target=kill_at_the_second_point, daemon=True).start()
        return dict(values)

    space = dataclasses.replace(space_of(), changes=changes)
    work, told = work_of(tmp_path, "stages.sfd_2.num_steps=12", space=space, rungs=12), list[Trial]()
    recipe = work.trial_recipe({}, 3, final=False)
    prepare(work, recipe, Console(quiet=True), work.shared_folder(recipe))
    config = SearchConfig(slots=1, num_trials=1)
    searching.search(work, config, [], searching.Rooms(config, work), told.append)
    (trial,) = told
    assert mark.exists() and trial.state == "done" and trial.lives == 2
    assert [int(step) for step, _ in trial.points] == list(range(1, 13))
    assert stored(work.sweep / "trials" / trial.key) == trial


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_trials_may_train_in_workers_of_their_own(tmp_path: Path):
    work, told = work_of(tmp_path, "train.num_workers=1", rungs=2), list[Trial]()
    rooms = searching.Rooms(SearchConfig(), work)
    assert rooms.nested and rooms.slots == 1  # 4 CPUs, one of them free, and 2 for each trial
    searching.perform_all(work, [trial_of(work)], rooms, told.append)
    (trial,) = told
    assert trial.state == "done" and [int(step) for step, _ in trial.points] == [2, 4], trial.mistake
    here = perform(work_of(tmp_path / "here", rungs=2), trial_of(work), Ears())
    assert trial.points == [pytest.approx(point, rel=1e-4) for point in here.points]


def test_a_draw_that_was_drawn_before_is_not_counted_again(tmp_path: Path):
    work, said = work_of(tmp_path), io.StringIO()
    sweep = Sweep(work, "own", SweepConfig(), Console(file=said, width=200))
    sweep._times = Times(work.sweep)
    before, new = ended(work, 1e-3, 5.0), ended(work, 2e-3, 4.0)
    TrialFile(work.sweep, before).write(state="done")
    counts: list[int] = []
    done = sweep._watcher("search", 3, counts.append, 1)
    for trial in (before, new, new):
        done(trial)
    assert counts == [2] and said.getvalue().splitlines() == [f"  search 2/3  {new.key}  score 4, 0 s   best 4"]


def test_more_slots_than_there_is_room_for_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(searching, "ensure_ray", lambda **_: None)
    monkeypatch.setattr(searching, "room_for", lambda **_: 2)
    assert searching.Rooms(SearchConfig(), work_of(tmp_path)).slots == 2
    assert searching.Rooms(SearchConfig(num_trials=1), work_of(tmp_path)).slots == 1
    with pytest.raises(ValueError, match="5 trials of 1 CPUs and 0 GPUs do not fit side by side: there is room for 2"):
        searching.Rooms(SearchConfig(slots=5), work_of(tmp_path))


def test_negative_numbers_are_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        SweepConfig(num_seeds=-1)
