"""Submit a run to SLURM: `python launch/submit.py configs/wt103_350m.yaml --nodes 4`; with --dry-run, show the script instead.

Fills the options of launch/slurm/pretrain.sbatch from the config and the command line, checks the config for that many ranks,
and hands the script to sbatch.
"""
from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from pathlib import Path

from serpent_scale.config import load_config
from serpent_scale.errors import UserError, exit_on_user_error
from serpent_scale.training.deepspeed_config import deepspeed_config

TEMPLATE = Path(__file__).parent / "slurm" / "pretrain.sbatch"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, as for launch/pretrain.py")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--ranks-per-node", type=int, default=8, help="one per GPU (default: 8)")
    parser.add_argument("--cpus-per-rank", type=int, default=8)
    parser.add_argument("--cpu", action="store_true", help="train on CPUs: ask for no GPUs, and share nodes with other jobs")
    parser.add_argument("--time", help="time limit as sbatch wants it (default: the partition's)")
    parser.add_argument("--warn", type=int, default=180, metavar="SECONDS",
                        help="save and requeue so long before the time limit (default: 180)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                        help="another option of sbatch, for example partition=gpu or account=lab; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


def script(args: argparse.Namespace, config) -> str:
    """The template with its #SBATCH lines, and the arguments it is run with, filled in."""
    options = {
        "job-name": config.run.name, "nodes": args.nodes, "ntasks-per-node": args.ranks_per_node,
        "cpus-per-task": args.cpus_per_rank, "signal": f"USR2@{args.warn}",
        "output": config.run_folder.absolute() / "slurm-%j.out", "time": args.time,
    }
    options["gpus-per-node"], options["exclusive"] = (None, None) if args.cpu else (args.ranks_per_node, "")
    for item in args.option:
        if not re.fullmatch(r"[a-z][a-z-]*(=.*)?", item):
            raise UserError(f"--option '{item}' is not NAME=VALUE, for example partition=gpu")
        name, _, options[name] = item.partition("=")
    present = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", TEMPLATE.read_text(), re.MULTILINE))
    lines = []
    for name, value in {**present, **options}.items():
        if value is not None:
            lines.append(f"#SBATCH --{name}" + (f"={quoted(str(value))}" if value != "" else ""))
    head, body = re.split(r"(?m)^set -euo pipefail\n", TEMPLATE.read_text())
    comments = "".join(line for line in head.splitlines(keepends=True) if not line.startswith(("#SBATCH", "# To the tasks")))
    call = shlex.join(["set", "--", str(Path(args.config).absolute()), *args.overrides])
    device = "export DS_ACCELERATOR=cpu\n" if args.cpu else ""
    return comments + "\n".join(lines) + f"\nset -euo pipefail\n{call}\n{device}" + body


def quoted(value: str) -> str:
    """As sbatch reads a value of an #SBATCH line. Raises UserError for what it cannot hold."""
    if re.fullmatch(r"[\w@%+=:,./\[\]-]+", value):
        return value
    if re.search(r"[\n\"\\]", value):
        raise UserError(f"{value!r}: line breaks, quotes and backslashes cannot be in an option of sbatch; choose another name")
    return f'"{value}"'


@exit_on_user_error
def main() -> None:
    args = arguments()
    if Path.cwd() != TEMPLATE.parents[2]:
        raise UserError(f"{Path.cwd()}: the job would run here; submit from the project's folder, {TEMPLATE.parents[2]}")
    for name in ("nodes", "ranks_per_node", "cpus_per_rank", "warn"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    config = load_config(args.config, args.overrides)
    deepspeed_config(config, args.nodes * args.ranks_per_node)  # refuses a batch that does not divide
    text = script(args, config)
    if args.dry_run:
        print(text, end="")
        return
    try:
        config.run_folder.mkdir(parents=True, exist_ok=True)  # SLURM would not make the folder of its output
        done = subprocess.run(["sbatch"], input=text, text=True, capture_output=True)
    except FileNotFoundError:
        raise UserError("sbatch: not found; run this on a host of the cluster, or use --dry-run") from None
    if done.returncode:
        raise UserError(f"sbatch refused it: {done.stderr.strip()}")
    print(done.stdout.strip())


if __name__ == "__main__":
    main()
