"""Cross-entropy of a linear read-out over a vocabulary, a chunk of tokens at a time: all logits never exist at once.
`reference.py` is the PyTorch form in use."""
from .reference import linear_cross_entropy, linear_token_nll

__all__ = ["linear_cross_entropy", "linear_token_nll"]
