"""What the kernels of compression and restoration share: rows of d channels read from here or from the piece before, the rows
dealt out to programs, and the programs' partial sums added up in a fixed order.

A program is one warp, and what hides the time of a load is other loads. So nothing is loaded under an `if`: the rows of taps
that do not count read 0, their weights anything finite, and the next slot or token is looked up while this one is worked on.
"""
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch

PROCESSORS = 132  # of an H200


@triton.jit
def wide(i):
    """i as int64: offsets pass 2^31."""
    return tl.zeros([], tl.int64) + i


@triton.jit
def row_of(x, halo, b, t, d, stride_b, stride_l, rows, c, mask, HALO: tl.constexpr):
    """Row t of x, or of the `rows` rows before x where t < 0; 0 where masked."""
    value = tl.load(x + b * stride_b + wide(t) * stride_l + c, mask=mask & (t >= 0), other=0.0)
    if HALO:
        before = halo + (b * rows + rows + t) * d + c
        value = tl.where(t < 0, tl.load(before, mask=mask & (t < 0), other=0.0), value)
    return value


@triton.jit
def bases_of(basis, d, c, M: tl.constexpr):
    out = ()
    for m in tl.static_range(M):
        out += (tl.load(basis + m * d + c, mask=c < d, other=0.0).to(tl.float32),)
    return out


@triton.jit
def numbers_at(at, N: tl.constexpr):
    out = ()
    for i in tl.static_range(N):
        out += (tl.load(at + i),)
    return out


@triton.jit
def _sum_rows(parts, out, rows, columns, program, limit, group, LIMIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    c = program * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < columns
    if LIMIT:
        rows_of = tl.load(limit + c, mask=inside, other=0) * group
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        r = start + tl.arange(0, ROWS)[:, None]
        mask = (r < rows) & inside[None, :]
        if LIMIT:
            mask = mask & (r < rows_of[None, :])
        total += tl.load(parts + r.to(tl.int64) * columns + c[None, :], mask=mask, other=0.0)
    tl.store(out + c, tl.sum(total, 0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_parts(
    first, first_out, first_rows, first_columns, second, second_out, second_rows, second_columns, limit, group,
    LIMIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Sums two (rows, columns) tables over their rows; with a limit (columns,), the second over its first limit * group."""
    p, programs = tl.program_id(0), tl.cdiv(first_columns, COLUMNS)
    if p < programs:
        _sum_rows(first, first_out, first_rows, first_columns, p, limit, group, False, ROWS, COLUMNS)
    else:
        _sum_rows(second, second_out, second_rows, second_columns, p - programs, limit, group, LIMIT, ROWS, COLUMNS)


def cdiv(a: int, b: int) -> int:  # Triton's own wrap their arguments: microseconds a call, tens of them a layer
    return -(-a // b)


def power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def strides_of(x: Tensor) -> tuple[Tensor, int, int]:
    """x (B, S, d) with its last dimension contiguous, and its other strides; those of a dimension of 1 as if contiguous,
    so that equal rows always meet the same kernel."""
    if x.stride(2) != 1 and x.shape[2] > 1:
        x = x.contiguous()
    inner = x.stride(1) if x.shape[1] > 1 else x.shape[2]
    return x, x.stride(0) if x.shape[0] > 1 else inner * x.shape[1], inner


def block_of(d: int, largest: int) -> int:
    """Channels per program: a power of two that wastes little of the last block."""
    block = min(largest, max(16, power_of_2(d)))
    while block > 128 and d % block and -d % block > d // 8:
        block //= 2
    return block


def share_of(rows: int, batch: int, blocks: int, warps: int) -> int:
    """Rows (slots or tokens) per program of one warp, if the kernel's registers let so many warps run on a multiprocessor:
    all programs run at once, and are few enough that their partial sums cost little."""
    return max(4, cdiv(rows, max(1, PROCESSORS * warps // (batch * blocks))))


def add_up(
    first: Tensor, first_out: Tensor, second: Tensor, second_out: Tensor, limit: Tensor | None = None, group: int = 1
) -> None:
    """Two tables of partial sums (n, columns) float32, each summed over n in one launch; with a limit (columns,) int, the
    second over its first limit * group rows."""
    columns, (n, m) = 32, (first.shape[1], second.shape[1])
    launch(
        _sum_parts, (cdiv(n, columns) + cdiv(m, columns),),
        first, first_out, len(first), n, second, second_out, len(second), m, first if limit is None else limit, group,
        LIMIT=limit is not None, ROWS=64, COLUMNS=columns, num_warps=4,
    )
