"""Numbers of the device on their way to the host."""
from __future__ import annotations

import torch


class Readback:
    """A tensor's values at this place of the device's work: who reads them waits for that, not for what is launched later."""

    def __init__(self, tensor: torch.Tensor):
        self._copy, self._copied = tensor.to("cpu", non_blocking=True, copy=True), None
        if tensor.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def tolist(self):
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy.tolist()

    def __float__(self) -> float:
        return float(self.tolist())
