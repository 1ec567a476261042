"""The configuration of a run: one YAML file, typed, checked whole before anything starts.

`load_config(file, ["key=value", ...])` merges the file and the overrides into `Config`, and refuses unknown keys (naming
the nearest valid one), wrong types, values out of range and impossible combinations. Nothing else reads YAML.
"""
from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from serpent_scale.config_checks import check, range_text
from serpent_scale.errors import UserError
from serpent_scale.settings import (  # noqa: F401: imported from here elsewhere
    MIXERS, AttentionConfig, CheckpointConfig, Config, DataConfig, EvaluationConfig, LoggingConfig, Mamba2Config, MambaConfig,
    ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, S4DConfig, S5Config, ScheduleConfig, SerpentConfig, SourceConfig,
    StageConfig, TrainingConfig,
)


def load_config(file: str | Path, overrides: list[str] = (), saved: bool = False) -> Config:
    """Read, merge and check a configuration. `saved`: the one beside a model's parameters, see `parse_config`.

    Raises UserError naming the key's path, what is wrong with it and what is allowed.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{path}: no such config file; the ones shipped are in configs/")
    try:
        text = path.read_text()
        _refuse_surprises(text, str(path))
        node = OmegaConf.create(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {_first_line(error)}") from None
    if not OmegaConf.is_dict(node):
        raise UserError(f"{path}: a config file holds sections such as `model:`, this one holds {type(node).__name__}")
    for item in overrides:
        if not re.match(r"^[A-Za-z_][\w.]*=", item):
            raise UserError(f"override '{item}' is not key=value, for example optimizer.lr=3e-4")
        try:
            _refuse_surprises(item.split("=", 1)[1], f"override '{item}'")
        except yaml.YAMLError as error:
            raise UserError(f"override '{item}': not valid YAML: {_first_line(error)}") from None
    return parse_config(node, list(overrides), str(path), saved)


def parse_config(node, overrides: list[str] = (), origin: str = "config", saved: bool = False) -> Config:
    """Check an already parsed configuration (a mapping) with overrides applied. Raises UserError.

    `saved`: it was written beside a model's parameters; a key that it lacks is newer than them, and means what was computed then.
    """
    schema = OmegaConf.structured(Config)
    try:
        merged = OmegaConf.merge(schema, node)
        if saved:
            merged.model.serpent.join = _saved_join(node, merged.model)
        for item in overrides:
            origin = f"override '{item}'"
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([item]))
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise UserError(f"{origin}: unknown key {_suggest(error.full_key or str(error.key))}") from None
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        key, text = getattr(error, "full_key", None), _first_line(error)
        text = "not a list" if "ListConfig" in text else text
        raise UserError(f"{origin}: {f'{key}: ' if key else ''}{text}{_allowed_at(key)}") from None
    check(config)
    return config


def _saved_join(node, model) -> str:
    """model.serpent.join of a saved configuration: before there was a choice, the outputs of several branches were projected.
    Where it has no meaning, what it is by default now."""
    serpent, chosen = model.serpent, OmegaConf.select(OmegaConf.create(node), "model.serpent.join")
    several = "serpent" in model.pattern and serpent.depth == 1 and len(serpent.rates) > 1
    return "project" if several and chosen is None else serpent.join


def check_same_model(config: Config, saved: Path) -> None:
    """Raises UserError naming the first key of `model` that the config file beside a checkpoint has otherwise.

    Many of them change what is computed and no parameter's shape.
    """
    theirs, ours = (_leaves(yaml.safe_load(c.to_yaml())["model"], "model") for c in (load_config(saved, saved=True), config))
    for key in theirs:
        if theirs[key] != ours[key]:
            was, now = (str(value).replace("'", "") for value in (theirs[key], ours[key]))
            raise UserError(
                f"{saved}: trained with {key}={was}, this run has {now}; set {key}={was}, or start over under another run.name"
            )


def _leaves(section: dict, prefix: str) -> dict[str, Any]:
    found = {}
    for key, value in section.items():
        path = f"{prefix}.{key}"
        found.update(_leaves(value, path) if isinstance(value, dict) else {path: value})
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _refuse_surprises(text: str, origin: str) -> None:
    """YAML reads 0123 as 83; an interpolated environment variable would end up in logs and checkpoints."""
    stack, seen = [yaml.compose(text)], set()
    while stack:
        node = stack.pop()
        if id(node) in seen:  # an alias, which may lead to itself
            raise UserError(f"{origin}: YAML aliases are refused; write the value out")
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            stack.extend(value for pair in node.value for value in pair)
        elif isinstance(node, yaml.SequenceNode):
            stack.extend(node.value)
        elif isinstance(node, yaml.ScalarNode):
            # Only ${key.path}: a resolver such as oc.env may be spelt in many ways.
            if "${" in re.sub(r"\$\{\.*\w+(\.\w+)*\}", "", node.value):
                raise UserError(f"{origin}: '{node.value}' is refused, only ${{section.key}} is filled in: what a resolver "
                                "reads would reach logs and checkpoints; pass key=value instead")
            if node.style is None and re.fullmatch(r"[-+]?0[0-7_]+", node.value):
                raise UserError(f"{origin}: {node.value} would be read as octal; write it without the leading zero")


def _fields(cls, prefix: str = ""):
    """(dotted path, dataclass field) of every leaf setting."""
    hints = {f.name: f for f in dataclasses.fields(cls)}
    instance = cls()
    for name, f in hints.items():
        value = getattr(instance, name)
        if dataclasses.is_dataclass(value):
            yield from _fields(type(value), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", f


def _suggest(key: str) -> str:
    names = [name for name, _ in _fields(Config)]
    sections = sorted({name.rsplit(".", 1)[0] for name in names if "." in name})
    near = difflib.get_close_matches(key, names + sections, n=1, cutoff=0.5)
    if not near:  # a right name in the wrong section
        near = [name for name in names if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return f"'{key}'" + (f"; the nearest valid key is '{near[0]}'" if near else f"; sections are {', '.join(sections)}")


def _allowed_at(key: str | None) -> str:
    f = dict(_fields(Config)).get(key or "")
    if f is None:
        return ""
    allowed = range_text(f)
    kind = f.type if isinstance(f.type, str) else f.type.__name__
    return f"; expected {kind}" + (f", {allowed}" if allowed else "")
