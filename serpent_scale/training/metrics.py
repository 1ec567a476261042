"""Where a run's figures go: `metrics.jsonl` always, the terminal, and Weights & Biases if asked. Rank 0 only.

metrics.jsonl holds one object per line with `kind` (train, evaluation, checkpoint or rollback) and `step`. A resumed run first
moves the lines of steps it will take again to `metrics.superseded.jsonl`: the file is one history without forks.
"""
from __future__ import annotations

import json
import math
import netrc
import os
import secrets
import sys
import time
from pathlib import Path

from tqdm import tqdm

from serpent_scale.config import LoggingConfig

NAME = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics file; one that a killed run left unfinished is skipped."""
    lines = []
    for text in Path(path).read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and {"kind", "step"} <= line.keys():
            lines.append(line)
    return lines


class Metrics:
    def __init__(
        self, run_folder: Path, logging: LoggingConfig, total_steps: int, start_step: int, config_yaml: str,
        wandb_id: str | None = None,
    ):
        self.every, self.total_steps, self.wandb_id = logging.every, total_steps, wandb_id
        path = Path(run_folder) / NAME
        _supersede(path, start_step)
        self._file, self._unwritten = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), b""
        self._bar = None
        if _terminal_width() > 0:
            # tok/s is among the values: the bar leaves out its own rate, and what an 80-column terminal cuts is the memory.
            self._bar = tqdm(
                total=total_steps, initial=start_step, dynamic_ncols=True,
                bar_format="{percentage:3.0f}% {bar:8} {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}",
            )
        self._started, self._start_step = time.monotonic(), start_step
        self._wandb = _Wandb(run_folder, logging, config_yaml, wandb_id) if logging.wandb else None
        if self._wandb:
            self.wandb_id = self._wandb.id

    def log(self, step: int, values: dict) -> None:
        """A training step: loss, grad_norm, lr, tokens_per_second, mfu, memory_gib, tokens, data_seconds, data_share (of
        the step, waiting for data), data_digest (hex, of all samples consumed so far), teach_loss (of the terms that
        model.serpent.teach or the routed clock add, without their weight: the sum over branches, the mean over passes), ..."""
        self._write("train", step, values)
        if self._bar is not None:
            self._bar.set_postfix_str(_short(values), refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self.every == 0 or step in (1, self.total_steps):
            remaining = (self.total_steps - step) * (time.monotonic() - self._started) / max(1, step - self._start_step)
            self._say(f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}  {_short(values)}  ETA {_clock(remaining)}")

    def log_evaluation(self, step: int, values: dict) -> None:
        self._write("evaluation", step, values)
        self._say(f"step {step}: evaluation loss {values['loss']:.4f}, perplexity {values['perplexity']:.2f}")

    def log_checkpoint(self, step: int, values: dict) -> None:
        """bytes, seconds from the start of a save to its rename, stall_seconds of them in which training stood still."""
        self._write("checkpoint", step, values)

    def log_rollback(self, step: int, values: dict) -> None:
        """The state is that after `step` again: spike_step, loss, z_score, skips ([first, last) of the samples left out), ..."""
        self._write("rollback", step, values)
        self._say(f"step {values['spike_step']}: loss {values['loss']:.4f} is a spike ({values['z_score']:.1f} deviations); "
                  f"back to step {step} without samples {values['skips'][0]} to {values['skips'][1] - 1}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        os.close(self._file)
        if self._wandb:
            self._wandb.close()

    def _write(self, kind: str, step: int, values: dict) -> None:
        finite = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        whole = not self._unwritten
        self._unwritten += json.dumps({"kind": kind, "step": step, **finite}).encode() + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
        except OSError as error:  # a full disk is no reason to stop: what is left goes with the next line
            if whole:
                print(f"warning: {NAME} cannot be written ({error.strerror}), training goes on", file=sys.stderr, flush=True)
        if self._wandb:
            self._wandb.log(kind, step, values)

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)


def _terminal_width() -> int:
    """Columns of the terminal on stderr; 0 if there is none, or one that says it has none, where a bar would be invisible."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns if sys.stderr.isatty() else 0
    except (OSError, ValueError):
        return 0


def _supersede(path: Path, start_step: int) -> None:
    """Leave only whole lines of steps up to start_step in the file."""
    if not path.exists():
        return
    keep, move = [], []
    for line in read_metrics(path):
        # The evaluation of step start_step came before its checkpoint; at step 0 there is none, all will be made again.
        keeps = start_step > 0 and line["step"] <= start_step
        (keep if keeps else move).append(json.dumps(line) + "\n")
    if move:
        with open(path.with_name("metrics.superseded.jsonl"), "a") as file:
            file.writelines(move)
    staging = path.with_suffix(".partial")
    with open(staging, "w") as file:
        file.writelines(keep)
        file.flush()
        os.fsync(file.fileno())
    staging.rename(path)


def _short(values: dict) -> str:
    parts = [f"loss {values['loss']:.4f}", f"{values['tokens_per_second']:,.0f} tok/s", f"norm {values['grad_norm']:.3f}",
             f"lr {values['lr']:.2e}"]
    if values.get("data_share") is not None:
        parts.append(f"data {values['data_share']:.1%}")
    if values.get("mfu") is not None:
        parts.append(f"MFU {values['mfu']:.1%}")
    if values.get("sequence_load") is not None:
        parts.append(f"load {values['sequence_load']:.3f}")
    if values.get("memory_gib") is not None:
        parts.append(f"{values['memory_gib']:.1f} GiB")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _has_api_key() -> bool:
    try:
        return bool(os.environ.get("WANDB_API_KEY")) or netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class _Wandb:
    """Weights & Biases on our own step axis. Whatever goes wrong in it is a warning: logging never ends training."""

    def __init__(self, run_folder: Path, logging: LoggingConfig, config_yaml: str, run_id: str | None):
        self._run, self.id = None, run_id
        try:
            import wandb
            import yaml

            mode = os.environ.get("WANDB_MODE") or ("online" if _has_api_key() else "offline")
            self.id = run_id or secrets.token_hex(4)
            self._run = wandb.init(
                project=logging.wandb_project, name=Path(run_folder).name, id=self.id, resume="allow", mode=mode,
                dir=str(run_folder), config=yaml.safe_load(config_yaml),
            )
            # wandb's own step only rises: a replay after a resume would be dropped or fork the curve.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            self._give_up(error)

    def log(self, kind: str, step: int, values: dict) -> None:
        if self._run is None:
            return
        try:
            self._run.log({"step": step, **{f"{kind}/{key}": value for key, value in values.items()}})
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        try:
            if self._run is not None:
                self._run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"warning: Weights & Biases stopped ({reason}); metrics.jsonl goes on", file=sys.stderr, flush=True)
