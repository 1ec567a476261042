"""The configuration of a run: one YAML file, typed, checked whole before anything starts.

`load_config(file, ["key=value", ...])` merges the file and the overrides into `Config`, and refuses unknown keys (naming
the nearest valid one), wrong types, values out of range and impossible combinations. Nothing else reads YAML.
"""
from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from data_pipeline.schedule import Schedule
from serpent_scale.errors import UserError

# Each has a section of `ModelConfig` and a class in serpent_scale/model/mixers.py.
MIXERS = ("mamba", "mamba2", "s4d", "s5", "attention")


def setting(default: Any, doc: str, *, ge=None, gt=None, le=None, lt=None, choices=None):
    """A documented field of a config section, with the range or the choices its value must keep to."""
    metadata = dict(doc=doc, ge=ge, gt=gt, le=le, lt=lt, choices=choices)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    name: str = setting("run", "name of the run; its files go to FOLDER/NAME")
    folder: str = setting("runs", "where runs are kept")
    seed: int = setting(1234, "seed of the initial parameters and of the data order", ge=0, lt=2**63)


@dataclass
class SourceConfig:
    path: str = setting("", "folder written by launch/prepare_data.py, with the tokenizer of the others")
    weight: Optional[float] = setting(None, "share of the tokens, relative to the other sources' weights", gt=0)
    tokens: Optional[int] = setting(None, "or tokens to take from it; the run ends when those of all sources are spent", ge=1)


@dataclass
class DataConfig:
    path: str = setting("data", "folder written by launch/prepare_data.py, or its URL: https://…, s3://…")
    cache: Optional[str] = setting(None, "local folder for what is fetched from a URL, shared by the ranks of a node")
    cache_gib: float = setting(100.0, "largest size of the cache", gt=0)
    sources: list[SourceConfig] = setting([], "mix the train splits of these instead: [{path: ..., weight: ... or tokens: ...}]")
    seq_len: int = setting(1024, "tokens per sequence", ge=2)
    shuffle_block: int = setting(65536, "windows are permuted within blocks of this many", ge=1)
    packing: str = setting("cut", "cut documents where a window ends, or best_fit: by a plan of prepare_data.py --pack",
                           choices=("cut", "best_fit"))
    on_error: str = setting("stop", "at a damaged shard: stop, or skip its tokens", choices=("stop", "skip"))


@dataclass
class MambaConfig:
    """Mamba (Gu & Dao, arXiv 2312.00752): the selective state-space mixer."""

    expand: float = setting(2.0, "d_inner = expand * d_model", gt=0)
    d_state: int = setting(16, "state size N per channel", ge=1)
    d_conv: int = setting(4, "taps of the causal convolution", ge=1)
    dt_rank: Optional[int] = setting(None, "rank of the step projection; null: d_inner / 32, from 16 on in multiples of 16", ge=1)
    dt_min: float = setting(0.001, "smallest initial step dt", gt=0)
    dt_max: float = setting(0.1, "largest initial step dt", gt=0)


@dataclass
class Mamba2Config:
    """Mamba-2 (Dao & Gu, arXiv 2405.21060): state-space duality, one decay per head."""

    expand: float = setting(2.0, "d_inner = expand * d_model", gt=0)
    d_state: int = setting(128, "state size N per channel", ge=1)
    d_conv: int = setting(4, "taps of the causal convolution over x, B and C", ge=1)
    head_dim: int = setting(64, "channels of a head; d_inner is a multiple of head_dim * n_groups", ge=1)
    n_groups: int = setting(1, "groups of heads, each with its own B, C and root mean square", ge=1)
    norm_eps: float = setting(1e-5, "epsilon of the gated RMSNorm", gt=0)
    dt_min: float = setting(0.001, "smallest initial step dt", gt=0)
    dt_max: float = setting(0.1, "largest initial step dt", gt=0)


@dataclass
class S4DConfig:
    """S4D (Gu et al., arXiv 2206.11893): a diagonal state-space model per channel, the same at every token."""

    expand: float = setting(2.0, "d_inner = expand * d_model", gt=0)
    d_state: int = setting(64, "state size N per channel, kept as N/2 complex numbers; even", ge=2)
    init: str = setting("lin", "initial frequencies: lin, pi n; inv, N/pi (N/(2n+1) - 1)", choices=("lin", "inv"))
    dt_min: float = setting(0.001, "smallest initial step dt", gt=0)
    dt_max: float = setting(0.1, "largest initial step dt", gt=0)
    convolution: str = setting(
        "chunks", "chunks: causal to the bit; fft: rows of one document by FFT, causal to rounding", choices=("chunks", "fft")
    )


@dataclass
class S5Config:
    """S5 (Smith et al., arXiv 2208.04933): one diagonal state-space model with many inputs and outputs."""

    expand: float = setting(2.0, "d_inner = expand * d_model", gt=0)
    d_state: int = setting(128, "state size N of the layer, kept as N/2 complex numbers; a multiple of 2 n_blocks", ge=2)
    n_blocks: int = setting(8, "the state starts as this many HiPPO systems side by side", ge=1)
    dt_min: float = setting(0.001, "smallest initial step dt", gt=0)
    dt_max: float = setting(0.1, "largest initial step dt", gt=0)


@dataclass
class AttentionConfig:
    """Causal softmax attention within documents; its state is a cache that grows with the document."""

    expand: float = setting(1.0, "d_inner = expand * d_model, the width of all query heads", gt=0)
    head_dim: int = setting(64, "channels of a head; even", ge=2)
    queries_per_key: int = setting(2, "query heads that share a key and a value; d_inner: a multiple of head_dim times it", ge=1)
    rope_theta: float = setting(10000.0, "base of the rotary positions, which count from the document's start", gt=1)


@dataclass
class SerpentConfig:
    """SeRpEnt (Rando et al., arXiv 2501.11729): selective resampling around a mixer."""

    rates: list[float] = setting([1.0, 0.5, 0.25], "elements kept per token, one branch each")
    inner: str = setting("mamba", "mixer that runs on each compressed sequence", choices=MIXERS)
    shares: list[float] = setting([], "relative widths of the branches, inside and of their outputs; []: all equal")
    depth: int = setting(1, "layers it stands for: each branch compresses once for a run of this many blocks of `inner`", ge=1)
    join: str = setting(
        "add", "several branches: project, each puts out a share of d_model and a map of all follows; add, each writes "
        "all of d_model, as it does where depth > 1", choices=("project", "add"),
    )
    d_inner: Optional[int] = setting(None, "inner widths, summed; null: as many parameters as `depth` layers of `inner`", ge=1)
    spread: float = setting(2.0, "intervals lie in [rate / spread, min(1, rate * spread)]", gt=1, le=64)
    band: float = setting(8.0, "grid steps the clock may run ahead of or behind rate * position", ge=0, le=1024)
    horizon: float = setting(1.0, "grid steps the compression window reaches back", gt=0, le=8)
    n_bases: int = setting(6, "Gaussian bases of the window and of the read-out", ge=2)
    decompress_taps: int = setting(2, "compressed outputs the read-out sees", ge=1)
    clock: str = setting(
        "learned", "who emits: learned intervals; uniform, all at the rate; stride, blocks of 1 / rate tokens; routed, who is "
        "unlike the token before (H-Net)", choices=("learned", "uniform", "stride", "routed"),
    )
    window: str = setting(
        "integrated", "what an element is: integrated bases; segment_mean of its grid cell; pointwise, figure 2 of the paper",
        choices=("integrated", "segment_mean", "pointwise"),
    )
    restore: str = setting(
        "readout", "outputs at full length: readout by bases; hold, each until the next", choices=("readout", "hold")
    )
    teach: str = setting(
        "durations", "what teaches a learned clock besides its durations: centred, its mean is held at the rate; confidence in "
        "what it did; surprise of the token, or of the next; worth of emitting there",
        choices=("durations", "centred", "confidence", "surprise", "next_surprise", "worth"),
    )
    teach_weight: float = setting(0.03, "weight of the term of the loss that `teach` adds, or of the routed clock's ratio", ge=0)


@dataclass
class ModelConfig:
    vocab_size: int = setting(50257, "the tokenizer's vocabulary; the embedding is padded to a multiple of 64", ge=2)
    d_model: int = setting(768, "width of the residual stream", ge=1)
    n_layers: int = setting(24, "number of mixer layers; a serpent layer counts as serpent.depth of them", ge=1)
    pattern: list[str] = setting(
        ["mamba", "serpent"], f"mixer of each layer, repeated to the depth: {', '.join(MIXERS)}, serpent"
    )
    norm_eps: float = setting(1e-5, "epsilon of RMSNorm", gt=0)
    tie_embeddings: bool = setting(True, "the read-out shares the embedding's matrix; false: it has its own")
    mamba: MambaConfig = field(default_factory=MambaConfig)
    mamba2: Mamba2Config = field(default_factory=Mamba2Config)
    s4d: S4DConfig = field(default_factory=S4DConfig)
    s5: S5Config = field(default_factory=S5Config)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    serpent: SerpentConfig = field(default_factory=SerpentConfig)

    @property
    def layers(self) -> list[str]:
        """The mixer of each layer, in order: the pattern repeated until there are n_layers, where a serpent layer counts as
        `serpent.depth`. Raises UserError where the last one is cut."""
        names, counted, depth = [], 0, self.serpent.depth
        while counted < self.n_layers:
            names.append(self.pattern[len(names) % len(self.pattern)])
            counted += depth if names[-1] == "serpent" else 1
        if counted > self.n_layers:
            whole = " or ".join(str(n) for n in (counted - depth, counted) if n)
            raise UserError(f"model.n_layers={self.n_layers} ends inside a serpent layer of model.serpent.depth={depth} layers; "
                            f"set model.n_layers to {whole}, or change model.pattern")
        return names


@dataclass
class OptimizerConfig:
    """AdamW, fused on GPUs."""

    lr: float = setting(6e-4, "peak learning rate", gt=0)
    beta1: float = setting(0.9, "decay of the first moment", ge=0, lt=1)
    beta2: float = setting(0.95, "decay of the second moment", ge=0, lt=1)
    eps: float = setting(1e-8, "added to the root of the second moment", gt=0)
    weight_decay: float = setting(0.1, "on matrices; never on A, D and dt of mixers, norms and SeRpEnt's clock and bases", ge=0)


@dataclass
class ScheduleConfig:
    """Learning rate as a function of the step."""

    kind: str = setting("cosine", "shape after the warm-up", choices=("cosine", "wsd", "constant"))
    warmup_steps: int = setting(200, "steps of linear warm-up", ge=0)
    decay_steps: int = setting(0, "wsd: steps of the final linear decay", ge=0)
    min_ratio: float = setting(0.1, "final learning rate / peak", ge=0, le=1)


@dataclass
class StageConfig:
    """The first steps of a run, of another shape."""

    steps: int = setting(1, "how many", ge=1)
    seq_len: Optional[int] = setting(None, "tokens per sequence, a divisor of data.seq_len; null: that", ge=2)
    global_batch: Optional[int] = setting(None, "sequences per step; null: training.global_batch", ge=1)


@dataclass
class TrainingConfig:
    max_steps: Optional[int] = setting(None, "stop after this many optimizer steps", ge=1)
    max_tokens: Optional[int] = setting(None, "stop after this many tokens (rounded up to a whole step)", ge=1)
    stop_at_step: Optional[int] = setting(None, "stop early at this step; the schedule still runs to the budget", ge=1)
    global_batch: int = setting(64, "sequences per optimizer step, over all ranks", ge=1)
    micro_batch: int = setting(8, "sequences per rank and forward pass", ge=1)
    stages: list[StageConfig] = setting([], "first steps of another shape: [{steps, seq_len, global_batch}]")
    precision: str = setting("bf16", "bf16: autocast with fp32 master weights", choices=("bf16", "fp32"))
    zero_stage: int = setting(1, "DeepSpeed ZeRO stage; one rank alone runs 1 and 2 as 0", ge=0, le=3)
    grad_clip: float = setting(1.0, "largest gradient norm; 0: no clipping", ge=0)
    activation_checkpointing: bool = setting(False, "recompute each block in the backward pass")
    cuda_graphs: bool = setting(True, "replay a GPU's passes as CUDA graphs; not with ZeRO-3 or activation checkpointing")
    deterministic: bool = setting(False, "torch's operations repeat to the bit, some slower; our kernels always do")
    max_bad_steps: int = setting(5, "stop after this many steps in a row with a non-finite loss or gradient", ge=1)
    spike_zscore: Optional[float] = setting(None, "robust z-score of a loss that makes the run go back; null: none does", gt=0)
    max_rollbacks: int = setting(3, "go back to the last checkpoint after a loss spike at most this often", ge=0)
    check_replicas: int = setting(100, "steps between comparisons of the ranks' parameters, bit by bit; 0: never", ge=0)
    hang_timeout: float = setting(1800.0, "seconds without progress until all ranks print their stacks and leave; 0: never", ge=0)
    peak_tflops: Optional[float] = setting(None, "peak of one device for the utilisation figure; null: by device name", gt=0)


@dataclass
class ParallelConfig:
    sequence: int = setting(1, "ranks that share each sequence, a contiguous shard each; it divides the number of ranks", ge=1)


@dataclass
class CheckpointConfig:
    every: int = setting(1000, "steps between checkpoints; one is always written at the end", ge=1)
    keep_last: int = setting(3, "checkpoints kept; at least 2, so that one is always whole", ge=2)
    keep_every: Optional[int] = setting(None, "checkpoints whose step is a multiple of this are kept for good; null: none", ge=1)
    background: bool = setting(True, "write while training goes on, from a copy in host memory; false: training waits")


@dataclass
class EvaluationConfig:
    every: int = setting(1000, "steps between evaluations; 0: only at the end", ge=0)
    split: str = setting("validation", "split of the data folder to evaluate on")
    max_windows: Optional[int] = setting(512, "windows per evaluation; null: the whole split", ge=1)
    carry_state: bool = setting(False, "hand states on through each document; false: each window from an empty one")


@dataclass
class LoggingConfig:
    every: int = setting(10, "steps between lines on the terminal; metrics.jsonl gets every step", ge=1)
    wandb: bool = setting(False, "log to Weights & Biases; offline when there is no API key")
    wandb_project: str = setting("serpent-scale", "Weights & Biases project")


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    deepspeed: dict[str, Any] = setting({}, "passed to DeepSpeed as it is; keys derived from the rest are refused")

    @property
    def samples(self) -> Schedule:
        """Which samples each step consumes."""
        training, seq_len = self.training, self.data.seq_len
        stages = [(s.steps, s.seq_len or seq_len, s.global_batch or training.global_batch) for s in training.stages]
        return Schedule(seq_len, training.global_batch, stages)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole budget; the schedule runs over them."""
        limits, samples = [], self.samples
        if self.training.max_steps is not None:
            limits.append(self.training.max_steps)
        if self.training.max_tokens is not None:
            limits.append(samples.steps(self.training.max_tokens))
        if any(source.tokens for source in self.data.sources):
            limits.append(samples.steps(sum(source.tokens for source in self.data.sources)))
        return min(limits)

    @property
    def run_folder(self) -> Path:
        return Path(self.run.folder) / self.run.name

    @property
    def shard_len(self) -> int:
        """Tokens of a sequence that a rank holds, at most."""
        return -(-self.data.seq_len // self.parallel.sequence)

    def replicas(self, world_size: int) -> int:
        """Groups of ranks that work on sequences of their own. Raises UserError when the ranks do not divide."""
        if world_size % self.parallel.sequence:
            raise UserError(
                f"parallel.sequence={self.parallel.sequence} does not divide the {world_size} ranks; change one of them"
            )
        return world_size // self.parallel.sequence

    def grad_accumulation(self, world_size: int, step: int | None = None) -> int:
        """Forward passes of a step on each rank; without `step`, of those after `training.stages`. Raises UserError when the
        batch of any stage does not divide."""
        samples, micro_batch, replicas = self.samples, self.training.micro_batch, self.replicas(world_size)
        groups = "ranks" if self.parallel.sequence == 1 else f"groups of {self.parallel.sequence} ranks"
        for number, stage in enumerate(samples.stages):
            per_pass = micro_batch * stage.parts * replicas
            shorter = f" x {stage.parts}, as sequences are shorter," if stage.parts > 1 else ""
            if stage.global_batch % per_pass:
                name = "training" if stage is samples.stages[-1] else f"training.stages[{number}]"
                raise UserError(f"{name}.global_batch={stage.global_batch} is not a multiple of training.micro_batch="
                                f"{micro_batch}{shorter} x {replicas} {groups} = {per_pass}; change one of them")  # fmt: skip
        stage = samples.stages[-1] if step is None else samples.stage(step)
        return stage.global_batch // (micro_batch * stage.parts * replicas)

    def to_yaml(self) -> str:
        """The resolved configuration; `load_config` reads it back to an equal `Config`."""
        return OmegaConf.to_yaml(OmegaConf.structured(self))


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
        key = getattr(error, "full_key", None)
        raise UserError(f"{origin}: {f'{key}: ' if key else ''}{_first_line(error)}{_allowed_at(key)}") from None
    _check_ranges(config, "")
    _check_combinations(config)
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


def _range_text(f: dataclasses.Field) -> str:
    if f.metadata.get("choices"):
        return "one of " + ", ".join(map(str, f.metadata["choices"]))
    words = dict(ge=">=", gt=">", le="<=", lt="<")
    return " and ".join(f"{sign} {f.metadata[k]}" for k, sign in words.items() if f.metadata.get(k) is not None)


def _allowed_at(key: str | None) -> str:
    f = dict(_fields(Config)).get(key or "")
    if f is None:
        return ""
    allowed = _range_text(f)
    kind = f.type if isinstance(f.type, str) else f.type.__name__
    return f"; expected {kind}" + (f", {allowed}" if allowed else "")


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
            raise UserError(f"{path}={value} is not allowed; it must be {finite}{_range_text(f)}")


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
    if training.stages and training.spike_zscore is not None:
        raise UserError("training.spike_zscore cannot be set with training.stages, which the samples it leaves out would move; "
                        "set it to null")  # fmt: skip
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
