"""The order itself: the written rule, its bits, permutations, quotas, large offsets."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from support import seeds

from clustops.reference import sampler as reference
from clustops.reference.philox import philox
from clustops.sampler import InverseClusterSizeSampler, MPerClusterBatchSampler

WRAP = 2**64 - 1
ORDER, DRAWS, BATCH_CLUSTERS, BATCH_MEMBERS = 0x5A01, 0x5A02, 0x5A03, 0x5A04
M, M_PRIME = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53


class ByHand:
    """The rule of ``clustops/reference/sampler.py`` once more, in Python integers, one position at a time."""

    def __init__(self, seed: int, epoch: int, tag: int) -> None:
        w = torch.stack(philox(seed, (tag << 48) + epoch, torch.arange(7)), dim=1).tolist()
        self.u = [word for a, b, c, d in w for word in (a << 32 | b, c << 32 | d)]

    def word(self, x: int, t: int, r: int) -> int:
        z = (x + t) * (self.u[5 + r] | 1) & WRAP
        return (z ^ z >> 32) * M & WRAP

    def tweak(self, c: int, p: int) -> int:
        z = c * (self.u[2] | 1) + p * (self.u[3] | 1) + self.u[4] & WRAP
        z = (z ^ z >> 32) * M & WRAP
        z = (z ^ z >> 29) * M_PRIME & WRAP
        return z ^ z >> 32

    def permute(self, x: int, n: int, t: int) -> int:
        def signed(word: int) -> int:
            return word - 2**64 if word >> 63 else word

        def shift(x: int, w: int, n: int) -> int:
            return (x + ((w >> 32) * n >> 32)) % n

        if n <= 16:
            return sum(signed(self.word(y, t, 0)) < signed(self.word(x, t, 0)) for y in range(n))
        a = math.ceil(math.sqrt(n))
        b = -(-n // a)
        while True:
            left, right = divmod(x, b)
            for i in range(0, 8, 2):
                left = shift(left, self.word(right, t, i), a)
                right = shift(right, self.word(left, t, i + 1), b)
            x = left * b + right
            if x < n:
                return shift(x, t, n)


def order_by_hand(
    labels: list[int], total: int, replacement: str, seed: int, epoch: int, weights: list[int]
) -> list[int]:
    hand = ByHand(seed, epoch, ORDER)
    members = [[i for i, label in enumerate(labels) if label == c] for c in range(len(weights))]
    whole = sum(weights)
    bounds = [(total * sum(weights[:c]) + hand.u[0] % whole) // whole for c in range(len(weights) + 1)]
    order = []
    for position in range(total):
        slot = hand.permute(position, total, hand.u[1])
        c = max(c for c in range(len(weights)) if bounds[c] <= slot)
        j, n, q = slot - bounds[c], len(members[c]), bounds[c + 1] - bounds[c]
        if replacement == "cover" or (replacement == "deepcluster" and n > q):
            order.append(members[c][hand.permute(j % n, n, hand.tweak(c, j // n))])
        else:
            w0, w1, _, _ = (int(w) for w in philox(seed, (DRAWS << 48) + epoch, torch.tensor(slot)))
            order.append(members[c][w0 * n + (w1 * n >> 32) >> 32])
    return order


def permuted(n: int, seed: int, epoch: int = 0) -> list[int]:
    return reference.slots_of(torch.arange(n), n, seed, epoch).tolist()


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("replacement", ["cover", "deepcluster", "always"])
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), total=st.integers(1, 90), seed=seeds)
def test_the_order_is_the_written_rule(replacement: str, sizes: list[int], total: int, seed: int) -> None:
    labels = [c for c, n in enumerate(sizes) for _ in range(n)][::-1] or [0]
    weights = [int(c in labels) for c in range(max(labels) + 1)]
    sampler = InverseClusterSizeSampler(torch.tensor(labels), total, replacement=replacement, seed=seed)
    sampler.set_epoch(3)
    assert list(sampler) == order_by_hand(labels, total, replacement, seed, 3, weights)


@pytest.mark.usefixtures("cpu_path")
def test_batches_are_the_written_rule() -> None:
    labels = [i % 7 if i % 7 < 5 else 2 for i in range(60)]
    sampler = MPerClusterBatchSampler(torch.tensor(labels), 2, 10, seed=9)
    clusters, members = ByHand(9, 0, BATCH_CLUSTERS), ByHand(9, 0, BATCH_MEMBERS)
    for g in range(7):
        p, expected = g // 2, []
        for i in (g % 2 * 2, g % 2 * 2 + 1):
            c = clusters.permute(i, 5, clusters.tweak(p, 0))
            table = [s for s, label in enumerate(labels) if label == c]
            n = len(table)
            expected += [
                table[members.permute(j % n, n, members.tweak(c, p * 10 + j // n))] for j in range(10)
            ]
        assert sampler.batches(g, g + 1).tolist() == [expected]


GOLDEN = {
    "cover": [425, 167, 820, 160, 573, 28, 980, 152, 662, 44, 41, 769],
    "deepcluster": [55, 685, 142, 765, 685, 842, 758, 917, 658, 628, 843, 674],
    "always": [55, 685, 142, 765, 685, 842, 758, 917, 658, 628, 843, 674],
}


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("replacement", ["cover", "deepcluster", "always"])
def test_version_1_of_the_order_is_frozen(replacement: str) -> None:
    labels = torch.arange(1000) ** 2 % 37 % 11
    sampler = InverseClusterSizeSampler(labels, 5000, power=0.7, replacement=replacement, seed=2024)
    sampler.set_epoch(5)
    got = [*sampler.indices(0, 8).tolist(), *sampler.indices(4996, 5000).tolist()]
    assert (reference.VERSION, got) == (1, GOLDEN[replacement])


@pytest.mark.usefixtures("cpu_path")
def test_version_1_of_the_batches_is_frozen() -> None:
    sampler = MPerClusterBatchSampler(torch.arange(1000) ** 2 % 37 % 11, 2, 3, seed=2024)
    assert (reference.VERSION, sampler.batches(100, 102).tolist()) == (
        1,
        [[526, 4, 637, 283, 801, 642], [180, 126, 217, 229, 710, 289]],
    )


def test_each_small_size_is_permuted_exhaustively() -> None:
    for n in range(1, 300):
        assert sorted(permuted(n, seed=n)) == list(range(n)), n


@given(n=st.integers(300, 20000), seed=seeds, epoch=st.integers(0, 1000))
def test_larger_sizes_are_permuted(n: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(n, seed, epoch)) == list(range(n))


def images(x: list[int], n: int, trials: int) -> torch.Tensor:
    """The images of ``x`` under ``trials`` permutations of [0, n), one for each row."""
    key = reference.keys(7, 0, ORDER)
    t = reference.tweak(torch.arange(trials), torch.zeros(trials, dtype=torch.int64), key).unsqueeze(1)
    shape = (trials, len(x))
    return reference.permute(
        torch.tensor(x).expand(shape), torch.tensor(n).expand(shape), t.expand(shape), key
    )


def test_all_permutations_of_five_are_equally_likely() -> None:
    seen = Counter(map(tuple, images([0, 1, 2, 3, 4], 5, 60_000).tolist()))
    assert len(seen) == 120
    assert chisquare(list(seen.values())).pvalue > 1e-4


@pytest.mark.parametrize("n", [3, 5, 16, 17, 23, 40])
def test_images_and_pairs_of_images_are_uniform(n: int) -> None:
    image = images([0, 1, n // 2], n, 100_000)
    for column in image.T:
        assert chisquare(torch.bincount(column, minlength=n).tolist()).pvalue > 1e-4
    pairs = torch.bincount(image[:, 0] * n + image[:, 1], minlength=n * n).view(n, n)
    off_diagonal = pairs[~torch.eye(n, dtype=torch.bool)]
    assert pairs.diagonal().sum() == 0
    assert chisquare(off_diagonal.tolist()).pvalue > 1e-4


def test_each_pass_over_a_cluster_has_its_own_order() -> None:
    bounds, offsets = torch.tensor([0, 3000]), torch.tensor([0, 1000])
    first, second, third = reference.table_positions(torch.arange(3000), offsets, bounds, 0, 0, "cover").view(
        3, 1000
    )
    for one, other in ((first, second), (first, third), (second, third)):
        assert torch.equal(one.sort().values, other.sort().values)
        assert int((one == other).sum()) < 12


def test_epochs_and_seeds_give_unrelated_orders() -> None:
    n = 1000
    base = permuted(n, 0, 0)
    for other in (permuted(n, 0, 1), permuted(n, 1, 0), permuted(n, 2**32, 0), permuted(n, -1, 0)):
        equal = sum(a == b for a, b in zip(base, other, strict=True))
        assert equal < 12  # one is expected; 12 has probability 1e-9


def test_neighbouring_positions_are_not_neighbours_in_the_data() -> None:
    order = torch.tensor(permuted(1 << 16, 0))
    steps = order.diff().abs()
    assert int((steps == 1).sum()) < 12
    assert abs(float(torch.corrcoef(torch.stack([order[1:].double(), order[:-1].double()]))[0, 1])) < 0.02


@given(
    weights=st.lists(st.integers(0, 2**31), min_size=1, max_size=40).filter(any),
    total=st.integers(1, 2**60 - 1),
    offset=st.integers(0, 2**64 - 1),
)
def test_quotas_are_exact_integers(weights: list[int], total: int, offset: int) -> None:
    cumulative = torch.tensor([0, *weights]).cumsum(0)
    bounds = reference.quota_bounds(cumulative, total, offset).tolist()
    whole = sum(weights)
    assert bounds == [(total * int(c) + offset % whole) // whole for c in cumulative]
    assert (bounds[0], bounds[-1]) == (0, total)
    for weight, q in zip(weights, torch.tensor(bounds).diff().tolist(), strict=True):
        assert total * weight // whole <= q <= -(-total * weight // whole)


def test_member_positions_reach_beyond_two_to_the_31() -> None:
    sizes = torch.tensor([2**31 - 1, 5, 2**31 - 1, 2**24 + 1])
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    for replacement in ("cover", "deepcluster", "always"):
        slots = torch.arange(2**34 - 1000, 2**34)
        bounds = torch.tensor([0, 10, 20, 2**34 - 500, 2**34])
        positions = reference.table_positions(slots, offsets, bounds, 1, 0, replacement)
        third, last = positions[:500], positions[500:]
        assert bool(((third >= offsets[2]) & (third < offsets[3])).all())
        assert bool(((last >= offsets[3]) & (last < offsets[4])).all())
        assert int(third.max()) > 2**32 - 2**28
        inside = last - offsets[3]
        assert {0, 1} == set((inside % 2).tolist()), "odd members are drawn: nothing was rounded to float32"


def test_one_cluster_of_two_to_the_24_plus_one() -> None:
    n = 2**24 + 1
    offsets = bounds = torch.tensor([0, n])
    slots = torch.cat([torch.arange(200000), torch.arange(n - 200000, n)])
    positions = reference.table_positions(slots, offsets, bounds, 0, 0, "cover")
    assert positions.unique().numel() == slots.numel()
    assert (int(positions.min()) >= 0, int(positions.max()) < n) == (True, True)
    assert chisquare((positions * 64 // n).bincount(minlength=64).tolist()).pvalue > 1e-4


@given(n=st.integers(2**31 - 2, 2**60 - 1), seed=seeds)
def test_slots_beyond_two_to_the_31_are_the_written_rule(n: int, seed: int) -> None:
    hand, positions = ByHand(seed, 0, ORDER), [0, 1, n // 2, n - 2, n - 1]
    expected = [hand.permute(x, n, hand.u[1]) for x in positions]
    assert reference.slots_of(torch.tensor(positions), n, seed, 0).tolist() == expected


@pytest.mark.usefixtures("cpu_path")
def test_two_to_the_40_draws_need_no_list() -> None:
    sampler = InverseClusterSizeSampler(torch.tensor([0, 0, 1]), 2**40)
    tail = sampler.indices(2**40 - 1000, 2**40)
    assert sampler.quotas().tolist() == [2**39, 2**39]
    assert abs(int((tail == 2).sum()) - 500) < 120
    assert torch.equal(tail[990:], sampler.indices(2**40 - 10, 2**40))


def test_ops_pass_opcheck() -> None:
    labels = torch.tensor([0, 2, 2, -1, 1])
    members, offsets = torch.ops.clustops.cluster_members(labels, 3)
    positions, bounds = torch.arange(6), torch.tensor([0, 2, 4, 6])
    torch.library.opcheck(torch.ops.clustops.cluster_members, (labels, 3))
    torch.library.opcheck(
        torch.ops.clustops.sampler_order, (positions, members, offsets, bounds, -5, 1, "deepcluster")
    )
    torch.library.opcheck(
        torch.ops.clustops.sampler_batches, (positions, members, offsets, torch.arange(3), 2, 2, 7, 0)
    )
