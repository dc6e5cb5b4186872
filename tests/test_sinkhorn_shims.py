"""The names that other training code calls, against the algorithms that it publishes."""

from __future__ import annotations

import doctest
import inspect
import math
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import assert_close, assert_message, generator, odd_sizes, run_ranks, seeds, small_sizes
from torch import Tensor

from clustops import sinkhorn_solve
from clustops.checks import ClustopsWarning
from clustops.distributed import default_group
from clustops.integrations import sinkhorn as shims
from clustops.integrations import sinkhorn_capi as capi
from clustops.integrations import sinkhorn_lightly as lightly

pytestmark = pytest.mark.filterwarnings("ignore::clustops.checks.ClustopsWarning")

double = torch.float64


def cosine_scores(seed: int, *shape: int, dtype: torch.dtype = double) -> Tensor:
    return (torch.rand(*shape, generator=generator(seed), dtype=double) * 2 - 1).to(dtype)


def scaled_to_marginals(scores: Tensor, temperature: float, n_iters: int) -> Tensor:
    """Matrix scaling by two vectors in fp64: prototypes to 1/K, then samples to 1/B, ``n_iters`` times."""
    kernel = np.exp(scores.double().numpy() / temperature)
    b, k = kernel.shape
    rows, columns = np.ones(b), np.ones(k)
    for _ in range(n_iters):
        columns = 1 / k / (kernel.T @ rows)
        rows = 1 / b / (kernel @ columns)
    return torch.from_numpy(b * rows[:, None] * kernel * columns)


def in_place_half(scores: Tensor, temperature: float) -> Tensor:
    """What a copy of the loop does with fp16: it exponentiates the scores as they are."""
    plan = torch.exp(scores / temperature)
    for _ in range(3):
        plan /= plan.sum(0)
        plan /= plan.sum(1, keepdim=True)
    return plan


def by_swav(scores: Tensor, temperature: float, n_iters: int) -> Tensor:
    return shims.distributed_sinkhorn(scores, epsilon=temperature, sinkhorn_iterations=n_iters)


def by_swav_arguments(scores: Tensor, temperature: float, n_iters: int) -> Tensor:
    return shims.distributed_sinkhorn_of(Namespace(epsilon=temperature, sinkhorn_iterations=n_iters))(scores)


def by_dino_module(scores: Tensor, temperature: float, n_iters: int) -> Tensor:
    result: Tensor = shims.SinkhornKnoppTeacher()(scores, temperature, None, n_iters)
    return result


def by_ibot(scores: Tensor, temperature: float, n_iters: int) -> Tensor:
    return shims.ibot_sinkhorn_knopp_teacher(scores, temperature, torch.tensor([len(scores)]), n_iters)


def by_capi(scores: Tensor, temperature: float, n_iters: int) -> Tensor:
    return capi.sinkhorn_knopp(scores / temperature, n_iters)


def by_lightly(scores: Tensor, temperature: float, n_iters: int) -> Tensor:
    return lightly.sinkhorn(scores, n_iters, temperature)


SHIMS: dict[str, Callable[[Tensor, float, int], Tensor]] = {
    "distributed_sinkhorn": by_swav,
    "distributed_sinkhorn_of": by_swav_arguments,
    "dino_sinkhorn_knopp_teacher": shims.dino_sinkhorn_knopp_teacher,
    "SinkhornKnoppTeacher": by_dino_module,
    "ibot_sinkhorn_knopp_teacher": by_ibot,
    "capi": by_capi,
    "lightly": by_lightly,
}
every_shim = pytest.mark.parametrize("shim", SHIMS.values(), ids=SHIMS)


@every_shim
@given(odd_sizes, odd_sizes, st.integers(1, 5), st.sampled_from([0.05, 0.07, 1.0]), seeds)
def test_equals_the_published_algorithm(
    shim: Callable[..., Tensor], b: int, k: int, n_iters: int, temperature: float, seed: int
) -> None:
    scores = cosine_scores(seed, b, k)
    expected = scaled_to_marginals(scores, temperature, n_iters)
    torch.testing.assert_close(shim(scores, temperature, n_iters), expected, rtol=1e-11, atol=1e-14)
    single = shim(scores.float(), temperature, n_iters)
    assert_close(single, scaled_to_marginals(scores.float(), temperature, n_iters), torch.float32)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (shims.dino_sinkhorn_knopp_teacher, "teacher_output, teacher_temp, n_iterations=3"),
        (
            shims.ibot_sinkhorn_knopp_teacher,
            "teacher_output, teacher_temp, n_masked_patches_tensor, n_iterations=3",
        ),
        (
            shims.SinkhornKnoppTeacher().forward,
            "teacher_output, teacher_temp, n_masked_patches_tensor=None, n_iterations=3",
        ),
        (shims.distributed_sinkhorn, "out"),
        (capi.sinkhorn_knopp, "M, n_iterations, eps=1e-08"),
        (capi.OnlineClustering, "in_dim, out_dim"),
        (capi.OnlineClustering(2, 2, bias=False, n_sk_iter=3, target_temp=1, pred_temp=1).forward, "x"),
        (lightly.sinkhorn, "out, iterations=3, epsilon=0.05, gather_distributed=False"),
        (
            lightly.SwaVLoss,
            "temperature=0.1, sinkhorn_iterations=3, sinkhorn_epsilon=0.05, "
            "sinkhorn_gather_distributed=False",
        ),
        (
            lightly.SwaVLoss().forward,
            "high_resolution_outputs, low_resolution_outputs, queue_outputs=None",
        ),
    ],
)
def test_positional_arguments_have_the_published_order_and_defaults(
    function: Callable[..., Any], arguments: str
) -> None:
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind != p.KEYWORD_ONLY]
    assert ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) == arguments


@every_shim
def test_assignments_carry_no_gradient_and_the_scores_are_not_written(shim: Callable[..., Tensor]) -> None:
    scores = cosine_scores(0, 9, 4).requires_grad_()
    before = scores.detach().clone()
    result = shim(scores, 0.05, 3)
    assert not result.requires_grad
    assert result.is_contiguous()
    result += 1
    assert torch.equal(scores.detach(), before)


KEEP = ("distributed_sinkhorn", "distributed_sinkhorn_of", "capi", "lightly")


@pytest.mark.parametrize("name", SHIMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_that_of_the_published_result(name: str, dtype: torch.dtype) -> None:
    scores = cosine_scores(0, 12, 5, dtype=dtype)
    result = SHIMS[name](scores, 0.07, 3)
    wide = double if dtype == double else torch.float32
    assert result.dtype == (dtype if name in KEEP else wide)


@every_shim
def test_half_precision_scores_do_not_overflow_as_they_do_in_the_loop(shim: Callable[..., Tensor]) -> None:
    half = cosine_scores(0, 32, 8, dtype=torch.float16) * 2
    assert in_place_half(half, 0.05).isnan().any()
    result = shim(half, 0.05, 3)
    # CAPI divides by the temperature before the call, in half precision.
    seen = half / 0.05 if shim is by_capi else half.double() / 0.05
    assert_close(result, scaled_to_marginals(seen, 1.0, 3), torch.float16)


def test_unnormalised_logits_do_not_overflow_as_they_do_in_the_loop() -> None:
    logits = cosine_scores(0, 64, 16, dtype=torch.float32) * 40
    assert in_place_half(logits, 0.07).isnan().any()
    result = shims.dino_sinkhorn_knopp_teacher(logits, 0.07)
    assert result.isfinite().all()
    assert_close(result.sum(-1), torch.ones(64), torch.float32)
    assert_close(result, shims.dino_sinkhorn_knopp_teacher(logits.double(), 0.07), torch.float32, scale=10)


def test_temperature_is_epsilon() -> None:
    scores = cosine_scores(0, 20, 6)
    expected = lightly.sinkhorn(scores, epsilon=0.07)
    torch.testing.assert_close(shims.dino_sinkhorn_knopp_teacher(scores, teacher_temp=0.07), expected)
    torch.testing.assert_close(capi.sinkhorn_knopp(scores / 0.07, 3), expected)
    assert (lightly.sinkhorn(scores) - expected).abs().max() > 1e-3


def test_arguments_of_a_command_line_are_read_at_each_call() -> None:
    scores, args = cosine_scores(0, 20, 6), Namespace(epsilon=0.05, sinkhorn_iterations=3)
    sinkhorn = shims.distributed_sinkhorn_of(args)
    torch.testing.assert_close(sinkhorn(scores), scaled_to_marginals(scores, 0.05, 3))
    args.epsilon, args.sinkhorn_iterations = 0.2, 10
    torch.testing.assert_close(sinkhorn(scores), scaled_to_marginals(scores, 0.2, 10))


class Loss(torch.nn.Module):
    """As the classes of DINOv2 use them."""

    dino = staticmethod(shims.dino_sinkhorn_knopp_teacher)
    ibot = staticmethod(shims.ibot_sinkhorn_knopp_teacher)


def test_functions_take_the_place_of_methods() -> None:
    scores = cosine_scores(0, 10, 4)
    expected = scaled_to_marginals(scores, 0.04, 3)
    torch.testing.assert_close(Loss().dino(scores, teacher_temp=0.04), expected)
    patches = Loss().ibot(scores, teacher_temp=0.04, n_masked_patches_tensor=torch.full((1,), 10))
    torch.testing.assert_close(patches, expected)


# --- padding


@given(small_sizes, st.integers(0, 7), small_sizes, st.sampled_from([0.0, math.nan, math.inf, 1e30]), seeds)
def test_rows_of_padding_have_no_say_and_get_zero(
    n: int, padding: int, k: int, junk: float, seed: int
) -> None:
    patches = cosine_scores(seed, n, k)
    padded = torch.cat([patches, torch.full((padding, k), junk, dtype=double)])
    expected = scaled_to_marginals(patches, 0.07, 3)
    for count in (n, torch.tensor(n), torch.tensor([n])):
        result = shims.ibot_sinkhorn_knopp_teacher(padded, 0.07, count)
        torch.testing.assert_close(result[:n], expected, rtol=1e-11, atol=1e-14)
        assert (result[n:] == 0).all()


def test_without_a_patch_all_is_zero() -> None:
    result = shims.ibot_sinkhorn_knopp_teacher(torch.ones(5, 3), 0.07, torch.tensor([0]))
    assert torch.equal(result, torch.zeros(5, 3))


def test_the_number_of_patches_is_not_written() -> None:
    count = torch.tensor([4])
    shims.ibot_sinkhorn_knopp_teacher(cosine_scores(0, 6, 3), 0.07, count)
    assert count == 4


def test_more_patches_than_rows_are_all_rows() -> None:
    scores = cosine_scores(0, 6, 3)
    result = shims.ibot_sinkhorn_knopp_teacher(scores, 0.07, torch.tensor([99]))
    torch.testing.assert_close(result, scaled_to_marginals(scores, 0.07, 3))


# --- CAPI


@pytest.mark.parametrize("positionwise", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_online_clustering_assigns_each_position_alone_or_all_together(
    positionwise: bool, bias: bool
) -> None:
    head = capi.OnlineClustering(
        8, 5, bias=bias, n_sk_iter=3, target_temp=0.06, pred_temp=0.12, positionwise_sk=positionwise
    ).double()
    x = torch.randn(4, 10, 8, generator=generator(0), dtype=double)
    assignments, loss = head(x)
    logits = (x / x.norm(dim=-1, keepdim=True)) @ head.layer.weight.T + (head.layer.bias if bias else 0)
    parts = logits.detach() if positionwise else logits.detach().flatten(0, 1)[None]
    expected = torch.stack([scaled_to_marginals(part, 0.06, 3) for part in parts]).view(4, 10, 5)
    torch.testing.assert_close(assignments, expected, rtol=1e-9, atol=1e-12)
    cross_entropy = -(expected * torch.log_softmax(logits / 0.12, -1)).sum(-1).mean()
    torch.testing.assert_close(loss, cross_entropy)
    assert not assignments.requires_grad
    (ours,) = torch.autograd.grad(loss, head.layer.weight, retain_graph=True)
    (plain,) = torch.autograd.grad(cross_entropy, head.layer.weight)
    torch.testing.assert_close(ours, plain)


def test_online_clustering_loads_the_published_state() -> None:
    head = capi.OnlineClustering(8, 5, bias=True, n_sk_iter=3, target_temp=0.06, pred_temp=0.12)
    assert {name: tuple(t.shape) for name, t in head.state_dict().items()} == {
        "layer.weight": (5, 8),
        "layer.bias": (5,),
    }
    assert (head.layer.bias == 0).all()
    assert 0.5 < head.layer.weight.std() < 1.6


def test_online_clustering_works_under_autocast() -> None:
    head = capi.OnlineClustering(8, 5, bias=False, n_sk_iter=3, target_temp=0.06, pred_temp=0.12)
    x = torch.randn(3, 10, 8, generator=generator(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assignments, loss = head(x)
    loss.backward()
    assert (assignments.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert loss.isfinite()
    assert head.layer.weight.grad is not None
    assert head.layer.weight.grad.isfinite().all()


# --- lightly


def swav_loss(high: list[Tensor], low: list[Tensor], queue: list[Tensor] | None) -> Tensor:
    """Equation 6 of the paper, pair by pair."""
    views, total = [*high, *low], torch.zeros((), dtype=double)
    for i, scores in enumerate(high):
        joint = scores.detach() if queue is None else torch.cat([scores.detach(), queue[i]])
        q = scaled_to_marginals(joint, 0.05, 3)[: len(scores)]
        others = [v for j, v in enumerate(views) if j != i]
        total = total - sum((q * F.log_softmax(v / 0.1, 1)).sum(1).mean() for v in others) / len(others)
    return total / len(high)


@given(st.integers(1, 3), st.integers(0, 3), small_sizes, small_sizes, st.integers(0, 6), seeds)
def test_lightly_loss_equals_the_equation_of_the_paper(
    n_high: int, n_low: int, b: int, k: int, queued: int, seed: int
) -> None:
    n_low = max(n_low, 2 - n_high)
    scores = cosine_scores(seed, n_high + n_low, b, k).requires_grad_()
    high, low = list(scores[:n_high]), list(scores[n_high:])
    for queue in (None, list(cosine_scores(seed + 1, n_high, queued, k))):
        loss, expected = lightly.SwaVLoss()(high, low, queue), swav_loss(high, low, queue)
        torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-13)
        (ours,), (plain,) = (torch.autograd.grad(x, scores, retain_graph=True) for x in (loss, expected))
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


def test_settings_of_the_lightly_loss_have_an_effect() -> None:
    scores = list(cosine_scores(0, 2, 12, 4))
    losses = [
        lightly.SwaVLoss(**settings)(scores, [])
        for settings in (
            {},
            {"temperature": 0.2},
            {"sinkhorn_epsilon": 0.2},
            {"sinkhorn_iterations": 0},
        )
    ]
    assert len({round(float(loss), 6) for loss in losses}) == 4


# --- warnings


@pytest.mark.parametrize("name", SHIMS)
def test_only_methods_that_want_more_rows_than_prototypes_warn(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinkhorn_solve, "_warned", False)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", ClustopsWarning)
        SHIMS[name](cosine_scores(0, 5, 20), 0.05, 3)
    assert len(raised) == ("sinkhorn_of" in name or name in ("distributed_sinkhorn", "lightly"))


# --- ranks

CUTS = {"equal": [0, 12, 24], "unequal": [0, 5, 24], "an empty one": [0, 0, 24]}
PATCHES = [4, 9]
BUFFER = 11


def patches_of(rank: int) -> Tensor:
    padded = torch.full((BUFFER, 5), math.nan, dtype=double)
    padded[: PATCHES[rank]] = cosine_scores(rank + 1, PATCHES[rank], 5)
    return padded


def on_a_rank(rank: int, world: int, cuts: list[int]) -> dict[str, Tensor]:
    scores = cosine_scores(0, 24, 5)[cuts[rank] : cuts[rank + 1]]
    results = {name: shim(scores, 0.07, 3) for name, shim in SHIMS.items() if name != "lightly"}
    results["gathered"] = lightly.sinkhorn(scores, epsilon=0.07, gather_distributed=True)
    results["positions"] = capi.sinkhorn_knopp(scores.view(-1, 1, 5).transpose(0, 1) / 0.07, 3)
    results["explicit"] = shims.SinkhornKnoppTeacher(default_group())(scores, 0.07)
    count = torch.tensor([PATCHES[rank]])
    results["patches"] = shims.SinkhornKnoppTeacher()(patches_of(rank), 0.07, count)
    results["count"] = count
    return results


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_ranks_share_one_assignment(cuts: list[int]) -> None:
    expected = scaled_to_marginals(cosine_scores(0, 24, 5), 0.07, 3)
    ranks = run_ranks(2, on_a_rank, cuts)
    for name in {*SHIMS, "gathered", "positions", "explicit"} - {"lightly"}:
        joint = torch.cat([result[name].reshape(-1, 5) for result in ranks])
        torch.testing.assert_close(joint, expected, rtol=1e-11, atol=1e-13, msg=name)


def test_ranks_may_have_different_numbers_of_patches() -> None:
    patches = [patches_of(rank)[:n] for rank, n in enumerate(PATCHES)]
    expected = scaled_to_marginals(torch.cat(patches), 0.07, 3).split(PATCHES)
    for rank, result in enumerate(run_ranks(2, on_a_rank, CUTS["equal"])):
        torch.testing.assert_close(result["patches"][: PATCHES[rank]], expected[rank])
        assert (result["patches"][PATCHES[rank] :] == 0).all()
        assert result["count"] == PATCHES[rank]


def alone_and_online_on_a_rank(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    scores = cosine_scores(0, 24, 5)[12 * rank : 12 * rank + 12]
    head = capi.OnlineClustering(5, 5, bias=False, n_sk_iter=3, target_temp=0.07, pred_temp=0.12).double()
    torch.nn.init.eye_(head.layer.weight)
    return lightly.sinkhorn(scores, epsilon=0.07), *(t.detach() for t in head(scores))


def test_online_clustering_is_over_ranks_and_lightly_is_not_unless_asked() -> None:
    scores = cosine_scores(0, 24, 5)
    cosines = F.normalize(scores, dim=-1)
    joint = scaled_to_marginals(cosines, 0.07, 3)
    loss = -(joint * torch.log_softmax(cosines / 0.12, -1)).sum(-1).mean()
    results = run_ranks(2, alone_and_online_on_a_rank)
    for (alone, assignments, _), part, shared in zip(results, scores.chunk(2), joint.chunk(2), strict=True):
        torch.testing.assert_close(alone, scaled_to_marginals(part, 0.07, 3))
        torch.testing.assert_close(assignments, shared)
    torch.testing.assert_close(torch.stack([result[2] for result in results]).mean(), loss)


def lightly_loss_of_a_rank(rank: int, world: int, gather: bool) -> Tensor:
    scores = cosine_scores(0, 3, 24, 5)[:, 12 * rank : 12 * rank + 12]
    queue = list(cosine_scores(1, 2, 8, 5)[:, 4 * rank : 4 * rank + 4])
    loss: Tensor = lightly.SwaVLoss(sinkhorn_gather_distributed=gather)(list(scores[:2]), [scores[2]], queue)
    return loss


def test_lightly_gathers_only_when_asked() -> None:
    scores, queue = cosine_scores(0, 3, 24, 5), cosine_scores(1, 2, 8, 5)
    joint = swav_loss(list(scores[:2]), [scores[2]], list(queue))
    gathered = torch.stack(run_ranks(2, lightly_loss_of_a_rank, True))
    torch.testing.assert_close(gathered.mean(), joint)
    for rank, loss in enumerate(run_ranks(2, lightly_loss_of_a_rank, False)):
        part, queued = scores[:, 12 * rank : 12 * rank + 12], queue[:, 4 * rank : 4 * rank + 4]
        torch.testing.assert_close(loss, swav_loss(list(part[:2]), [part[2]], list(queued)))


# --- tracing


def test_the_module_compiles_for_any_size_temperature_and_number_of_patches() -> None:
    torch._dynamo.reset()
    teacher = shims.SinkhornKnoppTeacher()
    compiled = torch.compile(teacher, fullgraph=True, dynamic=True, backend="aot_eager")
    for b, k, temperature in ((8, 5, 0.04), (17, 9, 0.05), (31, 40, 0.07)):
        scores, count = cosine_scores(b, b, k, dtype=torch.float32), torch.tensor([b - 3])
        result, expected = compiled(scores, temperature, count), teacher(scores, temperature, count)
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def compiled_on_a_rank(rank: int, world: int) -> tuple[Tensor, Tensor]:
    torch._dynamo.reset()
    teacher, count = shims.SinkhornKnoppTeacher(), torch.tensor([PATCHES[rank]])
    compiled = torch.compile(teacher, fullgraph=True, backend="aot_eager")
    return compiled(patches_of(rank), 0.07, count), teacher(patches_of(rank), 0.07, count)


def test_the_compiled_module_shares_an_assignment_over_ranks() -> None:
    for compiled, expected in run_ranks(2, compiled_on_a_rank):
        torch.testing.assert_close(compiled, expected)


# --- errors

S = torch.eye(6, 4)
LIST: Any = [[1.0]]
BAD: list[tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = [
    (partial(shims.distributed_sinkhorn, LIST), TypeError, ("out", "a tensor", "got list")),
    (partial(shims.distributed_sinkhorn, S.long()), TypeError, ("out", "float32", "got torch.int64")),
    (partial(shims.distributed_sinkhorn, S[:0]), ValueError, ("out", "at least one row", "got [0, 4]")),
    (partial(shims.distributed_sinkhorn, S, epsilon=0), ValueError, ("epsilon", "above 0", "got 0")),
    (partial(shims.distributed_sinkhorn, S / 0), ValueError, ("scores", "finite", "24 NaN")),
    (partial(shims.distributed_sinkhorn, S, group="all"), ValueError, ("group", "None", "got str")),
    (
        partial(shims.dino_sinkhorn_knopp_teacher, S, 0.0),
        ValueError,
        ("teacher_temp", "above 0", "got 0.0", "0.04"),
    ),
    (
        partial(shims.dino_sinkhorn_knopp_teacher, S[0], 0.04),
        ValueError,
        ("teacher_output", "[..., B, K]", "got [4]"),
    ),
    (
        partial(shims.ibot_sinkhorn_knopp_teacher, S, 0.04, torch.tensor([3, 3])),
        ValueError,
        ("n_masked_patches_tensor", "one number", "got [2]", "this rank"),
    ),
    (partial(shims.ibot_sinkhorn_knopp_teacher, LIST, 0.04, 3), TypeError, ("teacher_output", "a tensor")),
    (partial(capi.sinkhorn_knopp, S[:0], 3), ValueError, ("M", "at least one row", "got [0, 4]")),
    (
        partial(capi.OnlineClustering, 4, 3, bias=True, n_sk_iter=3, target_temp=0, pred_temp=1),
        ValueError,
        ("target_temp", "above 0", "got 0"),
    ),
    (
        partial(capi.OnlineClustering, 4, 3, bias=True, n_sk_iter=3, target_temp=1, pred_temp=-1),
        ValueError,
        ("pred_temp", "above 0", "got -1"),
    ),
    (partial(lightly.sinkhorn, S, -1), ValueError, ("n_iters", "at least 0", "got -1")),
    (partial(lightly.SwaVLoss, temperature=0), ValueError, ("temperature", "above 0", "got 0")),
    (partial(lightly.SwaVLoss, sinkhorn_epsilon=0), ValueError, ("sinkhorn_epsilon", "above 0", "got 0")),
    (partial(lightly.SwaVLoss(), [], [S]), ValueError, ("high_resolution_outputs", "one view", "got none")),
]


@pytest.mark.parametrize(
    ("call", "error", "parts"), BAD, ids=[f"{i}-{case[2][0]}" for i, case in enumerate(BAD)]
)
def test_bad_input_is_explained(
    call: Callable[[], Any], error: type[Exception], parts: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        call()
    assert_message(caught.value, *parts)


@pytest.mark.parametrize("module", [shims, capi, lightly])
def test_examples_in_the_documentation_run(module: Any) -> None:
    failed, ran = doctest.testmod(sys.modules[module.__name__])
    assert ran > 0
    assert failed == 0
