"""The diagonal scan one step at a time (the meaning), and in log2(L) passes over the whole sequence."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..phases import Phases


def diagonal_scan_reference(x: Tensor, log_decay: Tensor, since_reset: Tensor, initial_state: Tensor | None = None) -> Tensor:
    """Shapes as in `diagonal_scan`."""
    h = torch.zeros_like(x[:, 0]) if initial_state is None else initial_state
    hs = []
    for t in range(x.shape[1]):
        h = torch.exp(log_decay) * torch.where(since_reset[:, t, None] == 0, torch.zeros_like(h), h) + x[:, t]
        hs.append(h)
    return torch.stack(hs, 1)


def diagonal_scan(x: Tensor, log_decay: Tensor, since_reset: Tensor, initial_state: Tensor | None = None) -> Tensor:
    """h_t = exp(log_decay) h_{t-1} + x_t for every t, h_{t-1} being dropped at the first step of a document.

    x (B, L, M) complex; log_decay (M,) complex, of the same precision, real part negative.
    since_reset (B, L) int: steps since the document's first, larger than t where that lies before the row (`Documents`).
    initial_state (B, M): h before the row, zeros if None. Returns h (B, L, M). Differentiable in x, log_decay and
    initial_state. Pass k adds what lies 2^k steps back (Hillis & Steele), so the depth is log2(L), and step t is a sum of the
    same terms in the same order whatever comes after it.
    """
    if initial_state is not None:
        carried = (torch.exp(log_decay) * initial_state).masked_fill(since_reset[:, :1] == 0, 0)
        x = torch.cat([(x[:, 0] + carried)[:, None], x[:, 1:]], 1)
    return _Scan.apply(x, log_decay, since_reset)


def diagonal_scan_phases(x: Tensor, log_decay: Tensor, since_reset: Tensor, n_live: Tensor | None = None) -> Phases:
    """`diagonal_scan` of a shard whose initial state is not known yet; the state after is h at the last of the n_live (B,) slots
    in use, which come first, all if None. The span is their number (B,).

    The one scan is of the shard alone: what the state before it adds at step t is exp((t + 1) log_decay) of it.
    """
    h, length = diagonal_scan(x, log_decay, since_reset), x.shape[1]
    at = torch.arange(length, device=x.device)
    seen = since_reset > at  # steps that the state before the shard reaches
    n = torch.full((len(x),), length, device=x.device) if n_live is None else n_live
    last = (n - 1).clamp(min=0)[:, None]

    def after(h: Tensor, empty: Tensor) -> Tensor:
        ends = h.gather(1, last[..., None].expand(-1, -1, h.shape[2]))[:, 0]
        return torch.where((n == 0)[:, None], empty, ends)

    def run(initial: Tensor) -> tuple[Tensor, Tensor]:
        carried = torch.exp((at + 1)[:, None] * log_decay) * initial[:, None]
        states = h + carried.masked_fill(~seen[..., None], 0)
        return states, after(states, initial)

    def gradient(saved: tuple, grad_h: Tensor, grad_after: Tensor | None) -> Tensor:
        log_decay, seen, span = saved
        powers = torch.exp((torch.arange(seen.shape[1], device=seen.device) + 1)[:, None] * log_decay)
        found = (powers.conj() * grad_h.masked_fill(~seen[..., None], 0)).sum(1)
        return found if grad_after is None else found + decay(log_decay)(span).conj() * grad_after

    with torch.no_grad():
        state = after(h, torch.zeros_like(h[:, 0]))
        ended = (n > 0) & ~seen.gather(1, last)[:, 0]
        span = n.to(h.real.dtype).masked_fill(ended, torch.inf)
    return Phases(state, span, decay(log_decay.detach()), run, (log_decay, seen, span), gradient)


def decay(log_decay: Tensor) -> Callable[[Tensor], Tensor]:
    """From numbers of steps (...), infinite where a document begins, to what they leave of a state (..., *log_decay.shape)."""

    def of(span: Tensor) -> Tensor:
        span = span[(...,) + (None,) * log_decay.ndim]
        ended = span.isinf()  # the exponential of an infinite complex number is not 0 everywhere
        return torch.exp(span.masked_fill(ended, 0) * log_decay).masked_fill(ended, 0)

    return of


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, log_decay, since_reset):
        h, span = x, 1
        while span < x.shape[1]:
            older = (torch.exp(span * log_decay) * h[:, :-span]).masked_fill((since_reset[:, span:] < span)[..., None], 0)
            h = torch.cat([h[:, :span], h[:, span:] + older], 1)
            span *= 2
        ctx.save_for_backward(h, log_decay, since_reset)
        return h

    @staticmethod
    def backward(ctx, grad):
        """The same scan towards the front: grad of h_t is that of y_t plus the conjugate decay times the grad of h_{t+1}."""
        h, log_decay, since_reset = ctx.saved_tensors
        span = 1
        while span < h.shape[1]:
            newer = torch.exp(span * log_decay).conj() * grad[:, span:]
            newer = newer.masked_fill((since_reset[:, span:] < span)[..., None], 0)
            grad = torch.cat([grad[:, :-span] + newer, grad[:, -span:]], 1)
            span *= 2
        through = (torch.exp(log_decay) * h[:, :-1]).masked_fill((since_reset[:, 1:] < 1)[..., None], 0)
        return grad, (through.conj() * grad[:, 1:]).sum((0, 1)), None
