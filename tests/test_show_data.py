"""launch/show.py data: figures that a count of the documents gives, and a picture."""
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.index import load_index
from data_pipeline.shards import prepare_split
from data_pipeline.stream import documents
from data_pipeline.summary import Lengths, samples
from data_pipeline.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]
TEXTS = [f"Document {i}: " + "the grass snake sheds its skin. " * (i * 7 % 40) for i in range(300)]


def show(*arguments):
    spec = importlib.util.spec_from_file_location("show", ROOT / "launch/show.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([*map(str, arguments)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "data"
    folder.mkdir()
    tokenizer = train_tokenizer(TEXTS, 280, folder / "tokenizer.json")
    for split, texts in (("train", TEXTS), ("validation", ["short", "the grass"])):
        prepare_split(folder / split, texts, tokenizer, request={}, word_rule="whitespace", shard_tokens=4000)
    return folder


def test_lengths(data, monkeypatch):
    lengths = [len(ids) for ids in documents(data, "train")]
    bins = [length.bit_length() - 1 for length in lengths]
    for chunk in (1 << 20, 7):
        monkeypatch.setattr("data_pipeline.summary.CHUNK", chunk)
        found = Lengths.of(load_index(data / "train"))
        assert found.documents.tolist() == [bins.count(b) for b in range(max(bins) + 1)]
        assert found.tokens.tolist() == [sum(n for n, b in zip(lengths, bins) if b == c) for c in range(max(bins) + 1)]
        assert (found.shortest, found.longest) == (min(lengths), max(lengths))


def test_samples_are_documents_of_the_split(data):
    index = load_index(data / "train")
    found = samples(index, 300, 10_000, seed=0)
    assert found == list(enumerate(TEXTS)) and len(samples(index, 1000, 5, seed=0)) == 300
    few = samples(index, 5, 4, seed=0)
    assert len({number for number, _ in few}) == 5 and few != samples(index, 5, 4, seed=1)
    assert all(TEXTS[number].startswith(text) and 0 < len(text) < len(TEXTS[number]) for number, text in few)


def test_text_and_picture(data, tmp_path, capsys):
    show("data", data, "--out", tmp_path / "lengths.png", "--samples", 2)
    printed = capsys.readouterr().out
    index = load_index(data / "train")
    row = next(line.split() for line in printed.splitlines() if line.startswith("train "))
    assert row[1:3] == ["300", f"{index.tokens:,}"] and float(row[4]) == pytest.approx(index.tokens / index.bytes, abs=1e-4)
    assert printed.count("document ") == 4 and "validation: identity" in printed
    picture = np.asarray(Image.open(tmp_path / "lengths.png").convert("RGB"))
    assert picture.shape[1] > 1000 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    show("data", data, "--split", "validation")
    assert "train " not in capsys.readouterr().out


def test_bad_input_ends_in_one_line(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data/validation/shard-000000.tar"
    raw = bytearray(path.read_bytes())
    raw[514] ^= 1
    path.write_bytes(raw)
    for arguments, words in [
        ([tmp_path / "none"], "holds no data"),
        ([data, "--split", "test"], "test/index.json: no such index"),
        ([data, "--tokens", 0], "tokens >= 1"),
        (["pipe:ls"], "pipes are refused"),
        (["s3://bucket/data"], "set data.cache"),
        ([tmp_path / "data", "--split", "validation"], "shard-000000.tar: sha256"),
    ]:
        with pytest.raises(SystemExit) as end:
            show("data", *arguments)
        message = capsys.readouterr().err
        assert end.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1 and words in message, message
