"""The token streams of a run, opened and checked against its configuration."""
from __future__ import annotations

from data_pipeline.stream import TokenStream
from serpent_scale.config import Config, TrainingConfig
from serpent_scale.errors import UserError


def open_streams(config: Config) -> tuple[TokenStream, TokenStream]:
    """(training stream, evaluation windows in stored order). Raises UserError when the data is missing, damaged or of another
    vocabulary."""
    data = config.data
    train = TokenStream(data.path, "train", data.seq_len, config.run.seed, data.shuffle_block)
    evaluation = TokenStream.ordered(data.path, config.evaluation.split, data.seq_len)
    size = train.index.vocab_size
    if size != config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} but the tokenizer of {data.path} has {size} tokens; "
            f"set model.vocab_size={size} or prepare the data with another tokenizer"
        )
    return train, evaluation


def first_sample(training: TrainingConfig, replicas: int, replica: int, step: int, micro_step: int) -> int:
    """Number of the first sample of a replica's micro-batch: step s covers samples [s G, (s + 1) G), G the global batch. A
    replica is a rank, or the ranks that share a sequence."""
    return step * training.global_batch + (micro_step * replicas + replica) * training.micro_batch
