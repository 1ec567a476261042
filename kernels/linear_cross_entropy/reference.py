"""Chunked linear cross-entropy. The gradients are formed in the forward pass, while a chunk's logits are at hand."""
from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100  # label of a token that does not count
CHUNK = 2048  # tokens at a time, if the caller does not say


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, chunk: int | None = None, per_token: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Sum over tokens of -log softmax(hidden weight^T)[label], labels equal to -100 left out.

    hidden (T, d); weight (V, d) with V >= vocab_size, rows from vocab_size on are padding and get no probability;
    labels (T,) int64. The product runs in the autocast dtype where autocast is on, the softmax in float32 or better.
    Returns a scalar in that better dtype; differentiable in hidden and weight. per_token: (that, `linear_token_nll`).
    """
    if not torch.is_grad_enabled():
        nll = linear_token_nll(hidden, weight, labels, vocab_size, chunk)
        total = nll.sum()
    else:
        total, nll = _LinearCrossEntropy.apply(hidden, weight, labels, vocab_size, chunk or CHUNK, matmul_dtype(hidden))
    return (total, nll) if per_token else total


@torch.no_grad()
def linear_token_nll(hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, chunk: int | None = None) -> Tensor:
    """The same per token, without gradients: (T,), 0 where the label is -100."""
    dtype, chunk = matmul_dtype(hidden), chunk or CHUNK
    w = weight.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        parts = [
            _chunk_nll(h.to(dtype), w, label, vocab_size)[0]
            for h, label in zip(hidden.split(chunk), labels.split(chunk))
        ]
    return torch.cat(parts)


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _chunk_nll(h: Tensor, w: Tensor, labels: Tensor, vocab_size: int):
    """(nll (t,), logits (t, V), logsumexp (t, 1)) of one chunk."""
    logits = (h @ w.t()).to(torch.promote_types(h.dtype, torch.float32))
    logits[:, vocab_size:] = float("-inf")
    normaliser = logits.logsumexp(-1, keepdim=True)
    picked = logits.gather(1, labels.clamp(min=0)[:, None])
    nll = (normaliser - picked).squeeze(1).masked_fill(labels == IGNORE, 0.0)
    return nll, logits, normaliser


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, vocab_size, chunk, dtype):
        w = weight.to(dtype)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight) if want_weight else None
        total = hidden.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
        per_token = total.new_empty(len(hidden))
        with torch.autocast(hidden.device.type, enabled=False):
            for lo in range(0, len(hidden), chunk):
                part = slice(lo, lo + chunk)
                h, label = hidden[part].to(dtype), labels[part]
                nll, logits, normaliser = _chunk_nll(h, w, label, vocab_size)
                total += nll.sum()
                per_token[part] = nll
                if not (want_hidden or want_weight):
                    continue
                grad = logits.sub_(normaliser).exp_()  # softmax, then dLoss/dlogits
                grad.scatter_add_(1, label.clamp(min=0)[:, None], grad.new_full((len(grad), 1), -1.0))
                grad = grad.masked_fill_((label == IGNORE)[:, None], 0.0).to(dtype)
                if want_hidden:
                    grad_hidden[part] = grad @ w
                if want_weight:
                    grad_weight += grad.t() @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(per_token)
        return total, per_token

    @staticmethod
    def backward(ctx, grad, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = (None if g is None else g * grad.to(g.dtype) for g in (grad_hidden, grad_weight))
        return *scaled, None, None, None, None
