"""Steps that went wrong: a loss or gradient that is not finite, a loss far above those before it."""
from __future__ import annotations

import json
import math
import statistics
from collections import deque
from pathlib import Path

from serpent_scale.errors import UserError

NAME = "bad_steps.json"  # in the run's folder
WINDOW = 100  # losses that a new one is compared with; at least half of them must be there


class BadSteps:
    """Counts steps in a row with a loss or gradient that is not finite, and keeps their samples for a replay."""

    def __init__(self, most: int, dump: Path | None):
        """Stop after `most` in a row; `dump` is the file for their samples, None on ranks that do not write it."""
        self.most, self.dump, self.row = most, dump, []

    def __len__(self) -> int:
        return len(self.row)

    def count(self, step: int, loss: float, norm: float, samples: list[tuple[int, int]]) -> None:
        """A step's outcome; `samples` are [first, last) of the passes at fault. Raises UserError after `most` in a row."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.row = []
            return
        self.row.append({"step": step, "loss": str(loss), "grad_norm": str(norm), "samples": samples})
        if len(self.row) < self.most:
            return
        if self.dump is not None:
            self.dump.write_text(json.dumps(self.row, indent=1))
        ranges = ", ".join(f"{first} to {last - 1}" for first, last in samples)
        raise UserError(
            f"step {step}: loss {loss}, gradient norm {norm}, not finite {len(self.row)} steps in a row (samples {ranges}; all "
            "are in bad_steps.json of the run's folder); lower optimizer.lr or raise training.max_bad_steps"
        )


def merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers in as few [first, last) as can be."""
    found = []
    for first, last in sorted(set(ranges)):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(last, found[-1][1])
        else:
            found.append((first, last))
    return found


class SpikeDetector:
    """Compares each loss with those before it: its distance from their median, in robust standard deviations (1.4826 times
    the median absolute deviation; Leys et al., J. Exp. Soc. Psychol. 2013)."""

    def __init__(self, threshold: float | None):
        """`threshold` None: no loss is a spike."""
        self.threshold, self.losses = threshold, deque(maxlen=WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Whether `loss` is one; if it is not, it is among those that the next is compared with."""
        if self.threshold is None or not math.isfinite(loss):
            return False
        if len(self.losses) >= WINDOW // 2 and self.score(loss) > self.threshold:
            return True
        self.losses.append(loss)
        return False

    def score(self, loss: float) -> float:
        median = statistics.median(self.losses)
        deviation = 1.4826 * statistics.median(abs(x - median) for x in self.losses)
        return (loss - median) / max(deviation, 1e-6 * abs(median), 1e-12)
