"""Token-by-token generation with a state that does not grow (but for attention's cache)."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from serpent_scale.errors import UserError
from serpent_scale.model.language_model import LanguageModel
from serpent_scale.model.states import join_rows, take_rows


@torch.no_grad()
def generate(
    model: LanguageModel, prompts: Tensor | Sequence[Tensor], max_new_tokens: int, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None, end_of_text: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of each row, (B,) int64, up to max_new_tokens times or until every row ended.

    prompts: B of them, (B, L) or each (L_b,) int64, not empty. temperature 0 takes the likeliest token. top_k keeps the k
    likeliest, top_p the fewest whose probability reaches p. Rows that ended go on yielding end_of_text. Raises UserError for a
    token that the model does not have, and for an empty prompt.
    """
    check_prompts(prompts, model.config.vocab_size)
    logits, states = read_prompts(model, prompts)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=logits.device)
    for i in range(max_new_tokens):
        token = sample(logits[:, -1].float(), temperature, top_k, top_p, generator)
        if end_of_text is not None:
            token = torch.where(ended, end_of_text, token)
            ended |= token == end_of_text
        yield token
        if bool(ended.all()) or i + 1 == max_new_tokens:
            return
        logits, states = model(token[:, None], states=states)


def check_prompts(prompts: Tensor | Sequence[Tensor], vocab_size: int) -> None:
    """Raises UserError unless every prompt has tokens and all are of [0, vocab_size)."""
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {row} is empty; begin it with the end-of-text token, which also begins a document")
        low, high = (int(v) for v in prompt.aminmax())
        if low < 0 or high >= vocab_size:
            raise UserError(f"prompt {row} has token {low if low < 0 else high}, the model has 0 to {vocab_size - 1}; encode it "
                            "with the tokenizer the model was trained with")


def read_prompts(model: LanguageModel, prompts: Tensor | Sequence[Tensor]) -> tuple[Tensor, list[Any]]:
    """(logits of the token after each prompt (B, 1, V), states after it).

    Nothing is padded: all rows are read up to the end of the shortest, those left up to the end of the next, and so on; states
    are carried over. As many passes as there are lengths, over the tokens of the longest.
    """
    left = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    order, parts, states, begin = torch.tensor(left), [], None, 0
    while left:
        end = len(prompts[left[0]])
        ready = sum(len(prompts[row]) == end for row in left)
        logits, states = model(torch.stack([prompts[row][begin:end] for row in left]), states=states, last_only=True)
        parts.append(take_rows((logits, states), slice(ready)))
        left, states, begin = left[ready:], take_rows(states, slice(ready, None)), end
    return parts[0] if len(parts) == 1 else take_rows(join_rows(parts), order.argsort().to(prompts[0].device))


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
