"""The examples run, and do what they say."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import generator, run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import clustops
from clustops.examples import compiled, gradient_cache, mixed_precision, ranks

EXAMPLES = sorted(Path(compiled.__file__).parent.glob("[a-z]*.py"))
double = torch.float64


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 60


@pytest.mark.slow
@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_runs_as_a_program(file: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(file.parents[2])}
    command = [sys.executable, "-m", f"clustops.examples.{file.stem}"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_in_mixed_precision_follows_that_in_fp32(dtype: torch.dtype) -> None:
    single, mixed = (mixed_precision.train(d, steps=10) for d in (torch.float32, dtype))
    assert single[-1] < 0.9 * single[0]
    assert mixed == pytest.approx(single, rel=2e-2)
    assert mixed != single


def test_compiled_training_is_eager_training() -> None:
    torch._dynamo.reset()
    eager, traced = compiled.train(False, 6), compiled.train(True, 6, backend="aot_eager")
    assert traced == pytest.approx(eager, rel=1e-5)
    assert eager[3] < eager[0]


def losses_of_a_rank(rank: int, world: int) -> list[float]:
    return ranks.train(dist.group.WORLD, steps=5)


@pytest.mark.parametrize("world", [2, 3])
def test_training_over_ranks_is_that_of_one_process(world: int) -> None:
    expected = ranks.train(None, steps=5)
    assert expected[-1] < expected[0]
    for losses in run_ranks(world, losses_of_a_rank):
        assert losses == pytest.approx(expected, rel=1e-5)


def network_and_batch(*, dropout: float = 0.0) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4)).double()
    return network, torch.randn(23, 2, 6, dtype=double, generator=generator(0)), torch.arange(23) % 5


def parts_of(images: Tensor, labels: Tensor, size: int = 7) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), labels.split(size), strict=True))


def gradients_of_the_large_batch() -> tuple[Tensor, list[Tensor | None]]:
    network, images, labels = network_and_batch()
    loss = clustops.supcon_loss(network(images), labels, normalize=True)
    loss.backward()
    return loss.detach(), [p.grad for p in network.parameters()]


def test_cached_embeddings_give_the_gradients_of_the_large_batch() -> None:
    expected_loss, expected = gradients_of_the_large_batch()
    network, images, labels = network_and_batch()
    loss = gradient_cache.backward(network, parts_of(images, labels))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-14, atol=0)
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-15)


def test_cached_embeddings_repeat_their_dropout() -> None:
    network, images, labels = network_and_batch(dropout=0.5)
    twin, parts = copy.deepcopy(network), parts_of(images, labels)
    state = torch.get_rng_state()
    gradient_cache.backward(network, parts)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    rows = torch.cat([twin(images) for images, _ in parts])  # all parts' graphs at once
    assert torch.equal(torch.get_rng_state(), after), "random numbers go on as after one forward pass"
    clustops.supcon_loss(rows, labels, normalize=True).backward()
    for ours, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)


def cached_gradients_of_a_rank(rank: int, world: int) -> list[Tensor | None]:
    network, images, labels = network_and_batch()
    wrapped = DistributedDataParallel(network)
    gradient_cache.backward(wrapped, parts_of(images[rank::world], labels[rank::world], 4), dist.group.WORLD)
    return [p.grad for p in network.parameters()]


def test_cached_embeddings_over_ranks_give_the_gradients_of_the_large_batch() -> None:
    _, expected = gradients_of_the_large_batch()
    for gradients in run_ranks(2, cached_gradients_of_a_rank):
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
