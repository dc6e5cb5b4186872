"""The swapped-prediction loss and the soft cross-entropy: values, gradients, masks, memory."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import assert_close, generator, odd_sizes, seeds, small_sizes
from torch import Tensor

from clustops import reference, sinkhorn_solve
from clustops.checks import ClustopsWarning
from clustops.sinkhorn import sinkhorn, sinkhorn_potentials
from clustops.sinkhorn_loss import soft_cross_entropy, swapped_prediction_loss

pytestmark = [
    pytest.mark.usefixtures("path"),
    pytest.mark.filterwarnings("ignore::clustops.checks.ClustopsWarning"),
]

double = torch.float64
REDUCTIONS = ("mean", "sum", "none")


def cosine_scores(seed: int, *shape: int, dtype: torch.dtype = double) -> Tensor:
    return (torch.rand(*shape, generator=generator(seed), dtype=double) * 2 - 1).to(dtype)


def written_out(scores: Tensor, assign_views: tuple[int, ...], queue: Tensor | None = None) -> Tensor:
    """The loss as the paper's pseudo-code has it: loops over crops, plans by the in-place loop."""
    total = torch.zeros((), dtype=scores.dtype)
    for a, i in enumerate(assign_views):
        rows = scores[i].detach() if queue is None else torch.cat([scores[i].detach(), queue[a]])
        plan = torch.exp(rows / 0.05)
        for _ in range(3):
            plan = plan / plan.sum(0)
            plan = plan / plan.sum(1, keepdim=True)
        q = plan[: scores.shape[1]]
        others = [v for v in range(len(scores)) if v != i]
        for v in others:
            p = torch.exp(scores[v] / 0.1) / torch.exp(scores[v] / 0.1).sum(1, keepdim=True)
            total = total - (q * torch.log(p)).sum(1).mean() / len(others)
    return total / len(assign_views)


def gradients(loss: Tensor, scores: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, scores)
    return gradient


@given(st.integers(2, 5), odd_sizes, odd_sizes, seeds, st.data())
def test_swapped_loss_equals_the_loops_of_the_paper(
    v: int, b: int, k: int, seed: int, data: st.DataObject
) -> None:
    scores = cosine_scores(seed, v, b, k).requires_grad_()
    views = data.draw(st.permutations(range(v)).map(lambda order: tuple(order[: max(1, v // 2)])))
    loss, expected = swapped_prediction_loss(scores, assign_views=views), written_out(scores, views)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gradients(loss, scores), gradients(expected, scores), rtol=1e-9, atol=1e-12)


@given(small_sizes, small_sizes, st.integers(0, 9), seeds)
def test_queue_takes_part_in_the_assignment_only(b: int, k: int, n: int, seed: int) -> None:
    scores, queue = cosine_scores(seed, 3, b, k), cosine_scores(seed + 1, 2, n, k)
    loss = swapped_prediction_loss(scores, queue_scores=queue)
    torch.testing.assert_close(loss, written_out(scores, (0, 1), queue), rtol=1e-11, atol=1e-13)
    shared = swapped_prediction_loss(scores, queue_scores=queue[0])
    torch.testing.assert_close(shared, written_out(scores, (0, 1), queue[:1].expand(2, -1, -1)))


def test_rows_of_the_queue_count_fully_beside_weighted_samples() -> None:
    scores, queue = cosine_scores(0, 2, 6, 4), cosine_scores(1, 2, 9, 4)
    weights = torch.tensor([1, 2, 1, 0, 3, 1])
    repeated = scores.repeat_interleave(weights, dim=1)
    weighted = swapped_prediction_loss(scores, weights=weights, queue_scores=queue)
    torch.testing.assert_close(weighted, written_out(repeated, (0, 1), queue))


def test_given_potentials_replace_sinkhorn() -> None:
    scores = cosine_scores(0, 3, 20, 5)
    potentials = sinkhorn_potentials(scores[:2])
    torch.testing.assert_close(
        swapped_prediction_loss(scores, potentials=potentials), swapped_prediction_loss(scores)
    )
    shared = swapped_prediction_loss(scores, potentials=potentials[0], n_iters=50)
    q = torch.softmax(scores[:2] / 0.05 + potentials[0], -1)
    log_p = torch.log_softmax(scores / 0.1, -1)
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2)]
    torch.testing.assert_close(
        shared, torch.stack([-(q[i] * log_p[v]).sum(-1).mean() for i, v in pairs]).mean()
    )


def test_no_gradient_goes_through_the_targets() -> None:
    scores = cosine_scores(0, 2, 10, 4).requires_grad_()
    potentials = torch.zeros(4, dtype=double, requires_grad=True)
    swapped_prediction_loss(scores, potentials=potentials, assign_views=(0,)).backward()
    assert scores.grad is not None
    assert (scores.grad[0] == 0).all()
    assert potentials.grad is None
    target, bias = scores.detach().clone().requires_grad_(), potentials
    soft_cross_entropy(scores, target, bias, temperature=0.1, target_temperature=0.05).backward()
    assert target.grad is None
    assert bias.grad is None


@given(st.integers(2, 4), small_sizes, small_sizes, seeds)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_losses_equal_the_reference_with_random_upstream_gradients(
    reduction: str, v: int, b: int, k: int, seed: int
) -> None:
    scores = cosine_scores(seed, v, b, k).requires_grad_()
    targets, bias = cosine_scores(seed + 1, v, b, k), cosine_scores(seed + 2, v, k)
    weights = torch.rand(b, generator=generator(seed)) + 0.1
    soft = {"temperature": 0.1, "target_temperature": 0.07, "weights": weights, "reduction": reduction}
    cases = (
        ("swapped_prediction_loss", (), {"weights": weights, "reduction": reduction}),
        ("soft_cross_entropy", (targets, bias), soft),
        ("soft_cross_entropy", (targets[:2], bias[:2]), {**soft, "pairs": [(1, 0), (0, 1), (v - 1, 0)]}),
    )
    for name, tensors, settings in cases:
        loss = globals()[name](scores, *tensors, **settings)
        oracle = getattr(reference, name)(scores, *tensors, **settings)
        torch.testing.assert_close(loss, oracle, rtol=1e-11, atol=1e-13)
        upstream = torch.randn(loss.shape, generator=generator(seed), dtype=double)
        ours, plain = gradients((loss * upstream).sum(), scores), gradients((oracle * upstream).sum(), scores)
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


def test_gradient_is_exact() -> None:
    scores, target = cosine_scores(0, 3, 4, 5).requires_grad_(), cosine_scores(1, 3, 4, 5)
    fixed = sinkhorn_potentials(scores.detach()[:2], epsilon=1e6)
    assert torch.autograd.gradcheck(
        lambda s: soft_cross_entropy(
            s, target, fixed[0], temperature=0.3, target_temperature=0.2, reduction="none"
        ),
        scores,
    )
    # With only view 0 assigned and only view 0's scores held, the targets are constant.
    rest = scores.detach()[1:].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda r: swapped_prediction_loss(
            torch.cat([scores.detach()[:1], r]), assign_views=(0,), temperature=0.4, reduction="none"
        ),
        rest,
    )


def test_shapes_of_unreduced_losses() -> None:
    scores = cosine_scores(0, 3, 7, 5)
    settings: dict[str, Any] = {"temperature": 0.1, "target_temperature": 0.05, "reduction": "none"}
    assert swapped_prediction_loss(scores, reduction="none").shape == (7,)
    assert soft_cross_entropy(scores, scores, **settings).shape == (3, 7)
    assert soft_cross_entropy(scores[0], scores[0], **settings).shape == (7,)
    assert soft_cross_entropy(scores, scores[:2], pairs=[(0, 1), (2, 0)], **settings).shape == (2, 7)
    four = scores.expand(2, 3, 7, 5)
    assert soft_cross_entropy(four, four, four[:, :, 0], **settings).shape == (2, 3, 7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_masked_sample_may_hold_nan_and_leaves_no_trace(reduction: str) -> None:
    clean = cosine_scores(0, 3, 10, 5)
    kept = torch.ones(10)
    kept[[2, 7]] = 0
    dirty = clean.clone()
    dirty[:, [2, 7]] = math.nan
    dirty.requires_grad_()
    alone = clean[:, kept > 0].requires_grad_()

    def losses(scores: Tensor, weights: Tensor | None) -> list[Tensor]:
        settings: dict[str, Any] = {
            "temperature": 0.1,
            "target_temperature": 0.05,
            "weights": weights,
            "reduction": reduction,
        }
        return [
            swapped_prediction_loss(scores, weights=weights, reduction=reduction),
            soft_cross_entropy(scores, scores, **settings),
            soft_cross_entropy(scores, scores, pairs=[(0, 1), (2, 0)], **settings),
        ]

    for masked, expected in zip(losses(dirty, kept), losses(alone, None), strict=True):
        if reduction == "none":
            assert (masked[..., [2, 7]] == 0).all()
            torch.testing.assert_close(masked[..., kept > 0], expected)
        else:
            torch.testing.assert_close(masked, expected)
        gradient = gradients(masked.sum(), dirty)
        assert (gradient[:, kept == 0] == 0).all()
        torch.testing.assert_close(gradient[:, kept > 0], gradients(expected.sum(), alone))


def test_weight_two_is_a_sample_twice() -> None:
    scores, weights = cosine_scores(0, 3, 6, 4), torch.tensor([1, 2, 1, 0, 3, 1])
    repeated = scores.repeat_interleave(weights, dim=1)
    torch.testing.assert_close(
        swapped_prediction_loss(scores, weights=weights), swapped_prediction_loss(repeated)
    )


def test_centering_of_dino_is_a_bias() -> None:
    student, teacher = cosine_scores(0, 5, 12, 6) * 4, cosine_scores(1, 2, 12, 6) * 4
    center = teacher.mean((0, 1))
    pairs = [(v, t) for t, v in itertools.product(range(2), range(5)) if v != t]
    loss = soft_cross_entropy(
        student, teacher, -center / 0.04, temperature=0.1, target_temperature=0.04, pairs=pairs
    )
    q = torch.softmax((teacher - center) / 0.04, -1)
    terms = [-(q[t] * torch.log_softmax(student[v] / 0.1, -1)).sum(-1).mean() for v, t in pairs]
    torch.testing.assert_close(loss, torch.stack(terms).mean())


def test_a_prototype_with_bias_minus_infinity_is_no_target() -> None:
    scores, target = cosine_scores(0, 8, 4).requires_grad_(), cosine_scores(1, 8, 4)
    bias = torch.tensor([0.0, -math.inf, 0.0, 0.0])
    loss = soft_cross_entropy(scores, target, bias, temperature=0.1, target_temperature=0.05)
    q = torch.softmax(target[:, [0, 2, 3]] / 0.05, -1)
    expected = -(q * torch.log_softmax(scores / 0.1, -1)[:, [0, 2, 3]]).sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, scores), gradients(expected, scores))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_scores_give_a_single_precision_loss_and_a_gradient_in_their_dtype(
    dtype: torch.dtype,
) -> None:
    scores = cosine_scores(0, 3, 40, 9, dtype=dtype).requires_grad_()
    exact = scores.detach().double().requires_grad_()
    queue = cosine_scores(1, 30, 9, dtype=dtype)
    loss, oracle = (
        swapped_prediction_loss(s, queue_scores=q) for s, q in ((scores, queue), (exact, queue.double()))
    )
    assert loss.dtype == torch.float32
    assert_close(loss.detach(), oracle.detach(), torch.float32)
    gradient = gradients(loss, scores)
    assert gradient.dtype == dtype
    assert_close(gradient, gradients(oracle, exact), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    scores = cosine_scores(0, 2, 30, 5, dtype=torch.float32).requires_grad_()
    plain = swapped_prediction_loss(scores)
    with torch.autocast("cpu", dtype=dtype):
        inside = swapped_prediction_loss(scores)
    assert torch.equal(inside, plain)
    assert torch.equal(gradients(inside, scores), gradients(plain, scores))


def test_large_scores_do_not_overflow() -> None:
    scores = (cosine_scores(0, 2, 30, 5, dtype=torch.float32) * 500).requires_grad_()
    loss = swapped_prediction_loss(scores)
    assert loss.isfinite()
    assert gradients(loss, scores).isfinite().all()


def test_the_backward_pass_keeps_the_scores_and_no_targets() -> None:
    v, b, k = 4, 64, 50
    scores = cosine_scores(0, v, b, k, dtype=torch.float32).requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        swapped_prediction_loss(scores)
    assert sum(kept.values()) <= 4 * (v * b * k + 2 * v * b + 2 * k + 64)


def test_there_is_no_silent_second_derivative() -> None:
    scores = cosine_scores(0, 2, 8, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(swapped_prediction_loss(scores), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="soft_cross_entropy_backward has no derivative"):
        gradient.sum().backward()


def test_scores_are_never_written() -> None:
    scores, queue = cosine_scores(0, 3, 9, 4), cosine_scores(1, 5, 4)
    before = scores.clone(), queue.clone()
    scores.requires_grad_()
    swapped_prediction_loss(scores, queue_scores=queue, weights=torch.arange(9)).backward()
    assert torch.equal(scores.detach(), before[0])
    assert torch.equal(queue, before[1])


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_layouts_of_the_input_do_not_matter(layout: str) -> None:
    base = cosine_scores(0, 3, 16, 10)
    scores = {
        "transposed": base.transpose(1, 2),
        "expanded": base[:1].expand(3, -1, -1),
        "sliced": base[:, 1::3],
    }[layout]
    plain = scores.clone(memory_format=torch.contiguous_format).requires_grad_()
    scores = scores.detach().requires_grad_()
    loss, expected = swapped_prediction_loss(scores), swapped_prediction_loss(plain)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients(loss, scores), gradients(expected, plain), rtol=0, atol=0)


def test_more_prototypes_than_rows_give_a_loss_near_the_logarithm_of_their_number() -> None:
    scores = cosine_scores(0, 2, 8, 500) * 0.05
    assert abs(float(swapped_prediction_loss(scores)) - math.log(500)) < 0.3


def test_a_queue_counts_as_batch_for_the_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinkhorn_solve, "_warned", False)
    scores = cosine_scores(0, 2, 8, 20)
    swapped_prediction_loss(scores, queue_scores=cosine_scores(1, 12, 20))
    with pytest.warns(
        ClustopsWarning, match="20 prototypes share an effective batch of 19 rows .scores are .views, B, K"
    ):
        swapped_prediction_loss(scores, queue_scores=cosine_scores(1, 11, 20))


def test_targets_of_the_loss_are_the_assignments() -> None:
    scores = cosine_scores(0, 2, 30, 5)
    q, log_p = sinkhorn(scores), torch.log_softmax(scores / 0.1, -1)
    expected = -(q[0] * log_p[1] + q[1] * log_p[0]).sum(-1) / 2
    torch.testing.assert_close(swapped_prediction_loss(scores, reduction="none"), expected)
