"""Attention to one block of keys among others: outputs with their log-sum-exp, which merges them, and gradients given that of
all blocks. PyTorch's own kernels on GPUs.

Source: the merging of blocks is that of Rabe & Staats, arXiv 2112.05682; gradients from the log-sum-exp: Dao et al., arXiv
2205.14135. Legend: B rows, H query heads, G key-value heads (H / G queries share one), L queries, M keys, P head_dim.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES = 1024  # asked at once where there is a mask, which is (B, 1, QUERIES, M)
ALIGNED = 32  # the kernels for masks pad a log-sum-exp to a multiple of this, and want rows of masks at multiples of 8

Mask = Callable[[int, int], Tensor | None]  # (low, high) -> (B, 1, high - low, M) bool: what these queries see; None: all


def attend_block(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, causal: bool = False) -> tuple[Tensor, Tensor]:
    """q (B, H, L, P); k, v (B, G, M, P) -> outputs (B, H, L, P) in q's dtype and log-sum-exp (B, H, L), float32 or better.

    causal: query i sees keys up to i. A query that sees none has output 0 and log-sum-exp -inf.
    """
    k, v, in_kernel = _shared(k, q), _shared(v, q), _has_kernel(q)
    if mask is None and in_kernel:
        return _forward(q, k, v, None, causal)
    mask, forward, dtype = mask or _no_mask(q, k, causal), _forward if in_kernel else _plain_forward, q.dtype
    if in_kernel:  # with masks in bfloat16 this project's test failed on an H200, in float32 not
        q, k, v = q.float(), k.float(), v.float()
    parts = [forward(q[:, :, low:high], k, v, mask(low, high)) for low, high in _chunks(q)]
    y, lse = (torch.cat(part, 2) for part in zip(*parts))
    return y.to(dtype), lse


def attend_block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, mask: Mask | None = None, causal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v as far as they go through this block; grad, y and lse are of all blocks merged."""
    groups, dtype, in_kernel = k.shape[1], q.dtype, _has_kernel(q)
    shared_k, shared_v = _shared(k, q), _shared(v, q)
    if mask is None and in_kernel:
        grad_q, grad_k, grad_v = _backward(grad, q, shared_k, shared_v, y, lse, None, causal)
    else:
        mask, backward = mask or _no_mask(q, k, causal), _backward if in_kernel else _plain_backward
        if in_kernel:
            grad, q, shared_k, shared_v, y = (t.float() for t in (grad, q, shared_k, shared_v, y))
        grad_q, grad_k, grad_v = [], 0, 0
        for low, high in _chunks(q):
            one, asked, found, total = (t[:, :, low:high] for t in (grad, q, y, lse))
            found = backward(one, asked, shared_k, shared_v, found, total, mask(low, high))
            grad_q.append(found[0])
            grad_k, grad_v = (total + one.to(lse.dtype) for total, one in zip((grad_k, grad_v), found[1:]))
        grad_q = torch.cat(grad_q, 2)
    if groups != q.shape[1]:
        grad_k, grad_v = (g.to(lse.dtype).unflatten(1, (groups, -1)).sum(2) for g in (grad_k, grad_v))
    return grad_q.to(dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def merge(y: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exp over the keys of both. y in lse's dtype; lse is finite."""
    total = torch.logaddexp(lse, other_lse)
    shares = (torch.exp(part - total)[..., None] for part in (lse, other_lse))
    return y * next(shares) + other.to(y.dtype) * next(shares), total


def _shared(k: Tensor, q: Tensor) -> Tensor:
    return k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], 1)


def _chunks(q: Tensor) -> list[tuple[int, int]]:
    return [(low, min(low + QUERIES, q.shape[2])) for low in range(0, q.shape[2], QUERIES)]


def _no_mask(q: Tensor, k: Tensor, causal: bool) -> Mask:
    at = torch.arange(k.shape[2], device=q.device)
    return lambda low, high: (at <= at[low:high, None])[None, None] if causal else None


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, seen)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse[..., None].clamp(min=torch.finfo(lse.dtype).min))
    return (weights @ v.to(weights.dtype)).to(q.dtype), lse


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, seen: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    weights = torch.exp(_scores(q, k, seen) - lse[..., None])
    grad, q, k, v = (t.to(weights.dtype) for t in (grad, q, k, v))
    asked = weights * (grad @ v.mT - (grad * y).sum(-1, keepdim=True)) / math.sqrt(q.shape[3])
    return (asked @ k).to(y.dtype), asked.mT @ q, weights.mT @ grad


def _scores(q: Tensor, k: Tensor, seen: Tensor | None) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ k.to(dtype).mT / math.sqrt(q.shape[3])
    return scores if seen is None else scores.masked_fill(~seen, -math.inf)


def _forward(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool = False) -> tuple[Tensor, Tensor]:
    if seen is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    y, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, _bias(seen, q, k), True, 0.0, causal)
    lse = lse[:, :, : q.shape[2]]
    if seen is not None:
        any_seen = seen.any(-1)
        y, lse = torch.where(any_seen[..., None], y, 0), torch.where(any_seen, lse, -math.inf)
    return y, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, seen: Tensor | None, causal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    grad, y, lse = grad.contiguous(), y.contiguous(), lse.contiguous()
    zero = torch.zeros(2, dtype=torch.int64, device=q.device)  # a seed and an offset: without dropout they are not read
    if seen is None and q.dtype != torch.float32:
        lengths = q.shape[2], k.shape[2]
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, y, lse, None, None, *lengths, 0.0, causal, zero, zero[:0]
        )
    lse = F.pad(lse, (0, -q.shape[2] % ALIGNED), value=math.inf)
    return torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, _bias(seen, q, k), y, lse, zero[0], zero[1], 0.0, [True, True, True, False], causal
    )[:3]


def _has_kernel(q: Tensor) -> bool:
    return q.is_cuda and q.dtype != torch.float64 and q.shape[3] % 8 == 0 and q.shape[3] <= 256


def _bias(seen: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """What is added to scores, 0 or -inf."""
    if seen is None:
        return None
    rows = q.new_full((*seen.shape[:3], seen.shape[3] + -seen.shape[3] % ALIGNED), -math.inf)[..., : seen.shape[3]]
    return rows.masked_fill_(seen, 0).expand(-1, q.shape[1], -1, -1)

