"""The samplers in Accelerate."""

from __future__ import annotations

import copy
from itertools import zip_longest
from typing import Any

import pytest
import torch
from support import run_ranks, tell_trainers
from torch.utils.data import DataLoader

from clustops.sampler import InverseClusterSizeSampler, MPerClusterBatchSampler

accelerate = pytest.importorskip("accelerate")
from clustops.examples import deepcluster_accelerate  # noqa: E402

N = 90
LABELS = torch.arange(N).square() % 7 % 5


def by_index(**settings: Any) -> DataLoader[int]:
    sampler = InverseClusterSizeSampler(LABELS, N, seed=2, **settings)
    return DataLoader(range(N), batch_size=8, sampler=sampler)  # type: ignore[arg-type]


def by_batch() -> DataLoader[int]:
    return DataLoader(range(N), batch_sampler=MPerClusterBatchSampler(LABELS, 3, 2, seed=2))  # type: ignore[arg-type]


def order_of(epoch: int, make: Any = by_index) -> list[int]:
    """The indices of the epoch, one after the other."""
    sampler = make().batch_sampler.sampler
    sampler.set_epoch(epoch)
    return torch.tensor(list(sampler)).flatten().tolist()


def in_a_process(rank: int, world: int, function: Any, *args: Any) -> Any:
    tell_trainers(rank, world)
    return function(*args)


def processes(world: int, function: Any, *args: Any) -> list[Any]:
    """``function(*args)`` in so many processes that Accelerate knows of."""
    return run_ranks(world, in_a_process, function, *args)


def dealt(parts: list[list[list[int]]]) -> list[int]:
    """The order that processes have drawn: the first batch of each, the second of each, ..."""
    return [item for step in zip_longest(*parts, fillvalue=[]) for batch in step for item in batch]


def accelerator_with(**settings: Any) -> Any:
    return accelerate.Accelerator(cpu=True, dataloader_config=accelerate.DataLoaderConfiguration(**settings))


def two_epochs(make: Any, settings: dict[str, Any], first: int | None) -> list[list[list[int]]]:
    loader = accelerator_with(**settings).prepare(make())
    result = []
    for epoch in range(2):
        if first is not None:
            loader.set_epoch(first + epoch)
        result.append([batch.tolist() for batch in loader])
    return result


@pytest.mark.parametrize("make", [by_index, by_batch])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "settings", [{}, {"use_seedable_sampler": True}, {"use_stateful_dataloader": True}], ids=str
)
def test_prepared_loaders_deal_out_the_order_of_each_epoch(settings: Any, world: int, make: Any) -> None:
    if settings.get("use_stateful_dataloader"):
        pytest.importorskip("torchdata.stateful_dataloader")
    for first in (None, 3):  # by itself, a loader counts epochs from 0
        results = processes(world, two_epochs, make, settings, first)
        for epoch in range(2):
            order = order_of(epoch + (first or 0), make)
            drawn = dealt([result[epoch] for result in results])
            # Batches that are missing in the last step repeat the first ones.
            assert drawn == (order + order)[: len(drawn)]
            assert 0 <= len(drawn) - len(order) < 8 * (world - 1) + 1


@pytest.mark.parametrize("make", [by_index, by_batch])
def test_nothing_comes_twice_without_even_batches(make: Any) -> None:
    results = processes(2, two_epochs, make, {"even_batches": False}, None)
    for epoch in range(2):
        assert dealt([result[epoch] for result in results]) == order_of(epoch, make)


def skip_at_each_step(make: Any) -> None:
    accelerator = accelerator_with()
    first = accelerator.prepare(make())
    first.set_epoch(4)
    whole = [batch.tolist() for batch in first]
    for step in range(len(whole) + 1):
        resumed = accelerator.prepare(make())
        resumed.set_epoch(4)
        rest = accelerator.skip_first_batches(resumed, step)
        assert [batch.tolist() for batch in rest] == whole[step:]


@pytest.mark.parametrize("make", [by_index, by_batch])
@pytest.mark.parametrize("world", [1, 2])
def test_skipped_batches_leave_the_rest_of_the_epoch(world: int, make: Any) -> None:
    processes(world, skip_at_each_step, make)


def load_at_each_step(make: Any) -> None:
    accelerator = accelerator_with(use_stateful_dataloader=True)
    first = accelerator.prepare(make())
    first.set_epoch(4)
    whole, states = [], []
    for batch in first:
        whole.append(batch.tolist())
        states.append(copy.deepcopy(first.state_dict()))
    for step, state in enumerate(states[:-1], 1):
        resumed = accelerator.prepare(make())
        resumed.set_epoch(4)
        resumed.load_state_dict(state)
        assert [batch.tolist() for batch in resumed] == whole[step:]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
@pytest.mark.parametrize("make", [by_index, by_batch])
@pytest.mark.parametrize("world", [1, 2])
def test_a_stateful_loader_goes_on_at_each_step(world: int, make: Any) -> None:
    pytest.importorskip("torchdata.stateful_dataloader")
    processes(world, load_at_each_step, make)


def rest_of_an_epoch(consumed: int) -> list[list[int]]:
    loader = by_index()
    prepared = accelerator_with().prepare(loader)
    prepared.set_epoch(4)
    assert isinstance(loader.sampler, InverseClusterSizeSampler)
    loader.sampler.load_state_dict({**loader.sampler.state_dict(), "consumed": consumed})
    return [batch.tolist() for batch in prepared]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_processes_goes_on_where_others_stopped(world: int) -> None:
    for consumed in (0, 8, 16, 48, 72, 88, 90):
        rest = order_of(4)[consumed:]
        drawn = dealt(processes(world, rest_of_an_epoch, consumed))
        assert drawn[: len(rest)] == rest
        assert len(drawn) - len(rest) < 8 * world


def whole_and_resumed() -> tuple[list[list[int]], list[Any]]:
    steps = list(deepcluster_accelerate.train())
    whole = [indices for indices, _ in steps]
    for step in (1, 5, 10, 13, 20):
        assert [indices for indices, _ in deepcluster_accelerate.train(steps[step - 1][1])] == whole[step:]
    return whole, [steps[9][1]["labels"], steps[19][1]["labels"]]


@pytest.mark.parametrize("world", [1, 2])
def test_the_example_draws_clusters_evenly_and_goes_on_within_an_epoch(world: int) -> None:
    parts, clusterings = zip(*processes(world, whole_and_resumed), strict=True)
    for epoch, labels in enumerate(clusterings[0]):
        assert all(torch.equal(labels, other[epoch]) for other in clusterings)
        sampler = InverseClusterSizeSampler(labels, 400)
        sampler.set_epoch(epoch)
        drawn = dealt([part[10 * epoch : 10 * epoch + 10] for part in parts])
        assert drawn == list(sampler)
        assert labels[drawn].bincount().tolist() == [50] * 8
