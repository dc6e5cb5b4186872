"""FixMatch and class-aware contrastive semi-supervised learning on top of it.

Sources: Sohn et al., "FixMatch", NeurIPS 2020; Yang et al., "Class-Aware Contrastive Semi-Supervised
    Learning",
CVPR 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice
from ..contrastive import ccssl_loss, pseudo_labels
from ..distributed import Group
from . import augment
from .augment import Strength
from .data import ImageData
from .networks import Classifier, encoder, seeded
from .training import (
    Metrics,
    Progress,
    Result,
    Run,
    StepMetrics,
    accuracy,
    batch_indices,
    decayed_cosine,
    derive,
    evaluating,
    fit,
    generator,
    in_batches,
    move_towards,
    optimise,
    prepare,
    shard,
    weight_groups,
)

METHODS = ("fixmatch", "fixmatch_two_views", "ccssl")


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the demo on digits.

    Attributes:
        method: ``"ccssl"``; ``"fixmatch"``; ``"fixmatch_two_views"``: FixMatch on the two strong views of
            CCSSL, the control that tells what the second view does by itself.
        batch: labelled images a step. mu: unlabelled images for each labelled one; all training images are
            unlabelled ones too.
        threshold: confidence from which a pseudo-label counts in the cross-entropy.
        push_threshold: confidence from which images of one pseudo-class attract each other (T_push);
            ``None``: all do.
        lambda_u, lambda_c: weights of the unlabelled cross-entropy and of the contrastive loss.
        strong, second: augmentation of the two strong views.
    """

    method: Literal["fixmatch", "fixmatch_two_views", "ccssl"] = "ccssl"
    seed: int = 0
    labels_per_class: int = 4
    network: str = "small"
    projection: int = 64
    steps: int = 400
    batch: int = 40
    mu: int = 4
    threshold: float = 0.95
    push_threshold: float | None = None
    lambda_u: float = 1.0
    lambda_c: float = 1.0
    temperature: float = 0.07
    lr: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 1e-3
    ema: float = 0.99
    weak: Strength = augment.DIGITS_WEAK
    strong: Strength = augment.DIGITS_STRONG
    second: Strength = augment.DIGITS_CROP
    device: str = "cpu"
    log_every: int = 50
    checkpoint_every: int = 100


def published(data: str, labels_per_class: int) -> Config:
    """The settings of the paper for ``"cifar10"`` or ``"cifar100"``: 2**20 steps; a GPU's work for days.

    Augmentation is this package's batched one, not RandAugment.
    """
    check_choice(data, "data", ("cifar10", "cifar100"))
    return Config(
        labels_per_class=labels_per_class,
        network="wrn-28-2" if data == "cifar10" else "wrn-28-8",
        steps=2**20,
        batch=64,
        mu=7,
        ema=0.999,
        weak=augment.PHOTO_WEAK,
        strong=augment.PHOTO_STRONG,
        second=augment.PHOTO_CROP,
        log_every=1024,
        checkpoint_every=1024,
    )


def pair_weights(
    labels: Tensor, confidence: Tensor, truth: Tensor, threshold: float | None
) -> tuple[Tensor, Tensor]:
    """Class-wise positive weight of a batch for each image, in all and on pairs of one true class.

    Two different images with one pseudo-label and both confidences at the threshold or above weigh the
    product of their confidences. ``truth`` is -1 where an image is of no class.
    """
    weight = confidence if threshold is None else confidence * (confidence >= threshold)
    pairs = torch.outer(weight, weight) * (labels.unsqueeze(0) == labels.unsqueeze(1))
    pairs.fill_diagonal_(0)
    true = (truth.unsqueeze(0) == truth.unsqueeze(1)) & (truth >= 0)
    return pairs.sum() / len(labels), (pairs * true).sum() / len(labels)


def train(
    data: ImageData,
    config: Config,
    *,
    out: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    group: Group = None,
) -> Result:
    """Test accuracy of the averaged network after ``steps`` steps.

    ``L = CE(labelled) + lambda_u mean(CE(strong, y) [p >= threshold]) + lambda_c ccssl(projections, y, p)``
    with ``p, y`` the confidence and class of the weak view. Labelled rows do not enter the contrastive loss.
    """
    check_choice(config.method, "method", METHODS)
    run = Run(config, out, resume, progress, group)
    data, labelled = prepare(data, config.labels_per_class, config.seed, config.device)

    def build() -> Classifier:
        trunk = encoder(config.network, data.train_images.shape[1], group=group)
        projection = config.projection if config.method == "ccssl" else 0
        return Classifier(trunk, data.n_classes, projection=projection, group=group).to(config.device)

    model, average = (seeded(derive(config.seed, "network"), build) for _ in range(2))
    optimizer = torch.optim.SGD(
        weight_groups(model, config.weight_decay), config.lr, config.momentum, nesterov=True
    )

    def step(k: int) -> StepMetrics:
        loss, metrics = _loss(model, data, labelled, config, k, group)
        optimise(optimizer, loss, config.lr * decayed_cosine(k, config.steps), group)
        move_towards(average, model, config.ema)
        return metrics

    def evaluate(done: int) -> Metrics:
        return {"accuracy": accuracy(average, data.test_images, data.test_labels)}

    history = fit(
        step,
        config.steps,
        run,
        state={"model": model, "average": average, "optimizer": optimizer},
        evaluate=evaluate,
        log_every=config.log_every,
    )
    with evaluating(average):
        features = in_batches(average.encoder, data.test_images)
        guesses = in_batches(average, data.test_images).argmax(1)
    extras = {"embeddings": features, "labels": data.test_labels, "clusters": guesses}
    return Result(config.method, history[-1]["accuracy"], history, extras)


def _views(
    data: ImageData, labelled: Tensor, config: Config, k: int, group: Group
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of this rank at step ``k``: labelled, unlabelled, and all views in one batch, labelled first."""
    rows, many = shard(config.batch, group), shard(config.batch * config.mu, group)
    known = labelled[
        batch_indices(len(labelled), config.batch, seed=config.seed, stream="labelled", step=k)[rows]
    ]
    total, n = config.batch * config.mu, len(data.train_images)
    unknown = batch_indices(n, total, seed=config.seed, stream="unlabelled", step=k)[many].to(known.device)
    random = generator(config.seed, "views", k)
    views = [augment.augment(data.train_images[known], config.weak, random, rows=rows, total=config.batch)]
    strengths = [config.weak, config.strong]
    if config.method != "fixmatch":
        strengths.append(config.second)
    images = data.train_images[unknown]
    views += [augment.augment(images, strength, random, rows=many, total=total) for strength in strengths]
    return known, unknown, torch.cat(views)


def _loss(
    model: Classifier, data: ImageData, labelled: Tensor, config: Config, k: int, group: Group
) -> tuple[Tensor, StepMetrics]:
    known, unknown, views = _views(data, labelled, config, k, group)
    sizes = [len(known)] + [len(unknown)] * ((len(views) - len(known)) // len(unknown))
    # One forward: batch statistics are those of labelled and unlabelled images together.
    if config.method == "ccssl":
        logits, projections = model.logits_and_projection(views)
    else:
        logits = model(views)
    labelled_logits, weak, *strong = logits.split(sizes)
    labels, confidence = pseudo_labels(weak.detach())
    sure = (confidence >= config.threshold).float()
    used = strong if config.method == "fixmatch_two_views" else strong[:1]
    supervised = F.cross_entropy(labelled_logits, data.train_labels[known])
    unlabelled = torch.stack([F.cross_entropy(s, labels, reduction="none") for s in used]).mul(sure).mean()
    loss = supervised + config.lambda_u * unlabelled
    metrics: dict[str, Tensor | float] = {
        "loss_labelled": supervised.detach(),
        "loss_unlabelled": unlabelled.detach(),
    }
    if config.method == "ccssl":
        pairs = torch.stack(projections.split(sizes)[2:], 1)
        contrastive = ccssl_loss(
            pairs,
            labels,
            confidence,
            temperature=config.temperature,
            threshold=config.push_threshold,
            group=group,
        )
        loss = loss + config.lambda_c * contrastive
        metrics["loss_contrastive"] = contrastive.detach()
        # The truth serves the log alone.
        truth = data.train_labels[unknown]
        weights = pair_weights(labels, confidence, truth, config.push_threshold)
        metrics["pairs"], metrics["true_pairs"] = weights
    metrics |= {"loss": loss.detach(), "sure": sure.mean()}
    return loss, metrics
