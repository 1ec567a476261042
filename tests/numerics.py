"""Comparing a kernel with a float64 reference: outputs and every gradient."""
from __future__ import annotations

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; NaN if anything is not finite."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def assert_near(names, got, want, bound: float) -> None:
    """Each of `got` is within `bound` of its float64 twin, and finite. None matches None."""
    for name, g, w in zip(names, got, want, strict=True):
        assert (g is None) == (w is None), name
        if g is not None:
            error = relative_error(g, w)
            assert error <= bound, f"{name}: relative error {error:.2e} > {bound:.0e}"


def gradients(outputs, inputs, seed: int = 7) -> list[Tensor | None]:
    """Gradients of a fixed random projection of the outputs; the projection is the same for any dtype and device."""
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for out in outputs:
        if out is not None:
            direction = torch.randn(out.shape, generator=generator, dtype=torch.float64)
            total = total + (out * direction.to(out.device, out.dtype)).sum(dtype=torch.promote_types(out.dtype, torch.float32))
    return list(torch.autograd.grad(total, inputs, allow_unused=True))
