"""The tokenizer: one `tokenizer.json`, trained here as a byte-level BPE or taken as it is."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tokenizers

from data_pipeline.files import sha256_of, write_atomically
from serpent_scale.errors import UserError

END_OF_TEXT = "<|endoftext|>"


def tokenizer_hash(path: Path) -> str:
    """Hex sha256 of a tokenizer.json, by which data and checkpoints know it. Raises UserError when there is none."""
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer; give a tokenizer.json or train:VOCAB")
    return sha256_of(path)


class Tokenizer:
    """A loaded `tokenizer.json`.

    eot_id: the id of <|endoftext|>. vocab_size: the largest id + 1. sha256: of the file.
    """

    def __init__(self, path: Path):
        """Raises UserError when the file is missing, unreadable or has no <|endoftext|>."""
        self.path, self.sha256 = path, tokenizer_hash(path)
        try:
            self._bpe = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"{path}: not a tokenizer.json ({str(error)[:100]}); export one with `tokenizers`") from None
        eot_id = self._bpe.token_to_id(END_OF_TEXT)
        if eot_id is None:
            raise UserError(f"{path}: has no {END_OF_TEXT} token, which separates documents; add it as a special token")
        self._bpe.no_truncation()
        self._bpe.no_padding()
        self._bpe.encode_special_tokens = True  # the characters <|endoftext|> inside a text stay text
        self.eot_id = eot_id
        self.vocab_size = max(self._bpe.get_vocab(with_added_tokens=True).values()) + 1

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without any mark at its ends; runs on all cores."""
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens are kept visible."""
        return self._bpe.decode([int(i) for i in ids], skip_special_tokens=False)


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> Tokenizer:
    """Train a byte-level BPE of exactly `vocab_size` ids and write it to `path`.

    Raises UserError when the size is below bytes + end of text, or more than the text supports.
    """
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise UserError(f"--tokenizer train:{vocab_size}: must be at least {len(alphabet) + 1}, the bytes and {END_OF_TEXT}")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() != vocab_size:
        raise UserError(f"--tokenizer train:{vocab_size}: the text yields only {bpe.get_vocab_size()} tokens; ask for those")
    write_atomically(path, bpe.to_str().encode())
    return Tokenizer(path)
