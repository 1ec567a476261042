"""Models of ours in Hugging Face transformers: `import serpent_scale.huggingface`, then
`AutoModelForCausalLM.from_pretrained(FOLDER)` for a folder that `launch/convert.py export` wrote. It holds no code."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from serpent_scale.checkpoint.layouts import MODEL_TYPE
from serpent_scale.config import ModelConfig, parse_config
from serpent_scale.model.documents import Documents
from serpent_scale.model.language_model import LanguageModel


class SerpentPretrainedConfig(PreTrainedConfig):
    """`model` is the section of that name in our configuration."""

    model_type = MODEL_TYPE

    def __init__(self, model: dict | None = None, **kwargs):
        self.model = model or {}
        super().__init__(**kwargs)

    def ours(self) -> ModelConfig:
        """Checked as any configuration is. Raises UserError."""
        return parse_config({"model": self.model, "training": {"max_steps": 1000}}, origin="config.json", saved=True).model


class States:
    """The state of every layer after the tokens seen; what transformers calls a cache. Its size does not grow."""

    is_compileable = False

    def __init__(self, layers: list):
        self.layers = layers

    def reorder_cache(self, rows: Tensor) -> None:
        """Beam search: row i goes on from what was row rows[i]."""
        self.layers = tree_map_only(Tensor, lambda state: state.index_select(0, rows.to(state.device)), self.layers)


@dataclass
class SerpentOutput(ModelOutput):
    """logits (B, L, vocabulary) float32."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: States | None = None


class SerpentForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = SerpentPretrainedConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"model.readout.weight": "model.embedding.weight"}
    _is_stateful = True

    def __init__(self, config: SerpentPretrainedConfig):
        super().__init__(config)
        self.model = LanguageModel(config.ours())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Modules of ours set themselves when they are built."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # its layers hold keys and values; ours hand on their own states

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, use_cache=True, **kwargs):
        if past_key_values is not None:
            return {"input_ids": input_ids[:, -1:], "past_key_values": past_key_values, "use_cache": True}
        keep = kwargs.get("logits_to_keep", 1)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": use_cache, "logits_to_keep": keep}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: States | None = None,
        labels: Tensor | None = None, use_cache: bool | None = None, logits_to_keep: int = 0, return_dict: bool | None = None,
        **_,
    ) -> SerpentOutput | tuple:
        """input_ids (B, L). attention_mask (B, L): zeros first in a row are padding, which the tokens after it do not see.

        labels (B, L), -100 where none, are shifted in here; the loss is their mean cross-entropy. Raises ValueError for a mask
        with zeros elsewhere: after the last token they would be part of the state handed on.
        """
        documents = Documents.whole(*input_ids.shape, device=input_ids.device)
        if attention_mask is not None and past_key_values is None:
            documents = _left_padded(attention_mask)
        states = None if past_key_values is None else past_key_values.layers
        dtype = self.model.embedding.weight.dtype
        with torch.autocast(input_ids.device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            logits, states = self.model(input_ids, documents, states=states, last_only=logits_to_keep == 1 and labels is None)
        logits = logits.float()
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if logits_to_keep > 1:
            logits = logits[:, -logits_to_keep:]
        cached = use_cache if use_cache is not None else not self.training
        output = SerpentOutput(loss, logits, States(states) if cached else None)
        return output if return_dict is None or return_dict else output.to_tuple()


def _left_padded(mask: Tensor) -> Documents:
    """A row's padding as a document of its own before its tokens."""
    mask = mask.bool()
    padding = (~mask).sum(1).tolist()
    length = mask.shape[1]
    reset = torch.zeros_like(mask)
    for row, count in enumerate(padding):
        if count < length:
            reset[row, count] = count > 0
        if not mask[row, count:].all():
            raise ValueError("attention_mask: zeros after a token; pad on the left (tokenizer.padding_side = 'left')")
    return Documents(reset, tuple((count, length - count) if 0 < count < length else (length,) for count in padding))


AutoConfig.register(MODEL_TYPE, SerpentPretrainedConfig)
AutoModelForCausalLM.register(SerpentPretrainedConfig, SerpentForCausalLM)
