"""The first pass of the scan's backward pass in Gluon, where time is cut into segments: see `gluon_forward.py` for the legend."""
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_problems import for_its_problem
from .gluon_tiles import BD, bias_of, columns_of, dt_of, dt_rows, factor_of, rows_of, whole
from .gluon_walk import channels_of, dense, exp2, pair, sigmoid, state_layout, steps, store_pairs, store_whole


@gluon.jit
def scan_gradient_state(
    PROBLEMS, STARTS, SHAPES: gl.constexpr, N: gl.constexpr, T: gl.constexpr, U: gl.constexpr, FIRST: gl.constexpr,
    HAS_RESET: gl.constexpr, HAS_LIVE: gl.constexpr, FULL: gl.constexpr,
):  # fmt: skip
    """`_gradient_state` for the problem of this program."""
    for_its_problem(_gradient_state, PROBLEMS, STARTS, SHAPES, (N, T, U, FIRST, HAS_RESET, HAS_LIVE, FULL))


@gluon.jit
def _gradient_state(
    block, b, s, n_batch, L, S, SEGMENT, DT, FACTOR, Z, C, DY, A, BIAS, RESET, LIVE, LOCAL, SPAN, sd_b, sz_b, sc_b, sy_b,
    SHAPE: gl.constexpr, N: gl.constexpr, T: gl.constexpr, U: gl.constexpr, FIRST: gl.constexpr, HAS_RESET: gl.constexpr,
    HAS_LIVE: gl.constexpr, FULL: gl.constexpr,
):  # fmt: skip
    """The gradient a segment hands to the state before it when it gets none from behind, and the sum of its steps: of
    segments FIRST and on."""
    s += FIRST
    state: gl.constexpr = state_layout(N)
    by_channel: gl.constexpr = gl.SliceLayout(1, state)
    by_state: gl.constexpr = gl.SliceLayout(0, state)

    D: gl.constexpr = SHAPE[0]
    RANK: gl.constexpr = SHAPE[5]
    d0, d, off, d_ok, ok2, a2 = channels_of(block, A, D, N)
    rows, cols, col_ok, bcol_ok = columns_of(d0, D, N)
    bias = bias_of(BIAS, d0, D, RANK)
    factor = factor_of(FACTOR, d0, D, RANK)

    pairs_s = gl.allocate_shared_memory(gl.float32, [T, 8, 2, 2], dense(3))  # decay and gradient of y before the gate
    c_s = gl.allocate_shared_memory(gl.float32, [T, N], dense(1))
    carry = gl.full([BD, N], 0.0, gl.float32, state)
    span = gl.full([BD], 0.0, gl.float32, by_channel)

    first = s * SEGMENT
    last = gl.minimum(first + SEGMENT, L)
    tiles = (last - first + T - 1) // T
    t0 = first + (tiles - 1) * T
    DT += b * sd_b + (d0 if RANK == 0 else 0)
    Z += b * sz_b + d0
    DY += b * sy_b + d0
    C += b * sc_b
    flags_at = b * L
    dt_next, z_next, dy_next, c_next = _read(DT, Z, DY, C, t0, last, col_ok, bcol_ok, SHAPE, FULL)
    for i in range(0, tiles):
        t0 = first + (tiles - 1 - i) * T
        _, decay, _ = steps(dt_of(dt_next, factor, bias, RANK), t0, last, rows, flags_at, RESET, LIVE, HAS_RESET, HAS_LIVE, FULL)
        z = whole(z_next)
        dy = whole(dy_next) * z * sigmoid(z)
        store_pairs(pairs_s, decay, dy)
        store_whole(c_s, whole(c_next))
        t3 = gl.maximum(t0 - T, first)
        dt_next, z_next, dy_next, c_next = _read(DT, Z, DY, C, t3, last, col_ok, bcol_ok, SHAPE, FULL)
        for t1 in range(0, T, U):
            for u in gl.static_range(U):
                t = T - 1 - t1 - u
                decay_t, dy_t = pair(pairs_s, t, by_channel)
                asked = gl.expand_dims(dy_t, 1) * gl.expand_dims(c_s.index(t).load(by_state), 0)
                span += decay_t
                carry = (carry + asked) * exp2(gl.expand_dims(decay_t, 1) * a2)
    gl.store(LOCAL + (b * S + s) * D * N + off, carry, mask=ok2)
    gl.store(SPAN + (b * S + s) * D + d, span, mask=d_ok)


@gluon.jit
def _read(DT, Z, DY, C, t0, last, col_ok, bcol_ok, SHAPE: gl.constexpr, FULL: gl.constexpr):
    """A tile of each, on its way."""
    sd_t: gl.constexpr = SHAPE[1]
    sz_t: gl.constexpr = SHAPE[2]
    sc_t: gl.constexpr = SHAPE[3]
    sy_t: gl.constexpr = SHAPE[4]
    dt = dt_rows(DT, t0, last, sd_t, col_ok, SHAPE[5], FULL)
    z, dy = rows_of(Z, t0, last, sz_t, col_ok, FULL), rows_of(DY, t0, last, sy_t, col_ok, FULL)
    return dt, z, dy, rows_of(C, t0, last, sc_t, bcol_ok, FULL)
