"""SeRpEnt's other clocks, windows, restorations and teachers: each against a loop, and what must always hold."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_serpent import assert_causal_to_the_bit, clock_of, lags_moved_by, packed, pieces
from torch import nn

from serpent_scale.config import MambaConfig, ModelConfig, SerpentConfig, parse_config
from serpent_scale.errors import UserError
from serpent_scale.kernels.resample import TICKS, compress, reference
from serpent_scale.model import accounting, teaching
from serpent_scale.model.documents import Documents
from serpent_scale.model.language_model import LanguageModel
from serpent_scale.model.mamba import Mamba
from serpent_scale.model.routing import RoutedBranch, ratio_loss
from serpent_scale.model.serpent import Branch, Serpent

VARIANTS = {
    "stride": dict(clock="stride", rates=[1.0, 1 / 2, 1 / 3]),
    "segment mean": dict(window="segment_mean"),
    "figure 2 and 3": dict(window="pointwise", restore="hold", join="project"),
    "blocks, mean, held": dict(clock="stride", window="segment_mean", restore="hold"),
    "uniform, figure 2": dict(clock="uniform", window="pointwise", join="project"),
    "a wider full-rate branch": dict(shares=[0.6, 0.2, 0.2]),
    "projected": dict(join="project"),
    "a run": dict(rates=[0.5], depth=3),
    "runs side by side": dict(depth=2, shares=[3.0, 1.0, 2.0]),
    "a run of blocks, held": dict(clock="stride", rates=[0.25], restore="hold", window="pointwise", depth=2),
    "routed": dict(clock="routed"),
    "a routed run": dict(clock="routed", rates=[0.5], depth=2),
}


@pytest.fixture(params=VARIANTS)
def mixer(request):
    torch.manual_seed(0)
    mixer = Serpent(24, SerpentConfig(band=2.0, **VARIANTS[request.param]), Mamba, MambaConfig(d_state=4))
    for name, parameter in mixer.named_parameters():
        if "clock_weight" in name or "readout_basis" in name:
            nn.init.normal_(parameter, std=0.5)
    return mixer


def test_outputs_before_a_changed_token_do_not_move_by_a_bit(mixer):
    assert_causal_to_the_bit(mixer, 24)


def test_a_packed_document_gives_what_it_gives_alone_and_token_by_token(mixer):
    mixer.double()
    lengths = (70, 1, 17, 2, 40)
    x, documents = packed(lengths, 24)
    whole, _ = mixer(x, documents)
    for part, got in zip(x[0].split(lengths), whole[0].split(lengths)):
        torch.testing.assert_close(got, mixer(part[None], Documents.whole(1, len(part)))[0][0], rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        for cuts in (range(sum(lengths) + 1), (0, 1, 69, 71, 88, 100, 130)):
            state, ys = None, []
            for part, piece in pieces(documents, list(cuts)):
                y, state = mixer(x[:, part], piece, state)
                ys.append(y)
            torch.testing.assert_close(torch.cat(ys, 1), whole.detach(), rtol=1e-9, atol=1e-10)


class Twice(nn.Module):
    """An inner mixer without memory."""

    def forward(self, x, documents, state=None):
        return 2 * x, state


def times(config, rate, u, branch):
    """Integer ticks before and after each token of one document: the clock as a loop."""
    if config.clock == "stride":
        n = round(1 / rate)
        return [(TICKS * l // n, TICKS * (l + 1) // n) for l in range(len(u))]
    s, dev, ticks, found = branch.sampling, 0, TICKS - 1, []
    for l, token in enumerate(u):
        q = s.rate
        if config.clock == "learned":
            gate = 1 / (1 + np.exp(-(token @ branch.clock_weight.detach().numpy() + branch.clock_bias.item())))
            q = round((s.low + (s.high - s.low) * gate) * TICKS)
        dev = max(-s.band, min(s.band, dev + q - s.rate))
        found.append((ticks, TICKS - 1 + (l + 1) * s.rate + dev))
        ticks = found[-1][1]
    return found


def by_loop(config, rate, u, branch):
    """Held outputs (L, d) of a branch around `Twice`, by the definitions of the window, and the tokens that emit."""
    clock, out, newest, fires = times(config, rate, u, branch), [], 0 * u[0], []
    for e, (before, after) in enumerate(clock):
        if after // TICKS > before // TICKS:
            fires.append(e)
            point = after // TICKS * TICKS
            if config.window == "segment_mean":
                weights = [max(0, min(b, point) - max(a, point - TICKS)) for a, b in clock[: e + 1]]
                x = sum(w * token for w, token in zip(weights, u)) / sum(weights)
            else:
                span = 2 * branch.sampling.high
                centres, width = np.linspace(0, span, config.n_bases), span / (config.n_bases - 1)
                taps = []
                for k in range(3):
                    if e < k:
                        taps += [0.0] * (len(u[0]) + len(centres))
                    else:
                        since = (after - clock[e - k][1]) / TICKS
                        taps += [*u[e - k], *np.exp(-0.5 * ((since - centres) / width) ** 2)]
                x = branch.window_map.weight.detach().numpy() @ np.array(taps)
            newest = 2 * x
        out.append(newest)
    return np.array(out), fires


@pytest.mark.parametrize("clock, rate", [
    ("learned", 0.3), ("learned", 0.5), ("uniform", 0.2), ("stride", 1 / 3), ("stride", 0.25),
])  # fmt: skip
@pytest.mark.parametrize("window", ["segment_mean", "pointwise"])
def test_held_elements_equal_a_loop(clock, rate, window):
    torch.manual_seed(1)
    config = SerpentConfig(band=1.0, clock=clock, window=window, restore="hold")
    branch = Branch(Twice(), 6, 6, rate, config).double()
    if clock == "learned":
        nn.init.normal_(branch.clock_weight, std=1.0)
    lengths = (2, 61, 1, 20)
    x, documents = packed(lengths, 6)
    parts = [by_loop(config, rate, part.numpy(), branch) for part in x[0].split(lengths)]
    assert np.abs(branch(x, documents)[0][0].detach().numpy() - np.concatenate([z for z, _ in parts])).max() < 1e-9
    fires = np.concatenate([np.array(fire, dtype=int) + start for (_, fire), start in zip(parts, np.cumsum((0,) + lengths))])
    assert np.array_equal(clock_of(branch, x, documents)[1][0].numpy().nonzero()[0], fires)


def test_blocks_emit_at_their_last_token_and_have_a_slot_at_any_length():
    for n in (2, 3, 7, 63):
        branch = Branch(nn.Identity(), 2, 2, 1 / n, SerpentConfig(clock="stride"))
        for lengths in ((5 * n,), (n - 1, 3 * n + 1, n, 1), (65536 + n - 1,)):
            x, documents = packed(lengths, 2)
            clock, fire = clock_of(branch, x.float(), documents)
            want = np.concatenate([np.arange(1, w + 1) % n == 0 for w in lengths])
            assert np.array_equal(fire[0].numpy(), want) and int(clock.live.sum()) == want.sum() <= clock.live.shape[1]


@pytest.mark.parametrize("window", ["segment_mean", "pointwise"])
def test_gradients_of_the_intervals_match_finite_differences(window, monkeypatch):
    torch.manual_seed(3)
    branch = Branch(Twice(), 6, 6, 0.3, SerpentConfig(band=64.0, window=window, restore="hold")).double()
    nn.init.normal_(branch.clock_weight, std=0.5)
    x, documents = packed((40, 23), 6)
    s, width = branch.sampling, 6 if window == "segment_mean" else 3 * 12
    interval = reference.intervals(x, branch.clock_weight, branch.clock_bias, s).detach().requires_grad_()
    monkeypatch.setattr(reference, "intervals", lambda *_: interval)
    formed, clock, _ = compress(x, None, branch.clock_weight, branch.clock_bias, documents.reset, s, branch.slots(documents))
    direction, probe = torch.randn(*formed.shape, dtype=torch.float64), torch.randn(63, dtype=torch.float64)
    (formed * direction).sum().backward()
    fire = clock.newest.diff(prepend=torch.full((1, 1), -1)) > 0

    def loss(shift):
        lags, _ = lags_moved_by(s, clock, fire, shift)
        moved = getattr(reference, window)(x, x.new_zeros(1, s.window_taps - 1, 6), clock, lags, s)
        return (moved * clock.live[..., None] * direction).sum().item()

    # Less than a tick: that is the share of the first token of a document in its grid cell.
    numeric = (loss(1e-8 * probe) - loss(-1e-8 * probe)) / 2e-8
    assert formed.shape[-1] == width
    assert abs(float(interval.grad[0] @ probe) - numeric) < 1e-6 * max(1.0, abs(numeric)) and abs(numeric) > 1e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_a_layer_has_as_many_parameters_as_a_mamba_layer_and_its_flops_follow(name):
    def model(d_model, pattern):
        depth = VARIANTS[name].get("depth", 1)
        settings = {"vocab_size": 64, "d_model": d_model, "n_layers": depth, "pattern": [pattern], "serpent": VARIANTS[name]}
        return parse_config({"model": settings, "training": {"max_steps": 1000}}).model

    for d_model in (64, 128, 768, 1024):
        counts = accounting.parameter_counts(model(d_model, "serpent"))
        plain = accounting.parameter_counts(model(d_model, "mamba"))
        assert abs((counts["serpent layers"] + counts["norms"]) / (plain["mamba layers"] + plain["norms"]) - 1) < 0.01
        if d_model <= 128:
            with torch.device("meta"):
                built = LanguageModel(model(d_model, "serpent"))
            assert sum(p.numel() for p in built.parameters()) == sum(counts.values())
    ours, plain = (accounting.flops_per_token(model(768, p), 1024).training for p in ("serpent", "mamba"))
    assert 0.2 * plain < ours < plain


@pytest.mark.parametrize("overrides, words", [
    (dict(clock="stride", rates=[1.0, 0.3]), ["model.serpent.rates", "stride", "0.3", "0.333333"]),
    (dict(clock="fixed"), ["model.serpent.clock", "learned, uniform, stride, routed"]),
    (dict(clock="routed", restore="hold"), ["model.serpent.restore=hold", "clock=routed", "readout"]),
    (dict(window="pointwise"), ["model.serpent.window=pointwise", "model.serpent.join=project"]),
    (dict(clock="uniform", teach="worth"), ["model.serpent.teach=worth", "model.serpent.clock is uniform"]),
    (dict(shares=[0.5, 0.5]), ["model.serpent.shares=[0.5, 0.5]", "each of model.serpent.rates=[1.0, 0.5, 0.25]"]),
    (dict(shares=[1.0, 0.0, 0.5]), ["model.serpent.shares=[1.0, 0.0, 0.5]", "> 0"]),
    (dict(depth=4), ["model.n_layers=24", "model.serpent.depth=4", "21 or 25", "model.pattern"]),
    (dict(depth=100), ["model.n_layers=24", "model.serpent.depth=100", "to 1 or 101"]),
    (dict(depth=0), ["model.serpent.depth=0", ">= 1"]),
])  # fmt: skip
def test_refused(overrides, words):
    with pytest.raises(UserError) as error:
        parse_config({"model": {"serpent": overrides}, "training": {"max_steps": 1000}})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize("key, value", [("clock", "routed"), ("teach", "confidence")])
def test_shards_of_a_sequence_are_refused(key, value):
    config = {"model": {"serpent": {key: value, "rates": [1.0, 0.5], "join": "project"}}, "training": {"max_steps": 1000}}
    with pytest.raises(UserError, match=f"parallel.sequence=2: model.serpent.{key}={value}"):
        parse_config(config | {"parallel": {"sequence": 2}})


# ---- routing -----------------------------------------------------------------------------------------------------------


def routed_by_loop(branch, u, fires=None, sure=None):
    """Outputs (L, d) of a routed branch around `Twice` over one document, float64 tensors, and p. fires, sure: who emits, and
    what the outputs are divided by, if not what p says: with those of other parameters, what gradients are of."""
    unit = torch.nn.functional.normalize
    p, smoothed, out = [], None, []
    for l, token in enumerate(u):
        likeness = unit(branch.query_weight @ token, dim=0) @ unit(branch.key_weight @ u[l - 1], dim=0)
        p.append((1 - likeness) / 2 if l else u.new_ones(()))
        emits = p[l] >= 0.5 if fires is None else fires[l]
        if emits:
            smoothed = 2 * token if smoothed is None else p[l] * 2 * token + (1 - p[l]) * smoothed
        certainty = p[l] if emits else 1 - p[l]
        out.append(smoothed if sure is None else smoothed * (1 + certainty - sure[l]))
    return torch.stack(out), torch.stack(p)


@pytest.fixture
def routed():
    torch.manual_seed(2)
    branch = RoutedBranch(Twice(), 6, 6, 0.25).double()
    nn.init.normal_(branch.key_weight, std=0.5)
    return branch


def test_routed_outputs_equal_a_loop(routed):
    lengths = (2, 150, 1, 20)
    x, documents = packed(lengths, 6)
    want = torch.cat([routed_by_loop(routed, part)[0] for part in x[0].split(lengths)])
    got, _ = routed(x, documents)
    assert (got[0] - want).abs().max() < 1e-12
    states, ys = None, []
    with torch.no_grad():
        for part, piece in pieces(documents, list(range(sum(lengths) + 1))):
            y, states = routed(x[:, part], piece, states)
            ys.append(y)
    assert (torch.cat(ys, 1)[0] - want).abs().max() < 1e-12


def test_gradients_of_routing_match_finite_differences(routed):
    x, documents = packed((40,), 6)
    direction, probe = torch.randn(40, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    (routed(x, documents)[0][0] * direction).sum().backward()
    with torch.no_grad():
        p = routed_by_loop(routed, x[0])[1]
        fires, sure, losses = p >= 0.5, torch.where(p >= 0.5, p, 1 - p), []
        for side in (1e-6, -1e-6):
            routed.query_weight += side * probe
            losses.append((routed_by_loop(routed, x[0], fires, sure)[0] * direction).sum().item())
            routed.query_weight -= side * probe
    numeric = (losses[0] - losses[1]) / 2e-6
    assert abs(float((routed.query_weight.grad * probe).sum()) - numeric) < 1e-6 * max(1.0, abs(numeric)) and abs(numeric) > 1e-3


def test_the_ratio_loss_is_least_at_the_rate_and_counts_labelled_tokens_alone():
    rate = 0.25
    at_token = torch.arange(80).view(2, 40)
    known = at_token < 60
    losses = teaching.Losses(torch.zeros(2, 40), known, torch.zeros_like(known))

    def at(share):
        p = torch.full((2, 40), share, requires_grad=True)
        loss = ratio_loss(p, (at_token < round(60 * share)) | ~known, rate, losses)
        return loss.item(), torch.autograd.grad(loss, p)[0]

    assert at(rate)[0] == pytest.approx(1) and at(0.5)[0] == pytest.approx(4 / 3) and at(0.0)[0] == pytest.approx(4 / 3)
    for share, sign in ((0.5, 1), (0.1, -1)):  # too many emit: p is to fall
        gradient = at(share)[1]
        assert (gradient[known] * sign > 0).all() and not gradient[~known].any()


# ---- teaching ----------------------------------------------------------------------------------------------------------

TEACHERS = ["centred", "confidence", "surprise", "next_surprise", "worth"]


def model_and_batch(**serpent):
    """A model in float64 whose clocks have learned something, tokens of two rows, documents, labels of which some are missing."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=50, d_model=24, n_layers=2, pattern=["serpent"], serpent=SerpentConfig(band=2.0, **serpent))
    model = LanguageModel(config).double()
    for name, parameter in model.named_parameters():
        if "clock_weight" in name:
            nn.init.normal_(parameter, std=0.5)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 50, (2, 60), generator=generator)
    rows = [packed(lengths, 1)[1] for lengths in ((23, 1, 36), (60,))]
    documents = Documents(torch.cat([row.reset for row in rows]), ((23, 1, 36), (60,)))
    labels = tokens.roll(-1, 1)
    labels[:, -1:] = labels[0, 22] = labels[1, 7] = -100  # one across a border is left
    return model, tokens, documents, labels


def gradients_of(model, *batch):
    model.zero_grad()
    loss, _ = model(*batch)
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("how", [*TEACHERS, "routed"])
def test_lessons_move_gradients_and_not_the_loss_also_where_blocks_are_recomputed(how):
    serpent = dict(clock="routed") if how == "routed" else dict(teach=how)
    model, *batch = model_and_batch(**serpent, teach_weight=0.1)
    loss, taught = gradients_of(model, *batch)
    value = model.taught.item()
    model.activation_checkpointing = True
    again, recomputed = gradients_of(model, *batch)
    assert model.taught.item() == pytest.approx(2 * value) and value > 0
    assert torch.equal(loss, again) and all(torch.equal(g, recomputed[name]) for name, g in taught.items())
    with torch.no_grad():
        assert torch.equal(model(*batch)[0], loss)
    plain, *batch = model_and_batch(**serpent, teach_weight=0.0)
    plain.load_state_dict(model.state_dict())
    if how != "routed":
        object.__setattr__(plain.config.serpent, "teach", "durations")
    same, alone = gradients_of(plain, *batch)
    moved = {name for name, gradient in alone.items() if not torch.allclose(gradient, taught[name], rtol=1e-9, atol=1e-12)}
    heads = {name for name in alone if "clock" in name or "query_weight" in name or "key_weight" in name}
    assert torch.equal(same, loss) and heads <= moved
    if how not in ("confidence", "routed"):
        assert moved == heads


def by_rank(values, weights, k):
    """Targets (n,) of values with these weights, by a loop."""
    pairs, total = list(zip(values, weights)), sum(weights)
    return [((sum(w for v, w in pairs if v < value) + weight / 2) / total) ** k for value, weight in pairs]


def test_targets_keep_the_mean_interval_at_the_rate():
    torch.manual_seed(0)
    for rate in (0.25, 0.5, 0.8):
        s = Branch(nn.Identity(), 2, 2, rate, SerpentConfig(spread=3.0)).sampling
        values, weights = torch.rand(4, 500).exp(), torch.randint(0, 4, (4, 500))
        found = teaching.targets(values, weights, s)
        want = by_rank(values[weights > 0].tolist(), weights[weights > 0].tolist(), (s.high - rate) / (rate - s.low))
        torch.testing.assert_close(found[weights > 0], torch.tensor(want))
        mean = ((s.low + (s.high - s.low) * found) * weights).sum() / weights.sum()
        assert abs(mean / rate - 1) < 1e-3
        hidden = torch.where(weights > 0, values, -1e9)
        assert torch.equal(teaching.targets(hidden, weights, s)[weights > 0], found[weights > 0])


@pytest.mark.parametrize("how", ["surprise", "next_surprise"])
def test_the_teacher_is_the_models_own_loss(how):
    model, *batch = model_and_batch(teach=how, teach_weight=0.1)
    _, taught = gradients_of(model, *batch)
    nll, labels, reset = model(*batch, per_token=True)[0], batch[2], batch[1].reset
    object.__setattr__(model.config.serpent, "teach", "durations")
    _, alone = gradients_of(model, *batch)
    heard, branch = {}, model.blocks[1].mixer.branches[2]
    branch.register_forward_pre_hook(lambda _, arguments: heard.update(u=arguments[0].detach()))
    model(*batch)
    where, values = [], []
    for b in range(2):
        for l in range(60):
            if how == "next_surprise" and labels[b, l] >= 0:
                where.append((b, l)), values.append(nll[b, l].item())
            elif how == "surprise" and l and labels[b, l - 1] >= 0 and not reset[b, l]:
                where.append((b, l)), values.append(nll[b, l - 1].item())
    assert 100 < len(where) < 118
    want = 0.0
    for (b, l), target in zip(where, by_rank(values, [1] * len(values), 2.0)):  # at spread 2
        gate = torch.sigmoid(heard["u"][b, l] @ branch.clock_weight + branch.clock_bias)
        want = want + 0.1 * (labels >= 0).sum() * (gate - target) * heard["u"][b, l] / len(where)
    name = "blocks.1.mixer.branches.2.clock_weight"
    torch.testing.assert_close(taught[name] - alone[name], want.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("how", ["confidence", "worth"])
def test_what_the_outputs_gradients_teach_equals_a_loop(how, monkeypatch):
    torch.manual_seed(4)
    branch = Branch(Twice(), 6, 6, 0.3, SerpentConfig(band=1.0, teach=how)).double()
    nn.init.normal_(branch.clock_weight, std=0.5)
    x, documents = packed((30, 1, 25), 6)
    x.requires_grad_()
    s, direction = branch.sampling, torch.randn(56, 6, dtype=torch.float64)
    alone, _ = branch(x, documents)
    documents = replace(documents, lessons=teaching.Lessons(torch.zeros((), dtype=torch.float64)))
    z, _ = branch(x, documents)
    assert torch.equal(z, alone)
    losses = teaching.Losses(torch.zeros(1, 56), torch.ones(1, 56, dtype=torch.bool), documents.reset)
    taught, before = ((value * direction).sum() for value in (z, alone))
    if how == "worth":
        taught = taught + 0.7 * documents.lessons[0](losses)
    found, plain = (torch.autograd.grad(value, branch.clock_bias)[0].item() for value in (taught, before))
    clock, fire = clock_of(branch, x.detach(), documents)
    gate = torch.sigmoid(x[0] @ branch.clock_weight + branch.clock_bias).detach()
    slope, want, value = (s.high - s.low) * gate * (1 - gate), 0.0, 0.0
    if how == "confidence":
        for l in range(56):
            sign = 0 if documents.reset[0, l] else 1 if fire[0, l] else -1
            want += sign * float((z[0, l].detach() * direction[l]).sum() * slope[l])
        mean = (s.low + (s.high - s.low) * gate).mean()
        assert documents.lessons[0](losses).item() == pytest.approx((mean.item() / 0.3 - 1) ** 2, rel=1e-4)
    else:
        x_formed, _, _ = compress(x, branch.window_basis, branch.clock_weight, branch.clock_bias, documents.reset, s,
                                  branch.slots(documents))
        tokens, slots = fire[0].nonzero()[:, 0].tolist(), 2 * x_formed[0].detach()
        chosen = [j for j, e in enumerate(tokens) if not documents.reset[0, e]]
        worth = [float((direction[tokens[j]] * (slots[j] - slots[j - 1])).sum() ** 2) for j in chosen]
        weights = [1 / float(s.low + (s.high - s.low) * gate[tokens[j]]) for j in chosen]
        targets = by_rank(worth, weights, (s.high - 0.3) / (0.3 - s.low))
        for j, target, weight in zip(chosen, targets, weights):
            p = float(gate[tokens[j]])
            want += 0.7 * (p - target) * weight / sum(weights)
            value -= (target * math.log(p) + (1 - target) * math.log(1 - p)) * weight / sum(weights)
        assert documents.lessons.taught.item() == pytest.approx(value, rel=1e-5)
    assert found - plain == pytest.approx(want, rel=1e-4)
