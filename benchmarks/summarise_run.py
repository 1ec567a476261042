"""Lines of benchmarks/results.md from runs' metrics.jsonl: `summarise_run.py RUN [RUN ...] [--append]`, markdown on stdout.

Throughput is the median over steps after the first ten, with the 10th and 90th percentile; memory is the largest seen.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import harness
from harness import Spread

from serpent_scale.training.metrics import read_metrics


def row(run: Path) -> list[str]:
    steps = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]
    settled = Spread.of([line["tokens_per_second"] for line in steps[10:]])
    utilisation = [line["mfu"] for line in steps[10:] if line["mfu"] is not None]
    return [
        run.name, str(len(steps)), f"{steps[0]['loss']:.3f} → {steps[-1]['loss']:.3f}", settled.text(lambda v: f"{v:,.0f}"),
        f"{100 * Spread.of(utilisation).median:.1f} %" if utilisation else "-",
        f"{max(line['memory_gib'] for line in steps):.1f}",
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    harness.add_report_arguments(parser)
    arguments = parser.parse_args()
    head = ["run", "steps", "loss, first → last", "tokens/s, median (10-90 %)", "MFU", "GiB"]
    harness.report("Runs", [harness.table(head, [row(run) for run in arguments.runs])], arguments)
