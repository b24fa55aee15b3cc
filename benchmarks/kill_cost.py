"""What a kill in training costs, against how often checkpoints are written.

    python -m benchmarks.kill_cost [--quick] [--kills N] [--workers N]

Trains a sketch of the digits in a process of its own, kills it by SIGKILL at a drawn step, starts it again, and
measures what passes until it is where it was: steps made again, exactly, and seconds, of which those before its first
step are told apart. For several numbers of steps between checkpoints; undisturbed runs say what writing them costs.
`--workers` trains in so many Ray Train workers.
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from pipelines.curve import Curve

STEPS = 300
RECIPE = """\
# A sketch of the digits, for benchmarks/kill_cost.py.
data: {{held_out: 1197}}
track: {{enabled: false}}
precompute: {{num_samples: 512, intervals: 4, num_actors: 0}}
train: {{num_workers: {workers}}}
stages:
  sketch:
    objective: {{name: mean_velocity}}
    num_steps: {steps}
    batch_size: 128
    log_every: 1
    checkpoint_every: {every}
evaluate: {{num_samples: 100, pictures: 4, solvers: {{euler: [1]}}}}
"""


class Training:
    """`hdistill train` in a process of its own."""

    def __init__(self, recipe: Path, run_dir: Path) -> None:
        self.born = time.perf_counter()
        command = [sys.executable, "-m", "pipelines.cli", "train", str(recipe), "--run-dir", str(run_dir)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self._stage = run_dir / "stages" / "sketch"

    @property
    def step(self) -> int:
        """The last step that it has told."""
        lines = Curve.read(self._stage / "metrics.jsonl")
        return int(lines[-1]["step"]) if lines else 0

    @property
    def saved(self) -> int:
        """The last step that a new life can start from."""
        files = (self._stage / "checkpoints").glob("step-*.json")
        return max((int(file.stem.removeprefix("step-")) for file in files), default=0)

    def until(self, step: int) -> float:
        """Seconds of its life until it has told of a step."""
        while self.step < step:
            if self._process.poll():
                raise RuntimeError(f"training ended with {self._process.returncode}")
            time.sleep(0.01)
        return time.perf_counter() - self.born

    def kill(self) -> None:
        """End it where it is."""
        self._process.kill()
        self._process.wait()

    def end(self) -> float:
        """Seconds of its whole life."""
        if self._process.wait():
            raise RuntimeError(f"training ended with {self._process.returncode}")
        return time.perf_counter() - self.born


def killed(recipe: Path, run_dir: Path, step: int) -> dict[str, float]:
    """Kill a training at a step, start it again, and see what passes until it is there again."""
    first = Training(recipe, run_dir)
    first.until(step)
    first.kill()
    reached, saved = first.step, first.saved
    second = Training(recipe, run_dir)
    while reached > saved and second.step >= reached:  # the curve is cut back to the checkpoint first
        time.sleep(0.005)
    begun, back = second.until(saved + 1), second.until(max(reached, saved + 1))
    second.kill()
    return {"steps": reached - saved, "seconds": back, "start_seconds": begun}


def main() -> None:
    """Every interval in turn, then the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one kill for each of two intervals")
    parser.add_argument("--kills", type=int, default=5, help="for each interval")
    parser.add_argument("--workers", type=int, default=0)
    given = parser.parse_args()
    intervals, kills = ([10, 100], 1) if given.quick else ([5, 20, 80], given.kills)
    chance, found = random.Random(0), {}
    print("| steps between checkpoints | steps made again | seconds lost a kill | of them the start | undisturbed, s |")
    print("|---|---|---|---|---|")
    with TemporaryDirectory() as folder:
        recipe = Path(folder) / "kill_cost.yaml"
        for every in intervals:
            recipe.write_text(RECIPE.format(workers=given.workers, steps=STEPS, every=every))
            whole = Training(recipe, Path(folder) / f"whole-{every}").end()
            rounds = []
            for number in range(kills):
                rounds.append(killed(recipe, Path(folder) / f"{every}-{number}", chance.randint(100, 260)))
                shutil.rmtree(Path(folder) / f"{every}-{number}")
            means = {name: statistics.mean(one[name] for one in rounds) for name in rounds[0]}
            found[every] = {**means, "undisturbed_seconds": whole}
            cells = (means["steps"], means["seconds"], means["start_seconds"], whole)
            print(f"| {every} | {' | '.join(f'{cell:.1f}' for cell in cells)} |", flush=True)
    print(json.dumps({"kills": kills, "workers": given.workers, "steps": STEPS, "intervals": found}))


if __name__ == "__main__":
    main()
