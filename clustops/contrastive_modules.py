"""The contrastive losses as modules, for code that builds its loss from a configuration."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .contrastive import ccssl_loss, info_nce_loss, supcon_loss
from .distributed import Group


class _Loss(nn.Module):
    """Keeps the keyword arguments of a loss."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        """The options, as printed in ``repr``."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class CCSSLLoss(_Loss):
    """:func:`clustops.ccssl_loss` with its options kept.

    >>> import torch
    >>> loss = CCSSLLoss(temperature=0.1, threshold=0.9, normalize=True)
    >>> loss(torch.ones(2, 2, 3), torch.tensor([0, 1]), torch.tensor([0.95, 0.5]))  # log 3
    tensor(1.0986)
    """

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        threshold: float | None = None,
        reweight: bool = True,
        self_weight: str = "one",
        base_temperature: float | None = None,
        normalize: bool = False,
        no_positive: str = "zero",
        reduction: str = "mean",
        group: Group = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            threshold=threshold,
            reweight=reweight,
            self_weight=self_weight,
            base_temperature=base_temperature,
            normalize=normalize,
            no_positive=no_positive,
            reduction=reduction,
            group=group,
        )

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        confidence: Tensor | None = None,
        *,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of ``features`` ``[N, V, D]``; arguments as in :func:`clustops.ccssl_loss`."""
        return ccssl_loss(features, labels, confidence, weights=weights, **self.options)


class SupConLoss(_Loss):
    """:func:`clustops.supcon_loss` with its options kept."""

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        base_temperature: float | None = None,
        normalize: bool = False,
        no_positive: str = "zero",
        reduction: str = "mean",
        group: Group = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            base_temperature=base_temperature,
            normalize=normalize,
            no_positive=no_positive,
            reduction=reduction,
            group=group,
        )

    def forward(self, features: Tensor, labels: Tensor, *, weights: Tensor | None = None) -> Tensor:
        """The loss of ``features`` ``[N, V, D]``; arguments as in :func:`clustops.supcon_loss`."""
        return supcon_loss(features, labels, weights=weights, **self.options)


class InfoNCELoss(_Loss):
    """:func:`clustops.info_nce_loss` with its options kept."""

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        base_temperature: float | None = None,
        normalize: bool = False,
        no_positive: str = "zero",
        reduction: str = "mean",
        group: Group = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            base_temperature=base_temperature,
            normalize=normalize,
            no_positive=no_positive,
            reduction=reduction,
            group=group,
        )

    def forward(self, features: Tensor, *, weights: Tensor | None = None) -> Tensor:
        """The loss of ``features`` ``[N, V, D]``; arguments as in :func:`clustops.info_nce_loss`."""
        return info_nce_loss(features, weights=weights, **self.options)
