"""Evaluation against longhand: walks, distances, operations, and what is reused or refused."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch

from hd_core.random import sample_labels, sample_noise
from hd_core.types import Condition
from pipelines.artifacts import read_json, write_json
from pipelines.data import load_images, to_uint8
from pipelines.evaluate import EvaluateConfig, Evaluator, Generator, evaluation_seed, make_sampler, operations
from pipelines.feature_shards import Draw, FeatureJob, FeatureMaker
from pipelines.feature_training import FeatureTraining, make_feature_net
from pipelines.features import FeatureNet, FeatureNetConfig, save_feature_net
from pipelines.recipe import override
from pipelines.report import Row, read_report
from pipelines.run import Run
from pipelines.shards import Shard, ShardSet
from tests.pipelines.conftest import Finished
from tests.pipelines.tiny import open_run


@pytest.fixture(scope="module")
def job(finished: Finished) -> Run:
    return open_run(finished.recipe, finished.run_dir)


def evaluator_of(job: Run, folder: Path, **changes: Any) -> Evaluator:
    made = job.evaluator()
    made.folder = folder
    made.config = replace(made.config, **changes)
    return made


def generator_of(job: Run, key: str) -> Generator:
    return next(generator for generator in job.generators() if generator.key == key)


def maker_of(job: Run, generator: Generator, evaluator: Evaluator | None = None) -> FeatureMaker:
    evaluator = evaluator or job.evaluator()
    draw = Draw(seed=evaluator.seed, labels=evaluator.labels(range(200)).numpy(), pictures=16)
    asked = FeatureJob(generator=generator, shards=evaluator.shards(generator))
    return FeatureMaker(asked, draw, job.teacher, [job.extractor])


def measured(evaluator: Evaluator, generator: Generator, told: list[int] | None = None) -> Row:
    (row,) = evaluator.measure([generator], [].append if told is None else told.append)
    return row


# Sampling


def test_samples_carry_no_gradient(job: Run):
    x, condition = torch.randn(2, 1, 8, 8), Condition(labels=torch.tensor([0, 1]))
    for key in ("teacher-euler-2", "sfd_2-flow_map-2"):
        assert not make_sampler(generator_of(job, key), job.teacher)(x, condition).requires_grad


def test_the_teachers_euler_sampler_is_euler(job: Run):
    x, condition = torch.randn(4, 1, 8, 8), Condition(labels=torch.arange(4))
    v = job.teacher.velocity(1.0)
    with torch.no_grad():
        half = x - 0.5 * v(x, torch.ones(4), condition)
        wanted = half - 0.5 * v(half, torch.full((4,), 0.5), condition)
    found = make_sampler(generator_of(job, "teacher-euler-2"), job.teacher)(x, condition)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_noises_and_labels_of_evaluation_are_not_those_of_training(job: Run):
    seed = evaluation_seed(3)
    assert seed not in (3, evaluation_seed(4))
    assert not torch.equal(sample_noise(seed, range(1), (4,)), sample_noise(3, range(1), (4,)))


# Metrics


def longhand_fid(one: np.ndarray, other: np.ndarray) -> float:
    """Heusel et al. 2017, eq. 6, as clean-fid has it, in float64."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    s, r = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.asarray(scipy.linalg.sqrtm(s @ r))
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s) + np.trace(r) - 2 * np.trace(root).real)


@pytest.mark.parametrize("key", ["teacher-euler-1", "refine-flow_map-1", "sfd_4-flow_map-3"])
def test_the_fid_of_a_row_is_that_of_its_samples_by_hand(job: Run, key: str):
    generator, seed = generator_of(job, key), evaluation_seed(3)
    noise, labels = sample_noise(seed, range(200), (1, 8, 8)), sample_labels(seed, range(200), 10)
    images = to_uint8(make_sampler(generator, job.teacher)(noise, Condition(labels=labels)))
    wanted = longhand_fid(job.extractor(images), job.extractor(job.splits.reference.images))
    assert read_json(job.dir.evaluation / f"{key}.json")["row"]["fid"] == pytest.approx(wanted, rel=1e-3)
    kept = np.load(job.dir.evaluation / f"{key}.npz")
    assert np.abs(kept["images"].astype(int) - images[:16].astype(int)).max() <= 1
    assert kept["labels"].tolist() == labels[:16].tolist()


def test_the_reference_is_the_held_out_images(job: Run):
    held_out, train = (job.extractor(part.images) for part in (job.splits.reference, job.splits.train))
    assert job.reference.real_fid == pytest.approx(longhand_fid(train, held_out), rel=1e-4)
    half = len(held_out) // 2
    assert job.reference.halves_fid == pytest.approx(longhand_fid(held_out[:half], held_out[half:]), rel=1e-4)
    assert np.array_equal(job.reference.features, held_out)


@pytest.mark.parametrize("batch_size", [200, 77, 1])
def test_metrics_do_not_depend_on_the_blocks(job: Run, tmp_path: Path, batch_size: int):
    generator = generator_of(job, "sfd_2-flow_map-2")
    found = measured(evaluator_of(job, tmp_path, batch_size=batch_size), generator)
    row = Row(**read_json(job.dir.evaluation / f"{generator.key}.json")["row"])
    pictures = [np.load(folder / found.samples)["images"] for folder in (tmp_path, job.dir.evaluation)]
    assert np.array_equal(*pictures)
    assert found.fid == pytest.approx(row.fid, rel=1e-6)
    assert (found.precision, found.recall) == (row.precision, row.recall)


def test_a_row_says_what_was_measured(job: Run, tmp_path: Path):
    told: list[int] = []
    generator = generator_of(job, "refine-flow_map-1")
    row = measured(evaluator_of(job, tmp_path), generator, told)
    assert told == [100, 100]
    assert (row.generator, row.stage, row.solver, row.nfe) == ("hd", "refine", "flow_map", 1)
    assert (row.num_samples, row.fid_features, row.samples) == (200, "digits", "refine-flow_map-1.npz")
    assert row.train_seconds == generator.train_seconds > 0
    assert row.images_per_second > 0 and 0 < row.precision <= 1
    assert {path.name for path in tmp_path.iterdir()} == {"refine-flow_map-1.json", "refine-flow_map-1.npz"}


def test_a_longer_evaluation_keeps_no_more_pictures_than_asked_for(job: Run, tmp_path: Path):
    row = measured(evaluator_of(job, tmp_path, pictures=130), generator_of(job, "teacher-euler-1"))
    assert len(np.load(tmp_path / row.samples)["images"]) == 130


# By whom, and after a kill


def features_of(evaluator: Evaluator, generator: Generator, monkeypatch: pytest.MonkeyPatch) -> list[Shard]:
    """The shards of a measurement, which are dropped at its end."""
    kept: list[Shard] = []
    with monkeypatch.context() as patch:
        patch.setattr(ShardSet, "commit", lambda shards, shard: (kept.append(shard), commit(shards, shard)))
        measured(evaluator, generator)
    return sorted(kept, key=lambda shard: shard.index)


commit = ShardSet.commit


@pytest.mark.ray
@pytest.mark.parametrize("count", [1, 2, (1, 2)])
def test_actors_measure_the_same_to_the_last_bit(
    ray_cluster: None, judged: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int | tuple[int, int]
) -> None:
    """With a second net, and a student; four blocks, the last of them short."""
    generator = generator_of(judged, "sfd_2-flow_map-2")
    evaluators = [
        evaluator_of(judged, tmp_path / str(number), batch_size=60, num_actors=actors, pictures=70)
        for number, actors in enumerate((0, count))
    ]
    here, there = (features_of(evaluator, generator, monkeypatch) for evaluator in evaluators)
    assert [shard.sha256 for shard in there] == [shard.sha256 for shard in here] and len(here) == 4
    rows = [evaluator.finished(generator) for evaluator in evaluators]
    assert rows[0] and rows[1] and replace(rows[0], images_per_second=1) == replace(rows[1], images_per_second=1)
    pictures = [np.load(evaluator.folder / "sfd_2-flow_map-2.npz")["images"] for evaluator in evaluators]
    assert np.array_equal(*pictures) and len(pictures[0]) == 70


@pytest.mark.ray
def test_two_actors_and_other_blocks_measure_the_same_to_rounding(ray_cluster: None, job: Run, tmp_path: Path) -> None:
    generator = generator_of(job, "teacher-dpmpp_3m-2")
    found = measured(evaluator_of(job, tmp_path, batch_size=77, num_actors=2), generator)
    row = Row(**read_json(job.dir.evaluation / f"{generator.key}.json")["row"])
    assert found.fid == pytest.approx(row.fid, rel=1e-6)
    assert (found.precision, found.recall, found.num_samples) == (row.precision, row.recall, 200)
    assert {path.name for path in tmp_path.iterdir()} == {f"{generator.key}.json", f"{generator.key}.npz"}


class Died(BaseException):
    pass


def test_a_killed_measurement_goes_on_where_it_was(job: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four blocks are sampled again, the others are read; the result is that of an unkilled one."""
    generator, sampled, told = generator_of(job, "refine-flow_map-1"), list[int](), list[int]()
    make = FeatureMaker.shard

    def spying(maker: FeatureMaker, index: int) -> Shard:
        if index == 2 and not sampled[2:]:
            sampled.append(-1)
            raise Died
        sampled.append(index)
        return make(maker, index)

    monkeypatch.setattr(FeatureMaker, "shard", spying)
    evaluator = evaluator_of(job, tmp_path / "killed", batch_size=60)
    with pytest.raises(Died):
        measured(evaluator, generator)
    assert evaluator.finished(generator) is None
    row = measured(evaluator, generator, told)
    assert sampled == [0, 1, -1, 2, 3] and told == [120, 60, 20]
    whole = measured(evaluator_of(job, tmp_path / "whole", batch_size=60), generator)
    assert replace(row, images_per_second=1) == replace(whole, images_per_second=1)
    pictures = [np.load(tmp_path / kind / row.samples)["images"] for kind in ("killed", "whole")]
    assert np.array_equal(*pictures)


def test_blocks_of_another_size_or_of_other_weights_are_not_gone_on_with(job: Run, tmp_path: Path) -> None:
    generator = generator_of(job, "refine-flow_map-1")
    begun = evaluator_of(job, tmp_path, batch_size=60)
    maker = maker_of(job, generator, begun)
    begun.shards(generator).commit(maker.shard(0))
    assert len(begun.shards(generator).shards) == 1
    assert not begun.shards(replace(generator, identity="retrained")).shards
    other = evaluator_of(job, tmp_path, batch_size=50)
    assert not other.shards(generator).shards
    measured(other, generator)
    assert {path.name for path in tmp_path.iterdir()} == {f"{generator.key}.json", f"{generator.key}.npz"}


def test_the_rate_is_known_where_every_block_was_adopted(job: Run, tmp_path: Path) -> None:
    generator = generator_of(job, "refine-flow_map-1")
    evaluator = evaluator_of(job, tmp_path)
    maker = maker_of(job, generator, evaluator)
    for index in range(2):
        maker.shard(index)
    assert [shard.seconds for shard in evaluator.shards(generator).shards] == [0, 0]
    assert 0 < measured(evaluator, generator).images_per_second < 1e6


# A second feature net


@pytest.fixture(scope="module")
def judged(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run with a second net, in a directory of its own."""
    folder = tmp_path_factory.mktemp("second")
    splits = load_images(finished.recipe.data)
    make_feature_net(folder / "bars", splits, "denoise", FeatureTraining(num_steps=2), 0, lambda _: None)
    shutil.copytree(finished.run_dir, folder / "run")
    recipe = override(finished.recipe, {"evaluate.second_features": str(folder / "bars")})
    return open_run(recipe, folder / "run")


def test_the_second_fid_is_that_of_the_same_samples_under_the_second_net(job: Run, judged: Run, tmp_path: Path):
    generator, extractor = generator_of(job, "teacher-euler-2"), judged.second_extractor
    assert extractor is not None and extractor.name == "bars"
    row = measured(evaluator_of(judged, tmp_path, pictures=200, batch_size=77), generator)
    images, held_out = np.load(tmp_path / row.samples)["images"], judged.splits.reference.images
    assert row.second_features == "bars"
    assert row.second_fid == pytest.approx(longhand_fid(extractor(images), extractor(held_out)), rel=1e-3)
    first = read_json(job.dir.evaluation / "teacher-euler-2.json")["row"]
    assert row.fid == pytest.approx(first["fid"], rel=1e-6) and row.precision == first["precision"]
    assert first["second_fid"] is None and first["second_features"] == ""
    assert evaluator_of(judged, tmp_path, pictures=200).finished(generator) == row


def test_the_report_says_what_real_images_get_under_the_second_net(job: Run, judged: Run, tmp_path: Path):
    row = measured(evaluator_of(judged, tmp_path), generator_of(job, "teacher-euler-1"))
    judged.report([row])
    about, extractor = read_report(judged.dir.path / "report.json"), judged.second_extractor
    assert extractor is not None
    train, held_out = (extractor(part.images) for part in (judged.splits.train, judged.splits.reference))
    assert about.reference["second_features"] == "bars" and about.rows == [row]
    assert about.reference["second_real_fid"] == pytest.approx(longhand_fid(train, held_out), rel=1e-3)
    half = len(held_out) // 2
    wanted = longhand_fid(held_out[:half], held_out[half:])
    assert about.reference["second_halves_fid"] == pytest.approx(wanted, rel=1e-3)
    assert "second_features" not in read_report(job.dir.path / "report.json").reference


def test_rows_from_before_a_second_net_stay_valid_without_it_and_are_refused_with_it(job: Run, judged: Run):
    generator = generator_of(job, "refine-flow_map-1")
    alone, together = job.evaluator().inputs(generator), judged.evaluator().inputs(generator)
    second = judged.second_extractor
    assert second is not None and together == alone | {"second_feature_net": second.fingerprint}
    assert "second_feature_net" not in alone
    with pytest.raises(ValueError, match="second_feature_net: not set there, "):
        evaluator_of(judged, job.dir.evaluation).finished(generator)


def test_a_net_for_other_images_is_refused_before_anything_is_done(judged: Run, tmp_path: Path):
    config = FeatureNetConfig(size=12, channels=1, widths=(4, 4), num_classes=2)
    (tmp_path / "other").mkdir()
    save_feature_net(tmp_path / "other", FeatureNet(config), {})
    for key in ("features", "second_features"):
        recipe = override(judged.recipe, {f"evaluate.{key}": str(tmp_path / "other")})
        with pytest.raises(ValueError, match=r"the feature net other takes images of .* these are \(1, 8, 8\)"):
            open_run(recipe, tmp_path / "run").execute(0.0)
    assert not (tmp_path / "run").exists()


# Operations: a product of (m, k) and (k, n) is 2 m k n.


def dit_flops(width: int, depth: int, tokens: int, area: int, *, student: bool) -> int:
    """One image through the native DiT: linear layers and attention; norms and activations are not counted."""
    embedding = 2 * (64 * width + width * width)
    block = 2 * tokens * (3 * width * width + width * width + 8 * width * width) + 2 * 6 * width * width
    attention = 2 * 2 * tokens * tokens * width
    ends = 2 * tokens * (2 * area * width) + 2 * 2 * width * width
    return embedding * (2 if student else 1) + depth * (block + attention) + ends


@pytest.mark.parametrize(
    ("key", "calls", "student"),
    [("teacher-euler-1", 1, False), ("teacher-dpmpp_3m-2", 2, False), ("refine-flow_map-1", 1, True),
     ("sfd_4-flow_map-3", 3, True)],
)  # fmt: skip
def test_operations_are_those_of_a_longhand_count(job: Run, key: str, calls: int, student: bool):
    generator = generator_of(job, key)
    found = operations(maker_of(job, generator))
    assert found == calls * dit_flops(64, 4, 16, 4, student=student)
    row = read_json(job.dir.evaluation / f"{key}.json")["row"]
    assert row["gflops_per_image"] == found / 1e9 and row["nfe"] == calls


# Reuse


def test_a_row_is_found_again(job: Run):
    evaluator = job.evaluator()
    for generator in job.generators():
        row = evaluator.finished(generator)
        assert row is not None and row.nfe == generator.calls_per_image


def test_a_row_without_its_pictures_or_json_is_not_finished(job: Run, copied: Finished):
    evaluator, generator = evaluator_of(job, copied.run_dir / "evaluate"), generator_of(job, "refine-flow_map-1")
    (evaluator.folder / "refine-flow_map-1.npz").unlink()
    assert evaluator.finished(generator) is None
    (evaluator.folder / "refine-flow_map-1.json").unlink()
    assert evaluator.finished(generator) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 300}, "num_samples: 200 there, 300 here"),
        ({"neighbours": 3}, "neighbours: 5 there, 3 here"),
        ({"pictures": 8}, "pictures: 16 there, 8 here"),
    ],
)
def test_a_row_of_other_settings_is_refused_by_name(job: Run, changes: dict[str, int], message: str):
    evaluator = evaluator_of(job, job.dir.evaluation, **changes)
    with pytest.raises(ValueError, match=f"evaluation refine-flow_map-1 was made from other inputs: {message}"):
        evaluator.finished(generator_of(job, "refine-flow_map-1"))


def test_a_row_of_another_teacher_is_refused_and_one_of_retrained_weights_is_measured_again(job: Run):
    evaluator = job.evaluator()
    with pytest.raises(ValueError, match="identity: "):
        evaluator.finished(replace(generator_of(job, "teacher-euler-1"), identity="another"))
    assert evaluator.finished(replace(generator_of(job, "refine-flow_map-1"), identity="another")) is None


def test_a_row_against_another_reference_is_refused(job: Run, copied: Finished):
    stored = copied.run_dir / "evaluate" / "refine-flow_map-1.json"
    about = read_json(stored)
    write_json(stored, {**about, "inputs": {**about["inputs"], "reference": "another"}})
    with pytest.raises(ValueError, match="reference: another there, "):
        evaluator_of(job, copied.run_dir / "evaluate").finished(generator_of(job, "refine-flow_map-1"))


def test_all_that_makes_a_generator_is_among_its_inputs(job: Run):
    inputs = job.evaluator().inputs
    generator = generator_of(job, "sfd_2-flow_map-2")
    for changes in ({"grid": (1.0, 0.0)}, {"afs": True}, {"solver": "euler"}, {"identity": "x"}):
        assert inputs(replace(generator, **changes)) != inputs(generator)
    assert inputs(replace(generator, label="x", train_seconds=9.0)) == inputs(generator)


# Configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 1}, "num_samples must be at least 2"),
        ({"batch_size": 0}, "batch_size, neighbours and pictures at least 1"),
        ({"features": ""}, "features must name a net"),
        ({"num_actors": (2, 1)}, "num_actors must not be negative; of two, the first must be at least 1 and not above"),
        ({"cpus_per_actor": 0.0}, "cpus_per_actor must be positive"),
        ({"second_features": "nets/digits"}, "second_features one of another name; given 'digits' and 'nets/digits'"),
        ({"num_samples": 5}, "neighbours must be below num_samples and pairs; given 5, 5 and 10000"),
        ({"solvers": {"rk4": (1,)}}, "solvers: 'rk4' is not one of euler, "),
        ({"solvers": {"euler": ()}}, "solvers.euler: step counts must be at least 1"),
        ({"solvers": {"euler": (1, 1)}}, "solvers.euler: each step count once"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(**changes)
