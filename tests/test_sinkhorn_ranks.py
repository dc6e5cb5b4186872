"""Sinkhorn over several processes equals one process with all rows, for shards of any size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import generator, run_ranks
from torch import Tensor

from clustops import sinkhorn_solve
from clustops.checks import ClustopsWarning
from clustops.sinkhorn import sinkhorn, sinkhorn_potentials
from clustops.sinkhorn_loss import swapped_prediction_loss
from clustops.sinkhorn_queue import FeatureQueue

pytestmark = pytest.mark.filterwarnings("ignore::clustops.checks.ClustopsWarning")

double = torch.float64
CUTS = {2: [0, 13, 37], 3: [0, 5, 5, 37], 4: [0, 0, 1, 30, 37]}  # some ranks have no rows
N_PROTOTYPES = 6

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bound": {"bound": 2.5, "epsilon": 0.1},
    "prior": {"prior": torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5, 3.0])},
    "relax": {"relax": 0.4, "n_iters": 6},
    "mass": {"mass": 0.4, "n_iters": 6},
    "relax and mass": {"relax": 0.4, "mass": 0.4, "n_iters": 6},
    "tol": {"tol": 0.05, "n_iters": 60},
    "init": {"init": torch.tensor([3.0, -2.0, 0.0, 9.0, -700.0, 1.0])},
    "softmax": {"n_iters": 0},
    "sharp": {"epsilon": 1e-4},
    "sharp and relaxed": {"epsilon": 1e-4, "relax": 1e-5},
}


def everything() -> tuple[Tensor, Tensor]:
    g = generator(0)
    scores = torch.rand(2, 37, N_PROTOTYPES, generator=g, dtype=double) * 2 - 1
    scores[..., -1] -= 1.5  # a prototype that no row prefers
    return scores, torch.rand(2, 37, generator=g) * 2


def shard(tensor: Tensor, rank: int, world: int, dim: int = 1) -> Tensor:
    first, last = CUTS[world][rank : rank + 2]
    return tensor.narrow(dim, first, last - first)


def potentials_of_a_rank(rank: int, world: int, dtype: torch.dtype) -> dict[str, Tensor]:
    scores, weights = (shard(t, rank, world) for t in everything())
    queue = shard(queued()[0].to(dtype), rank, world)
    group = dist.group.WORLD
    return {
        name: sinkhorn_potentials(
            scores.to(dtype), weights=weights, queue_scores=queue, group=group, **settings
        )
        for name, settings in SETTINGS.items()
    }


@pytest.mark.parametrize("dtype", [double, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_potentials_of_shards_are_those_of_the_whole_on_every_rank(world: int, dtype: torch.dtype) -> None:
    scores, weights = everything()
    scores, queue = scores.to(dtype).double(), queued()[0].to(dtype).double()
    results = run_ranks(world, potentials_of_a_rank, dtype)
    for name, settings in SETTINGS.items():
        whole = sinkhorn_potentials(scores, weights=weights, queue_scores=queue, **settings)
        for result in results:
            # Rounding is relative to s / eps.
            scale = 1e-14 if dtype == double else 5e-6
            atol = scale / settings.get("epsilon", 0.05)
            torch.testing.assert_close(result[name].double(), whole, rtol=0, atol=atol)
            assert torch.equal(result[name], results[0][name]), name


def unrolled(scores: Tensor, group: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    """Assignments, and the gradient of a loss of which each rank has its rows' part."""
    scores = scores.clone().requires_grad_()
    soft = sinkhorn(scores, epsilon=0.2, gradient="unrolled", group=group, **settings)
    (gradient,) = torch.autograd.grad((scores.detach().sin() * soft.square()).sum(), scores)
    return soft.detach(), gradient


def assignments_of_a_rank(rank: int, world: int, settings: dict[str, Any]) -> tuple[Tensor, ...]:
    group = dist.group.WORLD
    scores, weights, queue = (shard(t, rank, world) for t in (*everything(), queued()[0]))
    hard = sinkhorn(scores, hard=True, group=group, **settings)
    return *unrolled(scores, group, weights=weights, queue_scores=queue, **settings), hard


UNROLLED: list[dict[str, Any]] = [
    {},
    {"relax": 0.4, "mass": 0.5},
    {"tol": 0.05, "n_iters": 20, "prior": torch.arange(1.0, N_PROTOTYPES + 1)},
]


@pytest.mark.parametrize("settings", UNROLLED, ids=lambda settings: ", ".join(settings) or "plain")
@pytest.mark.parametrize("world", [2, 4])
def test_assignments_and_unrolled_gradients_of_shards_are_those_of_the_whole(
    world: int, settings: dict[str, Any]
) -> None:
    scores, weights = everything()
    expected = (
        *unrolled(scores, None, weights=weights, queue_scores=queued()[0], **settings),
        sinkhorn(scores, hard=True, **settings),
    )
    results = run_ranks(world, assignments_of_a_rank, settings)
    for parts, whole in zip(zip(*results, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-12, atol=1e-12)


def loss_of_a_rank(rank: int, world: int, weighted: bool) -> tuple[Tensor, Tensor, Tensor]:
    group = dist.group.WORLD
    scores, weights = everything()
    scores = shard(scores, rank, world).clone().requires_grad_()
    mine = shard(weights[0], rank, world, 0) if weighted else None
    queue = FeatureQueue(16, N_PROTOTYPES, views=2, group=group, dtype=double)
    for features in queued():
        queue.push(shard(features, rank, world))
    loss = swapped_prediction_loss(scores, weights=mine, queue_scores=queue.share(), group=group)
    loss.backward()
    assert scores.grad is not None
    return loss.detach(), scores.grad, queue.rows()


def queued() -> list[Tensor]:
    return [torch.rand(2, 37, N_PROTOTYPES, generator=generator(s), dtype=double) for s in (1, 2)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_mean_loss_and_averaged_gradient_of_ranks_are_those_of_the_joint_batch(
    world: int, weighted: bool
) -> None:
    scores, weights = everything()
    scores.requires_grad_()
    queue = FeatureQueue(16, N_PROTOTYPES, views=2, dtype=double)
    for features in queued():
        queue.push(features)
    loss = swapped_prediction_loss(
        scores, weights=weights[0] if weighted else None, queue_scores=queue.rows()
    )
    loss.backward()
    assert scores.grad is not None
    losses, gradients, queues = zip(*run_ranks(world, loss_of_a_rank, weighted), strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat(gradients, dim=1) / world, scores.grad, rtol=1e-10, atol=1e-14)
    for rows in queues:
        assert torch.equal(rows, queue.rows())


class Counted:
    """``all_reduce`` that keeps a list of (operation, bytes)."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.original = dist.all_reduce

    def __call__(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, **settings: Any) -> Any:
        self.seen.append(("max" if op == dist.ReduceOp.MAX else "sum", tensor.nbytes))
        return self.original(tensor, op=op, **settings)

    def of(self, call: Callable[..., Any], *args: Any, **settings: Any) -> list[tuple[str, int]]:
        self.seen.clear()
        call(*args, group=dist.group.WORLD, n_iters=4, **settings)
        return list(self.seen)


def collectives_of_a_rank(rank: int, world: int) -> dict[str, list[tuple[str, int]]]:
    scores = shard(everything()[0].float(), rank, world)
    queue = shard(queued()[0].float(), rank, world)
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted()
        patch.setattr(dist, "all_reduce", counted)
        for name in ("all_gather", "broadcast", "barrier", "reduce"):
            patch.setattr(dist, name, lambda *_, **__: pytest.fail("another collective"))
        return {
            "plan": counted.of(sinkhorn, scores),
            "bound": counted.of(sinkhorn_potentials, scores, bound=2.5, epsilon=0.1),
            "bf16, queue, prior": counted.of(
                sinkhorn, scores.bfloat16(), queue_scores=queue, prior=torch.ones(N_PROTOTYPES)
            ),
            "init": counted.of(sinkhorn_potentials, scores, init=torch.zeros(N_PROTOTYPES)),
            "relax": counted.of(sinkhorn_potentials, scores, relax=0.5),
            "unrolled": counted.of(sinkhorn, scores, gradient="unrolled"),
            "loss": counted.of(swapped_prediction_loss, scores, queue_scores=queue),
        }


def test_traffic_is_one_sum_of_the_prototypes_for_each_update_of_all_problems() -> None:
    first, second = run_ranks(2, collectives_of_a_rank)
    assert first == second
    total, greatest = ("sum", 4 * 2 * N_PROTOTYPES), ("max", 4 * 2 * N_PROTOTYPES)
    assert first["bound"] == [total] * 4
    for name in ("plan", "bf16, queue, prior", "init", "unrolled"):
        assert first[name] == [greatest] + [total] * 4, name
    assert first["relax"] == [greatest, total] * 4
    # Of the loss itself: whether a rank has found NaN, and the number of samples.
    assert first["loss"] == [greatest] + [total] * 4 + [("max", 4), ("sum", 4)]


def warnings_of_a_rank(rank: int, world: int, n_queued: int) -> list[str]:
    sinkhorn_solve._warned = False
    scores, queue = torch.rand(4, 20), torch.rand(n_queued, 20)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", ClustopsWarning)
        for _ in range(3):
            sinkhorn(scores, queue_scores=queue, group=dist.group.WORLD)
    return [str(warning.message) for warning in raised]


def test_the_effective_batch_is_that_of_all_ranks_and_their_queues() -> None:
    assert run_ranks(2, warnings_of_a_rank, 6) == [[], []]
    for messages in run_ranks(2, warnings_of_a_rank, 5):
        assert len(messages) == 1
        assert "20 prototypes share an effective batch of 18 rows" in messages[0]


def empty_group(rank: int, world: int) -> tuple[Tensor, Tensor]:
    scores = torch.zeros(2, 0, 3, requires_grad=True)
    loss = swapped_prediction_loss(scores, group=dist.group.WORLD)
    loss.backward()
    return loss.detach(), sinkhorn_potentials(scores, group=dist.group.WORLD)


def test_a_group_without_rows_has_loss_zero_and_neutral_potentials() -> None:
    for loss, potentials in run_ranks(2, empty_group):
        assert loss == 0
        assert (potentials == 0).all()


def message_on_a_rank(rank: int, world: int, place: str) -> str:
    scores = torch.rand(3, 12, 4, generator=generator(rank))
    queue, weights = torch.rand(5, 4, generator=generator(2)), torch.ones(12)
    weights[7] = 0
    scores[:, 7] = math.nan  # a masked row may hold anything
    if rank == 0:
        bad = queue[3:] if place == "queue_scores" else scores[2 if place == "a local view" else 0, 3:]
        bad[0, 1] = math.inf
    settings: dict[str, Any] = {"queue_scores": queue, "weights": weights, "group": dist.group.WORLD}
    try:
        if place == "potentials":
            sinkhorn_potentials(scores[:2], **settings)
        else:
            swapped_prediction_loss(scores, **settings)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("place", ["potentials", "an assigned view", "a local view", "queue_scores"])
def test_a_score_that_is_not_finite_on_one_rank_is_an_error_on_all(place: str) -> None:
    first, second = run_ranks(2, message_on_a_rank, place)
    name = "queue_scores" if place == "queue_scores" else "scores"
    assert_message_of(first, f"{name} must be finite, got 1 NaN")
    assert_message_of(second, "scores must be finite on all ranks, got others on another rank")


def assert_message_of(message: str, beginning: str) -> None:
    assert message.startswith(beginning), message


def masked_on_a_rank(rank: int, world: int) -> Tensor:
    scores, weights = torch.rand(3, 12, 4, generator=generator(rank)), torch.ones(12)
    scores[:, 7], weights[7] = math.nan, 0
    return swapped_prediction_loss(scores, weights=weights, group=dist.group.WORLD)


def test_masked_rows_may_hold_nan_on_any_rank() -> None:
    assert all(loss.isfinite() for loss in run_ranks(2, masked_on_a_rank))
