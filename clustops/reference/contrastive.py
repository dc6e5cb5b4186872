"""The contrastive losses, dense: M x M scores and weights, plain autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_contrastive_loss(
    features: Tensor,
    pair_weights: Tensor,
    *,
    temperature: float = 0.07,
    base_temperature: float | None = None,
    normalize: bool = False,
    weights: Tensor | None = None,
    no_positive: str = "zero",
    reduction: str = "mean",
    group: None = None,
) -> Tensor:
    """loss_a = LSE_{b != a} s_ab - sum_b w_ab s_ab / sum_b w_ab, w_ab = pair_weights_ij, 0 on the diagonal.

    ``group`` is ``None``: one process with the rows of all ranks is what the losses over ranks equal.
    """
    if group is not None:
        raise ValueError(f"group must be None, got {group}; give this one process the rows of all ranks")
    with torch.autocast(features.device.type, enabled=False):
        z = _rows(features, normalize)
        n, views, _ = z.shape
        z = z.flatten(0, 1)
        itself = torch.eye(n * views, dtype=torch.bool, device=z.device)
        w = pair_weights.detach().to(z.dtype)
        w = w.repeat_interleave(views, 0).repeat_interleave(views, 1).masked_fill(itself, 0)
        s = z @ z.T / temperature
        lse = s.masked_fill(itself, torch.finfo(s.dtype).min).logsumexp(1)
        total = w.sum(1)
        mean = (w * s).sum(1) / torch.where(total > 0, total, 1)
        loss = torch.where(total > 0, lse - mean, 0).view(n, views)
        if base_temperature is not None:
            loss = loss * (temperature / base_temperature)
        if weights is not None:
            loss = loss * weights.detach().to(loss.dtype)[:, None]
        loss = loss.view(features.shape[:-1])
        return _reduce(loss, total.view_as(loss) > 0, no_positive, reduction)


def ccssl_loss(
    features: Tensor,
    labels: Tensor,
    confidence: Tensor | None = None,
    *,
    temperature: float = 0.07,
    threshold: float | None = None,
    reweight: bool = True,
    self_weight: str = "one",
    base_temperature: float | None = None,
    normalize: bool = False,
    weights: Tensor | None = None,
    no_positive: str = "zero",
    reduction: str = "mean",
    group: None = None,
) -> Tensor:
    """w_ij = p_i p_j where y_i = y_j and both p >= threshold, w_ii = 1 or p_i^2.

    Source: Yang et al., "Class-Aware Contrastive Semi-Supervised Learning", CVPR 2022, with the mean over
    positives weighted as in its published code.
    """
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    one = torch.ones(labels.shape, dtype=dtype, device=labels.device)
    p = one if confidence is None else confidence.detach()
    in_class = (labels >= 0) & (True if threshold is None else p >= threshold)
    p = p.to(dtype) if reweight else one
    same = (labels[:, None] == labels[None, :]) & in_class[:, None] & in_class[None, :]
    w = torch.where(same, p[:, None] * p[None, :], 0)
    w = w.diagonal_scatter(p.square() if self_weight == "confidence" else one)
    return weighted_contrastive_loss(
        features,
        w,
        temperature=temperature,
        base_temperature=base_temperature,
        normalize=normalize,
        weights=weights,
        no_positive=no_positive,
        reduction=reduction,
        group=group,
    )


def supcon_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.07,
    base_temperature: float | None = None,
    normalize: bool = False,
    weights: Tensor | None = None,
    no_positive: str = "zero",
    reduction: str = "mean",
    group: None = None,
) -> Tensor:
    """CCSSL with confidence 1: w_ij = 1 where y_i = y_j >= 0, w_ii = 1."""
    return ccssl_loss(
        features,
        labels,
        temperature=temperature,
        base_temperature=base_temperature,
        normalize=normalize,
        weights=weights,
        no_positive=no_positive,
        reduction=reduction,
        group=group,
    )


def info_nce_loss(
    features: Tensor,
    *,
    temperature: float = 0.07,
    base_temperature: float | None = None,
    normalize: bool = False,
    weights: Tensor | None = None,
    no_positive: str = "zero",
    reduction: str = "mean",
    group: None = None,
) -> Tensor:
    """CCSSL with a class for each sample: w_ij = 0, w_ii = 1."""
    return ccssl_loss(
        features,
        torch.arange(features.shape[0], device=features.device),
        temperature=temperature,
        base_temperature=base_temperature,
        normalize=normalize,
        weights=weights,
        no_positive=no_positive,
        reduction=reduction,
        group=group,
    )


def pseudo_labels(logits: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The most probable class of softmax(logits / temperature), the lowest of equals, and its probability."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits = logits.detach().to(dtype)
    return logits.argmax(-1), torch.softmax(logits / temperature, -1).amax(-1)


def _rows(features: Tensor, normalize: bool) -> Tensor:
    """``[N, V, D]`` in fp32 or fp64; a zero row has no direction and stays zero."""
    z = features.to(torch.float64 if features.dtype == torch.float64 else torch.float32)
    if z.ndim == 2:
        z = z[:, None]
    if normalize:
        norm = z.norm(dim=-1, keepdim=True)
        z = torch.where(norm > 0, z / torch.where(norm > 0, norm, 1), 0)
    return z


def _reduce(loss: Tensor, has_positive: Tensor, no_positive: str, reduction: str) -> Tensor:
    if no_positive == "raise" and not bool(has_positive.all()):
        raise ValueError("features must be rows with at least one positive each")
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (has_positive.sum().clamp_min(1) if no_positive == "ignore" else loss.numel())
