"""Indices uniform over clusters: an epoch, the wait for the first one, places of a large order, resuming."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import sampler_peers as peers
from .case import OURS, Case, Implementation, Inputs, Result, Run, Skip, Work

Make = Callable[[torch.Generator], Inputs]

PLACES = 16  # stretches of an order, evenly over the epoch
INDEX_RANGE = "an index out of range"


def cases(suite: str) -> list[Case]:
    """The shapes of one suite; the sampler runs on the CPU whatever the trainer uses."""
    if suite == "quick":
        n, k = 50_000, 500
        labels = uneven(n, k)
        return [
            epoch(n, k, labels, "as one tensor", TENSORS),
            epoch(n, k, labels, "as Python integers", ITERATORS),
            first_index(n, k, labels),
            members(n, k, labels),
            resume(n, k, labels),
        ]
    if suite == "cpu":
        n, k = 1_281_167, 10_000
        labels = uneven(n, k)
        many, fine = 100_000_000, 100_000
        large = uneven(many, fine, torch.int32)
        return [
            epoch(n, k, labels, "as one tensor", TENSORS, target=0.025),
            epoch(n, k, labels, "as Python integers", ITERATORS),
            first_index(n, k, labels, target=0.005),
            members(n, k, labels),
            resume(n, k, labels),
            first_index(many, fine, large),
            places(many, fine, large, target=60e-9),
            resume(many, fine, large),
        ]
    if suite == "big":
        n, k = 1_000_000_000, 1_000_000
        return [
            first_index(n, k, mapped(n, k)),
            places(n, k, mapped(n, k)),
            stream(n, k, mapped(n, k)),
            resume(n, k, mapped(n, k)),
        ]
    return []


def epoch(
    n: int,
    k: int,
    labels: Make,
    kind: str,
    against: tuple[Implementation, ...],
    target: float | None = None,
) -> Case:
    """N indices with every cluster drawn as often as any other."""
    return Case(
        name=f"epoch {kind}, N {n}, K {k}",
        make=labels,
        implementations=against,
        oracle=lambda inputs: n / k,
        error=functools.partial(_unevenness, n, k),
        error_name="chi-square of the clusters drawn, a degree of freedom; 1 is chance",
        tolerance=_chance(k),
        work=Work(bytes=12.0 * n),  # an index written, its member read: a table of this size stays in a cache
        target_seconds=target,
    )


def first_index(n: int, k: int, labels: Make, target: float | None = None) -> Case:
    """From new labels to the first index: what an epoch waits for after re-clustering."""
    size = 4 if n >= 1 << 24 else 8
    return Case(
        name=f"first index after new labels, N {n}, K {k}",
        make=labels,
        implementations=FIRST,
        oracle=lambda inputs: n,
        error=_outside,
        error_name=INDEX_RANGE,
        tolerance=0.0,
        work=Work(bytes=float(2 * size + 4) * n),  # labels read to count and to place, members written
        target_seconds=target,
    )


def members(n: int, k: int, labels: Make) -> Case:
    """The samples of each cluster, as one table."""

    def error(inputs: Inputs, count: int, result: Result) -> float:
        table = result[0].long()
        cluster = inputs["labels"][table]
        ascending = (cluster.diff() > 0) | ((cluster.diff() == 0) & (table.diff() > 0))
        return float((~ascending).sum()) + abs(table.numel() - count)

    return Case(
        name=f"member table, N {n}, K {k}",
        make=lambda generator: labels(generator) | {"k": torch.tensor(k)},
        implementations=(Implementation(OURS, _members), *peers.TABLES),
        oracle=lambda inputs: n,
        error=error,
        error_name="members out of order",
        tolerance=0.0,
        work=Work(bytes=20.0 * n),
    )


def places(n: int, k: int, labels: Make, target: float | None = None) -> Case:
    """Stretches of one order from its start to its end: no index waits for those before it."""
    length = min(1 << 18, n // PLACES)
    starts = [(n - length) * i // (PLACES - 1) for i in range(PLACES)]

    def build(inputs: Inputs) -> Run:
        sampler = shared(inputs["labels"])
        return lambda: tuple(sampler.indices(start, start + length) for start in starts)

    return Case(
        name=f"{PLACES} places of one order, N {n}, K {k}",
        make=labels,
        implementations=(Implementation(OURS, build), *TENSORS[1:]),
        oracle=lambda inputs: None,
        error=functools.partial(_unevenness, n, k),
        error_name="chi-square of the clusters drawn, a degree of freedom; 1 is chance",
        tolerance=_chance(k),
        work=Work(bytes=12.0, reads=1.0),
        steps=PLACES * length,
        step_name="index",
        target_seconds=target,
    )


def stream(n: int, k: int, labels: Make) -> Case:
    """Python integers from the middle of an epoch on, as a DataLoader takes them."""
    count = min(1 << 20, n // 2)

    def build(inputs: Inputs) -> Run:
        sampler = copy.copy(shared(inputs["labels"]))
        state = {**sampler.state_dict(), "consumed": n // 2}

        def run() -> Result:
            sampler.load_state_dict(state)
            return (torch.tensor(list(itertools.islice(sampler, count))),)

        return run

    return Case(
        name=f"{count} Python integers from the middle of an epoch, N {n}, K {k}",
        make=labels,
        implementations=(Implementation(OURS, build), *ITERATORS[1:]),
        oracle=lambda inputs: None,
        error=functools.partial(_unevenness, n, k),
        error_name="chi-square of the clusters drawn, a degree of freedom; 1 is chance",
        tolerance=_chance(k),
        work=Work(bytes=12.0, reads=1.0),
        steps=count,
        step_name="index",
    )


def resume(n: int, k: int, labels: Make) -> Case:
    """From the member table and a state saved at nine tenths of an epoch to the next index."""
    at = n * 9 // 10

    def ours(inputs: Inputs) -> Run:
        sampler = shared(inputs["labels"])
        state = {**copy.copy(sampler).state_dict(), "consumed": at}

        def run() -> Result:
            resumed = copy.copy(sampler)  # as in a new process: it has to compare its labels with the state's
            resumed.load_state_dict(state)
            return (torch.tensor(next(iter(resumed))),)

        return run

    def skipping(make: Any) -> Any:
        return lambda inputs: (
            lambda: (torch.tensor(next(itertools.islice(make(inputs["labels"]), at, None))),)
        )

    return Case(
        name=f"resume at position {at}, N {n}, K {k}",
        make=labels,
        implementations=(
            Implementation(OURS, ours),
            Implementation(peers.WEIGHTED, skipping(peers.weighted)),
            Implementation(peers.PUBLISHED, skipping(peers.published)),
        ),
        oracle=lambda inputs: n,
        error=_outside,
        error_name=INDEX_RANGE,
        tolerance=0.0,
        work=Work(bytes=4.0 * n + 8.0 * k),  # the table compared
    )


def uneven(n: int, k: int, dtype: torch.dtype = torch.int64) -> Make:
    """Labels whose cluster sizes fall by a power law; no cluster is empty."""

    def make(generator: torch.Generator) -> Inputs:
        return {"labels": _fill(torch.empty(n, dtype=dtype), k, generator)}

    return make


def mapped(n: int, k: int) -> Make:
    """The same in a file that has no name, so that it is gone with this process; int32, memory-mapped."""
    return lambda generator: {"labels": _file(n, k, generator.initial_seed())}


@functools.lru_cache(maxsize=1)
def _file(n: int, k: int, seed: int) -> Tensor:
    folder = tempfile.gettempdir()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if shutil.disk_usage(folder).free < 5 * n or memory < 12 * n:
        raise Skip(f"needs {5 * n / 1e9:g} GB in {folder} and {12 * n / 1e9:g} GB of memory")
    with tempfile.TemporaryFile() as file:
        labels = torch.from_numpy(np.memmap(file, np.int32, mode="w+", shape=(n,)))
    return _fill(labels, k, torch.Generator().manual_seed(seed))


def _fill(labels: Tensor, k: int, generator: torch.Generator) -> Tensor:
    for piece in labels.split(1 << 22):
        piece.copy_(torch.rand(piece.shape, dtype=torch.float64, generator=generator).square_().mul_(k))
    labels[:: labels.numel() // k][:k] = torch.arange(k)
    return labels


def ours(labels: Tensor) -> Any:
    from clustops.sampler import InverseClusterSizeSampler

    return InverseClusterSizeSampler(labels, seed=0)


@functools.lru_cache(maxsize=1)
def shared(labels: Tensor) -> Any:
    """One sampler for all cases and passes over the same labels."""
    return ours(labels)


def _outside(inputs: Inputs, count: int, result: Result) -> float:
    return 0.0 if 0 <= int(result[0]) < count else float("inf")


def _unevenness(n: int, k: int, inputs: Inputs, _: Any, result: Result) -> float:
    drawn, total = torch.zeros(k, dtype=torch.int64), 0
    for indices in result:
        if indices.min() < 0 or indices.max() >= n:
            return float("inf")
        drawn += inputs["labels"][indices].bincount(minlength=k)
        total += indices.numel()
    return float((drawn - total / k).square().sum() / (total / k) / (k - 1))


def _chance(k: int) -> float:
    """Six standard deviations above what independent draws give."""
    return 1 + 6 * math.sqrt(2 / k)


def _ours_tensor(inputs: Inputs) -> Run:
    sampler = ours(inputs["labels"])
    epochs = iter(range(1 << 30))

    def run() -> Result:
        sampler.set_epoch(next(epochs))  # a new order each time, as in training
        return (sampler.indices(0, len(sampler)),)

    return run


def _members(inputs: Inputs) -> Run:
    from clustops.sampler import cluster_members

    return lambda: cluster_members(inputs["labels"], int(inputs["k"]))


def _iterated(make: Any) -> Any:
    def build(inputs: Inputs) -> Run:
        sampler = make(inputs["labels"])
        return lambda: (torch.tensor(list(sampler)),)

    return build


def _first(make: Any) -> Any:
    return lambda inputs: lambda: (torch.tensor(next(iter(make(inputs["labels"])))),)


TENSORS = (
    Implementation(OURS, _ours_tensor),
    Implementation(peers.WEIGHTED, peers.weighted_tensor),
    Implementation(peers.PUBLISHED, peers.published_tensor),
)
ITERATORS = (
    Implementation(OURS, _iterated(ours)),
    Implementation(peers.WEIGHTED, _iterated(peers.weighted)),
    Implementation(peers.PUBLISHED, _iterated(peers.published)),
)
FIRST = (
    Implementation(OURS, _first(ours)),
    Implementation(peers.WEIGHTED, _first(peers.weighted)),
    Implementation(peers.PUBLISHED, _first(peers.published)),
)
