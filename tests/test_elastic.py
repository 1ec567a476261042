"""A run moved between world sizes and ZeRO stages is the run that never moved."""
import hashlib

import pytest
import torch

from ranks import run_ranks
from runs import losses, run_config, train, write_data
from serpent_scale.checkpoint import slices, store
from toy import build, parameters, toy_config
from toy import train as train_toy



@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("elastic") / "data")


def leg(processes, config) -> None:
    train(processes, config)


def travel(data, folder, legs: list[tuple[int, int]]) -> dict[int, float]:
    """Losses of a run of 12 steps whose legs, equally long, have these (world size, ZeRO stage)."""
    for i, (world, stage) in enumerate(legs):
        end = 12 * (i + 1) // len(legs)
        training = {"zero_stage": stage, "stop_at_step": end, "max_steps": 12, "global_batch": 8, "micro_batch": 2}
        # Else parameters as small as these would not be partitioned at stage 3.
        deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
        config = run_config(data, folder, training=training, deepspeed=deepspeed)
        run_ranks(world, leg, config)
    return losses(config)


def test_losses_of_a_moved_run_equal_those_of_an_unbroken_one(data, tmp_path):
    straight = travel(data, tmp_path / "straight", [(1, 1)])
    worlds = travel(data, tmp_path / "worlds", [(1, 1), (2, 1), (4, 1), (2, 1)])
    stages = travel(data, tmp_path / "stages", [(2, 1), (2, 3), (2, 2)])
    assert sorted(straight) == list(range(1, 13)) and straight[12] < straight[1] - 0.1
    for moved in (worlds, stages):
        assert moved == pytest.approx(straight, rel=1e-6)


# What moves, element by element: parameters, moments, Adam's steps, weight decay by group.


def state(engine) -> dict[str, torch.Tensor]:
    """All that training goes on from, whole: each rank's part, summed."""
    held = slices.held_slices(engine)
    views, found = slices.tensors(engine, held), {}
    for name, shape in slices.shapes(engine).items():
        for kind in slices.KINDS:
            whole = torch.zeros(torch.Size(shape).numel())
            for s, view in zip(held, views[kind]):
                if s.name == name:
                    whole[s.offset : s.offset + s.length] = view
            if engine.zero_optimization_stage() > 0:
                torch.distributed.all_reduce(whole)
            found[f"{kind}.{name}"] = whole.view(shape)
    return found


def train_and_save(processes, stage: int, folder) -> dict:
    engine = build(toy_config(stage, world_size=processes.world_size), processes.world_size)
    train_toy(engine, 0, 3, processes, factors=(1.0,) * processes.world_size)
    store.save(engine, folder, 3, {}, {}, keep_last=2)
    return state(engine)


def load_and_look(processes, stages: tuple, folder) -> list:
    found = []
    for stage in stages:
        engine = build(toy_config(stage, world_size=processes.world_size), processes.world_size)
        store.load(engine, store.newest(folder)[0])
        moved = state(engine)
        gathered = parameters(engine)
        # Zero gradients: what changes is by weight decay, and by the moments with their bias correction.
        train_toy(engine, 3, 4, processes, factors=(0.0,) * processes.world_size)
        found.append((moved, gathered, slices.adam_steps(engine), engine.global_steps, parameters(engine)))
    return found


def after_zero_gradients(state: dict, name: str, decay: float) -> torch.Tensor:
    """The fourth step of AdamW by its formula (Loshchilov & Hutter, arXiv 1711.05101), with the toy's settings."""
    lr, beta1, beta2, eps = 0.01, 0.9, 0.95, 1e-8
    mean, square = beta1 * state[f"exp_avg.{name}"].double(), beta2 * state[f"exp_avg_sq.{name}"].double()
    update = mean / (1 - beta1**4) / ((square / (1 - beta2**4)).sqrt() + eps)
    return (1 - lr * decay) * state[f"master.{name}"].double() - lr * update


@pytest.mark.parametrize("stage, world", [(0, 2), (2, 3), (3, 3)])
def test_every_element_step_and_decay_moves_right(stage, world, tmp_path):
    saved = run_ranks(world, train_and_save, stage, tmp_path)[0]
    assert len(saved) == 15
    for other in (1, 4):
        for moved, gathered, steps, global_steps, after in run_ranks(other, load_and_look, (0, 1, 2, 3), tmp_path)[-1]:
            assert saved.keys() == moved.keys() and all(torch.equal(saved[name], moved[name]) for name in saved)
            assert all(torch.equal(gathered[name], saved[f"master.{name}"]) for name in gathered)
            assert (steps, global_steps) == (4, 4)
            for name, value in after.items():
                expected = after_zero_gradients(saved, name, 0.0 if name in ("A_log", "linear.bias") else 0.1)
                torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-8)


# Where a run starts.


def first_step(processes, data, folder, stage: int) -> tuple[str, float]:
    """sha256 of the initial parameters, and the norm of the first gradient."""
    from serpent_scale.training.trainer import Trainer

    deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    config = run_config(data, folder, deepspeed=deepspeed, training={
        "zero_stage": stage, "max_steps": 12, "global_batch": 8, "micro_batch": 8 // processes.world_size})
    trainer = Trainer(config, processes, "auto")
    sha256 = hashlib.sha256(b"".join(value.numpy().tobytes() for value in parameters(trainer.engine).values()))
    return sha256.hexdigest(), trainer.train_step()["grad_norm"]


def first_steps(processes, data, folder) -> list:
    return [first_step(processes, data, folder, stage) for stage in (0, 1, 2, 3)]


def test_initial_parameters_and_gradient_norms_are_the_same_at_every_stage_and_world_size(data, tmp_path):
    found = [pair for world in (1, 4) for rank in run_ranks(world, first_steps, data, tmp_path) for pair in rank]
    assert len(found) == 4 * 5 and len({sha256 for sha256, _ in found}) == 1
    assert [norm for _, norm in found] == pytest.approx([found[0][1]] * len(found), rel=1e-6)
