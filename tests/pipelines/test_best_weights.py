"""Which weights a stage passes on, by the FID of its probes: whatever stops it, and whatever it started from."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hd_core.networks.student import FlowMapStudent
from pipelines import recipe as recipes
from pipelines.artifacts import file_hash, read_json
from pipelines.cast import build
from pipelines.checkpoints import save_weights
from pipelines.curve import Curve
from pipelines.probing import Probe
from pipelines.stages import ProbeConfig, StageJob
from tests.pipelines import tiny
from tests.pipelines.probed import Home, make_home, points, trained

FIDS: dict[int, float] = {2: 5.0, 4: 3.0, 6: 4.0}
"""Of a training that is best before its end, and better twice."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return make_home(tmp_path_factory.mktemp("probing"))


@pytest.fixture(scope="module")
def sketch(home: Home) -> StageJob:
    """With probes that change nothing."""
    return trained(home.job("sketch", "sketch"))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """FIDs that are known beforehand."""
    _script(monkeypatch)


@pytest.fixture(scope="module")
def sketch_best(home: Home) -> StageJob:
    """With the best weights passed on."""
    with pytest.MonkeyPatch.context() as patch:
        _script(patch)
        return trained(home.job("sketch", "sketch-best", keep="best"))


def _script(patch: pytest.MonkeyPatch) -> None:
    look = Probe.look
    patch.setattr(Probe, "look", lambda self, state: look(self, state) | {"probe/fid": FIDS[state.step]})


@pytest.mark.usefixtures("scripted")
class TestBest:
    def test_the_best_are_passed_on_and_the_last_stay_beside_them(
        self, home: Home, sketch: StageJob, sketch_best: StageJob
    ):
        job = sketch_best
        manifest, folder = read_json(job.manifest), Path(job.folder)
        assert (manifest["kept"], manifest["best_step"], manifest["best_probe_fid"]) == ("best", 4, 3.0)
        assert manifest["steps"] == 6
        assert _same(job.weights, folder / "student-best.safetensors")
        assert _same(job.other_weights, sketch.weights)
        short = home.job("sketch", "short", every=0)
        short = trained(replace(short, stage=replace(short.stage, num_steps=4)))
        assert _same(job.weights, short.weights), "the average as it was at step 4"

    def test_keep_last_passes_on_the_last_and_the_best_stay_beside_them(self, home: Home, sketch: StageJob):
        job = trained(home.job("sketch", "last"))
        manifest, folder = read_json(job.manifest), Path(job.folder)
        assert (manifest["kept"], manifest["best_step"]) == ("last", 4)
        assert _same(job.weights, sketch.weights)
        assert not _same(job.weights, folder / "student-best.safetensors")
        assert not job.other_weights.exists()

    @pytest.mark.parametrize(
        ("when", "file", "times"),
        [
            ("before", "student-best.safetensors", 2),
            ("before", "best.json", 1),
            ("before", "best.json", 2),
            ("after", "best.json", 2),
            ("before", "step-00000003.json", 1),
            ("before", "student-last.safetensors", 1),
            ("before", "student.safetensors", 1),
            ("before", "stage.json", 1),
        ],
    )
    def test_a_stop_at_any_file_changes_neither_choice_nor_result(
        self, home: Home, tmp_path: Path, sketch_best: StageJob, when: str, file: str, times: int
    ):
        job = replace(home.job("sketch", "", keep="best"), folder=str(tmp_path / "stage"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", _stopping(file, times, when))
            with pytest.raises(KeyboardInterrupt):
                trained(job)
        trained(job)
        for name in ("student", "student-best", "student-last"):
            assert _same(Path(job.folder) / f"{name}.safetensors", Path(sketch_best.folder) / f"{name}.safetensors"), (
                name
            )
        assert Curve.read(job.curve)[-1]["probe/fid"] == 4.0 and _probed(job) == _probed(sketch_best)
        assert points(job) == points(sketch_best)
        assert _facts(job) == _facts(sketch_best)
        assert read_json(Path(job.folder) / "best.json") == read_json(Path(sketch_best.folder) / "best.json")

    def test_the_best_of_another_start_is_no_longer_the_best(self, home: Home, monkeypatch: pytest.MonkeyPatch):
        """What the stage started from was made again, and came out otherwise: the stage begins anew."""
        job = replace(home.job("sketch", "started", keep="best"), start_weights=str(home.folder / "start.safetensors"))
        for scale in (1.0, 0.9):
            student = FlowMapStudent(copy.deepcopy(home.run.teacher.backbone))
            with torch.no_grad():
                _ = [parameter.mul_(scale) for parameter in student.parameters()]
            save_weights(Path(job.start_weights), student)
            assert job.finished() is None
            trained(job)
            monkeypatch.setitem(FIDS, 4, 3.5)  # of the second start: worse than the first one's best
        assert read_json(job.manifest)["best_probe_fid"] == 3.5
        fresh = replace(job, folder=str(home.folder / "started-fresh"))
        assert _same(trained(fresh).weights, job.weights)

    def test_damaged_best_weights_are_not_passed_on(self, home: Home, tmp_path: Path, sketch_best: StageJob):
        """Those of step 4, spoilt while the stage is stopped, are made again from the checkpoint of step 3."""
        job = replace(home.job("sketch", "", keep="best"), folder=str(tmp_path / "stage"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", _stopping("student-last.safetensors", 1, "before"))
            with pytest.raises(KeyboardInterrupt):
                trained(job)
        best = Path(job.folder) / "student-best.safetensors"
        best.write_bytes(best.read_bytes()[:-4] + b"\0\0\0\0")
        assert _same(trained(job).weights, sketch_best.weights)

    def test_a_later_stage_starts_from_the_best(self, home: Home, tmp_path: Path):
        settings = ("stages.sketch.probe.keep=best", "stages.refine.probe.every=0")
        recipe = recipes.load(str(home.folder / "small.yaml"), settings)
        run = tiny.open_run(recipe, tmp_path)
        tiny.make_trajectories(recipe, tmp_path)
        run.write_images()
        first = trained(run.job("sketch"))
        assert not _same(first.weights, first.other_weights)
        state, _ = build(run.job("refine"), run.teacher)
        best = load_file(Path(first.folder) / "student-best.safetensors")
        student = state.players["student"].network.state_dict()
        assert student.keys() == best.keys()
        assert all(torch.equal(student[key], best[key]) for key in best)


def test_the_choice_is_the_least_fid_of_the_curve(home: Home):
    job = trained(home.job("sketch", "real", keep="best", every=1))
    fids = {line["step"]: line["probe/fid"] for line in Curve.read(job.curve)}
    assert len(set(fids.values())) == 6
    assert read_json(job.manifest)["best_step"] == min(fids, key=lambda step: fids[step])


def test_keep_best_without_probes_is_refused():
    with pytest.raises(ValueError, match="keep best needs probes: set every to a number of iterations"):
        ProbeConfig(keep="best")


def _same(one: Path, other: Path) -> bool:
    return file_hash(one) == file_hash(other)


def _probed(job: StageJob) -> list[float]:
    return [line["probe/fid"] for line in Curve.read(job.curve) if "probe/fid" in line]


def _facts(job: StageJob) -> dict[str, Any]:
    return {key: value for key, value in read_json(job.manifest).items() if key != "train_seconds"}


def _stopping(file: str, times: int, when: str) -> Callable[[Path, Path], Path]:
    """A rename that stops the process the ``times``-th time that a file takes its place."""
    commit, seen = Path.replace, 0

    def mortal(temporary: Path, path: Path) -> Path:
        nonlocal seen
        seen += (meant := path.name == file)
        if meant and seen == times and when == "before":
            raise KeyboardInterrupt
        done = commit(temporary, path)
        if meant and seen == times:
            raise KeyboardInterrupt
        return done

    return mortal
