"""The last step of the scan's backward pass: of the gradients that programs share each has written its part, and the parts are
added in their order."""
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch_together, problem_of

ROWS, BLOCK = 8, 256  # of a program of one warp: enough loads on their way


def add_parts(problems: list[tuple[Tensor, ...]], of_log: bool) -> None:
    """One launch for several problems: part_bc (n_parts, B, L, 2, N) into grad_B and grad_C (B, L, N), which may be strided, and
    part_a (n_summands, n_sums) into sums (n_sums,). A, of as many elements as sums begin with: of_log multiplies those by it."""
    arguments, programs = [], []
    for part_bc, grad_B, grad_C, part_a, A, sums in problems:
        n_parts, batch, length, _, d_state = part_bc.shape
        row_programs = triton.cdiv(batch * length, ROWS)
        sizes = n_parts, batch * length, length, *part_a.shape, A.numel(), row_programs
        arguments.append((part_bc, grad_B, grad_C, part_a, A, sums, *sizes, *grad_B.stride()[:2], *grad_C.stride()[:2]))
        programs.append(row_programs + triton.cdiv(sums.numel(), BLOCK))
    launch_together(
        _scan_add_parts, arguments, programs, N=d_state, WIDTH=triton.next_power_of_2(2 * d_state), ROWS=ROWS, BLOCK=BLOCK,
        OF_LOG=of_log, num_warps=1,
    )


@triton.jit
def _add(parts, n_parts, stride, inside, SIZE: tl.constexpr):
    """The sum over n_parts of what lies stride apart, (SIZE,), eight at a time so that enough is on its way."""
    total = tl.zeros((SIZE,), tl.float32)
    k = tl.arange(0, 8)[:, None]
    for first in range(0, n_parts, 8):
        p = parts[None, :] + (first + k).to(tl.int64) * stride
        total += tl.sum(tl.load(p, mask=inside[None, :] & (first + k < n_parts), other=0.0).to(tl.float32), 0)
    return total


@triton.jit
def _scan_add_parts(
    PROBLEMS, STARTS,
    N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OF_LOG: tl.constexpr,
):  # fmt: skip
    """PARTS (n_parts, B L, 2, N) summed in order into the gradients of B and C, and SUMMANDS (n_summands, n_sums) into SUMS.
    OF_LOG: the first n_A of these times A."""
    problem, place = problem_of(PROBLEMS, STARTS)
    (PARTS, GB, GC, SUMMANDS, A, SUMS, n_parts, n_rows, L, n_summands, n_sums, n_A, row_programs,
     sb_b, sb_t, sc_b, sc_t) = problem  # fmt: skip
    if place < row_programs:
        i = tl.arange(0, ROWS * WIDTH)
        row, column = place * ROWS + i // WIDTH, i % WIDTH
        ok = (row < n_rows) & (column < 2 * N)
        total = _add(PARTS + row.to(tl.int64) * (2 * N) + column, n_parts, n_rows.to(tl.int64) * (2 * N), ok, ROWS * WIDTH)
        b, t = (row // L).to(tl.int64), (row % L).to(tl.int64)
        tl.store(GB + b * sb_b + t * sb_t + column, total.to(GB.dtype.element_ty), mask=ok & (column < N))
        tl.store(GC + b * sc_b + t * sc_t + column - N, total.to(GC.dtype.element_ty), mask=ok & (column >= N))
    else:
        at = (place - row_programs) * BLOCK + tl.arange(0, BLOCK)
        found = _add(SUMMANDS + at, n_summands, n_sums.to(tl.int64), at < n_sums, BLOCK)
        if OF_LOG:
            found *= tl.load(A + at, mask=at < n_A, other=1.0)
        tl.store(SUMS + at, found, mask=at < n_sums)
