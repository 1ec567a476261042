"""What a step makes of a layer's small weights before it uses them: one launch for all, where torch's foreach kernels give each
65,536 elements to one block."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_together, problem_of

BLOCK = 2048


def cast(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies in `dtype` of contiguous tensors of one other dtype."""
    copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    _launch(weights, copies, negative_exp=False)
    return copies


def negative_exp(logarithms: list[Tensor]) -> list[Tensor]:
    """-exp of each, contiguous and of one dtype, in float32."""
    found = [torch.empty_like(v, dtype=torch.float32) for v in logarithms]
    _launch(logarithms, found, negative_exp=True)
    return found


def _launch(sources: list[Tensor], results: list[Tensor], negative_exp: bool) -> None:
    problems = [(x, y, x.numel()) for x, y in zip(sources, results)]
    launch_together(_apply, problems, [triton.cdiv(n, BLOCK) for _, _, n in problems], NEGATIVE_EXP=negative_exp, BLOCK=BLOCK)


@triton.jit
def _apply(PROBLEMS, STARTS, NEGATIVE_EXP: tl.constexpr, BLOCK: tl.constexpr):
    problem, place = problem_of(PROBLEMS, STARTS)
    X, Y, n = problem
    i = place * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < n, other=0.0)
    if NEGATIVE_EXP:
        x = -tl.exp(x.to(tl.float32))
    tl.store(Y + i, x.to(Y.dtype.element_ty), mask=i < n)
