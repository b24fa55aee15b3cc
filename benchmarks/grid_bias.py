"""How far the mean velocities of a stored trajectory are from the exact ones.

    python -m benchmarks.grid_bias [--quick]

The student of `mean_velocity` regresses to difference quotients of stored states. They are off by the solver's error
and, since shards hold float16, by its rounding divided by the interval. Here the teacher is a mixture of Gaussians
whose velocity is exact, and the mean velocity from each stored state comes from fine Runge-Kutta steps. A figure is the
root mean square error over that of the mean velocity: over all pairs of grid points, over neighbours, and over the
whole interval, which is what one-step sampling asks. Rounding is noise, which a student averages; the rest is bias.
"""

import argparse
import json
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hd_core.solvers import SOLVERS, trajectory
from hd_core.times import GridConfig
from tests.oracles import PLANE, MixtureFlow, no_condition

INTERVALS = (16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class Bias:
    """Relative root mean square errors of the mean velocity."""

    pairs: float
    """All pairs of two points."""
    adjacent: float
    """Neighbours."""
    full: float
    """The two ends."""


def exact_ends(states: Tensor, grid: Tensor, flow: MixtureFlow) -> Tensor:
    """``(i, j, b, ...)``: where the flow brings the stored state ``i`` at the later time ``j``; zero elsewhere."""
    ends = torch.zeros(len(grid), *states.shape, dtype=torch.float64)
    x = states[:0]
    for j, (t, r) in enumerate(zip(grid, grid[1:], strict=False)):
        x = torch.cat([x, states[j : j + 1]])
        x = flow.flow_map(x.flatten(0, 1), t, r).reshape(x.shape)
        ends[: j + 1, j + 1] = x
    return ends


@torch.no_grad()
def bias(solver: str, intervals: int, *, rows: int, dtype: torch.dtype, substeps: int) -> Bias:
    """Errors of the targets that one solver's stored states give on the uniform grid."""
    grid, flow = GridConfig().times(intervals), replace(PLANE, substeps=max(1, substeps // intervals))
    noise = torch.randn(rows, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solved = SOLVERS[solver].states(flow, noise, grid, no_condition(rows))
    states = trajectory(solved).transpose(0, 1).to(dtype).double()
    interval = (grid[:, None] - grid).reshape(len(grid), len(grid), 1, 1, 1, 1)
    exact, stored = ((states[:, None] - end) / interval for end in (exact_ends(states, grid, flow), states[None]))

    def relative(chosen: Tensor) -> float:
        error = (stored[chosen] - exact[chosen]).square().mean()
        return (error / exact[chosen].square().mean()).sqrt().item()

    later = torch.ones(len(grid), len(grid)).triu(1).bool()
    whole = torch.zeros_like(later)
    whole[0, -1] = True
    return Bias(pairs=relative(later), adjacent=relative(later & ~later.roll(1, 1)), full=relative(whole))


def main() -> None:
    """Measure every solver, grid and storage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    rows, fine = (32, 128) if quick else (256, 512)
    figures: dict[str, dict[str, float]] = {}
    print("| solver | intervals | storage | all pairs | neighbours | whole interval |\n|---|---|---|---|---|---|")
    for solver in SOLVERS:
        for intervals in INTERVALS:
            for name, dtype in (("float64", torch.float64), ("float16", torch.float16)):
                found = bias(solver, intervals, rows=rows, dtype=dtype, substeps=fine)
                figures[f"{solver}_{intervals}_{name}"] = {k: float(f"{v:.3g}") for k, v in vars(found).items()}
                print(
                    f"| {solver} | {intervals} | {name} | {found.pairs:.2%} | {found.adjacent:.2%} | {found.full:.2%} |"
                )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
