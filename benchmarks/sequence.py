"""Sequences shared by GPUs: training steps on 1 and more of them, and one layer by state passing against all-to-all.

    python benchmarks/sequence.py --ranks 1 2 --append
    python benchmarks/sequence.py --ranks 2 --lengths 1048576 --checkpointing --append
    python benchmarks/sequence.py --size tiny --lengths 256 512 --steps 2        # on CPUs: tries the script

Each measurement has processes of its own, one a device, over NCCL or gloo. A training step is the trainer's, one sequence of
made-up data a step. The layer is a Mamba layer, forward and backward, in bf16; its all-to-all form is how a layer is shared by
heads: tokens are exchanged for channels before the convolution and back after the gate.
"""
from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import harness
import torch
import torch.distributed as dist
import torch.nn.functional as F
import trainer_runs
from harness import Spread
from step import SIZES, VOCABULARY
from torch import Tensor

from serpent_scale.config import ModelConfig, parse_config
from serpent_scale.kernels.causal_conv1d import causal_conv1d
from serpent_scale.kernels.selective_scan import selective_scan
from serpent_scale.model.documents import Documents
from serpent_scale.model.mamba import Mamba

LIMIT = 600.0  # seconds for one measurement


class AllToAll(torch.autograd.Function):
    """(B, L / P, D) of this rank's tokens -> (B, L, D / P) of its channels, or back."""

    @staticmethod
    def forward(ctx, x, to_channels: bool):
        ctx.to_channels = to_channels
        ranks = dist.get_world_size()
        cut, join = (2, 1) if to_channels else (1, 2)
        sent = torch.stack(x.chunk(ranks, cut))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        return torch.cat(received.unbind(0), join)

    @staticmethod
    def backward(ctx, grad):
        return AllToAll.apply(grad, not ctx.to_channels), None


class SumOfRanks(torch.autograd.Function):
    """The sum over ranks, of which each rank uses all; the gradients of their uses are summed too."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return SumOfRanks.apply(grad)


def all_to_all_layer(mixer: Mamba, x: Tensor) -> Tensor:
    """The layer, its channels shared by ranks between its two wide projections. x (B, L / P, d)."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    size = mixer.d_inner // ranks
    own = slice(rank * size, (rank + 1) * size)
    u, z = (AllToAll.apply(half.contiguous(), True) for half in mixer.in_proj(x).chunk(2, -1))
    u, _ = causal_conv1d(u, mixer.conv_weight[own], mixer.conv_bias[own])
    projected = SumOfRanks.apply(F.linear(u, mixer.x_proj.weight[:, own].to(u.dtype)))
    dt, B, C = projected.split([mixer.rank, mixer.d_state, mixer.d_state], -1)
    dt = F.linear(dt, mixer.dt_proj.weight[own].to(dt.dtype))
    y, _ = selective_scan(u, dt, -torch.exp(mixer.A_log[own]), B, C, mixer.D[own], z, mixer.dt_bias[own])
    return mixer.out_proj(AllToAll.apply(y, False))


def train(ranks, arguments, length: int) -> dict:
    d_model, layers = SIZES[arguments.size]
    model = ModelConfig(vocab_size=VOCABULARY, d_model=d_model, n_layers=layers, pattern=arguments.pattern)
    config = trainer_runs.configure(
        model, arguments.data, seq_len=length, global_batch=1, micro_batch=1, sequence=ranks.world_size,
        zero_stage=arguments.zero_stage, checkpointing=arguments.checkpointing,
    )
    return trainer_runs.measure(ranks, config, arguments.warmup, arguments.steps)


def layer(ranks, arguments, length: int) -> dict:
    """ms of a Mamba layer's forward and backward pass: state passing, all-to-all; and how far their outputs lie apart."""
    from serpent_scale.parallel.sequence import Sequence

    config = parse_config({"training": {"max_steps": 1000}}).model
    d_model, _ = SIZES[arguments.size]
    torch.manual_seed(0)
    mixer = Mamba(d_model, 2 * d_model, d_model, replace(config.mamba)).to(ranks.device)
    sequence = Sequence(ranks.world_size, ranks.world_size, ranks.device)
    whole = torch.randn(1, length, d_model, generator=torch.Generator().manual_seed(1))
    own, dtype = sequence.own(length), torch.bfloat16 if harness.DEVICE == "cuda" else torch.float32
    x = whole[:, own].to(ranks.device, dtype).requires_grad_()
    documents = sequence.shard(Documents.whole(1, length, ranks.device))
    forms = {
        "state passing": lambda: documents.shard.mix(mixer, x, documents, None)[0],
        "all-to-all": lambda: all_to_all_layer(mixer, x),
    }
    found, outputs = {}, []
    for name, form in forms.items():

        def step() -> Tensor:
            with torch.autocast(harness.DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = form()
            torch.autograd.grad(y, [x, *mixer.parameters()], torch.ones_like(y))
            return y.detach()

        outputs.append(step())
        if harness.DEVICE == "cuda":  # as in training: the host is no part of it
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step()
            found[name] = vars(harness.time_steps(graph.replay, arguments.warmup, arguments.steps))
            graph.reset()
        else:
            found[name] = vars(harness.time_steps(step, arguments.warmup, arguments.steps))
    return found | {"apart": harness.relative_error(*outputs)}


def start(world_size: int, arguments: argparse.Namespace) -> list[dict]:
    """What so many ranks find at each length."""
    found = []
    for length in arguments.lengths:
        for what in (train, layer) if world_size > 1 and not arguments.checkpointing else (train,):
            try:
                result = harness.run_ranks(world_size, what, arguments, length, seconds=LIMIT)
            except harness.RanksFailed as error:
                result = {"failed": str(error)}
            found.append({"what": what.__name__, "ranks": world_size, "length": length, **result})
            print(json.dumps({key: value for key, value in found[-1].items() if key != "losses"}), flush=True)
    return found


def tables(found: list[dict]) -> list[str]:
    steps = {(r["ranks"], r["length"]): r for r in found if r["what"] == "train"}
    rows = []
    for (ranks, length), r in sorted(steps.items(), key=lambda item: item[0][::-1]):
        if "failed" in r:
            rows.append([f"{length:,}", str(ranks), r["failed"], *[""] * 6])
            continue
        speed, alone = 1e3 * length / r["ms"]["median"], steps.get((1, length), {}).get("ms", {}).get("median")
        efficiency = f"{alone / r['ms']['median'] / ranks:.1%}" if alone else "-"
        rows.append([
            f"{length:,}", str(ranks), f"{speed:,.0f}", Spread(**r["ms"]).text(lambda v: f"{v:.1f}"), efficiency,
            f"{r['gib']:.1f}", str(r["exchanges"]), f"{r['bytes'] / 1e6:.2f}", f"{r['load']:.3f}",
        ])  # fmt: skip
    head = ["tokens a sequence", "ranks", "tokens/s", "ms per step", "efficiency", "peak GiB", "exchanges a step",
            "MB sent by rank 0", "emitted, largest / mean"]  # fmt: skip
    parts = [harness.table(head, rows)]
    layers = [
        [f"{r['length']:,}", str(r["ranks"]),
         *(Spread(**r[k]).text(lambda v: f"{v:.2f}") for k in ("state passing", "all-to-all")),
         f"{r['all-to-all']['median'] / r['state passing']['median']:.2f}", f"{r['apart']:.1e}"]
        for r in found if r["what"] == "layer" and "failed" not in r
    ]  # fmt: skip
    if layers:
        head = ["tokens a sequence", "ranks", "state passing, ms", "all-to-all, ms", "times as fast", "outputs apart"]
        parts.append("One Mamba layer, forward and backward:\n\n" + harness.table(head, layers))
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="370M")
    parser.add_argument("--pattern", nargs="+", default=["mamba"], metavar="MIXER", help="mixers of the layers, in turn")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks to share a sequence by")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536, 262144], help="tokens a sequence")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10, help="steps measured, at most")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    harness.add_report_arguments(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments.data = trainer_runs.write_data(Path(folder), VOCABULARY, max(arguments.lengths))
        found = [result for world_size in arguments.ranks for result in start(world_size, arguments)]
    recomputed = ", activations recomputed" if arguments.checkpointing else ""
    title = f"Shared sequences, {arguments.size}, {' and '.join(arguments.pattern)}, ZeRO-{arguments.zero_stage}{recomputed}"
    harness.report(title, tables(found), arguments)


if __name__ == "__main__":
    main()
