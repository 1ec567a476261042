"""Before any test is imported: without a GPU, Triton kernels run in Triton's interpreter, on CPU tensors."""
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated


@pytest.fixture
def poisoned():
    """Fresh memory is full of NaN: an output that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty, as torch.utils.deterministic says
    yield
    torch.use_deterministic_algorithms(False)
