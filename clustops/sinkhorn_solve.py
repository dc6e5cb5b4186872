"""Checks that all Sinkhorn functions share, and the way from checked arguments to potentials."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    ClustopsWarning,
    check_count,
    check_finite,
    check_floating,
    check_positive,
    check_same_device,
    check_tensor,
    reject,
    shape_of,
    values_are_checked,
)
from .distributed import Group, all_reduce_max, all_reduce_sum, all_reduce_sum_differentiable, world_size
from .native import sinkhorn as _registration  # noqa: F401
from .reference import sinkhorn_ops as reference

# exp(-80) is still a normal fp32 number, so a fixed shift loses no column.
_WIDEST_FIXED_SHIFT = 80.0

_warned = False


def check_scores(scores: Tensor, name: str, group: Group) -> None:
    """Raise unless ``scores`` is a floating point ``[..., B, K]``; a shard may be empty."""
    check_floating(scores, name)
    if scores.ndim < 2:
        reject(
            name,
            "[..., B, K]",
            shape_of(scores),
            "give it a row for each sample and a column for each prototype",
        )
    if scores.numel() == 0 and not (group is not None and scores.shape[-2] == 0):
        reject(
            name,
            "[..., B, K] with at least one row and one prototype",
            shape_of(scores),
            "skip empty batches",
        )


def check_counted(scores: Tensor, name: str, weights: Tensor | None = None) -> None:
    """Raise if a score of a row that counts is not finite; a row of weight 0 may hold anything."""
    if weights is not None and values_are_checked(scores):
        scores = scores.detach().masked_fill((weights == 0).unsqueeze(-1), 0)
    check_finite(scores, name)


class Settings(NamedTuple):
    """The scalar arguments, in the order in which the op takes them."""

    epsilon: float
    n_iters: int
    relax: float | None = None
    mass: float | None = None
    tol: float | None = None
    bound: float | None = None


def check_settings(settings: Settings) -> Settings:
    """Raise unless the scalar arguments are in range."""
    epsilon, n_iters, relax, mass, tol, bound = settings
    check_positive(epsilon, "epsilon", "0.05 is usual for cosine scores")
    check_count(n_iters, "n_iters", 0, "3 is usual; 0 is a softmax")
    if relax is not None and relax not in (0, math.inf):
        check_positive(relax, "relax", "pass None for a balanced assignment, 0 for a softmax")
    if mass is not None:
        check_positive(mass, "mass", "pass the share of rows to assign, in (0, 1]")
        if mass > 1:
            reject("mass", "at most 1", mass, "pass the share of rows to assign, in (0, 1]")
    if tol is not None:
        check_positive(tol, "tol", "pass None to do all n_iters updates")
    if bound is not None:
        check_positive(bound, "bound", "pass the largest |score|, 1 for unit vectors, or None")
    return settings


def check_bound(scores: Tensor, weights: Tensor | None, bound: float | None) -> None:
    """Raise if a counted score is larger than was promised, beyond rounding, where values are checked."""
    if bound is None or scores.numel() == 0 or not values_are_checked(scores):
        return
    largest = _largest(scores.detach())
    if largest > 1.01 * bound and weights is not None:
        largest = _largest(scores.detach().masked_fill((weights == 0).unsqueeze(-1), 0))
    if largest > 1.01 * bound:
        reject("bound", f"at least the largest |score|, {largest}", bound, "raise it, or pass None")


def _largest(scores: Tensor) -> float:
    least, most = scores.aminmax()
    return max(-float(least), float(most))


def queue_problems(queue_scores: Tensor | None, scores: Tensor, group: Group) -> Tensor | None:
    """``queue_scores``, ``[N, K]`` or ``[..., N, K]``, as ``[P, N, K]`` in the dtype of ``scores``."""
    if queue_scores is None:
        return None
    check_tensor(queue_scores, "queue_scores")
    check_floating(queue_scores, "queue_scores")
    check_same_device(queue_scores, "queue_scores", scores, "scores")
    leading, k = scores.shape[:-2], scores.shape[-1]
    given = queue_scores.shape
    if queue_scores.ndim < 2 or given[-1] != k or given[:-2] not in (leading, leading[:0]):
        each = f" or {[*leading, 'N', k]}".replace("'", "") if leading else ""
        reject(
            "queue_scores",
            f"[N, {k}]{each}, one queue for each problem",
            shape_of(queue_scores),
            "score the queue with the same prototypes",
        )
    if given[-2] == 0:
        return None
    queue = as_problems(queue_scores.detach().to(scores.dtype))
    return queue.expand(leading.numel(), -1, -1)


def as_problems(scores: Tensor) -> Tensor:
    """``[..., B, K]`` as ``[P, B, K]``."""
    return scores.unsqueeze(0) if scores.ndim == 2 else scores.flatten(end_dim=-3)


def row_weights(weights: Tensor | None, scores: Tensor, group: Group) -> Tensor | None:
    """``weights`` as a tensor of the shape ``[..., B]`` of the scores' rows, in the accumulation dtype."""
    if weights is None:
        return None
    check_tensor(weights, "weights")
    if weights.is_complex():
        reject("weights", "real", weights.dtype, "pass one number of at least 0 for each row", TypeError)
    check_same_device(weights, "weights", scores, "scores")
    rows = scores.shape[:-1]
    if weights.shape != rows and weights.shape != rows[-1:]:
        expected = f"[B] = [{rows[-1]}]" + (f" or [..., B] = {list(rows)}" if len(rows) > 1 else "")
        reject("weights", expected, shape_of(weights), "pass one weight for each row of scores")
    weights = weights.detach().to(reference.accumulator(scores.dtype))
    check_finite(weights, "weights")
    if values_are_checked(weights):
        if bool((weights < 0).any()):
            reject("weights", "at least 0", float(weights.min()), "0 masks a row, 2 counts it twice")
        if group is None and not bool((weights > 0).any()):
            reject("weights", "above 0 for at least one row", "all 0", "skip batches without a counted row")
    return weights.expand(rows)


def prototype_row(row: Tensor, name: str, scores: Tensor, *, virtual: bool | None = False) -> Tensor:
    """``row``, given as ``[K]`` or ``[..., K]``, as ``[P, K]`` in the accumulation dtype.

    Args:
        virtual: whether it has a last entry for the virtual column; ``None`` where both are welcome.
    """
    check_floating(row, name)
    check_same_device(row, name, scores, "scores")
    leading, k = scores.shape[:-2], scores.shape[-1]
    lengths = [k, k + 1] if virtual is None else [k + virtual]
    if row.ndim == 0 or row.shape[-1] not in lengths or row.shape[:-1] not in (leading, leading[:0]):
        expected = " or ".join(f"[{n}] or {[*leading, n]}" if leading else f"[{n}]" for n in lengths)
        why = "prototypes and the virtual column of mass" if virtual else "prototypes"
        reject(name, f"{expected} for K = {k} {why}", shape_of(row), "pass one entry for each column")
    row = row.detach().to(reference.accumulator(scores.dtype)).expand(*leading, row.shape[-1])
    return row.unsqueeze(0) if row.ndim == 1 else row.flatten(end_dim=-2)


def check_potentials(potentials: Tensor, name: str) -> None:
    """Raise if a potential is NaN or plus infinity; minus infinity is a prototype that is never used."""
    if values_are_checked(potentials):
        check_finite(potentials.masked_fill(potentials == -math.inf, 0), name)


def prior_row(prior: Tensor | None, scores: Tensor) -> Tensor | None:
    """``prior`` as ``[P, K]``, checked to be a marginal up to its scale."""
    if prior is None:
        return None
    prior = prototype_row(prior, "prior", scores)
    check_finite(prior, "prior")
    if values_are_checked(prior):
        if bool((prior < 0).any()):
            reject("prior", "at least 0", float(prior.min()), "pass class frequencies or shares")
        if bool((prior.sum(-1) == 0).any()):
            reject("prior", "above 0 for at least one prototype", "all 0", "pass None for a uniform prior")
    return prior


def warn_if_starved(n_prototypes: int, rows: int, group: Group, axes: str = "") -> None:
    """Warn, once a process, when there are more prototypes than rows to spread over them."""
    global _warned
    if _warned or torch.compiler.is_compiling() or rows == 0:
        return
    batch = rows * world_size(group)
    if n_prototypes > batch:
        _warned = True
        warnings.warn(
            f"{n_prototypes} prototypes share an effective batch of {batch} rows{axes}: their equal use "
            f"makes the targets nearly uniform and the loss stays near ln({n_prototypes}) = "
            f"{math.log(n_prototypes):.2f}; use a queue, a larger batch or fewer prototypes (a larger "
            f"epsilon is no cure). This is said once.",
            ClustopsWarning,
            stacklevel=4,
        )


class Problems(NamedTuple):
    """Checked tensors, in the order in which the op takes them."""

    scores: Tensor  # [P, B, K]
    queue: Tensor | None = None  # [P, N, K]
    prior: Tensor | None = None  # [P, K]
    weights: Tensor | None = None  # [P, B]
    init: Tensor | None = None  # [P, K], with mass [P, K + 1]

    @property
    def rows(self) -> int:
        """Rows of a problem, those of its queue included."""
        return self.scores.shape[1] + (0 if self.queue is None else self.queue.shape[1])


def solve(
    problems: Problems,
    group: Group,
    settings: Settings,
    *,
    out: Tensor | None = None,
    hard: bool = False,
    differentiable: bool = False,
    axes: str | None = "",
) -> Tensor:
    """Potentials ``[P, K]``, with ``mass`` ``[P, K + 1]``; NaN says that scores were not finite.

    ``out [P, B, K]`` receives the assignments. ``axes`` goes into the warning about the batch; ``None`` is
    for methods that have more prototypes than rows by design.
    """
    ops = torch.ops.clustops
    if settings.n_iters > 0 and settings.relax is None and axes is not None:
        warn_if_starved(problems.scores.shape[-1], problems.rows, group, axes)
    if group is None and out is not None:
        potentials: Tensor = ops.sinkhorn_(out, *problems, *settings[:-1], hard)
        return potentials
    if group is None:
        potentials = (reference if differentiable else ops).sinkhorn_potentials(*problems, *settings)
    else:
        potentials = _solve_over_ranks(problems, group, settings, differentiable)
    if out is not None:
        ops.assign_from_potentials_(out, problems.scores, potentials, settings.epsilon, hard)
    return potentials


def check_solved(potentials: Tensor, problems: Problems, group: Group) -> None:
    """Raise if scores were not finite: looked for only where potentials say so, to spare a pass."""
    if not values_are_checked(potentials):
        return
    # One NaN makes the sum NaN, which is quicker to find than the NaN itself.
    if not math.isnan(potentials.sum().item()) or not bool(potentials.isnan().any()):
        return
    check_counted(problems.scores, "scores", problems.weights)
    if (queue := problems.queue) is not None:
        check_finite(queue[:1] if queue.stride(0) == 0 else queue, "queue_scores")
    if group is not None:
        reject("scores", "finite on all ranks", "others on another rank", "look at that rank's message")


def _solve_over_ranks(problems: Problems, group: Group, settings: Settings, differentiable: bool) -> Tensor:
    """The same updates with the column masses of all ranks: one sum of the masses of all problems for each.

    A column maximum goes before the sum only where the masses have no known scale: in the first update
    (unless ``bound`` gives it), and with ``relax``.
    """
    scores, queue, prior, weights, init = problems
    epsilon, n_iters, relax, mass, tol, bound = settings
    local = reference.column_log_mass if differentiable else torch.ops.clustops.sinkhorn_column_mass
    reduce = all_reduce_sum_differentiable if differentiable else all_reduce_sum
    balanced = relax is None or relax == math.inf
    log_prior = reference.log_prior(scores, prior, mass)

    def column_mass(potentials: Tensor, t: int) -> Tensor:
        normalized = init is not None or t > 0
        log_mass = local(scores, queue, weights, potentials, epsilon, normalized)
        if t > 0 and balanced:
            shift = log_prior  # after a balanced update no column is far from its share
        elif not normalized and bound is not None and 2 * bound / epsilon <= _WIDEST_FIXED_SHIFT:
            shift = torch.full_like(log_mass, bound / epsilon)
        else:
            shift = all_reduce_max(log_mass, group)
        shift = shift.masked_fill(shift == -math.inf, 0)
        return shift + reduce((log_mass - shift).exp(), group).log()

    return reference.iterate(
        column_mass, log_prior, init, epsilon=epsilon, n_iters=n_iters, relax=relax, mass=mass, tol=tol
    )
