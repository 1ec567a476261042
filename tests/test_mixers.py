"""The registry, and what must hold of every mixer in it, alone and inside SeRpEnt."""
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import DEVICE, relative_error
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from serpent_scale import config as configuration
from serpent_scale.config import (
    AttentionConfig, Config, DataConfig, Mamba2Config, MambaConfig, ModelConfig, ParallelConfig, S4DConfig, S5Config,
    SerpentConfig, TrainingConfig, load_config,
)
from serpent_scale.evaluation.generation import generate, read_prompts
from serpent_scale.kernels.causal_conv1d.reference import causal_conv1d as reference_conv
from serpent_scale.kernels.rms_norm.reference import rms_norm as reference_norm
from serpent_scale.kernels.ssd.reference import ssd as reference_scan
from serpent_scale.kernels.ssd.reference import ssd_reference
from serpent_scale.model import mamba2, mixers, s4d
from serpent_scale.model.accounting import flops_per_token, memory_per_rank, parameter_counts
from serpent_scale.model.attention import QUERIES, Attention
from serpent_scale.model.documents import Documents
from serpent_scale.model.language_model import LanguageModel
from serpent_scale.model.mamba2 import Mamba2
from serpent_scale.model.mixer import Mixer
from serpent_scale.model.s4d import S4D
from serpent_scale.model.s5 import S5
from serpent_scale.model.states import take_rows

ROOT = Path(__file__).parents[1]
LENGTHS = (70, 3, 50)
CASES = [(pattern, inner) for inner in configuration.MIXERS for pattern in ((inner,), ("serpent",))]
CASES += [(("mamba", "attention", "serpent"), "s5")]
alone_and_inside = pytest.mark.parametrize("pattern, inner", CASES, ids=[f"{'-'.join(p)}({i})" for p, i in CASES])


def small(pattern, inner, dtype=torch.float32):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(
        vocab_size=97, d_model=32, n_layers=max(2, len(pattern)), pattern=list(pattern), serpent=SerpentConfig(band=2.0, inner=inner),
        mamba=MambaConfig(d_state=8), mamba2=Mamba2Config(d_state=8, head_dim=4, n_groups=2), s4d=S4DConfig(d_state=8),
        s5=S5Config(d_state=16, n_blocks=2), attention=AttentionConfig(head_dim=4),
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
                assert "attention" in (inner, *pattern) or sizes(states) == sizes(after)  # the state does not grow
        torch.testing.assert_close(torch.cat(pieces, 1), want, rtol=1e-8, atol=1e-9)


@alone_and_inside
def test_a_batch_of_unequal_prompts_goes_on_as_each_prompt_alone(pattern, inner):
    model = small(pattern, inner, torch.float64)
    prompts = [torch.randint(0, 97, (n,)) for n in (9, 23, 1, 9, 40)]
    together = torch.stack(list(generate(model, prompts, 30, temperature=0)), 1)
    for prompt, got in zip(prompts, together):
        assert torch.equal(got, torch.stack(list(generate(model, prompt[None], 30, temperature=0)), 1)[0])
    logits, states = read_prompts(model, prompts)
    with torch.no_grad():
        for row, prompt in enumerate(prompts):
            want, state = model(prompt[None], last_only=True)
            torch.testing.assert_close(logits[row], want[0], rtol=1e-9, atol=1e-10)
            after, want = (model(torch.tensor([[5]]), states=s)[0] for s in (take_rows(states, slice(row, row + 1)), state))
            torch.testing.assert_close(after, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("inner", configuration.MIXERS)
def test_a_compressed_branch_steps_only_the_rows_that_emit(inner):
    branch = small(("serpent",), inner, torch.float64).blocks[0].mixer.branches[2]
    stepped, documents = [], Documents.whole(3, 1)
    branch.inner.register_forward_pre_hook(lambda _, inputs: stepped.append(len(inputs[0])))
    with torch.no_grad():
        _, state = branch(torch.randn(3, 10, 32, dtype=torch.float64), Documents.whole(3, 10))
        stepped.clear()
        for _ in range(40):
            _, state = branch(torch.randn(3, 1, 32, dtype=torch.float64), documents, state)
    assert 0 < sum(stepped) < 0.5 * 40 * 3 and min(stepped) < 3 and len(stepped) < 40


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
    leaves = (torch.utils._pytree.tree_leaves(states) for states in (after, want, before))
    for got, first, second in zip(*leaves):
        torch.testing.assert_close(got[0], first[0], rtol=1e-10, atol=1e-12)
        kept = got[1][: len(second[1])] if second.ndim > 1 else got[1]  # the places of a cache are as many as the longest row's
        torch.testing.assert_close(kept, second[1], rtol=0, atol=0)


@alone_and_inside
def test_parameters_may_lie_anywhere_in_one_buffer(pattern, inner):
    """As ZeRO lays them."""
    model = small(pattern, inner)
    tokens, documents = row()
    want, _ = model(tokens, documents)
    flat, at = torch.empty(1 + sum(p.numel() + 1 for p in model.parameters())), 1
    for parameter in model.parameters():
        parameter.data = flat[at : at + parameter.numel()].view_as(parameter).copy_(parameter.data)
        at += parameter.numel() + 1 - parameter.numel() % 2  # always odd
    torch.testing.assert_close(model(tokens, documents)[0], want)


@alone_and_inside
def test_counts_equal_the_built_model_and_torch(pattern, inner):
    model = small(pattern, inner)
    assert sum(parameter_counts(model.config).values()) == sum(p.numel() for p in model.parameters())
    lengths = []  # of what each attention layer sees
    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(lambda layer, inputs: lengths.append((inputs[0].shape[1], layer.n_heads * 4)))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 1024, dtype=torch.int64))
    counted = counter.get_total_flops() - sum(2 * n * (n - 1) * width for n, width in lengths)  # behind the causal mask
    expected = flops_per_token(model.config, 1024).matmul * 1024
    if pattern == (inner,):
        assert counted == expected
    else:  # torch counts every slot of the static capacity, filled up to whole chunks, the formula what is emitted on average
        assert 0 <= counted / expected - 1 < 0.1
    run = Config(model=model.config, data=DataConfig(seq_len=128), training=TrainingConfig(micro_batch=2))
    on_gpu, on_cpu = (memory_per_rank(run, 1, device)["activations"] for device in ("cuda", "cpu"))
    assert 0 < on_gpu < on_cpu


@pytest.mark.parametrize("inner", configuration.MIXERS[1:])
@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_sizes_are_equal_with_and_without_serpent(file, inner):
    forms = ([f"model.pattern=[{inner}]"], ["model.pattern=[serpent]", "model.serpent.depth=1"], [f"model.pattern=[{inner},serpent]"])
    runs = [load_config(file, [*form, f"model.serpent.inner={inner}"]) for form in forms]
    counts = [sum(parameter_counts(run.model).values()) for run in runs]
    assert max(counts) / min(counts) - 1 < (0.02 if inner == "attention" else 0.01)  # whole groups of wide heads


@pytest.mark.parametrize("d_model", [512, 768, 1024, 2048])
def test_a_serpent_layer_around_mamba2_has_the_parameters_of_a_mamba2_layer_to_half_a_head(d_model):
    config = ModelConfig(d_model=d_model, serpent=SerpentConfig(inner="mamba2"))
    ours, plain = (mixers.parameter_count(name, config) for name in ("serpent", "mamba2"))
    assert abs(ours - plain) <= 64 * 3 * d_model / 2 and abs(ours / plain - 1) < 0.025


@pytest.mark.parametrize("inner", configuration.MIXERS[1:])
def test_bf16_autocast_stays_near_float32(inner):
    model = small((inner, "serpent"), inner)
    for name, parameter in model.named_parameters():
        if "clock_weight" in name:
            parameter.data.zero_()  # inputs rounded differently would make others emit
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


# Each mixer itself


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


def plain_s4d(mixer, x, reset):
    """Channel by channel and state by state, in complex numbers; x (L, d_in)."""
    u, z = (x @ mixer.in_proj.weight.T).chunk(2, -1)
    A, dt = -mixer.A_log.exp() + 1j * mixer.A_imag, mixer.dt_log.exp()[:, None]
    decay, C, h, ys = torch.exp(dt * A), torch.view_as_complex(mixer.C), 0, []
    for t in range(len(x)):
        h = (0 if reset[t] else decay * h) + (decay - 1) / A * u[t, :, None]
        ys.append((C * h + (C * h).conj()).sum(-1).real + mixer.D * u[t])
    return (torch.stack(ys) * z * torch.sigmoid(z)) @ mixer.out_proj.weight.T


def plain_s5(mixer, x, reset):
    u, z = (x @ mixer.in_proj.weight.T).chunk(2, -1)
    A, dt = -mixer.A_log.exp() + 1j * mixer.A_imag, mixer.dt_log.exp()
    B, C, h, ys = torch.complex(*mixer.B.weight.chunk(2)), torch.complex(*mixer.C.weight.chunk(2, 1)), 0, []
    for t in range(len(x)):
        h = (0 if reset[t] else torch.exp(dt * A) * h) + (torch.exp(dt * A) - 1) / A * (B @ (u[t] + 0j))
        ys.append((C @ h + (C @ h).conj()).real + mixer.D * u[t])
    return (torch.stack(ys) * z * torch.sigmoid(z)) @ mixer.out_proj.weight.T


def plain_attention(mixer, x, reset):
    """A softmax for every head and token; keys and queries turn as complex numbers."""
    P, shared = mixer.head_dim, mixer.n_heads // mixer.n_groups
    q, k, v = (x @ mixer.in_proj.weight.T).unflatten(-1, (-1, P)).split([mixer.n_heads, mixer.n_groups, mixer.n_groups], 1)
    speed = torch.tensor([mixer.rope_theta ** (-2 * i / P) for i in range(P // 2)], dtype=torch.float64)
    start, starts, rows = 0, [], []
    for t in range(len(x)):
        start = t if reset[t] else start
        starts.append(start)
    turn = torch.exp(1j * (torch.arange(len(x)) - torch.tensor(starts))[:, None, None] * speed)
    q, k = (torch.complex(*w.chunk(2, -1)) * turn for w in (q, k))
    for t in range(len(x)):
        heads, keys = [], slice(starts[t], t + 1)
        for h in range(mixer.n_heads):
            scores = (k[keys, h // shared] @ q[t, h].conj()).real / P**0.5
            weights = torch.exp(scores - scores.max())
            heads.append(weights / weights.sum() @ v[keys, h // shared])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ mixer.out_proj.weight.T


WRITTEN_OUT = {
    "mamba2": (Mamba2, plain_mamba2, Mamba2Config(d_state=4, head_dim=4, n_groups=3)),
    "s4d": (S4D, plain_s4d, S4DConfig(d_state=6)),
    "s4d, inv": (S4D, plain_s4d, S4DConfig(d_state=4, init="inv", convolution="fft")),
    "s5": (S5, plain_s5, S5Config(d_state=8, n_blocks=2)),
    "attention": (Attention, plain_attention, AttentionConfig(head_dim=4, queries_per_key=3)),
}


@pytest.mark.parametrize("lengths", [(40, 3, 30), (73,), (64, 64)])
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_outputs_and_gradients_equal_the_layer_written_out(name, lengths):
    torch.manual_seed(0)
    mixer, plain, settings = WRITTEN_OUT[name]
    mixer = mixer(6, 24, 5, settings).double()
    for parameter in mixer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    _, documents = row(lengths)
    x = torch.randn(1, sum(lengths), 6, dtype=torch.float64, requires_grad=True)
    inputs, found = [x, *mixer.parameters()], []
    for y in (mixer(x, documents)[0][0], plain(mixer, x[0], documents.reset[0])):
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


@pytest.mark.parametrize("init", ["lin", "inv"])
def test_s4d_starts_as_published(init):
    torch.manual_seed(0)
    mixer = S4D(8, 512, 8, S4DConfig(init=init))
    want = [math.pi * n if init == "lin" else 64 / math.pi * (64 / (2 * n + 1) - 1) for n in range(32)]
    torch.testing.assert_close(mixer.A_imag, torch.tensor(want).expand(512, -1))
    assert 0.001 <= mixer.dt_log.exp().min() < 0.0012 and 0.08 < mixer.dt_log.exp().max() <= 0.1
    assert (mixer.A_log.exp() - 0.5).abs().max() < 1e-6 and abs(mixer.C.square().sum(-1).mean() - 1) < 0.05
    marked = {name for name, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "A_imag", "dt_log", "D"}


def test_s5_starts_as_published():
    torch.manual_seed(0)
    mixer = S5(8, 512, 8, S5Config(d_state=64, n_blocks=2))
    n = np.arange(32)
    legs = -np.tril(np.sqrt(np.outer(2 * n + 1, 2 * n + 1)), -1) - np.diag(n + 1.0)
    normal = np.linalg.eigvals(legs + np.outer(np.sqrt(n + 0.5), np.sqrt(n + 0.5)))  # HiPPO-LegS made normal by a rank of one
    assert np.allclose(normal.real, -0.5) and np.allclose(np.sort(normal.imag)[16:], mixer.A_imag[:16].detach(), rtol=1e-5)
    assert torch.equal(mixer.A_imag[:16], mixer.A_imag[16:]) and (mixer.A_log.exp() - 0.5).abs().max() < 1e-6
    assert abs(mixer.B.weight.square().mean() * 2 * 512 - 1) < 0.1 and abs(mixer.C.weight.square().mean() * 2 * 64 - 1) < 0.1
    marked = {name for name, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "A_imag", "dt_log", "D"}


def test_s4d_by_fft_equals_its_form_in_chunks():
    """Whole rows, continued ones, rows with slots not in use; gradients too."""
    torch.manual_seed(0)
    u, state = torch.randn(2, 200, 6, dtype=torch.float64), torch.randn(2, 6, 3, dtype=torch.complex128)
    log_decay = -torch.rand(6, 3, dtype=torch.float64) - 1j * torch.randn(6, 3)
    live = torch.arange(200) < torch.tensor([[150], [200]])
    reset = torch.zeros(2, 200, dtype=torch.bool)
    reset[1, 0] = True
    inputs = [v.requires_grad_() for v in (u, log_decay, torch.randn(6, 3, dtype=torch.complex128), state)]
    for before in (None, state):
        documents, found = Documents(reset, ((200,), (200,)), live=live), []
        for fft in (False, True):
            y, after = s4d.convolve(*inputs[:3], documents, before, fft)
            y = y * live[..., None]
            found.append([y, after, *torch.autograd.grad(y.sin().sum() + after.abs().sin().sum(), inputs, allow_unused=True)])
        for got, want in zip(*found):
            assert (got is None) == (want is None)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10) if got is not None else None


def test_attention_asks_in_parts_what_it_asks_at_once():
    torch.manual_seed(0)
    mixer = Attention(6, 8, 5, AttentionConfig(head_dim=4, queries_per_key=1)).double()
    lengths = (QUERIES - 3, 10, 100)
    x, (_, documents) = torch.randn(1, sum(lengths), 6, dtype=torch.float64, requires_grad=True), row(lengths)
    want = torch.cat([mixer(part, Documents.whole(1, n))[0] for part, n in zip(x.split(lengths, 1), lengths)], 1)
    got, leaves = mixer(x, documents)[0], [x, *mixer.parameters()]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    grad = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(y, leaves, grad) for y in (got, want))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_plan_knows_that_shards_keep_nothing_of_earlier_ones():
    plan = lambda name, parts: memory_per_rank(Config(
        model=ModelConfig(vocab_size=64, d_model=32, n_layers=3, pattern=[name], attention=AttentionConfig(head_dim=8)),
        data=DataConfig(seq_len=64 * parts), parallel=ParallelConfig(parts), training=TrainingConfig(micro_batch=2),
    ), parts, "cuda")["activations"]  # fmt: skip
    assert plan("mamba", 4) == plan("mamba", 1) and plan("attention", 4) == plan("attention", 1)


def test_a_cache_holds_the_current_document_alone():
    mixer = Attention(6, 8, 5, AttentionConfig(head_dim=4, queries_per_key=1))
    with torch.no_grad():
        _, state = mixer(torch.randn(1, 43, 6), row((20, 3, 20))[1])
        assert state.keys.shape[1] == int(state.count) == 20
        _, state = mixer(torch.randn(1, 7, 6), Documents(torch.arange(7)[None] == 4, ((4, 3),)), state)
        assert state.keys.shape[1] == int(state.count) == 3
