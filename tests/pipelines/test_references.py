"""What samples are measured against: features made once, statistics of others, several sets as one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hd_core.metrics.frechet import frechet_distance
from hd_core.metrics.statistics import Moments
from pipelines.data import DataConfig, DataSplits, load_images
from pipelines.feature_shards import Joined, feature_spec
from pipelines.features import load_extractor
from pipelines.production import Actors
from pipelines.references import Library
from pipelines.shards import ShardSet, write_shard

DIGITS = load_extractor("digits")


@pytest.fixture(scope="module")
def splits() -> DataSplits:
    return load_images(DataConfig())


def library(folder: Path, splits: DataSplits, told: list[str] | None = None) -> Library:
    @contextmanager
    def progress(title: str, total: int) -> Iterator[object]:
        (told if told is not None else []).append(f"{title}: {total}")
        yield lambda _: None

    return Library(folder=folder, splits=splits, actors=Actors(count=0, cpus=1, gpus=0), progress=progress)  # pyright: ignore[reportArgumentType]


def test_features_of_real_images_are_made_once(splits: DataSplits, tmp_path: Path):
    told: list[str] = []
    found = [library(tmp_path, splits, told).reference("digits", DIGITS, 5000, "") for _ in range(2)]
    assert told == ["digits features of real images: 600", "digits features of real images: 1197"]
    for one in found:
        assert np.array_equal(one.features, DIGITS(splits.reference.images))
        wanted = frechet_distance(Moments.of(DIGITS(splits.train.images)), Moments.of(one.features))
        assert one.real_fid == pytest.approx(wanted, rel=1e-12)


def test_real_images_are_as_many_as_samples(splits: DataSplits, tmp_path: Path):
    found = library(tmp_path, splits).reference("digits", DIGITS, 300, "")
    wanted = frechet_distance(Moments.of(DIGITS(splits.train.images[:300])), Moments.of(found.features))
    assert found.real_fid == pytest.approx(wanted, rel=1e-12)


def test_a_damaged_file_is_made_again(splits: DataSplits, tmp_path: Path):
    whole = library(tmp_path, splits).reference("digits", DIGITS, 300, "")
    for file in tmp_path.rglob("part-*.parquet"):
        file.write_bytes(file.read_bytes()[:-20])
    assert np.array_equal(library(tmp_path, splits).reference("digits", DIGITS, 300, "").features, whole.features)


def test_published_statistics_are_what_fid_alone_is_against(splits: DataSplits, tmp_path: Path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(32), sigma=np.eye(32))
    found = library(tmp_path, splits).reference("digits", DIGITS, 300, str(tmp_path / "stats.npz"))
    assert found.source == str(tmp_path / "stats.npz") == found.provenance["source"]
    assert np.allclose(found.moments.covariance, np.eye(32)) and found.moments.mean.max() == 0
    assert np.array_equal(found.features, DIGITS(splits.reference.images))


def test_several_sets_are_one_that_can_be_produced(tmp_path: Path):
    spec = feature_spec(5, 2, np.zeros((1, 3), np.float32), {"of": "a"})
    sets = [ShardSet.open(tmp_path / name, replace(spec, inputs={"of": name})) for name in ("a", "b")]

    def made(place: int, local: int):
        ids = spec.ids(local)
        shard = write_shard(sets[place].folder, sets[place].spec, local, np.zeros(len(ids), np.int64),
                            np.zeros((len(ids), 3), np.float32))  # fmt: skip
        return replace(shard, index=3 * place + local)

    complete: list[int] = []
    joined = Joined(sets, complete.append)
    assert joined.missing == [0, 1, 2, 3, 4, 5]
    for place, local in ((1, 2), (0, 0), (0, 2), (0, 1)):
        joined.commit(made(place, local))
    assert joined.missing == [3, 4] and complete == [0]
    assert [shard.index for shard in sets[1].shards] == [2] and sets[0].complete
