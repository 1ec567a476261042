"""State-space duality for GPUs: chunks of steps as tensor-core products, states passed along inside one kernel.

Forward: `_prepare` (intervals, running log-decays), `_walk` (each chunk's incoming state), `_outputs`. Backward: the incoming
states again, `_walk` in reverse (the gradient at each chunk's outgoing state), `_backward_x`, `_backward_BC`, `_finish`.
Log-decays are base 2, in float32, and counted from the chunk's start; document starts are counted the same way, and a pair of
steps with different counts does not meet.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    reset: Tensor | None = None, live: Tensor | None = None, initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As in the package's docstring, for CUDA tensors of float32, bfloat16 or float16; the final state is float32."""
    A, D, dt_bias = (v.contiguous() for v in (A, D, dt_bias))
    return _SSD.apply(x, dt, A, B.to(x.dtype), C.to(x.dtype), D, dt_bias, reset, live, initial_state)


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_final):
        inputs = ctx.saved_tensors
        grad_y = torch.zeros_like(inputs[0]) if grad_y is None else grad_y
        *grads, grad_initial = backward(grad_y, grad_final, *inputs)
        initial_state = inputs[-1]
        return *grads, None, None, None if initial_state is None else grad_initial.to(initial_state.dtype)


@torch.no_grad()
def ssd_state(x, dt, A, B, dt_bias, reset=None, live=None) -> tuple[Tensor, Tensor]:
    """As `reference.ssd_state`."""
    B = B.to(x.dtype)
    call = _Call(x, dt, A.contiguous(), B, B, dt_bias.contiguous(), reset, live, forward_blocks(x.dtype, x.shape[3] * B.shape[3]))
    span = call.step.sum((1, 3))
    return call.walk(x, B, None, reverse=False)[1], span if reset is None else span.masked_fill(reset.any(1)[:, None], torch.inf)


@torch.no_grad()
def ssd_state_gradient(grad_y, grad_final, dt, A, C, dt_bias, reset=None, live=None) -> Tensor:
    """As `reference.ssd_state_gradient`."""
    grad_y = grad_y if grad_y.stride(-1) == 1 else grad_y.contiguous()
    C = C.to(grad_y.dtype)
    call = _Call(grad_y, dt, A.contiguous(), C, C, dt_bias.contiguous(), reset, live, backward_blocks(grad_y.dtype))
    return call.walk(grad_y, C, grad_final, reverse=True)[1]


class Blocks(NamedTuple):
    """Steps of a chunk, heads of one program, and (num_warps, num_stages) of the kernels."""

    chunk: int
    heads: int
    walk: tuple[int, int]
    main: tuple[int, int]  # `_outputs` or `_backward_x`
    pairs: tuple[int, int] = (4, 1)  # `_backward_BC`


def forward_blocks(dtype: torch.dtype, state_size: int = 0) -> Blocks:
    """state_size: head_dim * d_state. Large states leave no shared memory for long chunks."""
    if dtype == torch.float32:
        return Blocks(32, 4, (4, 1), (4, 1))
    return Blocks(128, 8, (8, 3), (8, 3)) if state_size <= 64 * 128 else Blocks(64, 8, (4, 3), (4, 2))


def backward_blocks(dtype: torch.dtype) -> Blocks:
    return Blocks(32, 4, (4, 1), (4, 1), (8, 1)) if dtype == torch.float32 else Blocks(64, 8, (4, 3), (4, 1), (8, 2))


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    reset: Tensor | None = None, live: Tensor | None = None, initial_state: Tensor | None = None,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """y (B, L, H, P) and the final state (B, H, P, N) float32. x, B, C share one dtype; their last dimension is contiguous."""
    blocks = blocks or forward_blocks(x.dtype, x.shape[3] * B.shape[3])
    call = _Call(x, dt, A, B, C, dt_bias, reset, live, blocks)
    states, final = call.walk(x, B, initial_state, reverse=False)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    warps, stages = blocks.main
    if y.numel():
        launch(
            _outputs, (call.batch * call.chunks, call.groups * call.splits),
            x, B, C, D, call.decay, call.source, call.document, states, y, *call.sizes, *x.stride()[:3], *B.stride()[:3],
            *C.stride()[:3], *y.stride()[:3], HEADS=call.heads, **call.constants, num_warps=warps, num_stages=stages,
        )
    return y, final


def backward(
    grad_y: Tensor, grad_final: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
    dt_bias: Tensor, reset: Tensor | None = None, live: Tensor | None = None, initial_state: Tensor | None = None,
    out: tuple[Tensor | None, ...] = (None,) * 4, blocks: Blocks | None = None,
) -> tuple[Tensor, ...]:
    """Gradients in x, dt, A, B, C, D, dt_bias and initial_state (float32). out: where those in x, dt, B, C go, if given."""
    blocks = blocks or backward_blocks(x.dtype)
    call = _Call(x, dt, A, B, C, dt_bias, reset, live, blocks)
    batch, length, heads, _ = x.shape
    grad_y = grad_y.to(x.dtype)
    grad_y = grad_y if grad_y.stride(-1) == 1 else grad_y.contiguous()
    grad_x, grad_dt, grad_B, grad_C = (torch.empty_like(v, memory_format=torch.contiguous_format) if o is None else o
                                       for v, o in zip((x, dt, B, C), out))
    states, _ = call.walk(x, B, initial_state, reverse=False)
    grad_states, grad_initial = call.walk(grad_y, C, grad_final, reverse=True)

    grad_step, grad_decay = torch.empty_like(call.step), torch.empty_like(call.step)
    sums = x.new_empty(4, batch, call.chunks, heads, dtype=torch.float32)  # of D, the last decay, A, dt_bias
    partial = x.new_empty(2, call.splits, *B.shape, dtype=torch.float32)
    if x.numel():
        launch(
            _backward_x, (batch * call.chunks, call.groups * call.splits),
            x, B, C, D, call.step, call.decay, call.document, states, grad_states, grad_y, grad_x, grad_step, grad_decay, sums,
            *call.sizes, *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *grad_y.stride()[:3], *grad_x.stride()[:3],
            HEADS=call.heads, **call.constants, num_warps=blocks.main[0], num_stages=blocks.main[1],
        )
        launch(
            _backward_BC, (batch * call.chunks, call.groups * call.splits),
            x, B, C, call.decay, call.source, call.document, states, grad_states, grad_y, partial, *call.sizes,
            *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *grad_y.stride()[:3], partial.stride(0),
            HEADS=call.heads, **call.constants, num_warps=blocks.pairs[0], num_stages=blocks.pairs[1],
        )
        launch(
            _finish, (batch * call.chunks, triton.cdiv(heads, _HEAD_BLOCK)),
            dt, dt_bias, A, live, call.step, grad_step, grad_decay, grad_dt, sums, length, heads, call.chunks,
            *dt.stride()[:2], *grad_dt.stride()[:2], 0 if live is None else live.stride(0), sums.stride(0),
            HAS_LIVE=live is not None, T=blocks.chunk, BLOCK_H=_HEAD_BLOCK, num_warps=4,
        )
    else:
        partial.zero_(), sums.zero_()
    for grad, parts in zip((grad_B, grad_C), partial):
        torch.sum(parts, 0, out=grad) if grad.dtype == parts.dtype else grad.copy_(parts.sum(0))
    grad_D, _, grad_A, grad_bias = sums.flatten(1, 2).sum(1)
    return (grad_x, grad_dt, grad_A.to(A.dtype), grad_B, grad_C, grad_D.to(D.dtype), grad_bias.to(dt_bias.dtype), grad_initial)


_HEAD_BLOCK = 16


class _Call:
    """What the kernels of one call share: sizes, intervals and decays per chunk, and the walk over chunks."""

    def __init__(self, x, dt, A, B, C, dt_bias, reset, live, blocks):
        self.batch, length, heads, head_dim = x.shape
        self.groups, d_state = B.shape[2:]
        per_group = heads // self.groups
        assert heads == per_group * self.groups and B.dtype == C.dtype == x.dtype
        assert x.stride(3) == B.stride(3) == C.stride(3) == dt.stride(2) == 1
        self.blocks, self.dtype = blocks, x.dtype
        self.chunks = triton.cdiv(length, blocks.chunk)
        self.heads = blocks.heads  # of one program; fewer, where programs would be too few for the chip
        while self.heads > 1 and self.batch * self.chunks * self.groups * triton.cdiv(per_group, self.heads) < 256:
            self.heads //= 2
        self.splits = triton.cdiv(per_group, self.heads)
        self.sizes = length, heads, per_group, self.splits, self.chunks
        self.constants = dict(
            HAS_RESET=reset is not None, T=blocks.chunk, P=head_dim, N=d_state,
            BLOCK_P=max(16, triton.next_power_of_2(head_dim)), BLOCK_N=max(16, triton.next_power_of_2(d_state)),
            PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",
        )
        self.step, self.decay, self.source = x.new_empty(3, self.batch, self.chunks, heads, blocks.chunk, dtype=torch.float32)
        self.document = x.new_empty(self.batch, self.chunks, blocks.chunk, dtype=torch.int32) if reset is not None else None
        if x.numel():
            launch(
                _prepare, (self.batch * self.chunks, triton.cdiv(heads, _HEAD_BLOCK)),
                dt, dt_bias, A, reset, live, self.step, self.decay, self.source, self.document, length, heads, self.chunks,
                *dt.stride()[:2], 0 if reset is None else reset.stride(0), 0 if live is None else live.stride(0),
                HAS_RESET=reset is not None, HAS_LIVE=live is not None, T=blocks.chunk, BLOCK_H=_HEAD_BLOCK, num_warps=4,
            )

    def walk(self, x, B, start, reverse):
        """The state before each chunk (B, K, H, P, N), in x's dtype, and after all; in reverse, its gradient after each chunk."""
        length, heads, head_dim, d_state = *x.shape[1:], B.shape[3]
        start = None if start is None else start.float().contiguous()
        states = x.new_empty(self.batch, self.chunks, heads, head_dim, d_state, dtype=self.dtype)
        end = x.new_empty(self.batch, heads, head_dim, d_state, dtype=torch.float32)
        constants = dict(self.constants)
        block_p, block_n = min(64, constants.pop("BLOCK_P")), min(64, constants.pop("BLOCK_N"))
        if end.numel():
            launch(
                _walk, (triton.cdiv(d_state, block_n) * triton.cdiv(head_dim, block_p) * self.batch * heads,),
                x, B, self.decay, self.source, self.document, start, states, end, length, heads, heads // self.groups,
                self.chunks, *x.stride()[:3], *B.stride()[:3], HAS_START=start is not None, REVERSE=reverse, BLOCK_P=block_p,
                BLOCK_N=block_n, **constants, num_warps=self.blocks.walk[0], num_stages=self.blocks.walk[1],
            )
        return states, end


_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, acc=None):
    if _INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _mask(row, column, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows that count by columns that exist: where the tile is exact, the rows alone (a predicate each, not one an element)."""
    mask = row[:, None]
    if SIZE % BLOCK != 0:
        mask = mask & (column < SIZE)[None, :]
    return mask


@triton.jit
def _softplus(v):
    LOG2E: tl.constexpr = 1.4426950408889634
    e = tl.exp2(-tl.abs(v) * LOG2E)
    one = 1.0 + e  # log(1 + e) * e / ((1 + e) - 1) cancels the rounding of 1 + e
    ratio = tl.where(one == 1.0, 1.0, e / tl.where(one == 1.0, 1.0, one - 1.0))
    return tl.maximum(v, 0.0) + tl.where(one == 1.0, e, tl.log2(one) * (1.0 / LOG2E) * ratio)


@triton.jit
def _prepare(
    dt, dt_bias, A, reset, live, step_out, decay_out, source_out, document_out, L, H, K, dt_b, dt_t, reset_b, live_b,
    HAS_RESET: tl.constexpr, HAS_LIVE: tl.constexpr, T: tl.constexpr, BLOCK_H: tl.constexpr,
):
    """step = softplus(dt + dt_bias), 0 where not live; decay, its running sum times A log2(e); source = decay - log2(step), so
    that 2^(decay_i - source_j) = exp(sum of step A over (j, i]) step_j: all (B, K, H, T). document (B, K, T)."""
    bk = tl.program_id(0).to(tl.int64)
    b, k = bk // K, bk % K
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, T)
    t = k * T + i
    tile = (h < H)[:, None] & (t < L)[None, :]
    v = tl.load(dt + b * dt_b + t[None, :] * dt_t + h[:, None], mask=tile, other=0.0).to(tl.float32)
    v += tl.load(dt_bias + h, mask=h < H, other=0.0).to(tl.float32)[:, None]
    step = tl.where(tile, _softplus(v), 0.0)
    if HAS_LIVE:
        on = tl.load(live + b * live_b + t, mask=t < L, other=0).to(tl.int32)
        step = tl.where((on != 0)[None, :], step, 0.0)
    a = tl.load(A + h, mask=h < H, other=0.0).to(tl.float32) * 1.4426950408889634
    at = (bk * H + h)[:, None] * T + i[None, :]
    tl.store(step_out + at, step, mask=(h < H)[:, None])
    decay = tl.cumsum(step * a[:, None], 1)
    tl.store(decay_out + at, decay, mask=(h < H)[:, None])
    source = tl.where(step > 0.0, decay - tl.log2(tl.where(step > 0.0, step, 1.0)), float("inf"))  # a step of 0 has weight 0
    tl.store(source_out + at, source, mask=(h < H)[:, None])
    if HAS_RESET:
        if tl.program_id(1) == 0:
            cut = tl.load(reset + b * reset_b + t, mask=t < L, other=0).to(tl.int32)
            tl.store(document_out + bk * T + i, tl.cumsum((cut != 0).to(tl.int32), 0))


@triton.jit
def _walk(
    x, B, decay, source, document, start, states, end, L, H, R, K, x_b, x_t, x_h, B_b, B_t, B_g,
    HAS_START: tl.constexpr, REVERSE: tl.constexpr, HAS_RESET: tl.constexpr, T: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):
    """state <- through * state + sum_t weight_t x_t B_t^T, chunk by chunk; the state before each goes to `states`."""
    tiles_p: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) % (tiles_p * tiles_n)
    bh = (tl.program_id(0) // (tiles_p * tiles_n)).to(tl.int64)
    b, h = bh // H, bh % H
    p = (tile // tiles_n) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, T)
    pn = (p < P)[:, None] & (n < N)[None, :]
    at = p[:, None] * N + n[None, :]
    x += b * x_b + h * x_h
    B += b * B_b + (h // R) * B_g
    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    if HAS_START:
        state += tl.load(start + bh * (P * N) + at, mask=pn, other=0.0)
    for c in range(K):
        k = c
        if REVERSE:
            k = K - 1 - c
        bk = b * K + k
        tl.store(states + (bk * H + h) * (P * N) + at, state.to(states.dtype.element_ty), mask=pn)
        vector = (bk * H + h) * T
        last = tl.load(decay + vector + T - 1)
        through = tl.exp2(last)
        if REVERSE:
            weight = tl.exp2(tl.load(decay + vector + i))
        else:
            weight = tl.exp2(last - tl.load(source + vector + i))
        if HAS_RESET:
            count = tl.load(document + bk * T + i)
            count_last = tl.load(document + bk * T + T - 1)
            through = tl.where(count_last == 0, through, 0.0)
            weight = tl.where(count == (0 if REVERSE else count_last), weight, 0.0)
        row = i < L - k * T
        at_x = x + (k * T).to(tl.int64) * x_t + i[:, None] * x_t + p[None, :]
        at_B = B + (k * T).to(tl.int64) * B_t + i[:, None] * B_t + n[None, :]
        xs = tl.load(at_x, mask=_mask(row, p, P, BLOCK_P), other=0.0)
        Bs = tl.load(at_B, mask=_mask(row, n, N, BLOCK_N), other=0.0)
        Bs = (Bs.to(tl.float32) * weight[:, None]).to(x.dtype.element_ty)
        state = _dot(tl.trans(xs), Bs, PRECISION, state * through)
    tl.store(end + bh * (P * N) + at, state, mask=pn)


@triton.jit
def _outputs(
    x, B, C, D, decay, source, document, states, y, L, H, R, SPLITS, K, x_b, x_t, x_h, B_b, B_t, B_g, C_b, C_t, C_g,
    y_b, y_t, y_h,
    HEADS: tl.constexpr, HAS_RESET: tl.constexpr, T: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):
    """y of one chunk for some heads of a group, which share C B^T: it is formed once."""
    bk = tl.program_id(0).to(tl.int64)
    b, k = bk // K, bk % K
    group, split = tl.program_id(1) // SPLITS, tl.program_id(1) % SPLITS
    i, p, n = tl.arange(0, T), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    row = i < L - k * T
    rp, rn, pn = _mask(row, p, P, BLOCK_P), _mask(row, n, N, BLOCK_N), _mask(p < P, n, N, BLOCK_N)
    x += b * x_b + k * T * x_t
    y += b * y_b + k * T * y_t
    Cs = tl.load(C + b * C_b + k * T * C_t + group * C_g + i[:, None] * C_t + n[None, :], mask=rn, other=0.0)
    Bs = tl.load(B + b * B_b + k * T * B_t + group * B_g + i[:, None] * B_t + n[None, :], mask=rn, other=0.0)
    meet = i[:, None] >= i[None, :]
    if HAS_RESET:
        count = tl.load(document + bk * T + i)
        meet = meet & (count[:, None] == count[None, :])
    CB = tl.where(meet, _dot(Cs, tl.trans(Bs), PRECISION), 0.0)
    first = group * R + split * HEADS
    for h in range(first, tl.minimum(first + HEADS, (group + 1) * R)):
        vector = (bk * H + h) * T + i
        run = tl.load(decay + vector)
        xs = tl.load(x + h * x_h + i[:, None] * x_t + p[None, :], mask=rp, other=0.0)
        state = tl.load(states + (bk * H + h) * (P * N) + p[:, None] * N + n[None, :], mask=pn, other=0.0)
        scale = tl.exp2(run)
        if HAS_RESET:
            scale = tl.where(count == 0, scale, 0.0)
        out = _dot(Cs, tl.trans(state), PRECISION) * scale[:, None]
        # Pairs that do not meet have CB = 0; the minimum keeps their weight finite.
        weight = CB * tl.exp2(tl.minimum(run[:, None] - tl.load(source + vector)[None, :], 64.0))
        out = _dot(weight.to(x.dtype.element_ty), xs, PRECISION, out)
        out += tl.load(D + h).to(tl.float32) * xs.to(tl.float32)
        tl.store(y + h * y_h + i[:, None] * y_t + p[None, :], out.to(y.dtype.element_ty), mask=rp)


@triton.jit
def _backward_x(
    x, B, C, D, step, decay, document, states, grad_states, grad_y, grad_x, grad_step, grad_decay, sums,
    L, H, R, SPLITS, K, x_b, x_t, x_h, B_b, B_t, B_g, C_b, C_t, C_g, gy_b, gy_t, gy_h, gx_b, gx_t, gx_h,
    HEADS: tl.constexpr, HAS_RESET: tl.constexpr, T: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):
    """Gradients in x, in the intervals (with the decays held) and in the running log-decays; source step j by reading step i."""
    bk = tl.program_id(0).to(tl.int64)
    b, k = bk // K, bk % K
    group, split = tl.program_id(1) // SPLITS, tl.program_id(1) % SPLITS
    i, p, n = tl.arange(0, T), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    row = i < L - k * T
    rp, rn, pn = _mask(row, p, P, BLOCK_P), _mask(row, n, N, BLOCK_N), _mask(p < P, n, N, BLOCK_N)
    x += b * x_b + k * T * x_t
    grad_y += b * gy_b + k * T * gy_t
    grad_x += b * gx_b + k * T * gx_t
    Cs = tl.load(C + b * C_b + k * T * C_t + group * C_g + i[:, None] * C_t + n[None, :], mask=rn, other=0.0)
    Bs = tl.load(B + b * B_b + k * T * B_t + group * B_g + i[:, None] * B_t + n[None, :], mask=rn, other=0.0)
    meet = i[:, None] <= i[None, :]
    if HAS_RESET:
        count = tl.load(document + bk * T + i)
        count_last = tl.load(document + bk * T + T - 1)
        meet = meet & (count[:, None] == count[None, :])
    BC = tl.where(meet, _dot(Bs, tl.trans(Cs), PRECISION), 0.0)  # (j, i)
    first = group * R + split * HEADS
    for h in range(first, tl.minimum(first + HEADS, (group + 1) * R)):
        head = bk * H + h
        run, last = tl.load(decay + head * T + i), tl.load(decay + head * T + T - 1)
        dt = tl.load(step + head * T + i)
        xs = tl.load(x + h * x_h + i[:, None] * x_t + p[None, :], mask=rp, other=0.0)
        gy = tl.load(grad_y + h * gy_h + i[:, None] * gy_t + p[None, :], mask=rp, other=0.0)
        state = tl.load(states + head * (P * N) + p[:, None] * N + n[None, :], mask=pn, other=0.0)
        grad_state = tl.load(grad_states + head * (P * N) + p[:, None] * N + n[None, :], mask=pn, other=0.0)
        from_start, to_end, through = tl.exp2(run), tl.exp2(last - run), tl.exp2(last)
        if HAS_RESET:
            from_start = tl.where(count == 0, from_start, 0.0)
            to_end = tl.where(count == count_last, to_end, 0.0)
            through = tl.where(count_last == 0, through, 0.0)
        xf, gyf = xs.to(tl.float32), gy.to(tl.float32)
        tl.store(sums + head, tl.sum(tl.sum(xf * gyf, 1), 0))
        read = tl.sum(_dot(Cs, tl.trans(state), PRECISION) * gyf, 1) * from_start
        out = _dot(Bs, tl.trans(grad_state), PRECISION) * to_end[:, None]
        sent = tl.sum(out * xf, 1)  # through the outgoing state
        # The inner product of two states as a trace: a product of tiles that are in shared memory anyway.
        kept = tl.where(p[:, None] == p[None, :], _dot(state, tl.trans(grad_state), PRECISION), 0.0)
        kept = tl.sum(tl.sum(kept, 1), 0) * through

        weight = BC * tl.exp2(tl.minimum(run[None, :] - run[:, None], 0.0))
        out = _dot(weight.to(x.dtype.element_ty), gy, PRECISION, out)
        weight *= _dot(xs, tl.trans(gy), PRECISION)
        direct = tl.sum(weight, 1) + sent
        read += tl.sum(weight * dt[:, None], 0)
        out = out * dt[:, None] + tl.load(D + h).to(tl.float32) * gyf
        tl.store(grad_x + h * gx_h + i[:, None] * gx_t + p[None, :], out.to(grad_x.dtype.element_ty), mask=rp)
        tl.store(grad_step + head * T + i, direct)
        tl.store(grad_decay + head * T + i, read - direct * dt)
        tl.store(sums + tl.num_programs(0).to(tl.int64) * H + head, tl.sum(sent * dt, 0) + kept)


@triton.jit
def _backward_BC(
    x, B, C, decay, source, document, states, grad_states, grad_y, partial,
    L, H, R, SPLITS, K, x_b, x_t, x_h, B_b, B_t, B_g, C_b, C_t, C_g, gy_b, gy_t, gy_h, part_which,
    HEADS: tl.constexpr, HAS_RESET: tl.constexpr, T: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):
    """Gradients in B and C: pairs are summed over heads before the products with C and B. partial (2, SPLITS, B, L, G, N)."""
    bk = tl.program_id(0).to(tl.int64)
    b, k = bk // K, bk % K
    group, split = tl.program_id(1) // SPLITS, tl.program_id(1) % SPLITS
    i, p, n = tl.arange(0, T), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    row = i < L - k * T
    rp, rn, pn = _mask(row, p, P, BLOCK_P), _mask(row, n, N, BLOCK_N), _mask(p < P, n, N, BLOCK_N)
    x += b * x_b + k * T * x_t
    grad_y += b * gy_b + k * T * gy_t
    meet = i[:, None] >= i[None, :]
    if HAS_RESET:
        count = tl.load(document + bk * T + i)
        count_last = tl.load(document + bk * T + T - 1)
        meet = meet & (count[:, None] == count[None, :])
    pairs = tl.zeros([T, T], tl.float32)  # (i, j), gradient in C B^T
    grad_C, grad_B = tl.zeros([T, BLOCK_N], tl.float32), tl.zeros([T, BLOCK_N], tl.float32)
    first = group * R + split * HEADS
    for h in range(first, tl.minimum(first + HEADS, (group + 1) * R)):
        head = bk * H + h
        run, last = tl.load(decay + head * T + i), tl.load(decay + head * T + T - 1)
        sent = tl.load(source + head * T + i)
        xs = tl.load(x + h * x_h + i[:, None] * x_t + p[None, :], mask=rp, other=0.0)
        gy = tl.load(grad_y + h * gy_h + i[:, None] * gy_t + p[None, :], mask=rp, other=0.0)
        state = tl.load(states + head * (P * N) + p[:, None] * N + n[None, :], mask=pn, other=0.0)
        grad_state = tl.load(grad_states + head * (P * N) + p[:, None] * N + n[None, :], mask=pn, other=0.0)
        from_start, to_end = tl.exp2(run), tl.exp2(last - sent)
        if HAS_RESET:
            from_start = tl.where(count == 0, from_start, 0.0)
            to_end = tl.where(count == count_last, to_end, 0.0)
        pairs += _dot(gy, tl.trans(xs), PRECISION) * tl.exp2(tl.minimum(run[:, None] - sent[None, :], 64.0))
        grad_C = _dot((gy.to(tl.float32) * from_start[:, None]).to(x.dtype.element_ty), state, PRECISION, grad_C)
        grad_B = _dot((xs.to(tl.float32) * to_end[:, None]).to(x.dtype.element_ty), grad_state, PRECISION, grad_B)
    pairs = tl.where(meet, pairs, 0.0).to(x.dtype.element_ty)
    Bs = tl.load(B + b * B_b + k * T * B_t + group * B_g + i[:, None] * B_t + n[None, :], mask=rn, other=0.0)
    grad_C = _dot(pairs, Bs, PRECISION, grad_C)
    Cs = tl.load(C + b * C_b + k * T * C_t + group * C_g + i[:, None] * C_t + n[None, :], mask=rn, other=0.0)
    grad_B = _dot(tl.trans(pairs), Cs, PRECISION, grad_B)
    groups = H // R
    partial += (((split * (tl.num_programs(0) // K) + b) * L + k * T) * groups + group) * N
    at = i[:, None] * (groups * N) + n[None, :]
    tl.store(partial + at, grad_B, mask=rn)
    tl.store(partial + part_which + at, grad_C, mask=rn)


@triton.jit
def _finish(
    dt, dt_bias, A, live, step, grad_step, grad_decay, grad_dt, sums, L, H, K, dt_b, dt_t, gdt_b, gdt_t, live_b, sums_which,
    HAS_LIVE: tl.constexpr, T: tl.constexpr, BLOCK_H: tl.constexpr,
):
    """From running log-decays and intervals to dt, A, dt_bias. sums (4, B, K, H): the last log-decay's in, A's and bias's out."""
    bk = tl.program_id(0).to(tl.int64)
    b, k = bk // K, bk % K
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = T - 1 - tl.arange(0, T)  # last step first: an interval moves every running log-decay from its own step on
    t = k * T + i
    head = (h < H)[:, None]
    tile = head & (t < L)[None, :]
    at = (bk * H + h)[:, None] * T + i[None, :]
    change = tl.load(grad_decay + at, mask=head, other=0.0)
    last = tl.load(sums + sums_which + bk * H + h, mask=h < H, other=0.0)
    change = tl.cumsum(change, 1) + last[:, None]
    s = tl.load(step + at, mask=head, other=0.0)
    a = tl.load(A + h, mask=h < H, other=0.0).to(tl.float32)
    v = tl.load(dt + b * dt_b + t[None, :] * dt_t + h[:, None], mask=tile, other=0.0).to(tl.float32)
    v += tl.load(dt_bias + h, mask=h < H, other=0.0).to(tl.float32)[:, None]
    grad = (tl.load(grad_step + at, mask=head, other=0.0) + change * a[:, None]) / (1.0 + tl.exp2(-v * 1.4426950408889634))
    if HAS_LIVE:
        on = tl.load(live + b * live_b + t, mask=t < L, other=0).to(tl.int32)
        grad = tl.where((on != 0)[None, :], grad, 0.0)
    grad = tl.where(tile, grad, 0.0)
    tl.store(grad_dt + b * gdt_b + t[None, :] * gdt_t + h[:, None], grad.to(grad_dt.dtype.element_ty), mask=tile)
    tl.store(sums + 2 * sums_which + bk * H + h, tl.sum(change * s, 1), mask=h < H)
    tl.store(sums + 3 * sums_which + bk * H + h, tl.sum(grad, 1), mask=h < H)
