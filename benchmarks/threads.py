"""What threads and memory settings do to one training step on shared cores.

    python -m benchmarks.threads [--quick]

A step of the digits teacher's network (batch 128, forward, backward, AdamW) is timed in a process of its own under
each OpenMP wait policy, alone and beside a second process that does the same, and with and without keeping freed
memory. Each figure is a median; the runs of one round follow each other, and the rounds are repeated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

CASES = {
    "active": {"OMP_WAIT_POLICY": "active"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "passive, memory returned": {"OMP_WAIT_POLICY": "passive", "KEEP": "0"},
    "passive, one thread": {"OMP_WAIT_POLICY": "passive", "THREADS": "1"},
}


def child(seconds: float) -> None:
    """Time steps for some seconds and print the median in milliseconds."""
    import torch

    from hd_core.networks.dit import DiT, DiTConfig
    from hd_core.types import Condition
    from pipelines.process import prepare_process

    if os.environ.get("KEEP") != "0":
        prepare_process()
    if "THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["THREADS"]))
    net = DiT(DiTConfig(width=64, depth=4, heads=4))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=True)
    x, t, condition = torch.randn(128, 1, 8, 8), torch.rand(128), Condition(labels=torch.randint(10, (128,)))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        net(x, t, condition).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    print(1000 * statistics.median(times[len(times) // 5 :] or times))


def start(case: str, seconds: float) -> subprocess.Popen[str]:
    """A child under one setting."""
    command = [sys.executable, "-m", "benchmarks.threads", "--child", str(seconds)]
    return subprocess.Popen(command, env={**os.environ, **CASES[case]}, stdout=subprocess.PIPE, text=True)


def milliseconds(case: str, seconds: float, companions: int) -> float:
    """Median step of one child beside others of the same kind."""
    children = [start(case, seconds) for _ in range(1 + companions)]
    return float(children[0].communicate()[0]) if all(child.wait() == 0 for child in children) else float("nan")


def main() -> None:
    """Time every case, alone and in company."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", type=float)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    rounds, seconds = (1, 2.0) if options.quick else (3, 5.0)
    figures: dict[str, dict[str, float]] = {}
    print("| setting | alone, ms | beside a second process, ms |\n|---|---|---|")
    for case in CASES:
        alone = statistics.median(milliseconds(case, seconds, 0) for _ in range(rounds))
        shared = statistics.median(milliseconds(case, seconds, 1) for _ in range(rounds))
        figures[case] = {"alone_ms": round(alone, 1), "shared_ms": round(shared, 1)}
        print(f"| {case} | {alone:.1f} | {shared:.1f} |")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
