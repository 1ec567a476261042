"""Pre-norm residual blocks, and a run of them as one mixer. Legend: B rows, L tokens."""
from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn

from serpent_scale.kernels.rms_norm import rms_norm
from serpent_scale.model.documents import Documents


class RMSNorm(nn.Module):
    """Adds y to the residual stream h (float32 or better) and normalises the sum, in the autocast dtype where that is on.

    Returns (normalised, sum). y None: there is nothing to add yet.
    """

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d_model)), eps

    def forward(self, h: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if y is None:
            return rms_norm(h, self.weight, self.eps, out_dtype=dtype)
        return rms_norm(y, self.weight, self.eps, h, dtype)


class Block(nn.Module):
    """(h, y) -> (h + y, mixer(norm(h + y))): what a mixer adds to the residual stream h is added by the norm after it, so that
    one kernel does both. y in the mixer's dtype, None before the first block."""

    def __init__(self, mixer: nn.Module, d_model: int, norm_eps: float):
        super().__init__()
        self.norm, self.mixer = RMSNorm(d_model, norm_eps), mixer

    def forward(self, h: Tensor, y: Tensor | None, documents: Documents, state=None):
        x, h = self.norm(h, y)
        if documents.shard is None:
            y, state = self.mixer(x, documents, state)
        else:
            y, state = documents.shard.mix(self.mixer, x, documents, state)
        return h, y, state


class Stack(nn.Module):
    """Blocks on a residual stream of their own, which begins as x: what they add to it, together. (B, L, d) -> (B, L, d).

    mixers: (B, L, d) -> (B, L, d), two or more.
    """

    def __init__(self, mixers: list[nn.Module], d: int, norm_eps: float):
        super().__init__()
        self.blocks = nn.ModuleList(Block(mixer, d, norm_eps) for mixer in mixers)

    def forward(self, x: Tensor, documents: Documents, state: tuple | None = None) -> tuple[Tensor, tuple]:
        start = x.to(torch.promote_types(x.dtype, torch.float32))
        h, y, after = start, None, []
        for block, given in zip(self.blocks, (None,) * len(self.blocks) if state is None else state):
            h, y, given = block(h, y, documents, given)
            after.append(given)
        return (h - start + y).to(y.dtype), tuple(after)

    @property
    def reach(self) -> int:
        """As `Mixer.reach`."""
        return sum(block.mixer.reach for block in self.blocks)

    def rounds(
        self, x: Tensor, begin: Callable[[nn.Module, Tensor, int, Any], Any], state: tuple | None = None
    ) -> Generator[Any, tuple[Tensor, Any], tuple[Tensor, tuple]]:
        """forward with a pause in each block. begin(mixer, x, how far back later blocks look on its outputs, state) -> what is
        yielded; what the mixer makes of it is sent."""
        start = x.to(torch.promote_types(x.dtype, torch.float32))
        h, y, after, reach = start, None, [], self.reach
        for block, given in zip(self.blocks, (None,) * len(self.blocks) if state is None else state):
            x, h = block.norm(h, y)
            reach -= block.mixer.reach
            y, given = yield begin(block.mixer, x, reach, given)
            after.append(given)
        return (h - start + y).to(y.dtype), tuple(after)

    @staticmethod
    def together(stacks: list[Stack], xs: list[Tensor], documents: list[Documents]) -> list[tuple[Tensor, tuple]]:
        """See `Mixer.together`; the stacks are equally deep."""
        starts = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in xs]
        hs, ys, after = starts, [None] * len(xs), []
        for blocks in zip(*(stack.blocks for stack in stacks)):
            xs, hs = zip(*(block.norm(h, y) for block, h, y in zip(blocks, hs, ys)))
            ys, states = zip(*type(blocks[0].mixer).together([block.mixer for block in blocks], xs, documents))
            after.append(states)
        return [((h - start + y).to(y.dtype), states) for h, start, y, states in zip(hs, starts, ys, zip(*after))]

    @property
    def out_projs(self) -> list[nn.Linear]:
        return [projection for block in self.blocks for projection in block.mixer.out_projs]
