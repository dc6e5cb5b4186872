"""Sinkhorn assignment: a balanced soft assignment of rows to prototypes, as one potential per prototype.

The losses, the queue and the matrix projection have files of their own and are offered here too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arrays import like, to_tensor
from .checks import (
    check_choice,
    check_finite,
    check_floating,
    check_positive,
    check_same_device,
    check_tensor,
    reject,
    shape_of,
    values_are_checked,
)
from .distributed import Group, check_group
from .reference import sinkhorn_ops as reference
from .sinkhorn_loss import soft_cross_entropy, swapped_prediction_loss
from .sinkhorn_matrix import sinkhorn_matrix
from .sinkhorn_queue import FeatureQueue
from .sinkhorn_solve import (
    Problems,
    Settings,
    as_problems,
    check_bound,
    check_counted,
    check_potentials,
    check_scores,
    check_settings,
    check_solved,
    prior_row,
    prototype_row,
    queue_problems,
    row_weights,
    solve,
)

__all__ = [
    "FeatureQueue",
    "assign_from_potentials",
    "sinkhorn",
    "sinkhorn_matrix",
    "sinkhorn_potentials",
    "soft_cross_entropy",
    "swapped_prediction_loss",
]


def sinkhorn(
    scores: Any,
    *,
    epsilon: float = 0.05,
    n_iters: int = 3,
    prior: Any = None,
    weights: Any = None,
    relax: float | None = None,
    mass: float | None = None,
    tol: float | None = None,
    init: Any = None,
    queue_scores: Any = None,
    hard: bool = False,
    gradient: str | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    group: Group = None,
    return_potentials: bool = False,
) -> Any:
    """Soft assignments ``Q`` of rows to prototypes whose average over rows is close to ``prior``.

    ``Q = softmax_k(s / epsilon + a)`` with the potentials ``a`` of :func:`sinkhorn_potentials`. Rows sum to
    1, or to the assigned share of the row with ``mass``. Equals the published loop that divides
    ``exp(s / epsilon)`` by column sums, then by row sums, ``n_iters`` times,
    but is finite wherever ``s / epsilon`` is.

    Args:
        scores: ``[..., B, K]``; leading dimensions are independent problems. fp32, bf16, fp16 or fp64, a
            tensor or another kind of array.
        epsilon, n_iters, prior, weights, relax, mass, tol, init, queue_scores, group: see
            :func:`sinkhorn_potentials`. Rows of a queue get no assignment.
        hard: one-hot rows: 1 at the largest entry, ties to the lowest index. A row whose largest entry is the
            virtual column of ``mass`` is all 0.
        gradient: ``None``: the result carries no gradient. ``"last_step"``: that of the final softmax, with
            ``a`` constant. ``"unrolled"``: through all updates; keeps O(n_iters B K) numbers for the backward
            pass and, with ``group``, each rank gets the gradient of the sum of all ranks' losses.
        dtype: of the assignments: ``None`` for fp32 (fp64 for fp64 scores), or the dtype of ``scores``.
        out: a contiguous tensor of the shape of ``scores`` that receives the assignments and is returned:
            where a step makes them anew, fresh memory costs as much as the arithmetic. Not with a gradient.
        return_potentials: also return ``a``.

    Returns:
        ``[..., B, K]``, contiguous, or (assignments, potentials) with potentials ``[..., K]``
        (``[..., K + 1]`` with ``mass``). Rows of weight 0 get an assignment too, they only have no say in
        ``a``. The kind of array that ``scores`` is.

    Raises:
        ValueError, TypeError: an argument is out of range, has a wrong shape or dtype, or lies on another
            device.

    Cost: ``n_iters + 1`` passes over the scores. Sums in fp32 (fp64 for fp64 scores).

    >>> scores = torch.tensor([[0.9, 0.8], [0.9, 0.1], [0.9, 0.3], [0.9, 0.5]])
    >>> sinkhorn(scores, n_iters=100, hard=True)
    tensor([[0., 1.],
            [1., 0.],
            [1., 0.],
            [0., 1.]])

    Source: Cuturi, "Sinkhorn distances", NeurIPS 2013; Caron et al., "Unsupervised learning of visual
    features by contrasting cluster assignments", NeurIPS 2020.
    """
    restore = like(scores)
    scores = to_tensor(scores, "scores")
    check_floating(scores, "scores")
    if gradient is not None:
        check_choice(gradient, "gradient", ("last_step", "unrolled"))
        if hard:
            reject("hard", "False with a gradient", hard, "a one-hot assignment has none: pass gradient=None")
        if out is not None:
            reject("out", "None with a gradient", shape_of(out), "autograd needs memory of its own")
    settings = check_settings(Settings(epsilon, n_iters, relax, mass, tol))
    problems = _checked(scores, queue_scores, prior, weights, init, group, settings)
    if gradient is None:
        assignments = _room(out, dtype, scores)
        potentials = solve(problems, group, settings, out=as_problems(assignments), hard=hard)
    else:
        whole, unrolled = as_problems(scores), gradient == "unrolled"
        traced = problems._replace(scores=whole) if unrolled else problems
        potentials = solve(traced, group, settings, differentiable=unrolled)
        wide = _output_dtype(dtype, scores)
        assignments = reference.assign_from_potentials(whole, potentials, epsilon, hard, wide)
        assignments = assignments.view(scores.shape)
    check_solved(potentials, problems, group)
    if not return_potentials:
        return restore(assignments)
    return restore(assignments), restore(potentials.view(*scores.shape[:-2], -1))


def sinkhorn_potentials(
    scores: Any,
    *,
    epsilon: float = 0.05,
    n_iters: int = 3,
    prior: Any = None,
    weights: Any = None,
    relax: float | None = None,
    mass: float | None = None,
    tol: float | None = None,
    init: Any = None,
    queue_scores: Any = None,
    bound: float | None = None,
    group: Group = None,
) -> Any:
    """The potential of each prototype; the Sinkhorn assignment is ``softmax_k(s / epsilon + a)``.

    Prototypes first, rows last, with ``r`` the prior and ``w`` the row weights::

        a  = log r - log sum_b w_b exp(s / epsilon)                                once
        a += log r - log (sum_b w_b softmax_k(s / epsilon + a) / sum_b w_b)        n_iters - 1 times

    so a constant added to all scores, or to those of one prototype, changes no assignment; one added to a row
    does, until the updates have converged.

    Args:
        scores: ``[..., B, K]``; leading dimensions are independent problems. fp32, bf16, fp16 or fp64, a
            tensor or another kind of array. Carries no gradient here.
        epsilon: temperature of the plan, above 0.
        n_iters: number of updates; 0 gives ``init``, or zeros, with which the assignment is a softmax.
        prior: ``[K]`` or ``[..., K]``, at least 0, scaled to sum 1: the share of rows for each prototype.
            ``None`` is uniform. A prototype with prior 0 gets potential -inf and no assignment.
        weights: ``[B]`` or ``[..., B]``, at least 0: 0 masks a row (which may hold anything), 2 counts it
            twice.
        relax: ``None`` keeps to the prior. ``gamma >= 0`` charges ``gamma KL(column masses || prior)``
            instead, the update is ``a = fi (a + log r - log m)`` with ``fi = gamma / (gamma + epsilon)``; 0
            is a softmax, infinity is ``None``.
        mass: ``rho`` in (0, 1] assigns that share of the row mass to the prototypes and the rest to a virtual
            prototype of score 0, whose potential is appended as entry K.
        tol: a problem stops changing when its column error ``sum_k |m_k - r_k|`` (with ``relax``: the mass
            that the update would move) is at most ``tol``; decided on the device. The first update of a cold
            start is always done.
        init: ``[K]`` or ``[..., K]`` (one more with ``mass``): potentials to start from, all updates are then
            of the second kind. ``n_iters=5`` is ``n_iters=3``, then 2 from its result. Zeros give rows-first
            Sinkhorn.
        queue_scores: ``[N, K]`` or ``[..., N, K]``: scores of further rows, of weight 1, with a say in ``a``,
            as those of a :class:`FeatureQueue`. N may be 0. With ``group``, this rank's share of them.
        bound: a promise that ``|s| <= bound`` (1 for unit vectors): saves the search for column maxima,
            changes nothing else.
        group: a process group whose ranks each hold some of the rows, of any number, none included. Needs one
            sum of ``[..., K]`` floats over ranks for each update (plus a maximum: in the first one without
            ``bound``, in all with ``relax``). ``None``: this process has all rows.

    Returns:
        ``[..., K]``, ``[..., K + 1]`` with ``mass``, fp32 (fp64 for fp64 scores), without gradient, the kind
        of array that ``scores`` is, equal on all ranks.

    Raises:
        ValueError, TypeError: an argument is out of range, has a wrong shape or dtype, or lies on another
            device.

    Cost: ``n_iters`` passes over the scores. Sums in fp32 (fp64 for fp64 scores).

    >>> scores = torch.tensor([[0.9, 0.8], [0.9, 0.1], [0.9, 0.3], [0.9, 0.5]])
    >>> a = sinkhorn_potentials(scores, n_iters=100)
    >>> assign_from_potentials(scores, a, epsilon=0.05).mean(0)
    tensor([0.5000, 0.5000])

    Source: Cuturi, NeurIPS 2013; Caron et al., NeurIPS 2020; relax and mass: Chizat et al., "Scaling
    algorithms for unbalanced optimal transport problems", 2018; Zhang et al., "P2OT", ICLR 2024.
    """
    restore = like(scores)
    scores = to_tensor(scores, "scores")
    check_floating(scores, "scores")
    settings = check_settings(Settings(epsilon, n_iters, relax, mass, tol, bound))
    problems = _checked(scores, queue_scores, prior, weights, init, group, settings)
    potentials = solve(problems, group, settings)
    check_solved(potentials, problems, group)
    return restore(potentials.view(*scores.shape[:-2], -1))


def assign_from_potentials(
    scores: Any,
    potentials: Any,
    *,
    epsilon: float = 0.05,
    hard: bool = False,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Any:
    """Assignments ``softmax_k(s / epsilon + a)`` of any rows, seen before or not, under given potentials.

    Args:
        scores: ``[..., B, K]``, a tensor or another kind of array; B may differ from that of the potentials'
            batch.
        potentials: ``[K]`` or ``[..., K]``; with a further entry, the virtual column of ``mass``, rows sum to
            less than 1.
        epsilon: the one that the potentials were made with.
        hard, dtype, out: see :func:`sinkhorn`.

    Returns:
        ``[..., B, K]``, contiguous, without gradient, the kind of array that ``scores`` is.

    Raises:
        ValueError, TypeError: an argument is out of range, has a wrong shape or dtype, or lies on another
            device.

    Cost: one pass over the scores. Sums in fp32 (fp64 for fp64 scores).

    >>> assign_from_potentials(torch.tensor([[0.5, 0.5]]), torch.tensor([0.0, -9.0]), epsilon=0.05)
    tensor([[9.9988e-01, 1.2339e-04]])
    """
    restore = like(scores)
    scores = to_tensor(scores, "scores")
    check_scores(scores, "scores", None)
    check_positive(epsilon, "epsilon", "pass the epsilon of the potentials")
    potentials = prototype_row(to_tensor(potentials, "potentials"), "potentials", scores, virtual=None)
    check_potentials(potentials, "potentials")
    result = _room(out, dtype, scores)
    torch.ops.clustops.assign_from_potentials_(
        as_problems(result), as_problems(scores.detach()), potentials, epsilon, hard
    )
    if values_are_checked(result) and bool(result[..., 0].isnan().any()):  # so are rows that are not finite
        check_finite(scores, "scores")
    return restore(result)


def _checked(
    scores: Tensor,
    queue_scores: Any,
    prior: Any,
    weights: Any,
    init: Any,
    group: Group,
    settings: Settings,
) -> Problems:
    """All tensor arguments but the values of the scores, which the first update looks at."""
    check_group(group)
    weights = None if weights is None else row_weights(to_tensor(weights, "weights"), scores, group)
    check_scores(scores, "scores", group)
    if settings.n_iters == 0:
        check_counted(scores, "scores", weights)
    check_bound(scores, weights, settings.bound)
    prior = None if prior is None else prior_row(to_tensor(prior, "prior"), scores)
    if init is not None:
        init = prototype_row(to_tensor(init, "init"), "init", scores, virtual=settings.mass is not None)
        check_potentials(init, "init")
    if queue_scores is not None:
        queue_scores = queue_problems(to_tensor(queue_scores, "queue_scores"), scores, group)
    problems = as_problems(scores.detach())
    weights = None if weights is None else weights.reshape(problems.shape[:-1])
    return Problems(problems, queue_scores, prior, weights, init)


def _room(out: Tensor | None, dtype: torch.dtype | None, scores: Tensor) -> Tensor:
    """``out`` as it may be written to, or fresh memory."""
    if out is None:
        return torch.empty(scores.shape, dtype=_output_dtype(dtype, scores), device=scores.device)
    check_tensor(out, "out")
    check_same_device(out, "out", scores, "scores")
    if dtype is not None and dtype != out.dtype:
        reject("dtype", f"that of out, {out.dtype}, or None", dtype, "pass one of them")
    if out.dtype not in (reference.accumulator(scores.dtype), scores.dtype):
        expected = f"{reference.accumulator(scores.dtype)} or {scores.dtype}, the dtype of scores"
        reject("out", expected, out.dtype, "pass a tensor of this dtype")
    if out.shape != scores.shape or not out.is_contiguous():
        got = shape_of(out) + ("" if out.is_contiguous() else ", not contiguous")
        reject("out", f"contiguous, {shape_of(scores)} like scores", got, "pass torch.empty(scores.shape)")
    if values_are_checked(out) and out.untyped_storage().data_ptr() == scores.untyped_storage().data_ptr():
        reject("out", "memory of its own", "that of scores", "pass a tensor that shares nothing with them")
    if out.requires_grad:
        reject("out", "without requires_grad", "a tensor that has it", "pass out.detach()")
    return out


def _output_dtype(dtype: torch.dtype | None, scores: Tensor) -> torch.dtype:
    wide = reference.accumulator(scores.dtype)
    if dtype is not None and dtype not in (wide, scores.dtype):
        expected = f"None, {wide} or {scores.dtype}, the dtype of scores"
        reject("dtype", expected, dtype, "convert the result instead")
    return dtype or wide
