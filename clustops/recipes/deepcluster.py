"""DeepCluster: cluster the features of all images, learn to predict the clusters, repeat.

Source: Caron, Bojanowski, Joulin, Douze, "Deep Clustering for Unsupervised Learning of Visual Features", ECCV
    2018.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice
from ..distributed import Group, all_gather_rows, rank, world_size
from ..kmeans import KMeansResult, kmeans
from ..metrics import cluster_sizes, nmi
from ..preprocess import pca_whiten
from ..sampler import InverseClusterSizeSampler, cluster_members
from . import augment
from .augment import Strength
from .data import ImageData, labelled_subset
from .networks import BatchNorm, Encoder, encoder, seeded
from .probe import probe_accuracy
from .training import (
    Metrics,
    Progress,
    Result,
    Run,
    StepMetrics,
    derive,
    evaluating,
    fit,
    generator,
    in_batches,
    optimise,
    prepare,
    shard,
    weight_groups,
)


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the demo on digits.

    Attributes:
        sobel: feed fixed edge filters instead of colours, as the paper does with photographs.
        n_clusters: the paper takes about ten times the classes.
        pca_dim: features are reduced to so many dimensions, whitened and brought to unit norm.
        init: of k-means: ``"k-means++"``, ``"random"``, or ``"warm"`` for the last epoch's centroids.
        empty: ``"split"`` repairs empty clusters, ``"keep"`` does not (ablation).
        balance: draw clusters evenly; without, images evenly (ablation).
        published_indices: the indices that the sampler draws address a list of the images in the order of
            their clusters, as in the released code: then draws follow cluster sizes again (ablation).
        head_lr: learning rate of the linear classifier of the clusters, new in each epoch, without momentum.
        view: augmentation of the training images; features are those of the plain images.
        labels_per_class: for the linear probe alone.
        probe_seeds: how many labelled sets the probe of each layer is repeated with.
        probe_every: epochs between probes.
    """

    seed: int = 0
    labels_per_class: int = 4
    network: str = "small"
    sobel: bool = False
    epochs: int = 50
    batch: int = 64
    n_clusters: int = 30
    pca_dim: int = 64
    init: Literal["k-means++", "random", "warm"] = "k-means++"
    kmeans_iterations: int = 15
    empty: Literal["split", "farthest", "random", "keep"] = "split"
    balance: bool = True
    published_indices: bool = False
    lr: float = 0.05
    head_lr: float = 0.3
    momentum: float = 0.9
    weight_decay: float = 1e-5
    view: Strength = augment.DIGITS_CROP
    probe_seeds: int = 3
    probe_every: int = 10
    device: str = "cpu"
    checkpoint_every: int = 100


class _Clustering(nn.Module):
    """The clusters that this epoch learns to predict, and the classifier that does."""

    labels: Tensor
    centroids: Tensor
    order: Tensor

    def __init__(self, n: int, n_drawn: int, config: Config, n_features: int, group: Group) -> None:
        super().__init__()
        self.register_buffer("labels", torch.zeros(n, dtype=torch.int64))
        self.register_buffer("order", torch.zeros(n_drawn, dtype=torch.int64))
        self.register_buffer("centroids", torch.zeros(config.n_clusters, config.pca_dim))
        self.norm = BatchNorm(n_features, group=group)
        self.head = nn.Linear(n_features, config.n_clusters)
        self.metrics: dict[str, float] = {}

    def get_extra_state(self) -> dict[str, float]:
        return self.metrics

    def set_extra_state(self, state: Metrics) -> None:
        self.metrics = dict(state)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``[N, n_clusters]``."""
        logits: Tensor = self.head(self.norm(features))
        return logits

    def renew_head(self, seed: int) -> None:
        """Weights N(0, 0.01), bias 0."""
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            weight = torch.randn(self.head.weight.shape, generator=random) * 0.01
            self.head.weight.copy_(weight.to(self.head.weight.device))
            self.head.bias.zero_()


def features(trunk: Encoder, images: Tensor, pca_dim: int, group: Group) -> Tensor:
    """Whitened unit features ``[N, pca_dim]`` of all images; each rank computes a part."""
    own = images.tensor_split(world_size(group))[rank(group)]
    with evaluating(trunk):
        whitened: Tensor = pca_whiten(all_gather_rows(in_batches(trunk, own), group)[0], pca_dim)
    return whitened


def cluster(
    rows: Tensor, config: Config, init: Any, epoch: int, group: Group, *, empty: str
) -> tuple[KMeansResult, Tensor]:
    """k-means with the rows sharded over ranks, and the labels of all rows."""
    result = kmeans(
        rows.tensor_split(world_size(group))[rank(group)],
        config.n_clusters,
        init=init,
        max_iter=config.kmeans_iterations,
        empty=empty,
        seed=derive(config.seed, "k-means", epoch),
        group=group,
    )
    return result, all_gather_rows(result.labels, group)[0]


def epoch_order(labels: Tensor, config: Config, epoch: int, n: int) -> Tensor:
    """The ``n`` images of an epoch, int64."""
    sampler = InverseClusterSizeSampler(
        labels.cpu(), n, power=float(config.balance), seed=derive(config.seed, "order")
    )
    sampler.set_epoch(epoch)
    order = sampler.indices(0, n)
    if config.published_indices:
        members = torch.as_tensor(cluster_members(labels.cpu(), config.n_clusters)[0])
        order = members[order].long()
    return order.to(labels.device)


def probe_by_layer(trunk: Encoder, data: ImageData, config: Config) -> list[list[float]]:
    """Test accuracies of linear probes: a list for each stage, an entry for each set of labelled images."""

    def pooled(stage: int) -> Callable[[Tensor], Tensor]:
        return lambda x: F.adaptive_avg_pool2d(trunk.stage_outputs(x)[stage], 4).flatten(1)

    truth = data.train_labels.cpu()
    subsets = [
        labelled_subset(truth, config.labels_per_class, config.seed + i).to(config.device)
        for i in range(config.probe_seeds)
    ]
    with evaluating(trunk):
        return [
            [probe_accuracy(data, rows, pooled(stage)) for rows in subsets]
            for stage in range(len(trunk.stages))
        ]


def train(
    data: ImageData,
    config: Config,
    *,
    out: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    group: Group = None,
) -> Result:
    """Test accuracy of a linear probe on the features that DeepCluster learns without labels."""
    check_choice(config.init, "init", ("k-means++", "random", "warm"))
    run = Run(config, out, resume, progress, group)
    data, labelled = prepare(data, config.labels_per_class, config.seed, config.device)
    images, channels = data.train_images, data.train_images.shape[1]
    trunk = seeded(
        derive(config.seed, "encoder"),
        lambda: encoder(config.network, channels, group=group, sobel=config.sobel),
    ).to(config.device)
    per_epoch = max(len(images) // config.batch, 1)
    n_drawn = per_epoch * config.batch
    state = seeded(0, lambda: _Clustering(len(images), n_drawn, config, trunk.n_features, group)).to(
        config.device
    )
    head = {"params": list(state.head.parameters()), "lr": config.head_lr, "momentum": 0.0}
    optimizer = torch.optim.SGD(
        [*weight_groups(nn.ModuleList([trunk, state.norm]), config.weight_decay), head],
        config.lr,
        config.momentum,
    )
    rows = shard(config.batch, group)
    known = data.train_labels >= 0

    def start_epoch(epoch: int) -> None:
        whitened = features(trunk, images, config.pca_dim, group)
        init = config.init if config.init != "warm" else (state.centroids if epoch else "k-means++")
        result, labels = cluster(whitened, config, init, epoch, group, empty=config.empty)
        sizes = cluster_sizes(result.counts)
        state.metrics = {
            "epoch": float(epoch + 1),
            "inertia": float(result.inertia),
            "nmi_labels": nmi(labels[known], data.train_labels[known]),
            "empty_before": float(result.n_repaired + result.n_empty),
            "empty_after": float(result.n_empty),
            "smallest": float(sizes.minimum),
            "median": sizes.median,
            "largest": float(sizes.maximum),
            "effective": sizes.effective,
        }
        if epoch:
            state.metrics["nmi_previous"] = nmi(labels, state.labels)
        state.labels.copy_(labels)
        state.centroids.copy_(result.centroids)
        state.order.copy_(epoch_order(labels, config, epoch, len(state.order)))
        state.renew_head(derive(config.seed, "head", epoch))

    def step(k: int) -> StepMetrics:
        epoch, batch = divmod(k, per_epoch)
        if batch == 0:
            start_epoch(epoch)
        index = state.order[batch * config.batch :][: config.batch][rows]
        random = generator(config.seed, "views", k)
        views = augment.augment(images[index], config.view, random, rows=rows, total=config.batch)
        loss = F.cross_entropy(state(trunk(views)), state.labels[index])
        optimise(optimizer, loss, None, group)
        return {"loss": loss.detach(), **state.metrics}

    def evaluate(done: int) -> Metrics:
        epoch = done // per_epoch
        if epoch % config.probe_every and epoch != config.epochs:
            return {}
        with evaluating(trunk):
            return {"accuracy": probe_accuracy(data, labelled, trunk)}

    history = fit(
        step,
        config.epochs * per_epoch,
        run,
        state={"encoder": trunk, "clustering": state, "optimizer": optimizer},
        evaluate=evaluate,
        log_every=per_epoch,
    )
    return Result(
        "deepcluster", history[-1]["accuracy"], history, _look_back(data, config, trunk, state, group)
    )


def _look_back(
    data: ImageData, config: Config, trunk: Encoder, state: _Clustering, group: Group
) -> dict[str, Any]:
    """Histograms of the last epoch and of the final features clustered without and with repair, probes,
    features.
    """

    def histogram(labels: Tensor) -> Tensor:
        return torch.bincount(labels, minlength=config.n_clusters)

    whitened = features(trunk, data.train_images, config.pca_dim, group)
    init = config.init if config.init != "warm" else state.centroids
    kept, repaired = (
        cluster(whitened, config, init, config.epochs, group, empty=empty)[1]
        for empty in ("keep", config.empty)
    )
    with evaluating(trunk, state):
        embeddings = in_batches(trunk, data.test_images)
        clusters = in_batches(lambda x: state(trunk(x)).argmax(1), data.test_images)
    return {
        "sizes_before_repair": histogram(kept),
        "sizes_after_repair": histogram(repaired),
        "sizes": histogram(state.labels),
        "drawn": histogram(state.labels[state.order]),
        "probe_by_layer": probe_by_layer(trunk, data, config),
        "embeddings": embeddings,
        "labels": data.test_labels,
        "clusters": clusters,
    }
