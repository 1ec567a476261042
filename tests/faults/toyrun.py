"""The small runs of the campaign: their data, their configurations, and how one is compared with an unbroken one."""
from __future__ import annotations

import json
from pathlib import Path

from runs import run_config, write_data
from serpent_scale.checkpoint import manifest, store
from serpent_scale.config import Config
from serpent_scale.training.metrics import NAME, read_metrics

STEPS, EVERY, EVALUATION = 24, 2, 8  # of a run, and between its checkpoints and evaluations
REPEATS = ("loss", "grad_norm", "lr", "tokens", "tokens_skipped", "data_digest", "perplexity")  # what must repeat to the bit
# Runs whose saves, shards and streams differ.
LANES = [
    {"training": {"zero_stage": 1}},
    {"training": {"zero_stage": 3}, "checkpoint": {"background": False},
     "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}},  # else so small a model is not partitioned
    {"training": {"zero_stage": 2, "micro_batch": 2, "stages": [{"steps": 7, "seq_len": 16}]}, "model": {"pattern": ["serpent"]},
     "checkpoint": {"keep_every": 6}},
    {"training": {"zero_stage": 0}, "checkpoint": {"background": False}},
]


def prepare_data(folder: Path) -> Path:
    return folder if (folder / "validation" / "index.json").is_file() else write_data(folder, shard_tokens=4_000)


def configuration(lane: int, data: Path, folder: Path) -> Config:
    sections = LANES[lane]
    return run_config(
        data, folder, model={"d_model": 16, "n_layers": 1, "pattern": ["mamba"], **sections.get("model", {})},
        training={"max_steps": STEPS, "global_batch": 8, "micro_batch": 4, "max_bad_steps": 2, **sections["training"]},
        checkpoint={"every": EVERY, **sections.get("checkpoint", {})}, deepspeed=sections.get("deepspeed", {}),
        logging={"every": 1},
        evaluation={"every": EVALUATION, "max_windows": 8},
    )


def told(path: Path) -> list[tuple[tuple[str, int], dict]]:
    """((kind, step), values) of each line of training and evaluation; nothing where there is no file."""
    lines = read_metrics(path) if path.is_file() else []
    return [((line["kind"], line["step"]), {key: line[key] for key in REPEATS if key in line})
            for line in lines if line["kind"] in ("train", "evaluation")]


def differences(run: Path, unbroken: Path, finished: bool = True) -> list[str]:
    """What a run tells otherwise than the unbroken one, in lines taken back too; of a finished one, also what it lacks."""
    expected, found = dict(told(unbroken / NAME)), []
    for name in (NAME, "metrics.superseded.jsonl"):
        for key, values in told(run / name):
            if values != expected.get(key) and not isinstance(values["loss"], str):  # "nan" is the fault, not its damage
                found.append(f"{name}: {key} is {values}, unbroken {expected.get(key)}")
    if finished:
        keys = sorted(key for key, _ in told(run / NAME))
        if keys != sorted(expected):
            found.append(f"{NAME} has {keys}")
        ours, theirs = last_state(run), last_state(unbroken)
        if ours != theirs or not ours:
            found.append(f"the last checkpoint differs: {ours}, unbroken {theirs}")
    return found


def last_state(run: Path) -> dict:
    """Step and hashes of the parameters and moments in the newest checkpoint."""
    path, skipped = store.newest(run / "checkpoints")
    if path is None or skipped:
        return {}
    files = json.loads((path / manifest.NAME).read_text())["files"]
    return {"folder": path.name} | {name: entry for name, entry in files.items() if name.startswith("state")}


def steps_of(run: Path) -> list[int]:
    return [step for step, _ in store.folders(run / "checkpoints")]
