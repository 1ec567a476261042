"""The language model: embedding, pre-norm residual blocks, final norm, read-out. Legend: B rows, L tokens, V vocabulary."""
from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from serpent_scale.config import ModelConfig
from serpent_scale.kernels.linear_cross_entropy import linear_cross_entropy, linear_token_nll
from serpent_scale.model.documents import Documents
from serpent_scale.model.mixer import Mixer
from serpent_scale.model.mixers import build_mixer
from serpent_scale.model.serpent import Branch
from serpent_scale.model.stack import Block, RMSNorm
from serpent_scale.model.teaching import Lessons, add_lessons


def padded_vocab(vocab_size: int) -> int:
    return -(-vocab_size // 64) * 64


def recomputed_together(n_layers: int) -> int:
    """Blocks that activation checkpointing recomputes at once: of all sizes the one that keeps least (Chen et al., arXiv
    1604.06174), given that a block keeps about four times its input for its own backward pass."""
    return max(1, round((n_layers / 4) ** 0.5))


class Readout(nn.Module):
    """Final norm and the read-out over the vocabulary, tied unless the configuration says not; rows past vocab_size are padding
    and get no probability."""

    def __init__(self, weight: nn.Parameter, config: ModelConfig):
        super().__init__()
        self.weight, self.vocab_size = weight, config.vocab_size
        self.norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(
        self, h: Tensor, y: Tensor, labels: Tensor | None = None, per_token: bool = False, with_tokens: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `LanguageModel.forward`. with_tokens: (the summed cross-entropy, that of each token without gradients)."""
        h, _ = self.norm(h, y)
        if labels is None:
            return (h @ self.weight.t())[..., : self.vocab_size]
        if per_token:
            return linear_token_nll(h.flatten(0, -2), self.weight, labels.flatten(), self.vocab_size).view(labels.shape)
        return linear_cross_entropy(h.flatten(0, -2), self.weight, labels.flatten(), self.vocab_size, per_token=with_tokens)


class LanguageModel(nn.Module):
    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False):
        super().__init__()
        self.config, self.activation_checkpointing = config, activation_checkpointing
        self.embedding = nn.Embedding(padded_vocab(config.vocab_size), config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        mixers = [build_mixer(name, config) for name in config.layers]
        self.blocks = nn.ModuleList(Block(mixer, config.d_model, config.norm_eps) for mixer in mixers)
        for block in self.blocks:  # the residual stream's variance does not grow with depth (GPT-2, section 2.3)
            for projection in block.mixer.out_projs:
                projection.weight.data.div_(config.n_layers**0.5)
        weight = self.embedding.weight
        if not config.tie_embeddings:
            weight = nn.Parameter(torch.empty_like(weight).normal_(std=0.02))
        self.readout = Readout(weight, config)
        self.taught: Tensor | None = None  # (), what lessons came to, summed over passes; whoever reads it sets it to 0

    @property
    def has_lessons(self) -> bool:
        """Whether something besides the loss teaches SeRpEnt's clocks."""
        return self.config.serpent.clock == "routed" or self.config.serpent.teach != "durations"

    @property
    def fixed_shapes(self) -> bool:
        """Whether the shapes inside a pass follow from the tokens' and `slots`."""
        return all(m.fixed_shapes for m in self.modules() if isinstance(m, Mixer))

    def slots(self, documents: Documents) -> tuple[int, ...]:
        """What the shapes inside depend on besides that of the tokens: the slots of each kind of compressed branch."""
        branches = {m.sampling: m for m in self.modules() if isinstance(m, Branch)}
        return tuple(branch.slots(documents) for branch in branches.values())

    def forward(
        self, tokens: Tensor, documents: Documents | None = None, labels: Tensor | None = None,
        states: list | None = None, per_token: bool = False, last_only: bool = False,
    ) -> tuple[Tensor, list]:
        """tokens (B, L) int64. Returns (what was asked for, state of every block after the last token).

        Without labels: logits (B, L, vocab_size), or (B, 1, vocab_size) if last_only. With labels (B, L) int64, -100 where
        none: the summed cross-entropy, or with per_token the cross-entropy (B, L) without gradients. What teaches SeRpEnt's
        clocks besides adds to the gradients of the sum, not to its value.
        """
        if documents is None:
            documents = Documents.whole(*tokens.shape, device=tokens.device)
        lessons = None
        if self.has_lessons and labels is not None and not per_token and torch.is_grad_enabled():
            if self.taught is None:
                self.taught = torch.zeros((), device=tokens.device)
            lessons = Lessons(self.taught)
            documents = dataclasses.replace(documents, lessons=lessons)
        h = self.embedding(tokens).to(torch.promote_types(self.embedding.weight.dtype, torch.float32))
        y, after = None, []
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        size = recomputed_together(len(self.blocks)) if recompute else len(self.blocks)
        for first in range(0, len(self.blocks), size):
            group = range(first, min(first + size, len(self.blocks)))
            given = [None if states is None else states[i] for i in group]
            if recompute:
                h, y, ended = checkpoint(self._run, group, h, y, documents, given, use_reentrant=False)
            else:
                h, y, ended = self._run(group, h, y, documents, given)
            after += ended
        if last_only:
            h, y = h[:, -1:], y[:, -1:]
        if not lessons:
            return self.readout(h, y, labels, per_token), after
        loss, nll = self.readout(h, y, labels, with_tokens=True)
        return add_lessons(loss, nll, labels, documents.reset, lessons, self.config.serpent.teach_weight), after

    def _run(self, blocks: range, h: Tensor, y: Tensor | None, documents: Documents, states: list) -> tuple:
        after = []
        for i, state in zip(blocks, states):
            h, y, state = self.blocks[i](h, y, documents, state)
            after.append(state)
        return h, y, after
