"""The main job on a tiny recipe: what it leaves behind, what it reuses, what it refuses, and how it comes back."""

import json
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from hd_core import step
from pipelines import preparation, recording
from pipelines import run as running
from pipelines import trainer as training
from pipelines.artifacts import RunDir, file_hash
from pipelines.cast import build
from pipelines.curve import Curve
from pipelines.evaluate import Evaluator
from pipelines.process import process_started
from pipelines.recording import default_store
from pipelines.report import read_report
from pipelines.run import check_recipe
from pipelines.shards import ShardSet
from pipelines.tracking import NoopTracker
from tests.pipelines.conftest import Finished
from tests.pipelines.tiny import STAGES, UNTRACKED, hdistill, make_trajectories, open_run, tiny_recipe, tree

pytestmark = pytest.mark.usefixtures("without_ray")

ROWS = [
    ("teacher", "euler", 1),
    ("teacher", "euler", 2),
    ("teacher", "dpmpp_3m", 2),
    ("sketch", "flow_map", 1),
    ("hd", "flow_map", 1),
    ("sfd", "flow_map", 2),
    ("sfd", "flow_map", 3),  # four steps, the first of them analytical
]
PHASES = ["start", "precompute", *STAGES, "evaluate"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr("pipelines.process.available_cpus", lambda: 1)


@pytest.fixture
def computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, precomputing or measuring fails the test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this was finished already")

    monkeypatch.setattr(running, "train_stage", refuse)
    monkeypatch.setattr(preparation, "produce", refuse)
    monkeypatch.setattr(Evaluator, "measure", refuse)


def stopped_at(monkeypatch: pytest.MonkeyPatch, moment: int, error: BaseException) -> None:
    """Training stops in its ``moment``-th iteration, counted over all stages from 1."""
    steps = iter(range(1, 1000))

    def stopping(*arguments: object, **more: object) -> object:
        if next(steps) == moment:
            raise error
        return step.train_step(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "train_step", stopping)


def losses(run_dir: Path) -> dict[str, list[dict[str, float]]]:
    """The curve of each stage, without its clock."""
    curves = {name: Curve.read(run_dir / "stages" / name / "metrics.jsonl") for name in STAGES}
    return {name: [{k: v for k, v in point.items() if k != "seconds"} for point in c] for name, c in curves.items()}


def weights(run_dir: Path) -> dict[str, str]:
    return {name: tree(run_dir / "stages" / name)["student.safetensors"] for name in STAGES}


# What a run leaves behind


def test_the_report_has_a_row_for_each_generator_and_a_phase_for_each_part(finished: Finished):
    record = json.loads((finished.run_dir / "report.json").read_text())
    assert [(row["generator"], row["solver"], row["nfe"]) for row in record["rows"]] == ROWS
    assert [phase["name"] for phase in record["phases"]] == PHASES
    assert record["recipe"] == finished.recipe.to_dict()
    assert record["fingerprint"] == finished.recipe.fingerprint
    assert record["reference"]["num_reference"] == 1597 and record["reference"]["fid_features"] == "digits"
    assert {phase["name"] for phase in record["phases"] if phase["reused"]} == {"precompute"}  # the fixture made it
    assert all(phase["wall_seconds"] >= 0 for phase in record["phases"])


def test_every_row_carries_the_documented_fields(finished: Finished):
    for row in json.loads((finished.run_dir / "report.json").read_text())["rows"]:
        wanted = "generator solver nfe num_samples fid fid_features precision recall images_per_second gflops_per_image"
        assert {*wanted.split(), "train_seconds"} <= row.keys()
        assert row["num_samples"] == 200 and row["fid_features"] == "digits"
        assert row["fid"] > 0 and 0 <= row["precision"] <= 1 and 0 <= row["recall"] <= 1
        assert row["images_per_second"] > 0 and row["gflops_per_image"] > 0
        assert (row["train_seconds"] > 0) == (row["generator"] != "teacher")


def test_train_seconds_of_a_stage_hold_those_of_the_stage_before(finished: Finished):
    seconds = {
        name: json.loads((finished.run_dir / "stages" / name / "stage.json").read_text())["train_seconds"]
        for name in STAGES
    }
    rows = {row.stage: row.train_seconds for row in read_report(finished.run_dir / "report.json").rows}
    assert rows["refine"] == pytest.approx(seconds["sketch"] + seconds["refine"])
    assert rows["sketch"] == seconds["sketch"] and rows["sfd_2"] == seconds["sfd_2"]


def test_finished_stages_keep_weights_and_curve_but_no_checkpoints(finished: Finished):
    for name in STAGES:
        kept = {path.name for path in (finished.run_dir / "stages" / name).iterdir()} - {"ray"}
        judged = {"token_weights.npz"} if name == "refine" else set[str]()
        assert kept == {"costs", "stage.json", "student.safetensors", "metrics.jsonl"} | judged
    assert losses(finished.run_dir)["sketch"][-1]["step"] == 5
    assert not [path for path in finished.run_dir.rglob("*") if path.suffix in (".pkl", ".pt", ".bin")]


def test_all_pictures_are_of_the_same_labels(finished: Finished):
    arrays = [np.load(path) for path in sorted((finished.run_dir / "evaluate").glob("*.npz"))]
    assert len(arrays) == len(ROWS)
    for kept in arrays:
        assert kept["images"].shape == (16, 8, 8, 1) and kept["images"].dtype == np.uint8
        assert np.array_equal(kept["labels"], arrays[0]["labels"])


def test_the_tracker_has_one_finished_run_with_a_child_for_each_stage(finished: Finished):
    client = MlflowClient(f"sqlite:///{default_store(RunDir(finished.run_dir))}")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"tiny", *STAGES}
    parent = runs["tiny"]
    assert all(run.info.status == "FINISHED" for run in runs.values())
    assert all(runs[name].data.tags["mlflow.parentRunId"] == parent.info.run_id for name in STAGES)
    assert parent.data.tags["fingerprint"] == finished.recipe.fingerprint
    assert parent.data.params["stages.sketch.num_steps"] == "5"
    assert "fid_digits" in {key.split("/")[1] for key in parent.data.metrics}
    best = min(
        (row for row in read_report(finished.run_dir / "report.json").rows if row.stage), key=lambda row: row.fid
    )
    assert parent.data.metrics["best/fid"] == best.fid and parent.data.tags["best.stage"] == best.stage
    assert "| generator | stage |" in parent.data.tags["mlflow.note.content"]
    history = client.get_metric_history(runs["sketch"].info.run_id, "loss/mean_velocity")
    curve = losses(finished.run_dir)["sketch"]
    assert [(point.step, point.value) for point in history] == [(p["step"], p["loss/mean_velocity"]) for p in curve]


def test_every_stage_has_the_same_metrics_and_tags(finished: Finished):
    client = MlflowClient(f"sqlite:///{default_store(RunDir(finished.run_dir))}")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    stages = client.search_runs([experiment.experiment_id], "tags.stage != ''")
    rows = {row.samples: row for row in read_report(finished.run_dir / "report.json").rows}
    own = {run.info.run_name: rows[f"{run.info.run_name}-flow_map-{run.data.metrics['nfe']:g}.npz"] for run in stages}
    assert own.keys() == set(STAGES)
    for run in stages:
        row, found = own[run.info.run_name], run.data.metrics
        for name in ("fid", "kid", "precision", "recall", "nfe", "train_seconds", "images_per_second"):
            assert found[name] == getattr(row, name)
        assert [found["fid_low"], found["fid_high"]] == row.intervals["fid"]
        tags = {key: value for key, value in run.data.tags.items() if "." not in key}
        assert tags["recipe"] == "tiny" and tags["features"] == "digits" and tags["num_samples"] == "200"
        assert len(tags["teacher_fingerprint"]) == len(tags["data"]) == len(tags["features_sha256"]) == 64
    assert {run.data.tags["objective"] for run in stages} == {"mean_velocity", "dmd", "sfd"}


# Again


@pytest.mark.usefixtures("computes_nothing")
def test_the_second_time_everything_is_reused_and_said_to_be(copied: Finished):
    before = tree(copied.run_dir)
    result = hdistill("run", *copied.arguments, *UNTRACKED)
    assert result.exit_code == 0, result.output
    assert "Reused: precompute, sketch, refine, sfd_2, sfd_4, evaluate." in result.output
    report = read_report(copied.run_dir / "report.json")
    assert [phase.name for phase in report.phases if not phase.reused] == ["start"]
    after = tree(copied.run_dir)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    # The recipe differs in where it is tracked; the report in what this run did.
    allowed = {"report.json", "report.html", "figures/seconds_by_phase.png", "recipe.json", "run.json"}
    assert changed <= allowed, changed


def test_the_report_says_what_everything_was_made_from(finished: Finished):
    found = {one.name: one for one in read_report(finished.run_dir / "report.json").lineage}
    assert list(found) == ["teacher", "real images", "trajectories", "sketch", "refine", "sfd_2", "sfd_4"]
    for place, one in enumerate(found.values()):
        assert set(one.made_from) <= set(list(found)[:place])
    assert found["refine"].made_from == ["sketch", "teacher", "real images"]
    assert found["sfd_2"].made_from == ["teacher", "trajectories"]
    for name in ("sketch", "refine", "sfd_2", "sfd_4"):
        assert found[name].sha256 == file_hash(finished.run_dir / "stages" / name / "student.safetensors")
    assert found["trajectories"].detail == "64 rows in 2 files, 4 steps by dpmpp_3m"
    assert found["real images"].detail == "digits: 200 to train on, 1,597 held out"


def test_the_second_time_the_rows_are_the_same(finished: Finished, copied: Finished):
    hdistill("run", *copied.arguments, *UNTRACKED)
    first, second = (read_report(found.run_dir / "report.json").rows for found in (finished, copied))
    assert first == second


@pytest.mark.usefixtures("computes_nothing")
def test_fields_that_change_no_result_may_change(copied: Finished):
    free = ("train.num_workers=2", "precompute.num_actors=7", "evaluate.batch_size=50", "name=other")
    settings = [part for setting in free for part in ("--set", setting)]
    result = hdistill("run", *copied.arguments, *UNTRACKED, *settings)
    assert result.exit_code == 0, result.output


@pytest.mark.usefixtures("computes_nothing")
@pytest.mark.parametrize("command", [("precompute",), ("train",), ("train", "--stage", "refine"), ("evaluate",)])
def test_every_part_finds_what_is_finished(copied: Finished, command: tuple[str, ...]):
    name, *options = command
    assert hdistill(name, *copied.arguments, *UNTRACKED, *options).exit_code == 0


def test_one_stage_is_trained_with_those_it_starts_from_alone(finished: Finished, tmp_path: Path):
    make_trajectories(finished.recipe, tmp_path / "run")
    result = hdistill("train", finished.recipe_file, "--run-dir", tmp_path / "run", *UNTRACKED, "--stage", "refine")
    assert result.exit_code == 0, result.output
    made = {path.parent.name for path in (tmp_path / "run" / "stages").glob("*/stage.json")}
    assert made == {"sketch", "refine"}
    refused = hdistill("evaluate", finished.recipe_file, "--run-dir", tmp_path / "run", *UNTRACKED)
    assert refused.exit_code == 2
    assert f"stage sfd_2 is not trained in {tmp_path / 'run'}: run `hdistill train` first" in refused.stderr


# Refusals


@pytest.mark.parametrize("command", [("run",), ("run", "--dry-run"), ("precompute",), ("train",), ("evaluate",)])
def test_a_directory_of_another_recipe_is_refused_by_name_and_left_alone(finished: Finished, command: tuple[str, ...]):
    name, *options = command
    before = tree(finished.run_dir)
    other = ("--set", "seed=4", "--set", "stages.sketch.optimizers.student.learning_rate=2e-3")
    result = hdistill(name, *finished.arguments, *other, *options)
    assert result.exit_code == 2
    assert "seed: 3 there, 4 here" in result.stderr
    assert "stages.sketch.optimizers.student.learning_rate: 0.001 there, 0.002 here" in result.stderr
    assert "--run-dir" in result.stderr and len(result.stderr.splitlines()) == 1
    assert tree(finished.run_dir) == before


def test_even_the_mark_of_a_killed_driver_is_left_alone(copied: Finished):
    (copied.run_dir / "lock").write_text("12345")
    before = tree(copied.run_dir)
    assert hdistill("run", *copied.arguments, "--set", "seed=4").exit_code == 2
    assert tree(copied.run_dir) == before


def test_check_recipe_takes_an_empty_directory(finished: Finished, tmp_path: Path):
    check_recipe(RunDir(tmp_path), finished.recipe)


def test_a_run_directory_that_cannot_be_made_is_refused(finished: Finished, tmp_path: Path):
    (tmp_path / "file").write_text("")
    result = hdistill("run", finished.recipe_file, "--run-dir", tmp_path / "file" / "run")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr and "--run-dir" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_run_directory_in_use_is_refused(copied: Finished):
    with RunDir(copied.run_dir).locked():
        before = tree(copied.run_dir)
        result = hdistill("run", *copied.arguments, *UNTRACKED)
        assert tree(copied.run_dir) == before
    assert result.exit_code == 2
    assert "is in use by process" in result.stderr


def test_data_that_does_not_fit_the_teacher_is_refused_before_anything_is_made(finished: Finished, tmp_path: Path):
    run_dir = tmp_path / "run"
    settings = (*UNTRACKED, "--set", "data.image_size=16")
    result = hdistill("run", finished.recipe_file, "--run-dir", run_dir, *settings)
    assert result.exit_code == 2
    assert "(1, 16, 16)" in result.stderr and "(1, 8, 8)" in result.stderr and "data.image_size" in result.stderr
    assert not (run_dir / "trajectories").exists()


def test_a_batch_larger_than_the_data_is_refused_in_one_line(finished: Finished, tmp_path: Path):
    settings = (*UNTRACKED, "--set", "stages.sketch.batch_size=65")
    result = hdistill("train", finished.recipe_file, "--run-dir", tmp_path / "run", *settings)
    assert result.exit_code == 2
    assert "65 rows are more than the 64 trajectories" in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_training_that_diverges_says_where_and_exits_with_1(finished: Finished, tmp_path: Path):
    setting = "stages.sketch.optimizers.student.learning_rate=1e30"
    make_trajectories(tiny_recipe(tmp_path, setting), tmp_path / "run")
    result = hdistill("train", finished.recipe_file, "--run-dir", tmp_path / "run", *UNTRACKED, "--set", setting)
    assert result.exit_code == 1
    assert "stage sketch diverged" in result.stderr and len(result.stderr.splitlines()) == 1


# Damage and interruption


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(path.read_bytes()[:-100]), Path.unlink])
def test_damaged_weights_are_trained_again_and_that_is_said(finished: Finished, copied: Finished, spoil: object):
    assert callable(spoil)
    spoil(copied.run_dir / "stages" / "refine" / "student.safetensors")
    result = hdistill("run", *copied.arguments, *UNTRACKED)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "is missing or damaged (its hash does not fit): training refine again" in said
    assert "Reused: precompute, sketch, sfd_2, sfd_4, evaluate." in said
    assert weights(copied.run_dir) == weights(finished.run_dir)


def test_weights_that_come_out_differently_are_measured_again(
    finished: Finished, copied: Finished, monkeypatch: pytest.MonkeyPatch
):
    (copied.run_dir / "stages" / "sfd_2" / "student.safetensors").unlink()
    monkeypatch.setattr(step, "warmed_decay", lambda *_: 0.5)  # as another machine's rounding would, but more
    result = hdistill("run", *copied.arguments, *UNTRACKED)
    assert result.exit_code == 0, result.output
    old, new = ({row.stage: row for row in read_report(f.run_dir / "report.json").rows} for f in (finished, copied))
    assert weights(copied.run_dir) != weights(finished.run_dir)
    assert new["sketch"] == old["sketch"] and new["sfd_2"].train_seconds != old["sfd_2"].train_seconds


def test_a_stage_is_trained_again_after_what_it_started_from(
    finished: Finished, copied: Finished, monkeypatch: pytest.MonkeyPatch
):
    (copied.run_dir / "stages" / "sketch" / "student.safetensors").unlink()
    monkeypatch.setattr(step, "warmed_decay", lambda *_: 0.5)
    result = hdistill("run", *copied.arguments, *UNTRACKED)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "what refine started from was made again: training refine again" in said
    assert "Reused: precompute, sfd_2, sfd_4." in said
    assert weights(copied.run_dir)["refine"] != weights(finished.run_dir)["refine"]


def test_a_damaged_shard_is_named_and_made_again(finished: Finished, copied: Finished, monkeypatch: pytest.MonkeyPatch):
    before = tree(copied.run_dir / "trajectories")
    shard = copied.run_dir / "trajectories" / "part-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])

    def again(shards: ShardSet, *_: object) -> None:
        assert shards.missing == [1]
        make_trajectories(finished.recipe, copied.run_dir, shards)

    monkeypatch.setattr(preparation, "produce", again)
    monkeypatch.setattr(preparation, "start_for", lambda *_: 1)
    result = hdistill("precompute", *copied.arguments, *UNTRACKED)
    assert result.exit_code == 0, result.output
    assert "shard part-00001.parquet is missing or damaged" in " ".join(result.output.split())
    assert "teacher trajectories: 32 of 64 are there; making the rest" in " ".join(result.output.split())
    assert tree(copied.run_dir / "trajectories") == before


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (KeyboardInterrupt(), "KILLED"), (ValueError("no"), "FAILED")]
)
def test_the_tracker_is_told_how_it_ended(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, status: str
):
    told: list[str] = []
    tracker = NoopTracker()
    monkeypatch.setattr(tracker, "finish", told.append)
    monkeypatch.setattr(recording, "open_tracker", lambda *_, **__: tracker)

    def work(_: running.Run) -> None:
        if error:
            raise error

    with suppress(KeyboardInterrupt, ValueError):
        open_run(finished.recipe, tmp_path).partial(work)
    assert told == [status]


@pytest.mark.parametrize("moment", [1, 4, 8, 17])
def test_an_interrupted_run_goes_on_to_the_same_weights_curves_and_figures(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
):
    run_dir = tmp_path / "run"
    arguments = (finished.recipe_file, "--run-dir", run_dir, *UNTRACKED)
    make_trajectories(finished.recipe, run_dir)
    with monkeypatch.context() as patch:
        stopped_at(patch, moment, KeyboardInterrupt())
        result = hdistill("run", *arguments)
    assert result.exit_code == 130
    assert "stopped. The same command goes on from the last checkpoint." in result.stderr
    assert hdistill("run", *arguments).exit_code == 0
    assert weights(run_dir) == weights(finished.run_dir)
    assert losses(run_dir) == losses(finished.run_dir)
    rows, wanted = (read_report(path / "report.json").rows for path in (run_dir, finished.run_dir))
    assert [(row.fid, row.precision, row.recall) for row in rows] == [
        (row.fid, row.precision, row.recall) for row in wanted
    ]


def test_a_resumed_stage_starts_from_its_checkpoint(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_trajectories(finished.recipe, tmp_path / "run")
    arguments = (finished.recipe_file, "--run-dir", tmp_path / "run", *UNTRACKED, "--stage", "sketch")
    with monkeypatch.context() as patch:
        stopped_at(patch, 4, KeyboardInterrupt())
        hdistill("train", *arguments)
    taken: list[int] = []

    def counting(state: step.TrainState, *more: object, **options: object) -> object:
        taken.append(state.step)
        return step.train_step(state, *more, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "train_step", counting)
    hdistill("train", *arguments)
    assert taken == [2, 3, 4]


def test_a_full_disk_loses_nothing_that_is_finished(
    finished: Finished, copied: Finished, monkeypatch: pytest.MonkeyPatch
):
    (copied.run_dir / "stages" / "sfd_4" / "student.safetensors").unlink()
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device", "student.safetensors")

        patch.setattr(training, "write_tensors", full)
        result = hdistill("run", *copied.arguments, *UNTRACKED)
    assert result.exit_code == 1
    assert "No space left on device (student.safetensors)" in result.stderr and len(result.stderr.splitlines()) == 1
    assert hdistill("run", *copied.arguments, *UNTRACKED).exit_code == 0
    assert weights(copied.run_dir) == weights(finished.run_dir)


# Pieces


def test_a_later_stage_starts_from_the_average_of_the_earlier(finished: Finished):
    job = open_run(finished.recipe, finished.run_dir).job("refine")
    state, _ = build(job, open_run(finished.recipe, finished.run_dir).teacher)
    stored = load_file(finished.run_dir / "stages" / "sketch" / "student.safetensors")
    for key, value in state.players["student"].network.state_dict().items():
        assert torch.equal(value, stored[key])


def test_a_stage_depends_on_what_it_starts_from(tmp_path: Path):
    jobs = [open_run(tiny_recipe(tmp_path, setting), tmp_path) for setting in ("seed=3", "stages.sketch.num_steps=6")]
    assert jobs[0].job("refine").inputs != jobs[1].job("refine").inputs
    assert jobs[0].job("sfd_2").inputs == jobs[1].job("sfd_2").inputs


def test_generator_keys_and_labels(finished: Finished):
    generators = open_run(finished.recipe, finished.run_dir).generators()
    assert [(g.label, g.solver, g.calls_per_image) for g in generators] == ROWS
    assert len({generator.key for generator in generators}) == len(generators)
    assert [generator.afs for generator in generators] == [False] * 6 + [True]
    assert generators[-1].grid == (1.0, 0.75, 0.5, 0.25, 0.0)


def test_the_process_started_before_now_and_after_the_machine():
    assert 0 < time.time() - process_started() < float(Path("/proc/uptime").read_text().split()[0]) + 1


def test_a_mistake_before_any_result_does_not_claim_the_directory(finished: Finished, tmp_path: Path):
    run_dir = tmp_path / "run"
    wrong = hdistill(
        "run", finished.recipe_file, "--run-dir", run_dir, *UNTRACKED, "--set", "teacher.path=/nowhere/at/all"
    )
    assert wrong.exit_code == 2 and not (run_dir / "recipe.json").exists()
    (run_dir / "recipe.json").write_text('{"seed": 77}')  # as a run that was stopped at once leaves it
    check_recipe(RunDir(run_dir), finished.recipe)
    (run_dir / "stages").mkdir()
    with pytest.raises(ValueError, match="made by another recipe"):
        check_recipe(RunDir(run_dir), finished.recipe)
