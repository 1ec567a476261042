"""The audit digest of consumed samples: a sum, so that neither order nor reader nor grouping matters. Pure functions.

Equal digests mean the same samples, each as often, with the same tokens, whatever the world size, accumulation or prefetch.
A sum of hashes guards against faults, not against somebody who chooses samples to make two sums meet.
"""
from __future__ import annotations

import re
import struct
from collections.abc import Sequence

import numpy as np
import xxhash

MODULUS = 1 << 128
_TAIL = struct.Struct("<qI")
LIMB = 32  # bits: sums of limbs over up to 2^21 ranks are integers below 2^53, exact in float64


def of_sample(g: int, tokens: memoryview | np.ndarray, last_label: int, starts: Sequence[int], ends: Sequence[int] = ()) -> int:
    """Digest of one sample: xxh3 (128 bits, g its seed) of all that the model sees of it.

    tokens (seq_len,) are hashed as they are, so they must be of the index's dtype; the last one's label and the starts (k,) of
    documents tell the other labels, if documents are only cut at the ends of windows; else ends are the labels of each piece's
    last token.
    """
    hashed = xxhash.xxh3_128(tokens, g)
    hashed.update(_TAIL.pack(last_label, len(starts)))
    if len(starts):
        hashed.update(struct.pack(f"<{len(starts)}I", *starts))
    if len(ends):
        hashed.update(struct.pack(f"<{len(ends)}q", *ends))
    return hashed.intdigest()


def to_limbs(digest: int) -> list[int]:
    """The digest in four numbers that may be summed over ranks, each on its own."""
    return [digest >> shift & (1 << LIMB) - 1 for shift in range(0, 128, LIMB)]


def from_limbs(limbs: list[float]) -> int:
    """The digest whose summed limbs these are."""
    return sum(int(limb) << LIMB * i for i, limb in enumerate(limbs)) % MODULUS


def to_hex(digest: int) -> str:
    return f"{digest:032x}"


def from_hex(text: object) -> int | None:
    """None if this is not the text of a digest."""
    return int(text, 16) if isinstance(text, str) and re.fullmatch(r"[0-9a-f]{32}", text) else None
