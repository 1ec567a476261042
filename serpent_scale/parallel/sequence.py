"""Sequence parallelism: each sequence is cut into contiguous shards, one a rank, over a mesh of data x sequence.

A mixer's forward pass comes in parts (`Mixer.rounds`) between which ranks make exchanges; parameters and the optimizer
know nothing of it: to DeepSpeed all ranks are data-parallel ones.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._pytree import tree_flatten, tree_unflatten

from serpent_scale.model.documents import Documents, Shard
from serpent_scale.model.mixer import Asked, Begun
from serpent_scale.parallel.attention import ShardedAttention
from serpent_scale.parallel.exchange import Continue, Ring, RowsBefore, states_before


class Sequence:
    """This rank's place in the mesh. Ranks that share sequences are neighbours, so that they are of one host where they can."""

    def __init__(self, size: int, world_size: int, device: torch.device):
        mesh = init_device_mesh(device.type, (world_size // size, size), mesh_dim_names=("data", "sequence"))
        self.ring = Ring(mesh.get_group("sequence"))
        self.replica = mesh.get_local_rank("data")
        self.elements = torch.zeros((), dtype=torch.int64, device=device)  # emitted at this rank's tokens

    def borders(self, length: int) -> list[int]:
        """Where the shards of a sequence begin, and its end."""
        return [length * p // self.ring.size for p in range(self.ring.size + 1)]

    def own(self, length: int) -> slice:
        borders = self.borders(length)
        return slice(*borders[self.ring.rank : self.ring.rank + 2])

    def shard(self, whole: Documents, carried: bool = False) -> Documents:
        """Of this rank's tokens; `whole` is of the sequences, on this rank's device. carried: `last_states` will be asked for."""
        borders, rank = self.borders(whole.reset.shape[1]), self.ring.rank
        shard = Shard(whole, borders[rank], rank, tuple(borders), self._mix, self._count, carried)
        return whole.part(borders[rank], borders[rank + 1], shard)

    def _mix(self, mixer, x: Tensor, documents: Documents, state):
        ring, borders = self.ring, self.borders(documents.shard.whole.reset.shape[1])
        reach, begin, end = mixer.reach, *borders[ring.rank : ring.rank + 2]
        # Those after this shard begin to count `reach` tokens before their own first.
        ends = [min(max(0, border - reach), end) - begin for border in borders[:-1]]
        outline = mixer.outline(x, documents, [max(0, n) for n in ends])
        x, before, outlines = RowsBefore.apply(x, ring, borders, reach, outline)
        rounds = mixer.rounds(x, before, [] if outlines is None else list(outlines), documents, state)
        begun = next(rounds)
        while True:
            exchange = self._attend if isinstance(begun[0].phases, Asked) else self._pass
            try:
                begun = rounds.send([part.finish(*ran) for part, ran in zip(begun, exchange(begun))])
            except StopIteration as end:
                return end.value

    def _attend(self, begun: list[Begun]) -> list[tuple]:
        asked = [part.phases for part in begun]
        found = ShardedAttention.apply(self.ring, asked, *(t for part in asked for t in part[:3]))
        return [(y, *(self.ring.gather([t])[0] for t in part.told)) for y, part in zip(found, asked)]

    def _pass(self, begun: list[Begun]) -> list[tuple]:
        ring, phases = self.ring, [part.phases for part in begun]
        initial, spans = states_before(
            ring, phases, [part.initial for part in begun], lambda: [part.meanwhile() for part in begun]
        )
        ran, rest = [], []
        for part, h in zip(phases, initial):
            y, after, *others = part.run(h)
            ran += y, after
            rest.append(others)
        ran = Continue.apply(ring, phases, spans, *ran, *(t for part in phases for t in part.saved))
        return [(y, after, *others) for y, after, others in zip(ran[::2], ran[1::2], rest)]

    def _count(self, emitted: Tensor) -> None:
        self.elements += emitted.sum()

    def last_states(self, states: list) -> list:
        """The states after the whole sequences, on every rank; each passes its own."""
        leaves, form = tree_flatten(states)
        return tree_unflatten(self.ring.of_last(leaves), form)


def load(elements: list[float], size: int) -> float:
    """Largest over mean number of elements emitted per rank, of the worst group of `size` neighbouring ranks."""
    groups = [elements[i : i + size] for i in range(0, len(elements), size)]
    return max(max(group) * size / max(1.0, sum(group)) for group in groups)
