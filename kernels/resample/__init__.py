"""SeRpEnt's resampling: the banded integer clock, compression of a sequence to its emitted elements, and restoration.
`reference.py` is the meaning, and the form of CPUs and of variants; `triton*.py` are for GPUs; docs/serpent_layer.md says more."""
import torch

from . import reference
from .reference import TICK_BITS, TICKS, Carry, Clock, Sampling, apply_map, banded_clock

__all__ = [
    "TICK_BITS", "TICKS", "Carry", "Clock", "Sampling", "apply_map", "banded_clock", "clock_maps", "compress", "compress_beside",
    "decompress",
]


def _implementation(x: torch.Tensor, sampling: Sampling, held: bool = False):
    in_triton = sampling.window == "integrated" and not sampling.stride and not held
    if in_triton and x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16):
        from . import triton

        return triton
    return reference


def compress(u, basis, weight, bias, reset, sampling, slots, carry=None):
    with torch.autocast(u.device.type, enabled=False):
        return _implementation(u, sampling).compress(u, basis, weight, bias, reset, sampling, slots, carry)


def compress_beside(u, basis, weight, bias, reset, sampling, slots, carry=None):
    with torch.autocast(u.device.type, enabled=False):
        return _implementation(u, sampling).compress_beside(u, basis, weight, bias, reset, sampling, slots, carry)


def decompress(y, basis, clock, sampling, tail=None):
    with torch.autocast(y.device.type, enabled=False):
        return _implementation(y, sampling, basis is None).decompress(y, basis, clock, sampling, tail)


def clock_maps(u, weight, bias, reset, sampling, ends):
    with torch.autocast(u.device.type, enabled=False):
        return _implementation(u, sampling).clock_maps(u, weight, bias, reset, sampling, ends)


clock_maps.__doc__ = reference.clock_maps.__doc__
compress.__doc__, decompress.__doc__ = reference.compress.__doc__, reference.decompress.__doc__
compress_beside.__doc__ = reference.compress_beside.__doc__
