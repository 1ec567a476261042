"""The diagonal scan against one step at a time: outputs and every gradient."""
import pytest
import torch
from numerics import assert_near

from serpent_scale.kernels.diagonal_scan import diagonal_scan
from serpent_scale.kernels.diagonal_scan.reference import diagonal_scan_reference
from serpent_scale.model.documents import Documents


def inputs(length, dtype):
    torch.manual_seed(length)
    decay = torch.complex(-torch.rand(5, dtype=torch.float64), 3 * torch.randn(5, dtype=torch.float64))
    values = torch.randn(3, length, 5, dtype=torch.complex128), decay, torch.randn(3, 5, dtype=torch.complex128)
    reset = torch.rand(3, length) < 0.1
    reset[:, 0] = torch.tensor([True, False, False])
    return [v.to(dtype).requires_grad_() for v in values], Documents(reset).since_reset


@pytest.mark.parametrize("length", [1, 2, 63, 130])
@pytest.mark.parametrize("dtype, bound", [(torch.complex128, 1e-13), (torch.complex64, 2e-6)])
@pytest.mark.parametrize("carried", [True, False])
def test_outputs_and_gradients(length, dtype, bound, carried):
    (x, decay, state), since = inputs(length, dtype)
    sources, found = [x, decay, state] if carried else [x, decay], []
    for scan, precision in ((diagonal_scan, dtype), (diagonal_scan_reference, torch.complex128)):
        leaves = [v.detach().to(precision).requires_grad_() for v in sources]
        h = scan(leaves[0], leaves[1], since, *leaves[2:])
        loss = (h.real * torch.linspace(-1, 1, h.numel(), dtype=h.real.dtype).view_as(h) + h.imag.sin()).sum()
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)  # of one step, the decay has none
        found.append([None if v is None else torch.view_as_real(v) for v in (h.detach(), *gradients)])
    got, want = found
    if want[2] is None:
        got[2] = got[2] if got[2].any() else None
    assert_near(("h", "x", "decay", "state")[: len(got)], got, want, bound)


def test_states_before_a_changed_step_do_not_move_by_a_bit():
    (x, decay, state), since = inputs(130, torch.complex64)
    h = diagonal_scan(x, decay, since, state)
    for t in (1, 64, 129):
        changed = torch.cat([x[:, :t], torch.randn_like(x[:, t:])], 1)
        assert torch.equal(torch.view_as_real(diagonal_scan(changed, decay, since, state)[:, :t]), torch.view_as_real(h[:, :t]))
