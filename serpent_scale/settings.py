"""The settings of a run: a dataclass per section of the YAML file, each field with its meaning and its range, and what follows
from them alone. `config.py` reads them, `config_checks.py` says what they must keep to together."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from omegaconf import OmegaConf

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
    deterministic: bool = setting(False, "torch's operations repeat to the bit too, some slower; our Triton kernels always do")
    max_bad_steps: int = setting(5, "stop after this many steps in a row with a non-finite loss or gradient", ge=1)
    spike_zscore: Optional[float] = setting(None, "robust z-score of a loss past the stages, to go back at; null: never", gt=0)
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
