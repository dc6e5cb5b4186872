"""Bad input gets an error that names the argument, what was expected, what came and the cure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_message

from clustops.sinkhorn import assign_from_potentials, sinkhorn, sinkhorn_potentials
from clustops.sinkhorn_loss import soft_cross_entropy, swapped_prediction_loss
from clustops.sinkhorn_matrix import sinkhorn_matrix

S = torch.eye(6, 4)
TEXT: Any = "0.1"
HALF: Any = 2.5
LIST: Any = [1.0] * 6
VIEWS: Any = [S, S]
V = S.expand(3, 6, 4)


def soft(*tensors: Any, **settings: Any) -> Any:
    return soft_cross_entropy(*tensors, **{"temperature": 0.1, "target_temperature": 0.05, **settings})


BAD: list[tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = [
    (lambda: sinkhorn("scores"), TypeError, ("scores", "a tensor", "got str")),
    (lambda: sinkhorn(S.long()), TypeError, ("scores", "float32", "got torch.int64")),
    (lambda: sinkhorn(S[0]), ValueError, ("scores", "[..., B, K]", "got [4]")),
    (lambda: sinkhorn(S[:0]), ValueError, ("scores", "at least one row", "got [0, 4]", "skip empty")),
    (lambda: sinkhorn(S[:, :0]), ValueError, ("scores", "one prototype", "got [6, 0]")),
    (lambda: sinkhorn(S * math.nan), ValueError, ("scores", "finite", "24 NaN")),
    (lambda: sinkhorn(S / 0), ValueError, ("scores", "finite", "mask these rows")),
    (lambda: sinkhorn(S, epsilon=0), ValueError, ("epsilon", "above 0", "got 0", "0.05")),
    (lambda: sinkhorn(S, epsilon=-1.0), ValueError, ("epsilon", "above 0", "got -1.0")),
    (lambda: sinkhorn(S, epsilon=TEXT), TypeError, ("epsilon", "a number", "got str")),
    (lambda: sinkhorn(S, out=torch.empty(6, 3)), ValueError, ("out", "[6, 4]", "got [6, 3]", "torch.empty")),
    (lambda: sinkhorn(S, out=torch.empty(4, 6).T), ValueError, ("out", "contiguous", "not contiguous")),
    (lambda: sinkhorn(S, out=torch.empty(6, 4).half()), ValueError, ("out", "float32", "got torch.float16")),
    (lambda: sinkhorn(S, out=S), ValueError, ("out", "of its own", "that of scores")),
    (lambda: sinkhorn(S, out=torch.ones(6, 4).requires_grad_()), ValueError, ("out", "requires_grad")),
    (
        lambda: sinkhorn(S, out=torch.empty(6, 4), gradient="unrolled"),
        ValueError,
        ("out", "None with a grad"),
    ),
    (lambda: sinkhorn(S, queue_scores=S[:, :3]), ValueError, ("queue_scores", "[N, 4]", "got [6, 3]")),
    (lambda: sinkhorn(S, queue_scores=S / 0), ValueError, ("queue_scores", "finite", "24 NaN")),
    (lambda: assign_from_potentials(S * math.nan, S[0]), ValueError, ("scores", "finite", "24 NaN")),
    (lambda: sinkhorn(S, n_iters=-1), ValueError, ("n_iters", "at least 0", "got -1")),
    (lambda: sinkhorn(S, n_iters=HALF), TypeError, ("n_iters", "an integer", "got 2.5")),
    (lambda: sinkhorn(S, prior=torch.ones(5)), ValueError, ("prior", "[4]", "got [5]")),
    (lambda: sinkhorn(V, prior=torch.ones(2, 4)), ValueError, ("prior", "[4] or [3, 4]", "got [2, 4]")),
    (lambda: sinkhorn(S, prior=-torch.ones(4)), ValueError, ("prior", "at least 0", "got -1.0")),
    (lambda: sinkhorn(S, prior=torch.zeros(4)), ValueError, ("prior", "above 0", "all 0")),
    (lambda: sinkhorn(S, prior=torch.full((4,), math.inf)), ValueError, ("prior", "finite", "4 NaN")),
    (
        lambda: sinkhorn(S, prior=torch.ones(4, device="meta")),
        ValueError,
        ("prior", "device of scores", "meta"),
    ),
    (lambda: sinkhorn(S, weights=torch.ones(4)), ValueError, ("weights", "[6]", "got [4]")),
    (lambda: sinkhorn(S, weights=-torch.ones(6)), ValueError, ("weights", "at least 0", "got -1.0", "masks")),
    (lambda: sinkhorn(S, weights=torch.zeros(6)), ValueError, ("weights", "above 0", "all 0")),
    (lambda: sinkhorn(S, weights=torch.full((6,), math.nan)), ValueError, ("weights", "finite", "6 NaN")),
    (lambda: sinkhorn(S, weights=torch.ones(6) * 1j), TypeError, ("weights", "real", "complex64")),
    (lambda: sinkhorn(S, relax=-1.0), ValueError, ("relax", "above 0", "got -1.0")),
    (lambda: sinkhorn(S, relax=math.nan), ValueError, ("relax", "above 0", "got nan")),
    (lambda: sinkhorn(S, mass=0.0), ValueError, ("mass", "above 0", "got 0.0")),
    (lambda: sinkhorn(S, mass=1.5), ValueError, ("mass", "at most 1", "got 1.5")),
    (lambda: sinkhorn(S, tol=0.0), ValueError, ("tol", "above 0", "pass None")),
    (lambda: sinkhorn(S, init=torch.ones(5)), ValueError, ("init", "[4]", "got [5]")),
    (
        lambda: sinkhorn(S, init=torch.ones(4), mass=0.5),
        ValueError,
        ("init", "[5]", "virtual column", "got [4]"),
    ),
    (lambda: sinkhorn(S, init=torch.full((4,), math.nan)), ValueError, ("init", "finite", "4 NaN")),
    (lambda: sinkhorn(S, gradient="all"), ValueError, ("gradient", "'last_step'", "got 'all'")),
    (lambda: sinkhorn(S, gradient="last_step", hard=True), ValueError, ("hard", "False", "got True")),
    (lambda: sinkhorn(S, dtype=torch.float16), ValueError, ("dtype", "torch.float32", "got torch.float16")),
    (lambda: sinkhorn(S, group="world"), ValueError, ("group", "None", "got str")),
    (lambda: sinkhorn_potentials(S, bound=0.0), ValueError, ("bound", "above 0", "got 0.0")),
    (lambda: sinkhorn_potentials(S, bound=0.5), ValueError, ("bound", "at least", "1.0", "got 0.5")),
    (lambda: assign_from_potentials(S, torch.ones(6)), ValueError, ("potentials", "[4] or [5]", "got [6]")),
    (
        lambda: assign_from_potentials(S, torch.ones(4), epsilon=0),
        ValueError,
        ("epsilon", "above 0", "got 0"),
    ),
    (lambda: sinkhorn_matrix(S), ValueError, ("m", "[..., n, n]", "got [6, 4]")),
    (lambda: sinkhorn_matrix(torch.eye(33)), ValueError, ("m", "at most 32", "got [33, 33]", "sinkhorn(")),
    (lambda: sinkhorn_matrix(torch.eye(3) / 0), ValueError, ("m", "finite", "9 NaN")),
    (lambda: swapped_prediction_loss(S), ValueError, ("scores", "[V, B, K]", "got [6, 4]", "stack")),
    (lambda: swapped_prediction_loss(V[:1]), ValueError, ("scores", "2 views", "got [1, 6, 4]")),
    (lambda: swapped_prediction_loss(V[:, :0]), ValueError, ("scores", "at least one row", "got [3, 0, 4]")),
    (lambda: swapped_prediction_loss(V * math.nan), ValueError, ("scores", "finite", "72 NaN")),
    (lambda: swapped_prediction_loss(V, temperature=0), ValueError, ("temperature", "above 0", "got 0")),
    (lambda: swapped_prediction_loss(V, epsilon=0), ValueError, ("epsilon", "above 0", "got 0")),
    (
        lambda: swapped_prediction_loss(V, assign_views=()),
        ValueError,
        ("assign_views", "one or more", "got ()"),
    ),
    (
        lambda: swapped_prediction_loss(V, assign_views=(1, 1)),
        ValueError,
        ("assign_views", "different", "(1, 1)"),
    ),
    (
        lambda: swapped_prediction_loss(V, assign_views=HALF),
        TypeError,
        ("assign_views", "(0, 1)", "got float"),
    ),
    (lambda: swapped_prediction_loss(VIEWS), TypeError, ("scores", "list of tensors", "torch.stack(views)")),
    (
        lambda: swapped_prediction_loss(V, weights=-torch.ones(6)),
        ValueError,
        ("weights", "at least 0", "-1.0"),
    ),
    (lambda: swapped_prediction_loss(V, assign_views=(0, 3)), ValueError, ("assign_views", "V = 3", "got 3")),
    (
        lambda: swapped_prediction_loss(V, assign_views=(-1,)),
        ValueError,
        ("assign_views", "at least 0", "got -1"),
    ),
    (lambda: swapped_prediction_loss(V, reduction="max"), ValueError, ("reduction", "'mean'", "got 'max'")),
    (
        lambda: swapped_prediction_loss(V, weights=torch.ones(3, 6)),
        ValueError,
        ("weights", "[6]", "got [3, 6]"),
    ),
    (lambda: swapped_prediction_loss(V, weights=LIST), TypeError, ("weights", "a tensor", "got list")),
    (
        lambda: swapped_prediction_loss(V, queue_scores=V),
        ValueError,
        ("queue_scores", "[2, N, 4]", "got [3, 6, 4]"),
    ),
    (
        lambda: swapped_prediction_loss(V, queue_scores=S[:, :3]),
        ValueError,
        ("queue_scores", "[N, 4]", "[6, 3]"),
    ),
    (
        lambda: swapped_prediction_loss(V, queue_scores=S / 0),
        ValueError,
        ("queue_scores", "finite", "24 NaN"),
    ),
    (
        lambda: swapped_prediction_loss(V, potentials=torch.ones(3, 4)),
        ValueError,
        ("potentials", "[2, 4]", "[3, 4]"),
    ),
    (
        lambda: swapped_prediction_loss(V, potentials=torch.ones(4), queue_scores=S),
        ValueError,
        ("queue_scores", "None", "got both"),
    ),
    (lambda: soft([S], [S]), TypeError, ("scores", "list of tensors", "torch.stack(views)")),
    (lambda: soft(S, S, weights=-torch.ones(6)), ValueError, ("weights", "at least 0", "-1.0")),
    (lambda: soft(S, V), ValueError, ("target_scores", "[6, 4]", "got [3, 6, 4]", "pairs")),
    (lambda: soft(S, S.int()), TypeError, ("target_scores", "float32", "got torch.int32")),
    (lambda: soft(S, S.to("meta")), ValueError, ("target_scores", "device of scores", "meta")),
    (lambda: soft(S, S, torch.ones(5)), ValueError, ("bias", "[4]", "got [5]")),
    (lambda: soft(S, S, torch.full((4,), math.nan)), ValueError, ("bias", "finite", "4 NaN")),
    (lambda: soft(S, S * math.nan), ValueError, ("target_scores", "finite", "24 NaN")),
    (lambda: soft(S, S, temperature=0), ValueError, ("temperature", "above 0", "got 0")),
    (lambda: soft(S, S, target_temperature=-0.1), ValueError, ("target_temperature", "above 0", "got -0.1")),
    (lambda: soft(V, V, pairs=[]), ValueError, ("pairs", "one or more", "got none")),
    (lambda: soft(V, V, pairs=[(0, 3)]), ValueError, ("pairs", "below 3", "got 3")),
    (lambda: soft(S, S, pairs=[(0, 0)]), ValueError, ("scores", "[V, B, K]", "got [6, 4]")),
    (lambda: soft(V, V[:, :5], pairs=[(0, 0)]), ValueError, ("target_scores", "[A, 6, 4]", "got [3, 5, 4]")),
]


@pytest.mark.parametrize(
    ("call", "error", "parts"), BAD, ids=[f"{i}-{case[2][0]}" for i, case in enumerate(BAD)]
)
def test_bad_input_is_explained(
    call: Callable[[], Any], error: type[Exception], parts: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        call()
    assert_message(caught.value, *parts)
