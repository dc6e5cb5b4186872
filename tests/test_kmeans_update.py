"""The update of k-means: exact sums and what is made of them, on every instruction set that this CPU runs."""

from __future__ import annotations

import pytest
import torch
from support import DEVICES, generator
from torch import Tensor

from clustops import kmeans_rows as _registered  # noqa: F401
from clustops.reference import kmeans_ops as reference

ops = torch.ops.clustops


def samples(device: str) -> dict[str, tuple[Tensor | int | None, ...]]:
    g = generator(0)
    x = torch.randn(2, 9, 3, generator=g).to(device)
    labels, before = (torch.randint(-1, 4, (2, 9), generator=g).to(device) for _ in range(2))
    weights = torch.ones((), dtype=torch.float64, device=device).expand(2, 9)
    grid = reference.units(reference.bounds(x, weights), torch.tensor([9, 9], device=device))
    sums = torch.zeros(2, 2, 4, 4, dtype=torch.float64, device=device)
    counts = torch.zeros(2, 4, dtype=torch.int64, device=device)
    return {
        "kmeans_bounds": (x, weights),
        "kmeans_sums_": (sums, counts, x, labels, weights, grid, before),
        "kmeans_means": (sums + 1, x[:, :4]),
        "kmeans_counts": (labels, weights, 4),
        "cluster_means": (x, labels, weights, 4),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", samples("cpu"))
def test_registration_passes_opcheck(name: str, device: str) -> None:
    torch.library.opcheck(getattr(ops, name).default, samples(device)[name])
