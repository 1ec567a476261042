"""Chunked linear cross-entropy in Triton against float64: loss and every gradient."""
import pytest
import torch
import torch.nn.functional as F
from numerics import DEVICE, assert_near, relative_error

from serpent_scale.kernels.linear_cross_entropy import reference, triton

BOUND = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 5e-3}


def inputs(tokens, d, rows, vocab_size, dtype, weight_dtype=None):
    hidden = torch.randn(tokens, d, device=DEVICE, dtype=dtype)
    weight = (torch.randn(rows, d, device=DEVICE) * 2 / d**0.5).to(weight_dtype or dtype)
    labels = torch.randint(0, vocab_size, (tokens,), device=DEVICE)
    labels[torch.rand(tokens, device=DEVICE) < 0.2] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def run(form, hidden, weight, labels, vocab_size, chunk=None, factor=0.37):
    loss = form(hidden, weight, labels, vocab_size, chunk)
    return loss, *torch.autograd.grad(loss * factor, (hidden, weight))


def exact(hidden, weight, labels, vocab_size, factor=0.37):
    hidden, weight = (v.detach().double().requires_grad_() for v in (hidden, weight))
    loss = F.cross_entropy((hidden @ weight.t())[:, :vocab_size], labels, reduction="sum")
    return loss, *torch.autograd.grad(loss * factor, (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "tokens, d, rows, vocab_size, chunk", [(1, 8, 16, 16, None), (37, 24, 192, 150, 16), (23, 16, 77, 77, 10)]
)
def test_loss_and_gradients(dtype, tokens, d, rows, vocab_size, chunk, poisoned):
    hidden, weight, labels = inputs(tokens, d, rows, vocab_size, dtype)
    if tokens == 1:
        labels[0] = 3
    got = run(triton.linear_cross_entropy, hidden, weight, labels, vocab_size, chunk)
    assert [g.dtype for g in got] == [torch.float32, dtype, dtype]
    assert_near(("loss", "hidden", "weight"), got, exact(hidden, weight, labels, vocab_size), BOUND[dtype])
    assert not got[2][vocab_size:].any() and not got[1][labels == -100].any()
    again = run(triton.linear_cross_entropy, hidden, weight, labels, vocab_size, chunk)
    assert all(torch.equal(a, b) for a, b in zip(got, again))


def test_vocabulary_longer_than_a_block_and_large_logits(poisoned):
    hidden, weight, labels = inputs(3, 8, 17_000, 16_999, torch.float32)
    weight.data *= 30
    labels[:] = torch.tensor([0, 16_998, 8192])
    got = run(triton.linear_cross_entropy, hidden, weight, labels, 16_999)
    assert_near(("loss", "hidden", "weight"), got, exact(hidden, weight, labels, 16_999), 2e-5)


def test_float32_weights_under_autocast_with_strided_hidden(poisoned):
    hidden, weight, labels = inputs(40, 48, 128, 100, torch.float32)
    hidden = hidden.detach()[:, 8:40].requires_grad_()
    weight = weight.detach()[:, :32].requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        got = run(triton.linear_cross_entropy, hidden, weight, labels, 100, 16)
        nll = triton.linear_token_nll(hidden, weight, labels, 100)
    want = exact(hidden.bfloat16(), weight.bfloat16(), labels, 100)
    assert [g.dtype for g in got] == [torch.float32] * 3
    assert_near(("loss", "hidden", "weight"), got, want, 1e-2)
    assert relative_error(nll.sum(), want[0]) < 1e-2


def test_token_losses_equal_the_reference_and_do_not_depend_on_the_chunk(poisoned):
    hidden, weight, labels = inputs(50, 16, 128, 120, torch.float32)
    want = reference.linear_token_nll(hidden.double(), weight.double(), labels, 120)
    got = triton.linear_token_nll(hidden, weight, labels, 120)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert not got.requires_grad and not got[labels == -100].any()
    torch.testing.assert_close(triton.linear_token_nll(hidden, weight, labels, 120, 7), got)
    both = triton.linear_cross_entropy(hidden, weight, labels, 120, per_token=True)
    assert torch.equal(both[1], got) and torch.equal(both[0], got.sum()) and not both[1].requires_grad
    with torch.no_grad():
        assert relative_error(triton.linear_cross_entropy(hidden, weight, labels, 120), want.sum()) < 1e-6


def test_only_the_wanted_gradient_is_formed_and_only_once():
    hidden, weight, labels = inputs(9, 16, 64, 64, torch.float32)
    _, want_hidden, want_weight = exact(hidden, weight, labels, 64, 1.0)
    loss = triton.linear_cross_entropy(hidden, weight.detach(), labels, 64)
    assert relative_error(torch.autograd.grad(loss, hidden, retain_graph=True)[0], want_hidden) < 5e-6
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()
    loss = triton.linear_cross_entropy(hidden.detach(), weight, labels, 64)
    assert relative_error(torch.autograd.grad(loss, weight)[0], want_weight) < 5e-6


def test_every_label_ignored_and_no_tokens():
    hidden, weight, labels = inputs(6, 8, 32, 32, torch.bfloat16)
    for h, label in ((hidden, torch.full_like(labels, -100)), (hidden[:0], labels[:0])):
        loss = triton.linear_cross_entropy(h, weight, label, 32)
        loss.backward()
        assert loss == 0 and not weight.grad.any() and not hidden.grad.any()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_gradient_error_is_that_of_the_plain_form_at_full_size(poisoned):
    hidden, weight, labels = inputs(5000, 512, 50_304, 50_257, torch.bfloat16, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        got = run(triton.linear_cross_entropy, hidden, weight, labels, 50_257, 2048)
        plain = F.cross_entropy((hidden @ weight.t())[:, :50_257].float(), labels, reduction="sum")
    plain = plain, *torch.autograd.grad(plain * 0.37, (hidden, weight))
    want = exact(hidden, weight.bfloat16(), labels, 50_257)
    for g, p, w in zip(got, plain, want):
        assert relative_error(g, w) <= 1.5 * relative_error(p, w) + 1e-7
