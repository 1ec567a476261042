"""Models of Hugging Face transformers and mamba_ssm as checkpoints here, and checkpoints as models there.

    python launch/convert.py import state-spaces/mamba-130m --out mamba-130m --tokenizer gpt-neox-20b/tokenizer.json
    python launch/pretrain.py --config mamba-130m/config.yaml --resume mamba-130m data.path=data run.name=continued
    python launch/convert.py export runs/wt103_350m --out wt103_350m

Both are folders on this machine. Nothing that is there is overwritten.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path

from data_pipeline.tokenizer import END_OF_TEXT, Tokenizer
from serpent_scale.checkpoint import layouts, store
from serpent_scale.errors import exit_on_user_error
from serpent_scale.evaluation.loading import find_checkpoint, read_model


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="way", required=True)
    reading = ways.add_parser("import", help="a model's folder (config.json and tensors) -> a checkpoint without optimizer state")
    reading.add_argument("folder", type=Path, help="of transformers (mamba, mamba2), of mamba_ssm, or one that `export` wrote")
    reading.add_argument("--tokenizer", type=Path, metavar="FILE", help="its tokenizer.json (default: the folder's, if any)")
    writing = ways.add_parser("export", help="a checkpoint -> a model's folder")
    writing.add_argument("checkpoint", type=Path, help="checkpoint folder, or a run's folder for its newest")
    writing.add_argument("--layout", choices=layouts.LAYOUTS,
                         help="default: transformers for a pure Mamba or Mamba-2; serpent_scale for any other, which "
                              "transformers reads after `import serpent_scale.huggingface`")
    for way in (reading, writing):
        way.add_argument("--out", required=True, type=Path, help="folder to write")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    (import_model if args.way == "import" else export_model)(args)


def import_model(args: argparse.Namespace) -> None:
    file = args.tokenizer or args.folder / "tokenizer.json"
    tokenizer = Tokenizer(file) if args.tokenizer or file.is_file() else None
    config, state = layouts.read(args.folder, tokenizer and tokenizer.vocab_size)
    texts = {"config.yaml": config.to_yaml()}
    if tokenizer:
        texts["tokenizer.json"] = file.read_text()
    else:
        print(f"note: {args.folder} has no tokenizer.json; without --tokenizer FILE what is written can be trained on, but not "
              "evaluated")
    store.save_parameters(args.out, state, texts)
    size = sum(value.numel() for name, value in state.items() if name != "readout.weight" or not config.model.tie_embeddings)
    print(f"wrote {args.out}: {', '.join(config.model.pattern)}, {size:,} parameters, vocabulary {config.model.vocab_size}")


def export_model(args: argparse.Namespace) -> None:
    path = find_checkpoint(args.checkpoint)
    config, state = read_model(path)
    file = path / "tokenizer.json"
    tokenizer = Tokenizer(file) if file.is_file() else None
    with store.new_folder(args.out) as folder:
        layout = layouts.write(args.layout, folder, config.model, state, tokenizer and tokenizer.eot_id)
        if tokenizer:
            (folder / "tokenizer.json").write_text(file.read_text())
            special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT,
                       "clean_up_tokenization_spaces": False}
            (folder / "tokenizer_config.json").write_text(json.dumps(special, indent=2) + "\n")
    print(f"wrote {args.out}, layout {layout}, from {path}")


if __name__ == "__main__":
    main()
