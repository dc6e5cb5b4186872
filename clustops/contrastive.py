"""Contrastive losses over classes, pseudo-labels and instances."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .contrastive_rows import (
    Options,
    check_confidence,
    check_features,
    check_labels,
    check_reduction,
    check_threshold,
    check_weights,
    class_loss,
)
from .distributed import Group, errors_reach_all_ranks


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
    group: Group = None,
) -> Tensor:
    """Class-aware contrastive loss: pseudo-labels pull in proportion to confidence, views always do.

    With rows a = (sample i, view), s_ab = z_a.z_b / temperature, p = confidence, y = labels:

        loss_a = log sum_{b != a} exp s_ab - sum_b w_ab s_ab / sum_b w_ab
        w_ab   = 1                    b is another view of i (``self_weight="confidence"``: p_i^2)
               = p_i p_j              y_i = y_j >= 0 and p_i, p_j >= threshold (``reweight=False``: 1)
               = 0                    otherwise

    Args:
        features: ``[N, V, D]``, N samples in V views, or ``[M, D]``; rows of norm 1, or ``normalize=True``.
        labels: ``[N]`` integers; -1 for a sample that only its own views pull.
        confidence: ``[N]`` in [0, 1]; ``None`` means 1.
        temperature: above 0.
        threshold: at least 0; samples below it are pulled by their own views only; ``None``: no threshold.
        reweight: False takes 1 for p wherever p is a weight.
        self_weight: "one" or "confidence", see above.
        base_temperature: multiplies the loss by temperature / base_temperature; ``None``: by 1.
        normalize: divide rows by their norms; a zero row stays zero and has a zero gradient.
        weights: ``[N]``, at least 0, multiply the losses of a sample's rows.
        no_positive: rows where w sums to 0 have loss and gradient 0. "zero" counts them in the mean, "ignore"
            does not, "raise" rejects them (and waits for the device to know).
        reduction: "mean" over rows, "sum", or "none".
        group: process group whose ranks share one batch: each passes its samples (any number, or none), has
            their rows as anchors and those of all ranks as positives and negatives. All ranks must run
            backward. The mean over ranks of a scalar loss, and of its gradients, is that of one process with
            all samples, as DistributedDataParallel wants it. "none" gives this rank's rows, unscaled.

    Returns:
        A scalar; for "none" ``[N, V]`` (``[M]`` for ``[M, D]``). fp32, fp64 for fp64 features. Gradients go
        to ``features`` only, in its dtype.

    Raises:
        ValueError, TypeError: an argument is not as above. Values are checked on the CPU, on a GPU only under
            ``CLUSTOPS_CHECK_VALUES=1``.
        ClustopsWarning: once a process, where values are checked and rows are not of norm 1 within 10 %.

    Cost: 6 M^2 D flops, M = N V, with gradient, 4 on a CPU. Autograd keeps the arguments and 4 M bytes.
    Working memory is 8 M (max(D, 32) + 8) bytes and 4 MB a thread on a CPU, O(M D) on a GPU; without kernels
    O(M D) and two blocks of scores, max(16 MB, 256 M bytes) each. Sums accumulate in fp32, over classes in
    fp64. There is no second derivative.

    >>> angles = torch.deg2rad(torch.tensor([[10.0, 20], [40, 35], [100, 120]]))
    >>> features = torch.stack([angles.cos(), angles.sin()], dim=-1)
    >>> ccssl_loss(features, torch.tensor([0, 0, 1]), torch.tensor([0.97, 0.60, 0.91]))
    tensor(0.7586)

    Source: Yang et al., "Class-Aware Contrastive Semi-Supervised Learning", CVPR 2022; the mean over
    positives is the weighted one of its published code, as is ``self_weight="one"``; its tables used
    "confidence".
    """
    with errors_reach_all_ranks(group, features):
        checks.check_choice(self_weight, "self_weight", ("one", "confidence"))
        views = check_features(features, group)
        temperature, how = check_reduction(temperature, base_temperature, no_positive, reduction)
        options = Options(
            temperature, check_threshold(threshold), reweight, self_weight == "confidence", normalize
        )
        labels = check_labels(labels, views)
        confidence = check_confidence(confidence, views)
        weights = check_weights(weights, views)
    loss = class_loss(views, labels, confidence, weights, options, how, group)
    return loss.reshape(features.shape[:-1]) if reduction == "none" else loss


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
    group: Group = None,
) -> Tensor:
    """Supervised contrastive loss: all rows of a label pull each other alike.

    :func:`ccssl_loss` with confidence 1: P(a) are the other rows of the label of a,

        loss_a = log sum_{b != a} exp s_ab - mean_{b in P(a)} s_ab

    Args:
        features: ``[N, V, D]``, N samples in V views, or ``[M, D]``; rows of norm 1, or ``normalize=True``.
        labels: ``[N]`` integers; -1 for a sample that only its own views pull.
        temperature, base_temperature, normalize, weights, no_positive, reduction, group: as in
            :func:`ccssl_loss`.

    Returns:
        As :func:`ccssl_loss`, which also states errors, cost and memory.

    >>> supcon_loss(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]), temperature=1.0)  # log(e + 2) - 1
    tensor(0.5514)

    Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, L_out.
    """
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
    group: Group = None,
) -> Tensor:
    """Instance-wise contrastive loss (InfoNCE, NT-Xent of SimCLR): only views of one sample pull.

    :func:`ccssl_loss` with a class for each sample:

        loss_a = log sum_{b != a} exp s_ab - mean over the other views b of the sample of a, of s_ab

    Args:
        features: ``[N, V, D]``, N samples in V views; rows of norm 1, or ``normalize=True``.
        temperature, base_temperature, normalize, weights, no_positive, reduction, group: as in
            :func:`ccssl_loss`.

    Returns:
        As :func:`ccssl_loss`, which also states errors, cost and memory.

    >>> info_nce_loss(torch.eye(2)[:, None].repeat(1, 2, 1), temperature=1.0)  # log(e + 2) - 1
    tensor(0.5514)

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020.
    """
    with errors_reach_all_ranks(group, features):
        if isinstance(features, Tensor) and features.ndim == 2:
            checks.reject(
                "features",
                "[N, V, D] (samples, views, features)",
                checks.shape_of(features),
                "stack the views: torch.stack([view_1, view_2], dim=1)",
            )
        views = check_features(features, group)
        temperature, how = check_reduction(temperature, base_temperature, no_positive, reduction)
        weights = check_weights(weights, views)
    options = Options(temperature, normalize=normalize)
    return class_loss(views, None, None, weights, options, how, group)


def pseudo_labels(logits: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The most probable class and its probability, without gradient.

    p = softmax(logits / temperature), labels = argmax p, confidence = max p.

    Args:
        logits: ``[..., K]``, K at least 1.
        temperature: above 0; below 1 sharpens.

    Returns:
        labels ``[...]`` int64, the lowest of equals; confidence ``[...]`` in (0, 1], fp32 (fp64 for fp64).

    Raises:
        ValueError, TypeError: an argument is not as above, or ``logits`` is not finite (looked at on the CPU,
            on a GPU only under ``CLUSTOPS_CHECK_VALUES=1``).

    >>> pseudo_labels(torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 0.0]]))
    (tensor([2, 0]), tensor([0.8438, 0.4683]))

    Source: Lee, "Pseudo-Label", ICML workshop 2013.
    """
    checks.check_floating(logits, "logits")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        checks.reject(
            "logits", "[..., K] with K >= 1", checks.shape_of(logits), "pass a score for each class"
        )
    checks.check_finite(logits, "logits")
    checks.check_positive(temperature, "temperature", "1.0 leaves the softmax as it is")
    logits = logits.detach().to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    # Subtracted before the division, a small temperature cannot overflow.
    below = (logits - logits.amax(-1, keepdim=True)) / temperature
    return logits.argmax(-1), below.exp().sum(-1).reciprocal()
