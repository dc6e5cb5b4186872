"""Contrastive losses of single anchors without an M x M matrix: what serves a device that has no kernel.

A row is a view of a sample, z_a, in fp32 (fp64 for fp64 features). Weights are separable: q_i q_j between
samples i and j of one class, o_i between the views of sample i. So sums over classes, kept in fp64, replace
the M x M weights, and only the softmax visits all pairs, a block of rows at a time.
:mod:`clustops.reference.contrastive` states the same losses densely.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

# A block of scores holds 2^22 numbers, 16 MB in fp32; 64 rows at least keep a matrix product efficient.
_BLOCK_SCORES = 1 << 22
_BLOCK_ROWS = 64


def contrastive_rows(
    features: Tensor,
    labels: Tensor | None,
    confidence: Tensor | None,
    first: int,
    count: int,
    temperature: float,
    threshold: float,
    reweight: bool,
    own_confidence: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of the anchors in samples ``first ... first + count - 1``, against the rows of all samples.

    loss_a = LSE_{b != a} s_ab - z_a.B_a / (temperature W_a),  B_a = sum_b w_ab z_b,  W_a = sum_b w_ab

    Args:
        features: ``[N, V, D]``.
        labels: ``[N]`` int64, negative where a sample has no class; ``None``: no sample has one.
        confidence: ``[N]``, any floating dtype; ``None`` means 1.
        first, count: which samples are anchors.
        temperature: s_ab = z_a.z_b / temperature.
        threshold: samples below it have no class; compared in the dtype of ``confidence``.
        reweight: whether confidence is a weight, or only compared with the threshold.
        own_confidence: whether o_i is the squared confidence, or 1.
        normalize: whether rows are divided by their norms; a zero row stays zero.

    Returns:
        loss ``[count, V]``, 0 where W is 0; LSE ``[count, V]``; W ``[count]``, the same for all views; norms
        ``[2]``, the least above 0 (inf: there is none) and the greatest of the given rows. If a feature is
        not finite, or a confidence not in [0, 1], all losses and both norms are NaN.
    """
    with torch.autocast(features.device.type, enabled=False):
        z = unit_rows(features, normalize)
        norms = extreme_norms(features, confidence, z.dtype)
        classes = _classes(z, labels, confidence, threshold, reweight, own_confidence)
        anchors = slice(first, first + count)
        weight, pull = _total_weight(z, *classes)[anchors], _positives(z, *classes)[anchors]
        lse = log_partition(z, first, count, temperature)
        mean = (z[anchors] * pull).sum(-1) / (temperature * weight)
        loss = torch.where(weight > 0, lse - mean, 0) + torch.where(norms[1].isnan(), torch.nan, 0)
        return loss.to(z.dtype), lse, weight[:, 0].clone(), norms


def contrastive_rows_backward(
    grad: Tensor,
    features: Tensor,
    labels: Tensor | None,
    confidence: Tensor | None,
    lse: Tensor,
    first: int,
    count: int,
    temperature: float,
    threshold: float,
    reweight: bool,
    own_confidence: bool,
    normalize: bool,
) -> Tensor:
    """Gradient of sum_a grad_a loss_a, over the anchors of all samples, with respect to some samples.

    With r_a = grad_a / W_a and symmetric w, G:

        dz_a = (sum_b G_ab z_b - r_a B_a - sum_b w_ab r_b z_b) / temperature
        G_ab = grad_a exp(s_ab - LSE_a) + grad_b exp(s_ab - LSE_b),  G_aa = 0

    Args:
        grad: ``[N, V]``, of all samples, as is ``lse``.
        first, count: the samples whose gradient is wanted.

    Returns:
        ``[count, V, D]`` in the dtype of ``features``.
    """
    with torch.autocast(features.device.type, enabled=False):
        z = unit_rows(features, normalize)
        classes = _classes(z, labels, confidence, threshold, reweight, own_confidence)
        weight = _total_weight(z, *classes)
        anchors = slice(first, first + count)
        grad = torch.where(weight > 0, grad, 0)
        share = torch.where(weight > 0, grad.to(_wide(z)) / weight, 0)[:, :, None]
        attraction = _positives(z, *classes).mul_(share).add_(_positives(share * z, *classes))
        attraction = attraction[anchors].to(z.dtype)
        repulsion = _repulsion(z, grad, lse, first, count, temperature)
        dz = (repulsion - attraction) / temperature
        return through_norm(dz, features[anchors], z[anchors], normalize)


def unit_rows(features: Tensor, normalize: bool) -> Tensor:
    """z ``[N, V, D]``."""
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    rows = features.to(dtype)
    return rows * _inverse_norm(features) if normalize else rows


def extreme_norms(features: Tensor, confidence: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``[2]``: the least norm above 0 and the greatest; NaN if a feature or a confidence is out of range."""
    norms = torch.linalg.vector_norm(features, dim=-1, dtype=_wide(features)).flatten()
    # A neutral one more, for there may be no rows.
    least = pad(torch.where(norms > 0, norms, torch.inf), (0, 1), value=torch.inf).amin()
    greatest = pad(norms, (0, 1)).amax()
    # A norm in a wider type is finite just where its features are.
    good = (features if features.dtype == norms.dtype else norms).isfinite().all()
    if confidence is not None:
        good = good & ((confidence >= 0) & (confidence <= 1)).all()
    return torch.where(good, torch.stack([least, greatest]), torch.nan).to(dtype)


def _inverse_norm(features: Tensor) -> Tensor:
    """``[N, V, 1]``; 0 for a zero row, and for one so short that the inverse overflows."""
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True, dtype=_wide(features))
    inverse = norm.reciprocal().to(dtype)
    return torch.where(inverse.isinf(), 0, inverse)


def through_norm(dz: Tensor, features: Tensor, z: Tensor, normalize: bool) -> Tensor:
    """The gradient of ``features`` from that of z: f = z |f| gives df = (dz - z (z.dz)) / |f|."""
    if normalize:
        dz = (dz - z * (z * dz).sum(-1, keepdim=True)) * _inverse_norm(features)
    return dz.to(features.dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64  # MPS has no fp64


def _classes(
    z: Tensor,
    labels: Tensor | None,
    confidence: Tensor | None,
    threshold: float,
    reweight: bool,
    own_confidence: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """A class number in ``[0, N)``, the weight q and the weight o of each sample."""
    n = z.shape[0]
    one = torch.ones(n, dtype=_wide(z), device=z.device)
    p = one if confidence is None else confidence
    if labels is None:
        labels = torch.full((n,), -1, device=z.device)
    in_class = (labels >= 0) & (p >= threshold)
    p = p.to(one.dtype) if reweight else one
    return _numbered(labels), torch.where(in_class, p, 0), p.square() if own_confidence else one


def _numbered(labels: Tensor) -> Tensor:
    """Labels replaced by numbers below N, so that the size of a table needs no look at their values."""
    ordered, order = labels.sort()
    step = torch.zeros_like(ordered)
    step[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(labels).scatter_(0, order, step.cumsum(0))


def _positives(x: Tensor, classes: Tensor, q: Tensor, own_weight: Tensor) -> Tensor:
    """sum_b w_ab x_b for each row a: ``[N, V, D]`` to ``[N, V, D]``, in fp64."""
    x, q, own_weight = x.to(q.dtype), q[:, None], own_weight[:, None, None]
    own = x.sum(1)
    # index_put_ adds in a fixed order on every device, index_add_ does not.
    sums = torch.zeros_like(own).index_put_((classes,), q * own, accumulate=True)
    rest = q * (sums[classes] - q * own)
    return (own[:, None] - x).mul_(own_weight).add_(rest[:, None])


def _total_weight(z: Tensor, classes: Tensor, q: Tensor, own_weight: Tensor) -> Tensor:
    """W ``[N, V]``."""
    return _positives(z.new_ones((*z.shape[:2], 1)), classes, q, own_weight).squeeze(-1).to(z.dtype)


def blocks(first: int, count: int, n: int, views: int) -> Iterator[tuple[int, int]]:
    """Samples ``first ... first + count - 1`` in ranges whose rows make one block of scores."""
    rows = max(_BLOCK_ROWS, _BLOCK_SCORES // max(1, n * views))
    step = max(1, rows // max(1, views))
    for start in range(first, first + count, step):
        yield start, min(start + step, first + count)


def score_block(z: Tensor, start: int, stop: int, temperature: float) -> Tensor:
    """s of the rows of some samples against all rows, -inf of a row with itself."""
    scores = torch.mm(z[start:stop].flatten(0, 1), z.flatten(0, 1).T).div_(temperature)
    scores.diagonal(start * z.shape[1]).fill_(-torch.inf)
    return scores


def log_partition(z: Tensor, first: int, count: int, temperature: float) -> Tensor:
    """LSE_{b != a} s_ab ``[count, V]``; the lowest finite number where there is no b."""
    n, views, _ = z.shape
    lse = z.new_empty((count, views))
    for start, stop in blocks(first, count, n, views):
        scores = score_block(z, start, stop, temperature)
        # A single row has no pair: its -inf must not become NaN.
        largest = scores.amax(1, keepdim=True).clamp_min_(torch.finfo(z.dtype).min)
        total = scores.sub_(largest).exp_().sum(1, keepdim=True)
        block = total.log_().add_(largest).clamp_min_(torch.finfo(z.dtype).min)
        lse[start - first : stop - first] = block.view(stop - start, views)
    return lse


def _repulsion(z: Tensor, grad: Tensor, lse: Tensor, first: int, count: int, temperature: float) -> Tensor:
    """sum_b G_ab z_b ``[count, V, D]``, G from scores computed again."""
    n, views, d = z.shape
    result = z.new_empty((count, views, d))
    grad, lse, rows = grad.flatten(), lse.flatten(), z.flatten(0, 1)
    for start, stop in blocks(first, count, n, views):
        scores = score_block(z, start, stop, temperature)
        anchors = slice(start * views, stop * views)
        columns = (scores - lse).exp_().mul_(grad)
        weights = scores.sub_(lse[anchors, None]).exp_().mul_(grad[anchors, None]).add_(columns)
        result[start - first : stop - first] = torch.mm(weights, rows).view(stop - start, views, d)
    return result
