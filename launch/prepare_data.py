"""Prepare training data: tokenise sources into shards that the token stream reads.

    python launch/prepare_data.py --source wikitext-103 --tokenizer train:32768 --out data
    python launch/prepare_data.py --source 'train=corpus/*.jsonl.xz' --source validation=held_out.jsonl \\
        --tokenizer gpt2/tokenizer.json --out data

For much text, an array job shares the work (launch/slurm/prepare_data.sbatch): each task runs this with `--part I/N`, then one
with `--merge` makes OUT of the parts, byte for byte what a single run makes.

Run it again after an interruption and it goes on where it stopped; run it again when it is done and it does nothing.
"""
from __future__ import annotations

import argparse
import itertools
import re
import shutil
from pathlib import Path

from data_pipeline import overlap
from data_pipeline.files import write_atomically
from data_pipeline.overlap import Runs
from data_pipeline.packing import write_plan
from data_pipeline.parts import Parts, parts_folder, write_part
from data_pipeline.shards import SHARD_TOKENS, left_out, prepare_split
from data_pipeline.sources import SPLIT_DOCUMENTS, Source, documents, parse_source
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from serpent_scale.errors import UserError, exit_on_user_error


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", action="append", required=True, metavar="[SPLIT=]SOURCE",
                        help="wikitext-103, stdlib, hf:OWNER/NAME[:CONFIG], a file or a quoted glob; repeatable. Without "
                             "SPLIT: all splits of the source, train for files")  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, help="the data folder, data.path of a run")
    parser.add_argument("--tokenizer", metavar="train:VOCAB|FILE",
                        help="a byte-level BPE of VOCAB tokens trained on the train split, or a tokenizer.json; may be left "
                             "out when OUT has one")  # fmt: skip
    parser.add_argument("--split-documents", choices=SPLIT_DOCUMENTS,
                        help="what is a document in a text file: default wikitext for .tokens and .raw, file for .txt")
    parser.add_argument("--text-key", default="text", help="column that holds the text (default text)")
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, help="at most this many a shard")
    parser.add_argument("--deduplicate", action="store_true", help="of texts that are equal byte for byte, keep a split's first")
    parser.add_argument("--decontaminate", action="append", default=[], metavar="[SPLIT=]SOURCE",
                        help="leave out of the train split what overlaps this evaluation set (of a source with splits: all but "
                             "its train split), see --shared-runs; repeatable")  # fmt: skip
    parser.add_argument("--shared-runs", type=int, default=overlap.RUNS, metavar="N",
                        help=f"how many runs of {overlap.N} words a document shares with an evaluation text when it overlaps it "
                             f"(default {overlap.RUNS}; 1: any shared phrase)")  # fmt: skip
    parser.add_argument("--pack", type=int, metavar="SEQ_LEN", help="also plan best-fit packing for this data.seq_len")
    share = parser.add_mutually_exclusive_group()
    share.add_argument("--part", type=part, metavar="I/N", help="only tokenise part I (0 to N - 1) of N, into OUT/SPLIT.parts")
    share.add_argument("--merge", action="store_true", help="make OUT of all its parts, which have the same arguments but this")
    return parser.parse_args(argv)


def part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}' is not I/N with 0 <= I < N, for example 0/16")
    return int(match[1]), int(match[2])


def group_by_split(arguments: argparse.Namespace) -> dict[str, list[Source]]:
    splits = {}
    for text in arguments.source:
        for source in parse_source(text, arguments.split_documents, arguments.text_key):
            splits.setdefault(source.split, []).append(source)
    return splits


def evaluation_sets(arguments: argparse.Namespace) -> list[Source]:
    found = []
    for text in arguments.decontaminate:
        sources = parse_source(text, arguments.split_documents, arguments.text_key)
        found += [source for source in sources if len(sources) == 1 or source.split != "train"]
    return found


def provide_tokenizer(wanted: str | None, out: Path, splits: dict[str, list[Source]]) -> Tokenizer:
    """OUT/tokenizer.json, made if it is not there. Raises UserError when it is not the one asked for."""
    path = out / "tokenizer.json"
    size = re.fullmatch(r"train:(\d+)", wanted or "")
    if path.is_file():
        present = Tokenizer(path)
        if size and int(size[1]) != present.vocab_size:
            raise UserError(f"{path}: has {present.vocab_size} tokens, --tokenizer asks for {size[1]}; choose another --out")
        if wanted and not size and Tokenizer(Path(wanted)).sha256 != present.sha256:
            raise UserError(f"{path}: is not {wanted}; leave --tokenizer out to use it, or choose another --out")
        return present
    if not wanted:
        raise UserError(f"{path}: no such file; pass --tokenizer train:VOCAB or a tokenizer.json")
    if size:
        texts = itertools.chain.from_iterable(map(documents, splits.get("train") or next(iter(splits.values()))))
        out.mkdir(parents=True, exist_ok=True)
        return train_tokenizer(texts, int(size[1]), path)
    given = Tokenizer(Path(wanted))
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, given.path.read_bytes())
    return Tokenizer(path)


def part_tokenizer(wanted: str | None, out: Path, splits: dict[str, list[Source]]) -> Tokenizer:
    """For a task of an array, which runs beside others: what `provide_tokenizer` gives, but OUT is left as it is."""
    if (out / "tokenizer.json").is_file():
        return provide_tokenizer(wanted, out, splits)
    if not wanted or re.fullmatch(r"train:\d+", wanted):
        raise UserError(f"{out}/tokenizer.json: no such file, and the tasks of an array cannot train it together; "
                        "give a tokenizer.json")
    return Tokenizer(Path(wanted))


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    for name, value, least in (("shard-tokens", arguments.shard_tokens, 1), ("shared-runs", arguments.shared_runs, 1)):
        if value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    if arguments.pack is not None and arguments.pack < 2:
        raise UserError(f"--pack {arguments.pack}: must be at least 2, data.seq_len of a run")
    splits = group_by_split(arguments)
    evaluations = evaluation_sets(arguments)
    if evaluations and "train" not in splits:
        raise UserError("--decontaminate: only cleans the split train, and there is no --source for it")
    try:
        tokenizer = (part_tokenizer if arguments.part else provide_tokenizer)(arguments.tokenizer, arguments.out, splits)
        indexes, held_out = [], None
        if evaluations:
            held_out = Runs(itertools.chain.from_iterable(map(documents, evaluations)), arguments.shared_runs)
            print(f"--decontaminate: {len(held_out):,} runs of {overlap.N} words to look for, {arguments.shared_runs} of a text "
                  "are an overlap")  # fmt: skip
        for split, sources in splits.items():
            folder, parts = arguments.out / split, parts_folder(arguments.out / split)
            wikitext = all(source.style == "wikitext" for source in sources)
            settings = dict(
                request={"sources": [source.fingerprint() for source in sources]},
                word_rule="whitespace+line_ends" if wikitext else "whitespace",
                held_out=held_out if split == "train" else None,
            )
            done = (folder / "index.json").is_file()
            if arguments.part:
                made = None if done else write_part(parts, sources, tokenizer, *arguments.part, **settings)
                print(f"{folder}: already prepared" if done else f"{made}: done")
                continue
            if arguments.merge and not done:
                texts = Parts(parts, tokenizer, **settings)
            else:
                texts = itertools.chain.from_iterable(map(documents, sources))
            options = dict(shard_tokens=arguments.shard_tokens, deduplicate=arguments.deduplicate)
            index, worked = prepare_split(folder, texts, tokenizer, **settings, **options)
            if arguments.merge:
                shutil.rmtree(parts, ignore_errors=True)
            if not worked:
                print(f"{index.folder}: already prepared")
            indexes.append(index)
            if arguments.pack:
                padding = write_plan(index, arguments.pack)
                print(f"{index.folder}: packed into windows of {arguments.pack} tokens, {padding:.2%} padding")
    except OSError as error:
        where = error.filename or arguments.out
        raise UserError(f"--out: {where}: {error.strerror or error}; mend that and run again, it will go on") from error
    if arguments.part:
        return
    print(f"{'split':<12}{'documents':>12}{'tokens':>16}{'shards':>8}{'tokens/byte':>13}{'duplicates':>12}{'overlapping':>13}")
    for i in indexes:
        gone = left_out(i.folder)
        print(f"{i.split:<12}{i.n_documents:>12,}{i.tokens:>16,}{len(i.shards):>8}{i.tokens / i.bytes:>13.4f}"
              f"{gone['duplicates']:>12,}{gone['overlapping']:>13,}")


if __name__ == "__main__":
    main()
