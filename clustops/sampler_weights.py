"""Cluster sizes into weights, quotas and member tables."""

from __future__ import annotations

import decimal
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arrays import like, to_tensor
from .checks import (
    check_choice,
    check_count,
    check_finite,
    reject,
    shape_of,
    values_are_checked,
)
from .native import sampler as _ops  # noqa: F401  defines clustops::cluster_members

_FINEST = 2**41  # draw weights sum to about this: what quota_bounds can multiply exactly
_LARGEST_LABEL = 2**31 - 1


def cluster_weights(
    counts: Any,
    *,
    scheme: str = "inverse",
    power: float = 1.0,
    beta: float = 0.999,
    normalize: str = "sample_mean",
    empty: str = "zero",
) -> Any:
    r"""Loss weight of each cluster from its number of samples.

    "inverse": :math:`w_k = 1 / n_k`; "power": :math:`n_k^{-power}`; "effective": the inverse of the effective
    number of samples, :math:`(1 - \beta) / (1 - \beta^{n_k})`.

    ``F.cross_entropy(weight=w)`` with ``reduction="mean"`` divides by the weights of the batch at hand, so a
    batch of one cluster keeps its full loss. For weights that mean the same in each batch and on each rank
    take ``(w[labels] * F.cross_entropy(logits, labels, reduction="none")).mean()``.

    Args:
        counts: ``[K]`` samples of each cluster, >= 0; integers or floating point (soft counts).
        scheme: "inverse", "power" or "effective".
        power: exponent of "power", finite; 1 for the other schemes.
        beta: of "effective", in [0, 1): 0 gives equal weights, 1 would give inverse ones.
        normalize: "sample_mean": :math:`\sum n_k w_k = \sum n_k`, the mean weight of a sample is 1, so the
            loss keeps its scale; "cluster_mean": the mean over non-empty clusters is 1; "none".
        empty: "zero": an empty cluster weighs 0; "error": raise if there is one.

    Returns:
        ``[K]`` float32 (fp64 for fp64 counts), computed in fp64.

    Raises:
        TypeError, ValueError: an argument is out of its range, or all clusters are empty.

    Cost: O(K) time and memory.

    Example:
        >>> cluster_weights(torch.tensor([3, 1, 0]))
        tensor([0.6667, 2.0000, 0.0000])

    Source: Caron et al., DeepCluster, ECCV 2018; "effective": Cui et al., CVPR 2019.
    """
    back = like(counts)
    counts = check_counts(counts, "counts")
    check_choice(scheme, "scheme", ("inverse", "power", "effective"))
    check_choice(normalize, "normalize", ("sample_mean", "cluster_mean", "none"))
    check_choice(empty, "empty", ("zero", "error"))
    check_number(power, "power", "pass the exponent of n, such as 0.5")
    if scheme != "power" and power != 1:
        reject("power", f"1 for scheme={scheme!r}", power, 'pass scheme="power"')
    if not 0 <= check_number(beta, "beta", "pass a number such as 0.999") < 1:
        reject("beta", "in [0, 1)", beta, 'pass a number such as 0.999, or scheme="inverse" for its limit 1')
    n = counts.double()
    filled = n > 0
    if values_are_checked(counts):
        if not bool(filled.any()):
            reject("counts", "above 0 for one cluster at least", "only zeros", "count the labels again")
        if empty == "error" and not bool(filled.all()):
            got = f"{int((~filled).sum())} empty of {n.numel()}"
            reject(
                "counts",
                'above 0 for each cluster with empty="error"',
                got,
                'repair the clusters or pass "zero"',
            )
    safe = torch.where(filled, n, 1.0)
    if scheme == "effective":
        # expm1: 1 - beta^n loses all digits for beta near 1.
        weight = (1 - beta) / -torch.expm1(safe * math.log(beta)) if beta > 0 else torch.ones_like(safe)
    else:
        weight = safe ** -float(power)
    weight = torch.where(filled, weight, 0.0)
    if normalize == "sample_mean":
        weight = weight * (n.sum() / (n * weight).sum())
    elif normalize == "cluster_mean":
        weight = weight * (filled.sum() / weight.sum())
    return back(weight.to(torch.float64 if counts.dtype == torch.float64 else torch.float32))


def balanced_quota(counts: Any, total: int) -> Any:
    r"""How many samples to take from each cluster so that the largest shares are as equal as possible.

    Water filling: :math:`\min(c, n_k)` with the cut c at which the quotas sum to ``total``. Where no integer
    c fits, the clusters above the largest that stays below take one more each, lowest index first.

    Args:
        counts: ``[K]`` integers >= 0, samples of each cluster. total: in [0, sum of counts].

    Returns:
        ``[K]`` int64 with sum ``total``.

    Raises:
        TypeError, ValueError: an argument is out of its range.

    Cost: a sort of K numbers.

    Example:
        >>> balanced_quota(torch.tensor([9, 1, 0, 5]), 8)
        tensor([4, 1, 0, 3])
    """
    back = like(counts)
    counts = check_counts(counts, "counts")
    if counts.is_floating_point():
        reject("counts", "integers", counts.dtype, "convert them: counts.long()", TypeError)
    check_count(total, "total", 0, "pass the number of samples to take")
    counts = counts.long()
    if total > int(counts.sum()):
        reject("total", f"at most the sum of counts, {int(counts.sum())}", total, "take fewer samples")
    ordered = torch.sort(counts).values
    above = torch.arange(ordered.numel(), 0, -1, device=counts.device)
    below = ordered.cumsum(0) - ordered
    # The first cluster, by size, that the water does not cover decides the level of all larger ones.
    dry = (below + ordered * above > total).nonzero().flatten()
    if dry.numel() == 0:
        return back(counts.clone())
    first = int(dry[0])
    cut, rest = divmod(total - int(below[first]), int(above[first]))
    quota = counts.clamp(max=cut)
    quota[(counts > cut).nonzero().flatten()[:rest]] += 1
    return back(quota)


def cluster_members(labels: Any, k: int) -> tuple[Any, Any]:
    """The samples of each cluster, as one table: cluster c holds ``members[offsets[c] : offsets[c + 1]]``.

    Args:
        labels: ``[N]`` integers below ``k``; negative ones belong to no cluster. A memory-mapped array is
            streamed where it lies.
        k: number of clusters, >= 1.

    Returns:
        members ``[number of labels >= 0]``, ascending inside a cluster, int32 where N < 2^31, else int64; and
        offsets ``[k + 1]`` int64.

    Raises:
        TypeError, ValueError: labels are not ``[N]`` integers below ``k``, or ``k`` is no integer >= 1.

    Cost: a counting sort over threads: three streams over the labels and one write a sample, where its
    cluster's others lie; memory is the table and counts of at most its size, or of ``k`` clusters where that
    is more. Without kernels, and on a GPU, a sort of each piece of 2^24 labels.

    Example:
        >>> cluster_members(torch.tensor([1, 0, -1, 1]), 2)
        (tensor([1, 0, 3], dtype=torch.int32), tensor([0, 1, 3]))
    """
    back = like(labels)
    tensor = check_labels(labels)
    check_count(k, "k", 1, "pass the number of clusters")
    if values_are_checked(tensor) and largest_label(tensor) >= k:
        reject("labels", f"below k = {k}", largest_label(tensor), "pass k = labels.max() + 1 or more")
    members, offsets = torch.ops.clustops.cluster_members(tensor, k)
    return back(members), back(offsets)


def check_labels(labels: Any, name: str = "labels") -> Tensor:
    """``labels`` as a tensor; raise unless they are ``[N]`` integers."""
    if hasattr(labels, "labels"):
        reject(name, "[N] integers", type(labels).__name__, "pass result.labels", TypeError)
    tensor = to_tensor(labels, name)
    if tensor.dim() != 1:
        cure = f"pass one label per sample, of one-hot rows {name}.argmax(1)"
        reject(name, "[N]", shape_of(tensor), cure)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        reject(name, "integers", tensor.dtype, "convert them to int64", TypeError)
    return tensor


def largest_label(labels: Tensor) -> int:
    """The largest label, -1 if there is none; raise where a table of that many clusters makes no sense."""
    largest = int(torch.ops.clustops.largest_label(labels))
    if largest > _LARGEST_LABEL:
        reject(
            "labels",
            f"at most {_LARGEST_LABEL}",
            largest,
            renumbering(labels),
        )
    return largest


def renumbering(labels: Tensor) -> str:
    """How to number the clusters from 0 without gaps; negative labels stay -1."""
    if bool((labels.long() < 0).any()):
        return "renumber them: torch.unique(torch.as_tensor(labels).clip(-1), return_inverse=True)[1] - 1"
    return "renumber them: torch.unique(torch.as_tensor(labels), return_inverse=True)[1]"


def draw_weights(counts: Tensor, power: float) -> Tensor:
    """Integers ``[K]`` in proportion to ``n^(1 - power)``, 0 for an empty cluster; their sum is below 2^42.

    The same integers on every platform: whole powers are exact, others go through decimal arithmetic, because
    ``pow`` of the C library may differ in the last bit.
    """
    if power == 1:
        return (counts > 0).long()
    if power == 0:
        return counts.clone()
    sizes, which, clusters = counts.unique(return_inverse=True, return_counts=True)
    with decimal.localcontext(decimal.Context(prec=30, Emax=10**9, Emin=-(10**9))):
        exponent = 1 - decimal.Decimal(power)
        shares = [decimal.Decimal(n) ** exponent if n else decimal.Decimal(0) for n in sizes.tolist()]
        whole = sum(share * number for share, number in zip(shares, clusters.tolist(), strict=True))
        weights = [max(1, int(share * _FINEST / whole)) if share else 0 for share in shares]
    return torch.tensor(weights)[which]


def given_weights(weights: Any, counts: Tensor) -> Tensor:
    """The caller's share of each cluster as integers like those of ``draw_weights``."""
    shares = check_counts(weights, "cluster_weights").detach().cpu().double()
    if shares.numel() < counts.numel():
        reject(
            "cluster_weights",
            f"[K] with K above the largest label, {counts.numel() - 1}",
            shape_of(shares),
            "pass one weight per cluster",
        )
    shares = torch.where(counts > 0, shares, 0.0)
    # fsum rounds once, so the sum does not depend on its order.
    whole = math.fsum(shares.tolist())
    if whole == 0:
        reject(
            "cluster_weights", "above 0 for one cluster with samples at least", "only zeros", "pass weights"
        )
    return torch.where(shares > 0, (shares / whole * _FINEST).long().clamp(min=1), 0)


def fingerprint(*tensors: Tensor) -> str:
    """Tells these integers ``[N]`` from others: their number and a word for each tensor."""
    words = ((t.numel(), int(torch.ops.clustops.sampler_fingerprint(t)) % 2**64) for t in tensors)
    return "-".join(f"{number:x}:{word:016x}" for number, word in words)


def check_number(value: Any, name: str, cure: str) -> float:
    """``value`` as a float; raise unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        reject(name, "a finite number", type(value).__name__, cure, TypeError)
    if not math.isfinite(value):
        reject(name, "a finite number", value, cure)
    return float(value)


def check_counts(array: Any, name: str) -> Tensor:
    """``array`` as a tensor; raise unless it is ``[K]`` finite numbers >= 0, K >= 1."""
    counts: Tensor = to_tensor(array, name)
    if counts.dim() != 1 or counts.numel() == 0:
        reject(name, "[K] with K >= 1", shape_of(counts), "pass one number per cluster")
    if counts.is_complex() or counts.dtype == torch.bool:
        reject(name, "numbers >= 0", counts.dtype, "pass integers or floating point numbers", TypeError)
    if counts.is_floating_point():
        check_finite(counts, name)
    if values_are_checked(counts) and bool((counts < 0).any()):
        reject(name, ">= 0", counts.min().item(), "pass one number of samples, or one share, per cluster")
    return counts
