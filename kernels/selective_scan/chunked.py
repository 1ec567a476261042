"""The selective scan in PyTorch, a chunk of time steps at once: no (B, L, D, N) tensor ever exists.

Within a chunk the decays and inputs of all steps are formed together and one fused multiply-add a step walks the state.
The forward pass keeps the state at each chunk's start; the backward pass recomputes the chunk and walks it in reverse.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of one (chunk, B, D, N) work tensor: the CPU's cache, or enough to amortise launches on a GPU.
WORK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    reset: Tensor | None = None, live: Tensor | None = None, initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = silu(z) * (scan(x, softplus(dt + dt_bias), A, B, C) + D x), and the state after the last step.

    x, dt, z (B, L, D); A (D, N), negative; B, C (B, L, N); D, dt_bias (D,).
    reset (B, L) bool: the state before that step is dropped. live (B, L) bool: False makes a step a no-op (dt = 0).
    initial_state (B, D, N). Computes in float32, or float64 if x is float64.
    Returns y (B, L, D) in x's dtype and the final state (B, D, N) in the compute dtype. Differentiable in every float input.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        xc, A, B, C = (v.to(compute) for v in (x, A, B, C))
        step = F.softplus(dt.to(compute) + dt_bias)
        if live is not None:
            step = step * live[..., None]
        if initial_state is None:
            initial_state = xc.new_zeros(x.shape[0], x.shape[2], A.shape[1])
        keep = None if reset is None else (~reset).to(compute)
        y, final_state = _Scan.apply(xc, step, A, B, C, keep, initial_state.to(compute))
        y = (y + D * xc) * F.silu(z.to(compute))
    return y.to(x.dtype), final_state


@torch.no_grad()
def scan_state(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor, reset: Tensor | None = None, live: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `selective_scan` leaves of a state of 0 (B, D, N), and the sum of its steps (B, D), infinite where a document begins:
    it takes a state h to exp(A sum) h + the former."""
    step, A, keep = _prepare(dt, A, dt_bias, reset, live)
    x, step, B = (v.to(A.dtype).transpose(0, 1).contiguous() for v in (x, step, B))
    h = x.new_zeros(*x.shape[1:], A.shape[1])
    size = _chunk_size(h.numel(), x.device.type)
    for lo in range(0, len(x), size):
        h = _walk(x, step, A, B, keep, h, slice(lo, min(lo + size, len(x))))[1][-1].clone()
    span = step.sum(0)
    return h, span if reset is None else span.masked_fill(reset.any(1)[:, None], torch.inf)


@torch.no_grad()
def scan_state_gradient(
    grad_y: Tensor, grad_final: Tensor | None, dt: Tensor, A: Tensor, C: Tensor, z: Tensor, dt_bias: Tensor,
    reset: Tensor | None = None, live: Tensor | None = None,
) -> Tensor:
    """The gradient of the initial state (B, D, N) alone."""
    step, A, keep = _prepare(dt, A, dt_bias, reset, live)
    grad = (grad_y.to(A.dtype) * F.silu(z.to(A.dtype))).transpose(0, 1)
    step, C = step.transpose(0, 1), C.to(A.dtype).transpose(0, 1)
    carry = grad.new_zeros(*grad.shape[1:], A.shape[1]) if grad_final is None else grad_final.to(A.dtype)
    for t in reversed(range(len(grad))):
        decay = torch.exp(step[t][..., None] * A)
        if keep is not None:
            decay = decay * keep[t][:, None, None]
        carry = (carry + grad[t][..., None] * C[t][:, None, :]) * decay
    return carry


def _prepare(dt, A, dt_bias, reset, live):
    """Steps (B, L, D), A, and 0 where a document begins (L, B), in the dtype of A or better."""
    compute = torch.promote_types(torch.promote_types(dt.dtype, A.dtype), torch.float32)
    with torch.autocast(dt.device.type, enabled=False):
        step = F.softplus(dt.to(compute) + dt_bias)
    if live is not None:
        step = step * live[..., None]
    return step, A.to(compute), None if reset is None else (~reset).to(compute).t().contiguous()


class _Scan(torch.autograd.Function):
    """The recurrence alone; keep (B, L) is 0 where the state before a step is dropped, 1 elsewhere, or None."""

    @staticmethod
    def forward(ctx, x, step, A, B, C, keep, initial_state):
        # Time first: every step's slice is contiguous.
        x, step, B, C = (v.transpose(0, 1).contiguous() for v in (x, step, B, C))
        keep = None if keep is None else keep.t().contiguous()
        length, batch, d_inner = x.shape
        size = _chunk_size(batch * d_inner * A.shape[1], x.device.type)
        h, starts = initial_state, []
        y = torch.empty_like(x)
        for lo in range(0, length, size):
            chunk = slice(lo, min(lo + size, length))
            starts.append(h)
            _, states = _walk(x, step, A, B, keep, h, chunk)
            torch.matmul(states, C[chunk, :, :, None], out=y[chunk].unsqueeze(-1))
            h = states[-1].clone()
        ctx.size = size
        ctx.save_for_backward(x, step, A, B, C, keep, *starts)
        return y.transpose(0, 1), h

    @staticmethod
    def backward(ctx, grad_y, grad_final):
        x, step, A, B, C, keep, *starts = ctx.saved_tensors
        grad_y = grad_y.transpose(0, 1).contiguous()
        grad_x, grad_step, grad_B, grad_C = (torch.empty_like(v) for v in (x, step, B, C))
        grad_A = torch.zeros_like(A)
        carry = grad_final  # gradient of the state after the chunk being walked
        for i in reversed(range(len(starts))):
            chunk = slice(i * ctx.size, min((i + 1) * ctx.size, len(x)))
            decay, states = _walk(x, step, A, B, keep, starts[i], chunk)
            grad = grad_y[chunk][..., None] * C[chunk][:, :, None, :]  # becomes dLoss/dh_t, (T, B, D, N)
            for t in reversed(range(len(grad))):
                grad[t] += carry
                carry = grad[t] * decay[t]
            torch.matmul(grad_y[chunk][:, :, None, :], states, out=grad_C[chunk].unsqueeze(2))
            before = torch.cat([starts[i][None], states[:-1]])
            through_decay = decay.mul_(before).mul_(grad)
            inputs = torch.matmul(grad, B[chunk][..., None]).squeeze(-1)  # dLoss/d(step * x)
            torch.matmul((step[chunk] * x[chunk])[:, :, None, :], grad, out=grad_B[chunk].unsqueeze(2))
            grad_x[chunk] = inputs * step[chunk]
            grad_step[chunk] = inputs * x[chunk] + (through_decay * A).sum(-1)
            grad_A += (through_decay * step[chunk][..., None]).sum((0, 1))
        back = (v.transpose(0, 1) for v in (grad_x, grad_step))
        return *back, grad_A, grad_B.transpose(0, 1), grad_C.transpose(0, 1), None, carry


def _chunk_size(elements_per_step: int, device: str) -> int:
    return max(8, min(256, WORK_ELEMENTS.get(device, 1 << 20) // elements_per_step))


def _walk(x, step, A, B, keep, h, chunk):
    """Decays and states of one chunk, both (T, B, D, N), from the state h before it."""
    decay = torch.exp(step[chunk][..., None] * A)
    if keep is not None:
        decay *= keep[chunk][:, :, None, None]
    states = (step[chunk] * x[chunk])[..., None] * B[chunk][:, :, None, :]
    for t in range(len(states)):
        h = states[t].addcmul_(decay[t], h)
    return decay, states
