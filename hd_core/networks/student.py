"""The flow-map student: any backbone, told the interval that it must cross and, in SFD-v, of how many steps it is one.

Both embeddings are added to the backbone's own time embedding, which every block reads. They start at zero unless asked
otherwise, so a fresh student is its teacher to the last bit.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from hd_core.networks.dit import ScalarEmbedding
from hd_core.types import Backbone, Condition, Images, Times

StepStart = Literal["zero", "random"]
_LONGEST = 10_000.0
"""Of the sinusoids of a number of steps, in steps: the frequencies are those of a DDPM's integer time."""


class FlowMapStudent(nn.Module):
    """Mean velocity ``u(x_t, t, r, condition)`` over ``[r, t]``, from a backbone that knows only ``t``."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.interval = ScalarEmbedding(self._velocity().embedding_width)
        self.interval.zero_output()
        self.steps: ScalarEmbedding | None = None

    def learn_steps(self, start: StepStart) -> None:
        """Have it told how many steps its walk has, from now on (SFD-v).

        Args:
            start: zero, which changes nothing yet; or the usual random weights, as SFD's authors do.
        """
        self.steps = ScalarEmbedding(self._velocity().embedding_width, max_frequency=_LONGEST)
        if start == "zero":
            self.steps.zero_output()

    def _velocity(self) -> Backbone:
        backbone: Backbone = self.backbone  # pyright: ignore[reportAssignmentType]
        return backbone

    def forward(self, x_t: Images, t: Times, r: Times, condition: Condition) -> Images:
        extra: Float[Tensor, "b d"] = self.interval(t - r)
        if self.steps is not None and condition.steps is not None:
            extra = extra + self.steps(condition.steps.to(t.dtype) / _LONGEST)
        return self._velocity()(x_t, t, condition, extra)
