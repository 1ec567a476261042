"""A linear layer without a bias."""
from __future__ import annotations

from torch import Tensor, nn

from serpent_scale.kernels.linear import linear


class Linear(nn.Linear):
    """See `kernels.linear.linear`."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor, copy: Tensor | None = None) -> Tensor:
        return linear(x, self.weight, copy)
