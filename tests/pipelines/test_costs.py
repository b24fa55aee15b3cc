"""The bill of a run: summed over lives that end and lives that are killed, and never in the way of the run itself."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.costs import Bill, Cost, costs_of, keep_worker_costs, metrics_of, with_costs
from pipelines.report import Phase, read_report
from tests.pipelines import tiny
from tests.pipelines.tiny import hdistill, tree

ROOT = Path(__file__).parents[2]


def test_a_finished_phase_is_billed_with_its_time_and_what_was_added(tmp_path: Path):
    bill = Bill(tmp_path / "costs")
    with bill.phase("precompute"):
        bill.add("precompute", network_calls=10, bytes_written=5.0)
        bill.add("precompute", network_calls=2)
        time.sleep(0.05)
    cost = costs_of(tmp_path, [])["precompute"]
    assert 0.05 <= cost.wall_seconds < 5
    assert replace(cost, wall_seconds=0.0) == Cost(network_calls=12, bytes_written=5)


def test_lives_are_summed_and_each_has_a_file(tmp_path: Path):
    for calls in (1, 2, 3):
        bill = Bill(tmp_path / "costs")
        with bill.phase("sketch"):
            bill.add("sketch", network_calls=calls)
    assert len(list((tmp_path / "costs").iterdir())) == 3
    cost = costs_of(tmp_path, [])["sketch"]
    assert (cost.network_calls, cost.restarts) == (6, 0)


def test_a_phase_that_was_found_finished_costs_nothing(tmp_path: Path):
    bill = Bill(tmp_path / "costs", every=0.01)
    with bill.phase("sketch"):
        time.sleep(0.1)
        assert list((tmp_path / "costs").iterdir()), "it was kept while nobody knew"
        bill.forget("sketch")
    assert list((tmp_path / "costs").iterdir()) == []
    assert costs_of(tmp_path, []) == {}


def test_a_phase_that_raised_counts_as_a_restart(tmp_path: Path):
    for mistake in (RuntimeError, KeyboardInterrupt, None):
        with Bill(tmp_path / "costs").phase("sketch") if mistake is None else pytest.raises(mistake):
            if mistake:
                with Bill(tmp_path / "costs").phase("sketch"):
                    raise mistake
    assert costs_of(tmp_path, [])["sketch"].restarts == 2


_WORKS_ON = """
import sys, time
from pathlib import Path
from pipelines.costs import Bill
bill = Bill(Path(sys.argv[1]), every=0.05)
with bill.phase("precompute"):
    bill.add("precompute", network_calls=7)
    time.sleep(0.5)
    print("kept", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_what_it_spent_till_then(tmp_path: Path):
    command = [sys.executable, "-c", _WORKS_ON, str(tmp_path / "costs")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "kept\n"
        process.send_signal(signal.SIGKILL)
    cost = costs_of(tmp_path, [])["precompute"]
    assert 0.3 < cost.wall_seconds < 30 and cost.network_calls == 7 and cost.restarts == 1


def test_workers_are_summed_and_a_group_that_began_anew_is_a_restart(tmp_path: Path):
    bill, folder = Bill(tmp_path / "costs"), tmp_path / "stages" / "sketch"
    with bill.phase("sketch"):
        for rank in (0, 1):
            keep_worker_costs(folder, rank, worker_seconds=1.0)
            keep_worker_costs(folder, rank, worker_seconds=8.0, waiting_seconds=2.0, network_calls=100, bytes_read=64)
    for file in list((folder / "costs").iterdir()):  # as a group of other processes leaves them
        file.rename(file.with_name(f"1-{file.name}"))
    for rank in (0, 1):
        keep_worker_costs(folder, rank, worker_seconds=2.0)
    cost = costs_of(tmp_path, ["sketch", "refine"])["sketch"]
    assert replace(cost, wall_seconds=0.0) == Cost(
        worker_seconds=20, waiting_seconds=4, network_calls=200, bytes_read=128, restarts=1
    )
    assert cost.idle_share == 0.2
    assert costs_of(tmp_path, ["sketch", "refine"])["refine"] == Cost()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"sketch": 3}', '{"sketch": {"wall_seconds": NaN, "worker_seconds": "much"}}']
)
def test_an_account_that_cannot_be_read_is_left_out(tmp_path: Path, content: str):
    with Bill(tmp_path / "costs").phase("sketch"):
        pass
    before = costs_of(tmp_path, ["sketch"])
    (tmp_path / "costs" / "other.json").write_text(content)
    folder = tmp_path / "stages" / "sketch" / "costs"
    folder.mkdir(parents=True)
    (folder / "other-0.json").write_text(content)
    assert costs_of(tmp_path, ["sketch"]) == before


def test_an_account_that_cannot_be_kept_does_not_end_the_run(tmp_path: Path):
    (tmp_path / "costs").write_text("a file where the folder should be")
    with Bill(tmp_path / "costs", every=0.01).phase("sketch"):
        time.sleep(0.05)
    keep_worker_costs(tmp_path / "costs", 0, worker_seconds=1.0)
    assert costs_of(tmp_path, ["sketch"])["sketch"] == Cost()


def test_the_report_has_whole_numbers_and_metrics_only_of_what_is_billed():
    phases = [Phase(name=name, wall_seconds=1.0, reused=False) for name in ("sketch", "report")]
    cost = Cost(wall_seconds=2.5, worker_seconds=10.0, waiting_seconds=5.0, network_calls=7.0, restarts=1.0)
    sketch, report = with_costs(phases, {"sketch": cost})
    assert (sketch.total_seconds, sketch.wall_seconds, sketch.idle_share) == (2.5, 1.0, 0.5)
    assert type(sketch.network_calls) is int and sketch.network_calls == 7 and sketch.restarts == 1
    assert metrics_of(sketch)["cost/sketch/idle_share"] == 0.5 and metrics_of(report) == {}


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory whose first life was stopped in its second stage."""
    folder = tmp_path_factory.mktemp("billed")
    recipe = tiny.write_recipe(folder)
    settings = (*tiny.UNTRACKED, "--set", "precompute.num_actors=0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.run.Run._say_why_again", _stop_at_refine)
        with pytest.raises(RuntimeError, match="stopped"):
            hdistill("run", recipe, "--run-dir", folder / "run", *settings)
    result = hdistill("run", recipe, "--run-dir", folder / "run", *settings)
    assert result.exit_code == 0, result.output
    return folder / "run"


def _stop_at_refine(_: object, job: object) -> None:
    if getattr(job, "name", "") == "refine":
        raise RuntimeError("stopped")


def test_a_run_says_what_each_phase_cost(twice: Path):
    phases = {phase.name: phase for phase in read_report(twice / "report.json").phases}
    shards = [path.stat().st_size for path in (twice / "trajectories").glob("*.parquet")]
    made = phases["precompute"]
    assert made.reused and made.total_seconds > 0, "by the first life"
    assert made.network_calls == 64 * 4 and made.bytes_written == sum(shards) and made.worker_seconds > 0
    assert phases["evaluate"].network_calls == 200 * sum((1, 2, 2, 1, 1, 2, 3))
    assert phases["evaluate"].worker_seconds > 0
    assert phases["sketch"].network_calls == 5 * 16 * 3, "five steps of 16 rows, forward and backward"
    assert all(phases[name].worker_seconds > 0 and phases[name].bytes_read > 0 for name in ("sketch", "sfd_2"))
    assert {name: phases[name].restarts for name in tiny.STAGES} == {"sketch": 0, "refine": 1, "sfd_2": 0, "sfd_4": 0}
    assert phases["refine"].total_seconds > 0.9 * phases["refine"].wall_seconds


def test_a_run_that_finds_everything_done_adds_no_account(twice: Path):
    before = tree(twice / "costs")
    recipe = twice.parent / "tiny.yaml"
    costs = [replace(phase, wall_seconds=0.0, reused=True) for phase in read_report(twice / "report.json").phases]
    settings = (*tiny.UNTRACKED, "--set", "precompute.num_actors=0")
    assert hdistill("run", recipe, "--run-dir", twice, *settings).exit_code == 0
    assert tree(twice / "costs") == before
    again = [replace(phase, wall_seconds=0.0, reused=True) for phase in read_report(twice / "report.json").phases]
    assert again == costs
    assert all(json.loads((twice / "costs" / name).read_text()) for name in before)
