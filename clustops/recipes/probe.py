"""Linear classifiers on frozen features."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import ImageData
from .training import in_batches


def linear_probe(
    features: Tensor, labels: Tensor, n_classes: int, *, penalty: float
) -> tuple[Tensor, Tensor]:
    """Weights ``[D, C]`` and bias ``[C]`` of multinomial logistic regression, the same bits on every run.

    Minimises ``sum_n CE(x_n W + b, y_n) + penalty / 2 |W|^2``, convex, in fp64 by L-BFGS.

    Args:
        features: ``[N, D]``. labels: ``[N]`` int64 below ``n_classes``. penalty: above 0.
    """
    x = features.detach().double()
    weight = torch.zeros(x.shape[1], n_classes, dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(n_classes, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=300, history_size=10, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (
            F.cross_entropy(x @ weight + bias, labels, reduction="sum") + penalty / 2 * weight.square().sum()
        )
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def probe_accuracy(
    data: ImageData, labelled: Tensor, features: Callable[[Tensor], Tensor], *, penalty: float = 1.0
) -> float:
    """Share of the test images that a linear classifier of the labelled images gets right.

    Args:
        labelled: rows of the training part. features: images to ``[N, D]``, a network in evaluation mode.
            Rows are brought to unit norm, then centred and scaled as a whole.
        penalty: see ``linear_probe``.
    """

    def unit(x: Tensor) -> Tensor:
        return F.normalize(features(x), dim=1)

    known = in_batches(unit, data.train_images[labelled])
    mean = known.mean(0)
    scale = (known - mean).square().mean().sqrt().clamp_min(1e-12)
    labels = data.train_labels[labelled]
    weight, bias = linear_probe((known - mean) / scale, labels, data.n_classes, penalty=penalty)
    guesses = in_batches(
        lambda x: (((unit(x) - mean) / scale).double() @ weight + bias).argmax(1), data.test_images
    )
    return float((guesses == data.test_labels).double().mean())
