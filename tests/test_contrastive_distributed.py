"""A batch spread over ranks gives the loss and the gradient of one process."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import assert_close, generator, run_ranks
from torch import Tensor

from clustops.contrastive import ccssl_loss, info_nce_loss, supcon_loss
from clustops.contrastive_weighted import weighted_contrastive_loss

everywhere = pytest.mark.usefixtures("cpu_path")

double = torch.float64
SHARDS = {2: (4, 5), 4: (3, 1, 0, 5)}
N, V, D = 9, 2, 6


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = generator(0)
    features = torch.randn(N, V, D, dtype=double, generator=g)
    labels = torch.tensor([0, 2**40, 0, -1, 2**40, 0, 3, 3, 7])
    confidence = torch.rand(N, dtype=double, generator=g)
    return features, labels, confidence, torch.rand(N, generator=g), torch.rand(N, N, generator=g)


def loss_of(kind: str, group: Any, part: slice, features: Tensor, **options: Any) -> Tensor:
    _, labels, confidence, weights, pair_weights = batch()
    options = {"normalize": True, "temperature": 0.3, "weights": weights[part], "group": group} | options
    if kind == "ccssl":
        return ccssl_loss(features, labels[part], confidence[part], threshold=0.3, **options)
    if kind == "info_nce":
        return info_nce_loss(features, **options)
    if kind == "one sample":
        return supcon_loss(features, labels[part], **options)
    if kind == "one view":  # two rows have no positive
        return supcon_loss(features[:, 0], labels[part], **options)
    pair_weights = torch.where(pair_weights > 0.5, pair_weights, 0)
    pair_weights[0] = 0
    return weighted_contrastive_loss(features, pair_weights[part], **options)


def part_of(rank: int, world: int) -> slice:
    first = sum(SHARDS[world][:rank])
    return slice(first, first + SHARDS[world][rank])


Case = tuple[str, dict[str, Any]]


def value_and_gradient(case: Case, group: Any, part: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss with random upstream gradients where it is one of rows."""
    kind, options = case
    features = batch()[0][part].to(dtype).requires_grad_()
    upstream = torch.randn(N, V, dtype=double, generator=generator(1))[part]
    loss = loss_of(kind, group, part, features, **options)
    (loss * upstream.to(loss.dtype) if loss.ndim else loss).sum().backward()
    assert features.grad is not None
    return loss.detach(), features.grad


def rank_losses(rank: int, world: int, cases: list[Case], dtype: torch.dtype) -> list[Any]:
    return [value_and_gradient(case, dist.group.WORLD, part_of(rank, world), dtype) for case in cases]


OPTIONS: list[dict[str, Any]] = [
    {"reduction": "mean"},
    {"reduction": "mean", "weights": None, "base_temperature": 0.1},
    {"reduction": "mean", "no_positive": "ignore"},
    {"reduction": "sum"},
]
SCALARS = [(kind, o) for kind in ("ccssl", "info_nce", "one view", "weighted") for o in OPTIONS]
SCALARS += [("ccssl", {"no_positive": "raise"}), ("ccssl", {"self_weight": "confidence", "reweight": False})]


@everywhere
@pytest.mark.parametrize("dtype", [double, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 4])
def test_the_mean_over_unequal_ranks_is_one_process(world: int, dtype: torch.dtype) -> None:
    ranks = run_ranks(world, rank_losses, SCALARS, dtype)
    wide = double if dtype == double else torch.float32
    for case, parts in zip(SCALARS, zip(*ranks, strict=True), strict=True):
        expected, expected_gradient = value_and_gradient(case, None, slice(None), dtype)
        assert_close(torch.stack([loss for loss, _ in parts]).mean(), expected, wide)
        # The mean over ranks of a gradient in shared parameters is one rank's share divided by their number.
        gradient = torch.cat([g for _, g in parts]) / world
        assert gradient.dtype == dtype
        assert_close(gradient, expected_gradient, dtype)
        # Rounded once, at the end, nearly all numbers of a narrow gradient are the same bits.
        if dtype == torch.bfloat16:
            assert (gradient == expected_gradient).double().mean() > 0.95, case


@everywhere
def test_rows_of_ranks_are_rows_of_one_process_with_their_own_upstream_gradients() -> None:
    cases: list[Case] = [(kind, {"reduction": "none"}) for kind in ("ccssl", "weighted")]
    ranks = run_ranks(2, rank_losses, cases, double)
    for case, parts in zip(cases, zip(*ranks, strict=True), strict=True):
        expected = value_and_gradient(case, None, slice(None), double)
        for whole, shards in zip(expected, zip(*parts, strict=True), strict=True):
            torch.testing.assert_close(torch.cat(shards), whole)


def small_group(rank: int, world: int, n: int) -> tuple[Tensor, Tensor]:
    """``n`` samples on rank 1, at any stride, their bytes not aligned."""
    part = slice(0, rank * n, 2)
    features = batch()[0][part, :, :5].bfloat16().requires_grad_()
    loss = loss_of("one sample", dist.group.WORLD, part, features)
    loss.backward()
    assert features.grad is not None
    return loss.detach(), features.grad


@everywhere
def test_a_group_may_have_one_sample_or_none() -> None:
    for loss, _ in run_ranks(2, small_group, 0):
        assert loss == 0
    (none, _), (loss, gradient) = run_ranks(2, small_group, 1)
    assert none == 0
    assert gradient.shape == (1, 2, 5)
    assert loss.abs() < 1e-5  # of one other view, the softmax is certain
    assert gradient.abs().max() < 1e-5


def model_and_input() -> tuple[torch.nn.Linear, Tensor]:
    model = torch.nn.Linear(D, D, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64, generator=generator(3)))
    return model, torch.randn(N, V, D, dtype=torch.float64, generator=generator(4))


def ddp_gradients(rank: int, world: int, kind: str, dtype: torch.dtype) -> list[Tensor]:
    from torch.nn.parallel import DistributedDataParallel

    model, x = (m.to(dtype) for m in model_and_input())
    part = part_of(rank, world)
    wrapped = DistributedDataParallel(model)
    loss_of(kind, dist.group.WORLD, part, wrapped(x[part])).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("world", "kind", "dtype"),
    [
        (2, "ccssl", double),
        (4, "ccssl", torch.float32),
        (2, "weighted", torch.float32),
        (4, "weighted", double),
    ],
)
def test_data_parallel_gradients_are_those_of_one_process(world: int, kind: str, dtype: torch.dtype) -> None:
    model, x = (m.to(dtype) for m in model_and_input())
    loss_of(kind, None, slice(None), model(x)).backward()
    for gradients in run_ranks(world, ddp_gradients, kind, dtype):
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            assert_close(gradient, parameter.grad, dtype)


def collectives_of_a_rank(rank: int, world: int, options: dict[str, Any]) -> dict[str, list[tuple[str, int]]]:
    """(collective, bytes this rank gives) of the class loss, forward and backward."""
    seen: list[tuple[str, int]] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(dist, name)

        def call(*tensors: Any, **settings: Any) -> Any:
            seen.append((name, tensors[-1].nbytes))
            return original(*tensors, **settings)

        return call

    part = part_of(rank, world)
    features = batch()[0][part].float().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_reduce"):
            patch.setattr(dist, name, counted(name))
        for name in ("broadcast", "barrier", "reduce", "reduce_scatter", "all_gather_object", "all_to_all"):
            patch.setattr(dist, name, lambda *_, **__: pytest.fail("another collective"))
        loss = loss_of("ccssl", dist.group.WORLD, part, features, **options)
        forward = list(seen)
        seen.clear()
        loss.sum().backward()
    return {"forward": forward, "backward": seen}


@pytest.mark.parametrize("options", [{}, {"no_positive": "ignore"}, {"reduction": "none"}], ids=str)
def test_ranks_gather_samples_and_numbers_per_row_but_no_gradients_of_features(
    options: dict[str, Any],
) -> None:
    longest = max(SHARDS[4])
    sizes, sample, row = ("all_gather", 16), 4 * V * D + 8 + 8, ("all_gather", 4 * V * longest)
    anchors = [("all_reduce", 8)] if "no_positive" in options else []
    for found in run_ranks(4, collectives_of_a_rank, options):
        assert found["forward"] == [sizes, ("all_gather", sample * longest), *anchors, row]
        assert found["backward"] == [row]


def wrong_on_rank_0() -> dict[str, tuple[dict[str, Any], str, str]]:
    """Changed arguments of rank 0, and the beginnings of the messages of rank 0 and 1."""
    features, labels, confidence, weights, _ = (t[part_of(0, 2)] for t in batch())
    features, nan = features.float(), torch.tensor([math.nan, 1, 1, 1])
    bad_features = features * nan[:, None, None]
    there = "arguments must be valid on all ranks, got an error on rank 0"
    values = "features must be finite, and confidence in [0, 1], on all ranks"
    uneven = "rows must be of one size on all ranks, got rows of "
    return {
        "features": ({"features": bad_features}, "features must be finite, got 12 NaN", values),
        "confidence": ({"confidence": confidence + 1}, "confidence must be in [0, 1]", values),
        "a NaN": ({"confidence": confidence * nan}, "confidence must be finite, got 1 NaN", values),
        "labels": ({"labels": labels - 2}, "labels must be at least -1", there),
        "weights": ({"weights": weights * nan}, "weights must be finite, got 1 NaN", there),
        "shape": ({"labels": labels[1:]}, "labels must be [N]", there),
        "type": ({"features": None}, "features must be a tensor, got NoneType", there),
        "option": ({"temperature": 0}, "temperature must be finite and above 0", there),
        "views": ({"features": features.repeat(1, 2, 1)}, uneven + "112, 64", uneven + "112, 64"),
        "no confidence": ({"confidence": None}, uneven + "56, 64", uneven + "56, 64"),
    }


def messages_of_a_rank(rank: int, world: int) -> dict[str, str]:
    features, labels, confidence, weights, _ = (t[part_of(rank, world)] for t in batch())
    good = {
        "features": features.float(),
        "labels": labels,
        "confidence": confidence,
        "weights": weights,
        "normalize": True,
        "group": dist.group.WORLD,
    }
    found = {}
    for name, (changed, *_) in wrong_on_rank_0().items():
        try:
            ccssl_loss(**(good | changed if rank == 0 else good))
            found[name] = "no error"
        except (TypeError, ValueError) as error:
            found[name] = str(error)
    assert ccssl_loss(**good).isfinite(), "the ranks still march in step"
    return found


@everywhere
def test_a_bad_argument_of_one_rank_is_an_error_on_all() -> None:
    first, second = run_ranks(2, messages_of_a_rank)
    for name, (_, here, there) in wrong_on_rank_0().items():
        assert first[name].startswith(here), (name, first[name])
        assert second[name].startswith(there), (name, second[name])


def rejected(rank: int, world: int) -> str:
    labels = (torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]))[rank]
    try:
        ccssl_loss(torch.ones(3, 1, 2), labels, normalize=True, no_positive="raise", group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_all_ranks_reject_a_row_without_positives_on_one() -> None:
    for message in run_ranks(2, rejected):
        assert "1 samples without one" in message


def train_until_rank_1_dies(rank: int, folder: str, how: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    part = part_of(rank, 2)
    try:
        for step in range(1000):
            features = batch()[0][part].requires_grad_()
            loss = loss_of("ccssl", dist.group.WORLD, part, features)
            if rank == 1 and step == 3:  # the other waits for it in backward
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError("the disk is gone")
            loss.backward()
    except BaseException:
        Path(f"{folder}/{rank}.error").write_text(traceback.format_exc())
        os._exit(1)  # as a trainer ends: no farewell to the group


@pytest.mark.parametrize("how", ["raised", "killed"])
def test_a_rank_that_dies_ends_the_others_with_an_error(how: str, tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=train_until_rank_1_dies, args=(r, str(tmp_path), how)) for r in range(2)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(timeout=60)
        assert [process.exitcode for process in ranks] == [1, 1 if how == "raised" else -signal.SIGKILL]
    finally:
        for process in ranks:
            process.kill()
    error = (tmp_path / "0.error").read_text()
    assert "RuntimeError" in error
    assert "in backward" in error
    assert "the disk is gone" not in error
