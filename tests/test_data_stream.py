"""The token stream: its order, its windows against a naive reconstruction, and damaged data."""
import io
import json
import os
import random
import shutil
import tarfile
from hashlib import sha256

import numpy as np
import pytest
import torch

from data_pipeline import order
from data_pipeline.index import HASH, load_index, verify_shard
from data_pipeline.shards import prepare_split
from data_pipeline.stream import TokenStream, documents, token_counts
from data_pipeline.tokenizer import train_tokenizer
from data_pipeline.windows import IGNORE
from serpent_scale.errors import UserError

LENGTHS = [1, 700, 3, 1, 1, 40, 2, 90, 260, 5, 1, 33, 64, 62, 61, 1, 9]
TEXTS = ["".join(chr(97 + (i * 7 + j * j) % 26) for j in range(n)) for i, n in enumerate(LENGTHS)]

GOLDEN_KEY = 5919882380390394350
GOLDEN_TEN = [8, 0, 3, 6, 5, 9, 1, 2, 7, 4]
GOLDEN_BIG = 340758019633
GOLDEN_STREAM = "c58552cdc19da1e4"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Bytes as tokens: documents of 3 to 702 tokens in several shards."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = train_tokenizer([], 257, folder / "tokenizer.json")
    for split, texts in dict(train=TEXTS, validation=TEXTS[5:9]).items():
        prepare_split(folder / split, texts, tokenizer, request={}, word_rule="whitespace", shard_tokens=150)
    return folder


def naive_epoch(folder, stream, epoch):
    """(tokens, labels, starts) of each window, token by token from the tars."""
    index = load_index(folder / "train")
    shards = range(len(index.shards))
    if stream.seed is not None:
        shards = order.permutation(len(shards), order.derive_key("shards", stream.seed, epoch)).tolist()
    line = []  # (token, whether it begins a document)
    for number in shards:
        with tarfile.open(folder / "train" / index.shards[number].name) as tar:
            for member in tar:
                ids = np.frombuffer(tar.extractfile(member).read(), "<u2").tolist()
                line += [(token, position == 0) for position, token in enumerate(ids)]
    real, size = len(line), stream.seq_len
    line += [(index.eot_id, i == 0) for i in range(-real % size + 1)]
    windows = []
    for at in range(0, real, size):
        labels = [IGNORE if line[t + 1][1] or t + 1 >= real else line[t + 1][0] for t in range(at, at + size)]
        starts = [t - at for t in range(at, at + size) if line[t][1]]
        windows.append(([token for token, _ in line[at : at + size]], labels, starts))
    return windows


def as_lists(sample):
    return sample.tokens.tolist(), sample.labels.tolist(), sample.starts.tolist()


@pytest.mark.parametrize("seq_len", [2, 7, 64, 72, 1367, 1368, 5000])  # of 1368 tokens
def test_stored_order_is_the_naive_reconstruction(data, seq_len):
    stream = TokenStream.ordered(data, "train", seq_len)
    assert stream.index.tokens == sum(LENGTHS) + 2 * len(LENGTHS) == 1368 and len(stream.index.shards) > 4
    expected = naive_epoch(data, stream, 0)
    assert stream.n_windows == len(expected)
    assert [as_lists(stream.sample(g)) for g in range(stream.n_windows)] == expected
    assert sum(stream.sample(g).n_labels for g in range(stream.n_windows)) == stream.index.tokens - len(LENGTHS)


@pytest.mark.parametrize("seq_len, block", [(7, 16), (64, 5), (64, 1000), (5000, 4)])
def test_an_epoch_holds_every_window_once_within_its_block(data, seq_len, block):
    stream = TokenStream(data, "train", seq_len, 11, block)
    n = stream.n_windows
    for epoch in (0, 1):
        expected = naive_epoch(data, stream, epoch)
        got = [as_lists(stream.sample(epoch * n + w)) for w in range(n)]
        for begin in range(0, n, block):
            assert sorted(got[begin : begin + block]) == sorted(expected[begin : begin + block])
    if n > 20:
        first, second = [[stream.sample(e * n + w).tokens.tolist() for w in range(n)] for e in (0, 1)]
        assert first != second
        other = TokenStream(data, "train", seq_len, 12, block)
        assert first != [other.sample(w).tokens.tolist() for w in range(n)]


def test_the_order_does_not_depend_on_who_asks(data):
    stream = TokenStream(data, "train", 16, 5, 32)
    total = 2 * stream.n_windows + 3
    straight = [as_lists(stream.sample(g)) for g in range(total)]
    numbers = list(range(total))
    random.Random(0).shuffle(numbers)
    fresh = TokenStream(data, "train", 16, 5, 32)
    for g in numbers:
        assert as_lists(fresh.sample(g)) == straight[g]
    batch = TokenStream(data, "train", 16, 5, 32).batch(total - 50, 50)
    assert batch.samples == range(total - 50, total)
    assert [(t, l) for t, l, _ in straight[-50:]] == list(zip(batch.tokens.tolist(), batch.labels.tolist()))


def test_batch_marks_documents(data):
    stream = TokenStream(data, "train", 48, 3, 8)
    batch = stream.batch(0, stream.n_windows)
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64 and batch.reset.dtype == torch.bool
    for row, g in enumerate(batch.samples):
        sample = stream.sample(g)
        assert batch.reset[row].nonzero().flatten().tolist() == sample.starts.tolist()
        lengths = batch.lengths[row]
        assert sum(lengths) == 48 and min(lengths) > 0
        begins = np.cumsum((0, *lengths))[:-1].tolist()
        assert [b for b in begins if b or batch.reset[row, 0]] == sample.starts.tolist()


def test_the_order_is_the_same_for_ever(data):
    """Golden values: a change here would silently break every resume."""
    assert order.derive_key("windows", 1, 2, 3) == GOLDEN_KEY
    assert [order.permute(i, 10, 7) for i in range(10)] == GOLDEN_TEN
    assert order.permute(123_456_789_012, 10**12, 7) == GOLDEN_BIG
    stream = TokenStream(data, "train", 16, 5, 32)
    digest = sha256(b"".join(stream.sample(g).tokens.astype("<i8").tobytes() for g in range(2 * stream.n_windows)))
    assert digest.hexdigest()[:16] == GOLDEN_STREAM


def test_feistel_is_a_bijection():
    for n in [*range(1, 70), 127, 128, 129, 1000, 4097]:
        for key in (0, 1, (1 << 64) - 1, order.derive_key("x", n)):
            assert sorted(order.permutation(n, key).tolist()) == list(range(n))
            assert order.permutation(n, key).tolist() == [order.permute(i, n, key) for i in range(n)]
    keys = [order.derive_key("k", i) for i in range(2000)]
    seen = np.bincount([order.permute(3, 10, key) for key in keys], minlength=10)
    assert (abs(seen - 200) < 70).all()  # five standard deviations
    pairs = {tuple(order.permutation(4, key).tolist()) for key in keys}
    assert len(pairs) == 24


def test_state_goes_round_and_names_what_differs(data, tmp_path):
    stream = TokenStream(data, "train", 16, 5, 32)
    state = json.loads(json.dumps(stream.state(77, 2**127 + 1)))
    assert len(json.dumps(state)) < 1024 and stream.check_state(state) == (77, 2**127 + 1)
    assert stream.check_state(stream.state(0, 0)) == (0, 0)
    for other, key in [
        (TokenStream(data, "train", 17, 5, 32), "seq_len"),
        (TokenStream(data, "train", 16, 6, 32), "seed"),
        (TokenStream(data, "train", 16, 5, 33), "shuffle_block"),
        (TokenStream(data, "validation", 16, 5, 32), "index_sha256"),
    ]:
        with pytest.raises(UserError, match=f"{key} was"):
            other.check_state(state)
    for change in ({"next_sample": -1}, {"next_sample": True}, {"format": 5}, {"seed": True}, {"more": 1}, {"digest": None},
                   {"digest": "ff"}, {"digest": "F" * 32}, {"digest": 5}, {"next_sample": 0}):  # fmt: skip
        with pytest.raises(UserError, match="data state"):
            stream.check_state(state | change)
    for state in (5, None, [], "x"):
        with pytest.raises(UserError, match="data state"):
            stream.check_state(state)


def test_a_state_without_a_digest_is_continued_with_one_that_counts_from_there(data):
    """As checkpoints of format 1 have it, written out here."""
    stream = TokenStream(data, "train", 16, 5, 32)
    index = load_index(data / "train")
    old = {"format": 1, "index_sha256": index.sha256, "tokenizer_sha256": index.tokenizer_sha256, "seed": 5, "seq_len": 16,
           "shuffle_block": 32, "next_sample": 77}  # fmt: skip
    assert stream.check_state(old) == (77, 0)
    assert stream.check_state(stream.state(77, 5) | {"format": 3}) == (77, 5)
    for change in ({"seed": 6}, {"digest": "0" * 32}, {"next_sample": -1}, {"format": 0}, {"format": 2}):
        with pytest.raises(UserError, match="data state"):
            stream.check_state(old | change)


def test_documents_and_counts(data):
    docs = list(documents(data, "train"))
    eot = load_index(data / "train").eot_id
    assert [len(doc) - 2 for doc in docs] == LENGTHS and all(doc[0] == doc[-1] == eot for doc in docs)
    counts = token_counts(data, "train")
    stream = TokenStream.ordered(data, "train", 64)
    labels = np.concatenate([stream.sample(g).labels for g in range(stream.n_windows)])
    assert counts.tolist() == np.bincount(labels[labels != IGNORE], minlength=257).tolist()


@pytest.fixture
def copy(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


def read_all(folder):
    stream = TokenStream(folder, "train", 64, 1, 8)
    for g in range(stream.n_windows):
        stream.sample(g)


def forge(folder, shard=None, documents=None, **changes):
    """Make the index agree with altered files, so that only the next check can object."""
    path = folder / "train" / "index.json"
    fields = json.loads(path.read_text()) | changes
    fields.pop(HASH, None)
    if shard is not None:
        raw = (folder / "train" / fields["shards"][shard]["name"]).read_bytes()
        fields["shards"][shard] |= dict(bytes=len(raw), sha256=sha256(raw).hexdigest())
    if documents is not None:
        buffer = io.BytesIO()
        np.save(buffer, documents)
        (folder / "train" / "documents.npy").write_bytes(buffer.getvalue())
        fields["documents_sha256"] = sha256(buffer.getvalue()).hexdigest()
    path.write_text(json.dumps(fields))


def test_a_shard_cut_anywhere_is_refused_at_opening(copy):
    path = copy / "train" / "shard-000001.tar"
    raw = path.read_bytes()
    for size in [*range(0, len(raw), 512), 1, 511, 513, len(raw) - 1]:
        path.write_bytes(raw[:size])
        with pytest.raises(UserError, match="shard-000001.tar: .* bytes, the index says"):
            load_index(copy / "train")
    path.write_bytes(raw + bytes(512))
    with pytest.raises(UserError, match="shard-000001.tar"):
        load_index(copy / "train")
    os.remove(path)
    with pytest.raises(UserError, match="shard-000001.tar: missing"):
        load_index(copy / "train")


def test_a_flipped_bit_is_refused_before_the_shard_is_used(copy):
    path = copy / "train" / "shard-000002.tar"
    raw = path.read_bytes()
    for at in [*range(0, len(raw), 499), len(raw) - 1]:
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        with pytest.raises(UserError, match="shard-000002.tar: sha256"):
            verify_shard(load_index(copy / "train"), 2)
    for reader in (read_all, lambda folder: list(documents(folder, "train"))):
        with pytest.raises(UserError, match="shard-000002.tar: sha256"):
            reader(copy)


def rewrite(path, change):
    """Rewrite a tar with change(members) -> members, each (TarInfo, bytes)."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, payload in change(members):
            tar.addfile(member, io.BytesIO(payload) if member.isreg() else None)


def foreign(name, kind=tarfile.REGTYPE, size=0):
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = kind, size, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
    return member, bytes(size)


def renamed(members, name):
    members[0][0].name = name
    return members


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m + [foreign("extra.txt", size=10)],
        lambda m: [foreign("extra.txt", size=10)] + m,
        lambda m: m[:-1],
        lambda m: m[::-1],
        lambda m: m[:-1] + [(m[-1][0], m[-1][1][:-2])] if setattr(m[-1][0], "size", m[-1][0].size - 2) is None else m,
        lambda m: m + [foreign("link", tarfile.SYMTYPE)],
        lambda m: [foreign(m[0][0].name, tarfile.SYMTYPE)] + m[1:],
        lambda m: renamed(m, "../" + m[0][0].name),
        lambda m: renamed(m, "/tmp/" + m[0][0].name),
        lambda m: renamed(m, "d" * 90 + "/" + m[0][0].name),
    ],
)
def test_a_tar_that_disagrees_with_the_index_is_refused(copy, change):
    path = copy / "train" / "shard-000004.tar"
    rewrite(path, lambda members: members)
    forge(copy, shard=4)
    verify_shard(load_index(copy / "train"), 4)
    rewrite(path, change)
    forge(copy, shard=4)
    with pytest.raises(UserError, match="shard-000004.tar"):
        read_all(copy)


def test_documents_that_disagree_are_refused(copy):
    good = np.load(copy / "train" / "documents.npy")
    for row, column, delta in [(3, 1, 512), (3, 1, -(1 << 40)), (3, 2, 1), (0, 0, 5), (5, 0, -9), (2, 2, -(1 << 50))]:
        bad = good.copy()
        bad[row, column] += delta
        forge(copy, documents=bad)
        with pytest.raises(UserError, match="documents.npy|index.json"):
            read_all(copy)
    for bad in (good[:, :2], good.astype(np.int32), good[:0], good.astype(float)):
        forge(copy, documents=bad)
        with pytest.raises(UserError, match="documents.npy|index.json"):
            read_all(copy)
    forge(copy, documents=np.array([{"code": 1}]))  # pickled
    with pytest.raises(UserError, match="not a plain array"):
        read_all(copy)
    (copy / "train" / "documents.npy").write_bytes(b"short")
    with pytest.raises(UserError, match="documents.npy: its sha256"):
        read_all(copy)


def test_a_wrong_index_is_refused(copy):
    path = copy / "train" / "index.json"
    good = json.loads(path.read_text())
    shard = good["shards"][0]
    cases = [{key: None} for key in good] + [{key: True} for key, value in good.items() if isinstance(value, int)]
    cases += [{"tokens": good["tokens"] + 1}, {"documents": 1}, {"eot_id": 257}, {"dtype": "int64"}, {"format": 2}, {"x": 1}]
    cases += [{"shards": [shard | change, *good["shards"][1:]]} for change in (
        {"name": "../shard-000000.tar"}, {"name": "/etc/x.tar"}, {"name": "pipe:ls.tar"}, {"tokens": 1},
        {"documents": -1}, {"y": 1},
        {"name": good["shards"][1]["name"]})]  # fmt: skip
    cases += [{"shards": good["shards"][:-1]}, {"shards": [1]}, {"shards": []}]
    for change in cases:
        path.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match="index.json|documents.npy"):
            load_index(copy / "train")
    for text in ("", "[]", "{}", path.read_text()[:-5], "null"):
        path.write_text(text)
        with pytest.raises(UserError, match="index.json"):
            load_index(copy / "train")
    path.unlink()
    with pytest.raises(UserError, match="index.json: no such index"):
        load_index(copy / "train")


def test_a_flipped_bit_or_lost_byte_of_the_index_is_refused(copy):
    """Words and bytes of the text, by which evaluation divides, agree with nothing else."""
    path = copy / "train" / "index.json"
    raw = path.read_bytes()
    fields = json.loads(raw)
    path.write_text(json.dumps(fields | {"words": fields["words"] + 1}, indent=1) + "\n")
    with pytest.raises(UserError, match=f"index.json: damaged, its {HASH} is not that of what it says"):
        load_index(copy / "train")
    for bit in range(0, 8 * len(raw), 61):
        path.write_bytes(raw[: bit // 8] + bytes([raw[bit // 8] ^ 1 << bit % 8]) + raw[bit // 8 + 1 :])
        with pytest.raises(UserError):
            load_index(copy / "train")
    path.write_bytes(raw[:-1])
    with pytest.raises(UserError, match="index.json: damaged"):
        load_index(copy / "train")
    del fields[HASH]  # as it was written before
    path.write_text(json.dumps(fields, indent=1) + "\n")
    assert load_index(copy / "train").words == fields["words"]


def test_a_wrong_tokenizer_is_refused(copy):
    train_tokenizer(["aa aa aa"], 258, copy / "tokenizer.json")
    with pytest.raises(UserError, match="tokenizer.json: not the tokenizer"):
        read_all(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json: missing"):
        read_all(copy)


def test_a_token_outside_the_vocabulary_is_refused(copy):
    index = load_index(copy / "train")
    row = index.documents[1]
    path = copy / "train" / index.shards[row[0]].name
    raw = bytearray(path.read_bytes())
    raw[row[1] + 2 : row[1] + 4] = (60_000).to_bytes(2, "little")
    path.write_bytes(raw)
    forge(copy, shard=int(row[0]))
    for reader in (read_all, lambda folder: list(documents(folder, "train"))):
        with pytest.raises(UserError, match=f"{path.name}: token 60000 in document 1 is outside the vocabulary of 257"):
            reader(copy)
