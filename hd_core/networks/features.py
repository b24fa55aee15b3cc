"""Token features tapped from the blocks of a frozen network."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from hd_core.types import Condition, Images, Times


class _Enough(Exception):
    """The deepest tapped block has been reached: the rest of the network need not run."""


class FeatureTaps:
    """Calls a backbone and returns what the tapped blocks put out, ``(b, n, d)`` each, in the order asked for."""

    def __init__(self, backbone: nn.Module, blocks: Sequence[nn.Module], layers: Sequence[int]) -> None:
        if not layers or not all(0 <= layer < len(blocks) for layer in layers):
            raise ValueError(f"layers to tap must be among 0..{len(blocks) - 1}, at least one; given {list(layers)}")
        self.backbone, self.layers = backbone, list(layers)
        self._caught: dict[int, Tensor] = {}
        for layer in set(self.layers):
            blocks[layer].register_forward_hook(self._hook(layer))
        self._listening = False
        self.stops_early = True
        """Whether what lies behind the deepest tapped block is left out; a sharded network must be run to its end."""

    def __call__(self, x_t: Images, t: Times, condition: Condition) -> list[Float[Tensor, "b n d"]]:
        self._listening = True
        try:
            self.backbone(x_t, t, condition)
        except _Enough:
            pass
        finally:
            self._listening = False
        caught, self._caught = self._caught, {}
        return [caught[layer] for layer in self.layers]

    def _hook(self, layer: int):
        def catch(_module: nn.Module, _inputs: tuple[object, ...], output: Tensor) -> None:
            if self._listening:
                self._caught[layer] = output
                if self.stops_early and layer == max(self.layers):
                    raise _Enough

        return catch
