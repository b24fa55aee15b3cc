"""A sweep whose driver is killed: whether a trial is lost or run twice, and what sharing and slots are worth.

    python -m benchmarks.sweep_kills FOLDER [--kills N] [--after N] [-- SPACE RECIPE OPTION...]

Runs `hdistill tune` in a process of its own and kills it, with all that it started, by SIGKILL as soon as so many more
trials have ended and a drawn while has passed, so that others are half-way; starts it again; and so on to the end.
Before each kill the trials that have ended are noted down: none of their files may change afterwards. By default: 30
trials of the schedule of a small digits recipe.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipelines.artifacts import read_json
from pipelines.tuning.trial import Trial, stored_trials

RECIPE = """\
# A student of two steps on the digits, for benchmarks/sweep_kills.py.
data: {held_out: 600}
track: {enabled: false}
precompute: {num_samples: 1024, intervals: 12}
stages:
  sfd_2:
    label: sfd
    objective: {name: sfd, intervals: 2}
    num_steps: 60
    batch_size: 64
    checkpoint_every: 15
    optimizers: {student: {learning_rate: 5e-4, warmup_moves: 10}}
evaluate: {num_samples: 1000, solvers: {euler: [2]}}
"""


class Driver:
    """`hdistill tune` in a session of its own, so that one signal reaches all that it starts."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log.open("a")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, start_new_session=True)

    @property
    def code(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def ended(sweep: Path) -> dict[str, Trial]:
    """Trials that will not be worked on again."""
    return {trial.key: trial for trial in stored_trials(sweep) if trial.state != "running"}


def run(command: list[str], folder: Path, kills: int, after: int) -> dict[str, Any]:
    """Kill and start again; what came of it."""
    sweep, noted, doubled, sessions = folder / "sweep", dict[str, Trial](), set[str](), 0
    chance = random.Random(kills)
    while True:
        driver, sessions, before = Driver(command, folder / "log.txt"), sessions + 1, len(ended(sweep))
        while driver.code is None and (sessions > kills or len(ended(sweep)) < before + after):
            time.sleep(0.2)
        if driver.code is None:
            time.sleep(chance.uniform(0.2, 0.8) * _seconds_a_trial(sweep))
            driver.kill()
        now = ended(sweep)
        doubled |= {key for key, trial in noted.items() if now.get(key) != trial}
        noted = now
        print(f"session {sessions}: {len(now)} trials have ended", flush=True)
        if driver.code == 0:
            return _figures(sweep, noted, doubled, sessions)
        if sessions > kills:
            raise SystemExit(f"the sweep ended with {driver.code}: see {folder / 'log.txt'}")


def _seconds_a_trial(sweep: Path) -> float:
    return statistics.median(trial.seconds for trial in ended(sweep).values())


def _figures(sweep: Path, noted: dict[str, Trial], doubled: set[str], sessions: int) -> dict[str, Any]:
    left = [trial for trial in stored_trials(sweep) if trial.state == "running"]
    costs = read_json(sweep / "sweep_report.json")["costs"]
    return {
        "trials": len(noted),
        "kills": sessions - 1,
        "lost": len(left),
        "run_twice": len(doubled),
        "begun_again": sum(trial.lives - 1 for trial in noted.values()),
        "wall_over_ideal": round(costs["wall"] / costs["ideal"], 3),
        "seconds": {name: round(value, 1) for name, value in costs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--after", type=int, default=10, help="trials that end before a kill")
    own, _, sweep = " ".join(sys.argv[1:]).partition(" -- ")
    asked = parser.parse_args(own.split())
    asked.folder.mkdir(parents=True, exist_ok=True)
    (asked.folder / "small.yaml").write_text(RECIPE)
    small = ["sfd_schedule", str(asked.folder / "small.yaml"), "--trials", "30", "--finalists", "1", "--seeds", "1"]
    command = [sys.executable, "-m", "pipelines.cli", "tune", *(sweep.split() or small)]
    command += ["--run-dir", str(asked.folder / "sweep")]
    print(json.dumps(run(command, asked.folder, asked.kills, asked.after), indent=1))


if __name__ == "__main__":
    main()
