"""A whole training step without the launcher: forward, backward and AdamW in a bare loop, tokens/s and peak memory.

    python benchmarks/step.py --size 370M --pattern mamba serpent alternating --peer --append
    python benchmarks/step.py --size 370M --pattern mamba runs hourglass --profile

bf16 autocast over fp32 parameters, torch's fused AdamW, no activation checkpointing, random tokens. `--peer` adds
mamba_ssm's MambaLMHeadModel of the same size with plain cross-entropy, in the same process and loop.
"""
from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import harness
import torch
import torch.nn.functional as F
from harness import DEVICE, Spread
from torch import Tensor, nn

from serpent_scale.config import ModelConfig
from serpent_scale.model.accounting import flops_per_token
from serpent_scale.model.documents import Documents
from serpent_scale.model.language_model import LanguageModel
from serpent_scale.model.placements import placements
from serpent_scale.training.graphs import GraphedForward
from serpent_scale.training.optimizer import parameter_groups

SIZES = {"130M": (768, 24), "370M": (1024, 48), "1.4B": (2048, 48), "tiny": (64, 6)}  # d_model, layers; tiny tries the script
VOCABULARY = 50280
PEER = "mamba_ssm"
PATTERNS = list(placements(ModelConfig()))


@dataclass
class Measured:
    name: str
    parameters: int
    step: Spread  # ms
    gib: float
    losses: tuple[float, float]
    flops: float | None  # of one token's step
    profile: str = ""


def model_config(size: str, pattern: str) -> ModelConfig:
    d_model, layers = SIZES[size]
    return placements(ModelConfig(vocab_size=VOCABULARY, d_model=d_model, n_layers=layers))[pattern]


def our_model(config: ModelConfig, rows: int, length: int, graphs: bool) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    model = LanguageModel(config)
    if graphs:
        model.forward = GraphedForward(model)
    documents = Documents.whole(rows, length, device=DEVICE)
    return model, lambda tokens, labels: model(tokens, documents, labels)[0] / labels.numel()


def peer_model(size: str) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    d_model, layers = SIZES[size]
    model = MambaLMHeadModel(MambaConfig(d_model=d_model, n_layer=layers, vocab_size=VOCABULARY))
    return model, lambda tokens, labels: F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())


def measure(name: str, size: str, arguments: argparse.Namespace) -> Measured:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    config = None if name == PEER else model_config(size, name)
    with torch.device(DEVICE):
        model, loss_of = peer_model(size) if config is None else our_model(config, arguments.batch, arguments.length, DEVICE == "cuda" and not arguments.eager)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=3e-4, betas=(0.9, 0.95), fused=DEVICE == "cuda")
    batches = [torch.randint(VOCABULARY, (arguments.batch, arguments.length + 1), device=DEVICE) for _ in range(4)]
    losses = []

    def step(i: int) -> None:
        tokens = batches[i % len(batches)]
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = loss_of(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    for i in range(arguments.warmup):
        step(i)
    harness.synchronize()
    clock = [_now()]
    for i in range(arguments.steps):
        step(i)
        clock.append(_now())
    harness.synchronize()
    spread = Spread.of([_between(a, b) for a, b in zip(clock, clock[1:])])
    gib = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else float("nan")
    profile = profile_tables(step, spread.median) if arguments.profile else ""
    return Measured(
        name, sum(p.numel() for p in model.parameters()), spread, gib, (losses[0].item(), losses[-1].item()),
        flops_per_token(config, arguments.length).training if config else None, profile,
    )


def _now():
    if DEVICE == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(a, b) -> float:
    return 1e3 * (b - a) if DEVICE == "cpu" else a.elapsed_time(b)


def rows_of(results: list[Measured], tokens: int) -> list[list[str]]:
    by_name = {r.name: r.step.median for r in results}

    def times(r: Measured, other: str) -> str:
        return f"{by_name[other] / r.step.median:.2f}" if other in by_name and other != r.name else "-"

    rows = []
    for r in results:
        speed = Spread(*(1e3 * tokens / t for t in (r.step.median, r.step.high, r.step.low)))
        rate = f"{r.flops * speed.median / 1e12:.0f}" if r.flops else "-"
        rows.append([
            r.name, f"{r.parameters / 1e6:.1f}M", speed.text(lambda v: f"{v:,.0f}"), r.step.text(lambda v: f"{v:.1f}"),
            f"{r.gib:.1f}", rate, times(r, PEER), times(r, "mamba"), f"{r.losses[0]:.2f} → {r.losses[1]:.2f}",
        ])
    return rows


HEAD = ["model", "parameters", "tokens/s, median (10-90 %)", "ms per step", "peak GiB", "model TFLOP/s", "× mamba_ssm",
        "× our Mamba", "loss, first → last"]

def profile_tables(step: Callable[[int], None], step_ms: float) -> str:
    """Where the device's time goes, in ms per step: by family of kernels, and the longest kernels."""
    if DEVICE == "cpu":
        return "(the profile is of CUDA kernels)"
    times, launches = harness.kernel_times(step, 5)
    counts, idle = harness.by_family(launches), step_ms - sum(times.values())  # of the step without the profiler
    rows = [[name, f"{ms:.2f}", f"{100 * ms / step_ms:.1f}", f"{counts[name]:.0f}"]
            for name, ms in harness.by_family(times).most_common()]  # fmt: skip
    rows += [["between kernels", f"{idle:.2f}", f"{100 * idle / step_ms:.1f}", ""], ["step", f"{step_ms:.2f}", "100", ""]]
    ours = harness.our_kernels()
    longest = [[f"`{name[:90].replace('|', '/')}`", harness.family(name, ours), f"{ms:.2f}", f"{launches[name]:.0f}"]
               for name, ms in times.most_common(20)]  # fmt: skip
    return "\n\n".join([
        harness.table(["kernels", "ms per step", "% of step", "launches"], rows),
        harness.table(["longest kernels", "family", "ms per step", "launches"], longest),
    ])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="370M")
    parser.add_argument("--pattern", choices=PATTERNS, nargs="*", default=["mamba"])
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens a sequence")
    parser.add_argument("--steps", type=int, default=30, help="steps measured")
    parser.add_argument("--warmup", type=int, default=8, help="steps before them")
    parser.add_argument("--peer", action="store_true", help=f"measure {PEER}'s reference model too")
    parser.add_argument("--eager", action="store_true", help="our models without CUDA graphs")
    parser.add_argument("--profile", action="store_true", help="also say where the device's time goes")
    harness.add_report_arguments(parser)
    arguments = parser.parse_args()
    results, failures = [], []
    for name in [PEER] * arguments.peer + arguments.pattern:
        try:
            results.append(measure(name, arguments.size, arguments))
            print(f"{name}: {results[-1].step.text(lambda v: f'{v:.1f}')} ms a step", flush=True)
        except Exception as error:  # the other models are still worth measuring
            failures.append(f"{name}: failed, {harness.one_line(error)}")
            print(failures[-1], flush=True)
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    tokens = arguments.batch * arguments.length
    profiles = [f"Where the step of {r.name} goes:\n\n{r.profile}" for r in results if r.profile]
    title = f"Training step, {arguments.size}, {arguments.batch} × {arguments.length} tokens"
    harness.report(title, [harness.table(HEAD, rows_of(results, tokens)), "\n".join(failures), *profiles], arguments)


if __name__ == "__main__":
    main()
