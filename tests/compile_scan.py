"""Run by test_kernel_selective_scan.py: compiles the plain scan kernels for a GPU that need not be here, running nothing."""
import torch
import triton
from triton.backends.compiler import GPUTarget

from serpent_scale.kernels import launch
from serpent_scale.kernels.selective_scan import launches
from serpent_scale.kernels.selective_scan import triton as scan


class Absent:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def main() -> None:
    triton.runtime.driver.set_active(Absent())
    compiled = []

    def compile_only(kernel, grid, *arguments, **constants):
        kernel.warmup(*arguments, grid=grid, **constants)
        compiled.append(kernel.__name__)

    launch.launch = compile_only
    for d_state, dtype, segments in ((8, torch.bfloat16, 1), (24, torch.float32, 3)):
        launches.kernels_for = lambda device, d_state: launches.PlainKernels(d_state)
        launches.segments_of = lambda *of: (segments, 11)
        wide, states, row = (torch.zeros(*shape, dtype=dtype) for shape in ((2, 33, 16), (2, 33, d_state), (16,)))
        A, reset, live = torch.zeros(16, d_state), torch.zeros(2, 33, dtype=torch.bool), torch.ones(2, 33, dtype=torch.bool)
        inputs = wide, wide, A, states, states, row, wide, row, reset, live
        y, final, kept = scan.forward(*inputs, final_state := torch.zeros(2, 16, d_state))
        scan.backward(y, final_state, *inputs, kept, y)
    print(*sorted(set(compiled)))


if __name__ == "__main__":
    main()
