"""launch/convert.py: models of other projects continued and evaluated here, ours in transformers, and what is refused."""
import errno
import importlib.util
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaForCausalLM
from transformers import MambaConfig as TheirMambaConfig

from ranks import run_script
from serpent_scale.checkpoint import layouts, store
from serpent_scale.config import Mamba2Config, MambaConfig, ModelConfig, SerpentConfig, parse_config
from serpent_scale.errors import UserError
from serpent_scale.evaluation.loading import load_checkpoint
from serpent_scale.model.language_model import LanguageModel

ROOT = Path(__file__).parents[1]
# The state dict of mamba_ssm's MambaLMHeadModel, as its modules name it; {} is a layer's number.
MAMBA_SSM = {
    "mamba": """backbone.embedding.weight backbone.layers.{}.mixer.A_log backbone.layers.{}.mixer.D
        backbone.layers.{}.mixer.in_proj.weight backbone.layers.{}.mixer.conv1d.weight backbone.layers.{}.mixer.conv1d.bias
        backbone.layers.{}.mixer.x_proj.weight backbone.layers.{}.mixer.dt_proj.weight backbone.layers.{}.mixer.dt_proj.bias
        backbone.layers.{}.mixer.out_proj.weight backbone.layers.{}.norm.weight backbone.norm_f.weight lm_head.weight""",
    "mamba2": """backbone.embedding.weight backbone.layers.{}.mixer.dt_bias backbone.layers.{}.mixer.A_log
        backbone.layers.{}.mixer.D backbone.layers.{}.mixer.in_proj.weight backbone.layers.{}.mixer.conv1d.weight
        backbone.layers.{}.mixer.conv1d.bias backbone.layers.{}.mixer.norm.weight backbone.layers.{}.mixer.out_proj.weight
        backbone.layers.{}.norm.weight backbone.norm_f.weight lm_head.weight""",
}  # fmt: skip


def launch(script, *arguments):
    return run_script(ROOT / f"launch/{script}.py", *arguments)


def convert(*arguments):
    """launch/convert.py in this process. Raises SystemExit(2) where it refuses."""
    spec = importlib.util.spec_from_file_location("convert", ROOT / "launch/convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([*map(str, arguments)])


def worked(done):
    assert done.returncode == 0, done.stderr
    return done.stdout


def shaken(model):
    """None of its parameters left at the zeros and ones it starts with."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def small(pattern=("mamba", "serpent"), **changes):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=97, d_model=32, n_layers=2, pattern=list(pattern), serpent=SerpentConfig(band=2.0),
        mamba=MambaConfig(d_state=8), mamba2=Mamba2Config(d_state=8, head_dim=4, n_groups=2),
    )
    for key, value in changes.items():
        setattr(config, key, value)
    return shaken(LanguageModel(config))


# Checkpoints of mamba_ssm.


@pytest.mark.parametrize("kind", MAMBA_SSM)
def test_mamba_ssm_and_back(kind, tmp_path):
    """Its own names and padding of the vocabulary to multiples of 8, in half precision, as published."""
    model = small([kind])
    assert layouts.write("mamba_ssm", tmp_path, model.config, model.state_dict(), None) == "mamba_ssm"
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert set(tensors) == {name.format(i) for name in MAMBA_SSM[kind].split() for i in range(2)}
    assert tensors["lm_head.weight"].shape == (97, 32) and tensors["backbone.layers.0.mixer.conv1d.weight"].shape[1] == 1
    _, state = layouts.read(tmp_path)
    again = LanguageModel(model.config)
    again.load_state_dict(state)
    tokens = torch.randint(0, 97, (1, 33))
    assert torch.equal(again(tokens)[0], model(tokens)[0])

    padded = {name: value.half() for name, value in tensors.items()}
    for name in ("backbone.embedding.weight", "lm_head.weight"):
        padded[name] = torch.nn.functional.pad(padded[name], (0, 0, 0, 7), value=9.0)
    torch.save(padded, tmp_path / "pytorch_model.bin")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"pad_vocab_size_multiple": 8}))
    config, state = layouts.read(tmp_path, 95)
    assert config.model.vocab_size == 95 and set(value.dtype for value in state.values()) == {torch.float32}
    again = LanguageModel(config.model)
    again.load_state_dict(state)
    torch.testing.assert_close(again(tokens)[0], model(tokens)[0][..., :95], rtol=0, atol=0.03)


# From the command line.


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A data set of 300 tokens, and in `published/` a transformers Mamba whose vocabulary is padded to 304."""
    folder = tmp_path_factory.mktemp("convert")
    for split, lines in (("train", range(400)), ("validation", range(400, 440))):
        texts = [f"line {i}: the {i % 7} quick brown foxes jump over {i * i % 13} lazy dogs. " * (1 + i % 5) for i in lines]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    worked(launch("prepare_data", "--source", f"train={folder}/train.jsonl", "--source", f"validation={folder}/validation.jsonl",
                  "--out", folder / "data", "--tokenizer", "train:300"))
    published = MambaForCausalLM(TheirMambaConfig(vocab_size=304, hidden_size=32, num_hidden_layers=2, state_size=8))
    published.backbone.embeddings.weight.data.normal_(std=2)  # sure of itself, and wrong: no fresh model has its loss
    published.save_pretrained(folder / "published")
    (folder / "published/tokenizer.json").write_text((folder / "data/tokenizer.json").read_text())
    return folder


def test_a_published_model_is_evaluated_continued_and_given_back(workplace, capsys):
    model, run = workplace / "model", workplace / "run"
    convert("import", workplace / "published", "--out", model)
    assert "vocabulary 300" in capsys.readouterr().out
    names = {"config.yaml", "layout.json", "manifest.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in model.iterdir()} == names
    said = worked(launch("evaluate", "--checkpoint", model, "--data", workplace / "data", "--seq-len", "32", "--json"))
    before = json.loads(said)["loss"]
    start = ("--config", model / "config.yaml", "--resume", model, f"data.path={workplace / 'data'}", "data.seq_len=32",
             f"run.folder={workplace}", "training.global_batch=4", "training.micro_batch=4", "training.precision=fp32",
             "schedule.warmup_steps=0", "optimizer.lr=1e-4", "optimizer.weight_decay=0", "training.max_steps=2",
             "training.zero_stage=2", "evaluation.max_windows=null")
    assert "begins with the parameters of" in worked(launch("pretrain", *start))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert before > 10  # the run leaves out what is over at the split's end
    assert next(line["loss"] for line in lines if line["kind"] == "evaluation") == pytest.approx(before, rel=1e-2)
    moved = store.read_full_state(run / "checkpoints/step-00000002")
    change = max((value - moved[name]).abs().max() for name, value in store.read_full_state(model).items())
    assert 1e-5 < change < 2.5e-4  # Adam's steps from there: the optimizer's copies began with these parameters too
    refused = launch("pretrain", *start, "model.norm_eps=1e-6", "run.name=other")
    assert refused.returncode == 2 and "model.norm_eps=1e-05" in refused.stderr and "\n" not in refused.stderr.strip()

    convert("export", run, "--out", workplace / "given_back")
    theirs = AutoModelForCausalLM.from_pretrained(workplace / "given_back")
    tokenizer = AutoTokenizer.from_pretrained(workplace / "given_back")
    assert type(theirs) is MambaForCausalLM and theirs.config.vocab_size == 300
    tokens = torch.tensor([tokenizer("the quick brown foxes")["input_ids"]])
    assert tokenizer.decode(tokens[0]) == "the quick brown foxes" and tokenizer.eos_token_id == theirs.config.eos_token_id
    ours = load_checkpoint(run, torch.device("cpu"))
    assert ours.end_of_text == tokenizer.eos_token_id
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens, use_cache=False).logits, ours.model(tokens)[0], rtol=0, atol=1e-4)


def test_without_a_tokenizer_it_says_so_and_what_is_there_is_kept(workplace, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((workplace / "published" / name).read_bytes())
    convert("import", bare, "--out", tmp_path / "out")
    assert "note:" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no tokenizer.json"):
        load_checkpoint(tmp_path / "out", torch.device("cpu"))
    before = (tmp_path / "out/manifest.json").read_bytes()
    for source, words in ((bare, "out: is there already"), (tmp_path / "out", "`export` takes"), (tmp_path, "no such file")):
        with pytest.raises(SystemExit):
            convert("import", source, "--out", tmp_path / ("out" if source == bare else "twice"))
        assert words in capsys.readouterr().err
    assert (tmp_path / "out/manifest.json").read_bytes() == before and not (tmp_path / "twice").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors"),
                                   SafetensorError("I/O error: No space left on device (os error 28)")])
@pytest.mark.parametrize("layout", ["mamba_ssm", "transformers"])
def test_a_full_disk_is_no_matter_of_a_run(tmp_path, monkeypatch, capsys, layout, error):
    model = small(["mamba"])
    config = parse_config({"model": asdict(model.config), "training": {"max_steps": 1}, "schedule": {"warmup_steps": 0}})
    store.save_parameters(tmp_path / "model", model.state_dict(), {"config.yaml": config.to_yaml()})

    def full(*_, **__):
        raise error

    monkeypatch.setattr("torch.save", full)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(SystemExit) as end:
        convert("export", tmp_path / "model", "--out", tmp_path / "out", "--layout", layout)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "No space left on device" in said and "run.folder" not in said, said
    assert said.endswith("free space there or name another folder\n") and [path.name for path in tmp_path.iterdir()] == ["model"]


# Refusals.

NAME = "backbone.layers.1.mixer.D"
REFUSED = [
    ("mamba", dict(model_type="llama"), {}, ["config.json: model_type 'llama'"]),
    ("mamba", dict(model_type="falcon_mamba"), {}, ["'falcon_mamba'"]),
    ("mamba", dict(use_bias=True), {}, ["use_bias=True", "only false"]),
    ("mamba", dict(hidden_act="gelu"), {}, ["hidden_act='gelu'"]),
    ("mamba", dict(hidden_size=None), {}, ["hidden_size is missing"]),
    ("mamba", dict(hidden_size="wide"), {}, ["hidden_size='wide' is not a number"]),
    ("mamba", dict(state_size=0), {}, ["config.json", "model.mamba.d_state=0"]),
    ("mamba", dict(state_size=9), {}, ["mixer.A_log has shape (64, 8)", "config.json asks for (64, 9)"]),
    ("mamba", dict(num_hidden_layers=3), {}, ["backbone.layers.2.", "is missing"]),
    ("mamba", dict(num_hidden_layers=1), {}, ["backbone.layers.1.", "has no place in a mamba model"]),
    ("mamba", dict(tie_word_embeddings=False), {}, ["lm_head.weight is missing"]),
    ("mamba", {}, {"lm_head.weight": torch.zeros(97, 32)}, ["lm_head.weight is not the embedding"]),
    ("mamba", {}, {NAME: torch.zeros(3)}, [NAME, "shape (3,)", "(64,)"]),
    ("mamba", {}, {NAME: torch.zeros(64, dtype=torch.int8)}, [NAME, "int8", "quantised"]),
    ("mamba", {}, {NAME: None}, [NAME, "is missing"]),
    ("mamba", {}, {"backbone.layers.1.mixer.extra": torch.zeros(1)}, ["mixer.extra has no place"]),
    ("mamba2", dict(model_type="mamba"), {}, ["conv1d.weight has shape (96, 1, 4)", "(64, 1, 4)"]),
    ("mamba2", dict(time_step_limit=[0.0, 1.0]), {}, ["time_step_limit=[0.0, 1.0]"]),
    ("mamba2", dict(num_heads=3), {}, ["num_heads x head_dim = 12", "= 64"]),
]


@pytest.mark.parametrize("kind, settings, tensors, words", REFUSED)
def test_what_is_not_read_is_named(kind, settings, tensors, words, tmp_path):
    model = small([kind])
    layouts.write("transformers", tmp_path, model.config, model.state_dict(), None)
    change_json(tmp_path / "config.json", settings)
    held = load_file(tmp_path / "model.safetensors") | tensors
    save_file({name: value for name, value in held.items() if value is not None}, tmp_path / "model.safetensors")
    refused(tmp_path, words)


@pytest.mark.parametrize("settings, words", [
    (dict(norm_before_gate=True), ["ssm_cfg.norm_before_gate=True", "only false"]),
    (dict(rmsnorm=False), ["ssm_cfg.rmsnorm=False"]),
    (dict(D_has_hdim=True), ["ssm_cfg.D_has_hdim"]),
    (dict(d_ssm=16), ["ssm_cfg.d_ssm=16"]),
    (dict(dt_limit=[0.01, 0.1]), ["ssm_cfg.dt_limit=[0.01, 0.1]"]),
    (dict(layer="Mamba3"), ["ssm_cfg.layer='Mamba3'"]),
    (dict(surprise=1), ["ssm_cfg.surprise is not a setting known here"]),
])  # fmt: skip
def test_mamba2_variants_of_mamba_ssm_are_named(settings, words, tmp_path):
    model = small(["mamba2"])
    layouts.write("mamba_ssm", tmp_path, model.config, model.state_dict(), None)
    ssm = json.loads((tmp_path / "config.json").read_text())["ssm_cfg"]
    change_json(tmp_path / "config.json", {"ssm_cfg": ssm | settings})
    refused(tmp_path, words)


def test_mamba_ssm_hybrids_and_harmful_files_are_named(tmp_path):
    model = small(["mamba"])
    layouts.write("mamba_ssm", tmp_path, model.config, model.state_dict(), None)
    for settings, words in ((dict(attn_layer_idx=[1]), ["attn_layer_idx=[1]"]), (dict(rms_norm=False), ["rms_norm=False"]),
                            (dict(bidirectional=True), ["bidirectional is not a setting"])):
        before = (tmp_path / "config.json").read_text()
        change_json(tmp_path / "config.json", settings)
        refused(tmp_path, words)
        (tmp_path / "config.json").write_text(before)
    with pytest.raises(UserError, match="97 rows of vocabulary, the tokenizer 98 tokens"):
        layouts.read(tmp_path, 98)
    torch.save({"a": small}, tmp_path / "pytorch_model.bin")  # a function: a pickle that would run something
    refused(tmp_path, ["pytorch_model.bin: refused, it holds more than tensors"])
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut")
    refused(tmp_path, ["pytorch_model.bin: cannot be read"])
    (tmp_path / "pytorch_model.bin").unlink()
    refused(tmp_path, ["holds none of model.safetensors"])
    for place, words in (("../model.safetensors", "weight_map"), ("a.safetensors", "a.safetensors: cannot be read (no such file)")):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": place}}))
        refused(tmp_path, [words])


@pytest.mark.parametrize("layout, pattern, changes, words", [
    ("transformers", ("mamba", "serpent"), {}, ["pure Mamba", "serpent_scale"]),
    ("mamba_ssm", ("serpent",), {}, ["pure Mamba", "serpent_scale"]),
    ("transformers", ("mamba",), dict(mamba=MambaConfig(expand=1.5)), ["model.mamba.expand=1.5"]),
    ("transformers", ("mamba2",), dict(norm_eps=1e-6), ["model.norm_eps=1e-06", "model.mamba2.norm_eps=1e-05"]),
    ("mamba_ssm", ("mamba",), dict(norm_eps=1e-6), ["model.norm_eps=1e-06", "use --layout transformers"]),
])  # fmt: skip
def test_what_a_layout_cannot_say_is_named(layout, pattern, changes, words, tmp_path):
    model = small(pattern, **changes)
    with pytest.raises(UserError) as error:
        layouts.write(layout, tmp_path, model.config, model.state_dict(), None)
    assert all(word in str(error.value) for word in words), error.value


def change_json(file, changes):
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def refused(folder, words):
    with pytest.raises(UserError) as error:
        layouts.read(folder)
    message = str(error.value)
    assert "\n" not in message and message.startswith(str(folder)) and all(word in message for word in words), message
