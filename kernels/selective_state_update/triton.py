"""One step of the selective scan, everything fused: the state is read once and written once."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch


@torch.no_grad()
def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    reset: Tensor | None = None, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As in the package's docstring; state, A and out contiguous, x, dt, z, B, C with contiguous rows."""
    batch, d_inner, d_state = state.shape
    out = torch.empty_like(state) if out is None else out
    assert state.is_contiguous() and A.is_contiguous() and out.is_contiguous() and out.dtype == torch.float32
    assert all(v.stride(-1) == 1 or v.shape[-1] == 1 for v in (x, dt, z, B, C, D, dt_bias))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    block = 32
    if batch:
        launch(
            _update, (triton.cdiv(d_inner, block), batch),
            state, x, dt, A, B, C, D, z, dt_bias, reset, y, out, d_inner, x.stride(0), dt.stride(0), z.stride(0), B.stride(0),
            C.stride(0), 0 if reset is None else reset.stride(0),
            HAS_RESET=reset is not None, N=d_state, BLOCK_N=triton.next_power_of_2(d_state), BLOCK_D=block, num_warps=2,
        )
    return y, out


@triton.jit
def _update(
    state, x, dt, A, B, C, D, z, dt_bias, reset, y, out, d_inner, x_row, dt_row, z_row, B_row, C_row, reset_row,
    HAS_RESET: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    inside = d < d_inner
    tile = inside[:, None] & (n < N)[None, :]
    at = d.to(tl.int64)[:, None] * N + n[None, :]

    h = tl.load(state + b * d_inner * N + at, mask=tile, other=0.0)
    if HAS_RESET:
        h = tl.where(tl.load(reset + b * reset_row), 0.0, h)
    a = tl.load(A + at, mask=tile, other=0.0).to(tl.float32)
    u = tl.load(x + b * x_row + d, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(dt + b * dt_row + d, mask=inside, other=0.0).to(tl.float32)
    v += tl.load(dt_bias + d, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z + b * z_row + d, mask=inside, other=0.0).to(tl.float32)
    skip = tl.load(D + d, mask=inside, other=0.0).to(tl.float32)
    into = tl.load(B + b * B_row + n, mask=n < N, other=0.0).to(tl.float32)
    outof = tl.load(C + b * C_row + n, mask=n < N, other=0.0).to(tl.float32)

    # softplus; log(1 + e) * e / ((1 + e) - 1) cancels the rounding of 1 + e
    e = tl.exp2(-tl.abs(v) * LOG2E)
    one = 1.0 + e
    step = tl.maximum(v, 0.0) + tl.where(one == 1.0, e, tl.log2(one) * (1.0 / LOG2E) * (e / tl.where(one == 1.0, 1.0, one - 1.0)))

    h = tl.exp2(step[:, None] * (a * LOG2E)) * h + (step * u)[:, None] * into[None, :]
    tl.store(out + b * d_inner * N + at, h, mask=tile)
    result = tl.sum(h * outof[None, :], 1) + skip * u
    result *= gate / (1.0 + tl.exp2(-gate * LOG2E))
    tl.store(y + b * d_inner + d, result.to(y.dtype.element_ty), mask=inside)
