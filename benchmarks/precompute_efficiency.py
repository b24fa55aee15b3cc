"""What Ray Data costs: shards by an actor pool against a plain loop over the same network on the same cores.

    python -m benchmarks.precompute_efficiency [--quick] [--cores N]

Trajectories are of the digits teacher, solved as the digits recipe has it; latents are of PNG pictures through an
autoencoder of random weights, read and encoded in two operators. Both sides write the same shards, with the same batch
size and as many threads: N threads in one process, or N actors of one. All of it, Ray's own processes too, is held to N
cores, so that what Ray does beside the network counts.

Sides take turns, each in a process of its own that makes one shard first. Seconds are from the first listed shard to
the last, and where shards are read first, from the moment when the network is loaded, before which nothing is read; the
start of a pool is told apart, as it counts the less the longer the work. Beside the clock there are the seconds that
all processes computed themselves, which other work on the machine changes less. Figures are medians over rounds, ratios
are taken within a round. `--quick` leaves the latents out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines import recipe as recipes  # before torch: `pipelines` sets how its threads wait

# isort: split
import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from pipelines.cluster import ensure_ray
from pipelines.data import DataConfig
from pipelines.diffusers_library import diffusers
from pipelines.encoding import latent_parts
from pipelines.lazy import LazyPixels
from pipelines.precompute import TrajectoryMaker, trajectory_spec
from pipelines.process import available_cpus, prepare_process
from pipelines.production import Actors, InParts, Made, produce
from pipelines.shards import Shard, ShardSet, ShardSetSpec, commit_table
from pipelines.sources import FolderSource
from pipelines.teachers import TeacherConfig, load_teacher

DIGITS = recipes.load("digits")
SIDE, LATENT_ROWS, LATENT_BATCH = 128, 32, 16
"""Of pictures: their side in pixels, how many a shard has, how many are encoded at once."""
TICKS = os.sysconf("SC_CLK_TCK")
Figures = dict[str, float]


@dataclass(frozen=True)
class Case:
    """Some kind of shard, of which any number can be made."""

    spec: Callable[[int], ShardSetSpec]
    maker: Callable[[ShardSet], Made]


def trajectories(_folder: Path) -> Case:
    """Shards of 256 rows."""
    config, teacher = replace(DIGITS.precompute, shard_rows=256, batch_size=256), load_teacher(DIGITS.teacher)

    def spec(count: int) -> ShardSetSpec:
        return trajectory_spec(replace(config, num_samples=256 * count), DIGITS.teacher, teacher, DIGITS.seed)

    maker = partial(TrajectoryMaker, config=config, teacher=DIGITS.teacher, seed=DIGITS.seed)
    return Case(spec, lambda shards: partial(maker, shards=shards))


def latents(folder: Path) -> Case:
    """Shards of pictures that are decoded from PNG."""
    data = DataConfig(kind="folder", path=str(folder))
    images, _ = LazyPixels.of(FolderSource(data), data, (SIDE, SIDE, 3))
    config, teacher = replace(DIGITS.precompute, batch_size=LATENT_BATCH), TeacherConfig(vae=str(folder / "vae"))
    labels = np.zeros(len(images), np.int64)
    return Case(latent_spec, partial(latent_parts, config=config, teacher=teacher, images=images, labels=labels))


def latent_spec(count: int) -> ShardSetSpec:
    return ShardSetSpec(
        kind="latents",
        rows=LATENT_ROWS * count,
        shard_rows=LATENT_ROWS,
        dtype="float16",
        shape=(2, 4, SIDE // 4, SIDE // 4),
        inputs={"count": count},
        details={"pixels": [SIDE, SIDE, 3]},
    )


def draw_pictures(folder: Path, count: int) -> None:
    """Pictures for so many shards, and an autoencoder of a quarter of their side."""
    rng = np.random.default_rng(0)
    for number in range(LATENT_ROWS * count):
        pixels = rng.integers(0, 255, (SIDE // 8, SIDE // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(folder / f"{number:06}.png")
    blocks: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": (32, 64, 64),
    }
    torch.manual_seed(0)
    diffusers().AutoencoderKL(norm_num_groups=8, **blocks).save_pretrained(folder / "vae")


KINDS = {"trajectories": trajectories, "latents": latents}


# One side, in a process of its own


def child(kind: str, side: str, count: int, cores: int, folder: Path) -> Figures:
    """Seconds of a shard, by the clock and computed, and those that a pool takes to start."""
    prepare_process(cores)
    case = KINDS[kind](folder)
    if side == "ray":
        ensure_ray(reserved_cpus=0)
    hold_to(sorted(os.sched_getaffinity(0))[:cores])
    first, second = (timed(case, number, cores if side == "ray" else 0) for number in (1, count))
    return {**second, "start": first["start"]}


def timed(case: Case, count: int, actors: int) -> Figures:
    """Make so many shards: the same seconds."""
    with TemporaryDirectory() as made:
        ready, shards = Path(made, "ready"), ShardSet.open(Path(made, "set"), case.spec(count))
        maker, started, loaded = gated(case.maker(shards), ready), time.perf_counter(), list[Mark]()
        watcher = threading.Thread(target=watch, args=(ready, loaded))
        watcher.start()
        listed: list[Mark] = []
        if actors:
            produce(shards, maker, Actors(count=actors, cpus=1.0, gpus=0.0), lambda _: listed.append(mark()))
        else:
            plainly(shards, maker, lambda: listed.append(mark()))
        watcher.join()
    in_parts = isinstance(maker, InParts)
    first, rows = (loaded[0], count) if in_parts else (listed[0], count - 1)
    clock, computed = ((listed[-1][place] - first[place]) / max(1, rows) for place in (0, 1))
    return {"clock": clock, "computed": computed, "start": loaded[0][0] - started}


Mark = tuple[float, float]


def mark() -> Mark:
    """The time, and what was computed."""
    return time.perf_counter(), computed_seconds()


def gated(maker: Made, ready: Path) -> Made:
    """A maker that says when its network is loaded, and reads nothing before."""

    def opened(load: Callable[[str], Any], device: str) -> Any:
        loaded = load(device)
        ready.touch()
        return loaded

    def read(ids: range) -> pa.Table:
        while not ready.exists():
            time.sleep(0.01)
        return given.read(ids)

    if not isinstance(maker, InParts):
        return partial(opened, maker)
    given = maker
    return replace(given, read=read, encoder=partial(opened, given.encoder))


def watch(ready: Path, loaded: list[Mark]) -> None:
    """Note when a network is loaded."""
    while not ready.exists():
        time.sleep(0.01)
    loaded.append(mark())


def plainly(shards: ShardSet, maker: Made, listed: Callable[[], None]) -> None:
    """The loop that one would write without Ray."""
    made = batches(shards, maker) if isinstance(maker, InParts) else map(maker("cpu").shard, shards.missing)
    for shard in made:
        shards.commit(shard)
        listed()


def batches(shards: ShardSet, parts: InParts) -> Iterator[Shard]:
    """The same in parts: read and encode one batch after another."""
    encode = parts.encoder("cpu")
    for index in shards.missing:
        ids = shards.spec.ids(index)
        cut = [ids[start : start + parts.rows] for start in range(0, len(ids), parts.rows)]
        table = pa.concat_tables([encode(parts.read(some)) for some in cut])
        yield commit_table(shards.folder, shards.spec, index, table)


def hold_to(cores: list[int]) -> None:
    """Keep this process and all below it, and what they start from now on, on some cores."""
    for process in family():
        for thread in Path(f"/proc/{process}/task").glob("*"):
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), cores)


def computed_seconds() -> float:
    """Seconds that this process and all below it have computed, the ended ones too."""
    return sum(sum(fields[10:14]) for fields in family().values()) / TICKS


def family() -> dict[int, list[int]]:
    """This process and its descendants, each with the numbers of its /proc/PID/stat from the parent's on."""
    stats: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            stats[int(path.parent.name)] = [int(word) for word in path.read_text().rsplit(")", 1)[1].split()[1:15]]
    found = {os.getpid()}
    while more := {process for process, fields in stats.items() if fields[0] in found} - found:
        found |= more
    return {process: stats[process] for process in found}


# Both sides


def measure(kind: str, count: int, rounds: int, cores: int) -> list[dict[str, Figures]]:
    """Both sides in every round, each first in half of them."""
    with TemporaryDirectory() as folder:
        if kind == "latents":
            draw_pictures(Path(folder), count)
        asked = [kind, str(count), str(cores), folder]
        orders = [("plain", "ray")[:: -1 if number % 2 else 1] for number in range(rounds)]
        return [{side: started(side, asked) for side in order} for order in orders]


def started(side: str, asked: list[str]) -> Figures:
    command = [sys.executable, "-m", "benchmarks.precompute_efficiency", "--child", side, *asked]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def figures(found: list[dict[str, Figures]]) -> dict[str, Any]:
    """Medians over rounds."""
    clock, computed = ([one["ray"][kind] / one["plain"][kind] for one in found] for kind in ("clock", "computed"))
    median = {
        f"{side}_{kind}_seconds": round(statistics.median(one[side][kind] for one in found), 4)
        for side, kind in (("plain", "clock"), ("ray", "clock"), ("plain", "computed"), ("ray", "computed"))
    }
    return {
        "ray_over_plain": round(statistics.median(clock), 3),
        "range": [round(min(clock), 3), round(max(clock), 3)],
        "ray_over_plain_computed": round(statistics.median(computed), 3),
        "range_computed": [round(min(computed), 3), round(max(computed), 3)],
        **median,
        "pool_start_seconds": round(statistics.median(one["ray"]["start"] for one in found), 1),
    }


def line(kind: str, one: dict[str, Any]) -> str:
    """One row of the table."""
    cells = [f"{one[f'{side}_clock_seconds']:.3f}" for side in ("plain", "ray")]
    for ratio, spread in (("ray_over_plain", "range"), ("ray_over_plain_computed", "range_computed")):
        cells.append(f"{one[ratio]:.3f} ({one[spread][0]:.3f} to {one[spread][1]:.3f})")
    return f"| {' | '.join([kind, *cells, str(one['pool_start_seconds'])])} |"


def main() -> None:
    """Both kinds, then the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cores", type=int, default=available_cpus(), help="default: all that there are")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kind", choices=KINDS, help="only these shards")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        side, kind, count, cores, folder = options.child
        print(json.dumps(child(kind, side, int(count), int(cores), Path(folder))))
        return
    count, rounds, kinds = (16, 1, ["trajectories"]) if options.quick else (32, options.rounds, list(KINDS))
    kinds = [options.kind] if options.kind else kinds
    heads = ["shards", "plain, s each", "Ray Data, s each", "Ray / plain", "computed, Ray / plain"]
    heads.append("a pool starts, s")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    found: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        found[kind] = figures(measure(kind, count, rounds, options.cores))
        print(line(kind, found[kind]), flush=True)
    about = {"shards": count, "rounds": rounds, "cores": options.cores}
    print(json.dumps({"ray_over_plain": found[kinds[0]]["ray_over_plain"], **about, "kinds": found}))


if __name__ == "__main__":
    main()
