"""Partial sums of a kernel's programs, added up in a fixed order: few columns of many rows fill a device when each program takes
few columns and asks for many rows at once."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

COLUMNS = 32  # of a program: a line of memory
ROWS = 256  # asked for at once


def add_rows(partial: Tensor) -> Tensor:
    """The sum (columns,) of contiguous float32 rows (n, columns)."""
    n, columns = partial.shape
    total = torch.empty(columns, dtype=torch.float32, device=partial.device)
    launch(_add_rows, (triton.cdiv(columns, COLUMNS),), partial, total, n, columns, COLUMNS=COLUMNS, ROWS=ROWS, num_warps=8)
    return total


@triton.jit
def _add_rows(partial, total, n, columns, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    inside = column < columns
    found = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, n, ROWS):
        at = (first + row).to(tl.int64) * columns + column
        found += tl.load(partial + at, mask=inside & (first + row < n), other=0.0)
    tl.store(total + column, tl.sum(found, 0)[None, :], mask=inside)
