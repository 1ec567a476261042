"""Leaving out duplicates and what overlaps an evaluation set: the documents a plain search finds, and no others."""
import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import shards
from data_pipeline.index import load_index
from data_pipeline.overlap import N, Runs
from data_pipeline.shards import left_out, prepare_split
from data_pipeline.stream import documents
from data_pipeline.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]


class Numbers:
    """Stands for a tokenizer: a text is its tokens, written as numbers."""

    eot_id, vocab_size, sha256 = 0, 1000, "0"

    def encode_batch(self, texts):
        return [[int(word) for word in text.split()] for text in texts]


def text(ids) -> str:
    return " ".join(map(str, ids))


def runs_of(ids) -> set:
    return {tuple(ids[i : i + N]) for i in range(len(ids) - N + 1)}


def test_overlap_is_what_a_search_of_all_runs_finds():
    """Few kinds of tokens, so that runs of N - 1 are shared all the time."""
    rng = random.Random(1)
    held = [[rng.choice((1, 2)) for _ in range(rng.choice((3, 12, 13, 40)))] for _ in range(60)]
    rows = [[rng.choice((1, 2)) for _ in range(rng.choice((0, 5, 12, 13, 14, 60)))] for _ in range(500)]
    wanted = set().union(*map(runs_of, held))
    expected = [bool(runs_of(row) & wanted) for row in rows]
    assert 0.1 < np.mean(expected) < 0.9
    found = Runs(map(text, held), Numbers())
    assert len(found) == len(wanted) and found.overlapping(rows).tolist() == expected
    assert found.overlapping([]).tolist() == [] and not Runs(["1 2"], Numbers()).overlapping(rows).any()


def test_a_run_across_two_texts_is_none():
    half, other = list(range(1, 8)), list(range(8, 15))
    assert not Runs([text(half + other)], Numbers()).overlapping([half, other]).any()
    assert not Runs([text(half), text(other)], Numbers()).overlapping([half + other]).any()


def test_equal_hashes_alone_are_no_overlap(monkeypatch):
    monkeypatch.setattr("data_pipeline.overlap._hashes", lambda tokens: np.full(max(len(tokens) - N + 1, 0), 7, np.uint64))
    held = list(range(1, N + 1))
    assert Runs([text(held)], Numbers()).overlapping([held, [*held[:-1], 99]]).tolist() == [True, False]


@pytest.fixture
def corpus(tmp_path):
    rng = random.Random(2)
    words = ["snake", "grass", "skin", "sheds", "the", "long", "winter", "sleeps", "green", "stone"]
    sentence = lambda n: " ".join(rng.choice(words) for _ in range(n))  # noqa: E731
    held = [sentence(60) for _ in range(3)]
    texts = [sentence(40) for _ in range(200)]
    for i in range(0, 200, 10):
        texts[i] = texts[(i + 3) % 7 + 1]  # a duplicate, of a later one too
    for i in (15, 99, 151):
        texts[i] += "\n" + held[i % 3] + "\n"
    texts += ["", "", texts[15]]
    (tmp_path / "tokenizer").mkdir()
    return texts, held, train_tokenizer(texts, 300, tmp_path / "tokenizer" / "tokenizer.json")


def kept(texts, held):
    """What should be left, by plain search."""
    unique = [t for t in dict.fromkeys(texts) if t.strip()]
    return [t for t in unique if not any(h in t for h in held)]


def test_preparation_leaves_them_out_and_counts(tmp_path, corpus, monkeypatch):
    texts, held, tokenizer = corpus
    def prepare(out, texts):  # noqa: E306
        (tmp_path / out).mkdir(exist_ok=True)
        (tmp_path / out / "tokenizer.json").write_bytes(tokenizer.path.read_bytes())
        return prepare_split(tmp_path / out / "train", texts, tokenizer, request={}, word_rule="whitespace",
                             shard_tokens=700, deduplicate=True, held_out=Runs(held, tokenizer))

    index, _ = prepare("whole", texts)
    expected = kept(texts, held)
    assert [tokenizer.decode(ids[1:-1]) for ids in documents(tmp_path / "whole", "train")] == expected
    blank = sum(not t.strip() for t in texts)
    gone = left_out(index.folder)
    assert gone["overlapping"] == 3 and gone["duplicates"] == len(texts) - blank - len(expected) - 3

    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 3000)  # other batches, and a kill, change nothing

    def interrupted():
        yield from texts[:120]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare("cut", interrupted())
    assert (tmp_path / "cut/train/shard-000002.tar").is_file()
    prepare("cut", texts)
    for path in (tmp_path / "whole/train").iterdir():
        assert path.read_bytes() == (tmp_path / "cut/train" / path.name).read_bytes(), path.name


def test_from_the_command_line(tmp_path, corpus, capsys):
    texts, held, tokenizer = corpus
    spec = importlib.util.spec_from_file_location("prepare_data", ROOT / "launch/prepare_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, rows in (("train", texts), ("held", held)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
    arguments = ["--source", f"{tmp_path}/train.jsonl", "--source", f"validation={tmp_path}/held.jsonl",
                 "--tokenizer", str(tokenizer.path), "--out", str(tmp_path / "data")]  # fmt: skip
    module.main([*arguments, "--deduplicate", "--decontaminate", f"{tmp_path}/held.jsonl"])
    printed = capsys.readouterr().out
    assert load_index(tmp_path / "data/train").n_documents == len(kept(texts, held))
    assert load_index(tmp_path / "data/validation").n_documents == len(held), "only the train split is cleaned"
    row = next(line.split() for line in printed.splitlines() if line.startswith("train "))
    assert int(row[-1]) == 3 and int(row[-2]) > 15
    with pytest.raises(SystemExit) as end:
        module.main([*arguments, "--deduplicate"])
    assert end.value.code == 2 and "held_out_sha256" in capsys.readouterr().err
