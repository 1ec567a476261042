"""Pretrain a SeRpEnt-Mamba language model: `deepspeed launch/pretrain.py --config configs/wt103_350m.yaml`.

Also under torchrun, under srun with one task per device, or as plain `python launch/pretrain.py` on one device.
"""
from __future__ import annotations

from serpent_scale.training import signals

if __name__ == "__main__":
    signals.install()  # before the slow imports: a signal that comes during them is not lost

import argparse
import os
import sys
from pathlib import Path

from data_pipeline.places import is_remote
from serpent_scale.config import load_config
from serpent_scale.errors import EXIT_REQUEUE, UserError, exit_on_user_error
from serpent_scale.model.accounting import GIB, flops_per_token, memory_per_rank, parameter_counts
from serpent_scale.model.placements import plain
from serpent_scale.parallel import processes, watchdog
from serpent_scale.training.deepspeed_config import deepspeed_config
from serpent_scale.training.streams import open_streams


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file; configs/ holds the ones shipped")
    parser.add_argument("--resume", default="auto", metavar="auto|none|PATH",
                        help="auto: the newest checkpoint of this run that verifies (default); none: a fresh run; "
                             "PATH: a checkpoint, a run's folder for its newest, or a model that convert.py imported")
    parser.add_argument("--dry-run", action="store_true",
                        help="check everything, print parameters, FLOPs, memory and steps for the ranks it is started on, and exit")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example training.micro_batch=4")
    return parser.parse_intermixed_args()


@exit_on_user_error
def main() -> None:
    args = arguments()
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        if os.environ.get("RANK", "0") == "0":
            print_plan(config, int(os.environ.get("WORLD_SIZE", 1)))
        return
    ranks = processes.start(config.training.deterministic)
    from serpent_scale.training.run_folder import prepare_run_folder
    from serpent_scale.training.trainer import Trainer  # after start(), which picks DeepSpeed's device

    failed = True
    try:
        watchdog.start(ranks, config.training.hang_timeout)
        processes.on_rank_zero(lambda: prepare_run_folder(config.run_folder))
        if ranks.rank == 0:
            print(config.to_yaml(), flush=True)
        trainer = Trainer(config, ranks, args.resume)
        trainer.resume()
        finished, failed = trainer.train(), False
    except UserError:
        failed = False
        raise
    finally:
        watchdog.stop(failed)
        processes.stop()
    if not finished:
        if ranks.rank == 0:
            print(f"ended by {signals.received() or 'a signal on another rank'} after step {trainer.step}, all is saved; start it "
                  f"again to go on (exit code {EXIT_REQUEUE})", flush=True)
        sys.exit(EXIT_REQUEUE)


def print_plan(config, world_size: int) -> None:
    """What the run will be, without starting it."""
    deepspeed_config(config, world_size)  # refuses what it would refuse at the start
    streams = open_streams(config) if is_remote(config.data.path) or Path(config.data.path).exists() else None
    print(config.to_yaml())
    counts, flops = parameter_counts(config.model), flops_per_token(config.model, config.data.seq_len)
    for part, n in counts.items():
        print(f"{part:<24}{n:>16,} parameters")
    print(f"{'total':<24}{sum(counts.values()):>16,} parameters")
    print(f"{'FLOPs per token':<24}{flops.training / 1e9:>16.3f} GFLOP, forward and backward "
          f"({flops.matmul / (flops.matmul + flops.other):.1%} in matrix products)")
    if "serpent" in config.model.pattern:
        twin = plain(config.model)
        n, cost = sum(parameter_counts(twin).values()), flops_per_token(twin, config.data.seq_len).training
        print(f"{f'all {config.model.serpent.inner} instead':<24}{n:>16,} parameters, {cost / 1e9:.3f} GFLOP per token "
              f"(this model: {sum(counts.values()) / n:.4f} and {flops.training / cost:.3f} times that)")
    device = "cpu" if os.environ.get("DS_ACCELERATOR") == "cpu" else "cuda"  # not what this machine has: plans are made anywhere
    memory = memory_per_rank(config, world_size, device)
    for part, size in memory.items():
        print(f"{part:<24}{size / GIB:>16.2f} GiB per rank")
    print(f"{'estimated total':<24}{sum(memory.values()) / GIB:>16.2f} GiB per rank, {world_size} ranks on {device}, "
          f"ZeRO-{config.training.zero_stage}")
    tokens = config.samples.tokens(config.total_steps)
    print(f"{'steps':<24}{config.total_steps:>16,} of {config.training.global_batch} x {config.data.seq_len} tokens: "
          f"{tokens:,} tokens, {config.grad_accumulation(world_size)} passes a step")
    for stage in config.samples.stages[:-1]:
        print(f"{'':<24}{f'from {stage.step:,}':>16} of {stage.global_batch} x {stage.seq_len} tokens, "
              f"{config.grad_accumulation(world_size, stage.step)} passes a step")
    if streams is None:
        print(f"{'data':<24}{config.data.path} is not there yet; prepare it with launch/prepare_data.py")
    else:
        train, evaluation = streams
        for source, share in zip(train.sources, train.mixture.shares):
            index, mixed = source.index, f" of {source.index.folder}, {float(share):.1%} of the run" if share < 1 else ""
            epochs = float(tokens * share) / config.data.seq_len / source.n_windows
            print(f"{'data, train':<24}{index.tokens:>16,} tokens of {index.n_documents:,} documents{mixed}, {epochs:.2f} epochs")
        index = evaluation.index
        print(f"{f'data, {index.split}':<24}{index.tokens:>16,} tokens of {index.n_documents:,} documents")


if __name__ == "__main__":
    processes.run_and_leave(main)
