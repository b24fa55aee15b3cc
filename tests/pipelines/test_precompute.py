"""Trajectories through Ray Data: the same rows however they are made, and only what is missing is made again."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hd_core.random import sample_labels, sample_noise
from hd_core.times import GridConfig
from pipelines import production
from pipelines.precompute import PrecomputeConfig, TrajectoryMaker, noise_seed, solve, trajectory_spec
from pipelines.production import Progress, ShardActor, produce
from pipelines.shards import ShardSet
from pipelines.teachers import Teacher, TeacherConfig, load_teacher

SEED, SCALE = 3, 1.0
CONFIG = PrecomputeConfig(
    num_samples=70, shard_rows=16, intervals=4, batch_size=16, num_actors=1, cpus_per_actor=2.0, dtype="float16"
)
"""Five shards, the last of six rows."""


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher(TeacherConfig())


def open_set(folder: Path, teacher: Teacher, config: PrecomputeConfig = CONFIG) -> ShardSet:
    return ShardSet.open(folder, trajectory_spec(config, TeacherConfig(), teacher, SEED))


def rows(teacher: Teacher, config: PrecomputeConfig, count: int) -> np.ndarray:
    """The same trajectories, solved in this process."""
    labels = sample_labels(noise_seed(SEED), range(count), teacher.num_classes)
    return solve(teacher, config, SCALE, SEED, range(count), labels)


def precompute(shards: ShardSet, config: PrecomputeConfig, progress: Progress = lambda _: None) -> None:
    maker = partial(TrajectoryMaker, shards=shards, config=config, teacher=TeacherConfig(), seed=SEED)
    produce(shards, maker, config.actors, progress)


def spying_actor(folder: Path, *, dies_at: int = -1) -> type[ShardActor]:
    """An actor that writes its threads down, and whose process is killed once, at one shard."""

    class Spying(ShardActor):
        def __call__(self, block: dict[str, np.ndarray]) -> dict[str, list[Any]]:
            import os
            import signal

            import torch

            seen = {"threads": torch.get_num_threads(), "wait_policy": os.environ.get("OMP_WAIT_POLICY")}
            folder.mkdir(exist_ok=True)
            (folder / f"process-{os.getpid()}.json").write_text(json.dumps(seen))
            grave = folder / "killed"
            if not grave.exists() and int(block["shard"][0]) == dies_at:
                grave.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(block)

    return Spying


def processes(folder: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in folder.glob("process-*.json")]


@pytest.fixture(scope="module")
def made(ray_cluster: None, teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """A whole set, made by one actor of two CPUs."""
    shards = open_set(tmp_path_factory.mktemp("shards") / "trajectories", teacher)
    counts: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(production, "ShardActor", spying_actor(shards.folder))
        precompute(shards, CONFIG, counts.append)
    assert sorted(counts) == [6, 16, 16, 16, 16]
    return shards


@pytest.mark.ray
def test_the_rows_are_those_of_this_process(made: ShardSet, teacher: Teacher) -> None:
    read = made.read(range(5))
    assert read.sample_ids.tolist() == list(range(70))
    assert np.array_equal(read.labels, sample_labels(noise_seed(SEED), range(70), teacher.num_classes).numpy())
    assert np.array_equal(read.values, rows(teacher, CONFIG, 70))


@pytest.mark.ray
def test_a_worker_takes_the_threads_of_its_cpus(made: ShardSet) -> None:
    assert processes(made.folder) == [{"threads": 2, "wait_policy": "passive"}]


@pytest.mark.ray
def test_two_actors_make_what_is_missing_and_survive_a_kill(
    made: ShardSet, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shard is gone, two are cut short: the others stay, the new ones are bit-equal to those of one actor."""
    folder = tmp_path / "trajectories"
    shutil.copytree(made.folder, folder, ignore=shutil.ignore_patterns("process-*"))
    files = [folder / shard.file for shard in made.shards]
    files[0].unlink()
    for path in files[2:4]:
        os.truncate(path, path.stat().st_size // 2)
    shards = open_set(folder, teacher)
    assert shards.damaged() == [files[i].name for i in (0, 2, 3)]
    before = {i: files[i].stat().st_mtime_ns for i in (1, 4)}

    counts: list[int] = []
    monkeypatch.setattr(production, "ShardActor", spying_actor(folder, dies_at=2))
    precompute(shards, replace(CONFIG, num_actors=2, cpus_per_actor=1.0), counts.append)

    assert (folder / "killed").exists()
    assert counts == [16, 16, 16]
    assert {i: files[i].stat().st_mtime_ns for i in (1, 4)} == before
    assert [shard.sha256 for shard in shards.shards] == [shard.sha256 for shard in made.shards]
    assert open_set(folder, teacher).complete
    assert not open_set(folder, teacher).damaged()
    assert all(seen == {"threads": 1, "wait_policy": "passive"} for seen in processes(folder))
    assert not list(folder.glob(".*")), "no half-written file is left"


@pytest.mark.ray
def test_a_pool_that_may_grow_makes_the_same_bytes(made: ShardSet, teacher: Teacher, tmp_path: Path) -> None:
    shards = open_set(tmp_path / "trajectories", teacher)
    precompute(shards, replace(CONFIG, num_actors=(1, 2), cpus_per_actor=1.0))
    assert [shard.sha256 for shard in shards.shards] == [shard.sha256 for shard in made.shards]


@pytest.mark.parametrize(
    "changes", [{"num_actors": -1}, {"num_actors": (0, 2)}, {"cpus_per_actor": 0.0}, {"gpus_per_actor": -1.0}], ids=str
)
def test_actors_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"num_actors must not be|cpus_per_actor must be"):
        replace(CONFIG, **changes)


@pytest.mark.ray
def test_actors_that_reserve_every_cpu_are_refused(ray_cluster: None, teacher: Teacher, tmp_path: Path) -> None:
    """Ray Data would wait for ever without a word."""
    config = replace(CONFIG, num_actors=4, cpus_per_actor=1.0)
    with pytest.raises(ValueError, match=r"4 CPUs are asked for by workers, and the Ray cluster has 4: leave at least"):
        precompute(open_set(tmp_path, teacher, config), config)


@pytest.mark.ray
def test_gpus_that_are_not_there_are_refused(ray_cluster: None, teacher: Teacher, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config = replace(CONFIG, gpus_per_actor=1.0)
    with pytest.raises(ValueError, match="1 GPUs are asked for by workers, and this machine has 0"):
        precompute(open_set(tmp_path, teacher, config), config)


@pytest.mark.ray
def test_what_an_actor_cannot_write_reaches_the_caller_as_it_is(
    ray_cluster: None, teacher: Teacher, tmp_path: Path
) -> None:
    shards = open_set(tmp_path / "trajectories", teacher)
    shards.folder.write_text("a file where the directory should be")
    with pytest.raises(FileExistsError) as caught:
        precompute(shards, CONFIG)
    assert type(caught.value) is FileExistsError
    assert caught.value.filename == str(shards.folder)


def test_without_actors_this_process_makes_the_same_files(teacher: Teacher, tmp_path: Path) -> None:
    config, counts = replace(CONFIG, num_actors=0), list[int]()
    shards = open_set(tmp_path / "here", teacher, config)
    precompute(shards, config, counts.append)
    assert counts == [16, 16, 16, 16, 6]
    assert shards.complete and np.array_equal(shards.read(range(5)).values, rows(teacher, CONFIG, 70))


@pytest.mark.parametrize("batch_size", [64, 9, 1])
def test_the_batch_size_changes_at_most_the_last_place(teacher: Teacher, batch_size: int) -> None:
    """Products may be summed in another order, which moves a float32 state by some 1e-6: the stored one by at most
    one unit in its last place, or by that much where its units are finer. Measured: not at all, but for batches of 1.
    """
    one, other = rows(teacher, CONFIG, 64), rows(teacher, replace(CONFIG, batch_size=batch_size), 64)
    apart = np.abs(one.astype(np.float64) - other.astype(np.float64))
    assert np.all(apart <= np.maximum(np.spacing(np.maximum(np.abs(one), np.abs(other))).astype(np.float64), 5e-6))


def test_a_trajectory_that_leaves_the_stored_range_is_refused(teacher: Teacher) -> None:
    wild = replace(teacher, backbone=_Wild())
    with pytest.raises(ValueError, match=r"outside the range of float16.*precompute\.dtype=float32"):
        rows(wild, CONFIG, 4)


class _Wild(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.somewhere = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: object) -> torch.Tensor:
        return 1e6 * torch.ones_like(x)


def test_the_first_state_is_the_noise_of_the_id(teacher: Teacher) -> None:
    noise = sample_noise(noise_seed(SEED), range(5, 8), teacher.shape).numpy()
    labels = torch.zeros(3, dtype=torch.int64)
    config = replace(CONFIG, dtype="float32", grid=GridConfig())
    states = solve(teacher, config, SCALE, SEED, range(5, 8), labels)
    assert np.array_equal(states[:, 0], noise)
