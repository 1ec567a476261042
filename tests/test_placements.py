"""Where compression sits: a run of blocks at the compressed length, in the layer and in the model; sizes of all placements."""
import importlib.util
from pathlib import Path

import pytest
import torch
from test_serpent import packed
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from serpent_scale import huggingface  # noqa: F401 - registers the models
from serpent_scale.checkpoint import layouts
from serpent_scale.config import Config, DataConfig, MambaConfig, ModelConfig, SerpentConfig, TrainingConfig, load_config
from serpent_scale.evaluation.generation import generate
from serpent_scale.kernels.resample import compress, decompress
from serpent_scale.model.accounting import flops_per_token, memory_per_rank, parameter_counts
from serpent_scale.model.documents import Documents
from serpent_scale.model.language_model import LanguageModel
from serpent_scale.model.mamba import Mamba
from serpent_scale.model.placements import placements
from serpent_scale.model.serpent import Serpent, branch_widths
from serpent_scale.training.optimizer import parameter_groups

ROOT = Path(__file__).parents[1]
RUNS = {"one": dict(rates=[0.5], depth=3), "several": dict(rates=[1.0, 0.5], depth=3, shares=[2.0, 1.0])}


def small(dtype=torch.float32, depth=3, **serpent):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(
        vocab_size=97, d_model=32, n_layers=2 + depth, pattern=["mamba", "serpent", "mamba"], mamba=MambaConfig(d_state=8),
        serpent=SerpentConfig(band=2.0, depth=depth, **serpent),
    ))
    for name, parameter in model.named_parameters():  # as after some training
        if parameter.ndim == 1 or "clock_weight" in name or "readout_basis" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.to(dtype)


@pytest.fixture(params=RUNS)
def model(request):
    return small(torch.float64, **RUNS[request.param])


def test_a_run_is_plain_residual_blocks_on_the_elements():
    """Each document alone, so that its elements are all there is."""
    torch.manual_seed(0)
    mixer = Serpent(24, SerpentConfig(band=2.0, **RUNS["several"]), Mamba, MambaConfig(d_state=4), norm_eps=0.1).double()
    for parameter in mixer.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    lengths = (70, 1, 40)
    x, documents = packed(lengths, 24)
    got = mixer(x, documents)[0]

    def run(stack, s):
        h = s
        for block in stack.blocks:
            scaled = h / (h.square().mean(-1, keepdim=True) + 0.1).sqrt() * block.norm.weight
            h = h + block.mixer(scaled, Documents.whole(*h.shape[:2]))[0]
        return h - s

    for part, found in zip(x[0].split(lengths), got[0].split(lengths)):
        u, alone = part[None], packed((len(part),), 24)[1]
        whole, branch = mixer.branches
        elements, clock, _ = compress(
            u, branch.window_basis, branch.clock_weight, branch.clock_bias, alone.reset, branch.sampling, branch.slots(alone)
        )
        used = int(clock.n_live)
        y = torch.zeros_like(elements)
        y[:, :used] = run(branch.inner, elements[:, :used])
        want = run(whole, u) + decompress(y, branch.readout_basis, clock, branch.sampling)[0]
        torch.testing.assert_close(found, want[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("d_model", [64, 768, 2048])
def test_shares_split_the_inner_widths_and_those_of_the_outputs(d_model):
    unit = 16 if d_model >= 512 else 1
    for shares in ([0.6, 0.2, 0.2], [1.0, 3.0, 2.0], [98.0, 1.0, 1.0]):
        inners, outs = branch_widths(d_model, SerpentConfig(shares=shares, join="project"), Mamba, MambaConfig())
        assert sum(outs) == d_model and min(inners + outs) >= unit
        for widths in (inners, outs):
            for width, share in zip(widths, shares):
                assert abs(width - sum(widths) * share / sum(shares)) <= 2 * unit
        run, whole = branch_widths(d_model, SerpentConfig(shares=shares, depth=2), Mamba, MambaConfig())
        assert whole == [d_model] * 3 and abs(run[1] - sum(run) * shares[1] / sum(shares)) <= 2 * unit
    fixed, _ = branch_widths(d_model, SerpentConfig(shares=[2.0, 1.0, 1.0], d_inner=400), Mamba, MambaConfig())
    assert sum(fixed) == 400 and abs(fixed[0] - 200) <= 2


@pytest.mark.parametrize("d_model, depth, width", [(256, 2, 512), (384, 6, 768), (96, 2, 190)])
def test_a_run_alone_has_the_widths_of_plain_blocks_where_parameters_allow(d_model, depth, width):
    config = SerpentConfig(rates=[0.5], depth=depth)
    assert branch_widths(d_model, config, Mamba, MambaConfig()) == ([width], [d_model])


def test_a_run_steps_only_the_rows_that_emit_and_its_state_does_not_grow():
    model = small(torch.float64, **RUNS["one"])
    stepped = []
    for block in model.blocks[1].mixer.branches[0].inner.blocks:
        block.mixer.register_forward_pre_hook(lambda _, inputs: stepped.append(len(inputs[0])))
    sizes = []
    with torch.no_grad():
        _, states = model(torch.randint(0, 97, (3, 10)))
        stepped.clear()
        for _ in range(40):
            _, states = model(torch.randint(0, 97, (3, 1)), states=states)
            sizes.append(sum(leaf.numel() for leaf in torch.utils._pytree.tree_leaves(states)))
    assert 0 < sum(stepped) < 0.75 * 3 * 40 * 3 and min(stepped) < 3 and len(set(sizes)) == 1


def test_prompts_of_unequal_length_go_on_as_each_alone(model):
    prompts = [torch.randint(0, 97, (n,)) for n in (9, 23, 1)]
    together = torch.stack(list(generate(model, prompts, 30, temperature=0)), 1)
    for prompt, got in zip(prompts, together):
        grown = prompt[None]
        for _ in range(30):
            grown = torch.cat([grown, model(grown)[0][:, -1:].argmax(-1)], 1)
        assert torch.equal(got, grown[0, len(prompt) :])


def test_a_model_with_a_run_is_counted_as_it_is_built(model):
    config = model.config
    counts = parameter_counts(config)
    assert len(model.blocks) == 3 and sum(counts.values()) == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1024, dtype=torch.int64))
    assert 0 <= counter.get_total_flops() / (flops_per_token(config, 1024).matmul * 1024) - 1 < 0.05  # slots that stay unused
    run = Config(model=config, data=DataConfig(seq_len=128), training=TrainingConfig(micro_batch=2))
    on_gpu, on_cpu = (memory_per_rank(run, 1, device)["activations"] for device in ("cuda", "cpu"))
    assert 0 < on_gpu < on_cpu
    decayed, others = (group["params"] for group in parameter_groups(model, 0.1))
    assert len(decayed) + len(others) == len(list(model.parameters())) and all(p.ndim == 2 for p in decayed)


def test_recomputing_activations_changes_nothing(model):
    tokens, found = torch.randint(0, 97, (1, 60)), []
    for recompute in (False, True):
        model.activation_checkpointing = recompute
        model.zero_grad()
        model(tokens, labels=tokens)[0].backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_everything_added_to_the_residual_stream_starts_scaled_by_the_depth():
    """At width 32 a linear map starts with weights up to 1/sqrt(fan in), those whose outputs are added up as one map would."""
    for serpent, expected in (
        (dict(rates=[0.5], depth=3), 3), (dict(depth=2), 6), (dict(depth=1), 3), (dict(rates=[1.0]), 1), (dict(join="project"), 1),
    ):
        torch.manual_seed(0)
        config = ModelConfig(vocab_size=97, d_model=32, n_layers=6, pattern=["serpent"], serpent=SerpentConfig(**serpent))
        projections = LanguageModel(config).blocks[0].mixer.out_projs
        assert len(projections) == expected
        added = sum(projection.in_features for projection in projections) // serpent.get("depth", 1)
        for projection in projections:
            largest = added**-0.5 / 6**0.5
            assert 0.9 * largest < projection.weight.abs().max() <= largest


def test_transformers_loads_and_generates(tmp_path):
    model = small(**RUNS["several"])
    assert layouts.write(None, tmp_path, model.config, model.state_dict(), end_of_text=None) == "serpent_scale"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = torch.randint(1, 97, (2, 30))
    assert torch.equal(theirs(prompt).logits, model(prompt)[0])
    want = torch.stack(list(generate(model, prompt, 20, temperature=0)), 1)
    assert torch.equal(theirs.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)[:, 30:], want)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.stem)
@pytest.mark.parametrize("inner", ["mamba", "mamba2"])
def test_all_placements_of_a_size_have_equal_parameters_and_fewer_flops(file, inner):
    every = placements(load_config(file, [f"model.serpent.inner={inner}", "model.mamba2.head_dim=8"]).model)
    sizes = {name: (sum(parameter_counts(c).values()), flops_per_token(c, 1024).training) for name, c in every.items()}
    parameters, flops = sizes.pop(inner)
    for name, (n, f) in sizes.items():
        assert abs(n / parameters - 1) < 0.01, name
        assert 0.3 * flops < f < flops, name
    assert sizes["hourglass-4"][1] < sizes["hourglass"][1] < sizes["hourglass-wide"][1]


def test_the_command_prints_every_size(capsys):
    spec = importlib.util.spec_from_file_location("show", ROOT / "launch/show.py")
    show = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(show)
    show.main(["sizes", "--config", str(ROOT / "configs/wt103_125m.yaml"), "model.serpent.rates=[0.5]"])
    printed = capsys.readouterr().out
    config = load_config(ROOT / "configs/wt103_125m.yaml", ["model.serpent.rates=[0.5]"])
    for name, model in {"as configured": config.model, **placements(config.model)}.items():
        line = next(line for line in printed.splitlines() if line.startswith(f"{name} "))
        assert f"{sum(parameter_counts(model).values()):,}" in line
        assert f"{flops_per_token(model, config.data.seq_len).training / 1e6:,.1f} " in line
