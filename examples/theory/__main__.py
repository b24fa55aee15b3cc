"""The theory of HD on a toy: figures and numbers.

    python -m examples.theory [--out DIR] [--quick]

Writes theory-capacity.png, theory-starts.png, theory-starts-curves.png, theory-pgd.png and theory.json.
"""

import argparse
import os
from pathlib import Path
from typing import Any

# Before torch: threads that spin while they wait would take the other process's core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from examples.theory.experiment import QUICK, Setting
from examples.theory.run import PROCESSES, run


def show(numbers: dict[str, Any]) -> None:
    """The two tables that the figures are read by."""
    names = ("endpoint_rmse", "sliced_w2", "coarse_recall", "fine_recall", "precision")
    print(f"{'':28}" + "".join(f"{name:>15}" for name in names))
    rows = [(f"sketch, {one['parameters']:,} parameters", one["mean"]) for one in numbers["capacity"]]
    for start in ("random", "velocity network", "sketch"):
        rows += [(f"{start}, before", numbers["starts"][start][0]), (f"{start}, after", numbers["starts"][start][-1])]
    for name, values in [*rows, ("exact flow", numbers["exact"])]:
        print(f"{name:28}" + "".join(f"{values[key]:15.3f}" for key in names))
    print(f"{numbers['seconds']:.0f} seconds")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/theory"), help="where to write (default: runs/theory)")
    parser.add_argument("--quick", action="store_true", help="a short form that shows the same with more noise")
    options = parser.parse_args()
    torch.set_num_threads(PROCESSES)
    show(run(QUICK if options.quick else Setting(), options.out, quick=options.quick))
    print(f"figures and theory.json in {options.out}")


if __name__ == "__main__":
    main()
