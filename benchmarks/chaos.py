"""What kills cost a run, and whether anything of it shows in the end.

    python -m benchmarks.chaos [--rounds N] [--seed S] [--storage local|s3] [--quick]

A real Ray cluster of a head and two nodes on this machine runs a tiny but whole recipe: trajectories by a pool of
actors, two stages by two training workers each, evaluation by actors, report. It runs once undisturbed. Then, round
after round in a new run directory, one to three victims die by SIGKILL at random moments of random phases: a worker
process, a node (its raylet, and with it all that ran there), a node that is announced to go some seconds before, as
clouds do, or the driver of the run. A node is replaced, a driver started again, until the run ends. Then all of it is
compared with the undisturbed run, bit by bit.

Everything is drawn from the seed but the moment at which a process really dies, so a round is not repeated exactly.
Ctrl-C ends after what was found so far. With --storage s3 the run directories lie in a bucket of moto's server.
"""

import argparse
import json
import logging
import os
import random
import secrets
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._nodes import NOTICE_SECONDS, PHASES, STAGES, Driver, Nodes
from pipelines.artifacts import file_hash, read_json
from pipelines.cluster import ENVIRONMENT
from pipelines.process import WORKER_ENVIRONMENT
from pipelines.shards import read_shard
from pipelines.storage import located

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """\
# A whole run in two minutes, for benchmarks/chaos.py.
seed: 5
data: {held_out: 1597}
track: {enabled: false}
precompute: {num_samples: 512, shard_rows: 16, intervals: 4, batch_size: 16, num_actors: 2}
train: {num_workers: 2, max_failures: 20}
stages:
  sketch:
    objective: {name: mean_velocity}
    num_steps: 200
    batch_size: 16
    log_every: 7
    checkpoint_every: 20
    optimizers: {student: {learning_rate: 1e-3}}
  refine:
    start: sketch
    label: hd
    objective: {name: dmd, update_ratio: 2}
    num_steps: 120
    batch_size: 16
    log_every: 7
    checkpoint_every: 20
evaluate: {num_samples: 400, batch_size: 50, pictures: 16, solvers: {euler: [4]}, num_actors: 2}
"""
KINDS = ("worker", "node", "driver", "notice")
SECONDS_TO_END = 1800
LIVES_MAX = 12
"""Starts of a driver in one run, more than which mean that it does not end."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """Whom to kill, and when."""

    kind: str
    phase: str
    moment: float
    """Share of the phase's undisturbed seconds that passes first; where it is over sooner, the next phase is hit."""


@dataclass(kw_only=True)
class Outcome:
    """What became of a run."""

    seconds: float = 0.0
    lives: int = 0
    done: list[Kill] = field(default_factory=list)
    """The kills that happened, each with the phase that it hit."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase, as the last driver said them."""
    saved: int = 0
    """Checkpoints that workers wrote because a node of theirs was announced to go."""


def say(text: str) -> None:
    """What is happening, at once."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def perform(
    run_dir: str, recipe: Path, nodes: Nodes, kills: Sequence[Kill], usual: Mapping[str, float], chance: random.Random
) -> Outcome:
    """Run a recipe to its end, killing as planned.

    Raises:
        RuntimeError: it does not end, with what its driver said last.
    """
    left, outcome, started = list(kills), Outcome(), time.monotonic()
    driver = Driver(recipe, run_dir, nodes.address)
    outcome.lives = 1
    try:
        while driver.code != 0:
            if driver.code is not None:
                _restartable(driver, outcome, started)
                driver = Driver(recipe, run_dir, nodes.address)
                outcome.lives += 1
            if left and _due(left[0], driver, usual) and _strike(left[0].kind, driver, nodes, chance, outcome):
                outcome.done.append(Kill(kind=left[0].kind, phase=driver.phase, moment=left[0].moment))
                say(f"  killed a {left[0].kind} in {driver.phase}")
                left.pop(0)
            if time.monotonic() - started > SECONDS_TO_END:
                raise RuntimeError(f"{run_dir} did not end:\n{''.join(driver.lines[-20:])}")
            time.sleep(0.05)
    finally:
        driver.kill()
    outcome.seconds, outcome.phases = time.monotonic() - started, driver.finished
    return outcome


def _restartable(driver: Driver, outcome: Outcome, started: float) -> None:
    """Say that a driver has ended, and give up where it always will."""
    if driver.code != -signal.SIGKILL:
        say(f"  the driver ended by itself with {driver.code}: {''.join(driver.lines[-3:]).strip()}")
    if outcome.lives >= LIVES_MAX or not outcome.done:
        raise RuntimeError(f"the driver ended with {driver.code}:\n{''.join(driver.lines[-20:])}")


def _due(kill: Kill, driver: Driver, usual: Mapping[str, float]) -> bool:
    """Whether its moment has come: in its phase, or as soon as that is over."""
    if not driver.phase or PHASES.index(driver.phase) < PHASES.index(kill.phase):
        return False
    if kill.kind == "notice" and not driver.trains:  # while a group starts there is nothing to save
        return False
    late = PHASES.index(driver.phase) > PHASES.index(kill.phase)
    return late or time.monotonic() - driver.since >= kill.moment * usual[kill.phase]


def _strike(kind: str, driver: Driver, nodes: Nodes, chance: random.Random, outcome: Outcome) -> bool:
    """Kill a victim, if there is one at this moment."""
    if kind == "driver":
        driver.kill()
        return True
    if kind == "worker":
        return nodes.kill_worker(driver.phase, chance)
    victim = nodes.victim(driver.phase, chance)
    if victim and kind == "notice":
        outcome.saved += _announced(victim, driver, nodes)
    if victim:
        nodes.replace(victim)
    return bool(victim)


def _announced(victim: Any, driver: Driver, nodes: Nodes) -> bool:
    """Announce that a node goes, and give its workers time; whether they saved what they had."""
    before, until = driver.has_saved, time.monotonic() + NOTICE_SECONDS
    nodes.announce(victim)
    while time.monotonic() < until and not (driver.has_saved and not before):
        time.sleep(0.05)
    return driver.has_saved and not before


def plan(round_: int, phases: Sequence[str], chance: random.Random) -> list[Kill]:
    """One to three kills in the order of the run; each kind is sure to come in one of four rounds."""
    kinds = [KINDS[round_ % len(KINDS)], *chance.choices(KINDS, k=chance.randint(0, 2))]
    kills = [Kill(kind=kind, phase=chance.choice(phases), moment=chance.random()) for kind in kinds]
    return sorted(kills, key=lambda kill: (phases.index(kill.phase), kill.moment))


QUICK = (
    Kill(kind="worker", phase="precompute", moment=0.5),
    Kill(kind="node", phase="sketch", moment=0.3),
    Kill(kind="driver", phase="sketch", moment=0.6),
    Kill(kind="notice", phase="refine", moment=0.3),
)


# What a run left behind


@dataclass(frozen=True, kw_only=True)
class Remains:
    """All of a finished run that must not depend on who died."""

    hashes: dict[str, str]
    """Of each shard and of each stage's weights."""
    ids: list[int]
    """Ids of the trajectories, from the files that the manifest lists."""
    rows: list[dict[str, Any]]
    """The report's, without what is timed."""


def remains_of(run_dir: str) -> Remains:
    """Read a finished run directory, local or remote."""
    folder = located(run_dir)
    manifest = read_json(folder / "trajectories" / "manifest.json")
    shards = [folder / "trajectories" / entry["file"] for entry in manifest["shards"]]
    files = [*shards, *(folder / "stages" / name / "student.safetensors" for name in STAGES)]
    timed = {"images_per_second", "train_seconds"}
    rows = read_json(folder / "report.json")["rows"]
    return Remains(
        hashes={str(file).removeprefix(str(folder)): file_hash(file) for file in files},
        ids=[int(number) for file in shards for number in read_shard(file).sample_ids],
        rows=[{key: value for key, value in row.items() if key not in timed} for row in rows],
    )


def compared(found: Remains, wanted: Remains) -> dict[str, int]:
    """Samples that are lost or there twice, files that differ or are not there, and rows of the report that differ."""
    counts = Counter(found.ids)
    return {
        "lost": len(set(wanted.ids) - counts.keys()),
        "doubled": sum(count - 1 for count in counts.values()),
        "hash_mismatches": len(dict(found.hashes.items() ^ wanted.hashes.items())),
        "row_mismatches": sum(a != b for a, b in zip(found.rows, wanted.rows, strict=False))
        + abs(len(found.rows) - len(wanted.rows)),
    }


# Around it


def prepare_environment() -> None:
    """What nodes, workers and drivers inherit: quick detection of death, one thread, a token of this cluster's own."""
    quick = {
        "RAY_health_check_initial_delay_ms": "0",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update({**ENVIRONMENT, **WORKER_ENVIRONMENT, **quick})


@contextmanager
def storage(kind: str) -> Iterator[str]:
    """Where run directories go: a temporary folder, or a bucket of a server on this machine."""
    if kind == "local":
        with tempfile.TemporaryDirectory(prefix="hdistill-chaos-") as folder:
            yield folder
        return
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "chaos", "AWS_SECRET_ACCESS_KEY": "chaos", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update({**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"})
    try:
        import s3fs

        s3fs.S3FileSystem().mkdir("chaos")
        yield "s3://chaos"
    finally:
        server.stop()


def rounds(count: int, seed: int, quick: bool, place: str, recipe: Path, nodes: Nodes) -> Iterator[dict[str, Any]]:
    """The undisturbed run, then what each round found."""
    say("undisturbed run")
    usual = perform(f"{place}/undisturbed", recipe, nodes, [], {}, random.Random())
    wanted = remains_of(f"{place}/undisturbed")
    say(f"  {usual.seconds:.0f} s: {', '.join(f'{name} {usual.phases[name]:.0f}' for name in PHASES)}")
    for number in range(count):
        chance = random.Random(f"{seed}-{number}")
        kills = list(QUICK) if quick else plan(number, PHASES, chance)
        say(f"round {number + 1} of {count}: {', '.join(f'{kill.kind} in {kill.phase}' for kill in kills)}")
        outcome = perform(f"{place}/round-{number}", recipe, nodes, kills, usual.phases, chance)
        found = compared(remains_of(f"{place}/round-{number}"), wanted)
        hit = [f"{kill.kind} in {kill.phase}" for kill in outcome.done]
        lost = (outcome.seconds - usual.seconds) / max(1, len(hit))
        say(f"  {outcome.seconds:.0f} s in {outcome.lives} lives, {lost:.0f} s lost a kill, {found}")
        told = {"lives": outcome.lives, "saved_on_notice": outcome.saved}
        yield {**found, "kills": hit, "seconds_lost_per_kill": lost, **told}


def summary(found: Sequence[Mapping[str, Any]], seed: int, kind: str) -> dict[str, Any]:
    """The figures of all rounds."""
    sums = ("lost", "doubled", "hash_mismatches", "row_mismatches")
    killed = Counter(kill for round_ in found for kill in round_["kills"])
    lost = [round_["seconds_lost_per_kill"] for round_ in found if round_["kills"]]
    return {
        "rounds": len(found),
        **{name: sum(round_[name] for round_ in found) for name in sums},
        "seconds_lost_per_kill": round(statistics.mean(lost), 1) if lost else 0.0,
        "kills": dict(sorted(killed.items())),
        "lives": sum(round_["lives"] for round_ in found),
        "saved_on_notice": sum(round_["saved_on_notice"] for round_ in found),
        "seed": seed,
        "storage": kind,
    }


def main() -> None:
    """Rounds, then the figures; the exit code is 1 where anything of a kill shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--storage", choices=["local", "s3"], default="local")
    parser.add_argument("--quick", action="store_true", help="one round of one kill of each kind")
    given = parser.parse_args()
    prepare_environment()
    found: list[dict[str, Any]] = []
    with ExitStack() as stack:
        recipe = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "chaos.yaml"
        recipe.write_text(RECIPE)
        place = stack.enter_context(storage(given.storage))
        nodes = Nodes()
        stack.callback(nodes.stop)
        try:
            count = 1 if given.quick else given.rounds
            for result in rounds(count, given.seed, given.quick, place, recipe, nodes):
                found.append(result)
        except KeyboardInterrupt:
            say("stopped")
    figures = summary(found, given.seed, given.storage)
    print(json.dumps(figures))
    bad = ("lost", "doubled", "hash_mismatches", "row_mismatches")
    sys.exit(any(figures[name] for name in bad) or not found)


if __name__ == "__main__":
    main()
