"""Text from a checkpoint, streamed to the terminal: `launch/generate.py --checkpoint RUN --prompt "The history of"`."""
from __future__ import annotations

import argparse
import math

import torch
from tokenizers.decoders import DecodeStream

from serpent_scale.errors import UserError, exit_on_user_error
from serpent_scale.evaluation.generation import generate
from serpent_scale.evaluation.loading import load_checkpoint, pick_device


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or a run's folder for its newest")
    parser.add_argument("--prompt", default="", help="text to continue (default: begin a document)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="stop after this many, if no document ends before")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, help="draw from the K likeliest tokens (default: from all)")
    parser.add_argument("--top-p", type=float, default=0.95,
                        help="draw from the likeliest tokens whose probability reaches P (default: 0.95; 1: from all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws: the same seed gives the same text")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:N]")
    return parser.parse_args()


@exit_on_user_error
def main() -> None:
    args = arguments()
    if not 0 <= args.temperature < math.inf or (args.top_k is not None and args.top_k < 1) or not 0 < args.top_p <= 1:
        raise UserError("--temperature must be >= 0, --top-k >= 1 and 0 < --top-p <= 1")
    if args.max_new_tokens < 1 or not 0 <= args.seed < 2**63:
        raise UserError("--max-new-tokens must be >= 1 and --seed >= 0 and below 2^63")
    device = pick_device(args.device)
    loaded = load_checkpoint(args.checkpoint, device)
    encoded, size = loaded.tokenizer.encode(args.prompt), loaded.config.model.vocab_size
    for token, text in zip(encoded.ids, encoded.tokens):
        if token >= size:
            raise UserError(f"--prompt: '{text}' is token {token}, which the model does not have (model.vocab_size={size}); "
                            "leave it out")
    prompt = torch.tensor([[loaded.end_of_text] + encoded.ids], device=device)
    draw = torch.Generator(device).manual_seed(args.seed)
    text = DecodeStream(skip_special_tokens=True)  # waits for the rest of a character
    print(args.prompt, end="", flush=True)
    for token in generate(loaded.model, prompt, args.max_new_tokens, args.temperature, args.top_k,
                          args.top_p, loaded.end_of_text, draw):
        piece = text.step(loaded.tokenizer, int(token))
        if piece:
            print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
