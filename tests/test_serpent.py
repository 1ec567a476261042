"""SeRpEnt against the float64 oracle, and the properties that must always hold."""
import math

import numpy as np
import pytest
import serpent_oracle
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from serpent_scale.config import MambaConfig, SerpentConfig
from serpent_scale.kernels.causal_conv1d import causal_conv1d
from serpent_scale.kernels.resample import TICKS, compress, reference
from serpent_scale.kernels.selective_scan.reference import selective_scan_reference
from serpent_scale.model.documents import Documents
from serpent_scale.model.mamba import Mamba
from serpent_scale.model.serpent import Branch, Serpent, branch_widths, parameter_count

LENGTHS = (153, 17, 60)  # three documents packed in one row


class OracleMixer(nn.Module):
    """The oracle's SSM as an inner mixer."""

    def __init__(self, oracle):
        super().__init__()
        self.p = {k: torch.tensor(v) for k, v in oracle.p.items() if isinstance(v, np.ndarray)}

    def forward(self, x, documents, state=None):
        p = self.p
        dt = torch.log1p(torch.exp(x @ p["W_dt"] - 1)) * documents.live[..., None]
        h = x.new_zeros(x.shape[0], *p["A"].shape) if state is None else state
        ys = []
        for j in range(x.shape[1]):
            h = torch.where(documents.reset[:, j, None, None], 0 * h, h)
            h = torch.exp(dt[:, j, :, None] * p["A"]) * h + (dt * x)[:, j, :, None] * (x @ p["W_B"])[:, j, None]
            ys.append((h * (x @ p["W_C"])[:, j, None]).sum(-1))
        return torch.stack(ys, 1), h


def packed(lengths, width, seed=1):
    """One row of documents: (x (1, L, width), Documents)."""
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, sum(lengths), width)))
    starts = np.cumsum((0,) + tuple(lengths[:-1]))
    reset = torch.zeros(x.shape[:2], dtype=torch.bool)
    reset[0, starts] = True
    return x, Documents(reset, (tuple(lengths),))


def pieces(documents, cuts):
    """`documents` cut at the given positions, as what each piece of the row sees."""
    starts = documents.reset[0].nonzero()[:, 0].tolist()
    for lo, hi in zip(cuts, cuts[1:]):
        bounds = [lo] + [s for s in starts if lo < s < hi] + [hi]
        yield slice(lo, hi), Documents(documents.reset[:, lo:hi], (tuple(np.diff(bounds).tolist()),))


def clock_of(branch, x, documents):
    """(Clock, fire (1, L) bool: the token emits) of a branch over one row."""
    _, clock, _ = compress(x, branch.window_basis, branch.clock_weight, branch.clock_bias, documents.reset, branch.sampling,
                           branch.slots(documents))
    return clock, clock.newest.diff(prepend=torch.full((1, 1), -1)) > 0


@pytest.fixture(params=[(0.5, 1.0, 1.0, 5, 2), (0.25, 4.0, 1.0, 5, 2), (0.2, 16.0, 1.0, 4, 3), (0.3, 0.0, 1.5, 6, 1)])
def oracle_and_branch(request):
    rate, band, horizon, bases, taps = request.param
    oracle = serpent_oracle.Branch(d=6, rate=rate, band=band, horizon=horizon, n_bases=bases, decompress_taps=taps)
    config = SerpentConfig(band=band, horizon=horizon, n_bases=bases, decompress_taps=taps)
    branch = Branch(OracleMixer(oracle), 6, 6, rate, config).double()
    with torch.no_grad():
        for ours, theirs in (("clock_weight", "w_clock"), ("clock_bias", "b_clock"), ("window_basis", "c_in"),
                             ("readout_basis", "c_out")):
            getattr(branch, ours).copy_(torch.as_tensor(oracle.p[theirs]))
    return oracle, branch


def test_emissions_and_outputs_equal_the_oracle(oracle_and_branch):
    oracle, branch = oracle_and_branch
    x, documents = packed(LENGTHS, 6)
    parts = [serpent_oracle.forward(oracle, part.numpy()) for part in x[0].split(LENGTHS)]
    want = np.concatenate([z for z, _ in parts])
    fires = np.concatenate([fire + start for (_, fire), start in zip(parts, np.cumsum((0,) + LENGTHS))])
    _, emitted = clock_of(branch, x, documents)
    assert np.array_equal(emitted[0].numpy().nonzero()[0], fires)
    z, _ = branch(x, documents)
    assert np.abs(z[0].detach().numpy() - want).max() < 1e-9
    # token by token, and cut at document starts, beside them and in between
    for cuts in (range(sum(LENGTHS) + 1), (0, 100, 153, 170, 230), (0, 1, 152, 154, 229, 230)):
        state, zs = None, []
        for part, piece in pieces(documents, list(cuts)):
            y, state = branch(x[:, part], piece, state)
            zs.append(y)
        assert np.abs(torch.cat(zs, 1)[0].detach().numpy() - want).max() < 1e-9


@pytest.fixture
def mixer():
    torch.manual_seed(0)
    mixer = Serpent(32, SerpentConfig(band=2.0), Mamba, MambaConfig())
    for name, parameter in mixer.named_parameters():  # a clock that has learned something
        if "clock_weight" in name or "readout_basis" in name:
            nn.init.normal_(parameter, std=0.5)
    return mixer


def assert_causal_to_the_bit(mixer, d):
    x, documents = packed(LENGTHS, d)
    x = x.float()
    y, _ = mixer(x, documents)
    for t in (1, 7, 152, 153, 154, 171, 229):
        changed = x.clone()
        changed[:, t:] = 3 * torch.randn_like(changed[:, t:])
        assert torch.equal(mixer(changed, documents)[0][:, :t], y[:, :t])
    assert not torch.equal(mixer(changed, documents)[0], y)


def test_outputs_before_a_changed_token_do_not_move_by_a_bit(mixer):
    assert_causal_to_the_bit(mixer, 32)


@pytest.mark.parametrize("depth", [1, 2])
def test_branches_together_give_what_they_give_one_by_one(depth):
    torch.manual_seed(0)
    mixer = Serpent(24, SerpentConfig(band=2.0, depth=depth, rates=[0.5, 1.0, 0.25]), Mamba, MambaConfig(d_state=4)).double()
    x, documents = packed(LENGTHS, 24)
    x.requires_grad_()
    leaves, heard, found = [x, *mixer.parameters()], [], []
    for _ in range(2):
        y, state = mixer(x, documents)
        found.append([y, *tree_leaves(state), *torch.autograd.grad(y.sin().sum(), leaves)])
        mixer.branches[0].register_forward_hook(lambda *_: heard.append(1))  # who listens to a part makes them run one by one
    assert heard
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_packed_document_gives_what_it_gives_alone(mixer):
    mixer.double()
    x, documents = packed(LENGTHS, 32)
    together = mixer(x, documents)[0][0].split(LENGTHS)
    for part, got in zip(x[0].split(LENGTHS), together):
        alone, _ = mixer(part[None], Documents.whole(1, len(part)))
        torch.testing.assert_close(got, alone[0], rtol=1e-9, atol=1e-10)


def test_rows_of_a_batch_do_not_touch(mixer):
    mixer.double()
    rows = [packed(lengths, 32, seed) for seed, lengths in enumerate([(40, 60), (100,), (1, 99)])]
    batch = Documents(torch.cat([d.reset for _, d in rows]), sum((d.lengths for _, d in rows), ()))
    together, _ = mixer(torch.cat([x for x, _ in rows]), batch)
    for got, (x, documents) in zip(together, rows):
        torch.testing.assert_close(got, mixer(x, documents)[0][0], rtol=1e-9, atol=1e-10)


def test_capacity_holds_for_any_clock_and_is_known_from_the_lengths():
    config = SerpentConfig(band=1.0)
    for seed in range(20):
        torch.manual_seed(seed)
        branch = Branch(nn.Identity(), 4, 4, 0.25, config)
        nn.init.normal_(branch.clock_weight, std=20.0)  # saturated: runs of the largest and of the smallest interval
        x, documents = packed((90, 3, 1, 30), 4, seed)
        clock, fire = clock_of(branch, x.float().cumsum(1), documents)
        slots = clock.live.shape[1]
        assert slots == documents.capacity(branch.sampling.rate, branch.sampling.band, TICKS)
        assert int(fire.sum()) == int(clock.live.sum()) == int(clock.n_live) <= slots  # every emission has a slot
        assert torch.equal(clock.emitter[clock.live], fire[0].nonzero()[:, 0])
        assert fire[0, [0, 90, 93, 94]].all()  # the first token of a document always emits
        steps = clock.steps[0].double() / TICKS
        assert steps.min() >= branch.sampling.low - 1e-6 and steps.max() <= branch.sampling.high + 1e-6


def test_compressed_states_equal_a_full_length_scan_that_skips_silent_tokens(mixer):
    mixer.double()
    branch = mixer.branches[1]
    x, documents = packed((120,), 32)
    e, fire = clock_of(branch, x, documents)
    seen = {}
    hook = branch.inner.register_forward_hook(lambda module, args, out: seen.update(x=args[0], state=out[1]))
    branch(x, documents)
    hook.remove()
    # lay the compressed inputs out at the tokens that emitted; everywhere else dt is 0
    inner, live = branch.inner, e.live[0]
    full = torch.zeros_like(x)
    full[0, e.emitter[0][live]] = seen["x"][0][live]
    u, z = inner.in_proj(seen["x"][:, : int(live.sum())]).chunk(2, -1)
    u, _ = causal_conv1d(u, inner.conv_weight, inner.conv_bias)
    spread = [torch.zeros(1, 120, v.shape[-1], dtype=v.dtype) for v in (u, z)]
    for v, s in zip((u, z), spread):
        s[0, e.emitter[0][live]] = v[0]
    dt, B, C = inner.x_proj(spread[0]).split([inner.rank, inner.d_state, inner.d_state], -1)
    _, state = selective_scan_reference(
        spread[0], inner.dt_proj(dt), -inner.A_log.exp(), B, C, inner.D, spread[1], inner.dt_bias, live=fire
    )
    torch.testing.assert_close(seen["state"].ssm, state, rtol=1e-9, atol=1e-12)


def lags_moved_by(sampling, clock, fire, shift):
    """(lags of the window, phase since the newest emission) with every token's step moved by `shift` (L,) grid steps, who
    emits and each emission's phase as they were: a loop over tokens and taps."""
    steps = clock.steps[0].double() / TICKS + shift
    phase = clock.phase[0].detach()
    lags = torch.zeros(*clock.emitter.shape, sampling.window_taps + 1, dtype=torch.float64)
    for j, t in enumerate(clock.emitter[0].tolist()):
        lags[0, j] = lag = -phase[t]
        for k in range(int(clock.reach[0, t])):
            lags[0, j, k + 1 :] = lag = lag + steps[t - k]
    since, last = torch.zeros_like(phase), 0.0
    for t in range(len(phase)):
        last = since[t] = phase[t] if fire[0, t] else last + steps[t]
    return lags, since[None]


def test_gradients_of_the_intervals_match_finite_differences(monkeypatch):
    torch.manual_seed(3)
    branch = Branch(Mamba(6, 8, 6, MambaConfig(d_state=4)), 6, 6, 0.3, SerpentConfig(band=64.0)).double()
    nn.init.normal_(branch.clock_weight, std=0.3), nn.init.normal_(branch.readout_basis, std=0.3)
    x, documents = packed((40, 23), 6)
    direction, probe = torch.randn(1, 63, 6, dtype=torch.float64), torch.randn(63, dtype=torch.float64)
    s = branch.sampling
    interval = reference.intervals(x, branch.clock_weight, branch.clock_bias, s).detach().requires_grad_()
    monkeypatch.setattr(reference, "intervals", lambda *_: interval)
    (branch(x, documents)[0] * direction).sum().backward()
    clock, fire = clock_of(branch, x, documents)

    def loss(shift):
        lags, since = lags_moved_by(s, clock, fire, shift)
        mass = reference.gaussian_mass(lags, len(branch.window_basis), s.window_width, s.horizon)
        halo = x.new_zeros(1, s.window_taps - 1, 6)
        xt = reference.window(x, halo, clock.emitter, mass, branch.window_basis) * clock.live[..., None]
        y, _ = branch.inner(xt, Documents(documents.reset.gather(1, clock.emitter) & clock.live, live=clock.live))
        z, _ = reference.decompress(y, branch.readout_basis, clock._replace(phase=since), s)
        return (z * direction).sum().item()

    numeric = (loss(1e-6 * probe) - loss(-1e-6 * probe)) / 2e-6
    assert abs(float(interval.grad[0] @ probe) - numeric) < 1e-6 * max(1.0, abs(numeric))
    assert abs(numeric) > 1e-3


def test_the_clock_starts_uniform_and_the_window_as_half_the_mean():
    branch = Branch(nn.Identity(), 8, 8, 0.25, SerpentConfig())
    x, documents = packed((64,), 8)
    fire = clock_of(branch, x.float(), documents)[1][0]
    assert fire.nonzero()[:, 0].tolist() == list(range(0, 64, 4))
    s = torch.linspace(0, 1, 50, dtype=torch.float64)[:, None]
    centres = torch.linspace(0, 1, 6, dtype=torch.float64)
    density = torch.exp(-0.5 * ((s - centres) / branch.sampling.window_width) ** 2) @ branch.window_basis[:, 0].double()
    assert (density - 0.5).abs().max() < 0.05


def test_rate_one_alone_is_exactly_the_inner_mixer():
    torch.manual_seed(0)
    config, mamba = SerpentConfig(rates=[1.0]), MambaConfig()
    mixer = Serpent(32, config, Mamba, mamba)
    assert mixer.branches[0].d_inner == 64
    x, documents = packed((50,), 32)
    assert torch.equal(mixer(x.float(), documents)[0], mixer.branches[0](x.float(), documents)[0])


@pytest.mark.parametrize("join", ["add", "project"])
@pytest.mark.parametrize("d_model", [64, 128, 512, 768, 1024, 2048])
def test_a_layer_has_as_many_parameters_as_a_mamba_layer(d_model, join):
    config, mamba = SerpentConfig(join=join), MambaConfig()
    inners, outs = branch_widths(d_model, config, Mamba, mamba)
    ours = parameter_count(d_model, inners, outs, config, Mamba, mamba)
    plain = Mamba.parameter_count(d_model, 2 * d_model, d_model, mamba)
    assert outs == [d_model] * 3 if join == "add" else sum(outs) == d_model
    assert abs(ours / plain - 1) < 0.01
    if d_model <= 128:
        with torch.device("meta"):
            assert sum(p.numel() for p in Serpent(d_model, config, Mamba, mamba).parameters()) == ours
            assert sum(p.numel() for p in Mamba(d_model, 2 * d_model, d_model, mamba).parameters()) == plain


def test_frozen_clock_is_uniform_and_has_no_parameters():
    branch = Branch(nn.Identity(), 8, 8, 1 / 3, SerpentConfig(clock="uniform"))
    assert not any("clock" in name for name, _ in branch.named_parameters())
    x, documents = packed((60,), 8)
    fire = clock_of(branch, x, documents)[1][0].nonzero()[:, 0]
    assert math.isclose(len(fire), 20, abs_tol=1) and set(np.diff(fire.numpy())) <= {2, 3, 4}
