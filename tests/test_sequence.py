"""Sequence parallelism on real ranks, held to one process: losses, every gradient, emissions, states, traffic."""
from functools import cache, partial

import pytest
import torch

from ranks import run_ranks
from serpent_scale.config import parse_config
from serpent_scale.model import serpent
from serpent_scale.model.attention import AttentionState
from serpent_scale.model.documents import Documents
from serpent_scale.model.language_model import LanguageModel
from serpent_scale.parallel.attention import steps

VOCABULARY = 29
SLOW = dict(rates=[0.25], horizon=0.5, band=16.0)  # and a clock that runs at half its rate: 8 tokens between emissions
CASES = {
    "mamba": dict(pattern=["mamba", "mamba"], length=41),
    "mamba2": dict(pattern=["mamba2"], length=151),
    "s4d": dict(pattern=["s4d", "s4d"], length=151),
    "s4d by fft": dict(pattern=["s4d"], length=151, convolution="fft", rows=1),
    "s5": dict(pattern=["s5", "s5"], length=83),
    "attention": dict(pattern=["attention", "attention"], length=83),
    "serpent": dict(pattern=["mamba", "serpent"], length=203),
    "serpent around mamba2": dict(pattern=["serpent"], inner="mamba2", length=203),
    "serpent around s4d": dict(pattern=["serpent"], inner="s4d", length=203),
    "serpent around s5": dict(pattern=["serpent", "s5"], inner="s5", length=203),
    "serpent around attention": dict(pattern=["serpent", "attention"], inner="attention", length=203),
    "attention in short shards": dict(pattern=["serpent"], inner="attention", horizon=0.5, length=27),
    "halos over several shards": dict(pattern=["serpent", "serpent"], horizon=0.5, length=27),
    "run": dict(pattern=["mamba", "serpent"], depth=3, rates=[0.5], length=151),
    "run of several rates": dict(pattern=["serpent"], depth=2, length=101),
    "run in short shards": dict(pattern=["serpent"], depth=2, horizon=0.5, length=27),
    "run of mamba2": dict(pattern=["serpent"], inner="mamba2", depth=2, rates=[0.5], length=101),
    "run of s4d": dict(pattern=["serpent"], inner="s4d", depth=2, length=83),
    "run of s5": dict(pattern=["serpent"], inner="s5", depth=2, length=83),
    "run of attention": dict(pattern=["serpent"], inner="attention", depth=2, length=83),
    "segment mean": dict(pattern=["serpent"], window="segment_mean", length=101),
    "pointwise window": dict(pattern=["serpent"], window="pointwise", join="project", length=101),
    "hold": dict(pattern=["serpent"], restore="hold", length=83),
    "stride": dict(pattern=["serpent"], clock="stride", rates=[0.5, 0.25], length=83),
    "nothing emitted": dict(pattern=["serpent"], length=20, slow=True, **SLOW),
    "uniform clock": dict(pattern=["serpent"], length=101, clock="uniform", rates=[0.5], decompress_taps=1),
    "activation checkpointing": dict(pattern=["mamba", "s4d", "s5", "attention"] * 2 + ["serpent"], length=53, checkpointing=True),
    "float32": dict(pattern=["serpent", "mamba", "s4d", "s5", "attention"], length=203, dtype=torch.float32),
}
WORLDS = (2, 3, 4)
KINDS = *({"pattern": [mixer]} for mixer in ("mamba", "mamba2", "s4d", "s5", "serpent")), dict(pattern=["serpent"], depth=3)


def configured(pattern, inner="mamba", convolution="chunks", **settings):
    n_layers = len(pattern) + pattern.count("serpent") * (settings.get("depth", 1) - 1)
    return parse_config({
        "model": {"vocab_size": VOCABULARY, "d_model": 24, "n_layers": n_layers, "pattern": pattern,
                  "mamba": {"d_state": 4}, "mamba2": {"d_state": 8, "head_dim": 4},
                  "s4d": {"d_state": 6, "dt_min": 0.01, "convolution": convolution}, "s5": {"d_state": 8, "n_blocks": 2, "dt_min": 0.01},
                  "attention": {"head_dim": 4, "queries_per_key": 2},
                  "serpent": {"inner": inner, "band": 2.0, **settings}},
        "training": {"max_steps": 1000},
    }).model


def build(length=0, rows=2, dtype=torch.float64, checkpointing=False, slow=False, config=None, **settings):
    """A small model whose clocks and read-outs are not at their plain start. config: of these settings, if there is one."""
    torch.manual_seed(3)
    model = LanguageModel(config or configured(**settings), checkpointing)
    for name, parameter in model.named_parameters():
        if "clock_weight" in name:
            torch.nn.init.normal_(parameter, std=0.0 if slow else 0.5)
        if "clock_bias" in name and slow:
            torch.nn.init.constant_(parameter, -30.0)
        if "readout_basis" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def sample(length, rows=2, seed=0):
    """Tokens, labels and documents; the first row is one document, the others hold several."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (rows, length + 1), generator=generator)
    labels, reset = tokens[:, 1:].clone(), torch.zeros(rows, length, dtype=torch.bool)
    for row in range(1, rows):
        reset[row, torch.randperm(length, generator=generator)[: 1 + length // 30]] = True
        labels[row, :-1][reset[row, 1:]] = -100
    lengths = []
    for row in reset:
        edges = sorted({0, length, *row.nonzero().flatten().tolist()})
        lengths.append(tuple(b - a for a, b in zip(edges, edges[1:])))
    return tokens[:, :-1], labels, Documents(reset, tuple(lengths))


class Emissions(list):
    """Which tokens emit (B, L), at every call of `compress_beside`. A clock that was carried on sees outputs before its first, so
    `decompress` must be given some: a kernel would read what lies before them in memory."""

    def __enter__(self):
        self.original = compress, decompress = serpent.compress_beside, serpent.decompress
        carried = {}

        def spy(original, u, *arguments):
            found = original(u, *arguments)
            newest = found[1].newest
            carried[id(newest)] = arguments[-1] is not None
            self.append(newest.diff(dim=1, prepend=newest.new_full((len(u), 1), -1)) > 0)
            return found

        def check(y, basis, clock, sampling, tail):
            assert tail is not None or not carried[id(clock.newest)]
            return decompress(y, basis, clock, sampling, tail)

        serpent.compress_beside, serpent.decompress = partial(spy, compress), check
        return self

    def __exit__(self, *_):
        serpent.compress_beside, serpent.decompress = self.original


def tensors(value):
    if isinstance(value, AttentionState):  # places in use alone
        used = torch.arange(value.keys.shape[1]) < value.count[:, None]
        return [value.count, *(t[used] for t in value[:2])]
    return [value] if isinstance(value, torch.Tensor) else [t for part in value for t in tensors(part)]


@cache
def whole(name):
    """Summed loss, gradients, emissions and the states after, in one process; and the losses by token of a piece that follows."""
    case = CASES[name]
    model = build(**{**case, "checkpointing": False}, config=configs()[name])
    rows = case.get("rows", 2)
    tokens, labels, documents = sample(case["length"], rows)
    with Emissions() as fired:
        loss, states = model(tokens, documents, labels)
        fired = list(fired)
    loss.backward()
    tokens, labels, documents = sample(case["length"], rows, seed=1)
    with torch.no_grad():
        continued, _ = model(tokens, documents, labels, [_detached(s) for s in states], per_token=True)
    return loss.item(), gradients(model), fired, tensors(_detached(states)), continued


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def _detached(value):
    if isinstance(value, torch.Tensor):
        return value.detach()
    parts = [_detached(part) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def sharded(processes, configs):
    """The same by all ranks together, and the exchanges of the forward and of the backward pass."""
    from serpent_scale.parallel.sequence import Sequence

    sequence = Sequence(processes.world_size, processes.world_size, processes.device)
    return {name: _sharded(sequence, config=config, **CASES[name]) for name, config in configs.items()}


def _sharded(sequence, length, rows=2, **case):
    model, own, traffic = build(**case), sequence.own(length), sequence.ring.traffic
    tokens, labels, documents = sample(length, rows)
    before = traffic.exchanges
    with Emissions() as fired:
        loss, _ = model(tokens[:, own], sequence.shard(documents), labels[:, own])
        fired = [emits[:, own.start - own.stop :] for emits in fired]
    forward = traffic.exchanges
    loss.backward()
    exchanges = forward - before, traffic.exchanges - forward
    parts = {"loss": loss.detach(), **gradients(model)}
    summed = torch.cat([part.double().flatten() for part in parts.values()])
    torch.distributed.all_reduce(summed)  # one by one they would take half the time of this test
    sums = summed.split([part.numel() for part in parts.values()])
    total, *grads = (value.view_as(part) for value, part in zip(sums, parts.values()))
    later, later_labels, later_documents = sample(length, rows, seed=1)
    with torch.no_grad():
        states = sequence.last_states(model(tokens[:, own], sequence.shard(documents, carried=True))[1])
        continued, _ = model(later[:, own], sequence.shard(later_documents), later_labels[:, own], states, per_token=True)
        plain = model(tokens[:, own], sequence.shard(documents))[0]
        changed = tokens.clone()
        changed[:, 2 * length // 3 :] = (changed[:, 2 * length // 3 :] + 1) % VOCABULARY
        other = model(changed[:, own], sequence.shard(documents))[0]
    same = max(0, 2 * length // 3 - own.start)
    causal = torch.equal(plain[:, :same], other[:, :same])
    if case.get("convolution") == "fft":  # to rounding in the shard that holds the token, to the bit in earlier ones
        causal = near(other[:, :same], plain[:, :same], 1e-12) and (causal or same < own.stop - own.start)
    moved = not torch.equal(plain[:, same:], other[:, same:]) or same >= own.stop - own.start
    return total.item(), dict(zip(gradients(model), grads)), fired, tensors(states), continued, exchanges, causal and moved


@cache
def configs():
    """Parsed once for all ranks, which takes a second."""
    outside = "length", "rows", "dtype", "checkpointing", "slow"
    return {name: configured(**{key: value for key, value in case.items() if key not in outside}) for name, case in CASES.items()}


@cache
def results(world_size):
    return run_ranks(world_size, sharded, configs())


def near(found, expected, bound):
    found, expected = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (found, expected))
    return (found - expected).norm() <= bound * expected.norm().clamp(min=1e-12)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_shards_give_what_one_process_gives(name, world_size):
    bound = 1e-5 if name == "float32" else 1e-9
    expected, grads, fired, states, continued = whole(name)
    ranks = [rank[name] for rank in results(world_size)]
    for loss, found, _, after, _, _, _ in ranks:
        assert abs(loss - expected) <= bound * expected
        for key, grad in grads.items():
            assert grad.norm() > 0 or "clock" in key, f"{key} is not tried"
            assert near(found[key], grad, bound), key
        assert all(near(a, b, bound) for a, b in zip(after, states, strict=True)), "the last rank's states, on all"
    for i, emits in enumerate(fired):
        assert torch.equal(torch.cat([rank[2][i] for rank in ranks], 1), emits)
    assert near(torch.cat([rank[4] for rank in ranks], 1), continued, bound), "continued from those states"
    if name == "nothing emitted" and world_size == 4:
        assert any((emits.sum(1) == 0).any() for rank in ranks for emits in rank[2])


@pytest.mark.parametrize("world_size", WORLDS)
def test_no_output_before_a_changed_token_moves_by_a_bit(world_size):
    for name in CASES:
        assert all(rank[name][-1] for rank in results(world_size)), name


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_layer_makes_at_most_two_exchanges_forward_and_two_backward(world_size):
    """A run of layers on one compressed stream one for each, and one before them. Attention: one for each of the steps in which
    blocks come, and one for each in which something goes back."""
    halves, others = world_size // 2, (world_size - 1) // 2
    for name, case in CASES.items():
        forward = backward = 0
        for mixer in case["pattern"]:
            inner, depth = (case.get("inner", "mamba"), case.get("depth", 1)) if mixer == "serpent" else (mixer, 1)
            # Without a convolution or a clock nothing is to be told before the states.
            first = mixer == "serpent" or mixer.startswith("mamba")
            forward += first + depth * (halves + others if inner == "attention" else 1)
            backward += first + depth * (2 * halves if inner == "attention" else 1)
        recomputed = forward if case.get("checkpointing") else 0
        assert results(world_size)[0][name][5] == (forward, backward + recomputed), name


def traffic_of(processes, lengths):
    from serpent_scale.parallel.sequence import Sequence

    sequence, found = Sequence(processes.world_size, processes.world_size, processes.device), []
    for length in lengths:
        for kind in KINDS:
            model, own = build(**kind), sequence.own(length)
            tokens, labels, documents = sample(length)
            before = sequence.ring.traffic.bytes
            model(tokens[:, own], sequence.shard(documents), labels[:, own])[0].backward()
            found.append(sequence.ring.traffic.bytes - before)
    return found


def test_bytes_do_not_depend_on_length():
    for found in run_ranks(2, traffic_of, [200, 800]):
        assert found[: len(KINDS)] == found[len(KINDS) :] and min(found) > 0


@pytest.mark.parametrize("size", range(1, 10))
def test_attention_is_shared_evenly(size):
    """Each pair of shards once, one a rank in each step; no rank does more than 1 + 1 / P times the mean."""
    pairs = [pair for step in steps(size) for pair in step]
    assert sorted(pair[:2] for pair in pairs) == [(later, earlier) for later in range(size) for earlier in range(later)]
    assert all(len({at for _, _, at in step}) == len(step) for step in steps(size))
    assert all(at in (later, earlier) for later, earlier, at in pairs)
    work = [0.5 + sum(at == rank for _, _, at in pairs) for rank in range(size)]
    assert max(work) <= (1 + 1 / size) * sum(work) / size


def traffic_of_attention(processes, cases):
    """Bytes of the forward and of the backward pass, and bytes kept, for documents of these lengths in one row."""
    from serpent_scale.parallel.sequence import Sequence

    sequence, found = Sequence(processes.world_size, processes.world_size, processes.device), []
    for lengths in cases:
        model, (own, traffic) = build(pattern=["attention"]), (sequence.own(sum(lengths)), sequence.ring.traffic)
        tokens, reset = torch.zeros(1, sum(lengths), dtype=torch.int64), torch.zeros(1, sum(lengths), dtype=torch.bool)
        reset[0, [sum(lengths[:i]) for i in range(len(lengths))]] = True
        marks, kept = [traffic.bytes], {}
        keep = lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss, _ = model(tokens[:, own], sequence.shard(Documents(reset, (lengths,))), tokens[:, own])
        marks.append(traffic.bytes)
        loss.backward()
        found.append([marks[1] - marks[0], traffic.bytes - marks[1], sum(t.untyped_storage().nbytes() for t in kept.values())])
    return found


def test_bytes_of_attention_are_those_of_the_tokens_that_share_a_document():
    """As docs/sequence_parallel.md counts them, of three ranks in float64."""
    short, long, apart, half = (96,), (384,), (32, 32, 32), (48, 48)
    ranks = run_ranks(3, traffic_of_attention, [short, long, apart, half])
    assert ranks[0][0][2] == ranks[2][0][2], "the last rank keeps no more than the first"
    sent = torch.tensor(ranks)[..., :2].sum(0)  # (cases, 2)
    mixer = build(pattern=["attention"]).blocks[0].mixer
    heads, queries, keys = mixer.n_heads, mixer.n_heads * mixer.head_dim, mixer.n_groups * mixer.head_dim
    assert queries == 2 * keys
    for case, tokens in zip(sent, (32, 128)):  # two pairs of neighbours, whose keys travel; the first rank helps the last
        rows = 2 * 2 * keys + 2 * queries + heads, 2 * 4 * keys + 4 * queries + heads
        assert case.tolist() == [8 * tokens * n for n in rows]
    assert not sent[2].any()
    # The border at token 48 is in the second shard: 32 keys before it are asked by 16 queries, 16 after it by 32.
    assert sent[3].tolist() == [8 * (32 + 16) * 2 * keys, 8 * (32 + 16) * 4 * keys]
