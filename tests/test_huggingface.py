"""Our models in transformers: loaded by AutoModelForCausalLM, saved again, and generating what we generate."""
import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from serpent_scale import huggingface
from serpent_scale.checkpoint import layouts
from serpent_scale.config import MambaConfig, ModelConfig, SerpentConfig
from serpent_scale.evaluation.generation import generate
from serpent_scale.model.language_model import LanguageModel


@pytest.fixture(scope="module", params=["tied", "untied"])
def exported(request, tmp_path_factory):
    """(our model, the folder written from it)."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(
        vocab_size=97, d_model=32, n_layers=2, serpent=SerpentConfig(band=2.0), mamba=MambaConfig(d_state=8),
        tie_embeddings=request.param == "tied",
    ))
    for parameter in model.parameters():  # none left at the zeros and ones it starts with
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert layouts.write(None, folder, model.config, model.state_dict(), end_of_text=None) == "serpent_scale"
    return model, folder


def test_a_serpent_model_is_loaded_by_transformers(exported, tmp_path):
    model, folder = exported
    theirs, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(theirs) is huggingface.SerpentForCausalLM and not any(told.values())
    tokens = torch.randint(0, 97, (2, 71))
    want, _ = model(tokens)
    output = theirs(tokens, labels=tokens)
    assert torch.equal(output.logits, want)
    mean = torch.nn.functional.cross_entropy(want[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(output.loss, mean)
    theirs.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, want)
    _, state = layouts.read(tmp_path)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    rough = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(tokens).logits
    errors = (rough - want).norm(dim=-1) / want.norm(dim=-1)  # a clock of rounded weights may emit elsewhere now and then
    assert errors.median() < 0.05


def test_a_folder_written_before_there_was_a_choice_of_join_is_read_as_it_was(exported, tmp_path):
    config = dataclasses.replace(exported[0].config, serpent=SerpentConfig(join="project"))
    model = LanguageModel(config)
    layouts.write(None, tmp_path, config, model.state_dict(), end_of_text=None)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["model"]["serpent"]["join"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    theirs, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    tokens = torch.randint(0, 97, (1, 40))
    assert not any(told.values()) and torch.equal(theirs(tokens).logits, model(tokens)[0])
    assert layouts.read(tmp_path)[0].model == config


def test_transformers_generates_what_we_do(exported):
    model, folder = exported
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.randint(1, 97, (2, 30))
    want = torch.stack(list(generate(model, prompt, 20, temperature=0)), 1)
    options = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
    for use_cache in (True, False):
        assert torch.equal(theirs.generate(prompt, use_cache=use_cache, **options)[:, 30:], want)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.int64), prompt], 1)
    padded[1] = torch.cat([padded[1, 10:], padded[1, :5], padded[1, 5:10]])[-35:]  # a longer prompt beside it
    mask = torch.ones_like(padded)
    mask[0, :5] = 0
    assert torch.equal(theirs.generate(padded, attention_mask=mask, **options)[0, 35:], want[0])
    beams = theirs.generate(prompt, num_beams=3, use_cache=True, **options)
    assert torch.equal(beams, theirs.generate(prompt, num_beams=3, use_cache=False, **options))
    with pytest.raises(ValueError, match="pad on the left"):
        theirs(padded, attention_mask=mask.flip(1))
