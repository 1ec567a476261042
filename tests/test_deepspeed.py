"""DeepSpeed, held to plain torch: each of its surprises that we met has a test here."""
import math

import pytest
import torch

from ranks import run_ranks
from serpent_scale.config import ScheduleConfig
from serpent_scale.errors import UserError
from serpent_scale.training.deepspeed_config import DERIVED, deepspeed_config
from serpent_scale.training.engine import for_ranks
from serpent_scale.training.optimizer import GuardedAdamW, apply_settings, build_optimizer, learning_rate, parameter_groups
from toy import Toy, batch, build, parameters, toy_config, train

STAGES = (0, 1, 2, 3)
CLIP = 0.5  # far below the toy's gradient norms
RAW = ("A_log", "linear.bias")  # not decayed


def torch_reference(steps: list[int], clip: float) -> tuple[dict[str, torch.Tensor], float]:
    """Parameters after plain AdamW on the global batch, and the last gradient norm before clipping."""
    torch.manual_seed(0)
    model = Toy()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for step in steps:
        optimizer.zero_grad()
        for micro_step in range(2):
            for rank in range(2):
                (model(batch(step, micro_step, rank, 2)) / 4).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf).item()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}, norm


def probe_stage(processes, stage: int) -> dict:
    found = {}
    for clip in (0.0, CLIP):
        engine = build(toy_config(stage, grad_clip=clip), 2)
        train(engine, 0, 3, processes)
        found["clipped" if clip else "plain"] = parameters(engine), float(engine.get_global_grad_norm())

    # A step whose gradient is not finite, on one rank only: no trace of it but the count.
    engine = build(toy_config(stage, grad_clip=CLIP), 2)
    train(engine, 0, 1, processes)
    before = parameters(engine)
    for bad in (math.nan, math.inf):
        train(engine, 1, 2, processes, factors=(1.0, bad))
        assert math.isinf(engine.get_global_grad_norm()), engine.get_global_grad_norm()
        assert all(torch.equal(before[name], p) for name, p in parameters(engine).items())
    assert engine.skipped_steps == 2 and engine.global_steps == 3
    train(engine, 2, 3, processes)
    found["after bad"] = parameters(engine), float(engine.get_global_grad_norm())

    # bf16: zero gradients, so that weight decay alone changes anything.
    engine = build(toy_config(stage, precision="bf16"), 2)
    before = parameters(engine)
    dtypes = []
    engine.module.linear.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    train(engine, 0, 1, processes, factors=(0.0, 0.0))
    found["decayed"] = {name: (p - before[name]).norm() / before[name].norm() for name, p in parameters(engine).items()}
    assert set(dtypes) == {torch.bfloat16}, "autocast is on"
    assert {p.dtype for p in engine.module.parameters()} == {torch.float32}
    assert stage == 0 or set(engine.optimizer.ipg_buckets) == {torch.float32}, "gradients are reduced in fp32"
    moments = [s["exp_avg"].dtype for s in (engine.optimizer if stage == 0 else engine.optimizer.optimizer).state.values()]
    assert moments and set(moments) == {torch.float32}
    engine = build(toy_config(stage, precision="bf16"), 2)
    train(engine, 0, 4, processes)
    found["bf16"] = parameters(engine), float(engine.get_global_grad_norm())
    return found


def probe_all_stages(processes) -> list[dict]:
    return [probe_stage(processes, stage) for stage in STAGES]


@pytest.fixture(scope="module")
def probed():
    return run_ranks(2, probe_all_stages)


def close(found, expected, tolerance):
    (parameters, norm), (expected_parameters, expected_norm) = found, expected
    assert norm == pytest.approx(expected_norm, rel=tolerance)
    for name, p in expected_parameters.items():
        torch.testing.assert_close(parameters[name], p, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("stage", STAGES)
def test_updates_equal_plain_torch(probed, stage):
    """No phantom first step, no clipping unless asked for, torch's clipping when it is."""
    for rank in probed:
        close(rank[stage]["plain"], torch_reference([0, 1, 2], 0.0), 1e-5)
        close(rank[stage]["clipped"], torch_reference([0, 1, 2], CLIP), 1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_non_finite_gradients_leave_no_trace(probed, stage):
    for rank in probed:
        close(rank[stage]["after bad"], torch_reference([0, 2], CLIP), 1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_autocast_over_fp32_parameters(probed, stage):
    for rank in probed:
        for name, change in rank[stage]["decayed"].items():
            assert change == pytest.approx(0 if name in RAW else 0.01 * 0.1, rel=1e-2), name
        # The same at all stages but for bf16 rounding: stage 3 has its own Linear, which rounds once more.
        (found, norm), (expected, expected_norm) = rank[stage]["bf16"], torch_reference([0, 1, 2, 3], 0.0)
        assert norm == pytest.approx(expected_norm, rel=3e-2)
        for name, p in expected.items():
            assert (found[name] - p).norm() < 0.02 * p.norm(), name


def test_settings():
    settings = deepspeed_config(toy_config(1, precision="bf16", grad_clip=0.0), 2)
    assert settings["gradient_clipping"] == 0.0, "DeepSpeed's default is 1.0"
    assert "bf16" not in settings and settings["torch_autocast"]["dtype"] == "bfloat16"
    assert settings["train_batch_size"] == 8 and settings["gradient_accumulation_steps"] == 2
    assert "torch_autocast" not in deepspeed_config(toy_config(1), 2)
    with pytest.raises(UserError, match="training.global_batch=8 is not a multiple"):
        deepspeed_config(toy_config(1), 3)


def test_passthrough_merges_deeply():
    passed = {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True, "new": {"a": [1]}}
    settings = deepspeed_config(toy_config(2, **passed), 2)
    assert settings["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert settings["wall_clock_breakdown"] is True and settings["new"] == {"a": [1]}
    with pytest.raises(UserError, match="deepspeed.zero_optimization=2 is not allowed"):
        deepspeed_config(toy_config(2, zero_optimization=2), 2)


@pytest.mark.parametrize("key, nearest", [("zero_optimisation", "zero_optimization"), ("optimiser", "optimizer")])
def test_a_misspelt_top_level_key_is_refused(key, nearest):
    with pytest.raises(UserError, match=f"deepspeed.{key}: .* nearest valid key is '{nearest}'"):
        deepspeed_config(toy_config(1, **{key: {}}), 2)


@pytest.mark.parametrize("path", sorted(DERIVED))
def test_passthrough_conflicts(path):
    *sections, key = path.split(".")
    passed = {key: {}}
    for section in sections:
        passed = {section: passed}
    with pytest.raises(UserError, match=f"deepspeed.{path} is refused"):
        deepspeed_config(toy_config(1, **passed), 2)


def test_parameter_groups():
    model = Toy()
    decayed, others = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in decayed["params"]] == ["conv_weight", "embedding.weight", "linear.weight"]
    assert [names[id(p)] for p in others["params"]] == ["A_log", "linear.bias"]
    cpu = torch.device("cpu")
    assert type(build_optimizer(model, toy_config(1), cpu)) is torch.optim.AdamW
    assert type(build_optimizer(model, toy_config(0, grad_clip=2.0), cpu)) is GuardedAdamW


def test_a_loaded_state_does_not_bring_back_old_settings():
    old, new = toy_config(1), toy_config(1)
    new.optimizer.weight_decay, new.optimizer.beta1, new.optimizer.eps = 0.3, 0.5, 1e-6
    model, cpu = Toy(), torch.device("cpu")
    optimizer = build_optimizer(model, new, cpu)
    optimizer.load_state_dict(build_optimizer(model, old, cpu).state_dict())
    apply_settings(optimizer, new)
    assert [(g["weight_decay"], g["betas"], g["eps"]) for g in optimizer.param_groups] == [
        (0.3, (0.5, 0.95), 1e-6), (0.0, (0.5, 0.95), 1e-6)]


def test_learning_rate():
    def rates(total=100, **config):
        return [learning_rate(step, ScheduleConfig(**config), total, 2.0) for step in range(total)]

    for kind, decay in (("cosine", 0), ("wsd", 20), ("constant", 0)):
        values = rates(kind=kind, warmup_steps=10, decay_steps=decay, min_ratio=0.1)
        assert values[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
        assert values[-1] == pytest.approx(2.0 if kind == "constant" else 0.2)
        assert all(a >= b for a, b in zip(values[9:], values[10:]))
        without = rates(kind=kind, warmup_steps=0, decay_steps=decay, min_ratio=0.0)
        assert 0 < without[0] <= 2.0 and without[-1] == pytest.approx(2.0 if kind == "constant" else 0.0)
    cosine = rates(kind="cosine", warmup_steps=10, min_ratio=0.1)
    assert cosine[54] == pytest.approx(1.1)  # half way from step 9 to step 99
    wsd = rates(kind="wsd", warmup_steps=10, decay_steps=20, min_ratio=0.1)
    assert wsd[10:80] == [2.0] * 70 and wsd[89] == pytest.approx(1.1)
    assert rates(kind="cosine", warmup_steps=100)[-1] == pytest.approx(2.0), "all warm-up"
    assert learning_rate(500, ScheduleConfig(kind="wsd", decay_steps=20, warmup_steps=10), 100, 2.0) == pytest.approx(0.2)


def test_one_rank_runs_stages_1_and_2_as_0_unless_zero_is_asked_for_more():
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    for stage, world_size, passed, expected in (
        (1, 1, {}, 0), (2, 1, {}, 0), (3, 1, {}, 3), (0, 1, {}, 0), (1, 2, {}, 1), (2, 1, offload, 2), (1, 1, {"timers": {}}, 0)
    ):  # fmt: skip
        assert for_ranks(toy_config(stage, **passed), world_size).training.zero_stage == expected
