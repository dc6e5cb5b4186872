"""The class-aware contrastive loss and its supervised special case, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from .case import OURS, Case, Implementation, Inputs, Result, Run, Target, Work, both, relative_error
from .contrastive_weighted import weighted

TEMPERATURE = 0.07
VIEWS = 2
CLASSES = 100
DENSE = "dense eager PyTorch"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of features, labels, confidence


def cases(suite: str) -> list[Case]:
    """The shapes of one suite: M rows (two views of M / 2 samples) of D dimensions."""
    if suite == "quick":
        return [ccssl(224, 64), ccssl(1024, 128), supcon(512, 128)]
    if suite == "cpu":
        return [
            ccssl(224, 64, targets={DENSE: both(4.5)}),
            ccssl(896, 64, targets={DENSE: both(7)}),
            ccssl(2048, 128, targets={DENSE: both(6)}),
            ccssl(8192, 128, targets={DENSE: both(18)}),
            supcon(2048, 128),
            weighted(896, 64),
            weighted(4096, 128),
        ]
    if suite == "big":
        return []
    bf16 = torch.bfloat16
    return [
        ccssl(224, 64, dtype=bf16, us=30),
        ccssl(1024, 128, dtype=bf16, us=30),
        ccssl(8192, 128, dtype=bf16, us=120),
        ccssl(8192, 512, dtype=bf16, us=450),
        ccssl(8192, 128, dtype=torch.float32),
        ccssl(65_536, 128, dtype=bf16, us=7e3),
        ccssl(262_144, 128, dtype=bf16, us=110e3),
        supcon(8192, 128),
        weighted(8192, 128, dtype=bf16),
        weighted(8192, 128),
    ]


def ccssl(
    m: int,
    d: int,
    *,
    dtype: torch.dtype = torch.float32,
    targets: Mapping[str, Target] | None = None,
    us: float | None = None,
) -> Case:
    """Pseudo-labels with a confidence for each sample."""

    def make(generator: torch.Generator) -> Inputs:
        inputs = batch(generator, m, d)
        return inputs | {"features": inputs["features"].to(dtype)}

    def oracle(inputs: Inputs) -> Result:
        return chunked(inputs["features"].double(), inputs["labels"], inputs["confidence"].double())

    return Case(
        name=f"ccssl loss and gradient, M {m}, D {d}, {str(dtype).removeprefix('torch.')}",
        make=make,
        implementations=(
            Implementation(OURS, _ccssl),
            *COMMON,
            Implementation("inf-cl, two-sided InfoNCE", _inf_cl, same_function=False),
            Implementation("siglip-kernel, sigmoid loss", _siglip, same_function=False),
        ),
        oracle=oracle,
        error=_error,
        error_name="relative, of loss and gradient",
        tolerance=1e-2 if dtype == torch.bfloat16 else 2e-3,  # on a GPU, fp32 is TF32-class
        work=_work(m, d, dtype),
        targets=targets or {},
        target_seconds=None if us is None else us / 1e6,
    )


def supcon(m: int, d: int) -> Case:
    """Confidence 1 and rows normalised inside, the loss that pytorch-metric-learning has."""

    def oracle(inputs: Inputs) -> Result:
        features = inputs["features"].double().requires_grad_()
        unit = F.normalize(features, dim=-1)
        loss, gradient = chunked(unit.detach(), inputs["labels"], inputs["confidence"].double())
        return loss, torch.autograd.grad(unit, features, gradient)[0]

    return Case(
        name=f"supcon loss and gradient, M {m}, D {d}, normalised inside",
        make=lambda generator: batch(generator, m, d) | {"confidence": _ones(generator, m // VIEWS)},
        implementations=(
            Implementation(OURS, _supcon),
            Implementation("pytorch-metric-learning SupCon", _metric_learning),
            Implementation(DENSE, _dense_normalised),
        ),
        oracle=oracle,
        error=_error,
        error_name="relative, of loss and gradient",
        tolerance=2e-3,
        work=_work(m, d, torch.float32),
    )


def batch(generator: torch.Generator, m: int, d: int) -> Inputs:
    """Unit rows in loose groups: the views of a sample are alike, the samples of a class a little."""
    n, device = m // VIEWS, generator.device
    classes = min(CLASSES, n // 8)
    labels = torch.randint(classes, (n,), generator=generator, device=device)
    groups = torch.randn(classes, d, generator=generator, device=device)
    samples = groups[labels] + torch.randn(n, d, generator=generator, device=device)
    features = samples[:, None] + 0.5 * torch.randn(n, VIEWS, d, generator=generator, device=device)
    confidence = torch.rand(n, generator=generator, device=device)
    return {"features": F.normalize(features, dim=-1), "labels": labels, "confidence": confidence}


def dense(features: Tensor, labels: Tensor, confidence: Tensor) -> Tensor:
    """The formula with every M x M matrix in memory and autograd over them."""
    n, views, d = features.shape
    z = features.float().transpose(0, 1).reshape(views * n, d)
    sample = torch.arange(n, device=z.device).repeat(views)
    label, weight = labels.repeat(views), confidence.repeat(views)
    w = torch.where(label[:, None] == label, weight[:, None] * weight, 0.0)
    w = torch.where(sample[:, None] == sample, 1.0, w).fill_diagonal_(0)
    scores = z @ z.T / TEMPERATURE
    scores = scores - scores.detach().amax(1, keepdim=True)
    others = 1 - torch.eye(len(z), device=z.device)
    log_probability = scores - (scores.exp() * others).sum(1, keepdim=True).log()
    return -((w * log_probability).sum(1) / w.sum(1)).mean()


def chunked(features: Tensor, labels: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient by the formula in blocks of rows; nothing M x M is kept."""
    n, views, d = features.shape
    z = features.reshape(n * views, d)
    sample = torch.arange(n, device=z.device).repeat_interleave(views)
    label, weight = labels.repeat_interleave(views), confidence.repeat_interleave(views)
    every = torch.arange(len(z), device=z.device)

    def block(rows: Tensor) -> tuple[Tensor, Tensor]:
        own = sample[rows, None] == sample
        w = torch.where(own, 1.0, (label[rows, None] == label) * weight[rows, None] * weight)
        itself = rows[:, None] == every
        return (z[rows] @ z.T / TEMPERATURE).masked_fill(itself, -math.inf), w.masked_fill(itself, 0.0)

    lse, total, positive = (z.new_empty(len(z)) for _ in range(3))
    blocks = every.split(max(1, (1 << 26) // len(z)))
    for rows in blocks:
        scores, w = block(rows)
        lse[rows], total[rows] = scores.logsumexp(1), w.sum(1)
        positive[rows] = (w * scores.masked_fill(w == 0, 0.0)).sum(1)
    gradient = torch.empty_like(z)
    for rows in blocks:
        scores, w = block(rows)
        pull = (scores - lse[rows, None]).exp() + (scores - lse).exp()  # P_ab + P_ba
        push = w / total[rows, None] + w / total
        gradient[rows] = (pull - push) @ z / (TEMPERATURE * len(z))
    return (lse - positive / total).mean(), gradient.view_as(features)


def _error(inputs: Inputs, oracle: Result, result: Result) -> float:
    return max(relative_error(mine, other) for mine, other in zip(result, oracle, strict=True))


def _work(m: int, d: int, dtype: torch.dtype) -> Work:
    """Scores forward, scores again and two products backward: 6 M^2 D; one exp a pair."""
    matmul = "bf16" if dtype == torch.bfloat16 else "tf32"
    return Work(flops=6.0 * m * m * d, exps=float(m * m), bytes=2.0 * m * d * dtype.itemsize, matmul=matmul)


def _ones(generator: torch.Generator, n: int) -> Tensor:
    return torch.ones(n, device=generator.device)


def _run(inputs: Inputs, loss: Loss) -> Run:
    """Forward and backward to the features."""
    labels, confidence = inputs["labels"], inputs["confidence"]

    def run() -> Result:
        features = inputs["features"].detach().requires_grad_()
        value = loss(features, labels, confidence)
        return value.detach(), torch.autograd.grad(value, features)[0]

    return run


def _ccssl(inputs: Inputs) -> Run:
    from clustops.contrastive import ccssl_loss

    return _run(inputs, lambda z, labels, p: ccssl_loss(z, labels, p, temperature=TEMPERATURE))


def _supcon(inputs: Inputs) -> Run:
    from clustops.contrastive import supcon_loss

    return _run(inputs, lambda z, labels, p: supcon_loss(z, labels, temperature=TEMPERATURE, normalize=True))


def _dense_compiled(inputs: Inputs) -> Run:
    return _run(inputs, torch.compile(dense, dynamic=False))


def _dense_normalised(inputs: Inputs) -> Run:
    return _run(inputs, lambda z, labels, p: dense(F.normalize(z, dim=-1), labels, p))


def _metric_learning(inputs: Inputs) -> Run:
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(temperature=TEMPERATURE)
    return _run(inputs, lambda z, labels, p: loss(z.flatten(0, 1), labels.repeat_interleave(VIEWS)))


def _inf_cl(inputs: Inputs) -> Run:
    from inf_cl import cal_flash_loss

    def loss(features: Tensor, labels: Tensor, confidence: Tensor) -> Tensor:
        z = features.flatten(0, 1)
        value: Tensor = cal_flash_loss(z, z.roll(1, 0), scale=1 / TEMPERATURE, head_dim=min(256, z.shape[1]))
        return value.mean()

    return _run(inputs, loss)


def _siglip(inputs: Inputs) -> Run:
    from siglip_kernel import fused_siglip_loss

    scale = torch.full((), -math.log(TEMPERATURE), device=inputs["features"].device)
    bias = torch.full((), -10.0, device=scale.device)

    def loss(features: Tensor, labels: Tensor, confidence: Tensor) -> Tensor:
        z = features.flatten(0, 1)
        value: Tensor = fused_siglip_loss(z, z.roll(1, 0), scale, bias)
        return value

    return _run(inputs, loss)


COMMON = (
    Implementation(DENSE, lambda inputs: _run(inputs, dense)),
    Implementation("dense, torch.compile", _dense_compiled, compiles=True),
)
