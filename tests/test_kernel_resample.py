"""SeRpEnt's resampling in Triton against the float64 reference: emissions, outputs and every gradient."""
import math

import pytest
import torch
from numerics import DEVICE, assert_near, gradients, relative_error

pytest.importorskip("triton")
from serpent_scale.kernels.resample import TICKS, Carry, Clock, Sampling, reference  # noqa: E402
from serpent_scale.kernels.resample import triton as kernels  # noqa: E402
from serpent_scale.kernels.resample import triton_clock  # noqa: E402
from serpent_scale.model.documents import Documents  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")


def sampling_of(rate, spread=2.0, band=2.0, horizon=1.0, taps=2, bases=6):
    low = rate / spread
    return Sampling(
        round(rate * TICKS), round(band * TICKS), low, min(1.0, rate * spread), horizon, math.ceil(horizon / low) + 1,
        horizon / (bases - 1), taps, taps / (bases - 1),
    )


def case(rows, d, s, learn=True, carry=False, dtype=torch.float32, seed=0):
    """Inputs of compress and decompress over rows of documents: (tensors by name, reset, slots, Carry of integers)."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    batch, length, bases = len(rows), sum(rows[0]), round(s.horizon / s.window_width) + 1
    reset = torch.zeros(batch, length, dtype=torch.bool)
    for b, row in enumerate(rows):
        starts = torch.tensor((0,) + row[:-1]).cumsum(0)
        reset[b, starts[1:] if carry else starts] = True
    slots = Documents(reset, rows).capacity(s.rate, s.band, TICKS)
    t = dict(
        u=draw(batch, length, d), window=draw(bases, d), readout=draw(bases, d), weight=2 * draw(d) / d**0.5, bias=0.3 * draw(1),
        tokens=draw(batch, s.window_taps - 1, d), tail=draw(batch, s.readout_taps, d),
    )
    t = {k: v.to(DEVICE, dtype if k in ("u", "tokens", "tail") else torch.float32) for k, v in t.items()}
    if not learn:
        t["weight"] = t["bias"] = None
    if not carry:
        t["tokens"] = t["tail"] = None
    steps = torch.randint(round(s.low * TICKS), round(s.high * TICKS), (batch, s.window_taps - 1), generator=generator)
    dev = torch.randint(-s.band, s.band + 1, (batch,), generator=generator)
    position = torch.randint(1, 2 * s.window_taps, (batch,), generator=generator) + (1 << 36) * (torch.arange(batch) % 2)
    return t, reset.to(DEVICE), slots, [v.to(DEVICE) for v in (dev, position, steps)]


def run(implementation, t, reset, slots, carried, s, interval=None):
    """Compress, a mixer that only scales, decompress: (x, z, tail, tokens handed on), clock, carry."""
    carry = None if t["tokens"] is None else Carry(carried[0], carried[1], t["tokens"], carried[2])
    x, clock, carry = implementation.compress(t["u"], t["window"], t["weight"], t["bias"], reset, s, slots, carry)
    scale = torch.linspace(0.5, 1.5, x.shape[1], device=x.device)[:, None]
    z, tail = implementation.decompress((x * scale).to(x.dtype), t["readout"], clock, s, t["tail"])
    return (x, z, tail, carry.tokens), clock, carry


def both(args, s, monkeypatch):
    """Outputs and gradients of the kernels and of the reference in float64, on the clock that the kernels saw: emissions are
    decided in float32, and a gate rounded otherwise may move one."""
    t, reset, slots, carried = args
    leaves = {k: v for k, v in t.items() if v is not None}
    got_in = {k: v.detach().clone().requires_grad_() for k, v in leaves.items()}
    outputs, clock, carry = run(kernels, {**t, **got_in}, reset, slots, carried, s)
    got = [*outputs, *gradients(outputs, list(got_in.values()))]

    want_in = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
    exact = reference.intervals
    if t["weight"] is not None:
        asked = triton_clock.run_clock(t["u"], t["weight"], t["bias"], reset, s, slots, None)[3].double() / TICKS
        monkeypatch.setattr(reference, "intervals", lambda *a: (v := exact(*a)) - v.detach() + asked)
    outputs, want_clock, want_carry = run(reference, {**t, **want_in}, reset, slots, carried, s)
    monkeypatch.undo()
    want = [*outputs, *gradients(outputs, list(want_in.values()))]
    names = ["x", "z", "tail", "tokens", *(f"grad {k}" for k in leaves)]
    if "bias" in leaves:  # one number, a sum that cancels: judged together with the weight
        at = names.index("grad bias")
        for values in (got, want):
            values[at - 1] = torch.cat([values[at - 1], values.pop(at)])
        names.pop(at)
    return names, got, want, (clock, carry), (want_clock, want_carry)


CASES = {
    "rate 1/2": dict(rows=((19, 1, 8), (28,)), d=24, s=dict(rate=0.5, bases=4)),
    "rate 1/4, odd width": dict(rows=((30, 3),), d=21, s=dict(rate=0.25, bases=3)),
    "carried": dict(rows=((9, 12), (1, 20)), d=16, s=dict(rate=0.3, taps=3, bases=3), carry=True),
    "frozen": dict(rows=((20, 9),), d=8, s=dict(rate=1 / 3, bases=2), learn=False),
    "tight band, short horizon": dict(rows=((45,),), d=8, s=dict(rate=0.25, band=0.3, horizon=0.4, bases=3)),
    "long horizon, one read-out tap": dict(rows=((7, 23),), d=8, s=dict(rate=0.4, horizon=2.5, taps=1, bases=3)),
    "one token": dict(rows=((1,), (1,)), d=8, s=dict(rate=0.25, taps=2, bases=3), carry=True),
}


@pytest.mark.parametrize("name, dtype, bound", [(n, torch.float32, 5e-6) for n in CASES] + [
    (n, torch.bfloat16, 1e-2) for n in ("rate 1/4, odd width", "carried")
])
def test_outputs_and_gradients_equal_the_reference(name, dtype, bound, monkeypatch):
    c = dict(CASES[name])
    s = sampling_of(**c.pop("s"))
    names, got, want, (clock, carry), (want_clock, want_carry) = both(case(s=s, dtype=dtype, **c), s, monkeypatch)
    for field in Clock._fields:
        g, w = getattr(clock, field), getattr(want_clock, field)
        if field == "since_reset":
            g, w = g[clock.live], w[clock.live]
        assert torch.equal(g.double(), w.double()), field
    for field in ("dev", "position", "steps"):
        assert torch.equal(getattr(carry, field).long(), getattr(want_carry, field).long()), field
    assert not got[0][~clock.live].any()
    assert_near(names, got, want, bound)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="large")
@pytest.mark.parametrize("rate, d, length, dtype, bound", [
    (0.5, 1024, 2048, torch.float32, 5e-6), (0.25, 1000, 4097, torch.bfloat16, 1e-2), (0.25, 333, 40_001, torch.float32, 5e-6),
])
def test_outputs_and_gradients_equal_the_reference_at_size(rate, d, length, dtype, bound, monkeypatch):
    s = sampling_of(rate, band=8.0)
    args = case(((length - 700, 1, 699),) * 2, d, s, dtype=dtype)
    names, got, want, (clock, _), (want_clock, _) = both(args, s, monkeypatch)
    for field in ("emitter", "newest", "phase", "cut"):
        assert torch.equal(getattr(clock, field).double(), getattr(want_clock, field).double())
    assert_near(names, got, want, bound)


def test_results_repeat_to_the_bit_and_do_not_depend_on_strides():
    s = sampling_of(0.5, bases=3)
    t, reset, slots, carried = case(((20, 13),), 16, s)
    results = []
    for strided in (False, False, True):
        wide = torch.zeros(1, 40, 40, device=DEVICE)
        u = wide[:, 3:36, 8:24].copy_(t["u"]) if strided else t["u"].clone()
        names = ("window", "readout", "weight", "bias")
        leaves = [u.detach().requires_grad_(), *(t[k].clone().requires_grad_() for k in names)]
        outputs, _, _ = run(kernels, {**t, **dict(zip(("u", *names), leaves))}, reset, slots, carried, s)
        z = outputs[1]
        grad = torch.sin(torch.arange(z.numel(), device=DEVICE).float()).view_as(z)
        if strided:  # what the gradient of a concatenation hands on
            grad = torch.cat([grad, grad], -1)[..., 16:]
        results.append([*outputs, *torch.autograd.grad(z, leaves, grad)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_outputs_go_into_given_buffers():
    s = sampling_of(0.5, bases=2)
    t, reset, slots, _ = case(((25,),), 16, s)
    x, clock, _, _, saved = kernels.compress_forward(t["u"], t["window"], t["weight"], t["bias"], reset, s, slots)
    z, _ = kernels.decompress_forward(x, t["readout"], clock, s)
    wide = torch.zeros(1, 25, 48, device=DEVICE)
    kernels.decompress_forward(x, t["readout"], clock, s, out=wide[..., 16:32])
    assert torch.equal(wide[..., 16:32], z) and not wide[..., :16].any() and not wide[..., 32:].any()
    args = (torch.ones_like(x), None, t["u"], None, t["window"], t["weight"], saved, s)
    grad_u = kernels.compress_backward(*args)[0]
    kernels.compress_backward(*args, out=wide[..., 16:32])
    assert torch.equal(wide[..., 16:32], grad_u)


def test_what_others_ask_of_u_is_added():
    s = sampling_of(0.5, bases=2)
    t, reset, slots, _ = case(((25,), (25,)), 16, s)
    u, asked = t["u"].requires_grad_(), torch.randn(2, 25, 32, device=DEVICE)[..., 3:19]
    x, _, _, through = kernels.compress_beside(u, t["window"], t["weight"], t["bias"], reset, s, slots)
    alone, = torch.autograd.grad(x.sin().sum(), u, retain_graph=True)
    added, = torch.autograd.grad(x.sin().sum() + (through * asked).sum(), u, retain_graph=True)
    assert torch.equal(through, u) and relative_error(added, alone + asked) < 1e-6
    assert torch.equal(torch.autograd.grad((through * asked).sum(), u)[0], asked)


def test_nothing_before_a_changed_token_moves_by_a_bit():
    s = sampling_of(0.5, bases=2)
    t, reset, slots, carried = case(((22, 11),), 8, s)
    (_, z, _, _), clock, _ = run(kernels, t, reset, slots, carried, s)
    for at in (1, 21, 22, 30):
        changed = {**t, "u": torch.cat([t["u"][:, :at], 3 * torch.randn_like(t["u"][:, at:])], 1)}
        (_, z2, _, _), clock2, _ = run(kernels, changed, reset, slots, carried, s)
        assert torch.equal(z2[:, :at], z[:, :at])
        for field in ("newest", "phase", "steps", "cut"):
            assert torch.equal(getattr(clock2, field)[:, :at], getattr(clock, field)[:, :at])


def test_a_row_cut_in_pieces_emits_the_same_to_the_bit():
    s = sampling_of(0.4, bases=2)
    t, reset, slots, _ = case(((9, 10),), 40, s)
    (_, z, _, _), whole, last = run(kernels, t, reset, slots, None, s)
    for cuts in ((0, 7, 9, 19), range(20)):
        carry, tail, zs, newest, phases = None, None, [], [], []
        for lo, hi in zip(cuts, cuts[1:]):
            room = min(hi - lo, 2 * (hi - lo + 2 * s.band // TICKS) + 2)
            x, clock, carry = kernels.compress(
                t["u"][:, lo:hi], t["window"], t["weight"], t["bias"], reset[:, lo:hi], s, room, carry
            )
            scale = torch.linspace(0.5, 1.5, slots, device=DEVICE)[sum(newest) : sum(newest) + room, None]
            y = x * torch.nn.functional.pad(scale, (0, 0, 0, room - len(scale)))
            piece, tail = kernels.decompress(y, t["readout"], clock, s, tail)
            zs.append(piece), newest.append(int(clock.n_live)), phases.append(clock.phase)
        assert torch.equal(torch.cat(phases, 1), whole.phase) and sum(newest) == int(whole.n_live)
        assert torch.equal(carry.dev, last.dev) and torch.equal(carry.position, last.position)
        assert torch.equal(carry.tokens, last.tokens) and torch.equal(carry.steps, last.steps)
        assert relative_error(torch.cat(zs, 1), z) < 1e-6


def test_a_clock_split_into_segments_is_the_same(monkeypatch):
    s = sampling_of(0.5, band=0.7, bases=2)
    t, reset, slots, (dev, position, steps) = case(((50, 3, 32), (85,)), 8, s, carry=True)
    args = (t["u"], 6 * t["weight"], t["bias"], reset, s, slots, Carry(dev, position, t["tokens"], steps))
    one, *after = triton_clock.run_clock(*args)
    monkeypatch.setattr(triton_clock, "CLOCK_BLOCK", 16), monkeypatch.setattr(triton_clock, "SEGMENT", 32)
    split, *after_split = triton_clock.run_clock(*args)
    used = torch.arange(slots, device=DEVICE) < one.n_live[:, None]
    assert one.cut.max() > 0 and torch.equal(one.n_live, split.n_live)
    assert all(torch.equal(getattr(one, f), getattr(split, f)) for f in ("newest", "reach", "count", "phase", "steps", "cut"))
    assert all(torch.equal(getattr(one, f)[used], getattr(split, f)[used]) for f in ("emitter", "since_reset"))
    assert all(torch.equal(a, b) for a, b in zip(after[:3], after_split[:3]))


def test_inputs_that_are_not_finite_keep_the_clock_in_bounds():
    s = sampling_of(0.5, bases=2)
    t, reset, slots, carried = case(((30,),), 8, s)
    t["u"][0, 11], t["u"][0, 20, 0] = torch.nan, torch.inf
    (x, _, _, _), clock, _ = run(kernels, t, reset, slots, carried, s)
    before = clock.emitter < 11
    assert int(clock.n_live) <= slots and x[clock.live & before].isfinite().all() and not x[clock.live].isfinite().all()
