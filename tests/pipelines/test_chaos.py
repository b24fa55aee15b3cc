"""Kills at random moments of a run on a real cluster of several nodes, and the eye that must see what they do."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import chaos
from benchmarks.chaos import Kill, Remains, compared, plan, remains_of, summary
from tests.pipelines.conftest import Finished

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_worker_nodes_and_the_driver_are_killed_and_nothing_of_it_shows():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.chaos", "--quick"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=2300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["rounds"] == 1 and found["lives"] >= 2
    assert sorted(kill.split()[0] for kill in found["kills"]) == ["driver", "node", "notice", "worker"]
    assert found["saved_on_notice"] == 1
    assert {name: found[name] for name in ("lost", "doubled", "hash_mismatches", "row_mismatches")} == {
        "lost": 0,
        "doubled": 0,
        "hash_mismatches": 0,
        "row_mismatches": 0,
    }


WANTED = Remains(
    hashes={"part-0": "a", "part-1": "b", "student": "c"}, ids=list(range(8)), rows=[{"fid": 1.0}, {"fid": 2.0}]
)


@pytest.mark.parametrize(
    ("found", "differs"),
    [
        (WANTED, {}),
        (replace(WANTED, ids=[0, 1, 2, 3, 4, 5, 6]), {"lost": 1}),
        (replace(WANTED, ids=[*range(8), 3, 3]), {"doubled": 2}),
        (replace(WANTED, hashes={**WANTED.hashes, "student": "d"}), {"hash_mismatches": 1}),
        (replace(WANTED, hashes={"part-0": "a", "part-1": "b"}), {"hash_mismatches": 1}),
        (replace(WANTED, rows=[{"fid": 1.0}, {"fid": 2.1}]), {"row_mismatches": 1}),
        (replace(WANTED, rows=[{"fid": 1.0}]), {"row_mismatches": 1}),
    ],
)
def test_every_difference_is_counted(found: Remains, differs: dict[str, int]):
    nothing = dict.fromkeys(("lost", "doubled", "hash_mismatches", "row_mismatches"), 0)
    assert compared(found, WANTED) == nothing | differs


def test_what_a_run_left_is_read_from_its_files(copied: Finished):
    before = remains_of(str(copied.run_dir))
    assert before.ids == list(range(64)) and len(before.rows) == 7
    shutil.copy(copied.run_dir / "trajectories" / "part-00000.parquet", copied.run_dir / "twice.parquet")
    (copied.run_dir / "twice.parquet").replace(copied.run_dir / "trajectories" / "part-00001.parquet")
    with (copied.run_dir / "stages" / "sketch" / "student.safetensors").open("ab") as file:
        file.write(b"\0")
    differs = compared(remains_of(str(copied.run_dir)), before)
    assert differs == {"lost": 32, "doubled": 32, "hash_mismatches": 2, "row_mismatches": 0}


def test_a_plan_follows_from_its_seed_and_each_kind_comes_in_four_rounds():
    plans = [plan(number, chaos.PHASES, random.Random(f"0-{number}")) for number in range(8)]
    assert plans == [plan(number, chaos.PHASES, random.Random(f"0-{number}")) for number in range(8)]
    assert all(1 <= len(kills) <= 3 for kills in plans)
    for four in (plans[:4], plans[4:]):
        assert {kill.kind for kills in four for kill in kills} == set(chaos.KINDS)
    order = [[chaos.PHASES.index(kill.phase) for kill in kills] for kills in plans]
    assert order == [sorted(places) for places in order]


def test_the_summary_adds_rounds_up():
    rounds = [
        {"lost": 0, "doubled": 1, "hash_mismatches": 0, "row_mismatches": 0, "lives": 2, "seconds_lost_per_kill": 10.0}
        | {"kills": [f"{kill.kind} in {kill.phase}" for kill in chaos.QUICK[:count]], "saved_on_notice": count - 1}
        for count in (1, 3)
    ]
    figures = summary(rounds, 0, "local")
    assert (figures["rounds"], figures["doubled"], figures["lives"]) == (2, 2, 4)
    assert figures["kills"] == {"driver in sketch": 1, "node in sketch": 1, "worker in precompute": 2}
    assert figures["saved_on_notice"] == 2
    assert figures["seconds_lost_per_kill"] == 10.0


def test_a_kill_waits_for_its_moment_and_hits_the_next_phase_where_it_comes_too_late():
    class Told:
        def __init__(self, phase: str, since: float, *, trains: bool = True) -> None:
            self.phase, self.since, self.trains = phase, since, trains

    kill, usual = Kill(kind="driver", phase="sketch", moment=0.5), {"sketch": 1e9}
    assert not chaos._due(kill, Told("precompute", -1e18), usual)  # pyright: ignore[reportArgumentType]
    assert not chaos._due(kill, Told("sketch", 0.0), usual)  # pyright: ignore[reportArgumentType]
    assert chaos._due(kill, Told("sketch", -1e18), usual)  # pyright: ignore[reportArgumentType]
    assert chaos._due(kill, Told("refine", 0.0), usual)  # pyright: ignore[reportArgumentType]
    assert not chaos._due(kill, Told("", -1e18), usual)  # pyright: ignore[reportArgumentType]
    notice, starts = replace(kill, kind="notice"), Told("sketch", -1e18, trains=False)
    assert not chaos._due(notice, starts, usual)  # pyright: ignore[reportArgumentType]
    assert chaos._due(kill, starts, usual)  # pyright: ignore[reportArgumentType]
