"""Launching Triton kernels from a training step: what Triton derives from a call's arguments is derived once per kind of call.

`kernel[grid](...)` looks at every argument's type, alignment and value on every call, which for the many-argument kernels here takes
longer than some of them run. A step repeats the same calls, so the compiled kernel is remembered by everything it can depend on.
"""
from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl

_compiled: dict[tuple, tuple] = {}
_LIMIT = 4096  # calls remembered; data-dependent shapes would otherwise pile up over a long run


def launch(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """`kernel[grid](*arguments, **constants)`. arguments: tensors, ints, floats, None or tuples of such, all parameters that are
    not constexpr; constants: the constexpr parameters, which come last in the kernel's signature, and options such as num_warps."""
    key = [kernel, torch.cuda.current_device() if torch.cuda.is_initialized() else None, *constants.values()]
    values = _values(arguments, key)
    key = tuple(key)
    found = _compiled.get(key)
    if found is not None:
        compiled, last = found
        compiled[(*grid, 1, 1)](*values, *last)
        return
    compiled = kernel[grid](*arguments, **constants)
    if hasattr(compiled, "packed_metadata"):  # not in the interpreter
        if len(_compiled) >= _LIMIT:
            _compiled.clear()
        _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])


def launch_together(kernel, problems: list[tuple], programs: list[int], **constants) -> None:
    """One launch for several problems (tuples of arguments, each of the same type in all), of so many programs each; the
    kernel's parameters are two tuples, which `problem_of` takes, and constants."""
    starts = (0, *accumulate(programs))
    launch(kernel, (starts[-1],), tuple(problems), starts, **constants)


@triton.jit
def problem_of(PROBLEMS, STARTS):
    """(arguments, number among its programs) of this program's problem: those of each stand together, from STARTS on."""
    problem, start, place = PROBLEMS[0], 0, tl.program_id(0)
    for i in tl.static_range(1, len(PROBLEMS)):
        here, chosen = place >= STARTS[i], ()
        for j in tl.static_range(len(problem)):
            chosen = chosen + (tl.where(here, PROBLEMS[i][j], problem[j]),)
        problem, start = chosen, tl.where(here, STARTS[i], start)
    return problem, place - start


def _values(arguments: tuple, key: list) -> list:
    """The arguments as the compiled kernel takes them; the key grows by what it is compiled for."""
    values = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            pointer = argument.data_ptr()  # a number: a tensor would make the launcher ask the driver about its address
            key += argument.dtype, pointer & 15
            values.append(pointer)
        elif isinstance(argument, tuple):
            key.append(len(argument))
            values.append(tuple(_values(argument, key)))
        else:
            key.append(argument)
            values.append(argument)
    return values
