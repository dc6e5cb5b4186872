"""The steps of greedy k-means++, on every instruction set that this CPU runs."""

from __future__ import annotations

import pytest
import torch
from support import DEVICES, generator
from torch import Tensor

from clustops import kmeans_rows as _registered  # noqa: F401

ops = torch.ops.clustops


def samples(device: str) -> dict[str, tuple[Tensor | int | None, ...]]:
    g = generator(0)
    x = torch.randn(2, 9, 3, generator=g).to(device)
    weights = torch.ones((), dtype=torch.float64, device=device).expand(4, 9)
    closest, improves = (
        torch.full((4, 9), 2.0, device=device),
        torch.full((4, 9), 3, dtype=torch.int32, device=device),
    )
    candidates = x.repeat_interleave(2, 0)[:, :2]
    scale = torch.full((4,), 2.0**50, dtype=torch.float64, device=device)
    return {
        "kmeans_seed": (x, weights[:2], torch.rand(4, 6, generator=g, dtype=torch.float64).to(device), 3),
        "kmeans_potentials": (x, candidates, closest, weights, scale),
        "kmeans_closest_": (
            closest,
            x,
            candidates[:, :1],
            improves,
            torch.tensor([0, 1, 0, 1], device=device),
        ),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", samples("cpu"))
def test_registration_passes_opcheck(name: str, device: str) -> None:
    torch.library.opcheck(getattr(ops, name).default, samples(device)[name])
