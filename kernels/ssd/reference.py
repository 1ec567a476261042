"""State-space duality in PyTorch, by autograd: one step at a time (the meaning), and chunks of steps as matrix products."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def ssd_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    reset: Tensor | None = None, live: Tensor | None = None, initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence itself. Shapes as in the package's docstring."""
    batch, length, heads, head_dim = x.shape
    step = F.softplus(dt + dt_bias)  # (B, L, H)
    if live is not None:
        step = step * live[..., None]
    B, C = (v.repeat_interleave(heads // v.shape[2], 2) for v in (B, C))  # (B, L, H, N)
    h = x.new_zeros(batch, heads, head_dim, B.shape[-1]) if initial_state is None else initial_state
    ys = []
    for t in range(length):
        if reset is not None:
            h = torch.where(reset[:, t, None, None, None], torch.zeros_like(h), h)
        decay = torch.exp(step[:, t] * A)
        h = decay[..., None, None] * h + (step[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        ys.append((h * C[:, t, :, None, :]).sum(-1))
    return torch.stack(ys, 1) + D[:, None] * x, h


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    reset: Tensor | None = None, live: Tensor | None = None, initial_state: Tensor | None = None, chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The same, a chunk at a time: inside a chunk y = (C B^T * decays) (dt x), between chunks only states pass."""
    batch, length, heads, head_dim = x.shape
    compute = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        xc, dt, A, B, C, D, dt_bias = (v.to(compute) for v in (x, dt, A, B, C, D, dt_bias))
        step = F.softplus(dt + dt_bias)
        if live is not None:
            step = step * live[..., None]
        if reset is None:
            reset = torch.zeros(batch, length, dtype=torch.bool, device=x.device)
        # Steps of dt = 0 fill the last chunk. T: steps in a chunk, K: chunks, R: heads of a group.
        step, u, B, C, document = (_chunks(v, chunk) for v in (step, step[..., None] * xc, B, C, reset))
        document = document.cumsum(2)  # (B, K, T), counted from the chunk's start
        ends = (step * A).cumsum(2).permute(0, 1, 3, 2)  # (B, K, H, T), log of the decay from the chunk's start
        last, from_start = ends[..., -1:], (document == 0)[:, :, None]
        u = u.transpose(2, 3)  # (B, K, H, T, P)
        B, C = (v.transpose(2, 3) for v in (B, C))  # (B, K, G, T, N)

        causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
        joined = causal & (document[..., :, None] == document[..., None, :])  # (B, K, T, T)
        decay = (ends[..., :, None] - ends[..., None, :]).masked_fill(~joined[:, :, None], float("-inf")).exp()
        y = (_heads(C @ B.transpose(-1, -2), heads) * decay) @ u

        to_end = (last - ends).exp() * (document == document[..., -1:])[:, :, None]
        local = (u * to_end[..., None]).transpose(-1, -2) @ _heads(B, heads)  # (B, K, H, P, N)
        through = last.exp()[..., None] * from_start[..., -1:, None]
        h = xc.new_zeros(local[:, 0].shape) if initial_state is None else initial_state.to(compute)
        starts = []
        for k in range(local.shape[1]):
            starts.append(h)
            h = through[:, k] * h + local[:, k]
        before = _heads(C, heads) @ torch.stack(starts, 1).transpose(-1, -2)  # (B, K, H, T, P)
        y = y + before * (ends.exp() * from_start)[..., None]
        y = y.transpose(2, 3).flatten(1, 2)[:, :length] + D[:, None] * xc
    return y.to(x.dtype), h


def _chunks(v: Tensor, size: int) -> Tensor:
    """(B, L, ...) -> (B, K, size, ...), zeros after the end."""
    pad = -v.shape[1] % size
    v = torch.cat([v, v.new_zeros(v.shape[0], pad, *v.shape[2:])], 1) if pad else v
    return v.unflatten(1, (-1, size))


def _heads(v: Tensor, heads: int) -> Tensor:
    """(B, K, G, ...) -> (B, K, H, ...)."""
    return v.repeat_interleave(heads // v.shape[2], 2)


@torch.no_grad()
def ssd_state(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor, reset: Tensor | None = None, live: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """What `ssd` leaves of a state of 0 (B, H, P, N), and the sum of its steps (B, H), infinite where a document begins."""
    step, ends, document = _decays(dt, A, dt_bias, reset, live, chunk)
    last, from_start = ends[..., -1:], document == 0
    to_end = (last - ends).exp() * (document == document[..., -1:])[:, :, None]
    u, B = (_chunks(v.to(step.dtype), chunk) for v in (x, B))
    u = (step[..., None] * u).transpose(2, 3) * to_end[..., None]
    local = u.transpose(-1, -2) @ _heads(B.transpose(2, 3), x.shape[2])
    through = last.exp()[..., None] * from_start[:, :, None, -1:, None]
    h = torch.zeros_like(local[:, 0])
    for k in range(local.shape[1]):
        h = through[:, k] * h + local[:, k]
    span = step.sum((1, 2))
    return h, span if reset is None else span.masked_fill(reset.any(1)[:, None], torch.inf)


@torch.no_grad()
def ssd_state_gradient(
    grad_y: Tensor, grad_final: Tensor | None, dt: Tensor, A: Tensor, C: Tensor, dt_bias: Tensor, reset: Tensor | None = None,
    live: Tensor | None = None, chunk: int = CHUNK,
) -> Tensor:
    """The gradient of the initial state (B, H, P, N) alone."""
    step, ends, document = _decays(dt, A, dt_bias, reset, live, chunk)
    from_start = (document == 0)[:, :, None]
    grad, C = (_chunks(v.to(step.dtype), chunk).transpose(2, 3) for v in (grad_y, C))
    local = (grad * (ends.exp() * from_start)[..., None]).transpose(-1, -2) @ _heads(C, grad.shape[2])
    through = ends[..., -1:].exp()[..., None] * from_start[..., -1:, None]
    g = torch.zeros_like(local[:, 0]) if grad_final is None else grad_final.to(step.dtype)
    for k in reversed(range(local.shape[1])):
        g = through[:, k] * g + local[:, k]
    return g


def _decays(dt, A, dt_bias, reset, live, chunk):
    """In chunks: steps (B, K, T, H), log of the decay from the chunk's start (B, K, H, T), documents since then (B, K, T)."""
    compute = torch.promote_types(torch.promote_types(dt.dtype, A.dtype), torch.float32)
    with torch.autocast(dt.device.type, enabled=False):
        step = F.softplus(dt.to(compute) + dt_bias)
    if live is not None:
        step = step * live[..., None]
    step = _chunks(step, chunk)
    document = step.new_zeros(step.shape[:3]) if reset is None else _chunks(reset, chunk).cumsum(2)
    return step, (step * A).cumsum(2).permute(0, 1, 3, 2), document
