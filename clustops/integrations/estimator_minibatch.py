"""Mini-batch k-means: running centres and the weight each has seen.

Source: Sculley, "Web-scale k-means clustering", WWW 2010.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kmeans import cluster_means, kmeans_assign
from ..reference.kmeans_ops import unit_rows


def learn(
    rows: Tensor, weights: Tensor | None, centres: Tensor, mass: Tensor, *, metric: str, precision: str | None
) -> tuple[Tensor, Tensor]:
    """Centres and their mass after one more batch.

    With ``m_k`` the mean and ``b_k`` the weight of the rows nearest to ``c_k``: ``v_k <- v_k + b_k``,
    ``c_k <- c_k + (m_k - c_k) b_k / v_k``.

    Args:
        rows: ``[N, D]``. weights: ``[N]``. centres: fp64 ``[K, D]``. mass: fp64 ``[K]``.
    """
    labels, _ = kmeans_assign(rows, centres, metric=metric, precision=precision)
    rows = unit_rows(rows.double()) if metric == "cosine" else rows.double()
    means, _ = cluster_means(rows, labels, len(centres), weights=weights)
    batch = mass_of(labels, weights, len(centres))
    mass = mass + batch
    moved = centres + (means - centres) * (batch / mass.where(mass > 0, 1.0)).unsqueeze(1)
    if metric == "cosine":
        # Opposite rows may cancel; a centre without a direction keeps the one it had.
        moved = torch.where((moved != 0).any(1, keepdim=True), unit_rows(moved), centres)
    return _reseeded(rows, weights, moved, mass), mass


def mass_of(labels: Tensor, weights: Tensor | None, k: int) -> Tensor:
    """Total weight of the rows with each label, fp64 ``[K]``, the same bits in any order of the rows."""
    if weights is None:
        weights = torch.ones(labels.shape)
    means, counts = cluster_means(weights.to(labels.device, torch.float64).unsqueeze(1), labels, k)
    total: Tensor = means[:, 0] * counts
    return total


def _reseeded(rows: Tensor, weights: Tensor | None, centres: Tensor, mass: Tensor) -> Tensor:
    """``centres``, those that no row was ever given moved to the rows farthest from all others."""
    idle = (mass == 0).nonzero()[:, 0].tolist()
    if not idle:
        return centres
    centres = centres.clone()
    _, distances = kmeans_assign(rows, centres[mass > 0])
    distances = distances if weights is None else distances.where(weights > 0, 0.0)
    for cluster in idle:
        farthest = distances.argmax()
        if not bool(distances[farthest] > 0):
            break
        centres[cluster] = rows[farthest]
        distances = torch.minimum(distances, (rows - rows[farthest]).square().sum(1))
    return centres
