"""Which program of a launch does what: the scan's kernels in Gluon take several problems, of any sizes, at once."""
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_tiles import BD


@gluon.jit
def for_its_problem(SCAN: gl.constexpr, PROBLEMS, STARTS, SHAPES: gl.constexpr, CONSTANTS):
    """SCAN(block of channels, row, segment, *problem, its SHAPE, *CONSTANTS) for the problem that this program is of.

    PROBLEMS: tuples of what is not compiled into the kernel, n_batch first; the programs of one stand together, from STARTS on.
    SHAPES: (first, behind, SHAPE) of each run of problems that have in common what is compiled, SHAPE: D, strides between tokens,
    and the rank of dt's factors.
    """
    if len(SHAPES) == 1:
        problem, block, b, s = _place(PROBLEMS, STARTS, _item(SHAPES, 0))
        SCAN(block, b, s, *problem, _item(SHAPES, 0, 2), *CONSTANTS)
    else:
        for i in gl.static_range(len(SHAPES)):
            if (gl.program_id(0) >= STARTS[_item(SHAPES, i, 0)]) & (gl.program_id(0) < STARTS[_item(SHAPES, i, 1)]):
                problem, block, b, s = _place(PROBLEMS, STARTS, _item(SHAPES, i))
                SCAN(block, b, s, *problem, _item(SHAPES, i, 2), *CONSTANTS)


@gluon.jit
def _place(PROBLEMS, STARTS, SHAPE: gl.constexpr):
    """(problem, block of channels, row, segment) of this program, one of those of a run of problems."""
    first: gl.constexpr = SHAPE[0]
    behind: gl.constexpr = SHAPE[1]
    problem, start = PROBLEMS[first], STARTS[first]
    for i in gl.static_range(first + 1, behind):
        here, chosen = gl.program_id(0) >= STARTS[i], ()
        for j in gl.static_range(len(problem)):
            chosen = chosen + (gl.where(here, PROBLEMS[i][j], problem[j]),)
        problem, start = chosen, gl.where(here, STARTS[i], start)
    blocks: gl.constexpr = (SHAPE[2][0] + BD - 1) // BD
    place = gl.program_id(0) - start
    row = place // blocks
    return problem, place % blocks, (row % problem[0]).to(gl.int64), row // problem[0]


@gluon.constexpr_function
def _item(values, i, j=None):
    return values[i] if j is None else values[i][j]
