"""The Triton RMSNorm against the reference in float64, and the reference against torch: outputs and every gradient."""
import pytest
import torch
import torch.nn.functional as F

from numerics import DEVICE, assert_near, gradients
from serpent_scale.kernels.rms_norm import reference
from serpent_scale.kernels.rms_norm import rms_norm as chosen
from serpent_scale.kernels.rms_norm import triton as kernel

EPS = 1e-5
BOUNDS = {torch.float32: 5e-6, torch.bfloat16: 1e-2}
gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="too large for the interpreter")]


def case(shape, dtype=torch.float32, residual=True):
    x, weight, before = [torch.randn(s, device=DEVICE) for s in (shape, shape[-1:], shape)]
    return [v.requires_grad_() for v in (x.to(dtype), 1 + weight) + ((3 * before,) if residual else ())]


def outcome(op, inputs, out_dtype=None, outputs=slice(None)):
    """Outputs and gradients of a random projection of those asked for."""
    found = op(inputs[0], inputs[1], EPS, *inputs[2:], out_dtype=out_dtype)
    return [*found, *gradients(found[outputs], inputs)]


def exact(inputs):
    return [v.detach().double().requires_grad_() for v in inputs]


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (5, 6), (3, 7, 48), (2, 100), (2, 1, 1031)]
    + [pytest.param(shape, marks=gpu) for shape in ((4, 511, 1024), (4097, 2048), (300, 8192))],
)
def test_outputs_and_gradients_equal_the_reference(shape, residual, dtype, out_dtype, poisoned):
    torch.manual_seed(shape[-1])
    inputs = case(shape, dtype, residual)
    got, want = outcome(kernel.rms_norm, inputs, out_dtype), outcome(reference.rms_norm, exact(inputs))
    assert got[0].dtype == (out_dtype or torch.float32) and got[1].dtype == torch.float32
    assert [g.dtype for g in got[2:]] == [v.dtype for v in inputs]
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        rough = torch.bfloat16 in (g.dtype, out_dtype)  # gradients arrive through the rounded output
        assert_near((f"tensor {i}",), (g,), (w,), BOUNDS[torch.bfloat16 if rough and i != 1 else torch.float32])


@pytest.mark.parametrize("outputs", [slice(0, 1), slice(1, 2)])
@pytest.mark.parametrize("residual", [True, False])
def test_gradients_of_one_output_alone(outputs, residual, poisoned):
    torch.manual_seed(0)
    for dtype in BOUNDS:
        inputs = case((4, 33), dtype, residual)
        got = outcome(kernel.rms_norm, inputs, outputs=outputs)
        want = outcome(reference.rms_norm, exact(inputs), outputs=outputs)
        assert_near(range(len(got)), got, want, BOUNDS[dtype])


def test_it_keeps_its_output_and_a_number_a_row():
    x, weight, residual = case((40, 33), torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        normalised, _ = kernel.rms_norm(x, weight, EPS, residual, torch.bfloat16)
    assert {t.data_ptr() for t in kept if t.dim() > 1} == {normalised.data_ptr()}
    assert sum(t.numel() for t in kept) == normalised.numel() + 40 + 33


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16, torch.float16])
def test_weights_of_zero_are_trained(out_dtype):
    torch.manual_seed(6)
    x, weight, residual = case((40, 33), torch.bfloat16)
    with torch.no_grad():
        weight[::3], weight[1], weight[4], weight[7] = 0.0, -0.0, 1e-12, -3e-7
    inputs = [x, weight, residual]
    got, want = outcome(kernel.rms_norm, inputs, out_dtype), outcome(reference.rms_norm, exact(inputs))
    assert not got[0][:, ::3].to(torch.float16).any()
    bound = BOUNDS[torch.float32 if out_dtype is None else torch.bfloat16]
    assert_near(("grad_weight", "grad_residual"), got[3:], want[3:], bound)
    assert_near(("grad_weight of 0",), (got[3][::3],), (want[3][::3],), bound)


@pytest.mark.parametrize("op", [reference.rms_norm, chosen])
def test_equals_torch(op):
    torch.manual_seed(1)
    x, weight, residual = [v.detach().double().requires_grad_() for v in case((3, 5, 24))]
    got = op(x, weight, EPS, residual)
    want = F.rms_norm(x + residual, (24,), weight, EPS), x + residual
    names = ("normalised", "h", "grad_x", "grad_weight", "grad_residual")
    inputs = (x, weight, residual)
    assert_near(names, (*got, *gradients(got, inputs)), (*want, *gradients(want, inputs)), 1e-12)


def test_the_reference_keeps_the_residual_stream_in_float32():
    x, weight = case((3, 16), torch.bfloat16, residual=False)
    normalised, h = reference.rms_norm(x, weight, EPS, out_dtype=torch.bfloat16)
    assert normalised.dtype == torch.bfloat16 and h.dtype == torch.float32 and torch.equal(h, x.float())
    assert reference.rms_norm(x, weight, EPS, torch.randn(3, 16, device=DEVICE, dtype=torch.float64))[1].dtype == torch.float64


def test_strided_inputs_and_gradients_written_into_half_of_a_buffer(poisoned):
    torch.manual_seed(2)
    both, wide = torch.randn(2, 2, 9, 40, device=DEVICE), torch.full((2, 9, 40), 3.0, device=DEVICE)
    x, residual, weight = both[0][..., :20], both[1][..., 20:], torch.randn(20, device=DEVICE)
    got = kernel.forward(x, weight, EPS, residual)
    assert all(torch.equal(g, w) for g, w in zip(got, kernel.forward(x.contiguous(), weight, EPS, residual.contiguous())))
    grads = torch.randn(2, 2, 9, 40, device=DEVICE)[..., 20:]
    kept = got[0], got[2]
    found = kernel.backward(grads[0], grads[1], *kept, weight, torch.float32, out=wide[..., 20:])
    assert found[0].data_ptr() == wide[..., 20:].data_ptr() and (wide[..., :20] == 3).all()
    dense = kernel.backward(grads[0].contiguous(), grads[1].contiguous(), *kept, weight, torch.float32)
    assert all(torch.equal(g, w) for g, w in zip(found, dense))


@pytest.mark.parametrize("d", [48, pytest.param(1024, marks=gpu), pytest.param(3000, marks=gpu)])
def test_a_row_depends_on_nothing_but_itself_and_repeats_to_the_bit(d):
    torch.manual_seed(3)
    inputs = case((23, d), torch.bfloat16)
    first = outcome(kernel.rms_norm, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, outcome(kernel.rms_norm, inputs)))
    x, weight, residual = (v.detach() for v in inputs)
    normalised, h, rstd = kernel.forward(x, weight, EPS, residual)
    grads = kernel.backward(h, h, normalised, rstd, weight, x.dtype)
    for rows in (slice(0, 1), slice(22, 23), slice(5, 18)):
        some = kernel.forward(x[rows], weight, EPS, residual[rows])
        assert all(torch.equal(s, a[rows]) for s, a in zip(some, (normalised, h, rstd)))
        some = kernel.backward(h[rows], h[rows], normalised[rows], rstd[rows], weight, x.dtype)
        assert all(torch.equal(s, a[rows]) for s, a in zip(some[:2], grads[:2]))


def test_more_rows_than_programs(poisoned):
    torch.manual_seed(4)
    x, weight, residual = case((11, 16))
    found = kernel.forward(x.detach(), weight.detach(), EPS, residual.detach())
    one = kernel.backward(found[1], None, found[0], found[2], weight.detach(), x.dtype, programs=1)
    three = kernel.backward(found[1], None, found[0], found[2], weight.detach(), x.dtype, programs=3)
    assert_near(("grad_x", "grad_residual", "grad_weight"), one, three, 1e-6)


def test_no_rows(poisoned):
    x, weight, residual = case((0, 16))
    normalised, h = kernel.rms_norm(x, weight, EPS, residual)
    assert normalised.shape == h.shape == x.shape
    assert not torch.autograd.grad(normalised.sum(), weight)[0].any()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs 30 GiB")
def test_offsets_past_2_31(poisoned):
    torch.manual_seed(5)
    rows, d = (1 << 20) + 8, 2056  # 2.2e9 elements
    x, weight = torch.randn(rows, d, device=DEVICE, dtype=torch.bfloat16), torch.randn(d, device=DEVICE)
    normalised, h, rstd = kernel.forward(x, weight, EPS, out_dtype=torch.bfloat16)
    want = F.rms_norm(x[-5:].double(), (d,), weight.double(), EPS)
    assert_near(("normalised", "h"), (normalised[-5:], h[-5:]), (want, x[-5:]), 1e-2)
    grad_x = kernel.backward(normalised, None, normalised, rstd, weight, x.dtype, need_residual=False)[0]
    leaf = x[-5:].double().requires_grad_()
    want = torch.autograd.grad(F.rms_norm(leaf, (d,), weight.double(), EPS), leaf, normalised[-5:].double())[0]
    assert_near(("grad_x",), (grad_x[-5:],), (want,), 1e-2)
