"""The fixtures that put a path in use: what they name serves the ops, and only while they last."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paths import instruction_sets, on_gpu, served_by
from support import generator, run_ranks

from clustops import native
from clustops.sinkhorn import sinkhorn_potentials

SCORES = torch.rand(9, 4, generator=generator(0))


@pytest.mark.parametrize("name", instruction_sets())
def test_a_set_of_instructions_is_in_use(name: str) -> None:
    before = native.extension.instruction_set()
    with served_by(name):
        assert native.extension.instruction_set() == name
    assert native.extension.instruction_set() == before


def calls_in_a_rank(rank: int, world: int, calls: list[int]) -> int:
    sinkhorn_potentials(SCORES)
    return len(calls)


def test_the_reference_is_in_use_also_in_forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = native.references["sinkhorn_potentials"]

    def spy(*args: Any) -> Any:
        calls.append(1)
        return original(*args)

    monkeypatch.setitem(native.references, "sinkhorn_potentials", spy)
    with served_by("reference"):
        sinkhorn_potentials(SCORES)
        assert run_ranks(1, calls_in_a_rank, calls) == [2]
    assert len(calls) == 1
    sinkhorn_potentials(SCORES)
    assert len(calls) == 1, "the kernel is back"


def test_what_an_op_writes_and_returns_elsewhere_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    op = torch.ops.clustops.sinkhorn_.default
    settings = (SCORES[None], None, None, None, None, 0.05, 3, None, None, None, False)
    expected, moved = torch.zeros(1, 9, 4), torch.zeros(1, 9, 4)
    potentials = op(expected, *settings)
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.clone)  # another place, without a GPU
    torch.testing.assert_close(on_gpu(op)(moved, *settings), potentials)
    torch.testing.assert_close(moved, expected)
