"""Preparing data: what ends up on disk, what a crash leaves, what is refused."""
import gzip
import importlib.util
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
import zstandard

from data_pipeline import stdlib_corpus
from data_pipeline.index import load_index, verify_shard
from data_pipeline.shards import prepare_split
from data_pipeline.sources import documents, parse_source
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from serpent_scale.errors import UserError

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
SCRIPT = ROOT / "launch" / "prepare_data.py"
TEXTS = [f"Document {i}: " + "the grass snake sheds its skin. " * (i * 7 % 40) for i in range(300)]


@pytest.fixture(scope="session")
def prepare_data():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(a) for a in arguments])


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(TEXTS, 280, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def prepare(data: Path, tokenizer: Tokenizer, texts=TEXTS, shard_tokens=4000):
    data.mkdir(parents=True, exist_ok=True)
    (data / "tokenizer.json").write_bytes(tokenizer.path.read_bytes())
    return prepare_split(data / "train", texts, tokenizer, request={}, word_rule="whitespace", shard_tokens=shard_tokens)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shards_hold_marked_documents_that_webdataset_reads(tmp_path, tokenizer):
    texts = ["", *TEXTS, "  \n", "the characters <|endoftext|> are text here"]
    index, worked = prepare(tmp_path, tokenizer, texts)
    kept = [text for text in texts if text.strip()]
    assert worked and index.n_documents == len(kept) and len(index.shards) > 3
    assert all(shard.tokens <= 4000 for shard in index.shards)
    assert index.bytes == sum(len(text.encode()) for text in kept)
    assert index.words == sum(len(text.split()) for text in kept)
    read = []
    for number, shard in enumerate(index.shards):
        verify_shard(index, number)
        read += list(webdataset.WebDataset(str(index.folder / shard.name), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"{i:09d}" for i in range(len(kept))]
    for sample, text, row in zip(read, kept, index.documents):
        ids = np.frombuffer(sample["tokens"], "<u2")
        assert ids[0] == ids[-1] == index.eot_id and (ids[1:-1] != index.eot_id).all() and len(ids) == row[2]
        assert tokenizer.decode(ids[1:-1]) == text


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path, tokenizer):
    spec = json.loads(tokenizer.path.read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 1 << 16, "content": "<|far|>"})
    vocab = spec["model"]["vocab"]
    vocab.update({f"filler {i}": i for i in range(len(vocab), 1 << 16)}, **{"<|far|>": 1 << 16})
    path = tmp_path / "large.json"
    path.write_text(json.dumps(spec))
    index, _ = prepare(tmp_path / "data", Tokenizer(path))
    assert (index.dtype, index.vocab_size) == (np.dtype("<u4"), (1 << 16) + 1)
    verify_shard(index, 0)


def test_a_document_larger_than_a_shard_gets_its_own(tmp_path, tokenizer):
    index, _ = prepare(tmp_path, tokenizer, ["short", "long " * 3000, "short"], shard_tokens=100)
    assert [shard.documents for shard in index.shards] == [1, 1, 1]


@pytest.mark.parametrize("crash_at", range(0, 26, 2))
def test_a_crash_at_any_rename_leads_to_the_same_bytes(tmp_path, tokenizer, monkeypatch, crash_at):
    prepare(tmp_path / "whole", tokenizer)
    replace, calls = os.replace, iter(range(1000))

    def crashing(source, target):
        if next(calls) == crash_at:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crashing)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "cut", tokenizer)
    assert not (tmp_path / "cut" / "train" / "index.json").exists()
    prepare(tmp_path / "cut", tokenizer)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_kill_minus_nine_then_rerun(tmp_path, tokenizer, jsonl, prepare_data, monkeypatch):
    arguments = ["--source", jsonl, "--tokenizer", tokenizer.path, "--shard-tokens", 120]
    process = subprocess.Popen([sys.executable, SCRIPT, *map(str, arguments), "--out", tmp_path / "cut"])
    deadline = time.monotonic() + 60
    while not (tmp_path / "cut" / "train" / "shard-000003.tar").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "train" / "index.json").exists(), "it finished before it was killed"
    before = (tmp_path / "cut" / "train" / "shard-000001.tar").stat().st_mtime_ns
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # of hundreds of shards
    prepare_data(*arguments, "--out", tmp_path / "cut")
    prepare_data(*arguments, "--out", tmp_path / "whole")
    assert (tmp_path / "cut" / "train" / "shard-000001.tar").stat().st_mtime_ns == before, "finished work was redone"
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_source_that_changed_under_an_interrupted_run_is_refused(tmp_path, tokenizer, monkeypatch):
    def interrupted():
        yield from TEXTS[:200]
        raise KeyboardInterrupt

    monkeypatch.setattr("data_pipeline.records.BATCH_CHARACTERS", 1000)  # so that shards are finished before it stops
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, tokenizer, interrupted())
    with pytest.raises(UserError, match="the source changed"):
        prepare(tmp_path, tokenizer, ["other", *TEXTS[1:]])
    prepare(tmp_path, tokenizer)


def test_done_is_done_and_other_options_are_refused(tmp_path, tokenizer, jsonl, prepare_data, capsys):
    arguments = ["--source", jsonl, "--out", tmp_path / "data"]
    prepare_data(*arguments, "--tokenizer", "train:280")
    before = contents(tmp_path / "data")
    prepare_data(*arguments)
    assert "already prepared" in capsys.readouterr().out
    with open(jsonl, "a") as file:
        file.write('{"text": "one more"}\n')
    for changed, message in [
        (["--shard-tokens", 99], "shard_tokens = 100000000, now it is 99"),
        (["--tokenizer", "train:290"], "has 280 tokens, --tokenizer asks for 290"),
        ([], "was prepared with sources ="),
    ]:
        assert message in _refusal(prepare_data, capsys, *arguments, *changed)
    assert contents(tmp_path / "data") == before


@pytest.mark.parametrize(
    "source, message",
    [
        ("pipe:touch pwned", "URLs and commands are refused"),
        ("train=pipe:touch pwned", "URLs and commands are refused"),
        ("text.jsonl::pipe:touch pwned", "URLs and commands are refused"),
        ("zip://a.txt::text.zip", "URLs and commands are refused"),
        ("https://example.com/a.jsonl", "URLs and commands are refused"),
        ("file:/etc/passwd.txt", "URLs and commands are refused"),
        ("hf:json", "is hf:OWNER/NAME"),
        ("hf:../up/a", "is hf:OWNER/NAME"),
        ("hf:a/b:pipe:ls", "is hf:OWNER/NAME"),
        ("missing.jsonl", "no such file"),
        ("text.pkl", "cannot tell how to read"),
        ("broken.jsonl", "cannot be read"),
        ("number.jsonl", "'text' of record 1 is NoneType"),
        ("other.jsonl", "no column 'text'; pass --text-key, one of body"),
        ("blank.txt", "holds no text"),
        ("latin.txt", "cannot be read"),
        ("dev=stdlib", "has the splits train, validation, test, not 'dev'"),
    ],
)
def test_refused_sources(tmp_path, tokenizer, prepare_data, capsys, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "text.jsonl": '{"text": "a"}', "text.pkl": "", "broken.jsonl": '{"text": ', "other.jsonl": '{"body": "a"}',
        "number.jsonl": '{"text": "a"}\n{"text": null}\n', "blank.txt": " \n",
    }.items():  # fmt: skip
        Path(name).write_text(text)
    Path("latin.txt").write_bytes(b"\xe9t\xe9")
    assert message in _refusal(prepare_data, capsys, "--source", source, "--out", "data", "--tokenizer", tokenizer.path)
    assert not Path("pwned").exists() and not Path("data/train/index.json").exists()


def test_no_network_is_one_line(tmp_path, tokenizer, prepare_data, capsys, monkeypatch):
    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    message = _refusal(prepare_data, capsys, "--source", "wikitext-103", "--out", tmp_path, "--tokenizer", tokenizer.path)
    assert "'wikitext-103': cannot be read (Couldn't reach the Hub); no network?" in message


def test_bad_outputs_and_tokenizers_are_one_line(tmp_path, tokenizer, jsonl, prepare_data, capsys):
    no_mark = tmp_path / "no_mark.json"
    no_mark.write_text(tokenizer.path.read_text().replace("<|endoftext|>", "<|other|>"))
    (tmp_path / "file").write_text("in the way")
    for out, wanted, message in [
        ("file/data", tokenizer.path, "Not a directory"),
        ("data", no_mark, "has no <|endoftext|> token"),
        ("data", jsonl, "not a tokenizer.json"),
        ("data", tmp_path / "none.json", "no such tokenizer"),
        ("data", "train:12", "must be at least 257"),
        ("data", "train:99999", "the text yields only"),
    ]:
        assert message in _refusal(prepare_data, capsys, "--source", jsonl, "--out", tmp_path / out, "--tokenizer", wanted)


def _refusal(prepare_data, capsys, *arguments) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        prepare_data(*arguments)
    captured = capsys.readouterr().err
    assert stopped.value.code == 2 and captured.startswith("error: ") and captured.count("\n") == 1, captured
    return captured


def test_file_formats_hold_the_same_documents(tmp_path):
    texts = ["first\nof two lines", "second", "été"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    files = {"a.jsonl": lines, "a.jsonl.gz": gzip.compress(lines), "a.jsonl.xz": lzma.compress(lines),
             "a.jsonl.zst": zstandard.compress(lines),
             "a.json": json.dumps([{"text": t} for t in texts]).encode()}  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    for name in [*files, "a.parquet"]:
        assert list(documents(parse_source(str(tmp_path / name))[0])) == texts, name
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    globbed = str(tmp_path / "[0-9].txt")
    assert list(documents(parse_source(globbed)[0])) == texts
    assert list(documents(parse_source(globbed, "line")[0])) == ["first", "of two lines", "second", "été"]


def test_shards_are_written_without_opening_urls(tmp_path, tokenizer, monkeypatch):
    """webdataset's gopen runs `pipe:` commands, also through the environment; a shard must never pass through it."""
    monkeypatch.setenv("GOPEN_REWRITE", "/=pipe:touch pwned;")
    monkeypatch.setattr("webdataset.writer.gopen", None)
    prepare(tmp_path, tokenizer)


def test_stdlib_corpus_is_large_and_in_a_fixed_order():
    named = stdlib_corpus._named_documents()
    names = [name for name, _ in named]
    assert names == sorted(set(names))
    splits = {split: list(stdlib_corpus.stdlib_documents(split)) for split in ("train", "validation", "test")}
    assert sum(map(len, splits["train"])) > 1_000_000
    total = sum(map(len, splits.values()))
    assert all(0.02 < len(splits[name]) / total < 0.09 for name in ("validation", "test"))
    texts = dict(named)
    assert "\njson.encoder.JSONEncoder.iterencode(self, o, _one_shot=False)\n\nEncode" in texts["module:json.encoder"]
    assert texts["topic:assert"].startswith('The "assert" statement')


@pytest.mark.parametrize("name, words", [("test", 245_569), ("valid", 217_646)])
@pytest.mark.parametrize("ending", ["tokens", "raw"])
def test_wikitext_words_are_counted_as_published(tmp_path, tokenizer, name, words, ending):
    path = SHARED / "wikitext-103" / f"wiki.{name}.{ending}"
    if not path.exists():
        pytest.skip("WikiText-103 is not here")
    articles = list(documents(parse_source(str(path))[0]))
    assert len(articles) == 60 and "".join(articles) == path.read_text()
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.path.read_bytes())
    index, _ = prepare_split(tmp_path / "test", articles, tokenizer, request={}, word_rule="whitespace+line_ends")
    assert (index.words, index.bytes) == (words, path.stat().st_size)
    rows = [line.strip() and f"{line}\n" for line in path.read_text().split("\n")[:-1]]  # as the Hub stores them
    from data_pipeline.sources import _articles

    assert list(_articles(iter(rows))) == articles
    assert load_index(tmp_path / "test").sha256 == index.sha256
