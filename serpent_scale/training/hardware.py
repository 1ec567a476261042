"""What the device can do at best, and the memory used."""
from __future__ import annotations

import resource

import torch

from serpent_scale.config import Config
from serpent_scale.model.accounting import GIB

# Dense bf16 peaks in TFLOP/s, by a part of the device's name (vendors' datasheets).
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165}


def peak_flops(config: Config, device: torch.device) -> float:
    """Peak FLOP/s of one device, 0 if not known."""
    if config.training.peak_tflops is not None:
        return config.training.peak_tflops * 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), 0.0)


def peak_memory_gib() -> float:
    """Largest memory so far: allocated on the GPU, or resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
