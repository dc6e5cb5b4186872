"""A batch spread over ranks gives the loss and the gradient of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import generator, run_ranks
from torch import Tensor

from clustops.contrastive import ccssl_loss, info_nce_loss
from clustops.contrastive_weighted import weighted_contrastive_loss

SHARDS = {2: (4, 5), 4: (3, 1, 0, 5)}
N, V, D = 9, 2, 6


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = generator(0)
    features = torch.randn(N, V, D, dtype=torch.float64, generator=g)
    labels = torch.tensor([0, 2**40, 0, -1, 2**40, 0, 3, 3, 7])
    confidence = torch.rand(N, dtype=torch.float64, generator=g)
    return features, labels, confidence, torch.rand(N, generator=g), torch.rand(N, N, generator=g)


def loss_of(kind: str, group: Any, part: slice, features: Tensor, **options: Any) -> Tensor:
    _, labels, confidence, weights, pair_weights = batch()
    options |= {"normalize": True, "temperature": 0.3, "weights": weights[part], "group": group}
    if kind == "ccssl":
        return ccssl_loss(features, labels[part], confidence[part], threshold=0.3, **options)
    if kind == "info_nce":
        return info_nce_loss(features, **options)
    pair_weights = torch.where(pair_weights > 0.5, pair_weights, 0)
    pair_weights[0] = 0
    return weighted_contrastive_loss(features, pair_weights[part], **options)


def part_of(rank: int, world: int) -> slice:
    first = sum(SHARDS[world][:rank])
    return slice(first, first + SHARDS[world][rank])


def rank_losses(rank: int, world: int, kinds: tuple[str, ...], options: list[dict[str, Any]]) -> list[Any]:
    import torch.distributed as dist

    results = []
    part = part_of(rank, world)
    upstream = torch.randn(N, V, dtype=torch.float64, generator=generator(1))[part]
    for kind in kinds:
        for option in options:
            features = batch()[0][part].requires_grad_()
            loss = loss_of(kind, dist.group.WORLD, part, features, **option)
            (loss * upstream if loss.ndim else loss).sum().backward()
            results.append((loss.detach(), features.grad))
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_the_mean_over_unequal_ranks_is_one_process(world: int) -> None:
    kinds = ("ccssl", "info_nce", "weighted")
    options: list[dict[str, Any]] = [
        {"reduction": "mean"},
        {"reduction": "mean", "no_positive": "ignore"},
        {"reduction": "sum"},
    ]
    ranks = run_ranks(world, rank_losses, kinds, options)
    cases = [(kind, option) for kind in kinds for option in options]
    for case, ((kind, option), parts) in enumerate(zip(cases, zip(*ranks, strict=True), strict=True)):
        features = batch()[0].requires_grad_()
        expected = loss_of(kind, None, slice(None), features, **option)
        expected.backward()
        mean = torch.stack([loss for loss, _ in parts]).mean()
        torch.testing.assert_close(mean, expected.detach(), msg=lambda m, c=cases[case]: f"{c}: {m}")
        # The mean over ranks of a gradient in shared parameters is one rank's share divided by their number.
        gradient = torch.cat([g for _, g in parts]) / world
        torch.testing.assert_close(gradient, features.grad, msg=lambda m, c=cases[case]: f"{c}: {m}")


def test_rows_of_ranks_are_rows_of_one_process_with_their_own_upstream_gradients() -> None:
    kinds = ("ccssl", "weighted")
    ranks = run_ranks(2, rank_losses, kinds, [{"reduction": "none"}])
    upstream = torch.randn(N, V, dtype=torch.float64, generator=generator(1))
    for kind, parts in zip(kinds, zip(*ranks, strict=True), strict=True):
        features = batch()[0].requires_grad_()
        expected = loss_of(kind, None, slice(None), features, reduction="none")
        (expected * upstream).sum().backward()
        torch.testing.assert_close(torch.cat([loss for loss, _ in parts]), expected.detach())
        torch.testing.assert_close(torch.cat([g for _, g in parts]), features.grad)


def model_and_input() -> tuple[torch.nn.Linear, Tensor]:
    model = torch.nn.Linear(D, D, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64, generator=generator(3)))
    return model, torch.randn(N, V, D, dtype=torch.float64, generator=generator(4))


def ddp_gradients(rank: int, world: int, kind: str) -> list[Tensor]:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model, x = model_and_input()
    part = part_of(rank, world)
    wrapped = DistributedDataParallel(model)
    loss_of(kind, dist.group.WORLD, part, wrapped(x[part])).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("kind", ["ccssl", "weighted"])
@pytest.mark.parametrize("world", [2, 4])
def test_data_parallel_gradients_are_those_of_one_process(world: int, kind: str) -> None:
    model, x = model_and_input()
    loss_of(kind, None, slice(None), model(x)).backward()
    for gradients in run_ranks(world, ddp_gradients, kind):
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)


def low_precision(rank: int, world: int) -> tuple[Tensor, Tensor]:
    import torch.distributed as dist

    features = batch()[0][part_of(rank, world)].bfloat16().requires_grad_()
    loss = loss_of("weighted", dist.group.WORLD, part_of(rank, world), features)
    loss.backward()
    return loss.detach(), features.grad


def test_low_precision_gradients_are_summed_over_ranks_in_fp32() -> None:
    parts = run_ranks(2, low_precision)
    features = batch()[0].bfloat16().requires_grad_()
    expected = loss_of("weighted", None, slice(None), features)
    expected.backward()
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, expected.detach())
    assert parts[0][1].dtype == torch.bfloat16
    # Rounded once, at the end, nearly all numbers are the same bits.
    same = torch.cat([g for _, g in parts]) / 2 == features.grad
    assert same.double().mean() > 0.95


def rejected(rank: int, world: int) -> str:
    import torch.distributed as dist

    labels = (torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]))[rank]
    try:
        ccssl_loss(torch.ones(3, 1, 2), labels, no_positive="raise", group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_all_ranks_reject_a_row_without_positives_on_one() -> None:
    for message in run_ranks(2, rejected):
        assert "1 samples without one" in message
