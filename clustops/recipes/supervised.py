"""Baselines that learn from the labelled images alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice
from ..distributed import Group
from . import augment
from .augment import Strength
from .data import ImageData
from .networks import Classifier, encoder, seeded
from .probe import probe_accuracy
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
    fit,
    generator,
    move_towards,
    optimise,
    prepare,
    shard,
    weight_groups,
)

Method = Literal["raw", "untrained", "weak", "strong"]


@dataclass(frozen=True)
class Config:
    """Settings of the baselines; the defaults are those of the demo on digits.

    Attributes:
        method: ``"raw"``: logistic regression on pixels. ``"untrained"``: the same on features of a network
            that was never trained. ``"weak"``, ``"strong"``: the network trained under weak or strong
            augmentation.
        penalty: of the logistic regression.
    """

    method: Method = "strong"
    seed: int = 0
    labels_per_class: int = 4
    network: str = "small"
    steps: int = 400
    batch: int = 40
    lr: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 1e-3
    ema: float = 0.99
    weak: Strength = augment.DIGITS_WEAK
    strong: Strength = augment.DIGITS_STRONG
    penalty: float = 1.0
    device: str = "cpu"
    log_every: int = 50
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
    """Test accuracy of a baseline trained on ``labels_per_class`` labels a class."""
    check_choice(config.method, "method", ("raw", "untrained", "weak", "strong"))
    data, labelled = prepare(data, config.labels_per_class, config.seed, config.device)
    if config.method == "raw":
        share = probe_accuracy(data, labelled, lambda x: x.flatten(1), penalty=config.penalty)
        return Result("supervised-raw", share, [])
    channels = data.train_images.shape[1]
    trunk = seeded(derive(config.seed, "encoder"), lambda: encoder(config.network, channels, group=group))
    if config.method == "untrained":
        trunk.to(config.device).eval()
        return Result(
            "supervised-untrained", probe_accuracy(data, labelled, trunk, penalty=config.penalty), []
        )
    return _train_network(data, labelled, config, Run(config, out, resume, progress, group))


def _train_network(data: ImageData, labelled: Tensor, config: Config, run: Run) -> Result:
    group = run.group

    def build() -> Classifier:
        trunk = encoder(config.network, data.train_images.shape[1], group=group)
        return Classifier(trunk, data.n_classes).to(config.device)

    model, average = (seeded(derive(config.seed, "network"), build) for _ in range(2))
    optimizer = torch.optim.SGD(
        weight_groups(model, config.weight_decay), config.lr, config.momentum, nesterov=True
    )
    strength = config.strong if config.method == "strong" else config.weak
    rows = shard(config.batch, group)

    def step(k: int) -> StepMetrics:
        random = generator(config.seed, "views", k)
        index = labelled[
            batch_indices(len(labelled), config.batch, seed=config.seed, stream="labelled", step=k)[rows]
        ]
        views = augment.augment(data.train_images[index], strength, random, rows=rows, total=config.batch)
        loss = F.cross_entropy(model(views), data.train_labels[index])
        optimise(optimizer, loss, config.lr * decayed_cosine(k, config.steps), group)
        move_towards(average, model, config.ema)
        return {"loss": loss.detach()}

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
    return Result(f"supervised-{config.method}", history[-1]["accuracy"], history)
