"""The selective scan on GPUs: for autograd, and as forward and backward passes of one scan or of several in one launch.

`launches.py` chooses between the kernels of `gluon_*.py` and of `plain.py`, and cuts time into segments for them. The forward
pass keeps a state every KEEP tokens for the backward pass. No sum depends on the order in which programs run: each writes its
part, and `parts.py` adds them in their order.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import launches
from .launches import KEEP
from .parts import add_parts


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    reset: Tensor | None = None, live: Tensor | None = None, initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `chunked.selective_scan`; x, dt, B, C and z may be views whose last dimension is contiguous."""
    return _SelectiveScan.apply(x, dt, A, B, C, D, z, dt_bias, reset, live, initial_state)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, z, dt_bias, reset, live, initial_state):
        y, final_state, kept = forward(x, dt, A, B, C, D, z, dt_bias, reset, live, initial_state)
        ctx.has_initial_state = initial_state is not None
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, reset, live, kept, y)
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    def backward(ctx, grad_y, grad_final_state):
        x, dt, A, B, C, D, z, dt_bias, reset, live, kept, y = ctx.saved_tensors
        if grad_y is None:
            grad_y = torch.zeros_like(y)
        g = backward(grad_y, grad_final_state, x, dt, A, B, C, D, z, dt_bias, reset, live, kept, y)
        initial = g["initial_state"] if ctx.has_initial_state else None
        return g["x"], g["dt"], g["A"], g["B"], g["C"], g["D"], g["z"], g["dt_bias"], None, None, initial


class Segments(NamedTuple):
    """What each segment does to what comes to it: what it makes of 0 (B, S, D, N), and the sum of its steps (B, S, D)."""

    local: Tensor
    span: Tensor

    def joined(self, A: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """What all do together: (B, D, N) and (B, D). In reverse, the first segment is the last to be met."""
        span = self.span.flip(1) if reverse else self.span
        local = self.local.flip(1) if reverse else self.local
        after = torch.zeros_like(span)  # spans of those met after each
        after[:, :-1] = span[:, 1:].flip(1).cumsum(1).flip(1)
        return (torch.exp(after[..., None] * A.float()) * local).sum(1), span.sum(1)


def scan_state(x, dt, A, B, dt_bias, reset=None, live=None) -> tuple[Tensor, Tensor]:
    """As `chunked.scan_state`."""
    return segment_states(x, dt, A, B, dt_bias, reset, live).joined(A)


def scan_state_gradient(grad_y, grad_final, dt, A, C, z, dt_bias, reset=None, live=None) -> Tensor:
    """As `chunked.scan_state_gradient`."""
    return join_gradients(segment_gradients(grad_y, dt, A, C, z, dt_bias, reset, live), A, grad_final)


def join_gradients(segments: Segments, A: Tensor, grad_final: Tensor | None) -> Tensor:
    grad, span = segments.joined(A, reverse=True)
    return grad if grad_final is None else grad + torch.exp(span[..., None] * A.float()) * grad_final


@torch.no_grad()
def segment_states(x, dt, A, B, dt_bias, reset=None, live=None) -> Segments:
    """What every segment that `forward` would walk leaves of a state of 0."""
    (batch, length, d_inner), d_state = x.shape, A.shape[1]
    x, B = map(_token_major, (x, B))
    A, dt_bias = A.float().contiguous(), dt_bias.float().contiguous()
    kernels = launches.kernels_for(x.device, d_state)
    dt, factor = _factors(dt, kernels)
    segments, size = launches.segments_of(batch, length, -(-d_inner // kernels.channels), x.device)
    found = Segments(_states(x, batch, segments, d_inner, d_state), _states(x, batch, segments, d_inner))
    kernels.forward(  # z, C, D and outputs are not touched
        [(d_inner, batch, length, segments, size, x, dt, factor, x, B, B, A, dt_bias, dt_bias, None, *found, _flags(reset),
          _flags(live), x, found.local, found.local, *_strides(x, dt, x, B, B))],
        local_pass=True,
    )
    return found


@torch.no_grad()
def segment_gradients(grad_y, dt, A, C, z, dt_bias, reset=None, live=None) -> Segments:
    """What the outputs of every segment that `backward` would walk ask of the state before it."""
    (batch, length, d_inner), d_state = grad_y.shape, A.shape[1]
    grad_y, C, z = map(_token_major, (grad_y, C, z))
    A, dt_bias = A.float().contiguous(), dt_bias.float().contiguous()
    kernels = launches.kernels_for(grad_y.device, d_state)
    dt, factor = _factors(dt, kernels)
    segments, size = launches.segments_of(batch, length, -(-d_inner // kernels.channels), grad_y.device)
    found = Segments(_states(grad_y, batch, segments, d_inner, d_state), _states(grad_y, batch, segments, d_inner))
    kernels.gradient_state(
        [(d_inner, batch, length, segments, size, dt, factor, z, C, grad_y, A, dt_bias, _flags(reset), _flags(live), *found,
          *_strides(dt, z, C, grad_y))]
    )
    return found


def forward(x, dt, A, B, C, D, z, dt_bias, reset=None, live=None, initial_state=None, passed: Segments | None = None):
    """(y (B, L, D) in x's dtype, final state (B, D, N), kept states (B, ceil(L / KEEP), D, N)), states in float32.

    dt (B, L, D), or the two factors of which it is the product, rows (B, L, R) and a matrix (D, R): here and in all that follows.
    passed: of `segment_states`, if it has been called already.
    """
    return forward_together([(x, dt, A, B, C, D, z, dt_bias, reset, live, initial_state)], [passed])[0]


def forward_together(problems: list[tuple], passed: list[Segments | None]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`forward` of each in one launch: problems of any sizes, but of one dtype and d_state, which fill the device together."""
    kernels, cuts = launches.cut(problems)
    found, first_pass, arguments = [], [], []
    for (x, dt, A, B, C, D, z, dt_bias, *flags, initial_state), known, (segments, size) in zip(_alike(problems), passed, cuts):
        (batch, length, d_inner), d_state = x.shape, A.shape[1]
        x, B, C, z = map(_token_major, (x, B, C, z))
        dt, factor = _factors(dt, kernels)
        A, D, dt_bias = (v.float().contiguous() for v in (A, D, dt_bias))
        initial_state = None if initial_state is None else initial_state.float().contiguous()
        y = x.new_empty(batch, length, d_inner)
        final, kept = _states(x, batch, d_inner, d_state), _states(x, batch, -(-length // KEEP), d_inner, d_state)
        states = _segment_states(final, segments) if known is None else known
        found.append((y, final, kept))
        arguments.append(
            (d_inner, batch, length, segments, size, x, dt, factor, z, B, C, A, dt_bias, D, initial_state, *states, *flags,
             y, kept, final, *_strides(x, dt, z, B, C))
        )
        if segments > 1 and known is None:
            first_pass.append(arguments[-1])
    if first_pass:
        kernels.forward(first_pass, local_pass=True, without_last=True)
    kernels.forward(arguments)
    return found


def backward(
    grad_y, grad_final, x, dt, A, B, C, D, z, dt_bias, reset, live, kept, y, grad_x=None, grad_dt=None, grad_z=None,
    grad_B=None, grad_C=None, asked: Segments | None = None,
) -> dict[str, Tensor]:
    """Gradients by name, from what `forward` returned. grad_x, ... (B, L, ·): where to write them, views allowed.

    asked: of `segment_gradients`, if it has been called already.
    """
    problem = x, dt, A, B, C, D, z, dt_bias, reset, live, grad_final
    return backward_together([problem], [(grad_y, kept, y)], [(grad_x, grad_dt, grad_z, grad_B, grad_C)], [asked])[0]


def backward_together(
    problems: list[tuple], results: list[tuple], outs: list[tuple], asked: list[Segments | None], of_log: bool = False
) -> list[dict[str, Tensor]]:
    """`backward` of each in one launch. problems: as `forward_together`'s, with grad_final in the place of the initial state;
    results: (grad_y, kept, y); outs: (grad_x, grad_dt, grad_z, grad_B, grad_C); of_log: A's gradient is that of log(-A)."""
    kernels, cuts = launches.cut(problems)
    found, first_pass, arguments, sums = [], [], [], []
    for problem, (grad_y, kept, y), into, known, (segments, size) in zip(_alike(problems), results, outs, asked, cuts):
        x, dt, A, B, C, D, z, dt_bias, *flags, grad_final = problem
        (batch, length, d_inner), d_state = x.shape, A.shape[1]
        x, B, C, z, grad_y = map(_token_major, (x, B, C, z, grad_y))
        dt, factor = _factors(dt, kernels)
        A, D, dt_bias = (v.float().contiguous() for v in (A, D, dt_bias))
        grad_final = None if grad_final is None else grad_final.float().contiguous()
        grad_x, grad_dt, grad_z, grad_B, grad_C = (
            torch.empty(v.shape, dtype=v.dtype, device=v.device) if out is None else out
            for v, out in zip((x, dt if factor is None else x, z, B, C), into)
        )
        programs, exact = -(-d_inner // kernels.channels), torch.bfloat16 not in (B.dtype, C.dtype)
        part_bc = torch.empty(
            programs, batch, length, 2, d_state, dtype=torch.float32 if exact else torch.bfloat16, device=x.device
        )
        part_a = _states(x, batch * segments, d_inner * (d_state + 2))  # behind those of A, (D, N), those of dt_bias and D
        vectors = _states(x, d_inner * (d_state + 2))
        grad_initial = _states(x, batch, d_inner, d_state)
        states = _segment_states(grad_initial, segments) if known is None else known
        if segments > 1 and known is None:
            first_pass.append(
                (d_inner, batch, length, segments, size, dt, factor, z, C, grad_y, A, dt_bias, *flags, *states,
                 *_strides(dt, z, C, grad_y))
            )
        arguments.append(
            (d_inner, batch, length, segments, size, x, dt, factor, z, B, C, grad_y, y, A, dt_bias, D, *flags, kept, grad_final,
             *states, grad_x, grad_dt, grad_z, part_bc, part_a, grad_initial,
             *_strides(x, dt, z, B, C, grad_y, grad_x, grad_dt, grad_z))
        )
        sums.append((part_bc, grad_B, grad_C, part_a, A, vectors))
        grad_A, grad_bias, grad_D = vectors.split([d_inner * d_state, d_inner, d_inner])
        found.append({
            "x": grad_x, "dt": grad_dt, "A": grad_A.view(d_inner, d_state), "B": grad_B, "C": grad_C, "D": grad_D, "z": grad_z,
            "dt_bias": grad_bias, "initial_state": grad_initial,
        })
    if first_pass:
        kernels.gradient_state(first_pass, without_first=True)  # nothing stands before the first
    kernels.backward(arguments)
    add_parts(sums, of_log)
    for gradients, (_, _, A, _, _, D, _, dt_bias, *_) in zip(found, problems):
        gradients.update({name: gradients[name].to(v.dtype) for name, v in (("A", A), ("D", D), ("dt_bias", dt_bias))})
    return found


def _alike(problems: list[tuple]) -> list[tuple]:
    """With flags as bytes, and everywhere if anywhere, as states are: a kernel is compiled with them or without."""
    given = [any(problem[i] is not None for problem in problems) for i in (8, 9, 10)]
    found = []
    for *values, reset, live, state in problems:
        x, A = values[0], values[2]
        reset, live = (
            x.new_full(x.shape[:2], usual, dtype=torch.bool) if needed and v is None else v
            for v, needed, usual in zip((reset, live), given, (False, True))
        )
        if given[2] and state is None:
            state = torch.zeros(x.shape[0], *A.shape, device=x.device)
        found.append((*values, _flags(reset), _flags(live), state))
    return found


def _factors(dt: Tensor | tuple[Tensor, Tensor], kernels) -> tuple[Tensor, Tensor | None]:
    """dt and None, or its factors where the kernels multiply them."""
    if isinstance(dt, Tensor):
        return _token_major(dt), None
    rows, matrix = dt
    if kernels.multiply(rows, matrix):
        return rows, matrix
    return torch.mm(rows.flatten(0, 1), matrix.t()).view(*rows.shape[:2], len(matrix)), None


def _token_major(v: Tensor) -> Tensor:
    return v if v.stride(-1) == 1 else v.contiguous()


def _flags(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous().view(torch.uint8)


def _states(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _segment_states(like: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """For what each segment does to a state (B, D, N): what it leaves of 0, and the sum of its steps. One needs neither."""
    batch, d_inner, d_state = like.shape
    if segments == 1:
        return like, like
    return _states(like, batch, segments, d_inner, d_state), _states(like, batch, segments, d_inner)


def _strides(*tensors: Tensor):
    """(batch stride, token stride) of each."""
    for v in tensors:
        yield from v.stride()[:2]
