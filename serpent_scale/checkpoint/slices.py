"""Which elements of which parameter a rank's DeepSpeed engine holds: its fp32 value and Adam's moments, at ZeRO stages 0-3.

A `Slice` is a run of elements of one parameter, flattened, and where they lie in the optimizer's flat tensors. All that a
checkpoint stores and restores goes through slices, so it does not matter how another engine cuts the parameters.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed

from serpent_scale.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("master", *MOMENTS)


@dataclass(frozen=True, eq=False)
class Slice:
    """Elements [offset, offset + length) of parameter `name`, at [start, start + length) of the optimizer's tensor `flat`."""

    name: str
    offset: int
    length: int
    flat: torch.Tensor
    start: int

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """These elements of a tensor laid out as `flat`."""
        return tensor.detach().view(-1).narrow(0, self.start, self.length)


def held_slices(engine) -> list[Slice]:
    """What this rank holds, in the model's order. Raises UserError for an optimizer swapped to NVMe."""
    stage, found = int(engine.zero_optimization_stage()), []
    if getattr(engine.optimizer, "swap_optimizer", False):
        raise UserError("deepspeed.zero_optimization.offload_optimizer: nvme cannot be checkpointed; use device: cpu")
    for name, parameter in engine.module.named_parameters():
        if stage == 0:
            found.append(Slice(name, 0, parameter.numel(), parameter, 0))
        elif stage == 3:
            zero = engine.optimizer
            group, start, length = zero.grad_position[zero.get_param_id(parameter)]
            offset = length * torch.distributed.get_rank(getattr(parameter, "ds_process_group", zero.dp_process_group))
            length = min(length, parameter.ds_numel - offset)  # the last rank's is padded
            if length > 0:
                found.append(Slice(name, offset, length, zero.fp32_partitioned_groups_flat[group], start))
        elif (mapping := parameter._hp_mapping) is not None:
            flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            own, part = mapping.lp_fragment_address, mapping.hp_fragment_address
            found.append(Slice(name, own.start, own.numel, flat, part.start))
    return found


def shapes(engine) -> dict[str, list[int]]:
    """Shape of each parameter, whole, in the model's order."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def tied_names(engine) -> dict[str, str]:
    """Other names of a parameter -> the first one."""
    first, tied = {}, {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            tied[name] = first[parameter]
    return tied


def base_optimizer(engine) -> torch.optim.Optimizer:
    """torch's optimizer, which ZeRO wraps."""
    return engine.optimizer.optimizer if int(engine.zero_optimization_stage()) else engine.optimizer


def adam_steps(engine) -> int:
    """Updates made so far, steps that were skipped not counted; the same for all parameters."""
    counts = {int(state["step"]) for state in base_optimizer(engine).state.values()}
    if len(counts) > 1:
        raise RuntimeError(f"the optimizer counts its steps differently for different parameters: {sorted(counts)}")
    return counts.pop() if counts else 0


def tensors(engine, held: list[Slice]) -> dict[str, list[torch.Tensor]]:
    """Views of the elements of each slice, by kind; zeros for moments that Adam has not made yet."""
    state = base_optimizer(engine).state
    views = {"master": [s.view(s.flat) for s in held]}
    for kind in MOMENTS:
        views[kind] = [s.view(state[s.flat][kind]) if kind in state.get(s.flat, ()) else torch.zeros(s.length) for s in held]
    return views


@torch.no_grad()
def restore(engine, held: list[Slice], read, steps: int) -> None:
    """Fill parameters and Adam's state: `read(kind, name, offset, length)` gives the elements, `steps` the updates made.

    Each flat tensor gets a step count of its own. Padding between slices becomes zero. All ranks together.
    """
    optimizer, stage = base_optimizer(engine), int(engine.zero_optimization_stage())
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()
    fused = bool(optimizer.defaults.get("fused"))
    for flat in _flat_tensors(engine, optimizer, stage):
        optimizer.state[flat] = {"step": torch.tensor(float(steps), device=flat.device if fused else "cpu")}
        for kind in MOMENTS:
            optimizer.state[flat][kind] = torch.zeros_like(flat, requires_grad=False)
    for s in held:
        s.view(s.flat).copy_(read("master", s.name, s.offset, s.length))
        for kind in MOMENTS:
            s.view(optimizer.state[s.flat][kind]).copy_(read(kind, s.name, s.offset, s.length))
    if stage in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
        engine.optimizer.update_lp_params()
    elif stage == 3:
        for group in range(len(engine.optimizer.fp32_partitioned_groups_flat)):
            engine.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        engine.optimizer.checkpoint_event_epilogue()


def _flat_tensors(engine, optimizer: torch.optim.Optimizer, stage: int) -> list[torch.Tensor]:
    """What the optimizer updates on this rank, tensors that hold padding alone included."""
    if stage == 3:  # it hands them to the optimizer one at a time
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [flat for group in optimizer.param_groups for flat in group["params"]]
