"""Plots of a run and of a model, for people to look at."""
from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from data_pipeline.summary import Lengths
from serpent_scale.errors import UserError
from serpent_scale.evaluation.clock import PLACES, BranchClock
from serpent_scale.evaluation.proposition import STEPS, Correlation, Fit
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
    _tidy((upper, lower))
    _save(figure, png)


def document_lengths(splits: dict[str, Lengths], png: Path) -> None:
    """Which share of each split's documents, and of its tokens, is in documents of what length, to a PNG. Raises UserError."""
    figure, grid = plt.subplots(len(splits), 1, figsize=(9, 1 + 2.4 * len(splits)), squeeze=False, layout="constrained")
    for (name, lengths), axes in zip(splits.items(), grid[:, 0]):
        bins = np.arange(len(lengths.documents))
        for shift, counts, color, label in ((-0.2, lengths.documents, "#1f5f9e", "documents"),
                                            (0.2, lengths.tokens, "#e08a3c", "tokens")):  # fmt: skip
            axes.bar(bins + shift, 100 * counts / counts.sum(), 0.38, color=color, label=label)
        first = int(np.flatnonzero(lengths.documents)[0])
        axes.set(xlim=(first - 0.6, len(bins) - 0.4), xticks=bins[first:],
                 xticklabels=[f"{1 << b:,}" for b in bins[first:].tolist()])  # fmt: skip
        axes.tick_params(axis="x", labelsize=8)
        axes.set_ylabel("% of the split")
        axes.set_title(f"{name}: {lengths.documents.sum():,} documents, {lengths.tokens.sum():,} tokens", loc="left", fontsize=10)
    grid[0, 0].legend(frameon=False)
    grid[-1, 0].set_xlabel("tokens of a document: from this up to the next")
    _tidy(grid[:, 0])
    _save(figure, png)


def proposition(fits: list[Fit], correlations: list[Correlation], png: Path) -> None:
    """Effect against interval, with the predicted lines; and for a trained model, each element's."""
    columns = min(4, 1 + len(correlations)) if correlations else 1
    rows = -(-(1 + len(correlations)) // columns)
    size = max(6.5, 3.6 * columns), 4.2 if rows == 1 else 3.3 * rows
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    axes, *others = grid.flat
    for f, color, mark in zip(fits, ("#1f5f9e", "#d1495b", "#5b8e5a", "#b07d2b"), "os^v"):
        axes.loglog(STEPS, f.predicted * STEPS, color=color, linewidth=1)
        axes.loglog(STEPS, f.effects, mark, color=color, markersize=5, label=f"{f.rule}, {f.removal}: slope {f.slope:.6f}")
    axes.set_xlabel("interval $\\Delta_i$")
    axes.set_ylabel("$\\|h_L - h_L^i\\|$")
    axes.set_title("Proposition 1; lines: predicted", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    for c, axes in zip(correlations, others):
        axes.semilogy(c.intervals, np.maximum(c.effects, 1e-9), ".", color="#1f5f9e", markersize=4, alpha=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_title(f"{c.what}, rank correlation {c.rank:.2f}", fontsize=9)
        axes.set_xlabel("interval")
    for axes in others[len(correlations):]:
        axes.set_visible(False)
    _tidy(grid.flat)
    _save(figure, png)


CLOCK_COLOURS = LinearSegmentedColormap.from_list("clock", ["#4084c4", "#ffffff", "#ee7d20"])


def clock(branches: list[BranchClock], pieces: list[str], places: np.ndarray, png: Path) -> None:
    """The beginning of the text once per branch, as clock.html colours it, and beside it where in a word emissions fall.

    pieces, places: of the tokens after the first, which begins the document.
    """
    columns, most_lines = 128, 5
    boxes, line, column = [], 0, 0  # (token, line, column, characters)
    for i, piece in enumerate(pieces, 1):
        shown = "".join(c if c.isprintable() else "\u21b5" if c == "\n" else " " for c in piece)
        if column + len(shown) > columns:
            line, column = line + 1, 0
        if line == most_lines:
            break
        boxes.append((i, line, column, shown))
        column += len(shown)
    lines = boxes[-1][1] + 1
    figure, grid = plt.subplots(len(branches), 2, figsize=(15, (0.27 * lines + 0.75) * len(branches) + 0.5), layout="constrained",
                                squeeze=False, gridspec_kw={"width_ratios": [4.2, 1]})  # fmt: skip
    legend = "colour: interval, blue short, orange long; dark bar: emits an element; red line: cut by the band"
    if any(b.routed for b in branches):
        legend = "colour: probability that something new begins, blue 0, orange 1; dark bar: emits an element"
    figure.suptitle(legend, x=0.01, ha="left", fontsize=10, color="#667085")
    for b, (text, bars) in zip(branches, grid):
        shades = b.shades
        for i, row, left, shown in boxes:
            color = CLOCK_COLOURS(0.5 + 0.33 * shades[i])
            text.add_patch(plt.Rectangle((left, -row - 0.42), len(shown), 0.84, color=color, linewidth=0))
            if shown and b.emits[i]:
                text.add_patch(plt.Rectangle((left + 0.08, -row - 0.42), len(shown) - 0.16, 0.12, color="#1d2530", linewidth=0))
            if shown and b.cut[i]:
                text.add_patch(plt.Rectangle((left + 0.08, -row + 0.36), len(shown) - 0.16, 0.06, color="#b3261e", linewidth=0))
            for k, character in enumerate(shown):
                text.text(left + k + 0.5, -row, character.replace("$", "\\$"), family="monospace", fontsize=9.5, ha="center",
                          va="center")  # fmt: skip
        text.set(xlim=(0, columns), ylim=(-lines + 0.5, 0.5), xticks=[], yticks=[])
        text.spines[:].set_visible(False)
        title = f"layer {b.layer}, rate {b.rate:g}: {b.realised:.1%} of tokens emit"
        if not b.routed:
            title += f", {b.saturation:.1%} cut by the band; intervals {b.low:.3g} to {b.high:.3g}"
        text.set_title(title, loc="left", fontsize=10)
        counts = b.by_place(np.append(-1, places))
        shares = [emitted / tokens if tokens else 0 for tokens, emitted in counts]
        bars.barh(PLACES, shares, color=["#e08a3c" if share >= b.realised else "#7fabd2" for share in shares], height=0.7)
        bars.axvline(b.realised, color="#1d2530", linewidth=1)
        bars.set(xlim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", "50 %", "100 %"])
        bars.invert_yaxis()
        bars.tick_params(labelsize=8)
        bars.set_title("share of tokens that emit", loc="left", fontsize=9)
        bars.spines[["top", "right"]].set_visible(False)
    _save(figure, png)


def _tidy(grid) -> None:
    for axes in grid:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)


def _save(figure, png: Path) -> None:
    """Raises UserError."""
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
