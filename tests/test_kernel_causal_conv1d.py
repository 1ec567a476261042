"""The Triton convolution against the reference in float64: outputs and every gradient, halo and halo out included."""
import pytest
import torch

from numerics import DEVICE, assert_near, gradients
from serpent_scale.kernels.causal_conv1d import causal_conv1d as chosen
from serpent_scale.kernels.causal_conv1d import reference
from serpent_scale.kernels.causal_conv1d import triton as kernel
from serpent_scale.model.documents import Documents

NAMES = ("y", "halo_out", "grad_x", "grad_weight", "grad_bias", "grad_halo")
BOUNDS = {torch.float32: 5e-6, torch.bfloat16: 1e-2}
gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="too large for the interpreter")]


def case(batch, length, d_inner, width=4, dtype=torch.float32, halo=True, resets=False, live=False):
    """x, weight, bias, halo (leaves or None), since_reset, n_live."""
    shapes = (batch, length, d_inner), (d_inner, width), (d_inner,), (batch, width - 1, d_inner)
    x, weight, bias, before = [torch.randn(shape, device=DEVICE) for shape in shapes]
    leaves = [x.to(dtype), weight, bias, before.to(dtype) if halo else None]
    since_reset = n_live = None
    if resets:
        reset = torch.rand(batch, length) < 0.2
        reset[0, :1] = True  # row 0 begins a document, the others continue one
        reset[1:, :1] = False
        since_reset = Documents(reset).since_reset.to(DEVICE)
    if live:
        n_live = torch.randint(0, length + 1, (batch,))
        n_live[:2] = torch.tensor([0, min(2, length)])[:batch]
        n_live = n_live.to(DEVICE)
    return [None if v is None else v.requires_grad_() for v in leaves] + [since_reset, n_live]


def outcome(op, x, weight, bias, halo, since_reset, n_live, seed=7):
    """Outputs and gradients of a random projection of both."""
    outputs = op(x, weight, bias, since_reset, halo, n_live)
    found = gradients(outputs, [v for v in (x, weight, bias, halo) if v is not None], seed)
    return [*outputs, *found] + [None] * (halo is None)


def exact(inputs):
    return [v if v is None or not v.is_floating_point() else v.detach().double().requires_grad_() for v in inputs]


def check(inputs, op=kernel.causal_conv1d):
    got, want = outcome(op, *inputs), outcome(reference.causal_conv1d, *exact(inputs))
    assert got[0].dtype == got[1].dtype == inputs[0].dtype
    assert_near(NAMES, got, want, BOUNDS[inputs[0].dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    "batch, length, d_inner, width, halo, resets, live",
    [
        (1, 1, 6, 4, True, False, False),
        (2, 2, 5, 4, True, True, True),
        (3, 19, 20, 4, True, True, True),
        (1, 67, 16, 4, False, True, False),
        (2, 23, 9, 3, True, True, False),
        (2, 17, 40, 2, True, False, True),
        (1, 12, 8, 6, True, True, False),
        (1, 9, 600, 4, False, False, False),
        pytest.param(2, 4099, 1536, 4, True, True, True, marks=gpu),
        pytest.param(4, 2048, 2048, 4, False, True, False, marks=gpu),
        pytest.param(1, 65537, 264, 4, False, False, False, marks=gpu),
    ],
)
def test_outputs_and_gradients_equal_the_reference(batch, length, d_inner, width, halo, resets, live, dtype, poisoned):
    torch.manual_seed(length)
    check(case(batch, length, d_inner, width, dtype, halo, resets, live))


def test_resets_need_not_be_those_of_documents(poisoned):
    """Tap k reads 0 where since_reset < k, whatever its neighbours say."""
    torch.manual_seed(0)
    *inputs, _, _ = case(1, 21, 8)
    check([*inputs, torch.randint(0, 5, (1, 21), device=DEVICE), None])


@pytest.mark.parametrize("output", [0, 1])
def test_gradients_of_one_output_alone(output, poisoned):
    torch.manual_seed(1)
    inputs = case(2, 11, 8, resets=True, live=True)

    def found(op, x, weight, bias, halo, since_reset, n_live):
        return gradients([op(x, weight, bias, since_reset, halo, n_live)[output]], [x, weight, bias, halo])

    for name, got, want in zip(NAMES[2:], found(kernel.causal_conv1d, *inputs), found(reference.causal_conv1d, *exact(inputs))):
        if want is None:  # the halo out does not depend on the weight
            assert not got.any(), name
        else:
            assert_near((name,), (got,), (want,), 5e-6)


def test_strided_inputs_and_gradients_written_into_half_of_a_buffer(poisoned):
    torch.manual_seed(2)
    batch, length, d_inner = 2, 11, 16
    _, weight, bias, halo, since_reset, n_live = case(batch, length, d_inner, resets=True)
    both = torch.randn(batch, length, 2 * d_inner, device=DEVICE)
    x, grad_y = both[..., :d_inner], torch.randn(batch, length, 2 * d_inner, device=DEVICE)[..., d_inner:]
    wide = torch.full_like(both, 3.0)
    inputs = [v.detach() for v in (weight, bias, since_reset, halo)] + [n_live]
    y, halo_out = kernel.forward(x, *inputs)
    found = kernel.backward(grad_y, None, x, *inputs, out=wide[..., d_inner:])
    assert found[0].data_ptr() == wide[..., d_inner:].data_ptr()
    assert (wide[..., :d_inner] == 3).all()
    dense = kernel.forward(x.contiguous(), *inputs)
    assert torch.equal(y, dense[0]) and torch.equal(halo_out, dense[1])
    for g, w in zip(found, kernel.backward(grad_y.contiguous(), None, x.contiguous(), *inputs)):
        assert torch.equal(g, w)


def test_a_gradient_without_memory_of_its_own(poisoned):
    """That of a sum is one number, expanded."""
    inputs = case(1, 10, 8)[:3]
    twins = exact(inputs)
    got = torch.autograd.grad(kernel.causal_conv1d(*inputs)[0].sum(), inputs)
    assert_near(NAMES[2:5], got, torch.autograd.grad(reference.causal_conv1d(*twins)[0].sum(), twins), 5e-6)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    "batch, length, d_inner, columns, documents",
    [
        (2, 37, 24, 32, 5), (1, 20, 8, 5, None),
        *(pytest.param(*values, marks=gpu) for values in (
            (2, 1024, 128, 96, None), (2, 1024, 128, 64, 300), (3, 1021, 736, 64, 40), (1, 130, 72, 32, 3), (2, 16, 64, 160, None),
        )),
    ],
)  # fmt: skip
def test_a_gradient_that_is_a_sum(batch, length, d_inner, columns, documents, dtype, poisoned):
    """What reaches y is one gradient plus a product, formed on the way where there is a kernel for it."""
    since_reset = None
    if documents:
        since_reset = Documents(torch.rand(batch, length) < 1 / documents).since_reset.to(DEVICE)
    xz, grad_y, rows, matrix = (
        torch.randn(shape, device=DEVICE).to(dtype)
        for shape in ((batch, length, 2 * d_inner), (batch, length, d_inner), (batch, length, columns), (columns, d_inner))
    )
    x, weight, bias = xz.chunk(2, -1)[0], torch.randn(d_inner, 4, device=DEVICE), torch.randn(d_inner, device=DEVICE)
    buffer = torch.full_like(xz, 7)
    arguments = rows, matrix, None, x, weight, bias, since_reset
    got = kernel.backward_of_sum(grad_y.clone(), *arguments, out=buffer[..., :d_inner])
    again = kernel.backward_of_sum(grad_y.clone(), *arguments)
    leaves = [v.double().requires_grad_() for v in (x, weight, bias)]
    total = grad_y.double() + rows.double() @ matrix.double()
    want = torch.autograd.grad(reference.causal_conv1d(*leaves, since_reset)[0], leaves, total)
    assert_near(NAMES[2:5], got[:3], want, BOUNDS[dtype] if DEVICE == "cuda" or dtype == torch.float32 else 2e-2)
    assert got[3] is None and bool((buffer[..., d_inner:] == 7).all())
    assert all(map(torch.equal, got[:3], again[:3]))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("length, d_inner, cuts", [(21, 8, (1, 8, 19)), pytest.param(3001, 520, (1, 64, 2500), marks=gpu)])
def test_repeats_to_the_bit_and_no_row_depends_on_a_later_one(length, d_inner, cuts, dtype):
    torch.manual_seed(3)
    inputs = case(1, length, d_inner, dtype=dtype, resets=True)
    first, second = outcome(kernel.causal_conv1d, *inputs), outcome(kernel.causal_conv1d, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    x, weight, bias, halo, since_reset, _ = inputs
    for t in cuts:
        changed = torch.cat([x[:, :t], torch.randn_like(x[:, t:])], 1)
        assert torch.equal(kernel.forward(changed, weight, bias, since_reset, halo)[0][:, :t], first[0][:, :t])


def test_the_halo_out_continues_the_sequence():
    torch.manual_seed(4)
    x, weight, bias, halo, since_reset, _ = case(1, 20, 8, resets=True)
    y, last = kernel.causal_conv1d(x, weight, bias, since_reset, halo)
    for cut in (2, 17):
        a, middle = kernel.causal_conv1d(x[:, :cut], weight, bias, since_reset[:, :cut], halo)
        b, end = kernel.causal_conv1d(x[:, cut:], weight, bias, since_reset[:, cut:], middle)
        assert_near(("y", "halo_out"), (torch.cat([a, b], 1), end), (y, last), 1e-6)


def test_a_sequence_of_no_tokens_passes_its_halo_on(poisoned):
    x, weight, bias, halo, *_ = case(2, 0, 8)
    y, halo_out = kernel.causal_conv1d(x, weight, bias, None, halo)
    assert y.shape == x.shape and torch.equal(halo_out, halo)
    assert torch.equal(torch.autograd.grad(halo_out.sum(), halo)[0], torch.ones_like(halo))


def test_the_shape_of_a_program_changes_nothing_but_rounding(poisoned):
    torch.manual_seed(8)
    x, weight, bias, halo, since_reset, n_live = [v.detach() for v in case(1, 37, 8, resets=True, live=True)]
    inputs, shape = (x, weight, bias, since_reset, halo, n_live), dict(walks=1, steps=16)
    grad_y, grad_halo_out = torch.randn_like(x), torch.randn_like(halo)
    got = *kernel.forward(*inputs, **shape), *kernel.backward(grad_y, grad_halo_out, *inputs, **shape)
    want = *kernel.forward(*inputs), *kernel.backward(grad_y, grad_halo_out, *inputs)
    assert_near(NAMES, got, want, 2e-6)


def test_the_choice_of_implementation_gives_the_same_numbers():
    torch.manual_seed(5)
    check(case(2, 30, 8, resets=True), chosen)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs 13 GiB")
def test_offsets_past_2_31(poisoned):
    torch.manual_seed(6)
    length, d_inner = (1 << 20) + 8, 2056  # 2.2e9 elements
    _, weight, bias, *_ = case(1, 1, d_inner, dtype=torch.bfloat16)
    x = torch.randn(1, length, d_inner, device=DEVICE, dtype=torch.bfloat16)
    y, halo_out = kernel.forward(x, weight.detach(), bias.detach())
    tail = slice(length - 67, length)
    want, _ = reference.causal_conv1d(x[:, tail].double(), weight.double(), bias.double())
    assert_near(("y", "halo_out"), (y[:, tail][:, 3:], halo_out), (want[:, 3:], x[:, -3:]), 1e-2)
    del y
    out = torch.empty_like(x)
    grad_x = kernel.backward(x, None, x, weight.detach(), bias.detach(), out=out)[0]
    leaf = x[:, tail].double().requires_grad_()
    want = torch.autograd.grad(reference.causal_conv1d(leaf, weight.double(), bias.double())[0], leaf, leaf.detach())[0]
    assert_near(("grad_x",), (grad_x[:, tail][:, 3:],), (want[:, 3:],), 1e-2)
