"""What else draws clusters evenly, and what else sorts samples by cluster."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler, WeightedRandomSampler

from .case import Implementation, Inputs, Run, Skip

WEIGHTED, PUBLISHED = "torch WeightedRandomSampler", "published DeepCluster rule"

MOST = 1 << 24  # labels that go through Python lists in seconds
PART = 1 << 20


class PublishedSampler(Sampler[int]):
    """Each cluster gives N / K + 1 of its indices, with replacement when it has fewer; shuffled, cut to N."""

    def __init__(self, labels: Tensor) -> None:
        values = labels.numpy()
        self.n = len(values)
        self.members: list[list[int]] = [[] for _ in range(int(values.max()) + 1)]
        for index, label in enumerate(values):
            self.members[label].append(index)

    def draw(self) -> np.ndarray[Any, Any]:
        filled = [members for members in self.members if members]
        size = self.n // len(filled) + 1
        parts = [np.random.choice(members, size, replace=len(members) <= size) for members in filled]
        indices = np.concatenate(parts)
        np.random.shuffle(indices)
        return indices[: self.n]

    def __iter__(self) -> Iterator[int]:
        return iter(self.draw().tolist())

    def __len__(self) -> int:
        return self.n


def published(labels: Tensor) -> PublishedSampler:
    """The sampler, or, where it takes minutes, what it would take by a part of the labels."""
    n = labels.numel()
    if n <= MOST:
        return PublishedSampler(labels)
    part = labels[:PART]
    start = time.process_time()
    next(iter(PublishedSampler(part % max(int(part.max()) * PART // n, 1))))
    seconds = (time.process_time() - start) * n / PART
    raise Skip(f"about {seconds:.0f} s to the first index, {40 * n / 1e9:.0f} GB of Python integers")


def weighted(labels: Tensor) -> WeightedRandomSampler:
    """Independent draws, each index weighted by one over its cluster's size."""
    n = labels.numel()
    torch.multinomial(torch.ones(1).expand(n), 1)  # raises where torch cannot, before the weights are made
    weights = 1 / labels.bincount().double()[labels]
    return WeightedRandomSampler(weights, n)  # type: ignore[arg-type]


def weighted_tensor(inputs: Inputs) -> Run:
    """An epoch of it in one call."""
    sampler = weighted(inputs["labels"])
    return lambda: (torch.multinomial(sampler.weights, sampler.num_samples, replacement=True),)


def published_tensor(inputs: Inputs) -> Run:
    """An epoch of it without the way through a list."""
    sampler = published(inputs["labels"])
    return lambda: (torch.from_numpy(sampler.draw()),)


def _sorted(inputs: Inputs) -> Run:
    labels, k = inputs["labels"], int(inputs["k"])
    return lambda: (labels.argsort(stable=True), labels.bincount(minlength=k).cumsum(0))


def _numpy(inputs: Inputs) -> Run:
    labels, k = inputs["labels"].numpy(), int(inputs["k"])
    return lambda: tuple(
        torch.from_numpy(part)
        for part in (labels.argsort(kind="stable"), np.bincount(labels, minlength=k).cumsum())
    )


def _scipy(inputs: Inputs) -> Run:
    from scipy.sparse import coo_array

    labels, k = inputs["labels"].numpy(), int(inputs["k"])

    def run() -> Any:
        columns, ones = np.arange(len(labels), dtype=np.int32), np.ones(len(labels), dtype=np.int8)
        table = coo_array((ones, (labels.astype(np.int32), columns)), shape=(k, len(labels))).tocsr()
        return torch.from_numpy(table.indices), torch.from_numpy(table.indptr)

    return run


TABLES = (
    Implementation("torch stable argsort", _sorted),
    Implementation("numpy stable argsort", _numpy),
    Implementation("scipy coo to csr", _scipy),
)
