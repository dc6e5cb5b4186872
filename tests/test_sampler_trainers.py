"""The samplers in whole training loops: new labels each epoch, ranks, saved states, kills."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support import generator, run_ranks, woven
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes
from torch.utils.data import BatchSampler, DataLoader, Dataset

from clustops.examples import deepcluster, deepcluster_ddp
from clustops.sampler import InverseClusterSizeSampler, MPerClusterBatchSampler
from clustops.sampler_resume import ResumableSampler


def order_of(labels: Tensor, epoch: int) -> list[int]:
    """What the examples draw in an epoch."""
    sampler = InverseClusterSizeSampler(labels, labels.numel())
    sampler.set_epoch(epoch)
    return list(sampler)


def test_a_plain_loop_draws_each_cluster_equally_often_after_each_clustering() -> None:
    steps = list(deepcluster.train(epochs=3))
    assert len(steps) == 3 * 24
    for epoch in range(3):
        clusterings, indices, losses = zip(*steps[24 * epoch : 24 * epoch + 24], strict=True)
        labels, drawn = clusterings[0], torch.cat(indices)
        sizes, draws = (x.bincount(minlength=8) for x in (labels, labels[drawn]))
        assert sizes.max() > 3 * sizes.min()
        assert draws.tolist() == [75] * 8
        assert min(labels[index].unique().numel() for index in indices) >= 4
        assert drawn.tolist() == order_of(labels, epoch)
        assert losses[-1] < losses[0]


def test_a_plain_loop_repeats_itself() -> None:
    runs = [[(index.tolist(), loss) for _, index, loss in deepcluster.train(epochs=2)] for _ in range(2)]
    assert runs[0] == runs[1]


class Told(InverseClusterSizeSampler):
    """A sampler that remembers its labels."""

    told: list[Tensor]
    latest: Told

    def set_labels(self, labels: Any) -> None:
        self.told = [*getattr(self, "told", []), labels]
        Told.latest = self
        super().set_labels(labels)


def steps_of_a_rank(rank: int, world: int) -> tuple[list[list[int]], list[float], list[Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clustops.InverseClusterSizeSampler", Told)
        group = dist.group.WORLD if world > 1 else None
        indices, losses = zip(*deepcluster_ddp.train(group, epochs=2), strict=True)
    return [index.tolist() for index in indices], list(losses), Told.latest.told[1:]


def test_ranks_cluster_together_and_draw_disjoint_shares_of_one_order() -> None:
    ((_, _, alone),) = run_ranks(1, steps_of_a_rank)
    results = run_ranks(2, steps_of_a_rank)
    parts, losses, labels = zip(*results, strict=True)
    assert [len(part) for part in parts] == [50, 50]
    for mine, other in zip(*labels, strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(labels[0][0], alone[0])
    assert woven(parts) == order_of(labels[0][0], 0) + order_of(labels[0][1], 1)
    for epoch in (slice(0, 25), slice(25, 50)):
        means = [sum(pair) / 2 for pair in zip(*losses, strict=True)][epoch]
        assert means[-1] < means[0]


class Logged(DataLoader[Any]):
    """A loader that writes down the batches it gives, and kills its process with one of them."""

    file: Path
    fatal: int | None
    drawn = 0

    def __iter__(self) -> Any:
        sampler = self.sampler
        assert isinstance(sampler, InverseClusterSizeSampler)
        for batch in super().__iter__():
            line = json.dumps([sampler.epoch, sampler.indices(0, 600).tolist(), batch[1].tolist()])
            with self.file.open("a") as log:
                print(line, file=log)
            Logged.drawn += 1
            if Logged.drawn == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def train_until_killed(rank: int, world: int, folder: Path, run: int, fatal: int | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{run}", rank=rank, world_size=world)
    Logged.file = folder / f"{run}-{rank}.log"
    Logged.fatal = fatal if rank == world - 1 else None
    deepcluster_ddp.DataLoader = Logged  # type: ignore[attr-defined]
    for _ in deepcluster_ddp.train(dist.group.WORLD, folder / "checkpoint", epochs=2):
        pass


def test_killed_processes_go_on_with_the_next_index_whatever_their_number(tmp_path: Path) -> None:
    """A run is killed between drawing a batch and training on it; what no checkpoint has is drawn again."""
    runs = [(1, 8), (2, 6), (1, 21), (2, 4), (3, None)]  # ranks, the batch that kills the last of them
    orders: dict[int, list[int]] = {}
    trained: list[int] = []
    for run, (world, fatal) in enumerate(runs):
        arguments = (world, tmp_path, run, fatal)
        if fatal is None:
            start_processes(train_until_killed, arguments, nprocs=world, start_method="fork")
        else:
            with pytest.raises((ProcessExitedException, ProcessRaisedException)):
                start_processes(train_until_killed, arguments, nprocs=world, start_method="fork")
        logs = [
            [json.loads(line) for line in (tmp_path / f"{run}-{rank}.log").read_text().splitlines()]
            for rank in range(world)
        ]
        for epoch, order, _ in chain(*logs):
            assert orders.setdefault(epoch, order) == order
        state = torch.load(tmp_path / "checkpoint")["sampler"]
        drawn = woven([[indices for _, _, indices in log] for log in logs])
        saved = 600 * state["epoch"] + state["consumed"] - len(trained)
        assert 0 < saved <= len(drawn)
        trained += drawn[:saved]
    assert trained == orders[0] + orders[1]


def labels_of(epoch: int) -> Tensor:
    return torch.randint(-1, 5, (37,), generator=generator(epoch))


def by_index(**ranks: Any) -> InverseClusterSizeSampler:
    return InverseClusterSizeSampler(labels_of(0), 37, seed=5, **ranks)


def by_batch(**ranks: Any) -> MPerClusterBatchSampler:
    return MPerClusterBatchSampler(labels_of(0), 3, 2, num_batches=11, seed=5, **ranks)


def lockstep(make: Any, world: int, state: Any, epochs: int = 3) -> Iterator[tuple[int, list[Any], Any]]:
    """What ranks that wait for each other draw: epoch, items in order, and the state after each step."""
    ranks: list[ResumableSampler[Any]] = [make(num_replicas=world, rank=rank) for rank in range(world)]
    for epoch in range(state["epoch"] if state else 0, epochs):
        for sampler in ranks:
            sampler.set_labels(labels_of(epoch))
            sampler.set_epoch(epoch)
            if state:
                sampler.load_state_dict(state)
        state = None
        batches = [BatchSampler(sampler, 1 if make is by_batch else 4, drop_last=False) for sampler in ranks]
        for step in zip(*batches, strict=True):
            states = [sampler.state_dict() for sampler in ranks]
            assert all(each == states[0] for each in states)
            yield epoch, woven([[batch] for batch in step]), states[0]


def trained_in(make: Any, runs: list[tuple[int, int, int]]) -> list[list[Any]]:
    """What each epoch was trained on by runs of (ranks, steps until killed, steps from save to save)."""
    kept: list[list[Any]] = [[], [], []]
    state = None
    for world, steps, every in [*runs, (1, 10**9, 1)]:
        drawn = copy.deepcopy(kept)
        for number, (epoch, items, now) in enumerate(islice(lockstep(make, world, state), steps), 1):
            drawn[epoch] += items
            if number % every == 0:
                kept, state = copy.deepcopy(drawn), now
    return kept


def assert_whole(make: Any, epochs: list[list[Any]], ranks: int) -> None:
    """Nothing is lost or comes twice, but for what fills up the last step of an epoch."""
    for epoch, items in enumerate(epochs):
        order = make()
        order.set_labels(labels_of(epoch))
        order.set_epoch(epoch)
        assert items[: order.order_size] == list(order)
        assert len(items) - order.order_size < ranks


@pytest.mark.parametrize("make", [by_index, by_batch])
@pytest.mark.parametrize(("world", "later"), [(1, 2), (2, 1), (2, 3)])
def test_a_kill_at_any_step_loses_and_repeats_nothing(make: Any, world: int, later: int) -> None:
    for steps in range(sum(1 for _ in lockstep(make, world, None)) + 1):
        assert_whole(make, trained_in(make, [(world, steps, 1), (later, 10**9, 1)]), max(world, later))


@pytest.mark.parametrize("make", [by_index, by_batch])
@given(runs=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12), st.integers(1, 3)), max_size=6))
def test_any_number_of_kills_loses_and_repeats_nothing(make: Any, runs: list[tuple[int, int, int]]) -> None:
    assert_whole(make, trained_in(make, runs), 4)


@pytest.mark.parametrize("make", [by_index, by_batch])
def test_labels_and_epoch_count_that_are_set_after_iter(make: Any) -> None:
    sampler, expected = make(), make()
    sampler.load_state_dict({**sampler.state_dict(), "consumed": sampler.order_size})
    iterator = iter(sampler)
    for each in (sampler, expected):
        each.set_labels(labels_of(1))
        each.set_epoch(1)
    assert list(iterator) == list(expected)


@pytest.mark.parametrize("make", [by_index, by_batch])
def test_an_epoch_that_changes_between_two_items_is_an_error(make: Any) -> None:
    sampler = make()
    iterator = iter(sampler)
    next(iterator)
    sampler.set_epoch(1)
    with pytest.raises(RuntimeError, match="the epoch or the labels changed"):
        next(iterator)


class Numbers(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index

    def __len__(self) -> int:
        return 37


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
@pytest.mark.parametrize("make", [by_index, by_batch])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_resumes_at_every_position(workers: int, make: Any) -> None:
    module = pytest.importorskip("torchdata.stateful_dataloader")

    def loader(epoch: int) -> Any:
        sampler = make()
        sampler.set_labels(labels_of(3))
        sampler.set_epoch(epoch)
        how = {"batch_sampler": sampler} if make is by_batch else {"sampler": sampler, "batch_size": 4}
        return module.StatefulDataLoader(Numbers(), num_workers=workers, **how)

    first, states, whole = loader(3), [], []
    states.append(first.state_dict())
    for batch in first:
        whole.append(batch.tolist())
        states.append(first.state_dict())
    order = list(first.sampler if make is by_index else first.batch_sampler)
    assert (whole if make is by_batch else list(chain(*whole))) == order
    for position, state in enumerate(states):
        resumed = loader(0)  # the epoch comes with the state
        resumed.load_state_dict(state)
        assert [batch.tolist() for batch in resumed] == whole[position:]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
@pytest.mark.parametrize(("workers", "positions"), [(0, range(1, 21)), (2, [4, 10, 13])])
def test_a_loop_with_a_stateful_loader_resumes_within_its_epoch(
    workers: int, positions: Iterable[int]
) -> None:
    pytest.importorskip("torchdata.stateful_dataloader")
    from clustops.examples import deepcluster_stateful

    whole, states = zip(*deepcluster_stateful.train(workers=workers), strict=True)
    assert len(whole) == 20
    for epoch in range(2):
        labels = states[10 * epoch]["labels"]
        assert list(chain(*whole[10 * epoch : 10 * epoch + 10])) == order_of(labels, epoch)
    for position in positions:
        resumed = deepcluster_stateful.train(states[position - 1], workers=workers)
        assert [indices for indices, _ in resumed] == list(whole[position:])
