"""The order of samples: keyed permutations that cost the same at any size. Pure functions.

`permute` is a Feistel network on the smallest power of two that holds n, walked until it lands below n (cycle-walking), so
it is a bijection of range(n) for every key.
"""
from __future__ import annotations

import hashlib

import numpy as np

MASK = (1 << 64) - 1
ROUNDS = 6


def derive_key(*parts: int | str) -> int:
    """A 64-bit key that differs whenever any part differs."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permute(i: int, n: int, key: int) -> int:
    """Where the permutation of range(n) with this key sends i, for 0 <= i < n. O(1) in time and memory."""
    bits = (n - 1).bit_length()
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    while True:
        low, high = i & low_mask, i >> low_bits
        for r in range(ROUNDS):
            if r % 2:
                low ^= _mix(high + key + (r << 56)) & low_mask
            else:
                high ^= _mix(low + key + (r << 56)) & high_mask
        i = high << low_bits | low
        if i < n:
            return i


def permutation(n: int, key: int) -> np.ndarray:
    """The whole permutation, (n,) int64: `permute` of every i at once.

    A round takes one half of i's bits to the other, so that tables of sqrt(n) entries hold all that it can mix.
    """
    bits = (n - 1).bit_length()
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    keys = np.array([(key + (r << 56)) & MASK for r in range(ROUNDS)], np.uint64)
    mixed = _mix(np.arange(high_mask + 1, dtype=np.uint64) + keys[:, None])
    tables = [(row & (low_mask if r % 2 else high_mask)).astype(np.int64) for r, row in enumerate(mixed)]

    def walk(i: np.ndarray) -> np.ndarray:
        low, high = i & low_mask, i >> low_bits
        for r, table in enumerate(tables):
            if r % 2:
                low ^= table[high]
            else:
                high ^= table[low]
        return high << low_bits | low

    out = walk(np.arange(n))
    while len(outside := np.flatnonzero(out >= n)):
        out[outside] = walk(out[outside])
    return out


def _mix(x):
    """splitmix64 of an int, or of an array of uint64."""
    x = (x * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)
