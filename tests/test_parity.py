"""Logits and generation against models that nobody here wrote: transformers' Mamba and Mamba-2, with their weights copied."""
import pytest
import torch
from transformers import Mamba2Config as TheirMamba2Config
from transformers import Mamba2ForCausalLM, MambaForCausalLM
from transformers import MambaConfig as TheirMambaConfig

from serpent_scale.config import Mamba2Config, MambaConfig, ModelConfig
from serpent_scale.evaluation.generation import generate
from serpent_scale.model.language_model import LanguageModel

VOCABULARY, WIDTH, LAYERS = 97, 48, 3
SIZES = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, tie_word_embeddings=True, eos_token_id=None)
NAMES = {
    "embeddings.": "embedding.", "layers.": "blocks.", "norm_f.": "readout.norm.", "conv1d.weight": "conv_weight",
    "conv1d.bias": "conv_bias", "dt_proj.bias": "dt_bias", "mixer.norm.weight": "mixer.norm_weight",
}


def pair(kind):
    """(their model, our configuration of the same)."""
    if kind == "mamba":
        theirs = MambaForCausalLM(TheirMambaConfig(state_size=8, **SIZES))
        return theirs, ModelConfig(pattern=[kind], mamba=MambaConfig(d_state=8))
    groups = int(kind[-1])
    theirs = TheirMamba2Config(num_heads=12, head_dim=8, state_size=16, n_groups=groups, chunk_size=32, **SIZES)
    ours = ModelConfig(pattern=["mamba2"], mamba2=Mamba2Config(d_state=16, head_dim=8, n_groups=groups))
    return Mamba2ForCausalLM(theirs), ours


@pytest.fixture(params=["mamba", "mamba2, groups: 1", "mamba2, groups: 3"])
def theirs_and_ours(request):
    torch.manual_seed(0)
    theirs, config = pair(request.param)
    config.vocab_size, config.d_model, config.n_layers = VOCABULARY, WIDTH, LAYERS
    with torch.no_grad():
        for parameter in theirs.parameters():  # none left at the zeros and ones it starts with
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours, state = LanguageModel(config), {}
    for name, value in theirs.backbone.state_dict().items():
        for part, our_part in NAMES.items():
            name = name.replace(part, our_part)
        state[name] = value[:, 0].flip(1) if name.endswith("conv_weight") else value  # our tap 0 is the newest token
    padding = ours.embedding.weight.shape[0] - VOCABULARY
    state["embedding.weight"] = torch.nn.functional.pad(state["embedding.weight"], (0, 0, 0, padding))
    state["readout.weight"] = state["embedding.weight"]
    ours.load_state_dict(state)
    return theirs.eval(), ours


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
