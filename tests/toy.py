"""A tiny model with everything that DeepSpeed has tripped over, and its engine."""
from __future__ import annotations

import torch
from torch import nn

from serpent_scale.config import Config, parse_config
from serpent_scale.training.deepspeed_config import deepspeed_config
from serpent_scale.training.optimizer import build_optimizer

VOCABULARY, WIDTH = 17, 6  # odd sizes: shards of unequal parts


class Toy(nn.Module):
    """An embedding tied to the read-out, a Linear with a bias, a raw parameter that is not decayed, one that is."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.linear = nn.Linear(width, width)
        self.A_log = nn.Parameter(torch.rand(width, 3))
        self.A_log._no_weight_decay = True
        self.conv_weight = nn.Parameter(torch.rand(width, 4))
        self.readout = nn.Linear(width, VOCABULARY, bias=False)
        self.readout.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        h = self.linear(self.embedding(tokens)).float()
        h = h * torch.exp(self.A_log).sum(-1) + h.cumsum(1) * self.conv_weight.sum(-1)
        return nn.functional.cross_entropy(self.readout(h)[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()) * factor


def toy_config(stage: int = 1, precision: str = "fp32", grad_clip: float = 0.0, world_size: int = 2, **deepspeed) -> Config:
    """Two passes per step, two sequences per pass and rank."""
    if stage == 3:  # else so small a model would not be partitioned
        deepspeed.setdefault("zero_optimization", {})["stage3_param_persistence_threshold"] = 0
    return parse_config({
        "training": {"zero_stage": stage, "precision": precision, "grad_clip": grad_clip, "max_steps": 100,
                     "global_batch": 4 * world_size, "micro_batch": 2},
        "schedule": {"kind": "constant", "warmup_steps": 0}, "optimizer": {"lr": 0.01}, "deepspeed": deepspeed,
    })


def build(config: Config, world_size: int, width: int = WIDTH):
    """A fresh engine, its parameters the same each time."""
    import deepspeed

    torch.manual_seed(0)
    model = Toy(width)
    optimizer = build_optimizer(model, config, torch.device("cpu"))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config, world_size))
    return engine


def batch(step: int, micro_step: int, rank: int, world_size: int) -> torch.Tensor:
    return global_batch(step, world_size)[(micro_step * world_size + rank) * 2 :][:2]


def global_batch(step: int, world_size: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (4 * world_size, 9), generator=torch.Generator().manual_seed(step))


def train(engine, first: int, last: int, processes, factors=(1.0, 1.0)) -> list[float]:
    """Steps first ... last - 1; this rank's losses. `factors` scales the loss of each rank."""
    losses = []
    for step in range(first, last):
        for micro_step in range(2):
            tokens = batch(step, micro_step, processes.rank, processes.world_size)
            loss = engine(tokens, factors[processes.rank])
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def parameters(engine) -> dict[str, torch.Tensor]:
    """Whole fp32 parameters; at stage 3 all ranks gather them together."""
    import deepspeed

    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            found[name] = parameter.detach().clone()
    return found
