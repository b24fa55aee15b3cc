"""Population-based training: who is copied, what a copy is, and that an interrupted one goes on to the same end."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from rich.console import Console

from pipelines.artifacts import read_json, write_json
from pipelines.recipe import load, override
from pipelines.tuning import sweep as sweeping
from pipelines.tuning.attempt import perform
from pipelines.tuning.config import SearchConfig
from pipelines.tuning.importance import study_of
from pipelines.tuning.population import Population, settle
from pipelines.tuning.sharing import shared_with
from pipelines.tuning.spaces import find_space
from pipelines.tuning.sweep import Sweep, SweepConfig
from pipelines.tuning.sweep_report import SweepReport
from pipelines.tuning.trial import Trial, TrialFile, stored_trials, trial_folder
from pipelines.tuning.work import Work
from tests.pipelines.tiny import UNTRACKED, hdistill, tiny_recipe, tree, write_recipe
from tune_spaces.space import Choice, Integer, Space, Uniform

RATE, MOVES, WIDTH = "optimizers.student.learning_rate", "objective.update_ratio", "discriminator.width"
START = "stages.refine."
LATER = "stages.refine.later"
PARAMETERS = {
    RATE: Uniform(low=1e-4, high=1e-2, log=True),
    MOVES: Integer(low=1, high=4),
    WIDTH: Choice(values=[16, 32]),
}


def space_of(**parameters: Any) -> Space:
    return Space(
        stage="refine",
        parameters=parameters or PARAMETERS,
        changes=lambda values: {START + key: value for key, value in values.items()},
        baselines={"hand-set": {}},
    )


def work_of(folder: Path, *settings: str, **known: Any) -> Work:
    folder.mkdir(exist_ok=True)
    small = ("track.enabled=false", "precompute.num_actors=0", "stages.refine.num_steps=8")
    recipe = tiny_recipe(folder, *small, *settings)
    told: dict[str, Any] = {"space": space_of(), "num_samples": 50, "rungs": 4, "pauses": True, **known}
    return Work(sweep=folder / "sweep", recipe=recipe, **told)


def scored(work: Work, *scores: float | None, at: int = 2) -> list[Trial]:
    """Trials of a population, of which those without a score have failed."""
    drawn = Population(work, len(scores), 0).first()
    return [
        replace(one, points=[] if score is None else [[at, score]], state="failed" if score is None else "paused")
        for one, score in zip(drawn, scores, strict=True)
    ]


# Who is copied


def test_the_worst_quarter_goes_on_as_copies_of_the_best(tmp_path: Path):
    work = work_of(tmp_path)
    members = scored(work, 5.0, 1.0, 9.0, 4.0, 3.0, 2.0, 8.0, 7.0)
    found = Population(work, 8, 0).next(members, 2)
    assert [model is None for _, model in found] == [True, True, False, True, True, True, False, True]
    best = {members[1].key, members[5].key}
    for copy, model in (found[2], found[6]):
        assert (
            model and copy.parent == model.key and model.key in best and copy.since == 2 and copy.points == model.points
        )
        assert copy.values[WIDTH] == model.values[WIDTH], "what is built cannot change"
        moved = copy.changes[LATER]["2"]
        assert moved and set(moved) <= {RATE, MOVES}
        assert copy.changes == {**model.changes, LATER: {"2": moved}}
        assert {**model.values, **moved} == copy.values
    assert found == Population(work, 8, 0).next(members, 2) != Population(work, 8, 1).next(members, 2)


def test_the_highest_score_is_the_best_where_that_is_meant(tmp_path: Path):
    work = work_of(tmp_path, metric="probe/diversity")
    found = Population(work, 4, 0).next(scored(work, 5.0, 1.0, 9.0, 4.0), 2)
    assert [bool(model) for _, model in found] == [False, True, False, False]
    assert found[1][1] and found[1][1].points == [[2, 9.0]]


def test_one_that_failed_is_the_worst_and_is_never_copied(tmp_path: Path):
    work = work_of(tmp_path)
    found = Population(work, 4, 0).next(scored(work, 5.0, None, 9.0, 4.0), 2)
    assert [bool(model) for _, model in found] == [False, True, False, False]
    assert not any(model for _, model in Population(work, 2, 0).next(scored(work, None, None), 2))


def test_a_copy_of_a_copy_keeps_both_changes(tmp_path: Path):
    work = work_of(tmp_path)
    population = Population(work, 2, 0)
    members = scored(work, 1.0, 2.0)
    (first, _), (copy, model) = population.next(members, 2)
    assert model == first
    members = [
        replace(first, points=[[2, 1.0], [4, 2.0]]),
        replace(copy, points=[[2, 1.0], [4, 0.5]]),
    ]
    (again, parent), _ = population.next(members, 4)
    assert parent and parent.key == copy.key and list(again.changes[LATER]) == ["2", "4"]
    assert again.points == [[2, 1.0], [4, 0.5]]
    assert work.trial_recipe(again.changes, 3, final=True).stages["refine"].later.keys() == {2, 4}


def test_numbers_move_within_their_ranges_by_steps_or_anywhere(tmp_path: Path):
    parameters = {
        **PARAMETERS,
        "objective.tau_power": Uniform(low=0.5, high=1.5),
        "ema_decay": Choice(values=[0.5, 0.9, 0.99]),
    }
    work = work_of(tmp_path, space=space_of(**parameters))
    model = scored(work, 1.0, 2.0)[0]
    values = {**model.values, RATE: 1e-3, MOVES: 2, "objective.tau_power": 1.45, "ema_decay": 0.9}
    model = replace(model, values=values, changes=work.space.overrides(values))
    seen: dict[str, set[Any]] = {name: set() for name in parameters}
    for seed in range(110):
        copy, _ = Population(work, 2, seed).next([model, replace(model, points=[[2, 9.0]])], 2)[1]
        for name, value in copy.values.items():
            seen[name].add(value)
    assert seen[WIDTH] == {values[WIDTH]}
    assert {1, 2, 3, 4} == seen[MOVES] and seen["ema_decay"] == {0.5, 0.9, 0.99}
    near = [
        rate for rate in seen[RATE] if rate == pytest.approx(1e-3 * 100**0.1) or rate == pytest.approx(1e-3 * 100**-0.1)
    ]
    assert len(near) == 2 and len(seen[RATE]) > 20 and all(1e-4 <= rate <= 1e-2 for rate in seen[RATE])
    powers = seen["objective.tau_power"]
    assert max(powers) == 1.5 and min(powers) >= 0.5 and any(power == pytest.approx(1.35) for power in powers)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("awd_weighting", ["weight", "time_mean", "r1_weight"]),
        ("dmd_balance", ["student", "fake_score", "update_ratio"]),
        ("meanflow_sampler", ["equal_share", "full_part", "times.t_mean", "times.t_std", "power"]),
    ],
)
def test_numbers_that_may_change_while_a_stage_trains(tmp_path: Path, name: str, numbers: list[str]):
    recipe = load("digits", ["stages.sketch.objective={name: meanflow}"])
    work = Work(sweep=tmp_path, recipe=recipe, space=find_space(name, recipe, ""))
    assert Population(work, 4, 0).numbers == numbers


# What a copy is


def test_a_copy_has_the_weights_that_its_recipe_gives_from_the_start(tmp_path: Path):
    work, other = work_of(tmp_path), work_of(tmp_path / "other")
    members = [perform(work, one, lambda *_: None, 4) for one in Population(work, 2, 0).first()]
    assert [(one.state, len(one.points)) for one in members] == [("paused", 2)] * 2
    pairs = Population(work, 2, 0).next(members, 4)
    ((copy, model),) = [(one, model) for one, model in pairs if model]
    assert settle(work, copy, model).state == "paused" and not copy.is_over
    handed = list((trial_folder(work.sweep, copy) / "taken-over").iterdir())
    assert {file.suffix for file in handed} == {".json", ".jsonl", ".safetensors"}
    here = perform(work, copy, lambda *_: None)
    assert here.state == "done" and len(here.points) == 4 and not handed[0].parent.exists()
    alone = replace(copy, points=[], parent="", since=0)
    there = perform(other, alone, lambda *_: None)
    assert there.points == here.points
    hashes = [read_json(trial_folder(one.sweep, copy) / "stages/refine/stage.json")["sha256"] for one in (work, other)]
    assert hashes[0] == hashes[1]
    curves = [(trial_folder(one.sweep, copy) / "stages/refine/metrics.jsonl").read_text() for one in (work, other)]
    timeless = [[{**json.loads(line), "seconds": 0} for line in curve.splitlines()] for curve in curves]
    assert timeless[0] == timeless[1]


def copied(folder: Path) -> tuple[Work, Trial, Trial]:
    work = work_of(folder)
    members = [perform(work, one, lambda *_: None, 4) for one in Population(work, 2, 0).first()]
    ((copy, model),) = [(one, model) for one, model in Population(work, 2, 0).next(members, 4) if model]
    return work, copy, model


def test_a_checkpoint_that_is_gone_or_damaged_costs_time_alone(tmp_path: Path):
    work, copy, model = copied(tmp_path)
    for file in (trial_folder(work.sweep, model) / "stages/refine/checkpoints").iterdir():
        file.unlink()
    settle(work, copy, model)
    assert not (trial_folder(work.sweep, copy) / "taken-over").exists()
    trial = perform(work, copy, lambda *_: None)
    assert trial.state == "done" and trial.points[:2] == copy.points


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path):
    work, copy, model = copied(tmp_path)
    settle(work, copy, model)
    (about,) = (trial_folder(work.sweep, copy) / "taken-over").glob("*.json")
    known = read_json(about)
    write_json(about, {**known, "inputs": {**known["inputs"], "batch_size": 999}})
    trial = perform(work, copy, lambda *_: None)
    assert trial.state == "failed" and "batch_size: 999 there" in trial.mistake


def test_a_loser_is_stopped_and_a_copy_says_nothing_of_importance(tmp_path: Path):
    work = work_of(tmp_path)
    members = [replace(one, state="done") for one in scored(work, 1.0, 2.0)]
    copy = Population(work, 2, 0).next(members, 2)[1][0]
    assert len(study_of(work, [*members, replace(copy, state="done")]).trials) == 2


# Whole searches


Asked = list[tuple[int | None, int]]


def inline(patch: pytest.MonkeyPatch, dies_after: int = 0) -> Asked:
    """Have trials performed here, one after the other, until so many have been; what is asked for is kept."""
    asked, performed = Asked(), 0

    def perform_all(work: Work, trials: list[Trial], _rooms: object, done: Any, until: int | None = None) -> None:
        nonlocal performed
        asked.append((until, len(trials)))
        for trial in trials:
            done(perform(work, trial, lambda *_: None, until))
            performed += 1
            if performed == dies_after:
                raise KeyboardInterrupt

    patch.setattr(sweeping, "perform_all", perform_all)
    patch.setattr(sweeping, "Rooms", lambda *_: type("Rooms", (), {"slots": 1})())
    return asked


def sweep_of(work: Work, trials: int = 4) -> Sweep:
    search = SearchConfig(scheduler="pbt", num_trials=trials, seed=3)
    return Sweep(work, "own", SweepConfig(search=search, num_finalists=1, num_seeds=1), Console(quiet=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Work, SweepReport, Asked]:
    """A search that nothing has disturbed."""
    work = work_of(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        asked = inline(patch)
        return work, sweep_of(work).execute(), asked


def told(folder: Path) -> list[dict[str, Any]]:
    """What is known of the trials, without what is timed."""
    trials = [asdict(replace(one, seconds=0.0, ended=0.0, lives=0)) for one in stored_trials(folder)]
    for trial in trials:
        if trial["row"]:
            trial["row"] |= {"images_per_second": 0, "train_seconds": 0}
    return trials


def test_a_search_goes_from_rung_to_rung(whole: tuple[Work, SweepReport, Asked]):
    work, report, asked = whole
    assert [one for one in asked if one[0]] == [(2, 4), (4, 4), (6, 4), (8, 4)]
    searched = [one for one in stored_trials(work.sweep) if one.kind == "search"]
    assert sorted(one.state for one in searched) == ["done"] * 4 + ["stopped"] * 3
    assert sum(bool(one.parent) for one in searched) == 3
    by_key = {one.key: one for one in searched}
    for one in (one for one in searched if one.parent):
        assert one.points[0] == by_key[one.parent].points[0] and one.since in (2, 4, 6)
    winner = load(str(work.sweep / "winner.yaml"))
    assert winner == override(work.recipe, report.winner.changes)


def test_finalists_are_trained_with_all_that_changed_on_the_way(whole: tuple[Work, SweepReport, Asked]):
    """A copy's last draw alone would be another training than the one that was scored."""
    trials = stored_trials(whole[0].sweep)
    finals = [one.changes for one in trials if one.kind == "final" and one.name.startswith("search")]
    searched = [one for one in trials if one.kind == "search" and one.score is not None and one.state == "done"]
    best = min(searched, key=lambda one: one.score or 0.0)
    assert best.parent and finals == [best.changes]


def test_a_population_has_its_picture(whole: tuple[Work, SweepReport, Asked]):
    work = whole[0]
    assert "population" in {path.stem for path in (work.sweep / "figures").iterdir()}


def test_an_interrupted_search_goes_on_to_the_same_end(
    tmp_path: Path, whole: tuple[Work, SweepReport, Asked], monkeypatch: pytest.MonkeyPatch
):
    """In its first rung, in its second, and so on: each life dies after so many trainings more."""
    work = work_of(tmp_path)
    for after in (2, 4, 3, 5):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            inline(patch, dies_after=after)
            sweep_of(work).execute()
        assert told(work.sweep) != told(whole[0].sweep)
    inline(monkeypatch)
    sweep_of(work).execute()
    assert told(work.sweep) == told(whole[0].sweep)


def test_a_search_that_is_over_is_only_read(whole: tuple[Work, SweepReport, Asked], monkeypatch: pytest.MonkeyPatch):
    work, report, _ = whole
    before = {path: digest for path, digest in tree(work.sweep / "trials").items()}
    assert not inline(monkeypatch) and sweep_of(work).execute().winner == report.winner
    assert tree(work.sweep / "trials") == before


def test_a_population_of_which_nothing_is_scored_has_its_page_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The recipe as it is was trained, and is what the sweep proposes."""
    inline(monkeypatch)
    healthy = sweeping.perform_all

    def perform_all(work: Work, trials: list[Trial], rooms: Any, done: Any, until: int | None = None) -> None:
        if trials[0].kind != "search":
            return healthy(work, trials, rooms, done, until)
        for trial in trials:
            done(TrialFile(work.sweep, trial).write(state="failed", mistake="it burst"))

    monkeypatch.setattr(sweeping, "perform_all", perform_all)
    work = work_of(tmp_path, rungs=2)
    assert sweep_of(work).execute().winner.name == "hand-set"
    assert "it burst" in (work.sweep / "sweep.html").read_text()
    assert not (work.sweep / "figures" / "population.png").exists()


def test_what_a_store_missed_that_was_away_reaches_it_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is there at the start, dies between two rungs, and is back when the command is given again."""
    inline(monkeypatch)
    work = work_of(tmp_path, "track.enabled=true", rungs=2)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri := f"sqlite:///{tmp_path / 'mlflow.db'}")

    def dies(*_: object) -> None:
        raise OSError("the server is gone")

    def sweep() -> None:
        search = SearchConfig(scheduler="pbt", num_trials=2, seed=3)
        Sweep(work, "own", SweepConfig(search=search, num_finalists=0, num_seeds=0), Console(quiet=True)).execute()

    with monkeypatch.context() as patch:
        first = Population.next
        patch.setattr(
            Population,
            "next",
            lambda self, *given: patch.setattr("pipelines.tracking.MlflowTracker.points", dies) or first(self, *given),
        )
        sweep()
    assert (work.sweep / "tracking" / "pending.jsonl").stat().st_size > 0
    sweep()
    assert (work.sweep / "tracking" / "pending.jsonl").stat().st_size == 0
    client = MlflowClient(uri)
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    told = {run.data.tags["trial"]: run for run in runs if "trial" in run.data.tags}
    for trial in stored_trials(work.sweep):
        run = told.pop(trial.key)
        points = client.get_metric_history(run.info.run_id, "score")
        assert [(point.step, point.value) for point in points] == [(int(step), score) for step, score in trial.points]
        assert run.data.tags["state"] == trial.state
    assert not told


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_population_on_ray(tmp_path: Path):
    recipe, folder = write_recipe(tmp_path), tmp_path / "sweep"
    command = (
        "tune",
        "dmd_balance",
        recipe,
        "--run-dir",
        folder,
        *UNTRACKED,
        "--samples",
        50,
        "--seeds",
        1,
        "--slots",
        2,
    )
    result = hdistill(*command, "--scheduler", "pbt", "--trials", 2, "--rungs", 2, "--finalists", 1)
    assert result.exit_code == 0, result.output
    trials = [one for one in stored_trials(folder) if one.kind == "search"]
    assert sorted(one.state for one in trials) == ["done", "done", "stopped"]
    (copy,) = [one for one in trials if one.parent]
    assert copy.lives == 1 and copy.since == 2 and "population, step 2 2/2" in result.output


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dmd_balance", "--trials", 1), "pbt needs at least 2 trials side by side in training; given 1"),
        (("dmd_balance", "--rungs", 1), "it needs at least 2 rungs; given 1"),
        (("dmd_balance", "--score-seeds", 2), "pbt scores a trial by one training; given 2 seeds"),
        (("dmd_balance", "--sampler", "cma_es"), "leave the sampler out; given cma_es"),
        (("dmd_balance", "--set", "train.num_workers=2"), "set train.num_workers to 0 (over Ray Train's workers"),
        (("dmd_balance", "--set", "stages.refine.later={1: {ema_decay: 0.5}}"), "and so does its later: take one"),
        (("sfd_schedule",), "none of gap_0, gap_1, gap_2, tail, afs, teacher_steps, teacher_solver may change then"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    tmp_path: Path, without_ray: None, arguments: tuple[Any, ...], message: str
):
    space, *rest = arguments
    result = hdistill(
        "tune", space, write_recipe(tmp_path), "--run-dir", tmp_path / "x", *UNTRACKED, "--scheduler", "pbt", *rest
    )
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not (tmp_path / "x").exists()


def test_a_shared_folder_serves_copies_too(tmp_path: Path):
    work, copy, model = copied(tmp_path)
    assert shared_with(work, copy, 3) == shared_with(work, model, 3)
    assert TrialFile(work.sweep, copy).exists is False
