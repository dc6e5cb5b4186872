"""One epoch of DeepCluster but for its training: features, clusters, the order of the images."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..distributed import Group, all_gather_rows, rank, world_size
from ..kmeans import KMeansResult, cluster_means, kmeans
from ..metrics import cluster_sizes, nmi
from ..preprocess import pca_whiten
from ..sampler import InverseClusterSizeSampler, cluster_members
from .networks import BatchNorm, Encoder
from .training import Metrics, evaluating, in_batches

Empty = Literal["split", "farthest", "random", "keep"]
Init = Literal["k-means++", "random", "warm"]


class Clustering(nn.Module):
    """The clusters that an epoch learns to predict and the classifier that does.

    Attributes:
        labels: ``[N]``: the cluster of each image. order: the images of the epoch. metrics: of the clusters.
    """

    labels: Tensor
    order: Tensor

    def __init__(self, n: int, n_drawn: int, n_clusters: int, n_features: int, group: Group) -> None:
        super().__init__()
        self.register_buffer("labels", torch.zeros(n, dtype=torch.int64))
        self.register_buffer("order", torch.zeros(n_drawn, dtype=torch.int64))
        # Fourteen steps an epoch teach a new classifier something only if its inputs are of one scale.
        self.norm = BatchNorm(n_features, group=group)
        self.head = nn.Linear(n_features, n_clusters)
        self.metrics: Metrics = {}

    def get_extra_state(self) -> Metrics:
        """What a checkpoint holds beside tensors."""
        return self.metrics

    def set_extra_state(self, state: Metrics) -> None:
        """Take it back."""
        self.metrics = dict(state)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``[N, n_clusters]``."""
        logits: Tensor = self.head(self.norm(features))
        return logits

    def renew_head(self, random: torch.Generator) -> None:
        """Weights N(0, 0.01), bias 0."""
        with torch.no_grad():
            weight = torch.randn(self.head.weight.shape, generator=random) * 0.01
            self.head.weight.copy_(weight.to(self.head.weight.device))
            self.head.bias.zero_()

    def histograms(self) -> dict[str, Tensor]:
        """Images in each cluster, and how often each cluster was drawn in the epoch."""
        k = self.head.out_features
        drawn = torch.bincount(self.labels[self.order], minlength=k)
        return {"sizes": torch.bincount(self.labels, minlength=k), "drawn": drawn}


def features(trunk: Encoder, images: Tensor, pca_dim: int, group: Group) -> Tensor:
    """Whitened unit features ``[N, pca_dim]`` of all images; each rank computes a part."""
    own = images.tensor_split(world_size(group))[rank(group)]
    with evaluating(trunk):
        whitened: Tensor = pca_whiten(all_gather_rows(in_batches(trunk, own), group)[0], pca_dim)
    return whitened


def cluster(
    rows: Tensor,
    k: int,
    init: Init,
    last: Tensor | None,
    *,
    iterations: int,
    empty: Empty,
    seed: int,
    group: Group,
) -> tuple[KMeansResult, Tensor]:
    """k-means with the rows sharded over ranks, and the labels of all rows.

    Args:
        last: labels to start from where ``init`` is ``"warm"``: the means of these clusters in the new
            features, as a centroid found in the old ones means nothing there.
    """
    start: Any = init
    if init == "warm":
        start = "k-means++" if last is None else cluster_means(rows, last, k)[0]
    own = rows.tensor_split(world_size(group))[rank(group)]
    result = kmeans(own, k, init=start, max_iter=iterations, empty=empty, seed=seed, group=group)
    return result, all_gather_rows(result.labels, group)[0]


def measure(result: KMeansResult, labels: Tensor, truth: Tensor, last: Tensor | None) -> Metrics:
    """What the log says about an epoch's clusters; ``truth`` is -1 where unknown."""
    sizes = cluster_sizes(result.counts)
    known = truth >= 0
    metrics = {
        "inertia": float(result.inertia),
        "nmi_labels": nmi(labels[known], truth[known]),
        "empty_before": float(result.n_repaired + result.n_empty),
        "empty_after": float(result.n_empty),
        "smallest": float(sizes.minimum),
        "median": sizes.median,
        "largest": float(sizes.maximum),
        "effective": sizes.effective,
    }
    return metrics if last is None else {**metrics, "nmi_previous": nmi(labels, last)}


def epoch_order(
    labels: Tensor, n: int, *, balance: bool, published_indices: bool, seed: int, epoch: int
) -> Tensor:
    """The ``n`` images of an epoch, int64: clusters evenly where ``balance``, else images evenly.

    With ``published_indices``, what the sampler draws addresses the images sorted by cluster.
    """
    sampler = InverseClusterSizeSampler(labels.cpu(), n, power=float(balance), seed=seed)
    sampler.set_epoch(epoch)
    order = sampler.indices(0, n)
    if published_indices:
        members, _ = cluster_members(labels.cpu(), int(labels.max()) + 1)
        order = torch.as_tensor(members)[order].long()
    return order.to(labels.device)
