"""A batch of the token stream on this rank's device."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from data_pipeline.stream import Batch
from serpent_scale.model.documents import Documents
from serpent_scale.parallel.sequence import Sequence


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """A batch of the stream on a device."""

    tokens: torch.Tensor
    labels: torch.Tensor
    documents: Documents
    digest: int  # of the samples; 0 on ranks that share them with one that counts, as are tokens_skipped
    tokens_skipped: int

    @classmethod
    def of(cls, batch: Batch, device: torch.device, sequence: Sequence | None = None, carried: bool = False) -> DeviceBatch:
        """sequence: the ranks that share the rows, of which this one takes its tokens. carried: whether states are handed on."""
        documents = Documents(send(batch.reset, device), batch.lengths)
        if sequence is None:
            return cls(send(batch.tokens, device), send(batch.labels, device), documents, batch.digest, batch.tokens_skipped)
        own, counts = sequence.own(batch.tokens.shape[1]), sequence.ring.rank == 0
        tokens, labels = (send(tensor[:, own].contiguous(), device) for tensor in (batch.tokens, batch.labels))
        return cls(tokens, labels, sequence.shard(documents, carried), counts * batch.digest, counts * batch.tokens_skipped)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that waits for nothing: a GPU reads pinned memory when it comes to it."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
