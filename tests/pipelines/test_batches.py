"""Batches: every epoch once through the rows, the same after a restart, the same split over workers as whole."""

from collections import Counter
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipelines.batches import BatchPlan, Window, resident
from pipelines.shards import ShardSet, ShardSetSpec, write_shard

PLANS = st.builds(
    lambda sizes, batch, seed, width: (tuple(sizes), batch, seed, width),
    st.lists(st.integers(1, 9), min_size=1, max_size=7),
    st.integers(1, 6),
    st.integers(0, 99),
    st.integers(1, 8),
)


def plan_of(given_: tuple[tuple[int, ...], int, int, int]) -> BatchPlan:
    sizes, batch, seed, width = given_
    assume(sum(sorted(sizes)[:width]) >= batch)
    return BatchPlan(shard_sizes=sizes, batch_size=batch, seed=seed, window_shards=width)


def batches(plan: BatchPlan, first_step: int, count: int) -> list[list[tuple[int, int]]]:
    """Each batch as (shard, row within it)."""
    found = []
    for window in plan.windows(first_step):
        rows = [(shard, row) for shard in window.shards for row in range(plan.shard_sizes[shard])]
        found += [[rows[position] for position in batch] for batch in plan.positions(window)]
        if len(found) >= count:
            return found[:count]
    raise AssertionError("windows do not end")


def windows_of_epoch(plan: BatchPlan, epoch: int) -> list[Window]:
    found = []
    for window in plan.windows():
        if window.epoch > epoch:
            return found
        found += [window] * (window.epoch == epoch)
    raise AssertionError("windows do not end")


@given(PLANS, st.integers(0, 2))
def test_an_epoch_visits_no_row_twice_and_leaves_less_than_a_batch_of_each_window(
    given_: tuple[tuple[int, ...], int, int, int], epoch: int
):
    plan = plan_of(given_)
    seen: Counter[tuple[int, int]] = Counter()
    for window in windows_of_epoch(plan, epoch):
        rows = [(shard, row) for shard in window.shards for row in range(plan.shard_sizes[shard])]
        positions = plan.positions(window)
        assert positions.shape[1] == plan.batch_size
        assert 0 <= len(rows) - positions.size < plan.batch_size
        seen.update(rows[position] for position in positions.flat)
    assert max(seen.values()) == 1


def test_an_epoch_visits_every_shard_once():
    plan = BatchPlan(shard_sizes=(8,) * 11, batch_size=4, seed=0, window_shards=3)
    for epoch in range(3):
        shards = [shard for window in windows_of_epoch(plan, epoch) for shard in window.shards]
        assert sorted(shards) == list(range(11))


@given(PLANS, st.integers(0, 40))
def test_a_restart_at_any_step_gives_the_batches_that_were_left(
    given_: tuple[tuple[int, ...], int, int, int], step: int
):
    plan = plan_of(given_)
    assert batches(plan, step, 10) == batches(plan, 0, step + 10)[step:]


def test_epochs_and_seeds_differ():
    plan, other = (BatchPlan(shard_sizes=(16, 16), batch_size=8, seed=seed) for seed in (0, 1))
    first, second = batches(plan, 0, 4), batches(plan, 4, 4)
    assert sorted(chain(*first)) == sorted(chain(*second))
    assert first != second != batches(other, 0, 4) != first


def test_rows_of_a_window_are_mixed():
    plan = BatchPlan(shard_sizes=(500, 500), batch_size=100, seed=0)
    for batch in batches(plan, 0, 10):
        assert 20 < sum(shard == 0 for shard, _ in batch) < 80


# Errors


def test_a_batch_that_no_window_fills_is_refused():
    with pytest.raises(ValueError, match=r"a batch of 9 rows does not fit into 8 rows .* choose a smaller batch_size"):
        BatchPlan(shard_sizes=(4, 4), batch_size=9, seed=0)
    with pytest.raises(ValueError, match=r"does not fit into 4 rows \(of 12, 1 shards are shuffled at a time\)"):
        BatchPlan(shard_sizes=(4, 8), batch_size=5, seed=0, window_shards=1)


def test_a_short_last_window_is_no_error():
    plan = BatchPlan(shard_sizes=(4, 4, 4), batch_size=8, seed=0, window_shards=2)
    assert len(batches(plan, 0, 5)) == 5
    assert [len(plan.positions(window)) for window in windows_of_epoch(plan, 0)] == [1]  # the third shard alone: none


# In memory


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    spec = ShardSetSpec(kind="images", rows=20, shard_rows=8, dtype="uint8", shape=(2,), inputs={})
    made = ShardSet.open(tmp_path, spec)
    for index in made.missing:
        ids = np.array(spec.ids(index))
        values = np.stack([ids, 2 * ids], axis=1).astype(np.uint8)
        made.commit(write_shard(tmp_path, spec, index, ids % 3, values))
    return made


def resident_plan(shards: ShardSet, batch_size: int = 6) -> BatchPlan:
    sizes = tuple(shard.rows for shard in shards.shards)
    return BatchPlan(shard_sizes=sizes, batch_size=batch_size, seed=5, window_shards=2)


def test_labels_and_values_stay_with_their_ids(shards: ShardSet):
    for batch in islice(resident(shards, resident_plan(shards), 0, slice(0, 6)), 10):
        assert batch.labels.tolist() == (batch.sample_ids % 3).tolist()
        assert batch.values.tolist() == [[i, 2 * i] for i in batch.sample_ids.tolist()]


def test_resident_batches_are_those_of_the_plan(shards: ShardSet):
    plan = resident_plan(shards)
    wanted = [[8 * shard + row for shard, row in batch] for batch in batches(plan, 3, 7)]
    found = [batch.sample_ids.tolist() for batch in islice(resident(shards, plan, 3, slice(0, 6)), 7)]
    assert found == wanted


@pytest.mark.parametrize("size", [2, 3])
def test_workers_share_the_batch_that_one_would_have(shards: ShardSet, size: int):
    plan, share = resident_plan(shards), 6 // size
    whole = list(islice(resident(shards, plan, 2, slice(0, 6)), 8))
    parts = [
        list(islice(resident(shards, plan, 2, slice(rank * share, (rank + 1) * share)), 8)) for rank in range(size)
    ]
    for step, batch in enumerate(whole):
        assert np.array_equal(np.concatenate([part[step].values for part in parts]), batch.values)
        assert np.array_equal(np.concatenate([part[step].sample_ids for part in parts]), batch.sample_ids)
