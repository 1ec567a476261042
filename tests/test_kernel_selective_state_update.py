"""One decoding step of the selective scan: against the scan's own reference at length 1."""
import pytest
import torch
from numerics import DEVICE, assert_near

from serpent_scale.kernels.selective_scan.reference import selective_scan_reference
from serpent_scale.kernels.selective_state_update import selective_state_update, triton

BOUND = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 5e-3}


def inputs(batch, d_inner, d_state, dtype, wide=0):
    """x, dt, z of one step as (possibly strided) rows; dt from far below 0 to beyond softplus's straight part."""
    def rows(width):
        return torch.randn(batch, width + wide, device=DEVICE).to(dtype)[:, wide:]

    x, dt, z, B, C = rows(d_inner), rows(d_inner) * 8, rows(d_inner), rows(d_state), rows(d_state)
    dt[0, 0], dt[0, -1] = 30, -20
    A = -torch.exp(torch.randn(d_inner, d_state, device=DEVICE))
    D, bias = torch.randn(2, d_inner, device=DEVICE)
    return torch.randn(batch, d_inner, d_state, device=DEVICE), x, dt, A, B, C, D, z, bias


def exact(state, x, dt, A, B, C, D, z, bias, reset=None):
    state, x, dt, A, B, C, D, z, bias = (v.double() for v in (state, x, dt, A, B, C, D, z, bias))
    steps = (v[:, None] for v in (x, dt))
    y, h = selective_scan_reference(
        *steps, A, B[:, None], C[:, None], D, z[:, None], bias, None if reset is None else reset[:, None], initial_state=state
    )
    return y[:, 0], h


@pytest.mark.parametrize("form", [selective_state_update, triton.selective_state_update])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch, d_inner, d_state, wide", [(1, 1, 1, 0), (3, 37, 16, 5), (2, 64, 12, 0)])
def test_equals_one_step_of_the_scan(form, dtype, batch, d_inner, d_state, wide, poisoned):
    args = inputs(batch, d_inner, d_state, dtype, wide)
    before = args[0].clone()
    reset = torch.tensor([True, False, True][:batch], device=DEVICE)
    for cut in (None, reset):
        y, state = form(*args, reset=cut)
        assert y.dtype == dtype and state.dtype == torch.float32 and torch.equal(args[0], before)
        want = exact(*args, reset=cut)
        assert_near(("y",), (y,), want[:1], BOUND[dtype])
        assert_near(("state",), (state,), want[1:], 5e-6)
        again = form(*args, reset=cut)
        assert torch.equal(again[0], y) and torch.equal(again[1], state)


def test_small_intervals_keep_their_relative_accuracy():
    state, x, dt, A, B, C, D, z, bias = inputs(2, 16, 4, torch.float32)
    args = torch.zeros_like(state), x, torch.full_like(dt, -14.0), A, B, C, torch.zeros_like(D), z, torch.zeros_like(bias)
    assert_near(("y", "state"), triton.selective_state_update(*args), exact(*args), 5e-6)


@pytest.mark.parametrize("form", [selective_state_update, triton.selective_state_update])
def test_in_place(form):
    args = inputs(2, 40, 16, torch.float32)
    y, state = form(*args)
    y2, same = form(*args, out=args[0])
    assert same is args[0] and torch.equal(same, state) and torch.equal(y2, y)


def test_float64_on_the_reference():
    args = [v.double() for v in inputs(2, 5, 4, torch.float32)]
    for got, want in zip(selective_state_update(*args), exact(*args)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
