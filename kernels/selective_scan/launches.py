"""Launches of the scan's kernels: which of them a device runs, and into how many segments time is cut for them.

Time is cut only as far as it takes to fill the device. With more than one segment, a first pass finds the state each leaves from
0 and the sum of its steps; since a segment acts on a state as exp(A sum dt), its true initial state follows from those of the
segments before it. The backward pass does the same from the other end.

A problem is a tuple: D, batch, length, segments, tokens of one, then tensors, then their strides between rows and between tokens.
"""
from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from ..launch import launch_together
from . import plain

KEEP = 32  # tokens from one state that the forward pass keeps to the next


@functools.cache
def kernels_for(device: torch.device, d_state: int):
    """Gluon's kernels where they run: an NVIDIA GPU since Ampere, and the d_state they are laid out for."""
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 8 and d_state == 16:
        return GluonKernels(d_state)
    return PlainKernels(d_state)


def segments_of(batch: int, length: int, programs: int, device: torch.device) -> tuple[int, int]:
    """(segments, tokens of one): as many as give every scheduler of the device two warps, no more, since a second
    segment means a second pass over most of the sequence."""
    return _size(length, 8 * _multiprocessors(device) // (batch * programs))


def _size(length: int, wanted: int) -> tuple[int, int]:
    segments = min(max(1, wanted), max(1, length // (4 * KEEP)))
    size = -(-length // segments)
    size = -(-size // KEEP) * KEEP  # kept states lie at multiples of KEEP
    return -(-length // size), size


def cut(problems: list[tuple]):
    """The kernels, and (segments, tokens of one) for each problem. Of several, those are cut that are much longer than what each
    of eight warps a multiprocessor would walk if all walked alike."""
    x, A = problems[0][0], problems[0][2]
    kernels = kernels_for(x.device, A.shape[1])
    shapes = [(*p[0].shape[:2], -(-p[0].shape[2] // kernels.channels)) for p in problems]
    if len(shapes) == 1:
        return kernels, [segments_of(*shapes[0], x.device)]
    share = sum(batch * length * programs for batch, length, programs in shapes) / (8 * _multiprocessors(x.device))
    return kernels, [_size(length, round(length / share)) for _, length, _ in shapes]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


class GluonKernels:
    """Launches of the kernels in `gluon_*.py`, each of several problems."""

    channels = 16  # of a program

    def __init__(self, d_state: int):
        from .gluon_backward import scan_backward
        from .gluon_forward import scan_forward
        from .gluon_gradient_state import scan_gradient_state

        self.d_state, self.scan_forward, self.scan_backward = d_state, scan_forward, scan_backward
        self.scan_gradient_state = scan_gradient_state

    def forward(self, problems: list[tuple], local_pass: bool = False, without_last: bool = False) -> None:
        x, h0, reset, live = (problems[0][i] for i in (5, 14, 17, 18))
        self._launch(
            self.scan_forward, problems, 5, (5, 6, 8, 9, 10, 19), 7, without_last, LOCAL_PASS=local_pass,
            EXACT=x.dtype == torch.float32, HAS_H0=h0 is not None, HAS_RESET=reset is not None, HAS_LIVE=live is not None,
        )

    def gradient_state(self, problems: list[tuple], without_first: bool = False) -> None:
        reset, live = problems[0][12:14]
        self._launch(
            self.scan_gradient_state, problems, 4, (5, 7, 8, 9), 6, without_first, U=8, FIRST=int(without_first),
            HAS_RESET=reset is not None, HAS_LIVE=live is not None,
        )

    def backward(self, problems: list[tuple]) -> None:
        reset, live, _, final = problems[0][16:20]
        self._launch(
            self.scan_backward, problems, 9, (5, 6, *range(8, 13)), 7,
            HAS_FINAL=final is not None, HAS_RESET=reset is not None, HAS_LIVE=live is not None,
        )

    def multiply(self, rows: Tensor, matrix: Tensor) -> bool:
        """Whether the kernels form dt of these factors: in bfloat16, 32 columns at a time, of which a lane reads 16 bytes."""
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
    """Launches of the kernels in `plain.py`, each of several problems."""

    channels = 32  # of a program

    def __init__(self, d_state: int):
        self.constants = dict(N=d_state, NP=triton.next_power_of_2(d_state), BD=self.channels)

    def multiply(self, rows: Tensor, matrix: Tensor) -> bool:
        return False

    def forward(self, problems: list[tuple], local_pass: bool = False, without_last: bool = False) -> None:
        h0, reset, live = (problems[0][i] for i in (14, 17, 18))
        _launch(
            plain.scan_forward, problems, problems, self.channels, without_last, **self.constants, KEEP=KEEP,
            LOCAL_PASS=local_pass, HAS_H0=h0 is not None, HAS_RESET=reset is not None, HAS_LIVE=live is not None,
        )

    def gradient_state(self, problems: list[tuple], without_first: bool = False) -> None:
        reset, live = problems[0][12:14]
        _launch(
            plain.scan_gradient_state, problems, problems, self.channels, without_first, **self.constants,
            FIRST=int(without_first), HAS_RESET=reset is not None, HAS_LIVE=live is not None,
        )

    def backward(self, problems: list[tuple]) -> None:
        reset, live, kept, final = problems[0][16:20]
        arguments = []
        for problem in problems:
            d_inner, batch, _, segments, *_ = problem
            programs = -(-d_inner // self.channels)
            states = programs, batch, segments, KEEP + 1, self.channels, self.constants["NP"]
            arguments.append((*problem, torch.empty(states, dtype=torch.float32, device=kept.device)))
        _launch(
            plain.scan_backward, problems, arguments, self.channels, **self.constants,
            KEEP=KEEP, HAS_FINAL=final is not None, HAS_RESET=reset is not None, HAS_LIVE=live is not None,
        )


def _launch(kernel, problems: list[tuple], arguments: list[tuple], channels: int, one_less: bool = False, **constants) -> None:
    """A kernel of one warp for `channels` of a row and segment. one_less: of its segments one is left out."""
    programs = [-(-d_inner // channels) * batch * (segments - one_less) for d_inner, batch, _, segments, *_ in problems]
    # What is not there must be something: kernels choose between problems.
    filled = [tuple(p[5] if v is None else v for v in values) for p, values in zip(problems, arguments)]
    launch_together(kernel, filled, programs, **constants, num_warps=1)
