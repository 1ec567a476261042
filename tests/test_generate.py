"""launch/generate.py: text appears as it is drawn, and a prompt that the model cannot read is one line."""
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from serpent_scale.config import Config, ModelConfig
from serpent_scale.evaluation.loading import Loaded
from serpent_scale.model.language_model import LanguageModel

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture
def command(monkeypatch):
    """(launch/generate.py, the model that it loads). The model has a token for each byte and the end of text."""
    spec = importlib.util.spec_from_file_location("generate_command", Path(__file__).parents[1] / "launch" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<|endoftext|>", *ALPHABET])}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"]), tokenizer.add_tokens([AddedToken("<new>")])
    config = Config(model=ModelConfig(vocab_size=257, d_model=16, n_layers=1, pattern=["s5"]))
    model = LanguageModel(config.model)
    monkeypatch.setattr(module, "load_checkpoint", lambda path, device: Loaded(model, config, tokenizer, Path(path)))
    return module, model


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint", "run", "--device", "cpu", *arguments])
    module.main()


def test_text_appears_as_it_is_drawn_in_whole_characters(command, monkeypatch):
    module, model = command
    draws, shown = list("n\u00ef!".encode()), []  # the second character is two bytes, so two tokens
    byte_of = {ord(c): i for i, c in enumerate(ALPHABET, start=1)}  # printable bytes stand for themselves

    def forward(tokens, states=None, last_only=False):
        logits = torch.full((1, 1, 257), -1e9)
        logits[..., byte_of[draws[forward.calls]]] = 0
        forward.calls += 1
        return logits, None

    forward.calls = 0
    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr("builtins.print", lambda *text, **how: shown.append((forward.calls, *text, how.get("flush"))))
    run(module, monkeypatch, "--prompt", "So", "--max-new-tokens", "4", "--temperature", "0")
    assert shown == [(0, "So", True), (1, "n", True), (3, "\u00ef", True), (4, "!", True), (4, None)]


def test_a_token_that_the_model_does_not_have_is_one_line(command, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(command[0], monkeypatch, "--prompt", "a <new> one")
    out, error = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and error.count("\n") == 1
    assert "--prompt" in error and "'<new>' is token 257" in error and "model.vocab_size=257" in error
