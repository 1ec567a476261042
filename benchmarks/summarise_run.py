"""Lines of benchmarks/results.md from runs' metrics.jsonl: `summarise_run.py RUN [RUN ...]`, markdown on stdout.

Throughput is the median over steps after the first ten, with the 10th and 90th percentile; memory is the largest seen.
"""
from __future__ import annotations

import sys
from pathlib import Path
from statistics import quantiles

from serpent_scale.training.metrics import read_metrics


def row(run: Path) -> str:
    steps = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]
    settled = [line["tokens_per_second"] for line in steps[10:]]
    deciles = quantiles(settled, n=10)
    utilisation = [line["mfu"] for line in steps[10:] if line["mfu"] is not None]
    mfu = f"{100 * sorted(utilisation)[len(utilisation) // 2]:.1f} %" if utilisation else "-"
    return (f"| {run.name} | {len(steps)} | {steps[0]['loss']:.3f} → {steps[-1]['loss']:.3f} | {deciles[4]:,.0f} "
            f"({deciles[0]:,.0f}-{deciles[8]:,.0f}) | {mfu} | {max(line['memory_gib'] for line in steps):.1f} |")


if __name__ == "__main__":
    print("| run | steps | loss, first → last | tokens/s, median (10-90 %) | MFU | GiB |\n|---|---|---|---|---|---|")
    for folder in sys.argv[1:]:
        print(row(Path(folder)))
