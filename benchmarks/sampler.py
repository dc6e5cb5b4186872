"""An epoch of indices, uniform over clusters, and the wait for the first one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler, WeightedRandomSampler

from .case import OURS, Case, Implementation, Inputs, Result, Run, Work

WEIGHTED, PUBLISHED = "torch WeightedRandomSampler", "published DeepCluster rule"


def cases(suite: str) -> list[Case]:
    """The shapes of one suite; the sampler runs on the CPU whatever the trainer uses."""
    if suite == "cuda":
        return []
    n, k = (50_000, 500) if suite == "quick" else (1_281_167, 10_000)
    return [
        epoch(n, k, "as one tensor", TENSORS, None if suite == "quick" else 0.025),
        epoch(n, k, "as Python integers", ITERATORS, None),
        first_index(n, k, None if suite == "quick" else 0.005),
    ]


def epoch(n: int, k: int, kind: str, against: tuple[Implementation, ...], target: float | None) -> Case:
    """N indices with every cluster drawn as often as any other."""

    def error(inputs: Inputs, expected: float, result: Result) -> float:
        if result[0].min() < 0 or result[0].max() >= n:
            return float("inf")
        drawn = inputs["labels"][result[0]].bincount(minlength=k).double()
        return float((drawn - expected).square().sum() / expected / (k - 1))

    return Case(
        name=f"epoch {kind}, N {n}, K {k}",
        make=lambda generator: {"labels": uneven_labels(generator, n, k)},
        implementations=against,
        oracle=lambda inputs: n / k,
        error=error,
        error_name="chi-square of the clusters drawn, a degree of freedom; 1 is chance",
        tolerance=1 + 6 * (2 / k) ** 0.5,  # six standard deviations of what independent draws give
        work=Work(bytes=16.0 * n),
        target_seconds=target,
    )


def first_index(n: int, k: int, target: float | None) -> Case:
    """From new labels to the first index: what an epoch waits for after re-clustering."""
    return Case(
        name=f"first index after new labels, N {n}, K {k}",
        make=lambda generator: {"labels": uneven_labels(generator, n, k)},
        implementations=FIRST,
        oracle=lambda inputs: n,
        error=lambda inputs, count, result: 0.0 if 0 <= int(result[0]) < count else float("inf"),
        error_name="an index out of range",
        tolerance=0.0,
        work=Work(bytes=16.0 * n),
        target_seconds=target,
    )


def uneven_labels(generator: torch.Generator, n: int, k: int) -> Tensor:
    """Cluster sizes fall by a power law, and none is empty."""
    odds = torch.arange(1, k + 1, dtype=torch.float64) ** -0.5
    drawn = torch.multinomial(odds, n - k, replacement=True, generator=generator)
    labels = torch.cat([torch.arange(k), drawn])
    return labels[torch.randperm(n, generator=generator)]


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


def weighted(labels: Tensor) -> WeightedRandomSampler:
    """Independent draws, each index weighted by one over its cluster's size."""
    weights = 1 / labels.bincount().double()[labels]
    return WeightedRandomSampler(weights, len(labels))  # type: ignore[arg-type]


def ours(labels: Tensor) -> Any:
    from clustops.sampler import InverseClusterSizeSampler

    return InverseClusterSizeSampler(labels, seed=0)


def _ours_tensor(inputs: Inputs) -> Run:
    sampler = ours(inputs["labels"])
    epochs = iter(range(1 << 30))

    def run() -> Result:
        sampler.set_epoch(next(epochs))  # a new order each time, as in training
        return (sampler.indices(0, len(sampler)),)

    return run


def _weighted_tensor(inputs: Inputs) -> Run:
    sampler = weighted(inputs["labels"])
    return lambda: (torch.multinomial(sampler.weights, sampler.num_samples, replacement=True),)


def _published_tensor(inputs: Inputs) -> Run:
    sampler = PublishedSampler(inputs["labels"])
    return lambda: (torch.from_numpy(sampler.draw()),)


def _iterated(make: Any) -> Any:
    def build(inputs: Inputs) -> Run:
        sampler = make(inputs["labels"])
        return lambda: (torch.tensor(list(sampler)),)

    return build


def _first(make: Any) -> Any:
    return lambda inputs: lambda: (torch.tensor(next(iter(make(inputs["labels"])))),)


TENSORS = (
    Implementation(OURS, _ours_tensor),
    Implementation(WEIGHTED, _weighted_tensor),
    Implementation(PUBLISHED, _published_tensor),
)
ITERATORS = (
    Implementation(OURS, _iterated(ours)),
    Implementation(WEIGHTED, _iterated(weighted)),
    Implementation(PUBLISHED, _iterated(PublishedSampler)),
)
FIRST = (
    Implementation(OURS, _first(ours)),
    Implementation(WEIGHTED, _first(weighted)),
    Implementation(PUBLISHED, _first(PublishedSampler)),
)
