"""On a CUDA device: the same numbers as on the CPU, causality to the bit, and no device-to-host sync in a pass."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from serpent_scale.config import MIXERS, AttentionConfig, Mamba2Config, ModelConfig, SerpentConfig
from serpent_scale.model.documents import Documents
from serpent_scale.model.language_model import LanguageModel
from serpent_scale.training.graphs import GraphedForward
from serpent_scale.training.readback import Readback

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
LENGTHS = (300, 3, 210)


INNER = pytest.mark.parametrize("inner", [*MIXERS, "run"])


def small(inner):
    """With SeRpEnt layers around this mixer; run: one that compresses once for three layers of Mamba."""
    torch.manual_seed(0)
    serpent = SerpentConfig(band=2.0, inner=inner)
    if inner == "run":
        inner, serpent = "mamba", SerpentConfig(band=2.0, rates=[1.0, 0.5], depth=3)
    model = LanguageModel(ModelConfig(
        vocab_size=97, d_model=64, n_layers=4, pattern=[inner, "serpent"], serpent=serpent,
        mamba2=Mamba2Config(d_state=16, head_dim=16), attention=AttentionConfig(head_dim=8),
    ))
    for name, parameter in model.named_parameters():
        if "clock_weight" in name or "readout_basis" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(device="cpu"):
    tokens = torch.randint(0, 97, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    reset = torch.zeros_like(tokens, dtype=torch.bool)
    reset[:, np.cumsum((0,) + LENGTHS[:-1])] = True
    return tokens.to(device), Documents(reset, (LENGTHS,) * 2).to(device)


@INNER
def test_loss_and_gradients_equal_the_cpu_in_float64(inner):
    results = []
    for device in ("cpu", "cuda"):
        model = small(inner).double().to(device)
        tokens, documents = batch(device)
        loss, _ = model(tokens, documents, tokens)
        loss.backward()
        results.append([loss.detach().cpu()] + [p.grad.cpu() for p in model.parameters()])
    for cpu, cuda in zip(*results):
        torch.testing.assert_close(cuda, cpu, rtol=1e-8, atol=1e-9)


@INNER
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_logits_before_a_changed_token_do_not_move_by_a_bit(precision, inner):
    model = small(inner).cuda()
    tokens, documents = batch("cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=precision == torch.bfloat16):
        logits, _ = model(tokens, documents)
        for t in (1, 299, 300, 303, 400, 512):
            changed = tokens.clone()
            changed[:, t:] = torch.randint_like(changed[:, t:], 97)
            assert torch.equal(model(changed, documents)[0][:, :t], logits[:, :t])


@INNER
def test_a_training_pass_never_waits_for_the_device(inner):
    model = small(inner).cuda()
    tokens, documents = batch("cuda")
    for checked in (False, True):  # the first pass may initialise libraries
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if checked else "default")
        try:
            with torch.autocast("cuda", torch.bfloat16):
                loss, _ = model(tokens, documents, tokens)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


def test_who_reads_back_waits_for_nothing_launched_later():
    work, value, end = torch.randn(4096, 4096, device="cuda"), torch.ones((), device="cuda"), torch.cuda.Event()
    work @ work  # loads what it needs
    read = Readback(value)
    value += 1
    for _ in range(100):
        work @ work
    end.record()
    assert float(read) == 1 and not end.query()


@pytest.mark.parametrize("inner", ["mamba", "mamba2", "s5", "run"])
def test_graphs_give_the_losses_and_gradients_of_single_launches_to_the_bit(inner):
    """Two shapes, each more often than it takes to capture it, in turn; then two batches summed."""
    losses, gradients = [], []
    for graphed in (False, True):
        model = small(inner).cuda()
        if graphed:
            model.forward = GraphedForward(model, accumulates=True)
        for step in range(8):
            tokens = torch.randint(0, 97, (2, 513), generator=torch.Generator().manual_seed(step)).cuda()
            lengths = ((40,) * 12 + (33,), (513,))[step % 2]
            reset = torch.zeros_like(tokens, dtype=torch.bool)
            reset[:, np.cumsum((0,) + lengths[:-1])] = True
            with torch.autocast("cuda", torch.bfloat16):
                loss, _ = model(tokens, Documents(reset, (lengths,) * 2), tokens)
            (loss / tokens.numel()).backward()
            losses.append(loss.item())
            gradients.append([p.grad.clone() for p in model.parameters()])
            if step != 6:
                model.zero_grad(set_to_none=True)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.01)  # a graph reads the weights of its replay, not those of its capture
    assert len(set(losses[:8])) == 8 and losses[:8] == losses[8:]
    assert all(torch.equal(a, b) for one, other in zip(gradients[:8], gradients[8:]) for a, b in zip(one, other))
    assert len(model.forward.graphs) == 2 and all(model.forward.graphs.values())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_graphs_with_the_exchanges_of_shared_sequences():
    script = Path(__file__).with_name("shared_graphs.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
