"""Tiles of 32 tokens between global memory and registers, for the scan's kernels in Gluon: their layouts, how they are read and
written, and dt formed of its two factors on the way.

A tile is read in two steps, so that it can be asked for long before it is used: `rows_of` and `dt_rows` load, `whole` and `dt_of`
take what has come.
"""
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

BD = gl.constexpr(16)  # channels of a program
MMA = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8]))


@gluon.constexpr_function
def rows_layout(width):
    """Rows of a token-major matrix, four values a lane: (128 / width, width) at once."""
    return gl.BlockedLayout([1, 4], [128 // width, width // 4], [1, 1], [1, 0])


TILE = gl.constexpr(rows_layout(BD))


@gluon.jit
def columns_of(d0, D: gl.constexpr, N: gl.constexpr):
    """Of a tile: its rows (32,) and columns (BD,), which of these there are, from channel d0 on, and the same of N columns."""
    rows, cols = gl.arange(0, 32, layout=gl.SliceLayout(1, TILE)), gl.arange(0, BD, layout=gl.SliceLayout(0, TILE))
    return rows, cols, d0 + cols < D, gl.arange(0, N, layout=gl.SliceLayout(0, rows_layout(N))) < N


@gluon.jit
def _float(block, layout: gl.constexpr):
    """One block of `rows_of` in float32."""
    if block.dtype == gl.int32:  # two bfloat16
        low, high = (block << 16).to(gl.float32, bitcast=True), (block & -65536).to(gl.float32, bitcast=True)
        value = gl.reshape(gl.join(low, high), [block.shape[0], 2 * block.shape[1]])
        value = gl.convert_layout(value, layout, assert_trivial=True)
    else:
        value = block.to(gl.float32)
    return value


@gluon.jit
def whole(blocks):
    """What `rows_of` read, (32, W) in float32."""
    layout: gl.constexpr = rows_layout(4 * len(blocks))
    if len(blocks) == 4:
        even = gl.join(_float(blocks[0], layout), _float(blocks[2], layout))
        odd = gl.join(_float(blocks[1], layout), _float(blocks[3], layout))
        rows = gl.permute(gl.join(even, odd), [2, 3, 0, 1])
    else:
        rows = gl.permute(gl.join(_float(blocks[0], layout), _float(blocks[1], layout)), [2, 0, 1])
    return gl.convert_layout(gl.reshape(rows, [32, rows.shape[-1]]), layout, assert_trivial=True)


@gluon.jit
def _two(pairs):
    """Two bfloat16 in an int32 -> twice as many columns."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=1
    )
    return gl.reshape(gl.join(low, high), [pairs.shape[0], 2 * pairs.shape[1]])


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
def rows_of(base, t0, last, stride: gl.constexpr, col_ok, FULL: gl.constexpr):
    """Rows t0..t0+32 of a token-major matrix, W wide as col_ok is, 0 outside the segment; in blocks of as many rows as make 4
    values a lane. Of bfloat16 two in an int32 where that can be: the compiler would take them apart at once, and wait."""
    W: gl.constexpr = col_ok.shape[0]
    R: gl.constexpr = 128 // W
    layout: gl.constexpr = rows_layout(W)
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
def fetch_tile(base, first, last, stride, T: gl.constexpr):
    """Ask for a tile's lines in the L2 cache, to be loaded later."""
    row = gl.minimum(first + gl.arange(0, T, layout=gl.BlockedLayout([1], [32], [1], [0])), last - 1)
    p = (base + row.to(gl.int64) * stride).to(gl.int64, bitcast=True)
    gl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [p], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def factor_of(base, d0, D: gl.constexpr, RANK: gl.constexpr):
    """Rows d0..d0+16 of the other factor (D, RANK), 32 columns at a time. They are in the order, and `dt_of` takes the columns in
    the order, in which the product needs nothing moved between lanes."""
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
def bias_of(base, d0, D: gl.constexpr, RANK: gl.constexpr):
    """dt_bias of BD channels, where `dt_of` adds it."""
    if RANK == 0:
        d = d0 + gl.arange(0, 16, layout=gl.SliceLayout(0, TILE))
    else:
        place = gl.arange(0, 16, layout=gl.SliceLayout(0, MMA))
        d = d0 + place % 8 // 2 * 4 + place // 8 * 2 + place % 2
    return gl.load(base + d, mask=d < D, other=0.0)


@gluon.jit
def dt_rows(base, t0, last, stride: gl.constexpr, col_ok, RANK: gl.constexpr, FULL: gl.constexpr):
    """What `dt_of` makes dt of: with a rank, 32 columns at a time, rows t0..t0+32 of the factor that has as many columns."""
    if RANK == 0:
        blocks = rows_of(base, t0, last, stride, col_ok, FULL)
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
def dt_of(blocks, factor, bias, RANK: gl.constexpr):
    """dt with its bias, (32, 16) in float32."""
    if RANK == 0:
        dt = whole(blocks) + gl.expand_dims(bias, 0)
    else:
        total = gl.full([32, 16], 0.0, gl.float32, MMA) + gl.expand_dims(bias, 0)
        for q in gl.static_range(RANK // 32):
            left = gl.reshape(gl.permute(gl.reshape(_two(blocks[q]), [32, 4, 2, 2, 2]), [0, 2, 3, 1, 4]), [32, 32])
            right = gl.reshape(gl.permute(gl.reshape(_two(factor[q]), [16, 4, 2, 2, 2]), [2, 3, 1, 4, 0]), [32, 16])
            right = gl.convert_layout(right, gl.DotOperandLayout(1, MMA, 2))
            total = mma_v2(gl.convert_layout(left, gl.DotOperandLayout(0, MMA, 2)), right, total)
        dt = gl.reshape(gl.permute(gl.reshape(total, [32, 2, 4, 2]), [0, 2, 1, 3]), [32, 16])
        dt = gl.convert_layout(dt, TILE, assert_trivial=True)
    return dt


@gluon.jit
def store_rows(base, t0, last, stride: gl.constexpr, col_ok, FULL: gl.constexpr, value):
    """value (32, 16) into rows t0..t0+32."""
    p = _block(base, t0, stride, 16, TILE, 8)
    even, odd = gl.split(gl.permute(gl.reshape(value.to(base.dtype.element_ty), [2, 2, 8, 16]), [2, 3, 0, 1]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    blocks = (first, second, third, fourth)
    for k in gl.static_range(4):
        block = gl.convert_layout(blocks[k], TILE, assert_trivial=True)
        if FULL:
            gl.store(p + k * 8 * stride, block)
        else:
            gl.store(p + k * 8 * stride, block, mask=_inside(t0 + 8 * k, last, col_ok, TILE, 8))
