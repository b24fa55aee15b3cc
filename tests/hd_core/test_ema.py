"""The moving average in numbers."""

import copy

import pytest
import torch
from torch import nn

from hd_core.ema import update_ema, warmed_decay


def test_one_update_in_numbers():
    average, network = nn.Linear(1, 1), nn.Linear(1, 1)
    with torch.no_grad():
        average.weight.fill_(2.0)
        network.weight.fill_(4.0)
    update_ema(average, network, 0.75)
    assert average.weight.item() == pytest.approx(0.75 * 2 + 0.25 * 4, rel=1e-7)  # float32
    assert network.weight.item() == 4.0
    assert average.weight.requires_grad
    assert average.weight.grad_fn is None


def test_the_ends_of_the_decay():
    average, network = nn.Linear(3, 3), nn.Linear(3, 3)
    before = copy.deepcopy(average)
    update_ema(average, network, 1.0)
    assert torch.equal(average.weight, before.weight)
    update_ema(average, network, 0.0)
    torch.testing.assert_close(average.weight, network.weight, rtol=1e-6, atol=1e-7)  # the last bit of a lerp


def test_buffers_are_copied_and_not_averaged():
    average, network = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    network(torch.randn(8, 2))
    update_ema(average, network, 0.99)
    assert network.num_batches_tracked is not None
    assert torch.equal(average.running_mean, network.running_mean)  # pyright: ignore[reportArgumentType]
    assert average.num_batches_tracked == network.num_batches_tracked == 1


def test_decay_warms_up():
    assert warmed_decay(0.999, 0) == pytest.approx(0.1)
    assert warmed_decay(0.999, 8) == pytest.approx(0.5)
    assert warmed_decay(0.999, 10**6) == 0.999
    assert warmed_decay(0.0, 100) == 0.0
