"""Causal convolution in Triton. A program has one warp per walk: STEPS tokens over BLOCK_D channels with the last W-1 tokens in
registers, so that x is read once; forward in time for y, back in time for the gradients, where what a token sends to older
ones waits in registers too. Tokens are loaded CHUNK at a time, before the first of them is needed."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..sums import add_rows

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
CHUNK = tl.constexpr(4)  # divides the tokens of a walk
FILLING_WARPS = 2112  # 16 on each multiprocessor of an H200


@triton.jit
def _place(d_inner, n_segments, WALKS: tl.constexpr, STEPS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Row of the batch, segment, first token (WALKS, 1) of each walk, channels (1, BLOCK_D) and whether they exist."""
    n_blocks = tl.cdiv(d_inner, BLOCK_D)
    block, row = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    start = ((row % n_segments) * WALKS + tl.arange(0, WALKS)[:, None]) * STEPS
    return (row // n_segments).to(tl.int64), row % n_segments, start, d, d < d_inner


@triton.jit
def _taps_and_bias(weight, bias, d, inside, d_inner, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, WIDTH_2: tl.constexpr):
    """The columns of weight (1, BLOCK_D) in float32, read together: one by one they would cost more than x; and the bias."""
    rows, k_all = tl.reshape(d, (BLOCK_D, 1)), tl.arange(0, WIDTH_2)[None, :]
    columns = tl.load(weight + rows * WIDTH + k_all, mask=(rows < d_inner) & (k_all < WIDTH), other=0).to(tl.float32)
    taps = ()
    for k in tl.static_range(WIDTH):
        taps = taps + (tl.sum(tl.where(k_all == k, columns, 0.0), 1)[None, :],)
    return taps, tl.load(bias + d, mask=inside, other=0).to(tl.float32)


@triton.jit
def _token(walk, halo, i, b, start, d, inside, stride, length, d_inner, WIDTH: tl.constexpr):
    """Token start + i of each walk (WALKS, BLOCK_D). Before the row it may be in the halo, past it is 0."""
    t = start + i
    value = tl.load(walk + i * stride, mask=inside & (t >= 0) & (t < length), other=0)
    if halo is not None:
        at = halo + (b * (WIDTH - 1) + WIDTH - 1 + t) * d_inner + d
        value = tl.where(t < 0, tl.load(at, mask=inside & (t < 0) & (t >= 1 - WIDTH), other=0).to(value.dtype), value)
    return value


@triton.jit
def _since(since_reset, t, b, length, RESET: tl.constexpr):
    since = t
    if RESET:
        since = tl.load(since_reset + b * length + t, mask=(t >= 0) & (t < length), other=0)
    return since


@triton.jit
def _chunk(
    walk, since_reset, i, direction: tl.constexpr, b, start, d, inside, stride, length, d_inner, RESET: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """CHUNK tokens i, i + direction, ... of a walk, and the tokens since each one's document began."""
    tokens, since = (), ()
    for j in tl.static_range(CHUNK):
        tokens = tokens + (_token(walk, None, i + direction * j, b, start, d, inside, stride, length, d_inner, WIDTH),)
        since = since + (_since(since_reset, start + i + direction * j, b, length, RESET),)
    return tokens, since


@triton.jit
def _sigmoid(z):
    if INTERPRETED:
        gate = 1 / (1 + tl.exp2(-1.4426950408889634 * z))
    else:  # what `/` and exp2 add for subnormal numbers would be a fifth of all instructions here
        gate = tl.inline_asm_elementwise(
            """{
            .reg .f32 e;
            mul.f32 e, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 e, e;
            add.f32 e, e, 0f3F800000;
            rcp.approx.ftz.f32 $0, e;
            }""", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1,
        )
    return gate


@triton.jit
def _pre_activation(window, taps, bias, since, RESET: tl.constexpr, WIDTH: tl.constexpr):
    """bias + taps . window, the window (x at t, t-1, .. t-W+1) being 0 where it lies in another document."""
    z = bias + taps[0] * window[0]
    for k in tl.static_range(1, WIDTH):
        tap = window[k]
        if RESET:
            tap = tl.where(since >= k, tap, 0.0)
        z += taps[k] * tap
    return z


@triton.jit
def _halo_slot_kept(since_reset, last, b, length, lag):
    """Whether the halo out holds the token `lag` back from the last live one: it is of the same document."""
    kept = lag >= 0
    if since_reset is not None:
        since = tl.load(since_reset + b * length + last - 1, mask=last > 0, other=0)
        kept = kept & ((last == 0) | (since >= lag))
    return kept


@triton.jit
def _conv1d_forward(
    x, weight, bias, since_reset, halo, n_live, y, halo_out, x_b, x_l, length, d_inner, n_segments,
    WIDTH: tl.constexpr, WIDTH_2: tl.constexpr, WALKS: tl.constexpr, STEPS: tl.constexpr, BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr,
):
    b, segment, start, d, inside = _place(d_inner, n_segments, WALKS, STEPS, BLOCK_D)
    taps, bias_d = _taps_and_bias(weight, bias, d, inside, d_inner, BLOCK_D, WIDTH, WIDTH_2)
    RESET: tl.constexpr = since_reset is not None
    walk = x + b * x_b + start.to(tl.int64) * x_l + d
    y_walk = y + (b * length + start) * d_inner + d
    older = ()  # x at t-1, .. t-W+1
    for k in tl.static_range(1, WIDTH):
        older = older + (_token(walk, halo, -k, b, start, d, inside, x_l, length, d_inner, WIDTH).to(tl.float32),)
    if AHEAD:
        new, since = _chunk(walk, since_reset, 0, 1, b, start, d, inside, x_l, length, d_inner, RESET, WIDTH)
    for i in tl.range(0, STEPS, CHUNK, num_stages=1):
        if AHEAD:  # asked for while this chunk is worked on; past the walk's end there is none
            more = inside & (i + CHUNK < STEPS)
            next_new, next_since = _chunk(walk, since_reset, i + CHUNK, 1, b, start, d, more, x_l, length, d_inner, RESET, WIDTH)
        else:
            new, since = _chunk(walk, since_reset, i, 1, b, start, d, inside, x_l, length, d_inner, RESET, WIDTH)
        for j in tl.static_range(CHUNK):
            window = (new[j].to(tl.float32),) + older
            z = _pre_activation(window, taps, bias_d, since[j], RESET, WIDTH)
            tl.store(y_walk + (i + j) * d_inner, (z * _sigmoid(z)).to(y.dtype.element_ty), mask=inside & (start + i + j < length))
            older = window[: WIDTH - 1]
        if AHEAD:
            new, since = next_new, next_since
    if segment == 0:
        last = length if n_live is None else tl.load(n_live + b)
        for lag in tl.static_range(WIDTH - 1):
            at = last - 1 - lag
            kept = inside & _halo_slot_kept(since_reset, last, b, length, lag)
            tail = tl.load(x + b * x_b + at.to(tl.int64) * x_l + d, mask=kept & (at >= 0), other=0)
            if halo is not None:
                before = tl.load(halo + (b * (WIDTH - 1) + WIDTH - 1 + at) * d_inner + d, mask=kept & (at < 0), other=0)
                tail = tl.where(at < 0, before.to(tail.dtype), tail)
            tl.store(halo_out + (b * (WIDTH - 1) + WIDTH - 2 - lag) * d_inner + d, tail, mask=inside)


@triton.jit
def _from_halo_out(grad_halo_out, since_reset, n_live, b, t, d, inside, length, d_inner, WIDTH: tl.constexpr):
    """What reaches x_t through the halo out, if x_t is a slot of it."""
    last = length if n_live is None else tl.load(n_live + b)
    lag = last - 1 - t
    seen = (lag < WIDTH - 1) & _halo_slot_kept(since_reset, last, b, length, lag)
    at = grad_halo_out + (b * (WIDTH - 1) + WIDTH - 2 - lag) * d_inner + d
    return tl.load(at, mask=inside & seen, other=0).to(tl.float32)


@triton.jit
def _step_back(grad_y, x, since, newer, sent, taps, bias, RESET: tl.constexpr, WIDTH: tl.constexpr):
    """One token t of the walk back. x: x_{t-W+1}; newer: x at t, .. t-W+2; sent: what later tokens sent to t, .. t-W+2.

    Returns the gradients of the weight's columns, of the bias and of x_t, then newer and sent for token t-1.
    """
    window = newer + (x.to(tl.float32),)
    z = _pre_activation(window, taps, bias, since, RESET, WIDTH)
    gate = _sigmoid(z)
    g = grad_y.to(tl.float32) * (gate + z * gate * (1 - gate))
    sent = sent + (tl.zeros_like(g),)
    passed, grad_w = (sent[0] + taps[0] * g,), (window[0] * g,)
    for k in tl.static_range(1, WIDTH):
        through = g
        if RESET:
            through = tl.where(since >= k, g, 0.0)
        passed = passed + (sent[k] + taps[k] * through,)
        grad_w = grad_w + (window[k] * through,)
    return grad_w, g, passed[0], window[1:], passed[1:]


@triton.jit
def _old_chunk(x_walk, halo, i, b, start, d, inside, stride, length, d_inner, WIDTH: tl.constexpr):
    """CHUNK tokens i, i - 1, ... of x; they may lie in the halo."""
    tokens = ()
    for j in tl.static_range(CHUNK):
        tokens = tokens + (_token(x_walk, halo, i - j, b, start, d, inside, stride, length, d_inner, WIDTH),)
    return tokens


@triton.jit
def _walk_back(
    gy_walk, x_walk, gx_walk, grad_halo_out, since_reset, halo, n_live, taps, bias, b, start, d, inside,
    gy_l, x_l, gx_l, length, d_inner,
    RESET: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, AHEAD: tl.constexpr,
):
    """Gradients of the weight's columns and of the bias, and what was sent to the tokens before start; stores grad_x."""
    nothing = tl.zeros_like(start).to(tl.float32) + tl.zeros_like(bias)
    newer, sent, grad_w, grad_b = (), (), (nothing,), nothing
    for k in tl.static_range(WIDTH - 1):
        newest = _token(x_walk, halo, STEPS + WIDTH - 2 - k, b, start, d, inside, x_l, length, d_inner, WIDTH)
        newer = newer + (newest.to(tl.float32),)
        sent = sent + (nothing,)
        grad_w = grad_w + (nothing,)
    for k in tl.static_range(WIDTH - 1):  # the first tokens of the next segment send back to this one
        i = STEPS + WIDTH - 2 - k
        _, _, _, newer, sent = _step_back(
            _token(gy_walk, None, i, b, start, d, inside, gy_l, length, d_inner, WIDTH),
            _token(x_walk, halo, i - WIDTH + 1, b, start, d, inside, x_l, length, d_inner, WIDTH),
            _since(since_reset, start + i, b, length, RESET), newer, sent, taps, bias, RESET, WIDTH,
        )
    if AHEAD:
        gy, since = _chunk(gy_walk, since_reset, STEPS - 1, -1, b, start, d, inside, gy_l, length, d_inner, RESET, WIDTH)
        old = _old_chunk(x_walk, halo, STEPS - WIDTH, b, start, d, inside, x_l, length, d_inner, WIDTH)
    for done in tl.range(0, STEPS, CHUNK, num_stages=1):
        at = STEPS - 1 - done
        if AHEAD:
            more = inside & (done + CHUNK < STEPS)
            next_gy, next_since = _chunk(gy_walk, since_reset, at - CHUNK, -1, b, start, d, more, gy_l, length, d_inner, RESET, WIDTH)
            next_old = _old_chunk(x_walk, halo, at - CHUNK - WIDTH + 1, b, start, d, more, x_l, length, d_inner, WIDTH)
        else:
            gy, since = _chunk(gy_walk, since_reset, at, -1, b, start, d, inside, gy_l, length, d_inner, RESET, WIDTH)
            old = _old_chunk(x_walk, halo, at - WIDTH + 1, b, start, d, inside, x_l, length, d_inner, WIDTH)
        for j in tl.static_range(CHUNK):
            i = STEPS - 1 - done - j
            grad_taps, g, grad_here, newer, sent = _step_back(gy[j], old[j], since[j], newer, sent, taps, bias, RESET, WIDTH)
            grad_b += g
            sums = ()
            for k in tl.static_range(WIDTH):
                sums = sums + (grad_w[k] + grad_taps[k],)
            grad_w = sums
            if grad_halo_out is not None:
                grad_here += _from_halo_out(
                    grad_halo_out, since_reset, n_live, b, start + i, d, inside, length, d_inner, WIDTH
                )
            tl.store(gx_walk + i * gx_l, grad_here.to(gx_walk.dtype.element_ty), mask=inside & (start + i < length))
        if AHEAD:
            gy, old, since = next_gy, next_old, next_since
    return grad_w, grad_b, sent


@triton.jit
def _conv1d_backward(
    grad_y, grad_halo_out, x, weight, bias, since_reset, halo, n_live, grad_x, grad_halo, partial,
    gy_b, gy_l, x_b, x_l, gx_b, gx_l, length, d_inner, n_segments,
    WIDTH: tl.constexpr, WIDTH_2: tl.constexpr, WALKS: tl.constexpr, STEPS: tl.constexpr, BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr,
):
    b, segment, start, d, inside = _place(d_inner, n_segments, WALKS, STEPS, BLOCK_D)
    taps, bias_d = _taps_and_bias(weight, bias, d, inside, d_inner, BLOCK_D, WIDTH, WIDTH_2)
    x_walk = x + b * x_b + start.to(tl.int64) * x_l + d
    gy_walk = grad_y + b * gy_b + start.to(tl.int64) * gy_l + d
    gx_walk = grad_x + b * gx_b + start.to(tl.int64) * gx_l + d
    if since_reset is None:
        grad_w, grad_b, sent = _walk_back(
            gy_walk, x_walk, gx_walk, grad_halo_out, since_reset, halo, n_live, taps, bias_d, b, start, d, inside,
            gy_l, x_l, gx_l, length, d_inner, False, WIDTH, STEPS, AHEAD,
        )
    else:  # most segments lie inside one document and need no masks
        t = segment * WALKS * STEPS + tl.arange(0, WALKS * STEPS)
        least = tl.load(since_reset + b * length + t, mask=t < length, other=WIDTH)
        t += WIDTH - 1
        least = tl.minimum(least, tl.load(since_reset + b * length + t, mask=t < length, other=WIDTH))
        if tl.min(least, 0) >= WIDTH - 1:
            grad_w, grad_b, sent = _walk_back(
                gy_walk, x_walk, gx_walk, grad_halo_out, since_reset, halo, n_live, taps, bias_d, b, start, d, inside,
                gy_l, x_l, gx_l, length, d_inner, False, WIDTH, STEPS, AHEAD,
            )
        else:
            grad_w, grad_b, sent = _walk_back(
                gy_walk, x_walk, gx_walk, grad_halo_out, since_reset, halo, n_live, taps, bias_d, b, start, d, inside,
                gy_l, x_l, gx_l, length, d_inner, True, WIDTH, STEPS, AHEAD,
            )
    if grad_halo is not None:
        for k in tl.static_range(WIDTH - 1):
            to_halo = sent[k]
            if grad_halo_out is not None:
                to_halo += _from_halo_out(grad_halo_out, since_reset, n_live, b, start - 1 - k, d, inside, length, d_inner, WIDTH)
            at = grad_halo + (b * (WIDTH - 1) + WIDTH - 2 - k) * d_inner + d + start * 0
            tl.store(at, to_halo.to(grad_halo.dtype.element_ty), mask=inside & (start == 0))
    partial += (b * n_segments + segment) * (WIDTH + 1) * d_inner
    for k in tl.static_range(WIDTH):
        tl.store(partial + d * WIDTH + k, tl.sum(grad_w[k], 0, keep_dims=True), mask=inside)
    tl.store(partial + WIDTH * d_inner + d, tl.sum(grad_b, 0, keep_dims=True), mask=inside)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _launch(x: Tensor, width: int, walks: int, block: int | None, steps: int | None, longest: int) -> tuple[int, int, dict]:
    """Segments of a sequence, programs, and the constants of both kernels."""
    batch, length, d_inner = x.shape
    block = min(triton.next_power_of_2(d_inner), block or 512 // x.element_size())  # 16 bytes a lane
    blocks = triton.cdiv(d_inner, block)
    if steps is None:  # long walks repeat fewer tokens at their ends, short ones make enough programs to fill a device
        steps = longest
        while steps > 8 and batch * blocks * triton.cdiv(length, steps) < FILLING_WARPS:
            steps //= 2
    segments = max(triton.cdiv(length, walks * steps), 1)  # a sequence of no tokens still has a halo out
    constants = dict(WIDTH=width, WIDTH_2=triton.next_power_of_2(width), WALKS=walks, STEPS=steps, BLOCK_D=block, num_warps=walks)
    return segments, batch * segments * blocks, constants


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, since_reset: Tensor | None = None, halo: Tensor | None = None,
    n_live: Tensor | None = None, *, walks: int = 1, block: int | None = 128, steps: int | None = None,
    registers: int | None = 64, ahead: bool = False,
) -> tuple[Tensor, Tensor]:
    """y and the halo out as `causal_conv1d` returns them, without autograd. x may be strided, its last dimension dense.

    A program walks `walks` stretches of `steps` tokens, powers of two, over `block` channels. ahead: it loads one chunk ahead,
    into registers; registers: at most these per thread, so that more warps fit.
    """
    x = _rows(x)
    weight, bias, since_reset, halo, n_live = _dense(weight, bias, since_reset, halo, n_live)
    batch, length, d_inner = x.shape
    width = weight.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    halo_out = torch.empty(batch, width - 1, d_inner, dtype=x.dtype, device=x.device)
    segments, programs, constants = _launch(x, width, walks, block, steps, longest=32)
    launch(
        _conv1d_forward, (programs,),
        x, weight, bias, since_reset, halo, n_live, y, halo_out, x.stride(0), x.stride(1), length, d_inner, segments,
        AHEAD=ahead, maxnreg=registers, **constants,
    )
    return y, halo_out


def backward(
    grad_y: Tensor, grad_halo_out: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor,
    since_reset: Tensor | None = None, halo: Tensor | None = None, n_live: Tensor | None = None, out: Tensor | None = None,
    *, walks: int = 1, block: int | None = 128, steps: int | None = None, registers: int | None = 128,
    ahead: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients to x, weight, bias and halo (None if there is none) of the gradients to the two outputs of `forward`.

    grad_halo_out may be None. x, grad_y and out (B, L, D) may be strided, their last dimension dense; grad_x is written to
    out if given. walks, block, steps, registers, ahead as in `forward`.
    """
    x, grad_y = _rows(x), _rows(grad_y)
    weight, bias, since_reset, halo, n_live, grad_halo_out = _dense(weight, bias, since_reset, halo, n_live, grad_halo_out)
    batch, length, d_inner = x.shape
    width = weight.shape[1]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    grad_halo = None if halo is None else torch.empty_like(halo)
    segments, programs, constants = _launch(x, width, walks, block, steps, longest=64)
    partial = torch.empty(batch * segments, (width + 1) * d_inner, dtype=torch.float32, device=x.device)
    launch(
        _conv1d_backward, (programs,),
        grad_y, grad_halo_out, x, weight, bias, since_reset, halo, n_live, grad_x, grad_halo, partial,
        grad_y.stride(0), grad_y.stride(1), x.stride(0), x.stride(1), grad_x.stride(0), grad_x.stride(1),
        length, d_inner, segments, AHEAD=ahead, maxnreg=registers, **constants,
    )
    sums = add_rows(partial)
    grad_weight, grad_bias = sums[: width * d_inner].view(d_inner, width), sums[width * d_inner :]
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), grad_halo


def backward_of_sum(
    grad_y: Tensor, rows: Tensor, matrix: Tensor, grad_halo_out: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor,
    since_reset: Tensor | None = None, halo: Tensor | None = None, n_live: Tensor | None = None, out: Tensor | None = None,
    *, steps: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`backward` where what reaches y is grad_y + rows matrix; rows (B, L, K), matrix (K, D), in x's dtype. grad_y, a buffer of the
    caller's with even strides between tokens, may be overwritten.

    Where the kernel of `gluon.py` runs the sum is formed inside it, and neither written nor read. steps: as in `backward`.
    """
    if not _forms_sum(grad_y, rows, matrix, grad_halo_out, x, weight, halo, out):
        grad_y.flatten(0, 1).addmm_(rows.flatten(0, 1), matrix)
        return backward(grad_y, grad_halo_out, x, weight, bias, since_reset, halo, n_live, out)
    from . import gluon

    batch, length, d_inner = x.shape
    weight, bias, since_reset = _dense(weight, bias, since_reset)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if steps is None:
        steps = 128
        while steps > 16 and batch * triton.cdiv(d_inner, 64) * triton.cdiv(length, 4 * steps) < FILLING_WARPS // 4:
            steps //= 2
    segments = triton.cdiv(length, 4 * steps)
    partial = torch.empty(4 * batch * segments, 5 * d_inner, dtype=torch.float32, device=x.device)
    launch(
        gluon.conv_backward, (batch * segments * triton.cdiv(d_inner, 64),),
        grad_y, rows, matrix, x, weight, bias, since_reset, grad_x, partial, length, segments,
        grad_y.stride(0), rows.stride(0), x.stride(0), grad_x.stride(0),
        D=d_inner, K=rows.shape[2], g_l=grad_y.stride(1), p_l=rows.stride(1), x_l=x.stride(1), o_l=grad_x.stride(1), STEPS=steps,
        HAS_RESET=since_reset is not None, FULL=d_inner % 64 == 0 and length % (4 * steps) == 0, num_warps=4, maxnreg=168,
    )
    sums = add_rows(partial)
    return grad_x, sums[: 4 * d_inner].view(d_inner, 4).to(weight.dtype), sums[4 * d_inner :].to(bias.dtype), None


def _forms_sum(grad_y, rows, matrix, grad_halo_out, x, weight, halo, out) -> bool:
    """Whether `gluon.py` has the kernel: for Hopper's tensor cores, bfloat16 two at a time, and no halo on either side."""
    tensors = [grad_y, rows, x] if out is None else [grad_y, rows, x, out]
    return (
        x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] == 9
        and halo is None and grad_halo_out is None and x.numel() > 0
        and all(v.dtype == torch.bfloat16 for v in (*tensors, matrix))
        and weight.shape[1] == 4 and x.shape[2] % 8 == 0 and rows.shape[2] % 32 == 0 and matrix.is_contiguous()
        and all(v.stride(2) == 1 and v.stride(0) % 2 == v.stride(1) % 2 == v.data_ptr() % 4 == 0 for v in tensors)
    )  # fmt: skip


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, since_reset, halo, n_live):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, since_reset, halo, n_live)
        return forward(x, weight, bias, since_reset, halo, n_live)

    @staticmethod
    def backward(ctx, grad_y, grad_halo_out):
        x = ctx.saved_tensors[0]
        if grad_y is None:
            grad_y = torch.zeros_like(x)
        grad_x, grad_weight, grad_bias, grad_halo = backward(grad_y, grad_halo_out, *ctx.saved_tensors)
        return grad_x, grad_weight, grad_bias, None, grad_halo, None


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, since_reset: Tensor | None = None, halo: Tensor | None = None,
    n_live: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """silu(bias + sum_k weight[:, k] x_{t-k}), and the halo that continues it. Differentiable in x, weight, bias and halo.

    x (B, L, D) float32, bfloat16 or float16, may be strided, its last dimension dense; weight (D, W), tap 0 is the newest
    token; bias (D,). since_reset (B, L) int: tokens since the document of each token began; taps reaching further back read 0.
    halo (B, W-1, D): the tokens before x, oldest first (zeros if None). n_live (B,) int: tokens in use at the front of each
    row (all, if None); the halo out holds the last of those.
    Returns y (B, L, D) in x's dtype and the halo out (B, W-1, D), zero before the start of the last token's document.
    """
    return _CausalConv1d.apply(x, weight, bias, since_reset, halo, n_live)
