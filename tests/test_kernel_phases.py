"""A scan in phases over shards, held to the scan of the whole: outputs, states, gradients, and what a shard asks of the state
before it."""
import pytest
import torch
from numerics import DEVICE, assert_near

from serpent_scale.kernels import mamba_inner as mamba_package
from serpent_scale.kernels import ssd as ssd_package
from serpent_scale.kernels.linear_later import linear_later
from serpent_scale.kernels.mamba_inner import reference as mamba_reference
from serpent_scale.kernels.mamba_inner import triton as mamba_triton
from serpent_scale.kernels.resample import TICKS, Sampling
from serpent_scale.kernels.resample import reference as resample_reference
from serpent_scale.kernels.resample import triton_clock
from serpent_scale.kernels.selective_scan import launches as scan_launches
from serpent_scale.kernels.ssd import reference as ssd_reference
from serpent_scale.kernels.ssd import triton as ssd_triton

pytestmark = pytest.mark.usefixtures("poisoned")
LENGTH, CUT = 110, 70


def flags(documents: bool):
    """reset and live of LENGTH tokens; a document begins in the first shard of row 0 only, and some slots are not in use."""
    reset, live = torch.zeros(2, LENGTH, dtype=torch.bool), torch.ones(2, LENGTH, dtype=torch.bool)
    if documents:
        reset[0, 20] = reset[0, 50] = True
        live[:, 60:66] = False
    return (reset, live) if documents else (None, None)


def part(value, lo, hi):
    return None if value is None else value[:, lo:hi]


def mamba(form, dtype, documents):
    """The phases of a piece, and the whole, of the inside of a Mamba layer; then its leaves."""
    torch.manual_seed(0)
    d, n, rank = 8, 16, 3
    values = [
        torch.randn(2, LENGTH, 2 * d), torch.randn(d, 1), torch.randn(d), torch.randn(rank + 2 * n, d) / d**0.5,
        torch.randn(d, rank) / 2, torch.randn(d) - 3, torch.randn(d, n) / 2 - 1, torch.randn(d),
    ]  # fmt: skip
    leaves = [v.to(DEVICE, dtype).requires_grad_() for v in values]
    reset, live = (None if f is None else f.to(DEVICE) for f in flags(documents))

    def arguments(lo, hi):
        # A convolution of one tap: shards need nothing of each other but the state.
        return leaves[0][:, lo:hi], *leaves[1:], None, None, part(reset, lo, hi), part(live, lo, hi)

    def whole():
        y, _, state = mamba_reference.mamba_inner(*arguments(0, LENGTH))
        return y, state

    return lambda lo, hi: form.mamba_inner_phases(*arguments(lo, hi)), whole, leaves


def ssd(form, dtype, documents):
    torch.manual_seed(0)
    heads, p, n = 4, 8, 16
    values = [
        torch.randn(2, LENGTH, heads, p), torch.randn(2, LENGTH, heads), -torch.rand(heads) - 0.5, torch.randn(2, LENGTH, 2, n),
        torch.randn(2, LENGTH, 2, n), torch.randn(heads), torch.randn(heads) - 4,
    ]  # fmt: skip
    leaves = [v.to(DEVICE, dtype).requires_grad_() for v in values]
    reset, live = (None if f is None else f.to(DEVICE) for f in flags(documents))

    def arguments(lo, hi):
        x, dt, A, B, C, D, bias = leaves
        return x[:, lo:hi], dt[:, lo:hi], A, B[:, lo:hi], C[:, lo:hi], D, bias, part(reset, lo, hi), part(live, lo, hi)

    return lambda lo, hi: ssd_package.ssd_phases(*arguments(lo, hi)), lambda: ssd_reference.ssd(*arguments(0, LENGTH)), leaves


def check(phases, whole, leaves, bound, live):
    """Two shards in a row, forward and backward as ranks do it, against the whole."""
    weight = torch.randn(*whole()[0].shape, dtype=torch.float64).to(DEVICE, leaves[0].dtype)
    if live is not None:
        weight = weight * live.to(DEVICE).view(2, LENGTH, *[1] * (weight.ndim - 2))
    y, state = whole()
    after = torch.randn(*state.shape, dtype=torch.float64).to(DEVICE, state.dtype)
    wanted = torch.autograd.grad((y * weight).sum() + (state * after).sum(), leaves)

    first, second = phases(0, CUT), phases(CUT, LENGTH)
    zero = torch.zeros_like(first.state)
    between = first.decay(first.span) * zero + first.state
    y1, state1, *_ = first.run(zero)
    y2, state2, *_ = second.run(between)
    assert_near(["y", "state", "between"], [torch.cat([y1, y2], 1) * weight, state2, between], [y * weight, state, state1], bound)
    assert_near(["state after"], [second.decay(second.span) * between + second.state], [state], bound)
    asked = second.gradient(second.saved, weight[:, CUT:], after)
    first.gradient(first.saved, weight[:, :CUT], None)  # leaves something for the backward pass
    found = torch.autograd.grad(
        [y1, state1, y2, state2], leaves, [weight[:, :CUT], asked, weight[:, CUT:], after]
    )
    assert_near([f"gradient {i}" for i in range(len(leaves))], found, wanted, bound)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("scan", [mamba, ssd])
def test_reference_phases(scan, documents):
    form = mamba_package.reference if scan is mamba else None
    check(*scan(form, torch.float64, documents), 1e-12, flags(documents)[1])


def test_fused_mamba_phases(monkeypatch):
    monkeypatch.setattr(scan_launches, "segments_of", lambda batch, length, programs, device: (-(-length // 32), 32))
    check(*mamba(mamba_triton, torch.float32, True), 2e-5, flags(True)[1])


def test_fused_ssd_phases(monkeypatch):
    monkeypatch.setattr(ssd_package, "_form", lambda x: ssd_triton)
    check(*ssd(None, torch.float32, True), 2e-5, flags(True)[1])


def test_clock_maps(monkeypatch):
    monkeypatch.setattr(triton_clock, "CLOCK_BLOCK", 16)
    monkeypatch.setattr(triton_clock, "SEGMENT", 64)
    sampling = Sampling(TICKS // 2, TICKS, 0.25, 1.0, 1.0, 5, 0.2, 2, 0.4)
    torch.manual_seed(0)
    u, weight, bias = torch.randn(2, 200, 12), torch.randn(12), torch.randn(1)
    reset = torch.zeros(2, 200, dtype=torch.bool)
    reset[1, 90] = True
    ends = [0, 1, 64, 90, 91, 200, 200]
    inputs = [v.to(DEVICE) for v in (u, weight, bias, reset)]
    maps = triton_clock.clock_maps(*inputs, sampling, ends)
    expected = resample_reference.clock_maps(u, weight, bias, reset, sampling, ends)
    drift = torch.round(resample_reference.intervals(u, weight, bias, sampling) * TICKS).long() - sampling.rate
    for dev in (-TICKS, 12345, TICKS):  # a clock that begins anywhere ends where its map says
        start, ended = torch.full((2,), dev), []
        steps, _ = resample_reference.banded_clock(drift, sampling.band, reset, start)
        for end, clock_map, fast in zip(ends, expected, maps.cpu(), strict=True):
            ended.append(resample_reference.apply_map(start, *clock_map))
            assert torch.equal(ended[-1], steps[:, end - 1] if end else start)
            near = resample_reference.apply_map(start, *fast)
            assert (near - ended[-1]).abs().max() < 32, "the logistic function may round otherwise"
        assert len({tuple(e.tolist()) for e in ended}) > 4, "the clock moves"


@pytest.mark.parametrize("now", [slice(0, 3), slice(3, None)])
def test_linear_later_is_the_product(now):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 4).requires_grad_(), torch.randn(8, 4).requires_grad_()
    grad = torch.randn(2, 5, 8)
    for autocast, bound in ((False, 1e-6), (True, 1e-2)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, fill = linear_later(x, weight, now)
            before = y[..., now].clone()
            fill()
            expected = torch.nn.functional.linear(x, weight)
        assert y.dtype == expected.dtype and torch.equal(before, y[..., now])
        got, want = (torch.autograd.grad(v, (x, weight), grad.to(v.dtype)) for v in (y, expected))
        assert_near(["y", "x", "weight"], [y, *got], [expected, *want], bound)
