"""Shards made once, by Ray Data or in this process: the missing ones of a set, each committed by whoever made it.

Ray Data streams the numbers of shards through an actor pool. One block is one shard, so a kill loses only the shards in
flight, and a restart makes what is missing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pipelines.process import WORKER_ENVIRONMENT, default_device, prepare_process
from pipelines.shards import Shard, ShardSet

Progress = Callable[[int], None]


class Maker(Protocol):
    """Holds the networks that some kind of shard needs."""

    def shard(self, index: int) -> Shard:
        """Make and commit one shard's file."""
        ...


MakerOn = Callable[[str], Maker]
"""A maker on a device; it travels to the actors."""


@dataclass(frozen=True, kw_only=True)
class Actors:
    """Who makes the shards."""

    count: int
    """0: this process, without Ray."""
    cpus: float
    gpus: float


class ShardActor:
    """A Ray Data actor: the number of a shard in, the committed shard out."""

    def __init__(self, maker: MakerOn, actors: Actors) -> None:
        prepare_process(actors.cpus)
        self._maker = maker(default_device() if actors.gpus else "cpu")

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """The shard; or the mistake, as a value: a raised one would arrive wrapped into Ray's, without its cause."""
        try:
            return {"made": [self._maker.shard(int(block["shard"][0]))]}
        except (ValueError, OSError) as error:
            return {"made": [error]}


def produce(shards: ShardSet, maker: MakerOn, actors: Actors, progress: Progress) -> None:
    """Make the missing shards; ``progress`` is told of rows as their shard is committed.

    Raises:
        ValueError: the actors do not fit into the cluster, or the maker refuses what it is to make.
        OSError: a shard cannot be written.
    """
    made = _by_actors(shards, maker, actors) if actors.count else _here(shards, maker)
    for shard in made:
        shards.commit(shard)
        progress(shard.rows)


def start_for(shards: ShardSet, actors: Actors) -> int:
    """Start Ray, or see that it has room, for the missing shards; returns the number of actors.

    Raises:
        ValueError: the actors do not fit into the cluster.
    """
    from pipelines.cluster import ensure_ray

    count = min(actors.count, len(shards.missing))
    ensure_ray(reserved_cpus=count * actors.cpus, reserved_gpus=count * actors.gpus)
    return count


def _here(shards: ShardSet, maker: MakerOn) -> Iterator[Shard]:
    ready = maker(default_device())
    return (ready.shard(index) for index in shards.missing)


def _by_actors(shards: ShardSet, maker: MakerOn, actors: Actors) -> Iterator[Shard]:
    import pyarrow as pa
    import ray.data

    count = start_for(shards, actors)
    blocks = ray.data.from_arrow([pa.table({"shard": [index]}) for index in shards.missing])
    made = blocks.map_batches(
        ShardActor,
        fn_constructor_kwargs={"maker": maker, "actors": actors},
        batch_size=None,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=count),
        num_cpus=actors.cpus,
        num_gpus=actors.gpus,
        runtime_env={"env_vars": WORKER_ENVIRONMENT},
    )
    for row in made.iter_rows():
        if isinstance(row["made"], Exception):
            raise row["made"]
        yield row["made"]
