"""Cross-entropy of a linear read-out over a vocabulary, a chunk of tokens at a time: all logits never exist at once.
`reference.py` is the PyTorch form and the CPU's; `triton.py` serves CUDA tensors of up to 32 bits."""
from __future__ import annotations

import torch
from torch import Tensor

from . import reference


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, chunk: int | None = None, per_token: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Sum over tokens of -log softmax(hidden weight^T)[label], labels equal to -100 left out.

    hidden (T, d); weight (V, d) with V >= vocab_size, rows from vocab_size on are padding and get no probability;
    labels (T,) int64; chunk: tokens whose logits exist at a time, None for a size suited to the device.
    Returns a scalar in float32 or better; differentiable in hidden and weight. per_token: (that, `linear_token_nll`).
    """
    return _form(hidden).linear_cross_entropy(hidden, weight, labels, vocab_size, chunk, per_token)


def linear_token_nll(hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, chunk: int | None = None) -> Tensor:
    """The same per token, without gradients: (T,), 0 where the label is -100."""
    return _form(hidden).linear_token_nll(hidden, weight, labels, vocab_size, chunk)


def _form(hidden: Tensor):
    if hidden.is_cuda and hidden.dtype in (torch.float32, torch.bfloat16, torch.float16):
        from . import triton
        return triton
    return reference


__all__ = ["linear_cross_entropy", "linear_token_nll"]
