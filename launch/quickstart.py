"""The main job in small, end to end, on the documentation that ships with Python: `make quickstart`.

Prepares data, trains half way through the real DeepSpeed launcher on two CPU ranks, resumes from the sharded checkpoint,
evaluates, samples and plots. Run again, or after an interruption, it picks up what is there.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

from data_pipeline.stream import token_counts
from serpent_scale.config import load_config
from serpent_scale.errors import UserError, exit_on_user_error
from serpent_scale.evaluation.perplexity import unigram_perplexity
from serpent_scale.parallel.ports import free_port
from serpent_scale.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/quickstart.yaml"
RANKS = 2


def run(title: str, *command: str, capture: bool = False) -> str:
    """Run one of the project's commands as a user would; raise UserError if it fails."""
    print(f"\n=== {title}\n$ {' '.join(command)}", flush=True)
    threads = str(max(1, (os.cpu_count() or RANKS) // RANKS))
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": threads, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE if capture else None)
    if done.returncode:
        raise UserError(f"quickstart: '{title}' failed with exit code {done.returncode}; its output is above")
    return done.stdout or ""


def pretrain(title: str, *arguments: str) -> None:
    """At a port of its own: the launcher's usual one may be taken by another run on this machine."""
    run(title, "deepspeed", "--log_level", "error", "--num_gpus", str(RANKS), "--master_port", str(free_port()), "launch/pretrain.py",
        "--config", CONFIG, *arguments)  # fmt: skip


@exit_on_user_error
def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    started = time.time()
    config = load_config(ROOT / CONFIG)
    data, folder, half = Path(config.data.path), config.run_folder, config.total_steps // 2
    checkpoint, metrics = folder / "checkpoints" / f"step-{config.total_steps:08d}", folder / "metrics.jsonl"
    run("prepare data: Python's own documentation", sys.executable, "launch/prepare_data.py", "--source", "stdlib",
        "--out", str(data), "--tokenizer", f"train:{config.model.vocab_size}")
    if not (ROOT / checkpoint).is_dir():
        pretrain("train the first half", f"training.stop_at_step={half}")
        pretrain("resume from the checkpoint and train the second half")
    # The checkpoint of half time is pruned later, so that its perplexity is the one noted in training.
    noted = {line["step"]: line["loss"] for line in read_metrics(ROOT / metrics) if line["kind"] == "evaluation"}
    after = json.loads(run("evaluate", sys.executable, "launch/evaluate.py", "--checkpoint", str(folder), "--json", capture=True))
    sample = run("sample", sys.executable, "launch/generate.py", "--checkpoint", str(folder), "--prompt", "Return a list of",
                 "--max-new-tokens", "80", capture=True)
    unigram = unigram_perplexity(token_counts(ROOT / data, "train"), token_counts(ROOT / data, config.evaluation.split))
    run("plot", sys.executable, "launch/plot.py", str(folder), "--baseline", f"unigram={math.log(unigram):.4f}")
    print(f"""
=== sample
{sample.strip()}

=== validation perplexity, {after['tokens']:,} tokens
unigram model of the training text   {unigram:10.1f}
before training{'':22}{math.exp(noted[0]):10.1f}
after {half} steps{'':22}{math.exp(noted[half]):10.1f}
after {config.total_steps} steps, resumed{'':13}{after['token_perplexity']:10.1f}   ({after['bits_per_byte']:.3f} bits per byte)

=== where everything is
data          {ROOT / data}
run           {ROOT / folder}
checkpoints   {ROOT / folder / 'checkpoints'}
metrics       {ROOT / metrics}
loss curve    {ROOT / folder / 'loss.png'}
took          {time.time() - started:.0f} s""")
    if after["token_perplexity"] > unigram / 2:
        raise UserError("quickstart: the model did not beat the unigram model by a factor of 2; something is wrong")


if __name__ == "__main__":
    main()
