"""Networks of the recipes: a small one for 8x8 digits, Wide ResNets for CIFAR-sized images, heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice
from ..distributed import Group, all_reduce_sum_differentiable, world_size

Built = TypeVar("Built")

ENCODERS = ("small", "wrn-28-2", "wrn-28-8")


def seeded(seed: int, build: Callable[[], Built]) -> Built:
    """``build()`` with layers initialised from ``seed``; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


class BatchNorm(nn.Module):
    """Batch normalisation whose statistics are those of the joint batch of all ranks.

    ``torch.nn.SyncBatchNorm`` needs a GPU; this one runs anywhere. Input ``[N, C]`` or ``[N, C, H, W]``,
    ranks with equally many values.
    """

    def __init__(self, channels: int, *, group: Group = None, momentum: float = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.group, self.momentum = group, momentum

    def forward(self, x: Tensor) -> Tensor:
        """``x`` normalised by channel."""
        if not self.training or world_size(self.group) == 1:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum
            )
        dims = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = x.numel() // x.shape[1] * world_size(self.group)
        mean = all_reduce_sum_differentiable(x.sum(dims), self.group) / count
        centred = x - mean.view(shape)
        var = all_reduce_sum_differentiable(centred.square().sum(dims), self.group) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / max(count - 1, 1)), self.momentum)
        scale = self.weight * torch.rsqrt(var + 1e-5)
        return centred * scale.view(shape) + self.bias.view(shape)


class SobelFilters(nn.Module):
    """Two fixed edge filters over the grey image: no colour is left to cluster by."""

    def __init__(self) -> None:
        super().__init__()
        edge = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.filters: Tensor
        self.register_buffer("filters", torch.stack([edge, edge.T]).unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, 2, H, W]``."""
        return F.conv2d(x.mean(1, keepdim=True), self.filters, padding=1)


class Encoder(nn.Module):
    """A chain of convolution stages, then average pooling joined with max pooling where ``max_pool``."""

    def __init__(self, stages: list[nn.Module], channels: int, *, max_pool: bool) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.max_pool = max_pool
        self.n_features = channels * (2 if max_pool else 1)

    def stage_outputs(self, x: Tensor) -> list[Tensor]:
        """The activations ``[N, C, H, W]`` after each stage."""
        outputs = []
        # With channels last, convolutions and pooling on a CPU take two thirds of the time.
        x = x.contiguous(memory_format=torch.channels_last)
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to features ``[N, n_features]``."""
        last = self.stage_outputs(x)[-1]
        average = last.mean((2, 3))
        return torch.cat([average, last.amax((2, 3))], 1) if self.max_pool else average


def _conv_block(inputs: int, outputs: int, group: Group, *, pool: bool = False) -> nn.Module:
    # Pooling first leaves a quarter of the values to normalise.
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), *([nn.MaxPool2d(2)] if pool else [])]
    return nn.Sequential(*layers, BatchNorm(outputs, group=group), nn.ReLU(inplace=True))


class _WideBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, group: Group) -> None:
        super().__init__()
        self.norm1, self.norm2 = BatchNorm(inputs, group=group), BatchNorm(outputs, group=group)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if inputs != outputs else None
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = F.leaky_relu(self.norm1(x), 0.1)
        out: Tensor = self.conv2(F.leaky_relu(self.norm2(self.conv1(activated)), 0.1))
        return out + (x if self.shortcut is None else self.shortcut(activated))


def _wide_resnet(channels: int, depth: int, width: int, group: Group) -> Encoder:
    blocks = (depth - 4) // 6
    stages: list[nn.Module] = [nn.Conv2d(channels, 16, 3, padding=1, bias=False)]
    inputs = 16
    for outputs, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
        first = _WideBlock(inputs, outputs, stride, group)
        stages.append(
            nn.Sequential(first, *[_WideBlock(outputs, outputs, 1, group) for _ in range(blocks - 1)])
        )
        inputs = outputs
    stages.append(nn.Sequential(BatchNorm(inputs, group=group), nn.LeakyReLU(0.1)))
    encoder = Encoder(stages, inputs, max_pool=False)
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=0.1, mode="fan_out")
    return encoder


def encoder(name: str, channels: int, *, group: Group = None, sobel: bool = False) -> Encoder:
    """The encoder called ``name`` for images of ``channels`` channels.

    Args:
        name: ``"small"`` (23 thousand weights, 128 features) or ``"wrn-28-2"``, ``"wrn-28-8"``.
        sobel: put fixed edge filters in front.
    """
    check_choice(name, "network", ENCODERS)
    channels = 2 if sobel else channels
    if name == "small":
        blocks = [(channels, 16, False), (16, 32, True), (32, 64, False)]
        made = Encoder([_conv_block(i, o, group, pool=pool) for i, o, pool in blocks], 64, max_pool=True)
    else:
        made = _wide_resnet(channels, 28, int(name.rpartition("-")[2]), group)
    if sobel:
        made.stages[0] = nn.Sequential(SobelFilters(), made.stages[0])
    for module in made.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return made


def projector(inputs: int, hidden: int, outputs: int, *, group: Group = None) -> nn.Module:
    """Two-layer perceptron with batch normalisation between its layers."""
    return nn.Sequential(
        nn.Linear(inputs, hidden, bias=False),
        BatchNorm(hidden, group=group),
        nn.ReLU(),
        nn.Linear(hidden, outputs),
    )


class Classifier(nn.Module):
    """An encoder with a linear classifier and, where ``projection`` > 0, a unit-norm projection beside it."""

    def __init__(self, encoder: Encoder, n_classes: int, *, projection: int = 0, group: Group = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.n_features, n_classes)
        width = encoder.n_features
        self.projector = projector(width, width, projection, group=group) if projection else None

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, n_classes]``."""
        logits: Tensor = self.head(self.encoder(x))
        return logits

    def logits_and_projection(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[N, n_classes]`` and unit rows ``[N, projection]``."""
        assert self.projector is not None
        features = self.encoder(x)
        return self.head(features), F.normalize(self.projector(features), dim=1)


class PrototypeNet(nn.Module):
    """Encoder, projector, unit norm, prototypes: scores are cosines to K unit prototypes, no bias."""

    def __init__(
        self, encoder: Encoder, n_prototypes: int, *, hidden: int, dim: int, group: Group = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector(encoder.n_features, hidden, dim, group=group)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(n_prototypes, dim), dim=1))

    def embed(self, x: Tensor) -> Tensor:
        """Unit rows ``[N, dim]``."""
        return F.normalize(self.projector(self.encoder(x)), dim=1)

    def scores(self, embeddings: Tensor) -> Tensor:
        """Cosines ``[N, K]`` of unit rows to the prototypes."""
        return embeddings @ F.normalize(self.prototypes, dim=1).T

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``[N, K]`` of images."""
        return self.scores(self.embed(x))
