"""Configuration: what is accepted, and that every refusal names the key and the mend."""
import re
from pathlib import Path

import pytest

from serpent_scale.config import Config, check_same_model, load_config
from serpent_scale.errors import UserError, check_torch

ROOT = Path(__file__).parents[1]
BASE = "training: {max_steps: 1000}\n"


def load(tmp_path, text=BASE, *overrides):
    (tmp_path / "c.yaml").write_text(text)
    return load_config(tmp_path / "c.yaml", list(overrides))


def test_round_trip_and_overrides(tmp_path):
    config = load(tmp_path, BASE, "optimizer.lr=3e-4", "model.pattern=[mamba]", "deepspeed.zero_optimization.reduce_bucket_size=1000")
    assert config.optimizer.lr == 3e-4 and config.model.pattern == ["mamba"]
    assert config.deepspeed == {"zero_optimization": {"reduce_bucket_size": 1000}}
    assert load(tmp_path, config.to_yaml()) == config


def test_a_token_budget_is_rounded_up_to_steps(tmp_path):
    config = load(tmp_path, "training: {max_tokens: 1000001, global_batch: 10, micro_batch: 5}\ndata: {seq_len: 100}\nschedule: {warmup_steps: 0}")
    assert config.total_steps == 1001


@pytest.mark.parametrize("text, overrides, words", [
    ("training: {max_stps: 1000}", [], ["training.max_stps", "nearest valid key is 'training.max_steps'"]),
    ("trainng: {max_steps: 10}", [], ["'trainng'", "'training'"]),
    ("lr: 3", [], ["'optimizer.lr'"]),
    (BASE, ["model.patern=[mamba]"], ["override", "model.pattern"]),
    ("training: {max_steps: abc}", [], ["training.max_steps", "abc", ">= 1"]),
    (BASE, ["data.seq_len=0.5"], ["data.seq_len", "0.5"]),
    (BASE, ["optimizer.lr=-1"], ["optimizer.lr=-1", "> 0"]),
    (BASE, ["optimizer.lr=.nan"], ["optimizer.lr"]),
    (BASE, ["training.zero_stage=4"], ["training.zero_stage=4", "<= 3"]),
    (BASE, ["training.precision=fp16"], ["training.precision=fp16", "bf16, fp32"]),
    (BASE, ["model.pattern=[mmba]"], ["'mmba'", "did you mean 'mamba'"]),
    (BASE, ["model.pattern=[]"], ["model.pattern is empty"]),
    (BASE, ["model.serpent.rates=[1.0,1.5]"], ["model.serpent.rates"]),
    (BASE, ["schedule.kind=wsd"], ["schedule.decay_steps"]),
    (BASE, ["schedule.warmup_steps=2000"], ["2000", "1000 steps"]),
    (BASE, ["training.micro_batch=7"], ["training.global_batch=64", "training.micro_batch=7"]),
    (BASE, ["training.max_steps=null"], ["training.max_steps or training.max_tokens"]),
    (BASE, ["run.name=../x"], ["run.name"]),
    (BASE, ["run.name"], ["not key=value"]),
    ("training: {max_steps: 01000}", [], ["octal"]),
    ("training: {max_steps: 1}\ntraining: {max_steps: 2}", [], ["not valid YAML"]),
    ("run: {name: '${oc.env:HOME}'}", [], ["refused"]),
    ('run: {name: "\\x24{ oc.env:HOME}"}', [], ["refused", "resolver"]),
    (BASE, ["run.name=${ oc.env:HOME}"], ["override", "refused"]),
    ("run: {name: '${run.nme}'}", [], ["run.nme"]),
    ("model: {pattern: &a [*a]}", [], ["aliases"]),
    (BASE, ["model.pattern=["], ["override 'model.pattern=['", "not valid YAML"]),
    (BASE, ["model.pattern.0=serpent"], ["override 'model.pattern.0=serpent'"]),
    (BASE, ["optimizer.lr=.inf"], ["optimizer.lr=inf"]),
    (BASE, [f"run.seed={10**20}"], ["run.seed=", f"< {2**63}"]),
    (BASE, ["model.serpent.spread=1e9"], ["model.serpent.spread", "<= 64"]),
    (BASE, ["model.serpent.d_inner=2"], ["model.serpent.d_inner=2", ">= 3"]),
    (BASE, ["model.mamba.expand=0.001"], ["model.mamba.expand=0.001", "model.d_model=768"]),
    (BASE, ["model.mamba2.dt_min=1"], ["model.mamba2.dt_min=1", "model.mamba2.dt_max=0.1"]),
    (BASE, ["model.serpent.inner=mamba3"], ["model.serpent.inner=mamba3", "mamba, mamba2"]),
    (BASE, ["model.pattern=[mamba,atention]"], ["'atention'", "did you mean 'attention'"]),
    (BASE, ["model.s4d.d_state=63"], ["model.s4d.d_state=63", "even", "62 or 64"]),
    (BASE, ["model.s4d.init=legs"], ["model.s4d.init=legs", "lin, inv"]),
    (BASE, ["model.s5.d_state=100"], ["model.s5.d_state=100", "2 x model.s5.n_blocks = 16"]),
    (BASE, ["model.attention.head_dim=25"], ["model.attention.head_dim=25", "even"]),
    (BASE, ["model.pattern=[mamba,attention]", "model.attention.queries_per_key=5"], ["768", "queries_per_key", "= 320"]),
    (BASE, ["model.serpent.inner=attention", "model.attention.queries_per_key=6"], ["3 branches", "<= 256"]),
    (BASE, ["model.pattern=[mamba2]", "model.mamba2.head_dim=100"], ["1536", "head_dim", "= 100"]),
    (BASE, ["model.serpent.inner=mamba2", "model.serpent.d_inner=200"], ["model.serpent.d_inner=200", "= 64"]),
    (BASE, ["model.serpent.inner=mamba2", "model.mamba2.n_groups=12"], ["n_groups = 768", "3 branches", "<= 512"]),
    ("run: !!python/object/apply:os.system ['true']", [], ["c.yaml"]),
    ("- 3", [], ["sections"]),
    ("a: [", [], ["not valid YAML"]),
])
def test_refusals_name_the_key_and_the_mend(tmp_path, text, overrides, words):
    with pytest.raises(UserError) as refusal:
        load(tmp_path, text, *overrides)
    message = str(refusal.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match="nowhere.yaml: no such config file"):
        load_config("nowhere.yaml")


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused():
    config = Config()
    assert config.grad_accumulation(8) == 1 and config.grad_accumulation(2) == 4
    with pytest.raises(UserError, match="8 x 3 ranks = 24"):
        config.grad_accumulation(3)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_configs_load_and_document_every_key(file):
    import yaml

    load_config(file)

    def keys(node, prefix=""):
        for name, value in node.items():
            yield from keys(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [f"{prefix}{name}"]

    lines = [line for line in file.read_text().splitlines() if re.match(r" *\w+: *[^ #]", line)]
    assert not [line for line in lines if "#" not in line], "a key without a word on it"
    written, resolved = yaml.safe_load(file.read_text()), yaml.safe_load(load_config(file).to_yaml())
    assert set(keys(written)) == set(keys(resolved))


@pytest.mark.parametrize("overrides, then, now", [
    (["model.serpent.rates=[1,0.5]"], "project", "add"),
    (["model.serpent.rates=[1,0.5]", "model.serpent.join=project"], "project", "project"),
    (["model.serpent.rates=[0.5]"], "add", "add"),
    (["model.serpent.depth=2", "model.n_layers=3"], "add", "add"),
    (["model.pattern=[mamba]"], "add", "add"),
])
def test_a_configuration_saved_before_there_was_a_choice_of_join_means_project_where_it_matters(tmp_path, overrides, then, now):
    config = load(tmp_path, BASE, *overrides)
    saved = tmp_path / "saved.yaml"
    saved.write_text("".join(line for line in config.to_yaml().splitlines(True) if "join:" not in line))
    assert load_config(saved, saved=True).model.serpent.join == then
    assert load_config(saved).model.serpent.join == "add" and config.model.serpent.join == now
    if then == now:
        return check_same_model(config, saved)
    with pytest.raises(UserError, match="trained with model.serpent.join=project, this run has add; set model.serpent.join=pro"):
        check_same_model(config, saved)


def test_a_key_newer_than_a_checkpoint_is_compared_too(tmp_path):
    saved = tmp_path / "saved.yaml"
    saved.write_text("".join(line for line in load(tmp_path).to_yaml().splitlines(True) if "clock:" not in line))
    check_same_model(load(tmp_path), saved)
    with pytest.raises(UserError, match="trained with model.serpent.clock=learned, this run has uniform"):
        check_same_model(load(tmp_path, BASE, "model.serpent.clock=uniform"), saved)


def test_what_the_readme_submits_divides_over_its_ranks():
    calls = re.findall(r"submit\.py (\S+) --nodes (\d+) ?([^#\n]*)", (ROOT / "README.md").read_text())
    assert calls
    for file, nodes, overrides in calls:
        load_config(ROOT / file, overrides.split()).grad_accumulation(8 * int(nodes))


def test_torch_below_2_10_is_refused():
    check_torch("2.10.0"), check_torch("2.13.0+cpu")
    with pytest.raises(UserError, match="torch 2.9.1.* is too old"):
        check_torch("2.9.1+cu128")
