"""Backbone, student and feature taps, in float64 where numbers are compared."""

import math

import pytest
import torch
from torch import Tensor, nn

from hd_core.networks.dit import DiT, DiTConfig, ScalarEmbedding
from hd_core.networks.features import FeatureTaps
from hd_core.networks.student import FlowMapStudent
from hd_core.types import Condition
from tests.oracles import points

CONFIG = DiTConfig(image_size=4, channels=2, patch_size=2, width=16, depth=3, heads=2, num_classes=3)
LABELS = Condition(labels=torch.tensor([0, 2, 3]))
TIMES = torch.tensor([0.2, 0.7, 1.0], dtype=torch.float64)


def awake(network: nn.Module) -> nn.Module:
    """Random weights everywhere, so that the layers that start at zero do not hide what lies before them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network.double()


def awake_dit() -> DiT:
    dit = awake(DiT(CONFIG))
    assert isinstance(dit, DiT)
    return dit


@pytest.fixture
def dit() -> DiT:
    return awake_dit()


@pytest.fixture
def x() -> Tensor:
    return points(3, 2, 4, 4)


class TestScalarEmbedding:
    def test_longhand(self):
        embedding = ScalarEmbedding(5, num_frequencies=3, max_frequency=64.0).double()
        angles = torch.tensor([[0.3, 0.3 * 8, 0.3 * 64]], dtype=torch.float64)  # 1, sqrt(64), 64
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        expected = embedding.mlp(features)
        # The frequencies were made in float32.
        torch.testing.assert_close(embedding(torch.tensor([0.3]).double()), expected, rtol=1e-5, atol=1e-6)

    def test_zero_output(self):
        embedding = ScalarEmbedding(4)
        assert embedding(torch.rand(3)).abs().min() > 0
        embedding.zero_output()
        assert torch.equal(embedding(torch.rand(3)), torch.zeros(3, 4))


class TestDiT:
    def test_patches_go_there_and_back(self):
        config = DiTConfig(image_size=6, channels=3, patch_size=2, width=8, heads=2, depth=1)
        network, x = DiT(config), points(2, 3, 6, 6)
        tokens = network._to_tokens(x)
        assert tokens.shape == (2, config.tokens, 12)
        assert torch.equal(network._to_images(tokens), x)
        # Token 4 is the middle square; channels outermost.
        assert torch.equal(tokens[0, 4], x[0, :, 2:4, 2:4].reshape(-1))

    def test_a_fresh_network_is_zero_and_an_awake_one_is_not(self, x: Tensor):
        assert torch.equal(DiT(CONFIG)(x.float(), TIMES.float(), LABELS), torch.zeros(3, 2, 4, 4))
        assert awake_dit()(x, TIMES, LABELS).abs().min() > 1e-6

    def test_rows_do_not_see_each_other(self, dit: DiT, x: Tensor):
        together = dit(x, TIMES, LABELS)
        for i in range(3):
            row = slice(i, i + 1)
            alone = dit(x[row], TIMES[row], LABELS.rows(row))
            torch.testing.assert_close(together[row], alone, rtol=1e-12, atol=1e-12)

    def test_everything_that_goes_in_matters(self, dit: DiT, x: Tensor):
        base, condition = dit(x, TIMES, LABELS), Condition(labels=torch.tensor([1, 2, 3]))
        other = dit(x, TIMES, condition)
        assert (other[0] - base[0]).abs().max() > 1e-3
        assert torch.equal(other[1:], base[1:])
        assert (dit(x, TIMES - 0.1, LABELS) - base).abs().amax((1, 2, 3)).min() > 1e-3
        assert (dit(x, TIMES, LABELS, torch.ones(3, 16).double()) - base).abs().amax((1, 2, 3)).min() > 1e-3
        nudged = x.clone()
        nudged[:, 0, 0, 0] += 1.0  # attention carries one pixel to every other
        assert (dit(nudged, TIMES, LABELS) - base).abs().min() > 1e-9

    def test_extra_is_added_to_the_time_embedding(self, dit: DiT, x: Tensor):
        assert torch.equal(dit(x, TIMES, LABELS, torch.zeros(3, 16).double()), dit(x, TIMES, LABELS))
        extra = dit.time(TIMES / 2) - dit.time(TIMES)
        torch.testing.assert_close(dit(x, TIMES, LABELS, extra), dit(x, TIMES / 2, LABELS), rtol=1e-10, atol=1e-10)

    def test_one_block_longhand(self, dit: DiT):
        block, tokens, embedding = dit.blocks[0], points(1, 4, 16, seed=1), points(1, 16, seed=2)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = block.modulation(embedding)[0].split(16)

        def norm(y: Tensor) -> Tensor:
            return (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

        y = tokens[0]
        q, k, v = block.qkv(norm(y) * (1 + scale_1) + shift_1).split(16, dim=1)
        heads = [
            torch.softmax(q[:, h] @ k[:, h].T / math.sqrt(8), dim=1) @ v[:, h] for h in (slice(0, 8), slice(8, 16))
        ]
        y = y + gate_1 * block.out(torch.cat(heads, dim=1))
        y = y + gate_2 * block.mlp(norm(y) * (1 + scale_2) + shift_2)
        torch.testing.assert_close(block(tokens, embedding)[0], y, rtol=1e-12, atol=1e-12)

    def test_null_condition(self):
        assert DiT(CONFIG).null_condition(LABELS).labels.tolist() == [3, 3, 3]  # pyright: ignore

    def test_forward_mode_derivative_equals_finite_differences(self, dit: DiT, x: Tensor):
        """MeanFlow needs ``du/dt`` along the flow; fused attention has no forward mode, the plain one has."""
        tangents = (points(3, 2, 4, 4, seed=7), torch.ones(3, dtype=torch.float64))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            _, derivative = torch.func.jvp(lambda x, t: dit(x, t, LABELS), (x, TIMES), tangents)
        h = 1e-6  # the error of central differences: h^2 times a third derivative of up to 128^3, and 1e-16 / h
        ahead = dit(x + h * tangents[0], TIMES + h, LABELS)
        behind = dit(x - h * tangents[0], TIMES - h, LABELS)
        torch.testing.assert_close(derivative, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [({"image_size": 7}, "image_size 7 is not a multiple of patch_size 2"), ({"heads": 5}, "width 96 .* heads 5")],
    )
    def test_mistakes_are_named(self, fields: dict[str, int], message: str):
        with pytest.raises(ValueError, match=message):
            DiTConfig(**fields)


class TestStudent:
    def test_a_fresh_student_is_its_backbone_to_the_last_bit(self, x: Tensor):
        dit, x, t = awake_dit().float(), x.float(), TIMES.float()
        student = FlowMapStudent(dit)
        for r in (t, t / 2, torch.zeros(3)):
            assert torch.equal(student(x, t, r, LABELS), dit(x, t, LABELS))

    def test_gradient_reaches_the_interval_embedding(self, dit: DiT, x: Tensor):
        student = FlowMapStudent(dit).double()
        student(x, TIMES, TIMES / 2, LABELS).square().sum().backward()
        last = student.interval.mlp[-1]
        assert isinstance(last, nn.Linear)
        assert last.weight.grad is not None
        assert last.weight.grad.abs().max() > 0

    def test_after_a_change_it_tells_intervals_apart(self, dit: DiT, x: Tensor):
        student = FlowMapStudent(dit).double()
        last = student.interval.mlp[-1]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight)
        outputs = [student(x, TIMES, r, LABELS) for r in (TIMES, TIMES / 2, 0 * TIMES)]
        for a, b in ((0, 1), (1, 2), (0, 2)):
            assert (outputs[a] - outputs[b]).abs().amax((1, 2, 3)).min() > 1e-3
        expected = dit(x, TIMES, LABELS, student.interval(TIMES - TIMES / 2))
        assert torch.equal(outputs[1], expected)


class TestFeatureTaps:
    def test_equal_to_what_hooks_see(self, dit: DiT, x: Tensor):
        seen: dict[int, Tensor] = {}
        for i, block in enumerate(dit.blocks):
            block.register_forward_hook(lambda _m, _i, output, i=i: seen.__setitem__(i, output))
        dit(x, TIMES, LABELS)
        expected = dict(seen)
        features = FeatureTaps(dit, list(dit.blocks), [2, 0])(x, TIMES, LABELS)
        assert len(features) == 2
        assert torch.equal(features[0], expected[2])  # in the order asked for
        assert torch.equal(features[1], expected[0])

    def test_stops_at_the_deepest_tap(self, dit: DiT, x: Tensor):
        calls: list[str] = []
        dit.blocks[2].register_forward_hook(lambda *_: calls.append("block 2"))
        dit.output.register_forward_hook(lambda *_: calls.append("output"))
        taps = FeatureTaps(dit, list(dit.blocks), [0, 1])
        taps(x, TIMES, LABELS)
        assert calls == []
        dit(x, TIMES, LABELS)
        assert calls == ["block 2", "output"]

    def test_is_silent_and_holds_nothing_outside_its_calls(self, dit: DiT, x: Tensor):
        before = dit(x, TIMES, LABELS)
        taps = FeatureTaps(dit, list(dit.blocks), [1])
        assert torch.equal(dit(x, TIMES, LABELS), before)
        taps(x, TIMES, LABELS)
        assert torch.equal(dit(x, TIMES, LABELS), before)
        assert taps._caught == {}

    def test_an_error_of_the_network_is_not_swallowed(self, dit: DiT, x: Tensor):
        taps = FeatureTaps(dit, list(dit.blocks), [1])
        with pytest.raises(AssertionError):
            taps(x, TIMES, Condition())
        assert torch.equal(dit(x, TIMES, LABELS), dit(x, TIMES, LABELS))

    def test_gradient_flows_to_the_input_of_a_frozen_network(self, dit: DiT, x: Tensor):
        dit.requires_grad_(False)
        taps, x = FeatureTaps(dit, list(dit.blocks), [0, 1]), x.requires_grad_()
        sum(f.square().sum() for f in taps(x, TIMES, LABELS)).backward()  # pyright: ignore
        assert x.grad is not None
        assert x.grad.abs().min() > 0
        assert all(p.grad is None for p in dit.parameters())

    @pytest.mark.parametrize("layers", [[], [3], [-1]])
    def test_mistakes_are_named(self, dit: DiT, layers: list[int]):
        with pytest.raises(ValueError, match=r"among 0\.\.2"):
            FeatureTaps(dit, list(dit.blocks), layers)


def test_an_embedding_lies_where_a_device_context_says_though_linspace_is_replaced(monkeypatch: pytest.MonkeyPatch):
    """As transformers replaces it while it loads a text encoder, by one that does not see the context."""
    plain = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *args, **options: plain(*args, **{"device": "cpu", **options}))
    with torch.device("meta"):
        assert ScalarEmbedding(8).frequencies.device.type == "meta"
