"""The GPU's selective scan against the sequential float64 reference: outputs, states and every gradient."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics import DEVICE, assert_near, gradients

from serpent_scale.kernels.selective_scan import launches
from serpent_scale.kernels.selective_scan import triton as scan
from serpent_scale.kernels.selective_scan.reference import selective_scan_reference

NAMES = ("y", "final_state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
CUDA = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")


@pytest.fixture(params=["plain", pytest.param("gluon", marks=[CUDA, pytest.mark.gpu])])
def kernels(request, monkeypatch, poisoned):
    if request.param == "plain":
        monkeypatch.setattr(launches, "kernels_for", lambda device, d_state: launches.PlainKernels(d_state))


def inputs(batch, length, d_inner, d_state, dtype=torch.float32, strided=False):
    """Leaves (float64 values that `dtype` holds exactly): x, dt, A, B, C, D, z, dt_bias, initial state."""
    shapes = [(batch, length, d_inner)] * 2 + [(batch, length, d_state)] * 2 + [(batch, length, d_inner)]
    x, dt, B, C, z = (torch.randn(s).to(dtype) for s in shapes)
    dt = (dt * 1.5 - 1).to(dtype)
    A, D, bias = -torch.rand(d_inner, d_state) * 8 - 0.01, torch.randn(d_inner), torch.randn(d_inner) * 0.5
    return [x, dt, A, B, C, D, z, bias, torch.randn(batch, d_inner, d_state)]


def compare(values, bound, reset=None, live=None, use_state=True, views=False, odd=0):
    """views: inputs are halves of a wider tensor, as the layer's projections are; odd: behind so many other columns."""
    leaves = [v.to(DEVICE).requires_grad_() for v in values]
    used = list(leaves)
    if views:
        used = [
            torch.cat([v[..., :odd], v, v], -1)[..., odd : odd + v.shape[-1]] if v.dim() == 3 and i < 7 else v
            for i, v in enumerate(leaves)
        ]
    flags = [None if f is None else f.to(DEVICE) for f in (reset, live)]
    got = scan.selective_scan(*used[:8], *flags, used[8] if use_state else None)
    got = (*got, *gradients(got, leaves if use_state else leaves[:8]))
    exact = [v.double().requires_grad_() for v in values]
    want = selective_scan_reference(*exact[:8], reset, live, exact[8] if use_state else None)
    want = (*want, *gradients(want, exact if use_state else exact[:8]))
    assert_near(NAMES[: len(got)], got, want, bound)


@pytest.mark.parametrize("length, d_inner, d_state", [(1, 8, 16), (37, 40, 16), (70, 33, 8), (32, 16, 8), (64, 32, 16)])
def test_outputs_states_and_gradients(kernels, length, d_inner, d_state):
    compare(inputs(2, length, d_inner, d_state), 3e-6)


def test_documents_unused_slots_and_views(kernels):
    reset = torch.rand(2, 75) < 0.1
    live = torch.arange(75) < torch.tensor([[75], [41]])
    compare(inputs(2, 75, 24, 16), 3e-6, reset, live, views=True)
    compare(inputs(2, 20, 24, 16), 3e-6, reset[:, :20], live[:, 21:41], use_state=False)


@pytest.mark.parametrize("length, d_inner, rank, documents, segments", [
    (19, 8, 64, True, None), (70, 8, 32, True, (2, 64)),
    *(pytest.param(*values, marks=[CUDA, pytest.mark.gpu]) for values in (
        (64, 32, 32, False, None), (150, 24, 64, True, (3, 64)), (70, 24, 7, False, None), (96, 64, 128, True, None),
    )),
])  # fmt: skip
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-6), (torch.bfloat16, 1e-2 if DEVICE == "cuda" else 2.5e-2)])
def test_dt_as_two_factors(kernels, length, d_inner, rank, documents, segments, dtype, bound, monkeypatch):
    if segments:
        monkeypatch.setattr(launches, "segments_of", lambda batch, length, programs, device: segments)
    x, _, A, B, C, D, z, bias, state = inputs(2, length, d_inner, 16, dtype)
    rows, matrix = torch.randn(2, length, rank).to(dtype), (torch.randn(d_inner, rank) / rank**0.5).to(dtype)
    beside = torch.cat([rows, B, C], -1).to(DEVICE)  # as x_proj's output
    rows_, B_, C_ = beside.split([rank, 16, 16], -1)
    reset = torch.rand(2, length) < 0.1 if documents else None
    x_, A_, D_, z_, bias_, state_ = (v.to(DEVICE) for v in (x, A, D, z, bias, state))
    arguments = x_, (rows_, matrix.to(DEVICE)), A_, B_, C_, D_, z_, bias_, reset if reset is None else reset.to(DEVICE), None
    y, final, kept = scan.forward(*arguments, state_)
    grad_y, grad_final = torch.randn_like(y), torch.randn_like(final)
    found = scan.backward(grad_y, grad_final, *arguments, kept, y)
    steps = rows.double() @ matrix.double().t()
    exact = [v.double().requires_grad_() for v in (x, steps, A, B, C, D, z, bias, state)]
    want = selective_scan_reference(*exact[:8], reset, None, exact[8])
    grads = torch.autograd.grad(want, exact, (grad_y.double().cpu(), grad_final.double().cpu()))
    names = (*NAMES[2:-1], "initial_state")
    assert_near(NAMES, (y, final, *(found[name] for name in names)), (*want, *grads), bound)
    if segments:
        passed = scan.segment_states(x_, arguments[1], A_, B_, bias_, *arguments[8:])
        again, _, _ = scan.forward(*arguments, state_, passed)
        assert torch.equal(y, again)


def test_segments_give_what_one_pass_gives(kernels, monkeypatch):
    values, reset = inputs(1, 150, 24, 16), torch.arange(150)[None] == 100
    monkeypatch.setattr(launches, "segments_of", lambda batch, length, programs, device: (3, 64))
    compare(values, 3e-6, reset)


@pytest.mark.parametrize("length, d_inner, d_state, views", [(61, 24, 16, False), (64, 32, 16, False), (64, 16, 8, True)])
def test_bfloat16(kernels, length, d_inner, d_state, views):
    values = inputs(1, length, d_inner, d_state, torch.bfloat16)
    compare(values, 1.2e-2, views=views)  # the interpreter rounds to bfloat16 towards zero


def test_bfloat16_at_odd_addresses(kernels):
    values = inputs(2, 32, 16, 16, torch.bfloat16)
    compare(values, 1.2e-2, views=True, odd=1)


def test_a_gate_of_zero_passes_its_gradient(kernels):
    values = inputs(1, 20, 8, 16)
    values[6][:, ::3] = 0.0
    compare(values, 3e-6)


def test_causal_and_repeatable_to_the_bit(kernels, monkeypatch):
    monkeypatch.setattr(launches, "segments_of", lambda batch, length, programs, device: (2, 64))
    values = [v.to(DEVICE) for v in inputs(1, 100, 16, 16)]
    y, _ = scan.selective_scan(*values[:8], initial_state=values[8])
    for t in (33, 64, 90):
        changed = [torch.cat([v[:, :t], torch.randn_like(v[:, t:])], 1) if v.dim() == 3 and i < 7 else v for i, v in enumerate(values)]
        again, _ = scan.selective_scan(*changed[:8], initial_state=values[8])
        assert torch.equal(again[:, :t], y[:, :t])
    twice = []
    for _ in range(2):
        leaves = [v.clone().requires_grad_() for v in values]
        twice.append(gradients(scan.selective_scan(*leaves[:8], initial_state=leaves[8]), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*twice))


@CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("batch, length, d_inner", [(1, 4000, 256), (3, 1021, 1000)])
def test_larger_on_the_gpu(kernels, batch, length, d_inner, dtype, bound):
    reset = torch.rand(batch, length) < 0.003
    compare(inputs(batch, length, d_inner, 16, dtype), bound, reset)


def test_the_plain_kernels_compile_for_a_gpu():
    """The interpreter takes what the compiler refuses: a name of another type in each branch, say."""
    script, variables = Path(__file__).with_name("compile_scan.py"), {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, script], env=variables, capture_output=True, text=True)
    assert found.stdout.split() == ["_scan_add_parts", "scan_backward", "scan_forward", "scan_gradient_state"], found.stderr[-2000:]
