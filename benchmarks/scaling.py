"""The GPUs of one host: training steps on 2, 4 or 8 of them against one, data parallel and with sequences shared.

    python benchmarks/scaling.py --append                                # all there is to measure, at most 25 minutes
    python benchmarks/scaling.py --minutes 9 --resume scaling.jsonl      # and again, until nothing is left; then with --append
    python benchmarks/scaling.py --small                                 # 8 ranks on CPUs: tries the script
    python benchmarks/scaling.py --minutes 0                             # what would be measured, in order

All is measured on the trainer's own steps, in bf16, each cell of the table in processes of its own: one that fails is a line of
the report, and the rest goes on. Results are added to a file of JSON lines as they come; with the same file the next call goes on
with what is missing (--again: and with what failed; FILE.work/logs has what its ranks printed). The most telling cells come
first. Kernels are compiled in steps before those that are measured, by the first cell that needs them; Triton keeps them for the
others.

Data parallel, ZeRO-1, 2 and 3: 16k tokens a GPU and step, against one GPU, which has nothing to shard; checkpoints saved, and
resumed at other numbers of ranks. One sequence shared by all GPUs: against as many tokens on one GPU, and against the cost model
of docs/sequence_parallel.md with the latency and the bandwidth that exchanges have here. Data x sequence: the losses of meshes of
equal global batch, against those of data parallelism alone; how far apart bf16 rounding takes them is seen from the latter with
each pass cut in two.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from dataclasses import replace as with_
from pathlib import Path

import harness
import torch
import torch.distributed as dist
import trainer_runs
from harness import ROOT, RanksFailed, RanksLate, Spread, time_steps
from step import VOCABULARY, model_config

from serpent_scale.config import Config
from serpent_scale.errors import UserError
from serpent_scale.model.language_model import LanguageModel
from serpent_scale.model.mamba import Mamba
from serpent_scale.model.serpent import Branch
from serpent_scale.parallel.sequence import Sequence

LEAST = 15.0  # seconds left below which no cell is begun
LIMIT = 240.0  # seconds for one cell
APART = 3.0  # losses count as equal up to so many times what another order of the same sums makes of them


@dataclass(frozen=True)
class Table:
    """What is measured, and how large."""

    sizes: tuple[str, ...]
    shared: tuple[str, str]  # sizes whose sequences are shared: of shards up to `long` tokens, and of longer ones
    lengths: tuple[int, ...]  # of shared sequences
    rows: int  # of a rank's pass
    seq_len: int
    loss_rows: int
    loss_length: int
    loss_steps: int = 50
    recompute: int = 1 << 15  # activations are recomputed where a shard has more tokens
    long: int = 1 << 18
    vocabulary: int = VOCABULARY
    document: int = 1 << 20  # tokens
    warmup: int = 5
    steps: int = 20
    transfer: int = 1 << 26  # bytes of a rank's part of a gather that is large


FULL = Table(("370M", "1.4B"), ("370M", "130M"), (1 << 16, 1 << 18, 1 << 20), 8, 2048, 2, 8192)
SMALL = Table(("tiny",), ("tiny", "tiny"), (512, 1024, 2048), 2, 128, 2, 256, recompute=128, vocabulary=512, document=1 << 12,
              warmup=2, steps=5, transfer=1 << 18)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One measurement. part: of the report; against: the cell that it is compared with, or whose checkpoint it resumes."""

    name: str
    part: str
    ranks: int
    config: Config | None
    size: str = ""
    pattern: str = ""
    against: str = ""


class Plan:
    """The cells for a number of ranks; all their files are in `folder`."""

    def __init__(self, table: Table, ranks: int, folder: Path):
        self.table, self.ranks, self.folder = table, ranks, folder
        first, *larger = table.sizes
        usual = ("mamba", "alternating")
        cells = [Cell(f"links x{ranks}", "links", ranks, None)]
        for pattern in usual:
            cells += self.data_parallel(first, pattern, 1)
        cells += self.losses(first, "alternating") + self.shared("mamba")
        for size in larger:
            for pattern in usual:
                cells += self.data_parallel(size, pattern, 1)
        for size in table.sizes:
            for pattern in usual:
                cells += self.data_parallel(size, pattern, 2) + self.data_parallel(size, pattern, 3)
        cells += self.shared("alternating")
        for size in table.sizes:
            for stage in (1, 2, 3):
                cells += self.data_parallel(size, "serpent", stage)
        self.cells = list({cell.name: cell for cell in cells}.values())

    def config(self, name: str, size: str, pattern: str, **settings) -> Config:
        model = with_(model_config(size, pattern), vocab_size=self.table.vocabulary)
        return trainer_runs.configure(model, self.folder / "data", runs=self.folder, name=re.sub(r"\W+", "-", name), **settings)

    def data_parallel(self, size: str, pattern: str, stage: int) -> list[Cell]:
        """One rank, all ranks, and all but SeRpEnt in every layer resumed."""
        table, n, alone = self.table, self.ranks, f"{size} {pattern} x1"
        name = f"{size} {pattern} ZeRO-{stage} x{n}"
        shape = dict(seq_len=table.seq_len, micro_batch=table.rows)
        one = self.config(alone, size, pattern, global_batch=table.rows, **shape)
        all_ = self.config(name, size, pattern, global_batch=n * table.rows, zero_stage=stage, **shape)
        cells = [Cell(alone, "alone", 1, one, size, pattern), Cell(name, "data", n, all_, size, pattern, alone)]
        for fewer in sorted({n // 2, 1}, reverse=True) if pattern != "serpent" else ():
            cells.append(Cell(f"{name} resumed on {fewer}", "resume", fewer, all_, size, pattern, name))
        return cells

    def shared(self, pattern: str) -> list[Cell]:
        """Each length on all ranks, and on one the tokens that are a rank's share of it."""
        cells = []
        for length in self.table.lengths:
            share = length // self.ranks
            size = self.table.shared[share > self.table.long]
            name = f"sequence {size} {pattern} {length} x{self.ranks}"
            alone = f"sequence {size} {pattern} {share} x1"
            settings = dict(global_batch=1, micro_batch=1, checkpointing=share > self.table.recompute)
            one = self.config(alone, size, pattern, seq_len=share, **settings)
            all_ = self.config(name, size, pattern, seq_len=length, sequence=self.ranks, **settings)
            cells += [Cell(alone, "alone", 1, one, size, pattern), Cell(name, "sequence", self.ranks, all_, size, pattern, alone)]
        return cells

    def losses(self, size: str, pattern: str) -> list[Cell]:
        n, rows, title = self.ranks, self.table.loss_rows, f"losses {size} {pattern}"
        plain = f"{title} {n}x1"
        meshes = [(plain, 1, rows), (f"{plain} in halves", 1, rows // 2)]
        meshes += [(f"{title} {n // p}x{p}", p, rows * p) for p in (2, 4) if p < max(n, 3)]
        return [
            Cell(name, "losses", n, self.config(name, size, pattern, seq_len=self.table.loss_length, global_batch=n * rows,
                                                micro_batch=micro_batch, sequence=p), size, pattern, plain)
            for name, p, micro_batch in meshes
        ]  # fmt: skip

    def measure(self, cell: Cell, seconds: float) -> dict:
        log = self.folder / "logs" / (re.sub(r"\W+", "-", cell.name) + ".txt")
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        trainer_runs.write_data(self.folder / "data", self.table.vocabulary, self.table.document)
        if cell.part != "resume":
            self.forget(cell)
        return harness.run_ranks(cell.ranks, work, cell, self.table, seconds=seconds, log=log)

    def forget(self, cell: Cell) -> None:
        """Remove the checkpoints of its run."""
        if cell.config is not None:
            shutil.rmtree(cell.config.run_folder, ignore_errors=True)


def work(ranks, cell: Cell, table: Table) -> dict:
    """On each rank."""
    if cell.part == "links":
        return links(ranks, table.transfer)
    if cell.part == "resume":
        return trainer_runs.resume(ranks, cell.config)
    if cell.part == "losses":
        return trainer_runs.take(ranks, cell.config, table.loss_steps)
    return trainer_runs.measure(ranks, cell.config, table.warmup, table.steps, save=cell.part == "data")


def links(ranks, transfer: int) -> dict:
    """What the cost model asks of the links: seconds of an exchange that carries next to nothing, the mean of its two kinds, and
    bytes per second that reach a rank in a large gather."""
    ring, many = Sequence(ranks.world_size, ranks.world_size, ranks.device).ring, 20
    little = torch.zeros(16, device=ranks.device)
    blocks, forms = [[little]] * ring.size, [[(little.shape, little.dtype)]] * ring.size
    part = torch.zeros(transfer // 4, device=ranks.device)
    whole = part.new_empty(ring.size * len(part))

    def exchange() -> None:
        for _ in range(many):
            ring.gather([little])
            ring.swap(blocks, forms, ranks.device)()

    latency = time_steps(exchange, 3, 10).median / 1e3 / (2 * many)
    seconds = time_steps(lambda: dist.all_gather_into_tensor(whole, part), 3, 10).median / 1e3
    return {"latency": latency, "bandwidth": (ring.size - 1) * part.nbytes / seconds}


@dataclass(frozen=True)
class Predicted:
    ms: float
    exchanges: int
    bytes: float  # sent by rank 0


def predict(config: Config, alone_ms: float, latency: float, bandwidth: float) -> Predicted:
    """T(P, L) of docs/sequence_parallel.md, for Mamba alone and inside SeRpEnt: bf16 rows, fp32 states."""
    with torch.device("meta"):
        model = LanguageModel(config.model)
    P, d = config.parallel.sequence, config.model.d_model
    times = 1 + config.training.activation_checkpointing  # of the forward exchanges
    exchanges, received, sent = 0, 0, 0
    for block in model.blocks:
        scans = [module for module in block.mixer.modules() if isinstance(module, Mamba)]
        rows, spans = 2 * block.mixer.reach * d, sum(4 * scan.d_inner for scan in scans)
        states = sum(4 * scan.d_inner * scan.d_state for scan in scans)
        outlines = 24 * sum(isinstance(module, Branch) for module in block.mixer.modules())
        forward = rows + (P - 1) * (states + spans + outlines)
        exchanges += 2 * times + 2
        received += times * forward + rows + (P - 1) * states
        sent += times * forward + (P - 1) * states  # rank 0 has no rows before it whose gradients to send
    n = sum(parameter.numel() for parameter in model.parameters())
    seconds = exchanges * latency + (received + 8 * n * (P - 1) / P) / bandwidth
    return Predicted(alone_ms + 1e3 * seconds, exchanges, sent)


class Results:
    """What was found, by cell, in a file of JSON lines. Raises UserError for one of other ranks or devices."""

    def __init__(self, path: Path, about: dict):
        self.path, self.found = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.is_file() else ""
        for number, line in enumerate(text.splitlines()):
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut while it was written
            if "about" in entry and entry["about"] != about:
                raise UserError(f"{path}: line {number + 1} says {entry['about']}, here it is {about}; name another file")
            if "cell" in entry:
                self.found[entry.pop("cell")] = entry
        self.file = path.open("a")
        if not text:
            self._write({"about": about})
        elif not text.endswith("\n"):
            self.file.write("\n")

    def add(self, cell: Cell, result: dict) -> None:
        self.found[cell.name] = result
        self._write({"cell": cell.name, **result})

    def _write(self, entry: dict) -> None:
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())


def run(plan, cells: list[Cell], results: Results, deadline: float, again: bool = False) -> list[Cell]:
    """Measure the cells that are missing from the results, until time.monotonic() is `deadline`; those left over. again: those
    that failed are missing too."""
    by_name = {cell.name: cell for cell in plan.cells}
    if again:
        results.found = {name: result for name, result in results.found.items() if "failed" not in result}
    missing = [cell for cell in cells if cell.name not in results.found]
    number = 0
    while missing:
        cell = missing[0]
        if cell.part == "resume" and not (cell.config.run_folder / "checkpoints").is_dir():
            saved = results.found.get(cell.against)
            if saved is not None and "failed" in saved:
                results.add(cell, {"failed": "there is no checkpoint to resume"})
                missing.pop(0)
                continue
            missing.insert(0, cell := by_name[cell.against])  # of an earlier call, whose files are gone
        left = deadline - time.monotonic()
        if left < LEAST:
            break
        number += 1
        print(f"[{number}/{number - 1 + len(missing)}] {cell.name} ...", end=" ", flush=True)
        started = time.monotonic()
        try:
            result = plan.measure(cell, min(left, LIMIT))
        except RanksFailed as error:
            if isinstance(error, RanksLate) and left <= LIMIT:
                print("out of time", flush=True)
                break
            result = {"failed": str(error)}
        seconds = time.monotonic() - started
        results.add(cell, result | {"cell_seconds": round(seconds, 1)})
        missing.pop(0)
        saved_by = cell.against if cell.part == "resume" else cell.name
        if not any(later.part == "resume" and later.against == saved_by for later in missing):
            plan.forget(cell)
        print(f"{said(result)}, {seconds:.0f} s; {max(0.0, deadline - time.monotonic()) / 60:.1f} min left", flush=True)
    return [cell for cell in missing if cell.name not in results.found]


def said(result: dict) -> str:
    if "failed" in result:
        return f"failed: {result['failed']}"
    if "ms" in result:
        return f"{result['ms']['median']:.1f} ms a step"
    if "resume_seconds" in result:
        return f"resumed in {result['resume_seconds']:.1f} s"
    if "latency" in result:
        return f"{1e6 * result['latency']:.0f} µs an exchange, {result['bandwidth'] / 1e9:.1f} GB/s"
    return f"loss {result['losses'][0]:.3f} → {result['losses'][-1]:.3f}"


class Report:
    """The tables, of whatever was found."""

    def __init__(self, cells: list[Cell], found: dict[str, dict]):
        self.found = {name: result for name, result in found.items() if "failed" not in result}
        self.cells = [cell for cell in cells if cell.name in self.found]
        self.links = next((self.found[cell.name] for cell in self.cells if cell.part == "links"), None)

    def parts(self) -> list[str]:
        return [self.data_parallel(), self.shared(), self.losses()]

    def _of(self, *parts: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.part in parts]

    def _step(self, cell: Cell) -> list[str]:
        """Tokens/s, ms, efficiency."""
        ms, alone = self.found[cell.name]["ms"], self.found.get(cell.against, {}).get("ms")
        tokens = cell.config.training.global_batch * cell.config.data.seq_len
        return [f"{1e3 * tokens / ms['median']:,.0f}", Spread(**ms).text(lambda v: f"{v:.1f}"),
                f"{alone['median'] / ms['median']:.1%}" if alone else "-"]  # fmt: skip

    def data_parallel(self) -> str:
        rows, apart = [], []
        cells = [cell for cell in self._of("alone", "data") if not cell.name.startswith("sequence")]
        models = [(cell.size, cell.pattern) for cell in cells]
        for cell in sorted(cells, key=lambda cell: models.index((cell.size, cell.pattern))):
            result = self.found[cell.name]
            stage = str(cell.config.training.zero_stage) if cell.ranks > 1 else "-"
            saved = f"{result['save_bytes'] / 1e9:.2g} GB, {result['save_seconds']:.1f} s" if "save_seconds" in result else "-"
            resumed = [self.found[c.name] | {"on": c.ranks} for c in self._of("resume") if c.against == cell.name]
            apart += [abs(r["next_loss"] - result["next_loss"]) for r in resumed]
            on = [f"{r['on']}: {r['resume_seconds']:.1f} s ({r['load_seconds']:.1f} s)" for r in resumed]
            rows.append([cell.size, cell.pattern, stage, str(cell.ranks), *self._step(cell), f"{result['gib']:.1f}", saved,
                         "; ".join(on) or "-", f"{result['losses'][0]:.2f} → {result['losses'][-1]:.2f}"])  # fmt: skip
        if not rows:
            return ""
        head = ["size", "model", "ZeRO", "ranks", "tokens/s", "ms per step (10-90 %)", "efficiency", "peak GiB", "saved in",
                "resumed on ranks: in (loading)", "loss, first → last"]  # fmt: skip
        text = "Data parallel:\n\n" + harness.table(head, rows)
        if apart:
            text += "\n\nThe loss of the step after a checkpoint, resumed on fewer ranks, lies at most "
            text += f"{max(apart):.1e} from that of the run that went on ({len(apart)} resumed)."
        return text

    def shared(self) -> str:
        rows = []
        for cell in self._of("sequence"):
            result, alone = self.found[cell.name], self.found.get(cell.against)
            row = [cell.size, cell.pattern, f"{cell.config.data.seq_len:,}", *self._step(cell)]
            if alone and self.links:
                alone_ms = alone["ms"]["median"]
                predicted = predict(cell.config, alone_ms, self.links["latency"], self.links["bandwidth"])
                row += [f"{alone_ms / predicted.ms:.1%} ({predicted.ms:.1f} ms)"]
                traffic = [f"{result['exchanges']} ({predicted.exchanges})",
                           f"{result['bytes'] / 1e6:.2f} ({predicted.bytes / 1e6:.2f})"]  # fmt: skip
            else:
                row += ["-"]
                traffic = [str(result["exchanges"]), f"{result['bytes'] / 1e6:.2f}"]
            recomputed = "recomputed" if cell.config.training.activation_checkpointing else "kept"
            rows.append([*row, f"{result['gib']:.1f}", recomputed, *traffic, f"{result['load']:.3f}"])
        if not rows:
            return ""
        head = ["size", "model", "tokens a sequence", "tokens/s", "ms per step (10-90 %)", "efficiency", "predicted", "peak GiB",
                "activations", "exchanges a step (predicted)", "MB sent by rank 0 (predicted)",
                "emitted, largest / mean"]  # fmt: skip
        ranks = self._of("sequence")[0].ranks
        text = f"One sequence shared by {ranks} ranks, ZeRO-1; efficiency against one rank on its share of the tokens"
        text += ", whose passes are CUDA graphs where activations are kept:\n\n" if harness.DEVICE == "cuda" else ":\n\n"
        text += harness.table(head, rows)
        if self.links:
            text += f"\n\nPredicted by the cost model with what exchanges take here: α {1e6 * self.links['latency']:.0f} µs, "
            text += f"β {self.links['bandwidth'] / 1e9:.1f} GB/s."
        return text

    def losses(self) -> str:
        cells = self._of("losses")
        plain = next((self.found[c.name] for c in cells if c.name == c.against), None)
        if plain is None:
            return ""
        apart = {}
        for cell in cells:
            found = self.found[cell.name]
            apart[cell.name] = [abs(a - b) for a, b in zip(found["losses"], plain["losses"])]
        halves = max(apart.get(f"{cells[0].against} in halves", [float("nan")]))
        rows = []
        for cell in cells:
            found, name = self.found[cell.name], cell.name.split(maxsplit=3)[3]
            same = found["digest"] == plain["digest"]
            near = all(difference <= APART * halves for difference in apart[cell.name])
            equal = "-" if "x1" in name else "yes" if same and near else "no"
            rows.append([name, *(f"{found['losses'][i]:.5f}" for i in (0, -1)), f"{apart[cell.name][0]:.1e}",
                         f"{max(apart[cell.name]):.1e}", "the same" if same else "others", equal])  # fmt: skip
        steps, config = len(plain["losses"]), cells[0].config
        text = f"Data x sequence, {cells[0].size} {cells[0].pattern}, {config.training.global_batch} sequences of "
        text += f"{config.data.seq_len:,} tokens a step, {steps} steps. In halves: each pass as two, which changes nothing but "
        text += f"the order of sums; losses count as equal if they are never farther from {cells[0].ranks}x1 than {APART:g} "
        text += "times that.\n\n"
        head = ["mesh", "first loss", "last loss", "apart at step 1", "apart at most", "samples", "equal"]
        return text + harness.table(head, rows)


def about(ranks: int, small: bool) -> dict:
    name = "CPU"
    if harness.DEVICE == "cuda":  # asked without a context of our own on the device
        names = harness.output_of(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]).splitlines()
        name = names[0] if names else "GPU"
    return {"ranks": ranks, "device": name, "small": small}


def main(given: list[str] | None = None) -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="processes, one a GPU (default: all GPUs; 8 on CPUs)")
    parser.add_argument("--minutes", type=float, default=25, help="after which nothing more is measured")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="results so far (default runs/scaling-xRANKS.jsonl)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure, for checkpoints (default: FILE.work)")
    parser.add_argument("--only", default="", metavar="REGEX", help="cells whose names it is found in")
    parser.add_argument("--again", action="store_true", help="measure what failed once more")
    parser.add_argument("--small", action="store_true", help="a tiny model, for CPUs")
    harness.add_report_arguments(parser)
    arguments = parser.parse_args(given)
    on_gpu = harness.DEVICE == "cuda"
    ranks = arguments.ranks or (torch.cuda.device_count() if on_gpu else 8)
    if ranks < 2 or ranks & (ranks - 1) or (on_gpu and ranks > torch.cuda.device_count()):
        raise UserError(f"--ranks {ranks}: a power of 2 from 2 on, and no more than there are GPUs; set it to another")
    path = arguments.resume or ROOT / "runs" / f"scaling-x{ranks}{'-small' * arguments.small}.jsonl"
    folder = (arguments.folder or path.with_name(path.name + ".work")).resolve()
    plan = Plan(SMALL if arguments.small else FULL, ranks, folder)
    cells = [cell for cell in plan.cells if re.search(arguments.only, cell.name)]
    results = Results(path, about(ranks, arguments.small))
    print(f"{len(cells)} cells, {sum(c.name in results.found for c in cells)} of them in {path}", flush=True)
    left = run(plan, cells, results, started + 60 * arguments.minutes, arguments.again)
    failed = [f"- {name}: {result['failed']}" for name, result in results.found.items() if "failed" in result]
    if not left and not failed:  # else what the ranks printed may be asked for
        shutil.rmtree(folder, ignore_errors=True)
    parts = Report(plan.cells, results.found).parts()
    parts.append("Failed:\n\n" + "\n".join(failed) if failed else "")
    parts.append("Not run: " + ", ".join(cell.name for cell in left) + "." if left else "")
    harness.report(f"Scaling, {ranks} ranks of one host" + ", a tiny model" * arguments.small, parts, arguments)
    if failed:
        raise UserError(f"{len(failed)} cells failed, see above; measure them again with --again")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ranks are ended too
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
