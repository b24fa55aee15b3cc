"""The flow-map student: any backbone, told the interval that it must cross.

The interval's embedding is added to the backbone's own time embedding and starts at zero, so a fresh student is
its teacher to the last bit.
"""

from jaxtyping import Float
from torch import Tensor, nn

from hd_core.networks.dit import ScalarEmbedding
from hd_core.types import Backbone, Condition, Images, Times


class FlowMapStudent(nn.Module):
    """Mean velocity ``u(x_t, t, r, condition)`` over ``[r, t]``, from a backbone that knows only ``t``."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.interval = ScalarEmbedding(self._velocity().embedding_width)
        self.interval.zero_output()

    def _velocity(self) -> Backbone:
        backbone: Backbone = self.backbone  # pyright: ignore[reportAssignmentType]
        return backbone

    def forward(self, x_t: Images, t: Times, r: Times, condition: Condition) -> Images:
        extra: Float[Tensor, "b d"] = self.interval(t - r)
        return self._velocity()(x_t, t, condition, extra)
