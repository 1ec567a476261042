"""Rows of the states that a model or a mixer returns: nested lists and tuples of tensors, one entry per row of the batch."""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map


def take_rows(states: Any, rows: Tensor | slice) -> Any:
    """The given rows: a slice, or their numbers (int64)."""
    return tree_map(lambda leaf: leaf if leaf is None else leaf[rows], states)


def join_rows(parts: list[Any]) -> Any:
    """The rows of the first part, then those of the next, ...: what differs in length is a cache, filled from its front."""

    def join(*leaves):
        if leaves[0] is None:
            return None
        longest = max(leaf.shape[1] for leaf in leaves) if leaves[0].ndim > 2 else 0
        return torch.cat([F.pad(v, (0, 0) * (v.ndim - 2) + (0, longest - v.shape[1])) if longest else v for v in leaves])

    return parts[0] if len(parts) == 1 else tree_map(join, *parts)
