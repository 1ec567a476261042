"""Do all ranks hold the same parameters? A flaky device or a lost update lets replicas drift apart without a sign."""
from __future__ import annotations

import torch
from torch import nn

from serpent_scale.parallel.processes import on_every_rank


CHUNK = 1 << 22  # elements at a time: the products take 8 bytes each


class ReplicaError(RuntimeError):
    """Ranks hold different parameters. Resuming from a checkpoint mends it, unless a device is broken."""


def check_replicas(model: nn.Module, step: int) -> None:
    """Compare a digest of each parameter between ranks; at ZeRO stage 3 only those that are not partitioned, the others have
    no replica. All ranks together. Raises ReplicaError on all of them."""
    named = [(name, p) for name, p in model.named_parameters() if p.numel()]
    if not named:
        return
    digests = torch.stack([_digest(p.detach()) for _, p in named]).tolist()
    by_rank = on_every_rank(lambda: digests)
    for rank, theirs in enumerate(by_rank):
        odd = [name for (name, _), a, b in zip(named, theirs, by_rank[0]) if a != b]
        if odd:
            raise ReplicaError(
                f"after step {step} rank {rank} and rank 0 hold different parameters: {', '.join(odd[:5])}, {len(odd)} in all; "
                "not saved, start again to resume from the last checkpoint, and look for a faulty device if it comes back"
            )


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    """A sum over the bits, mod 2^64, weighted by position: exact, so the same wherever the tensor is the same."""
    bits, total = tensor.contiguous().view(-1).view(torch.int16), torch.zeros((), dtype=torch.int64, device=tensor.device)
    odd = 2 * torch.arange(min(CHUNK, len(bits)), device=bits.device) + 1
    for chunk in bits.split(CHUNK):
        total = 31 * total + (chunk * odd[: len(chunk)]).sum()
    return total
