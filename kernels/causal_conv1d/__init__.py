"""Depthwise causal convolution over time with SiLU, cut at document starts, with a halo in and out.
`reference.py` is the PyTorch form in use."""
from .reference import causal_conv1d

__all__ = ["causal_conv1d"]
