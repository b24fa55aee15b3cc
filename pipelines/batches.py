"""Which rows make which batch: the same global batches at any number of workers, resumed exactly, resident or streamed.

Each epoch visits the shards in a new order, a window of them at a time, and shuffles the rows of a window among
themselves. A window gives whole batches only; the few rows left over come in other windows of other epochs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hd_core.random import permutation
from pipelines.shards import Rows, ShardSet, read_shard
from pipelines.storage import located


@dataclass(frozen=True, kw_only=True)
class Window:
    """Some shards of one epoch, whose rows are shuffled together."""

    epoch: int
    number: int
    shards: tuple[int, ...]
    skip: int = 0
    """Batches at its start that were used before a restart."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The order of a shard set's rows, as a function of the seed."""

    shard_sizes: tuple[int, ...]
    batch_size: int
    """Rows of the global batch."""
    seed: int
    window_shards: int = 16
    """Shards whose rows are shuffled together; more shuffle better and need more memory."""

    def __post_init__(self) -> None:
        smallest = sorted(self.shard_sizes)[: self.window_shards]
        if sum(smallest) < self.batch_size:  # some epoch's first window might give no batch
            raise ValueError(
                f"a batch of {self.batch_size} rows does not fit into {sum(smallest)} rows (of"
                f" {sum(self.shard_sizes)}, {self.window_shards} shards are shuffled at a time): choose a smaller"
                " batch_size, or more samples"
            )

    def windows(self, first_step: int = 0) -> Iterator[Window]:
        """Windows without end, from the one that holds a step's batch; one that fills no batch is left out."""
        step, epoch = 0, 0
        while True:
            order = permutation(self.seed, len(self.shard_sizes), "shards", epoch).tolist()
            for number, start in enumerate(range(0, len(order), self.window_shards)):
                window = Window(epoch=epoch, number=number, shards=tuple(order[start : start + self.window_shards]))
                batches = sum(self.shard_sizes[i] for i in window.shards) // self.batch_size
                if batches and step + batches > first_step:
                    skip = max(0, first_step - step)
                    yield Window(epoch=epoch, number=number, shards=window.shards, skip=skip)
                step += batches
            epoch += 1

    def positions(self, window: Window) -> np.ndarray:
        """Rows of a window's remaining batches, ``(batches, batch_size)``, as positions in its joined shards."""
        rows = sum(self.shard_sizes[i] for i in window.shards)
        order = permutation(self.seed, rows, "rows", window.epoch, window.number).numpy()
        whole = rows // self.batch_size
        return order[: whole * self.batch_size].reshape(whole, self.batch_size)[window.skip :]


def resident(shards: ShardSet, plan: BatchPlan, first_step: int, rows: slice) -> Iterator[Rows]:
    """This worker's rows of each batch from a step on, of a set that is held in memory."""
    everything = shards.read(range(len(plan.shard_sizes)))
    starts = np.concatenate([[0], np.cumsum(plan.shard_sizes)])
    for window in plan.windows(first_step):
        joined = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in window.shards])
        for batch in plan.positions(window):
            yield everything.take(joined[batch[rows]])


def streamed(shards: ShardSet, plan: BatchPlan, first_step: int, last_step: int, rows: slice) -> Iterator[Rows]:
    """The same batches, streamed through Ray Data: tasks read windows ahead and hand over this worker's rows."""
    import ray.data

    from pipelines.cluster import ensure_ray

    ensure_ray(reserved_cpus=0)
    windows = _until(plan, first_step, last_step)
    reader: Any = _WindowReader([str(path) for path in shards.paths(range(len(plan.shard_sizes)))], plan, rows)
    dataset = ray.data.from_items([{"window": window} for window in windows], override_num_blocks=len(windows))
    dataset = dataset.map_batches(reader, batch_size=1, batch_format="numpy", num_cpus=0.5)
    dataset.context.execution_options.preserve_order = True
    local = rows.stop - rows.start
    batches: Any = dataset.iter_batches(batch_size=local, batch_format="numpy", prefetch_batches=2)
    for batch in batches:
        values = np.frombuffer(b"".join(batch["values"]), shards.spec.dtype).reshape(-1, *shards.spec.shape)
        yield Rows(sample_ids=batch["sample_id"], labels=batch["label"], values=values)


def _until(plan: BatchPlan, first_step: int, last_step: int) -> list[Window]:
    windows: list[Window] = []
    step = first_step
    for window in plan.windows(first_step):
        windows.append(window)
        step += len(plan.positions(window))
        if step >= last_step:
            return windows
    raise AssertionError("windows do not end")


class _WindowReader:
    """A Ray Data task: one window to this worker's rows of its batches, in order."""

    def __init__(self, paths: Sequence[str], plan: BatchPlan, rows: slice) -> None:
        self._paths, self._plan, self._rows = list(paths), plan, rows

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, Any]:
        (window,) = block["window"]
        parts = [read_shard(located(self._paths[index])) for index in window.shards]
        index = self._plan.positions(window)[:, self._rows].reshape(-1)
        values = np.concatenate([part.values for part in parts])[index]
        return {
            "sample_id": np.concatenate([part.sample_ids for part in parts])[index],
            "label": np.concatenate([part.labels for part in parts])[index],
            "values": [row.tobytes() for row in values],
        }
