"""Scan with one complex decay per channel, the same at every step (S4D, S5): h_t = exp(log_decay) h_{t-1} + x_t.
`reference.py` has the sequential meaning and the parallel form, of logarithmic depth, for any device."""
from .reference import decay, diagonal_scan, diagonal_scan_phases

__all__ = ["decay", "diagonal_scan", "diagonal_scan_phases"]
