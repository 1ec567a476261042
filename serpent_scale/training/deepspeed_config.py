"""DeepSpeed's settings, derived from the run's configuration; `deepspeed:` in it is passed on as it is."""
from __future__ import annotations

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
    "bf16": "set training.precision",
    "bfloat16": "set training.precision",
    "fp16": "set training.precision",
    "torch_autocast": "set training.precision",
    "optimizer": "set the keys of optimizer:",
    "scheduler": "set the keys of schedule:",
    "checkpoint": "remove it; checkpoints have one format here",
}


def deepspeed_config(config: Config, world_size: int) -> dict:
    """The dictionary for `deepspeed.initialize`. Raises UserError for a derived key and a batch that does not divide."""
    training = config.training
    settings = {
        "train_batch_size": training.global_batch,
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": config.grad_accumulation(world_size),
        # Always set: DeepSpeed's default is 1.0. At stage 0 our optimizer clips (GuardedAdamW), it must see the whole norm.
        "gradient_clipping": 0.0 if training.zero_stage == 0 else training.grad_clip,
        "zero_optimization": {"stage": training.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,  # we print our own lines
        "wall_clock_breakdown": False,
    }
    if training.precision == "bf16":
        # Autocast, not DeepSpeed's `bf16`: that engine casts every parameter, and A_log, dt_bias and the clock need fp32.
        # By default the gradients of nn.Linear would be reduced, and at stage 3 its weights gathered, in bf16; with no
        # module on the list both stay fp32, and the sum over ranks does not round.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
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
