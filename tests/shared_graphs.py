"""Run by test_gpu.py under torchrun: shared sequences by CUDA graphs, exchanges included, against single launches."""
import numpy as np
import torch
import torch.distributed as dist

from serpent_scale.config import ModelConfig, SerpentConfig
from serpent_scale.model.documents import Documents
from serpent_scale.model.language_model import LanguageModel
from serpent_scale.parallel import processes
from serpent_scale.parallel.sequence import Sequence
from serpent_scale.training.graphs import GraphedForward

LENGTHS = (40,) * 12 + (33,), (513,)


def run(ranks: processes.Processes, pattern: list[str], graphed: bool):
    """Losses and gradients of batches of two kinds, in turn."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=97, d_model=64, n_layers=4, pattern=pattern, serpent=SerpentConfig(band=2.0))
    model = LanguageModel(config).to(ranks.device)
    sequence = Sequence(ranks.world_size, ranks.world_size, ranks.device)
    if graphed:
        model.forward = GraphedForward(model, shard=sequence.shard)
        processes.before_stop(model.forward.release)
    found = []
    for step in range(8):
        tokens = torch.randint(0, 97, (2, 513), generator=torch.Generator().manual_seed(step)).to(ranks.device)
        lengths, own = LENGTHS[step % 2], sequence.own(513)
        reset = torch.zeros_like(tokens, dtype=torch.bool)
        reset[:, np.cumsum((0,) + lengths[:-1])] = True
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = model(tokens[:, own], sequence.shard(Documents(reset, (lengths,) * 2)), tokens[:, own])
        loss.backward()
        found += [loss.detach().clone(), *(p.grad.clone() for p in model.parameters())]
        model.zero_grad(set_to_none=True)
    captured = [graph is not None for graph in model.forward.graphs.values()] if graphed else []
    assert all(captured) and (not graphed or captured), captured
    return found, sequence.elements.clone()


def main() -> None:
    ranks = processes.start()
    for pattern in (["mamba"], ["mamba2"], ["mamba", "serpent"]):
        (alone, emitted), (together, again) = (run(ranks, pattern, graphed) for graphed in (False, True))
        same = torch.tensor(all(torch.equal(a, b) for a, b in zip(alone, together)) and bool(emitted == again), device=ranks.device)
        dist.all_reduce(same, op=dist.ReduceOp.MIN)
        if not same:
            raise SystemExit(f"{pattern}: not the same to the bit")
        if ranks.rank == 0:
            print(f"{pattern}: the same to the bit", flush=True)
    processes.stop()


if __name__ == "__main__":
    processes.run_and_leave(main)
