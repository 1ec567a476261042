"""The Mamba-2 mixer (Dao & Gu, arXiv 2405.21060, section 7): state-space duality with one scalar decay a head.

Legend: B batch, L length, H heads, P head_dim (H P = d_inner), G groups of heads that share B and C, N d_state.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serpent_scale.config import Mamba2Config
from serpent_scale.kernels.causal_conv1d import causal_conv1d
from serpent_scale.kernels.linear_later import linear_later
from serpent_scale.kernels.rms_norm import rms_norm
from serpent_scale.kernels.ssd import ssd, ssd_phases
from serpent_scale.kernels.ssd.reference import CHUNK
from serpent_scale.model.documents import Documents
from serpent_scale.model.mixer import Begun, Mixer, halo

LARGEST_A = 16.0  # initial decay rates are uniform in [1, 16]


class Mamba2State(NamedTuple):
    conv: Tensor  # (B, d_conv - 1, H P + 2 G N) last inputs of the convolution
    ssm: Tensor  # (B, H, P, N)


class Mamba2(Mixer):
    """in_proj, causal conv and SiLU over x, B and C, scan, gate, RMSNorm per group, out_proj."""

    def __init__(self, d_in: int, d_inner: int, d_out: int, config: Mamba2Config):
        super().__init__(d_in, d_inner, d_out, config)
        self.d_inner, self.n_groups, self.d_bc = d_inner, config.n_groups, config.n_groups * config.d_state
        self.n_heads, self.norm_eps = d_inner // config.head_dim, config.norm_eps
        d_conv_in = d_inner + 2 * self.d_bc
        self.in_proj = nn.Linear(d_in, d_inner + d_conv_in + self.n_heads, bias=False)  # z, (x, B, C), dt
        self.conv_weight = nn.Parameter(torch.empty(d_conv_in, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(d_conv_in))
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.norm_weight = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_out, bias=False)
        for parameter in (self.A_log, self.D, self.dt_bias):
            parameter._no_weight_decay = True
        self._initialise(config)

    @torch.no_grad()
    def _initialise(self, config: Mamba2Config) -> None:
        bound = config.d_conv**-0.5
        self.conv_weight.uniform_(-bound, bound)
        self.conv_bias.uniform_(-bound, bound)
        self.A_log.uniform_(1, LARGEST_A).log_()
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        dt = torch.exp(torch.rand(self.n_heads) * (high - low) + low)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus

    def forward(self, x: Tensor, documents: Documents, state: Mamba2State | None = None) -> tuple[Tensor, Mamba2State]:
        conv, before = (None, None) if state is None else state
        z, scanned, conv = self._project(self.in_proj(x), documents, conv)
        one_token = state is not None and x.shape[1] == 1 and not torch.is_grad_enabled()
        y, after = (_step if one_token else ssd)(*scanned, documents.reset, documents.live, before)
        return self._finish(y, z), Mamba2State(conv, after)

    def _project(self, projected: Tensor, documents: Documents, conv: Tensor | None) -> tuple[Tensor, tuple, Tensor]:
        """z, the arguments of `ssd` from x to dt_bias, and the convolution's halo out."""
        z, xBC, dt = projected.split([self.d_inner, len(self.conv_bias), self.n_heads], -1)
        xBC, conv = causal_conv1d(xBC, self.conv_weight, self.conv_bias, documents.since_reset, conv, documents.n_live)
        u, B, C = xBC.split([self.d_inner, self.d_bc, self.d_bc], -1)
        u, B, C = u.unflatten(-1, (self.n_heads, -1)), B.unflatten(-1, (self.n_groups, -1)), C.unflatten(-1, (self.n_groups, -1))
        return z, (u, dt, -torch.exp(self.A_log), B, C, self.D, self.dt_bias), conv

    def _finish(self, y: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(self._norm(y.flatten(-2) * F.silu(z)))

    @property
    def reach(self) -> int:
        return self.conv_weight.shape[1] - 1

    def begin(self, x: Tensor, before: Tensor, documents: Documents, state: Mamba2State | None = None) -> Begun:
        conv, ssm = (None, None) if state is None else state
        conv = halo(conv, self.in_proj(before)[..., self.d_inner : self.d_inner + len(self.conv_bias)], self.reach)
        projected, gate = linear_later(x, self.in_proj.weight, slice(self.d_inner, None))
        z, scanned, conv = self._project(projected, documents, conv)
        phases = ssd_phases(*scanned, documents.reset, documents.live)
        return Begun(phases, ssm, lambda y, after: (self._finish(y, z), Mamba2State(conv, after)), gate)

    def _norm(self, y: Tensor) -> Tensor:
        """Each group's channels by their own root mean square."""
        groups = zip(y.chunk(self.n_groups, -1), self.norm_weight.chunk(self.n_groups))
        parts = [rms_norm(v, weight, self.norm_eps, out_dtype=y.dtype)[0] for v, weight in groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @staticmethod
    def width_unit(config: Mamba2Config) -> int:
        return config.head_dim * config.n_groups

    @staticmethod
    def parameter_count(d_in: int, d_inner: int, d_out: int, config: Mamba2Config) -> int:
        heads, d_conv_in = d_inner // config.head_dim, d_inner + 2 * config.n_groups * config.d_state
        return d_in * (d_inner + d_conv_in + heads) + d_conv_in * (config.d_conv + 1) + 3 * heads + d_inner + d_inner * d_out

    @staticmethod
    def flops(d_in: int, d_inner: int, d_out: int, config: Mamba2Config, length: int) -> tuple[int, int]:
        heads, d_bc = d_inner // config.head_dim, config.n_groups * config.d_state
        d_conv_in = d_inner + 2 * d_bc
        matmul = 2 * d_in * (d_inner + d_conv_in + heads) + 2 * d_inner * d_out
        # a chunk: C B^T for every group, its product with x for every head, states out and in
        matmul += 2 * CHUNK * (d_bc + d_inner) + 4 * d_inner * config.d_state
        # conv: multiply and add per tap; scan: subtract, exp and multiply per pair of steps and head, dt x, D x
        return matmul, 2 * config.d_conv * d_conv_in + 3 * CHUNK * heads + 3 * d_inner

    @staticmethod
    def kept_bytes(d_inner: int, config: Mamba2Config, itemsize: int) -> float:
        """in_proj's output, the convolution's, the scan's, silu(z) and what the norms of the groups give, apart and together."""
        heads, d_conv_in = d_inner // config.head_dim, d_inner + 2 * config.n_groups * config.d_state
        normalised = 1 if config.n_groups == 1 else 2
        return itemsize * (d_inner + 2 * d_conv_in + heads + (2 + normalised) * d_inner)


def _step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, reset: Tensor, live: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """`ssd` of one token a row, without gradients."""
    dtype, compute = x.dtype, state.dtype
    with torch.autocast(x.device.type, enabled=False):
        x, dt, A, B, C, D, dt_bias = (v.to(compute) for v in (x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, dt_bias))
        step = F.softplus(dt + dt_bias)  # (B, H)
        if live is not None:
            step = step * live
        state = state.masked_fill(reset[..., None, None], 0.0)
        B, C = (v.repeat_interleave(x.shape[1] // v.shape[1], 1)[:, :, None] for v in (B, C))  # (B, H, 1, N)
        state = torch.exp(step * A)[..., None, None] * state + (step[..., None] * x)[..., None] * B
        y = (state * C).sum(-1) + D[:, None] * x
    return y[:, None].to(dtype), state
