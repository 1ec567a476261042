"""The trainer on a tiny model and data set, on real ranks without a launcher."""
from __future__ import annotations

import json
from pathlib import Path

from serpent_scale.config import Config, parse_config


def write_data(folder: Path, shard_tokens: int = 100_000) -> Path:
    from data_pipeline.shards import prepare_split
    from data_pipeline.tokenizer import train_tokenizer

    lines = [f"line {i}: the {i % 7} quick brown foxes jump over {i * i % 13} lazy dogs. " * (1 + i % 5) for i in range(300)]
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer(iter(lines), 300, folder / "tokenizer.json")
    for split, texts in (("train", lines[:270]), ("validation", lines[270:])):
        prepare_split(folder / split, iter(texts), tokenizer, request={}, word_rule="whitespace", shard_tokens=shard_tokens)
    return folder


def run_config(data: Path, folder: Path, **sections) -> Config:
    """12 steps of 8 sequences; `sections` are merged over it."""
    base = {
        "run": {"name": "run", "folder": str(folder)},
        "data": {"path": str(data), "seq_len": 32, "shuffle_block": 64},
        "model": {"vocab_size": 300, "d_model": 32, "n_layers": 2, "serpent": {"band": 2.0}},
        "optimizer": {"lr": 0.001}, "schedule": {"warmup_steps": 2},
        "training": {"max_steps": 12, "global_batch": 8, "micro_batch": 2, "precision": "fp32", "zero_stage": 1},
        "checkpoint": {"every": 1000}, "evaluation": {"every": 0, "max_windows": 8},
    }
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values}
    return parse_config(base)


def history(config: Config) -> list[dict]:
    return [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]


def lines(config: Config) -> dict[tuple[str, int], float]:
    """Loss by kind of line, training and evaluation, and step."""
    found = [line for line in history(config) if "loss" in line]
    assert len(found) == len({(line["kind"], line["step"]) for line in found}), "no step is there twice"
    return {(line["kind"], line["step"]): line["loss"] for line in found}


def losses(config: Config) -> dict[int, float]:
    """Loss by step of training."""
    return {line["step"]: line["loss"] for line in history(config) if line["kind"] == "train"}


def train(processes, config: Config, prepare=None):
    """For `run_ranks`: what launch/pretrain.py does; whether the run was finished. `prepare(trainer)` may meddle with it."""
    from serpent_scale.parallel.processes import on_rank_zero
    from serpent_scale.training.run_folder import prepare_run_folder
    from serpent_scale.training.trainer import Trainer

    on_rank_zero(lambda: prepare_run_folder(config.run_folder))
    trainer = Trainer(config, processes, "auto")
    trainer.resume()
    if prepare is not None:
        prepare(trainer)
    return trainer.train()
