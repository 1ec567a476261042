"""The scan's backward pass in Gluon: see `gluon_forward.py` for the legend."""
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_problems import for_its_problem
from .gluon_tiles import BD, MMA, TILE, bias_of, columns_of, dt_of, dt_rows, factor_of, fetch_tile, rows_of, store_rows, whole
from .gluon_walk import (
    LN2, advance, by_token, channels_of, dense, exp2, in_lane, nonzero, over_lanes, pair, reciprocal, sigmoid, state_layout,
    steps, store_pairs, store_whole, suffix,
)


@gluon.jit
def scan_backward(
    PROBLEMS, STARTS, SHAPES: gl.constexpr, N: gl.constexpr, T: gl.constexpr, HAS_FINAL: gl.constexpr, HAS_RESET: gl.constexpr,
    HAS_LIVE: gl.constexpr, FULL: gl.constexpr,
):  # fmt: skip
    """`_backward` for the problem of this program."""
    for_its_problem(_backward, PROBLEMS, STARTS, SHAPES, (N, T, HAS_FINAL, HAS_RESET, HAS_LIVE, FULL))


@gluon.jit
def _backward(
    block, b, s, n_batch, L, S, SEGMENT, X, DT, FACTOR, Z, Bm, C, DY, OUT, A, BIAS, SKIP, RESET, LIVE, STATES, DFINAL, LOCAL,
    SPAN, DX, DDT, DZ, DBC, DA, DH0, sx_b, sd_b, sz_b, sb_b, sc_b, sy_b, sdx_b, sdd_b, sdz_b, SHAPE: gl.constexpr,
    N: gl.constexpr, T: gl.constexpr, HAS_FINAL: gl.constexpr, HAS_RESET: gl.constexpr, HAS_LIVE: gl.constexpr,
    FULL: gl.constexpr,
):  # fmt: skip
    """One segment of BD channels, laid out as `gluon_walk.py` says, from its end, a tile of T tokens a time.

    From the state kept before the tile the states before every eighth token are computed into shared memory. Then, from the last
    eight tokens to the first: their states and decays again, into registers, and the walk back over them. DBC (D / BD, B, L, 2,
    N) and DA (B S, D N + 2 D) get this program's parts of the gradients of B and C, and of A, dt_bias and D.
    FULL: no tile reaches past the channels or the tokens. Strides between tokens are constants: a tile's addresses are sums.
    """
    state: gl.constexpr = state_layout(N)
    by_channel: gl.constexpr = gl.SliceLayout(1, state)
    by_state: gl.constexpr = gl.SliceLayout(0, state)
    # a tile, every 8th row summed
    folded: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, 1, 4], [1, 8, 4], [1, 1, 1], [2, 1, 0]))
    parts_l: gl.constexpr = gl.BlockedLayout([1, 8, 1, N // 4], [4, 1, 2, 4], [1, 1, 1, 1], [3, 2, 1, 0])

    D: gl.constexpr = SHAPE[0]
    sx_t: gl.constexpr = SHAPE[1]
    sd_t: gl.constexpr = SHAPE[2]
    sz_t: gl.constexpr = SHAPE[3]
    sy_t: gl.constexpr = SHAPE[6]
    sdx_t: gl.constexpr = SHAPE[7]
    sdd_t: gl.constexpr = SHAPE[8]
    sdz_t: gl.constexpr = SHAPE[9]
    RANK: gl.constexpr = SHAPE[10]
    d0, d, off, d_ok, ok2, a2 = channels_of(block, A, D, N)
    rows, cols, col_ok, bcol_ok = columns_of(d0, D, N)
    bias = bias_of(BIAS, d0, D, RANK)
    skip = gl.load(SKIP + d0 + cols, mask=col_ok, other=0.0)

    states_s = gl.allocate_shared_memory(gl.float32, [T // 8, BD, N], _states_layout(N))
    early_s = gl.allocate_shared_memory(gl.float32, [4, 8, 2, N], _parts_layout(N))
    late_s = gl.allocate_shared_memory(gl.float32, [4, 8, 2, N], _parts_layout(N))
    pairs_s = gl.allocate_shared_memory(gl.float32, [T, 8, 2, 2], dense(3))  # decay and input; of tokens done with, their sums
    dy_s = gl.allocate_shared_memory(gl.float32, [T, BD], dense(1))
    b_s = gl.allocate_shared_memory(gl.float32, [T, N], dense(1))
    c_s = gl.allocate_shared_memory(gl.float32, [T, N], dense(1))
    dt_s = gl.allocate_shared_memory(gl.float32, [T, BD], dense(2))
    slope_s = gl.allocate_shared_memory(gl.float32, [T, BD], dense(2))

    carry = gl.full([BD, N], 0.0, gl.float32, state)
    if HAS_FINAL:
        carry = gl.load(DFINAL + b * D * N + off, mask=ok2, other=0.0)
    carry = suffix(carry, a2, LOCAL, SPAN, b, s, S, D, N, d, off, d_ok, ok2)
    d_a = gl.full([BD, N], 0.0, gl.float32, state)
    d_bias, d_skip = gl.full([8, BD], 0.0, gl.float32, folded), gl.full([8, BD], 0.0, gl.float32, folded)

    first = s * SEGMENT
    last = gl.minimum(first + SEGMENT, L)
    tiles = (last - first + T - 1) // T
    X += b * sx_b + d0
    DT += b * sd_b + (d0 if RANK == 0 else 0)
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
    DBC += (block.to(gl.int64) * n_batch + b) * L * (2 * N)
    part_t = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(1, parts_l))))
    part_q = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(1, parts_l))))
    part_n = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(1, parts_l))))
    part_row = gl.expand_dims(gl.expand_dims(part_t, 1), 2)
    part_off = (part_row * 2 + gl.expand_dims(gl.expand_dims(part_q, 0), 2)) * N + gl.expand_dims(gl.expand_dims(part_n, 0), 0)

    t0 = first + (tiles - 1) * T
    x_raw, dt_raw, z_raw, dy_raw, out_raw, b_raw, c_raw = _read(
        X, DT, Z, DY, OUT, Bm, C, t0, last, col_ok, bcol_ok, SHAPE, FULL
    )
    h_next = gl.load(STATES + (t0 // T).to(gl.int64) * D * N + off, mask=ok2, other=0.0)
    factor = factor_of(FACTOR, d0, D, RANK)
    for i in range(0, tiles):
        t0 = first + (tiles - 1 - i) * T
        x = whole(x_raw)
        dt = dt_of(dt_raw, factor, bias, RANK)
        dt, decay, slope = steps(dt, t0, last, rows, flags_at, RESET, LIVE, HAS_RESET, HAS_LIVE, FULL)
        z, dy = whole(z_raw), whole(dy_raw)
        z = nonzero(z, Z)
        gate = sigmoid(z)
        # y before the gate is out / silu(z); silu'(z) / silu(z) = (1 + z (1 - sigmoid(z))) / z
        dz = dy * whole(out_raw) * (1.0 + z * (1.0 - gate)) * reciprocal(z)
        store_rows(DZ, t0, last, sdz_t, col_ok, FULL, dz)
        dy = dy * z * gate
        d_skip += gl.sum(gl.reshape(dy * x, [T // 8, 8, BD]), 0)
        store_pairs(pairs_s, decay, dt * x)
        store_whole(dy_s, dy)
        dt_s.store(dt)
        slope_s.store(slope)
        store_whole(b_s, whole(b_raw))
        store_whole(c_s, whole(c_raw))

        t3 = gl.maximum(t0 - T, first)
        fetch_tile(X, t3, last, sx_t, T)
        fetch_tile(DT, t3, last, sd_t, T)
        fetch_tile(Z, t3, last, sz_t, T)
        fetch_tile(DY, t3, last, sy_t, T)
        fetch_tile(OUT, t3, last, D, T)
        h = h_next
        for t1 in range(0, T - 8, 8):
            states_s.index(t1 // 8).store(h)
            for u in gl.static_range(8):
                decay_t, input_t = pair(pairs_s, t1 + u, by_channel)
                h = advance(h, a2, decay_t, input_t, b_s.index(t1 + u).load(by_state))
        states_s.index(T // 8 - 1).store(h)
        for t2 in range(0, T, 8):
            t1 = T - 8 - t2
            h = states_s.index(t1 // 8).load(state)
            before, decays = (), ()
            for u in gl.static_range(8):
                before = before + (h,)
                decay_t, input_t = pair(pairs_s, t1 + u, by_channel)
                decays = decays + (exp2(gl.expand_dims(decay_t, 1) * a2),)
                h = h * decays[u] + gl.expand_dims(input_t, 1) * gl.expand_dims(b_s.index(t1 + u).load(by_state), 0)
            decay_sums, input_sums = gl.full([16, 8], 0.0, gl.float32, MMA), gl.full([16, 8], 0.0, gl.float32, MMA)
            for low in gl.static_range(4, -4, -4):
                through_decay, through_input, parts = (), (), ()
                for u in gl.static_range(low + 3, low - 1, -1):
                    decay_t, input_t = pair(pairs_s, t1 + u, by_channel)
                    dy_t = dy_s.index(t1 + u).load(by_channel)
                    dh = carry + gl.expand_dims(dy_t, 1) * gl.expand_dims(c_s.index(t1 + u).load(by_state), 0)
                    carry = dh * decays[u]
                    q = carry * before[u]
                    d_a += q * gl.expand_dims(decay_t, 1)
                    through_decay = through_decay + (in_lane(q * a2, N),)
                    through_input = through_input + (in_lane(dh * gl.expand_dims(b_s.index(t1 + u).load(by_state), 0), N),)
                    d_b = gl.sum(gl.reshape(dh * gl.expand_dims(input_t, 1), [8, 2, N]), 1)
                    d_c = gl.sum(gl.reshape(h * gl.expand_dims(dy_t, 1), [8, 2, N]), 1)
                    parts = (gl.join(d_b, d_c),) + parts
                    h = before[u]
                decay_sums = over_lanes(through_decay, low + 3, -1, decay_sums, True)
                input_sums = over_lanes(through_input, low + 3, -1, input_sums, True)
                four = gl.join(gl.join(parts[0], parts[2]), gl.join(parts[1], parts[3]))  # (8, N, q, token / 2, token % 2)
                four = gl.reshape(gl.permute(four, [3, 4, 0, 2, 1]), [4, 8, 2, N])
                if low == 4:
                    late_s.store(four)
                else:
                    early_s.store(four)
            p = DBC + (t0 + t1).to(gl.int64) * (2 * N) + part_off
            early, late = gl.sum(early_s.load(parts_l), 1), gl.sum(late_s.load(parts_l), 1)
            if FULL:
                gl.store(p, early.to(DBC.dtype.element_ty))
                gl.store(p + 4 * 2 * N, late.to(DBC.dtype.element_ty))
            else:
                ok = part_off >= 0
                gl.store(p, early.to(DBC.dtype.element_ty), mask=ok & (t0 + t1 + part_row < last))
                gl.store(p + 4 * 2 * N, late.to(DBC.dtype.element_ty), mask=ok & (t0 + t1 + 4 + part_row < last))
            sums = gl.permute(gl.join(by_token(decay_sums), by_token(input_sums)), [2, 0, 1])
            pairs_s._reinterpret(gl.float32, [T // 8, 2, 8, BD], dense(3)).index(t1 // 8).store(sums)

        # The tile before is on its way while this one is finished.
        x_now = x_raw
        x_raw, dt_raw, z_raw, dy_raw, out_raw, b_raw, c_raw = _read(
            X, DT, Z, DY, OUT, Bm, C, t3, last, col_ok, bcol_ok, SHAPE, FULL
        )
        h_next = gl.load(STATES + (t3 // T).to(gl.int64) * D * N + off, mask=ok2, other=0.0)
        factor = factor_of(FACTOR, d0, D, RANK)  # once more: there are no registers to keep it in
        sums = gl.permute(pairs_s._reinterpret(gl.float32, [T // 8, 2, 8, BD], dense(4)).load(_sums_layout(T)), [0, 2, 3, 1])
        through_decay, through_input = gl.split(gl.reshape(sums, [T, BD, 2]))
        through_decay = gl.convert_layout(through_decay, TILE, assert_trivial=True)
        through_input = gl.convert_layout(through_input, TILE, assert_trivial=True)
        dt, dy = dt_s.load(TILE), dy_s._reinterpret(gl.float32, [T, BD], dense(2)).load(TILE)
        dx = through_input * dt + dy * gl.expand_dims(skip, 0)
        ddt = (through_input * whole(x_now) + LN2 * through_decay) * slope_s.load(TILE)
        d_bias += gl.sum(gl.reshape(ddt, [T // 8, 8, BD]), 0)
        store_rows(DX, t0, last, sdx_t, col_ok, FULL, dx)
        store_rows(DDT, t0, last, sdd_t, col_ok, FULL, ddt)
    DA += (b * S + s) * D * (N + 2)
    gl.store(DA + off, d_a, mask=ok2)
    d_vector = d0 + gl.arange(0, BD, layout=gl.SliceLayout(0, folded))
    gl.store(DA + D * N + d_vector, gl.sum(d_bias, 0), mask=d_vector < D)
    gl.store(DA + D * (N + 1) + d_vector, gl.sum(d_skip, 0), mask=d_vector < D)
    if s == 0:
        gl.store(DH0 + b * D * N + off, carry, mask=ok2)


@gluon.jit
def _read(X, DT, Z, DY, OUT, Bm, C, t0, last, col_ok, bcol_ok, SHAPE: gl.constexpr, FULL: gl.constexpr):
    """A tile of each, on its way."""
    D: gl.constexpr = SHAPE[0]
    sx_t: gl.constexpr = SHAPE[1]
    sd_t: gl.constexpr = SHAPE[2]
    sz_t: gl.constexpr = SHAPE[3]
    sb_t: gl.constexpr = SHAPE[4]
    sc_t: gl.constexpr = SHAPE[5]
    sy_t: gl.constexpr = SHAPE[6]
    x, dt = rows_of(X, t0, last, sx_t, col_ok, FULL), dt_rows(DT, t0, last, sd_t, col_ok, SHAPE[10], FULL)
    z, dy = rows_of(Z, t0, last, sz_t, col_ok, FULL), rows_of(DY, t0, last, sy_t, col_ok, FULL)
    out = rows_of(OUT, t0, last, D, col_ok, FULL)
    return x, dt, z, dy, out, rows_of(Bm, t0, last, sb_t, bcol_ok, FULL), rows_of(C, t0, last, sc_t, bcol_ok, FULL)


@gluon.constexpr_function
def _bits(count):
    return [1 << i for i in range(count.bit_length() - 1)]


@gluon.constexpr_function
def _states_layout(N):
    """Where shared memory has state n of channel d of a token, (BD, N), in `_backward`: the channels of a lane lie apart and
    those of neighbouring lanes together, so that 8 lanes read 128 bytes in a row."""
    return gl.SharedLinearLayout([[0, b] for b in _bits(N)] + [[2 * b, 0] for b in _bits(8)] + [[1, 0]])


@gluon.constexpr_function
def _parts_layout(N):
    """Where it has lane g's part of the gradients of B (q = 0) and C (q = 1), (4 tokens, g, q, n): q is flipped for every other
    g, so that 8 lanes write 128 bytes without two meeting in a bank."""
    token = [[0, 0, 0, b] for b in _bits(N)] + [[0, 0, 1, 0], [0, 1, 1, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
    return gl.SharedLinearLayout(token + [[1, 0, 0, 0], [2, 0, 0, 0]])


@gluon.constexpr_function
def _sums_layout(T):
    """A tile of two sums, (T / 8, 2, 8, BD): a lane has what it has of a tile."""
    lanes = [[0, 0, 0, 4], [0, 0, 0, 8], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]]
    return gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 0, 2], [0, 1, 0, 0]] + [[b, 0, 0, 0] for b in _bits(T // 8)], lanes, [], [], [T // 8, 2, 8, 16]
    )
