"""DeepCluster: cluster the features of all images, learn to predict the clusters, repeat.

Source: Caron, Bojanowski, Joulin, Douze, "Deep Clustering for Unsupervised Learning of Visual Features", ECCV
2018.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice
from ..distributed import Group
from . import augment, clustering
from .augment import Strength
from .clustering import Clustering, Empty, Init
from .data import ImageData, labelled_subset
from .networks import Encoder, encoder, seeded
from .probe import probe_accuracy
from .training import (
    Metrics,
    Progress,
    Result,
    Run,
    Stateful,
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
        init: of k-means: ``"k-means++"``, ``"random"``, or ``"warm"`` for the last epoch's clusters.
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
    epochs: int = 40
    batch: int = 64
    n_clusters: int = 30
    pca_dim: int = 64
    init: Init = "k-means++"
    kmeans_iterations: int = 15
    empty: Empty = "split"
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
    images = data.train_images
    per_epoch = max(len(images) // config.batch, 1)
    n_drawn, rows = per_epoch * config.batch, shard(config.batch, group)

    def build() -> tuple[Encoder, Clustering]:
        trunk = encoder(config.network, images.shape[1], group=group, sobel=config.sobel)
        return trunk, Clustering(len(images), n_drawn, config.n_clusters, trunk.n_features, group)

    trunk, state = seeded(derive(config.seed, "network"), build)
    trunk.to(config.device)
    state.to(config.device)
    optimizer = _optimizer(trunk, state, config)

    def start_epoch(epoch: int) -> None:
        last = state.labels.clone() if epoch else None
        result, labels = _cluster(trunk, images, last, config, epoch, group, empty=config.empty)
        measured = clustering.measure(result, labels, data.train_labels, last)
        state.metrics = {"epoch": float(epoch + 1), **measured}
        state.labels.copy_(labels)
        state.order.copy_(
            clustering.epoch_order(
                labels,
                n_drawn,
                balance=config.balance,
                published_indices=config.published_indices,
                seed=derive(config.seed, "order"),
                epoch=epoch,
            )
        )
        state.renew_head(generator(config.seed, "head", epoch))

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

    parts: dict[str, Stateful] = {"encoder": trunk, "clustering": state, "optimizer": optimizer}
    steps = config.epochs * per_epoch
    history = fit(step, steps, run, state=parts, evaluate=evaluate, log_every=per_epoch)
    extras = _look_back(data, config, trunk, state, group)
    return Result("deepcluster", history[-1]["accuracy"], history, extras)


def _optimizer(trunk: Encoder, state: Clustering, config: Config) -> torch.optim.Optimizer:
    lasting = weight_groups(nn.ModuleList([trunk, state.norm]), config.weight_decay)
    head = {"params": list(state.head.parameters()), "lr": config.head_lr, "momentum": 0.0}
    return torch.optim.SGD([*lasting, head], config.lr, config.momentum)


def _cluster(
    trunk: Encoder,
    images: Tensor,
    last: Tensor | None,
    config: Config,
    epoch: int,
    group: Group,
    *,
    empty: Empty,
) -> tuple[Any, Tensor]:
    return clustering.cluster(
        clustering.features(trunk, images, config.pca_dim, group),
        config.n_clusters,
        config.init,
        last,
        iterations=config.kmeans_iterations,
        empty=empty,
        seed=derive(config.seed, "k-means", epoch),
        group=group,
    )


def probe_by_layer(trunk: Encoder, data: ImageData, config: Config) -> list[list[float]]:
    """Test accuracies of linear probes: a list for each stage, an entry for each set of labelled images."""

    def pooled(stage: int) -> Callable[[Tensor], Tensor]:
        return lambda x: F.adaptive_avg_pool2d(trunk.stage_outputs(x)[stage], 4).flatten(1)

    truth, seeds = data.train_labels.cpu(), range(config.seed, config.seed + config.probe_seeds)
    subsets = [labelled_subset(truth, config.labels_per_class, seed).to(config.device) for seed in seeds]
    with evaluating(trunk):
        return [
            [probe_accuracy(data, rows, pooled(stage)) for rows in subsets]
            for stage in range(len(trunk.stages))
        ]


def _look_back(
    data: ImageData, config: Config, trunk: Encoder, state: Clustering, group: Group
) -> dict[str, Any]:
    """Probes, features, and cluster sizes: of the last epoch, and finally without and with repair."""

    def final_sizes(empty: Empty) -> Tensor:
        images = data.train_images
        _, labels = _cluster(trunk, images, state.labels, config, config.epochs, group, empty=empty)
        return torch.bincount(labels, minlength=config.n_clusters)

    with evaluating(trunk, state):
        embeddings = in_batches(trunk, data.test_images)
        clusters = in_batches(lambda x: state(trunk(x)).argmax(1), data.test_images)
    return {
        "sizes_before_repair": final_sizes("keep"),
        "sizes_after_repair": final_sizes(config.empty),
        **state.histograms(),
        "probe_by_layer": probe_by_layer(trunk, data, config),
        "embeddings": embeddings,
        "labels": data.test_labels,
        "clusters": clusters,
    }
