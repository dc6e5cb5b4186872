"""Sinkhorn assignment on a GPU: results and workspace, calls of kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.sinkhorn_ops import accumulator
from . import dense_rows, extension, stream_of, view


def potentials(
    scores: Tensor,
    queue: Tensor | None,
    prior: Tensor | None,
    weights: Tensor | None,
    init: Tensor | None,
    epsilon: float,
    n_iters: int,
    relax: float | None,
    mass: float | None,
    tol: float | None,
    bound: float | None,
) -> Tensor:
    """``clustops::sinkhorn_potentials``."""
    return _solve(None, scores, queue, prior, weights, init, epsilon, n_iters, relax, mass, tol, False)


def plan_(
    out: Tensor,
    scores: Tensor,
    queue: Tensor | None,
    prior: Tensor | None,
    weights: Tensor | None,
    init: Tensor | None,
    epsilon: float,
    n_iters: int,
    relax: float | None,
    mass: float | None,
    tol: float | None,
    hard: bool,
) -> Tensor:
    """``clustops::sinkhorn_``."""
    written = _writable(out, scores)
    result = _solve(written, scores, queue, prior, weights, init, epsilon, n_iters, relax, mass, tol, hard)
    if written is not out:
        out.copy_(written)
    return result


def assign_(out: Tensor, scores: Tensor, potentials: Tensor, epsilon: float, hard: bool) -> None:
    """``clustops::assign_from_potentials_``."""
    written = _writable(out, scores)
    row = potentials.to(accumulator(scores.dtype)).contiguous()
    workspace = row.new_empty(0, dtype=torch.float64)
    with torch.cuda.device(scores.device):
        given = (written, dense_rows(scores), row, workspace)
        extension.sinkhorn_assign_cuda(*map(view, given), epsilon, hard, stream_of(scores))
    if written is not out:
        out.copy_(written)


def column_mass(
    scores: Tensor,
    queue: Tensor | None,
    weights: Tensor | None,
    potentials: Tensor,
    epsilon: float,
    normalized: bool,
) -> Tensor:
    """``clustops::sinkhorn_column_mass``."""
    row = potentials.to(accumulator(scores.dtype)).contiguous()
    result, rows = torch.empty_like(row), _rows(scores, queue, weights)
    virtual = row.shape[1] > scores.shape[2]
    with torch.cuda.device(scores.device):
        size = extension.sinkhorn_column_mass_workspace_cuda(view(rows[0]), _view(rows[1]), virtual)
        workspace = row.new_empty(size, dtype=torch.float64)
        given = (result, *rows, row, workspace)
        extension.sinkhorn_column_mass_cuda(*map(_view, given), epsilon, normalized, stream_of(scores))
    return result


def _solve(
    assignments: Tensor | None,
    scores: Tensor,
    queue: Tensor | None,
    prior: Tensor | None,
    weights: Tensor | None,
    init: Tensor | None,
    epsilon: float,
    n_iters: int,
    relax: float | None,
    mass: float | None,
    tol: float | None,
    hard: bool,
) -> Tensor:
    """Potentials after ``n_iters`` updates; what they assign goes to ``assignments``."""
    dtype, virtual = accumulator(scores.dtype), mass is not None
    shape = (scores.shape[0], scores.shape[2] + virtual)
    if n_iters == 0:
        result = scores.new_zeros(shape, dtype=dtype) if init is None else init.to(dtype, copy=True)
        if assignments is not None:
            assign_(assignments, scores, result, epsilon, hard)
        return result
    result, (x, queued, weighed) = scores.new_empty(shape, dtype=dtype), _rows(scores, queue, weights)
    prior, init = (None if t is None else t.to(dtype).contiguous() for t in (prior, init))
    with torch.cuda.device(scores.device):
        size = extension.sinkhorn_workspace_cuda(view(x), _view(queued), virtual)
        workspace = result.new_empty(size, dtype=torch.float64)
        given = (result, assignments, x, queued, prior, weighed, init, workspace)
        extension.sinkhorn_cuda(
            *map(_view, given), epsilon, n_iters, relax, mass, tol, hard, stream_of(scores)
        )
    return result


def _rows(
    scores: Tensor, queue: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scores, a queue and weights as kernels take them."""
    return (
        dense_rows(scores),
        None if queue is None else dense_rows(queue.to(scores.dtype)),
        None if weights is None else weights.to(accumulator(scores.dtype)),
    )


def _writable(out: Tensor, scores: Tensor) -> Tensor:
    """``out``, or memory of its shape that a kernel may write to."""
    if out.is_contiguous() and out.dtype in (scores.dtype, accumulator(scores.dtype)):
        return out
    return torch.empty(out.shape, dtype=accumulator(scores.dtype), device=out.device)


def _view(tensor: Tensor | None) -> Any:
    return None if tensor is None else view(tensor)
