"""Checkpoints: what a save takes, how long training stands still for one, what the hashes add, what a resume takes.

    python benchmarks/checkpoint.py --parameters 50e6 --folder DIR

One process, ZeRO-1, fp32 on whatever device there is: 12 bytes a parameter.
"""
from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from serpent_scale.checkpoint import manifest, store
from serpent_scale.config import parse_config
from serpent_scale.parallel import processes

WIDTH, MATRICES = 1024, 8  # of one layer


class Layers(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH * MATRICES, bias=False) for _ in range(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(layer(x).square().mean() for layer in self.layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=50e6)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    ranks = processes.start()
    import deepspeed

    from serpent_scale.training.deepspeed_config import deepspeed_config
    from serpent_scale.training.optimizer import build_optimizer

    config = parse_config({"training": {"max_steps": 1000, "global_batch": 1, "micro_batch": 1, "precision": "fp32"}})
    model = Layers(round(args.parameters / (WIDTH * WIDTH * MATRICES))).to(ranks.device)
    engine, *_ = deepspeed.initialize(model=model, optimizer=build_optimizer(model, config, ranks.device),
                                      config=deepspeed_config(config, 1))

    def step(writing: store.Save | None = None) -> float:
        started = time.perf_counter()
        engine.backward(engine(torch.ones(1, WIDTH, device=ranks.device)))
        if writing is not None:
            writing.wait_for_copy()
        engine.step()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    undisturbed = statistics.median(step() for _ in range(5))
    waiting, moving, number = [], [], 0
    by = manifest.algorithm()
    real = manifest.ALGORITHMS[by]
    for kind in ["with hashes", "without"] * args.repeats:
        number += 1
        manifest.ALGORITHMS[by] = real if kind == "with hashes" else Blank
        saved = store.begin(engine, args.folder, number, {}, {}).finish(2)
        waiting.append((kind, saved.seconds))
    manifest.ALGORITHMS[by] = real
    copies = {}
    for i in range(args.repeats + 1):
        number += 1
        writing, steps = store.begin(engine, args.folder, number, {}, {}, copies), []
        while not writing.done:
            steps.append(step(writing))
        saved = writing.finish(2)
        if i:  # the first one makes the copies' memory
            moving.append((saved.seconds, saved.stall_seconds, statistics.median(steps) if steps else undisturbed))
    started = time.perf_counter()
    path, _ = store.newest(args.folder)
    store.load(engine, path)
    resume = time.perf_counter() - started
    with_hashes, without = (statistics.median(s for kind, s in waiting if kind == k) for k in ("with hashes", "without"))
    seconds, stall, slowed = (statistics.median(values) for values in zip(*moving))
    print(f"{saved.bytes / 1e9:.2f} GB; training waits: {with_hashes:.2f} s, of which the hashes {with_hashes - without:+.2f} s "
          f"({(with_hashes - without) / without:+.1%})")
    print(f"in the background: {seconds:.2f} s, training stands still for {stall:.3f} s of them ({stall / seconds:.1%}; "
          f"{stall / with_hashes:.1%} of a save that it waits for); a step takes {slowed * 1e3:.0f} ms meanwhile, "
          f"{undisturbed * 1e3:.0f} ms otherwise")
    print(f"verify and resume: {resume:.2f} s")
    processes.stop()


class Blank:
    """Stands for a hash that costs nothing."""

    def update(self, data) -> None:
        pass

    def hexdigest(self) -> str:
        return "0" * 64


if __name__ == "__main__":
    main()
