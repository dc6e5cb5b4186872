"""DeepCluster-v2: several spherical clusterings of a memory bank, their centroids as prototypes.

Source: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS
2020, section 4 and appendix.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import Group, all_gather_rows, rank, world_size
from ..kmeans import kmeans
from . import augment, clustering
from .augment import Strength
from .data import ImageData
from .networks import PrototypeNet, encoder, seeded
from .probe import probe_accuracy
from .prototypes import DIGITS_VIEWS, embed_views
from .training import (
    Metrics,
    Progress,
    Result,
    Run,
    Stateful,
    StepMetrics,
    batch_indices,
    cosine,
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
    """Settings; the defaults are for digits.

    Attributes:
        views: augmentation of each view of an image; the first two are the global ones, which fill the bank.
        heads: clusterings, each from another start. n_clusters: of each of them.
        temperature: of the softmax over cosines to the centroids.
    """

    seed: int = 0
    labels_per_class: int = 4
    network: str = "small"
    hidden: int = 128
    dim: int = 64
    views: tuple[Strength, ...] = DIGITS_VIEWS
    epochs: int = 40
    batch: int = 128
    heads: int = 3
    n_clusters: int = 30
    kmeans_iterations: int = 10
    temperature: float = 0.1
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    probe_every: int = 10
    device: str = "cpu"
    checkpoint_every: int = 100


class _Bank(nn.Module):
    """The last embedding of each image, and its cluster and the centroids in each clustering."""

    rows: Tensor
    labels: Tensor
    centroids: Tensor

    def __init__(self, n: int, config: Config) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(n, config.dim))
        self.register_buffer("labels", torch.zeros(config.heads, n, dtype=torch.int64))
        self.register_buffer("centroids", torch.zeros(config.heads, config.n_clusters, config.dim))
        self.metrics: Metrics = {}

    def get_extra_state(self) -> Metrics:
        return self.metrics

    def set_extra_state(self, state: Metrics) -> None:
        self.metrics = dict(state)

    def recluster(self, config: Config, epoch: int, truth: Tensor, group: Group) -> None:
        """Cluster the bank anew, once for each head."""
        last = self.labels[0].clone() if epoch else None
        own = self.rows.tensor_split(world_size(group))[rank(group)]
        for head in range(config.heads):
            result = kmeans(
                own,
                config.n_clusters,
                metric="cosine",
                max_iter=config.kmeans_iterations,
                seed=derive(config.seed, f"head {head}", epoch),
                group=group,
            )
            self.labels[head] = all_gather_rows(result.labels, group)[0]
            self.centroids[head] = result.centroids
            if head == 0:
                measured = clustering.measure(result, self.labels[0], truth, last)
                self.metrics = {"epoch": float(epoch + 1), **measured}


def train(
    data: ImageData,
    config: Config,
    *,
    out: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    group: Group = None,
) -> Result:
    """Test accuracy of a linear probe on the features that DeepCluster-v2 learns without labels.

    Each view of an image predicts the image's cluster in each clustering: cross-entropy of the cosines to the
    centroids over the temperature.
    """
    run = Run(config, out, resume, progress, group)
    data, labelled = prepare(data, config.labels_per_class, config.seed, config.device)
    images = data.train_images
    per_epoch, rows = max(len(images) // config.batch, 1), shard(config.batch, group)
    steps = config.epochs * per_epoch

    def build() -> PrototypeNet:
        trunk = encoder(config.network, images.shape[1], group=group)
        return PrototypeNet(trunk, 1, hidden=config.hidden, dim=config.dim, group=group)

    model = seeded(derive(config.seed, "network"), build).to(config.device)
    model.prototypes.requires_grad_(False)
    bank = _Bank(len(images), config).to(config.device)
    optimizer = torch.optim.SGD(weight_groups(model, config.weight_decay), config.lr, config.momentum)

    def step(k: int) -> StepMetrics:
        if k == 0:
            with evaluating(model):
                bank.rows.copy_(in_batches(model.embed, images))
        if k % per_epoch == 0:
            bank.recluster(config, k // per_epoch, data.train_labels, group)
        index = batch_indices(len(images), config.batch, seed=config.seed, stream="images", step=k)[rows]
        index = index.to(images.device)
        random = generator(config.seed, "views", k)
        views = augment.multi_crop(images[index], config.views, random, rows=rows, total=config.batch)
        embeddings = embed_views(model, views)
        loss = _loss(embeddings, bank.centroids, bank.labels[:, index], config.temperature)
        optimise(optimizer, loss, cosine(k, steps, config.lr, 0.0), group)
        with torch.no_grad():
            seen = embeddings.view(len(views), len(index), -1)[:2].mean(0)
            bank.rows[all_gather_rows(index, group)[0]] = all_gather_rows(F.normalize(seen, dim=1), group)[0]
        return {"loss": loss.detach(), **bank.metrics}

    def evaluate(done: int) -> Metrics:
        epoch = done // per_epoch
        if epoch % config.probe_every and epoch != config.epochs:
            return {}
        with evaluating(model):
            return {"accuracy": probe_accuracy(data, labelled, model.encoder)}

    parts: dict[str, Stateful] = {"model": model, "bank": bank, "optimizer": optimizer}
    history = fit(step, steps, run, state=parts, evaluate=evaluate, log_every=per_epoch)
    with evaluating(model):
        embeddings = in_batches(model.embed, data.test_images)
    extras = {"embeddings": embeddings, "labels": data.test_labels}
    extras["clusters"] = (embeddings @ bank.centroids[0].T).argmax(1)
    extras["sizes"] = torch.bincount(bank.labels[0], minlength=config.n_clusters)
    return Result("deepcluster-v2", history[-1]["accuracy"], history, extras)


def _loss(embeddings: Tensor, centroids: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Mean over heads, views and images.

    Args:
        embeddings: ``[V N, D]``, view by view. centroids: ``[H, K, D]``. labels: ``[H, N]``.
    """
    logits = torch.einsum("nd,hkd->hnk", embeddings, centroids) / temperature
    targets = labels.repeat(1, len(embeddings) // labels.shape[1])
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
