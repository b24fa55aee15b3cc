"""The spread within classes: numbers by hand, the pairs it stands for, and what must not change it."""

import math

import pytest
import torch
from torch import Tensor

from hd_core.metrics.diversity import within_class_spread
from tests.oracles import points


def labelled(*sizes: int) -> Tensor:
    return torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])


def by_pairs(samples: Tensor, labels: Tensor) -> float:
    """Root of half the mean squared distance per value between two samples of one class, classes by their rows."""
    flat, total, rows = samples.flatten(1).tolist(), 0.0, 0
    for label in set(labels.tolist()):
        group = [flat[i] for i in range(len(flat)) if labels[i] == label]
        pairs = [(a, b) for i, a in enumerate(group) for j, b in enumerate(group) if i != j]
        if pairs:
            squares = [sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a) for a, b in pairs]
            total, rows = total + len(group) * sum(squares) / len(squares) / 2, rows + len(group)
    return math.sqrt(total / rows)


def test_two_classes_by_hand():
    """Variances (2 + 8) / 2 = 5 of two rows, and (1 + 0) / 2 of three: the root of (2 * 5 + 3 * 0.5) / 5."""
    samples = torch.tensor([[0.0, 1.0], [2.0, 5.0], [7.0, 3.0], [8.0, 3.0], [9.0, 3.0]])
    assert within_class_spread(samples, labelled(2, 3)) == pytest.approx(math.sqrt(11.5 / 5), rel=1e-14)


def test_it_is_half_the_distance_of_pairs():
    samples, labels = points(12, 1, 2, 2), labelled(5, 3, 4)
    assert within_class_spread(samples, labels) == pytest.approx(by_pairs(samples, labels), rel=1e-12)


def test_normals_have_their_standard_deviation():
    samples = 0.3 * points(4000, 1, 2, 2)
    assert within_class_spread(samples, torch.arange(4000) % 7) == pytest.approx(0.3, rel=0.02)


def test_alike_within_a_class_is_0_however_classes_differ():
    pictures, labels = points(3, 1, 2, 2), labelled(4, 2, 5)
    assert within_class_spread(pictures[labels], labels) == 0
    assert within_class_spread(pictures[labels], torch.zeros_like(labels)) > 0.5


def test_where_a_class_lies_does_not_count():
    samples, labels = points(9, 1, 2, 2), labelled(4, 5)
    moved = samples + 3.0 * labels.reshape(-1, 1, 1, 1)
    assert within_class_spread(moved, labels) == pytest.approx(within_class_spread(samples, labels), rel=1e-12)
    assert within_class_spread(2 * samples, labels) == pytest.approx(
        2 * within_class_spread(samples, labels), rel=1e-12
    )


def test_order_does_not_count():
    samples, labels = points(12, 1, 2, 2), labelled(5, 3, 4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    shuffled = within_class_spread(samples[order], labels[order])
    assert shuffled == pytest.approx(within_class_spread(samples, labels), rel=1e-13)
    assert shuffled != pytest.approx(within_class_spread(samples[order], labels), rel=1e-3)


def test_a_class_with_one_row_says_nothing():
    samples, labels = points(8, 1, 2, 2), labelled(4, 4)
    alone = torch.cat([samples, 100 * torch.ones(1, 1, 2, 2)]), torch.cat([labels, torch.tensor([9])])
    assert within_class_spread(*alone) == within_class_spread(samples, labels)
    assert within_class_spread(samples, torch.arange(8)) == 0


def test_small_numbers_on_a_large_mean_keep_their_spread():
    """In float64: float32 would lose a spread of 1e-4 on a mean of 1e4."""
    samples = 1e4 + 1e-4 * points(100, 1, 2, 2)
    assert within_class_spread(samples, torch.zeros(100, dtype=torch.int64)) == pytest.approx(1e-4, rel=0.1)
    assert isinstance(within_class_spread(samples.float(), torch.zeros(100, dtype=torch.int64)), float)
