"""Launching Triton kernels from a training step: what Triton derives from a call's arguments is derived once per kind of call.

`kernel[grid](...)` looks at every argument's type, alignment and value on every call, which for the many-argument kernels here takes
longer than some of them run. A step repeats the same calls, so the compiled kernel is remembered by everything it can depend on.
"""
from __future__ import annotations

import torch

_compiled: dict[tuple, tuple] = {}
_LIMIT = 4096  # calls remembered; data-dependent shapes would otherwise pile up over a long run


def launch(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """`kernel[grid](*arguments, **constants)`. arguments: tensors, ints, floats or None, all parameters that are not constexpr;
    constants: the constexpr parameters, which come last in the kernel's signature, and options such as num_warps."""
    key, values = [kernel, torch.cuda.current_device() if torch.cuda.is_initialized() else None, *constants.values()], []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            pointer = argument.data_ptr()  # a number: a tensor would make the launcher ask the driver about its address
            key += argument.dtype, pointer & 15
            values.append(pointer)
        else:
            key.append(argument)
            values.append(argument)
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
