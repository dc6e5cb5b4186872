"""The contrastive loss under weights from a graph between samples, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .case import OURS, Case, Implementation, Inputs, Result, Run, Work, relative_error

TEMPERATURE = 0.2
VIEWS = 2
SURE = 0.8  # a pair of samples whose predictions agree less has no weight


def weighted(m: int, d: int, *, dtype: torch.dtype = torch.float32) -> Case:
    """M rows (two views of M / 2 samples) of D dimensions under a sparse graph, as CoMatch builds it."""

    def make(generator: torch.Generator) -> Inputs:
        inputs = batch(generator, m // VIEWS, d)
        return inputs | {"features": inputs["features"].to(dtype)}

    return Case(
        name=f"contrastive loss under a graph, M {m}, D {d}, {str(dtype).removeprefix('torch.')}",
        make=make,
        implementations=(
            Implementation(OURS, _ours),
            Implementation("dense eager PyTorch", lambda inputs: _run(inputs, dense)),
            Implementation("dense, torch.compile", _compiled, compiles=True),
        ),
        oracle=lambda inputs: chunked(inputs["features"].double(), inputs["pair_weights"].double()),
        error=lambda inputs, oracle, result: max(map(relative_error, result, oracle)),
        error_name="relative, of loss and gradient",
        tolerance=1e-2 if dtype == torch.bfloat16 else 2e-3,  # on a GPU, fp32 is TF32-class
        work=_work(m, d, dtype),
    )


def batch(generator: torch.Generator, n: int, d: int) -> Inputs:
    """Unit rows, and the graph of samples whose predicted probabilities agree."""
    device, classes = generator.device, max(2, n // 32)
    labels = torch.randint(classes, (n,), generator=generator, device=device)
    features = torch.randn(n, VIEWS, d, generator=generator, device=device)
    noise = torch.randn(n, classes, generator=generator, device=device)
    probabilities = (12 * F.one_hot(labels, classes) + 2 * noise).softmax(-1)
    graph = (probabilities @ probabilities.T).fill_diagonal_(1)
    graph = torch.where(graph >= SURE, graph, 0)
    return {"features": F.normalize(features, dim=-1), "pair_weights": graph / graph.sum(1, keepdim=True)}


def dense(features: Tensor, pair_weights: Tensor) -> Tensor:
    """The formula with every M x M matrix in memory and autograd over them."""
    z = features.float().flatten(0, 1)
    others = 1 - torch.eye(len(z), device=z.device)
    w = pair_weights.repeat_interleave(VIEWS, 0).repeat_interleave(VIEWS, 1) * others
    scores = z @ z.T / TEMPERATURE
    scores = scores - scores.detach().amax(1, keepdim=True)
    log_probability = scores - (scores.exp() * others).sum(1, keepdim=True).log()
    return -((w * log_probability).sum(1) / w.sum(1)).mean()


def chunked(features: Tensor, pair_weights: Tensor) -> Result:
    """Loss and gradient by the formula in blocks of rows; nothing M x M is kept."""
    z = features.flatten(0, 1)
    every = torch.arange(len(z), device=z.device)
    lse, total, positive = (z.new_empty(len(z)) for _ in range(3))
    gradient = torch.zeros_like(z)
    for rows in every.split(max(1, (1 << 26) // len(z))):
        itself = rows[:, None] == every
        scores = (z[rows] @ z.T / TEMPERATURE).masked_fill(itself, -math.inf)
        w = pair_weights[rows // VIEWS][:, every // VIEWS].masked_fill(itself, 0.0)
        lse[rows], total[rows] = scores.logsumexp(1), w.sum(1)
        positive[rows] = (w * scores.masked_fill(itself, 0.0)).sum(1)
        g = (scores - lse[rows, None]).exp() - w / total[rows, None]
        gradient[rows] += g @ z
        gradient += g.T @ z[rows]
    loss = (lse - positive / total).mean()
    return loss, (gradient / (TEMPERATURE * len(z))).view_as(features)


def _work(m: int, d: int, dtype: torch.dtype) -> Work:
    """Scores of half of the pairs forward and again backward, one product; the graph is read twice."""
    matmul = "bf16" if dtype == torch.bfloat16 else "tf32"
    graph = 8.0 * (m // VIEWS) ** 2
    return Work(
        flops=4.0 * m * m * d, exps=float(m * m), bytes=graph + 2.0 * m * d * dtype.itemsize, matmul=matmul
    )


def _run(inputs: Inputs, loss: Callable[[Tensor, Tensor], Tensor]) -> Run:
    """Forward and backward to the features."""

    def run() -> Result:
        features = inputs["features"].detach().requires_grad_()
        value = loss(features, inputs["pair_weights"])
        return value.detach(), torch.autograd.grad(value, features)[0]

    return run


def _ours(inputs: Inputs) -> Run:
    from clustops.contrastive_weighted import weighted_contrastive_loss

    return _run(inputs, lambda z, w: weighted_contrastive_loss(z, w, temperature=TEMPERATURE))


def _compiled(inputs: Inputs) -> Run:
    return _run(inputs, torch.compile(dense, dynamic=False))
