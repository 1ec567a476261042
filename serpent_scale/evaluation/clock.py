"""What SeRpEnt's clocks do with a text: the interval of each token, who emits, and where in a word that is.

Legend: L tokens, the first one the mark that begins a document.
"""
from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from serpent_scale.errors import UserError
from serpent_scale.kernels.resample.reference import TICKS, intervals, run_clock
from serpent_scale.model.documents import Documents
from serpent_scale.model.language_model import LanguageModel
from serpent_scale.model.routing import RoutedBranch
from serpent_scale.model.serpent import Branch, Serpent

PLACES = ("whole word", "first of a word", "inside a word", "last of a word", "punctuation, digits", "white space")
TEMPLATE = Path(__file__).with_name("clock.html")


@dataclass(frozen=True)
class BranchClock:
    """One branch's clock over the text; times in grid steps.

    interval (L,) what each token asked for, in [low, high]; ahead (L,) how far the clock is ahead of rate x position, within
    [-band, band]; emits (L,) bool; cut (L,) bool, True where the band cut the token's step.

    Of a routed branch: interval, the probability, in [0, 1], that something new begins with the token; ahead, elements emitted
    less rate x position, which nothing bounds; band 0, and nothing is cut.
    """

    layer: int
    rate: float
    low: float
    high: float
    band: float
    interval: np.ndarray
    ahead: np.ndarray
    emits: np.ndarray
    cut: np.ndarray
    routed: bool = False

    @property
    def shades(self) -> np.ndarray:
        """(L,) how each token is coloured, from -1, the least, over 0 at the rate, or where p is a half, to 1. Of intervals by
        their logarithm: half is as far as double."""
        if self.routed:
            return 2 * self.interval - 1
        below, above = math.log(self.rate / self.low), math.log(self.high / self.rate) or 1.0
        x = np.log(self.interval / self.rate)
        return np.where(x < 0, x / below, x / above)

    @property
    def realised(self) -> float:
        """Elements emitted per token."""
        return float(self.emits.mean())

    @property
    def saturation(self) -> float:
        """Share of tokens whose step the band cut."""
        return float(self.cut.mean())

    def by_place(self, places: np.ndarray) -> list[tuple[int, int]]:
        """(tokens, emissions) at each of PLACES."""
        return [(int((places == p).sum()), int(self.emits[places == p].sum())) for p in range(len(PLACES))]


@torch.no_grad()
def clocks(model: LanguageModel, tokens: Tensor) -> list[BranchClock]:
    """Every branch below rate 1, in order, over one document of tokens (L,) int64. Raises UserError if there is none."""
    found, hooks = [], []

    def listen(layer: int, branch: Branch | RoutedBranch):
        read = _read_routed if isinstance(branch, RoutedBranch) else _read
        return branch.register_forward_pre_hook(lambda _, args: found.append(read(layer, branch, args[0], args[1])))

    for layer, block in enumerate(model.blocks):
        if isinstance(block.mixer, Serpent):
            hooks += [listen(layer, b) for b in block.mixer.branches if isinstance(b, (Branch, RoutedBranch))]
    if not hooks:
        pattern, rates = ", ".join(model.config.pattern), model.config.serpent.rates
        raise UserError(f"model.pattern=[{pattern}] with model.serpent.rates={rates} has no clock to show; "
                        "name a checkpoint with a SeRpEnt branch below rate 1")  # fmt: skip
    try:
        model(tokens[None])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _read(layer: int, branch: Branch, u: Tensor, documents: Documents) -> BranchClock:
    sampling, zero = branch.sampling, torch.zeros(1, dtype=torch.int64, device=u.device)
    asked = intervals(u.float(), branch.clock_weight, branch.clock_bias, sampling)
    clock, _, _ = run_clock(asked, documents.reset, sampling, branch.slots(documents), zero, zero)
    at = torch.arange(u.shape[1], device=u.device)
    ahead = clock.steps[0].cumsum(0) - (at + 1) * sampling.rate
    emits = clock.newest[0].diff(prepend=zero - 1) > 0
    values = (asked[0], ahead / TICKS, emits, clock.cut[0] == at)
    return BranchClock(layer, sampling.rate / TICKS, sampling.low, sampling.high, sampling.band / TICKS,
                       *(value.cpu().numpy() for value in values))


def _read_routed(layer: int, branch: RoutedBranch, u: Tensor, documents: Documents) -> BranchClock:
    p = branch.boundaries(u, documents.reset)[0][0].cpu().numpy()
    emits = p >= 0.5
    ahead = emits.cumsum() - branch.rate * np.arange(1, len(p) + 1)
    return BranchClock(layer, branch.rate, 0.0, 1.0, 0.0, p, ahead, emits, np.zeros_like(emits), routed=True)


def encode(tokenizer: Tokenizer, text: str, most: int) -> tuple[list[int], list[str]]:
    """(ids, the characters each covers) of at most `most` tokens. A character that several tokens share is the first one's."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ends = [0]
    for _, end in encoding.offsets[:most]:
        ends.append(max(end, ends[-1]))
    return encoding.ids[:most], [text[start:end] for start, end in zip(ends, ends[1:])]


def places_in_words(pieces: list[str]) -> np.ndarray:
    """(L,) for each token's characters, where in a word they are: an index of PLACES, -1 for a token without characters."""
    wordy = [any(c.isalpha() for c in piece) for piece in pieces]
    begins = [w and (i == 0 or not wordy[i - 1] or not piece[0].isalpha() or pieces[i - 1][-1].isspace())
              for i, (w, piece) in enumerate(zip(wordy, pieces))]  # fmt: skip
    places = []
    for i, piece in enumerate(pieces):
        if not piece:
            places.append(-1)
        elif not wordy[i]:
            places.append(PLACES.index("white space" if piece.isspace() else "punctuation, digits"))
        else:
            ends = i + 1 == len(pieces) or not wordy[i + 1] or begins[i + 1] or piece[-1].isspace()
            places.append({(True, True): 0, (True, False): 1, (False, False): 2, (False, True): 3}[begins[i], ends])
    return np.array(places)


def page(title: str, source: str, pieces: list[str], places: np.ndarray, branches: list[BranchClock]) -> str:
    """A page of HTML that needs nothing beside it: no network, no fonts, no other file.

    pieces, places: of the tokens after the first, which begins the document.
    """
    data = {
        "title": title, "source": source, "places": PLACES, "pieces": ["", *pieces],
        "routed": any(b.routed for b in branches),
        "branches": [
            {
                "layer": b.layer, "rate": b.rate, "low": b.low, "high": b.high, "band": b.band, "realised": b.realised,
                "saturation": b.saturation, "byPlace": b.by_place(np.append(-1, places)),
                "interval": b.interval.round(4).tolist(), "shades": b.shades.round(3).tolist(), "ahead": b.ahead.round(3).tolist(),
                "emits": "".join("01"[int(v)] for v in b.emits), "cut": "".join("01"[int(v)] for v in b.cut),
            }
            for b in branches
        ],
    }
    embedded = json.dumps(data).replace("<", "\\u003c")  # no text can end the script element
    return TEMPLATE.read_text().replace("/*DATA*/", embedded)
