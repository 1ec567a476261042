"""Preparation by parts gives the bytes that preparation alone gives, and says which part is missing or wrong."""
import importlib.util
import json
import os
from pathlib import Path

import pytest

from data_pipeline import parts, records
from data_pipeline.sources import parse_source
from data_pipeline.tokenizer import Tokenizer
from serpent_scale.errors import UserError

SCRIPT = Path(__file__).parents[1] / "launch" / "prepare_data.py"


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def made(prepare, tmp_path_factory):
    """(arguments of preparation, its folder): duplicates in the same and in other blocks and files, overlaps, blanks."""
    folder = tmp_path_factory.mktemp("made")
    held = "a passage of the evaluation set " + " ".join(f"w{i}" for i in range(30))
    texts = [f"text {i % 700}: " + "the quick brown fox " * (i % 7) for i in range(1000)] + ["", "", "  ", "again", "again"]
    texts[300] = texts[700] = texts[950] = f"before {held} after"
    for name, rows in {"one": texts, "a": texts[:300], "b": texts[300:310], "c": [""], "d": texts[310:]}.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in rows)
        (folder / f"{'many-' * (len(name) < 3)}{name}.jsonl").write_text(lines)
    (folder / "held.jsonl").write_text(json.dumps({"text": held}) + "\n")
    options = ["--source", f"validation={folder}/held.jsonl", "--shard-tokens", 3000, "--deduplicate", "--decontaminate",
               f"{folder}/held.jsonl"]  # fmt: skip
    alone = {}
    for files in ("one", "many-*"):
        out, tokenizer = folder / files.strip("-*"), folder / "one" / "tokenizer.json"
        arguments = ["--source", f"train={folder}/{files}.jsonl", *options, "--tokenizer"]
        prepare(*arguments, "train:300" if files == "one" else tokenizer, "--out", out)
        alone[files] = [*arguments, tokenizer], out
    return alone


def content(folder) -> dict:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(prepare, capsys, *arguments) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        prepare(*arguments)
    text = capsys.readouterr().err
    assert stopped.value.code == 2 and text.count("\n") == 1
    return text


@pytest.mark.parametrize("files, n", [("one", 1), ("one", 5), ("many-*", 2), ("many-*", 4), ("many-*", 5)])
def test_the_merge_is_the_single_run(prepare, made, tmp_path, monkeypatch, files, n):
    arguments, alone = made[files]
    monkeypatch.setattr(parts, "FRAME", 2000)
    for part in [*range(n)][::-1] + [0]:
        prepare(*arguments, "--out", tmp_path, "--part", f"{part}/{n}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.parts", "validation.parts"]
    progress = json.loads((alone / "train/preparation.json").read_bytes())["progress"]
    assert progress["overlapping"] == 1 and progress["duplicates"] > 250

    monkeypatch.setattr(Tokenizer, "encode_batch", None)  # the merge tokenises nothing
    replace, calls = os.replace, iter(range(1000))

    def crashing(source, target):
        if next(calls) == 9:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crashing)
        with pytest.raises(SystemExit):
            prepare(*arguments, "--out", tmp_path, "--merge")
    assert (tmp_path / "train/shard-000001.tar").is_file() and not (tmp_path / "train/index.json").exists()
    for again in (["--merge"], ["--merge"], ["--part", f"0/{n}"]):
        prepare(*arguments, "--out", tmp_path, *again)
        assert content(tmp_path) == content(alone)


def test_a_part_goes_on_where_it_was_killed(made, tmp_path, monkeypatch):
    (*_, tokenizer), alone = made["one"]
    tokenizer = Tokenizer(tokenizer)
    sources = parse_source(f"{alone.parent}/one.jsonl")
    monkeypatch.setattr(parts, "FRAME", 2000)
    monkeypatch.setattr(records, "BATCH_TEXTS", 40)
    arguments = dict(request={"sources": 1}, word_rule="whitespace")
    whole = parts.write_part(tmp_path / "whole", sources, tokenizer, 1, 2, **arguments).read_bytes()
    encode, tokenised = Tokenizer.encode_batch, []

    def failing(self, texts):
        tokenised.extend(texts)
        if len(tokenised) > 300:
            raise KeyboardInterrupt
        return encode(self, texts)

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_batch", failing)
        with pytest.raises(KeyboardInterrupt):
            parts.write_part(tmp_path / "cut", sources, tokenizer, 1, 2, **arguments)
    (staging,) = (tmp_path / "cut").iterdir()
    left = staging.read_bytes()
    assert staging.name == "00001-of-00002.part.partial" and 10_000 < len(left) < len(whole)
    tokenised.clear()
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: tokenised.extend(texts) or encode(self, texts))
    # What a kill leaves, what a full disk or power cut does, and, at last, a kill just before the rename.
    for remains in (left, left[:-1], left[:5000], left[:39], b"", left[:5000] + bytes(len(whole)), whole):
        staging.write_bytes(remains)
        assert parts.write_part(tmp_path / "cut", sources, tokenizer, 1, 2, **arguments).read_bytes() == whole
        if remains == left:
            assert 100 < len(tokenised) < 250, "what was done is not done again"
        (tmp_path / "cut/00001-of-00002.part").unlink()
    staging.write_bytes(left)
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "other"}) + "\n")
    with pytest.raises(UserError, match="source changed"):
        parts.write_part(tmp_path / "cut", parse_source(f"{tmp_path}/other.jsonl") + sources, tokenizer, 1, 2, **arguments)


def frames_of(raw: bytes) -> list[bytes]:
    frames, at = [], 0
    while at < len(raw):
        end = at + parts.HEAD + int.from_bytes(raw[at : at + 8], "little")
        frames.append(raw[at:end])
        at = end
    return frames


def test_what_is_missing_or_wrong_is_named(prepare, made, tmp_path, capsys, monkeypatch):
    arguments, alone = made["one"]
    monkeypatch.setattr(parts, "FRAME", 2000)
    out = ["--out", tmp_path]
    assert "holds no finished part" in refusal(prepare, capsys, *arguments, *out, "--merge")
    for part in (0, 2):
        prepare(*arguments, *out, "--part", f"{part}/4")
    assert "of 4 parts these are missing or not finished: 1, 3;" in refusal(prepare, capsys, *arguments, *out, "--merge")
    for part in (1, 3):
        prepare(*arguments, *out, "--part", f"{part}/4")
    assert "00000-of-00004.part: was made with held_out_sha256" in refusal(
        prepare, capsys, *arguments, *out, "--merge", "--shared-runs", 3)  # fmt: skip
    assert "made with held_out_sha256" in refusal(prepare, capsys, *arguments, *out, "--part", "0/4", "--shared-runs", 3)
    file = tmp_path / "train.parts" / "00002-of-00004.part"
    whole = file.read_bytes()
    head, first, second, *others = frames_of(whole)
    moved, less = (b"".join([head, *frames, *others]) for frames in ([second, first], [second]))
    for damaged in (whole[:-1], whole[:-40], whole[:3000], whole + b"x", whole[:5000] + b"?" + whole[5001:], b"", moved, less):
        file.write_bytes(damaged)
        assert f"{file}: damaged from byte" in refusal(prepare, capsys, *arguments, *out, "--merge")
        assert not (tmp_path / "train" / "index.json").exists()
    file.write_bytes(whole)
    prepare(*arguments, *out, "--part", "1/2")
    assert "holds parts of 2 and of 4" in refusal(prepare, capsys, *arguments, *out, "--merge")
    for split in ("train", "validation"):
        (tmp_path / f"{split}.parts" / "00001-of-00002.part").unlink()
    prepare(*arguments, *out, "--merge")
    assert content(tmp_path / "train") == content(alone / "train")

    for nonsense in (["--part", "3/3"], ["--part", "1"], ["--part", "-1/3"], ["--part", "0/1", "--merge"]):
        with pytest.raises(SystemExit):
            prepare(*arguments, *out, *nonsense)
    message = refusal(prepare, capsys, *arguments[:-1], "train:300", "--out", tmp_path / "x", "--part", "0/2")
    assert "cannot train it together" in message
