"""Rows of the states that a model or a mixer returns: nested lists and tuples of tensors, one entry per row of the batch."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from serpent_scale.model.documents import Documents


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


def step_live(mixer: Callable, d_out: int, x: Tensor, documents: Documents, state: Any) -> tuple[Tensor, Any]:
    """mixer(x, documents, state) for one slot a row, x (B, 1, d): run on the rows whose slot is live, and not at all where none
    is. The others' outputs are 0."""
    live = documents.live[:, 0]
    rows, silent = live.nonzero()[:, 0], (~live).nonzero()[:, 0]
    if not len(silent):
        return mixer(x, documents, state)
    y = x.new_zeros(len(x), 1, d_out)
    if not len(rows):
        return y, state
    on_rows = Documents(documents.reset[rows], since_reset=documents.since_reset[rows], pieces=1)
    found, after = mixer(x[rows], on_rows, take_rows(state, rows))
    order = torch.cat([silent, rows]).argsort()
    return y.to(found.dtype).index_copy(0, rows, found), take_rows(join_rows([take_rows(state, silent), after]), order)
