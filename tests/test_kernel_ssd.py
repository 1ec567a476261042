"""Mamba-2's state-space duality: the chunked forms against the recurrence in float64, outputs and every gradient."""
import pytest
import torch
from numerics import DEVICE, assert_near, gradients, relative_error

from serpent_scale.kernels.ssd import reference, ssd, triton

NAMES = ("y", "state", "x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")]


def inputs(batch, length, heads, head_dim, groups, d_state, dtype=torch.float32, masked=False):
    """Arguments of ssd, with B, C and x as parts of wider tensors, and the two masks (or None)."""
    def part(*shape):
        wide = torch.randn(batch, length, shape[0], shape[1] + 8, device=DEVICE, dtype=torch.float64)
        return wide.to(dtype)[..., :shape[1]].detach()

    def vector(*shape):
        return torch.randn(*shape, device=DEVICE, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))

    x, B, C = part(heads, head_dim), part(groups, d_state), part(groups, d_state)
    dt = part(1, heads)[:, :, 0]
    args = [x, dt, -vector(heads).abs() * 2, B, C, vector(heads), vector(heads), vector(batch, heads, head_dim, d_state)]
    reset = torch.rand(batch, length, device=DEVICE) < 0.04 if masked else None
    live = torch.rand(batch, length, device=DEVICE) < 0.9 if masked else None
    return [v.requires_grad_() for v in args], reset, live


def run(form, args, reset, live, state=True, **options):
    out = form(*args[:7], reset, live, args[7] if state else None, **options)
    return *out, *gradients(out, args if state else args[:7])


def exact(args, reset, live, state=True):
    return run(reference.ssd_reference, [v.detach().double().requires_grad_() for v in args], reset, live, state)


@pytest.mark.parametrize("length, masked, chunk", [(1, False, 8), (63, True, 16), (40, True, 64), (64, False, 16)])
def test_chunks_in_pytorch_equal_the_recurrence(length, masked, chunk):
    args, reset, live = inputs(2, length, 4, 5, 2, 3, torch.float64, masked)
    for state in (True, False):
        got, want = run(reference.ssd, args, reset, live, state, chunk=chunk), exact(args, reset, live, state)
        for name, g, w in zip(NAMES, got, want):
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype, bound, loose", [(torch.float32, 5e-6, 5e-5), (torch.bfloat16, 1e-2, 1e-1)])
@pytest.mark.parametrize("batch, length, heads, head_dim, groups, d_state, masked, state", [
    (2, 1, 2, 16, 1, 16, False, True),
    (1, 75, 4, 16, 2, 24, True, True),
    (1, 140, 3, 20, 1, 16, True, False),
    (1, 33, 2, 16, 1, 80, False, False),
    pytest.param(2, 1000, 24, 64, 1, 128, True, True, marks=gpu),
    pytest.param(1, 500, 8, 128, 2, 64, False, False, marks=gpu),
])
def test_outputs_and_gradients(dtype, bound, loose, batch, length, heads, head_dim, groups, d_state, masked, state, poisoned):
    args, reset, live = inputs(batch, length, heads, head_dim, groups, d_state, dtype, masked)
    if masked:
        reset[0, 64] = True  # on a chunk's border
    got, want = run(triton.ssd, args, reset, live, state), exact(args, reset, live, state)
    assert [g.dtype for g in got] == [dtype, torch.float32, *(v.dtype for v in (args if state else args[:7]))]
    # One number a head, the sum over all steps of terms that cancel: A, dt_bias.
    bounds = {"A": loose, "dt_bias": loose, "dt": 2 * bound}
    for name, g, w in zip(NAMES, got, want):
        assert_near((name,), (g,), (w,), bounds.get(name, bound))
    if state:
        again = run(triton.ssd, args, reset, live, state)
        assert all(torch.equal(a, b) for a, b in zip(got, again))


def test_small_and_strong_decays_stay_finite(poisoned):
    args, _, live = inputs(1, 150, 2, 16, 1, 16, torch.float32, True)
    with torch.no_grad():
        args[1][:, ::2] = 12.0  # a decay of e^-1000 a step beside nearly none
        args[1][:, 1::2] = -30.0
        args[2][:] = torch.tensor([-90.0, -1e-4])
    got, want = run(triton.ssd, args, None, live), exact(args, None, live)
    for name, g, w in zip(NAMES, got, want):
        assert torch.isfinite(g).all(), name
    assert_near(NAMES[:3], got[:3], want[:3], 1e-4)


@pytest.mark.parametrize("form", [triton.ssd, ssd])
def test_causal_to_the_bit_documents_apart_and_split_at_any_point(form):
    args, _, _ = inputs(1, 150, 2, 16, 1, 16)
    args = [v.detach() for v in args]
    steps = (0, 1, 3, 4)
    y, final = form(*args[:7], initial_state=args[7])
    changed = [torch.cat([v[:, :71], torch.randn_like(v[:, 71:])], 1) if i in steps else v for i, v in enumerate(args)]
    assert torch.equal(form(*changed[:7], initial_state=args[7])[0][:, :71], y[:, :71])

    def cut(part):
        return [v[:, part] if i in steps else v for i, v in enumerate(args[:7])]

    first, state = form(*cut(slice(0, 71)), initial_state=args[7])
    second, state = form(*cut(slice(71, None)), initial_state=state)
    assert relative_error(torch.cat([first, second], 1), y) < 5e-6 and relative_error(state, final) < 5e-6
    reset = torch.arange(150, device=DEVICE)[None] == 71
    alone, state = form(*cut(slice(71, None)))
    y, final = form(*args[:7], reset=reset, initial_state=args[7])
    assert relative_error(y[:, 71:], alone) < 5e-6 and relative_error(final, state) < 5e-6
    assert torch.equal(y[:, :71], form(*args[:7], initial_state=args[7])[0][:, :71])


def test_gradients_into_given_buffers_and_only_one_output_used():
    args, reset, live = inputs(1, 40, 2, 16, 1, 16, masked=True)
    plain = [v.detach() for v in args]
    grad_y = torch.randn(1, 40, 2, 16, device=DEVICE)
    want = triton.backward(grad_y, None, *plain[:7], reset, live, plain[7])
    wide = torch.full((1, 40, 2 * 16 + 2 * 16 + 2), float("nan"), device=DEVICE)
    out = (wide[..., :32].unflatten(-1, (2, 16)), wide[..., 64:], wide[..., 32:48].unsqueeze(2), wide[..., 48:64].unsqueeze(2))
    got = triton.backward(grad_y, None, *plain[:7], reset, live, plain[7], out=out)
    assert got[0] is out[0] and got[1] is out[1] and got[3] is out[2] and got[4] is out[3]
    assert all(torch.equal(g, w) for g, w in zip(got, want)) and not wide.isnan().any()
    y, state = triton.ssd(*args[:7], reset, live, args[7])
    for g, w in zip(torch.autograd.grad((y * grad_y).sum(), args, retain_graph=True), want):
        assert torch.equal(g, w)
    _, exact_state = reference.ssd_reference(*[v.detach().double() for v in args[:7]], reset, live, args[7].double())
    got, want = (torch.autograd.grad(v.sum(), args[7])[0] for v in (state, exact_state))
    assert relative_error(got, want) < 5e-6
