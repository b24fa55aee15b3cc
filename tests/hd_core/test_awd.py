"""One conformance suite for every arm of the discriminator, then each arm longhand; numbers compared are float64."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from hd_core.networks.awd import STANDARD, AdaptiveWeightedDiscriminator, Arm, AWDConfig, TokenWeightedHead
from hd_core.networks.heads import StandardHead, matched_widths
from hd_core.objectives.adversarial import token_entropy
from hd_core.objectives.dmd import DMD
from hd_core.random import Draws
from hd_core.step import OptimizerConfig, train_step
from hd_core.types import Judge
from tests.oracles import points
from tests.toys import batch_of, cast_of, networks, state_of

ARMS: tuple[Arm, ...] = ("adaptive", "pooled", "token_logits", "convolution", "uniform", "random")
CONFIG = AWDConfig(layers=(0, 1), width=12, heads=3)
VARIANTS = {
    "default": CONFIG,
    "plain": replace(CONFIG, spectral_norm=False, layer_norm=False),
    "hot": replace(CONFIG, temperature=4.0),
}


@pytest.fixture(params=ARMS)
def arm(request: pytest.FixtureRequest) -> Arm:
    return request.param


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> AWDConfig:
    return VARIANTS[request.param]


def made(config: AWDConfig, features: int = 7) -> AdaptiveWeightedDiscriminator:
    """A discriminator in float64 and eval mode, from the same seed whatever its arm."""
    torch.manual_seed(4)
    return AdaptiveWeightedDiscriminator([features] * len(config.layers), config).double().eval()


def single(config: AWDConfig, features: int = 7) -> TokenWeightedHead:
    head = made(replace(config, layers=(0,)), features).heads[0]
    assert isinstance(head, TokenWeightedHead)
    return head


def awake(judge: AdaptiveWeightedDiscriminator, std: float = 3.0) -> AdaptiveWeightedDiscriminator:
    """With queries that tell tokens apart, where the arm has any to learn."""
    with torch.no_grad():
        for name, parameter in judge.named_parameters():
            if name.endswith("query"):
                parameter.normal_(std=std)
    return judge


def matrices(network: nn.Module) -> list[Tensor]:
    """Weights of every linear layer and convolution, as the matrices that spectral norm bounds."""
    layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return [layer.weight.flatten(1) for layer in layers]


def leaky(y: Tensor) -> Tensor:
    return torch.where(y > 0, y, 0.2 * y)


def normed(y: Tensor, layer: nn.Module) -> Tensor:
    assert isinstance(layer, nn.LayerNorm)
    centred = (y - y.mean()) / ((y - y.mean()).square().mean() + 1e-5).sqrt()
    return centred * layer.weight + layer.bias


class TestConformance:
    def test_shapes_and_weights_that_sum_to_one(self, arm: Arm, variant: AWDConfig):
        judge = awake(made(replace(variant, arm=arm)))
        assert isinstance(judge, Judge)
        judgement = judge([points(2, 9, 7, seed=1), points(2, 9, 7, seed=2)])
        assert judgement.logits.shape == (2, 18 if arm == "token_logits" else 2)
        assert judgement.weights.shape == (2, 2, 3, 9)
        assert judgement.weights.min() >= 0
        torch.testing.assert_close(judgement.weights.sum(-1), torch.ones(2, 2, 3).double(), rtol=1e-12, atol=0)
        assert (judgement.weights.std() > 0.01) == (arm in ("adaptive", "random"))
        assert judgement.logits.std() > 1e-4

    def test_a_layer_is_judged_by_its_own_head(self, arm: Arm):
        judge, tokens = awake(made(replace(CONFIG, arm=arm))), [points(2, 9, 7, seed=seed) for seed in (1, 2, 3)]
        one, other = judge(tokens[:2]), judge([tokens[0], tokens[2]])
        half = one.logits.shape[1] // 2
        assert torch.equal(one.logits[:, :half], other.logits[:, :half])
        assert torch.equal(one.weights[:, 0], other.weights[:, 0])
        assert (one.logits[:, half:] - other.logits[:, half:]).abs().min() > 1e-6

    def test_rows_do_not_see_each_other(self, arm: Arm):
        judge, tokens = awake(made(replace(CONFIG, arm=arm))), points(3, 9, 7)
        together = judge([tokens, tokens])
        alone = judge([tokens[1:2], tokens[1:2]])
        torch.testing.assert_close(together.logits[1:2], alone.logits, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(together.weights[1:2], alone.weights, rtol=1e-10, atol=0)

    def test_permuted_tokens_permute_weights_and_leave_the_logit(self, arm: Arm):
        judge, tokens, order = awake(made(replace(CONFIG, arm=arm))), points(2, 9, 7), torch.randperm(9)
        before, after = judge([tokens, tokens]), judge([tokens[:, order], tokens[:, order]])
        torch.testing.assert_close(after.weights, before.weights[..., order], rtol=1e-10, atol=0)
        if arm == "convolution":  # it sees neighbours
            assert (after.logits - before.logits).abs().min() > 1e-4
            return
        expected = before.logits
        if arm == "token_logits":
            expected = expected.reshape(2, 2, 9)[..., order].flatten(1)
        torch.testing.assert_close(after.logits, expected, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("layer_norm", [True, False])
    @pytest.mark.parametrize(
        ("features", "width", "heads"), [(2, 8, 2), (7, 12, 3), (64, 64, 4), (96, 32, 1), (320, 128, 8), (1152, 64, 4)]
    )
    def test_arms_are_of_equal_size(self, arm: Arm, features: int, width: int, heads: int, layer_norm: bool):
        config = AWDConfig(layers=(0, 1), width=width, heads=heads, layer_norm=layer_norm)
        norms = 2 * features + 2 * width if layer_norm else 0
        adaptive = 2 * (2 * features * width + width**2 + 5 * width + 1 + norms)
        judge = AdaptiveWeightedDiscriminator([features] * 2, replace(config, arm=arm))
        assert judge.size == pytest.approx(adaptive, rel=0.02)
        if arm not in STANDARD:
            assert judge.size == adaptive
        trained = sum(parameter.numel() for parameter in judge.parameters())
        frozen = {"random": width, "uniform": width + features * width + width}.get(arm, 0)
        assert judge.size - trained == 2 * frozen

    def test_spectral_norm_bounds_every_layer(self, arm: Arm):
        torch.manual_seed(1)
        judge = AdaptiveWeightedDiscriminator([7, 7], replace(CONFIG, arm=arm)).train()
        with torch.no_grad():
            for parameter in judge.parameters():
                parameter.mul_(5.0)  # as if training had grown them
        features = [points(2, 9, 7).float()] * 2
        for _ in range(50):
            judge(features)
        weights = matrices(judge.eval())
        assert len(weights) == 2 * (3 if arm in STANDARD else 4)
        for weight in weights:
            # The power iteration approaches the largest singular value from below: 50 passes leave less than 1%.
            assert 0.999 < torch.linalg.matrix_norm(weight, 2).item() < 1.01

    def test_without_spectral_norm_nothing_is_bounded(self, arm: Arm):
        judge = AdaptiveWeightedDiscriminator([7, 7], replace(VARIANTS["plain"], arm=arm))
        with torch.no_grad():
            for parameter in judge.parameters():
                parameter.mul_(5.0)
        assert max(torch.linalg.matrix_norm(weight, 2).item() for weight in matrices(judge)) > 2
        assert not any(isinstance(module, nn.LayerNorm) for module in judge.modules())

    def test_only_the_judges_own_turn_moves_the_power_iteration(self, arm: Arm):
        """DMD with a generator that moves in every second step; snapshots around each player's move."""
        objective, changed = DMD(update_ratio=2), set[str]()
        nets = networks(objective.players)
        nets["discriminator"] = made(replace(CONFIG, arm=arm), features=2).train()
        with torch.no_grad():
            for parameter in nets["discriminator"].parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))  # far from where the iteration has come to rest
        state, last = state_of(nets, OptimizerConfig(learning_rate=1e-2)), copy.deepcopy(nets["discriminator"])

        def look(player: str) -> None:
            nonlocal last
            now, before = nets["discriminator"].state_dict(), last.state_dict()
            if not all(torch.equal(now[name], before[name]) for name in now):
                changed.add(player)
            last = copy.deepcopy(nets["discriminator"])

        for name, player in state.players.items():
            player.optimizer.register_step_post_hook(lambda *_, name=name: look(name))
        for step in range(2):
            draws = Draws(seed=step, rows=slice(0, 4), total=4)
            train_step(state, objective, cast_of(nets), batch_of(4, first=4 * step), draws, progress=0.0)
        assert {name: player.moves for name, player in state.players.items()} == {
            "student": 1,
            "fake_score": 2,
            "discriminator": 2,
        }
        assert changed == {"discriminator"}

    def test_what_is_frozen_stays_under_weight_decay_and_all_else_moves(self, arm: Arm):
        objective = DMD(update_ratio=1)
        nets = networks(objective.players)
        judge = nets["discriminator"] = made(replace(CONFIG, arm=arm), features=2).train()
        before = {name: value.clone() for name, value in judge.state_dict().items() if name[-3:] not in ("._u", "._v")}
        state = state_of(nets, OptimizerConfig(learning_rate=1e-2, weight_decay=0.5))
        for step in range(3):
            draws = Draws(seed=step, rows=slice(0, 4), total=4)
            train_step(state, objective, cast_of(nets), batch_of(4, first=4 * step), draws, progress=0.0)
        now = judge.state_dict()
        still = {name for name, value in before.items() if torch.equal(now[name], value)}
        frozen = {"random": ["query"], "uniform": ["query", "key.bias", "key.parametrizations.weight.original"]}
        expected = {f"heads.{i}.{name}" for i in range(2) for name in frozen.get(arm, [])}
        assert still == expected
        assert {name for name, _ in judge.named_parameters()} == set(before) - expected

    def test_checkpoints_restore_the_verdict(self, arm: Arm):
        config = replace(CONFIG, arm=arm)
        judge, features = awake(made(config)), [points(2, 9, 7)] * 2
        torch.manual_seed(99)
        other = AdaptiveWeightedDiscriminator([7, 7], config).double().eval()
        assert not torch.equal(other(features).logits, judge(features).logits)
        other.load_state_dict(judge.state_dict())
        assert torch.equal(other(features).logits, judge(features).logits)
        assert torch.equal(copy.deepcopy(judge)(features).logits, judge(features).logits)

    def test_layers_of_different_widths_and_grids(self, arm: Arm):
        """As a U-Net has them: the weights of the coarser layer are spread over the tokens of the finer one."""
        torch.manual_seed(4)
        judge = awake(AdaptiveWeightedDiscriminator([7, 5], replace(CONFIG, arm=arm)).double().eval())
        fine, coarse = points(2, 16, 7), points(2, 4, 5)
        judgement = judge([fine, coarse])
        assert judgement.logits.shape == (2, 20 if arm == "token_logits" else 2)
        assert judgement.weights.shape == (2, 2, 3, 16)
        _, own = judge.heads[1](coarse)
        maps = judgement.weights[:, 1].reshape(2, 3, 4, 4)
        for y in range(4):
            for x in range(4):
                expected = own[..., 2 * (y // 2) + x // 2] / 4
                torch.testing.assert_close(maps[..., y, x], expected, rtol=1e-12, atol=0)
        assert torch.equal(judgement.weights[:, 0], judge.heads[0](fine)[1])


class Spotting:
    """Real tokens are noise; a fake has one token, at a random place, whose mean is off."""

    TOKENS, FEATURES, ROWS = 16, 6, 32

    def __init__(self) -> None:
        self.source = torch.Generator().manual_seed(0)

    def draw(self) -> tuple[Tensor, Tensor]:
        real, fake = torch.randn(2, self.ROWS, self.TOKENS, self.FEATURES, generator=self.source)
        where = torch.randint(self.TOKENS, (self.ROWS,), generator=self.source)
        fake[torch.arange(self.ROWS), where] += torch.tensor([4.0, -4.0] * 3)
        return real, fake

    def final_loss(self, arm: Arm, steps: int = 80) -> float:
        """The hinge loss at the end of a short training, averaged over its last ten steps."""
        torch.manual_seed(0)
        judge = AdaptiveWeightedDiscriminator([self.FEATURES], AWDConfig(arm=arm, layers=(0,), width=16, heads=2))
        optimizer, losses = torch.optim.AdamW(judge.parameters(), 0.03), list[float]()
        for _ in range(steps):
            real, fake = (judge([tokens]).logits for tokens in self.draw())
            loss = 0.5 * (F.relu(1 - real) + F.relu(1 + fake)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return sum(losses[-10:]) / 10


@pytest.fixture(scope="module")
def losses() -> dict[Arm, float]:
    return {arm: Spotting().final_loss(arm) for arm in ARMS}


class TestSpottingOneToken:
    def test_every_arm_learns(self, arm: Arm, losses: dict[Arm, float]):
        assert losses[arm] < 0.98  # 1 is what a constant logit of 0 pays

    def test_token_logits_pay_for_the_good_tokens_of_a_fake(self, losses: dict[Arm, float]):
        """Fifteen of a fake's sixteen tokens are real ones: at best they cost 1 together with the real rows'."""
        assert losses["token_logits"] > 15 / 16 - 0.02

    def test_adaptive_weights_find_it_where_averages_drown_it(self, losses: dict[Arm, float]):
        assert losses["adaptive"] < 0.6 * losses["uniform"]
        assert losses["adaptive"] < 0.5 * losses["pooled"]


class TestAdaptive:
    def test_starts_as_average_pooling(self, variant: AWDConfig):
        head, tokens = single(variant), points(2, 5, 7)
        logit, weights = head(tokens)
        torch.testing.assert_close(weights, torch.full((2, 3, 5), 0.2).double(), rtol=1e-7, atol=0)
        pooled = F.leaky_relu(head.value(head.norm(tokens)), 0.2).mean(1)
        expected = head.logit(F.leaky_relu(head.hidden(head.pooled_norm(pooled)), 0.2))
        torch.testing.assert_close(logit, expected, rtol=1e-6, atol=1e-7)  # 0.2 above was rounded to float32

    @pytest.mark.parametrize("tail", ["mlp", "token_logits"])
    def test_single_head_longhand(self, tail: str):
        config = AWDConfig(layers=(0,), width=4, heads=1, temperature=2.0, tail=tail)  # pyright: ignore
        head, tokens = single(config, features=6), points(1, 5, 6)
        nn.init.normal_(head.query)
        nn.init.normal_(head.norm.weight)  # pyright: ignore
        rows = [normed(token, head.norm) for token in tokens[0]]
        scores = torch.stack([(head.query[0] * head.key(row)).sum() for row in rows]) / (2.0 * math.sqrt(4))
        weights = scores.exp() / scores.exp().sum()

        def verdict(z: Tensor) -> Tensor:
            return head.logit(leaky(head.hidden(normed(z, head.pooled_norm))))

        values = [leaky(head.value(row)) for row in rows]
        if tail == "mlp":
            expected = verdict(torch.stack([w * value for w, value in zip(weights, values, strict=True)]).sum(0))
        else:
            logits = [w * verdict(value) for w, value in zip(weights, values, strict=True)]
            expected = torch.stack(logits).sum(0)
        logit, given_weights = head(tokens)
        torch.testing.assert_close(given_weights[0, 0], weights, rtol=1e-12, atol=0)
        torch.testing.assert_close(logit[0], expected, rtol=1e-10, atol=1e-12)

    def test_token_logits_are_weighted_by_the_mean_over_heads(self):
        config = replace(CONFIG, tail="token_logits")
        judge, tokens = awake(made(config)), points(2, 5, 7)
        head = judge.heads[0]
        assert isinstance(head, TokenWeightedHead)
        logit, weights = head(tokens)
        values = leaky(head.value(head.norm(tokens)))
        logits = head.logit(leaky(head.hidden(head.pooled_norm(values)))).squeeze(2)
        torch.testing.assert_close(logit, (weights.mean(1) * logits).sum(1, keepdim=True), rtol=1e-10, atol=1e-12)

    def test_each_head_pools_its_own_share_of_the_values(self):
        """Two heads with opposite queries: each half of the pooled vector is weighted by its own head."""
        config = AWDConfig(layers=(0,), width=4, heads=2, layer_norm=False, spectral_norm=False)
        head, tokens = single(config, features=4), points(1, 3, 4)
        with torch.no_grad():
            head.key.weight.copy_(torch.eye(4))  # pyright: ignore
            head.key.bias.zero_()  # pyright: ignore
            head.query.copy_(torch.tensor([[1.0, 0.5], [-2.0, 1.0]]))
        logit, weights = head(tokens)
        values, pooled = F.leaky_relu(head.value(tokens[0]), 0.2), list[Tensor]()
        for h, query in enumerate(head.query):
            share = slice(2 * h, 2 * h + 2)
            expected = (tokens[0][:, share] @ query / math.sqrt(2)).softmax(0)
            torch.testing.assert_close(weights[0, h], expected, rtol=1e-12, atol=0)
            pooled.append(expected @ values[:, share])
        verdict = head.logit(F.leaky_relu(head.hidden(torch.cat(pooled)), 0.2))
        torch.testing.assert_close(logit[0], verdict, rtol=1e-10, atol=1e-12)

    def test_larger_queries_concentrate_and_heat_spreads(self):
        judge, features = awake(made(CONFIG), std=1.0), [points(4, 16, 7, seed=seed) for seed in (1, 2)]

        def entropy(judge: AdaptiveWeightedDiscriminator) -> float:
            return token_entropy(judge(features).weights).item()

        assert entropy(made(CONFIG)) == pytest.approx(1.0, abs=1e-6)
        hot = made(replace(CONFIG, temperature=4.0))
        hot.load_state_dict(judge.state_dict())
        falling = [entropy(hot), entropy(judge)]
        for _ in range(3):
            with torch.no_grad():
                for head in judge.heads:
                    assert isinstance(head, TokenWeightedHead)
                    head.query.mul_(5.0)
            falling.append(entropy(judge))
        assert all(after < before - 1e-3 for before, after in zip(falling, falling[1:], strict=False))
        assert falling[-1] < 0.1

    def test_the_query_learns_which_token_matters(self):
        """Real and fake differ in one token of eight: the weights must move to tokens that tell."""
        torch.manual_seed(0)
        config = AWDConfig(layers=(0,), width=8, heads=1)
        judge = AdaptiveWeightedDiscriminator([6], config)
        optimizer = torch.optim.AdamW(judge.parameters(), 0.01)
        generator, flaw = torch.Generator().manual_seed(0), torch.zeros(8, 6)
        flaw[3] = 4.0 * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
        weights = torch.full((1,), math.nan)
        for _ in range(150):
            real, fake = torch.randn(2, 32, 8, 6, generator=generator)
            on_real, on_fake = judge([real]), judge([fake + flaw])
            weights = on_fake.weights
            loss = F.relu(1 - on_real.logits).mean() + F.relu(1 + on_fake.logits).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert weights[:, 0, 0, 3].mean() > 3 / 8  # three times its uniform share


class TestFrozenArms:
    def test_uniform_is_the_adaptive_arm_at_its_start(self, variant: AWDConfig):
        adaptive, uniform = made(variant), made(replace(variant, arm="uniform"))
        uniform.load_state_dict(adaptive.state_dict())
        features = [points(2, 9, 7)] * 2
        assert torch.equal(adaptive(features).logits, uniform(features).logits)
        ninths = torch.full((2, 2, 3, 9), 1 / 9, dtype=torch.float64)
        torch.testing.assert_close(uniform(features).weights, ninths, rtol=1e-12, atol=0)

    def test_arms_of_one_seed_differ_in_nothing_but_the_query(self):
        adaptive = made(CONFIG).state_dict()
        for arm in ("uniform", "random"):
            other = made(replace(CONFIG, arm=arm)).state_dict()
            assert other.keys() == adaptive.keys()
            differ = {name for name, value in other.items() if not torch.equal(value, adaptive[name])}
            assert differ == ({"heads.0.query", "heads.1.query"} if arm == "random" else set())

    def test_random_queries_are_standard_normal_and_differ_between_layers(self):
        config = AWDConfig(arm="random", layers=(0, 1), width=1024, heads=4)
        first, second = (single_layer.query for single_layer in AdaptiveWeightedDiscriminator([2, 2], config).heads)
        assert isinstance(first, Tensor)
        assert not torch.equal(first, second)  # pyright: ignore
        assert abs(first.mean().item()) < 4 / 32
        assert first.std().item() == pytest.approx(1.0, abs=4 / math.sqrt(2 * 1024))


class TestStandard:
    @staticmethod
    def made(arm: Arm) -> StandardHead:
        head = made(AWDConfig(arm=arm, layers=(0,), width=8, heads=2), features=6).heads[0]
        assert isinstance(head, StandardHead)
        with torch.no_grad():
            for layer in (head.norm, head.inner_norm):
                layer.weight.normal_()  # pyright: ignore
                layer.bias.normal_()  # pyright: ignore
        return head

    @staticmethod
    def inner(head: StandardHead, token: Tensor) -> Tensor:
        return normed(leaky(head.inner(token)), head.inner_norm)

    def test_token_logits_longhand(self):
        head, tokens = self.made("token_logits"), points(1, 4, 6)
        logits, _ = head(tokens)
        for token, logit in zip(tokens[0], logits[0], strict=True):
            expected = head.logit(leaky(head.hidden(self.inner(head, normed(token, head.norm)))))
            torch.testing.assert_close(logit[None], expected, rtol=1e-10, atol=1e-12)

    def test_pooled_longhand(self):
        head, tokens = self.made("pooled"), points(1, 5, 6)
        logits, _ = head(tokens)
        mean = torch.stack([normed(token, head.norm) for token in tokens[0]]).mean(0)
        expected = head.logit(leaky(head.hidden(self.inner(head, mean))))
        torch.testing.assert_close(logits[0], expected, rtol=1e-10, atol=1e-12)

    def test_convolution_longhand(self):
        """Rows of the grid lie one after the other; what is beyond its edge is zero."""
        head, tokens = self.made("convolution"), points(1, 9, 6)
        logits, _ = head(tokens)
        assert isinstance(head.hidden, nn.Conv2d)
        inner = [self.inner(head, normed(token, head.norm)) for token in tokens[0]]
        outputs = list[Tensor]()
        for y in range(3):
            for x in range(3):
                near = [(j, i) for j in range(y - 1, y + 2) for i in range(x - 1, x + 2) if 0 <= j < 3 and 0 <= i < 3]
                parts = [head.hidden.weight[:, :, j - y + 1, i - x + 1] @ inner[3 * j + i] for j, i in near]
                outputs.append(leaky(torch.stack(parts).sum(0) + head.hidden.bias))  # pyright: ignore
        expected = head.logit(torch.stack(outputs).mean(0))
        torch.testing.assert_close(logits[0], expected, rtol=1e-10, atol=1e-12)

    @given(features=st.integers(8, 200), width=st.integers(8, 100), area=st.sampled_from([1, 9]), norms=st.booleans())
    def test_matched_widths(self, features: int, width: int, area: int, norms: bool):
        size = 2 * features * width + width**2 + 5 * width + 1 + (2 * features + 2 * width if norms else 0)
        inner, hidden = matched_widths(features, size, area=area, layer_norm=norms)
        linear = features * inner + inner + area * inner * hidden + hidden + hidden + 1
        assert linear + (2 * features + 2 * inner if norms else 0) == pytest.approx(size, rel=0.02)
        assert min(inner, hidden) >= 1


class TestMistakes:
    @given(width=st.integers(1, 64), heads=st.integers(1, 64))
    def test_width_and_heads(self, width: int, heads: int):
        if width % heads:
            with pytest.raises(ValueError, match=f"width {width} is not a multiple of heads {heads}"):
                AWDConfig(width=width, heads=heads)
        else:
            AWDConfig(width=width, heads=heads)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"heads": 0}, "heads 0"),
            ({"temperature": 0.0}, "temperature must be positive; given 0"),
            ({"layers": ()}, "at least one block"),
            ({"arm": "pooled", "tail": "token_logits"}, "adaptive, uniform and random; given arm pooled"),
        ],
    )
    def test_of_the_config(self, fields: dict[str, object], message: str):
        with pytest.raises(ValueError, match=message):
            AWDConfig(**fields)  # pyright: ignore[reportArgumentType]

    def test_a_width_is_missing(self):
        with pytest.raises(ValueError, match=r"one width for each of 2 layers; given \[7\]"):
            AdaptiveWeightedDiscriminator([7], CONFIG)

    def test_a_convolution_needs_a_square(self):
        judge = made(replace(CONFIG, arm="convolution"))
        with pytest.raises(ValueError, match="8 tokens fill no square grid"):
            judge([points(2, 8, 7)] * 2)
