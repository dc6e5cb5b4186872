"""The contrastive ops are good citizens of torch: opcheck, compile, one message for each bad argument."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_message, generator
from torch._dynamo.testing import CompileCounterWithBackend

from clustops import checks, contrastive_rows
from clustops.contrastive import ccssl_loss, info_nce_loss, pseudo_labels, supcon_loss
from clustops.contrastive_modules import CCSSLLoss
from clustops.contrastive_weighted import weighted_contrastive_loss

N, V, D = 5, 2, 4
FEATURES = torch.nn.functional.normalize(torch.randn(N, V, D, generator=generator(0)), dim=-1)
LABELS = torch.tensor([0, 1, -1, 0, 1])
CONFIDENCE = torch.tensor([0.9, 0.2, 0.6, 1.0, 0.0])


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("labels", [LABELS, None], ids=["labels", "no labels"])
@pytest.mark.parametrize("anchors", [(0, N), (1, 3), (N, 0)], ids=["all", "some", "none"])
def test_opcheck_of_contrastive_rows(
    dtype: torch.dtype, labels: torch.Tensor | None, anchors: tuple[int, int]
) -> None:
    features = FEATURES.to(dtype).requires_grad_()
    confidence = None if labels is None else CONFIDENCE
    torch.library.opcheck(
        torch.ops.clustops.contrastive_rows.default,
        (features, labels, confidence, *anchors, 0.5, 0.3, True, False, True),
    )
    lse = torch.ops.clustops.contrastive_rows(features, labels, None, 0, N, 0.5, 0.3, True, False, True)[1]
    torch.library.opcheck(
        torch.ops.clustops.contrastive_rows_backward.default,
        (lse, features.detach(), labels, confidence, lse, *anchors, 0.5, 0.3, True, False, True),
    )


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("anchors", [(0, N), (1, 3), (N, 0)], ids=["all", "some", "none"])
def test_opcheck_of_weighted_contrastive_rows(dtype: torch.dtype, anchors: tuple[int, int]) -> None:
    features, (first, count) = FEATURES.to(dtype).requires_grad_(), anchors
    pair_weights = torch.rand(count, N, generator=generator(1))
    arguments = (features, pair_weights, first, 0.5, True)
    torch.library.opcheck(torch.ops.clustops.weighted_contrastive_rows.default, arguments)
    _, lse, weight, _ = torch.ops.clustops.weighted_contrastive_rows(*arguments)
    torch.library.opcheck(
        torch.ops.clustops.weighted_contrastive_rows_backward.default,
        (lse, features.detach(), pair_weights, lse, weight, first, 0.5, True),
    )


@pytest.mark.usefixtures("cpu_path")
def test_losses_of_some_anchors_have_the_gradient_of_those_rows() -> None:
    features = FEATURES.double().requires_grad_()
    # So cold that the exponential of a score alone overflows.
    options = (1e-4, 0.3, True, False, True)
    everyone = torch.ops.clustops.contrastive_rows(features, LABELS, CONFIDENCE, 0, N, *options)[0]
    some = torch.ops.clustops.contrastive_rows(features, LABELS, CONFIDENCE, 1, 3, *options)[0]
    torch.testing.assert_close(some, everyone[1:4])
    expected = torch.autograd.grad(everyone[1:4].square().sum(), features)[0]
    torch.testing.assert_close(torch.autograd.grad(some.square().sum(), features)[0], expected)


def _arguments(loss: Callable[..., Any], n: int) -> tuple[torch.Tensor, ...]:
    features = torch.randn(n, V, D, generator=generator(n)).requires_grad_()
    confidence = torch.rand(n, generator=generator(n))
    return {
        "ccssl_loss": (features, torch.arange(n) % 3, confidence),
        "supcon_loss": (features, torch.arange(n) % 3),
        "info_nce_loss": (features,),
        "weighted_contrastive_loss": (features, torch.rand(n, n, generator=generator(n))),
        "pseudo_labels": (features,),
        "forward": (features, torch.arange(n) % 3, confidence),
    }[loss.__name__]


@pytest.mark.parametrize("no_positive", ["zero", "ignore", "raise"])
@pytest.mark.parametrize(
    "loss", [ccssl_loss, supcon_loss, info_nce_loss, weighted_contrastive_loss], ids=lambda f: f.__name__
)
def test_losses_compile_once_for_all_sizes(loss: Callable[..., Any], no_positive: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    options: dict[str, Any] = {"normalize": True, "no_positive": no_positive, "base_temperature": 0.1}
    compiled = torch.compile(lambda *a: loss(*a, **options), fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for n in (5, 8, 13):
        features, *rest = _arguments(loss, n)
        plain, traced = loss(features, *rest, **options), compiled(features, *rest)
        torch.testing.assert_close(traced, plain)
        torch.testing.assert_close(
            torch.autograd.grad(traced, features)[0], torch.autograd.grad(plain, features)[0]
        )
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1], f"compiled again for another size: {graphs}"


def test_modules_and_pseudo_labels_compile() -> None:
    torch._dynamo.reset()
    module = CCSSLLoss(threshold=0.5, normalize=True, reduction="none")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    arguments = _arguments(module.forward, 7)
    torch.testing.assert_close(compiled(*arguments), module(*arguments))
    labels = torch.compile(pseudo_labels, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(labels(arguments[0]), pseudo_labels(arguments[0]))


def test_a_row_without_positives_stops_a_compiled_loss() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(supcon_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="without a positive"):
        compiled(FEATURES[:, 0], torch.arange(N), no_positive="raise")


CCSSL = {"features": FEATURES, "labels": LABELS, "confidence": CONFIDENCE}
WEIGHTED = {"features": FEATURES, "pair_weights": torch.ones(N, N)}
NAN = FEATURES.clone().index_fill(0, torch.tensor([1]), math.nan)

BAD = [
    (ccssl_loss, CCSSL, "features", [[0.0]], TypeError, "a tensor", "list"),
    (ccssl_loss, CCSSL, "features", FEATURES.long(), TypeError, "float32", "torch.int64"),
    (ccssl_loss, CCSSL, "features", FEATURES[0, 0], ValueError, "[N, V, D]", "[4]"),
    (ccssl_loss, CCSSL, "features", FEATURES[:0], ValueError, "not empty", "[0, 2, 4]"),
    (ccssl_loss, CCSSL, "features", FEATURES[:, :0], ValueError, "not empty", "[5, 0, 4]"),
    (ccssl_loss, CCSSL, "features", NAN, ValueError, "finite", "8 NaN or infinite values of 40"),
    (ccssl_loss, CCSSL, "labels", LABELS.float(), TypeError, "integers", "torch.float32"),
    (ccssl_loss, CCSSL, "labels", LABELS.repeat(2), ValueError, "[N] with N = features.shape[0] = 5", "[10]"),
    (ccssl_loss, CCSSL, "labels", LABELS[:, None], ValueError, "[N]", "[5, 1]"),
    (ccssl_loss, CCSSL, "labels", LABELS - 1, ValueError, "at least -1", "-2"),
    (ccssl_loss, CCSSL, "labels", LABELS.to("meta"), ValueError, "on the device of features, cpu", "meta"),
    (ccssl_loss, CCSSL, "confidence", LABELS, TypeError, "float32", "torch.int64"),
    (ccssl_loss, CCSSL, "confidence", CONFIDENCE[:3], ValueError, "[N]", "[3]"),
    (ccssl_loss, CCSSL, "confidence", CONFIDENCE + 0.5, ValueError, "in [0, 1]", "1.5"),
    (ccssl_loss, CCSSL, "confidence", CONFIDENCE - 0.5, ValueError, "in [0, 1]", "-0.5"),
    (ccssl_loss, CCSSL, "confidence", CONFIDENCE / 0, ValueError, "finite", "5 NaN"),
    (ccssl_loss, CCSSL, "temperature", 0.0, ValueError, "above 0", "0.0"),
    (ccssl_loss, CCSSL, "temperature", -1, ValueError, "above 0", "-1"),
    (ccssl_loss, CCSSL, "temperature", "hot", TypeError, "a number", "str"),
    (ccssl_loss, CCSSL, "base_temperature", 0.0, ValueError, "above 0", "0.0"),
    (ccssl_loss, CCSSL, "threshold", math.nan, ValueError, "at least 0", "nan"),
    (ccssl_loss, CCSSL, "threshold", -5, ValueError, "at least 0", "-5"),
    (ccssl_loss, CCSSL, "threshold", "0.9", TypeError, "a number or None", "str"),
    (ccssl_loss, CCSSL, "self_weight", "two", ValueError, "'one', 'confidence'", "'two'"),
    (ccssl_loss, CCSSL, "no_positive", "nan", ValueError, "'zero', 'ignore', 'raise'", "'nan'"),
    (ccssl_loss, CCSSL, "reduction", "avg", ValueError, "'mean', 'sum', 'none'", "'avg'"),
    (ccssl_loss, CCSSL, "weights", LABELS, TypeError, "float32", "torch.int64"),
    (ccssl_loss, CCSSL, "weights", torch.ones(N, V), ValueError, "[N]", "[5, 2]"),
    (ccssl_loss, CCSSL, "weights", torch.full((N,), math.inf), ValueError, "finite", "5 NaN or infinite"),
    (ccssl_loss, CCSSL, "weights", CONFIDENCE - 0.5, ValueError, "at least 0", "-0.5"),
    (weighted_contrastive_loss, WEIGHTED, "weights", CONFIDENCE - 0.5, ValueError, "at least 0", "-0.5"),
    (ccssl_loss, CCSSL, "group", "world", ValueError, "None where torch.distributed", "str"),
    (info_nce_loss, {"features": FEATURES}, "features", FEATURES[:, 0], ValueError, "[N, V, D]", "[5, 4]"),
    (
        weighted_contrastive_loss,
        WEIGHTED,
        "pair_weights",
        torch.ones(10, 10),
        ValueError,
        "[5, 5]",
        "[10, 10]",
    ),
    (weighted_contrastive_loss, WEIGHTED, "pair_weights", torch.ones(N), ValueError, "[N, N]", "[5]"),
    (
        weighted_contrastive_loss,
        WEIGHTED,
        "pair_weights",
        -torch.ones(N, N),
        ValueError,
        "at least 0",
        "-1.0",
    ),
    (
        weighted_contrastive_loss,
        WEIGHTED,
        "pair_weights",
        torch.ones(N, N).bool(),
        TypeError,
        "float32",
        "bool",
    ),
    (
        weighted_contrastive_loss,
        WEIGHTED,
        "pair_weights",
        torch.full((N, N), math.nan),
        ValueError,
        "finite",
        "25",
    ),
    (pseudo_labels, {"logits": FEATURES}, "logits", torch.ones(3, 0), ValueError, "K >= 1", "[3, 0]"),
    (pseudo_labels, {"logits": FEATURES}, "logits", LABELS, TypeError, "float32", "torch.int64"),
    (pseudo_labels, {"logits": FEATURES}, "logits", NAN, ValueError, "finite", "8 NaN"),
    (pseudo_labels, {"logits": FEATURES}, "temperature", 0.0, ValueError, "above 0", "0.0"),
]


@pytest.mark.parametrize(
    ("function", "good", "name", "value", "error", "expected", "got"),
    BAD,
    ids=[f"{case[0].__name__}-{case[2]}-{case[6]}" for case in BAD],
)
def test_a_bad_argument_is_named(
    function: Callable[..., Any],
    good: dict[str, Any],
    name: str,
    value: object,
    error: type[Exception],
    expected: str,
    got: str,
) -> None:
    with pytest.raises(error) as caught:
        function(**{**good, name: value})
    assert_message(caught.value, f"{name} must be ", expected, got)


@pytest.mark.parametrize(
    ("features", "labels", "cure"),
    [
        ([FEATURES[:, 0], FEATURES[:, 1]], LABELS, "torch.stack(views, dim=1)"),
        (
            FEATURES.transpose(0, 1),
            LABELS,
            "did you mean features.transpose(0, 1)? views are the second axis",
        ),
        (FEATURES.flatten(0, 1), LABELS, "stack the views to [N, V, D]: torch.stack(views, dim=1)"),
        (FEATURES, torch.eye(N), "labels.argmax(1)"),
        (FEATURES, LABELS.float(), "class indices: labels.long()"),
    ],
)
def test_what_was_meant_is_guessed(features: Any, labels: torch.Tensor, cure: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(cure)) as caught:
        supcon_loss(features, labels)
    assert_message(caught.value)


def test_rows_far_from_norm_one_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_rows, "_warned", False)
    info_nce_loss(FEATURES * 1.05)
    info_nce_loss(FEATURES * 3, normalize=True)
    info_nce_loss(FEATURES.index_fill(0, torch.tensor([2]), 0))
    assert not contrastive_rows._warned
    with pytest.warns(checks.ClustopsWarning, match="rows of norm 3 to 3, .* normalize=True"):
        info_nce_loss(FEATURES * 3)
    info_nce_loss(FEATURES * 3)


def test_a_row_without_positives_is_rejected_on_request() -> None:
    with pytest.raises(ValueError, match="no_positive='raise'") as caught:
        supcon_loss(FEATURES[:, 0], torch.tensor([0, 0, 1, 2, 2]), no_positive="raise")
    assert_message(caught.value, "features must be rows with at least one positive", "1 samples without one")
