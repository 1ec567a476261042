"""Plots of a run, for people to look at."""
from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from serpent_scale.errors import UserError
from serpent_scale.training.metrics import read_metrics


def loss_curve(metrics: Path, png: Path, baselines: dict[str, float] | None = None) -> None:
    """Training loss (each step, and smoothed), evaluation loss and learning rate over steps, to a PNG.

    `baselines`: losses in nats drawn as horizontal lines, by name. Raises UserError if there is nothing to draw.
    """
    if not metrics.is_file():
        raise UserError(f"{metrics}: no such file; give the folder of a run that has started")
    lines = read_metrics(metrics)
    train = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    if not train:
        raise UserError(f"{metrics}: holds no training step yet")
    steps, losses = np.array([(line["step"], float(line["loss"])) for line in train]).T
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(9, 6), sharex=True, gridspec_kw={"height_ratios": [4, 1], "hspace": 0.08}, layout="constrained"
    )
    upper.plot(steps, losses, color="#9ec5e8", linewidth=0.8, label="training, each step")
    if len(losses) > 50:
        upper.plot(steps, _smooth(losses), color="#1f5f9e", linewidth=1.8, label="training, smoothed")
    if evaluations:
        upper.plot([line["step"] for line in evaluations], [float(line["loss"]) for line in evaluations], "o-", color="#d1495b",
                   markersize=5, linewidth=1.2, label="evaluation")
    for name, loss in (baselines or {}).items():
        upper.axhline(loss, color="#555555", linestyle="--", linewidth=1)
        upper.annotate(f"{name}, {loss:.2f}", (steps[-1], loss), ha="right", va="bottom", color="#555555")
    upper.set_ylabel("loss, nats per token")
    upper.set_title(f"{metrics.parent.name}: loss {losses[-1]:.3f} after {int(steps[-1]):,} steps, {train[-1]['tokens']:,} tokens")
    upper.legend(frameon=False)
    lower.plot(steps, [line["lr"] for line in train], color="#5b8e5a", linewidth=1.2)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    lower.set_ylim(bottom=0)
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(png, dpi=130, format="png")
    except OSError as error:
        raise UserError(f"{png}: cannot be written ({error.strerror}); name another with --out") from None
    finally:
        plt.close(figure)


def _smooth(values: np.ndarray, weight: float = 0.95) -> np.ndarray:
    """Exponential moving average, corrected for its start."""
    out, average, mass = np.empty_like(values), 0.0, 0.0
    for i, value in enumerate(values):
        if np.isfinite(value):
            average, mass = weight * average + (1 - weight) * value, weight * mass + (1 - weight)
        out[i] = average / mass if mass else np.nan
    return out
