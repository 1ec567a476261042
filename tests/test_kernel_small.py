"""What surrounds the large kernels: casts and -exp of many weights in one launch, and sums of programs' partial sums."""
import pytest
import torch
from numerics import DEVICE, assert_near

from serpent_scale.kernels import sums, weights

pytestmark = pytest.mark.usefixtures("poisoned")


def test_weights_of_several_sizes_in_one_launch():
    sources = [torch.randn(shape, device=DEVICE) for shape in ((3, 5), (weights.BLOCK,), (7, 700), (1,))]
    copies = weights.cast(sources, torch.bfloat16)
    assert all(copy.dtype == torch.bfloat16 and copy.shape == source.shape for copy, source in zip(copies, sources))
    if DEVICE == "cuda":
        assert all(torch.equal(copy, source.bfloat16()) for copy, source in zip(copies, sources))
    assert_near("abcd", copies, sources, 8e-3)  # the interpreter rounds to bfloat16 towards zero
    negative = weights.negative_exp(sources)
    assert_near("abcd", negative, [-source.double().exp() for source in sources], 1e-6)
    assert all(v.dtype == torch.float32 for v in weights.negative_exp(copies))


@pytest.mark.parametrize("n, columns", [(1, 3), (256, 40), (1056, 100), (0, 8)])
def test_rows_added_up(n, columns):
    partial = torch.randn(n, columns, device=DEVICE)
    total = sums.add_rows(partial)
    assert total.shape == (columns,)
    assert (total.double() - partial.double().sum(0)).abs().max() <= 1e-5 * max(1, n) ** 0.5
    assert torch.equal(total, sums.add_rows(partial))
