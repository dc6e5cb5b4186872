"""Mini-batch k-means: running centres and the weight each has seen.

Source: Sculley, "Web-scale k-means clustering", WWW 2010.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kmeans_rows import Rows
from ..kmeans_source import Reader, Source
from ..kmeans_steps import assign_chunks
from ..reference.kmeans_ops import unit_rows


def learn(
    x: Tensor | Reader,
    weights: Tensor | None,
    centres: Tensor,
    mass: Tensor,
    *,
    metric: str,
    precision: str | None,
) -> tuple[Tensor, Tensor]:
    """Centres and their mass after one more batch.

    With ``m_k`` the mean and ``b_k`` the weight of the rows nearest to ``c_k``: ``v_k <- v_k + b_k``,
    ``c_k <- c_k + (m_k - c_k) b_k / v_k``.

    Args:
        x: ``[N, D]``. weights: ``[N]``. centres: fp64 ``[K, D]``. mass: fp64 ``[K]``.
    """
    weights = None if weights is None else weights.unsqueeze(0)
    rows = Rows(x, weights, None, metric=metric, precision=precision, device=centres.device)
    sums = rows.assign_and_sum(centres.to(rows.dtype).unsqueeze(0)).sums
    batch = sums[0, :, :, -1].sum(0)
    means, _ = (t[0] for t in torch.ops.clustops.kmeans_means(sums, centres.unsqueeze(0)))
    mass = mass + batch
    moved = centres + (means - centres) * (batch / mass.where(mass > 0, 1.0)).unsqueeze(1)
    if metric == "cosine":
        # Opposite rows may cancel; a centre without a direction keeps the one it had.
        moved = torch.where((moved != 0).any(1, keepdim=True), unit_rows(moved), centres)
    return _reseeded(rows, moved, mass), mass


def nearest(
    x: Tensor | Reader, centres: Tensor, top: int, *, metric: str, precision: str | None
) -> tuple[Tensor, Tensor]:
    """Labels and squared distances ``[N, top]`` of the nearest ``centres``, on their device."""
    centres = unit_rows(centres) if metric == "cosine" else centres
    labels, distances = assign_chunks(
        Source(x, metric=metric, device=centres.device), centres, top, precision
    )
    return labels[0], distances[0]


def mass_of(labels: Tensor, weights: Tensor | None, k: int) -> Tensor:
    """Total weight of the rows with each label, fp64 ``[K]``, the same bits in any order of the rows."""
    ones = labels.new_ones((len(labels), 1), dtype=torch.float64)
    rows = Rows(ones, None if weights is None else weights.unsqueeze(0), None)
    return rows.sum_labels(labels.unsqueeze(0), k)[0, :, :, -1].sum(0)


def _reseeded(rows: Rows, centres: Tensor, mass: Tensor) -> Tensor:
    """``centres``, those that no row was ever given moved to the rows farthest from all others."""
    idle = (mass == 0).nonzero()[:, 0].tolist()
    if not idle:
        return centres
    centres = centres.clone()
    _, distances = rows.assign(centres[mass > 0].to(rows.dtype).unsqueeze(0))
    distances = distances.where(rows.weights > 0, 0.0)
    for cluster in idle:
        farthest = distances.argmax(1, keepdim=True)
        if not bool(distances.gather(1, farthest) > 0):
            break
        row = rows.take(farthest)
        centres[cluster] = row[0, 0]
        distances = torch.minimum(distances, rows.assign(row)[1])
    return centres
