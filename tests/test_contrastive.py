"""The contrastive losses mean what their formulas say."""

from __future__ import annotations

import doctest
import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import assert_close, generator, seeds, small_sizes
from torch import Tensor

import clustops.contrastive
import clustops.contrastive_modules
import clustops.contrastive_weighted
from clustops.contrastive import ccssl_loss, info_nce_loss, pseudo_labels, supcon_loss
from clustops.contrastive_modules import CCSSLLoss, InfoNCELoss, SupConLoss
from clustops.contrastive_weighted import weighted_contrastive_loss
from clustops.reference import contrastive as reference

pytestmark = pytest.mark.usefixtures("path")

ANGLES = torch.deg2rad(torch.tensor([[10, 20], [40, 35], [100, 120]], dtype=torch.float64))
EXAMPLE = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=-1)
LABELS = torch.tensor([0, 0, 1])
CONFIDENCE = torch.tensor([0.97, 0.60, 0.91], dtype=torch.float64)
PRINTED = {"rel": 0, "abs": 0.5001e-6}  # the digits of the worked example

BOTH = pytest.mark.parametrize("ccssl", [ccssl_loss, reference.ccssl_loss], ids=["op", "reference"])

options = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.07, 0.5, 1.0]),
        "threshold": st.sampled_from([None, 0.0, 0.5, 0.95, 1.5]),
        "reweight": st.booleans(),
        "self_weight": st.sampled_from(["one", "confidence"]),
        "base_temperature": st.sampled_from([None, 0.07]),
        "normalize": st.booleans(),
        "no_positive": st.sampled_from(["zero", "ignore"]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
    }
)


def unit(tensor: Tensor) -> Tensor:
    return torch.nn.functional.normalize(tensor, dim=-1)


def draw(n: int, v: int, d: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 unit features, labels with gaps and -1, confidence with exact 0 and 1."""
    g = generator(seed)
    features = unit(torch.randn(n, v, d, dtype=torch.float64, generator=g))
    names = torch.tensor([-1, 0, 7, 2**62])
    labels = names[torch.randint(0, 4, (n,), generator=g)]
    confidence = torch.rand(n, dtype=torch.float64, generator=g).mul(1.4).sub(0.2).clamp(0, 1)
    return features, labels, confidence


def value_and_gradient(
    loss: Any, features: Tensor, *args: Any, upstream: Tensor, **kw: Any
) -> tuple[Tensor, Tensor]:
    leaf = features.detach().requires_grad_()
    value = loss(leaf, *args, **kw)
    weight = upstream if value.ndim else upstream.flatten()[0]
    (gradient,) = torch.autograd.grad((value * weight.to(value.dtype)).sum(), leaf)
    return value.detach(), gradient


@BOTH
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 0.758640),
        ({"threshold": 0.9}, 0.394853),
        ({"self_weight": "confidence"}, 0.845847),
        ({"reweight": False}, 0.845732),
    ],
    ids=str,
)
def test_worked_example(ccssl: Any, settings: dict[str, Any], expected: float) -> None:
    assert ccssl(EXAMPLE, LABELS, CONFIDENCE, **settings).item() == pytest.approx(expected, **PRINTED)


@BOTH
def test_worked_example_row_by_row(ccssl: Any) -> None:
    rows = ccssl(EXAMPLE, LABELS, CONFIDENCE, reduction="none")
    expected = torch.tensor(
        [[1.169469, 1.073783], [1.188899, 1.117157], [0.002506, 0.000023]], dtype=torch.float64
    )
    torch.testing.assert_close(rows, expected, atol=PRINTED["abs"], rtol=0)


@pytest.mark.parametrize(
    ("supcon", "info_nce"),
    [(supcon_loss, info_nce_loss), (reference.supcon_loss, reference.info_nce_loss)],
    ids=["op", "reference"],
)
def test_worked_example_without_confidence_and_without_classes(supcon: Any, info_nce: Any) -> None:
    assert supcon(EXAMPLE, LABELS).item() == pytest.approx(0.845732, **PRINTED)
    assert info_nce(EXAMPLE).item() == pytest.approx(0.394853, **PRINTED)


@given(n=small_sizes, v=st.integers(1, 3), d=small_sizes, seed=seeds, kw=options, weighted=st.booleans())
def test_ccssl_and_its_gradient_equal_the_reference(
    n: int, v: int, d: int, seed: int, kw: dict[str, Any], weighted: bool
) -> None:
    features, labels, confidence = draw(n, v, d, seed)
    kw["weights"] = torch.rand(n, dtype=torch.float64, generator=generator(seed + 1)) if weighted else None
    upstream = torch.randn(n, v, dtype=torch.float64, generator=generator(seed + 2))
    args = (features, labels, confidence)
    expected = value_and_gradient(reference.ccssl_loss, *args, upstream=upstream, **kw)
    actual = value_and_gradient(ccssl_loss, *args, upstream=upstream, **kw)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, torch.float64, scale=100)


@given(
    n=small_sizes,
    v=st.integers(1, 3),
    d=small_sizes,
    seed=seeds,
    kw=options,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_low_precision_inputs_are_computed_in_fp32(
    n: int, v: int, d: int, seed: int, kw: dict[str, Any], dtype: torch.dtype
) -> None:
    features, labels, confidence = draw(n, v, d, seed)
    features, confidence = features.to(dtype), confidence.float()
    upstream = torch.randn(n, v, dtype=torch.float64, generator=generator(seed))
    expected, expected_gradient = value_and_gradient(
        reference.ccssl_loss, features.double(), labels, confidence, upstream=upstream, **kw
    )
    loss, gradient = value_and_gradient(ccssl_loss, features, labels, confidence, upstream=upstream, **kw)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert_close(loss, expected, torch.float32, scale=10)
    # fp32 scores of 1 / 0.07 carry errors of 1e-6, and the gradient is multiplied by 1 / 0.07 again.
    assert_close(gradient, expected_gradient, dtype, scale=10 if dtype == torch.float32 else 1)


def spread(features: Tensor) -> dict[str, Tensor]:
    n, v, d = features.shape
    buffer = torch.zeros(n * v * d + 1, dtype=features.dtype)
    buffer[1:] = features.flatten()
    wide = torch.zeros(n, 2 * v, d, dtype=features.dtype)
    wide[:, ::2] = features
    return {
        "transposed": features.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": wide[:, ::2],
        "misaligned": buffer[1:].view(n, v, d),
    }


@pytest.mark.parametrize("layout", ["transposed", "sliced", "misaligned"])
def test_layout_changes_nothing(layout: str) -> None:
    features, labels, confidence = draw(7, 2, 5, 0)
    upstream = torch.ones(())
    expected = value_and_gradient(ccssl_loss, features, labels, confidence, upstream=upstream)
    actual = value_and_gradient(ccssl_loss, spread(features)[layout], labels, confidence, upstream=upstream)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


def test_expanded_features_and_labels() -> None:
    features = unit(torch.randn(1, 1, 4, dtype=torch.float64, generator=generator(0))).expand(5, 2, 4)
    labels = torch.tensor([3]).expand(5)
    assert ccssl_loss(features, labels).item() == pytest.approx(math.log(9))


def test_inputs_are_not_written() -> None:
    inputs = draw(9, 2, 5, 1)
    before = [x.clone() for x in inputs]
    value_and_gradient(ccssl_loss, *inputs, upstream=torch.ones(()), normalize=True)
    for x, b in zip(inputs, before, strict=True):
        assert torch.equal(x, b)


@given(n=small_sizes, v=st.integers(2, 3), seed=seeds)
def test_a_class_for_each_sample_is_info_nce(n: int, v: int, seed: int) -> None:
    features, _, confidence = draw(n, v, 4, seed)
    assert_close(
        ccssl_loss(features, torch.arange(n), confidence), info_nce_loss(features), torch.float64, 10
    )


@given(n=small_sizes, v=st.integers(1, 3), seed=seeds)
def test_a_threshold_above_one_is_info_nce(n: int, v: int, seed: int) -> None:
    features, labels, confidence = draw(n, v, 4, seed)
    assert_close(
        ccssl_loss(features, labels, confidence, threshold=1.5), info_nce_loss(features), torch.float64
    )


@given(n=small_sizes, v=st.integers(1, 3), seed=seeds)
def test_full_confidence_is_supcon(n: int, v: int, seed: int) -> None:
    features, labels, _ = draw(n, v, 4, seed)
    assert_close(ccssl_loss(features, labels, torch.ones(n)), supcon_loss(features, labels), torch.float64)
    assert_close(
        supcon_loss(features, labels), reference.supcon_loss(features, labels), torch.float64, scale=10
    )


@given(n=small_sizes, v=st.integers(1, 3), seed=seeds, c=st.floats(0.01, 1))
def test_with_own_views_weighted_by_confidence_its_scale_does_not_matter(
    n: int, v: int, seed: int, c: float
) -> None:
    features, labels, confidence = draw(n, v, 4, seed)
    whole = ccssl_loss(features, labels, confidence, self_weight="confidence")
    scaled = ccssl_loss(features, labels, c * confidence, self_weight="confidence")
    assert_close(scaled, whole, torch.float64, scale=100)


@given(n=st.integers(2, 17), v=st.integers(1, 3), seed=seeds)
def test_equal_features_give_the_log_of_the_number_of_pairs(n: int, v: int, seed: int) -> None:
    _, _, confidence = draw(n, v, 4, seed)
    features = unit(torch.ones(n, v, 4, dtype=torch.float64))
    loss = ccssl_loss(features, torch.zeros(n, dtype=torch.int64), 0.1 + 0.9 * confidence)
    assert loss.item() == pytest.approx(math.log(n * v - 1))


SETTINGS: dict[str, Any] = {
    "temperature": 0.2,
    "base_temperature": 0.1,
    "normalize": True,
    "weights": torch.rand(9, dtype=torch.float64, generator=generator(20)),
    "no_positive": "ignore",
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["supcon_loss", "info_nce_loss", "weighted_contrastive_loss"])
def test_every_loss_passes_its_settings_on(name: str, reduction: str) -> None:
    features = torch.randn(9, 2, 5, dtype=torch.float64, generator=generator(21))
    positives = {
        "supcon_loss": (torch.arange(9) % 4,),
        "info_nce_loss": (),
        "weighted_contrastive_loss": (torch.eye(9, dtype=torch.float64).cumsum(0),),
    }[name]
    loss = weighted_contrastive_loss if name.startswith("weighted") else getattr(clustops.contrastive, name)
    actual = loss(features, *positives, reduction=reduction, **SETTINGS)
    expected = getattr(reference, name)(features, *positives, reduction=reduction, **SETTINGS)
    assert_close(actual, expected, torch.float64, scale=10)


@pytest.mark.parametrize("loss", [supcon_loss, weighted_contrastive_loss], ids=["classes", "pair_weights"])
def test_rows_without_positives_are_ignored_or_rejected_as_asked(loss: Any) -> None:
    features = draw(3, 1, 5, 2)[0]
    positives = torch.tensor([0, 0, 1]) if loss is supcon_loss else torch.ones(3, 3).tril(-1).T
    rows = loss(features, positives, reduction="none")
    assert rows[2] == 0
    assert_close(loss(features, positives, no_positive="ignore"), rows.sum() / 2, torch.float64)
    with pytest.raises(ValueError, match="1 samples without one"):
        loss(features, positives, no_positive="raise")


def test_a_matrix_is_rows_of_one_view() -> None:
    features, labels, confidence = draw(9, 1, 5, 3)
    rows = ccssl_loss(features[:, 0], labels, confidence, reduction="none")
    assert rows.shape == (9,)
    assert torch.equal(rows, ccssl_loss(features, labels, confidence, reduction="none")[:, 0])


def test_labels_may_be_any_integers() -> None:
    features, _, confidence = draw(6, 2, 5, 4)
    far = torch.tensor([2**63 - 1, 0, 2**63 - 1, 5, 0, 5])
    near = torch.tensor([2, 0, 2, 1, 0, 1], dtype=torch.int32)
    assert torch.equal(ccssl_loss(features, far, confidence), ccssl_loss(features, near, confidence))


def test_label_minus_one_is_pulled_by_its_own_views_only() -> None:
    features, _, confidence = draw(6, 2, 5, 4)
    nobody = torch.full((6,), -1)
    assert torch.equal(ccssl_loss(features, nobody, confidence), info_nce_loss(features))


def test_confidence_at_the_threshold_is_confident() -> None:
    features, _, _ = draw(4, 2, 5, 4)
    labels, confidence = torch.tensor([0, 0, 1, 1]), torch.full((4,), 0.9, dtype=torch.float32)
    assert torch.equal(
        ccssl_loss(features, labels, confidence, threshold=0.9), ccssl_loss(features, labels, confidence)
    )


def test_base_temperature_multiplies_the_loss() -> None:
    plain = ccssl_loss(EXAMPLE, LABELS, CONFIDENCE, temperature=0.14)
    scaled = ccssl_loss(EXAMPLE, LABELS, CONFIDENCE, temperature=0.14, base_temperature=0.07)
    assert scaled.item() == pytest.approx(2 * plain.item())


def test_a_temperature_may_be_a_numpy_number() -> None:
    loss = ccssl_loss(EXAMPLE, LABELS, CONFIDENCE, temperature=np.float32(0.5))
    assert torch.equal(loss, ccssl_loss(EXAMPLE, LABELS, CONFIDENCE, temperature=0.5))


def test_weights_multiply_the_losses_of_a_sample() -> None:
    weights = torch.tensor([0.0, 2.0, 0.5])
    rows = ccssl_loss(EXAMPLE, LABELS, CONFIDENCE, reduction="none")
    weighted = ccssl_loss(EXAMPLE, LABELS, CONFIDENCE, weights=weights)
    assert weighted.item() == pytest.approx((rows * weights[:, None]).mean().item())


def test_normalize_is_a_division_by_the_norm_with_its_gradient() -> None:
    features, labels, confidence = draw(7, 2, 5, 5)
    features = features * torch.linspace(1e-3, 1e3, 7, dtype=torch.float64)[:, None, None]
    upstream = torch.ones(())
    expected = value_and_gradient(
        lambda x: ccssl_loss(unit(x), labels, confidence), features, upstream=upstream
    )
    actual = value_and_gradient(ccssl_loss, features, labels, confidence, normalize=True, upstream=upstream)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


@BOTH
@pytest.mark.parametrize("v", [1, 2, 3])
def test_the_gradient_is_that_of_finite_differences(v: int, ccssl: Any) -> None:
    features, labels, confidence = draw(4, v, 3, 6)
    labels[:2], confidence[:2] = 0, 0.9
    for settings in (
        {},
        {"threshold": 0.5, "normalize": True},
        {"self_weight": "confidence", "temperature": 0.5},
    ):
        torch.autograd.gradcheck(
            lambda x, kw=settings: ccssl(x, labels, confidence, reduction="none", **kw),
            (features.clone().requires_grad_(),),
        )


def test_only_features_get_a_gradient() -> None:
    features, labels, confidence = draw(5, 2, 4, 7)
    confidence, weights = confidence.requires_grad_(), torch.ones(5, requires_grad=True)
    ccssl_loss(features.requires_grad_(), labels, confidence, weights=weights).backward()
    assert features.grad is not None
    assert confidence.grad is None
    assert weights.grad is None


def test_modules_give_what_the_functions_give() -> None:
    features, labels, confidence = draw(5, 2, 4, 8)
    weights = torch.rand(5, generator=generator(0))
    settings: dict[str, Any] = {"temperature": 0.2, "normalize": True, "reduction": "sum"}
    ccssl = CCSSLLoss(threshold=0.5, **settings)
    assert torch.equal(
        ccssl(features, labels, confidence, weights=weights),
        ccssl_loss(features, labels, confidence, threshold=0.5, weights=weights, **settings),
    )
    assert torch.equal(
        SupConLoss(**settings)(features, labels, weights=weights),
        supcon_loss(features, labels, weights=weights, **settings),
    )
    assert torch.equal(
        InfoNCELoss(**settings)(features, weights=weights),
        info_nce_loss(features, weights=weights, **settings),
    )
    assert "threshold=0.5" in repr(ccssl)


@given(n=small_sizes, k=small_sizes, seed=seeds, temperature=st.sampled_from([0.1, 1.0, 3.0]))
def test_pseudo_labels_are_the_largest_of_the_softmax(n: int, k: int, seed: int, temperature: float) -> None:
    logits = torch.randn(n, k, dtype=torch.float64, generator=generator(seed))
    labels, confidence = pseudo_labels(logits, temperature=temperature)
    expected_labels, expected = reference.pseudo_labels(logits, temperature=temperature)
    assert torch.equal(labels, expected_labels)
    assert_close(confidence, expected, torch.float64)


def test_pseudo_labels_of_equal_logits_are_the_lowest_class() -> None:
    labels, confidence = pseudo_labels(torch.zeros(3, 4, requires_grad=True))
    assert labels.tolist() == [0, 0, 0]
    assert confidence.tolist() == [0.25] * 3
    assert not confidence.requires_grad


def test_pseudo_labels_of_extreme_logits_are_finite() -> None:
    labels, confidence = pseudo_labels(torch.tensor([[6e4, -6e4]], dtype=torch.float16), temperature=1e-36)
    assert (labels.item(), confidence.item()) == (0, 1.0)
    assert confidence.dtype == torch.float32


@pytest.mark.parametrize(
    ("no_positive", "reducer"), [("zero", "MeanReducer"), ("ignore", "AvgNonZeroReducer")]
)
def test_supcon_agrees_with_pytorch_metric_learning(no_positive: str, reducer: str) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    features = torch.randn(31, 8, dtype=torch.float64, generator=generator(9))
    labels = torch.randint(0, 12, (31,), generator=generator(10))
    assert (labels.bincount() == 1).any(), "a row without a positive belongs to this test"
    judge = losses.SupConLoss(temperature=0.1, reducer=getattr(reducers, reducer)())
    expected = value_and_gradient(judge, features, labels, upstream=torch.ones(()))
    actual = value_and_gradient(
        supcon_loss,
        features,
        labels,
        temperature=0.1,
        normalize=True,
        no_positive=no_positive,
        upstream=torch.ones(()),
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


@given(
    n=small_sizes,
    v=st.integers(1, 3),
    d=small_sizes,
    seed=seeds,
    normalize=st.booleans(),
    zeros=st.booleans(),
)
def test_any_pair_weights_and_their_gradient_equal_the_reference(
    n: int, v: int, d: int, seed: int, normalize: bool, zeros: bool
) -> None:
    features, _, _ = draw(n, v, d, seed)
    pair_weights = torch.rand(n, n, dtype=torch.float64, generator=generator(seed))
    if zeros:
        pair_weights = torch.where(pair_weights > 0.7, pair_weights, 0)
    kw: dict[str, Any] = {"normalize": normalize, "reduction": "none", "temperature": 0.2}
    upstream = torch.randn(n, v, dtype=torch.float64, generator=generator(seed + 1))
    args = (features, pair_weights)
    expected = value_and_gradient(reference.weighted_contrastive_loss, *args, upstream=upstream, **kw)
    actual = value_and_gradient(weighted_contrastive_loss, *args, upstream=upstream, **kw)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, torch.float64, scale=100)


def test_pair_weights_of_classes_are_supcon() -> None:
    features, _, _ = draw(9, 2, 5, 11)
    labels = torch.arange(9) % 4
    same = (labels[:, None] == labels[None, :]).double()
    expected = value_and_gradient(supcon_loss, features, labels, upstream=torch.ones(()))
    actual = value_and_gradient(weighted_contrastive_loss, features, same, upstream=torch.ones(()))
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, torch.float64, scale=10)


@pytest.mark.parametrize(
    "function",
    [ccssl_loss, supcon_loss, info_nce_loss, pseudo_labels, weighted_contrastive_loss],
    ids=lambda f: f.__name__,
)
def test_the_reference_takes_the_same_arguments(function: Any) -> None:
    public = inspect.signature(function).parameters.values()
    dense = inspect.signature(getattr(reference, function.__name__)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in public] == [(p.name, p.kind, p.default) for p in dense]


@pytest.mark.parametrize(
    "module",
    [clustops.contrastive, clustops.contrastive_modules, clustops.contrastive_weighted],
    ids=lambda m: m.__name__,
)
def test_examples_in_docstrings_run(module: Any) -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0
