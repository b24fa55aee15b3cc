"""Networks of diffusers as velocities in this project's own time; each satisfies `hd_core.types.Backbone`.

The network's own class and parameter names stay, under ``model``; a student's embedding and the taps of a discriminator
are forward hooks, so that no model class is rewritten.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hd_core.paths import expand, to_gaussian
from hd_core.types import Condition, Images, Times
from pipelines.discrete_time import DiscretePath

Inputs = Callable[[Condition], dict[str, Any]]
"""The keyword arguments by which a network takes a condition."""


class DiffusersBackbone(nn.Module):
    """What both kinds of time share: the call of the network, and what can be added to it."""

    def __init__(self, model: nn.Module, *, embedding_width: int, inputs: Inputs) -> None:
        super().__init__()
        self.model, self.embedding_width, self._inputs = model, embedding_width, inputs
        self.tokens = nn.ModuleList()
        self._extra: Tensor | None = None
        self._embedders: list[nn.Module] = []

    def add_extra_to(self, embedder: nn.Module) -> None:
        """Let ``extra`` be added to what a module of the network, a ``TimestepEmbedding``, puts out."""
        embedder.register_forward_hook(self._with_extra)
        self._embedders.append(embedder)

    @torch.no_grad()
    def fold(self, extra: Float[Tensor, " d"]) -> None:
        """Make one ``extra`` a part of the network for good: the bias with which its time embeddings end."""
        for embedder in self._embedders:
            last: Any = embedder.linear_2
            last.bias += extra.to(last.bias)

    def show_tokens_of(self, block: nn.Module) -> nn.Module:
        """A module whose output is the output of a convolutional block as tokens (b, h * w, c)."""
        tokens = _Tokens()
        self.tokens.append(tokens)
        block.register_forward_hook(tokens.hook)
        return tokens

    def checkpoint_blocks(self) -> None:
        """Keep no activations within blocks from now on: the backward pass computes them again."""
        self.model.enable_gradient_checkpointing(self._checkpointed)  # pyright: ignore[reportCallIssue]

    def _checkpointed(self, block: Callable[..., Any], *arguments: Any) -> Any:
        extra = self._extra  # what is computed again, after the call has ended, must see it again

        def run(*again: Any) -> Any:
            with self._telling(extra):
                return block(*again)

        return checkpoint(run, *arguments, use_reentrant=False)

    def _predict(self, x: Images, timestep: Times, condition: Condition, extra: Tensor | None) -> Images:
        """What the network says, without a learned variance in further channels."""
        with self._telling(extra):
            prediction = self.model(x, timestep=timestep, **self._inputs(condition), return_dict=False)[0]
        return prediction[:, : x.shape[1]]

    @contextmanager
    def _telling(self, extra: Tensor | None) -> Iterator[None]:
        before, self._extra = self._extra, extra
        try:
            yield
        finally:
            self._extra = before

    def _with_extra(self, _module: nn.Module, _inputs: tuple[Any, ...], embedding: Tensor) -> Tensor:
        return embedding if self._extra is None else embedding + self._extra


class DiscreteTimeBackbone(DiffusersBackbone):
    """A network over the discrete timesteps of a DDPM schedule.

    Beyond the table's noisy end the noise is brought to the table's and the data prediction is held, so one Euler step
    from t = 1 is that of diffusers' EulerDiscreteScheduler from its last timestep.
    """

    def __init__(self, model: nn.Module, path: DiscretePath, *, embedding_width: int, inputs: Inputs) -> None:
        super().__init__(model, embedding_width=embedding_width, inputs=inputs)
        self.path = path

    def forward(self, x_t: Images, t: Times, condition: Condition, extra: Float[Tensor, "b d"] | None = None) -> Images:
        point = self.path.point(t)
        t = torch.maximum(t.double(), point.t)
        at_point = expand(point.t / t, x_t) * x_t
        x = to_gaussian(at_point, point.alpha, point.sigma)
        prediction = self._predict(x, point.timestep.float(), condition, extra)
        velocity = self.path.to_velocity(x, prediction, point.alpha, point.sigma)
        x_0 = at_point - expand(point.t, x_t) * velocity
        return velocity + expand(1 / point.t - 1 / t, x_t) * x_0  # (x_t - x_0) / t, which within the table is velocity


class FlowTimeBackbone(DiffusersBackbone):
    """A network that predicts ``eps - x_0`` on the straight path: only its clock differs from ours."""

    def __init__(self, model: nn.Module, *, timesteps: float, embedding_width: int, inputs: Inputs) -> None:
        super().__init__(model, embedding_width=embedding_width, inputs=inputs)
        self.timesteps = timesteps

    def forward(self, x_t: Images, t: Times, condition: Condition, extra: Float[Tensor, "b d"] | None = None) -> Images:
        return self._predict(x_t, self.timesteps * t, condition, extra)


class _Tokens(nn.Module):
    def forward(self, images: Images) -> Float[Tensor, "b n d"]:
        return images.flatten(2).transpose(1, 2)

    def hook(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Any]) -> None:
        self(output[0] if isinstance(output, tuple) else output)
