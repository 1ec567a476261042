"""What the settings of a run must keep to: each its range, and together the combinations that can run.
All raise UserError naming the key, what is wrong and what to set."""
from __future__ import annotations

import dataclasses
import difflib
import math
import re

from serpent_scale.errors import UserError
from serpent_scale.settings import MIXERS, Config, ModelConfig, SourceConfig


def check(config: Config) -> None:
    """Raises UserError at the first setting that does not hold."""
    _check_ranges(config, "")
    _check_combinations(config)


def range_text(f: dataclasses.Field) -> str:
    if f.metadata.get("choices"):
        return "one of " + ", ".join(map(str, f.metadata["choices"]))
    words = dict(ge=">=", gt=">", le="<=", lt="<")
    return " and ".join(f"{sign} {f.metadata[k]}" for k, sign in words.items() if f.metadata.get(k) is not None)


def _check_ranges(section, prefix: str) -> None:
    for f in dataclasses.fields(section):
        value, path = getattr(section, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            _check_ranges(value, f"{path}.")
            continue
        if isinstance(value, list):
            for number, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    _check_ranges(item, f"{path}[{number}].")
        meta = f.metadata
        if value is None or not meta:
            continue
        bad = (
            (meta["choices"] is not None and value not in meta["choices"])
            or (isinstance(value, float) and not math.isfinite(value))
            or (meta["ge"] is not None and not value >= meta["ge"])
            or (meta["gt"] is not None and not value > meta["gt"])
            or (meta["le"] is not None and not value <= meta["le"])
            or (meta["lt"] is not None and not value < meta["lt"])
        )
        if bad:
            finite = "finite and " if isinstance(value, float) and not math.isfinite(value) else ""
            raise UserError(f"{path}={value} is not allowed; it must be {finite}{range_text(f)}")


def _check_combinations(config: Config) -> None:
    model, training, schedule = config.model, config.training, config.schedule
    mixers = (*MIXERS, "serpent")
    if not model.pattern:
        raise UserError("model.pattern is empty; name at least one mixer of " + ", ".join(mixers))
    for name in model.pattern:
        if name not in mixers:
            near = difflib.get_close_matches(name, mixers, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"model.pattern: unknown mixer '{name}'; known are {', '.join(mixers)}{hint}")
    rates = model.serpent.rates
    if not rates or any(not 1 / 64 <= r <= 1 for r in rates):
        raise UserError(f"model.serpent.rates={rates} is not allowed; each rate must be >= 1/64 and <= 1")
    if len(rates) > model.d_model:
        raise UserError(f"model.serpent.rates has {len(rates)} branches but model.d_model is {model.d_model}")
    if model.serpent.d_inner is not None and model.serpent.d_inner < len(rates):
        raise UserError(f"model.serpent.d_inner={model.serpent.d_inner} is not allowed; its {len(rates)} branches "
                        f"(model.serpent.rates) need >= {len(rates)}")
    shares = model.serpent.shares
    if shares and (len(shares) != len(rates) or not all(0 < share < math.inf for share in shares)):
        raise UserError(f"model.serpent.shares={shares} is not allowed; it must be one number > 0 for each of "
                        f"model.serpent.rates={rates}, or []")  # fmt: skip
    model.layers  # refused where it ends inside a serpent layer
    for rate in rates if model.serpent.clock == "stride" else ():
        if abs(rate * round(1 / rate) - 1) > 1e-3:
            raise UserError(f"model.serpent.rates={rates}: with model.serpent.clock=stride each rate is 1 / n, {rate} is not; "
                            f"set it to {1 / round(1 / rate):.6g}")  # fmt: skip
    for key, only in (("window", "integrated"), ("restore", "readout")) if model.serpent.clock == "routed" else ():
        if getattr(model.serpent, key) != only:
            raise UserError(f"model.serpent.{key}={getattr(model.serpent, key)} has no meaning with model.serpent.clock=routed, "
                            f"which has its own; leave it at {only}")  # fmt: skip
    if model.serpent.window == "pointwise" and model.serpent.join == "add" and len(rates) > 1 and model.serpent.depth == 1:
        raise UserError("model.serpent.window=pointwise maps windows to what a branch puts out, which takes more parameters than "
                        "a layer has where each of several branches puts out d_model; set model.serpent.join=project")
    if model.serpent.teach != "durations" and model.serpent.clock != "learned":
        raise UserError(f"model.serpent.teach={model.serpent.teach} teaches a learned clock, model.serpent.clock is "
                        f"{model.serpent.clock}; set model.serpent.clock=learned or model.serpent.teach=durations")  # fmt: skip
    for name in MIXERS:
        mixer, path = getattr(model, name), f"model.{name}"
        if int(mixer.expand * model.d_model) < 1:
            raise UserError(f"{path}.expand={mixer.expand} x model.d_model={model.d_model} leaves no inner channel; "
                            f"raise {path}.expand to >= {1 / model.d_model:.4g}")
        if hasattr(mixer, "dt_min") and mixer.dt_min > mixer.dt_max:
            raise UserError(f"{path}.dt_min={mixer.dt_min} is above {path}.dt_max={mixer.dt_max}")
    for key, value in (("s4d.d_state", model.s4d.d_state), ("attention.head_dim", model.attention.head_dim)):
        if value % 2:
            raise UserError(f"model.{key}={value} is odd; it must be even, {value - 1} or {value + 1}")
    if model.s5.d_state % (2 * model.s5.n_blocks):
        raise UserError(f"model.s5.d_state={model.s5.d_state} is not a multiple of 2 x model.s5.n_blocks = "
                        f"{2 * model.s5.n_blocks}; change one of them")
    _check_heads(model, "mamba2", "n_groups")
    _check_heads(model, "attention", "queries_per_key")
    _check_sources(config.data.sources)
    _check_stages(config)
    _check_shards(config)
    if training.max_steps is None and training.max_tokens is None and not any(s.tokens for s in config.data.sources):
        raise UserError("training.max_steps or training.max_tokens must be set; a run needs a budget")
    if schedule.kind == "wsd" and not schedule.decay_steps:
        raise UserError("schedule.decay_steps must be > 0 with schedule.kind=wsd")
    if schedule.kind != "wsd" and schedule.decay_steps:
        raise UserError(f"schedule.decay_steps is only for schedule.kind=wsd, this is {schedule.kind}; remove it")
    if schedule.warmup_steps + schedule.decay_steps > config.total_steps:
        raise UserError(
            f"schedule.warmup_steps + schedule.decay_steps = {schedule.warmup_steps + schedule.decay_steps} is more "
            f"than the {config.total_steps} steps of the budget (training.max_steps, training.max_tokens)"
        )
    if training.global_batch % training.micro_batch:
        raise UserError(
            f"training.global_batch={training.global_batch} is not a multiple of training.micro_batch={training.micro_batch}"
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", config.run.name):
        raise UserError(f"run.name='{config.run.name}' must be letters, digits, '.', '_' and '-': it names a folder")


def _check_sources(sources: list[SourceConfig]) -> None:
    for number, source in enumerate(sources):
        path = f"data.sources[{number}]"
        if not source.path:
            raise UserError(f"{path}.path is missing; name a folder written by launch/prepare_data.py")
        if (source.weight is None) == (source.tokens is None):
            raise UserError(f"{path}: give either weight or tokens")
        if (source.weight is None) != (sources[0].weight is None):
            raise UserError(f"{path}: some sources have weights and others tokens; give all of them the same")


def _check_stages(config: Config) -> None:
    training, full = config.training, config.data.seq_len
    for number, stage in enumerate(training.stages):
        path, length, batch = f"training.stages[{number}]", stage.seq_len or full, stage.global_batch or training.global_batch
        if full % length:
            raise UserError(f"{path}.seq_len={length} is not a divisor of data.seq_len={full}")
        rows = training.micro_batch * (full // length)  # of a pass: as many tokens as at full length
        if batch % rows:
            raise UserError(f"{path}.global_batch={batch} is not a multiple of training.micro_batch x data.seq_len / seq_len = "
                            f"{rows}")  # fmt: skip


def _check_shards(config: Config) -> None:
    """Each shard of a sequence has at least the tokens that the one after it looks back on."""
    model, parts = config.model, config.parallel.sequence
    if parts == 1:
        return
    length = min(stage.seq_len for stage in config.samples.stages)
    halos, used = {}, set(model.pattern)
    if "serpent" in used:
        for key, sharded in (("clock", "learned, uniform or stride"), ("teach", "durations")):
            value = str(getattr(model.serpent, key))
            if value not in sharded.replace(" or ", ", ").split(", "):
                raise UserError(f"parallel.sequence={parts}: model.serpent.{key}={value} has no form for shards of a sequence; "
                                f"set parallel.sequence=1 or model.serpent.{key} to {sharded}")  # fmt: skip
        used.add(model.serpent.inner)
        slowest = min((rate for rate in model.serpent.rates if rate != 1), default=1)
        spread = 1 if model.serpent.clock == "stride" else model.serpent.spread
        tokens = {"integrated": math.ceil(model.serpent.horizon * spread / slowest), "segment_mean": math.ceil(spread / slowest)}
        halos["SeRpEnt's window"] = tokens.get(model.serpent.window, 2)
    for name in used & set(MIXERS):
        halos[f"{name}'s convolution"] = getattr(getattr(model, name), "d_conv", 1) - 1
    what, need = max(halos.items(), key=lambda item: item[1])
    if length // parts < max(1, need):
        raise UserError(
            f"parallel.sequence={parts} cuts data.seq_len={length} into shards of {length // parts} tokens, and {what} reaches "
            f"{need} tokens back; set parallel.sequence <= {max(1, length // max(1, need))} or data.seq_len >= "
            f"{parts * max(1, need)}"
        )


def _check_heads(model: ModelConfig, name: str, per_head: str) -> None:
    """The widths of a mixer of heads, where it is in use, are multiples of head_dim times `per_head`."""
    mixer, path = getattr(model, name), f"model.{name}"
    unit, width = mixer.head_dim * getattr(mixer, per_head), int(mixer.expand * model.d_model)
    inside = "serpent" in model.pattern and model.serpent.inner == name
    heads = f"{path}.head_dim x {path}.{per_head} = {unit}"
    if (name in model.pattern or inside) and width % unit:
        raise UserError(f"{path}.expand x model.d_model = {width} is not a multiple of {heads}; change one of them")
    if not inside:
        return
    branches, d_inner = len(model.serpent.rates), model.serpent.d_inner
    if d_inner is not None and d_inner % unit:
        raise UserError(f"model.serpent.d_inner={d_inner} is not a multiple of {heads}; change one of them")
    if (d_inner or width) < branches * unit:
        raise UserError(f"{heads} is too wide: the {branches} branches (model.serpent.rates) share {d_inner or width} channels; "
                        f"lower it to <= {(d_inner or width) // branches}")
