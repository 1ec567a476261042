"""The scan's kernels in plain Triton, one token at a time: for where those of `gluon_*.py` do not run."""
from __future__ import annotations

import triton
import triton.language as tl

from ..launch import problem_of

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
CUT = tl.constexpr(3e38)  # a step so long that nothing is left of the state: exp2(CUT * A) = 0


@triton.jit
def _place(PROBLEMS, STARTS, BD: tl.constexpr):
    """(problem, block of channels, row, segment) of this program."""
    problem, place = problem_of(PROBLEMS, STARTS)
    blocks = (problem[0] + BD - 1) // BD
    row = place // blocks
    return problem, place % blocks, (row % problem[1]).to(tl.int64), row // problem[1]


@triton.jit
def _step_size(DT, bias, ok, at, RESET, LIVE, HAS_RESET: tl.constexpr, HAS_LIVE: tl.constexpr):
    """(dt, step of the decay, slope of softplus) of one token's channels, and whether the token counts."""
    v = tl.load(DT, mask=ok, other=0.0).to(tl.float32) + bias
    e = tl.exp2(tl.abs(v) * -LOG2E)
    # log1p(e) by a polynomial fitted on [0, 1], relative error 2e-7
    p = 0.005253457929939032 * e - 0.02958850748836994
    p = p * e + 0.07836166769266129
    p = p * e - 0.13674770295619965
    p = p * e + 0.19111430644989014
    p = p * e - 0.24844369292259216
    p = p * e + 0.33319270610809326
    p = p * e - 0.49999502301216125
    p = p * e + 1.0
    dt = tl.maximum(v, 0.0) + p * e
    slope = tl.where(v >= 0.0, 1.0, e) / (1.0 + e)
    if HAS_LIVE:
        count = (tl.load(LIVE + at) != 0).to(tl.float32)
        dt *= count
        slope *= count
    decay = dt
    if HAS_RESET:
        decay = tl.where(tl.load(RESET + at) != 0, CUT, dt)
    return dt, decay, slope


@triton.jit
def scan_forward(
    PROBLEMS, STARTS,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, KEEP: tl.constexpr, LOCAL_PASS: tl.constexpr, HAS_H0: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_LIVE: tl.constexpr,
):  # fmt: skip
    """As in `gluon_forward.py`."""
    problem, block, b, s = _place(PROBLEMS, STARTS, BD)
    (D, n_batch, L, S, SEGMENT, X, DT, FACTOR, Z, Bm, C, A, BIAS, SKIP, H0, LOCAL, SPAN, RESET, LIVE, Y, STATES, FINAL,
     sx_b, sx_t, sd_b, sd_t, sz_b, sz_t, sb_b, sb_t, sc_b, sc_t) = problem  # fmt: skip
    d, n = block * BD + tl.arange(0, BD), tl.arange(0, NP)
    ok, n_ok = d < D, n < N
    ok2 = ok[:, None] & n_ok[None, :]
    off = d[:, None] * N + n[None, :]
    a2 = tl.minimum(tl.load(A + off, mask=ok2, other=-1.0) * LOG2E, -1e-30)
    bias, skip = tl.load(BIAS + d, mask=ok, other=0.0), tl.load(SKIP + d, mask=ok, other=0.0)
    h = tl.zeros((BD, NP), tl.float32)
    if not LOCAL_PASS:
        if HAS_H0:
            h = tl.load(H0 + b * D * N + off, mask=ok2, other=0.0)
        for j in range(0, s):
            span = tl.load(SPAN + (b * S + j) * D + d, mask=ok, other=0.0)
            h = h * tl.exp2(a2 * span[:, None]) + tl.load(LOCAL + (b * S + j) * D * N + off, mask=ok2, other=0.0)
    span = tl.zeros((BD,), tl.float32)
    n_kept = (L + KEEP - 1) // KEEP
    for t in range(s * SEGMENT, tl.minimum((s + 1) * SEGMENT, L)):
        at = b * L + t
        t64 = at - b * L
        x = tl.load(X + b * sx_b + t64 * sx_t + d, mask=ok, other=0.0).to(tl.float32)
        dt, decay, _ = _step_size(DT + b * sd_b + t64 * sd_t + d, bias, ok, at, RESET, LIVE, HAS_RESET, HAS_LIVE)
        b_t = tl.load(Bm + b * sb_b + t64 * sb_t + n, mask=n_ok, other=0.0).to(tl.float32)
        if not LOCAL_PASS:
            if t % KEEP == 0:
                tl.store(STATES + (b * n_kept + t // KEEP) * D * N + off, h, mask=ok2)
        h = h * tl.exp2(decay[:, None] * a2) + (dt * x)[:, None] * b_t[None, :]
        if LOCAL_PASS:
            span += decay
        else:
            c_t = tl.load(C + b * sc_b + t64 * sc_t + n, mask=n_ok, other=0.0).to(tl.float32)
            z = tl.load(Z + b * sz_b + t64 * sz_t + d, mask=ok, other=0.0).to(tl.float32)
            z = tl.where(z == 0.0, 1e-30, z)  # the backward pass divides by silu(z)
            y = tl.sum(h * c_t[None, :], 1) + skip * x
            tl.store(Y + at * D + d, (y * (z / (1.0 + tl.exp2(z * -LOG2E)))).to(Y.dtype.element_ty), mask=ok)
    if LOCAL_PASS:
        tl.store(LOCAL + (b * S + s) * D * N + off, h, mask=ok2)
        tl.store(SPAN + (b * S + s) * D + d, span, mask=ok)
    else:
        if s == S - 1:
            tl.store(FINAL + b * D * N + off, h, mask=ok2)


@triton.jit
def scan_gradient_state(
    PROBLEMS, STARTS,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, FIRST: tl.constexpr, HAS_RESET: tl.constexpr, HAS_LIVE: tl.constexpr,
):  # fmt: skip
    """As in `gluon_gradient_state.py`."""
    problem, block, b, s = _place(PROBLEMS, STARTS, BD)
    (D, n_batch, L, S, SEGMENT, DT, FACTOR, Z, C, DY, A, BIAS, RESET, LIVE, LOCAL, SPAN,
     sd_b, sd_t, sz_b, sz_t, sc_b, sc_t, sy_b, sy_t) = problem  # fmt: skip
    s += FIRST
    d, n = block * BD + tl.arange(0, BD), tl.arange(0, NP)
    ok, n_ok = d < D, n < N
    ok2 = ok[:, None] & n_ok[None, :]
    off = d[:, None] * N + n[None, :]
    a2 = tl.minimum(tl.load(A + off, mask=ok2, other=-1.0) * LOG2E, -1e-30)
    bias = tl.load(BIAS + d, mask=ok, other=0.0)
    carry, span = tl.zeros((BD, NP), tl.float32), tl.zeros((BD,), tl.float32)
    first = s * SEGMENT
    last = tl.minimum(first + SEGMENT, L)
    for i in range(0, last - first):
        t = last - 1 - i
        at = b * L + t
        t64 = at - b * L
        _, decay, _ = _step_size(DT + b * sd_b + t64 * sd_t + d, bias, ok, at, RESET, LIVE, HAS_RESET, HAS_LIVE)
        z = tl.load(Z + b * sz_b + t64 * sz_t + d, mask=ok, other=0.0).to(tl.float32)
        dy = tl.load(DY + b * sy_b + t64 * sy_t + d, mask=ok, other=0.0).to(tl.float32) * (z / (1.0 + tl.exp2(z * -LOG2E)))
        c_t = tl.load(C + b * sc_b + t64 * sc_t + n, mask=n_ok, other=0.0).to(tl.float32)
        carry = (carry + dy[:, None] * c_t[None, :]) * tl.exp2(decay[:, None] * a2)
        span += decay
    tl.store(LOCAL + (b * S + s) * D * N + off, carry, mask=ok2)
    tl.store(SPAN + (b * S + s) * D + d, span, mask=ok)


@triton.jit
def scan_backward(
    PROBLEMS, STARTS,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, KEEP: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_RESET: tl.constexpr,
    HAS_LIVE: tl.constexpr,
):  # fmt: skip
    """As in `gluon_backward.py`; a program keeps the states of KEEP tokens in its part of SCRATCH."""
    problem, pid, b, s = _place(PROBLEMS, STARTS, BD)
    (D, n_batch, L, S, SEGMENT, X, DT, FACTOR, Z, Bm, C, DY, OUT, A, BIAS, SKIP, RESET, LIVE, STATES, DFINAL, LOCAL, SPAN,
     DX, DDT, DZ, DBC, DA, DH0, sx_b, sx_t, sd_b, sd_t, sz_b, sz_t, sb_b, sb_t, sc_b, sc_t, sy_b, sy_t,
     sdx_b, sdx_t, sdd_b, sdd_t, sdz_b, sdz_t, SCRATCH) = problem  # fmt: skip
    d, n = pid * BD + tl.arange(0, BD), tl.arange(0, NP)
    ok, n_ok = d < D, n < N
    ok2 = ok[:, None] & n_ok[None, :]
    off = d[:, None] * N + n[None, :]
    a2 = tl.minimum(tl.load(A + off, mask=ok2, other=-1.0) * LOG2E, -1e-30)
    bias, skip = tl.load(BIAS + d, mask=ok, other=0.0), tl.load(SKIP + d, mask=ok, other=0.0)
    carry = tl.zeros((BD, NP), tl.float32)
    if HAS_FINAL:
        carry = tl.load(DFINAL + b * D * N + off, mask=ok2, other=0.0)
    for i in range(0, S - 1 - s):
        j = S - 1 - i
        span = tl.load(SPAN + (b * S + j) * D + d, mask=ok, other=0.0)
        carry = carry * tl.exp2(a2 * span[:, None]) + tl.load(LOCAL + (b * S + j) * D * N + off, mask=ok2, other=0.0)
    d_a = tl.zeros((BD, NP), tl.float32)
    d_bias, d_skip = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    n_kept = (L + KEEP - 1) // KEEP
    scratch = SCRATCH + ((pid * n_batch + b) * S + s) * (KEEP + 1) * BD * NP + tl.arange(0, BD)[:, None] * NP + n[None, :]
    first = s * SEGMENT
    last = tl.minimum(first + SEGMENT, L)
    chunks = (last - first + KEEP - 1) // KEEP
    for k in range(0, chunks):
        t0 = first + (chunks - 1 - k) * KEEP
        size = tl.minimum(KEEP, last - t0)
        h = tl.load(STATES + (b * n_kept + t0 // KEEP) * D * N + off, mask=ok2, other=0.0)
        tl.store(scratch, h)
        for u in range(0, size):
            at = b * L + t0 + u
            t64 = at - b * L
            x = tl.load(X + b * sx_b + t64 * sx_t + d, mask=ok, other=0.0).to(tl.float32)
            dt, decay, _ = _step_size(DT + b * sd_b + t64 * sd_t + d, bias, ok, at, RESET, LIVE, HAS_RESET, HAS_LIVE)
            b_t = tl.load(Bm + b * sb_b + t64 * sb_t + n, mask=n_ok, other=0.0).to(tl.float32)
            h = h * tl.exp2(decay[:, None] * a2) + (dt * x)[:, None] * b_t[None, :]
            tl.store(scratch + (u + 1) * BD * NP, h)
        tl.debug_barrier()
        for v in range(0, size):
            u = size - 1 - v
            at = b * L + t0 + u
            t64 = at - b * L
            x = tl.load(X + b * sx_b + t64 * sx_t + d, mask=ok, other=0.0).to(tl.float32)
            dt, decay, slope = _step_size(DT + b * sd_b + t64 * sd_t + d, bias, ok, at, RESET, LIVE, HAS_RESET, HAS_LIVE)
            b_t = tl.load(Bm + b * sb_b + t64 * sb_t + n, mask=n_ok, other=0.0).to(tl.float32)
            c_t = tl.load(C + b * sc_b + t64 * sc_t + n, mask=n_ok, other=0.0).to(tl.float32)
            z = tl.load(Z + b * sz_b + t64 * sz_t + d, mask=ok, other=0.0).to(tl.float32)
            z = tl.where(z == 0.0, 1e-30, z)
            gate = 1.0 / (1.0 + tl.exp2(z * -LOG2E))
            dy = tl.load(DY + b * sy_b + t64 * sy_t + d, mask=ok, other=0.0).to(tl.float32)
            out = tl.load(OUT + at * D + d, mask=ok, other=0.0).to(tl.float32)
            # y before the gate is out / silu(z); silu'(z) / silu(z) = (1 + z (1 - sigmoid(z))) / z
            dz = dy * out * (1.0 + z * (1.0 - gate)) / z
            dy = dy * z * gate
            before, after = tl.load(scratch + u * BD * NP), tl.load(scratch + (u + 1) * BD * NP)
            dh = carry + dy[:, None] * c_t[None, :]
            carry = dh * tl.exp2(decay[:, None] * a2)
            q = carry * before
            through_input = tl.sum(dh * b_t[None, :], 1)
            ddt = (through_input * x + tl.sum(q * a2, 1) * LN2) * slope
            d_a += q * decay[:, None]
            d_bias += ddt
            d_skip += dy * x
            tl.store(DX + b * sdx_b + t64 * sdx_t + d, (through_input * dt + dy * skip).to(DX.dtype.element_ty), mask=ok)
            tl.store(DDT + b * sdd_b + t64 * sdd_t + d, ddt.to(DDT.dtype.element_ty), mask=ok)
            tl.store(DZ + b * sdz_b + t64 * sdz_t + d, dz.to(DZ.dtype.element_ty), mask=ok)
            part = DBC + ((pid.to(tl.int64) * n_batch + b) * L + t0 + u) * (2 * N) + n
            tl.store(part, tl.sum(dh * (dt * x)[:, None], 0).to(DBC.dtype.element_ty), mask=n_ok)
            tl.store(part + N, tl.sum(after * dy[:, None], 0).to(DBC.dtype.element_ty), mask=n_ok)
        tl.debug_barrier()
    DA += (b * S + s) * D * (N + 2)
    tl.store(DA + off, d_a, mask=ok2)
    tl.store(DA + D * N + d, d_bias, mask=ok)
    tl.store(DA + D * (N + 1) + d, d_skip, mask=ok)
    if s == 0:
        tl.store(DH0 + b * D * N + off, carry, mask=ok2)
