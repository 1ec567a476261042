"""The training loop: build, resume, step, evaluate, save."""
from __future__ import annotations

import math
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline import digest
from data_pipeline.stream import Batch
from serpent_scale.checkpoint import store
from serpent_scale.config import Config, check_same_model
from serpent_scale.errors import UserError
from serpent_scale.model.accounting import GIB, flops_per_token
from serpent_scale.model.documents import Documents
from serpent_scale.model.language_model import LanguageModel
from serpent_scale.parallel.processes import Processes, all_reduce_sum, broadcast_object, on_rank_zero
from serpent_scale.parallel.sequence import Sequence, load
from serpent_scale.training.engine import build_engine, check_gradients, loss_divisor
from serpent_scale.training.metrics import Metrics
from serpent_scale.training.optimizer import apply_settings, learning_rate
from serpent_scale.training.streams import first_sample, open_streams

# Dense bf16 peaks in TFLOP/s, by a part of the device's name (vendors' datasheets).
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165}


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """A batch of the stream on a device."""

    tokens: torch.Tensor
    labels: torch.Tensor
    documents: Documents
    digest: int  # of the samples; 0 on ranks that share them with one that counts

    @classmethod
    def of(cls, batch: Batch, device: torch.device, sequence: Sequence | None = None) -> DeviceBatch:
        """sequence: the ranks that share the rows, of which this one takes its tokens."""
        documents = Documents(send(batch.reset, device), batch.lengths)
        if sequence is None:
            return cls(send(batch.tokens, device), send(batch.labels, device), documents, batch.digest)
        own = sequence.own(batch.tokens.shape[1])
        tokens, labels = (send(tensor[:, own].contiguous(), device) for tensor in (batch.tokens, batch.labels))
        return cls(tokens, labels, sequence.shard(documents), batch.digest if sequence.ring.rank == 0 else 0)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that waits for nothing: a GPU reads pinned memory when it comes to it."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class Trainer:
    """One pretraining run. Raises UserError for anything the user can mend, on all ranks together."""

    def __init__(self, config: Config, processes: Processes):
        self.config, self.processes = config, processes
        self.accumulation = config.grad_accumulation(processes.world_size)
        device = processes.device
        self.stream, self.validation = open_streams(config)
        self.tokenizer = self.stream.index.tokenizer_path.read_text()
        self.replicas, self.replica, self.sequence = processes.world_size, processes.rank, None
        if config.parallel.sequence > 1:
            self.sequence = Sequence(config.parallel.sequence, processes.world_size, device)
            self.replicas, self.replica = config.replicas(processes.world_size), self.sequence.replica
            check_gradients(config, self.sequence, processes)

        torch.manual_seed(config.run.seed)  # the same parameters on every rank, whatever the world size
        model = LanguageModel(config.model, config.training.activation_checkpointing).to(device)
        self.engine, self.optimizer = build_engine(model, config, processes)
        self.flops = flops_per_token(config.model).training
        self.peak = peak_flops(config, device) * processes.world_size
        self.step, self.tokens, self.bad_steps, self.wandb_id, self.metrics = 0, 0, 0, None, None
        self.digest = 0  # of all samples consumed, by all ranks
        self.ahead: tuple[int, DeviceBatch] | None = None  # a batch fetched before its turn, and its first sample

    @property
    def checkpoints(self) -> Path:
        return self.config.run_folder / "checkpoints"

    def resume(self, where: str) -> None:
        """`auto`: the newest checkpoint that verifies, or a fresh start if there is none at all; `none`: a fresh start,
        refused where checkpoints are; else the path of a checkpoint."""
        path = on_rank_zero(lambda: find_checkpoint(where, self.checkpoints))
        if path is None:
            return
        state = store.load(self.engine, path)
        on_rank_zero(lambda: check_same_model(self.config, path / "config.yaml"))
        apply_settings(self.optimizer, self.config)
        self.step, self.tokens, self.wandb_id = state["step"], state["tokens"], state["wandb_id"]
        samples, self.digest = self.stream.check_state(state["data"])
        if samples != self.step * self.config.training.global_batch:
            raise UserError(
                f"{path}: written with another training.global_batch ({samples} samples in {self.step} steps); "
                f"set training.global_batch={samples // max(self.step, 1)}"
            )
        if self.processes.rank == 0:
            print(f"resumed from {path}, step {self.step}", flush=True)
            if state["data"]["format"] == 1:
                print(f"note: it has no digest of its samples; data_digest counts those after step {self.step}", flush=True)

    def train(self) -> None:
        """Run to the budget, or to training.stop_at_step."""
        config = self.config
        last = min(config.total_steps, config.training.stop_at_step or config.total_steps)
        if self.step >= last:
            if self.processes.rank == 0:
                keys = "training.stop_at_step" if last < config.total_steps else "training.max_steps or training.max_tokens"
                print(f"nothing to do: the run is at step {self.step} and was to end at {last}; raise {keys} to go on", flush=True)
            return
        self.metrics = self._open_metrics() if self.processes.rank == 0 else None
        if self.processes.rank == 0:
            (config.run_folder / "config.yaml").write_text(config.to_yaml())
        if self.step == 0 and config.evaluation.every:
            self.evaluate()
        while self.step < last:
            self._log(self.train_step())
            if config.evaluation.every and self.step % config.evaluation.every == 0 and self.step < last:
                self.evaluate()
            if self.step % config.checkpoint.every == 0 and self.step < last and not self.bad_steps:
                self.save()  # not while the loss is not finite: such checkpoints would push out the good ones
        self.evaluate()
        self.save()
        if self.metrics:
            self.metrics.close()

    def train_step(self) -> dict[str, float]:
        """One optimizer step over the global batch: its metrics.

        The host waits for the device once, at the end, for the loss and the gradient norm.
        """
        training, started = self.config.training, time.perf_counter()
        rate = learning_rate(self.step, self.config.schedule, self.config.total_steps, self.config.optimizer.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        totals, data_seconds = torch.zeros(2, dtype=torch.float64, device=self.processes.device), 0.0
        consumed, before = 0, self.sequence.elements.clone() if self.sequence else None
        for micro_step in range(self.accumulation):
            fetched = time.perf_counter()
            batch = self._batch(self._first_sample(self.step, micro_step))
            data_seconds += time.perf_counter() - fetched
            consumed += batch.digest
            loss_sum = self._loss(batch)
            self.engine.backward(loss_sum / loss_divisor(self.config))
            self._fetch_ahead(micro_step)
            self.engine.step()
            totals += self._totals(loss_sum, batch)
        # The limbs go along as float64, which holds them exactly: one collective, one wait.
        limbs = torch.tensor(digest.to_limbs(consumed), dtype=torch.float64)
        parts = [totals, send(limbs, self.processes.device)]
        if self.sequence:
            elements = torch.zeros(self.processes.world_size, dtype=torch.float64, device=self.processes.device)
            elements[self.processes.rank] = self.sequence.elements - before
            parts.append(elements)
        loss_sum, labels, *rest = all_reduce_sum(torch.cat(parts)).tolist()
        limbs, elements = rest[: len(limbs)], rest[len(limbs) :]
        loss, norm = loss_sum / labels if labels else math.nan, float(self.engine.get_global_grad_norm())
        self._count_bad_steps(loss, norm)
        self.step += 1
        self.digest = (self.digest + digest.from_limbs(limbs)) % digest.MODULUS
        tokens = training.global_batch * self.config.data.seq_len
        self.tokens += tokens
        seconds = time.perf_counter() - started
        return {
            "loss": loss, "grad_norm": norm, "lr": rate, "tokens": self.tokens, "tokens_per_second": tokens / seconds,
            "mfu": self.flops * tokens / seconds / self.peak if self.peak else None, "memory_gib": peak_memory_gib(),
            "step_seconds": seconds, "data_seconds": data_seconds,
            "data_digest": digest.to_hex(self.digest),
        } | ({"sequence_load": load(elements, self.config.parallel.sequence)} if any(elements) else {})

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean cross-entropy over non-overlapping windows of the evaluation split, shared by all ranks."""
        stream, rows = self.validation, self.config.training.micro_batch
        windows = min(stream.n_windows, self.config.evaluation.max_windows or stream.n_windows)
        totals, stride = torch.zeros(2, dtype=torch.float64, device=self.processes.device), rows * self.replicas
        self.engine.eval()
        for first in range(self.replica * rows, windows + self.replica * rows, stride):
            # Every rank runs as many passes (ZeRO-3 gathers together); rows past the end count for nothing.
            batch = DeviceBatch.of(stream.batch(min(first, windows - 1), rows), self.processes.device, self.sequence)
            batch.labels[max(0, windows - first) :] = -100
            totals += self._totals(self._loss(batch), batch)
        self.engine.train()
        all_reduce_sum(totals)
        loss = (totals[0] / totals[1]).item()
        if self.metrics:
            self.metrics.log_evaluation(self.step, {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": self.tokens})
        return loss

    def save(self) -> Path:
        state = {
            "step": self.step, "tokens": self.tokens,
            "data": self.stream.state(self.step * self.config.training.global_batch, self.digest),
            "wandb_id": broadcast_object(self.metrics.wandb_id if self.metrics else None),
        }
        texts = {"config.yaml": self.config.to_yaml(), "tokenizer.json": self.tokenizer}
        return store.save(self.engine, self.checkpoints, self.step, state, texts, self.config.checkpoint.keep_last)

    def _loss(self, batch: DeviceBatch) -> torch.Tensor:
        loss_sum, _ = self.engine(batch.tokens, batch.documents, batch.labels)
        return loss_sum

    def _totals(self, loss_sum: torch.Tensor, batch: DeviceBatch) -> torch.Tensor:
        """(2,) float64: the loss summed over labelled tokens, and their number."""
        return torch.stack([loss_sum.detach().double(), (batch.labels >= 0).sum().double()])

    def _batch(self, first: int) -> DeviceBatch:
        """The micro-batch that begins with sample `first`."""
        ahead, self.ahead = self.ahead, None
        if ahead and ahead[0] == first:
            return ahead[1]
        return DeviceBatch.of(self.stream.batch(first, self.config.training.micro_batch), self.processes.device, self.sequence)

    def _fetch_ahead(self, micro_step: int) -> None:
        """Get the batch after this one while the device is at work. Not past the budget, and not for the CPU: it is at work."""
        step, micro_step = (self.step, micro_step + 1) if micro_step + 1 < self.accumulation else (self.step + 1, 0)
        if self.processes.device.type == "cuda" and step < self.config.total_steps:
            first = self._first_sample(step, micro_step)
            self.ahead = first, self._batch(first)

    def _first_sample(self, step: int, micro_step: int) -> int:
        return first_sample(self.config.training, self.replicas, self.replica, step, micro_step)

    def _count_bad_steps(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            self.bad_steps = 0
            return
        self.bad_steps += 1
        if self.bad_steps >= self.config.training.max_bad_steps:
            first = self.step * self.config.training.global_batch
            raise UserError(
                f"step {self.step + 1}: loss {loss}, gradient norm {norm}, not finite {self.bad_steps} steps in a row (samples "
                f"{first} to {first + self.config.training.global_batch - 1}); lower optimizer.lr or raise training.max_bad_steps"
            )

    def _open_metrics(self) -> Metrics:
        config = self.config
        return Metrics(config.run_folder, config.logging, config.total_steps, self.step, config.to_yaml(), self.wandb_id)

    def _log(self, metrics: dict[str, float]) -> None:
        if self.metrics:
            self.metrics.log(self.step, metrics)


def prepare_run_folder(folder: Path) -> None:
    """Make the run's folder. Raises UserError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise UserError(f"{folder}: cannot make the run's folder ({error.strerror}); set run.folder to one that can be") from None
    if not writable:
        raise UserError(f"{folder}: the run's folder cannot be written; set run.folder to one that can be")


def find_checkpoint(where: str, checkpoints: Path) -> Path | None:
    """The checkpoint that --resume WHERE means. Raises UserError rather than start over where something was saved."""
    if where not in ("auto", "none"):
        return _named_checkpoint(Path(where), checkpoints)
    newest, skipped = _newest(checkpoints)
    if where == "none":
        if newest or skipped:
            raise UserError(f"{checkpoints}: holds checkpoints of an earlier run; use --resume auto or another run.name")
        return None
    if newest is None and skipped:
        raise UserError(f"{checkpoints}: no checkpoint verifies (see above); mend one, or use another run.name to start over")
    return newest


def _named_checkpoint(path: Path, own: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"--resume {path}: no such checkpoint folder")
    if (path / "checkpoints").is_dir():  # a run's folder
        newest, _ = _newest(path / "checkpoints")
        if newest is None:
            raise UserError(f"--resume {path}: this run's folder holds no checkpoint that verifies; name another")
        path = newest
    mine, _ = store.newest(own)
    if mine is not None and path.resolve().parent != own.resolve():
        raise UserError(f"--resume {path}: is of another run, and {own} already holds checkpoints, which this one would replace; "
                        "set run.name to a new one")
    if mine is not None and path.name < mine.name:
        print(f"note: {mine} is newer than {path.name}; until this run passes it, --resume auto would choose it", flush=True)
    return path


def _newest(checkpoints: Path) -> tuple[Path | None, list]:
    newest, skipped = store.newest(checkpoints)
    for path, reason in skipped:
        print(f"skipped checkpoint {path}: {reason}", flush=True)
    return newest, skipped


def peak_flops(config: Config, device: torch.device) -> float:
    """Peak FLOP/s of one device, 0 if not known."""
    if config.training.peak_tflops is not None:
        return config.training.peak_tflops * 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), 0.0)


def peak_memory_gib() -> float:
    """Largest memory so far: allocated on the GPU, or resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
