"""Metrics: one clean history across kills and resumes, whatever the sinks do."""
import contextlib
import fcntl
import json
import os
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from serpent_scale.config import LoggingConfig
from serpent_scale.training.metrics import Metrics, read_metrics

STEP = {"loss": 2.0, "grad_norm": 0.5, "lr": 1e-3, "tokens_per_second": 1000.0, "mfu": None, "memory_gib": 1.0}


def record(folder, start, steps, **logging):
    metrics = Metrics(folder, LoggingConfig(**logging), 10, start, "run: {}", logging.pop("id", None))
    for step in steps:
        metrics.log(step, {**STEP, "loss": float(step)})
    return metrics


def test_a_resumed_run_leaves_one_history_without_torn_lines(tmp_path):
    metrics = record(tmp_path, 0, range(1, 6))
    metrics.log_evaluation(3, {"loss": 1.0, "perplexity": 2.7})
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # killed in the middle of a line
    record(tmp_path, 3, range(4, 7)).close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 1), ("train", 2), ("train", 3), ("evaluation", 3), ("train", 4), ("train", 5), ("train", 6)]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.superseded.jsonl")] == [4, 5]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_a_loss_that_is_not_finite_is_still_valid_json(tmp_path):
    metrics = record(tmp_path, 0, [])
    metrics.log(1, {**STEP, "loss": float("nan"), "grad_norm": float("inf")})
    metrics.close()
    strict = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict["loss"] == "nan" and strict["grad_norm"] == "inf"


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    record(tmp_path, 0, range(1, 11), every=5).close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "5/10", "10/10"]
    assert all(word in lines[1] for word in ("loss 5.0000", "lr 1.00e-03", "1,000 tok/s", "ETA"))


@pytest.mark.parametrize("columns", [0, 60, 100])
def test_a_bar_where_the_terminal_has_columns_and_lines_where_it_has_none(tmp_path, columns):
    """Some terminals (script, docker run -t) say 0 columns, in which tqdm draws nothing."""
    code = f"from test_metrics import *; record(Path({str(tmp_path)!r}), 0, range(1, 11), every=5).close()"
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", code], env=env, stdout=slave, stderr=slave, check=True, timeout=60)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(master, 65536):
            shown += part
    os.close(master)
    last = shown.decode().replace("\n", "\r").rstrip("\r").split("\r")[-1]
    assert "10/10" in last and "loss 10.0" in last and "1,000 tok/s" in last and len(last) <= (columns or 200)
    assert ("100%" in last) == (columns > 0)


def test_wandb_works_offline_and_keeps_its_run_id_over_a_resume(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = record(tmp_path, 0, range(1, 4), wandb=True)
    assert first.wandb_id
    first.close()
    second = Metrics(tmp_path, LoggingConfig(wandb=True), 10, 2, "run: {}", first.wandb_id)
    second.log(3, STEP)
    second.close()
    assert second.wandb_id == first.wandb_id
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{first.wandb_id}"))) >= 1


def test_a_broken_wandb_does_not_end_training(tmp_path, monkeypatch, capsys):
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **settings: (_ for _ in ()).throw(OSError("no space left")))
    metrics = record(tmp_path, 0, range(1, 4), wandb=True)
    metrics.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    assert capsys.readouterr().err.count("warning: Weights & Biases stopped (no space left)") == 1
