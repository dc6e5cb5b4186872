"""The order of the cluster-balanced samplers: a pure function of (seed, epoch, position), version 1.

All integers are 64 bit and wrap; ``>>`` on words is the logical shift; Philox is ``reference.philox``.

Keys of (seed, epoch, tag): ``w[i] = philox(seed, stream=(tag << 48) + epoch, position=i)``, its first two
words as one number ``w0 * 2^32 + w1`` and its last two as another: ``u[2i], u[2i+1]``. Then

    offset = u[0]    slot_tweak = u[1]    tweak_keys = u[2], u[3], u[4]    multiplier[r] = u[5 + r] | 1

    word(x, t, r) = (z ^ (z >> 32)) * M,   z = (x + t) * multiplier[r]
    tweak(c, p)   = mix(c * (u[2] | 1) + p * (u[3] | 1) + u[4])
    mix(z)        = z ^= z >> 32, z *= M, z ^= z >> 29, z *= M', z ^= z >> 32

``permute(x, n, t)`` is a bijection of [0, n):
    n <= 16: how many of word(0, t, 0) .. word(n - 1, t, 0) are below word(x, t, 0), as signed numbers;
    n > 16:  a Feistel network on [0, a) x [0, b), a = ceil(sqrt(n)) in float64, b = ceil(n / a), from
             (l, r) = (x div b, x mod b): in round i = 0, 2, .. 6, l = shift(l, word(r, t, i), a); in round
             i = 1, 3, .. 7, r = shift(r, word(l, t, i), b); y = l * b + r. While y >= n, again from y (cycle
             walking). The image is shift(y, t, n): each image is equally likely.
    shift(x, w, n) = (x + ((w >> 32) * n >> 32)) mod n

``order[position]``, keys of tag ``ORDER``: slot = permute(position mod M, M, slot_tweak); its cluster c is
the one with bounds[c] <= slot < bounds[c + 1]; j = slot - bounds[c]; n is the cluster's size, q its
quota. Then
    without replacement: members[offsets[c] + permute(j mod n, n, tweak(c, j div n))];
    independent draws:   members[offsets[c] + (w0 * n + (w1 * n >> 32) >> 32)],
                         w = philox(seed, stream=(DRAWS << 48) + epoch, position=slot).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .philox import philox

VERSION = 1
ORDER, DRAWS, BATCH_CLUSTERS, BATCH_MEMBERS = 0x5A01, 0x5A02, 0x5A03, 0x5A04
ROUNDS = 8
RANKED = 16  # up to here a Feistel network has too few cells to look like a random permutation

_MASK = 0xFFFFFFFF
_CHUNK = 1 << 15  # positions at a time: temporaries stay in the cache
_LABELS_CHUNK = 1 << 24
_FINGERPRINT_CHUNK = 1 << 18


def _signed(word: int) -> int:
    return (word & (2**64 - 1)) - ((word & 2**63) << 1)


_M = _signed(0xFF51AFD7ED558CCD)
_M_PRIME = _signed(0xC4CEB9FE1A85EC53)
_OF_NUMBER, _OF_PLACE = _signed(0x9E3779B97F4A7C15), _signed(0xD1342543DE82EF95)


class Keys(NamedTuple):
    """What (seed, epoch, tag) fixes: signed 64-bit words."""

    offset: int
    slot_tweak: int
    tweak: tuple[int, int, int]
    multipliers: tuple[int, ...]


@functools.lru_cache(maxsize=64)
def keys(seed: int, epoch: int, tag: int) -> Keys:
    """The keys of one epoch."""
    words = torch.stack(philox(seed, (tag << 48) + epoch, torch.arange(3 + ROUNDS // 2)), dim=1)
    u = (words[:, 0::2] << 32 | words[:, 1::2]).flatten().tolist()
    multipliers = tuple(word | 1 for word in u[5 : 5 + ROUNDS])
    return Keys(u[0], u[1], (u[2] | 1, u[3] | 1, u[4]), multipliers)


def _high(z: Tensor) -> Tensor:
    return (z >> 32).bitwise_and_(_MASK)


def _word(x: Tensor, t: Tensor, multiplier: int) -> Tensor:
    z = (x + t).mul_(multiplier)
    return z.bitwise_xor_(_high(z)).mul_(_M)


def _shift(x: Tensor, word: Tensor, n: Tensor) -> Tensor:
    """(x + (word >> 32) * n >> 32) mod n, for 0 <= x < n <= 2^31; ``word`` is overwritten."""
    word = word.bitwise_right_shift_(32).bitwise_and_(_MASK).mul_(n).bitwise_right_shift_(32).add_(x).sub_(n)
    return word.add_((word >> 63).bitwise_and_(n))


def tweak(cluster: Tensor, passes: Tensor, key: Keys) -> Tensor:
    """One 64-bit word for each (cluster, pass)."""
    return _mix(cluster * key.tweak[0] + passes * key.tweak[1] + key.tweak[2])


def _mix(z: Tensor) -> Tensor:
    z = z.bitwise_xor_(_high(z)).mul_(_M)
    z = z.bitwise_xor_((z >> 29) & (2**35 - 1)).mul_(_M_PRIME)
    return z.bitwise_xor_(_high(z))


def permute(x: Tensor, n: Tensor, t: Tensor, key: Keys) -> Tensor:
    """Image of ``x`` under the permutation of [0, n) that the word ``t`` names.

    Args:
        x: int64, any shape, 0 <= x < n. n, t: of the same shape, or one number.
    """
    ranked = (n <= RANKED).expand_as(x)
    if not bool(ranked.any()):
        return _feistel(x, n, t, key)
    if bool(ranked.all()):
        return _rank(x, n, t, key)
    n, t, large = n.expand_as(x), t.expand_as(x), ~ranked
    image = torch.empty_like(x)
    image[ranked] = _rank(x[ranked], n[ranked], t[ranked], key)
    image[large] = _feistel(x[large], n[large], t[large], key)
    return image


def _rank(x: Tensor, n: Tensor, t: Tensor, key: Keys) -> Tensor:
    own = _word(x, t, key.multipliers[0])
    rank = torch.zeros_like(x)
    for other in range(RANKED):
        word = _word(torch.full_like(x, other), t, key.multipliers[0])
        rank += (word < own) & (other < n)
    return rank


def _feistel(x: Tensor, n: Tensor, t: Tensor, key: Keys) -> Tensor:
    a = n.double().sqrt_().ceil_().long()
    b = (n + a - 1) // a
    image = _rounds(x, a, b, t, key)
    outside = (image >= n).nonzero(as_tuple=True)
    while outside[0].numel():
        sub = [v if v.dim() == 0 else v[outside] for v in (a, b, t, n)]
        again = _rounds(image[outside], sub[0], sub[1], sub[2], key)
        image[outside] = again
        still = (again >= sub[3]).nonzero(as_tuple=True)
        outside = tuple(index[still] for index in outside)
    # n may pass 2^31 here, so the product comes in two parts.
    word = _high(t)
    image = image + (word * (n >> 32) + _high(word * (n & _MASK))) - n
    return image.add_((image >> 63).bitwise_and_(n))


def _rounds(x: Tensor, a: Tensor, b: Tensor, t: Tensor, key: Keys) -> Tensor:
    left = x // b
    right = x - left * b
    for i in range(0, ROUNDS, 2):
        left = _shift(left, _word(right, t, key.multipliers[i]), a)
        right = _shift(right, _word(left, t, key.multipliers[i + 1]), b)
    return left * b + right


def quota_bounds(cumulative: Tensor, total: int, offset: int) -> Tensor:
    """``floor((total * cumulative + offset) / cumulative[-1])``, exactly: where each cluster's slots begin.

    The difference of neighbours is the cluster's quota: ``total`` times its share, rounded up or down. Over
    uniform offsets in [0, cumulative[-1]) its mean is exactly that share.

    Args:
        cumulative: int64 ``[K + 1]``, ascending from 0 to less than 2^42. total: in [1, 2^60).
    """
    whole = int(cumulative[-1])
    quotient, rest = torch.zeros_like(cumulative), torch.zeros_like(cumulative)
    # Long division in digits of 20 bits: the product would need 102 bits.
    for shift in (40, 20, 0):
        rest = (rest << 20) + cumulative * (total >> shift & 0xFFFFF)
        quotient = (quotient << 20) + rest // whole
        rest = rest % whole
    return quotient + (rest + offset % whole) // whole


def table_positions(
    slots: Tensor, offsets: Tensor, bounds: Tensor, seed: int, epoch: int, replacement: str
) -> Tensor:
    """Where in the member table the draw of each slot lies."""
    key = keys(seed, epoch, ORDER)
    cluster = torch.searchsorted(bounds, slots, right=True).sub_(1)
    first, begin = offsets[cluster], bounds[cluster]
    n = offsets[cluster + 1] - first
    j = slots - begin
    if replacement == "cover":
        passes = j // n
        return first + permute(j - passes * n, n, tweak(cluster, passes, key), key)
    if replacement == "always":
        return first + _draw(slots, n, seed, epoch)
    exceeds = n > bounds[cluster + 1] - begin
    alone = ~exceeds
    index = torch.empty_like(slots)
    t = tweak(cluster[exceeds], torch.zeros_like(cluster[exceeds]), key)
    index[exceeds] = permute(j[exceeds], n[exceeds], t, key)
    index[alone] = _draw(slots[alone], n[alone], seed, epoch)
    return first + index


def _draw(slots: Tensor, n: Tensor, seed: int, epoch: int) -> Tensor:
    high, low, _, _ = philox(seed, (DRAWS << 48) + epoch, slots)
    return (high * n + (low * n >> 32)) >> 32


def slots_of(positions: Tensor, total: int, seed: int, epoch: int) -> Tensor:
    """The slot in [0, total) at each position of the epoch: a permutation, repeated beyond ``total``."""
    key = keys(seed, epoch, ORDER)
    positions = positions % total
    size, t = (
        torch.tensor(total, device=positions.device),
        torch.tensor(key.slot_tweak, device=positions.device),
    )
    return permute(positions, size, t, key)


def sampler_order(
    positions: Tensor,
    members: Tensor,
    offsets: Tensor,
    bounds: Tensor,
    seed: int,
    epoch: int,
    replacement: str,
) -> Tensor:
    """Data set index at each position of the epoch.

    Args:
        positions: int64 ``[P]``, >= 0; taken modulo ``bounds[-1]``, the number of draws.
        members: ``[N]`` sample indices cluster by cluster. offsets: int64 ``[K + 1]``, where each cluster
            begins.
        bounds: int64 ``[K + 1]``, where each cluster's slots begin (``quota_bounds``).
        replacement: "cover", "deepcluster" or "always".

    Returns:
        int64 ``[P]``.
    """
    result = torch.empty_like(positions, memory_format=torch.contiguous_format)
    total = int(bounds[-1]) if positions.numel() else 0
    for chunk, out in zip(positions.split(_CHUNK), result.split(_CHUNK), strict=True):
        if chunk.numel():
            slots = slots_of(chunk, total, seed, epoch)
            out.copy_(members[table_positions(slots, offsets, bounds, seed, epoch, replacement)])
    return result


def sampler_range(
    start: int,
    step: int,
    count: int,
    members: Tensor,
    offsets: Tensor,
    bounds: Tensor,
    seed: int,
    epoch: int,
    replacement: str,
) -> Tensor:
    """``sampler_order`` of the positions start, start + step, ..: int64 ``[count]``."""
    positions = start + step * torch.arange(count, device=members.device)
    return sampler_order(positions, members, offsets, bounds, seed, epoch, replacement)


def sampler_batches(
    batches: Tensor,
    members: Tensor,
    offsets: Tensor,
    clusters: Tensor,
    clusters_per_batch: int,
    samples_per_cluster: int,
    seed: int,
    epoch: int,
) -> Tensor:
    """Data set indices of each batch: ``clusters_per_batch`` distinct clusters, so many samples of each.

    Pass p over the C clusters holds ``per_pass = C div clusters_per_batch`` batches. Batch g takes clusters
    ``permute(i, C, tweak(p, 0))``, p = g div per_pass, i from (g mod per_pass) * clusters_per_batch on, keys
    of tag ``BATCH_CLUSTERS``; and of cluster c the members ``permute(j mod n, n, tweak(c, p *
    samples_per_cluster + j div n))``, j = 0 .. samples_per_cluster - 1, keys of tag ``BATCH_MEMBERS``.

    Args:
        batches: int64 ``[B]``, >= 0. clusters: int64 ``[C]``, the ids with a member, C >= clusters_per_batch.

    Returns:
        int64 ``[B, clusters_per_batch * samples_per_cluster]``, cluster by cluster.
    """
    total = clusters.numel()
    per_pass = total // clusters_per_batch
    passes = (batches // per_pass).unsqueeze(1)
    places = (batches % per_pass).unsqueeze(1) * clusters_per_batch
    places = places + torch.arange(clusters_per_batch, device=batches.device)
    key = keys(seed, epoch, BATCH_CLUSTERS)
    t = tweak(passes, torch.zeros_like(passes), key).expand_as(places)
    cluster = clusters[permute(places, torch.tensor(total, device=batches.device), t, key)].unsqueeze(2)
    n = offsets[cluster + 1] - offsets[cluster]
    j = torch.arange(samples_per_cluster, device=batches.device).expand(*cluster.shape[:2], -1)
    again = j // n
    key = keys(seed, epoch, BATCH_MEMBERS)
    t = tweak(cluster, passes.unsqueeze(2) * samples_per_cluster + again, key)
    index = offsets[cluster] + permute(j - again * n, n.expand_as(j), t, key)
    return members[index].long().flatten(1)


def fingerprint(numbers: Tensor) -> Tensor:
    """A 64-bit word, int64 ``[]``, that tells ``[N]`` integers from others; not against an adversary.

    The sum over i of ``mix(numbers[i] * A + (i + 1) * B)``, so that it can be taken in any order.
    """
    total = torch.zeros((), dtype=torch.int64, device=numbers.device)
    for i, chunk in enumerate(numbers.split(_FINGERPRINT_CHUNK)):
        first = i * _FINGERPRINT_CHUNK + 1
        place = torch.arange(first, first + chunk.numel(), device=numbers.device)
        total += _mix(chunk.long() * _OF_NUMBER + place * _OF_PLACE).sum()
    return total


def largest_label(labels: Tensor) -> Tensor:
    """The largest of ``[N]`` integers, -1 if there is none above: int64 ``[]``."""
    largest = torch.tensor(-1, device=labels.device)
    for chunk in labels.split(_LABELS_CHUNK):
        if chunk.numel():
            largest = torch.maximum(largest, chunk.long().max())
    return largest


def cluster_members(labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Counting sort: the samples of each cluster in ascending order, and where each cluster begins.

    Args:
        labels: integers ``[N]``, below ``k``; negative ones belong to no cluster.

    Returns:
        members ``[number of labels >= 0]``, int32 where N < 2^31, else int64; offsets int64 ``[k + 1]``.
    """
    chunks = labels.split(_LABELS_CHUNK)
    counts = torch.zeros(k, dtype=torch.int64, device=labels.device)
    for chunk in chunks:
        chunk = chunk.long()
        counts += torch.bincount(chunk[chunk >= 0], minlength=k)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    dtype = torch.int32 if labels.numel() < 2**31 else torch.int64
    members = torch.empty(int(offsets[-1]), dtype=dtype, device=labels.device)
    filled, base = offsets[:-1].clone(), 0
    for chunk in chunks:
        ordered, index = torch.sort(chunk.long(), stable=True)
        negative = int((ordered < 0).sum())
        ordered, index = ordered[negative:], index[negative:]
        counts = torch.bincount(ordered, minlength=k)
        rank = torch.arange(ordered.numel(), device=labels.device) - (counts.cumsum(0) - counts)[ordered]
        members[filled[ordered] + rank] = (index + base).to(dtype)
        filled += counts
        base += chunk.numel()
    return members, offsets
