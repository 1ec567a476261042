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
    path = Path(where)
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint or run folder")
    if (path / "checkpoints").is_dir():
        newest, skipped = store.newest(path / "checkpoints")
        if newest is None:
            reasons = "; ".join(f"{p.name}: {reason}" for p, reason in skipped)
            raise UserError(f"{path}: holds no checkpoint that verifies{f' ({reasons})' if reasons else ''}")
        path = newest
    state = store.read_full_state(path)  # verifies the manifest before anything in the folder is trusted
    config = load_config(path / "config.yaml")
    model = LanguageModel(config.model)
    model.load_state_dict(state)
    return Loaded(model.to(device).eval(), config, Tokenizer.from_file(str(path / "tokenizer.json")), path)


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
