"""The Mamba mixer (Gu & Dao, arXiv 2312.00752, section 3.4). Legend: B batch, L length, D d_inner, N d_state."""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from serpent_scale.config import MambaConfig
from serpent_scale.kernels.causal_conv1d import causal_conv1d
from serpent_scale.kernels.linear import low_copies, products_dtype
from serpent_scale.kernels.linear_later import linear_later
from serpent_scale.kernels.mamba_inner import mamba_inner, mamba_inner_phases, mamba_inner_together
from serpent_scale.kernels.selective_state_update import selective_state_update
from serpent_scale.model.documents import Documents
from serpent_scale.model.linear import Linear
from serpent_scale.model.mixer import Begun, Mixer, halo

TOKENS_A_STATE = 32  # the GPU's scan keeps one state for the backward pass every so many tokens


class MambaState(NamedTuple):
    conv: Tensor  # (B, d_conv - 1, D) last inputs of the convolution
    ssm: Tensor  # (B, D, N)


def dt_rank(d_inner: int, config: MambaConfig) -> int:
    """Rank of the step projection: d_model / 16 at the usual expansion of 2; from 16 on a multiple of 16, so that rows of
    x_proj's output, dt, B and C side by side, are aligned for wide loads."""
    if config.dt_rank is not None:
        return config.dt_rank
    rank = math.ceil(d_inner / 32)
    return rank if rank < 16 else 16 * math.ceil(rank / 16)


class Mamba(Mixer):
    """(B, L, d_in) -> (B, L, d_out): in_proj, causal conv, SiLU, x_proj, dt_proj, selective scan, gate, out_proj."""

    def __init__(self, d_in: int, d_inner: int, d_out: int, config: MambaConfig):
        super().__init__(d_in, d_inner, d_out, config)
        self.d_inner, self.d_state, self.rank = d_inner, config.d_state, dt_rank(d_inner, config)
        self.in_proj = Linear(d_in, 2 * d_inner)
        self.conv_weight = nn.Parameter(torch.empty(d_inner, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(d_inner))
        self.x_proj = nn.Linear(d_inner, self.rank + 2 * config.d_state, bias=False)
        self.dt_proj = nn.Linear(self.rank, d_inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(d_inner))
        self.A_log = nn.Parameter(torch.arange(1, config.d_state + 1).float().log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = Linear(d_inner, d_out)
        for parameter in (self.A_log, self.D, self.dt_bias):
            parameter._no_weight_decay = True
        self._initialise(config)

    @torch.no_grad()
    def _initialise(self, config: MambaConfig) -> None:
        bound = config.d_conv**-0.5
        self.conv_weight.uniform_(-bound, bound)
        self.conv_bias.uniform_(-bound, bound)
        self.dt_proj.weight.uniform_(-(self.rank**-0.5), self.rank**-0.5)
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        dt = torch.exp(torch.rand(self.d_inner) * (high - low) + low)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus

    def forward(self, x: Tensor, documents: Documents, state: MambaState | None = None) -> tuple[Tensor, MambaState]:
        if state is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
            return self._decode(x, documents, state)
        conv, ssm = (None, None) if state is None else state
        y, conv, ssm = mamba_inner(self.in_proj(x), *self._inner(documents), conv, ssm)
        return self.out_proj(y), MambaState(conv, ssm)

    @staticmethod
    def together(mixers: list[Mamba], xs: list[Tensor], documents: list[Documents]) -> list[tuple[Tensor, MambaState]]:
        projections = [(m.in_proj, m.x_proj, m.dt_proj, m.out_proj) for m in mixers]
        copies = low_copies([p.weight for four in projections for p in four], products_dtype(xs[0]))
        calls = [(m.in_proj(x, copy), *m._inner(d), None, None) for m, x, d, copy in zip(mixers, xs, documents, copies[::4])]
        inner = [copy for four in zip(copies[1::4], copies[2::4]) for copy in four]
        done = zip(mixers, mamba_inner_together(calls, inner), copies[3::4])
        return [(m.out_proj(y, copy), MambaState(conv, ssm)) for m, (y, conv, ssm), copy in done]

    def _inner(self, documents: Documents) -> tuple:
        """Arguments of `mamba_inner` from conv_weight to live."""
        return (
            self.conv_weight, self.conv_bias, self.x_proj.weight, self.dt_proj.weight, self.dt_bias, self.A_log, self.D,
            documents.since_reset, documents.n_live, documents.reset, documents.live,
        )

    @property
    def reach(self) -> int:
        return self.conv_weight.shape[1] - 1

    def begin(self, x: Tensor, before: Tensor, documents: Documents, state: MambaState | None = None) -> Begun:
        conv, ssm = (None, None) if state is None else state
        conv = halo(conv, self.in_proj(before)[..., : self.d_inner], self.reach)
        xz, gate = linear_later(x, self.in_proj.weight, slice(0, self.d_inner))
        phases = mamba_inner_phases(xz, *self._inner(documents), conv)
        return Begun(phases, ssm, lambda y, after, conv: (self.out_proj(y), MambaState(conv, after)), gate)

    def _decode(self, x: Tensor, documents: Documents, state: MambaState) -> tuple[Tensor, MambaState]:
        """One token a row, without gradients."""
        u, z = self.in_proj(x).chunk(2, -1)
        u, halo = causal_conv1d(u, self.conv_weight, self.conv_bias, documents.since_reset, state.conv, documents.n_live)
        dt, B, C = self.x_proj(u).split([self.rank, self.d_state, self.d_state], -1)
        dt = self.dt_proj(dt)
        if documents.live is not None:
            dt = dt.masked_fill(~documents.live[..., None], -math.inf)  # a step of 0
        y, ssm = selective_state_update(
            state.ssm, u[:, 0], dt[:, 0], -torch.exp(self.A_log), B[:, 0], C[:, 0], self.D, z[:, 0], self.dt_bias,
            documents.reset[:, 0],
        )
        return self.out_proj(y[:, None]), MambaState(halo, ssm)

    @staticmethod
    def parameter_count(d_in: int, d_inner: int, d_out: int, config: MambaConfig) -> int:
        n, r = config.d_state, dt_rank(d_inner, config)
        return d_inner * (2 * d_in + config.d_conv + 1 + r + 2 * n + r + 1 + n + 1 + d_out)

    @staticmethod
    def kept_bytes(d_inner: int, config: MambaConfig, itemsize: int) -> float:
        """xz, y, x_proj's output and scan states."""
        in_and_out = 3 * d_inner + dt_rank(d_inner, config) + 2 * config.d_state
        return itemsize * in_and_out + 4 * d_inner * config.d_state / TOKENS_A_STATE

    @staticmethod
    def flops(d_in: int, d_inner: int, d_out: int, config: MambaConfig, length: int) -> tuple[int, int]:
        n, r = config.d_state, dt_rank(d_inner, config)
        matmul = 2 * d_inner * (2 * d_in + r + 2 * n + r + d_out) + 2 * d_inner * n  # the last: y = C h
        # conv: multiply and add per tap; scan per state: dt A, exp, decay h, + input, (dt x) B
        return matmul, d_inner * (2 * config.d_conv + 5 * n)
