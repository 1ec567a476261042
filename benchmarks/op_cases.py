"""What `ops.py` measures: inputs of each kernel, our call of it, a float64 reference, and other projects' calls.

Inputs are random, in the types and layouts of a training step (bf16 activations, fp32 parameters); each implementation gets
the layout it asks for.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from harness import DEVICE
from torch import Tensor

from serpent_scale.model.documents import Documents

ACTIVATION = torch.bfloat16
D_STATE, HEAD_DIM, SSD_STATE, VOCABULARY = 16, 64, 128, 50304
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Form:
    """One implementation: call(**adapt(inputs)) gives a tensor or a tuple of them; restore brings each into our layout."""

    call: Callable[..., object]
    adapt: Callable[[Inputs], Inputs] = lambda inputs: inputs
    restore: Callable[[Tensor], Tensor] = lambda out: out


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    inputs: Callable[[], Inputs]
    check_inputs: Callable[[], Inputs]  # the same, small: a reference walks them one token at a time
    ours: Callable[[], Form]
    reference: Callable[..., object]
    peers: dict[str, Callable[[], Form]] = field(default_factory=dict)  # ImportError: not installed
    backward: bool = True
    flops: float = 0.0  # forward; given where matrix products are the bound, else bytes are


# Inputs ---------------------------------------------------------------------------------------------------------------------


def activations(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(ACTIVATION)


def halves(batch: int, length: int, width: int) -> tuple[Tensor, Tensor]:
    """Two (B, L, D) views of one (B, L, 2 D) tensor, as a projection leaves them."""
    return activations(batch, length, 2 * width).chunk(2, -1)


def documents(batch: int, length: int, packed: bool) -> Documents:
    """Whole rows, or rows of documents of about an eighth of the length, at most 700 tokens."""
    if not packed:
        return Documents.whole(batch, length, device=DEVICE)
    mean = min(700, max(2, length // 8))
    reset = torch.rand(batch, length, device=DEVICE) < 1 / mean
    reset[:, 0] = True
    starts = [row.nonzero().flatten().tolist() + [length] for row in reset.cpu()]
    return Documents(reset, tuple(tuple(b - a for a, b in zip(s, s[1:])) for s in starts))


def inverse_softplus(low: float, high: float, n: int) -> Tensor:
    dt = torch.exp(torch.empty(n, device=DEVICE).uniform_(math.log(low), math.log(high)))
    return dt + torch.log(-torch.expm1(-dt))


# Selective scan -------------------------------------------------------------------------------------------------------------


def scan_inputs(batch: int, length: int, d_inner: int, packed: bool) -> Inputs:
    _, z = halves(batch, length, d_inner)
    B, C = activations(batch, length, 2 * D_STATE).chunk(2, -1)
    inputs = dict(
        x=activations(batch, length, d_inner), dt=activations(batch, length, d_inner, scale=0.5),
        A=-torch.arange(1.0, D_STATE + 1, device=DEVICE).repeat(d_inner, 1), B=B, C=C,
        D=torch.randn(d_inner, device=DEVICE), z=z, dt_bias=inverse_softplus(1e-3, 0.1, d_inner),
    )
    if packed:
        inputs["reset"] = documents(batch, length, True).reset
    return inputs


def our_scan() -> Form:
    from serpent_scale.kernels.selective_scan import selective_scan

    return Form(lambda **inputs: selective_scan(**inputs)[0])


def scan_reference(**inputs: Tensor) -> Tensor:
    from serpent_scale.kernels.selective_scan.reference import selective_scan_reference

    return selective_scan_reference(**inputs)[0]


def mamba_scan() -> Form:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def call(x, dt, A, B, C, D, z, dt_bias):
        return selective_scan_fn(x, dt, A, B, C, D, z, dt_bias, delta_softplus=True)

    def adapt(i: Inputs) -> Inputs:
        return {k: v.transpose(1, 2).contiguous() if k in ("x", "dt", "B", "C", "z") else v for k, v in i.items()}

    return Form(call, adapt, lambda y: y.transpose(1, 2))


def scan_case(batch: int, length: int, d_inner: int, packed: bool = False) -> Case:
    return Case(
        "selective_scan", f"B{batch} L{length} D{d_inner}" + " with resets" * packed,
        lambda: scan_inputs(batch, length, d_inner, packed), lambda: scan_inputs(2, 700, 96, packed),
        our_scan, scan_reference, {} if packed else {"mamba_ssm": mamba_scan},
    )


# Convolution ----------------------------------------------------------------------------------------------------------------


def conv_inputs(batch: int, length: int, d_inner: int, packed: bool) -> Inputs:
    x, _ = halves(batch, length, d_inner)
    inputs = dict(x=x, weight=torch.randn(d_inner, 4, device=DEVICE) / 2, bias=torch.randn(d_inner, device=DEVICE))
    if packed:
        inputs["since_reset"] = documents(batch, length, True).since_reset
    return inputs


def our_conv() -> Form:
    from serpent_scale.kernels.causal_conv1d import causal_conv1d

    return Form(lambda **inputs: causal_conv1d(**inputs)[0])


def conv_reference(**inputs: Tensor) -> Tensor:
    from serpent_scale.kernels.causal_conv1d.reference import causal_conv1d

    return causal_conv1d(**inputs)[0]


def dao_conv(packed: bool) -> Form:
    """causal_conv1d: its (B, D, L) layout, or with documents the (B, L, D) one, which is the one that takes them."""
    from causal_conv1d import causal_conv1d_fn

    def adapt(i: Inputs) -> Inputs:
        x = i["x"].contiguous().transpose(1, 2)
        out = dict(x=x if packed else x.contiguous(), weight=i["weight"].flip(1).contiguous(), bias=i["bias"])
        if packed:
            out["seq_idx"] = (i["since_reset"] == 0).cumsum(1).int()
        return out

    return Form(lambda **i: causal_conv1d_fn(**i, activation="silu"), adapt, lambda y: y.transpose(1, 2))


def fla_conv() -> Form:
    from fla.modules.convolution import causal_conv1d

    def adapt(i: Inputs) -> Inputs:
        return dict(x=i["x"].contiguous(), weight=i["weight"].flip(1).contiguous(), bias=i["bias"])

    return Form(lambda **i: causal_conv1d(**i, activation="silu")[0], adapt)


def conv_case(batch: int, length: int, d_inner: int, packed: bool = False) -> Case:
    return Case(
        "causal_conv1d", f"B{batch} L{length} D{d_inner}" + " with resets" * packed,
        lambda: conv_inputs(batch, length, d_inner, packed), lambda: conv_inputs(2, 700, 96, packed), our_conv, conv_reference,
        {"causal_conv1d": lambda: dao_conv(packed), **({} if packed else {"fla": fla_conv})},
    )


# Norm -----------------------------------------------------------------------------------------------------------------------


def norm_inputs(tokens: int, d_model: int) -> Inputs:
    return dict(x=activations(tokens, d_model), residual=torch.randn(tokens, d_model, device=DEVICE),
                weight=torch.rand(d_model, device=DEVICE) + 0.5)  # fmt: skip


def our_norm() -> Form:
    from serpent_scale.kernels.rms_norm import rms_norm

    return Form(lambda x, residual, weight: rms_norm(x, weight, 1e-5, residual, ACTIVATION))


def norm_reference(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, 1e-5), total


def peer_norm(function: Callable) -> Form:
    def call(x, residual, weight):
        return function(x, weight, None, residual=residual, eps=1e-5, prenorm=True, residual_in_fp32=True)

    return Form(call)


def mamba_norm() -> Form:
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

    return peer_norm(rms_norm_fn)


def fla_norm() -> Form:
    from fla.modules.layernorm import rms_norm

    return peer_norm(rms_norm)


def liger_norm() -> Form:
    """Its residual has the type of x: half the bytes of a float32 residual, and its rounding."""
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    def call(x, residual, weight):
        return liger_fused_add_rms_norm(x, residual, weight, 1e-5, in_place=False)

    return Form(call, lambda i: {**i, "residual": i["residual"].to(ACTIVATION), "weight": i["weight"].to(ACTIVATION)})


def norm_case(tokens: int, d_model: int) -> Case:
    return Case(
        "rms_norm", f"{tokens} tokens, d{d_model}, residual added", lambda: norm_inputs(tokens, d_model),
        lambda: norm_inputs(700, 192), our_norm, norm_reference,
        {"mamba_ssm": mamba_norm, "fla": fla_norm, "Liger": liger_norm},
    )


# Resampling -----------------------------------------------------------------------------------------------------------------


def sampling_of(rate: float):
    from serpent_scale.kernels.resample import TICKS, Sampling

    low, taps = rate / 2, math.ceil(2 / rate) + 1
    return Sampling(round(rate * TICKS), 8 * TICKS, low, min(1.0, 2 * rate), 1.0, taps, 1 / 5, 2, 2 / 5)


def resample_inputs(batch: int, length: int, d_model: int, rate: float, packed: bool) -> Inputs:
    d_out, pieces = d_model // 3, documents(batch, length, packed)
    sampling = sampling_of(rate)
    slots = pieces.capacity(sampling.rate, sampling.band, 1 << 20)
    return dict(
        u=activations(batch, length, d_model), window_basis=torch.randn(6, d_model, device=DEVICE) / 2,
        weight=torch.randn(d_model, device=DEVICE) / d_model**0.5, bias=torch.zeros(1, device=DEVICE),
        y=activations(batch, slots, d_out), readout_basis=torch.randn(6, d_out, device=DEVICE) / 2, reset=pieces.reset,
    )


def resample_form(module, rate: float) -> Form:
    """Compression of u, and decompression of y with the clock it gave: what surrounds the inner mixer of one branch."""
    sampling = sampling_of(rate)

    def call(u, window_basis, weight, bias, y, readout_basis, reset):
        x, clock, _ = module.compress(u, window_basis, weight, bias, reset, sampling, y.shape[1])
        return x, module.decompress(y, readout_basis, clock, sampling)[0]

    return Form(call)


def our_resample(rate: float) -> Form:
    from serpent_scale.kernels import resample

    return resample_form(resample, rate)


def resample_reference(rate: float) -> Callable[..., object]:
    from serpent_scale.kernels.resample import reference

    return resample_form(reference, rate).call


def resample_case(batch: int, length: int, d_model: int, rate: float, packed: bool = False) -> Case:
    return Case(
        "resample", f"rate {rate:g}, B{batch} L{length} d{d_model}" + " with resets" * packed,
        lambda: resample_inputs(batch, length, d_model, rate, packed), lambda: resample_inputs(2, 700, 96, rate, packed),
        lambda: our_resample(rate), lambda **i: resample_reference(rate)(**i),
    )


# Cross-entropy --------------------------------------------------------------------------------------------------------------


def loss_inputs(tokens: int, d_model: int, vocabulary: int) -> Inputs:
    labels = torch.randint(vocabulary - 7, (tokens,), device=DEVICE)
    labels[::50] = -100
    return dict(hidden=activations(tokens, d_model), weight=torch.randn(vocabulary, d_model, device=DEVICE) * d_model**-0.5,
                labels=labels)  # fmt: skip


def our_loss() -> Form:
    from serpent_scale.kernels.linear_cross_entropy import linear_cross_entropy

    return Form(lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, len(weight) - 7))


def loss_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight[:-7].t(), labels, reduction="sum")


def liger_loss() -> Form:
    """It has no padding rows: the weight is cut, then cast, as autocast would."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def call(hidden, weight, labels):
        cast = weight[:-7].to(ACTIVATION)
        return liger_fused_linear_cross_entropy(hidden, cast, labels, reduction="sum", accum_dtype=torch.float32)

    return Form(call)


def fla_loss() -> Form:
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    return Form(lambda hidden, weight, labels: fused_linear_cross_entropy_loss(
        hidden, labels, weight[:-7].to(ACTIVATION), reduction="sum"))


def loss_case(tokens: int, d_model: int, vocabulary: int) -> Case:
    return Case(
        "linear_cross_entropy", f"{tokens} tokens, d{d_model}, V{vocabulary}", lambda: loss_inputs(tokens, d_model, vocabulary),
        lambda: loss_inputs(700, 192, 2055), our_loss, loss_reference, {"fla": fla_loss, "Liger": liger_loss},
        flops=6.0 * tokens * d_model * vocabulary,  # the gradients are formed in the forward pass
    )


# Mamba-2's SSD --------------------------------------------------------------------------------------------------------------


def ssd_inputs(batch: int, length: int, heads: int, packed: bool) -> Inputs:
    inputs = dict(
        x=activations(batch, length, heads, HEAD_DIM), dt=activations(batch, length, heads, scale=0.5),
        A=-torch.empty(heads, device=DEVICE).uniform_(1, 16), B=activations(batch, length, 1, SSD_STATE),
        C=activations(batch, length, 1, SSD_STATE), D=torch.randn(heads, device=DEVICE),
        dt_bias=inverse_softplus(1e-3, 0.1, heads),
    )
    if packed:
        inputs["reset"] = documents(batch, length, True).reset
    return inputs


def our_ssd() -> Form:
    from serpent_scale.kernels.ssd import ssd

    return Form(lambda **inputs: ssd(**inputs)[0])


def ssd_reference(**inputs: Tensor) -> Tensor:
    from serpent_scale.kernels.ssd.reference import ssd_reference

    return ssd_reference(**inputs)[0]


def mamba_ssd(packed: bool) -> Form:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def call(x, dt, A, B, C, D, dt_bias, seq_idx=None):
        return mamba_chunk_scan_combined(
            x, dt, A, B, C, chunk_size=256, D=D, dt_bias=dt_bias, seq_idx=seq_idx, dt_softplus=True)

    def adapt(i: Inputs) -> Inputs:
        if not packed:
            return i
        return {**{k: v for k, v in i.items() if k != "reset"}, "seq_idx": i["reset"].cumsum(1).int()}

    return Form(call, adapt)


def fla_ssd() -> Form:
    """Its simple gated linear attention, with the step folded into v and g, and B and C repeated for every head."""
    from fla.ops.simple_gla import chunk_simple_gla

    def call(x, dt, A, B, C, D, dt_bias):
        step = F.softplus(dt.float() + dt_bias)
        k, q = (v.expand(-1, -1, x.shape[2], -1) for v in (B, C))
        y, _ = chunk_simple_gla(q, k, (x * step[..., None]).to(x.dtype), step * A, scale=1.0)
        return y + (D[:, None] * x).to(x.dtype)

    return Form(call)


def ssd_case(batch: int, length: int, heads: int, packed: bool = False) -> Case:
    return Case(
        "ssd", f"B{batch} L{length} H{heads} P{HEAD_DIM} N{SSD_STATE}" + " with resets" * packed,
        lambda: ssd_inputs(batch, length, heads, packed), lambda: ssd_inputs(2, 700, 3, packed), our_ssd, ssd_reference,
        {"mamba_ssm": lambda: mamba_ssd(packed), **({} if packed else {"fla": fla_ssd})},
    )


# Decoding -------------------------------------------------------------------------------------------------------------------


def update_inputs(batch: int, d_inner: int) -> Inputs:
    i = scan_inputs(batch, 1, d_inner, False)
    return {"state": torch.randn(batch, d_inner, D_STATE, device=DEVICE),
            **{k: v.squeeze(1) if k in ("x", "dt", "B", "C", "z") else v for k, v in i.items()}}  # fmt: skip


def our_update() -> Form:
    from serpent_scale.kernels.selective_state_update import selective_state_update

    return Form(lambda state, **i: selective_state_update(state, **i, out=state))


def update_reference(state: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    from serpent_scale.kernels.selective_state_update.reference import selective_state_update

    return selective_state_update(state, **inputs)


def mamba_update() -> Form:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    def call(state, x, dt, A, B, C, D, z, dt_bias):
        return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus=True), state

    return Form(call)


def update_case(batch: int, d_inner: int) -> Case:
    return Case(
        "selective_state_update", f"B{batch} D{d_inner}", lambda: update_inputs(batch, d_inner), lambda: update_inputs(3, 96),
        our_update, update_reference, {"mamba_ssm": mamba_update}, backward=False,
    )


def cases(small: bool) -> list[Case]:
    if small:
        return [
            scan_case(1, 64, 32), scan_case(1, 64, 32, True), conv_case(1, 64, 32), conv_case(1, 64, 32, True),
            norm_case(64, 64), resample_case(1, 64, 48, 0.5), resample_case(1, 64, 48, 0.25, True), loss_case(64, 32, 519),
            ssd_case(1, 64, 2), update_case(2, 32),
        ]
    return [
        scan_case(8, 2048, 2048), scan_case(8, 4096, 2048), scan_case(8, 4096, 2048, True), scan_case(1, 65536, 2048),
        scan_case(1, 65536, 256), scan_case(4, 2048, 4096),
        conv_case(8, 4096, 2048), conv_case(8, 4096, 2048, True), norm_case(16384, 1024), norm_case(8192, 2048),
        resample_case(8, 2048, 1024, 0.5), resample_case(8, 2048, 1024, 0.25), resample_case(8, 2048, 1024, 0.25, True),
        loss_case(16384, 1024, VOCABULARY), loss_case(8192, 2048, VOCABULARY), ssd_case(8, 4096, 32),
        ssd_case(8, 4096, 32, True), update_case(64, 2048), update_case(512, 2048),
    ]
