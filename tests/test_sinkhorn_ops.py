"""Registration of the Sinkhorn ops: schemas, fakes, autograd formulas, tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import generator
from torch import Tensor

from clustops.sinkhorn import assign_from_potentials, sinkhorn, sinkhorn_potentials
from clustops.sinkhorn_loss import soft_cross_entropy, swapped_prediction_loss
from clustops.sinkhorn_matrix import sinkhorn_matrix

pytestmark = pytest.mark.filterwarnings("ignore::clustops.checks.ClustopsWarning")

OPS = torch.ops.clustops


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=generator(seed)).to(dtype)


def samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    scores, half = random(3, 7, 5), random(3, 7, 5, dtype=torch.bfloat16)
    leaf, half_leaf = scores.clone().requires_grad_(), half.clone().requires_grad_()
    rows, prior = random(3, 7, seed=1), random(3, 5, seed=2)
    no_pairs: list[int] = []
    losses, p, q = OPS.soft_cross_entropy(scores, scores, prior, no_pairs, no_pairs, 0.1, 0.05)
    backward = OPS.soft_cross_entropy_backward
    cases: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "potentials": (
            OPS.sinkhorn_potentials,
            (scores, None, None, None, None, 0.05, 3, None, None, None, None),
        ),
        "potentials, bf16, all arguments": (
            OPS.sinkhorn_potentials,
            (half, half[:, :4], prior, rows, random(3, 6), 0.05, 3, 0.5, 0.5, 1e-3, 1.0),
        ),
        "potentials, no update": (
            OPS.sinkhorn_potentials,
            (scores, None, None, None, prior, 0.05, 0, None, None, None, None),
        ),
        "column mass": (OPS.sinkhorn_column_mass, (scores, None, rows, prior, 0.05, True)),
        "column mass, no rows": (OPS.sinkhorn_column_mass, (scores[:, :0], None, None, prior, 0.05, False)),
        "column mass, a queue": (OPS.sinkhorn_column_mass, (half, half[:, :4], rows, prior, 0.05, True)),
        "plan": (
            OPS.sinkhorn_,
            (random(3, 7, 5), scores, None, None, None, None, 0.05, 3, None, None, None, False),
        ),
        "plan, bf16, all arguments": (
            OPS.sinkhorn_,
            (half.clone(), half, half[:, :4], prior, rows, random(3, 6), 0.05, 3, 0.5, 0.5, 1e-3, True),
        ),
        "assign": (OPS.assign_from_potentials_, (random(3, 7, 5), scores, prior, 0.05, False)),
        "assign, hard, virtual column": (
            OPS.assign_from_potentials_,
            (half.clone(), half, random(3, 6), 0.05, True),
        ),
        "cross-entropy": (OPS.soft_cross_entropy, (leaf, scores, prior, no_pairs, no_pairs, 0.1, 0.05)),
        "cross-entropy, pairs": (
            OPS.soft_cross_entropy,
            (half_leaf, half[:2], prior[:2], [0, 1, 2], [1, 0, 0], 0.1, 0.05),
        ),
        "cross-entropy backward": (
            backward,
            (losses, scores, scores, prior, p, q, no_pairs, no_pairs, 0.1, 0.05),
        ),
        "matrix": (OPS.sinkhorn_matrix, (random(4, 3, 3).requires_grad_(), 5)),
        "matrix backward": (OPS.sinkhorn_matrix_backward, (random(4, 3, 3), random(4, 3, 3, seed=1), 5)),
    }
    return cases


@pytest.mark.parametrize("name", samples())
def test_registration_passes_opcheck(name: str) -> None:
    op, arguments = samples()[name]
    torch.library.opcheck(op, arguments)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sinkhorn": lambda s: sinkhorn(s, tol=1e-3, weights=s[..., 0].square()),
    "sinkhorn, unrolled": lambda s: sinkhorn(s, gradient="unrolled"),
    "sinkhorn, in place": lambda s: sinkhorn(s, out=torch.empty_like(s), queue_scores=s[:, :2].detach()),
    "potentials": lambda s: sinkhorn_potentials(s, mass=0.5, relax=1.0),
    "assign": lambda s: assign_from_potentials(s, s[:, 0].float(), epsilon=0.05),
    "swapped": lambda s: swapped_prediction_loss(s, queue_scores=s[:2], weights=s[0, :, 0].detach().square()),
    "soft": lambda s: soft_cross_entropy(s, s, temperature=0.1, target_temperature=0.05, reduction="none"),
    "soft, pairs": lambda s: soft_cross_entropy(
        s, s[:2], -s[:2].mean((0, 1)) / 0.04, temperature=0.1, target_temperature=0.04, pairs=[(0, 1), (2, 0)]
    ),
    "matrix": lambda s: sinkhorn_matrix(s[..., :4, :4]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_traces_as_a_full_graph_without_recompiles_across_sizes(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, dynamic=True, backend="aot_eager")
    for stance, b, k in (("default", 8, 5), ("fail_on_recompile", 17, 9), ("fail_on_recompile", 31, 40)):
        scores, plain = (random(3, b, k, seed=b).requires_grad_() for _ in range(2))
        with torch.compiler.set_stance(stance):
            result = compiled(scores)
        expected = FUNCTIONS[name](plain)
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
        if expected.requires_grad:
            result.square().sum().backward()
            expected.square().sum().backward()
            torch.testing.assert_close(scores.grad, plain.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("name", FUNCTIONS)
def test_on_a_gpu_nothing_waits_for_the_host_and_the_result_is_the_same(name: str) -> None:
    scores = random(3, 67, 13)
    expected = FUNCTIONS[name](scores)
    on_device = scores.cuda()
    FUNCTIONS[name](on_device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = FUNCTIONS[name](on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-4, atol=1e-5)
