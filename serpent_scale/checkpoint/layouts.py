"""Models in the layouts of other projects: their folders as our configuration and parameters, and ours as theirs.

    transformers   config.json (model_type mamba or mamba2) and safetensors, in one file or sharded by an index
    mamba_ssm      config.json (d_model, n_layer, ssm_cfg) and pytorch_model.bin or safetensors
    serpent_scale  what transformers reads with `import serpent_scale.huggingface`: any model of ours, config.json and safetensors

Everything that would change what a model computes and that we do not have is refused by name. What only sets how a model
starts, or how it is calculated, is passed over. Nothing in a folder is executed.
"""
from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import torch
from torch import Tensor

from serpent_scale.config import Config, MambaConfig, ModelConfig, parse_config
from serpent_scale.errors import UserError
from serpent_scale.model.language_model import LanguageModel
from serpent_scale.model.mamba import dt_rank

LAYOUTS = ("transformers", "mamba_ssm", "serpent_scale")
MODEL_TYPE, PREFIX = "serpent_scale", "model."  # of our own layout: its name in config.json, and before every tensor's name
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PUBLISHED_LENGTH = 2048  # tokens a sequence, in the training of the published Mamba and Mamba-2 models
NAMES = [  # a pattern in our names, what stands for it in theirs
    (r"^embedding\.", "backbone.embeddings."), (r"^blocks\.", "backbone.layers."), (r"^readout\.norm\.", "backbone.norm_f."),
    (r"^readout\.weight$", "lm_head.weight"), (r"\.conv_weight$", ".conv1d.weight"), (r"\.conv_bias$", ".conv1d.bias"),
    (r"\.norm_weight$", ".norm.weight"),
]
FREE = float("inf")


def read(folder: Path, vocab_size: int | None = None) -> tuple[Config, dict[str, Tensor]]:
    """(configuration of a run that goes on from it, float32 parameters under every name `load_state_dict` wants).

    vocab_size: the tokenizer's, where the folder counts rows of padding as tokens; None: the folder's. Raises UserError: no
    such layout, another architecture, a setting we do not have, tensors missing, unknown or of another shape.
    """
    file = folder / "config.json"
    found = Settings(_read_json(file), file)
    kind = found.values.get("model_type")
    if kind == MODEL_TYPE:
        return _read_own(folder, found)
    if kind in ("mamba", "mamba2"):
        model, rows = (_transformers_mamba if kind == "mamba" else _transformers_mamba2)(found), found.take("vocab_size")
    elif "d_model" in found.values and "n_layer" in found.values:
        model, rows = _mamba_ssm(found)
    else:
        said = f"model_type '{kind}'" if kind else "neither model_type nor d_model and n_layer"
        raise UserError(f"{file}: {said}: not a Mamba or Mamba-2 of transformers or mamba_ssm, which are what can be read")
    if vocab_size is not None and vocab_size > rows:
        raise UserError(f"{file}: the model has {rows} rows of vocabulary, the tokenizer {vocab_size} tokens; "
                        "give the model's own with --tokenizer")
    model["vocab_size"] = vocab_size or model["vocab_size"]
    config = _run_of(model, file)
    return config, _ours(_read_tensors(folder), config.model, rows, folder, bool(found.conv_bias))


def write(layout: str | None, folder: Path, config: ModelConfig, state: dict[str, Tensor], end_of_text: int | None) -> str:
    """Write config.json and the tensors into an existing folder; the layout. None: transformers if the model is a pure Mamba or
    Mamba-2, else serpent_scale. Raises UserError for a model that the layout has no words for."""
    pure = config.pattern[0] if len(set(config.pattern)) == 1 and config.pattern[0] in ("mamba", "mamba2") else None
    layout = layout or ("transformers" if pure else "serpent_scale")
    if layout == "serpent_scale":
        tied = "readout.weight" if config.tie_embeddings else None
        tensors = {PREFIX + name: value for name, value in state.items() if name != tied}
        settings = {
            "model_type": MODEL_TYPE, "architectures": ["SerpentForCausalLM"], "model": dataclasses.asdict(config),
            "vocab_size": config.vocab_size, "hidden_size": config.d_model, "num_hidden_layers": config.n_layers,
            "tie_word_embeddings": config.tie_embeddings, "bos_token_id": end_of_text, "eos_token_id": end_of_text,
            "dtype": "float32",
        }
    else:
        if pure is None:
            raise UserError(f"--layout {layout}: has pure Mamba and Mamba-2 models only, this one is "
                            f"{', '.join(config.pattern)}; use --layout serpent_scale")
        settings = (_to_transformers if layout == "transformers" else _to_mamba_ssm)(config, pure, end_of_text)
        tensors = _theirs(state, config, "embeddings" if layout == "transformers" else "embedding")
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    if layout == "mamba_ssm":  # its from_pretrained reads this file only
        torch.save(tensors | {"lm_head.weight": tensors.get("lm_head.weight", tensors["backbone.embedding.weight"])},
                   folder / "pytorch_model.bin")
    else:
        # Copies: parameters read from DeepSpeed's files are views of one storage, which safetensors refuses.
        tensors = {name: value.clone() for name, value in tensors.items()}
        huggingface_hub.save_torch_state_dict(tensors, folder, metadata={"format": "pt"})
    return layout


# Settings: theirs as ours.


class Settings:
    """The mapping of a config.json, or a part of it, with refusals that name the file and the key."""

    def __init__(self, values: dict, file: Path, prefix: str = ""):
        if not isinstance(values, dict):
            raise UserError(f"{file}: {prefix.rstrip('.') or 'the file'} is not a mapping of settings")
        self.values, self.file, self.prefix, self.conv_bias = values, file, prefix, True

    def take(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key, default)
        if value is None:
            raise UserError(f"{self.file}: {self.prefix}{key} is missing")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{self.file}: {self.prefix}{key}={value!r} is not a number")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """The setting, where it is given, must be one of these."""
        value = self.values.get(key, allowed[0])
        if value not in allowed:
            raise UserError(f"{self.file}: {self.prefix}{key}={value!r} is not available here, only {json.dumps(allowed[0])}")

    def known(self, *keys: str) -> None:
        for key in self.values:
            if key not in keys:
                raise UserError(f"{self.file}: {self.prefix}{key} is not a setting known here; it may change what is computed")


def _transformers_mamba(found: Settings) -> dict:
    found.only("hidden_act", "silu", "swish")
    found.only("use_bias", False)
    found.conv_bias = found.take("use_conv_bias", True)
    d_model, expand = found.number("hidden_size"), found.number("expand", 2)
    rank = found.take("time_step_rank", "auto")
    rank = math.ceil(d_model / 16) if rank == "auto" else rank
    return _common(found, "mamba") | {"mamba": {
        "expand": float(expand), "d_state": found.number("state_size", 16), "d_conv": found.number("conv_kernel", 4),
        "dt_rank": _unless_default(rank, d_model, expand),
        "dt_min": found.number("time_step_min", 0.001), "dt_max": found.number("time_step_max", 0.1),
    }}


def _transformers_mamba2(found: Settings) -> dict:
    found.only("hidden_act", "silu", "swish")
    found.only("use_bias", False)
    found.conv_bias = found.take("use_conv_bias", True)
    _free_steps(found, "time_step_limit")
    heads, width, d_model = found.number("num_heads", 128), found.number("head_dim", 64), found.number("hidden_size")
    expand = found.number("expand", 2)
    if heads * width != int(expand * d_model):
        raise UserError(f"{found.file}: num_heads x head_dim = {heads * width} is not expand x hidden_size = "
                        f"{int(expand * d_model)}")
    return _common(found, "mamba2", tied=False) | {"mamba2": {
        "expand": float(expand), "d_state": found.number("state_size", 128), "d_conv": found.number("conv_kernel", 4),
        "head_dim": width, "n_groups": found.number("n_groups", 8), "norm_eps": found.number("layer_norm_epsilon", 1e-5),
        "dt_min": found.number("time_step_min", 0.001), "dt_max": found.number("time_step_max", 0.1),
    }}


def _common(found: Settings, mixer: str, tied: bool = True) -> dict:
    return {
        "vocab_size": found.number("vocab_size"), "d_model": found.number("hidden_size"),
        "n_layers": found.number("num_hidden_layers"), "pattern": [mixer], "norm_eps": found.number("layer_norm_epsilon", 1e-5),
        "tie_embeddings": found.take("tie_word_embeddings", tied),
    }


def _mamba_ssm(found: Settings) -> tuple[dict, int]:
    """(our settings, rows of the embedding)."""
    found.known("d_model", "n_layer", "vocab_size", "ssm_cfg", "rms_norm", "residual_in_fp32", "fused_add_norm", "d_intermediate",
                "attn_layer_idx", "attn_cfg", "pad_vocab_size_multiple", "tie_embeddings", "initializer_cfg")  # fmt: skip
    found.only("rms_norm", True)
    found.only("d_intermediate", 0)
    found.only("attn_layer_idx", [], None)
    ssm = Settings(found.values.get("ssm_cfg") or {}, found.file, "ssm_cfg.")
    ssm.only("layer", "Mamba1", "Mamba2")
    ssm.only("bias", False)
    found.conv_bias = ssm.take("conv_bias", True)
    d_model, expand = found.number("d_model"), ssm.number("expand", 2)
    shared = {
        "expand": float(expand), "d_conv": ssm.number("d_conv", 4),
        "dt_min": ssm.number("dt_min", 0.001), "dt_max": ssm.number("dt_max", 0.1),
    }
    known = ("layer", "d_state", "d_conv", "expand", "dt_min", "dt_max", "dt_init_floor", "conv_bias", "bias")
    if ssm.values.get("layer", "Mamba1") == "Mamba1":
        ssm.known(*known, "dt_rank", "dt_init", "dt_scale", "use_fast_path")
        rank = ssm.take("dt_rank", "auto")
        rank = math.ceil(d_model / 16) if rank == "auto" else rank
        mixer = "mamba"
        section = shared | {"d_state": ssm.number("d_state", 16), "dt_rank": _unless_default(rank, d_model, expand)}
    else:
        ssm.known(*known, "headdim", "ngroups", "conv_init", "A_init_range", "chunk_size", "use_mem_eff_path",
                  "sequence_parallel", "d_ssm", "D_has_hdim", "rmsnorm", "norm_before_gate", "dt_limit",
                  "activation")  # fmt: skip
        ssm.only("d_ssm", None, expand * d_model)
        ssm.only("D_has_hdim", False)
        ssm.only("rmsnorm", True)
        ssm.only("norm_before_gate", False)
        ssm.only("activation", "silu", "swish")
        _free_steps(ssm, "dt_limit")
        mixer = "mamba2"
        section = shared | {
            "d_state": ssm.number("d_state", 128), "head_dim": ssm.number("headdim", 64), "n_groups": ssm.number("ngroups", 1),
        }
    vocabulary, multiple = found.number("vocab_size"), max(1, int(found.number("pad_vocab_size_multiple", 8)))
    model = {
        "vocab_size": vocabulary, "d_model": d_model, "n_layers": found.number("n_layer"), "pattern": [mixer], mixer: section,
        "tie_embeddings": found.take("tie_embeddings", True),
    }
    return model, -(-int(vocabulary) // multiple) * multiple


def _free_steps(found: Settings, key: str) -> None:
    """dt is not clamped here."""
    low, high = (found.values.get(key) or [0.0, FREE])[:2]
    if isinstance(high, dict):  # transformers writes an infinite float so
        high = float(next(iter(high.values())))
    if low != 0 or high != FREE:
        raise UserError(f"{found.file}: {found.prefix}{key}=[{low}, {high}] is not available here, only [0.0, Infinity]")


def _unless_default(rank: int, d_model: float, expand: float) -> int | None:
    """A rank of the step projection as our setting: null where that comes to the same."""
    return None if rank == dt_rank(int(expand * d_model), MambaConfig()) else rank


def _run_of(model: dict, file: Path) -> Config:
    """A whole configuration around a model's, its training left at the defaults and a budget to be overridden."""
    try:
        run = {"model": model, "data": {"seq_len": PUBLISHED_LENGTH}, "training": {"max_steps": 1000}}
        return parse_config(run, origin="model", saved=True)
    except UserError as error:
        raise UserError(f"{file}: as a model of ours: {error}") from None


# Settings: ours as theirs.


def _to_transformers(config: ModelConfig, mixer: str, end_of_text: int | None) -> dict:
    section = getattr(config, mixer)
    expand = _whole(config, mixer, "transformers")
    settings = {
        "model_type": mixer, "architectures": ["MambaForCausalLM" if mixer == "mamba" else "Mamba2ForCausalLM"],
        "vocab_size": config.vocab_size, "hidden_size": config.d_model, "num_hidden_layers": config.n_layers,
        "state_size": section.d_state, "conv_kernel": section.d_conv, "expand": expand, "layer_norm_epsilon": config.norm_eps,
        "time_step_min": section.dt_min, "time_step_max": section.dt_max, "hidden_act": "silu", "use_bias": False,
        "use_conv_bias": True, "residual_in_fp32": True, "tie_word_embeddings": config.tie_embeddings, "dtype": "float32",
        "bos_token_id": end_of_text, "eos_token_id": end_of_text, "pad_token_id": end_of_text,
    }
    if mixer == "mamba":
        return settings | {"time_step_rank": _rank(config)}
    if section.norm_eps != config.norm_eps:
        raise UserError(f"--layout transformers: has one epsilon for all norms, here model.norm_eps={config.norm_eps} and "
                        f"model.mamba2.norm_eps={section.norm_eps}; use --layout serpent_scale")
    heads = expand * config.d_model // section.head_dim
    return settings | {"num_heads": heads, "head_dim": section.head_dim, "n_groups": section.n_groups, "chunk_size": 256}


def _to_mamba_ssm(config: ModelConfig, mixer: str, end_of_text: int | None) -> dict:
    section = getattr(config, mixer)
    for path, eps in (("norm_eps", config.norm_eps), ("mamba2.norm_eps", config.mamba2.norm_eps)):
        if eps != 1e-5 and (mixer == "mamba2" or path == "norm_eps"):
            raise UserError(f"--layout mamba_ssm: its norms have epsilon 1e-05, here model.{path}={eps}; "
                            "use --layout transformers")
    ssm = {
        "layer": "Mamba1" if mixer == "mamba" else "Mamba2", "d_state": section.d_state, "d_conv": section.d_conv,
        "expand": _whole(config, mixer, "mamba_ssm"), "dt_min": section.dt_min, "dt_max": section.dt_max,
    }
    ssm |= {"dt_rank": _rank(config)} if mixer == "mamba" else {"headdim": section.head_dim, "ngroups": section.n_groups}
    return {
        "d_model": config.d_model, "d_intermediate": 0, "n_layer": config.n_layers, "vocab_size": config.vocab_size,
        "ssm_cfg": ssm, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
        "pad_vocab_size_multiple": 1, "tie_embeddings": config.tie_embeddings,
    }


def _whole(config: ModelConfig, mixer: str, layout: str) -> int:
    expand = getattr(config, mixer).expand
    if expand != int(expand):
        raise UserError(f"--layout {layout}: its expansion is a whole number, here model.{mixer}.expand={expand}; "
                        "use --layout serpent_scale")
    return int(expand)


def _rank(config: ModelConfig) -> int:
    return dt_rank(int(config.mamba.expand * config.d_model), config.mamba)


# Tensors.


def _ours(theirs: dict[str, Tensor], config: ModelConfig, rows: int, folder: Path, conv_bias: bool) -> dict[str, Tensor]:
    """Their tensors under our names, float32, the vocabulary padded with what rows they have and zeros."""
    if "backbone.embedding.weight" in theirs:
        theirs["backbone.embeddings.weight"] = theirs.pop("backbone.embedding.weight")
    state, seen = {}, set()
    for name, parameter in _parameters(config).items():
        name_there, shape = _their_name(name, config), tuple(parameter.shape)
        if name == "readout.weight" and config.tie_embeddings:
            continue
        if name.endswith("conv_bias") and not conv_bias:
            state[name] = torch.zeros(shape)
            continue
        if name in ("embedding.weight", "readout.weight"):
            shape = (rows, config.d_model)
        elif name.endswith("conv_weight"):
            shape = (shape[0], 1, shape[1])
        value = _tensor(theirs, name_there, shape, folder)
        seen.add(name_there)
        if name.endswith("conv_weight"):  # our tap 0 is the newest token
            value = value[:, 0].flip(1).contiguous()
        elif len(shape) == 2 and shape[0] != parameter.shape[0]:
            value = value[: parameter.shape[0]]
            value = torch.nn.functional.pad(value, (0, 0, 0, parameter.shape[0] - len(value)))
        state[name] = value
    if config.tie_embeddings:
        state["readout.weight"] = state["embedding.weight"]
        head = theirs.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, theirs["backbone.embeddings.weight"]):
            raise UserError(f"{folder}: lm_head.weight is not the embedding, though config.json says that they are tied")
    for name in sorted(theirs.keys() - seen):
        raise UserError(f"{folder}: tensor {name} has no place in a {config.pattern[0]} model as config.json describes it")
    return state


def _tensor(theirs: dict[str, Tensor], name: str, shape: tuple[int, ...], folder: Path) -> Tensor:
    if name not in theirs:
        raise UserError(f"{folder}: tensor {name} is missing; config.json asks for it, of shape {shape}")
    value = theirs[name]
    if tuple(value.shape) != shape:
        raise UserError(f"{folder}: tensor {name} has shape {tuple(value.shape)}, config.json asks for {shape}")
    if not value.is_floating_point():
        raise UserError(f"{folder}: tensor {name} holds {value.dtype}; only float tensors are read, none that are quantised")
    return value.float()


def _theirs(state: dict[str, Tensor], config: ModelConfig, embedding: str) -> dict[str, Tensor]:
    """Our parameters under their names, the vocabulary without its padding. A tied read-out is left out."""
    tensors = {}
    for name, value in state.items():
        if name in ("embedding.weight", "readout.weight"):
            value = value[: config.vocab_size]
        elif name.endswith("conv_weight"):
            value = value.flip(1)[:, None]
        if name != "readout.weight" or not config.tie_embeddings:
            tensors[_their_name(name, config).replace("embeddings", embedding)] = value.contiguous().float()
    return tensors


def _their_name(name: str, config: ModelConfig) -> str:
    for pattern, theirs in NAMES:
        name = re.sub(pattern, theirs, name)
    return name.replace(".dt_bias", ".dt_proj.bias") if config.pattern[0] == "mamba" else name


def _parameters(config: ModelConfig) -> dict[str, Tensor]:
    """Name and shape of every parameter, without memory for them."""
    with torch.device("meta"):
        return LanguageModel(config).state_dict()


def _read_own(folder: Path, found: Settings) -> tuple[Config, dict[str, Tensor]]:
    config = _run_of(found.take("model"), found.file)
    tensors, state = _read_tensors(folder), {}
    for name, parameter in _parameters(config.model).items():
        if name != "readout.weight" or not config.model.tie_embeddings:
            state[name] = _tensor(tensors, PREFIX + name, tuple(parameter.shape), folder)
    for name in sorted(tensors.keys() - {PREFIX + name for name in state}):
        raise UserError(f"{folder}: tensor {name} has no place in the model that config.json describes")
    if config.model.tie_embeddings:
        state["readout.weight"] = state["embedding.weight"]
    return config, state


# Files.


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder by name. Raises UserError naming the file."""
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder}: holds none of {', '.join(WEIGHTS)}; download the model's weights too")
    if file.suffix != ".json":
        return _load(file)
    places = _read_json(file).get("weight_map")
    names = set(places.values()) if isinstance(places, dict) else {None}
    if not all(isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin)", name) for name in names):
        raise UserError(f"{file}: its weight_map does not name files beside it; download the model again")
    tensors: dict[str, Tensor] = {}
    for name in sorted(names):
        tensors |= _load(folder / name)
    for name in sorted(places.keys() - tensors.keys()):
        raise UserError(f"{folder / places[name]}: tensor {name} is missing, {file.name} places it there")
    return tensors


def _load(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{file}: refused, it holds more than tensors and plain values; do not use it") from None
    except (OSError, RuntimeError, EOFError, ValueError, safetensors.SafetensorError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0][:100]
        raise UserError(f"{file}: cannot be read ({reason}); download it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in tensors.items()):
        raise UserError(f"{file}: is not a mapping of names to tensors; give a model's folder, not a trainer's checkpoint")
    return dict(tensors)


def _read_json(file: Path) -> dict:
    if not file.is_file():
        ours = (file.parent / "manifest.json").is_file() or (file.parent / "checkpoints").is_dir()
        hint = "this is a checkpoint or run of ours, which `export` takes"
        raise UserError(f"{file}: no such file; {hint if ours else 'give a folder of transformers or mamba_ssm'}")
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError):
        raise UserError(f"{file}: not JSON; download it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: holds no mapping; download it again")
    return values
