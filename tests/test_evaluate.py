"""launch/evaluate.py reads data from a place as it reads it from a folder."""
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data_pipeline import places
from data_pipeline.shards import prepare_split
from data_pipeline.tokenizer import train_tokenizer
from serpent_scale.checkpoint import store
from serpent_scale.config import parse_config
from serpent_scale.evaluation.perplexity import stretches
from serpent_scale.model.language_model import LanguageModel

SCRIPT = Path(__file__).parents[1] / "launch" / "evaluate.py"
TEXTS = [f"Document {i}: " + "the grass snake sheds its skin. " * (i * 7 % 10) for i in range(30)]


def evaluate(monkeypatch, *arguments):
    spec = importlib.util.spec_from_file_location("evaluate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments), "--device", "cpu", "--json"])
    module.main()


def test_a_place_gives_what_a_folder_gives(tmp_path, monkeypatch, capsys):
    fsspec = pytest.importorskip("fsspec")
    data = tmp_path / "data"
    data.mkdir()
    tokenizer = train_tokenizer(TEXTS, 280, data / "tokenizer.json")
    prepare_split(data / "validation", TEXTS, tokenizer, request={}, word_rule="whitespace", shard_tokens=500)
    fields = {
        "data": {"seq_len": 32}, "model": {"vocab_size": 280, "d_model": 32, "n_layers": 1, "pattern": ["mamba"]},
        "training": {"max_steps": 1}, "schedule": {"warmup_steps": 0},
    }  # fmt: skip
    torch.manual_seed(0)
    model = LanguageModel(parse_config(fields).model)
    texts = {"config.yaml": yaml.safe_dump(fields), "tokenizer.json": (data / "tokenizer.json").read_text()}
    store.save_parameters(tmp_path / "model", model.state_dict(), texts)
    monkeypatch.setattr(places, "SCHEMES", ("memory",))
    fsspec.filesystem("memory").put(str(data), "/evaluated", recursive=True)

    reports = []
    for where in ([data], ["memory://evaluated", "--cache", tmp_path / "cache"]):
        evaluate(monkeypatch, "--checkpoint", tmp_path / "model", "--data", *where)
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[1].pop("data") == "memory://evaluated" and reports[0].pop("data") == str(data)
    assert {**reports[0], "seconds": 0} == {**reports[1], "seconds": 0} and reports[0]["loss"] > 1
    with pytest.raises(SystemExit) as end:
        evaluate(monkeypatch, "--checkpoint", tmp_path / "model", "--data", "memory://evaluated")
    assert end.value.code == 2 and "set data.cache" in capsys.readouterr().err


@pytest.mark.parametrize("starts", [[0], [0, 10], [0, 90], [0, 3, 5, 40, 41, 77]])
def test_documents_are_dealt_whole_to_rows(starts):
    for rows in (1, 2, 3, 8):
        begins, ends = stretches(np.array(starts), 100, rows)
        assert len(begins) <= rows and set(begins) <= set(starts) and begins[0] == 0 and ends[-1] == 100
        assert (begins[1:] == ends[:-1]).all() and (begins < ends).all()
