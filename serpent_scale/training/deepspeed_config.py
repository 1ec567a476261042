"""DeepSpeed's settings, derived from the run's configuration; `deepspeed:` in it is passed on as it is."""
from __future__ import annotations

import difflib
from copy import deepcopy

from serpent_scale.config import Config
from serpent_scale.errors import UserError

# Refused in `deepspeed:`, with what to do in their place: two places for one value would drift apart.
DERIVED = {
    "train_batch_size": "set training.global_batch",
    "train_micro_batch_size_per_gpu": "set training.micro_batch",
    "gradient_accumulation_steps": "set training.global_batch and training.micro_batch",
    "gradient_clipping": "set training.grad_clip",
    "zero_optimization.stage": "set training.zero_stage",
    "zero_optimization.compute_grad_norm": "remove it; the norm tells which steps went wrong",
    "sequence_parallel_size": "set parallel.sequence",
    "bf16": "set training.precision",
    "bfloat16": "set training.precision",
    "fp16": "set training.precision",
    "torch_autocast": "set training.precision",
    "optimizer": "set the keys of optimizer:",
    "scheduler": "set the keys of schedule:",
    "checkpoint": "remove it; checkpoints have one format here",
}
# DeepSpeed checks the keys of its sections, but passes over a top-level key that it does not know.
KNOWN = {
    "activation_checkpointing", "aio", "amp", "comms_logger", "communication_data_type", "compile", "csv_monitor",
    "data_efficiency", "data_types", "dataloader_drop_last", "disable_allgather", "dump_state", "eigenvalue",
    "flops_profiler", "gradient_predivide_factor", "memory_breakdown", "monitor_config", "prescale_gradients",
    "progressive_layer_drop", "seq_parallel_communication_data_type", "sparse_gradients", "steps_per_print", "tensorboard",
    "tensor_parallel", "timers", "use_node_local_storage", "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
} | {path.split(".")[0] for path in DERIVED}  # fmt: skip


def deepspeed_config(config: Config, world_size: int) -> dict:
    """The dictionary for `deepspeed.initialize`. Raises UserError for a derived or
    misspelt key and a batch that does not divide."""
    training = config.training
    settings = {
        # To DeepSpeed a shard of a sequence is a sample of its own, and every rank a data-parallel one.
        "train_batch_size": training.global_batch * config.parallel.sequence,
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": config.grad_accumulation(world_size),
        # Always set: DeepSpeed's default is 1.0. At stage 0 our optimizer clips (GuardedAdamW), it must see the whole norm.
        "gradient_clipping": 0.0 if training.zero_stage == 0 else training.grad_clip,
        "zero_optimization": {"stage": training.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,  # we print our own lines
        "wall_clock_breakdown": False,
        # Else DeepSpeed waits for the device before each forward pass and after each step, for a speed that nobody reads.
        "timers": {"throughput": {"enabled": False}},
    }
    if training.precision == "bf16":
        # Autocast, not DeepSpeed's `bf16`: that engine casts every parameter, and A_log, dt_bias and the clock need fp32.
        # By default the gradients of nn.Linear would be reduced, and at stage 3 its weights gathered, in bf16; with no
        # module on the list both stay fp32, and the sum over ranks does not round.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    for key in config.deepspeed.keys() - KNOWN:  # newer versions have others, so only a near miss is refused
        for near in difflib.get_close_matches(key, KNOWN, n=1, cutoff=0.8):
            raise UserError(f"deepspeed.{key}: DeepSpeed has no such key and would ignore it; the nearest valid key is '{near}'")
    return merge(settings, config.deepspeed)


def merge(settings: dict, passed: dict, prefix: str = "") -> dict:
    """`passed` over `settings`, deeply. Raises UserError for a key of DERIVED and for a value where a section belongs."""
    merged = dict(settings)
    for key, value in passed.items():
        path = f"{prefix}{key}"
        if path in DERIVED:
            raise UserError(f"deepspeed.{path} is refused: it follows from the rest; {DERIVED[path]}")
        if isinstance(settings.get(key), dict):
            if not isinstance(value, dict):
                raise UserError(f"deepspeed.{path}={value} is not allowed; it is a section: {path}: {{key: value}}")
            merged[key] = merge(settings[key], value, f"{path}.")
        else:
            merged[key] = deepcopy(value)
    return merged
