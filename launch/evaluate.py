"""Perplexity of a checkpoint on a split: `launch/evaluate.py --checkpoint RUN --data DATA --split test`.

Reads a sharded checkpoint of any ZeRO stage and world size in one process. Prints a table, or JSON with --json.
"""
from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from tqdm import tqdm

from data_pipeline.index import load_split
from data_pipeline.places import Cache
from data_pipeline.stream import documents
from data_pipeline.tokenizer import tokenizer_hash
from serpent_scale.errors import UserError, exit_on_user_error
from serpent_scale.evaluation.loading import load_checkpoint, pick_device
from serpent_scale.evaluation.perplexity import MODES, TokenText, score


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or a run's folder for its newest")
    parser.add_argument("--data", help="folder written by prepare_data.py, or its URL (default: the one trained on)")
    parser.add_argument("--split", default="validation", help="a split of that folder (default: validation)")
    parser.add_argument("--cache", metavar="FOLDER", help="where data from a URL is kept (default: data.cache as trained)")
    parser.add_argument("--mode", choices=MODES, default="windows",
                        help="windows: non-overlapping; sliding: with --stride; carry: states carried through documents")
    parser.add_argument("--seq-len", type=int, help="tokens per pass (default: as trained)")
    parser.add_argument("--stride", type=int, help="sliding: tokens scored per window (default: seq-len / 2)")
    parser.add_argument("--rows", type=int, default=8, help="sequences side by side")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast (default: fp32)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:N]")
    parser.add_argument("--json", action="store_true", help="print one JSON object to standard output")
    return parser.parse_args()


@exit_on_user_error
def main() -> None:
    args = arguments()
    if args.stride is not None and args.mode != "sliding":
        raise UserError(f"--stride is only for --mode sliding, this is {args.mode}; remove it")
    loaded = load_checkpoint(args.checkpoint, pick_device(args.device))
    data, folder = args.data or loaded.config.data.path, args.cache or loaded.config.data.cache
    cache = Cache(Path(folder), int(loaded.config.data.cache_gib * 2**30)) if folder else None
    index = load_split(data, args.split, cache)
    if index.tokenizer_sha256 != tokenizer_hash(loaded.path / "tokenizer.json"):
        raise UserError(f"{data}: its tokenizer is not the one of {loaded.path}; prepare the data with the checkpoint's "
                        f"tokenizer.json")
    seq_len = loaded.config.data.seq_len if args.seq_len is None else args.seq_len
    stride = args.stride
    if args.mode == "sliding" and stride is None:
        stride = max(1, seq_len // 2)
    if seq_len < 2 or args.rows < 1 or (stride is not None and not 1 <= stride <= seq_len):
        raise UserError(f"--seq-len {seq_len} --stride {stride} --rows {args.rows}: need seq-len >= 2, 1 <= stride <= seq-len "
                        f"and rows >= 1")
    text, started = TokenText.join(documents(data, args.split, cache)), time.perf_counter()
    with tqdm(total=len(text.tokens) - len(text.starts), unit=" tokens", disable=None) as bar:
        result = score(loaded.model, text, args.mode, seq_len, stride, args.rows, args.precision == "bf16", bar.update)
    report = {
        "checkpoint": str(loaded.path), "data": data, "split": args.split, "mode": args.mode, "seq_len": seq_len,
        "stride": stride, **result.report(index.words, index.bytes), "seconds": round(time.perf_counter() - started, 2),
    }
    if args.json:
        print(json.dumps(report))
    else:
        for key, value in report.items():
            print(f"{key:<18}{value:.4f}" if isinstance(value, float) else f"{key:<18}{value}")


if __name__ == "__main__":
    main()
