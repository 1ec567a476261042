"""The scan's forward pass in Gluon, Triton's lower-level language: one warp walks time with its states in registers.

Legend, also of the files beside it: B batch, L tokens, D channels, N states, T tokens of a tile, S segments of time, BD channels
of a program. Inputs come from global memory as vectors, a tile ahead. Nothing but the states is carried from token to token.
"""
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_problems import for_its_problem
from .gluon_tiles import BD, MMA, TILE, bias_of, columns_of, dt_of, dt_rows, factor_of, rows_of, store_rows, whole
from .gluon_walk import (
    advance, by_token, channels_of, dense, in_lane, nonzero, over_lanes, pair, prefix, sigmoid, state_layout, steps, store_pairs,
    store_whole,
)


@gluon.jit
def scan_forward(
    PROBLEMS, STARTS, SHAPES: gl.constexpr, N: gl.constexpr, T: gl.constexpr, LOCAL_PASS: gl.constexpr, EXACT: gl.constexpr,
    HAS_H0: gl.constexpr, HAS_RESET: gl.constexpr, HAS_LIVE: gl.constexpr, FULL: gl.constexpr,
):  # fmt: skip
    """`_forward` for the problem of this program."""
    for_its_problem(_forward, PROBLEMS, STARTS, SHAPES, (N, T, LOCAL_PASS, EXACT, HAS_H0, HAS_RESET, HAS_LIVE, FULL))


@gluon.jit
def _forward(
    block, b, s, n_batch, L, S, SEGMENT, X, DT, FACTOR, Z, Bm, C, A, BIAS, SKIP, H0, LOCAL, SPAN, RESET, LIVE, Y, STATES, FINAL,
    sx_b, sd_b, sz_b, sb_b, sc_b, SHAPE: gl.constexpr,
    N: gl.constexpr, T: gl.constexpr, LOCAL_PASS: gl.constexpr, EXACT: gl.constexpr,
    HAS_H0: gl.constexpr, HAS_RESET: gl.constexpr, HAS_LIVE: gl.constexpr, FULL: gl.constexpr,
):  # fmt: skip
    """One segment of BD channels, laid out as `gluon_walk.py` says, from its beginning, a tile of T tokens a time.

    LOCAL_PASS: only the state the segment leaves when it starts from 0, and the sum of its steps. EXACT: see `over_lanes`.
    FULL: no tile reaches past the channels or the tokens. Strides between tokens are constants: a tile's addresses are sums.
    """
    state: gl.constexpr = state_layout(N)
    by_channel: gl.constexpr = gl.SliceLayout(1, state)
    by_state: gl.constexpr = gl.SliceLayout(0, state)

    D: gl.constexpr = SHAPE[0]
    RANK: gl.constexpr = SHAPE[6]
    d0, d, off, d_ok, ok2, a2 = channels_of(block, A, D, N)
    rows, cols, col_ok, bcol_ok = columns_of(d0, D, N)
    bias = bias_of(BIAS, d0, D, RANK)
    factor = factor_of(FACTOR, d0, D, RANK)
    skip = gl.load(SKIP + d0 + cols, mask=col_ok, other=0.0)

    h = gl.full([BD, N], 0.0, gl.float32, state)
    if not LOCAL_PASS:
        if HAS_H0:
            h = gl.load(H0 + b * D * N + off, mask=ok2, other=0.0)
        h = prefix(h, a2, LOCAL, SPAN, b, s, S, D, N, d, off, d_ok, ok2)
    span = gl.full([BD], 0.0, gl.float32, by_channel)

    pairs_s = gl.allocate_shared_memory(gl.float32, [T, 8, 2, 2], dense(3))  # decay and input
    y_s = gl.allocate_shared_memory(gl.float32, [T, BD], dense(1))
    b_s = gl.allocate_shared_memory(gl.float32, [T, N], dense(1))
    c_s = gl.allocate_shared_memory(gl.float32, [T, N], dense(1))

    first = s * SEGMENT
    last = gl.minimum(first + SEGMENT, L)
    X += b * sx_b + d0
    DT += b * sd_b + (d0 if RANK == 0 else 0)
    Z += b * sz_b + d0
    Bm += b * sb_b
    C += b * sc_b
    Y += b * L * D + d0
    states_p = STATES + (b * ((L + T - 1) // T) + first // T) * D * N + off
    flags_at = b * L

    x_next, dt_next, b_next, z_next, c_next = _read(X, DT, Bm, Z, C, first, last, col_ok, bcol_ok, SHAPE, LOCAL_PASS, FULL)
    for t0 in range(first, last, T):
        x = whole(x_next)
        dt, decay, _ = steps(dt_of(dt_next, factor, bias, RANK), t0, last, rows, flags_at, RESET, LIVE, HAS_RESET, HAS_LIVE, FULL)
        store_pairs(pairs_s, decay, dt * x)
        store_whole(b_s, whole(b_next))
        if not LOCAL_PASS:
            z = whole(z_next)
            store_whole(c_s, whole(c_next))
        # The next tile is on its way while this one is walked; behind the last it is the last once more.
        t3 = gl.minimum(t0 + T, first + (last - first - 1) // T * T)
        x_next, dt_next, b_next, z_next, c_next = _read(X, DT, Bm, Z, C, t3, last, col_ok, bcol_ok, SHAPE, LOCAL_PASS, FULL)
        if not LOCAL_PASS:
            gl.store(states_p, h, mask=ok2)
            states_p += D * N
        for t1 in range(0, T, 8):
            sums = gl.full([16, 8], 0.0, gl.float32, MMA)
            for half in gl.static_range(2):
                ys = ()
                for u in gl.static_range(4):
                    t = t1 + 4 * half + u
                    decay_t, input_t = pair(pairs_s, t, by_channel)
                    h = advance(h, a2, decay_t, input_t, b_s.index(t).load(by_state))
                    if LOCAL_PASS:
                        span += decay_t
                    else:
                        ys = ys + (in_lane(h * gl.expand_dims(c_s.index(t).load(by_state), 0), N),)
                if not LOCAL_PASS:
                    sums = over_lanes(ys, 4 * half, 1, sums, EXACT)
            if not LOCAL_PASS:
                y_s._reinterpret(gl.float32, [T // 8, 8, BD], dense(2)).index(t1 // 8).store(by_token(sums))
        if not LOCAL_PASS:
            y = y_s._reinterpret(gl.float32, [T, BD], dense(2)).load(TILE) + gl.expand_dims(skip, 0) * x
            z = nonzero(z, Z)
            y = y * (z * sigmoid(z))
            store_rows(Y, t0, last, D, col_ok, FULL, y)
    if LOCAL_PASS:
        gl.store(LOCAL + (b * S + s) * D * N + off, h, mask=ok2)
        gl.store(SPAN + (b * S + s) * D + d, span, mask=d_ok)
    else:
        if s == S - 1:
            gl.store(FINAL + b * D * N + off, h, mask=ok2)


@gluon.jit
def _read(X, DT, Bm, Z, C, t0, last, col_ok, bcol_ok, SHAPE: gl.constexpr, LOCAL_PASS: gl.constexpr, FULL: gl.constexpr):
    """A tile of each, on its way; a LOCAL_PASS needs no Z and C."""
    sx_t: gl.constexpr = SHAPE[1]
    sd_t: gl.constexpr = SHAPE[2]
    sz_t: gl.constexpr = SHAPE[3]
    sb_t: gl.constexpr = SHAPE[4]
    sc_t: gl.constexpr = SHAPE[5]
    x, dt = rows_of(X, t0, last, sx_t, col_ok, FULL), dt_rows(DT, t0, last, sd_t, col_ok, SHAPE[6], FULL)
    b, z, c = rows_of(Bm, t0, last, sb_t, bcol_ok, FULL), (), ()
    if not LOCAL_PASS:
        z, c = rows_of(Z, t0, last, sz_t, col_ok, FULL), rows_of(C, t0, last, sc_t, bcol_ok, FULL)
    return x, dt, b, z, c
