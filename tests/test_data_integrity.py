"""Damage of every kind is found, and its file named, before any token of the damaged shard is used."""
import io
import random
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from data_pipeline.index import load_index
from data_pipeline.stream import TokenStream
from serpent_scale.errors import UserError
from unique_corpus import write_corpus

SHARD = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "data"
    write_corpus(folder, 39, 700)
    index = load_index(folder / "train")
    assert len(index.shards) > 4 and index.shards[SHARD].documents > 3
    return folder


@pytest.fixture
def copy(data, tmp_path):
    """(DATA, path of the shard to be damaged, its bytes)."""
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data" / "train" / f"shard-00000{SHARD}.tar"
    return tmp_path / "data", path, path.read_bytes()


def damage(stream, shard=SHARD) -> str:
    """Read an epoch until it is refused: the message. No sample before may hold a token of the shard."""
    index, numbers = stream.index, range(stream.n_windows)
    begin = sum(shard.tokens - 2 * shard.documents for shard in index.shards[:shard]) + 1
    own = range(begin, begin + index.shards[shard].tokens - 2 * index.shards[shard].documents)
    read = 0
    for g in numbers:
        try:
            tokens = stream.sample(g).tokens
        except UserError as error:
            for _ in range(2):
                with pytest.raises(UserError, match=re.escape(str(error))):  # again, not only the first time
                    stream.sample(g)
            return str(error)
        assert not ((tokens >= own.start) & (tokens < own.stop)).any()
        read += 1
    raise AssertionError("the damage was not found")


def opened(folder) -> TokenStream:
    return TokenStream(folder, "train", 16, 1, 8)


def test_the_corpus_is_read_whole_when_nothing_is_wrong(data):
    stream = opened(data)
    tokens = np.concatenate([stream.sample(g).tokens for g in range(stream.n_windows)])
    assert (np.bincount(tokens)[1:] == 1).all()
    with pytest.raises(AssertionError):
        damage(stream)


def test_a_cut_of_a_shard_in_use(copy, tmp_path):
    """In a process of its own, which a read beyond the cut would end."""
    folder, path, raw = copy
    script = f"""
import os
from data_pipeline.stream import TokenStream
stream = TokenStream({str(folder)!r}, "train", 16, None, 8)
for g in range(stream.n_windows):
    stream.sample(g)
os.truncate({str(path)!r}, 512)
for g in range(stream.n_windows):
    stream.sample(g)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"{path}: 512 bytes, the index says" in done.stderr, (done.returncode, done.stderr)


def test_a_cut_at_every_512_bytes(copy):
    """Before the stream is opened, after it, and filled up with zeros to the size it had."""
    folder, path, raw = copy
    index = load_index(folder / "train")
    documents = np.flatnonzero(index.documents[:, 0] == SHARD)
    ends = {d: int(index.documents[d, 1] + 2 * index.documents[d, 2]) for d in documents}
    end_of_data = max(ends.values())
    for size in range(0, len(raw), 512):
        path.write_bytes(raw)
        stream = opened(folder)
        path.write_bytes(raw[:size])
        gone = [d for d in documents if ends[d] > size]
        words = f"cut at byte {size}, in or before document {gone[0]}" if gone else f"cut at byte {size}, in its end mark"
        for message in (damage(stream), refusal(lambda: load_index(folder / "train"))):
            assert message.startswith(f"{path}: ") and words in message
        if size < end_of_data:
            path.write_bytes(raw[:size] + bytes(len(raw) - size))
            message = damage(opened(folder))
            assert message.startswith(f"{path}: sha256 is ")
            header = next((int(index.documents[d, 1]) - 512 for d in documents if index.documents[d, 1] - 512 >= size), None)
            assert f"at byte {header} there is no" in message if header is not None else "other bytes differ" in message
    path.write_bytes(raw + b"x")
    assert f"from byte {len(raw)} on does not belong" in refusal(lambda: load_index(folder / "train"))


def refusal(fn) -> str:
    with pytest.raises(UserError) as error:
        fn()
    return str(error.value)


def test_a_flipped_bit_at_any_byte(copy):
    folder, path, raw = copy
    random.seed(0)
    index = load_index(folder / "train")
    for at in [*range(0, len(raw), 59), len(raw) - 1]:
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << random.randrange(8)]) + raw[at + 1 :])
        assert damage(opened(folder)).startswith(f"{path}: sha256 is ")
    document = int(np.flatnonzero(index.documents[:, 0] == SHARD)[1])
    header = int(index.documents[document, 1]) - 512
    path.write_bytes(raw[:header] + b"x" + raw[header + 1 :])
    assert f"at byte {header} there is no {document:09d}.tokens" in damage(opened(folder))


def test_shards_that_changed_places(copy):
    folder, path, raw = copy
    for other in range(len(load_index(folder / "train").shards)):
        neighbour = path.with_name(f"shard-00000{other}.tar")
        if other != SHARD and neighbour.stat().st_size == len(raw):
            theirs = neighbour.read_bytes()
            path.write_bytes(theirs), neighbour.write_bytes(raw)
            message = damage(opened(folder))
            assert "under another name" in message and message.split(": ")[0] in (str(path), str(neighbour))
            damage(opened(folder), other)
            path.write_bytes(raw), neighbour.write_bytes(theirs)
            break
    else:
        raise AssertionError("no two shards have one size")


def test_a_shard_that_is_gone_or_comes_to_be_gone(copy):
    folder, path, _ = copy
    stream = opened(folder)
    path.unlink()
    assert damage(stream).startswith(f"{path}: missing")
    assert refusal(lambda: opened(folder)).startswith(f"{path}: missing")
    path.mkdir()
    assert refusal(lambda: opened(folder)).startswith(f"{path}: missing")


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("name", ["000000000.tokens", "extra.tokens", "../up", "/etc/passwd"])
def test_a_foreign_member(copy, name, place):
    folder, path, raw = copy
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    stranger = tarfile.TarInfo(name)
    stranger.size = 4
    members.insert({"first": 0, "middle": 2, "last": len(members)}[place], (stranger, b"\1\0\2\0"))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for member, payload in members:
            tar.addfile(member, io.BytesIO(payload))
    stream = opened(folder)
    path.write_bytes(buffer.getvalue())
    message = damage(stream)
    assert message.startswith(f"{path}: ")
    if len(buffer.getvalue()) == len(raw):
        assert "at byte" in message
