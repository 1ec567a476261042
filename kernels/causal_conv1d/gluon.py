"""The convolution's backward pass in Gluon, with a product formed on the way: what reaches y is a sum of a gradient and of rows
P (tokens, K) times a matrix M (K, D), as where y goes into a scan and into a projection.

Four warps walk back in time, each over STEPS tokens of the same 64 channels, 16 tokens at a time: the tensor cores form those
tokens' rows of P M, which then lie in the registers of the lanes that walk. `triton.py` holds the host side.
"""
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

CHUNK = gl.constexpr(16)  # tokens
WIDTH = gl.constexpr(4)
PIECE = gl.constexpr(32)  # columns of P that a lane's 16 bytes of a row are part of


@gluon.jit
def _sigmoid(z):
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 e;
        mul.f32 e, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 e, e;
        add.f32 e, e, 0f3F800000;
        rcp.approx.ftz.f32 $0, e;
        }""", "=f,f", [z], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _float(pairs, layout: gl.constexpr):
    """Two bfloat16 in an int32 -> float32, channels in their order."""
    low, high = (pairs << 16).to(gl.float32, bitcast=True), (pairs & -65536).to(gl.float32, bitcast=True)
    return gl.convert_layout(gl.reshape(gl.join(low, high), [4, 64]), layout, assert_trivial=True)


@gluon.jit
def _row(p, t, L, channel_ok, MASKED: gl.constexpr):
    """Token t of each walk, two bfloat16 in an int32, (4, 32); 0 outside the row."""
    if MASKED:
        row = gl.load(p, mask=(t >= 0) & (t < L) & channel_ok, other=0)
    else:
        row = gl.load(p)
    return row


@gluon.jit
def _chunk(base, start, newest, lag: gl.constexpr, stride: gl.constexpr, L, channel_ok, FULL: gl.constexpr):
    """16 tokens lag before newest, newest - 1, ..., base being to token start. FULL: only what is before the walk can lie outside
    the row."""
    rows, p, t = (), base + (newest - lag) * (stride // 2), start + (newest - lag)
    for r in gl.static_range(CHUNK):
        rows = rows + (_row(p - r * (stride // 2), t - r, L, channel_ok, not FULL or r + lag >= CHUNK),)
    return rows


@gluon.jit
def _operand(P, first_token, oldest, stride: gl.constexpr, L, K: gl.constexpr, STEPS: gl.constexpr, MASKED: gl.constexpr):
    """Rows oldest .. oldest + 15 of P in each walk, (64, 32) a piece of its columns."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))  # (half of the 16 tokens, walk, token)
    i = oldest + row // 32 * 8 + row % 8
    t = first_token + row // 8 % 4 * STEPS + i
    at = gl.expand_dims(t.to(gl.int64) * stride, 1) + gl.expand_dims(gl.arange(0, PIECE, layout=gl.SliceLayout(0, layout)), 0)
    ok = gl.expand_dims((i < STEPS + WIDTH - 1) & (t < L), 1) & (at >= 0)
    pieces = ()
    for q in gl.static_range(K // PIECE):
        if MASKED:
            pieces = pieces + (gl.load(P + at + q * PIECE, mask=ok, other=0.0),)
        else:
            pieces = pieces + (gl.load(P + at + q * PIECE),)
    return pieces


@gluon.jit
def _product(pieces, matrix, mma: gl.constexpr, walk: gl.constexpr):
    """The 16 rows of each walk times the matrix: newest first, (4, 64) each."""
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    together: gl.constexpr = gl.BlockedLayout([CHUNK, 2], [1, 32], [4, 1], [1, 0])
    total = gl.full([64, 64], 0.0, gl.float32, mma)
    for q in gl.static_range(len(pieces)):
        # Columns of P are taken in the order that gives each lane what it loaded: see `_matrix`.
        rows = gl.permute(gl.reshape(pieces[q], [2, 4, 8, 4, 2, 2, 2]), [1, 0, 2, 4, 5, 3, 6])
        total = warpgroup_mma(gl.convert_layout(gl.reshape(rows, [64, PIECE]), left), matrix[q], total)
    rows = gl.permute(gl.reshape(gl.convert_layout(total, together), [4, 2, 2, 2, 2, 64]), [0, 5, 1, 2, 3, 4])
    found = ()
    for r in gl.static_range(CHUNK):
        found = found + (gl.convert_layout(_token(rows, CHUNK - 1 - r), walk, assert_trivial=True),)
    return found


@gluon.jit
def _token(rows, token: gl.constexpr):
    """One of 16 tokens: the last four dimensions are the bits of its number."""
    rows = gl.split(rows)[token % 2]
    rows = gl.split(rows)[token // 2 % 2]
    rows = gl.split(rows)[token // 4 % 2]
    return gl.split(rows)[token // 8]


@gluon.jit
def _matrix(M, d0, D: gl.constexpr, K: gl.constexpr):
    """64 columns of M (K, D) in shared memory, its rows in the order in which `_product` takes the columns of P."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    place, d = gl.arange(0, PIECE, layout=gl.SliceLayout(1, layout)), gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    column = place // 2 % 4 * 8 + place // 16 * 4 + place // 8 % 2 * 2 + place % 2
    at = gl.expand_dims(column * D, 1) + gl.expand_dims(d0 + d, 0)
    ok = gl.expand_dims(column >= 0, 1) & gl.expand_dims(d0 + d < D, 0)
    pieces = ()
    for q in gl.static_range(K // PIECE):
        rows = gl.load(M + at + q * PIECE * D, mask=ok, other=0.0)
        pieces = pieces + (gl.allocate_shared_memory(gl.bfloat16, [PIECE, 64], gl.NVMMASharedLayout(128, 16, 2), rows),)
    fence_async_shared()
    return pieces


@gluon.jit
def _step_back(grad, x, since, newer, sent, taps, bias, RESET: gl.constexpr):
    """As `triton._step_back`."""
    window = newer + (x,)
    z = bias + taps[0] * window[0]
    for k in gl.static_range(1, WIDTH):
        tap = window[k]
        if RESET:
            tap = gl.where(since >= k, tap, 0.0)
        z += taps[k] * tap
    gate = _sigmoid(z)
    g = grad * (gate + z * gate * (1.0 - gate))
    sent = sent + (gl.zeros_like(g),)
    passed, grad_w = (sent[0] + taps[0] * g,), (window[0] * g,)
    for k in gl.static_range(1, WIDTH):
        through = g
        if RESET:
            through = gl.where(since >= k, g, 0.0)
        passed = passed + (sent[k] + taps[k] * through,)
        grad_w = grad_w + (window[k] * through,)
    return grad_w, g, passed[0], window[1:], passed[1:]


@gluon.jit
def _since(SINCE, start, i, L, RESET: gl.constexpr):
    t = start + i
    since = t
    if RESET:
        since = gl.load(SINCE + t, mask=(t >= 0) & (t < L), other=0).to(gl.int32)
    return since


@gluon.jit
def _walk_back(
    GRAD, P, X, OUT, SINCE, matrix, taps, bias, first_token, start, channel_ok, at, out_ok, L,
    mma: gl.constexpr, walk: gl.constexpr, g_l: gl.constexpr, p_l: gl.constexpr, x_l: gl.constexpr, o_l: gl.constexpr, K: gl.constexpr, STEPS: gl.constexpr,
    RESET: gl.constexpr, FULL: gl.constexpr,
):  # fmt: skip
    """Gradients of the weight's columns and of the bias; that of x is stored. start (4, 1): first token of each walk, as loads of
    two channels a lane want it; at: the same in the layout of the walk."""
    nothing = gl.full([4, 64], 0.0, gl.float32, walk)
    newer, sent, grad_w, grad_b = (), (), (nothing,), nothing
    for k in gl.static_range(WIDTH - 1):
        i = STEPS + WIDTH - 2 - k
        newer = newer + (_float(_row(X + i * (x_l // 2), start + i, L, channel_ok, True), walk),)
        sent = sent + (nothing,)
        grad_w = grad_w + (nothing,)
    # The first tokens behind the stretch send back to it.
    rows = _product(_operand(P, first_token, STEPS, p_l, L, K, STEPS, True), matrix, mma, walk)
    for k in gl.static_range(WIDTH - 1):
        i = STEPS + WIDTH - 2 - k
        grad = _float(_row(GRAD + i * (g_l // 2), start + i, L, channel_ok, True), walk) + rows[CHUNK - WIDTH + 1 + k]
        old = _float(_row(X + (i - WIDTH + 1) * (x_l // 2), start + (i - WIDTH + 1), L, channel_ok, True), walk)
        _, _, _, newer, sent = _step_back(grad, old, _since(SINCE, at, i, L, RESET), newer, sent, taps, bias, RESET)
    pieces = _operand(P, first_token, STEPS - CHUNK, p_l, L, K, STEPS, not FULL)
    grads = _chunk(GRAD, start, STEPS - 1, 0, g_l, L, channel_ok, FULL)
    old = _chunk(X, start, STEPS - 1, WIDTH - 1, x_l, L, channel_ok, FULL)
    for done in range(0, STEPS, CHUNK):
        newest = STEPS - 1 - done
        rows = _product(pieces, matrix, mma, walk)
        # The chunk before is on its way while this one is worked on; before the first it is the first once more.
        before = gl.maximum(newest - CHUNK, CHUNK - 1)
        pieces = _operand(P, first_token, before - CHUNK + 1, p_l, L, K, STEPS, not FULL)
        next_grads = _chunk(GRAD, start, before, 0, g_l, L, channel_ok, FULL)
        next_old = _chunk(X, start, before, WIDTH - 1, x_l, L, channel_ok, FULL)
        out = OUT + newest * o_l
        for r in gl.static_range(CHUNK):
            i = newest - r
            since = _since(SINCE, at, i, L, RESET)
            grad, x = _float(grads[r], walk) + rows[r], _float(old[r], walk)
            grad_taps, g, here, newer, sent = _step_back(grad, x, since, newer, sent, taps, bias, RESET)
            grad_b += g
            sums = ()
            for k in gl.static_range(WIDTH):
                sums = sums + (grad_w[k] + grad_taps[k],)
            grad_w = sums
            if FULL:
                gl.store(out - r * o_l, here.to(gl.bfloat16))
            else:
                gl.store(out - r * o_l, here.to(gl.bfloat16), mask=(at + i < L) & out_ok)
        grads, old = next_grads, next_old
    return grad_w, grad_b


@gluon.jit
def conv_backward(
    GRAD, P, M, X, WEIGHT, BIAS, SINCE, OUT, PARTIAL, L, n_segments, g_b, p_b, x_b, o_b, D: gl.constexpr, K: gl.constexpr,
    g_l: gl.constexpr, p_l: gl.constexpr, x_l: gl.constexpr, o_l: gl.constexpr, STEPS: gl.constexpr, HAS_RESET: gl.constexpr,
    FULL: gl.constexpr,
):  # fmt: skip
    """GRAD (B, L, D), X, OUT and P (B, L, K) bfloat16 in rows of any even stride, M (K, D). PARTIAL (B n_segments 4, 5 D): of each
    walk, the gradient of WEIGHT (D, 4) and then that of BIAS. FULL: no program reaches past the channels or the tokens."""
    walk: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    pairs: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    blocks: gl.constexpr = (D + 63) // 64
    d0 = gl.program_id(0) % blocks * 64
    place = gl.program_id(0) // blocks
    segment, b = place % n_segments, (place // n_segments).to(gl.int64)
    first = segment * (4 * STEPS)
    pair = gl.expand_dims(d0 // 2 + gl.arange(0, 32, layout=gl.SliceLayout(0, pairs)), 0)
    start = gl.expand_dims(first + STEPS * gl.arange(0, 4, layout=gl.SliceLayout(1, pairs)), 1)
    d = gl.expand_dims(d0 + gl.arange(0, 64, layout=gl.SliceLayout(0, walk)), 0)
    at = gl.expand_dims(first + STEPS * gl.arange(0, 4, layout=gl.SliceLayout(1, walk)), 1)
    inside = d < D
    taps = ()
    for k in gl.static_range(WIDTH):
        taps = taps + (gl.load(WEIGHT + d * WIDTH + k, mask=inside, other=0.0).to(gl.float32),)
    bias = gl.load(BIAS + d, mask=inside, other=0.0).to(gl.float32)
    matrix = _matrix(M, d0, D, K)
    two: gl.constexpr = gl.pointer_type(gl.int32)
    grads = (GRAD + b * g_b).to(two, bitcast=True) + (start.to(gl.int64) * (g_l // 2) + pair)
    xs = (X + b * x_b).to(two, bitcast=True) + (start.to(gl.int64) * (x_l // 2) + pair)
    outs = OUT + b * o_b + (at.to(gl.int64) * o_l + d)
    P += b * p_b
    channel_ok = pair < D // 2
    if HAS_RESET:  # most stretches lie inside one document and need no masks
        SINCE += b * L
        t = first + gl.arange(0, 4 * STEPS, layout=gl.BlockedLayout([1], [32], [4], [0]))
        far = gl.load(SINCE + t, mask=t < L, other=WIDTH)
        near = gl.load(SINCE + t + (WIDTH - 1), mask=t + (WIDTH - 1) < L, other=WIDTH)
        if gl.min(gl.minimum(far, near), 0) < WIDTH - 1:
            grad_w, grad_b = _walk_back(
                grads, P, xs, outs, SINCE, matrix, taps, bias, first, start, channel_ok, at, inside, L, mma, walk, g_l, p_l, x_l, o_l,
                K, STEPS, True, FULL,
            )  # fmt: skip
        else:
            grad_w, grad_b = _walk_back(
                grads, P, xs, outs, SINCE, matrix, taps, bias, first, start, channel_ok, at, inside, L, mma, walk, g_l, p_l, x_l, o_l,
                K, STEPS, False, FULL,
            )  # fmt: skip
    else:
        grad_w, grad_b = _walk_back(
            grads, P, xs, outs, SINCE, matrix, taps, bias, first, start, channel_ok, at, inside, L, mma, walk, g_l, p_l, x_l, o_l,
            K, STEPS, False, FULL,
        )  # fmt: skip
    row = gl.expand_dims(place * 4 + gl.arange(0, 4, layout=gl.SliceLayout(1, walk)), 1)
    partial = PARTIAL + row.to(gl.int64) * ((WIDTH + 1) * D)
    for k in gl.static_range(WIDTH):
        gl.store(partial + d * WIDTH + k, grad_w[k], mask=inside & (row >= 0))
    gl.store(partial + WIDTH * D + d, grad_b, mask=inside & (row >= 0))
