"""The registry, and what must hold of every mixer in it, alone and inside SeRpEnt."""
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import DEVICE, relative_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from serpent_scale import config as configuration
from serpent_scale.config import (
    Config, DataConfig, Mamba2Config, MambaConfig, ModelConfig, SerpentConfig, TrainingConfig, load_config,
)
from serpent_scale.kernels.causal_conv1d.reference import causal_conv1d as reference_conv
from serpent_scale.kernels.rms_norm.reference import rms_norm as reference_norm
from serpent_scale.kernels.ssd.reference import ssd as reference_scan
from serpent_scale.kernels.ssd.reference import ssd_reference
from serpent_scale.model import mamba2, mixers
from serpent_scale.model.accounting import flops_per_token, memory_per_rank, parameter_counts
from serpent_scale.model.documents import Documents
from serpent_scale.model.language_model import LanguageModel
from serpent_scale.model.mamba2 import Mamba2
from serpent_scale.model.mixer import Mixer

ROOT = Path(__file__).parents[1]
LENGTHS = (70, 3, 50)
CASES = [(pattern, inner) for inner in configuration.MIXERS for pattern in ((inner,), ("serpent",))]
alone_and_inside = pytest.mark.parametrize("pattern, inner", CASES, ids=[f"{p[0]}({i})" for p, i in CASES])


def small(pattern, inner, dtype=torch.float32):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(
        vocab_size=97, d_model=32, n_layers=2, pattern=list(pattern), serpent=SerpentConfig(band=2.0, inner=inner),
        mamba=MambaConfig(d_state=8), mamba2=Mamba2Config(d_state=8, head_dim=4, n_groups=2),
    ))
    for name, parameter in model.named_parameters():  # as after some training: nothing at the zeros and ones it starts with
        if parameter.ndim == 1 or "readout_basis" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.to(dtype)


def row(lengths=LENGTHS):
    tokens = torch.randint(0, 97, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    reset = torch.zeros_like(tokens, dtype=torch.bool)
    reset[0, np.cumsum((0,) + tuple(lengths[:-1]))] = True
    return tokens, Documents(reset, (tuple(lengths),))


def test_the_names_in_the_config_are_those_of_the_registry():
    assert set(configuration.MIXERS) == set(mixers.MIXERS)
    sections = {f.name for f in dataclasses.fields(ModelConfig) if dataclasses.is_dataclass(getattr(ModelConfig(), f.name))}
    assert sections == {*configuration.MIXERS, "serpent"}
    for mixer in mixers.MIXERS.values():  # the whole of the interface, each with its own
        assert issubclass(mixer, Mixer)
        assert not [name for name in ("forward", "parameter_count", "flops", "kept_bytes") if name not in vars(mixer)]


@alone_and_inside
def test_logits_before_a_changed_token_do_not_move_by_a_bit(pattern, inner):
    model = small(pattern, inner)
    tokens, documents = row()
    logits, _ = model(tokens, documents)
    for t in (1, 63, 64, 65, 70, 71, 122):
        changed = tokens.clone()
        changed[:, t:] = torch.randint(0, 97, changed[:, t:].shape)
        assert torch.equal(model(changed, documents)[0][:, :t], logits[:, :t])


@alone_and_inside
def test_packed_documents_give_what_they_give_alone(pattern, inner):
    model = small(pattern, inner, torch.float64)
    tokens, documents = row()
    logits, _ = model(tokens, documents)
    for part, got in zip(tokens.split(LENGTHS, 1), logits.split(LENGTHS, 1)):
        torch.testing.assert_close(got, model(part)[0], rtol=1e-8, atol=1e-9)


@alone_and_inside
@pytest.mark.parametrize("gradients", [True, False])
def test_a_row_in_pieces_or_token_by_token_equals_the_batch_form(pattern, inner, gradients):
    model = small(pattern, inner, torch.float64)
    tokens, documents = row((25, 3, 14))
    want, after = model(tokens, documents)
    sizes = lambda states: [leaf.shape for leaf in torch.utils._pytree.tree_leaves(states) if leaf is not None]
    for cuts in (range(43), (0, 1, 24, 25, 26, 42), (0, 17, 28, 42)):
        states, pieces = None, []
        with torch.set_grad_enabled(gradients):
            for low, high in zip(cuts, cuts[1:]):
                starts = [low] + [s for s in (25, 28) if low < s < high] + [high]
                piece = Documents(documents.reset[:, low:high], (tuple(np.diff(starts).tolist()),))
                logits, states = model(tokens[:, low:high], piece, states=states)
                pieces.append(logits)
                assert sizes(states) == sizes(after)  # the state does not grow
        torch.testing.assert_close(torch.cat(pieces, 1), want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", configuration.MIXERS)
@pytest.mark.parametrize("slots, used", [(1, 0), (30, 15)])
def test_slots_that_are_not_live_change_nothing(name, slots, used):
    mixer = small((name,), name, torch.float64).blocks[0].mixer
    x = torch.randn(2, 30 + slots, 32, dtype=torch.float64)
    live = torch.arange(slots).expand(2, -1) < torch.tensor([[used], [0]])
    with torch.no_grad():
        _, before = mixer(x[:, :30], Documents.whole(2, 30))
        _, after = mixer(x[:, 30:], Documents(torch.zeros_like(live), live=live), before)
        want = mixer(x[:, 30 : 30 + used], Documents.whole(2, used), before)[1] if used else before
    for got, first, second in zip(after, want, before):
        torch.testing.assert_close(got[0], first[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(got[1], second[1], rtol=0, atol=0)


@alone_and_inside
def test_counts_equal_the_built_model_and_torch(pattern, inner):
    model = small(pattern, inner)
    assert sum(parameter_counts(model.config).values()) == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1024, dtype=torch.int64))
    expected = flops_per_token(model.config, 1024).matmul * 1024
    if pattern == (inner,):
        assert counter.get_total_flops() == expected
    else:  # torch counts every slot of the static capacity, filled up to whole chunks, the formula what is emitted on average
        assert 0 <= counter.get_total_flops() / expected - 1 < 0.1
    run = Config(model=model.config, data=DataConfig(seq_len=128), training=TrainingConfig(micro_batch=2))
    on_gpu, on_cpu = (memory_per_rank(run, 1, device)["activations"] for device in ("cuda", "cpu"))
    assert 0 < on_gpu < on_cpu


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_sizes_with_mamba2_are_equal_with_and_without_serpent(file):
    patterns = ("[mamba2]", "[serpent]", "[mamba2,serpent]")
    runs = [load_config(file, [f"model.pattern={pattern}", "model.serpent.inner=mamba2"]) for pattern in patterns]
    counts = [sum(parameter_counts(run.model).values()) for run in runs]
    assert max(counts) / min(counts) - 1 < 0.01


@pytest.mark.parametrize("d_model", [512, 768, 1024, 2048])
def test_a_serpent_layer_around_mamba2_has_the_parameters_of_a_mamba2_layer_to_half_a_head(d_model):
    config = ModelConfig(d_model=d_model, serpent=SerpentConfig(inner="mamba2"))
    ours, plain = (mixers.parameter_count(name, config) for name in ("serpent", "mamba2"))
    assert abs(ours - plain) <= 64 * 3 * d_model / 2 and abs(ours / plain - 1) < 0.025


def test_bf16_autocast_stays_near_float32():
    model = small(("mamba2", "serpent"), "mamba2")
    tokens, documents = row()
    exact, states = model(tokens, documents)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = model(tokens, documents)
        with torch.no_grad():
            step, _ = model(tokens[:, :1], states=states)
    assert (rough.float() - exact).norm() / exact.norm() < 0.05
    with torch.no_grad():
        exact, _ = model(tokens[:, :1], states=states)
    assert (step.float() - exact).norm() / exact.norm() < 0.05


# Mamba-2 itself


def plain_mamba2(mixer, x, reset):
    """The layer written out step by step, one group and head at a time where that is what the words say. x (L, d_in)."""
    inner, groups, bc = mixer.d_inner, mixer.n_groups, mixer.d_bc
    z, xBC, dt = (x @ mixer.in_proj.weight.T).split([inner, inner + 2 * bc, mixer.n_heads], -1)
    start, convolved = 0, []
    for t in range(len(x)):
        start = t if reset[t] else start
        taps = [mixer.conv_weight[:, k] * xBC[t - k] for k in range(mixer.conv_weight.shape[1]) if t - k >= start]
        convolved.append(nn.functional.silu(mixer.conv_bias + sum(taps)))
    u, B, C = torch.stack(convolved)[None].split([inner, bc, bc], -1)
    y, _ = ssd_reference(
        u.unflatten(-1, (mixer.n_heads, -1)), dt[None], -mixer.A_log.exp(), B.unflatten(-1, (groups, -1)),
        C.unflatten(-1, (groups, -1)), mixer.D, mixer.dt_bias, reset[None],
    )
    y = (y.flatten(2)[0] * z * torch.sigmoid(z)).unflatten(-1, (groups, -1))
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return (y.flatten(1) * mixer.norm_weight) @ mixer.out_proj.weight.T


def test_outputs_and_gradients_equal_the_layer_written_out():
    torch.manual_seed(0)
    mixer = Mamba2(6, 24, 5, Mamba2Config(d_state=4, head_dim=4, n_groups=3)).double()
    for parameter in mixer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    _, documents = row((40, 3, 30))
    x = torch.randn(1, 73, 6, dtype=torch.float64, requires_grad=True)
    inputs, found = [x, *mixer.parameters()], []
    for y in (mixer(x, documents)[0][0], plain_mamba2(mixer, x[0], documents.reset[0])):
        direction = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).sin()
        found.append([y, *torch.autograd.grad((y * direction).sum(), inputs)])
    for got, want in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_through_the_gpu_kernels_it_computes_the_same(monkeypatch):
    """Their Triton forms on the views of wider rows that the layer hands them; in the interpreter where there is no GPU."""
    from serpent_scale.kernels.causal_conv1d import triton as conv
    from serpent_scale.kernels.rms_norm import triton as norm
    from serpent_scale.kernels.ssd import triton as scan

    torch.manual_seed(0)
    mixer = Mamba2(6, 32, 5, Mamba2Config(d_state=16, head_dim=8, n_groups=2)).to(DEVICE)
    x, direction = torch.randn(1, 73, 6, device=DEVICE, requires_grad=True), torch.randn(1, 73, 5, device=DEVICE)
    live = torch.arange(73, device=DEVICE)[None] < 70
    documents = Documents(row((40, 3, 30))[1].reset.to(DEVICE), live=live)
    inputs, found = [x, *mixer.parameters()], []
    for forms in ((reference_conv, reference_norm, reference_scan), (conv.causal_conv1d, norm.rms_norm, scan.ssd)):
        for name, form in zip(("causal_conv1d", "rms_norm", "ssd"), forms):
            monkeypatch.setattr(mamba2, name, form)
        y, state = mixer(x, documents)
        y = y * live[..., None]
        found.append([y, *state, *torch.autograd.grad((y * direction).sum(), inputs)])
    for got, want in zip(*found):
        assert relative_error(got, want) < 1e-5


def test_it_starts_as_published():
    torch.manual_seed(0)
    mixer = Mamba2(8, 2048, 8, Mamba2Config(head_dim=4))
    A, dt = mixer.A_log.exp(), nn.functional.softplus(mixer.dt_bias)
    assert 1 <= A.min() < 1.5 and 15.5 < A.max() <= 16 and abs(A.mean() - 8.5) < 0.5
    assert 0.00099 < dt.min() < 0.0012 and 0.08 < dt.max() < 0.1001 and abs(dt.log().mean() - math.log(0.01)) < 0.2
    assert (mixer.D == 1).all() and (mixer.norm_weight == 1).all() and mixer.conv_weight.abs().max() <= 0.5
    marked = {name for name, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "D", "dt_bias"}
