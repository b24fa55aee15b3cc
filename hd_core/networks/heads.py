"""Standard discriminator heads, to compare the adaptive one with: no token of a layer weighs more than another.

All three are one perceptron, ``SN(act(SN(LN(act(SN(LN(F)))))))`` with two hidden layers as the adaptive head has. They
differ in where the tokens become one: before the perceptron, never (a logit for each token, as in StyleGAN-T and LADD)
or behind a convolution in its second layer (as in DMD2). Their inner widths follow from the number of weights that is
asked for, so that heads are compared at equal size.
"""

import math

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm as normalised

SLOPE = 0.2
"""Of the leaky ReLU in every head."""


class StandardHead(nn.Module):
    """The perceptron on every token for itself; what gathers tokens is added by a subclass."""

    kernel = 1
    """Side of the square of tokens that the second layer sees."""

    def __init__(self, features: int, size: int, *, heads: int, spectral_norm: bool, layer_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        inner, hidden = matched_widths(features, size, area=self.kernel**2, layer_norm=layer_norm)
        self.norm = norm(features, layer_norm)
        self.inner = linear(features, inner, spectral_norm)
        self.inner_norm = norm(inner, layer_norm)
        self.hidden = self._second_layer(inner, hidden, spectral_norm)
        self.logit = linear(hidden, 1, spectral_norm)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> tuple[Float[Tensor, "b outputs"], Float[Tensor, "b heads n"]]:
        rows, n, _ = tokens.shape
        inner = F.leaky_relu(self.inner(self._gather(self.norm(tokens))), SLOPE)
        logits = self._verdict(F.leaky_relu(self._mix(self.inner_norm(inner)), SLOPE))
        return logits, tokens.new_full((rows, self.heads, n), 1 / n)

    def _second_layer(self, inner: int, hidden: int, spectral_norm: bool) -> nn.Module:
        return linear(inner, hidden, spectral_norm)

    def _gather(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        return tokens

    def _mix(self, tokens: Float[Tensor, "b m d"]) -> Float[Tensor, "b m e"]:
        return self.hidden(tokens)

    def _verdict(self, tokens: Float[Tensor, "b m e"]) -> Float[Tensor, "b outputs"]:
        return self.logit(tokens).squeeze(2)


class TokenLogitHead(StandardHead):
    """A logit for each token: the loss is taken token by token and averaged behind its nonlinearity."""


class PooledHead(StandardHead):
    """Global average pooling of the features, then the perceptron."""

    def _gather(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        return tokens.mean(1, keepdim=True)


class ConvolutionHead(StandardHead):
    """The tokens on their square grid: the second layer is a convolution, whose output is averaged.

    Spectral norm bounds the kernel as a matrix ``(outputs, inputs * 9)``, as is usual, and not the whole convolution.
    """

    kernel = 3

    def _second_layer(self, inner: int, hidden: int, spectral_norm: bool) -> nn.Module:
        layer = nn.Conv2d(inner, hidden, self.kernel, padding=self.kernel // 2)
        return normalised(layer) if spectral_norm else layer

    def _mix(self, tokens: Float[Tensor, "b m d"]) -> Float[Tensor, "b m e"]:
        rows, n, features = tokens.shape
        images = tokens.transpose(1, 2).reshape(rows, features, grid_side(n), -1)
        return self.hidden(images).flatten(2).transpose(1, 2)

    def _verdict(self, tokens: Float[Tensor, "b m e"]) -> Float[Tensor, "b outputs"]:
        return self.logit(tokens.mean(1))


def matched_widths(features: int, size: int, *, area: int, layer_norm: bool) -> tuple[int, int]:
    """Inner and hidden width of a `StandardHead` of ``size`` weights.

    Among the pairs that come within 1% of it the one whose widths are most alike; where there is none (in heads of a
    few dozen weights), the nearest.
    """
    norms = 2 if layer_norm else 0

    def count(inner: int, hidden: int) -> int:
        return norms * (features + inner) + (features + 1) * inner + (area * inner + 2) * hidden + 1

    def pair(inner: int) -> tuple[int, int]:
        return inner, max(1, round((size - count(inner, 0)) / (area * inner + 2)))

    pairs = [pair(inner) for inner in range(1, max(1, size // (features + 1)) + 1)]
    return min(pairs, key=lambda p: (max(abs(count(*p) / size - 1) - 0.01, 0.0), max(p) / min(p)))


def grid_side(tokens: int) -> int:
    """Side of the square grid that so many tokens fill.

    Raises:
        ValueError: they fill none.
    """
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{tokens} tokens fill no square grid; needed: a square number of tokens")
    return side


def linear(inputs: int, outputs: int, spectral_norm: bool) -> nn.Module:
    """A linear layer, under spectral norm if wanted."""
    layer = nn.Linear(inputs, outputs)
    return normalised(layer) if spectral_norm else layer


def norm(features: int, layer_norm: bool) -> nn.Module:
    """A layer norm if wanted, or nothing."""
    return nn.LayerNorm(features) if layer_norm else nn.Identity()


def freeze(module: nn.Module) -> None:
    """Make buffers of a module's own parameters, so that nothing trains them."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        delattr(module, name)
        module.register_buffer(name, parameter.detach())
