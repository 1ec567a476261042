"""The S4D mixer (Gu, Gupta, Goel & Re, arXiv 2206.11893): a diagonal state-space model per channel, the same at every step.

Legend: B batch, L length, D d_inner, N d_state, of which N/2 are kept: states come in conjugate pairs. T steps of a chunk,
K chunks of a row.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serpent_scale.config import S4DConfig
from serpent_scale.kernels.diagonal_scan import decay, diagonal_scan
from serpent_scale.kernels.linear_later import linear_later
from serpent_scale.kernels.phases import Phases
from serpent_scale.model.documents import Documents
from serpent_scale.model.mixer import Begun, Mixer, to_front

CHUNK = 64


class S4D(Mixer):
    """in_proj to u and z; per channel h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A u_t (zero-order hold, B = 1),
    y = 2 Re(C h) + D u; out_proj of y * silu(z).

    The SSM is the paper's; the gate is that of Mamba's block, so that layers of this project differ in their SSM alone.

    In training, y is a convolution. It is done in chunks of 64 steps, by a Toeplitz matrix inside a chunk and by the states
    between chunks: any document, state and length, and causal to the bit. With convolution = fft, rows that are one document
    (or part of one) are convolved by one FFT of the whole row; rounding in an FFT mixes all positions, so outputs before a
    changed token may then move by rounding. Rows of several documents go in chunks either way. Decoding is the recurrence.
    All of it is float32 (or float64), whatever autocast says. State (B, D, N/2) complex: the sum of decayed inputs, h without the
    factor of the hold.
    """

    fixed_shapes = False

    def __init__(self, d_in: int, d_inner: int, d_out: int, config: S4DConfig):
        super().__init__(d_in, d_inner, d_out, config)
        pairs = config.d_state // 2
        self.fft = config.convolution == "fft"
        self.in_proj = nn.Linear(d_in, 2 * d_inner, bias=False)  # u, z
        self.A_log = nn.Parameter(torch.full((d_inner, pairs), math.log(0.5)))  # A = -exp(A_log) + i A_imag
        self.A_imag = nn.Parameter(frequencies(config.init, config.d_state).repeat(d_inner, 1))
        self.C = nn.Parameter(torch.randn(d_inner, pairs, 2) * 0.5**0.5)  # real and imaginary part
        self.dt_log = nn.Parameter(torch.empty(d_inner).uniform_(math.log(config.dt_min), math.log(config.dt_max)))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_out, bias=False)
        for parameter in (self.A_log, self.A_imag, self.dt_log, self.D):
            parameter._no_weight_decay = True

    def forward(self, x: Tensor, documents: Documents, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, z = self.in_proj(x).chunk(2, -1)
        compute = torch.promote_types(u.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            v = u.to(compute)
            log_decay, read = self._system(compute)
            if state is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
                y, after = _step(v, log_decay, read, documents, state)
            else:
                y, after = convolve(v, log_decay, read, documents, state, self.fft)
        return self._finish(y, v, z), after

    def _finish(self, y: Tensor, v: Tensor, z: Tensor) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            y = (y + self.D.to(y.dtype) * v).to(z.dtype)
        return self.out_proj(y * F.silu(z))

    @property
    def reach(self) -> int:
        return 0

    def begin(self, x: Tensor, before: Tensor, documents: Documents, state: Tensor | None = None) -> Begun:
        x, documents, back = to_front(x, documents)
        projected, gate = linear_later(x, self.in_proj.weight, slice(0, len(self.D)))
        u, z = projected.chunk(2, -1)
        with torch.autocast(x.device.type, enabled=False):
            v = u.to(torch.promote_types(u.dtype, torch.float32))
            phases = convolution_phases(v, *self._system(v.dtype), documents, self.fft)
        return Begun(phases, state, lambda y, after: (back(self._finish(y, v, z)), after), gate)

    def _system(self, compute: torch.dtype) -> tuple[Tensor, Tensor]:
        """(dt A, what reads y from the sum of decayed inputs), both (D, N/2) complex."""
        A = torch.complex(-torch.exp(self.A_log), self.A_imag).to(torch.promote_types(compute, torch.complex64))
        log_decay = A * torch.exp(self.dt_log).to(compute)[:, None]
        C = torch.complex(*self.C.to(compute).unbind(-1))  # a view as complex would need an even offset in ZeRO's flat buffers
        return log_decay, 2 * C * torch.expm1(log_decay) / A

    @staticmethod
    def parameter_count(d_in: int, d_inner: int, d_out: int, config: S4DConfig) -> int:
        return d_inner * (2 * d_in + 2 * config.d_state + 2 + d_out)

    @staticmethod
    def flops(d_in: int, d_inner: int, d_out: int, config: S4DConfig, length: int) -> tuple[int, int]:
        """Of the form in chunks; the kernel's making, once for all rows, is left out."""
        matmul = 2 * d_inner * (2 * d_in + d_out) + d_inner * (2 * CHUNK + 4 * config.d_state)
        # a complex multiply and add is 8: the scan over chunks; then D u and the gate
        passes = math.ceil(math.log2(max(2, length / CHUNK)))
        return matmul, d_inner * (8 * passes * config.d_state // (2 * CHUNK) + 3)

    @staticmethod
    def kept_bytes(d_inner: int, config: S4DConfig, itemsize: int) -> float:
        """in_proj's output, y, silu(z) and their product; in float32 u twice (the convolution wants time last), and at each
        chunk's end local states, states, and those before the chunk."""
        return itemsize * 5 * d_inner + 4 * d_inner * (2 + 3 * config.d_state / CHUNK)


def frequencies(init: str, size: int) -> Tensor:
    """(size / 2,) imaginary parts of A at the start, whose real parts are all -1/2 (arXiv 2206.11893, section 4)."""
    n = torch.arange(size // 2).float()
    return math.pi * n if init == "lin" else size / math.pi * (size / (2 * n + 1) - 1)


def _step(u: Tensor, log_decay: Tensor, read: Tensor, documents: Documents, state: Tensor) -> tuple[Tensor, Tensor]:
    """`convolve` of one token a row."""
    h = torch.exp(log_decay) * state.masked_fill(documents.reset[..., None], 0) + u[:, 0, :, None]
    y = (read * h).real.sum(-1)[:, None]
    return y, h if documents.live is None else torch.where(documents.live[..., None], h, state)


class _Layout(NamedTuple):
    """Where the tokens of rows lie in chunks, when each document begins a chunk of its own: no chunk holds two."""

    slots: Tensor | None  # (B, L) slot of each token, None: its position
    starts: Tensor  # (B, K) bool: a document begins with this chunk

    @classmethod
    def of(cls, documents: Documents, size: int) -> _Layout:
        reset, length, pieces = documents.reset, documents.reset.shape[1], documents.most_pieces()
        if pieces == 1:
            starts = reset[:, :1]
            return cls(None, torch.cat([starts, starts.new_zeros(len(reset), -(-length // size) - 1)], 1))
        if documents.lengths:
            count = max(sum(-(-n // size) for n in row) for row in documents.lengths)
        else:
            count = (length + pieces * (size - 1)) // size
        at = torch.arange(length, device=reset.device)
        first = torch.where(reset, at, 0).cummax(1).values  # of the token's piece
        filled = torch.cat([reset.new_zeros(len(reset), 1, dtype=torch.int64), (at - first)[:, :-1] // size + 1], 1)
        chunk = (filled * reset).cumsum(1) + (at - first) // size
        starts = reset.new_zeros(len(reset), count + 1).scatter(1, torch.where(reset, chunk, count), True)[:, :count]
        return cls(chunk * size + (at - first) % size, starts)


def convolve(
    u: Tensor, log_decay: Tensor, read: Tensor, documents: Documents, state: Tensor | None = None, fft: bool = False
) -> tuple[Tensor, Tensor]:
    """y_t = Re(sum_n read_n h_tn) with h_t = exp(log_decay) h_{t-1} + u_t: (y (B, L, D), h after the last slot in use).

    u (B, L, D) real; log_decay, read (D, N/2) complex; state (B, D, N/2), zeros if None.
    """
    return _begin(u, log_decay, read, documents, fft)[1](state)


def convolution_phases(u: Tensor, log_decay: Tensor, read: Tensor, documents: Documents, fft: bool) -> Phases:
    """`convolve` of a shard whose initial state is not known yet. The span is its number of steps (B,)."""
    state, finish = _begin(u, log_decay, read, documents, fft)
    span, seen = _span(documents, u.dtype), documents.reset.cumsum(1) == 0

    def run(initial: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(u.device.type, enabled=False):
            return finish(initial)

    return Phases(state.detach(), span, decay(log_decay.detach()), run, (log_decay, read, seen, span), _state_gradient)


@torch.no_grad()
def _state_gradient(saved: tuple, grad_y: Tensor, grad_after: Tensor | None) -> Tensor:
    """Of the initial state (B, D, N/2). It reaches the tokens before the first document that begins."""
    log_decay, read, seen, span = saved
    size, pairs = min(CHUNK, seen.shape[1]), log_decay.shape[1]
    count = -(-seen.shape[1] // size)
    grad = _pad(grad_y.masked_fill(~seen[..., None], 0), None, count * size).unflatten(1, (count, size))
    powers = torch.exp(log_decay[..., None] * torch.arange(1, size + 1, device=seen.device))
    read_out = _parts(read[..., None] * powers, conjugate=True)  # (D, N, T)
    grad = torch.einsum("bktd,dnt->bkdn", grad, read_out)
    steps = size * torch.arange(count, device=seen.device, dtype=span.dtype)
    found = (decay(log_decay)(steps).conj() * torch.complex(*grad.split(pairs, -1))).sum(1)
    return found if grad_after is None else found + decay(log_decay)(span).conj() * grad_after


def _span(documents: Documents, dtype: torch.dtype) -> Tensor:
    """(B,) slots in use, infinite where a document begins among them."""
    return documents.in_use.to(dtype).masked_fill(documents.reset.any(1), torch.inf)


def _begin(
    u: Tensor, log_decay: Tensor, read: Tensor, documents: Documents, fft: bool
) -> tuple[Tensor, Callable[[Tensor | None], tuple[Tensor, Tensor]]]:
    """What `convolve` leaves of a state of 0, and what makes its result from the state there is."""
    batch, length, d = u.shape
    size, pairs = min(CHUNK, length), log_decay.shape[1]
    layout = _Layout.of(documents, size)
    count = layout.starts.shape[1]
    powers = torch.exp(log_decay[..., None] * torch.arange(size + 1, device=u.device))  # (D, N/2, T + 1)
    by_fft = fft and layout.slots is None

    columns = _pad(u, layout.slots, count * size).unflatten(1, (count, size)).permute(3, 2, 0, 1).flatten(2)  # (D, T, B K)
    ends_whole = layout.slots is None and documents.n_live is None and length % size == 0
    tail, offset, last_chunk = (None, None, None) if ends_whole else _tail(u, documents, layout.slots, size)
    to_end = _parts(powers[..., :size].flip(-1)).transpose(1, 2)  # (D, T, N)
    wanted = columns if ends_whole else torch.cat([columns, tail.permute(2, 1, 0)], 2)
    local = wanted.transpose(1, 2) @ to_end  # (D, B K + B, N)
    local = torch.complex(*local.chunk(2, -1)).transpose(0, 1)  # (B K + B, D, N/2)

    ends = local[: batch * count].reshape(batch, count, d * pairs)
    h = diagonal_scan(ends, size * log_decay.flatten(), Documents(layout.starts).since_reset)
    # States before each chunk, of a state before the row of 0.
    begins = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1).masked_fill(layout.starts[..., None], 0)
    if ends_whole:
        left = h[:, -1].unflatten(1, (d, pairs))
    else:
        begin = begins.gather(1, last_chunk[:, None, None].expand(-1, 1, d * pairs))[:, 0].unflatten(1, (d, pairs))
        left = torch.exp(log_decay * (offset + 1)[:, None, None]) * begin + local[batch * count :]

    def finish(state: Tensor | None) -> tuple[Tensor, Tensor]:
        within, before, after = None, begins, left
        if by_fft:
            within, before = _fft_convolution(u, log_decay, read, powers[..., :size], count), 0
            if state is None:
                return within, after
        if state is not None:
            powers_of_chunks = torch.exp(size * log_decay.flatten() * torch.arange(count, device=u.device)[:, None])
            carried = powers_of_chunks * state.flatten(1)[:, None]
            before = before + carried.masked_fill(layout.starts.cumsum(1)[..., None] > 0, 0)
            after = after + decay(log_decay)(_span(documents, u.dtype)) * state
        read_out = _parts(read[..., None] * powers[..., 1:], conjugate=True)  # (D, N, T)
        states = _parts(before.unflatten(-1, (d, pairs)).flatten(0, 1).permute(1, 2, 0))  # (D, N, B K)
        y = read_out.transpose(1, 2) @ states  # (D, T, B K)
        if not by_fft:
            kernel = torch.cat([read.real[..., None], read_out[:, :pairs, :-1]], 2).sum(1)  # Re(read exp(t log_decay)), summed
            y = y + _toeplitz(kernel) @ columns
        y = y.unflatten(2, (batch, count)).permute(2, 3, 1, 0).flatten(1, 2)  # (B, K T, D)
        if by_fft:
            return within + y[:, :length], after
        return (y[:, :length] if layout.slots is None else y.gather(1, layout.slots[..., None].expand(-1, -1, d))), after

    return left, finish


def _pad(u: Tensor, slots: Tensor | None, total: int) -> Tensor:
    """u (B, L, D) in its slots of (B, total, D), zeros elsewhere."""
    if slots is None:
        return F.pad(u, (0, 0, 0, total - u.shape[1]))
    return u.new_zeros(len(u), total, u.shape[2]).scatter(1, slots[..., None].expand(-1, -1, u.shape[2]), u)


def _tail(u: Tensor, documents: Documents, slots: Tensor | None, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row's last token in use: (its chunk up to it, moved to the chunk's end (B, T, D), its place in it, the chunk)."""
    n_live = documents.in_use
    slot = n_live - 1
    if slots is not None:
        slot = torch.where(n_live > 0, slots.gather(1, slot.clamp(min=0)[:, None])[:, 0], -1)
    chunk, offset = slot.clamp(min=0) // size, torch.where(slot < 0, -1, slot % size)
    back = torch.arange(size - 1, -1, -1, device=u.device)  # tokens before the last one
    at = (n_live[:, None] - 1 - back).clamp(min=0)[..., None].expand(-1, -1, u.shape[2])
    return u.gather(1, at) * (back <= offset[:, None])[..., None], offset, chunk


def _parts(x: Tensor, conjugate: bool = False) -> Tensor:
    """(D, N/2, X) complex -> (D, N, X): real parts, then imaginary ones."""
    return torch.cat([x.real, -x.imag if conjugate else x.imag], 1)


def _toeplitz(kernel: Tensor) -> Tensor:
    """kernel (D, T) -> (D, T, T) with kernel[t - s] at (t, s), 0 above the diagonal."""
    return F.pad(kernel, (kernel.shape[1] - 1, 0)).unfold(1, kernel.shape[1], 1).flip(2)


def _fft_convolution(u: Tensor, log_decay: Tensor, read: Tensor, powers: Tensor, count: int) -> Tensor:
    """The convolution of whole rows from an empty state. powers (D, N/2, T) of the first T steps; count chunks hold a row."""
    length, size = u.shape[1], powers.shape[2]
    hops = torch.exp(log_decay[..., None] * size * torch.arange(count, device=u.device)) * read[..., None]  # (D, N/2, K)
    kernel = (_parts(hops, conjugate=True).transpose(1, 2) @ _parts(powers)).flatten(1)[:, :length]
    spectrum = torch.fft.rfft(u.transpose(1, 2), 2 * length) * torch.fft.rfft(kernel, 2 * length)
    return torch.fft.irfft(spectrum, 2 * length)[..., :length].transpose(1, 2)
