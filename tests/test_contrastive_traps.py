"""What breaks in other contrastive losses does not break here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import assert_close, generator, seeds, small_sizes
from torch import Tensor

from clustops.contrastive import ccssl_loss, info_nce_loss, supcon_loss
from clustops.contrastive_weighted import weighted_contrastive_loss
from clustops.reference import contrastive as reference

pytestmark = pytest.mark.usefixtures("path")


def unit_rows(n: int, v: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    rows = torch.randn(n, v, d, dtype=torch.float64, generator=generator(seed))
    return torch.nn.functional.normalize(rows, dim=-1).to(dtype).requires_grad_()


def gradient(loss: Tensor, features: Tensor) -> Tensor:
    return torch.autograd.grad(loss, features, retain_graph=True)[0]


@pytest.mark.parametrize("self_weight", ["one", "confidence"])
def test_a_row_without_positives_has_loss_and_gradient_zero(self_weight: str) -> None:
    features = unit_rows(3, 1, 4, torch.float64)
    rows = supcon_loss(features, torch.tensor([0, 0, 1]), reduction="none")
    assert rows[2] == 0
    assert not gradient(rows[2].sum(), features).any()
    # It stays a negative of the others.
    assert gradient(rows[:2].sum(), features)[2].any()


@pytest.mark.parametrize("self_weight", ["one", "confidence"])
@pytest.mark.parametrize("v", [1, 2])
def test_confidence_zero_gives_no_nan(v: int, self_weight: str) -> None:
    features, labels = unit_rows(5, v, 4), torch.zeros(5, dtype=torch.int64)
    loss = ccssl_loss(features, labels, torch.zeros(5), self_weight=self_weight)
    if self_weight == "one" and v == 2:
        assert_close(loss, reference.info_nce_loss(features.detach().double()), torch.float32)
    else:  # nothing pulls
        assert loss == 0
        assert not gradient(loss, features).any()


def test_a_single_row_has_loss_and_gradient_zero() -> None:
    features = unit_rows(1, 1, 4)
    for loss in (
        supcon_loss(features, torch.zeros(1, dtype=torch.int64)),
        info_nce_loss(features),
        weighted_contrastive_loss(features, torch.ones(1, 1)),
    ):
        assert loss == 0
        assert not gradient(loss, features).any()


def test_a_class_of_one_confident_sample_is_no_class() -> None:
    features = unit_rows(7, 1, 4)
    confidence = torch.rand(7, generator=generator(0))
    rows = ccssl_loss(features, torch.arange(7), confidence, reduction="none")
    assert not rows.any()


def test_rows_without_positives_may_be_left_out_of_the_mean() -> None:
    features, labels = unit_rows(3, 1, 4), torch.tensor([0, 0, 1])
    rows = supcon_loss(features, labels, reduction="none")
    assert torch.equal(supcon_loss(features, labels, no_positive="ignore"), rows.sum() / 2)
    assert torch.equal(supcon_loss(features, labels, no_positive="zero"), rows.sum() / 3)
    assert supcon_loss(features, torch.arange(3), no_positive="ignore") == 0


def test_a_nearly_empty_sum_of_weights_keeps_its_precision() -> None:
    features = unit_rows(3, 1, 4)
    confidence = torch.tensor([1.0, 1e-6, 1e-6])
    labels = torch.zeros(3, dtype=torch.int64)
    loss, expected = (
        f(features.double(), labels, confidence.double()) for f in (ccssl_loss, reference.ccssl_loss)
    )
    assert_close(loss, expected, torch.float64, scale=100)
    assert_close(ccssl_loss(features, labels, confidence), expected, torch.float32)


def test_a_self_similarity_above_all_others_is_not_subtracted() -> None:
    # exp of the diagonal is e^2000 times larger than all else: what is left after a subtraction is log(0).
    features = torch.tensor([[[1.0, 0]], [[-1.0, 0]], [[-1.0, 1e-3]]], requires_grad=True)
    rows = supcon_loss(features, torch.tensor([0, 0, 0]), temperature=1e-3, reduction="none")
    expected = reference.supcon_loss(
        features.double(), torch.tensor([0, 0, 0]), temperature=1e-3, reduction="none"
    )
    assert_close(rows, expected, torch.float32, scale=10)
    assert gradient(rows.sum(), features).isfinite().all()


@pytest.mark.filterwarnings("ignore:features have rows of norm")
def test_fp16_features_do_not_overflow() -> None:
    features = (unit_rows(9, 2, 8).detach() * 400).half().requires_grad_()
    labels = torch.arange(9) % 3
    loss = supcon_loss(features, labels, temperature=100.0)
    expected = reference.supcon_loss(features.double(), labels, temperature=100.0)
    assert_close(loss, expected, torch.float32, scale=10)
    assert gradient(loss, features).isfinite().all()


@given(n=small_sizes, v=st.integers(1, 3), seed=seeds)
def test_each_row_gets_its_own_upstream_gradient(n: int, v: int, seed: int) -> None:
    features = unit_rows(n, v, 5, torch.float64, seed)
    labels = torch.randint(0, 3, (n,), generator=generator(seed))
    upstream = torch.randn(n, v, dtype=torch.float64, generator=generator(seed))
    actual, expected = (
        gradient((f(features, labels, reduction="none").exp() * upstream).sum(), features)
        for f in (supcon_loss, reference.supcon_loss)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_expanded_upstream_gradients() -> None:
    features, labels = unit_rows(5, 2, 4), torch.arange(5) % 2
    rows = supcon_loss(features, labels, reduction="none")
    rows.backward(torch.tensor(0.5).expand(5, 2))
    torch.testing.assert_close(
        features.grad, gradient(supcon_loss(features, labels, reduction="sum"), features) / 2
    )


def test_the_loss_need_not_be_the_last_layer() -> None:
    features, labels = unit_rows(5, 2, 4), torch.arange(5) % 2
    loss = supcon_loss(features, labels)
    torch.testing.assert_close(
        gradient(loss**2, features), 2 * loss * gradient(supcon_loss(features, labels), features)
    )


def test_labels_of_the_last_batch_are_forgotten() -> None:
    features = unit_rows(6, 2, 4)
    first, second = torch.arange(6) % 2, torch.arange(6) // 3
    supcon_loss(features, first)
    assert_close(supcon_loss(features, second), reference.supcon_loss(features, second), torch.float32)


def test_zero_rows_stay_zero_and_have_no_gradient() -> None:
    rows = unit_rows(5, 2, 4).detach()
    rows[1, 0] = 0
    rows[2] = 0
    features = rows.requires_grad_()
    labels = torch.zeros(5, dtype=torch.int64)
    loss = supcon_loss(features, labels, normalize=True)
    assert_close(loss, reference.supcon_loss(features.double(), labels, normalize=True), torch.float32, 10)
    g = gradient(loss, features)
    assert g.isfinite().all()
    assert not g[1, 0].any()
    assert not g[2].any()
    assert g[0].any()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_norms_are_normalised(scale: float) -> None:
    features, labels = unit_rows(5, 2, 4), torch.arange(5) % 2
    loss = supcon_loss(features.detach() * scale, labels, normalize=True)
    assert_close(loss, supcon_loss(features.detach().double(), labels), torch.float32, scale=10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float32, 1e-5)])
def test_many_small_gradients_are_not_dropped(dtype: torch.dtype, tolerance: float) -> None:
    features = unit_rows(1024, 2, 8, dtype)
    labels = torch.arange(1024)
    # At a high temperature every negative has probability 1 / M, below any filter, and all of them count.
    actual = gradient(supcon_loss(features, labels, temperature=10.0, reduction="sum"), features)
    exact = features.detach().double().requires_grad_()
    expected = gradient(reference.supcon_loss(exact, labels, temperature=10.0, reduction="sum"), exact)
    assert (actual - expected).norm() / expected.norm() < tolerance


def test_blocks_of_rows_give_the_dense_loss() -> None:
    # 2^22 scores in a block: 2,300 rows of 2,300 are two blocks, and the second is not full.
    features, labels = unit_rows(1150, 2, 8), torch.arange(1150) % 7
    exact = features.detach().double().requires_grad_()
    expected = reference.supcon_loss(exact, labels)
    loss = supcon_loss(features, labels)
    assert_close(loss, expected, torch.float32)
    same = (labels[:, None] == labels[None, :]).float()
    weighted = weighted_contrastive_loss(features, same)
    assert_close(weighted, expected, torch.float32)
    expected_gradient = gradient(expected, exact)
    for one in (loss, weighted):
        assert (gradient(one, features) - expected_gradient).norm() / expected_gradient.norm() < 1e-5


def test_pairs_beyond_2_to_the_31() -> None:
    n = 46_400  # n^2 > 2^31
    features = unit_rows(n, 1, 2).detach()
    labels = torch.arange(n) // 2
    options = (1.0, -torch.inf, True, False, False)
    loss, lse, *_ = torch.ops.clustops.contrastive_rows(features, labels, None, n - 4, 4, *options)
    rows = features[:, 0].double()
    scores = rows[-4:] @ rows.T
    scores.diagonal(n - 4).fill_(-torch.inf)
    assert_close(lse[:, 0], scores.logsumexp(1), torch.float32)
    partner = torch.tensor([n - 3, n - 4, n - 1, n - 2])
    assert_close(loss[:, 0], scores.logsumexp(1) - scores.gather(1, partner[:, None])[:, 0], torch.float32)
    grad = torch.ones(n, 1)
    everyone = torch.full((n, 1), 10.0)
    dz = torch.ops.clustops.contrastive_rows_backward(
        grad, features, labels, None, everyone, n - 4, 4, *options
    )
    weights = 2 * (scores - 10).exp()
    assert_close(dz[:, 0], weights @ rows - 2 * rows[partner], torch.float32, scale=100)


@pytest.mark.slow
def test_all_pairs_of_more_than_2_to_the_31() -> None:
    n = 46_400
    features, labels = unit_rows(n, 1, 2), torch.arange(n) // 2
    rows = supcon_loss(features, labels, temperature=1.0, reduction="none")
    chosen = torch.tensor([0, 1, n // 2, n - 1])
    z = features.detach()[:, 0].double()
    scores = (z[chosen] @ z.T).scatter_(1, chosen[:, None], -torch.inf)
    partner = chosen ^ 1
    lse = scores.logsumexp(1, keepdim=True)
    assert_close(rows[chosen], lse - scores.gather(1, partner[:, None]), torch.float32)
    # With an upstream gradient on the chosen rows alone, theirs is that of a few rows of scores.
    upstream = torch.zeros(n, 1).index_fill_(0, chosen, 1.0)
    (actual,) = torch.autograd.grad((rows * upstream).sum(), features)
    p = (scores - lse).exp()
    expected = p.T @ z[chosen]
    expected.index_add_(0, chosen, p @ z - z[partner]).index_add_(0, partner, -z[chosen])
    assert_close(actual[:, 0], expected, torch.float32)


def saved_bytes(loss: Any, *args: Any, **kw: Any) -> int:
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss(*args, **kw)
    return sum(seen.values())


@pytest.mark.parametrize("normalize", [False, True])
def test_autograd_keeps_the_arguments_and_four_bytes_a_row(normalize: bool) -> None:
    n, v, d = 512, 2, 16
    features, labels, confidence = (
        unit_rows(n, v, d),
        torch.arange(n) % 9,
        torch.rand(n, generator=generator(0)),
    )
    arguments = 4 * n * v * d + 8 * n + 4 * n
    kept = saved_bytes(ccssl_loss, features, labels, confidence, normalize=normalize)
    assert kept <= arguments + 4 * n * v + 64
    pair_weights = torch.ones(n, n)
    kept = saved_bytes(weighted_contrastive_loss, features, pair_weights, normalize=normalize)
    assert kept <= 4 * n * v * d + 4 * n * n + 4 * n * v + 4 * n + 64


PEAK = """
import re, sys, torch
from clustops import native
from clustops.contrastive import ccssl_loss

if native.extension:
    native.extension.use_instruction_set(sys.argv[1])

def run(n):
    features = torch.nn.functional.normalize(torch.randn(n, 2, 128), dim=-1).requires_grad_()
    ccssl_loss(features, torch.arange(n) % 100, torch.rand(n)).backward()
    # Not getrusage: its peak begins with that of the process that started this one.
    return int(re.search("VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])

before = run(64)
print((run(4096) - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_peak_memory_is_that_of_the_docstring(path: str) -> None:
    if path == "cuda":
        pytest.skip("counts the memory of this process")
    # Freed blocks go back to the system at once, so that the resident set is what was in use.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    env["CLUSTOPS_DISABLE_NATIVE"] = str(int(path == "reference"))
    command = [sys.executable, "-c", PEAK, path]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)
    m, d = 8192, 128  # a dense loss takes 2,200 MB
    working = 8 * m * (d + 8) + 4 * 2**20
    if path == "reference":  # at most eight fp64 copies of [M, D]
        working = 2 * 16 * 2**20 + 8 * 8 * m * d
    assert peak < 2 * 4 * m * d + working, f"{peak / 2**20:.1f} MB"


@pytest.mark.parametrize("loss", [supcon_loss, weighted_contrastive_loss], ids=["classes", "pair_weights"])
def test_a_second_derivative_is_refused_by_name(loss: Any) -> None:
    features = unit_rows(4, 2, 3)
    positives = torch.arange(4) % 2 if loss is supcon_loss else torch.ones(4, 4)
    first = torch.autograd.grad(loss(features, positives), features, create_graph=True)[0]
    with pytest.raises(
        RuntimeError, match=r"contrastive_rows_backward .*double backward.*clustops\.reference"
    ):
        first.sum().backward()


def test_autocast_changes_nothing() -> None:
    features, labels = unit_rows(17, 2, 8), torch.arange(17) % 4
    plain = supcon_loss(features, labels, normalize=True)
    expected = gradient(plain, features)
    with torch.autocast("cpu", torch.bfloat16):
        loss = supcon_loss(features, labels, normalize=True)
        assert torch.equal(gradient(loss, features), expected)
    assert torch.equal(loss, plain)
    with torch.autocast("cpu", torch.bfloat16):
        same = (labels[:, None] == labels[None, :]).float()
        weighted = weighted_contrastive_loss(features, same, normalize=True)
        dense = reference.supcon_loss(features, labels, normalize=True)
    assert_close(weighted, plain, torch.float32)
    assert_close(dense, plain, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scaled_step_under_autocast(dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(6, 8)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, labels = torch.randn(9, 2, 6, generator=generator(0)), torch.arange(9) % 3
    exact = torch.autograd.grad(supcon_loss(layer(x), labels, normalize=True), layer.weight)[0]
    with torch.autocast("cpu", dtype):
        features = layer(x)
        loss = supcon_loss(features, labels, normalize=True)
    assert features.dtype == dtype
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert layer.weight.grad is not None
    assert (layer.weight.grad - exact).norm() / exact.norm() < 0.1
    before = layer.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0, "no overflow was seen"
    assert not torch.equal(before, layer.weight)


def test_two_runs_give_the_same_bits() -> None:
    features, labels = unit_rows(300, 2, 16), torch.arange(300) % 11
    one, two = (gradient(supcon_loss(features, labels), features) for _ in range(2))
    assert torch.equal(one, two)
