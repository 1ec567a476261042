"""The selective scan in Gluon, Triton's lower-level language: one warp walks time with its states in registers.

Legend: B batch, L tokens, D channels, N states, T tokens of a tile, S segments of time, BD channels of a program.
A tile's inputs come from global memory as vectors, a tile ahead; per-token values (dt, dt x, ...) go through shared memory, where the
walk reads them by broadcast. Nothing but the states is carried from token to token. `triton.py` holds the host side and a
plain-Triton twin.
"""
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
# The tensor cores drop the low 13 bits of a float32: on average this much of it, a part of 2^-11 * E[1 / mantissa].
DROPPED = gl.constexpr(3.52e-4)
CUT = gl.constexpr(3e38)  # a step so long that nothing is left of the state: exp2(CUT * A) = 0


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _upper(x):
    """x without the bits that the tensor cores drop."""
    return gl.inline_asm_elementwise("and.b32 $0, $1, 0xffffe000;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


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
def _pointers(base, first, stride, rows, cols):
    """To rows first..first+T of a token-major matrix: computed once, then moved by T * stride from tile to tile."""
    return base + first.to(gl.int64) * stride + (gl.expand_dims(rows, 1) * stride + gl.expand_dims(cols, 0))


@gluon.jit
def _inside(rows, first, last, col_ok, FULL: gl.constexpr):
    """(T, BD) or (T, 1): what of the tile at token `first` lies in the segment."""
    ok = gl.expand_dims(first + rows < last, 1)
    if not FULL:
        ok = ok & gl.expand_dims(col_ok, 0)
    return ok


@gluon.jit
def _tile(base, first, last, stride, rows, cols, col_ok, FULL: gl.constexpr):
    """Rows first..first+T of a token-major matrix, 0 outside the segment."""
    p = gl.expand_dims(base + cols, 0) + gl.expand_dims(first + rows, 1).to(gl.int64) * stride
    return gl.load(p, mask=_inside(rows, first, last, col_ok, FULL), other=0.0)


@gluon.jit
def _fetch_tile(base, first, last, stride, T: gl.constexpr):
    """Ask for a tile's lines in the L2 cache, to be loaded later."""
    row = gl.minimum(first + gl.arange(0, T, layout=gl.BlockedLayout([1], [32], [1], [0])), last - 1)
    p = (base + row.to(gl.int64) * stride).to(gl.int64, bitcast=True)
    gl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [p], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _store_tile(base, first, last, stride, rows, cols, col_ok, FULL: gl.constexpr, value):
    p = gl.expand_dims(base + cols, 0) + gl.expand_dims(first + rows, 1).to(gl.int64) * stride
    gl.store(p, value.to(base.dtype.element_ty), mask=_inside(rows, first, last, col_ok, FULL))


@gluon.jit
def _flags(base, first, last, rows):
    return gl.load(base + first + rows, mask=first + rows < last, other=0) != 0


@gluon.jit
def _steps(dt_raw, bias, first, last, rows, flags_at, RESET, LIVE, HAS_RESET: gl.constexpr, HAS_LIVE: gl.constexpr):
    """(dt, step of the decay, slope of softplus), (T, BD) each: dt is 0 where a token does not count, and the decay's step is CUT
    where the state before the token is dropped."""
    v = dt_raw.to(gl.float32) + gl.expand_dims(bias, 0)
    e = _exp2(-LOG2E * gl.abs(v))
    slope = gl.where(v >= 0.0, 1.0, e) * _reciprocal(1.0 + e)
    counts = first + rows < last
    if HAS_LIVE:
        counts = counts & _flags(LIVE + flags_at, first, last, rows)
    dt = gl.where(gl.expand_dims(counts, 1), _softplus(v, e), 0.0)
    slope = gl.where(gl.expand_dims(counts, 1), slope, 0.0)
    decay = dt
    if HAS_RESET:
        decay = gl.where(gl.expand_dims(_flags(RESET + flags_at, first, last, rows), 1), CUT, dt)
    return dt, decay, slope


@gluon.jit
def _advance(h, a2, decay_t, input_t, b_t):
    """The recurrence: h (BD, N), decay_t and input_t = dt x (BD,), b_t (N,)."""
    return h * _exp2(gl.expand_dims(decay_t, 1) * a2) + gl.expand_dims(input_t, 1) * gl.expand_dims(b_t, 0)


@gluon.jit
def _prefix(start, A2, LOCAL, SPAN, b, s, S, D, N, d, off, ok, ok2):
    """The state before segment s: what the segments before it leave, from the state `start`."""
    h = start
    for j in range(0, s):
        span = gl.load(SPAN + (b * S + j) * D + d, mask=ok, other=0.0)
        h = h * _exp2(A2 * gl.expand_dims(span, 1)) + gl.load(LOCAL + (b * S + j) * D * N + off, mask=ok2, other=0.0)
    return h


@gluon.jit
def _suffix(start, A2, LOCAL, SPAN, b, s, S, D, N, d, off, ok, ok2):
    """The gradient of the state after segment s: what the segments behind it ask for, `start` being that of the final state."""
    g = start
    for i in range(0, S - 1 - s):
        j = S - 1 - i
        span = gl.load(SPAN + (b * S + j) * D + d, mask=ok, other=0.0)
        g = g * _exp2(A2 * gl.expand_dims(span, 1)) + gl.load(LOCAL + (b * S + j) * D * N + off, mask=ok2, other=0.0)
    return g


@gluon.jit
def _in_lane(x, N: gl.constexpr):
    """x (BD, N) summed over the states of a lane: (BD, 4)."""
    return gl.sum(gl.reshape(x, [x.shape[0], 4, N // 4]), 2)


@gluon.jit
def _over_lanes(s, first: gl.constexpr, direction: gl.constexpr, total, M: gl.constexpr, EXACT: gl.constexpr):
    """Four tokens' (BD, 4), summed over the 4 lanes by a product with ones on the tensor cores, into columns first,
    first + direction, ... of total (BD, 8). EXACT: the bits that they drop are added by a second product."""
    rows = gl.permute(gl.join(gl.join(s[0], s[1]), gl.join(s[2], s[3])), [0, 3, 2, 1])  # (BD, 2, 2, 4): k = 4 token + lane
    rows = gl.permute(gl.reshape(rows, [8, 2, 16]), [1, 0, 2])  # their rows g and g + 8 are a lane's two channels
    left: gl.constexpr = gl.DotOperandLayout(0, M, 1)
    right: gl.constexpr = gl.DotOperandLayout(1, M, 1)
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
def _by_token(total):
    """(BD, 8) as `_over_lanes` makes it -> (8, BD)."""
    return gl.reshape(gl.permute(gl.reshape(total, [2, 8, 8]), [2, 1, 0]), [8, 16])


@gluon.jit
def scan_forward(
    X, DT, Z, Bm, C, A, BIAS, SKIP, H0, LOCAL, SPAN, RESET, LIVE, Y, STATES, FINAL,
    L, D, S, SEGMENT, sx_b, sx_t, sd_b, sd_t, sz_b, sz_t, sb_b, sb_t, sc_b, sc_t,
    N: gl.constexpr, T: gl.constexpr, KEEP: gl.constexpr, LOCAL_PASS: gl.constexpr, EXACT: gl.constexpr,
    HAS_H0: gl.constexpr, HAS_RESET: gl.constexpr, HAS_LIVE: gl.constexpr, FULL: gl.constexpr,
):  # fmt: skip
    """One segment of BD = 16 channels: a lane holds N / 4 states of two channels, 4 lanes share them.

    LOCAL_PASS: only the state the segment leaves when it starts from 0, and the sum of its steps. EXACT: see `_over_lanes`. FULL: D divides by BD.
    """
    BD: gl.constexpr = 16
    state: gl.constexpr = gl.BlockedLayout([2, N // 4], [8, 4], [1, 1], [1, 0])
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    by_channel: gl.constexpr = gl.SliceLayout(1, state)
    by_state: gl.constexpr = gl.SliceLayout(0, state)
    tile: gl.constexpr = gl.BlockedLayout([1, 4], [128 // BD, BD // 4], [1, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 4], [128 // N, N // 4], [1, 1], [1, 0])
    by_token: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    whole: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

    d0 = gl.program_id(0) * BD
    b = gl.program_id(1).to(gl.int64)
    s = gl.program_id(2)
    d = d0 + gl.arange(0, BD, layout=by_channel)
    off = gl.expand_dims(d, 1) * N + gl.expand_dims(gl.arange(0, N, layout=by_state), 0)
    d_ok, ok2 = d < D, off < D * N
    a2 = gl.minimum(gl.load(A + off, mask=ok2, other=-1.0) * LOG2E, -1e-30)
    rows, cols = gl.arange(0, T, layout=gl.SliceLayout(1, tile)), gl.arange(0, BD, layout=gl.SliceLayout(0, tile))
    brows, bcols = gl.arange(0, T, layout=gl.SliceLayout(1, narrow)), gl.arange(0, N, layout=gl.SliceLayout(0, narrow))
    col_ok = d0 + cols < D
    bias = gl.load(BIAS + d0 + cols, mask=col_ok, other=0.0)
    skip = gl.load(SKIP + d0 + cols, mask=col_ok, other=0.0)

    h = gl.full([BD, N], 0.0, gl.float32, state)
    if not LOCAL_PASS:
        if HAS_H0:
            h = gl.load(H0 + b * D * N + off, mask=ok2, other=0.0)
        h = _prefix(h, a2, LOCAL, SPAN, b, s, S, D, N, d, off, d_ok, ok2)
    span = gl.full([BD], 0.0, gl.float32, by_channel)

    decay_s = gl.allocate_shared_memory(gl.float32, [T, BD], by_token)
    input_s = gl.allocate_shared_memory(gl.float32, [T, BD], by_token)
    y_s = gl.allocate_shared_memory(gl.float32, [T, BD], by_token)
    b_s = gl.allocate_shared_memory(gl.float32, [T, N], by_token)
    c_s = gl.allocate_shared_memory(gl.float32, [T, N], by_token)

    first = s * SEGMENT
    last = gl.minimum(first + SEGMENT, L)
    x_p = _pointers(X + b * sx_b + d0, first, sx_t, rows, cols)
    dt_p = _pointers(DT + b * sd_b + d0, first, sd_t, rows, cols)
    z_p = _pointers(Z + b * sz_b + d0, first, sz_t, rows, cols)
    b_p = _pointers(Bm + b * sb_b, first, sb_t, brows, bcols)
    c_p = _pointers(C + b * sc_b, first, sc_t, brows, bcols)
    y_p = _pointers(Y + b * L * D + d0, first, D, rows, cols)
    states_p = STATES + (b * ((L + KEEP - 1) // KEEP) + first // KEEP) * D * N + off
    flags_at = b * L

    ok, b_ok = _inside(rows, first, last, col_ok, FULL), gl.expand_dims(first + brows < last, 1)
    x_next, dt_next = gl.load(x_p, mask=ok, other=0.0), gl.load(dt_p, mask=ok, other=0.0)
    b_next = gl.load(b_p, mask=b_ok, other=0.0)
    if not LOCAL_PASS:
        z_next, c_next = gl.load(z_p, mask=ok, other=0.0), gl.load(c_p, mask=b_ok, other=0.0)
    for t0 in range(first, last, T):
        x = x_next.to(gl.float32)
        dt, decay, _ = _steps(dt_next, bias, t0, last, rows, flags_at, RESET, LIVE, HAS_RESET, HAS_LIVE)
        decay_s._reinterpret(gl.float32, [T, BD], whole).store(decay)
        input_s._reinterpret(gl.float32, [T, BD], whole).store(dt * x)
        b_s._reinterpret(gl.float32, [T, N], whole).store(b_next.to(gl.float32))
        if not LOCAL_PASS:
            z = z_next.to(gl.float32)
            c_s._reinterpret(gl.float32, [T, N], whole).store(c_next.to(gl.float32))
        # The next tile is on its way while this one is walked.
        out_ok = ok
        ok, b_ok = _inside(rows, t0 + T, last, col_ok, FULL), gl.expand_dims(t0 + T + brows < last, 1)
        x_p += T * sx_t
        dt_p += T * sd_t
        b_p += T * sb_t
        x_next, dt_next = gl.load(x_p, mask=ok, other=0.0), gl.load(dt_p, mask=ok, other=0.0)
        b_next = gl.load(b_p, mask=b_ok, other=0.0)
        if not LOCAL_PASS:
            z_p += T * sz_t
            c_p += T * sc_t
            z_next, c_next = gl.load(z_p, mask=ok, other=0.0), gl.load(c_p, mask=b_ok, other=0.0)
            if t0 % KEEP == 0:
                gl.store(states_p, h, mask=ok2)
                states_p += D * N
        for t1 in range(0, T, 8):
            sums = gl.full([16, 8], 0.0, gl.float32, mma)
            for half in gl.static_range(2):
                ys = ()
                for u in gl.static_range(4):
                    t = t1 + 4 * half + u
                    decay_t, input_t = decay_s.index(t).load(by_channel), input_s.index(t).load(by_channel)
                    h = _advance(h, a2, decay_t, input_t, b_s.index(t).load(by_state))
                    if LOCAL_PASS:
                        span += decay_t
                    else:
                        ys = ys + (_in_lane(h * gl.expand_dims(c_s.index(t).load(by_state), 0), N),)
                if not LOCAL_PASS:
                    sums = _over_lanes(ys, 4 * half, 1, sums, mma, EXACT)
            if not LOCAL_PASS:
                y_s._reinterpret(gl.float32, [T // 8, 8, BD], whole).index(t1 // 8).store(_by_token(sums))
        if not LOCAL_PASS:
            y = y_s._reinterpret(gl.float32, [T, BD], whole).load(tile) + gl.expand_dims(skip, 0) * x
            z = gl.where(z == 0.0, 1e-30, z)  # the backward pass divides by silu(z)
            y = y * (z * _reciprocal(1.0 + _exp2(-LOG2E * z)))
            gl.store(y_p, y.to(Y.dtype.element_ty), mask=out_ok)
            y_p += T * D
    if LOCAL_PASS:
        gl.store(LOCAL + (b * S + s) * D * N + off, h, mask=ok2)
        gl.store(SPAN + (b * S + s) * D + d, span, mask=d_ok)
    else:
        if s == S - 1:
            gl.store(FINAL + b * D * N + off, h, mask=ok2)


@gluon.jit
def scan_gradient_state(
    DT, Z, C, DY, A, BIAS, RESET, LIVE, LOCAL, SPAN,
    L, D, S, SEGMENT, sd_b, sd_t, sz_b, sz_t, sc_b, sc_t, sy_b, sy_t,
    N: gl.constexpr, T: gl.constexpr, U: gl.constexpr, FIRST: gl.constexpr, HAS_RESET: gl.constexpr, HAS_LIVE: gl.constexpr,
    FULL: gl.constexpr,
):  # fmt: skip
    """The gradient a segment hands to the state before it when it gets none from behind, and the sum of its steps; of segments
    FIRST and on."""
    BD: gl.constexpr = 16
    state: gl.constexpr = gl.BlockedLayout([2, N // 4], [8, 4], [1, 1], [1, 0])
    by_channel: gl.constexpr = gl.SliceLayout(1, state)
    by_state: gl.constexpr = gl.SliceLayout(0, state)
    tile: gl.constexpr = gl.BlockedLayout([1, 4], [128 // BD, BD // 4], [1, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 4], [128 // N, N // 4], [1, 1], [1, 0])
    by_token: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    whole: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

    d0 = gl.program_id(0) * BD
    b = gl.program_id(1).to(gl.int64)
    s = gl.program_id(2) + FIRST
    d = d0 + gl.arange(0, BD, layout=by_channel)
    off = gl.expand_dims(d, 1) * N + gl.expand_dims(gl.arange(0, N, layout=by_state), 0)
    d_ok, ok2 = d < D, off < D * N
    a2 = gl.minimum(gl.load(A + off, mask=ok2, other=-1.0) * LOG2E, -1e-30)
    rows, cols = gl.arange(0, T, layout=gl.SliceLayout(1, tile)), gl.arange(0, BD, layout=gl.SliceLayout(0, tile))
    brows, bcols = gl.arange(0, T, layout=gl.SliceLayout(1, narrow)), gl.arange(0, N, layout=gl.SliceLayout(0, narrow))
    col_ok = d0 + cols < D
    bias = gl.load(BIAS + d0 + cols, mask=col_ok, other=0.0)

    decay_s = gl.allocate_shared_memory(gl.float32, [T, BD], by_token)
    dy_s = gl.allocate_shared_memory(gl.float32, [T, BD], by_token)
    c_s = gl.allocate_shared_memory(gl.float32, [T, N], by_token)
    carry = gl.full([BD, N], 0.0, gl.float32, state)
    span = gl.full([BD], 0.0, gl.float32, by_channel)

    first = s * SEGMENT
    last = gl.minimum(first + SEGMENT, L)
    tiles = (last - first + T - 1) // T
    t0 = first + (tiles - 1) * T
    dt_p = _pointers(DT + b * sd_b + d0, t0, sd_t, rows, cols)
    z_p = _pointers(Z + b * sz_b + d0, t0, sz_t, rows, cols)
    dy_p = _pointers(DY + b * sy_b + d0, t0, sy_t, rows, cols)
    c_p = _pointers(C + b * sc_b, t0, sc_t, brows, bcols)
    flags_at = b * L
    ok, c_ok = _inside(rows, t0, last, col_ok, FULL), gl.expand_dims(t0 + brows < last, 1)
    dt_next, z_next = gl.load(dt_p, mask=ok, other=0.0), gl.load(z_p, mask=ok, other=0.0)
    dy_next, c_next = gl.load(dy_p, mask=ok, other=0.0), gl.load(c_p, mask=c_ok, other=0.0)
    for i in range(0, tiles):
        t0 = first + (tiles - 1 - i) * T
        _, decay, _ = _steps(dt_next, bias, t0, last, rows, flags_at, RESET, LIVE, HAS_RESET, HAS_LIVE)
        z = z_next.to(gl.float32)
        decay_s._reinterpret(gl.float32, [T, BD], whole).store(decay)
        dy_s._reinterpret(gl.float32, [T, BD], whole).store(dy_next.to(gl.float32) * z * _reciprocal(1.0 + _exp2(-LOG2E * z)))
        c_s._reinterpret(gl.float32, [T, N], whole).store(c_next.to(gl.float32))
        ok, c_ok = _inside(rows, t0 - T, last, col_ok, FULL), gl.expand_dims(t0 - T + brows < last, 1)
        ok, c_ok = ok & (i + 1 < tiles), c_ok & (i + 1 < tiles)
        dt_p -= T * sd_t
        z_p -= T * sz_t
        dy_p -= T * sy_t
        c_p -= T * sc_t
        dt_next, z_next = gl.load(dt_p, mask=ok, other=0.0), gl.load(z_p, mask=ok, other=0.0)
        dy_next, c_next = gl.load(dy_p, mask=ok, other=0.0), gl.load(c_p, mask=c_ok, other=0.0)
        for t1 in range(0, T, U):
            for u in gl.static_range(U):
                t = T - 1 - t1 - u
                decay_t = decay_s.index(t).load(by_channel)
                asked = gl.expand_dims(dy_s.index(t).load(by_channel), 1) * gl.expand_dims(c_s.index(t).load(by_state), 0)
                span += decay_t
                carry = (carry + asked) * _exp2(gl.expand_dims(decay_t, 1) * a2)
    gl.store(LOCAL + (b * S + s) * D * N + off, carry, mask=ok2)
    gl.store(SPAN + (b * S + s) * D + d, span, mask=d_ok)


@gluon.constexpr_function
def _states_layout(N):
    """Where shared memory has state n of channel d of a token, (BD, N), in `scan_backward`: the channels of a lane lie apart and
    those of neighbouring lanes together, so that 8 lanes read 128 bytes in a row."""
    return gl.SharedLinearLayout([[0, b] for b in _bits(N)] + [[2 * b, 0] for b in _bits(8)] + [[1, 0]])


@gluon.constexpr_function
def _parts_layout(N):
    """Where it has lane g's part of the gradients of B (q = 0) and C (q = 1), (4 tokens, g, q, n): q is flipped for every other g, so
    that 8 lanes write 128 bytes without two meeting in a bank."""
    token = [[0, 0, 0, b] for b in _bits(N)] + [[0, 0, 1, 0], [0, 1, 1, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
    return gl.SharedLinearLayout(token + [[1, 0, 0, 0], [2, 0, 0, 0]])


@gluon.constexpr_function
def _bits(count):
    return [1 << i for i in range(count.bit_length() - 1)]


@gluon.jit
def scan_backward(
    X, DT, Z, Bm, C, DY, OUT, A, BIAS, SKIP, RESET, LIVE, STATES, DFINAL, LOCAL, SPAN,
    DX, DDT, DZ, DBC, DA, DVEC, DH0,
    L, D, S, SEGMENT, n_batch, sx_b, sx_t, sd_b, sd_t, sz_b, sz_t, sb_b, sb_t, sc_b, sc_t, sy_b, sy_t, sdx_b, sdx_t, sdd_b, sdd_t,
    sdz_b, sdz_t,
    N: gl.constexpr, T: gl.constexpr, HAS_FINAL: gl.constexpr, HAS_RESET: gl.constexpr, HAS_LIVE: gl.constexpr, FULL: gl.constexpr,
):  # fmt: skip
    """One segment of BD = 16 channels, laid out as in `scan_forward`, from its end to its beginning, a tile of T tokens at a time.

    From the state kept before the tile the states before every fourth token are computed into shared memory. Then, from the last
    four tokens to the first: their states and decays again, into registers, and the walk back over them. DBC (D / BD, B, L, 2, N),
    DA (B S, D, N) and DVEC (B S, 2, D) get this program's parts of the gradients of B and C, of A, and of dt_bias and D.
    """
    BD: gl.constexpr = 16
    state: gl.constexpr = gl.BlockedLayout([2, N // 4], [8, 4], [1, 1], [1, 0])
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    by_channel: gl.constexpr = gl.SliceLayout(1, state)
    by_state: gl.constexpr = gl.SliceLayout(0, state)
    tile: gl.constexpr = gl.BlockedLayout([1, 4], [128 // BD, BD // 4], [1, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 4], [128 // N, N // 4], [1, 1], [1, 0])
    folded: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, 1, 4], [1, 8, 4], [1, 1, 1], [2, 1, 0]))  # tile, every 8th row summed
    by_token: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    whole: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    parts_l: gl.constexpr = gl.BlockedLayout([1, 8, 1, N // 4], [4, 1, 2, 4], [1, 1, 1, 1], [3, 2, 1, 0])

    d0 = gl.program_id(0) * BD
    b = gl.program_id(1).to(gl.int64)
    s = gl.program_id(2)
    d = d0 + gl.arange(0, BD, layout=by_channel)
    off = gl.expand_dims(d, 1) * N + gl.expand_dims(gl.arange(0, N, layout=by_state), 0)
    d_ok, ok2 = d < D, off < D * N
    a2 = gl.minimum(gl.load(A + off, mask=ok2, other=-1.0) * LOG2E, -1e-30)
    rows, cols = gl.arange(0, T, layout=gl.SliceLayout(1, tile)), gl.arange(0, BD, layout=gl.SliceLayout(0, tile))
    brows, bcols = gl.arange(0, T, layout=gl.SliceLayout(1, narrow)), gl.arange(0, N, layout=gl.SliceLayout(0, narrow))
    col_ok = d0 + cols < D
    bias = gl.load(BIAS + d0 + cols, mask=col_ok, other=0.0)
    skip = gl.load(SKIP + d0 + cols, mask=col_ok, other=0.0)

    states_s = gl.allocate_shared_memory(gl.float32, [T // 4, BD, N], _states_layout(N))
    parts_s = gl.allocate_shared_memory(gl.float32, [4, 8, 2, N], _parts_layout(N))
    decay_s = gl.allocate_shared_memory(gl.float32, [T, BD], by_token)  # after a token is done with, its sum through the decay
    input_s = gl.allocate_shared_memory(gl.float32, [T, BD], by_token)  # and that through the input
    dy_s = gl.allocate_shared_memory(gl.float32, [T, BD], by_token)
    b_s = gl.allocate_shared_memory(gl.float32, [T, N], by_token)
    c_s = gl.allocate_shared_memory(gl.float32, [T, N], by_token)
    dt_s = gl.allocate_shared_memory(gl.float32, [T, BD], whole)
    slope_s = gl.allocate_shared_memory(gl.float32, [T, BD], whole)

    carry = gl.full([BD, N], 0.0, gl.float32, state)
    if HAS_FINAL:
        carry = gl.load(DFINAL + b * D * N + off, mask=ok2, other=0.0)
    carry = _suffix(carry, a2, LOCAL, SPAN, b, s, S, D, N, d, off, d_ok, ok2)
    d_a = gl.full([BD, N], 0.0, gl.float32, state)
    d_bias, d_skip = gl.full([8, BD], 0.0, gl.float32, folded), gl.full([8, BD], 0.0, gl.float32, folded)

    first = s * SEGMENT
    last = gl.minimum(first + SEGMENT, L)
    tiles = (last - first + T - 1) // T
    X += b * sx_b + d0
    DT += b * sd_b + d0
    Z += b * sz_b + d0
    DY += b * sy_b + d0
    OUT += b * L * D + d0
    Bm += b * sb_b
    C += b * sc_b
    DX += b * sdx_b + d0
    DDT += b * sdd_b + d0
    DZ += b * sdz_b + d0
    flags_at = b * L
    STATES += b * ((L + T - 1) // T) * D * N
    DBC += (gl.program_id(0).to(gl.int64) * n_batch + b) * L * (2 * N)
    part_t = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(1, parts_l))))
    part_q = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(1, parts_l))))
    part_n = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(1, parts_l))))
    part_row = gl.expand_dims(gl.expand_dims(part_t, 1), 2)
    part_off = (part_row * 2 + gl.expand_dims(gl.expand_dims(part_q, 0), 2)) * N + gl.expand_dims(gl.expand_dims(part_n, 0), 0)

    t0 = first + (tiles - 1) * T
    x_raw, dt_raw = _tile(X, t0, last, sx_t, rows, cols, col_ok, FULL), _tile(DT, t0, last, sd_t, rows, cols, col_ok, FULL)
    z_raw, dy_raw = _tile(Z, t0, last, sz_t, rows, cols, col_ok, FULL), _tile(DY, t0, last, sy_t, rows, cols, col_ok, FULL)
    out_raw = _tile(OUT, t0, last, D, rows, cols, col_ok, FULL)
    b_raw, c_raw = _tile(Bm, t0, last, sb_t, brows, bcols, col_ok, True), _tile(C, t0, last, sc_t, brows, bcols, col_ok, True)
    h_next = gl.load(STATES + (t0 // T).to(gl.int64) * D * N + off, mask=ok2, other=0.0)
    for i in range(0, tiles):
        t0 = first + (tiles - 1 - i) * T
        x = x_raw.to(gl.float32)
        dt, decay, slope = _steps(dt_raw, bias, t0, last, rows, flags_at, RESET, LIVE, HAS_RESET, HAS_LIVE)
        z, dy = z_raw.to(gl.float32), dy_raw.to(gl.float32)
        z = gl.where(z == 0.0, 1e-30, z)
        gate = _reciprocal(1.0 + _exp2(-LOG2E * z))
        # y before the gate is out / silu(z); silu'(z) / silu(z) = (1 + z (1 - sigmoid(z))) / z
        dz = dy * out_raw.to(gl.float32) * (1.0 + z * (1.0 - gate)) * _reciprocal(z)
        _store_tile(DZ, t0, last, sdz_t, rows, cols, col_ok, FULL, dz)
        dy = dy * z * gate
        d_skip += gl.sum(gl.reshape(dy * x, [T // 8, 8, BD]), 0)
        decay_s._reinterpret(gl.float32, [T, BD], whole).store(decay)
        input_s._reinterpret(gl.float32, [T, BD], whole).store(dt * x)
        dy_s._reinterpret(gl.float32, [T, BD], whole).store(dy)
        dt_s.store(dt)
        slope_s.store(slope)
        b_s._reinterpret(gl.float32, [T, N], whole).store(b_raw.to(gl.float32))
        c_s._reinterpret(gl.float32, [T, N], whole).store(c_raw.to(gl.float32))

        t3 = gl.maximum(t0 - T, first)
        _fetch_tile(X, t3, last, sx_t, T)
        _fetch_tile(DT, t3, last, sd_t, T)
        _fetch_tile(Z, t3, last, sz_t, T)
        _fetch_tile(DY, t3, last, sy_t, T)
        _fetch_tile(OUT, t3, last, D, T)
        h = h_next
        for t1 in range(0, T - 4, 4):
            states_s.index(t1 // 4).store(h)
            for u in gl.static_range(4):
                decay_t, input_t = decay_s.index(t1 + u).load(by_channel), input_s.index(t1 + u).load(by_channel)
                h = _advance(h, a2, decay_t, input_t, b_s.index(t1 + u).load(by_state))
        states_s.index(T // 4 - 1).store(h)
        for t2 in range(0, T, 8):
            decay_sums, input_sums = gl.full([16, 8], 0.0, gl.float32, mma), gl.full([16, 8], 0.0, gl.float32, mma)
            for half in gl.static_range(2):
                base = T - 4 - t2 - 4 * half
                h = states_s.index(base // 4).load(state)
                before, decays = (), ()
                for u in gl.static_range(4):
                    before = before + (h,)
                    decays = decays + (_exp2(gl.expand_dims(decay_s.index(base + u).load(by_channel), 1) * a2),)
                    added = gl.expand_dims(input_s.index(base + u).load(by_channel), 1) * gl.expand_dims(b_s.index(base + u).load(by_state), 0)
                    h = h * decays[u] + added
                through_decay, through_input = (), ()
                for v in gl.static_range(4):
                    t = base + 3 - v
                    decay_t, input_t = decay_s.index(t).load(by_channel), input_s.index(t).load(by_channel)
                    dy_t = dy_s.index(t).load(by_channel)
                    dh = carry + gl.expand_dims(dy_t, 1) * gl.expand_dims(c_s.index(t).load(by_state), 0)
                    carry = dh * decays[3 - v]
                    q = carry * before[3 - v]
                    d_a += q * gl.expand_dims(decay_t, 1)
                    through_decay = through_decay + (_in_lane(q * a2, N),)
                    through_input = through_input + (_in_lane(dh * gl.expand_dims(b_s.index(t).load(by_state), 0), N),)
                    d_b = gl.sum(gl.reshape(dh * gl.expand_dims(input_t, 1), [8, 2, N]), 1)
                    d_c = gl.sum(gl.reshape(h * gl.expand_dims(dy_t, 1), [8, 2, N]), 1)
                    parts_s.slice(3 - v, 1).store(gl.reshape(gl.permute(gl.join(d_b, d_c), [0, 2, 1]), [1, 8, 2, N]))
                    h = before[3 - v]
                decay_sums = _over_lanes(through_decay, 7 - 4 * half, -1, decay_sums, mma, True)
                input_sums = _over_lanes(through_input, 7 - 4 * half, -1, input_sums, mma, True)
                p = DBC + (t0 + base).to(gl.int64) * (2 * N) + part_off
                gl.store(p, gl.sum(parts_s.load(parts_l), 1), mask=(part_off >= 0) & (t0 + base + part_row < last))
            decay_s._reinterpret(gl.float32, [T // 8, 8, BD], whole).index((T - 8 - t2) // 8).store(_by_token(decay_sums))
            input_s._reinterpret(gl.float32, [T // 8, 8, BD], whole).index((T - 8 - t2) // 8).store(_by_token(input_sums))

        # The tile before is on its way while this one is finished.
        x_now = x_raw
        if i + 1 < tiles:
            x_raw, dt_raw = _tile(X, t3, last, sx_t, rows, cols, col_ok, FULL), _tile(DT, t3, last, sd_t, rows, cols, col_ok, FULL)
            z_raw, dy_raw = _tile(Z, t3, last, sz_t, rows, cols, col_ok, FULL), _tile(DY, t3, last, sy_t, rows, cols, col_ok, FULL)
            out_raw = _tile(OUT, t3, last, D, rows, cols, col_ok, FULL)
            b_raw, c_raw = _tile(Bm, t3, last, sb_t, brows, bcols, col_ok, True), _tile(C, t3, last, sc_t, brows, bcols, col_ok, True)
            h_next = gl.load(STATES + (t3 // T).to(gl.int64) * D * N + off, mask=ok2, other=0.0)
        through_input = input_s._reinterpret(gl.float32, [T, BD], whole).load(tile)
        through_decay = decay_s._reinterpret(gl.float32, [T, BD], whole).load(tile)
        dx = through_input * dt_s.load(tile) + dy_s._reinterpret(gl.float32, [T, BD], whole).load(tile) * gl.expand_dims(skip, 0)
        ddt = (through_input * x_now.to(gl.float32) + LN2 * through_decay) * slope_s.load(tile)
        d_bias += gl.sum(gl.reshape(ddt, [T // 8, 8, BD]), 0)
        _store_tile(DX, t0, last, sdx_t, rows, cols, col_ok, FULL, dx)
        _store_tile(DDT, t0, last, sdd_t, rows, cols, col_ok, FULL, ddt)
    gl.store(DA + (b * S + s) * D * N + off, d_a, mask=ok2)
    d_vector = d0 + gl.arange(0, BD, layout=gl.SliceLayout(0, folded))
    gl.store(DVEC + (b * S + s) * 2 * D + d_vector, gl.sum(d_bias, 0), mask=d_vector < D)
    gl.store(DVEC + (b * S + s) * 2 * D + D + d_vector, gl.sum(d_skip, 0), mask=d_vector < D)
    if s == 0:
        gl.store(DH0 + b * D * N + off, carry, mask=ok2)
