"""clustops::pca_whiten."""

from __future__ import annotations

from torch import Tensor

from ..reference import preprocess_ops as ops
from . import register


def _fake(x: Tensor, dim: int, eps: float) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], dim))


register("pca_whiten(Tensor x, int dim, float eps) -> Tensor", reference=ops.pca_whiten, fake=_fake)
