"""What a model costs before it exists: parameters per part, FLOPs per token, memory per rank."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from serpent_scale.config import Config, ModelConfig
from serpent_scale.model import mixers
from serpent_scale.model.documents import Documents
from serpent_scale.model.language_model import padded_vocab, recomputed_together
from serpent_scale.model.stack import Block

GIB = 2**30


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by part; the sum is the model's size."""
    counts = {"embedding": padded_vocab(config.vocab_size) * config.d_model}
    if not config.tie_embeddings:
        counts["read-out"] = counts["embedding"]
    for name in config.layers:
        counts[f"{name} layers"] = counts.get(f"{name} layers", 0) + mixers.parameter_count(name, config)
    counts["norms"] = (len(config.layers) + 1) * config.d_model
    return counts


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs per token; a training step costs three times as much (the backward pass twice the forward)."""

    matmul: float  # matrix products, the ones a utilisation figure is about
    other: float  # convolutions, scans, resampling weights

    @property
    def training(self) -> float:
        return 3 * (self.matmul + self.other)


def flops_per_token(config: ModelConfig, length: int) -> Flops:
    """In rows of `length` tokens, each one document: attention costs by it. SeRpEnt branches counted at their target rates. Norms
    and activations are left out."""
    matmul, other = 2.0 * config.d_model * padded_vocab(config.vocab_size), 0.0
    for name in config.layers:
        m, o = mixers.flops(name, config, length)
        matmul, other = matmul + m, other + o
    return Flops(matmul, other)


def memory_per_rank(config: Config, world_size: int, device: str) -> dict[str, float]:
    """Estimated bytes on one rank: fp32 parameters, gradients and Adam moments under ZeRO, and what the backward pass of
    one micro-batch keeps. device: cpu, counted on fake tensors, or cuda, by what our kernels there keep."""
    n, stage = sum(parameter_counts(config.model).values()), config.training.zero_stage
    share = [1 if stage < k else world_size for k in (3, 2, 1)]
    return {
        "parameters": 4 * n / share[0],
        "gradients": 4 * n / share[1],
        "Adam moments": 8 * n / share[2],
        "activations": _activation_bytes(config, device),
    }


def _activation_bytes(config: Config, device: str) -> float:
    model, rows, length = config.model, config.training.micro_batch, config.shard_len
    names, on_cpu = model.layers, device == "cpu"
    kept = {name: (_saved_bytes if on_cpu else _kernels_bytes)(name, config) for name in set(names)}
    stream = 4 * rows * length * model.d_model
    if config.training.activation_checkpointing:
        size = recomputed_together(len(names))
        group = max(sum(kept[name] for name in names[i : i + size]) for i in range(0, len(names), size))
        given = stream * (1.5 if config.training.precision == "bf16" else 2)  # h and y
        total = given * -(-len(names) // size) + group
    else:
        total = sum(kept[name] for name in names)
    if not on_cpu and config.training.precision == "bf16":  # autocast's copies of the weights
        total += 2 * sum(parameter_counts(model).values())
    chunk_logits = 3 * 4 * 2048 * padded_vocab(model.vocab_size)
    return total + 3 * stream + chunk_logits


def _kernels_bytes(name: str, config: Config) -> float:
    """Bytes one block keeps for its backward pass on a GPU."""
    model, rows, length = config.model, config.training.micro_batch, config.shard_len
    d, itemsize = model.d_model, 2 if config.training.precision == "bf16" else 4
    mixer = mixers.kept_bytes(name, model, itemsize, length)
    return rows * length * (itemsize * d + mixer)  # what the norm makes of the residual stream


def _saved_bytes(name: str, config: Config) -> float:
    """Bytes one block keeps for its backward pass on a CPU, counted on at most 512 tokens a row and scaled up."""
    model, rows, length = config.model, config.training.micro_batch, min(config.shard_len, 512)
    seen: dict[int, torch.Tensor] = {}

    def keep(tensor):
        if not tensor.is_leaf or not tensor.requires_grad:
            seen[id(tensor.untyped_storage())] = tensor
        return tensor

    with FakeTensorMode():
        block = Block(mixers.build_mixer(name, model), model.d_model, model.norm_eps)
        h = torch.empty(rows, length, model.d_model, requires_grad=True)
        documents = Documents.whole(rows, length)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.training.precision == "bf16")
        with autocast, saved_tensors_hooks(keep, lambda t: t):
            block(h, None, documents)
    return sum(t.untyped_storage().nbytes() for t in seen.values()) * config.shard_len / length
