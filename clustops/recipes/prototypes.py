"""What the prototype methods share: SwAV with Suave, DINO with Daino.

Each method pre-trains with many prototypes and then learns with one prototype a class, where the prototype
layer is the classifier. They differ in the loss of the unlabelled views and in the optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import reject
from ..distributed import Group
from . import augment
from .augment import Strength
from .data import ImageData
from .networks import PrototypeNet, encoder, seeded
from .probe import probe_accuracy
from .training import (
    Metrics,
    Result,
    Run,
    Stateful,
    StepMetrics,
    accuracy,
    batch_indices,
    cosine,
    derive,
    evaluating,
    fit,
    generator,
    in_batches,
    optimise,
    shard,
)

DIGITS_VIEWS = (augment.DIGITS_CROP, augment.DIGITS_CROP, augment.DIGITS_LOCAL, augment.DIGITS_LOCAL)


@dataclass(frozen=True)
class Config:
    """Settings that both methods have; the defaults are those of the demo on digits.

    Attributes:
        stage: ``"full"``: the whole system. ``"pretrain"``: without labels, evaluated by a linear probe.
        views: augmentation of each unlabelled view; the first two are the global ones, which give targets.
            The default is the published scheme, two crops and two small ones. On digits, weak global views
            with strong others serve both stages better, pre-training most.
        light: augmentation of the two views of the fine-tuning steps at the end.
        labelled_view: augmentation of the labelled images.
        n_prototypes: of pre-training; afterwards there is one for each class.
        batch: unlabelled images a step; all training images are unlabelled ones too. labelled_batch: labelled
            ones.
        temperature: of the softmax over cosines.
        smoothing: of the labels.
        label_weight: the loss is ``(V b L_u + w l L_l) / (V b + w l)`` with b unlabelled images, V views of
            each, l labelled rows and w this weight. The published 1 gives few labels a few percent of the
            loss.
        prototypes: at the start, ``"class_means"`` of the labelled embeddings or the published ``"random"``;
            from random ones two classes can stay swapped for good when labels are few.
        mix: ``"mixup"`` or ``"cutmix"`` adds one mixed row for each labelled one; ``"none"`` does not.
    """

    stage: Literal["full", "pretrain"] = "full"
    seed: int = 0
    labels_per_class: int = 4
    network: str = "small"
    hidden: int = 128
    dim: int = 64
    views: tuple[Strength, ...] = DIGITS_VIEWS
    light: Strength = augment.DIGITS_WEAK
    labelled_view: Strength = augment.DIGITS_STRONG
    temperature: float = 0.1
    n_prototypes: int = 60
    pretrain_steps: int = 300
    pretrain_batch: int = 128
    pretrain_lr: float = 0.1
    steps: int = 220
    finetune_steps: int = 30
    batch: int = 128
    labelled_batch: int = 40
    lr: float = 0.05
    finetune_lr: float = 0.005
    weight_decay: float = 1e-4
    smoothing: float = 0.01
    label_weight: float = 4.0
    prototypes: Literal["class_means", "random"] = "class_means"
    mix: Literal["none", "mixup", "cutmix"] = "none"
    device: str = "cpu"
    log_every: int = 50
    checkpoint_every: int = 100


class Objective(Protocol):
    """The loss of the unlabelled views, with whatever state it keeps."""

    def loss(self, model: PrototypeNet, views: list[Tensor], scores: Tensor, embeddings: Tensor) -> Tensor:
        """From the images of each view, their scores ``[V, N, K]`` and embeddings ``[V, N, D]``."""

    def after_step(self, model: PrototypeNet, k: int) -> None:
        """Called when the weights have changed."""

    def evaluated(self, model: PrototypeNet) -> PrototypeNet:
        """The network that counts."""

    def state(self) -> Mapping[str, Stateful]:
        """What a checkpoint must hold."""


@dataclass(frozen=True)
class Phase:
    """One run of the loop.

    Attributes:
        steps: in all. batch: unlabelled images a step. views: augmentations at step k. lr: at step k.
    """

    steps: int
    batch: int
    views: Callable[[int], tuple[Strength, ...]]
    lr: Callable[[int], float]


def pretrain_phase(config: Config) -> Phase:
    """Many prototypes, no labels."""
    steps = config.pretrain_steps
    return Phase(
        steps,
        config.pretrain_batch,
        lambda k: config.views,
        lambda k: cosine(k, steps, config.pretrain_lr, 0.0),
    )


def full_phase(config: Config) -> Phase:
    """One prototype a class, and labels; ``finetune_steps`` with light views and a small rate at the end."""

    def views(k: int) -> tuple[Strength, ...]:
        return config.views if k < config.steps else (config.light, config.light)

    def lr(k: int) -> float:
        if k < config.steps:
            return cosine(k, config.steps, config.lr, config.finetune_lr)
        return cosine(k - config.steps, config.finetune_steps, config.finetune_lr, 0.0)

    return Phase(config.steps + config.finetune_steps, config.batch, views, lr)


def build(data: ImageData, config: Config, n_prototypes: int, group: Group) -> PrototypeNet:
    """The network with its weights drawn from the seed."""

    def network() -> PrototypeNet:
        trunk = encoder(config.network, data.train_images.shape[1], group=group)
        return PrototypeNet(trunk, n_prototypes, hidden=config.hidden, dim=config.dim, group=group)

    return seeded(derive(config.seed, "network"), network).to(config.device)


def begin(
    data: ImageData, config: Config, labelled: Tensor, pretrained: Result | Path | None, group: Group
) -> tuple[PrototypeNet, Phase]:
    """The network of ``config.stage`` as its training starts, and that training."""
    if config.stage == "pretrain" or pretrained is None:
        return build(data, config, config.n_prototypes, group), pretrain_phase(config)
    model = build(data, config, data.n_classes, group)
    start_from(model, pretrained)
    if config.prototypes == "class_means":
        use_class_means(model, data, labelled)
    return model, full_phase(config)


def start_from(model: PrototypeNet, pretrained: Result | Path) -> None:
    """Load the encoder and the projector of a pre-training, not its prototypes."""
    if isinstance(pretrained, Result):
        if "model" not in pretrained.extras:
            reject(
                "pretrained",
                "the result of a pre-training",
                pretrained.name,
                'run train with stage="pretrain"',
            )
        state = pretrained.extras["model"]
    else:
        state = torch.load(Path(pretrained), map_location="cpu", weights_only=True)["state"]["model"]
    own = model.state_dict()
    model.load_state_dict({**state, "prototypes": own["prototypes"]})


@torch.no_grad()
def use_class_means(model: PrototypeNet, data: ImageData, labelled: Tensor) -> None:
    """Set prototype c to the mean embedding of the labelled images of class c."""
    with evaluating(model):
        embeddings = in_batches(model.embed, data.train_images[labelled])
    sums = torch.zeros_like(model.prototypes).index_add_(0, data.train_labels[labelled], embeddings)
    model.prototypes.copy_(F.normalize(sums, dim=1))


def embed_views(model: PrototypeNet, views: list[Tensor]) -> Tensor:
    """Unit rows of all views one below the other, one forward for each run of views of one size."""
    sizes = groupby(views, key=lambda view: view.shape[2:])
    return torch.cat([model.embed(torch.cat(list(same))) for _, same in sizes])


def unlabelled_views(data: ImageData, config: Config, phase: Phase, k: int, group: Group) -> list[Tensor]:
    """This rank's part of the joint batch of step ``k`` in each view."""
    rows = shard(phase.batch, group)
    n = len(data.train_images)
    index = batch_indices(n, phase.batch, seed=config.seed, stream="unlabelled", step=k)[rows]
    images = data.train_images[index.to(data.train_images.device)]
    random = generator(config.seed, "unlabelled views", k)
    return augment.multi_crop(images, phase.views(k), random, rows=rows, total=phase.batch)


def labelled_views(
    data: ImageData, labelled: Tensor, config: Config, strength: Strength, k: int, group: Group
) -> tuple[Tensor, Tensor]:
    """This rank's part of the labelled rows of step ``k``, mixed ones included, and their targets."""
    batch = batch_indices(len(labelled), config.labelled_batch, seed=config.seed, stream="labelled", step=k)
    index = labelled[batch.to(labelled.device)]
    random = generator(config.seed, "labelled views", k)
    images = augment.augment(data.train_images[index], strength, random)
    targets = F.one_hot(data.train_labels[index], data.n_classes).float()
    targets = targets * (1 - config.smoothing) + config.smoothing / data.n_classes
    if config.mix != "none":
        mixed, mixed_targets = augment.mix_images(images, targets, random, how=config.mix)
        images, targets = torch.cat([images, mixed]), torch.cat([targets, mixed_targets])
    rows = shard(len(images), group)
    return images[rows], targets[rows]


def learn(
    name: str,
    data: ImageData,
    labelled: Tensor,
    phase: Phase,
    model: PrototypeNet,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    run: Run,
) -> Result:
    """The loop of one stage; ``config.stage`` says whether labels take part."""
    config, group = run.config, run.group
    supervised = config.stage == "full"

    def step(k: int) -> StepMetrics:
        views = unlabelled_views(data, config, phase, k, group)
        if supervised:
            light = k >= config.steps
            strength = config.light if light else config.labelled_view
            images, targets = labelled_views(data, labelled, config, strength, k, group)
        n_labelled = len(images) if supervised else 0
        embeddings = embed_views(model, [images, *views] if supervised else views)
        scores = model.scores(embeddings)
        by_view = scores[n_labelled:].view(len(views), len(views[0]), -1)
        loss = objective.loss(model, views, by_view, embeddings[n_labelled:].view(*by_view.shape[:2], -1))
        metrics: dict[str, Tensor | float] = {"loss_unlabelled": loss.detach()}
        if supervised:
            loss_labelled = F.cross_entropy(scores[:n_labelled] / config.temperature, targets)
            rows, weighted = len(scores) - n_labelled, config.label_weight * n_labelled
            loss = (rows * loss + weighted * loss_labelled) / (rows + weighted)
            metrics["loss_labelled"] = loss_labelled.detach()
        optimise(optimizer, loss, phase.lr(k), group)
        objective.after_step(model, k)
        return {"loss": loss.detach(), **metrics}

    def evaluate(done: int) -> Metrics:
        network = objective.evaluated(model)
        if supervised:
            return {"accuracy": accuracy(network, data.test_images, data.test_labels)}
        with evaluating(network):
            return {"accuracy": probe_accuracy(data, labelled, network.encoder)}

    history = fit(
        step,
        phase.steps,
        run,
        state={"model": model, "optimizer": optimizer, **objective.state()},
        evaluate=evaluate,
        log_every=config.log_every,
    )
    network = objective.evaluated(model)
    with evaluating(network):
        embeddings = in_batches(network.embed, data.test_images)
        clusters = network.scores(embeddings).argmax(1)
    weights = {key: value.detach().clone() for key, value in network.state_dict().items()}
    extras = {"model": weights, "embeddings": embeddings, "labels": data.test_labels, "clusters": clusters}
    return Result(name, history[-1]["accuracy"], history, extras)
