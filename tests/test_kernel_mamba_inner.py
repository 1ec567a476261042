"""The fused inside of a Mamba layer against its composition of plain operations: outputs, states and every gradient."""
import pytest
import torch
from numerics import DEVICE, assert_near, gradients

from serpent_scale.config import MambaConfig
from serpent_scale.kernels.mamba_inner import mamba_inner, reference
from serpent_scale.kernels.mamba_inner import triton as fused
from serpent_scale.kernels.selective_scan import launches
from serpent_scale.model.documents import Documents
from serpent_scale.model.mamba import Mamba, dt_rank

NAMES = ("y", "halo out", "final state", "xz", "conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A_log", "D", "halo",
         "initial state")  # fmt: skip
pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(batch, length, d_inner, d_state=16, rank=3, dtype=torch.float32):
    """Values that `dtype` holds exactly: xz and the weights of the two products; the rest in float32."""
    xz = torch.randn(batch, length, 2 * d_inner).to(dtype)
    x_proj, dt_proj = torch.randn(rank + 2 * d_state, d_inner) / d_inner**0.5, torch.randn(d_inner, rank) / rank**0.5
    return [
        xz, torch.randn(d_inner, 4) / 2, torch.randn(d_inner) / 2, x_proj.to(dtype).float(), dt_proj.to(dtype).float(),
        torch.randn(d_inner) - 2, torch.randn(d_inner, d_state), torch.randn(d_inner), torch.randn(batch, 3, d_inner).to(dtype),
        torch.randn(batch, d_inner, d_state),
    ]  # fmt: skip


def packed(batch, length, live=False):
    reset = torch.rand(batch, length) < 0.15
    in_use = torch.arange(length) < torch.randint(1, length + 1, (batch, 1)) if live else None
    return Documents(reset, live=in_use)


def flags_of(documents, device=DEVICE):
    if documents is None:
        return (None,) * 4
    flags = documents.since_reset, documents.n_live, documents.reset, documents.live
    return [None if f is None else f.to(device) for f in flags]


def run(op, values, documents=None, use_state=True):
    """Outputs, then the gradients of a projection of them in every float input."""
    leaves = [v.requires_grad_() for v in values][: None if use_state else 8]
    state = leaves[8:] if use_state else (None, None)
    device = leaves[0].device
    y, halo, final = op(*leaves[:8], *flags_of(documents, device), *state)
    if documents is not None and documents.live is not None:  # outputs at slots not in use mean nothing
        y = y * documents.live.to(device)[..., None]
    outputs = (y, halo, final)
    return *outputs, *gradients(outputs, leaves)


def compare(values, bound, documents=None, use_state=True):
    got = run(fused.mamba_inner, [v.detach().clone().to(DEVICE) for v in values], documents, use_state)
    want = run(reference.mamba_inner, [v.double() for v in values], documents, use_state)
    assert_near(NAMES[: len(got)], got, want, bound)
    assert all(g.dtype == v.dtype for g, v in zip(got[3:], values))


@pytest.mark.parametrize("batch, length, d_inner, use_state", [(1, 1, 8, False), (1, 1, 8, True), (2, 45, 24, True)])
def test_outputs_states_and_gradients(batch, length, d_inner, use_state):
    compare(inputs(batch, length, d_inner), 5e-6, use_state=use_state)


def test_documents_and_unused_slots():
    compare(inputs(2, 45, 24), 5e-6, packed(2, 45, True))


def test_bfloat16():
    bound = 1.5e-2 if DEVICE == "cuda" else 4e-2  # the interpreter rounds to bfloat16 towards zero
    compare(inputs(2, 45, 24, dtype=torch.bfloat16), bound, packed(2, 45, True))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 5e-6), (torch.bfloat16, 1.5e-2 if DEVICE == "cuda" else 4e-2)])
def test_several_together(dtype, bound, monkeypatch):
    """Of other lengths, widths and flags each, some of them without states before, some cut into segments."""
    monkeypatch.setattr(launches, "_size", lambda length, wanted: (-(-length // 32), 32))
    cases = [(inputs(1, 45, 24, dtype=dtype), packed(1, 45), False), (inputs(1, 20, 40, dtype=dtype), None, False),
             (inputs(2, 33, 16, rank=2, dtype=dtype), packed(2, 33, True), True)]  # fmt: skip
    together = [[v.detach().clone().to(DEVICE) for v in values] for values, _, _ in cases]

    leaves = [v.requires_grad_() for values in together for v in values]
    calls = [(*values[:8], *flags_of(documents), *(values[8:] if state else (None, None)))
             for values, (_, documents, state) in zip(together, cases)]  # fmt: skip
    outputs = [out for outs in fused.mamba_inner_together(calls) for out in outs]
    outputs[6] = outputs[6] * cases[2][1].live.to(DEVICE)[..., None]
    got = gradients(outputs, leaves)
    exact = [[v.double().requires_grad_() for v in values] for values, _, _ in cases]
    wanted = []
    for values, (_, documents, state) in zip(exact, cases):
        wanted += reference.mamba_inner(*values[:8], *flags_of(documents, "cpu"), *(values[8:] if state else (None, None)))
    wanted[6] = wanted[6] * cases[2][1].live[..., None]
    assert_near(NAMES[:3] * 3, outputs, wanted, bound)
    assert_near(NAMES[3:] * 3, got, gradients(wanted, [v for values in exact for v in values]), bound)


def test_only_what_it_promises_is_kept():
    values = [v.to(DEVICE).requires_grad_() for v in inputs(2, 64, 24, rank=dt_rank(24, MambaConfig()))]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused.mamba_inner(*values[:8])
    kept = [t for t in kept if t.dim() > 2]
    assert {tuple(t.shape) for t in kept} == {(2, 64, 48), (2, 64, 33), (2, 64, 24), (2, 2, 24, 16)}  # xz, dt B C, y, states
    assert sum(t.nbytes for t in kept) == 2 * 64 * Mamba.kept_bytes(24, MambaConfig(), 4)  # what plans count with


def test_no_gradients_wanted_gives_the_same():
    values = [v.to(DEVICE) for v in inputs(1, 20, 8)]
    y, halo, state = fused.mamba_inner(*values[:8])
    with torch.no_grad():
        assert all(map(torch.equal, fused.mamba_inner(*values[:8]), (y, halo, state)))


def test_repeatable_to_the_bit():
    values, documents = [v.to(DEVICE) for v in inputs(1, 33, 24, dtype=torch.bfloat16)], packed(1, 33)
    once, again = (run(fused.mamba_inner, [v.detach().clone() for v in values], documents) for _ in range(2))
    assert all(map(torch.equal, once, again))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("batch, length, d_inner, rank", [(2, 1021, 256, 16), (1, 700, 1000, 32)])
def test_larger_on_the_gpu(batch, length, d_inner, rank, dtype, bound):
    compare(inputs(batch, length, d_inner, 16, rank, dtype), bound, packed(batch, length))


def test_the_chooser_takes_the_reference_for_float64():
    values = [v.double().to(DEVICE) for v in inputs(1, 9, 8)]
    assert all(map(torch.equal, mamba_inner(*values[:8]), reference.mamba_inner(*values[:8])))
