"""The main job through the real launcher: falling loss, kill and resume to the bit, refusals."""
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline import digest
from data_pipeline.stream import TokenStream
from ranks import run_ranks, run_script
from runs import train
from serpent_scale.checkpoint import manifest
from serpent_scale.config import load_config

ROOT = Path(__file__).parents[1]
SMALL = """
run: {name: run, folder: RUNS}
data: {path: DATA, seq_len: 32, shuffle_block: 64}
model: {vocab_size: 300, d_model: 32, n_layers: 2, serpent: {band: 2.0}}
optimizer: {lr: 0.01}
schedule: {warmup_steps: 4}
training: {max_steps: 40, global_batch: 8, micro_batch: 2, precision: fp32, zero_stage: 1}
checkpoint: {every: 10, keep_last: 2}
evaluation: {every: 20, max_windows: 8}
"""
TAUGHT = "model.serpent.teach=surprise", "model.serpent.teach_weight=0"  # weighs nothing, and is logged


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a small data set in it."""
    folder = tmp_path_factory.mktemp("training")
    lines = [f"line {i}: the {i % 7} quick brown foxes jump over {i * i % 13} lazy dogs. " * (1 + i % 5) for i in range(400)]
    for split, part in (("train", lines[:360]), ("validation", lines[360:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in part))
    done = launch("prepare_data.py", "--source", f"train={folder}/train.jsonl", "--source", f"validation={folder}/validation.jsonl",
                  "--out", str(folder / "data"), "--tokenizer", "train:300")
    assert done.returncode == 0, done.stderr
    return folder


def config(folder: Path, name: str) -> Path:
    """A config file for a run of its own below `folder`."""
    path = folder / f"{name}.yaml"
    path.write_text(SMALL.replace("RUNS", str(folder / name)).replace("DATA", str(folder / "data")))
    return path


def environment():
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    return env


def launch(script, *arguments):
    """One process of an entry point."""
    return run_script(ROOT / "launch" / script, *arguments)


def deepspeed(port, *arguments):
    """The launcher with two ranks, in a process group of its own."""
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(port), "launch/pretrain.py", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


def finish(process, timeout=240):
    out, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, out[-3000:]
    return out


def history(run):
    lines = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    return {(line["kind"], line["step"]): line["loss"] for line in lines if "loss" in line}


def digests(run):
    """The digest of all samples so far, by step."""
    lines = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["data_digest"] for line in lines if line["kind"] == "train"}


def test_a_killed_and_resumed_run_has_the_losses_of_an_unbroken_one_to_the_bit(workplace):
    whole, broken = config(workplace, "whole"), config(workplace, "broken")
    assert run_ranks(2, train, load_config(whole)) == [True, True]
    victim = deepspeed(29612, "--config", broken)
    metrics, deadline = workplace / "broken" / "run" / "metrics.jsonl", time.time() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") > 15):  # past the checkpoint at step 10
        assert victim.poll() is None and time.time() < deadline, victim.communicate()[0][-3000:]
        time.sleep(0.02)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.communicate()
    killed_at = max(step for _, step in history(workplace / "broken"))
    assert killed_at < 40
    out = finish(deepspeed(29613, "--config", broken))
    resumed_at = int(out.split("step-")[1][:8])
    assert resumed_at in (10, 20, 30) and resumed_at <= killed_at
    unbroken = history(workplace / "whole")
    assert len(unbroken) == 40 + 3 and unbroken == history(workplace / "broken")
    assert digests(workplace / "whole") == digests(workplace / "broken")
    assert unbroken["train", 40] < unbroken["train", 1] - 1
    saved = sorted(p.name for p in (workplace / "broken" / "run" / "checkpoints").iterdir())
    assert saved == ["step-00000030", "step-00000040"]
    layout = json.loads((workplace / "broken" / "run" / "checkpoints" / saved[-1] / "layout.json").read_text())
    assert layout["world_size"] == 2


def test_one_process_gives_the_losses_of_two_and_any_accumulation(workplace):
    alone = config(workplace, "alone")
    done = launch("pretrain.py", "--config", str(alone), "training.stop_at_step=12", "training.micro_batch=8", *TAUGHT)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (workplace / "alone" / "run" / "metrics.jsonl").read_text().splitlines()]
    # At first every gate is 1/3 and the mean target too: H(1/3) of each of two branches.
    assert math.isclose(next(line["teach_loss"] for line in lines if line["kind"] == "train"), 2 * 0.6365, rel_tol=1e-3)
    two = history(workplace / "whole")
    for key, loss in history(workplace / "alone").items():
        if key in two:
            assert math.isclose(loss, two[key], rel_tol=2e-5), key
    mine, theirs = digests(workplace / "alone"), digests(workplace / "whole")
    assert len(mine) == len(set(mine.values())) == 12 and mine == {step: theirs[step] for step in range(1, 13)}
    stream = TokenStream(workplace / "data", "train", 32, 1234, 64)
    assert mine[12] == digest.to_hex(stream.batch(0, 12 * 8).digest)


def test_a_checkpoint_without_a_digest_is_resumed_with_one_that_counts_from_there(workplace):
    path = workplace / "aged" / "run" / "checkpoints" / "step-00000012"
    shutil.copytree(workplace / "alone" / "run" / "checkpoints" / path.name, path)
    state = json.loads((path / "trainer.json").read_text())
    kept = ("index_sha256", "tokenizer_sha256", "seed", "seq_len", "shuffle_block", "next_sample")
    state["data"] = {"format": 1, **{key: state["data"][key] for key in kept}}
    (path / "trainer.json").write_text(json.dumps(state))
    entries = manifest.read_manifest(path)
    manifest.write_manifest(path, {**entries, "trainer.json": manifest.hash_file(path / "trainer.json")})
    done = launch("pretrain.py", "--config", str(config(workplace, "aged")), "training.stop_at_step=14", "training.micro_batch=8",
                  *TAUGHT)
    assert done.returncode == 0 and "data_digest counts those after step 12" in done.stdout, done.stderr
    stream = TokenStream(workplace / "data", "train", 32, 1234, 64)
    expected = {12 + n: digest.to_hex(stream.batch(96, 8 * n).digest) for n in (1, 2)}
    assert digests(workplace / "aged") == expected


def test_evaluate_and_generate_read_the_sharded_checkpoint_in_one_process(workplace):
    run = workplace / "whole" / "run"
    losses = {}
    for mode in ("windows", "sliding", "carry"):
        done = launch("evaluate.py", "--checkpoint", str(run), "--mode", mode, "--json")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        losses[mode] = report["loss"]
        assert math.isclose(report["token_perplexity"], math.exp(report["loss"]), rel_tol=1e-9)
        assert report["word_perplexity"] > report["token_perplexity"] and report["bits_per_byte"] > 0
    assert losses["carry"] < losses["windows"] and losses["sliding"] < losses["windows"]
    done = launch("generate.py", "--checkpoint", str(run), "--prompt", "the", "--max-new-tokens", "5", "--seed", "1")
    assert done.returncode == 0 and done.stdout.startswith("the"), done.stderr


def test_evaluate_refuses_data_of_another_tokenizer_and_names_the_splits_there_are(workplace):
    run, other = str(workplace / "whole" / "run"), workplace / "other"
    shutil.copytree(workplace / "data", other)
    mine = (other / "tokenizer.json").read_bytes()
    (other / "tokenizer.json").write_bytes(mine + b"\n")
    hashes = [hashlib.sha256(data).hexdigest() for data in (mine, mine + b"\n")]
    for split in ("train", "validation"):
        index = other / split / "index.json"
        fields = json.loads(index.read_text().replace(*hashes))
        del fields["fields_sha256"]
        index.write_text(json.dumps(fields))
    for arguments, words in ((["--data", str(other)], [str(other), "tokenizer is not the one of"]),
                             (["--split", "tset"], ["tset/index.json", "train, validation"]),
                             (["--mode", "carry", "--stride", "8"], ["--stride is only for --mode sliding"])):
        done = launch("evaluate.py", "--checkpoint", run, *arguments, "--json")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert all(word in done.stderr for word in words), done.stderr


def test_a_dry_run_prints_the_plan_and_leaves_nothing(workplace):
    done = launch("pretrain.py", "--config", str(config(workplace, "dry")), "--dry-run")
    assert done.returncode == 0, done.stderr
    for word in ("parameters", "FLOPs per token", "Adam moments", "GiB per rank", "steps", "data, train", "epochs"):
        assert word in done.stdout
    assert not (workplace / "dry").exists()
    for override, word in (("deepspeed.bf16.enabled=true", "training.precision"), ("model.vocab_size=512", "has 300 tokens")):
        refused = launch("pretrain.py", "--config", str(config(workplace, "dry")), "--dry-run", override)
        assert refused.returncode == 2 and word in refused.stderr and not refused.stdout


def test_deterministic_is_set_before_anything_starts(tmp_path):
    code = ("import os, torch; from serpent_scale.parallel import processes; processes.start(deterministic=True); "
            "print(torch.are_deterministic_algorithms_enabled(), os.environ['CUBLAS_WORKSPACE_CONFIG']); processes.stop()")
    (tmp_path / "code.py").write_text(code)
    done = run_script(tmp_path / "code.py")
    assert done.stdout.split()[-2:] == ["True", ":4096:8"], done.stderr


def test_a_loss_that_stays_not_finite_stops_the_run_and_leaves_no_checkpoint_of_it(workplace):
    overrides = ["optimizer.lr=1e30", "training.grad_clip=0", "checkpoint.every=3", "evaluation.every=0",
                 "training.max_bad_steps=3"]
    done = launch("pretrain.py", "--config", str(config(workplace, "diverged")), *overrides)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "not finite 3 steps in a row (samples 24 to 31;" in error, done.stderr
    assert not (workplace / "diverged" / "run" / "checkpoints").exists()
    assert json.loads((workplace / "diverged" / "run" / "metrics.jsonl").read_text().splitlines()[-1])["loss"] == "nan"


@pytest.mark.parametrize("arguments, words", [
    (["--config", "configs/nothing.yaml"], ["configs/nothing.yaml", "no such config"]),
    (["training.global_batch=8", "training.micro_batch=8", "model.vocab_size=512"], ["model.vocab_size=512", "has 300 tokens"]),
    (["data.path=/nowhere"], ["/nowhere"]),
    (["run.folder=/proc/nope"], ["/proc/nope", "run.folder"]),
    (["--resume", "none", "run.folder=WHOLE"], ["--resume auto", "run.name"]),
    (["run.folder=ALONE", "model.d_model=48"], ["config.yaml", "model.d_model=", "has 48"]),
    (["run.folder=ALONE", "model.serpent.band=3.0"], ["config.yaml", "model.serpent.band=2.0"]),
    (["run.folder=WHOLE", "--resume", "ALONE/run"], ["of another run", "run.name"]),
    (["deepspeed.zero_optimization.overlap_com=true"], ["overlap_com", "deepspeed section"]),
])
def test_bad_input_ends_in_one_line_and_writes_nothing(workplace, arguments, words):
    base = [] if "configs/nothing.yaml" in arguments else ["--config", str(config(workplace, "bad"))]
    arguments = [a.replace("WHOLE", str(workplace / "whole")).replace("ALONE", str(workplace / "alone")) for a in arguments]
    checkpoints = sorted((workplace / "whole" / "run" / "checkpoints").rglob("*"))
    done = launch("pretrain.py", *base, *arguments)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert all(word in errors[0] for word in words), errors[0]
    assert "Traceback" not in done.stderr
    assert sorted((workplace / "whole" / "run" / "checkpoints").rglob("*")) == checkpoints
