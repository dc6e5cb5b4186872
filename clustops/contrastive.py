"""Contrastive losses over classes, pseudo-labels and instances."""

from __future__ import annotations

from torch import Tensor

from . import checks
from .contrastive_rows import (
    check_confidence,
    check_features,
    check_labels,
    check_options,
    check_threshold,
    check_weights,
    class_rows,
    reduce_rows,
)
from .distributed import Group


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
        threshold: samples below it are pulled by their own views only; ``None``: no threshold.
        reweight: False takes 1 for p wherever p is a weight.
        self_weight: "one" or "confidence", see above.
        base_temperature: multiplies the loss by temperature / base_temperature; ``None``: by 1.
        normalize: divide rows by their norms; a zero row stays zero and has a zero gradient.
        weights: ``[N]``, multiply the losses of a sample's rows.
        no_positive: rows where w sums to 0 have loss and gradient 0. "zero" counts them in the mean, "ignore"
            does not, "raise" rejects them (and waits for the device to know).
        reduction: "mean" over rows, "sum", or "none".
        group: process group whose ranks share one batch: each passes its samples, has their rows as anchors and
            those of all ranks as positives and negatives. All ranks must run backward. The mean over ranks of
            a scalar loss, and of its gradients, is that of one process with all samples.

    Returns:
        A scalar; for "none" ``[N, V]`` (``[M]`` for ``[M, D]``). fp32, fp64 for fp64 features. Gradients go
        to ``features`` only, in its dtype.

    Raises:
        ValueError, TypeError: an argument is not as above. Values are checked on the CPU, on a GPU only under
            ``CLUSTOPS_CHECK_VALUES=1``.

    Cost: 6 M^2 D flops, M = N V, with gradient. Autograd keeps the arguments and 4 M bytes; working memory is
    O(M D) and two blocks of scores, max(16 MB, 256 M bytes) each. Sums accumulate in fp32, over classes in fp64.

    >>> angles = torch.deg2rad(torch.tensor([[10.0, 20], [40, 35], [100, 120]]))
    >>> features = torch.stack([angles.cos(), angles.sin()], dim=-1)
    >>> ccssl_loss(features, torch.tensor([0, 0, 1]), torch.tensor([0.97, 0.60, 0.91]))
    tensor(0.7586)

    Source: Yang et al., "Class-Aware Contrastive Semi-Supervised Learning", CVPR 2022; the mean over
    positives is the weighted one of its published code, as is ``self_weight="one"``; its tables used
    "confidence".
    """
    checks.check_choice(self_weight, "self_weight", ("one", "confidence"))
    own_confidence = self_weight == "confidence"
    views = check_features(features, group)
    factor = check_options(temperature, base_temperature, no_positive, reduction)
    weights = check_weights(weights, views)
    options = (temperature, check_threshold(threshold), reweight, own_confidence, normalize)
    rows, weight = class_rows(
        views, check_labels(labels, views), check_confidence(confidence, views), options, group
    )
    loss = reduce_rows(rows, weight, factor, weights, no_positive, reduction, group)
    return loss.reshape(features.shape[:-1]) if reduction == "none" else loss
