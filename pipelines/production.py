"""Shards made once, by Ray Data or in this process: the missing ones of a set, each committed by whoever made it.

What needs no reading is made whole: Ray Data streams the numbers of shards through an actor pool. What is read first is
`InParts`: tasks on CPUs read units of a shard, an actor pool runs its network on each, and tasks commit a shard's units
together, in three operators with back-pressure between them. A kill loses only the shards in flight, and a restart
makes what is missing.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from pipelines.process import WORKER_ENVIRONMENT, default_device, prepare_process
from pipelines.progress import Counter
from pipelines.shards import Shard, ShardSet, commit_table

if TYPE_CHECKING:
    import ray
    import ray.data

UNIT_BYTES = 16 * 2**20
"""What a unit weighs at most before the network, where one row does not weigh more: a few of them stand between two
operators, in an object store of some hundred MiB."""
_READER_CPUS = 1.0

Progress = Callable[[int], None]
Count = int | tuple[int, int]


class Producible(Protocol):
    """Shards of which some are missing."""

    @property
    def missing(self) -> list[int]:
        """Their numbers."""
        ...

    def commit(self, shard: Shard) -> None:
        """List one that was written."""
        ...


class Maker(Protocol):
    """Holds the networks that some kind of shard needs."""

    def shard(self, index: int) -> Shard:
        """Make and commit one shard's file."""
        ...


MakerOn = Callable[[str], Maker]
"""A maker on a device; it travels to the actors."""
Read = Callable[[range], pa.Table]
"""CPU part: what the network takes for the rows of some ids, a row each, ``sample_id`` among its columns."""
Encode = Callable[[pa.Table], pa.Table]
"""Accelerator part: the same rows as they are stored."""


@dataclass(frozen=True, kw_only=True)
class InParts:
    """A maker in two parts, of which only the second needs the network; all of it travels."""

    read: Read
    encoder: Callable[[str], Encode]
    """The second part on a device."""
    rows: int
    """Rows of a unit, the last of a shard may have fewer: what is read, and what the network is given, at once."""
    readers: int | None = None
    """Most tasks that read side by side; ``None``: as many as there are CPUs and memory for."""


Made = MakerOn | InParts


@dataclass(frozen=True, kw_only=True)
class Actors:
    """Who makes the shards."""

    count: Count
    """How many processes, or the fewest and the most; 0: this process, without Ray."""
    cpus: float
    gpus: float

    def __post_init__(self) -> None:
        few, most = self._range
        if few < 0 or (not isinstance(self.count, int) and not 1 <= few <= most):
            raise ValueError(
                "num_actors must not be negative; of two, the first must be at least 1 and not above the second; given"
                f" {self.count if isinstance(self.count, int) else list(self.count)}"
            )
        if self.cpus <= 0 or self.gpus < 0:
            raise ValueError(
                "cpus_per_actor must be positive and gpus_per_actor not negative; given"
                f" {self.cpus:g} and {self.gpus:g}"
            )

    @property
    def _range(self) -> tuple[int, int]:
        return (self.count, self.count) if isinstance(self.count, int) else self.count

    @property
    def fewest(self) -> int:
        return self._range[0]

    @property
    def most(self) -> int:
        return self._range[1]


class ShardActor:
    """A Ray Data actor: the number of a shard in, the committed shard out."""

    def __init__(self, maker: MakerOn, actors: Actors) -> None:
        prepare_process(actors.cpus)
        self._maker = maker(default_device() if actors.gpus else "cpu")

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """The shard; or the mistake, as a value."""
        return {"made": [_or_mistake(_timed, self._maker.shard, int(index)) for index in block["shard"]]}


class EncodingActor:
    """A Ray Data actor: a unit as it was read in, as it is stored out."""

    def __init__(self, parts: InParts, actors: Actors) -> None:
        prepare_process(actors.cpus)
        self._encode = parts.encoder(default_device() if actors.gpus else "cpu")

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """The unit; or the mistake, as a value."""
        return {"made": [self._encoded(unit) for unit in block["made"]]}

    def _encoded(self, unit: "_Unit | Exception") -> "_Unit | Exception":
        return unit if isinstance(unit, Exception) else _or_mistake(unit.through, self._encode)


@dataclass(frozen=True)
class _Unit:
    """Some rows of one shard on their way."""

    shard: int
    table: pa.Table
    seconds: float
    """That were spent on it so far."""

    @classmethod
    def of(cls, shard: int, read: Read, ids: range) -> "_Unit":
        started = time.perf_counter()
        return cls(shard, read(ids), time.perf_counter() - started)

    def through(self, encode: Encode) -> "_Unit":
        started = time.perf_counter()
        return _Unit(self.shard, encode(self.table), self.seconds + time.perf_counter() - started)


def produce(shards: Producible, maker: Made, actors: Actors, progress: Progress) -> None:
    """Make the missing shards; ``progress`` is told of rows as their shard is committed.

    Raises:
        ValueError: the actors do not fit into the cluster, or the maker refuses what it is to make.
        OSError: a shard cannot be written.
    """
    made = _by_actors(shards, maker, actors) if actors.count else _here(shards, maker)
    for shard in made:
        shards.commit(shard)
        progress(shard.rows)


def produce_rest(shards: ShardSet, maker: Made, actors: Actors, show: Progress) -> None:
    """The same, for who shows how many rows are there, from the first."""
    counter = Counter(sum(shard.rows for shard in shards.shards), show)
    counter.add(0)
    produce(shards, maker, actors, counter.add)


def start_for(shards: Producible, maker: Made, actors: Actors) -> tuple[int, int]:
    """Start Ray, or see that it has room for the fewest actors; returns the fewest and the most that have work.

    Raises:
        ValueError: the actors do not fit into the cluster.
    """
    from pipelines.cluster import ensure_ray, room_for

    work = len(_units_of(_set_of(shards), maker.rows)) if isinstance(maker, InParts) else len(shards.missing)
    fewest, others = min(actors.fewest, work), _READER_CPUS if isinstance(maker, InParts) else 0.0
    ensure_ray(reserved_cpus=fewest * actors.cpus, reserved_gpus=fewest * actors.gpus, other_cpus=others)
    return fewest, max(fewest, min(actors.most, work, room_for(cpus=actors.cpus, gpus=actors.gpus)))


def unit_rows(row_bytes: int, batch_size: int) -> int:
    """Rows of a unit: a batch, or fewer where so many would weigh more than `UNIT_BYTES`."""
    return max(1, min(batch_size, UNIT_BYTES // row_bytes))


def _set_of(shards: Producible) -> ShardSet:
    """What is made in parts is one set: its units are cut by its spec."""
    assert isinstance(shards, ShardSet)
    return shards


# In this process


def _here(shards: Producible, maker: Made) -> Iterator[Shard]:
    if isinstance(maker, InParts):
        return _in_parts_here(_set_of(shards), maker, maker.encoder(default_device()))
    ready = maker(default_device())
    return (_timed(ready.shard, index) for index in shards.missing)


def _in_parts_here(shards: ShardSet, parts: InParts, encode: Encode) -> Iterator[Shard]:
    for index in shards.missing:
        cut = _cut(shards.spec.ids(index), parts.rows)
        yield _of_units(shards, [_Unit.of(index, parts.read, ids).through(encode) for ids in cut])


def _cut(ids: range, rows: int) -> list[range]:
    return [ids[start : start + rows] for start in range(0, len(ids), rows)]


def _timed(make: Callable[[int], Shard], index: int) -> Shard:
    """A shard with the seconds that it took, where its maker does not know better."""
    started = time.perf_counter()
    shard = make(index)
    return shard if shard.seconds else replace(shard, seconds=time.perf_counter() - started)


def _of_units(shards: ShardSet, parts: Sequence[_Unit]) -> Shard:
    """Commit the units of one shard."""
    started, table = time.perf_counter(), pa.concat_tables([unit.table for unit in parts]).combine_chunks()
    ids = shards.spec.ids(parts[0].shard)
    assert np.array_equal(table.column("sample_id").to_numpy(), np.arange(ids.start, ids.stop)), ids
    shard = commit_table(shards.folder, shards.spec, parts[0].shard, table)
    return replace(shard, seconds=sum(unit.seconds for unit in parts) + time.perf_counter() - started)


# By Ray Data


def _by_actors(shards: Producible, maker: Made, actors: Actors) -> Iterator[Shard]:
    from ray.data import ActorPoolStrategy

    fewest, most = start_for(shards, maker, actors)
    pool = {
        "compute": ActorPoolStrategy(min_size=fewest, max_size=most),
        "num_cpus": actors.cpus,
        "num_gpus": actors.gpus,
        "runtime_env": {"env_vars": WORKER_ENVIRONMENT},
        **_WHOLE_BLOCKS,
    }
    if isinstance(maker, InParts):
        flow = _in_parts(_set_of(shards), maker, actors, pool)
    else:
        flow = _whole(shards, maker, actors, pool)
    for row in flow.iter_rows():
        if isinstance(row["made"], Exception):
            raise row["made"]
        yield row["made"]


def _whole(shards: Producible, maker: MakerOn, actors: Actors, pool: dict[str, Any]) -> "ray.data.Dataset":
    import ray.data

    numbers = ray.data.from_arrow([pa.table({"shard": [index]}) for index in shards.missing])
    return numbers.map_batches(ShardActor, fn_constructor_kwargs={"maker": maker, "actors": actors}, **pool)


def _in_parts(shards: ShardSet, parts: InParts, actors: Actors, pool: dict[str, Any]) -> "ray.data.Dataset":
    """Read, encode, commit; in order, so that the units of a shard come to be committed one after another."""
    import ray
    import ray.data

    cut = [(index, ids.start, ids.stop) for index, ids in _units_of(shards, parts.rows)]
    asked = ray.data.from_arrow(
        [pa.table({key: [value] for key, value in zip(_ASKED, unit, strict=True)}) for unit in cut]
    )
    reading: Any = partial(_read, read=ray.put(parts.read))
    committing: Any = partial(_commit, shards=shards)
    readers = ray.data.TaskPoolStrategy(parts.readers)
    read = asked.map_batches(reading, compute=readers, num_cpus=_READER_CPUS, **_WHOLE_BLOCKS)
    encoded = read.map_batches(EncodingActor, fn_constructor_kwargs={"parts": parts, "actors": actors}, **pool)
    units_of_a_shard = len(_cut(shards.spec.ids(0), parts.rows))
    made = encoded.map_batches(committing, batch_size=units_of_a_shard, batch_format="numpy")
    made.context.execution_options.preserve_order = True
    return made


_ASKED = ("shard", "start", "stop")
_WHOLE_BLOCKS: dict[str, Any] = {"batch_size": None, "batch_format": "numpy"}


def _units_of(shards: ShardSet, rows: int) -> list[tuple[int, range]]:
    return [(index, ids) for index in shards.missing for ids in _cut(shards.spec.ids(index), rows)]


def _read(block: dict[str, np.ndarray], read: "ray.ObjectRef[Read]") -> dict[str, list[Any]]:
    asked = zip(*(block[key].tolist() for key in _ASKED), strict=True)
    return {"made": [_or_mistake(_Unit.of, shard, _here_once(read), range(*ids)) for shard, *ids in asked]}


@lru_cache(maxsize=1)
def _here_once(read: "ray.ObjectRef[Read]") -> Read:
    """What all tasks of an operator share, brought to a process once: it may list every picture of a large set."""
    import ray

    return ray.get(read)


def _commit(block: dict[str, np.ndarray], shards: ShardSet) -> dict[str, list[Any]]:
    mistakes = [unit for unit in block["made"] if isinstance(unit, Exception)]
    return {"made": mistakes[:1] or [_or_mistake(_of_units, shards, block["made"])]}


def _or_mistake(work: Callable[..., Any], *given: Any) -> Any:
    """What the work gives; or the mistake, as a value: a raised one would arrive wrapped into Ray's, without cause."""
    try:
        return work(*given)
    except (ValueError, OSError) as error:
        return error
