"""The walk over tokens that the scan's kernels in Gluon share: what a step makes of the states, and what it reads.

A program is one warp, for BD channels of one segment of time. A lane holds N / 4 states of two channels, 4 lanes share these.
Per-token values (dt, dt x, ...) go through shared memory, where the walk reads them by broadcast.
"""
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .gluon_tiles import BD, MMA

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
# The tensor cores drop the low 13 bits of a float32: on average this much of it, a part of 2^-11 * E[1 / mantissa].
DROPPED = gl.constexpr(3.52e-4)
CUT = gl.constexpr(3e38)  # a step so long that nothing is left of the state: exp2(CUT * A) = 0


@gluon.constexpr_function
def state_layout(N):
    """Of states (BD, N)."""
    return gl.BlockedLayout([2, N // 4], [8, 4], [1, 1], [1, 0])


@gluon.constexpr_function
def dense(rank):
    """Row-major shared memory of so many dimensions."""
    return gl.SwizzledSharedLayout(1, 1, 1, list(range(rank))[::-1])


@gluon.jit
def channels_of(block, A, D: gl.constexpr, N: gl.constexpr):
    """The program's first channel; its channels (BD,), where their states (BD, N) lie, and which of both there are; A log2(e)."""
    state: gl.constexpr = state_layout(N)
    d0 = block * BD
    d = d0 + gl.arange(0, BD, layout=gl.SliceLayout(1, state))
    off = gl.expand_dims(d, 1) * N + gl.expand_dims(gl.arange(0, N, layout=gl.SliceLayout(0, state)), 0)
    d_ok, ok2 = d < D, off < D * N
    return d0, d, off, d_ok, ok2, gl.minimum(gl.load(A + off, mask=ok2, other=-1.0) * LOG2E, -1e-30)


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def sigmoid(z):
    return reciprocal(1.0 + exp2(-LOG2E * z))


@gluon.jit
def nonzero(z, Z):
    """z, but for 0, since the backward pass divides by silu(z). No bfloat16 is -1e-30."""
    if Z.dtype.element_ty == gl.bfloat16:
        z += 1e-30
    else:
        z = gl.where(z == 0.0, 1e-30, z)
    return z


@gluon.jit
def _softplus(v, e):
    """log(1 + exp(v)), with e = exp(-|v|) in [0, 1]: log1p by a polynomial fitted on [0, 1], relative error 2e-7."""
    p = 0.005253457929939032 * e - 0.02958850748836994
    p = p * e + 0.07836166769266129
    p = p * e - 0.13674770295619965
    p = p * e + 0.19111430644989014
    p = p * e - 0.24844369292259216
    p = p * e + 0.33319270610809326
    p = p * e - 0.49999502301216125
    p = p * e + 1.0
    return gl.maximum(v, 0.0) + p * e


@gluon.jit
def _flags(base, first, last, rows):
    return gl.load(base + first + rows, mask=first + rows < last, other=0) != 0


@gluon.jit
def steps(
    v, first, last, rows, flags_at, RESET, LIVE, HAS_RESET: gl.constexpr, HAS_LIVE: gl.constexpr, FULL: gl.constexpr
):  # fmt: skip
    """(dt, step of the decay, slope of softplus), (T, BD) each: dt is 0 where a token does not count, and the decay's step is CUT
    where the state before the token is dropped."""
    e = exp2(-LOG2E * gl.abs(v))
    slope = gl.where(v >= 0.0, 1.0, e) * reciprocal(1.0 + e)
    dt = _softplus(v, e)
    if HAS_LIVE or not FULL:
        counts = first + rows < last
        if HAS_LIVE:
            counts = counts & _flags(LIVE + flags_at, first, last, rows)
        dt = gl.where(gl.expand_dims(counts, 1), dt, 0.0)
        slope = gl.where(gl.expand_dims(counts, 1), slope, 0.0)
    decay = dt
    if HAS_RESET:
        decay = gl.where(gl.expand_dims(_flags(RESET + flags_at, first, last, rows), 1), CUT, dt)
    return dt, decay, slope


@gluon.jit
def store_whole(shared, value):
    """value into shared memory of its shape, which may have been laid out otherwise."""
    shared._reinterpret(gl.float32, value.shape, dense(len(value.shape))).store(value)


@gluon.constexpr_function
def _pairs_layout():
    """Two values of each of a lane's two channels, (8, 2, 2): all four together in shared memory, the same for 4 lanes."""
    lanes = [[0, 0, 0], [0, 0, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout([[0, 0, 1], [0, 1, 0]], lanes, [], [], [8, 2, 2])


@gluon.jit
def store_pairs(shared, first, second):
    """Two tiles (T, BD) into shared memory, for `pair`."""
    both = gl.permute(gl.reshape(gl.join(first, second), [first.shape[0], 8, 2, 2]), [0, 1, 3, 2])
    store_whole(shared, both)


@gluon.jit
def pair(shared, t, by_channel: gl.constexpr):
    """The two values of token t that `store_pairs` put side by side, (BD,) each."""
    both = gl.reshape(gl.permute(shared.index(t).load(_pairs_layout()), [0, 2, 1]), [16, 2])
    first, second = gl.split(both)
    return gl.convert_layout(first, by_channel, assert_trivial=True), gl.convert_layout(second, by_channel, assert_trivial=True)


@gluon.jit
def advance(h, a2, decay_t, input_t, b_t):
    """The recurrence: h (BD, N), decay_t and input_t = dt x (BD,), b_t (N,)."""
    return h * exp2(gl.expand_dims(decay_t, 1) * a2) + gl.expand_dims(input_t, 1) * gl.expand_dims(b_t, 0)


@gluon.jit
def prefix(start, A2, LOCAL, SPAN, b, s, S, D, N, d, off, ok, ok2):
    """The state before segment s: what the segments before it leave, from the state `start`."""
    h = start
    for j in range(0, s):
        span = gl.load(SPAN + (b * S + j) * D + d, mask=ok, other=0.0)
        h = h * exp2(A2 * gl.expand_dims(span, 1)) + gl.load(LOCAL + (b * S + j) * D * N + off, mask=ok2, other=0.0)
    return h


@gluon.jit
def suffix(start, A2, LOCAL, SPAN, b, s, S, D, N, d, off, ok, ok2):
    """The gradient of the state after segment s: what the segments behind it ask for, `start` being that of the final state."""
    g = start
    for i in range(0, S - 1 - s):
        j = S - 1 - i
        span = gl.load(SPAN + (b * S + j) * D + d, mask=ok, other=0.0)
        g = g * exp2(A2 * gl.expand_dims(span, 1)) + gl.load(LOCAL + (b * S + j) * D * N + off, mask=ok2, other=0.0)
    return g


@gluon.jit
def _upper(x):
    """x without the bits that the tensor cores drop."""
    return gl.inline_asm_elementwise("and.b32 $0, $1, 0xffffe000;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def in_lane(x, N: gl.constexpr):
    """x (BD, N) summed over the states of a lane: (BD, 4)."""
    return gl.sum(gl.reshape(x, [x.shape[0], 4, N // 4]), 2)


@gluon.jit
def over_lanes(s, first: gl.constexpr, direction: gl.constexpr, total, EXACT: gl.constexpr):
    """Four tokens' (BD, 4), summed over the 4 lanes by a product with ones on the tensor cores, into columns first,
    first + direction, ... of total (BD, 8). EXACT: the bits that they drop are added by a second product."""
    rows = gl.permute(gl.join(gl.join(s[0], s[1]), gl.join(s[2], s[3])), [0, 3, 2, 1])  # (BD, 2, 2, 4): k = 4 token + lane
    rows = gl.permute(gl.reshape(rows, [8, 2, 16]), [1, 0, 2])  # their rows g and g + 8 are a lane's two channels
    left: gl.constexpr = gl.DotOperandLayout(0, MMA, 1)
    right: gl.constexpr = gl.DotOperandLayout(1, MMA, 1)
    rows = gl.convert_layout(gl.reshape(rows, [16, 16]), left)
    token = gl.arange(0, 16, layout=gl.SliceLayout(1, right)) // 4
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, right))
    ones = gl.where(gl.expand_dims(column, 0) == first + direction * gl.expand_dims(token, 1), 1.0, 0.0)
    if EXACT:
        high = _upper(rows)
        total = mma_v2(rows - high, ones, total, input_precision="tf32")
        return mma_v2(high, ones, total, input_precision="tf32")
    return mma_v2(rows, ones * (1.0 + DROPPED), total, input_precision="tf32")


@gluon.jit
def by_token(total):
    """(BD, 8) as `over_lanes` makes it -> (8, BD)."""
    return gl.reshape(gl.permute(gl.reshape(total, [2, 8, 8]), [2, 1, 0]), [8, 16])
