"""The mixers by name, and a layer of the model by its mixer's name.

A new mixer is a file with a subclass of `Mixer`, its name and its section of settings in settings.py, and a line here: it then
stands in model.pattern, and in model.serpent.inner.
"""
from __future__ import annotations

from typing import Any

from torch import nn

from serpent_scale.config import ModelConfig
from serpent_scale.model import serpent
from serpent_scale.model.attention import Attention
from serpent_scale.model.mamba import Mamba
from serpent_scale.model.mamba2 import Mamba2
from serpent_scale.model.mixer import Mixer
from serpent_scale.model.s4d import S4D
from serpent_scale.model.s5 import S5

MIXERS: dict[str, type[Mixer]] = {
    "mamba": Mamba,
    "mamba2": Mamba2,
    "s4d": S4D,
    "s5": S5,
    "attention": Attention,
}


def build_mixer(name: str, config: ModelConfig) -> nn.Module:
    """A mixer (B, L, d_model) -> (B, L, d_model); forward(x, documents, state) returns (y, state after x)."""
    if name == "serpent":
        return serpent.Serpent(config.d_model, config.serpent, *_mixer(config.serpent.inner, config), config.norm_eps)
    mixer, widths, settings = _plain(name, config)
    return mixer(*widths, settings)


def parameter_count(name: str, config: ModelConfig) -> int:
    if name == "serpent":
        inner = _mixer(config.serpent.inner, config)
        widths = serpent.branch_widths(config.d_model, config.serpent, *inner)
        return serpent.parameter_count(config.d_model, *widths, config.serpent, *inner)
    mixer, widths, settings = _plain(name, config)
    return mixer.parameter_count(*widths, settings)


def flops(name: str, config: ModelConfig, length: int) -> tuple[float, float]:
    """Forward FLOPs per token, in rows of `length` tokens: (matrix products, the rest)."""
    if name == "serpent":
        return serpent.flops(config.d_model, config.serpent, *_mixer(config.serpent.inner, config), length)
    mixer, widths, settings = _plain(name, config)
    return mixer.flops(*widths, settings, length)


def kept_bytes(name: str, config: ModelConfig, itemsize: int, length: int) -> float:
    """What a GPU keeps of one token for the backward pass, the input left out. length: tokens of a row."""
    if name == "serpent":
        inner = _mixer(config.serpent.inner, config)
        return serpent.kept_bytes(config.d_model, config.serpent, *inner, itemsize, length)
    mixer, (_, d_inner, _), settings = _plain(name, config)
    return mixer.kept_bytes(d_inner, settings, itemsize)


def _mixer(name: str, config: ModelConfig) -> tuple[type[Mixer], Any]:
    """(class, its settings)."""
    return MIXERS[name], getattr(config, name)


def _plain(name: str, config: ModelConfig) -> tuple[type[Mixer], tuple[int, int, int], Any]:
    """(class, (d_in, d_inner, d_out), its settings) of a layer of this mixer alone."""
    mixer, settings = _mixer(name, config)
    return mixer, (config.d_model, mixer.width(config.d_model, settings), config.d_model), settings
