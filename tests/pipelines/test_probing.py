"""Probes against figures of one's own; that they change nothing; how a fake score lags; and what a judge looked at."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hd_core.networks.student import FlowMapStudent
from hd_core.objectives.adversarial import Adversarial
from hd_core.objectives.dmd import DMD
from hd_core.random import sample_labels, sample_noise
from hd_core.step import OptimizerConfig, Player, TrainState
from hd_core.times import GridConfig
from hd_core.types import Condition
from pipelines.artifacts import file_hash
from pipelines.cast import build
from pipelines.curve import Curve
from pipelines.data import ImageSet, to_model
from pipelines.extractor import Extractor
from pipelines.features import load_extractor
from pipelines.feed import Feed
from pipelines.group import Group
from pipelines.probing import Probe, save_looks
from pipelines.stages import ProbeConfig, StageJob
from pipelines.trainer import StageTrainer, Watch
from tests.oracles import GaussianFlow
from tests.pipelines.probed import RECIPE, Home, make_home, points, trained
from tests.pipelines.tiny import trainer_of
from tests.toys import Follower, Generator, cast_with


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return make_home(tmp_path_factory.mktemp("probing"))


@pytest.fixture(scope="module")
def sketch(home: Home) -> StageJob:
    """With probes that change nothing."""
    return trained(home.job("sketch", "sketch"))


@pytest.fixture(scope="module")
def refiner(home: Home) -> StageTrainer:
    """A worker that has trained three players."""
    trainer = trainer_of(home.job("refine", "refine"))
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def refine(refiner: StageTrainer) -> StageJob:
    return refiner.job


# What a probe says


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The distance of two sets of features, by the eigenvalues of the product of their covariances."""
    shift = a.mean(0) - b.mean(0)
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.real(np.sqrt(np.linalg.eigvals(s @ t).astype(complex))).sum()
    return float(shift @ shift + np.trace(s) + np.trace(t) - 2 * roots)


def spread(values: np.ndarray, labels: np.ndarray) -> float:
    groups = [values[labels == label] for label in set(labels.tolist())]
    groups = [group for group in groups if len(group) > 1]
    total = sum(((g - g.mean(0)) ** 2).sum(0).mean() * len(g) / (len(g) - 1) for g in groups)
    return float(np.sqrt(total / sum(map(len, groups))))


def test_the_figures_are_those_of_the_average_against_the_training_images(home: Home, sketch: StageJob):
    splits = home.run.splits
    assert splits.validation is None
    check_figures(home, sketch, splits.train, splits.reference)


def test_images_that_are_kept_from_training_are_what_it_is_scored_against(tmp_path: Path):
    kept = RECIPE.replace("held_out: 1697", "held_out: 1647, validation: 60")
    home = make_home(tmp_path, kept)
    job, splits = trained(home.job("sketch", "sketch")), home.run.splits
    assert splits.validation is not None and job.images is not None and job.images.spec.rows == len(splits.train) == 90
    check_figures(home, job, splits.validation, splits.train)


def test_features_of_real_images_are_made_once(home: Home, sketch: StageJob, monkeypatch: pytest.MonkeyPatch):
    made: list[int] = []
    kept = Extractor.__call__
    monkeypatch.setattr(Extractor, "__call__", lambda net, images: made.append(len(images)) or kept(net, images))
    home.run.make_judged_by()
    assert StageTrainer(sketch, Group(), Watch()).probe
    assert sum(made) == 1  # a picture that tells their width


def check_figures(home: Home, sketch: StageJob, train: ImageSet, held_out: ImageSet) -> None:
    """Computed once more, from the weights that were saved at the step of the last probe."""
    probe = StageTrainer(sketch, Group(), Watch()).probe
    assert probe is not None
    student = FlowMapStudent(copy.deepcopy(home.run.teacher.backbone))
    student.load_state_dict(load_file(sketch.weights))
    noise, labels = sample_noise(probe.seed, range(40), (1, 8, 8)), sample_labels(probe.seed, range(40), 10)
    with torch.no_grad():
        x = noise - student(noise, torch.ones(40), torch.zeros(40), Condition(labels=labels))
    levels = ((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    extractor = load_extractor("digits")
    made, real, others = (np.asarray(extractor(i), np.float64) for i in (levels, train.images, held_out.images))
    last = Curve.read(sketch.curve)[-1]
    assert last["step"] == 6
    assert last["probe/fid"] == pytest.approx(frechet(made, real), rel=1e-3)
    assert abs(last["probe/fid"] - frechet(made, others)) > 0.02 * last["probe/fid"], "far beyond that tolerance"
    share = spread(x.flatten(1).double().numpy(), labels.numpy())
    share /= spread(to_model(train.in_memory()).flatten(1).double().numpy(), train.labels)
    assert last["probe/diversity"] == pytest.approx(share, rel=1e-4)


def test_there_is_a_probe_at_every_second_step_and_at_the_last(sketch: StageJob, refine: StageJob):
    for job, steps in ((sketch, [2, 4, 6]), (refine, [2, 4, 5])):
        found = [line["step"] for line in Curve.read(job.curve) if "probe/fid" in line]
        assert found == steps
        assert all(
            ("probe/fake_score_lag" in line) == (job is refine and "probe/fid" in line)
            for line in Curve.read(job.curve)
        )


def test_a_probe_is_logged_between_points_of_the_curve_too(home: Home):
    job = home.job("sketch", "seldom")
    job = trained(replace(job, stage=replace(job.stage, log_every=100)))
    assert [line["step"] for line in Curve.read(job.curve)] == [1, 2, 3, 4, 6]


@pytest.mark.parametrize("stage", ["sketch", "refine"])
def test_probes_change_no_bit_of_the_training(home: Home, stage: str, request: pytest.FixtureRequest):
    """Nor does trying how the fake score lags."""
    probed = request.getfixturevalue(stage)
    plain = trained(home.job(stage, f"{stage}-plain", every=0, fake_score_moves=0))
    assert file_hash(plain.weights) == file_hash(probed.weights)
    assert points(plain) == points(probed)
    assert not (Path(plain.folder) / "best.json").exists()


def test_a_second_look_sees_the_same(refiner: StageTrainer):
    assert refiner.probe is not None
    seen = refiner.probe.look(refiner.state)
    last = Curve.read(refiner.job.curve)[-1]
    assert seen == {name: value for name, value in last.items() if name.startswith("probe/")} and len(seen) == 3


def test_a_student_that_is_not_a_number_is_neither_kept_nor_called_collapsed(home: Home):
    job = home.job("sketch", "diverged", every=1)
    optimizers = replace(job.stage.optimizers, student=OptimizerConfig(learning_rate=1e30))
    job = replace(job, stage=replace(job.stage, optimizers=optimizers))
    with pytest.raises(FloatingPointError, match=r"^stage sketch diverged"):
        trained(job)
    assert not (Path(job.folder) / "student-best.safetensors").exists()
    assert not Curve.read(job.curve)


# How the fake score lags


class Toy:
    """A probe of a generator of ``N(mean, std^2)`` whose fake score is the flow of another Gaussian."""

    def __init__(self, mean: float, std: float, fake: tuple[float, float], moves: int, rate: float = 3e-2) -> None:
        self.objective = DMD(adversarial=Adversarial(weight=0.0))
        stage = SimpleNamespace(batch_size=512, objective=self.objective)
        self.follower = Follower(*fake)
        self.cast = cast_with(Generator(mean, std), fake_score=self.follower)
        self.probe: Any = Probe.__new__(Probe)
        self.probe.job = SimpleNamespace(stage=stage, train=SimpleNamespace(autocast="none"))
        self.probe.teacher = SimpleNamespace(
            shape=(1, 4, 4), num_classes=3, device="cpu", condition=lambda labels: Condition(labels=labels)
        )
        self.probe.cast, self.probe.seed = self.cast, 7
        self.probe.config = ProbeConfig(every=1, fake_score_moves=moves)
        player = Player(network=self.follower, config=OptimizerConfig(learning_rate=rate))
        self.state = TrainState(players={"fake_score": player}, average=self.follower, ema_decay=0.9, step=3)

    @property
    def lag(self) -> float:
        return self.probe.fake_score_lag(self.state, self.objective)


def test_a_converged_fake_score_does_not_lag():
    assert abs(Toy(0.4, 0.5, (0.4, 0.5), moves=30, rate=1e-3).lag) < 5e-3


def test_a_stale_one_lags_by_what_it_costs():
    """Its loss over the least one: 1 plus the mean squared difference of the velocities over ``E[std^2 / s_t^2]``."""
    toy, flow, stale = (
        Toy(0.4, 0.5, (0.9, 0.7), moves=60),
        GaussianFlow(mean=0.4, std=0.5),
        GaussianFlow(mean=0.9, std=0.7),
    )
    source = torch.Generator().manual_seed(0)
    t = torch.rand(200_000, generator=source).double()
    x_0, eps = (torch.randn(200_000, 1, generator=source).double() for _ in range(2))
    x_t = (1 - t)[:, None] * (0.4 + 0.5 * x_0) + t[:, None] * eps
    least = (0.25 / ((1 - t) ** 2 * 0.25 + t**2)).mean()
    expected = ((stale.velocity(x_t, t) - flow.velocity(x_t, t)).square().mean() / least).item()
    assert expected > 0.2
    assert toy.lag == pytest.approx(expected, rel=0.1)


def test_the_longer_the_copy_trains_the_more_is_seen():
    lags = [Toy(0.4, 0.5, (0.9, 0.7), moves=moves).lag for moves in (1, 5, 60)]
    assert 0 < lags[0] < lags[1] < lags[2]


def test_the_fake_score_itself_is_left_alone(refiner: StageTrainer):
    """Weights, moments, moves, what is frozen, and the generators of random numbers."""
    state, probe = refiner.state, refiner.probe
    assert probe is not None and isinstance(refiner.job.stage.objective, DMD)
    before, random = _everything(state), torch.get_rng_state()
    assert probe.fake_score_lag(state, refiner.job.stage.objective) != 0
    after = _everything(state)
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert torch.equal(random, torch.get_rng_state())


def _everything(state: TrainState) -> dict[str, Tensor]:
    found = {f"average/{key}": value.clone() for key, value in state.average.state_dict().items()}
    for name, player in state.players.items():
        found |= {f"{name}/{key}": value.clone() for key, value in player.network.state_dict().items()}
        for key, parameter in player.network.named_parameters():
            found[f"{name}/{key}/trainable"] = torch.tensor(parameter.requires_grad)
            found[f"{name}/{key}/gradient"] = torch.zeros(0) if parameter.grad is None else parameter.grad.clone()
        for index, slot in player.optimizer.state_dict()["state"].items():
            found |= {f"{name}/{index}/{key}": value.clone() for key, value in slot.items()}
        found[f"{name}/moves"] = torch.tensor([player.moves, player.network.training])
    return found


@pytest.mark.parametrize("t_max", [1.0, 0.8])
def test_noise_starts_where_the_generators_grid_does(home: Home, t_max: float):
    """Its standard deviation is the first time: in training, in the lag's turns and in a probe's samples."""
    job = home.job("refine", "noise")
    objective = DMD(intervals=2, grid=GridConfig(t_max=t_max), adversarial=Adversarial(weight=0.0))
    job = replace(job, stage=replace(job.stage, objective=objective, batch_size=64))
    _, cast = build(job, home.run.teacher)
    starts: list[Tensor] = []

    def student(x_t: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        if t[0] == objective.sampling_grid()[0].to(t):
            starts.append(x_t)
        return 0 * x_t

    cast, probe = replace(cast, student=student), Probe(job, home.run.teacher, cast)
    batch = next(iter(Feed(job, home.run.teacher, slice(0, 64), 0).batches(1)))
    objective.generate(student, batch)
    probe._fake_turn(objective, cast, 0, 0)
    probe.sample(student)
    assert len(starts) == 3
    for x in starts:
        assert x.std().item() == pytest.approx(t_max, rel=0.05)


# What the discriminator looked at


def test_what_the_discriminator_says_is_left_behind(home: Home, refine: StageJob):
    with np.load(refine.looks) as file:
        found = dict(file)
    assert set(found) == {f"{kind}_{what}" for kind in ("fake", "real") for what in ("images", "logits", "weights")}
    for kind in ("fake", "real"):
        assert found[f"{kind}_images"].shape == (32, 8, 8, 1) and found[f"{kind}_images"].dtype == np.uint8
        assert found[f"{kind}_logits"].shape == (32, 2) and np.isfinite(found[f"{kind}_logits"]).all()
        weights = found[f"{kind}_weights"]
        assert weights.shape == (32, 2, 2, 16) and weights.min() >= 0
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
        assert weights.std() > 0, "not uniform any more"
    assert np.array_equal(found["real_images"], home.run.splits.train.images[:32])
    assert not np.array_equal(found["fake_images"], found["real_images"])


def test_looking_moves_no_estimate_of_the_spectral_norm(refiner: StageTrainer, tmp_path: Path):
    job, network = replace(refiner.job, folder=str(tmp_path)), refiner.state.players["discriminator"].network
    network.train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    estimates = [key for key in before if key.endswith(("._u", "._v"))]
    save_looks(job, refiner.teacher, refiner.state, refiner.cast)
    assert estimates and job.looks.is_file()
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    network.train()
    network([torch.randn(2, 16, refiner.teacher.feature_widths[0])] * 2)
    assert not torch.equal(before[estimates[0]], network.state_dict()[estimates[0]]), "as one call in training does"


def test_a_stage_without_a_discriminator_leaves_none(sketch: StageJob):
    assert not sketch.looks.exists()
    assert json.loads(sketch.manifest.read_text())["kept"] == "last"
