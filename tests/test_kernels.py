"""Kernels against independent references: outputs and every gradient, in float64, on fresh random inputs."""
import pytest
import torch
import torch.nn.functional as F

from serpent_scale.kernels.causal_conv1d import causal_conv1d
from serpent_scale.kernels.linear_cross_entropy import linear_cross_entropy, linear_token_nll
from serpent_scale.kernels.resample import TICKS, banded_clock
from serpent_scale.kernels.selective_scan import chunked, selective_scan
from serpent_scale.kernels.selective_scan.reference import selective_scan_reference
from serpent_scale.model.documents import Documents


def leaves(*shapes, dtype=torch.float64):
    return [torch.randn(*s, dtype=dtype, requires_grad=True) for s in shapes]


def gradients(outputs, inputs):
    """Gradients of a fixed random projection of the outputs."""
    generator = torch.Generator().manual_seed(7)
    total = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs)
    return torch.autograd.grad(total, inputs, retain_graph=True)


def scan_inputs(b, length, d, n, dtype=torch.float64):
    x, dt, B, C, D, z, bias, h0, A = leaves(
        (b, length, d), (b, length, d), (b, length, n), (b, length, n), (d,), (b, length, d), (d,), (b, d, n), (d, n), dtype=dtype
    )
    A = (-torch.exp(A.detach())).requires_grad_()
    return x, dt, A, B, C, D, z, bias, h0


@pytest.mark.parametrize("length, masked", [(1, False), (37, True), (300, True), (63, False)])
def test_selective_scan_equals_the_sequential_reference(length, masked, monkeypatch):
    monkeypatch.setitem(chunked.WORK_ELEMENTS, "cpu", 3 * 5 * 4 * 16)  # chunks of 16 steps
    *inputs, h0 = scan_inputs(3, length, 5, 4)
    reset = torch.rand(3, length) < 0.1 if masked else None
    live = (torch.arange(length) < torch.tensor([[length], [length // 2], [0]])) if masked else None
    got = selective_scan(*inputs, reset=reset, live=live, initial_state=h0)
    want = selective_scan_reference(*inputs, reset=reset, live=live, initial_state=h0)
    for g, w in zip((*got, *gradients(got, (*inputs, h0))), (*want, *gradients(want, (*inputs, h0)))):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


def test_selective_scan_in_float32_and_bfloat16_stays_near_float64():
    inputs = [v.detach() for v in scan_inputs(2, 200, 8, 16)]
    want, _ = selective_scan_reference(*inputs[:8])
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        rounded = [v.to(dtype) if v.dim() == 3 else v.float() for v in inputs[:8]]
        exact, _ = selective_scan_reference(*[v.double() for v in rounded])
        got, state = selective_scan(*rounded)
        assert got.dtype == dtype and state.dtype == torch.float32
        assert (got.double() - exact).norm() / want.norm() < bound


def test_selective_scan_is_causal_to_the_bit_and_splits_at_any_point():
    *inputs, h0 = scan_inputs(2, 90, 6, 4, torch.float32)
    y, final = selective_scan(*inputs, initial_state=h0)
    changed = [torch.cat([v[:, :50], torch.randn_like(v[:, 50:])], 1) if v.dim() == 3 else v for v in inputs]
    assert torch.equal(selective_scan(*changed, initial_state=h0)[0][:, :50], y[:, :50])
    first, state = selective_scan(*[v[:, :41] if v.dim() == 3 else v for v in inputs], initial_state=h0)
    second, state = selective_scan(*[v[:, 41:] if v.dim() == 3 else v for v in inputs], initial_state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), y)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("length", [1, 2, 33])
def test_causal_conv1d_equals_torch_and_its_halo_continues_it(length):
    x, weight, bias, halo = leaves((2, length, 6), (6, 4), (6,), (2, 3, 6))
    got, out = causal_conv1d(x, weight, bias, halo=halo)
    padded = torch.cat([halo, x], 1)
    want = F.silu(F.conv1d(padded.transpose(1, 2), weight.flip(1)[:, None], bias, groups=6)).transpose(1, 2)
    for g, w in zip((got, out, *gradients((got, out), (x, weight, bias, halo))),
                    (want, padded[:, -3:], *gradients((want, padded[:, -3:]), (x, weight, bias, halo)))):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


def test_causal_conv1d_is_cut_at_documents_and_ignores_unused_slots():
    x, weight, bias = leaves((1, 20, 6), (6, 4), (6,))
    documents = Documents(torch.arange(20)[None] == 9, live=torch.arange(20)[None] < 11)
    y, halo = causal_conv1d(x, weight, bias, documents.since_reset, n_live=documents.n_live)
    torch.testing.assert_close(y[:, 9:], causal_conv1d(x[:, 9:], weight, bias)[0])
    torch.testing.assert_close(y[:, :9], causal_conv1d(x[:, :9], weight, bias)[0])
    # the document began at token 9 and slots in use end at 10: one tap of the halo lies before the document
    torch.testing.assert_close(halo, torch.cat([torch.zeros(1, 1, 6, dtype=x.dtype), x[:, 9:11]], 1))


@pytest.mark.parametrize("chunk", [5, 64])
def test_linear_cross_entropy_equals_torch(chunk):
    hidden, weight = leaves((23, 8), (64, 8))
    labels = torch.randint(0, 50, (23,))
    labels[[0, 11]] = -100
    got = linear_cross_entropy(hidden, weight, labels, 50, chunk)
    want = F.cross_entropy((hidden @ weight.t())[:, :50], labels, reduction="sum")
    torch.testing.assert_close(got, want)
    for g, w in zip(gradients((got,), (hidden, weight)), gradients((want,), (hidden, weight))):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)
    assert not gradients((got,), (weight,))[0][50:].any()
    nll = linear_token_nll(hidden, weight, labels, 50, chunk)
    torch.testing.assert_close(nll.sum(), want)
    both = linear_cross_entropy(hidden, weight, labels, 50, chunk, per_token=True)
    assert torch.equal(both[0], got) and torch.equal(both[1], nll) and not both[1].requires_grad


@pytest.mark.parametrize("length, band", [(1, 4.0), (37, 0.0), (257, 1.5)])
def test_banded_clock_equals_one_step_at_a_time(length, band):
    band, dev = round(band * TICKS), torch.tensor([0, band // 2])
    drift = torch.randint(-TICKS, TICKS, (2, length))
    reset = torch.rand(2, length) < 0.05
    want, free = torch.empty_like(drift), torch.empty_like(reset)
    for b in range(2):
        d = int(dev[b])
        for t in range(length):
            raw = (0 if reset[b, t] else d) + int(drift[b, t])
            d = max(-band, min(band, raw))
            want[b, t], free[b, t] = d, d == raw
    got = banded_clock(drift, band, reset, dev)
    assert torch.equal(got[0], want) and torch.equal(got[1], free)


def test_work_in_64_bit_positions_past_2_31():
    documents = Documents(torch.zeros(1, 3, dtype=torch.bool), ((3,),))
    assert int(documents.since_reset[0, 0]) > 2**31
