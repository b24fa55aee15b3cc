"""Flow matching against its formula longhand, the spread of its times, and a flow whose least loss is known."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hd_core.objectives.flow_matching import FlowMatching
from hd_core.objectives.turns import Batch, Cast
from hd_core.step import OptimizerConfig, train_step
from hd_core.types import Condition
from tests.oracles import GAUSSIAN, points
from tests.toys import CLASSES, SHAPE, Perceptron, batch_of, cast_of, cast_with, draws_of, only_turn, state_of

NULL = Condition(labels=torch.tensor([CLASSES]))


class Witness:
    """A student that answers with its input's sine, and remembers what it was asked."""

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        assert condition.labels is not None
        self.x_t, self.t, self.r, self.labels = x_t, t, r, condition.labels
        return x_t.sin()


def drawn(rows: int, seed: int = 0) -> Batch:
    """Noise, and images of the Gaussian, with classes in turn."""
    condition = Condition(labels=torch.arange(rows) % CLASSES)
    images = GAUSSIAN.mean + GAUSSIAN.std * points(rows, *SHAPE, seed=2 * seed + 1)
    noise = points(rows, *SHAPE, seed=2 * seed)
    return Batch(noise=noise, condition=condition, images=images, images_condition=condition)


def asked(objective: FlowMatching, rows: int = 5, null: Condition | None = NULL, seed: int = 5) -> Witness:
    student = Witness()
    only_turn(objective, cast_with(student, null_condition=null), drawn(rows), draws_of(slice(0, rows), rows, seed))
    return student


def ends(batch: Batch) -> tuple[Tensor, Tensor]:
    assert batch.images is not None
    return batch.images, batch.noise


# The loss


def test_one_turn_longhand():
    """Point, target and mean number by number, from the time that the student was asked at."""
    student, batch = Witness(), batch_of(5)
    terms = only_turn(FlowMatching(), cast_with(student), batch, draws_of(slice(0, 5), 5))
    x_0, eps = ends(batch)
    for row, t in enumerate(student.t.tolist()):
        x_t = (1 - t) * x_0[row] + t * eps[row]
        torch.testing.assert_close(student.x_t[row], x_t, rtol=1e-12, atol=1e-12)
        parts = zip(*map(_numbers, (x_t, eps[row], x_0[row])), strict=True)
        longhand = sum((math.sin(x) - (e - d)) ** 2 for x, e, d in parts) / 4
        assert terms.losses["flow_matching"][row].item() == pytest.approx(longhand, rel=1e-12)
    assert torch.equal(student.r, student.t)


def _numbers(image: Tensor) -> list[float]:
    return image.flatten().tolist()


def test_the_velocity_runs_from_data_to_noise():
    batch = batch_of(6)
    x_0, eps = ends(batch)
    losses = [
        only_turn(FlowMatching(), cast_with(lambda *_, v=v: v), batch, draws_of(slice(0, 6), 6)).losses["flow_matching"]
        for v in (eps - x_0, x_0 - eps)
    ]
    assert losses[0].max() == 0
    torch.testing.assert_close(losses[1], 4 * (eps - x_0).square().flatten(1).mean(1), rtol=1e-12, atol=0)


def test_the_exact_velocity_has_the_least_loss_there_is():
    """For N(mean, std^2) the variance of ``eps - x_0`` given ``x_t`` is ``std^2 / ((1 - t)^2 std^2 + t^2)``."""
    rows, seen = 20_000, []

    def loss(factor: float) -> float:
        def student(x_t: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
            seen.append(t.double())
            return factor * GAUSSIAN.velocity(x_t, t)

        cast, draws = cast_with(student), draws_of(slice(0, rows), rows)
        return only_turn(FlowMatching(), cast, batch, draws).total.item()

    batch = drawn(rows)
    exact, larger, smaller, reversed_ = loss(1.0), loss(1.2), loss(0.8), loss(-1.0)
    least = (GAUSSIAN.std**2 / ((1 - seen[0]) ** 2 * GAUSSIAN.std**2 + seen[0] ** 2)).mean().item()
    assert exact == pytest.approx(least, rel=0.02)
    assert exact < 0.99 * min(larger, smaller)
    assert reversed_ > 2 * exact


def test_training_finds_the_velocity():
    """Of the Gaussian: what is left is less than a tenth of its variance over points and times."""
    student, objective = Perceptron(2, seed=1), FlowMatching(label_dropout=0.0)
    state = state_of({"student": student}, OptimizerConfig(learning_rate=1e-2, decay="cosine"))
    for step in range(500):
        cast, draws = cast_of({"student": student}), draws_of(slice(0, 128), 128, step)
        train_step(state, objective, cast, drawn(128, step), draws, progress=step / 500)
    held_out, t = drawn(512, 10**6), torch.linspace(0.2, 0.8, 512, dtype=torch.float64)
    x_0, eps = ends(held_out)
    x_t = (1 - t).reshape(-1, 1, 1, 1) * x_0 + t.reshape(-1, 1, 1, 1) * eps
    with torch.no_grad():
        error = student(x_t, t, t, held_out.condition) - GAUSSIAN.velocity(x_t, t)
    assert error.square().mean() < 0.1 * GAUSSIAN.velocity(x_t, t).var()


# Times


def test_uniform_times():
    t = asked(FlowMatching(uniform_share=1.0), rows=20_000).t.double()
    assert 0 <= t.min() < 0.001 and 0.999 < t.max() < 1
    assert t.mean().item() == pytest.approx(1 / 2, abs=0.01)
    assert t.var().item() == pytest.approx(1 / 12, abs=0.003)


def test_logit_normal_times():
    logit = torch.logit(asked(FlowMatching(uniform_share=0.0), rows=20_000).t.double())
    assert logit.mean().item() == pytest.approx(0, abs=0.03)
    assert logit.std().item() == pytest.approx(1, abs=0.03)


def test_a_share_of_the_times_is_uniform():
    """``P(t < 0.1) = share 0.1 + (1 - share) Phi(logit 0.1)``: logit-normal times are seldom so small."""
    normal = 0.5 * math.erfc(math.log(9) / math.sqrt(2))
    for share in (0.25, 0.7):
        t = asked(FlowMatching(uniform_share=share), rows=20_000).t
        expected = share * 0.1 + (1 - share) * normal
        assert (t < 0.1).double().mean().item() == pytest.approx(expected, abs=0.006)
        assert (t > 0.9).double().mean().item() == pytest.approx(expected, abs=0.006)


# The class


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_a_share_of_rows_is_trained_without_a_class(share: float):
    rows = 10_000
    labels = asked(FlowMatching(label_dropout=share), rows).labels
    without = labels == CLASSES
    assert without.double().mean().item() == pytest.approx(share, abs=0.02)
    assert torch.equal(labels[~without], (torch.arange(rows) % CLASSES)[~without])


def test_all_or_none():
    assert torch.equal(asked(FlowMatching(label_dropout=0.0)).labels, torch.arange(5) % CLASSES)
    assert torch.equal(asked(FlowMatching(label_dropout=1.0)).labels, torch.full((5,), CLASSES))
    assert torch.equal(asked(FlowMatching(label_dropout=1.0), null=None).labels, torch.arange(5) % CLASSES)


def test_the_class_is_dropped_apart_from_the_time():
    """Rows without a class are no earlier or later than the others."""
    student = asked(FlowMatching(label_dropout=0.5), rows=20_000)
    without = student.labels == CLASSES
    assert (student.t[without].mean() - student.t[~without].mean()).abs() < 0.015


def test_the_class_is_that_of_the_image():
    """Not that of the batch's own condition, which belongs to the noise."""
    batch, student = batch_of(4), Witness()
    batch = replace(batch, condition=Condition(labels=torch.tensor([2, 2, 2, 2])))
    cast: Cast = cast_with(student, null_condition=NULL)
    only_turn(FlowMatching(label_dropout=0.0), cast, batch, draws_of(slice(0, 4), 4))
    assert student.labels.tolist() == [0, 1, 2, 0]


def test_every_part_of_a_condition_is_replaced():
    rows = torch.tensor([True, False, True])
    text = Condition(embeddings=points(3, 2, 4), mask=torch.ones(3, 2, dtype=torch.bool))
    empty = Condition(embeddings=torch.zeros(1, 2, 4, dtype=torch.float64), mask=torch.tensor([[True, False]]))
    found = text.replaced(rows, empty)
    assert found.labels is None and found.embeddings is not None and found.mask is not None
    assert text.embeddings is not None
    assert found.embeddings[rows].abs().max() == 0 and torch.equal(found.embeddings[1], text.embeddings[1])
    assert found.mask.tolist() == [[True, False], [True, True], [True, False]]


@pytest.mark.parametrize("name", ["uniform_share", "label_dropout"])
@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_and_1_is_refused_by_name(name: str, share: float):
    with pytest.raises(ValueError, match=f"{name} is a share of rows, between 0 and 1; given {share}"):
        FlowMatching(**{name: share})  # pyright: ignore[reportArgumentType]
