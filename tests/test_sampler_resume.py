"""Ranks, epochs, saved states, worker processes."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from support import assert_message, seeds
from torch.utils.data import DataLoader, Dataset

from clustops.sampler import InverseClusterSizeSampler, MPerClusterBatchSampler

LABELS = torch.tensor([0, 0, 0, 0, 0, 1, -1, 2, 2, 1, 0, 0, 4])


def make(**arguments: Any) -> InverseClusterSizeSampler:
    return InverseClusterSizeSampler(LABELS, **{"num_samples": 23, "seed": 3, **arguments})


def make_at(epoch: int) -> InverseClusterSizeSampler:
    order = make()
    order.set_epoch(epoch)
    return order


@given(world=st.integers(1, 9), drop_last=st.booleans(), total=st.integers(1, 40), seed=seeds)
def test_ranks_are_disjoint_and_cover_the_global_order(
    world: int, drop_last: bool, total: int, seed: int
) -> None:
    whole = list(make(num_samples=total, seed=seed))
    ranks = [
        make(num_samples=total, seed=seed, num_replicas=world, rank=r, drop_last=drop_last)
        for r in range(world)
    ]
    parts = [list(rank) for rank in ranks]
    share = total // world if drop_last else -(-total // world)
    assert {len(part) for part in parts} == {len(rank) for rank in ranks} == {share}
    woven = [item for step in zip(*parts, strict=True) for item in step]
    assert woven == (whole * world)[: share * world]  # without drop_last the first indices come again


def test_without_ranks_all_processes_iterate_one_order() -> None:
    assert list(make()) == list(make())
    assert list(make(num_replicas=1, rank=0)) == list(make())


def test_an_epoch_repeats_until_set_epoch() -> None:
    order = make()
    first = list(order)
    assert list(order) == first
    order.set_epoch(1)
    second = list(order)
    assert second != first
    order.set_epoch(0)
    assert list(order) == first


@pytest.mark.parametrize(("world", "later"), [(1, 1), (1, 2), (2, 1), (2, 3), (3, 2)])
def test_each_position_of_an_epoch_resumes_under_any_world_size(world: int, later: int) -> None:
    whole = make().indices(0, 23).tolist()
    for steps in range(-(-23 // world) + 1):
        order = make(num_replicas=world, rank=world - 1)
        iterator = iter(order)
        for _ in range(steps):
            next(iterator)
        state = order.state_dict()
        rest = whole[steps * world :]
        resumed = [make(num_replicas=later, rank=r) for r in range(later)]
        parts = []
        for each in resumed:
            each.load_state_dict(state)
            parts.append(list(each))
        woven = [item for step in zip(*parts, strict=True) for item in step]
        assert woven[: len(rest)] == rest
        assert len(woven) - len(rest) in range(later)
        assert woven[len(rest) :] == whole[: len(woven) - len(rest)]


def test_ranks_report_the_same_state_at_the_same_step() -> None:
    states = []
    for r in range(3):
        order = make(num_replicas=3, rank=r)
        iterator = iter(order)
        next(iterator), next(iterator)
        states.append(order.state_dict())
    assert states[0] == states[1] == states[2]
    assert states[0]["consumed"] == 6


def test_after_a_resumed_epoch_come_whole_ones() -> None:
    order = make()
    order.load_state_dict({**order.state_dict(), "epoch": 2, "consumed": 20})
    assert order.epoch == 2
    assert len(list(order)) == 3
    assert len(list(order)) == len(order) == 23
    order.load_state_dict({**order.state_dict(), "consumed": 20})
    order.set_epoch(2)  # trainers set the epoch again after loading
    assert len(list(order)) == 3
    order.load_state_dict({**order.state_dict(), "consumed": 20})
    order.set_epoch(3)
    assert len(list(order)) == 23


def test_a_finished_epoch_does_not_take_the_sampler_back() -> None:
    order = make()
    list(order)
    state = order.state_dict()
    assert state["consumed"] == 23
    order.set_epoch(1)
    order.load_state_dict(state)
    assert (order.epoch, len(list(order))) == (1, 23)


def test_a_state_survives_being_taken_before_the_first_item() -> None:
    order = make()
    order.load_state_dict({**order.state_dict(), "consumed": 7})
    assert order.state_dict()["consumed"] == 7
    iterator = iter(order)
    assert order.state_dict()["consumed"] == 7
    next(iterator)
    assert order.state_dict()["consumed"] == 8


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (lambda: make(seed=4), "seed"),
        (lambda: make(num_samples=24), "num_samples"),
        (lambda: make(power=0.5), "shares"),
        (lambda: make(cluster_weights=[1, 1, 1, 1, 2]), "shares"),
        (lambda: make(replacement="always"), "replacement"),
        (lambda: InverseClusterSizeSampler(LABELS.roll(1), 23, seed=3), "labels"),
    ],
)
def test_a_state_of_another_order_is_refused_with_both_values(other: Any, name: str) -> None:
    own, state = make(), other().state_dict()
    before = own.state_dict()
    with pytest.raises(ValueError, match="state_dict") as caught:
        own.load_state_dict(state)
    assert_message(caught.value, name, repr(before[name]), repr(state[name]))
    assert own.state_dict() == before


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"version": 2}, ("'version'", "1", "2")),
        ({"consumed": -1}, ("'consumed'", "at least 0", "-1")),
        ({"consumed": None}, ("'consumed'", "integer", "None")),
        ({"epoch": -1}, ("epoch", "at least 0", "-1")),
    ],
)
def test_a_broken_state_is_refused(change: dict[str, Any], parts: tuple[str, ...]) -> None:
    order = make()
    with pytest.raises((ValueError, TypeError)) as caught:
        order.load_state_dict({**order.state_dict(), **change})
    assert_message(caught.value, *parts)
    with pytest.raises(ValueError, match="one with 'labels'"):
        order.load_state_dict({"version": 1, "seed": 3})


def test_states_are_plain_values() -> None:
    for order in (make(), MPerClusterBatchSampler(LABELS, 2, 2)):
        assert {type(value) for value in order.state_dict().values()} <= {int, str}


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_data_loader_resumes_mid_epoch(workers: int) -> None:
    module = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        return module.StatefulDataLoader(list(range(13)), batch_size=4, sampler=make(), num_workers=workers)

    whole = [batch.tolist() for batch in loader()]
    for taken in (1, 4, 6):
        first = loader()
        iterator = iter(first)
        head = [next(iterator).tolist() for _ in range(taken)]
        resumed = loader()
        resumed.load_state_dict(first.state_dict())
        assert head + [batch.tolist() for batch in resumed] == whole
        assert [batch.tolist() for batch in resumed] == whole


def test_pickles_hold_the_table_once() -> None:
    order = InverseClusterSizeSampler(torch.arange(50_000) % 100)
    next(iter(order))
    assert len(pickle.dumps(order)) < 4 * 50_000 + 24 * 101 + 4096
    assert list(pickle.loads(pickle.dumps(order))) == list(order)


def test_a_pickle_keeps_its_place() -> None:
    order = make()
    order.load_state_dict({**order.state_dict(), "epoch": 1, "consumed": 9})
    assert list(pickle.loads(pickle.dumps(order))) == make_at(1).indices(9, 23).tolist()


def _mark(order: InverseClusterSizeSampler) -> None:
    order.members[0] = 12345


def test_a_spawned_process_shares_the_table() -> None:
    order = InverseClusterSizeSampler(torch.arange(100) % 10)
    process = mp.get_context("spawn").Process(target=_mark, args=(order,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert int(order.members[0]) == 12345


class Drawn(Dataset[int]):
    """A data set that draws its own indices in the workers."""

    def __init__(self, order: InverseClusterSizeSampler) -> None:
        self.order = order

    def __getitem__(self, position: int) -> int:
        return int(self.order.indices(position, position + 1))

    def __len__(self) -> int:
        return self.order.order_size


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_compute_the_same_order(context: str) -> None:
    loader = DataLoader(Drawn(make()), batch_size=4, num_workers=1, multiprocessing_context=context)
    assert torch.cat(list(loader)).tolist() == list(make())
