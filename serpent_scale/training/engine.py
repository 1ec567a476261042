"""DeepSpeed's engine around the model, and a trial of how it adds up the gradients of ranks that share sequences."""
from __future__ import annotations

import dataclasses

import deepspeed
import pydantic
import torch
from deepspeed.utils import set_z3_leaf_modules

from serpent_scale.config import Config, ModelConfig
from serpent_scale.errors import UserError
from serpent_scale.model.documents import Documents
from serpent_scale.model.language_model import Block, LanguageModel
from serpent_scale.parallel.processes import Processes
from serpent_scale.parallel.sequence import Sequence
from serpent_scale.training.deepspeed_config import deepspeed_config
from serpent_scale.training.optimizer import build_optimizer
from serpent_scale.training.readback import Readback

TRIAL_VOCABULARY = 64
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}  # of a norm; a wrong sum is out by a factor of 2 or more


def build_engine(model: LanguageModel, config: Config, processes: Processes):
    """(engine, the optimizer it wraps). Raises UserError for what DeepSpeed refuses in its settings."""
    if config.parallel.sequence > 1 and config.training.zero_stage == 3:
        # The parts of a mixer's pass that exchanges lie between use its parameters without calling it: gather a block's together.
        set_z3_leaf_modules(model, [Block])
    config = for_ranks(config, processes.world_size)
    optimizer = build_optimizer(model, config, processes.device)
    settings = deepspeed_config(config, processes.world_size)
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    except pydantic.ValidationError as error:  # DeepSpeed's check of its sections: only `deepspeed:` can be at fault
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        reason = f"'{key}' is refused by {error.title} ({first['msg']})"
        raise UserError(f"deepspeed: {reason}; mend the deepspeed section") from None
    if processes.world_size == 1 and config.training.zero_stage == 0:
        # Over one rank it would copy all gradients into one buffer, multiply them by 1 and copy them back.
        engine.enable_backward_allreduce = False

    def read_norm(*_) -> None:
        if torch.is_tensor(getattr(engine.optimizer, "_global_grad_norm", None)):
            engine.optimizer._global_grad_norm = Readback(engine.optimizer._global_grad_norm)

    # ZeRO knows the norm when it calls the optimizer: who asks for it does not wait for the update and the gathering after it.
    optimizer.register_step_pre_hook(read_norm)
    return engine, optimizer


def for_ranks(config: Config, world_size: int) -> Config:
    """One rank has nothing to shard: it runs ZeRO 1 and 2 as 0, which does the same without copies of gradients and parameters.
    Not where the `deepspeed` section asks ZeRO for something, such as offloading."""
    training = config.training
    if world_size > 1 or training.zero_stage not in (1, 2) or "zero_optimization" in config.deepspeed:
        return config
    return dataclasses.replace(config, training=dataclasses.replace(training, zero_stage=0))


def loss_divisor(config: Config) -> float:
    """What a rank's summed loss is divided by. Fixed: the global gradient does not depend on how documents fall on ranks.

    DeepSpeed averages gradients over all ranks. Those of P ranks that share sequences are to be summed: each counts P times.
    """
    return config.training.micro_batch * config.data.seq_len / config.parallel.sequence


def check_gradients(config: Config, sequence: Sequence, processes: Processes) -> None:
    """One step of a model with one layer of each kind, on a sequence shared by ranks as in training, against plain torch on one.

    Raises UserError, on all ranks, if the norms of the gradient are not the same.
    """
    names, shards = list(dict.fromkeys(config.model.pattern)), config.parallel.sequence
    counted = sum(config.model.serpent.depth if name == "serpent" else 1 for name in names)
    model_config = dataclasses.replace(config.model, vocab_size=TRIAL_VOCABULARY, n_layers=counted, pattern=names)
    model = _trial_model(model_config, processes)
    length = shards * min(config.data.seq_len // shards, 2 + max(block.mixer.reach for block in model.blocks))
    tokens = torch.randint(TRIAL_VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0)).to(processes.device)
    labels, documents = tokens.roll(-1, 1), Documents.whole(1, length, processes.device)
    with torch.autocast(processes.device.type, torch.bfloat16, enabled=config.training.precision == "bf16"):
        loss, _ = model(tokens, documents, labels)
    (loss / length).backward()
    alone = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()

    trial = dataclasses.replace(
        config, model=model_config, data=dataclasses.replace(config.data, seq_len=length),
        training=dataclasses.replace(
            config.training, micro_batch=1, global_batch=config.replicas(processes.world_size), stages=[], activation_checkpointing=False
        ),
    )
    engine, _ = build_engine(_trial_model(model_config, processes), trial, processes)
    own = sequence.own(length)
    loss, _ = engine(tokens[:, own], sequence.shard(documents), labels[:, own])
    engine.backward(loss / loss_divisor(trial))
    engine.step()
    shared = float(engine.get_global_grad_norm())
    engine.destroy()
    if not abs(shared - alone) <= TOLERANCE[config.training.precision] * alone:
        raise UserError(
            f"parallel.sequence={shards}: the gradient norm of a trial step is {shared:.6g} shared, and {alone:.6g} "
            f"on one rank (ZeRO stage {config.training.zero_stage}); install the pinned DeepSpeed (make install), or set "
            "parallel.sequence=1"
        )


def _trial_model(config: ModelConfig, processes: Processes) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(config).to(processes.device)
