"""The S5 mixer (Smith, Warrington & Linderman, arXiv 2208.04933): one diagonal state-space model with many inputs and outputs.

Legend: B batch, L length, D d_inner, N d_state, of which N/2 are kept: states come in conjugate pairs.
"""
from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serpent_scale.config import S5Config
from serpent_scale.kernels.diagonal_scan import diagonal_scan, diagonal_scan_phases
from serpent_scale.kernels.linear_later import linear_later
from serpent_scale.model.documents import Documents
from serpent_scale.model.mixer import Begun, Mixer, to_front


class S5(Mixer):
    """in_proj to u and z; h_t = exp(dt A) h_{t-1} + dt-discretised B u_t (zero-order hold), y = 2 Re(C h) + D u; out_proj of
    y * silu(z).

    The SSM is the paper's; the gate is that of Mamba's block, so that layers of this project differ in their SSM alone. A scan
    of logarithmic depth over all channels of the state runs it in training. B and C act as real matrices on the stacked real
    and imaginary parts, in the autocast dtype like any projection; all complex arithmetic is float32 (or float64).
    State: h (B, N/2) complex.
    """

    def __init__(self, d_in: int, d_inner: int, d_out: int, config: S5Config):
        super().__init__(d_in, d_inner, d_out, config)
        pairs = config.d_state // 2
        self.in_proj = nn.Linear(d_in, 2 * d_inner, bias=False)  # u, z
        self.B = nn.Linear(d_inner, config.d_state, bias=False)  # real parts, then imaginary ones
        self.C = nn.Linear(config.d_state, d_inner, bias=False)
        self.A_log = nn.Parameter(torch.full((pairs,), math.log(0.5)))  # A = -exp(A_log) + i A_imag
        self.A_imag = nn.Parameter(legs_frequencies(config.d_state // config.n_blocks).repeat(config.n_blocks))
        self.dt_log = nn.Parameter(torch.empty(pairs))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_out, bias=False)
        for parameter in (self.A_log, self.A_imag, self.dt_log, self.D):
            parameter._no_weight_decay = True
        # The eigenvectors of HiPPO-N are unitary: in their basis Gaussian B and C are complex Gaussian, half in either part.
        nn.init.normal_(self.B.weight, std=(2 * d_inner) ** -0.5)
        nn.init.normal_(self.C.weight, std=(2 * config.d_state) ** -0.5)
        nn.init.uniform_(self.dt_log, math.log(config.dt_min), math.log(config.dt_max))

    def forward(self, x: Tensor, documents: Documents, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, z = self.in_proj(x).chunk(2, -1)
        h = diagonal_scan(*self._held(u), documents.since_reset, state)
        return self._read(h, u, z), last_live(h, documents, state)

    def _held(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The scan's inputs (B, L, N/2), and dt A (N/2,)."""
        inputs = self.B(u)
        compute = torch.promote_types(inputs.dtype, torch.float32)
        with torch.autocast(u.device.type, enabled=False):
            rate = torch.complex(-torch.exp(self.A_log), self.A_imag).to(torch.promote_types(compute, torch.complex64))
            log_decay = rate * torch.exp(self.dt_log).to(compute)
            return torch.complex(*inputs.to(compute).chunk(2, -1)) * (torch.expm1(log_decay) / rate), log_decay

    def _read(self, h: Tensor, u: Tensor, z: Tensor) -> Tensor:
        y = 2 * self.C(torch.cat([h.real, -h.imag], -1).to(u.dtype)) + self.D * u
        return self.out_proj(y.to(z.dtype) * F.silu(z))

    @property
    def reach(self) -> int:
        return 0

    def begin(self, x: Tensor, before: Tensor, documents: Documents, state: Tensor | None = None) -> Begun:
        x, documents, back = to_front(x, documents)
        projected, gate = linear_later(x, self.in_proj.weight, slice(0, self.B.in_features))
        u, z = projected.chunk(2, -1)
        phases = diagonal_scan_phases(*self._held(u), documents.since_reset, documents.n_live)
        return Begun(phases, state, lambda h, after: (back(self._read(h, u, z)), after), gate)

    @staticmethod
    def parameter_count(d_in: int, d_inner: int, d_out: int, config: S5Config) -> int:
        return d_inner * (2 * d_in + 2 * config.d_state + 1 + d_out) + 3 * config.d_state // 2

    @staticmethod
    def flops(d_in: int, d_inner: int, d_out: int, config: S5Config, length: int) -> tuple[int, int]:
        matmul = 2 * d_inner * (2 * d_in + 2 * config.d_state + d_out)
        # a complex multiply and add is 8: the hold, then one per pass of the scan; D u
        return matmul, (6 + 8 * math.ceil(math.log2(max(2, length)))) * config.d_state // 2 + 2 * d_inner

    @staticmethod
    def kept_bytes(d_inner: int, config: S5Config, itemsize: int) -> float:
        """in_proj's output, C's input, y, silu(z) and their product; held inputs and states in float32."""
        return itemsize * (5 * d_inner + config.d_state) + 4 * 2 * config.d_state


def legs_frequencies(size: int) -> Tensor:
    """(size / 2,) imaginary parts of the eigenvalues of HiPPO-N (LegS made normal), whose real parts are all -1/2.

    HiPPO-N is -1/2 plus the skew-symmetric matrix S_nk = -sqrt((2n + 1)(2k + 1)) / 2 for n > k (arXiv 2208.04933, section 4.2).
    """
    root = np.sqrt(2 * np.arange(size) + 1)
    lower = np.tril(-np.outer(root, root) / 2, -1)
    return torch.tensor(np.linalg.eigvalsh(1j * (lower - lower.T))[size // 2 :].copy(), dtype=torch.float32)


def last_live(h: Tensor, documents: Documents, state: Tensor | None) -> Tensor:
    """h (B, L, M) at the last slot in use of each row; state (B, M), zeros if None, where none is."""
    if documents.n_live is None:
        return h[:, -1]
    last = h.gather(1, (documents.n_live - 1).clamp(min=0)[:, None, None].expand(-1, 1, h.shape[2]))[:, 0]
    before = torch.zeros_like(last) if state is None else state
    return torch.where((documents.n_live == 0)[:, None], before, last)
