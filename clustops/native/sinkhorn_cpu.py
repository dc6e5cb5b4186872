"""Sinkhorn assignment on a CPU: results, calls of kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.sinkhorn_ops import accumulator
from . import dense_rows, extension, view


def _row(row: Tensor | None, dtype: torch.dtype) -> Any:
    """A view of a contiguous prior or init in the accumulation dtype, or ``None``."""
    return None if row is None else view(row.to(dtype).contiguous())


def _rows(scores: Tensor, queue: Tensor | None, weights: Tensor | None) -> tuple[Any, Any, Any]:
    """Views of the rows."""
    queued = None if queue is None else view(dense_rows(queue.to(scores.dtype)))
    return view(dense_rows(scores)), queued, None if weights is None else view(weights)


def _solve(
    out: Tensor | None,
    scores: Tensor,
    queue: Tensor | None,
    prior: Tensor | None,
    weights: Tensor | None,
    init: Tensor | None,
    *settings: Any,
) -> Tensor:
    dtype, threads = accumulator(scores.dtype), torch.get_num_threads()
    mass = settings[3]
    potentials = scores.new_empty((scores.shape[0], scores.shape[2] + (mass is not None)), dtype=dtype)
    weights = None if weights is None else weights.to(dtype)
    rows, queued, weighed = _rows(scores, queue, weights)
    extension.sinkhorn(
        view(potentials),
        None if out is None else view(out),
        rows,
        queued,
        _row(prior, dtype),
        weighed,
        _row(init, dtype),
        *settings,
        threads,
    )
    return potentials


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
    written = out.contiguous()
    result = _solve(written, scores, queue, prior, weights, init, epsilon, n_iters, relax, mass, tol, hard)
    if written is not out:
        out.copy_(written)
    return result


def column_mass(
    scores: Tensor,
    queue: Tensor | None,
    weights: Tensor | None,
    potentials: Tensor,
    epsilon: float,
    normalized: bool,
) -> Tensor:
    """``clustops::sinkhorn_column_mass``."""
    dtype, threads = accumulator(scores.dtype), torch.get_num_threads()
    potentials = potentials.to(dtype).contiguous()
    result = torch.empty_like(potentials)
    weights = None if weights is None else weights.to(dtype)
    rows, queued, weighed = _rows(scores, queue, weights)
    given = (view(result), rows, queued, weighed, view(potentials))
    extension.sinkhorn_column_mass(*given, epsilon, normalized, threads)
    return result


def assign_(out: Tensor, scores: Tensor, potentials: Tensor, epsilon: float, hard: bool) -> None:
    """``clustops::assign_from_potentials_``."""
    written, threads = out.contiguous(), torch.get_num_threads()
    rows, potentials = view(dense_rows(scores)), potentials.to(accumulator(scores.dtype)).contiguous()
    given = (view(written), rows, view(potentials))
    extension.sinkhorn_assign(*given, epsilon, hard, threads)
    if written is not out:
        out.copy_(written)
