"""Before any test is imported: without a GPU, Triton kernels run in Triton's interpreter, on CPU tensors."""
import functools
import os
import types

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated
    import triton.language as tl
    from triton.runtime import interpreter

    # The interpreter gives triton.language other parts when a kernel starts, and again for every function that the kernel calls,
    # which takes a third of the time. Here a kernel's start does it for all modules that functions may look into, and no call.
    all_of_it = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    interpreter._patch_lang = functools.partial(lambda patch, kernel: patch(all_of_it), interpreter._patch_lang)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


@pytest.fixture
def poisoned():
    """Fresh memory is full of NaN: an output that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty, as torch.utils.deterministic says
    yield
    torch.use_deterministic_algorithms(False)
