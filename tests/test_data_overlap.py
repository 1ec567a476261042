"""Leaving out duplicates and what overlaps an evaluation set: the documents a plain search finds, and no others."""
import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import records
from data_pipeline.index import load_index
from data_pipeline.overlap import N, Runs, Seen
from data_pipeline.shards import left_out, prepare_split
from data_pipeline.stream import documents
from data_pipeline.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]


def runs_of(words) -> set:
    return {tuple(words[i : i + N]) for i in range(len(words) - N + 1)}


@pytest.mark.parametrize("wanted", [1, 3, 8])
def test_overlap_is_what_a_search_of_all_runs_finds(wanted):
    """Few kinds of words, so that runs are shared all the time, some of them by many texts."""
    rng = random.Random(1)
    held = [[rng.choice("aaaab") for _ in range(rng.choice((3, 12, 13, 16, 40)))] for _ in range(40)]
    rows = [[rng.choice("abc" if i % 2 else "aaaab") for _ in range(rng.choice((0, 5, 12, 13, 14, 60)))] for i in range(500)]
    met, texts = set(), []  # a run counts for the first text that has it
    for words in held:
        texts.append(runs_of(words) - met)
        met |= texts[-1]
    expected = [any(len(runs_of(row) & runs) >= min(wanted, len(runs)) for runs in texts if runs) for row in rows]
    assert 0.05 < np.mean(expected) < 0.95
    found = Runs(map(" ".join, held), wanted)
    assert len(found) == len(met) and found.overlapping(list(map(" ".join, rows))).tolist() == expected
    assert found.overlapping([]).tolist() == [] and not Runs(["a b"]).overlapping(["a b"]).any()


def test_words_are_compared_without_marks_case_and_spacing():
    held = "In 1999 , it wasn 't <unk> @-@ free : 10 @,@ 000 of the \u201cLong Grass\u201d Snakes shed"
    found = Runs([held], 1)
    raw = "in 1999, it wasn't \"unk\"-free; 10,000 of the Long\nGrass snakes shed"
    assert found.overlapping([raw, raw.replace("snakes", "adders")]).tolist() == [True, True]
    assert not found.overlapping([raw.replace("Long", "short")]).any()


def test_a_few_shared_phrases_are_no_overlap_but_short_texts_count_whole():
    words = [f"w{i}" for i in range(60)]
    text = lambda ids: " ".join(words[i] for i in ids)  # noqa: E731
    found = Runs([text(range(40)), text(range(40, 55))])
    assert found.overlapping([text(range(19)), text(range(20)), text(range(5, 25))]).tolist() == [False, True, True]
    twice = text(range(16)) + " x " + text(range(16)) + " y " + text(range(16))
    assert not found.overlapping([twice]).any(), "different runs count"
    assert found.overlapping([text(range(40, 54)), text(range(40, 55))]).tolist() == [False, True]


def test_a_run_across_two_texts_is_none():
    half, other = ("a b c d e f g", "h i j k l m n")
    assert not Runs([f"{half} {other}"], 1).overlapping([half, other]).any()
    assert not Runs([half, other], 1).overlapping([f"{half} {other}"]).any()


def test_equal_hashes_alone_are_no_overlap(monkeypatch):
    monkeypatch.setattr("data_pipeline.overlap._hashes", lambda ids: np.full(max(len(ids) - N + 1, 0), 7, np.uint64))
    assert Runs(["a b c d e f g h i j k l m"], 1).overlapping(
        ["a b c d e f g h i j k l m", "a b c d e f g h i j k l x"]).tolist() == [True, False]  # fmt: skip


def test_another_evaluation_set_has_another_identity():
    texts = ["a b c d e f g h i j k l m n"], ["b a c d e f g h i j k l m n"], ["a b c d e f g h i j k l m", "n"]
    assert len({Runs(t, wanted).sha256 for t in texts for wanted in (1, 2)}) == 6


@pytest.mark.parametrize("size", [16, 9])
def test_seen_is_a_set(size, monkeypatch):
    """Of 9 bytes: keys that only differ in their second half."""
    monkeypatch.setattr("data_pipeline.overlap.UNSORTED", 50)
    rng, seen, plain = random.Random(3), Seen(), set()
    keys = [rng.randbytes(size).rjust(16, b"\0") for _ in range(5000)]
    for key in [*keys, *rng.sample(keys, 1000)]:
        assert seen.add(key) == (key in plain)
        plain.add(key)
    assert sum(rows.nbytes for rows in seen._sorted) > 16 * 4800


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
                             shard_tokens=700, deduplicate=True, held_out=Runs(held))

    index, _ = prepare("whole", texts)
    expected = kept(texts, held)
    assert [tokenizer.decode(ids[1:-1]) for ids in documents(tmp_path / "whole", "train")] == expected
    blank = sum(not t.strip() for t in texts)
    gone = left_out(index.folder)
    assert gone["overlapping"] == 3 and gone["duplicates"] == len(texts) - blank - len(expected) - 3

    monkeypatch.setattr(records, "BATCH_CHARACTERS", 3000)  # other batches, and a kill, change nothing

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
