"""Token-by-token generation with a state that does not grow."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from serpent_scale.model.language_model import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel, prompt: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
    top_p: float | None = None, end_of_text: int | None = None, generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of each row, (B,) int64, up to max_new_tokens times or until every row ended.

    prompt (B, L) int64, L >= 1. temperature 0 takes the likeliest token. top_k keeps the k likeliest, top_p the fewest whose
    probability reaches p. Rows that ended go on yielding end_of_text. The prompt runs in one batch pass, then one token a step.
    """
    logits, states = model(prompt, last_only=True)
    ended = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    for i in range(max_new_tokens):
        token = sample(logits[:, -1].float(), temperature, top_k, top_p, generator)
        if end_of_text is not None:
            token = torch.where(ended, end_of_text, token)
            ended |= token == end_of_text
        yield token
        if bool(ended.all()) or i + 1 == max_new_tokens:
            return
        logits, states = model(token[:, None], states=states)


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None = None
) -> Tensor:
    """Draw from logits (B, V): (B,) int64."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None:
        ordered, order = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all likelier tokens
        drop = (before >= top_p).scatter(1, order, before >= top_p)
        drop.scatter_(1, order[:, :1], False)
        logits = logits.masked_fill(drop, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
