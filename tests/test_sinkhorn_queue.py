"""The queue of embeddings against a list that keeps the last rows."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import DEVICES, assert_message, generator
from torch import Tensor, nn

from benchmarks import measure
from clustops.sinkhorn import sinkhorn, sinkhorn_potentials
from clustops.sinkhorn_loss import swapped_prediction_loss
from clustops.sinkhorn_queue import FeatureQueue


def numbered(first: int, n: int, dim: int = 2) -> Tensor:
    return torch.arange(first, first + n).float()[:, None].expand(n, dim)


def numbers(rows: Tensor) -> list[int]:
    return sorted(int(x) for x in rows[..., 0].flatten())


@given(st.integers(1, 9), st.lists(st.integers(0, 25), max_size=8))
def test_holds_the_last_rows_that_were_pushed(size: int, pushes: list[int]) -> None:
    queue, first = FeatureQueue(size, 2), 0
    for n in pushes:
        queue.push(numbered(first, n))
        first += n
        assert numbers(queue.rows()) == list(range(max(0, first - size), first))
        assert len(queue) == min(first, size)


def test_an_unfilled_queue_returns_no_zeros() -> None:
    queue = FeatureQueue(8, 2)
    assert queue.rows().shape == (0, 2)
    queue.push(numbered(1, 3))
    assert numbers(queue.rows()) == [1, 2, 3]


def test_views_have_a_queue_each() -> None:
    queue = FeatureQueue(4, 2, views=2)
    queue.push(torch.stack([numbered(0, 3), numbered(100, 3)]))
    queue.push(torch.stack([numbered(3, 3), numbered(103, 3)]))
    assert queue.rows().shape == (2, 4, 2)
    assert numbers(queue.rows()[0]) == [2, 3, 4, 5]
    assert numbers(queue.rows()[1]) == [102, 103, 104, 105]


def test_a_checkpoint_resumes_to_the_same_rows() -> None:
    queue = FeatureQueue(5, 2)
    queue.push(numbered(0, 3))
    queue.push(numbered(3, 4))
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    resumed = FeatureQueue(5, 2)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for q in (queue, resumed, copy.deepcopy(resumed)):
        q.push(numbered(7, 2))
        assert numbers(q.rows()) == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("device", DEVICES)
def test_a_checkpoint_of_a_model_goes_to_another_device_and_dtype(device: str) -> None:
    queue = FeatureQueue(5, 2, views=2)
    pushed = torch.stack([numbered(0, 7), numbered(100, 7)])
    queue.push(pushed[:, :4])
    queue.push(pushed[:, 4:])
    file = io.BytesIO()
    torch.save(nn.ModuleDict({"queue": queue}).state_dict(), file)
    file.seek(0)
    queue = FeatureQueue(5, 2, views=2, device="meta", dtype=torch.bfloat16).to_empty(device=device)
    model = nn.ModuleDict({"queue": queue})
    model.load_state_dict(torch.load(file, weights_only=True, map_location=device))
    assert (queue.buffer.device.type, queue.buffer.dtype, len(queue)) == (device, torch.bfloat16, 5)
    queue.push(torch.stack([numbered(7, 1), numbered(107, 1)]).to(device))
    assert numbers(queue.rows()) == [3, 4, 5, 6, 7, 103, 104, 105, 106, 107]


def test_a_checkpoint_of_another_size_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        FeatureQueue(5, 2).load_state_dict(FeatureQueue(6, 2).state_dict())


def test_pushed_rows_are_kept_without_gradient_and_returned_as_a_copy() -> None:
    queue = FeatureQueue(3, 2)
    features = torch.ones(2, 2, requires_grad=True)
    queue.push(features)
    rows = queue.rows()
    assert not rows.requires_grad
    rows += 1
    with torch.no_grad():
        features += 1
    assert torch.equal(queue.rows(), torch.ones(2, 2))


def test_the_queue_follows_the_module_it_is_part_of() -> None:
    queue = FeatureQueue(3, 2).double()
    queue.push(numbered(0, 2).half())
    assert queue.rows().dtype == torch.float64
    assert not list(queue.parameters())


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((0, 2), ("size", "at least 1", "got 0")),
        ((3, 0), ("dim", "at least 1", "got 0")),
    ],
)
def test_impossible_queues_are_refused(arguments: tuple[int, int], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        FeatureQueue(*arguments)
    assert_message(error.value, *parts)


@pytest.mark.parametrize(
    ("features", "error", "parts"),
    [
        (torch.ones(3, 4), ValueError, ("features", "[B, 2]", "got [3, 4]")),
        (torch.ones(2), ValueError, ("features", "[B, 2]", "got [2]")),
        (torch.ones(3, 2, dtype=torch.int64), TypeError, ("features", "float32", "got torch.int64")),
        (torch.full((3, 2), float("nan")), ValueError, ("features", "finite", "6 NaN")),
        ([[1.0, 2.0]], TypeError, ("features", "a tensor", "got list")),
    ],
)
def test_bad_features_are_refused(features: Tensor, error: type[Exception], parts: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        FeatureQueue(3, 2).push(features)
    assert_message(caught.value, *parts)


# --- in the assignment


def test_a_training_loop_with_a_queue_is_one_without_on_the_joint_rows() -> None:
    g = generator(0)
    queue, prototypes = FeatureQueue(20, 4, views=2), torch.rand(3, 4, generator=g)
    seen = torch.empty(2, 0, 4)
    for _ in range(5):
        embeddings = torch.rand(2, 6, 4, generator=g)
        scores = embeddings @ prototypes.T
        loss = swapped_prediction_loss(scores, queue_scores=queue.rows() @ prototypes.T)
        joint = torch.cat([scores, seen[:, -20:] @ prototypes.T], dim=1)
        q = sinkhorn(joint)[:, :6]
        log_p = torch.log_softmax(scores / 0.1, -1)
        torch.testing.assert_close(loss, -(q * log_p.flip(0)).sum(-1).mean())
        queue.push(embeddings)
        seen = torch.cat([seen, embeddings], dim=1)
    assert len(queue) == 20


NATIVE = torch._C._dispatch_has_kernel_for_dispatch_key("clustops::sinkhorn_potentials", "CPU")
needs_kernel = pytest.mark.skipif(not NATIVE, reason="the reference joins batch and queue")


@needs_kernel
@pytest.mark.parametrize("shared", [False, True], ids=["a queue for each view", "one queue"])
def test_batch_and_queue_are_never_joined_in_memory(shared: bool) -> None:
    v, b, n, k = 2, 64, 16384, 512
    scores = torch.rand(v, b, k, generator=generator(0))
    queue = torch.rand(*(() if shared else (v,)), n, k, generator=generator(1))
    calls = (
        lambda: sinkhorn(scores, queue_scores=queue),
        lambda: (sinkhorn_potentials(scores, queue_scores=queue),),
        lambda: (swapped_prediction_loss(scores, queue_scores=queue),),
    )
    for call in calls:
        call()  # loads the code
        peak = measure.observe(call, torch.device("cpu")).peak_bytes
        if peak is None:
            pytest.skip("needs Linux's peak counter")
        assert peak < queue.nbytes // 4
