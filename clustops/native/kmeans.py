"""clustops::kmeans_assign and the other steps of k-means."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import kmeans_ops as ops
from . import dense_rows, extension, register, stream_of, view


def _fake(x: Tensor, centroids: Tensor, top: int, precision: str | None = None) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1], top)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=ops.accumulator(x.dtype))


def _prepare(x: Tensor, centroids: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows with neighbouring features (at any stride otherwise), centroids, and room for the result."""
    shape, dtype = (*x.shape[:2], top), ops.accumulator(x.dtype)
    labels, distances = x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=dtype)
    return dense_rows(x), centroids.to(dtype).contiguous(), labels, distances


def _cpu(x: Tensor, centroids: Tensor, top: int, precision: str | None = None) -> tuple[Tensor, Tensor]:
    x, centroids, labels, distances = _prepare(x, centroids, top)
    threads, rows, centres = torch.get_num_threads(), view(x), view(centroids)
    size = extension.kmeans_assign_workspace(rows, centres, threads) if top == 1 else 0
    extension.kmeans_assign(rows, centres, view(labels), view(distances), view(torch.empty(size)), threads)
    return labels, distances


_LONGEST = 64  # nearest centroids that the GPU kernel sorts by insertion; above it the reference is faster


def _cuda(x: Tensor, centroids: Tensor, top: int, precision: str | None = None) -> tuple[Tensor, Tensor]:
    if top > _LONGEST:
        return ops.assign_l2(x, centroids, top)
    precision = precision or torch.get_float32_matmul_precision()
    x, centroids, labels, distances = _prepare(x, centroids, top)
    (b, n, d), k, rows = x.shape, centroids.shape[1], view(x)
    size = extension.kmeans_assign_cuda_workspace(b, n, k, d, top, rows, precision)
    workspace = x.new_empty(size // 4, dtype=torch.float32)
    with torch.cuda.device(x.device):
        extension.kmeans_assign_cuda(
            rows, view(centroids), view(labels), view(distances), view(workspace), precision, stream_of(x)
        )
    return labels, distances


register(
    "kmeans_assign(Tensor x, Tensor centroids, int top, str? precision=None)"
    " -> (Tensor labels, Tensor distances)",
    reference=ops.assign_l2,
    fake=_fake,
    cpu=_cpu if hasattr(extension, "kmeans_assign") else None,
    cuda=_cuda if hasattr(extension, "kmeans_assign_cuda") else None,
)
