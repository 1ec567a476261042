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
def _nonzero(z, Z):
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


@gluon.constexpr_function
def _pairs_layout():
    """Two values of each of a lane's two channels, (8, 2, 2): all four together in shared memory, the same for 4 lanes."""
    lanes = [[0, 0, 0], [0, 0, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout([[0, 0, 1], [0, 1, 0]], lanes, [], [], [8, 2, 2])


@gluon.jit
def _pair(shared, t, by_channel: gl.constexpr):
    """The two values of token t that `_store_pairs` put side by side, (BD,) each."""
    both = gl.reshape(gl.permute(shared.index(t).load(_pairs_layout()), [0, 2, 1]), [16, 2])
    first, second = gl.split(both)
    return gl.convert_layout(first, by_channel, assert_trivial=True), gl.convert_layout(second, by_channel, assert_trivial=True)


@gluon.jit
def _store_pairs(shared, first, second, T: gl.constexpr, whole: gl.constexpr):
    both = gl.permute(gl.reshape(gl.join(first, second), [T, 8, 2, 2]), [0, 1, 3, 2])
    shared._reinterpret(gl.float32, [T, 8, 2, 2], whole).store(both)


@gluon.jit
def _float(block, layout: gl.constexpr):
    """One block of `_rows_of` in float32."""
    if block.dtype == gl.int32:  # two bfloat16
        low, high = (block << 16).to(gl.float32, bitcast=True), (block & -65536).to(gl.float32, bitcast=True)
        value = gl.reshape(gl.join(low, high), [block.shape[0], 2 * block.shape[1]])
        value = gl.convert_layout(value, layout, assert_trivial=True)
    else:
        value = block.to(gl.float32)
    return value


@gluon.jit
def _whole(blocks, layout: gl.constexpr):
    """What `_rows_of` read, (32, W) in float32."""
    if len(blocks) == 4:
        even = gl.join(_float(blocks[0], layout), _float(blocks[2], layout))
        odd = gl.join(_float(blocks[1], layout), _float(blocks[3], layout))
        rows = gl.permute(gl.join(even, odd), [2, 3, 0, 1])
    else:
        rows = gl.permute(gl.join(_float(blocks[0], layout), _float(blocks[1], layout)), [2, 0, 1])
    return gl.convert_layout(gl.reshape(rows, [32, rows.shape[-1]]), layout, assert_trivial=True)


@gluon.jit
def _block(base, t0, stride: gl.constexpr, width: gl.constexpr, layout: gl.constexpr, R: gl.constexpr):
    """To R rows of a token-major matrix (R, width), the first block of a tile: the others lie a constant further on."""
    row, col = gl.arange(0, R, layout=gl.SliceLayout(1, layout)), gl.arange(0, width, layout=gl.SliceLayout(0, layout))
    return (base + t0.to(gl.int64) * stride) + (gl.expand_dims(row, 1) * stride + gl.expand_dims(col, 0))


@gluon.jit
def _inside(first, last, col_ok, layout: gl.constexpr, R: gl.constexpr):
    row = gl.arange(0, R, layout=gl.SliceLayout(1, layout))
    return gl.expand_dims(first + row < last, 1) & gl.expand_dims(col_ok, 0)


@gluon.jit
def _rows_of(base, t0, last, stride: gl.constexpr, col_ok, layout: gl.constexpr, FULL: gl.constexpr):
    """Rows t0..t0+32 of a token-major matrix, W wide as col_ok is, 0 outside the segment; in blocks of as many rows as make 4
    values a lane. Of bfloat16 two in an int32 where that can be: the compiler would take them apart at once, and wait for them."""
    W: gl.constexpr = col_ok.shape[0]
    R: gl.constexpr = 128 // W
    blocks = ()
    if FULL and base.dtype.element_ty == gl.bfloat16:
        two: gl.constexpr = gl.BlockedLayout([1, 2], [R, W // 4], [1, 1], [1, 0])
        p = _block(base.to(gl.pointer_type(gl.int32), bitcast=True), t0, stride // 2, W // 2, two, R)
        for k in gl.static_range(32 // R):
            blocks = blocks + (gl.load(p + k * R * (stride // 2)),)
    else:
        p = _block(base, t0, stride, W, layout, R)
        for k in gl.static_range(32 // R):
            if FULL:
                blocks = blocks + (gl.load(p + k * R * stride),)
            else:
                blocks = blocks + (gl.load(p + k * R * stride, mask=_inside(t0 + k * R, last, col_ok, layout, R), other=0.0),)
    return blocks


@gluon.jit
def _two(pairs):
    """Two bfloat16 in an int32 -> twice as many columns."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=1
    )
    return gl.reshape(gl.join(low, high), [pairs.shape[0], 2 * pairs.shape[1]])


@gluon.jit
def _dt_rows(base, t0, last, stride: gl.constexpr, col_ok, layout: gl.constexpr, RANK: gl.constexpr, FULL: gl.constexpr):
    """What `_dt` makes dt of: with a rank, 32 columns at a time, rows t0..t0+32 of the factor that has as many columns."""
    if RANK == 0:
        blocks = _rows_of(base, t0, last, stride, col_ok, layout, FULL)
    else:
        wide: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [1, 1], [1, 0])
        p, blocks = _block(base.to(gl.pointer_type(gl.int32), bitcast=True), t0, stride // 2, 16, wide, 32), ()
        for q in gl.static_range(RANK // 32):
            if FULL:
                blocks = blocks + (gl.load(p + 16 * q),)
            else:
                ok = _inside(t0, last, gl.arange(0, 16, layout=gl.SliceLayout(0, wide)) >= 0, wide, 32)
                blocks = blocks + (gl.load(p + 16 * q, mask=ok, other=0),)
    return blocks


@gluon.jit
def _factor(base, d0, D: gl.constexpr, RANK: gl.constexpr):
    """Rows d0..d0+16 of the other factor (D, RANK), 32 columns at a time. They are in the order, and `_dt` takes the columns in the
    order, in which the product needs nothing moved between lanes."""
    blocks = ()
    if RANK > 0:
        wide: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [1, 1], [1, 0])
        place, col = gl.arange(0, 16, layout=gl.SliceLayout(1, wide)), gl.arange(0, 16, layout=gl.SliceLayout(0, wide))
        d = d0 + place % 8 // 2 * 4 + place // 8 * 2 + place % 2
        p = base.to(gl.pointer_type(gl.int32), bitcast=True) + (gl.expand_dims(d * (RANK // 2), 1) + gl.expand_dims(col, 0))
        for q in gl.static_range(RANK // 32):
            blocks = blocks + (gl.load(p + 16 * q, mask=gl.expand_dims(d < D, 1) & gl.expand_dims(col >= 0, 0), other=0),)
    return blocks


@gluon.jit
def _bias(base, d0, D: gl.constexpr, layout: gl.constexpr, M: gl.constexpr, RANK: gl.constexpr):
    """dt_bias of 16 channels, where `_dt` adds it."""
    if RANK == 0:
        d = d0 + gl.arange(0, 16, layout=gl.SliceLayout(0, layout))
    else:
        place = gl.arange(0, 16, layout=gl.SliceLayout(0, M))
        d = d0 + place % 8 // 2 * 4 + place // 8 * 2 + place % 2
    return gl.load(base + d, mask=d < D, other=0.0)


@gluon.jit
def _dt(blocks, factor, bias, layout: gl.constexpr, M: gl.constexpr, RANK: gl.constexpr):
    """dt with its bias, (32, 16) in float32."""
    if RANK == 0:
        dt = _whole(blocks, layout) + gl.expand_dims(bias, 0)
    else:
        total = gl.full([32, 16], 0.0, gl.float32, M) + gl.expand_dims(bias, 0)
        for q in gl.static_range(RANK // 32):
            left = gl.reshape(gl.permute(gl.reshape(_two(blocks[q]), [32, 4, 2, 2, 2]), [0, 2, 3, 1, 4]), [32, 32])
            right = gl.reshape(gl.permute(gl.reshape(_two(factor[q]), [16, 4, 2, 2, 2]), [2, 3, 1, 4, 0]), [32, 16])
            right = gl.convert_layout(right, gl.DotOperandLayout(1, M, 2))
            total = mma_v2(gl.convert_layout(left, gl.DotOperandLayout(0, M, 2)), right, total)
        dt = gl.reshape(gl.permute(gl.reshape(total, [32, 2, 4, 2]), [0, 2, 1, 3]), [32, 16])
        dt = gl.convert_layout(dt, layout, assert_trivial=True)
    return dt


@gluon.jit
def _store_rows(base, t0, last, stride: gl.constexpr, col_ok, layout: gl.constexpr, FULL: gl.constexpr, value):
    """value (32, 16) into rows t0..t0+32."""
    p = _block(base, t0, stride, 16, layout, 8)
    even, odd = gl.split(gl.permute(gl.reshape(value.to(base.dtype.element_ty), [2, 2, 8, 16]), [2, 3, 0, 1]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    blocks = (first, second, third, fourth)
    for k in gl.static_range(4):
        block = gl.convert_layout(blocks[k], layout, assert_trivial=True)
        if FULL:
            gl.store(p + k * 8 * stride, block)
        else:
            gl.store(p + k * 8 * stride, block, mask=_inside(t0 + 8 * k, last, col_ok, layout, 8))


@gluon.jit
def _fetch_tile(base, first, last, stride, T: gl.constexpr):
    """Ask for a tile's lines in the L2 cache, to be loaded later."""
    row = gl.minimum(first + gl.arange(0, T, layout=gl.BlockedLayout([1], [32], [1], [0])), last - 1)
    p = (base + row.to(gl.int64) * stride).to(gl.int64, bitcast=True)
    gl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [p], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _flags(base, first, last, rows):
    return gl.load(base + first + rows, mask=first + rows < last, other=0) != 0


@gluon.jit
def _steps(
    v, first, last, rows, flags_at, RESET, LIVE, HAS_RESET: gl.constexpr, HAS_LIVE: gl.constexpr, FULL: gl.constexpr
):  # fmt: skip
    """(dt, step of the decay, slope of softplus), (T, BD) each: dt is 0 where a token does not count, and the decay's step is CUT
    where the state before the token is dropped."""
    e = _exp2(-LOG2E * gl.abs(v))
    slope = gl.where(v >= 0.0, 1.0, e) * _reciprocal(1.0 + e)
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


@gluon.constexpr_function
def _item(values, i, j=None):
    return values[i] if j is None else values[i][j]


@gluon.jit
def _place(PROBLEMS, STARTS, SHAPE: gl.constexpr):
    """(problem, block of channels, row, segment) of this program, one of those of problems SHAPE[0] to SHAPE[1] - 1, which have
    in common what is compiled, SHAPE[2]: D, and strides between tokens. PROBLEMS: the other arguments of each, n_batch first.
    The programs of a problem stand together, from STARTS on."""
    first: gl.constexpr = SHAPE[0]
    behind: gl.constexpr = SHAPE[1]
    problem, start = PROBLEMS[first], STARTS[first]
    for i in gl.static_range(first + 1, behind):
        here, chosen = gl.program_id(0) >= STARTS[i], ()
        for j in gl.static_range(len(problem)):
            chosen = chosen + (gl.where(here, PROBLEMS[i][j], problem[j]),)
        problem, start = chosen, gl.where(here, STARTS[i], start)
    blocks: gl.constexpr = (SHAPE[2][0] + 15) // 16
    place = gl.program_id(0) - start
    row = place // blocks
    return problem, place % blocks, (row % problem[0]).to(gl.int64), row // problem[0]


@gluon.jit
def scan_forward(
    PROBLEMS, STARTS, SHAPES: gl.constexpr, N: gl.constexpr, T: gl.constexpr, LOCAL_PASS: gl.constexpr, EXACT: gl.constexpr,
    HAS_H0: gl.constexpr, HAS_RESET: gl.constexpr, HAS_LIVE: gl.constexpr, FULL: gl.constexpr,
):  # fmt: skip
    """`_forward` of several problems in one launch: see `_place`."""
    if len(SHAPES) == 1:
        problem, block, b, s = _place(PROBLEMS, STARTS, _item(SHAPES, 0))
        _forward(block, b, s, *problem, _item(SHAPES, 0, 2), N, T, LOCAL_PASS, EXACT, HAS_H0, HAS_RESET, HAS_LIVE, FULL)
    else:
        for i in gl.static_range(len(SHAPES)):
            if (gl.program_id(0) >= STARTS[_item(SHAPES, i, 0)]) & (gl.program_id(0) < STARTS[_item(SHAPES, i, 1)]):
                problem, block, b, s = _place(PROBLEMS, STARTS, _item(SHAPES, i))
                _forward(block, b, s, *problem, _item(SHAPES, i, 2), N, T, LOCAL_PASS, EXACT, HAS_H0, HAS_RESET, HAS_LIVE, FULL)


@gluon.jit
def _forward(
    block, b, s, n_batch, L, S, SEGMENT, X, DT, FACTOR, Z, Bm, C, A, BIAS, SKIP, H0, LOCAL, SPAN, RESET, LIVE, Y, STATES, FINAL,
    sx_b, sd_b, sz_b, sb_b, sc_b, SHAPE: gl.constexpr,
    N: gl.constexpr, T: gl.constexpr, LOCAL_PASS: gl.constexpr, EXACT: gl.constexpr,
    HAS_H0: gl.constexpr, HAS_RESET: gl.constexpr, HAS_LIVE: gl.constexpr, FULL: gl.constexpr,
):  # fmt: skip
    """One segment of BD = 16 channels: a lane holds N / 4 states of two channels, 4 lanes share them.

    LOCAL_PASS: only the state the segment leaves when it starts from 0, and the sum of its steps. EXACT: see `_over_lanes`.
    FULL: no tile reaches past the channels or the tokens. Strides between tokens are constants: a tile's addresses are sums.
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
    cube: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    whole_pairs: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])

    D: gl.constexpr = SHAPE[0]
    sx_t: gl.constexpr = SHAPE[1]
    sd_t: gl.constexpr = SHAPE[2]
    sz_t: gl.constexpr = SHAPE[3]
    sb_t: gl.constexpr = SHAPE[4]
    sc_t: gl.constexpr = SHAPE[5]
    RANK: gl.constexpr = SHAPE[6]
    d0 = block * BD
    d = d0 + gl.arange(0, BD, layout=by_channel)
    off = gl.expand_dims(d, 1) * N + gl.expand_dims(gl.arange(0, N, layout=by_state), 0)
    d_ok, ok2 = d < D, off < D * N
    a2 = gl.minimum(gl.load(A + off, mask=ok2, other=-1.0) * LOG2E, -1e-30)
    rows, cols = gl.arange(0, T, layout=gl.SliceLayout(1, tile)), gl.arange(0, BD, layout=gl.SliceLayout(0, tile))
    col_ok, bcol_ok = d0 + cols < D, gl.arange(0, N, layout=gl.SliceLayout(0, narrow)) < N
    bias = _bias(BIAS, d0, D, tile, mma, RANK)
    factor = _factor(FACTOR, d0, D, RANK)
    skip = gl.load(SKIP + d0 + cols, mask=col_ok, other=0.0)

    h = gl.full([BD, N], 0.0, gl.float32, state)
    if not LOCAL_PASS:
        if HAS_H0:
            h = gl.load(H0 + b * D * N + off, mask=ok2, other=0.0)
        h = _prefix(h, a2, LOCAL, SPAN, b, s, S, D, N, d, off, d_ok, ok2)
    span = gl.full([BD], 0.0, gl.float32, by_channel)

    pairs_s = gl.allocate_shared_memory(gl.float32, [T, 8, 2, 2], cube)  # decay and input
    y_s = gl.allocate_shared_memory(gl.float32, [T, BD], by_token)
    b_s = gl.allocate_shared_memory(gl.float32, [T, N], by_token)
    c_s = gl.allocate_shared_memory(gl.float32, [T, N], by_token)

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

    x_next, dt_next = _rows_of(X, first, last, sx_t, col_ok, tile, FULL), _dt_rows(DT, first, last, sd_t, col_ok, tile, RANK, FULL)
    b_next = _rows_of(Bm, first, last, sb_t, bcol_ok, narrow, FULL)
    if not LOCAL_PASS:
        z_next, c_next = _rows_of(Z, first, last, sz_t, col_ok, tile, FULL), _rows_of(C, first, last, sc_t, bcol_ok, narrow, FULL)
    for t0 in range(first, last, T):
        x = _whole(x_next, tile)
        dt, decay, _ = _steps(_dt(dt_next, factor, bias, tile, mma, RANK), t0, last, rows, flags_at, RESET, LIVE, HAS_RESET, HAS_LIVE, FULL)
        _store_pairs(pairs_s, decay, dt * x, T, whole_pairs)
        b_s._reinterpret(gl.float32, [T, N], whole).store(_whole(b_next, narrow))
        if not LOCAL_PASS:
            z = _whole(z_next, tile)
            c_s._reinterpret(gl.float32, [T, N], whole).store(_whole(c_next, narrow))
        # The next tile is on its way while this one is walked; behind the last it is the last once more.
        t3 = gl.minimum(t0 + T, first + (last - first - 1) // T * T)
        x_next, dt_next = _rows_of(X, t3, last, sx_t, col_ok, tile, FULL), _dt_rows(DT, t3, last, sd_t, col_ok, tile, RANK, FULL)
        b_next = _rows_of(Bm, t3, last, sb_t, bcol_ok, narrow, FULL)
        if not LOCAL_PASS:
            z_next, c_next = _rows_of(Z, t3, last, sz_t, col_ok, tile, FULL), _rows_of(C, t3, last, sc_t, bcol_ok, narrow, FULL)
            gl.store(states_p, h, mask=ok2)
            states_p += D * N
        for t1 in range(0, T, 8):
            sums = gl.full([16, 8], 0.0, gl.float32, mma)
            for half in gl.static_range(2):
                ys = ()
                for u in gl.static_range(4):
                    t = t1 + 4 * half + u
                    decay_t, input_t = _pair(pairs_s, t, by_channel)
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
            z = _nonzero(z, Z)
            y = y * (z * _reciprocal(1.0 + _exp2(-LOG2E * z)))
            _store_rows(Y, t0, last, D, col_ok, tile, FULL, y)
    if LOCAL_PASS:
        gl.store(LOCAL + (b * S + s) * D * N + off, h, mask=ok2)
        gl.store(SPAN + (b * S + s) * D + d, span, mask=d_ok)
    else:
        if s == S - 1:
            gl.store(FINAL + b * D * N + off, h, mask=ok2)


@gluon.jit
def scan_gradient_state(
    PROBLEMS, STARTS, SHAPES: gl.constexpr, N: gl.constexpr, T: gl.constexpr, U: gl.constexpr, FIRST: gl.constexpr,
    HAS_RESET: gl.constexpr, HAS_LIVE: gl.constexpr, FULL: gl.constexpr,
):  # fmt: skip
    """`_gradient_state` of several problems in one launch: see `_place`. Of segments FIRST and on."""
    if len(SHAPES) == 1:
        problem, block, b, s = _place(PROBLEMS, STARTS, _item(SHAPES, 0))
        _gradient_state(block, b, s + FIRST, *problem, _item(SHAPES, 0, 2), N, T, U, HAS_RESET, HAS_LIVE, FULL)
    else:
        for i in gl.static_range(len(SHAPES)):
            if (gl.program_id(0) >= STARTS[_item(SHAPES, i, 0)]) & (gl.program_id(0) < STARTS[_item(SHAPES, i, 1)]):
                problem, block, b, s = _place(PROBLEMS, STARTS, _item(SHAPES, i))
                _gradient_state(block, b, s + FIRST, *problem, _item(SHAPES, i, 2), N, T, U, HAS_RESET, HAS_LIVE, FULL)


@gluon.jit
def _gradient_state(
    block, b, s, n_batch, L, S, SEGMENT, DT, FACTOR, Z, C, DY, A, BIAS, RESET, LIVE, LOCAL, SPAN, sd_b, sz_b, sc_b, sy_b,
    SHAPE: gl.constexpr, N: gl.constexpr, T: gl.constexpr, U: gl.constexpr, HAS_RESET: gl.constexpr, HAS_LIVE: gl.constexpr,
    FULL: gl.constexpr,
):  # fmt: skip
    """The gradient a segment hands to the state before it when it gets none from behind, and the sum of its steps."""
    BD: gl.constexpr = 16
    state: gl.constexpr = gl.BlockedLayout([2, N // 4], [8, 4], [1, 1], [1, 0])
    by_channel: gl.constexpr = gl.SliceLayout(1, state)
    by_state: gl.constexpr = gl.SliceLayout(0, state)
    tile: gl.constexpr = gl.BlockedLayout([1, 4], [128 // BD, BD // 4], [1, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 4], [128 // N, N // 4], [1, 1], [1, 0])
    by_token: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    whole: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    cube: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    whole_pairs: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])

    D: gl.constexpr = SHAPE[0]
    sd_t: gl.constexpr = SHAPE[1]
    sz_t: gl.constexpr = SHAPE[2]
    sc_t: gl.constexpr = SHAPE[3]
    sy_t: gl.constexpr = SHAPE[4]
    RANK: gl.constexpr = SHAPE[5]
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    d0 = block * BD
    d = d0 + gl.arange(0, BD, layout=by_channel)
    off = gl.expand_dims(d, 1) * N + gl.expand_dims(gl.arange(0, N, layout=by_state), 0)
    d_ok, ok2 = d < D, off < D * N
    a2 = gl.minimum(gl.load(A + off, mask=ok2, other=-1.0) * LOG2E, -1e-30)
    rows, cols = gl.arange(0, T, layout=gl.SliceLayout(1, tile)), gl.arange(0, BD, layout=gl.SliceLayout(0, tile))
    col_ok, bcol_ok = d0 + cols < D, gl.arange(0, N, layout=gl.SliceLayout(0, narrow)) < N
    bias = _bias(BIAS, d0, D, tile, mma, RANK)
    factor = _factor(FACTOR, d0, D, RANK)

    pairs_s = gl.allocate_shared_memory(gl.float32, [T, 8, 2, 2], cube)  # decay and gradient of y before the gate
    c_s = gl.allocate_shared_memory(gl.float32, [T, N], by_token)
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
    dt_next, z_next = _dt_rows(DT, t0, last, sd_t, col_ok, tile, RANK, FULL), _rows_of(Z, t0, last, sz_t, col_ok, tile, FULL)
    dy_next, c_next = _rows_of(DY, t0, last, sy_t, col_ok, tile, FULL), _rows_of(C, t0, last, sc_t, bcol_ok, narrow, FULL)
    for i in range(0, tiles):
        t0 = first + (tiles - 1 - i) * T
        _, decay, _ = _steps(_dt(dt_next, factor, bias, tile, mma, RANK), t0, last, rows, flags_at, RESET, LIVE, HAS_RESET, HAS_LIVE, FULL)
        z = _whole(z_next, tile)
        dy = _whole(dy_next, tile) * z * _reciprocal(1.0 + _exp2(-LOG2E * z))
        _store_pairs(pairs_s, decay, dy, T, whole_pairs)
        c_s._reinterpret(gl.float32, [T, N], whole).store(_whole(c_next, narrow))
        t3 = gl.maximum(t0 - T, first)
        dt_next, z_next = _dt_rows(DT, t3, last, sd_t, col_ok, tile, RANK, FULL), _rows_of(Z, t3, last, sz_t, col_ok, tile, FULL)
        dy_next, c_next = _rows_of(DY, t3, last, sy_t, col_ok, tile, FULL), _rows_of(C, t3, last, sc_t, bcol_ok, narrow, FULL)
        for t1 in range(0, T, U):
            for u in gl.static_range(U):
                t = T - 1 - t1 - u
                decay_t, dy_t = _pair(pairs_s, t, by_channel)
                asked = gl.expand_dims(dy_t, 1) * gl.expand_dims(c_s.index(t).load(by_state), 0)
                span += decay_t
                carry = (carry + asked) * _exp2(gl.expand_dims(decay_t, 1) * a2)
    gl.store(LOCAL + (b * S + s) * D * N + off, carry, mask=ok2)
    gl.store(SPAN + (b * S + s) * D + d, span, mask=d_ok)


@gluon.constexpr_function
def _states_layout(N):
    """Where shared memory has state n of channel d of a token, (BD, N), in `_backward`: the channels of a lane lie apart and
    those of neighbouring lanes together, so that 8 lanes read 128 bytes in a row."""
    return gl.SharedLinearLayout([[0, b] for b in _bits(N)] + [[2 * b, 0] for b in _bits(8)] + [[1, 0]])


@gluon.constexpr_function
def _parts_layout(N):
    """Where it has lane g's part of the gradients of B (q = 0) and C (q = 1), (4 tokens, g, q, n): q is flipped for every other g, so
    that 8 lanes write 128 bytes without two meeting in a bank."""
    token = [[0, 0, 0, b] for b in _bits(N)] + [[0, 0, 1, 0], [0, 1, 1, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
    return gl.SharedLinearLayout(token + [[1, 0, 0, 0], [2, 0, 0, 0]])


@gluon.constexpr_function
def _sums_layout(T):
    """A tile of two sums, (T / 8, 2, 8, BD): a lane has what it has of a tile."""
    lanes = [[0, 0, 0, 4], [0, 0, 0, 8], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]]
    return gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 0, 2], [0, 1, 0, 0]] + [[b, 0, 0, 0] for b in _bits(T // 8)], lanes, [], [], [T // 8, 2, 8, 16]
    )


@gluon.constexpr_function
def _bits(count):
    return [1 << i for i in range(count.bit_length() - 1)]


@gluon.jit
def scan_backward(
    PROBLEMS, STARTS, SHAPES: gl.constexpr, N: gl.constexpr, T: gl.constexpr, HAS_FINAL: gl.constexpr, HAS_RESET: gl.constexpr,
    HAS_LIVE: gl.constexpr, FULL: gl.constexpr,
):  # fmt: skip
    """`_backward` of several problems in one launch: see `_place`."""
    if len(SHAPES) == 1:
        problem, block, b, s = _place(PROBLEMS, STARTS, _item(SHAPES, 0))
        _backward(block, b, s, *problem, _item(SHAPES, 0, 2), N, T, HAS_FINAL, HAS_RESET, HAS_LIVE, FULL)
    else:
        for i in gl.static_range(len(SHAPES)):
            if (gl.program_id(0) >= STARTS[_item(SHAPES, i, 0)]) & (gl.program_id(0) < STARTS[_item(SHAPES, i, 1)]):
                problem, block, b, s = _place(PROBLEMS, STARTS, _item(SHAPES, i))
                _backward(block, b, s, *problem, _item(SHAPES, i, 2), N, T, HAS_FINAL, HAS_RESET, HAS_LIVE, FULL)


@gluon.jit
def _backward(
    block, b, s, n_batch, L, S, SEGMENT, X, DT, FACTOR, Z, Bm, C, DY, OUT, A, BIAS, SKIP, RESET, LIVE, STATES, DFINAL, LOCAL, SPAN,
    DX, DDT, DZ, DBC, DA, DH0, sx_b, sd_b, sz_b, sb_b, sc_b, sy_b, sdx_b, sdd_b, sdz_b, SHAPE: gl.constexpr,
    N: gl.constexpr, T: gl.constexpr, HAS_FINAL: gl.constexpr, HAS_RESET: gl.constexpr, HAS_LIVE: gl.constexpr,
    FULL: gl.constexpr,
):  # fmt: skip
    """One segment of BD = 16 channels, laid out as in `_forward`, from its end to its beginning, a tile of T tokens a time.

    From the state kept before the tile the states before every eighth token are computed into shared memory. Then, from the last
    eight tokens to the first: their states and decays again, into registers, and the walk back over them. DBC (D / BD, B, L, 2,
    N) and DA (B S, D N + 2 D) get this program's parts of the gradients of B and C, and of A, dt_bias and D.
    FULL: no tile reaches past the channels or the tokens. Strides between tokens are constants: a tile's addresses are sums.
    """
    BD: gl.constexpr = 16
    state: gl.constexpr = gl.BlockedLayout([2, N // 4], [8, 4], [1, 1], [1, 0])
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    by_channel: gl.constexpr = gl.SliceLayout(1, state)
    by_state: gl.constexpr = gl.SliceLayout(0, state)
    tile: gl.constexpr = gl.BlockedLayout([1, 4], [128 // BD, BD // 4], [1, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 4], [128 // N, N // 4], [1, 1], [1, 0])
    # a tile, every 8th row summed
    folded: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, 1, 4], [1, 8, 4], [1, 1, 1], [2, 1, 0]))
    by_token: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    whole: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    cube: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    whole_pairs: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    parts_l: gl.constexpr = gl.BlockedLayout([1, 8, 1, N // 4], [4, 1, 2, 4], [1, 1, 1, 1], [3, 2, 1, 0])

    D: gl.constexpr = SHAPE[0]
    sx_t: gl.constexpr = SHAPE[1]
    sd_t: gl.constexpr = SHAPE[2]
    sz_t: gl.constexpr = SHAPE[3]
    sb_t: gl.constexpr = SHAPE[4]
    sc_t: gl.constexpr = SHAPE[5]
    sy_t: gl.constexpr = SHAPE[6]
    sdx_t: gl.constexpr = SHAPE[7]
    sdd_t: gl.constexpr = SHAPE[8]
    sdz_t: gl.constexpr = SHAPE[9]
    RANK: gl.constexpr = SHAPE[10]
    d0 = block * BD
    d = d0 + gl.arange(0, BD, layout=by_channel)
    off = gl.expand_dims(d, 1) * N + gl.expand_dims(gl.arange(0, N, layout=by_state), 0)
    d_ok, ok2 = d < D, off < D * N
    a2 = gl.minimum(gl.load(A + off, mask=ok2, other=-1.0) * LOG2E, -1e-30)
    rows, cols = gl.arange(0, T, layout=gl.SliceLayout(1, tile)), gl.arange(0, BD, layout=gl.SliceLayout(0, tile))
    bcols = gl.arange(0, N, layout=gl.SliceLayout(0, narrow))
    col_ok, bcol_ok = d0 + cols < D, bcols < N
    bias = _bias(BIAS, d0, D, tile, mma, RANK)
    skip = gl.load(SKIP + d0 + cols, mask=col_ok, other=0.0)

    states_s = gl.allocate_shared_memory(gl.float32, [T // 8, BD, N], _states_layout(N))
    early_s = gl.allocate_shared_memory(gl.float32, [4, 8, 2, N], _parts_layout(N))
    late_s = gl.allocate_shared_memory(gl.float32, [4, 8, 2, N], _parts_layout(N))
    pairs_s = gl.allocate_shared_memory(gl.float32, [T, 8, 2, 2], cube)  # decay and input; of tokens done with, their sums
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
    x_raw, dt_raw = _rows_of(X, t0, last, sx_t, col_ok, tile, FULL), _dt_rows(DT, t0, last, sd_t, col_ok, tile, RANK, FULL)
    z_raw, dy_raw = _rows_of(Z, t0, last, sz_t, col_ok, tile, FULL), _rows_of(DY, t0, last, sy_t, col_ok, tile, FULL)
    out_raw = _rows_of(OUT, t0, last, D, col_ok, tile, FULL)
    b_raw, c_raw = _rows_of(Bm, t0, last, sb_t, bcol_ok, narrow, FULL), _rows_of(C, t0, last, sc_t, bcol_ok, narrow, FULL)
    h_next = gl.load(STATES + (t0 // T).to(gl.int64) * D * N + off, mask=ok2, other=0.0)
    factor = _factor(FACTOR, d0, D, RANK)
    for i in range(0, tiles):
        t0 = first + (tiles - 1 - i) * T
        x = _whole(x_raw, tile)
        dt = _dt(dt_raw, factor, bias, tile, mma, RANK)
        dt, decay, slope = _steps(dt, t0, last, rows, flags_at, RESET, LIVE, HAS_RESET, HAS_LIVE, FULL)
        z, dy = _whole(z_raw, tile), _whole(dy_raw, tile)
        z = _nonzero(z, Z)
        gate = _reciprocal(1.0 + _exp2(-LOG2E * z))
        # y before the gate is out / silu(z); silu'(z) / silu(z) = (1 + z (1 - sigmoid(z))) / z
        dz = dy * _whole(out_raw, tile) * (1.0 + z * (1.0 - gate)) * _reciprocal(z)
        _store_rows(DZ, t0, last, sdz_t, col_ok, tile, FULL, dz)
        dy = dy * z * gate
        d_skip += gl.sum(gl.reshape(dy * x, [T // 8, 8, BD]), 0)
        _store_pairs(pairs_s, decay, dt * x, T, whole_pairs)
        dy_s._reinterpret(gl.float32, [T, BD], whole).store(dy)
        dt_s.store(dt)
        slope_s.store(slope)
        b_s._reinterpret(gl.float32, [T, N], whole).store(_whole(b_raw, narrow))
        c_s._reinterpret(gl.float32, [T, N], whole).store(_whole(c_raw, narrow))

        t3 = gl.maximum(t0 - T, first)
        _fetch_tile(X, t3, last, sx_t, T)
        _fetch_tile(DT, t3, last, sd_t, T)
        _fetch_tile(Z, t3, last, sz_t, T)
        _fetch_tile(DY, t3, last, sy_t, T)
        _fetch_tile(OUT, t3, last, D, T)
        h = h_next
        for t1 in range(0, T - 8, 8):
            states_s.index(t1 // 8).store(h)
            for u in gl.static_range(8):
                decay_t, input_t = _pair(pairs_s, t1 + u, by_channel)
                h = _advance(h, a2, decay_t, input_t, b_s.index(t1 + u).load(by_state))
        states_s.index(T // 8 - 1).store(h)
        for t2 in range(0, T, 8):
            t1 = T - 8 - t2
            h = states_s.index(t1 // 8).load(state)
            before, decays = (), ()
            for u in gl.static_range(8):
                before = before + (h,)
                decay_t, input_t = _pair(pairs_s, t1 + u, by_channel)
                decays = decays + (_exp2(gl.expand_dims(decay_t, 1) * a2),)
                h = h * decays[u] + gl.expand_dims(input_t, 1) * gl.expand_dims(b_s.index(t1 + u).load(by_state), 0)
            decay_sums, input_sums = gl.full([16, 8], 0.0, gl.float32, mma), gl.full([16, 8], 0.0, gl.float32, mma)
            for low in gl.static_range(4, -4, -4):
                through_decay, through_input, parts = (), (), ()
                for u in gl.static_range(low + 3, low - 1, -1):
                    decay_t, input_t = _pair(pairs_s, t1 + u, by_channel)
                    dy_t = dy_s.index(t1 + u).load(by_channel)
                    dh = carry + gl.expand_dims(dy_t, 1) * gl.expand_dims(c_s.index(t1 + u).load(by_state), 0)
                    carry = dh * decays[u]
                    q = carry * before[u]
                    d_a += q * gl.expand_dims(decay_t, 1)
                    through_decay = through_decay + (_in_lane(q * a2, N),)
                    through_input = through_input + (_in_lane(dh * gl.expand_dims(b_s.index(t1 + u).load(by_state), 0), N),)
                    d_b = gl.sum(gl.reshape(dh * gl.expand_dims(input_t, 1), [8, 2, N]), 1)
                    d_c = gl.sum(gl.reshape(h * gl.expand_dims(dy_t, 1), [8, 2, N]), 1)
                    parts = (gl.join(d_b, d_c),) + parts
                    h = before[u]
                decay_sums = _over_lanes(through_decay, low + 3, -1, decay_sums, mma, True)
                input_sums = _over_lanes(through_input, low + 3, -1, input_sums, mma, True)
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
            sums = gl.permute(gl.join(_by_token(decay_sums), _by_token(input_sums)), [2, 0, 1])
            pairs_s._reinterpret(gl.float32, [T // 8, 2, 8, BD], cube).index(t1 // 8).store(sums)

        # The tile before is on its way while this one is finished.
        x_now = x_raw
        x_raw, dt_raw = _rows_of(X, t3, last, sx_t, col_ok, tile, FULL), _dt_rows(DT, t3, last, sd_t, col_ok, tile, RANK, FULL)
        z_raw, dy_raw = _rows_of(Z, t3, last, sz_t, col_ok, tile, FULL), _rows_of(DY, t3, last, sy_t, col_ok, tile, FULL)
        out_raw = _rows_of(OUT, t3, last, D, col_ok, tile, FULL)
        b_raw, c_raw = _rows_of(Bm, t3, last, sb_t, bcol_ok, narrow, FULL), _rows_of(C, t3, last, sc_t, bcol_ok, narrow, FULL)
        h_next = gl.load(STATES + (t3 // T).to(gl.int64) * D * N + off, mask=ok2, other=0.0)
        factor = _factor(FACTOR, d0, D, RANK)  # once more: there are no registers to keep it in
        sums = gl.permute(pairs_s._reinterpret(gl.float32, [T // 8, 2, 8, BD], whole_pairs).load(_sums_layout(T)), [0, 2, 3, 1])
        through_decay, through_input = gl.split(gl.reshape(sums, [T, BD, 2]))
        through_decay = gl.convert_layout(through_decay, tile, assert_trivial=True)
        through_input = gl.convert_layout(through_input, tile, assert_trivial=True)
        dx = through_input * dt_s.load(tile) + dy_s._reinterpret(gl.float32, [T, BD], whole).load(tile) * gl.expand_dims(skip, 0)
        ddt = (through_input * _whole(x_now, tile) + LN2 * through_decay) * slope_s.load(tile)
        d_bias += gl.sum(gl.reshape(ddt, [T // 8, 8, BD]), 0)
        _store_rows(DX, t0, last, sdx_t, col_ok, tile, FULL, dx)
        _store_rows(DDT, t0, last, sdd_t, col_ok, tile, FULL, ddt)
    DA += (b * S + s) * D * (N + 2)
    gl.store(DA + off, d_a, mask=ok2)
    d_vector = d0 + gl.arange(0, BD, layout=gl.SliceLayout(0, folded))
    gl.store(DA + D * N + d_vector, gl.sum(d_bias, 0), mask=d_vector < D)
    gl.store(DA + D * (N + 1) + d_vector, gl.sum(d_skip, 0), mask=d_vector < D)
    if s == 0:
        gl.store(DH0 + b * D * N + off, carry, mask=ok2)
