"""The token streams of a run, opened and checked against its configuration."""
from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from data_pipeline.places import Cache
from data_pipeline.schedule import Stage
from data_pipeline.stream import TokenStream
from serpent_scale.config import Config
from serpent_scale.errors import UserError


def open_streams(config: Config) -> tuple[TokenStream, TokenStream]:
    """(training stream, evaluation windows in stored order). Raises UserError when the data is missing, damaged or of another
    vocabulary."""
    data = config.data
    sources = [(source.path, source.tokens or Fraction(str(source.weight))) for source in data.sources] or data.path
    cache = Cache(Path(data.cache), int(data.cache_gib * 2**30)) if data.cache else None
    train = TokenStream(
        sources, "train", data.seq_len, config.run.seed, data.shuffle_block,
        packing=data.packing, stages=config.samples.shapes, on_error=data.on_error, cache=cache,
    )  # fmt: skip
    evaluation = TokenStream.ordered(data.path, config.evaluation.split, data.seq_len, cache)
    size = train.index.vocab_size
    if size != config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} but the tokenizer of {train.index.folder.parent} has {size} tokens; "
            f"set model.vocab_size={size} or prepare the data with another tokenizer"
        )
    if evaluation.index.tokenizer_sha256 != train.index.tokenizer_sha256:
        raise UserError(f"{evaluation.index.folder}: tokenised with another tokenizer than {train.index.folder}; set data.path "
                        "to data of the same tokenizer")  # fmt: skip
    return train, evaluation


def first_sample(stage: Stage, micro_batch: int, replicas: int, replica: int, step: int, micro_step: int) -> int:
    """Number of the first sample of a replica's micro-batch, in a step of `stage`, of micro_batch * parts samples: a step's
    samples are consecutive, and so are those of a pass of all replicas. A replica is a rank, or the ranks that share sequences."""
    rows = micro_batch * stage.parts
    return stage.sample + (step - stage.step) * stage.global_batch + (micro_step * replicas + replica) * rows
