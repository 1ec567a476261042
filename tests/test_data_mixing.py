"""Sources, stages and packing: which sample is what, against plain loops; and what damaged shards leave out."""
import json
import math
import random
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import xxhash

from data_pipeline import digest, packing
from data_pipeline.index import load_index
from data_pipeline.packing import best_fit, plan_shard, write_plan
from data_pipeline.schedule import Mixture, Schedule
from data_pipeline.stream import TokenStream
from data_pipeline.windows import IGNORE
from serpent_scale.errors import UserError
from unique_corpus import write_corpus

ENWIKI = Path(__file__).parents[2] / "shared/data/enwiki-2015-head/valid.jsonl"
SEQ_LEN = 16
STAGES = [(3, 4, 8), (2, 8, 6), (5, 16, 2)]
SOURCES = (Fraction(1, 2), Fraction("0.3"), Fraction(1, 5))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three sources of one tokenizer, whose tokens are all different, and plans for them."""
    folder, first = tmp_path_factory.mktemp("data"), 1
    for name, documents in dict(a=52, b=13, c=26).items():
        first = write_corpus(folder / name, documents, 900, first, vocab_size=9000)
        write_plan(load_index(folder / name / "train"), SEQ_LEN)
    return folder


def opened(data, **options) -> TokenStream:
    folders = [(data / name, share) for name, share in zip("abc", SOURCES)]
    return TokenStream(folders, "train", SEQ_LEN, 7, 20, **options)


# Stages.


def test_stages_against_a_loop():
    schedule, sample, tokens, seen = Schedule(SEQ_LEN, 5, STAGES), 0, 0, []
    shapes = [(length, batch) for steps, length, batch in STAGES for _ in range(steps)] + [(SEQ_LEN, 5)] * 4
    for step, (length, batch) in enumerate(shapes):
        stage = schedule.stage(step)
        assert (stage.seq_len, stage.global_batch, stage.parts) == (length, batch, SEQ_LEN // length)
        assert schedule.samples(step) == sample and schedule.tokens(step) == tokens
        assert schedule.steps(tokens) == step and schedule.steps(tokens + 1) == step + 1
        rows = [schedule.stage_of_sample(g).locate(g) for g in range(sample, sample + batch)]
        assert len({window for window, _ in rows}) == min(batch, stage.windows or batch)  # rows of different windows
        seen += [(window, part, stage.parts) for window, part in rows]
        sample, tokens = sample + batch, tokens + batch * length
    windows = {}
    for window, part, parts in seen:
        windows.setdefault((window, parts), []).append(part)
    assert [window for window, _ in sorted(windows)] == list(range(len(windows)))  # none twice, none left out
    assert all(sorted(found) == list(range(parts)) for (_, parts), found in windows.items())
    for bad in ((3, 5, 8), (3, 4, 1)):
        with pytest.raises(ValueError, match="no whole windows"):
            Schedule(SEQ_LEN, 5, [bad])


# Mixing.


@pytest.mark.parametrize("weights", [["1"], ["0.7", "0.3"], ["1", "1", "1"], ["0.001", "5", "0.2", "3", "1", "1", "0.77"]])
def test_every_source_has_its_share_at_any_time(weights):
    mixture = Mixture([Fraction(weight) for weight in weights])
    shares, counts = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights], [0] * len(weights)
    for start in (0, 10**15):
        counts = [mixture.count(source, start) for source in range(len(weights))]
        assert sum(counts) == start
        for window in range(start, start + 3000):
            source, number = mixture.locate(window)
            assert number == counts[source]
            counts[source] += 1
            assert max(abs(n - share * (window + 1)) for n, share in zip(counts, shares)) <= (1 + math.log2(len(weights))) / 2


def test_a_mixed_stream_in_stages_is_its_sources_dealt_in_turn(data):
    """Every sample against one source read alone; every source's own epochs hold each token once."""
    stream, schedule = opened(data, stages=STAGES), Schedule(SEQ_LEN, 5, STAGES)
    alone = [TokenStream(data / name, "train", SEQ_LEN, source.seed, 20) for name, source in zip("abc", stream.sources)]
    taken = [[] for _ in alone]
    last = schedule.samples(10) + 5 * 200
    for g in range(last):
        stage = schedule.stage_of_sample(g)
        window, part = stage.locate(g)
        which, number = stream.mixture.locate(window)
        whole, sample = alone[which].sample(number), stream.sample(g)
        cut = slice(part * stage.seq_len, (part + 1) * stage.seq_len)
        assert sample.tokens.tolist() == whole.tokens[cut].tolist() and sample.labels.tolist() == whole.labels[cut].tolist()
        assert sample.starts.tolist() == [s - cut.start for s in whole.starts.tolist() if cut.start <= s < cut.stop]
        taken[which] += sample.tokens.tolist()
    for tokens, source, source_alone in zip(taken, stream.sources, alone):
        counts = np.bincount(tokens, minlength=9000)[1:]
        epoch = np.bincount(np.concatenate([source_alone.sample(w).tokens for w in range(source.n_windows)]))
        own = np.flatnonzero(epoch[1:])
        assert set(np.flatnonzero(counts)) <= set(own)
        epochs = len(tokens) / SEQ_LEN / source.n_windows
        assert epochs > 1 and set(counts[own]) <= {math.floor(epochs), math.ceil(epochs)}
    with pytest.raises(ValueError, match="two stages"):
        stream.batch(schedule.samples(3) - 1, 2)


def test_a_mixed_state_is_small_and_knows_every_source_and_stage(data):
    stream = opened(data, stages=STAGES, packing="best_fit")
    state = json.loads(json.dumps(stream.state(55, 3)))
    assert len(json.dumps(state)) < 1024 and opened(data, stages=STAGES, packing="best_fit").check_state(state) == (55, 3)
    folders = [(data / name, 1) for name in "abc"]
    options = dict(stages=STAGES, packing="best_fit")
    for other, key in [
        (TokenStream(folders, "train", SEQ_LEN, 7, 20, **options), "sources"),
        (TokenStream(folders[::-1], "train", SEQ_LEN, 7, 20, **options), "sources"),
        (TokenStream(data / "a", "train", SEQ_LEN, 7, 20, **options), "sources"),
        (opened(data, packing="best_fit"), "stages"),
        (opened(data, stages=STAGES), "packing"),
    ]:
        with pytest.raises(UserError, match=f"{key} was"):
            other.check_state(state)
    write_corpus(data / "d", 3, 900, 1, vocab_size=8999)
    with pytest.raises(UserError, match="another tokenizer"):
        TokenStream([(data / "a", 1), (data / "d", 1)], "train", SEQ_LEN, 7, 20)


# Packing.


def test_best_fit_is_the_slow_one():
    random.seed(0)
    for size in (1, 2, 7, 100):
        lengths = [random.randint(1, size) for _ in range(300)]
        rooms, expected = [], [0] * 300
        for piece in sorted(range(300), key=lambda i: -lengths[i]):
            fitting = [b for b, room in enumerate(rooms) if room >= lengths[piece]]
            if not fitting:
                rooms.append(size)
                fitting = [len(rooms) - 1]
            expected[piece] = min(fitting, key=lambda b: rooms[b])
            rooms[expected[piece]] -= lengths[piece]
        bins = best_fit(np.array(lengths), size)
        assert np.bincount(bins, lengths).max() <= size and bins.max() + 1 == len(rooms)
        assert sorted(np.bincount(bins, lengths)) == sorted(size - room for room in rooms)


def by_hand(index, pieces, documents, size):
    """(tokens, labels, starts) of each window of a shard's plan, token by token, and labels that only its digest tells: of the
    pieces' last tokens and of padding."""
    windows = [([], [], [], []) for _ in range(pieces[-1][0] + 1)]
    for window, document, first, n in pieces:
        tokens, labels, starts, ends = windows[window]
        if tokens or first == 0:
            starts.append(len(tokens))
        for t in range(first, first + n):
            tokens.append(documents[document][t])
            labels.append(documents[document][t + 1] if t + 1 < len(documents[document]) else IGNORE)
        ends.append(labels[-1])
    for tokens, labels, starts, ends in windows:
        if len(tokens) < size:
            starts.append(len(tokens))
        ends += [IGNORE] * (size - len(tokens))
        labels += [IGNORE] * (size - len(tokens))
        tokens += [index.eot_id] * (size - len(tokens))
    return windows


def test_packed_windows_against_the_plan_by_hand(data):
    from data_pipeline.stream import documents

    stream = TokenStream(data / "a", "train", SEQ_LEN, 7, 20, packing="best_fit")
    index, expected, read = stream.index, [], list(documents(data / "a", "train"))
    for shard in range(len(index.shards)):
        pieces = plan_shard(index.rows(shard)[:, 2], SEQ_LEN).tolist()
        first, last = index.first_document(shard), index.first_document(shard + 1)
        expected += by_hand(index, pieces, [document.tolist() for document in read[first:last]], SEQ_LEN)
    for epoch in (0, 1):
        samples = [stream.sample(epoch * stream.n_windows + w) for w in range(stream.n_windows)]
        assert sorted((s.tokens.tolist(), s.labels.tolist(), s.starts.tolist()) for s in samples) == sorted(
            window[:3] for window in expected
        )
    for g in range(stream.n_windows):
        tokens, labels, starts, ends = next(w for w in expected if w[0] == stream.sample(g).tokens.tolist())
        text = struct.pack(f"<{SEQ_LEN}HqI", *tokens, labels[-1], len(starts)) + struct.pack(f"<{len(starts)}I", *starts)
        assert stream.batch(g, 1).digest == xxhash.xxh3_128_intdigest(text + struct.pack(f"<{len(ends)}q", *ends), g)
    assert sum(sample.n_labels for sample in samples) == index.tokens - index.n_documents  # each is learned
    short = TokenStream(data / "a", "train", SEQ_LEN, 7, 20, packing="best_fit", stages=[(10**6, 4, 4)])
    for g in (0, 1, 1023, 1024, 1500):
        window, part = short.schedule.stage_of_sample(g).locate(g)
        assert short.sample(g).labels.tolist() == stream.sample(window).labels[4 * part : 4 * part + 4].tolist()
        assert short.sample(g).tokens.tolist() == stream.sample(window).tokens[4 * part : 4 * part + 4].tolist()
    sample = samples[0]
    numbers = {digest.of_sample(0, sample.tokens, 5, sample.starts, ends) for ends in ([3, 5], [4, 5], ())}
    assert len(numbers) == 3


def test_a_plan_that_is_not_of_this_index_or_was_changed_is_refused(data, tmp_path):
    import shutil

    shutil.copytree(data / "a", tmp_path / "a")
    plan, pieces = packing.paths(tmp_path / "a" / "train", SEQ_LEN)

    def refused(words):
        with pytest.raises(UserError, match=words):
            TokenStream(tmp_path / "a", "train", SEQ_LEN, 7, 20, packing="best_fit")

    good, raw = plan.read_text(), pieces.read_bytes()
    pieces.write_bytes(raw[:40] + bytes([raw[40] ^ 1]) + raw[41:])
    refused("pieces: missing, or not what")
    pieces.write_bytes(raw)
    for change in ({"seq_len": 8}, {"index_sha256": "0" * 64}, {"windows": [1]}, {"pieces": [True] * 9}, {"format": 2}, {"x": 1}):
        plan.write_text(json.dumps(json.loads(good) | change))
        refused("not a plan of")
    plan.write_text(good[:-9])
    refused("not a plan of")
    plan.unlink()
    refused("no such plan; make it with .*--pack 16")


def test_padding_of_real_text(tmp_path):
    if not ENWIKI.is_file():
        pytest.skip("no such text here")
    lengths = np.array([len(json.loads(line)["text"].encode()) // 4 + 2 for line in ENWIKI.open()])
    pieces = plan_shard(np.tile(lengths, 20), 2048)
    assert pieces[:, 3].sum() / (2048 * (pieces[-1, 0] + 1)) > 0.98


# Skipping.


def test_a_skipped_shard_reads_as_padding_and_nothing_else_moves(data, tmp_path, capfd):
    import shutil

    for name in "abc":
        shutil.copytree(data / name, tmp_path / name)
    path, shard = tmp_path / "a" / "train" / "shard-000001.tar", 1
    good = path.read_bytes()
    path.write_bytes(good[:-512] + b"x" + good[-511:])
    with pytest.raises(UserError, match="shard-000001.tar: sha256"):
        stopping = opened(tmp_path)
        stopping.batch(0, 200)
    for kind in ("cut", "best_fit"):
        whole, stream = opened(data, packing=kind), opened(tmp_path, on_error="skip", packing=kind)
        last = 3 * stream.sources[0].n_windows
        own = whole.index.shards[shard].tokens
        first = sum(s.tokens - 2 * s.documents for s in whole.index.shards[:shard]) + 1
        lost = range(first, first + own - 2 * whole.index.shards[shard].documents)
        total = consumed = 0
        for g in range(last):
            batch, sample, other = stream.batch(g, 1), stream.sample(g), whole.sample(g)
            gone = (other.tokens >= lost.start) & (other.tokens < lost.stop)
            assert (sample.tokens[gone] == 0).all() and (sample.labels[gone] == IGNORE).all()
            assert not ((sample.tokens >= lost.start) & (sample.tokens < lost.stop)).any()
            kept = ~gone & (other.tokens != 0)
            assert (sample.tokens[kept] == other.tokens[kept]).all() and (sample.labels[kept] == other.labels[kept]).all()
            assert batch.tokens.tolist() == [sample.tokens.tolist()] and sum(batch.lengths[0]) == SEQ_LEN
            total, consumed = total + batch.tokens_skipped, consumed + batch.digest
        epochs = stream.mixture.count(0, last) / stream.sources[0].n_windows
        assert stream.skipped == [[0, shard]] and math.floor(epochs) * own <= total <= math.ceil(epochs) * own
        warning = capfd.readouterr().err
        assert warning.count("warning: ") == 1 and f"{path}: sha256 is" in warning and f"{own:,} tokens are left out" in warning
        # A resumed run leaves it out even if it was mended meanwhile; one that would stop is told.
        stream.tokens_skipped = total
        state = json.loads(json.dumps(stream.state(last, consumed % digest.MODULUS)))
        mended = opened(data, on_error="skip", packing=kind)
        mended.batch(0, 50)
        assert mended.check_state(state)[0] == last and mended.tokens_skipped == total and mended.skipped == [[0, shard]]
        assert mended.batch(0, 300).digest == stream.batch(0, 300).digest != whole.batch(0, 300).digest
        with pytest.raises(UserError, match="on_error=skip"):
            opened(data, packing=kind).check_state(state)
        for bad in ([[0, 99]], [[3, 0]], [[0, -1]], [0], 5, [[0, True]]):
            with pytest.raises(UserError, match="data state: skipped"):
                mended.check_state(state | {"skipped": bad})


def test_too_many_damaged_shards_end_the_run(data):
    stream = opened(data, on_error="skip")
    with pytest.raises(UserError, match="more than 32 shards"):
        stream.skip([[0, n] for n in range(33)])


def test_a_shard_that_is_missing_at_the_start_is_skipped_too(data, tmp_path):
    import shutil

    shutil.copytree(data / "b", tmp_path / "b")
    (tmp_path / "b" / "train" / "shard-000000.tar").unlink()
    stream = TokenStream(tmp_path / "b", "train", SEQ_LEN, 1, 9, on_error="skip")
    assert stream.batch(0, stream.n_windows).tokens_skipped == stream.index.shards[0].tokens and stream.skipped == [[0, 0]]
