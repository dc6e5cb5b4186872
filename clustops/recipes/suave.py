"""SwAV pre-training and Suave: semi-supervised learning with one prototype a class.

Sources: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS
    2020;
Fini et al., "Semi-supervised learning made simple with self-supervised clustering", CVPR 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..distributed import Group
from ..sinkhorn_loss import swapped_prediction_loss
from ..sinkhorn_queue import FeatureQueue
from . import prototypes
from .data import ImageData
from .networks import PrototypeNet
from .training import Progress, Result, Run, Stateful, prepare, weight_groups


@dataclass(frozen=True)
class Config(prototypes.Config):
    """Settings; the defaults are those of the demo on digits.

    Attributes:
        epsilon, n_iters: of the Sinkhorn assignment of the two global views.
        queue: how many earlier embeddings of each global view take part in the assignment.
    """

    lr: float = 0.1
    finetune_lr: float = 0.01
    epsilon: float = 0.05
    n_iters: int = 3
    queue: int = 0
    momentum: float = 0.9


class _SwappedPrediction:
    """Each view predicts the Sinkhorn assignment of each other global view."""

    def __init__(self, config: Config, group: Group) -> None:
        self.config, self.group = config, group
        self.queue = None
        if config.queue:
            self.queue = FeatureQueue(config.queue, config.dim, views=2, group=group, device=config.device)

    def loss(self, model: PrototypeNet, views: list[Tensor], scores: Tensor, embeddings: Tensor) -> Tensor:
        queued = None
        if self.queue is not None:
            with torch.no_grad():
                queued = model.scores(self.queue.share())
            self.queue.push(embeddings[:2])
        return swapped_prediction_loss(
            scores,
            temperature=self.config.temperature,
            epsilon=self.config.epsilon,
            n_iters=self.config.n_iters,
            queue_scores=queued,
            group=self.group,
        )

    def after_step(self, model: PrototypeNet, k: int) -> None:
        pass

    def evaluated(self, model: PrototypeNet) -> PrototypeNet:
        return model

    def state(self) -> Mapping[str, Stateful]:
        return {} if self.queue is None else {"queue": self.queue}


def train(
    data: ImageData,
    config: Config,
    *,
    pretrained: Result | Path | None = None,
    out: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    group: Group = None,
) -> Result:
    """Test accuracy of Suave, or of a linear probe on SwAV features for ``stage="pretrain"``.

    Args:
        pretrained: a pre-training's result or checkpoint to start from; ``None`` pre-trains first.
    """
    if config.stage == "full" and pretrained is None:
        first = replace(config, stage="pretrain")
        folder = None if out is None else out / "pretrain"
        pretrained = train(data, first, out=folder, resume=resume, progress=progress, group=group)
    data, labelled = prepare(data, config.labels_per_class, config.seed, config.device)
    model, phase = prototypes.begin(data, config, labelled, pretrained, group)
    optimizer = torch.optim.SGD(weight_groups(model, config.weight_decay), config.lr, config.momentum)
    objective = _SwappedPrediction(config, group)
    run = Run(config, out, resume, progress, group)
    name = "swav" if config.stage == "pretrain" else "suave"
    return prototypes.learn(name, data, labelled, phase, model, objective, optimizer, run)
