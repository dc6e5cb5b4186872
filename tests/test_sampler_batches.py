"""MPerClusterBatchSampler: P clusters, m samples each."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from support import assert_message, seeds
from torch.utils.data import DataLoader

from clustops.sampler import MPerClusterBatchSampler

LABELS = torch.tensor([0] * 9 + [1] * 3 + [-1] * 4 + [3] * 1 + [4] * 20 + [5] * 7)


@given(p=st.integers(1, 5), m=st.integers(1, 8), seed=seeds, epoch=st.integers(0, 99))
def test_a_batch_holds_m_samples_of_each_of_p_clusters(p: int, m: int, seed: int, epoch: int) -> None:
    order = MPerClusterBatchSampler(LABELS, p, m, num_batches=7, seed=seed)
    order.set_epoch(epoch)
    for batch in order:
        rows = torch.tensor(batch).view(p, m)
        clusters = LABELS[rows]
        assert bool((clusters == clusters[:, :1]).all())
        assert clusters[:, 0].unique().numel() == p
        assert int(clusters.min()) >= 0
        for row, c in zip(rows.tolist(), clusters[:, 0].tolist(), strict=True):
            n = int((c == LABELS).sum())
            assert set(Counter(row).values()) <= {m // n, -(-m // n)}  # all distinct where n >= m


def test_clusters_and_members_are_drawn_evenly() -> None:
    order = MPerClusterBatchSampler(LABELS, 2, 3, num_batches=3000)
    drawn = torch.bincount(torch.tensor(list(order)).flatten(), minlength=len(LABELS))
    assert int(drawn[LABELS < 0].sum()) == 0
    clusters = torch.bincount(LABELS.clamp(min=0), weights=drawn.double() * (LABELS >= 0))
    assert chisquare([c for c in clusters.tolist() if c]).pvalue > 1e-4
    for c in (0, 4, 5):
        assert chisquare(drawn[c == LABELS].tolist()).pvalue > 1e-4


def test_a_pass_takes_each_cluster_once_where_p_divides() -> None:
    labels = torch.arange(60) % 6
    for two in MPerClusterBatchSampler(labels, 3, 2, num_batches=10).batches(0, 10).view(5, 12):
        assert sorted(labels[two].tolist()) == sorted([*range(6), *range(6)])


@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_the_batches(drop_last: bool) -> None:
    whole = MPerClusterBatchSampler(LABELS, 2, 3, num_batches=11)
    ranks = [
        MPerClusterBatchSampler(LABELS, 2, 3, num_batches=11, num_replicas=4, rank=r, drop_last=drop_last)
        for r in range(4)
    ]
    parts = [list(rank) for rank in ranks]
    share = 2 if drop_last else 3
    assert [len(part) for part in parts] == [len(rank) for rank in ranks] == [share] * 4
    woven = [batch for step in zip(*parts, strict=True) for batch in step]
    assert woven == whole.batches(0, 4 * share).tolist()  # ranks go on to later batches, nothing comes twice


def test_batches_resume_under_another_world_size() -> None:
    whole = list(MPerClusterBatchSampler(LABELS, 2, 3, num_batches=11))
    for steps in range(12):
        order = MPerClusterBatchSampler(LABELS, 2, 3, num_batches=11)
        iterator = iter(order)
        for _ in range(steps):
            next(iterator)
        parts = []
        for r in range(2):
            resumed = MPerClusterBatchSampler(LABELS, 2, 3, num_batches=11, num_replicas=2, rank=r)
            resumed.load_state_dict(order.state_dict())
            parts.append(list(resumed))
        woven = [batch for step in zip(*parts, strict=True) for batch in step]
        assert woven[: 11 - steps] == whole[steps:]


def test_a_loader_takes_it_as_batch_sampler() -> None:
    order = MPerClusterBatchSampler(LABELS, 2, 3)
    assert len(order) == 40 // 6
    batches = [batch.tolist() for batch in DataLoader(range(len(LABELS)), batch_sampler=order, num_workers=2)]
    assert batches == list(order)


def test_refused_labels_leave_the_sampler_as_it_was() -> None:
    order = MPerClusterBatchSampler(LABELS, 5, 3)
    before = list(order)
    with pytest.raises(ValueError, match="clusters_per_batch"):
        order.set_labels(LABELS.clamp(max=3))
    assert list(order) == before


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"clusters_per_batch": 6}, ValueError, ("clusters_per_batch", "at most the 5", "6")),
        ({"clusters_per_batch": 0}, ValueError, ("clusters_per_batch", "at least 1")),
        ({"samples_per_cluster": 0}, ValueError, ("samples_per_cluster", "at least 1")),
        ({"samples_per_cluster": 1.5}, TypeError, ("samples_per_cluster", "integer", "1.5")),
        ({"num_batches": 0}, ValueError, ("num_batches", "at least 1")),
        ({"labels": LABELS.float()}, TypeError, ("labels", "integers", "float32")),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict[str, Any], error: type[Exception], parts: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        MPerClusterBatchSampler(
            **{"labels": LABELS, "clusters_per_batch": 2, "samples_per_cluster": 2, **arguments}
        )
    assert_message(caught.value, *parts)
    order = MPerClusterBatchSampler(LABELS, 2, 2)
    with pytest.raises(ValueError, match="start must be at least 0"):
        order.batches(-1, 2)
