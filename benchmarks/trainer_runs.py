"""The trainer as what is measured: made-up data for it, steps, checkpoints. `harness.run_ranks` gives functions their ranks."""
from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path

import harness
import numpy as np
import torch
import torch.distributed as dist
from harness import Spread

from data_pipeline.files import sha256_of
from data_pipeline.shards import prepare_split
from serpent_scale.config import Config, ModelConfig, parse_config
from serpent_scale.parallel.processes import Processes, broadcast_object
from serpent_scale.training.hardware import peak_memory_gib
from serpent_scale.training.trainer import Trainer

WORDS, LETTERS = 1000, 4  # of the made-up language: its words, tokens of each
LONGEST = 15.0  # seconds for the measured steps, if that gives 5


class Language:
    """Stands for a tokenizer: the text "7" is document 7, words of four tokens, the first ones often: a loss has what to learn.
    0 is the mark."""

    eot_id = 0

    def __init__(self, path: Path, vocab_size: int, length: int):
        path.write_text("{}")
        self.sha256, self.vocab_size, self.length = sha256_of(path), vocab_size, length
        self.words = np.random.default_rng(0).integers(1, vocab_size, (WORDS, LETTERS))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._document(int(text)).tolist() for text in texts]

    def _document(self, number: int) -> np.ndarray:
        inner = self.length - 2  # between the marks
        ranks = WORDS ** np.random.default_rng([1, number]).random(-(-inner // LETTERS))  # Zipf's law, of exponent 1
        return self.words[ranks.astype(int) - 1].ravel()[:inner]


def write_data(folder: Path, vocab_size: int, length: int, documents: int = 4) -> Path:
    """`folder`/train, if it is not there: documents of `length` tokens, marks included, so that a sequence whose length divides
    that lies in one document."""
    folder.mkdir(parents=True, exist_ok=True)
    language = Language(folder / "tokenizer.json", vocab_size, length)
    prepare_split(folder / "train", map(str, range(documents)), language, request={"length": length}, word_rule="whitespace")
    return folder


def configure(
    model: ModelConfig, data: Path, *, seq_len: int, global_batch: int, micro_batch: int, sequence: int = 1,
    zero_stage: int = 1, checkpointing: bool = False, runs: Path | None = None, name: str = "run",
) -> Config:
    """Of a run on the data of `write_data`, kept in `runs`/`name`."""
    return parse_config({
        "run": {"name": name, "folder": str(runs or data)}, "data": {"path": str(data), "seq_len": seq_len},
        "model": asdict(model), "parallel": {"sequence": sequence}, "schedule": {"warmup_steps": 10},
        "training": {"max_steps": 1000, "global_batch": global_batch, "micro_batch": micro_batch, "zero_stage": zero_stage,
                     "activation_checkpointing": checkpointing},
        "evaluation": {"split": "train", "every": 0},
    })  # fmt: skip


def measure(ranks: Processes, config: Config, warmup: int, steps: int, save: bool = False) -> dict:
    """Steps of a fresh run, as its user gets them, from the trainer's own figures.

    ms: of a step, a Spread; gib: the most any rank held; losses of all steps; digest of the samples; bytes and exchanges: what
    rank 0 told those it shares sequences with in a step; load: see `sequence_load`. save: the checkpoint's seconds and
    bytes too, and next_loss, of the step after it.
    """
    trainer = Trainer(config, ranks, "none")
    before = _traffic(trainer)  # counted where exchanges are called: in the first step, not where a graph repeats them
    taken = [trainer.train_step()]
    bytes_sent, exchanges = (after - start for after, start in zip(_traffic(trainer), before))
    taken += [trainer.train_step() for _ in range(warmup - 1)]
    each = taken[-1]["step_seconds"]
    steps = broadcast_object(min(steps, max(5, math.ceil(LONGEST / each))))
    settled = [trainer.train_step() for _ in range(steps)]
    gib = torch.tensor(peak_memory_gib(), device=ranks.device)
    dist.all_reduce(gib, op=dist.ReduceOp.MAX)
    found = {
        "ms": vars(Spread.of([1e3 * step["step_seconds"] for step in settled])), "gib": gib.item(),
        "losses": [step["loss"] for step in taken + settled], "digest": settled[-1]["data_digest"], "bytes": bytes_sent,
        "exchanges": exchanges, "load": max(step.get("sequence_load", 1.0) for step in settled),
    }  # fmt: skip
    return found | (save_checkpoint(trainer) if save else {})


def save_checkpoint(trainer: Trainer) -> dict:
    harness.synchronize()
    started = time.perf_counter()
    trainer.save()
    seconds = time.perf_counter() - started
    (folder,) = trainer.checkpoints.iterdir()
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"save_seconds": seconds, "save_bytes": size, "next_loss": trainer.train_step()["loss"]}


def take(ranks: Processes, config: Config, steps: int) -> dict:
    """The losses of a fresh run's first steps, and the digest of its samples."""
    trainer = Trainer(config, ranks, "none")
    taken = [trainer.train_step() for _ in range(steps)]
    return {"losses": [step["loss"] for step in taken], "digest": taken[-1]["data_digest"]}


def resume(ranks: Processes, config: Config) -> dict:
    """A run that goes on from the checkpoint in its folder: seconds until it can, of which `load_seconds` once the model stands
    and the checkpoint is verified; next_loss, of the step after."""
    started = time.perf_counter()
    trainer = Trainer(config, ranks, "auto")
    built = time.perf_counter()
    trainer.resume()
    harness.synchronize()
    dist.barrier()
    ready = time.perf_counter()
    return {"resume_seconds": ready - started, "load_seconds": ready - built, "step": trainer.step,
            "next_loss": trainer.train_step()["loss"]}  # fmt: skip


def _traffic(trainer: Trainer) -> tuple[int, int]:
    traffic = trainer.sequence.ring.traffic if trainer.sequence else None
    return (traffic.bytes, traffic.exchanges) if traffic else (0, 0)
