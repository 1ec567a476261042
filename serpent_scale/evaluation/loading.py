"""A plain model, its configuration and its tokenizer, from a checkpoint of any ZeRO stage and world size."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from serpent_scale.checkpoint import store
from serpent_scale.config import Config, load_config
from serpent_scale.errors import UserError
from serpent_scale.model.language_model import LanguageModel


@dataclass
class Loaded:
    model: LanguageModel
    config: Config
    tokenizer: Tokenizer
    path: Path  # the checkpoint's folder

    @property
    def end_of_text(self) -> int:
        return self.tokenizer.token_to_id("<|endoftext|>")


def load_checkpoint(where: str | Path, device: torch.device) -> Loaded:
    """`where`: a checkpoint folder, or a run's folder (its newest checkpoint). Raises UserError."""
    path = find_checkpoint(where)
    config, state = read_model(path)
    if not (path / "tokenizer.json").is_file():
        raise UserError(f"{path}: has no tokenizer.json; convert the model again with --tokenizer FILE")
    model = LanguageModel(config.model)
    model.load_state_dict(state)
    return Loaded(model.to(device).eval(), config, Tokenizer.from_file(str(path / "tokenizer.json")), path)


def find_checkpoint(where: str | Path) -> Path:
    """The checkpoint's folder. Raises UserError."""
    path = Path(where)
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint or run folder")
    if not (path / "checkpoints").is_dir():
        return path
    newest, skipped = store.newest(path / "checkpoints")
    if newest is None:
        reasons = "; ".join(f"{p.name}: {reason}" for p, reason in skipped)
        raise UserError(f"{path}: holds no checkpoint that verifies{f' ({reasons})' if reasons else ''}")
    return newest


def read_model(path: Path) -> tuple[Config, dict[str, torch.Tensor]]:
    """(configuration, float32 parameters) of a checkpoint, which is verified first. Raises UserError."""
    state = store.read_full_state(path)
    return load_config(path / "config.yaml", saved=True), state


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).tolist()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"--device {name}: not usable here ({reason}); choose auto, cpu or cuda[:N]") from None
