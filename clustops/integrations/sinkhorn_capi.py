"""Sinkhorn and online clustering under the names that CAPI calls."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_positive
from ..distributed import Group, default_group
from ..sinkhorn_loss import soft_cross_entropy
from .sinkhorn import assign


def sinkhorn_knopp(M: Tensor, n_iterations: int, eps: float = 1e-8, *, group: Group = None) -> Tensor:
    """Assignments of logits ``M [..., n, p]`` that have been divided by the temperature.

    Args:
        M: n rows, p prototypes; leading dimensions, as positions in an image, are problems of their own.
        n_iterations: 0 is a softmax.
        eps: has no effect: no sum here can be 0.
        group: ``None`` is all ranks of torch.distributed, where that is initialised.

    Returns:
        ``[..., n, p]`` in the dtype of ``M``, without gradient; rows sum to 1. ``M`` is not written (the
        published code leaves its maxima taken off).

    Raises:
        ValueError, TypeError: an argument is out of range, or has a wrong shape or dtype.

    Cost: that of :func:`clustops.sinkhorn`; all positions in one sum over ranks for each iteration, plus one
    maximum. More prototypes than rows raise no warning here.

    >>> import torch
    >>> sinkhorn_knopp(torch.tensor([[30.0, 0.0], [30.0, 30.0]]), 3).round()
    tensor([[1., 0.],
            [0., 1.]])

    Source: Darcet et al., "Cluster and predict latent patches for improved masked image modeling", TMLR 2025.
    """
    group = default_group() if group is None else group
    return assign(M, "M", 1.0, n_iterations, group, keep_dtype=True, warn=False)[0]


class OnlineClustering(nn.Module):
    """CAPI's teacher head: assignments to prototypes, and the loss that the prototypes learn from.

    The loss is the cross-entropy of ``softmax(logits / pred_temp)`` against the assignments, with
    ``logits = layer(x / |x|)`` and assignments of epsilon ``target_temp``. Has the ``state_dict`` of CAPI's.

    Args:
        in_dim, out_dim: features, prototypes.
        bias: whether the layer has one.
        n_sk_iter: iterations of Sinkhorn.
        target_temp, pred_temp: above 0.
        positionwise_sk: whether leading dimensions of ``x`` are problems of their own.
        group: ``None`` is all ranks of torch.distributed, where that is initialised.

    >>> import torch
    >>> head = OnlineClustering(4, 3, bias=False, n_sk_iter=3, target_temp=0.06, pred_temp=0.12)
    >>> assignments, loss = head(torch.ones(5, 8, 4))  # 5 positions, 8 images
    >>> assignments.shape, loss.shape
    (torch.Size([5, 8, 3]), torch.Size([]))

    Source: Darcet et al., "Cluster and predict latent patches for improved masked image modeling", TMLR 2025.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        bias: bool,
        n_sk_iter: int,
        target_temp: float,
        pred_temp: float,
        positionwise_sk: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__()
        check_positive(target_temp, "target_temp", "0.06 is usual")
        check_positive(pred_temp, "pred_temp", "0.12 is usual")
        self.n_sk_iter, self.target_temp, self.pred_temp = n_sk_iter, target_temp, pred_temp
        self.positionwise_sk, self.group = positionwise_sk, group
        self.layer = nn.Linear(in_dim, out_dim, bias=bias)
        nn.init.normal_(self.layer.weight)
        if bias:
            nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Assignments ``[..., n, out_dim]`` of ``x [..., n, in_dim]`` in the logits' dtype, and the loss."""
        logits: Tensor = self.layer(F.normalize(x, dim=-1, eps=1e-7))
        scores = logits if self.positionwise_sk else logits.flatten(0, -2)
        group = default_group() if self.group is None else self.group
        assignments, potentials = assign(
            scores, "logits", self.target_temp, self.n_sk_iter, group, keep_dtype=True, warn=False
        )
        loss = soft_cross_entropy(
            scores,
            scores.detach(),
            potentials.view(*scores.shape[:-2], -1),
            temperature=self.pred_temp,
            target_temperature=self.target_temp,
        )
        return assignments.view(logits.shape), loss
