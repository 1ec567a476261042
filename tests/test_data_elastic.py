"""One order and one digest, however many ranks read, however they accumulate, prefetch, are killed and come back."""
import json
import random
from collections import deque

import numpy as np
import pytest
import torch
import xxhash

from data_pipeline import digest, order, windows
from data_pipeline import index as data_index
from data_pipeline.index import Index, Shard
from data_pipeline.schedule import Schedule
from data_pipeline.stream import TokenStream
from data_pipeline.windows import Windows
from serpent_scale.config import TrainingConfig
from serpent_scale.training.streams import first_sample
from unique_corpus import write_corpus

SEQ_LEN, SEED, BLOCK = 8, 3, 50


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "data"
    write_corpus(folder, 208, 1500)
    return folder


def open_stream(folder) -> TokenStream:
    return TokenStream(folder, "train", SEQ_LEN, SEED, BLOCK)


class Rank:
    """Reads what a rank of a trainer reads, `ahead` micro-batches before their turn."""

    def __init__(self, folder, training, world, rank, step, ahead):
        self.stream, self.training, self.world, self.rank = open_stream(folder), training, world, rank
        self.stage = Schedule(SEQ_LEN, training.global_batch).stage(0)
        self.accumulation = training.global_batch // (world * training.micro_batch)
        self.ahead, self.fetched, self.next = ahead, deque(), step * self.accumulation

    def take(self):
        """The batch whose turn it is."""
        while len(self.fetched) <= self.ahead:
            turn = divmod(self.next, self.accumulation)
            first = first_sample(self.stage, self.training.micro_batch, self.world, self.rank, *turn)
            self.fetched.append(self.stream.batch(first, self.training.micro_batch))
            self.next += 1
        return self.fetched.popleft()

    def step(self):
        return [self.take() for _ in range(self.accumulation)]


def run_step(ranks, samples: dict) -> int:
    """A step of all ranks: its samples by number, and its digest, summed as the ranks sum it."""
    total = torch.zeros(4, dtype=torch.float64)
    for rank in ranks:
        batches = rank.step()
        for batch in batches:
            for g, tokens in zip(batch.samples, batch.tokens.tolist()):
                assert g not in samples
                samples[g] = tokens
        total += torch.tensor(digest.to_limbs(sum(batch.digest for batch in batches)), dtype=torch.float64)
    return digest.from_limbs(total.tolist())


def naive_digest(g: int, sample) -> int:
    """As docs/design.md says it."""
    text = b"".join(t.to_bytes(2, "little") for t in sample.tokens.tolist())
    text += int(sample.labels[-1]).to_bytes(8, "little", signed=True) + len(sample.starts).to_bytes(4, "little")
    text += b"".join(s.to_bytes(4, "little") for s in sample.starts.tolist())
    return int(xxhash.xxh3_128_hexdigest(text, seed=g), 16)


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_any_world_accumulation_and_prefetch_give_one_order_and_one_digest(data, world, micro_batch):
    straight, steps = open_stream(data), 6
    training = TrainingConfig(global_batch=48, micro_batch=micro_batch)
    start = straight.n_windows // 48 - 2  # past the end of the epoch
    for ahead in (0, 1, 5):
        ranks = [Rank(data, training, world, rank, start, ahead) for rank in range(world)]
        for step in range(start, start + steps):
            samples, numbers = {}, range(48 * step, 48 * (step + 1))
            assert run_step(ranks, samples) == sum(naive_digest(g, straight.sample(g)) for g in numbers) % 2**128
            assert {g: straight.sample(g).tokens.tolist() for g in numbers} == samples


def test_a_run_killed_a_hundred_times_on_changing_ranks_reads_every_token_once(data):
    random.seed(5)
    training = TrainingConfig(global_batch=24, micro_batch=1)
    whole = open_stream(data)
    total = -(-whole.n_windows // 24)
    state, history, kills = json.dumps(whole.state(0, 0)), {}, 0
    while True:
        world = (1, 2, 4, 3)[kills % 4]
        number, consumed = open_stream(data).check_state(json.loads(state))
        step = number // 24
        history = {g: tokens for g, tokens in history.items() if g < number}  # what came after was lost with the run
        ranks = [Rank(data, training, world, rank, step, kills % 3) for rank in range(world)]
        for _ in range(random.randint(0, 2)):
            if step < total:
                consumed += run_step(ranks, history)
                step += 1
            if random.random() < 0.6:
                state = json.dumps(whole.state(24 * step, consumed % 2**128))
                assert len(state) < 1024
        if json.loads(state)["next_sample"] == 24 * total:
            break
        for rank in ranks[: random.randint(0, world)]:  # killed within a step
            rank.take()
        kills += 1
    assert kills >= 100
    epoch = [history[g] for g in range(whole.n_windows)]
    counts = np.bincount(np.concatenate(epoch), minlength=whole.index.vocab_size)
    padding = -whole.index.tokens % SEQ_LEN
    assert (counts[1:] == 1).all() and counts[0] == 2 * whole.index.n_documents + padding
    assert sorted(history) == list(range(24 * total))
    assert json.loads(state)["digest"] == digest.to_hex(whole.batch(0, 24 * total).digest)


def test_shards_that_do_not_fit_are_opened_again_and_hashed_once(data, monkeypatch):
    roomy, hashed = open_stream(data), []
    monkeypatch.setattr(windows, "OPEN_BYTES", 0)
    verify = data_index.verify_shard
    monkeypatch.setattr(data_index, "verify_shard", lambda index, number, path: hashed.append(number) or verify(index, number))
    tight = open_stream(data)
    assert tight.batch(0, tight.n_windows).digest == roomy.batch(0, tight.n_windows).digest
    n_shards = len(tight.index.shards)
    assert len(tight.sources[0]._opened) == 1 and sorted(hashed) == sorted(2 * [*range(n_shards)])


def test_the_digest_knows_every_change_of_a_sample(data):
    stream = open_stream(data)
    good = stream.sample(7)
    tokens, label, starts = good.tokens.astype(stream.index.dtype), int(good.labels[-1]), good.starts
    number = digest.of_sample(7, tokens, label, starts)
    assert number == naive_digest(7, good) == stream.batch(7, 1).digest
    other = [tokens.copy() for _ in range(2)]
    other[0][3] += 1
    other[1][[2, 3]] = other[1][[3, 2]]
    assert label != -100
    changed = [digest.of_sample(7, tokens, label, starts) for tokens in other]
    changed += [digest.of_sample(8, tokens, label, starts), digest.of_sample(7, tokens, label + 1, starts),
                digest.of_sample(7, tokens, -100, starts), digest.of_sample(7, tokens, label, np.append(starts, 7))]  # fmt: skip
    assert len({number, *changed}) == 7
    numbers = [stream.batch(g, 1).digest for g in range(10)]
    assert stream.batch(0, 10).digest == sum(numbers) % 2**128
    assert len({sum(numbers), sum(numbers[1:]), sum(numbers) + numbers[3], sum(numbers) - numbers[3] + numbers[4]}) == 4


def test_limbs_are_summed_exactly():
    assert digest.from_limbs(digest.to_limbs(2**128 - 1)) == 2**128 - 1
    random.seed(0)
    for ranks in (1, 3, 1000):
        numbers = [random.choice([random.getrandbits(128), 2**128 - 1]) for _ in range(ranks)]
        limbs = torch.tensor([digest.to_limbs(number) for number in numbers], dtype=torch.float64).sum(0)
        assert digest.from_limbs(limbs.tolist()) == sum(numbers) % 2**128
    most = (2**21 * torch.tensor(digest.to_limbs(2**128 - 1), dtype=torch.float64)).tolist()
    assert digest.from_limbs(most) == 2**21 * (2**128 - 1) % 2**128
    for text in ("", "0" * 31, "0" * 33, "G" * 32, "A" * 32, 5, None, "0" * 31 + "\n"):
        assert digest.from_hex(text) is None
    assert digest.from_hex(digest.to_hex(77)) == 77


# Seeking.


class Untouched:
    def __getattr__(self, name):
        raise AssertionError(f"{name} of the documents was asked for")


def synthetic(n_shards: int, shard_tokens: int) -> Index:
    """An index without files, whose documents nobody may look at."""
    shards = tuple(Shard(f"{i}.tar", 1, shard_tokens - i, 0, "") for i in range(n_shards))
    return Index(None, "", "train", np.dtype("<u2"), "", 10, 0, sum(shard.tokens for shard in shards), 0, 0, "", shards,
                 Untouched())  # fmt: skip


def test_seeking_costs_the_same_at_any_position(monkeypatch):
    index = synthetic(1000, 1_000_000_000)
    calls = []
    for name in ("permute", "permutation"):
        function = getattr(windows, name)
        monkeypatch.setattr(windows, name, lambda *args, f=function, name=name: calls.append(name) or f(*args))
    steps = []
    monkeypatch.setattr(order, "_mix", lambda x, mix=order._mix: steps.append(1) or mix(x))
    for g in (0, 10**6, 10**9, 10**12, 10**15):
        seeker = Windows(index, 2048, 1, 8192)
        calls.clear(), steps.clear()
        spans = seeker.spans(g)
        assert sum(last - first for _, first, last in spans) == 2049 and len(spans) <= 2
        assert calls == ["permutation", "permute"] and len(steps) <= 6 * 20  # cycle-walking takes a few walks
        seeker.spans(g + 1)
        assert calls == ["permutation", "permute", "permute"]


def test_spans_of_an_epoch_cover_every_token_once():
    """Against the order told shard by shard: the line of an epoch, cut."""
    index = synthetic(7, 100)
    seeker = Windows(index, 9, 4, 10)
    for epoch in (0, 1, 10**6):
        shards = [order.permute(i, 7, order.derive_key("shards", 4, epoch)) for i in range(7)]
        line = [(shard, token) for shard in shards for token in range(index.shards[shard].tokens)]
        n, read = seeker.n_windows, []
        for g in range(epoch * n, epoch * n + n):
            tokens = [(shard, t) for shard, first, last in seeker.spans(g) for t in range(first, last)]
            at = line.index(tokens[0])
            assert tokens == line[at : at + 10] and at % 9 == 0
            read += tokens[:9]
        assert sorted(read) == sorted(line)
