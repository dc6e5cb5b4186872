"""Sinkhorn over several processes equals one process with all rows, for shards of any size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import generator, run_ranks
from torch import Tensor

from clustops.sinkhorn import sinkhorn, sinkhorn_potentials
from clustops.sinkhorn_loss import swapped_prediction_loss
from clustops.sinkhorn_queue import FeatureQueue

double = torch.float64
CUTS = {2: [0, 13, 37], 3: [0, 5, 5, 37]}  # the second of three ranks has no rows
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


def potentials_of_a_rank(rank: int, world: int) -> dict[str, Tensor]:
    scores, weights = (shard(t, rank, world) for t in everything())
    group = dist.group.WORLD
    return {
        name: sinkhorn_potentials(scores, weights=weights, group=group, **settings)
        for name, settings in SETTINGS.items()
    }


@pytest.mark.parametrize("world", [2, 3])
def test_potentials_of_shards_are_those_of_the_whole_on_every_rank(world: int) -> None:
    scores, weights = everything()
    results = run_ranks(world, potentials_of_a_rank)
    for name, settings in SETTINGS.items():
        whole = sinkhorn_potentials(scores, weights=weights, **settings)
        for result in results:
            torch.testing.assert_close(result[name], whole, rtol=1e-11, atol=1e-11)
            assert torch.equal(result[name], results[0][name]), name


def assignments_of_a_rank(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    scores = shard(everything()[0], rank, world).clone().requires_grad_()
    upstream = shard(torch.arange(74.0, dtype=double).view(2, 37, 1), rank, world).sin()
    soft = sinkhorn(scores, epsilon=0.2, gradient="unrolled", group=dist.group.WORLD)
    (upstream * soft.square()).sum().backward()
    assert scores.grad is not None
    return soft.detach(), sinkhorn(scores, hard=True, mass=0.5, group=dist.group.WORLD), scores.grad


@pytest.mark.parametrize("world", [2, 3])
def test_assignments_and_unrolled_gradients_of_shards_are_those_of_the_whole(world: int) -> None:
    scores = everything()[0].requires_grad_()
    soft = sinkhorn(scores, epsilon=0.2, gradient="unrolled")
    (torch.arange(74.0, dtype=double).view(2, 37, 1).sin() * soft.square()).sum().backward()
    assert scores.grad is not None
    expected = soft.detach(), sinkhorn(scores, hard=True, mass=0.5), scores.grad
    results = run_ranks(world, assignments_of_a_rank)
    for parts, whole in zip(zip(*results, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-10, atol=1e-12)


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


def collectives_of_a_rank(rank: int, world: int) -> dict[str, list[tuple[str, int]]]:
    scores = shard(everything()[0], rank, world)
    seen: list[tuple[str, int]] = []
    original = dist.all_reduce

    def counted(tensor: Tensor, op: Any = dist.ReduceOp.SUM, **settings: Any) -> Any:
        seen.append(("max" if op == dist.ReduceOp.MAX else "sum", tensor.numel()))
        return original(tensor, op=op, **settings)

    dist.all_reduce = counted  # type: ignore[assignment]
    result = {}
    for name in ("plain", "bound"):
        seen.clear()
        sinkhorn(scores, n_iters=4, group=dist.group.WORLD) if name == "plain" else sinkhorn_potentials(
            scores, n_iters=4, group=dist.group.WORLD, **SETTINGS["bound"]
        )
        result[name] = list(seen)
    dist.all_reduce = original
    return result


def test_traffic_is_one_sum_of_the_prototypes_for_each_update_of_all_problems() -> None:
    (first, second) = run_ranks(2, collectives_of_a_rank)
    assert first == second
    assert first["bound"] == [("sum", 2 * N_PROTOTYPES)] * 4
    assert first["plain"] == [("max", 2 * N_PROTOTYPES)] + [("sum", 2 * N_PROTOTYPES)] * 4


def empty_group(rank: int, world: int) -> tuple[Tensor, Tensor]:
    scores = torch.zeros(2, 0, 3, requires_grad=True)
    loss = swapped_prediction_loss(scores, group=dist.group.WORLD)
    loss.backward()
    return loss.detach(), sinkhorn_potentials(scores, group=dist.group.WORLD)


def test_a_group_without_rows_has_loss_zero_and_neutral_potentials() -> None:
    for loss, potentials in run_ranks(2, empty_group):
        assert loss == 0
        assert (potentials == 0).all()


def message_on_a_rank(rank: int, world: int) -> str:
    scores = shard(everything()[0], rank, world).clone()
    if rank == 0:
        scores[0, 3, 1] = math.nan
    try:
        sinkhorn_potentials(scores, group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return ""


def test_a_nan_on_one_rank_is_an_error_on_all() -> None:
    first, second = run_ranks(2, message_on_a_rank)
    assert "1 NaN" in first
    assert "on another rank" in second
