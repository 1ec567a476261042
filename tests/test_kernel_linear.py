"""Products with weights of higher precision: as autocast's, but for the weight's gradient, which is not rounded."""
import torch
import torch.nn.functional as F
from numerics import DEVICE, assert_near, relative_error

from serpent_scale.kernels.linear import linear, low_copies


def both(copy: bool):
    """(outputs, gradients of x and the weight) of ours and of torch's under autocast; the weight's exact gradient."""
    x = torch.randn(3, 500, 24, device=DEVICE).bfloat16()
    weight, grad = torch.randn(40, 24, device=DEVICE), torch.randn(3, 500, 40, device=DEVICE).bfloat16()
    found = []
    for op in (linear, F.linear):
        leaves = [v.clone().requires_grad_() for v in (x, weight)]
        more = low_copies([leaves[1]], torch.bfloat16) if copy and op is linear else ()
        with torch.autocast(DEVICE, torch.bfloat16):
            y = op(*leaves, *more)
        found.append((y, *torch.autograd.grad(y, leaves, grad)))
    return *found, grad.double().flatten(0, 1).t() @ x.double().flatten(0, 1)


def test_as_under_autocast():
    for copy in (False, True):
        ours, theirs, exact = both(copy)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        assert ours[2].dtype == torch.float32
        assert_near(["weight"], [ours[2]], [exact], 1e-6 if DEVICE == "cuda" else 4e-3)
        assert relative_error(ours[2], exact) <= 1.01 * relative_error(theirs[2], exact)


def test_without_autocast_as_it_is():
    x, weight = torch.randn(5, 8, device=DEVICE), torch.randn(6, 8, device=DEVICE)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))


def test_no_tokens():
    x, weight = (torch.randn(2, n, 8, device=DEVICE, dtype=dtype, requires_grad=True) for n, dtype in
                 ((0, torch.bfloat16), (6, torch.float32)))
    with torch.autocast(DEVICE, torch.bfloat16):
        y = linear(x, weight[0])
    grads = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == (2, 0, 6) and grads[0].shape == x.shape and not grads[1].any()
