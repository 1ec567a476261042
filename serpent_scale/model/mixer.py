"""What a mixer is to the stack, to SeRpEnt and to the accounting. `mixers.py` knows them by name."""
from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from serpent_scale.model.documents import Documents


class Mixer(nn.Module):
    """Mixes tokens causally and with a state of constant size (attention: a cache of the document): (B, L, d_in) ->
    (B, L, d_out), by d_inner inner channels.

    config is the mixer's own section of the model's configuration; it has `expand`.
    """

    fixed_shapes = True  # inside a pass they depend on documents by the slots of compressed branches alone

    def __init__(self, d_in: int, d_inner: int, d_out: int, config: Any):
        super().__init__()

    def forward(self, x: Tensor, documents: Documents, state: Any = None) -> tuple[Tensor, Any]:
        """x (B, L, d_in) -> (y (B, L, d_out), state after x), any L. state: what an earlier piece of the rows returned.

        The state is dropped where documents.reset is True. Slots that are not live leave the state as it is; their outputs
        mean nothing.
        """
        raise NotImplementedError

    @staticmethod
    def width(d_model: int, config: Any) -> int:
        """d_inner of a layer of its own."""
        return int(config.expand * d_model)

    @staticmethod
    def width_unit(config: Any) -> int:
        """d_inner is a multiple of this."""
        return 1

    @staticmethod
    def parameter_count(d_in: int, d_inner: int, d_out: int, config: Any) -> int:
        raise NotImplementedError

    @staticmethod
    def flops(d_in: int, d_inner: int, d_out: int, config: Any, length: int) -> tuple[float, float]:
        """Forward FLOPs per token, in rows of `length` tokens: (matrix products, the rest)."""
        raise NotImplementedError

    @staticmethod
    def kept_bytes(d_inner: int, config: Any, itemsize: int) -> float:
        """What a GPU keeps of one token for the backward pass, the input left out."""
        raise NotImplementedError
