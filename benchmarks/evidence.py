"""Does a learned clock pay? Small models of every variant on one text, equal parameters and tokens, on one GPU.

    python benchmarks/evidence.py --data DATA --score wikitext-103=OTHER --out FILE.jsonl
    python benchmarks/evidence.py --out FILE.jsonl --report

First each variant's learning rate is chosen by short runs, or by whole ones on the first seed where --search-tokens says as
many as --tokens; then it is trained on --seeds seeds; plain Mamba also on fewer tokens, so that the others can be compared with
it at equal FLOPs and equal time. Trained with AdamW and a cosine schedule as launch/pretrain.py does, without its launcher;
several runs share the GPU. Run again, it goes on where it stopped: a run's line in FILE.jsonl is written when it is done. DATA
and OTHER: prepared folders of one tokenizer (launch/prepare_data.py).
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from harness import DEVICE, synchronize

from data_pipeline.stream import TokenStream, documents
from serpent_scale.config import ModelConfig, ScheduleConfig, SerpentConfig
from serpent_scale.errors import UserError, exit_on_user_error
from serpent_scale.evaluation.perplexity import TokenText, score
from serpent_scale.model.accounting import flops_per_token, parameter_counts
from serpent_scale.model.language_model import LanguageModel
from serpent_scale.model.placements import placements
from serpent_scale.training.batches import DeviceBatch
from serpent_scale.training.graphs import GraphedForward
from serpent_scale.training.optimizer import GuardedAdamW, learning_rate, parameter_groups

REFERENCE = "mamba"
PLACES = [name for name in placements(ModelConfig()) if name != REFERENCE]
CLOCKS = {
    "uniform": {"clock": "uniform"},
    "learned": {},
    **{how: {"teach": how} for how in ("centred", "confidence", "surprise", "worth")},
    "next": {"teach": "next_surprise"},
    "routed": {"clock": "routed"},
}
LAYERS = {
    "stride": {"clock": "stride"},
    "mean": {"window": "segment_mean"},
    "figure2": {"window": "pointwise", "restore": "hold", "join": "project"},
    "held": {"restore": "hold"},
    "projected": {"clock": "uniform", "join": "project"},
}
VARIANTS = {  # where compression sits (serpent_scale/model/placements.py), settings of SeRpEnt
    REFERENCE: (REFERENCE, {}),
    **{f"{place}/{clock}": (place, CLOCKS[clock]) for clock in ("uniform", "learned") for place in PLACES},
    **{f"{place}/{clock}": (place, CLOCKS[clock]) for place in ("alternating", "hourglass") for clock in CLOCKS},
    **{f"alternating/{name}": ("alternating", settings) for name, settings in LAYERS.items()},
    "serpent/projected": ("serpent", LAYERS["projected"]),
}
SHORTER = (0.5, 0.7)  # of the tokens: what Mamba is also trained on


@dataclasses.dataclass(frozen=True)
class Job:
    variant: str
    lr: float
    seed: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Setup:
    data: str
    scores: tuple[tuple[str, str], ...]
    vocab_size: int
    d_model: int
    n_layers: int
    rows: int
    length: int

    def model(self, variant: str) -> ModelConfig:
        place, settings = VARIANTS[variant]
        return placements(ModelConfig(
            vocab_size=self.vocab_size, d_model=self.d_model, n_layers=self.n_layers, serpent=SerpentConfig(**settings)
        ))[place]


class Trainer:
    """A model on its way: `step()` is one optimizer step on the stream's next batch."""

    def __init__(self, job: Job, setup: Setup):
        torch.manual_seed(job.seed)
        self.setup = setup
        self.model = LanguageModel(setup.model(job.variant)).to(DEVICE)
        if DEVICE == "cuda":
            self.model.forward = GraphedForward(self.model)
        self.optimizer = GuardedAdamW(parameter_groups(self.model, 0.1), clip=1.0, lr=job.lr, betas=(0.9, 0.95))
        self.stream = TokenStream(setup.data, "train", setup.length, seed=job.seed, shuffle_block=4096)
        self.n_steps = max(2, job.tokens // (setup.rows * setup.length))
        self.schedule, self.peak, self.done = ScheduleConfig(warmup_steps=max(1, self.n_steps // 10)), job.lr, 0

    def step(self) -> torch.Tensor:
        rows, length = self.setup.rows, self.setup.length
        batch = DeviceBatch.of(self.stream.batch(self.done * rows, rows), torch.device(DEVICE))
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = self.model(batch.tokens, batch.documents, batch.labels)[0] / (rows * length)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.done, self.schedule, self.n_steps, self.peak)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return loss.detach()


def run(job: Job, setup: Setup) -> dict:
    started = time.time()
    trainer = Trainer(job, setup)
    losses = [trainer.step() for _ in range(trainer.n_steps)]
    last = torch.stack(losses[-max(1, len(losses) // 50) :]).mean().item()
    result = {**dataclasses.asdict(job), "steps": trainer.n_steps, "train": last}
    for name, folder in setup.scores:
        text = TokenText.join(documents(folder, "validation"))
        scored = score(trainer.model, text, "windows", setup.length, rows=4 * setup.rows, autocast=True)
        result[name] = scored.nll / scored.tokens
    return {**result, "seconds": round(time.time() - started, 1)}


def step_time(variant: str, setup: Setup, steps: int = 30) -> float:
    """Median ms of a step, alone on the device."""
    trainer = Trainer(Job(variant, 1e-4, 0, 10**9), setup)
    graphs, times = getattr(trainer.model.forward, "graphs", {}), []
    for _ in range(10 * steps):
        before, start = dict(graphs), time.perf_counter()
        trainer.step()
        synchronize()
        if graphs == before:  # neither compiled nor captured
            times.append(1e3 * (time.perf_counter() - start))
        if len(times) == steps:
            break
    return statistics.median(times)


def attempt(job: Job, setup: Setup) -> dict:
    try:
        return run(job, setup)
    except Exception as error:  # one variant's failure must not stop the others
        return {**dataclasses.asdict(job), "error": f"{type(error).__name__}: {error}"[:500]}


def run_all(jobs: list[Job], setup: Setup, out: Path, workers: int) -> None:
    done = {tuple(line[f.name] for f in dataclasses.fields(Job)) for line in read(out) if "seed" in line}
    jobs = [job for job in jobs if dataclasses.astuple(job) not in done]
    if not jobs:
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool, out.open("a") as file:
        running = [pool.submit(attempt, job, setup) for job in jobs]
        for n, future in enumerate(as_completed(running), 1):
            result = future.result()
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(f"{n}/{len(jobs)}", json.dumps(result), flush=True)


def read(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []


def best_lr(lines: list[dict], variant: str, tokens: int, key: str, seed: int) -> float | None:
    found = [(line[key], line["lr"]) for line in lines if line.get("variant") == variant and line.get("tokens") == tokens
             and line["seed"] == seed and math.isfinite(line.get(key, math.nan))]  # fmt: skip
    return min(found)[1] if found else None


def report(out: Path) -> str:
    lines = read(out)
    head = next(line for line in lines if "setup" in line)
    setup, tokens = Setup(**{**head["setup"], "scores": tuple(map(tuple, head["setup"]["scores"]))}), head["tokens"]
    names, times = [name for name, _ in setup.scores], {line["timed"]: line["ms"] for line in lines if "timed" in line}
    chosen = {variant: best_lr(lines, variant, tokens, "own", 1) for variant in VARIANTS}
    runs = [line for line in lines if line.get("seed") and "error" not in line and line["lr"] == chosen[line["variant"]]]

    def mean(rows: list[dict], name: str) -> float:
        return statistics.mean(row[name] for row in rows)

    curve = {}
    for row in runs:
        if row["variant"] == REFERENCE:
            curve.setdefault(row["tokens"], []).append(row)
    curve = sorted((n, mean(rows, names[0])) for n, rows in curve.items())
    flops = {variant: flops_per_token(setup.model(variant), setup.length).training for variant in VARIANTS}
    columns = ["variant", "parameters", "MFLOP a token", "ms a step", "lr", *names, "seeds", "against Mamba at equal tokens",
               "FLOPs", "time"]  # fmt: skip
    table = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for variant in VARIANTS:
        rows = [row for row in runs if row["variant"] == variant and row["tokens"] == tokens]
        if not rows:
            continue
        losses = [mean(rows, name) for name in names]
        spread = "/".join(f"{row[names[0]]:.3f}" for row in sorted(rows, key=lambda row: row["seed"]))
        ms = times.get(variant, math.nan)
        shares = 1, flops[variant] / flops[REFERENCE], ms / times.get(REFERENCE, math.nan)
        cells = [variant, f"{sum(parameter_counts(setup.model(variant)).values()) / 1e6:.2f}M", f"{flops[variant] / 1e6:.0f}",
                 f"{ms:.1f}", f"{rows[0]['lr']:g}", *(f"{loss:.4f}" for loss in losses), spread,
                 *(f"{losses[0] - at(curve, tokens * share):+.3f}" for share in shares)]  # fmt: skip
        table.append("| " + " | ".join(cells) + " |")
    return "\n".join(table)


def at(curve: list[tuple[int, float]], tokens: float) -> float:
    """Loss after so many tokens: linear in their logarithm between the runs next to it, and beyond them."""
    if len(curve) < 2 or not math.isfinite(tokens):
        return curve[0][1] if curve and curve[0][0] == tokens else math.nan
    after = min(max(1, sum(n < tokens for n, _ in curve)), len(curve) - 1)
    (a, low), (b, high) = curve[after - 1], curve[after]
    return low + (high - low) * math.log(tokens / a) / math.log(b / a)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a run")
    parser.add_argument("--report", action="store_true", help="print the table of FILE.jsonl and stop")
    parser.add_argument("--data", help="folder to train and score on")
    parser.add_argument("--score", action="append", default=[], metavar="NAME=FOLDER",
                        help="also score this one's validation split")  # fmt: skip
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--phase", nargs="+", default=["search", "train", "time"], choices=["search", "train", "time"])
    parser.add_argument("--d-model", type=int, default=512, help="from 512 on widths are aligned, and fast")
    parser.add_argument("--n-layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=16, help="sequences a step (default 16)")
    parser.add_argument("--length", type=int, default=1024, help="tokens a sequence (default 1024)")
    parser.add_argument("--tokens", type=int, default=24_000_000)
    parser.add_argument("--search-tokens", type=int, default=4_000_000)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=4, help="runs at once on the GPU (default 4)")
    return parser.parse_args()


@exit_on_user_error
def main() -> None:
    arguments = parse_arguments()
    if arguments.report:
        return print(report(arguments.out))
    if not arguments.data:
        raise UserError("--data: needed to train; or --report for the table of what there is")
    if arguments.phase == ["search"] and len(arguments.lrs) == 1:
        raise UserError("--phase search: one learning rate leaves nothing to choose; name several --lrs, or --phase train")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the workers
    stream = TokenStream(arguments.data, "train", arguments.length, seed=0, shuffle_block=4096)
    scores = [("own", arguments.data), *(tuple(text.split("=", 1)) for text in arguments.score)]
    setup = Setup(
        arguments.data, tuple(scores), stream.index.vocab_size, arguments.d_model, arguments.n_layers, arguments.rows,
        arguments.length,
    )  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if not read(arguments.out):
        head = {"setup": dataclasses.asdict(setup), "tokens": arguments.tokens, "search_tokens": arguments.search_tokens}
        arguments.out.write_text(json.dumps(head) + "\n")
    searched = int(arguments.search_tokens == arguments.tokens)  # the seed: whole runs are the first of those to come
    if "search" in arguments.phase and len(arguments.lrs) > 1:
        search = [Job(variant, lr, searched, arguments.search_tokens) for variant in arguments.only for lr in arguments.lrs]
        run_all(search, setup, arguments.out, arguments.workers)
    if "train" in arguments.phase:
        jobs, lines = [], read(arguments.out)
        for variant in arguments.only:
            lr = best_lr(lines, variant, arguments.search_tokens, "own", searched) if len(arguments.lrs) > 1 else arguments.lrs[0]
            if lr is None:
                continue
            lengths = [arguments.tokens, *(int(share * arguments.tokens) for share in SHORTER * (variant == REFERENCE))]
            jobs += [Job(variant, lr, seed, tokens) for tokens in lengths for seed in range(1, 1 + arguments.seeds)]
        run_all(jobs, setup, arguments.out, arguments.workers)
    if "time" in arguments.phase:
        for variant in arguments.only:
            line = {"timed": variant, "ms": step_time(variant, setup)}
            print(json.dumps(line), flush=True)
            with arguments.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
    print(report(arguments.out))


if __name__ == "__main__":
    main()
