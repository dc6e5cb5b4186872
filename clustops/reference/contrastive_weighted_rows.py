"""Contrastive losses of single anchors under any weights between samples, a block of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .contrastive_rows import blocks, extreme_norms, log_partition, score_block, through_norm, unit_rows


def weighted_contrastive_rows(
    features: Tensor, pair_weights: Tensor, first: int, temperature: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of the anchors in samples ``first ... first + A - 1``, against the rows of all samples.

    loss_a = LSE_{b != a} s_ab - z_a.B_a / (temperature W_a),  B_a = sum_b w_ab z_b,  W_a = sum_b w_ab

    Args:
        features: ``[N, V, D]``.
        pair_weights: ``[A, N]``, at least 0: w of each anchor's sample with each sample, ``[i, first + i]``
            between views of one sample.

    Returns:
        loss ``[A, V]``, 0 where W is 0; LSE ``[A, V]``; W ``[A]``, the same for all views; norms ``[2]``, the
        least above 0 (inf: there is none) and the greatest of the given rows. If a feature is not finite, or
        a weight negative or not finite, all losses and both norms are NaN.
    """
    with torch.autocast(features.device.type, enabled=False):
        z = unit_rows(features, normalize)
        n, views, _ = z.shape
        count = pair_weights.shape[0]
        norms = extreme_norms(features, None, z.dtype)
        lse = log_partition(z, first, count, temperature)
        mean, weight = z.new_empty((count, views)), z.new_empty((count,))
        for start, stop in blocks(0, count, n, views):
            given = pair_weights[start:stop]
            norms = torch.where(((given >= 0) & given.isfinite()).all(), norms, torch.nan)
            between, within = _weights(pair_weights, start, stop, first, z.dtype)
            pull = _pull(z, first + start, between, within)
            weight[start:stop] = _total(between, within, views)
            mean[start:stop] = (z[first + start : first + stop] * pull).sum(-1) / weight[start:stop, None]
        loss = torch.where(weight[:, None] > 0, lse - mean / temperature, 0)
        return loss + torch.where(norms[1].isnan(), torch.nan, 0), lse, weight, norms


def weighted_contrastive_rows_backward(
    grad: Tensor,
    features: Tensor,
    pair_weights: Tensor,
    lse: Tensor,
    weight: Tensor,
    first: int,
    temperature: float,
    normalize: bool,
) -> Tensor:
    """Gradient of sum_a grad_a loss_a, over the anchors, with respect to all rows.

    With E_ab = grad_a (exp(s_ab - LSE_a) - w_ab / W_a), an anchor a adds to the rows

        dz_a += sum_b E_ab z_b / temperature,    dz_b += E_ab z_a / temperature

    Args:
        grad: ``[A, V]``, as is ``lse``.
        weight: ``[A]``, W.

    Returns:
        ``[N, V, D]`` in the dtype of ``features``.
    """
    with torch.autocast(features.device.type, enabled=False):
        z = unit_rows(features, normalize)
        n, views, _ = z.shape
        dz, rows = torch.zeros_like(z), z.flatten(0, 1)
        for start, stop in blocks(0, pair_weights.shape[0], n, views):
            anchors = slice(first + start, first + stop)
            between, within = _weights(pair_weights, start, stop, first, z.dtype)
            total = weight[start:stop, None]
            g = torch.where(total > 0, grad[start:stop], 0)
            r = torch.where(total > 0, g / total, 0)[:, :, None]
            share = (r * z[anchors]).sum(1)
            dz -= (between.T @ share)[:, None]
            dz[anchors] -= within[:, None, None] * (share[:, None] - r * z[anchors])
            dz[anchors] -= r * _pull(z, first + start, between, within)
            scores = score_block(z, first + start, first + stop, temperature)
            scores.sub_(lse[start:stop].reshape(-1, 1)).exp_().mul_(g.reshape(-1, 1))
            dz[anchors] += (scores @ rows).view_as(z[anchors])
            dz += (scores.T @ z[anchors].flatten(0, 1)).view_as(z)
        return through_norm(dz / temperature, features, z, normalize)


def _weights(
    pair_weights: Tensor, start: int, stop: int, first: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weights between different samples ``[stop - start, N]``, and within each ``[stop - start]``."""
    between = pair_weights[start:stop].to(dtype, copy=True)
    own = between.diagonal(first + start)
    within = own.clone()
    own.zero_()
    return between, within


def _total(between: Tensor, within: Tensor, views: int) -> Tensor:
    return views * between.sum(1) + (views - 1) * within


def _pull(z: Tensor, first: int, between: Tensor, within: Tensor) -> Tensor:
    """B of the anchors ``[A, V, D]``."""
    own = z.sum(1)
    anchors = slice(first, first + between.shape[0])
    return (between @ own)[:, None] + within[:, None, None] * (own[anchors, None] - z[anchors])
