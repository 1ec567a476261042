"""Logits and generation against models that nobody here wrote: transformers' Mamba and Mamba-2, converted by layouts.py."""
import pytest
import torch
from transformers import AutoModelForCausalLM, Mamba2ForCausalLM, MambaForCausalLM
from transformers import Mamba2Config as TheirMamba2Config
from transformers import MambaConfig as TheirMambaConfig

from serpent_scale.checkpoint import layouts
from serpent_scale.evaluation.generation import generate
from serpent_scale.model.accounting import parameter_counts
from serpent_scale.model.language_model import LanguageModel

VOCABULARY = 97
SIZES = dict(vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=3, eos_token_id=None)
KINDS = {
    "mamba": lambda: MambaForCausalLM(TheirMambaConfig(state_size=8, **SIZES)),
    # A rank that is not ours by default, a convolution without bias, its own read-out, other taps and epsilon.
    "odd mamba": lambda: MambaForCausalLM(TheirMambaConfig(
        state_size=5, time_step_rank=7, use_conv_bias=False, tie_word_embeddings=False, conv_kernel=3, expand=3,
        layer_norm_epsilon=1e-3, **SIZES)),
    "mamba2": lambda: Mamba2ForCausalLM(TheirMamba2Config(
        num_heads=12, head_dim=8, state_size=16, n_groups=1, chunk_size=32, tie_word_embeddings=True, **SIZES)),
    "odd mamba2": lambda: Mamba2ForCausalLM(TheirMamba2Config(
        num_heads=12, head_dim=8, state_size=16, n_groups=3, chunk_size=32, use_conv_bias=False, layer_norm_epsilon=1e-3,
        **SIZES)),
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def theirs_and_ours(request, tmp_path_factory):
    """(their model, ours read from its folder)."""
    torch.manual_seed(0)
    theirs = KINDS[request.param]().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # none left at the zeros and ones it starts with
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder, max_shard_size="40KB" if "odd" in request.param else "1GB")
    assert len(list(folder.glob("*.safetensors"))) > 1 or "odd" not in request.param
    config, state = layouts.read(folder)
    ours = LanguageModel(config.model)
    ours.load_state_dict(state)
    assert sum(parameter_counts(config.model).values()) == sum(p.numel() for p in ours.parameters())
    return theirs, ours


@pytest.mark.parametrize("length", [1, 37, 131])
def test_logits_are_theirs(theirs_and_ours, length):
    theirs, ours = theirs_and_ours
    tokens = torch.randint(0, VOCABULARY, (2, length))
    with torch.no_grad():
        want, (got, _) = theirs(tokens, use_cache=False).logits, ours(tokens)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_token_by_token_it_goes_on_as_theirs_does(theirs_and_ours):
    theirs, ours = theirs_and_ours
    prompt, steps = torch.randint(0, VOCABULARY, (2, 21)), 15
    want = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=steps, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )
    chosen = want.sequences[:, 21:]
    assert torch.equal(torch.stack(list(generate(ours, prompt, steps, temperature=0)), 1), chosen)
    with torch.no_grad():
        logits, states = ours(prompt)
        for step in range(steps):
            torch.testing.assert_close(logits[:, -1], want.logits[step], rtol=0, atol=1e-4)
            logits, states = ours(chosen[:, step : step + 1], states=states)


def test_what_we_write_is_loaded_by_theirs(theirs_and_ours, tmp_path):
    _, ours = theirs_and_ours
    assert layouts.write(None, tmp_path, ours.config, ours.state_dict(), end_of_text=3) == "transformers"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.eos_token_id == 3 and type(theirs).__module__.startswith("transformers.")
    tokens = torch.randint(0, VOCABULARY, (2, 43))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens, use_cache=False).logits, ours(tokens)[0], rtol=0, atol=1e-4)
    tied = theirs.lm_head.weight is theirs.backbone.embeddings.weight
    assert tied == ours.config.tie_embeddings
