"""AdamW's parameter groups, and the learning rate as a function of the step."""
from __future__ import annotations

import math

import torch
from torch import nn

from serpent_scale.config import Config, ScheduleConfig
from serpent_scale.training.readback import Readback


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """[decayed, not decayed], each in the model's order; a tied parameter is in once.

    Not decayed: what says so by `_no_weight_decay`, and all vectors and scalars (norms, biases). To be called before
    DeepSpeed partitions the model: at ZeRO stage 3 every parameter is a vector afterwards.
    """
    decayed, others = [], []
    for parameter in model.parameters():
        plain = getattr(parameter, "_no_weight_decay", False) or parameter.ndim < 2
        (others if plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, config: Config, device: torch.device) -> torch.optim.AdamW:
    """AdamW for DeepSpeed to wrap; fused on GPUs."""
    settings = config.optimizer
    options = dict(lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps)
    groups = parameter_groups(model, settings.weight_decay)
    if config.training.zero_stage == 0:
        return GuardedAdamW(groups, clip=config.training.grad_clip, **options)
    return torch.optim.AdamW(groups, fused=device.type == "cuda", **options)


def apply_settings(optimizer: torch.optim.Optimizer, config: Config) -> None:
    """Give the groups of `build_optimizer` the run's settings: a loaded state brings those it was saved with."""
    settings = config.optimizer
    for group, decay in zip(optimizer.param_groups, (settings.weight_decay, 0.0), strict=True):
        group.update(betas=(settings.beta1, settings.beta2), eps=settings.eps, weight_decay=decay)


class GuardedAdamW(torch.optim.AdamW):
    """What DeepSpeed's ZeRO optimizers do around AdamW and its stage 0 leaves out.

    The gradient norm before clipping, clipping, and no step at all where that norm is not finite. The engine reads
    `_global_grad_norm` and `overflow` of whatever optimizer it holds: its `get_global_grad_norm()` and `skipped_steps` are
    then right at stage 0 too. Ranks agree, since stage 0 hands each of them the same averaged gradients.

    The fused kernel divides gradients by a factor on the device, and does nothing where a flag there says so: the update is
    launched before the norm is known on the host, which then waits for the norm alone.
    """

    def __init__(self, groups: list[dict], clip: float, **options):
        super().__init__(groups, fused=True, **options)
        self.clip, self._global_grad_norm = clip, 0.0
        self.grad_scale = self.found_inf = None  # what torch's fused step reads

    @property
    def overflow(self) -> bool:
        return not math.isfinite(self._global_grad_norm)

    @torch.no_grad()
    def step(self, closure=None):
        norm = nn.utils.get_total_norm([p.grad for group in self.param_groups for p in group["params"] if p.grad is not None])
        finite = norm.isfinite()
        self.found_inf = 1 - finite.float()
        if self.clip > 0:
            self.grad_scale = ((norm + 1e-6) / self.clip).clamp(min=1.0)  # as torch.nn.utils.clip_grad_norm_
        self._global_grad_norm = Readback(torch.where(finite, norm, math.inf))  # as ZeRO says it
        return super().step(closure)


def learning_rate(step: int, config: ScheduleConfig, total_steps: int, peak: float) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up to `peak` in the last warm-up step, then the shape of `config.kind`,
    which reaches `min_ratio * peak` in step `total_steps - 1`. Nothing to save: it depends on the step alone."""
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    low = config.min_ratio * peak
    if config.kind == "cosine":
        done = min(1.0, (step + 1 - config.warmup_steps) / (total_steps - config.warmup_steps))
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * done))
    if config.kind == "wsd":
        done = min(1.0, max(0.0, (step + 1 - (total_steps - config.decay_steps)) / config.decay_steps))
        return peak + (low - peak) * done
    return peak
