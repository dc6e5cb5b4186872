"""clustops::kmeans_assign."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import kmeans as reference
from . import register


def _fake(x: Tensor, centroids: Tensor, top: int) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1], top)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=dtype)


register(
    "kmeans_assign(Tensor x, Tensor centroids, int top) -> (Tensor labels, Tensor distances)",
    reference=reference.assign_l2,
    fake=_fake,
)
