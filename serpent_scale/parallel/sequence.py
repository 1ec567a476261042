"""Sequence parallelism: each sequence is cut into contiguous shards, one a rank, over a mesh of data x sequence.

A mixer's forward pass comes in parts (`Mixer.begin_all`) between which ranks make two exchanges; parameters and the optimizer
know nothing of it: to DeepSpeed all ranks are data-parallel ones.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from serpent_scale.model.documents import Documents, Shard
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

    def shard(self, whole: Documents) -> Documents:
        """Of this rank's tokens; `whole` is of the sequences, on this rank's device."""
        own = self.own(whole.reset.shape[1])
        return whole.part(own.start, own.stop, Shard(whole, own.start, self._mix, self._count))

    def _mix(self, mixer, x: Tensor, documents: Documents, state):
        ring, borders = self.ring, self.borders(documents.shard.whole.reset.shape[1])
        reach, begin, end = mixer.reach, *borders[ring.rank : ring.rank + 2]
        # Those after this shard begin to count `reach` tokens before their own first.
        ends = [min(max(0, border - reach), end) - begin for border in borders[:-1]]
        outline = mixer.outline(x, documents, [max(0, n) for n in ends])
        x, before, outlines = RowsBefore.apply(x, ring, borders, reach, outline)
        begun, join = mixer.begin_all(x, before, [] if outlines is None else list(outlines), documents, state)
        phases = [part.phases for part in begun]
        initial, spans = states_before(
            ring, phases, [part.initial for part in begun], lambda: [part.meanwhile() for part in begun]
        )
        ran, rest = [], []
        for part, h in zip(phases, initial):
            y, after, *others = part.run(h)
            ran += y, after
            rest.append(others)
        ran = Continue.apply(ring, phases, spans, *ran, *(t for part in phases for t in part.saved))
        return join([part.finish(y, after, *others) for part, y, after, others in zip(begun, ran[::2], ran[1::2], rest)])

    def _count(self, emitted: Tensor) -> None:
        self.elements += emitted.sum()

    def last_states(self, states: list) -> list:
        """The states after the whole sequences, on every rank; each passes its own."""
        return _map(self._from_last, states)

    def _from_last(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        torch.distributed.broadcast(tensor, group=self.ring.group, group_src=self.ring.size - 1)
        return tensor


def load(elements: list[float], size: int) -> float:
    """Largest over mean number of elements emitted per rank, of the worst group of `size` neighbouring ranks."""
    groups = [elements[i : i + size] for i in range(0, len(elements), size)]
    return max(max(group) * size / max(1.0, sum(group)) for group in groups)


def _map(fn, value):
    """fn of each tensor in lists and tuples, NamedTuples among them."""
    if isinstance(value, Tensor):
        return fn(value)
    parts = [_map(fn, part) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
