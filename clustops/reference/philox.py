"""Philox4x32-10: random numbers as a pure function of (seed, stream, position).

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
``csrc/common/philox.h`` is the same function; a test holds the two together.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox(seed: int, stream: int, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words in [0, 2^32) for each position: key = seed (64 bit), counter = (position, stream).

    Args:
        seed: any integer, taken mod 2^64.
        stream: which sequence of draws; taken mod 2^64. One use, one stream: draws never overlap.
        position: int64, any shape, >= 0.

    Returns:
        Four int64 tensors of the shape of ``position``.
    """
    position = position.to(torch.int64)
    low, high = seed & _MASK, (seed >> 32) & _MASK
    c0, c1 = position & _MASK, (position >> 32) & _MASK
    c2 = torch.full_like(c0, stream & _MASK)
    c3 = torch.full_like(c0, (stream >> 32) & _MASK)
    for _ in range(_ROUNDS):
        # The 64-bit products wrap as unsigned ones do; masks undo the sign of the arithmetic shift.
        p0, p1 = c0 * _M0, c2 * _M1
        h0, h1 = (p0 >> 32) & _MASK, (p1 >> 32) & _MASK
        c0, c1, c2, c3 = h1 ^ c1 ^ low, p1 & _MASK, h0 ^ c3 ^ high, p0 & _MASK
        low, high = (low + _W0) & _MASK, (high + _W1) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, stream: int, position: Tensor) -> Tensor:
    """float64 in [0, 1) with 53 random bits for each position.

    >>> uniform(0, 0, torch.arange(2)).dtype
    torch.float64
    """
    a, b, _, _ = philox(seed, stream, position)
    return ((a >> 5) * 67108864 + (b >> 6)).to(torch.float64) * 2.0**-53


def normal(seed: int, stream: int, position: Tensor) -> Tensor:
    """float64 standard normal draw for each position (Box-Muller)."""
    a, b, c, d = philox(seed, stream, position)
    u = ((a >> 5) * 67108864 + (b >> 6) + 1).to(torch.float64) * 2.0**-53
    v = ((c >> 5) * 67108864 + (d >> 6)).to(torch.float64) * 2.0**-53
    return torch.sqrt(-2 * torch.log(u)) * torch.cos(2 * torch.pi * v)
