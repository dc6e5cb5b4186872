"""DINO pre-training and Daino: semi-supervised self-distillation with one prototype a class.

Sources: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021; Fini et al.,
"Semi-supervised learning made simple with self-supervised clustering", CVPR 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..distributed import Group, all_reduce_sum, world_size
from ..sinkhorn_loss import soft_cross_entropy
from . import prototypes
from .data import ImageData
from .networks import PrototypeNet
from .training import Progress, Result, Run, Stateful, cosine, move_towards, prepare, weight_groups


@dataclass(frozen=True)
class Config(prototypes.Config):
    """Settings; the defaults are those of the demo on digits.

    Attributes:
        teacher_temperature: below ``temperature``: sharpening.
        teacher_decay, pretrain_teacher_decay: of the teacher's average of the student, at the first step; it
            goes to 1 along a cosine.
        centre_decay: of the average of the teacher's scores that is taken off them: centering.
    """

    pretrain_lr: float = 2e-3
    lr: float = 4e-3
    finetune_lr: float = 4e-4
    weight_decay: float = 0.01
    teacher_temperature: float = 0.03
    teacher_decay: float = 0.9
    pretrain_teacher_decay: float = 0.95
    centre_decay: float = 0.9


class _Distillation(nn.Module):
    """Each view of the student predicts the teacher's sharp, centred scores on each other global view."""

    def __init__(
        self, config: Config, steps: int, model: PrototypeNet, teacher: PrototypeNet, group: Group
    ) -> None:
        super().__init__()
        self.config, self.steps, self.group = config, steps, group
        teacher.load_state_dict(model.state_dict())
        self.teacher = teacher
        self.centre: Tensor
        self.register_buffer("centre", torch.zeros(model.prototypes.shape[0], device=model.prototypes.device))

    def loss(self, model: PrototypeNet, views: list[Tensor], scores: Tensor, embeddings: Tensor) -> Tensor:
        with torch.no_grad():
            target_scores = self.teacher(torch.cat(views[:2])).view(2, len(views[0]), -1)
        sharp = self.config.teacher_temperature
        loss = soft_cross_entropy(
            scores,
            target_scores,
            -self.centre / sharp,
            temperature=self.config.temperature,
            target_temperature=sharp,
            pairs=[(v, i) for i in range(2) for v in range(len(views)) if v != i],
        )
        with torch.no_grad():
            mean = all_reduce_sum(target_scores.mean((0, 1)), self.group) / world_size(self.group)
            self.centre.lerp_(mean, 1 - self.config.centre_decay)
        return loss

    def after_step(self, model: PrototypeNet, k: int) -> None:
        config = self.config
        first = config.pretrain_teacher_decay if config.stage == "pretrain" else config.teacher_decay
        move_towards(self.teacher, model, cosine(k, self.steps, first, 1.0))

    def evaluated(self, model: PrototypeNet) -> PrototypeNet:
        return model

    def state(self) -> Mapping[str, Stateful]:
        return {"objective": self}


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
    """Test accuracy of Daino, or of a linear probe on DINO features for ``stage="pretrain"``.

    Args:
        pretrained: a pre-training's result or checkpoint to start from; ``None`` pre-trains first.
    """
    if config.stage == "full" and pretrained is None:
        first = replace(config, stage="pretrain")
        folder = None if out is None else out / "pretrain"
        pretrained = train(data, first, out=folder, resume=resume, progress=progress, group=group)
    data, labelled = prepare(data, config.labels_per_class, config.seed, config.device)
    model, phase = prototypes.begin(data, config, labelled, pretrained, group)
    teacher = prototypes.build(data, config, model.prototypes.shape[0], group)
    optimizer = torch.optim.AdamW(weight_groups(model, config.weight_decay), config.lr)
    objective = _Distillation(config, phase.steps, model, teacher, group)
    run = Run(config, out, resume, progress, group)
    name = "dino" if config.stage == "pretrain" else "daino"
    return prototypes.learn(name, data, labelled, phase, model, objective, optimizer, run)
