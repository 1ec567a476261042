"""Which sample is what, in closed form: the stages of a run (sequence lengths, batch sizes) and the mixing of sources.

Pure integer arithmetic: nothing here depends on what was read before, so seeking costs the same anywhere.
"""
from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

GROUP = 1024  # windows whose parts are dealt in turn: rows of a batch come from different windows


@dataclass(frozen=True)
class Stage:
    """Steps of one shape. It begins with step `step`, sample `sample` and window `window`, after `tokens` tokens; each of its
    samples is one of `parts` equal parts of a window. windows: how many it holds, None for the last stage."""

    step: int
    sample: int
    window: int
    tokens: int
    windows: int | None
    seq_len: int
    global_batch: int
    parts: int

    def locate(self, sample: int) -> tuple[int, int]:
        """(window, part) of a sample of this stage."""
        row = sample - self.sample
        if self.parts == 1:
            return self.window + row, 0
        group, row = divmod(row, GROUP * self.parts)
        size = min(GROUP, self.windows - group * GROUP)
        part, window = divmod(row, size)
        return self.window + group * GROUP + window, part


class Schedule:
    """Stages in turn, then steps of the full shape without end.

    Windows are always cut to the full `seq_len`; a stage of shorter sequences takes them in parts. So a sequence-length
    curriculum changes neither the order of windows nor that an epoch holds every token once.
    """

    def __init__(self, seq_len: int, global_batch: int = 1, stages: Sequence[tuple[int, int, int]] = ()):
        """stages: (steps, seq_len, global_batch) each. Raises ValueError for one that does not end with a whole window."""
        self.shapes = [list(stage) for stage in stages]
        self.stages, step, sample, window, tokens = [], 0, 0, 0, 0
        for steps, length, batch in stages:
            parts, rest = divmod(seq_len, length)
            if rest or steps * batch % parts:
                raise ValueError(f"{steps} steps of {batch} sequences of {length} tokens are no whole windows of {seq_len}")
            windows = steps * batch // parts
            self.stages.append(Stage(step, sample, window, tokens, windows, length, batch, parts))
            step, sample, window = step + steps, sample + steps * batch, window + windows
            tokens += steps * batch * length
        self.stages.append(Stage(step, sample, window, tokens, None, seq_len, global_batch, 1))
        self._steps = [stage.step for stage in self.stages]
        self._samples = [stage.sample for stage in self.stages]

    def stage(self, step: int) -> Stage:
        """The stage that a step belongs to."""
        return self.stages[bisect_right(self._steps, step) - 1]

    def stage_of_sample(self, sample: int) -> Stage:
        return self.stages[bisect_right(self._samples, sample) - 1]

    def samples(self, step: int) -> int:
        """Samples before a step: the number of its first."""
        stage = self.stage(step)
        return stage.sample + (step - stage.step) * stage.global_batch

    def tokens(self, step: int) -> int:
        """Tokens before a step."""
        stage = self.stage(step)
        return stage.tokens + (step - stage.step) * stage.global_batch * stage.seq_len

    def steps(self, tokens: int) -> int:
        """Steps it takes to consume `tokens` or more."""
        for stage, after in zip(self.stages, [*self.stages[1:], None]):
            if after is None or tokens <= after.tokens:
                return stage.step - (stage.tokens - tokens) // (stage.global_batch * stage.seq_len)


class Mixture:
    """Deals windows to sources by their shares.

    A binary tree halves the list of sources; at each fork, `round(n * share)` of the first n windows go left. After any number
    of windows every one of k sources has had its share of them, up to (1 + log2 k) / 2 windows, and which window of its own
    comes next is known without counting.
    """

    def __init__(self, shares: Sequence[Fraction | int]):
        """shares: positive; only their ratios count."""
        self.shares = [Fraction(share) / sum(shares) for share in shares]
        self._tree = self._fork(0, len(shares))

    def _fork(self, begin: int, end: int):
        if end - begin == 1:
            return begin
        middle = (begin + end) // 2
        left = sum(self.shares[begin:middle]) / sum(self.shares[begin:end])
        return left.numerator, left.denominator, self._fork(begin, middle), self._fork(middle, end)

    def locate(self, window: int) -> tuple[int, int]:
        """(source, number among the source's own windows) of a window."""
        node = self._tree
        while type(node) is tuple:
            p, q, left, right = node
            before = (2 * window * p + q) // (2 * q)
            if (2 * (window + 1) * p + q) // (2 * q) > before:
                node, window = left, before
            else:
                node, window = right, window - before
        return node, window

    def count(self, source: int, windows: int) -> int:
        """How many of the first `windows` windows are of a source."""
        node, begin, end = self._tree, 0, len(self.shares)
        while type(node) is tuple:
            p, q, left, right = node
            before, middle = (2 * windows * p + q) // (2 * q), (begin + end) // 2
            if source < middle:
                node, windows, end = left, before, middle
            else:
                node, windows, begin = right, windows - before, middle
        return windows
