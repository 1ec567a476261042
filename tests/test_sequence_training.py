"""Training with shared sequences: every ZeRO stage, accumulation, checkpoints, evaluation, refusals, load."""
import math
from pydoc_data.topics import topics

import pytest
import torch

from ranks import run_ranks
from torch.utils._pytree import tree_leaves

from data_pipeline.stream import documents
from serpent_scale.config import parse_config
from serpent_scale.errors import UserError
from serpent_scale.evaluation.perplexity import TokenText, score
from unique_corpus import write_corpus

VOCABULARY = 1000
STAGES, FOUR_RANKS = (0, 1, 2, 3), (1, 3)
WINDOWS = 8  # of an evaluation


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequence")
    write_corpus(folder / "data", 13, 500)
    return folder


def config(folder, sequence, stage=1, **training):
    zero = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return parse_config({
        "run": {"name": "run", "folder": str(folder / f"runs{stage}")},
        "data": {"path": str(folder / "data"), "seq_len": 41, "shuffle_block": 8},
        "model": {"vocab_size": 1271, "d_model": 16, "n_layers": 2, "serpent": {"band": 2.0}, "mamba": {"d_state": 4}},
        "optimizer": {"lr": 0.01}, "schedule": {"warmup_steps": 0},
        "training": {"max_steps": 100, "global_batch": 4, "micro_batch": 1, "precision": "fp32", "zero_stage": stage,
                     "grad_clip": 0.5, **training},
        "parallel": {"sequence": sequence}, "evaluation": {"split": "train", "max_windows": WINDOWS},
        "deepspeed": {"zero_optimization": zero},
    })


def steps(trainer, n, evaluations=(False, True)):
    """[(loss, gradient norm, digest)] of n steps, and the evaluation losses after them, without and with states carried."""
    taken, evaluated, sizes = [trainer.train_step() for _ in range(n)], [], []
    size = lambda states: sum(leaf.numel() for leaf in tree_leaves(states))
    watch = trainer.engine.module.register_forward_hook(lambda module, inputs, outputs: sizes.append(size(outputs[1])))
    for carry in evaluations:
        trainer.config.evaluation.carry_state = carry
        evaluated.append(trainer.evaluate())
    watch.remove()
    assert len(sizes) >= len(evaluations) * WINDOWS // 2 and len(set(sizes)) <= 1, "what is carried does not grow"
    return [(t["loss"], t["grad_norm"], t["data_digest"]) for t in taken], evaluated


def train_stages(processes, folder, sequence):
    """Two steps at every stage, at two of them with four ranks. Two ranks that share sequences leave a checkpoint; two that do
    not take a third step, and take it again from that checkpoint."""
    from serpent_scale.training.trainer import Trainer

    found = {}
    for stage in STAGES if processes.world_size == 2 else FOUR_RANKS:
        settings = config(folder, sequence, stage)
        trainer = Trainer(settings, processes, "auto")
        found[stage] = steps(trainer, 2)
        if processes.world_size == sequence == 2:
            trainer.save()
        if sequence == 1:
            resumed = Trainer(settings, processes, "auto")
            resumed.resume()
            evaluations = (False, True) if stage == 0 else ()
            found["third", stage], found["resumed", stage] = steps(trainer, 1, evaluations), steps(resumed, 1, evaluations)
            if stage == 0:
                text = TokenText.join(documents(folder / "data", "train"))
                text = TokenText(text.tokens[: WINDOWS * 41 + 1], text.starts[text.starts < WINDOWS * 41])
                scores = [score(trainer.engine.module, text, "carry", *shape) for shape in ((41, None, 1), (300, None, 3))]
                found["scored"] = [one.nll / one.tokens for one in scores]
            resumed.engine.destroy()
        trainer.engine.destroy()
    return found


def close(found, expected, bound):
    (taken, evaluated), (wanted, wanted_evaluated) = found, expected
    assert evaluated == pytest.approx(wanted_evaluated, rel=bound)
    for (loss, norm, digest), (wanted_loss, wanted_norm, wanted_digest) in zip(taken, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=bound) and norm == pytest.approx(wanted_norm, rel=bound)
        assert digest == wanted_digest


@pytest.fixture(scope="module")
def trained(workplace):
    """By (ranks, ranks that share a sequence)."""
    return {(world, sequence): run_ranks(world, train_stages, workplace, sequence, timeout=300)
            for world, sequence in ((2, 2), (2, 1), (4, 2))}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_as_it_does_with_whole_sequences(trained, stage):
    """Losses, gradient norms before clipping, what clipped steps lead to, order of samples, evaluation."""
    expected = trained[2, 1][0][stage]
    for key in ((2, 2), (4, 2)) if stage in FOUR_RANKS else ((2, 2),):
        for rank in trained[key]:
            close(rank[stage], expected, 2e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_is_the_same_whatever_the_sharing(trained, stage):
    for rank in trained[2, 1]:
        close(rank["resumed", stage], rank["third", stage], 2e-5)


def test_carried_states_see_whole_documents_whoever_shares_them(trained):
    """The loss that `launch/evaluate.py --mode carry` computes, whatever its rows and passes, and not that of windows apart."""
    for rank in trained[2, 1]:
        apart, carried = rank["third", 0][1]
        assert rank["scored"] == pytest.approx([carried] * 2, rel=2e-6) and abs(apart - carried) > 1e-4


def combine(processes, folder):
    """Activation checkpointing and bf16; a run on a compressed stream; then a wrong divisor, which the trial must find."""
    from serpent_scale.training import engine
    from serpent_scale.training.trainer import Trainer

    found = {}
    for precision in ("fp32", "bf16"):
        settings = config(folder, 2, 3, precision=precision, activation_checkpointing=True)
        trainer = Trainer(settings, processes, "auto")
        found[precision] = steps(trainer, *((2, (False, True)) if precision == "fp32" else (1, ())))
        trainer.engine.destroy()
    for sequence in (1, 2):
        settings = config(folder, sequence, 3)
        settings.model.serpent.depth, settings.model.n_layers = 3, 4
        trainer = Trainer(settings, processes, "auto")
        found["run", sequence] = steps(trainer, 1, (True,))
        trainer.engine.destroy()
    right = engine.loss_divisor
    engine.loss_divisor = lambda config: right(config) * config.parallel.sequence
    try:
        Trainer(config(folder, 2, 1), processes, "auto")
    except UserError as error:
        found["refused"] = str(error)
    return found


def test_checkpointing_and_bf16_and_the_trial(trained, workplace):
    for rank in run_ranks(2, combine, workplace, timeout=300):
        close(rank["fp32"], trained[2, 1][0][3], 2e-5)
        for (loss, norm, _), (wanted, wanted_norm, _) in zip(rank["bf16"][0], trained[2, 1][0][3][0]):
            assert loss == pytest.approx(wanted, rel=5e-3) and norm == pytest.approx(wanted_norm, rel=0.1)
        close(rank["run", 2], rank["run", 1], 2e-5)
        assert "gradient norm of a trial step" in rank["refused"] and "parallel.sequence=2" in rank["refused"]


def test_refusals(workplace):
    with pytest.raises(UserError, match="parallel.sequence=2 does not divide the 3 ranks"):
        config(workplace, 2).grad_accumulation(3)
    with pytest.raises(UserError, match="1 x 3 groups of 2 ranks = 3"):
        config(workplace, 2).grad_accumulation(6)
    with pytest.raises(UserError, match=r"data.seq_len=41 into shards of 6 tokens, and SeRpEnt's window reaches 8 .* <= 5"):
        config(workplace, 6)
    assert config(workplace, 5).shard_len == 9


def emitted(processes, data):
    from serpent_scale.model.language_model import LanguageModel
    from serpent_scale.parallel.sequence import Sequence, load

    settings = parse_config({"model": {"vocab_size": 256, "d_model": 16, "n_layers": 1, "pattern": ["serpent"]},
                             "training": {"max_steps": 1000}})
    torch.manual_seed(0)
    model = LanguageModel(settings.model)
    for name, parameter in model.named_parameters():
        if "clock_weight" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    from serpent_scale.model.documents import Documents

    sequence = Sequence(2, 2, processes.device)
    tokens, documents = data
    with torch.no_grad():
        model(tokens[:, sequence.own(tokens.shape[1])], sequence.shard(documents := Documents(*documents)))
    counts = torch.zeros(2, dtype=torch.float64)
    counts[processes.rank] = sequence.elements
    torch.distributed.all_reduce(counts)
    return counts.tolist(), load(counts.tolist(), 2)


def real_text(length):
    """One row of Python's documentation as bytes, and its documents."""
    data, starts = b"", []
    for _, text in sorted(topics.items()):
        starts.append(len(data))
        data += text.encode()
        if len(data) >= length:
            break
    reset = torch.zeros(1, length, dtype=torch.bool)
    reset[0, starts] = True
    lengths = tuple(b - a for a, b in zip(starts, [*starts[1:], length]))
    return torch.frombuffer(bytearray(data[:length]), dtype=torch.uint8).long()[None], (reset, (lengths,))


def test_ranks_emit_about_as_much_on_real_text():
    (counts, ratio), _ = run_ranks(2, emitted, real_text(16384))
    assert sum(counts) == pytest.approx(16384 * 0.75, rel=0.25) and counts[0] != counts[1]
    assert 1 < ratio <= 1.1
    assert math.isclose(ratio, max(counts) / (sum(counts) / 2))
