"""The whole model: causality, packing, decoding, accounting, evaluation modes."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from serpent_scale.config import Config, DataConfig, ModelConfig, SerpentConfig, TrainingConfig, load_config
from serpent_scale.errors import UserError
from serpent_scale.evaluation.generation import generate, sample
from serpent_scale.evaluation.perplexity import TokenText, score, unigram_perplexity
from serpent_scale.model.accounting import flops_per_token, memory_per_rank, parameter_counts
from serpent_scale.model.documents import Documents
from serpent_scale.model.language_model import LanguageModel

ROOT = Path(__file__).parents[1]


def small(pattern=("mamba", "serpent"), dtype=torch.float32, **kw):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=97, d_model=32, n_layers=4, pattern=list(pattern), serpent=SerpentConfig(band=2.0), **kw)
    model = LanguageModel(config)
    for name, parameter in model.named_parameters():  # as after some training: clocks and read-outs that do something
        if "clock_weight" in name or "readout_basis" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def rows(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 97, (1, sum(lengths)), generator=generator)
    reset = torch.zeros_like(tokens, dtype=torch.bool)
    reset[0, np.cumsum((0,) + tuple(lengths[:-1]))] = True
    return tokens, Documents(reset, (tuple(lengths),))


@pytest.mark.parametrize("pattern", [("mamba",), ("serpent",), ("mamba", "serpent")])
def test_logits_before_a_changed_token_do_not_move_by_a_bit(pattern):
    model = small(pattern)
    tokens, documents = rows((70, 3, 50))
    logits, _ = model(tokens, documents)
    for t in (1, 69, 70, 71, 100, 122):
        changed = tokens.clone()
        changed[:, t:] = torch.randint(0, 97, changed[:, t:].shape)
        assert torch.equal(model(changed, documents)[0][:, :t], logits[:, :t])


def test_packed_documents_give_what_they_give_alone():
    model = small(dtype=torch.float64)
    tokens, documents = rows((70, 3, 50))
    logits, _ = model(tokens, documents)
    for part, got in zip(tokens.split((70, 3, 50), 1), logits.split((70, 3, 50), 1)):
        torch.testing.assert_close(got, model(part)[0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("gradients", [True, False])
def test_decoding_token_by_token_equals_the_batch_form(gradients):
    model = small(dtype=torch.float64)
    tokens, _ = rows((57,))
    batch, _ = model(tokens)
    states, steps = None, []
    with torch.set_grad_enabled(gradients):
        for t in range(57):
            logits, states = model(tokens[:, t : t + 1], states=states)
            steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), batch, rtol=1e-8, atol=1e-9)
    greedy = torch.stack(list(generate(model, tokens[:, :20], 12, temperature=0)), 1)
    grown = tokens[:, :20]
    for _ in range(12):
        grown = torch.cat([grown, model(grown)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy, grown[:, 20:])


def test_the_state_does_not_grow():
    model = small()
    sizes = []
    for length in (40, 400):
        leaves = torch.utils._pytree.tree_leaves(model(torch.randint(0, 97, (1, length)))[1])
        sizes.append(sum(leaf.numel() for leaf in leaves if leaf is not None))
    assert sizes[0] == sizes[1]


def test_sampling_keeps_to_top_k_and_top_p():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)
    draw = lambda **kw: torch.bincount(sample(logits, 1.0, kw.get("top_k"), kw.get("top_p"), generator), minlength=4) / 4000
    assert torch.allclose(draw(), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03)
    assert torch.allclose(draw(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03)
    assert torch.allclose(draw(top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03)
    assert torch.equal(draw(top_p=0.01), torch.tensor([1.0, 0, 0, 0]))
    assert torch.equal(sample(logits, 0, None, None), torch.zeros(4000, dtype=torch.int64))


def test_generation_stops_when_every_row_ended():
    model = small()
    tokens = list(generate(model, torch.zeros(3, 1, dtype=torch.int64), 500, end_of_text=5))
    ended = torch.stack(tokens, 1) == 5
    assert len(tokens) == 500 or ended[:, -1].all()
    assert (ended.cummax(1).values == ended).all()  # once ended, a row goes on yielding the mark


@pytest.mark.parametrize("prompts, words", [
    ([[1, 2], [3, 97]], ["prompt 1", "token 97", "0 to 96"]), ([[1], []], ["prompt 1 is empty"]), ([[-1]], ["token -1"]),
])
def test_a_prompt_that_the_model_cannot_read_is_refused(prompts, words):
    with pytest.raises(UserError) as refusal:
        next(generate(small(), [torch.tensor(p, dtype=torch.int64) for p in prompts], 1))
    assert all(word in str(refusal.value) for word in words)


def test_activation_checkpointing_changes_nothing():
    tokens, documents = rows((70, 3, 50))
    grads = []
    for recompute in (False, True):
        model = small(dtype=torch.float64)
        model.activation_checkpointing = recompute
        loss, _ = model(tokens, documents, tokens)
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_parameters_marked_for_no_decay_are_the_ones_promised():
    marked = {name.rsplit(".", 1)[-1] for name, p in small().named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "D", "dt_bias", "clock_weight", "clock_bias", "window_basis", "readout_basis"}


@pytest.mark.parametrize("pattern", [("mamba",), ("serpent",), ("mamba", "serpent")])
def test_counts_equal_the_built_model_and_torch(pattern):
    model = small(pattern)
    assert sum(parameter_counts(model.config).values()) == sum(p.numel() for p in model.parameters())
    tokens = torch.zeros(1, 1024, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    expected = flops_per_token(model.config, 1024).matmul * 1024
    # torch counts every slot of the static capacity, the formula the elements emitted at the target rates
    excess = counter.get_total_flops() / expected - 1
    assert excess == 0 if pattern == ("mamba",) else 0 <= excess < 0.02


def test_shipped_sizes_are_what_their_names_say_and_all_patterns_are_equal():
    for name, size, tolerance in (("wt103_125m", 125e6, 0.035), ("wt103_350m", 350e6, 0.03), ("web_1b", 1e9, 0.03)):
        counts = []
        for pattern, depth in (("[mamba,serpent]", 2), ("[mamba,serpent]", 1), ("[mamba]", 1), ("[serpent]", 1)):
            config = load_config(f"{ROOT}/configs/{name}.yaml", [f"model.pattern={pattern}", f"model.serpent.depth={depth}"])
            counts.append(sum(parameter_counts(config.model).values()))
        assert abs(counts[0] / size - 1) < tolerance
        assert max(counts) / min(counts) - 1 < 0.01


def test_memory_estimate_shards_by_stage_and_counts_activations():
    config = Config(model=small().config, data=DataConfig(seq_len=64), training=TrainingConfig(micro_batch=2, zero_stage=3))
    one, four = memory_per_rank(config, 1, "cpu"), memory_per_rank(config, 4, "cpu")
    assert one["parameters"] == 4 * four["parameters"] and one["Adam moments"] == 4 * four["Adam moments"]
    assert one["activations"] == four["activations"] > 64 * 2 * 32 * 4 * 4


@pytest.mark.parametrize("pattern", ["mamba", "serpent"])
def test_memory_estimate_for_a_gpu_needs_none_and_is_less_than_the_cpu_form_keeps(pattern):
    config = Config(model=ModelConfig(d_model=1024, n_layers=8, pattern=[pattern]), data=DataConfig(seq_len=2048))
    on_gpu, on_cpu = (memory_per_rank(config, 1, device)["activations"] for device in ("cuda", "cpu"))
    tokens = 8 * 2048
    # a Mamba layer: xz, y and the norm's output, and a state (D, N) every 32 tokens
    layer = tokens * (2 * (3 * 2048 + 64 + 32) + 4 * 2048 * 16 / 32 + 2 * 1024)
    assert 8 * layer * 0.9 < on_gpu < 8 * layer * 1.5 + 2**30 and on_gpu < on_cpu


def text(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return TokenText.join(generator.integers(0, 97, n) for n in lengths)


def test_evaluation_modes_agree_with_scoring_each_document_alone():
    model, sample_text = small(dtype=torch.float64), text((70, 1, 33, 90, 41))
    want, count = 0.0, 0
    for document in np.split(sample_text.tokens, sample_text.starts[1:]):
        tokens = torch.from_numpy(document)[None]
        if tokens.shape[1] > 1:
            want += model(tokens[:, :-1], labels=tokens[:, 1:])[0].item()
            count += tokens.shape[1] - 1
    for rows_ in (1, 2, 8):
        got = score(model, sample_text, "carry", 16, rows=rows_)
        assert got.tokens == count and math.isclose(got.nll, want, rel_tol=1e-9)
    got = score(model, sample_text, "windows", 1000)  # one window holds everything
    assert got.tokens == count and math.isclose(got.nll, want, rel_tol=1e-9)
    got = score(model, sample_text, "sliding", 200, stride=7)  # always at least a whole document of context
    assert got.tokens == count and math.isclose(got.nll, want, rel_tol=1e-9)


def test_short_windows_score_every_token_once_with_less_context():
    model, sample_text = small(), text((70, 33))
    assert {score(model, sample_text, mode, 8, stride=4).tokens for mode in ("windows", "sliding", "carry")} == {101}


def test_unigram_perplexity_of_known_frequencies():
    counts = np.array([50_000, 50_000])
    assert math.isclose(unigram_perplexity(counts, np.array([3, 5])), 2.0, rel_tol=1e-9)


def test_bf16_autocast_stays_near_float32():
    model = small()
    tokens, documents = rows((70, 3, 50))
    exact, _ = model(tokens, documents)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = model(tokens, documents)
    assert (rough.float() - exact).norm() / exact.norm() < 0.05
