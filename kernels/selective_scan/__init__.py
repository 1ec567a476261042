"""Selective scan of Mamba (Gu & Dao, arXiv 2312.00752, algorithm 2): h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t.
`selective_scan` chooses the implementation; `reference.py` is the sequential meaning, `chunked.py` the PyTorch form in use."""
from .chunked import selective_scan

__all__ = ["selective_scan"]
