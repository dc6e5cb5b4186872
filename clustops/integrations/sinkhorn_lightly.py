"""Sinkhorn and the swapped-prediction loss with the signatures of ``lightly.loss.swav_loss``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..checks import check_positive, reject
from ..distributed import default_group
from ..sinkhorn_loss import swapped_prediction_loss
from .sinkhorn import assign


def sinkhorn(
    out: Tensor, iterations: int = 3, epsilon: float = 0.05, gather_distributed: bool = False
) -> Tensor:
    """Assignments ``[B, K]`` of scores ``out [B, K]``, in their dtype, without gradient; rows sum to 1.

    Args:
        out, iterations, epsilon: scores, ``n_iters`` and ``epsilon`` of :func:`clustops.sinkhorn`.
        gather_distributed: whether the ranks of torch.distributed, where it is initialised, share one
            assignment.

    Raises:
        ValueError, TypeError: an argument is out of range, or has a wrong shape or dtype.

    Cost: that of :func:`clustops.sinkhorn`.

    >>> scores = torch.tensor([[0.9, 0.8], [0.9, 0.1], [0.9, 0.3], [0.9, 0.5]])
    >>> sinkhorn(scores, iterations=100).mean(0)
    tensor([0.5000, 0.5000])

    Source: Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments",
    NeurIPS 2020.
    """
    group = default_group() if gather_distributed else None
    return assign(out, "out", epsilon, iterations, group, keep_dtype=True)[0]


class SwaVLoss(nn.Module):
    """The loss of SwAV from lists of scores, which are copied into one tensor.

    :func:`clustops.swapped_prediction_loss` takes that tensor, where there is one, without a copy.

    Args:
        temperature: of the predictions.
        sinkhorn_iterations, sinkhorn_epsilon: of the assignments.
        sinkhorn_gather_distributed: whether the ranks of torch.distributed, where it is initialised, share
            one assignment. The mean of the loss over ranks is then that of the joint batch.

    >>> SwaVLoss()([torch.eye(4), torch.eye(4)], [torch.eye(4)])
    tensor(0.0001)
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        sinkhorn_epsilon: float = 0.05,
        sinkhorn_gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        check_positive(temperature, "temperature", "0.1 is usual")
        check_positive(sinkhorn_epsilon, "sinkhorn_epsilon", "0.05 is usual")
        self.temperature = temperature
        self.sinkhorn_iterations = sinkhorn_iterations
        self.sinkhorn_epsilon = sinkhorn_epsilon
        self.sinkhorn_gather_distributed = sinkhorn_gather_distributed

    def forward(
        self,
        high_resolution_outputs: Sequence[Tensor],
        low_resolution_outputs: Sequence[Tensor],
        queue_outputs: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The mean over pairs of views of samples, a number.

        Args:
            high_resolution_outputs: scores ``[B, K]`` of the views that give assignments, one or more.
            low_resolution_outputs: those of other views, possibly none.
            queue_outputs: scores ``[N, K]`` of the queue of each view that gives assignments.
        """
        n = len(high_resolution_outputs)
        if n == 0:
            cure = "pass the views that give assignments"
            reject("high_resolution_outputs", "one view or more", "none", cure)
        return swapped_prediction_loss(
            torch.stack([*high_resolution_outputs, *low_resolution_outputs]),
            temperature=self.temperature,
            epsilon=self.sinkhorn_epsilon,
            n_iters=self.sinkhorn_iterations,
            assign_views=range(n),
            queue_scores=None if queue_outputs is None else torch.stack([*queue_outputs]),
            group=default_group() if self.sinkhorn_gather_distributed else None,
        )
