"""The selective scan on GPUs: the host side, and kernels in plain Triton for where those of `gluon.py` do not run.

Time is cut into segments only as far as it takes to fill the device. With more than one, a first pass finds the state each leaves
from 0 and the sum of its steps; since a segment acts on a state as exp(A sum dt), its true initial state follows from those of the
segments before it. The backward pass does the same from the other end. The forward pass keeps a state every KEEP tokens.

No sum depends on the order in which programs run: each writes its part, and the parts are added in their order.
"""
from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch_together, problem_of

KEEP = 32  # tokens from one kept state to the next
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
CUT = tl.constexpr(3e38)  # a step so long that nothing is left of the state: exp2(CUT * A) = 0


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
    kernels = _kernels(x.device, d_state)
    dt, factor = _factors(dt, kernels)
    segments, size = _segments(batch, length, -(-d_inner // kernels.channels), x.device)
    found = Segments(_states(x, batch, segments, d_inner, d_state), _states(x, batch, segments, d_inner))
    kernels.forward(  # z, C, D and outputs are not touched
        [(d_inner, batch, length, segments, size, x, dt, factor, x, B, B, A, dt_bias, dt_bias, None, *found, _flags(reset), _flags(live),
          x, found.local, found.local, *_strides(x, dt, x, B, B))],
        local_pass=True,
    )
    return found


@torch.no_grad()
def segment_gradients(grad_y, dt, A, C, z, dt_bias, reset=None, live=None) -> Segments:
    """What the outputs of every segment that `backward` would walk ask of the state before it."""
    (batch, length, d_inner), d_state = grad_y.shape, A.shape[1]
    grad_y, C, z = map(_token_major, (grad_y, C, z))
    A, dt_bias = A.float().contiguous(), dt_bias.float().contiguous()
    kernels = _kernels(grad_y.device, d_state)
    dt, factor = _factors(dt, kernels)
    segments, size = _segments(batch, length, -(-d_inner // kernels.channels), grad_y.device)
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
    kernels, cuts = _cut(problems)
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
    kernels, cuts = _cut(problems)
    rows, block = 8, 256  # of one warp: enough loads on their way
    found, first_pass, arguments, sums, sum_programs = [], [], [], [], []
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
            (d_inner, batch, length, segments, size, x, dt, factor, z, B, C, grad_y, y, A, dt_bias, D, *flags, kept, grad_final, *states,
             grad_x, grad_dt, grad_z, part_bc, part_a, grad_initial,
             *_strides(x, dt, z, B, C, grad_y, grad_x, grad_dt, grad_z))
        )
        row_programs = triton.cdiv(batch * length, rows)
        sums.append(
            (part_bc, grad_B, grad_C, part_a, A, vectors, programs, batch * length, length, *part_a.shape, A.numel(), row_programs,
             *_strides(grad_B, grad_C))
        )
        sum_programs.append(row_programs + triton.cdiv(vectors.numel(), block))
        grad_A, grad_bias, grad_D = vectors.split([d_inner * d_state, d_inner, d_inner])
        found.append({
            "x": grad_x, "dt": grad_dt, "A": grad_A.view(d_inner, d_state), "B": grad_B, "C": grad_C, "D": grad_D, "z": grad_z,
            "dt_bias": grad_bias, "initial_state": grad_initial,
        })
    if first_pass:
        kernels.gradient_state(first_pass, without_first=True)  # nothing stands before the first
    kernels.backward(arguments)
    launch_together(
        _scan_add_parts, sums, sum_programs, N=d_state, WIDTH=triton.next_power_of_2(2 * d_state), ROWS=rows, BLOCK=block,
        OF_LOG=of_log, num_warps=1,
    )
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
    """For what each segment does to a state (B, D, N): what it leaves from 0, and the sum of its steps. One segment needs neither."""
    batch, d_inner, d_state = like.shape
    if segments == 1:
        return like, like
    return _states(like, batch, segments, d_inner, d_state), _states(like, batch, segments, d_inner)


def _strides(*tensors: Tensor):
    """(batch stride, token stride) of each."""
    for v in tensors:
        yield from v.stride()[:2]


def _segments(batch: int, length: int, programs: int, device: torch.device) -> tuple[int, int]:
    """(segments, tokens of one): as many as give every scheduler of the device two warps, no more, since a second
    segment means a second pass over most of the sequence."""
    return _size(length, 8 * _multiprocessors(device) // (batch * programs))


def _size(length: int, wanted: int) -> tuple[int, int]:
    segments = min(max(1, wanted), max(1, length // (4 * KEEP)))
    size = -(-length // segments)
    size = -(-size // KEEP) * KEEP  # kept states lie at multiples of KEEP
    return -(-length // size), size


def _cut(problems: list[tuple]):
    """The kernels, and (segments, tokens of one) for each problem. Of several, those are cut that are much longer than what each
    of eight warps a multiprocessor would walk if all walked alike."""
    x, A = problems[0][0], problems[0][2]
    kernels = _kernels(x.device, A.shape[1])
    shapes = [(*p[0].shape[:2], -(-p[0].shape[2] // kernels.channels)) for p in problems]
    if len(shapes) == 1:
        return kernels, [_segments(*shapes[0], x.device)]
    share = sum(batch * length * programs for batch, length, programs in shapes) / (8 * _multiprocessors(x.device))
    return kernels, [_size(length, round(length / share)) for _, length, _ in shapes]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def _kernels(device: torch.device, d_state: int):
    """Gluon's kernels where they run: an NVIDIA GPU since Ampere, and the d_state they are laid out for."""
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 8 and d_state == 16:
        return GluonKernels(d_state)
    return PlainKernels(d_state)


class GluonKernels:
    """Launches of the kernels in `gluon.py`, each of several problems: D, batch, length, segments, tokens of one, then tensors,
    then their strides between rows and between tokens."""

    channels = 16  # of a program

    def __init__(self, d_state: int):
        from . import gluon

        self.module, self.d_state = gluon, d_state

    def forward(self, problems: list[tuple], local_pass: bool = False, without_last: bool = False) -> None:
        x, h0, reset, live = (problems[0][i] for i in (5, 14, 17, 18))
        self._launch(
            self.module.scan_forward, problems, 5, (5, 6, 8, 9, 10, 19), 7, without_last, LOCAL_PASS=local_pass,
            EXACT=x.dtype == torch.float32, HAS_H0=h0 is not None, HAS_RESET=reset is not None, HAS_LIVE=live is not None,
        )

    def gradient_state(self, problems: list[tuple], without_first: bool = False) -> None:
        reset, live = problems[0][12:14]
        self._launch(
            self.module.scan_gradient_state, problems, 4, (5, 7, 8, 9), 6, without_first, U=8, FIRST=int(without_first),
            HAS_RESET=reset is not None, HAS_LIVE=live is not None,
        )

    def backward(self, problems: list[tuple]) -> None:
        reset, live, _, final = problems[0][16:20]
        self._launch(
            self.module.scan_backward, problems, 9, (5, 6, *range(8, 13)), 7,
            HAS_FINAL=final is not None, HAS_RESET=reset is not None, HAS_LIVE=live is not None,
        )

    def multiply(self, rows: Tensor, matrix: Tensor) -> bool:
        """Whether the kernels form dt of these factors: in bfloat16, 32 columns at a time, which a row's lanes read 16 bytes each."""
        aligned = all(
            v.data_ptr() % 16 == 0 and v.stride(-1) == 1 and all(s % 8 == 0 for s in v.stride()[:-1]) for v in (rows, matrix)
        )
        return aligned and rows.dtype == matrix.dtype == torch.bfloat16 and rows.shape[-1] % 32 == 0 and matrix.is_contiguous()

    def _launch(
        self, kernel, problems: list[tuple], n_strided: int, token_major, factor_at: int, one_less: bool = False, **flags
    ) -> None:
        """n_strided: pairs of strides at the end of a problem; token_major: which of its arguments are read a tile at a time;
        factor_at: which is dt's second factor."""
        arguments, shapes, full = [], [], True
        for problem in problems:
            (d_inner, _, length, *_), strides = problem[:5], problem[-2 * n_strided :]
            arguments.append((*problem[1 : -2 * n_strided], *strides[::2]))
            rank = 0 if problem[factor_at] is None else problem[factor_at].shape[1]
            shape, last = (d_inner, *strides[1::2], rank), len(arguments)
            alike = bool(shapes) and shapes[-1][2] == shape
            shapes.append((shapes.pop()[0] if alike else last - 1, last, shape))
            full = full and d_inner % self.channels == 0 and length % KEEP == 0
            tiles = [problem[i] for i in token_major]
            if full and any(v.dtype == torch.bfloat16 for v in tiles):  # read two at a time
                full = not any(stride % 2 for stride in strides) and not any(v.data_ptr() % 4 for v in tiles)
        _launch(
            kernel, problems, arguments, self.channels, one_less, SHAPES=tuple(shapes), N=self.d_state, T=KEEP, **flags, FULL=full
        )


class PlainKernels:
    """Launches of the kernels below."""

    channels = 32  # of a program

    def __init__(self, d_state: int):
        self.constants = dict(N=d_state, NP=triton.next_power_of_2(d_state), BD=self.channels)

    def multiply(self, rows: Tensor, matrix: Tensor) -> bool:
        return False

    def forward(self, problems: list[tuple], local_pass: bool = False, without_last: bool = False) -> None:
        h0, reset, live = (problems[0][i] for i in (14, 17, 18))
        _launch(
            _scan_forward, problems, problems, self.channels, without_last, **self.constants, KEEP=KEEP, LOCAL_PASS=local_pass,
            HAS_H0=h0 is not None, HAS_RESET=reset is not None, HAS_LIVE=live is not None,
        )

    def gradient_state(self, problems: list[tuple], without_first: bool = False) -> None:
        reset, live = problems[0][12:14]
        _launch(
            _scan_gradient_state, problems, problems, self.channels, without_first, **self.constants, FIRST=int(without_first),
            HAS_RESET=reset is not None, HAS_LIVE=live is not None,
        )

    def backward(self, problems: list[tuple]) -> None:
        reset, live, kept, final = problems[0][16:20]
        arguments = []
        for problem in problems:
            d_inner, batch, _, segments, *_ = problem
            programs = -(-d_inner // self.channels)
            arguments.append(
                (*problem, _states(kept, programs, batch, segments, KEEP + 1, self.channels, self.constants["NP"]))
            )
        _launch(
            _scan_backward, problems, arguments, self.channels, **self.constants,
            KEEP=KEEP, HAS_FINAL=final is not None, HAS_RESET=reset is not None, HAS_LIVE=live is not None,
        )


def _launch(kernel, problems: list[tuple], arguments: list[tuple], channels: int, one_less: bool = False, **constants) -> None:
    """A kernel of one warp for `channels` of a row and segment. one_less: of its segments one is left out."""
    programs = [-(-d_inner // channels) * batch * (segments - one_less) for d_inner, batch, _, segments, *_ in problems]
    # What is not there must be something: kernels choose between problems.
    filled = [tuple(p[5] if v is None else v for v in values) for p, values in zip(problems, arguments)]
    launch_together(kernel, filled, programs, **constants, num_warps=1)


@triton.jit
def _place(PROBLEMS, STARTS, BD: tl.constexpr):
    """(problem, block of channels, row, segment) of this program."""
    problem, place = problem_of(PROBLEMS, STARTS)
    blocks = (problem[0] + BD - 1) // BD
    row = place // blocks
    return problem, place % blocks, (row % problem[1]).to(tl.int64), row // problem[1]


@triton.jit
def _step_size(DT, bias, ok, at, RESET, LIVE, HAS_RESET: tl.constexpr, HAS_LIVE: tl.constexpr):
    """(dt, step of the decay, slope of softplus) of one token's channels, and whether the token counts."""
    v = tl.load(DT, mask=ok, other=0.0).to(tl.float32) + bias
    e = tl.exp2(tl.abs(v) * -LOG2E)
    # log1p(e) by a polynomial fitted on [0, 1], relative error 2e-7
    p = 0.005253457929939032 * e - 0.02958850748836994
    p = p * e + 0.07836166769266129
    p = p * e - 0.13674770295619965
    p = p * e + 0.19111430644989014
    p = p * e - 0.24844369292259216
    p = p * e + 0.33319270610809326
    p = p * e - 0.49999502301216125
    p = p * e + 1.0
    dt = tl.maximum(v, 0.0) + p * e
    slope = tl.where(v >= 0.0, 1.0, e) / (1.0 + e)
    if HAS_LIVE:
        count = (tl.load(LIVE + at) != 0).to(tl.float32)
        dt *= count
        slope *= count
    decay = dt
    if HAS_RESET:
        decay = tl.where(tl.load(RESET + at) != 0, CUT, dt)
    return dt, decay, slope


@triton.jit
def _scan_forward(
    PROBLEMS, STARTS,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, KEEP: tl.constexpr, LOCAL_PASS: tl.constexpr, HAS_H0: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_LIVE: tl.constexpr,
):  # fmt: skip
    """As `gluon.scan_forward`, one token at a time."""
    problem, block, b, s = _place(PROBLEMS, STARTS, BD)
    (D, n_batch, L, S, SEGMENT, X, DT, FACTOR, Z, Bm, C, A, BIAS, SKIP, H0, LOCAL, SPAN, RESET, LIVE, Y, STATES, FINAL,
     sx_b, sx_t, sd_b, sd_t, sz_b, sz_t, sb_b, sb_t, sc_b, sc_t) = problem  # fmt: skip
    d, n = block * BD + tl.arange(0, BD), tl.arange(0, NP)
    ok, n_ok = d < D, n < N
    ok2 = ok[:, None] & n_ok[None, :]
    off = d[:, None] * N + n[None, :]
    a2 = tl.minimum(tl.load(A + off, mask=ok2, other=-1.0) * LOG2E, -1e-30)
    bias, skip = tl.load(BIAS + d, mask=ok, other=0.0), tl.load(SKIP + d, mask=ok, other=0.0)
    h = tl.zeros((BD, NP), tl.float32)
    if not LOCAL_PASS:
        if HAS_H0:
            h = tl.load(H0 + b * D * N + off, mask=ok2, other=0.0)
        for j in range(0, s):
            span = tl.load(SPAN + (b * S + j) * D + d, mask=ok, other=0.0)
            h = h * tl.exp2(a2 * span[:, None]) + tl.load(LOCAL + (b * S + j) * D * N + off, mask=ok2, other=0.0)
    span = tl.zeros((BD,), tl.float32)
    n_kept = (L + KEEP - 1) // KEEP
    for t in range(s * SEGMENT, tl.minimum((s + 1) * SEGMENT, L)):
        at = b * L + t
        t64 = at - b * L
        x = tl.load(X + b * sx_b + t64 * sx_t + d, mask=ok, other=0.0).to(tl.float32)
        dt, decay, _ = _step_size(DT + b * sd_b + t64 * sd_t + d, bias, ok, at, RESET, LIVE, HAS_RESET, HAS_LIVE)
        b_t = tl.load(Bm + b * sb_b + t64 * sb_t + n, mask=n_ok, other=0.0).to(tl.float32)
        if not LOCAL_PASS:
            if t % KEEP == 0:
                tl.store(STATES + (b * n_kept + t // KEEP) * D * N + off, h, mask=ok2)
        h = h * tl.exp2(decay[:, None] * a2) + (dt * x)[:, None] * b_t[None, :]
        if LOCAL_PASS:
            span += decay
        else:
            c_t = tl.load(C + b * sc_b + t64 * sc_t + n, mask=n_ok, other=0.0).to(tl.float32)
            z = tl.load(Z + b * sz_b + t64 * sz_t + d, mask=ok, other=0.0).to(tl.float32)
            z = tl.where(z == 0.0, 1e-30, z)  # the backward pass divides by silu(z)
            y = tl.sum(h * c_t[None, :], 1) + skip * x
            tl.store(Y + at * D + d, (y * (z / (1.0 + tl.exp2(z * -LOG2E)))).to(Y.dtype.element_ty), mask=ok)
    if LOCAL_PASS:
        tl.store(LOCAL + (b * S + s) * D * N + off, h, mask=ok2)
        tl.store(SPAN + (b * S + s) * D + d, span, mask=ok)
    else:
        if s == S - 1:
            tl.store(FINAL + b * D * N + off, h, mask=ok2)


@triton.jit
def _scan_gradient_state(
    PROBLEMS, STARTS,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, FIRST: tl.constexpr, HAS_RESET: tl.constexpr, HAS_LIVE: tl.constexpr,
):  # fmt: skip
    """As `gluon.scan_gradient_state`, one token at a time."""
    problem, block, b, s = _place(PROBLEMS, STARTS, BD)
    (D, n_batch, L, S, SEGMENT, DT, FACTOR, Z, C, DY, A, BIAS, RESET, LIVE, LOCAL, SPAN,
     sd_b, sd_t, sz_b, sz_t, sc_b, sc_t, sy_b, sy_t) = problem  # fmt: skip
    s += FIRST
    d, n = block * BD + tl.arange(0, BD), tl.arange(0, NP)
    ok, n_ok = d < D, n < N
    ok2 = ok[:, None] & n_ok[None, :]
    off = d[:, None] * N + n[None, :]
    a2 = tl.minimum(tl.load(A + off, mask=ok2, other=-1.0) * LOG2E, -1e-30)
    bias = tl.load(BIAS + d, mask=ok, other=0.0)
    carry, span = tl.zeros((BD, NP), tl.float32), tl.zeros((BD,), tl.float32)
    first = s * SEGMENT
    last = tl.minimum(first + SEGMENT, L)
    for i in range(0, last - first):
        t = last - 1 - i
        at = b * L + t
        t64 = at - b * L
        _, decay, _ = _step_size(DT + b * sd_b + t64 * sd_t + d, bias, ok, at, RESET, LIVE, HAS_RESET, HAS_LIVE)
        z = tl.load(Z + b * sz_b + t64 * sz_t + d, mask=ok, other=0.0).to(tl.float32)
        dy = tl.load(DY + b * sy_b + t64 * sy_t + d, mask=ok, other=0.0).to(tl.float32) * (z / (1.0 + tl.exp2(z * -LOG2E)))
        c_t = tl.load(C + b * sc_b + t64 * sc_t + n, mask=n_ok, other=0.0).to(tl.float32)
        carry = (carry + dy[:, None] * c_t[None, :]) * tl.exp2(decay[:, None] * a2)
        span += decay
    tl.store(LOCAL + (b * S + s) * D * N + off, carry, mask=ok2)
    tl.store(SPAN + (b * S + s) * D + d, span, mask=ok)


@triton.jit
def _scan_backward(
    PROBLEMS, STARTS,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, KEEP: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_RESET: tl.constexpr,
    HAS_LIVE: tl.constexpr,
):  # fmt: skip
    """As `gluon.scan_backward`, one token at a time; a program keeps the states of KEEP tokens in its part of SCRATCH."""
    problem, pid, b, s = _place(PROBLEMS, STARTS, BD)
    (D, n_batch, L, S, SEGMENT, X, DT, FACTOR, Z, Bm, C, DY, OUT, A, BIAS, SKIP, RESET, LIVE, STATES, DFINAL, LOCAL, SPAN,
     DX, DDT, DZ, DBC, DA, DH0, sx_b, sx_t, sd_b, sd_t, sz_b, sz_t, sb_b, sb_t, sc_b, sc_t, sy_b, sy_t,
     sdx_b, sdx_t, sdd_b, sdd_t, sdz_b, sdz_t, SCRATCH) = problem  # fmt: skip
    d, n = pid * BD + tl.arange(0, BD), tl.arange(0, NP)
    ok, n_ok = d < D, n < N
    ok2 = ok[:, None] & n_ok[None, :]
    off = d[:, None] * N + n[None, :]
    a2 = tl.minimum(tl.load(A + off, mask=ok2, other=-1.0) * LOG2E, -1e-30)
    bias, skip = tl.load(BIAS + d, mask=ok, other=0.0), tl.load(SKIP + d, mask=ok, other=0.0)
    carry = tl.zeros((BD, NP), tl.float32)
    if HAS_FINAL:
        carry = tl.load(DFINAL + b * D * N + off, mask=ok2, other=0.0)
    for i in range(0, S - 1 - s):
        j = S - 1 - i
        span = tl.load(SPAN + (b * S + j) * D + d, mask=ok, other=0.0)
        carry = carry * tl.exp2(a2 * span[:, None]) + tl.load(LOCAL + (b * S + j) * D * N + off, mask=ok2, other=0.0)
    d_a = tl.zeros((BD, NP), tl.float32)
    d_bias, d_skip = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    n_kept = (L + KEEP - 1) // KEEP
    scratch = SCRATCH + ((pid * n_batch + b) * S + s) * (KEEP + 1) * BD * NP + tl.arange(0, BD)[:, None] * NP + n[None, :]
    first = s * SEGMENT
    last = tl.minimum(first + SEGMENT, L)
    chunks = (last - first + KEEP - 1) // KEEP
    for k in range(0, chunks):
        t0 = first + (chunks - 1 - k) * KEEP
        size = tl.minimum(KEEP, last - t0)
        h = tl.load(STATES + (b * n_kept + t0 // KEEP) * D * N + off, mask=ok2, other=0.0)
        tl.store(scratch, h)
        for u in range(0, size):
            at = b * L + t0 + u
            t64 = at - b * L
            x = tl.load(X + b * sx_b + t64 * sx_t + d, mask=ok, other=0.0).to(tl.float32)
            dt, decay, _ = _step_size(DT + b * sd_b + t64 * sd_t + d, bias, ok, at, RESET, LIVE, HAS_RESET, HAS_LIVE)
            b_t = tl.load(Bm + b * sb_b + t64 * sb_t + n, mask=n_ok, other=0.0).to(tl.float32)
            h = h * tl.exp2(decay[:, None] * a2) + (dt * x)[:, None] * b_t[None, :]
            tl.store(scratch + (u + 1) * BD * NP, h)
        tl.debug_barrier()
        for v in range(0, size):
            u = size - 1 - v
            at = b * L + t0 + u
            t64 = at - b * L
            x = tl.load(X + b * sx_b + t64 * sx_t + d, mask=ok, other=0.0).to(tl.float32)
            dt, decay, slope = _step_size(DT + b * sd_b + t64 * sd_t + d, bias, ok, at, RESET, LIVE, HAS_RESET, HAS_LIVE)
            b_t = tl.load(Bm + b * sb_b + t64 * sb_t + n, mask=n_ok, other=0.0).to(tl.float32)
            c_t = tl.load(C + b * sc_b + t64 * sc_t + n, mask=n_ok, other=0.0).to(tl.float32)
            z = tl.load(Z + b * sz_b + t64 * sz_t + d, mask=ok, other=0.0).to(tl.float32)
            z = tl.where(z == 0.0, 1e-30, z)
            gate = 1.0 / (1.0 + tl.exp2(z * -LOG2E))
            dy = tl.load(DY + b * sy_b + t64 * sy_t + d, mask=ok, other=0.0).to(tl.float32)
            out = tl.load(OUT + at * D + d, mask=ok, other=0.0).to(tl.float32)
            # y before the gate is out / silu(z); silu'(z) / silu(z) = (1 + z (1 - sigmoid(z))) / z
            dz = dy * out * (1.0 + z * (1.0 - gate)) / z
            dy = dy * z * gate
            before, after = tl.load(scratch + u * BD * NP), tl.load(scratch + (u + 1) * BD * NP)
            dh = carry + dy[:, None] * c_t[None, :]
            carry = dh * tl.exp2(decay[:, None] * a2)
            q = carry * before
            through_input = tl.sum(dh * b_t[None, :], 1)
            ddt = (through_input * x + tl.sum(q * a2, 1) * LN2) * slope
            d_a += q * decay[:, None]
            d_bias += ddt
            d_skip += dy * x
            tl.store(DX + b * sdx_b + t64 * sdx_t + d, (through_input * dt + dy * skip).to(DX.dtype.element_ty), mask=ok)
            tl.store(DDT + b * sdd_b + t64 * sdd_t + d, ddt.to(DDT.dtype.element_ty), mask=ok)
            tl.store(DZ + b * sdz_b + t64 * sdz_t + d, dz.to(DZ.dtype.element_ty), mask=ok)
            part = DBC + ((pid.to(tl.int64) * n_batch + b) * L + t0 + u) * (2 * N) + n
            tl.store(part, tl.sum(dh * (dt * x)[:, None], 0).to(DBC.dtype.element_ty), mask=n_ok)
            tl.store(part + N, tl.sum(after * dy[:, None], 0).to(DBC.dtype.element_ty), mask=n_ok)
        tl.debug_barrier()
    DA += (b * S + s) * D * (N + 2)
    tl.store(DA + off, d_a, mask=ok2)
    tl.store(DA + D * N + d, d_bias, mask=ok)
    tl.store(DA + D * (N + 1) + d, d_skip, mask=ok)
    if s == 0:
        tl.store(DH0 + b * D * N + off, carry, mask=ok2)


@triton.jit
def _add(parts, n_parts, stride, inside, SIZE: tl.constexpr):
    """The sum over n_parts of what lies stride apart, (SIZE,), eight at a time so that enough is on its way."""
    total = tl.zeros((SIZE,), tl.float32)
    k = tl.arange(0, 8)[:, None]
    for first in range(0, n_parts, 8):
        p = parts[None, :] + (first + k).to(tl.int64) * stride
        total += tl.sum(tl.load(p, mask=inside[None, :] & (first + k < n_parts), other=0.0).to(tl.float32), 0)
    return total


@triton.jit
def _scan_add_parts(
    PROBLEMS, STARTS,
    N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OF_LOG: tl.constexpr,
):  # fmt: skip
    """PARTS (n_parts, B L, 2, N) summed in order into the gradients of B and C, and SUMMANDS (n_summands, n_sums) into SUMS.
    OF_LOG: the first n_A of these times A."""
    problem, place = problem_of(PROBLEMS, STARTS)
    (PARTS, GB, GC, SUMMANDS, A, SUMS, n_parts, n_rows, L, n_summands, n_sums, n_A, row_programs,
     sb_b, sb_t, sc_b, sc_t) = problem  # fmt: skip
    if place < row_programs:
        i = tl.arange(0, ROWS * WIDTH)
        row, column = place * ROWS + i // WIDTH, i % WIDTH
        ok = (row < n_rows) & (column < 2 * N)
        total = _add(PARTS + row.to(tl.int64) * (2 * N) + column, n_parts, n_rows.to(tl.int64) * (2 * N), ok, ROWS * WIDTH)
        b, t = (row // L).to(tl.int64), (row % L).to(tl.int64)
        tl.store(GB + b * sb_b + t * sb_t + column, total.to(GB.dtype.element_ty), mask=ok & (column < N))
        tl.store(GC + b * sc_b + t * sc_t + column - N, total.to(GC.dtype.element_ty), mask=ok & (column >= N))
    else:
        at = (place - row_programs) * BLOCK + tl.arange(0, BLOCK)
        found = _add(SUMMANDS + at, n_summands, n_sums.to(tl.int64), at < n_sums, BLOCK)
        if OF_LOG:
            found *= tl.load(A + at, mask=at < n_A, other=1.0)
        tl.store(SUMS + at, found, mask=at < n_sums)
