"""What else teaches a learned clock where its emissions should fall, besides the durations: `model.serpent.teach`.

Durations say how a token's time changes what its element is made of, not whether its token was a good one to emit at. A branch
leaves a lesson, a term of the loss to be, in `documents.lessons`; the model reads them once it knows the loss of every token.
Legend: B rows, L tokens, J slots for emitted elements.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from serpent_scale.kernels.resample import TICKS, Clock, Sampling
from serpent_scale.kernels.resample.reference import intervals
from serpent_scale.model.documents import Documents
from serpent_scale.model.mixer import at_slots

RESOLUTION = 1 << 16  # weights of ranks are integers: their running sums do not depend on the order of summation


class Losses(NamedTuple):
    """What lessons are about. All (B, L)."""

    nll: Tensor  # of predicting the next token, without gradients
    known: Tensor  # bool: there is a label
    reset: Tensor  # bool: the token is a document's first


Lesson = Callable[[Losses], Tensor]  # a mean over tokens, to be minimised


class Lessons(list[Lesson]):
    """taught: (), to which the values of all of them are added, when they are known."""

    def __init__(self, taught: Tensor):
        super().__init__()
        self.taught = taught


def add_lessons(loss: Tensor, nll: Tensor, labels: Tensor, reset: Tensor, lessons: Lessons, weight: float) -> Tensor:
    """The summed loss with the gradients of `weight` times the sum of the lessons, for each labelled token, and its own value."""
    known = labels >= 0
    losses = Losses(nll.view(labels.shape), known, reset)
    total = torch.stack([lesson(losses) for lesson in lessons]).sum()
    lessons.taught.add_(total.detach())
    extra = weight * known.sum() * total
    return loss + (extra - extra.detach())


def teach(
    how: str, z: Tensor, y: Tensor, u: Tensor, weight: Tensor, bias: Tensor, clock: Clock, sampling: Sampling,
    documents: Documents,
) -> Tensor:
    """z (B, L, d_out), the branch's outputs, as they are, and a lesson left in documents.lessons; gradients of z may go on to the
    clock's weight (d,) and bias (1,). u (B, L, d) the clock's input, y (B, J, d_out) the outputs of the elements."""
    with torch.autocast(u.device.type, enabled=False):
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        if how in ("centred", "confidence"):
            interval = intervals(u.detach() if how == "centred" else u, weight, bias, sampling)
            documents.lessons.append(lambda losses: rate_loss(interval, losses.known, sampling))
            return z if how == "centred" else z * confidence(interval, clock, documents.reset)[..., None].to(z.dtype)
        logit = (u.detach() * weight).sum(-1) + bias
        if how == "worth":
            z, lesson = _Worth.apply(z, logit, y.detach(), clock, sampling, documents.lessons.taught)
            documents.lessons.append(lambda losses: lesson)
        else:
            own = how == "surprise"
            documents.lessons.append(lambda losses: surprise_loss(logit, losses, own, sampling))
        return z


def confidence(interval: Tensor, clock: Clock, reset: Tensor) -> Tensor:
    """(B, L) ones, whose gradients are those of how sure the clock was of what it did: a step of interval Δ crosses a grid point
    with probability Δ if the phase may be any, so Δ where the token emitted and 1 - Δ where not. Constant at a document's first
    token, which has no choice. After Hwang et al., arXiv 2507.07955, equation 7."""
    emits = clock.newest.diff(dim=1, prepend=clock.newest.new_full((len(interval), 1), -1)) > 0
    sure = torch.where(reset, 1, torch.where(emits, interval, 1 - interval))
    return 1 + (sure - sure.detach())


def rate_loss(interval: Tensor, known: Tensor, sampling: Sampling) -> Tensor:
    """How far the mean interval is from the rate, as a share of it, squared: nothing else keeps it from drifting until the band
    cuts every step, and the clock is uniform again."""
    mean = (interval * known).sum() / known.sum().clamp(min=1)
    return (mean * TICKS / sampling.rate - 1).square()


def surprise_loss(logit: Tensor, losses: Losses, own: bool, sampling: Sampling) -> Tensor:
    """Cross-entropy of the clock's gate (its logit: (B, L)) against `targets` of each token's surprise.

    own: how surprising the token itself was, known where it does not begin a document; else how hard the next one is to predict.
    """
    nll, known = losses.nll, losses.known
    if own:
        nll = F.pad(nll[:, :-1], (1, 0))
        known = F.pad(known[:, :-1], (1, 0)) & ~losses.reset
    apart = F.binary_cross_entropy_with_logits(logit, targets(nll, known.long(), sampling).to(logit.dtype), reduction="none")
    return (apart * known).sum() / known.sum().clamp(min=1)


def targets(values: Tensor, weights: Tensor, sampling: Sampling) -> Tensor:
    """Where in [low, high] intervals should lie, from 0 to 1, the larger the values: r^k, r in (0, 1) a value's weighted rank
    among those whose weight, an integer, is not 0; k such that the weighted mean interval is the rate, whatever the values."""
    flat, counts = values.flatten(), weights.flatten()
    order = torch.where(counts > 0, flat, torch.inf).argsort(stable=True)
    counts = counts[order]
    total = counts.cumsum(0)
    rank = (2 * total - counts).double() / (2 * total[-1]).clamp(min=1)
    rate = sampling.rate / TICKS
    share = rank ** ((sampling.high - rate) / (rate - sampling.low))
    return torch.zeros_like(share).scatter(0, order, share).to(torch.float32).view_as(values)


class _Worth(torch.autograd.Function):
    """Identity on z, and a lesson whose gradient is formed in the backward pass, where it is known what emissions were worth; its
    value, 0 before, is added to `taught` there.

    Had element j waited a token longer, its token e would have read y_{j-1} for y_j. Its nll then moves by g . (y_{j-1} - y_j) in
    the first order, g = dL/dz_e: 0 in the mean where the model fits, and by half the square of that in the second, with the
    gradients' outer product as the Hessian. That square is the worth of emitting at e. Tokens emit with probability Δ; what was
    seen of them counts 1/Δ.
    """

    @staticmethod
    def forward(ctx, z, logit, y, clock, sampling, taught):
        ctx.save_for_backward(logit, y, clock.emitter, clock.live & ~clock.reset)
        ctx.sampling, ctx.taught = sampling, taught
        return z.view_as(z), logit.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_lesson):
        logit, y, emitter, counts = ctx.saved_tensors
        sampling, emitter, length = ctx.sampling, emitter.long(), logit.shape[1]
        g = at_slots(grad, emitter).to(logit.dtype)
        # A row's first element is no choice either: its slot is left out with those of documents' first.
        worth = (g[:, 1:] * y.diff(dim=1).to(logit.dtype)).sum(-1).square()
        worth = F.pad(worth, (1, 0)).masked_fill(~counts, 0)
        logit = logit.gather(1, emitter)
        gate = logit.sigmoid()
        rate = sampling.rate / TICKS
        weights = (RESOLUTION * rate / (sampling.low + (sampling.high - sampling.low) * gate)).round().long() * (worth > 0)
        target, share = targets(worth, weights, sampling).to(logit.dtype), weights / weights.sum().clamp(min=1)
        moved = grad_lesson * (gate - target) * share
        ctx.taught.add_((F.binary_cross_entropy_with_logits(logit, target, reduction="none") * share).sum())
        # Slots out of use write to one token more, which is dropped.
        at = torch.where(counts, emitter, length)
        return grad, moved.new_zeros(len(moved), length + 1).scatter(1, at, moved)[:, :length], None, None, None, None
