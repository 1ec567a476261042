"""The random number generators of a rank as plain tensors: pickled states would have to be trusted."""
from __future__ import annotations

import random

import numpy as np
import torch


def state() -> dict[str, torch.Tensor]:
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss]),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_state(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, states["numpy_gauss"].item()))
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])


def branch_off(rank: int) -> None:
    """For a rank that had none when the states were saved: numbers of its own, a function of the state set and its rank."""
    seed = int(torch.randint(2**31, ())) + rank
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
