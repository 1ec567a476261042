"""Chunked linear cross-entropy for GPUs: the products are cuBLAS's, and one kernel turns a chunk's logits into dLoss/dlogits."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch

from .reference import IGNORE, matmul_dtype

LOGITS_BYTES = 512 << 20  # of one chunk; 4096 tokens of a 50k vocabulary fill all SMs in each of the three products
LOG2E = 1.4426950408889634


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, chunk: int | None = None, per_token: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """As `reference.linear_cross_entropy`, for CUDA tensors of float32, bfloat16 or float16; the loss is float32.

    The gradients formed in the forward pass are scaled in place by the backward pass, which can therefore run only once.
    """
    dtype = matmul_dtype(hidden)
    if not torch.is_grad_enabled():
        nll = forward(hidden, weight, labels, vocab_size, chunk, dtype)[0]
        total = nll.sum()
    else:
        total, nll = _LinearCrossEntropy.apply(hidden, weight, labels, vocab_size, chunk, dtype)
    return (total, nll) if per_token else total


@torch.no_grad()
def linear_token_nll(hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, chunk: int | None = None) -> Tensor:
    """The same per token, without gradients: (T,) float32, 0 where the label is -100."""
    return forward(hidden, weight, labels, vocab_size, chunk, matmul_dtype(hidden))[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, vocab_size, chunk, dtype):
        nll, *ctx.formed = forward(hidden, weight, labels, vocab_size, chunk, dtype, *ctx.needs_input_grad[:2])
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(nll)
        return nll.sum(), nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        if ctx.formed is None:
            raise RuntimeError("linear_cross_entropy: the backward pass scales its gradients in place and can run only once")
        formed, ctx.formed = ctx.formed, None  # no reference left behind: autograd can take the tensors over without a copy
        scaled = (None if g is None else scale(g, grad, dtype) for g, dtype in zip(formed, ctx.dtypes))
        return *scaled, None, None, None, None


def forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, chunk: int | None, dtype: torch.dtype,
    want_hidden: bool = False, want_weight: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(nll (T,) float32, gradient of its sum in hidden, in hidden's dtype, and in weight, in float32); None if not wanted.

    chunk: tokens at a time; None takes what `LOGITS_BYTES` hold. dtype: of the products' operands and of the logits.
    """
    tokens, rows = len(hidden), len(weight)
    if chunk is None:
        chunk = even_chunk(tokens, rows * dtype.itemsize)
    chunk = max(1, min(chunk, tokens))
    hidden, w = hidden.detach(), weight.detach().to(dtype)
    nll = hidden.new_empty(tokens, dtype=torch.float32)
    grad_hidden = torch.empty_like(hidden) if want_hidden else None
    grad_weight = torch.empty_like(weight, dtype=torch.float32) if want_weight else None
    logits = hidden.new_empty(chunk, rows, dtype=dtype)
    if tokens == 0 and want_weight:
        grad_weight.zero_()
    with torch.autocast(hidden.device.type, enabled=False):
        for lo in range(0, tokens, chunk):
            part = slice(lo, min(lo + chunk, tokens))
            h, x = hidden[part].to(dtype), logits[: part.stop - lo]
            torch.mm(h, w.t(), out=x)
            logits_to_gradient(x, labels[part], nll[part], vocab_size, want_hidden or want_weight)
            if want_hidden:
                _product(grad_hidden[part], x, w, add=False)
            if want_weight:
                _product(grad_weight, x.t(), h, add=lo > 0)
    return nll, grad_hidden, grad_weight


def even_chunk(tokens: int, row_bytes: int) -> int:
    """Tokens of one chunk: as few chunks as `LOGITS_BYTES` allows, equal up to the product's tile of 128 rows."""
    chunks = triton.cdiv(tokens * row_bytes, LOGITS_BYTES)
    return triton.cdiv(triton.cdiv(tokens, max(1, chunks)), 128) * 128 if tokens else 128


def _product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out = a b, or out += a b, rounded once: the sum over tokens stays in float32 from one chunk to the next."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        product = a.float() @ b.float()
        out.add_(product) if add else out.copy_(product)


def logits_to_gradient(
    logits: Tensor, labels: Tensor, nll: Tensor, vocab_size: int, gradient: bool, block: int = 8192, num_warps: int = 16
) -> None:
    """nll (t,) = logsumexp(logits) - logits[label]; with gradient, logits (t, V) become d nll / d logits, in place."""
    vector = 16 // logits.element_size()
    if len(logits):
        launch(
            _logits_to_gradient, (len(logits),),
            logits, labels, nll, logits.shape[1], vocab_size, logits.stride(0), labels.stride(0),
            IGNORE=IGNORE, GRADIENT=gradient, BLOCK=block, VECTOR=vector, LOG2E=LOG2E, num_warps=num_warps,
        )


def scale(x: Tensor, factor: Tensor, dtype: torch.dtype, block: int = 4096) -> Tensor:
    """x * factor (a float32 scalar on the device) in dtype: in place if that is x's own dtype."""
    x = x if x.is_contiguous() else x.contiguous()
    out = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    if x.numel():
        _scale[(triton.cdiv(x.numel(), block),)](x, out, factor, x.numel(), IN_PLACE=out is x, BLOCK=block, num_warps=8)
    return out


@triton.jit
def _logits_to_gradient(
    logits, labels, nll, V, vocab_size, row_stride, label_stride,
    IGNORE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, LOG2E: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * row_stride
    label = tl.load(labels + token * label_stride)
    # One thread holds a line of VECTOR columns and keeps its own running maximum: no barrier inside the loop.
    lines: tl.constexpr = BLOCK // VECTOR
    offset = tl.arange(0, lines)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    blocks = tl.cdiv(V, BLOCK)
    full = vocab_size // BLOCK  # blocks without padding columns need no masks
    if label == IGNORE:
        tl.store(nll + token, 0.0)
        if GRADIENT:
            for i in range(blocks):
                column = i * BLOCK + offset
                tl.store(row + column, tl.zeros([lines, VECTOR], logits.dtype.element_ty), mask=column < V)
    else:
        picked = tl.load(row + label).to(tl.float32)
        top = tl.full([lines], -1e30, tl.float32)  # finite: lines beyond the vocabulary stay at it
        total = tl.zeros([lines], tl.float32)
        for i in range(full):
            x = tl.load(row + i * BLOCK + offset).to(tl.float32)
            top, total = _add_exp(top, total, x, LOG2E)
        for i in range(full, blocks):
            column = i * BLOCK + offset
            x = tl.load(row + column, mask=column < V, other=0.0).to(tl.float32)
            top, total = _add_exp(top, total, tl.where(column < vocab_size, x, float("-inf")), LOG2E)
        highest = tl.max(top, 0)
        normaliser = highest + tl.log2(tl.sum(total * tl.exp2(top - highest), 0))  # log2 of the sum of exp
        tl.store(nll + token, normaliser * (1.0 / LOG2E) - picked)
        if GRADIENT:
            for back in range(blocks):
                i = blocks - 1 - back  # backwards: what was read last is still in L1
                column = i * BLOCK + offset
                if i >= full or i == label // BLOCK:
                    x = tl.load(row + column, mask=column < V, other=0.0).to(tl.float32)
                    p = tl.exp2(x * LOG2E - normaliser)
                    p = tl.where(column == label, p - 1.0, p)
                    p = tl.where(column < vocab_size, p, 0.0)
                    tl.store(row + column, p.to(logits.dtype.element_ty), mask=column < V)
                else:
                    x = tl.load(row + column).to(tl.float32)
                    tl.store(row + column, tl.exp2(x * LOG2E - normaliser).to(logits.dtype.element_ty))


@triton.jit
def _add_exp(top, total, x, LOG2E: tl.constexpr):
    """total 2^top is the sum of exp so far, of each line: the same with the columns x of those lines added."""
    new_top = tl.maximum(top, tl.max(x, 1) * LOG2E)
    return new_top, total * tl.exp2(top - new_top) + tl.sum(tl.exp2(x * LOG2E - new_top[:, None]), 1)


@triton.jit
def _scale(x, out, factor, n, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if not IN_PLACE or by != 1.0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32) * by
        tl.store(out + i, value.to(out.dtype.element_ty), mask=i < n)
