"""Goodput: the share of wall-clock time that went into steps which were kept, under failures at the rate that Llama 3 met.

    python benchmarks/goodput.py --ranks 16384 --days 54 --every 600 --stall 1 --restart 300

Simulates a run on failures that come at random: 419 unexpected interruptions in 54 days on 16,384 GPUs (Grattafiori et al.,
arXiv 2407.21783, section 3.3.4), scaled to the ranks. A failure costs what was trained since the last checkpoint that was
whole by then, the teardown (5 s at most; a share of failures are hangs, which are found after training.hang_timeout), and the
restart: the pause, starting python, verifying and loading, compiling. Take the seconds from metrics.jsonl (kind checkpoint)
and the log of the run in question.
"""
from __future__ import annotations

import argparse
import random
from dataclasses import dataclass

LLAMA_3 = 419 / (54 * 86400 * 16384)  # failures per rank and second


@dataclass(frozen=True)
class Run:
    """Seconds all, but the number of ranks and the share of failures that are hangs."""

    ranks: int
    duration: float
    every: float  # between checkpoints
    write: float  # from a checkpoint's begin to its rename
    stall: float  # of that, training stands still
    teardown: float
    restart: float
    hang_share: float
    hang_timeout: float


def goodput(run: Run, seed: int) -> tuple[float, int]:
    """(share of the time in steps that were kept, failures)."""
    draw, clock, kept, failures = random.Random(seed), 0.0, 0.0, 0
    while clock < run.duration:
        alive = min(draw.expovariate(LLAMA_3 * run.ranks), run.duration - clock)
        # A period is `every` of training and a stall; its checkpoint is whole `write - stall` later.
        period = run.every + run.stall
        whole = max(0, int((alive - max(0.0, run.write - run.stall)) // period))
        ends = clock + alive >= run.duration
        # The end of the run saves what it has: no training since the last checkpoint is lost then.
        kept += max(0.0, alive - int(alive // period) * run.stall) if ends else whole * run.every
        clock += alive
        if not ends:
            failures += 1
            clock += run.restart + (run.hang_timeout if draw.random() < run.hang_share else run.teardown)
    return kept / max(clock, run.duration), failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=16384)
    parser.add_argument("--days", type=float, default=54)
    parser.add_argument("--every", type=float, default=600, help="seconds between checkpoints")
    parser.add_argument("--write", type=float, default=60, help="seconds a checkpoint takes to be whole")
    parser.add_argument("--stall", type=float, default=1, help="seconds that training stands still for it")
    parser.add_argument("--teardown", type=float, default=5)
    parser.add_argument("--restart", type=float, default=120)
    parser.add_argument("--hang-share", type=float, default=0.05, help="share of failures that are hangs")
    parser.add_argument("--hang-timeout", type=float, default=600)
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()
    run = Run(args.ranks, args.days * 86400, args.every, args.write, args.stall, args.teardown, args.restart, args.hang_share,
              args.hang_timeout)
    found = sorted(goodput(run, seed) for seed in range(args.repeats))
    failures = sum(n for _, n in found) / len(found)
    print(f"{args.ranks} ranks, {args.days:g} days: {failures:.1f} failures, one in {1 / (LLAMA_3 * args.ranks) / 3600:.1f} h; "
          f"goodput {found[len(found) // 2][0]:.2%} (median; worst of {args.repeats}: {found[0][0]:.2%})")


if __name__ == "__main__":
    main()
