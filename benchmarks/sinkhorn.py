"""Sinkhorn assignment, its potentials alone, and the swapped-prediction loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from .case import OURS, Case, Implementation, Inputs, Result, Run, Target, Work, both, relative_error

EPSILON, ITERATIONS, TEMPERATURE = 0.05, 3, 0.1
IN_PLACE, COMPOSED = "in-place PyTorch loop", "composed PyTorch loss"


def cases(suite: str) -> list[Case]:
    """The shapes of one suite."""
    if suite == "quick":
        return [plan(512, 1000), potentials(512, 1000), swapped(2, 128, 500)]
    if suite == "cpu":
        return [
            plan(512, 1000, targets={IN_PLACE: both(6)}),
            plan(4096, 3000, targets={IN_PLACE: both(6)}),
            potentials(4096, 3000, targets={IN_PLACE: both(11)}),
            swapped(8, 512, 3000, targets={COMPOSED: both(3)}),
        ]
    if suite == "big":
        return []
    bf16 = torch.bfloat16
    return [
        plan(512, 1000, us=20),
        plan(1024, 3000, us=20),
        plan(4096, 3000, us=35),
        plan(65_536, 8192, us=2800),
        potentials(65_536, 8192, dtype=bf16, us=900),
        plan(1 << 20, 1024, us=5500),
        potentials(1 << 20, 1024, dtype=bf16, us=1800),
        swapped(8, 1024, 3000),
    ]


def plan(
    b: int,
    k: int,
    *,
    dtype: torch.dtype = torch.float32,
    targets: Mapping[str, Target] | None = None,
    us: float | None = None,
) -> Case:
    """The assignment matrix, fresh memory for each result."""
    passes = ITERATIONS + 1
    return Case(
        name=f"plan, {b} x {k}, T {ITERATIONS}, {_name(dtype)}",
        make=lambda generator: {"scores": cosines(generator, (b, k)).to(dtype)},
        implementations=(Implementation(OURS, _plan), *PLANS),
        oracle=lambda inputs: log_domain(inputs["scores"].double()),
        error=lambda inputs, oracle, result: relative_error(result[0], oracle),
        error_name="|Q - Q64| / |Q64|",
        tolerance=1e-4 if dtype == torch.float32 else 1e-2,
        work=Work(exps=passes * b * k, bytes=float((passes * dtype.itemsize + 4) * b * k)),
        targets=targets or {},
        target_seconds=None if us is None else us / 1e6,
    )


def potentials(
    b: int,
    k: int,
    *,
    dtype: torch.dtype = torch.float32,
    targets: Mapping[str, Target] | None = None,
    us: float | None = None,
) -> Case:
    """The K-vector that the plan is a softmax with; peers only have the whole plan."""

    def error(inputs: Inputs, oracle: Tensor, result: Result) -> float:
        answer = result[0].double()
        if answer.dim() == 1:
            answer = (inputs["scores"].double() / EPSILON + answer).softmax(-1)
        return relative_error(answer, oracle)

    return Case(
        name=f"potentials, {b} x {k}, T {ITERATIONS}, {_name(dtype)}",
        make=lambda generator: {"scores": cosines(generator, (b, k)).to(dtype)},
        implementations=(Implementation(OURS, _potentials), *PLANS),
        oracle=lambda inputs: log_domain(inputs["scores"].double()),
        error=error,
        error_name="|Q - Q64| / |Q64| of the plan that the potentials give",
        tolerance=1e-4 if dtype == torch.float32 else 1e-2,
        work=Work(exps=ITERATIONS * b * k, bytes=float(ITERATIONS * dtype.itemsize * b * k)),
        targets=targets or {},
        target_seconds=None if us is None else us / 1e6,
    )


def swapped(v: int, b: int, k: int, *, targets: Mapping[str, Target] | None = None) -> Case:
    """Forward and backward; two views are assigned, each predicted from all the others."""

    def oracle(inputs: Inputs) -> tuple[Tensor, Tensor]:
        return _with_gradient(inputs["scores"].double(), lambda scores: composed(scores, log_domain))

    def error(inputs: Inputs, answer: tuple[Tensor, Tensor], result: Result) -> float:
        return max(relative_error(mine, other) for mine, other in zip(result, answer, strict=True))

    # An exp an element in each pass: T for a plan, then the targets and every view's softmax, both ways.
    elements = b * k * (2 * ITERATIONS + 2 * (v + 2))
    return Case(
        name=f"swapped loss and gradient, {v} views x {b} x {k}",
        make=lambda generator: {"scores": cosines(generator, (v, b, k))},
        implementations=(Implementation(OURS, _swapped), *LOSSES),
        oracle=oracle,
        error=error,
        error_name="relative, of loss and gradient",
        tolerance=1e-4,
        work=Work(exps=elements, bytes=4.0 * b * k * (2 * ITERATIONS + 3 * v)),
        targets=targets or {},
    )


def cosines(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Scores as a model gives them: unit features times unit prototypes, 128 dimensions."""
    features, prototypes = (
        F.normalize(torch.randn(*size, 128, generator=generator, device=generator.device), dim=-1)
        for size in (shape[:-1], shape[-1:])
    )
    return features @ prototypes.T


def in_place(scores: Tensor) -> Tensor:
    """Exponentiate, then divide by the sums of columns and rows in turn: 23 passes for T = 3."""
    b, k = scores.shape
    plan = (scores.float() / EPSILON).exp()
    plan /= plan.sum()
    for _ in range(ITERATIONS):
        plan /= plan.sum(0, keepdim=True)
        plan /= k
        plan /= plan.sum(1, keepdim=True)
        plan /= b
    plan *= b
    return plan


def log_domain(scores: Tensor) -> Tensor:
    """The same plan as a softmax with a bias: ``a = -log K - LSE_b``, then T - 1 corrections."""
    z = scores.to(torch.promote_types(scores.dtype, torch.float32)) / EPSILON
    a = -math.log(z.shape[1]) - z.logsumexp(0)
    for _ in range(ITERATIONS - 1):
        a = a - math.log(z.shape[1]) - (z + a).softmax(1).mean(0).log()
    return (z + a).softmax(1)


def composed(scores: Tensor, solve: Callable[[Tensor], Tensor] = in_place) -> Tensor:
    """The swapped-prediction loss from its parts: a plan, a log-softmax and their product for each pair."""
    views = len(scores)
    loss = scores.new_zeros(())
    for i in (0, 1):
        with torch.no_grad():
            target = solve(scores[i])
        for v in set(range(views)) - {i}:
            loss = loss - (target * (scores[v] / TEMPERATURE).log_softmax(1)).sum(1).mean()
    return loss / (2 * (views - 1))


def _with_gradient(scores: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    scores = scores.detach().requires_grad_()
    value = loss(scores)
    return value.detach(), torch.autograd.grad(value, scores)[0]


def _plan(inputs: Inputs) -> Run:
    from clustops.sinkhorn import sinkhorn

    return lambda: (sinkhorn(inputs["scores"], epsilon=EPSILON, n_iters=ITERATIONS),)


def _potentials(inputs: Inputs) -> Run:
    from clustops.sinkhorn import sinkhorn_potentials

    return lambda: (sinkhorn_potentials(inputs["scores"], epsilon=EPSILON, n_iters=ITERATIONS),)


def _swapped(inputs: Inputs) -> Run:
    from clustops.sinkhorn_loss import swapped_prediction_loss

    def loss(scores: Tensor) -> Tensor:
        value: Tensor = swapped_prediction_loss(
            scores, temperature=TEMPERATURE, epsilon=EPSILON, n_iters=ITERATIONS
        )
        return value

    return lambda: _with_gradient(inputs["scores"], loss)


def _pot(inputs: Inputs) -> Run:
    import ot

    scores = inputs["scores"].float()
    b, k = scores.shape
    rows, columns = scores.new_full((b,), 1 / b), scores.new_full((k,), 1 / k)
    exact = {"numItermax": ITERATIONS, "stopThr": 0, "warn": False}
    return lambda: (ot.sinkhorn(rows, columns, -scores, EPSILON, **exact) * b,)


def _composed_compiled(inputs: Inputs) -> Run:
    loss = torch.compile(composed, dynamic=False)
    return lambda: _with_gradient(inputs["scores"], loss)


def _in_place_compiled(inputs: Inputs) -> Run:
    loop = torch.compile(in_place, dynamic=False)
    return lambda: (loop(inputs["scores"]),)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


PLANS = (
    Implementation(IN_PLACE, lambda inputs: lambda: (in_place(inputs["scores"]),)),
    Implementation("in-place loop, torch.compile", _in_place_compiled, compiles=True),
    Implementation("PyTorch potentials form", lambda inputs: lambda: (log_domain(inputs["scores"]),)),
    Implementation("POT sinkhorn", _pot),
)
LOSSES = (
    Implementation(COMPOSED, lambda inputs: lambda: _with_gradient(inputs["scores"], composed)),
    Implementation("composed loss, torch.compile", _composed_compiled, compiles=True),
)
