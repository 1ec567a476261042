"""Attention block by block against all at once: outputs and every gradient."""
import math

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_near

from serpent_scale.kernels import attention
from serpent_scale.kernels.attention import attend_block, attend_block_backward, merge

gpu = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])


@pytest.mark.parametrize("device", ["cpu", gpu])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_merged_give_what_all_keys_give(dtype, bound, masked, device, monkeypatch):
    monkeypatch.setattr(attention, "QUERIES", 16)
    torch.manual_seed(0)
    q, grad = torch.randn(2, 2, 4, 50, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 50 + 37, 8, dtype=torch.float64)
    seen = torch.ones(2, 1, 50, 37, dtype=torch.bool)
    if masked:  # of some queries all keys, of others a part
        seen[:, :, 20:] &= torch.rand(2, 1, 30, 37) < 0.5
        seen[:, :, :20] = False
    whole = torch.cat([seen, torch.ones(50, 50, dtype=torch.bool).tril().expand(2, 1, -1, -1)], 3)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    want = F.scaled_dot_product_attention(leaves[0], *(t.repeat_interleave(2, 1) for t in leaves[1:]), whole)
    want = [want.detach(), *torch.autograd.grad(want, leaves, grad)]

    q, k, v, grad, seen = (t.to(device, dtype if t.is_floating_point() else None) for t in (q, k, v, grad, seen))
    mask = (lambda low, high: seen[:, :, low:high]) if masked else None
    blocks = [(k[:, :, 37:], v[:, :, 37:], None, True), (k[:, :, :37], v[:, :, :37], mask, False)]
    y, lse = attend_block(q, *blocks[0])
    other, other_lse = attend_block(q, *blocks[1])
    assert not masked or (not other[:, :, :20].any() and (other_lse[:, :, :20] == -math.inf).all())
    y, lse = merge(y.to(lse.dtype), lse, other, other_lse)
    parts = [attend_block_backward(grad, q, k, v, y.to(dtype), lse, *rest) for k, v, *rest in blocks]
    got = [y, parts[0][0] + parts[1][0], *(torch.cat([parts[1][i], parts[0][i]], 2) for i in (1, 2))]
    assert_near(("y", "q", "k", "v"), [t.double().cpu() for t in got], want, bound)
