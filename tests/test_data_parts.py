"""Preparation by parts gives the bytes that preparation alone gives."""
import importlib.util
import json
from pathlib import Path

import pytest

from data_pipeline import parts
from data_pipeline.tokenizer import Tokenizer
from serpent_scale.errors import UserError

SCRIPT = Path(__file__).parents[1] / "launch" / "prepare_data.py"


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path):
    texts = [f"text {i % 900}: " + "the quick brown fox " * (i % 7) for i in range(1000)] + ["", "  ", "again", "again"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": "held out"}) + "\n")
    return ["--source", f"train={tmp_path}/train.jsonl", "--source", f"validation={tmp_path}/held.jsonl",
            "--shard-tokens", "3000"]


def content(folder) -> dict:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_parts_give_the_same_bytes(prepare, source, tmp_path, monkeypatch):
    prepare.main([*source, "--tokenizer", "train:300", "--out", str(tmp_path / "alone")])
    tokenizer = ["--tokenizer", str(tmp_path / "alone" / "tokenizer.json")]
    out = ["--out", str(tmp_path / "together")]
    for part in ("2/3", "0/3", "1/3", "1/3"):
        prepare.main([*source, *tokenizer, *out, "--part", part])
    files = list(parts.parts_folder(tmp_path / "together" / "train").iterdir())
    assert len(files) == 3
    assert sorted(path.name for path in (tmp_path / "together").iterdir()) == ["train.parts", "validation.parts"]

    encoded, encode = [], Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: encoded.append(texts) or encode(self, texts))
    prepare.main([*source, *tokenizer, *out])
    assert not encoded, "all of it was there"
    assert content(tmp_path / "together") == content(tmp_path / "alone")

    prepare.main([*source, *tokenizer, "--out", str(tmp_path / "lame"), "--part", "0/3"])  # the others are missing
    prepare.main([*source, *tokenizer, "--out", str(tmp_path / "lame")])
    assert content(tmp_path / "lame") == content(tmp_path / "alone")


def test_damage_and_nonsense_are_refused(prepare, source, tmp_path, capsys):
    for nonsense in ("3/3", "1", "-1/3", "a/b"):
        with pytest.raises(SystemExit):
            prepare.main([*source, "--out", str(tmp_path / "x"), "--part", nonsense])
    with pytest.raises(SystemExit):
        prepare.main([*source, "--out", str(tmp_path / "x"), "--tokenizer", "train:300", "--part", "0/2"])
    assert "cannot train it together" in capsys.readouterr().err
    prepare.main([*source, "--tokenizer", "train:300", "--out", str(tmp_path / "alone")])
    folder = tmp_path / "parts"
    tokenizer = Tokenizer(tmp_path / "alone" / "tokenizer.json")
    parts.write_part(folder, ["some text"] * 5, tokenizer, 0, 1)
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        parts.CachedTokenizer(tokenizer, folder)
