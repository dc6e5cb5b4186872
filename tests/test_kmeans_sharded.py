"""Rows spread over ranks give the result of one process."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support import generator, run_ranks
from torch import Tensor

from clustops.checks import ClustopsWarning
from clustops.kmeans import KMeansResult, kmeans

SHARDS = {
    "unequal": [0, 90, 120],
    "an empty one": [0, 0, 120],
    "tiny": [0, 119, 120],
    "four": [0, 5, 5, 77, 120],
}


def problem(batch: int) -> tuple[Tensor, Tensor]:
    """Rows of magnitudes so different that float64 sums depend on their order."""
    x = torch.randn(batch, 120, 3, generator=generator(1), dtype=torch.float64)
    x *= torch.exp(3 * torch.randn(batch, 120, 1, generator=generator(3), dtype=torch.float64))
    x[:, 60:90] = x[:, :1]
    weights = torch.rand(batch, 120, generator=generator(2))
    weights[:, ::7] = 0
    return x, weights


def options() -> list[dict[str, Any]]:
    far = torch.cat([problem(2)[0][:, :4], torch.full((2, 8, 3), 1e3)], dim=1)
    return [
        {"init": init, "empty": empty, "metric": metric, "n_init": 2, "max_iter": 6, "seed": 4}
        for init, empty, metric in [
            ("k-means++", "split", "l2"),
            ("random", "random", "cosine"),
            (far, "split", "l2"),
            (far, "farthest", "l2"),
            (far, "random", "cosine"),
            (far, "keep", "l2"),
        ]
    ]


def all_results(x: Tensor, weights: Tensor, lengths: Tensor, group: Any) -> list[KMeansResult]:
    return [
        kmeans(x, 12, weights=w, lengths=n, group=group, **chosen)
        for chosen in options()
        for w, n in ((None, None), (weights, None), (None, lengths))
    ]


def sharded(rank: int, world: int, cuts: list[int]) -> list[KMeansResult]:
    x, weights = problem(2)
    rows = slice(cuts[rank], cuts[rank + 1])
    lengths = torch.tensor([cuts[rank + 1] - cuts[rank]] * 2)
    return all_results(x[:, rows], weights[:, rows], lengths, torch.distributed.group.WORLD)


@pytest.mark.parametrize("cuts", SHARDS.values(), ids=SHARDS.keys())
def test_labels_centroids_and_counts_equal_the_single_process_bit_for_bit(cuts: list[int]) -> None:
    x, weights = problem(2)
    alone = all_results(x, weights, torch.tensor([120, 120]), None)
    ranks = run_ranks(len(cuts) - 1, sharded, cuts)
    for i, expected in enumerate(alone):
        for name, value in vars(expected).items():
            parts = [getattr(results[i], name) for results in ranks]
            if name == "labels":
                assert torch.equal(torch.cat(parts, dim=1), value)
            else:
                assert all(torch.equal(part, value) for part in parts), name


def surplus(rank: int, world: int) -> tuple[int, int]:
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", ClustopsWarning)
        found = kmeans(torch.ones(3 * rank + 1, 2), 4, group=torch.distributed.group.WORLD)
    return int(found.n_empty), sum(issubclass(w.category, ClustopsWarning) for w in raised)


def test_fewer_distinct_rows_than_clusters_over_all_ranks_are_reported_on_each() -> None:
    assert run_ranks(2, surplus) == [(3, 1), (3, 1)]


def too_many(rank: int, world: int) -> str:
    try:
        kmeans(torch.ones(2, 2), 5, group=torch.distributed.group.WORLD)
    except ValueError as error:
        return str(error)
    return "no error"


def test_k_is_held_against_the_rows_of_all_ranks() -> None:
    assert all("number of rows, 4, got 5" in message for message in run_ranks(2, too_many))
