"""Perplexity of a split: non-overlapping windows, a sliding window, or states carried through whole documents."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from serpent_scale.model.documents import Documents
from serpent_scale.model.language_model import LanguageModel

MODES = ("windows", "sliding", "carry")


@dataclass(frozen=True)
class TokenText:
    """A split as one stream: tokens (N,), and the position in it where each document begins (n_documents,)."""

    tokens: np.ndarray
    starts: np.ndarray

    @classmethod
    def join(cls, documents: Iterable[np.ndarray]) -> TokenText:
        documents = list(documents)
        lengths = [len(d) for d in documents]
        return cls(np.concatenate(documents).astype(np.int64), np.cumsum([0] + lengths[:-1]))

    def labels(self) -> np.ndarray:
        """(N,) the token after each within its document, -100 after a document's last."""
        labels = np.append(self.tokens[1:], -100)
        labels[self.starts[1:] - 1] = -100
        return labels


@dataclass(frozen=True)
class Score:
    """Summed negative log-likelihood in nats over `tokens` predicted tokens."""

    nll: float
    tokens: int

    def report(self, words: int, text_bytes: int) -> dict[str, float]:
        """Loss and perplexities; words and bytes are those of the original text, whatever the tokenizer."""
        loss = self.nll / self.tokens
        return {
            "loss": loss, "token_perplexity": _exp(loss), "word_perplexity": _exp(self.nll / words),
            "bits_per_byte": self.nll / math.log(2) / text_bytes,
            "tokens": self.tokens, "words": words, "bytes": text_bytes,
        }


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def score(
    model: LanguageModel, text: TokenText, mode: str, seq_len: int, stride: int | None = None, rows: int = 8,
    autocast: bool = False, progress: Callable[[int], None] = lambda tokens: None,
) -> Score:
    """Score every token of the split that follows another in its document, once.

    windows: cut into windows of seq_len, each from an empty state. sliding: windows of seq_len of which the last `stride`
    tokens count, so that each has at least seq_len - stride tokens of context. carry: every document from its beginning,
    states handed on between passes of seq_len tokens; `rows` groups of documents run side by side.
    `progress` is told the tokens done after each pass.
    """
    if mode == "carry":
        passes = _carried(text, seq_len, rows)
    else:
        passes = _windows(text, seq_len, seq_len if mode == "windows" else stride, rows)
    device = next(model.parameters()).device
    nll, count, states = 0.0, 0, None
    for tokens, labels, documents in passes:
        labels = labels.to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            losses, after = model(tokens.to(device), documents.to(device), labels, states=states, per_token=True)
        states = after if mode == "carry" else None
        nll, n = nll + losses.double().sum().item(), int((labels >= 0).sum())
        count += n
        progress(n)
    return Score(nll, count)


def _windows(text: TokenText, seq_len: int, stride: int, rows: int) -> Iterator[tuple]:
    """Windows ending at stride, 2 stride, ... and at the end; the labels before the last stride are masked."""
    labels, n = text.labels(), len(text.tokens)
    firsts = list(range(0, n, stride))
    for lo in range(0, len(firsts), rows):
        cut = []
        for first in firsts[lo : lo + rows]:
            end = min(first + stride, n)
            begin = max(0, end - seq_len)
            label = labels[begin:end].copy()
            label[: first - begin] = -100
            cut.append((begin, end, label))
        yield _batch(text, cut, max(end - begin for begin, end, _ in cut))


def _carried(text: TokenText, seq_len: int, rows: int) -> Iterator[tuple]:
    """Documents dealt to rows in contiguous groups of near-equal length; each row is read in passes of seq_len tokens."""
    labels = text.labels()
    begins, ends = stretches(text.starts, len(text.tokens), rows)
    for offset in range(0, int((ends - begins).max()), seq_len):
        cut = []
        for begin, end in zip(begins, ends):
            lo, hi = min(begin + offset, end), min(begin + offset + seq_len, end)
            cut.append((lo, hi, labels[lo:hi]))
        yield _batch(text, cut, max(hi - lo for lo, hi, _ in cut))


def stretches(starts: np.ndarray, n: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Deal documents that begin at `starts` in n tokens to at most `rows` rows, consecutive ones to each, about as many tokens:
    where rows begin and end."""
    targets = np.arange(rows) * n // rows
    begins = np.unique(np.append(starts, n)[np.searchsorted(starts, targets)])
    begins = begins[begins < n]
    return begins, np.append(begins[1:], n)


def _batch(text: TokenText, cut: list[tuple[int, int, np.ndarray]], length: int):
    """Rows [begin, end) of the stream, padded at the end to `length` by a document whose labels do not count."""
    tokens = np.zeros((len(cut), length), np.int64)
    labels = np.full((len(cut), length), -100)
    reset, lengths = np.zeros((len(cut), length), bool), []
    for row, (begin, end, label) in enumerate(cut):
        size = end - begin
        tokens[row, :size], labels[row, :size] = text.tokens[begin:end], label
        inside = text.starts[np.searchsorted(text.starts, begin) : np.searchsorted(text.starts, end)] - begin
        starts = np.append(inside, size) if size < length else inside
        reset[row, starts] = True
        bounds = np.unique(np.concatenate([[0], starts, [length]]))
        lengths.append(tuple(np.diff(bounds).tolist()))
    documents = Documents(torch.from_numpy(reset), tuple(lengths))
    return torch.from_numpy(tokens), torch.from_numpy(labels), documents


def unigram_perplexity(train_counts: np.ndarray, text_counts: np.ndarray) -> float:
    """Token perplexity of the text under add-one smoothed token frequencies of the training split: the floor to beat.

    Both (vocab_size,) int64 counts of predicted tokens.
    """
    probability = (train_counts + 1) / (train_counts.sum() + len(train_counts))
    return math.exp(-(text_counts * np.log(probability)).sum() / text_counts.sum())
