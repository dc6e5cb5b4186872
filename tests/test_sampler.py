"""InverseClusterSizeSampler: what is drawn, how often, and what is refused."""

from __future__ import annotations

import doctest
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from support import assert_message, generator, seeds
from torch.utils.data import DataLoader, DistributedSampler

from clustops import metrics, sampler, sampler_batches, sampler_weights
from clustops.kmeans import kmeans
from clustops.sampler import InverseClusterSizeSampler

SIZES = [1, 2, 5, 20, 90, 300, 800]


def long_tail(seed: int = 0) -> torch.Tensor:
    labels = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    return labels[torch.randperm(labels.numel(), generator=generator(seed))]


label_lists = st.lists(st.integers(-1, 7), min_size=1, max_size=60).filter(lambda labels: max(labels) >= 0)


def histogram(labels: torch.Tensor, indices: Any) -> list[int]:
    return torch.bincount(labels[torch.as_tensor(list(indices))], minlength=int(labels.max()) + 1).tolist()


class Labels(torch.utils.data.Dataset[int]):
    """A data set whose item is the label: what training sees."""

    def __init__(self, labels: torch.Tensor) -> None:
        self.labels = labels

    def __getitem__(self, index: int) -> int:
        return int(self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("replacement", ["cover", "deepcluster", "always"])
def test_the_label_histogram_through_a_loader_is_flat(workers: int, replacement: str) -> None:
    labels = long_tail()
    order = InverseClusterSizeSampler(labels, 3500, replacement=replacement)
    loader = DataLoader(Labels(labels), batch_size=128, sampler=order, num_workers=workers)
    seen = torch.bincount(torch.cat(list(loader)), minlength=len(SIZES))
    assert chisquare(seen.tolist()).pvalue > 0.999  # quotas are exact, flatter than chance
    assert seen.tolist() == [500] * len(SIZES)


def test_drawing_positions_of_a_list_sorted_by_cluster_is_caught() -> None:
    # The published loader re-orders the images by cluster, yet its sampler yields data set indices.
    labels = long_tail()
    re_ordered = labels.sort().values
    indices = InverseClusterSizeSampler(labels, 3500).indices(0, 3500)
    seen = histogram(re_ordered, indices)
    assert chisquare(seen).pvalue < 1e-6
    assert np.corrcoef(seen, SIZES)[0, 1] > 0.9


@given(labels=label_lists, total=st.integers(1, 200), seed=seeds)
def test_quotas_are_even_and_sum_to_num_samples(labels: list[int], total: int, seed: int) -> None:
    tensor = torch.tensor(labels)
    order = InverseClusterSizeSampler(tensor, total, seed=seed)
    filled = order.offsets.diff() > 0
    drawn = torch.tensor(histogram(tensor, order))
    assert drawn.tolist() == order.quotas().tolist()
    assert (int(drawn.sum()), len(order)) == (total, total)
    share = total / int(filled.sum())
    assert set(drawn[filled].tolist()) <= {int(share), -int(-share // 1)}
    assert int(drawn[~filled].sum()) == 0


@given(labels=label_lists, total=st.integers(1, 200), seed=seeds)
def test_cover_draws_each_member_floor_or_one_more(labels: list[int], total: int, seed: int) -> None:
    order = InverseClusterSizeSampler(labels, total, seed=seed)
    drawn = Counter(order)
    for c, q in enumerate(order.quotas().tolist()):
        members = [i for i, label in enumerate(labels) if label == c]
        if members:
            assert {drawn[i] for i in members} <= {q // len(members), -(-q // len(members))}


def test_deepcluster_draws_without_replacement_only_above_the_quota() -> None:
    labels = torch.tensor([0] * 30 + [1] * 20 + [2] * 5)
    order = InverseClusterSizeSampler(
        labels, 60, replacement="deepcluster"
    )  # 20 each: 30 > 20, 20 = 20, 5 < 20
    repeats = {c: [] for c in range(3)}
    for epoch in range(20):
        order.set_epoch(epoch)
        for c in range(3):
            drawn = [i for i in order if labels[i] == c]
            repeats[c].append(len(drawn) - len(set(drawn)))
    assert max(repeats[0]) == 0
    assert min(repeats[1]) > 0
    spread = InverseClusterSizeSampler(labels, 60).indices(0, 60)
    assert max(Counter(i for i in spread.tolist() if i >= 50).values()) == 4  # cover: 20 draws of 5 members


@pytest.mark.parametrize("replacement", ["cover", "deepcluster", "always"])
def test_members_of_a_cluster_are_drawn_uniformly(replacement: str) -> None:
    labels = torch.tensor([0] * 37 + [1] * 3 + [2] * 11)
    order = InverseClusterSizeSampler(labels, 30, replacement=replacement)
    drawn: Counter[int] = Counter()
    for epoch in range(300):
        order.set_epoch(epoch)
        drawn.update(order.indices(0, 30).tolist())
    for c in range(3):
        counts = [drawn[i] for i in (labels == c).nonzero().flatten().tolist()]
        assert chisquare(counts).pvalue > 1e-4


def test_independent_draws_repeat_as_often_as_chance() -> None:
    order = InverseClusterSizeSampler(torch.zeros(1000, dtype=torch.int64), 1000, replacement="always")
    distinct = order.indices(0, 1000).unique().numel()
    assert abs(distinct - 632) < 60  # 1000 (1 - 1/e), standard deviation 10


@pytest.mark.parametrize(("power", "expected"), [(1.0, [1, 1, 1]), (0.5, [1, 2, 5]), (0.0, [1, 4, 25])])
def test_power_sets_the_share_of_a_cluster(power: float, expected: list[int]) -> None:
    labels = torch.tensor([0] * 1 + [1] * 4 + [3] * 25)
    order = InverseClusterSizeSampler(labels, 10 * sum(expected), power=power)
    assert order.quotas().tolist() == [10 * expected[0], 10 * expected[1], 0, 10 * expected[2]]


def test_power_zero_covers_each_sample_once() -> None:
    assert sorted(InverseClusterSizeSampler(long_tail(), power=0.0)) == list(range(sum(SIZES)))


def test_rounded_quotas_have_the_exact_share_as_mean() -> None:
    order = InverseClusterSizeSampler(torch.arange(7), 3, power=0.3)
    total = torch.zeros(7)
    for epoch in range(1000):
        order.set_epoch(epoch)
        total += order.quotas()
    torch.testing.assert_close(order.expected_counts(), torch.full((7,), 3 / 7, dtype=torch.float64))
    assert chisquare(total.tolist()).pvalue > 1e-4


def test_given_weights_replace_the_power() -> None:
    order = InverseClusterSizeSampler([0, 0, 1, 2], 60, cluster_weights=[3, 1, 0, 5])
    assert order.quotas().tolist() == [45, 15, 0, 0]  # cluster 3 is empty, cluster 2 is given nothing
    torch.testing.assert_close(order.expected_counts(), torch.tensor([45.0, 15, 0, 0], dtype=torch.float64))


def test_negative_labels_and_empty_clusters_are_never_drawn() -> None:
    labels = torch.tensor([-1, 4, -7, 0, 0, -1, 4, 4])
    order = InverseClusterSizeSampler(labels)
    assert len(order) == 5
    assert set(InverseClusterSizeSampler(labels, 100)) == {1, 3, 4, 6, 7}


@given(labels=label_lists, power=st.sampled_from([0.0, 0.5, 1.0, 1.5]))
def test_importance_weights_restore_the_mean_over_samples(labels: list[int], power: float) -> None:
    tensor = torch.tensor(labels)
    order = InverseClusterSizeSampler(tensor, 10_000_000, power=power)
    value = torch.arange(8, dtype=torch.float64).square()[: order.quotas().numel()]
    drawn = order.expected_counts() / order.expected_counts().sum()
    wanted = value[tensor[tensor >= 0]].mean()
    torch.testing.assert_close((drawn * order.importance_weights() * value).sum(), wanted)


def test_set_labels_gives_the_order_of_the_new_labels() -> None:
    first, second = long_tail(0), long_tail(1) % 3
    order = InverseClusterSizeSampler(first, seed=4)
    iterator = iter(order)
    next(iterator)
    order.set_labels(second)
    assert list(order) == list(InverseClusterSizeSampler(second, seed=4))
    with pytest.raises(RuntimeError, match="labels changed during iteration"):
        next(iterator)


def test_any_slice_equals_the_whole_order() -> None:
    order = InverseClusterSizeSampler(long_tail(), seed=2)
    whole = order.indices(0, len(order))
    assert (whole.dtype, whole.tolist()) == (torch.int64, list(order))
    for start, stop in ((0, 0), (0, 1), (17, 400), (len(order) - 1, len(order))):
        assert torch.equal(order.indices(start, stop), whole[start:stop])


def test_the_order_touches_no_global_random_state_and_ignores_threads() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    threads, whole = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            whole.append(InverseClusterSizeSampler(torch.arange(200_000) % 1009).indices(0, 200_000))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*whole)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64])
def test_memory_mapped_read_only_labels_are_accepted(tmp_path: Path, dtype: type) -> None:
    labels = long_tail().numpy().astype(dtype)
    np.save(tmp_path / "labels.npy", labels)
    mapped = np.load(tmp_path / "labels.npy", mmap_mode="r")
    order = InverseClusterSizeSampler(mapped)
    assert list(order) == list(InverseClusterSizeSampler(torch.from_numpy(labels.astype(np.int64))))
    assert order.members.dtype == torch.int32


def test_inputs_are_not_written_and_not_kept() -> None:
    labels = long_tail()
    copy = labels.clone()
    order = InverseClusterSizeSampler(labels)
    before = list(order)
    assert torch.equal(labels, copy)
    labels.zero_()
    assert list(order) == before


def test_trainers_see_a_distributed_sampler() -> None:
    order = InverseClusterSizeSampler(long_tail(), num_replicas=2, rank=1)
    assert isinstance(order, DistributedSampler)
    assert (order.num_replicas, order.rank, order.epoch, order.drop_last) == (2, 1, 0, False)
    assert (order.num_samples, order.total_size) == (609, 1218)


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"labels": torch.rand(3)}, TypeError, ("labels", "integers", "float32", "to int64")),
        ({"labels": torch.tensor([True])}, TypeError, ("labels", "integers", "bool")),
        (
            {"labels": torch.zeros(2, 2, dtype=torch.int64)},
            ValueError,
            ("labels", "[N]", "[2, 2]", "one label"),
        ),
        ({"labels": torch.eye(3)}, ValueError, ("labels", "[N]", "[3, 3]", "labels.argmax(1)")),
        ({"labels": kmeans(torch.eye(3), 2)}, TypeError, ("labels", "integers", "pass result.labels")),
        (
            {"labels": [0, 10**8]},
            ValueError,
            ("labels", f"below {2**24}", str(10**8), "unique(torch.as_tensor(labels), "),
        ),
        ({"labels": [-3, 10**8]}, ValueError, ("labels", ".clip(-1), ")),
        ({"labels": torch.tensor([-1, -1])}, ValueError, ("labels", "0 or more", "2 without")),
        ({"labels": torch.zeros(0, dtype=torch.int64)}, ValueError, ("labels", "0 without")),
        ({"labels": [2**31]}, ValueError, ("labels", str(2**31), "unique")),
        ({"labels": "abc"}, TypeError, ("labels", "str")),
        ({"num_samples": 0}, ValueError, ("num_samples", "at least 1", "0")),
        ({"num_samples": 2.5}, TypeError, ("num_samples", "integer", "2.5")),
        ({"num_samples": 2**60}, ValueError, ("num_samples", "2^60")),
        ({"power": float("nan")}, ValueError, ("power", "a finite number", "nan")),
        ({"power": "1"}, TypeError, ("power must be a finite number", "got str")),
        ({"replacement": "never"}, ValueError, ("replacement", "'cover'", "'never'")),
        ({"seed": 1.5}, TypeError, ("seed", "integer", "1.5")),
        ({"num_replicas": 2}, ValueError, ("rank", "num_replicas=2")),
        ({"rank": 0}, ValueError, ("rank", "rank=0")),
        ({"num_replicas": 2, "rank": 2}, ValueError, ("rank", "below num_replicas = 2", "got 2")),
        ({"num_replicas": 0, "rank": 0}, ValueError, ("num_replicas", "at least 1")),
        ({"cluster_weights": 1.0}, TypeError, ("cluster_weights", "float")),
        ({"cluster_weights": [1.0]}, ValueError, ("cluster_weights", "largest label, 1", "[1]")),
        ({"cluster_weights": [1.0, -1.0]}, ValueError, ("cluster_weights", ">= 0", "-1.0")),
        ({"cluster_weights": [1.0, float("inf")]}, ValueError, ("cluster_weights", "finite")),
        ({"cluster_weights": [0.0, 0.0, 5.0]}, ValueError, ("cluster_weights", "above 0", "only zeros")),
        (
            {"cluster_weights": [1.0, 1.0], "power": 0.5},
            ValueError,
            ("power", "1 where cluster_weights", "0.5"),
        ),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict[str, Any], error: type[Exception], parts: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        InverseClusterSizeSampler(**{"labels": [0, 1, 1], **arguments})
    assert_message(caught.value, *parts)


def test_labels_far_apart_are_cured_by_renumbering() -> None:
    labels = torch.tensor([-7, 10**8, 5, 10**8])
    renumbered = torch.unique(labels.clip(-1), return_inverse=True)[1] - 1
    assert renumbered.tolist() == [-1, 1, 0, 1]
    assert InverseClusterSizeSampler(renumbered).members.tolist() == [2, 1, 3]


def test_one_epoch_has_one_order_and_another_another() -> None:
    order = InverseClusterSizeSampler(torch.arange(40) % 4)
    first = list(order)
    assert list(order) == first
    order.set_epoch(1)
    assert list(order) != first


def test_bad_positions_and_epochs_are_named() -> None:
    order = InverseClusterSizeSampler([0, 1, 1])
    for call, parts in (
        (lambda: order.indices(0, 4), ("stop", "3 draws", "4")),
        (lambda: order.indices(2, 1), ("stop", "at least 2", "1")),
        (lambda: order.indices(-1, 1), ("start", "at least 0", "-1")),
        (lambda: order.set_epoch(-1), ("epoch", "at least 0", "-1")),
        (lambda: order.set_epoch(2**48), ("epoch", "2^48")),
        (lambda: order.set_labels([-1]), ("labels", "0 or more")),
    ):
        with pytest.raises(ValueError, match="must be") as caught:
            call()
        assert_message(caught.value, *parts)


@pytest.mark.parametrize("module", [sampler, sampler_batches, sampler_weights, metrics])
def test_examples_in_docstrings_run(module: Any) -> None:
    failed, attempted = doctest.testmod(module, extraglobs={"torch": torch})
    assert (failed, attempted > 0) == (0, True)
