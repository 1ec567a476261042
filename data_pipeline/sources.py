"""Where text comes from: local files, Hugging Face data sets, WikiText-103, Python's own documentation.

A source is read in one fixed order, so that an interrupted preparation can skip what it already has. Only plain local paths
and Hub names are opened: nothing here can reach a shell or an arbitrary URL.
"""
from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.stdlib_corpus import stdlib_documents
from serpent_scale.errors import UserError

WIKITEXT_103 = "hf:Salesforce/wikitext:wikitext-103-raw-v1"
SPLITS = ("train", "validation", "test")
FORMATS = {
    "txt": "text", "tokens": "text", "raw": "text", "jsonl": "json", "json": "json", "parquet": "parquet",
}  # fmt: skip
SPLIT_DOCUMENTS = ("file", "line", "wikitext")


@dataclass(frozen=True)
class Source:
    """One split of one source.

    kind: stdlib, hub, text, json or parquet. files: of a local source, sorted. style: a document is a `file`, a `line`, a
    `record` of a table, or a `wikitext` article, whose heading ` = Title = ` stands in a row of its own.
    """

    spec: str
    split: str
    kind: str
    style: str
    text_key: str = "text"
    files: tuple[str, ...] = ()

    def fingerprint(self) -> dict:
        """What a later run must match to count as the same source."""
        files = [f"{os.path.abspath(name)}:{os.path.getsize(name)}" for name in self.files]
        return {"spec": self.spec, "style": self.style, "text_key": self.text_key, "files": files}


def parse_source(text: str, split_documents: str | None = None, text_key: str = "text") -> list[Source]:
    """Read `[SPLIT=]SOURCE`: one Source per split; a Hub data set may be asked for its splits.

    split_documents: `file` or `line` for text files; `wikitext` joins the rows of anything but stdlib. None: wikitext for
    .tokens, .raw and wikitext-103, file for .txt. Raises UserError.
    """
    match = re.fullmatch(r"(?:([A-Za-z][\w-]*)=)?(.+)", text, re.DOTALL)
    if not match:
        raise UserError(f"--source '{text}' is empty; name a file, hf:NAME, wikitext-103 or stdlib")
    split, spec = match.groups()
    if spec in ("stdlib", "wikitext-103"):
        if split not in (None, *SPLITS):
            raise UserError(f"--source '{text}': {spec} has the splits {', '.join(SPLITS)}, not '{split}'")
        kind, style = ("stdlib", "record") if spec == "stdlib" else ("hub", "wikitext")
        return [Source(spec, name, kind, style) for name in ([split] if split else SPLITS)]
    if spec.startswith("hf:"):
        style = "wikitext" if split_documents == "wikitext" else "record"
        name, config = _hub_name(spec)
        return [Source(spec, s, "hub", style, text_key) for s in ([split] if split else _hub_splits(spec, name, config))]
    return [_parse_files(spec, split or "train", split_documents, text_key)]


def documents(source: Source) -> Iterator[str]:
    """The texts of a source, always in the same order. Raises UserError when it cannot be read."""
    if source.kind == "stdlib":
        return stdlib_documents(source.split)
    rows = _rows(source)
    return _articles(rows) if source.style == "wikitext" else rows


def by_file(source: Source) -> list[Source]:
    """Sources of one file each whose documents, one after the other, are this one's; itself where that cannot be."""
    if source.style == "wikitext" or not source.files:  # an article may reach from one file into the next
        return [source]
    return [replace(source, files=(name,)) for name in source.files]


def _parse_files(spec: str, split: str, split_documents: str | None, text_key: str) -> Source:
    if re.match(r"\w+:", spec) or "::" in spec:
        raise UserError(f"--source '{spec}': URLs and commands are refused; give a path, hf:NAME, wikitext-103 or stdlib")
    names = tuple(sorted(name for name in ([spec] if os.path.isfile(spec) else glob.glob(spec)) if os.path.isfile(name)))
    if not names:
        raise UserError(f"--source '{spec}': no such file; give a file or glob, hf:NAME, wikitext-103 or stdlib")
    endings = {_ending(name) for name in names}
    if len(endings) > 1 or not endings <= set(FORMATS):
        known = ", ".join(f".{e}" for e in FORMATS)
        raise UserError(f"--source '{spec}': cannot tell how to read {', '.join(sorted(names))[:80]}; use one of {known}")
    ending = endings.pop()
    if FORMATS[ending] == "text":
        style = split_documents or ("file" if ending == "txt" else "wikitext")
    else:
        style = "wikitext" if split_documents == "wikitext" else "record"
    return Source(spec, split, FORMATS[ending], style, text_key, names)


def _ending(name: str) -> str:
    return re.sub(r"\.(gz|xz|zst)$", "", Path(name).name).rpartition(".")[2]


def _hub_name(spec: str) -> tuple[str, str | None]:
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?::([\w.-]+))?", spec)
    if not match:
        raise UserError(f"--source '{spec}': a Hugging Face data set is hf:OWNER/NAME or hf:OWNER/NAME:CONFIG")
    if os.path.exists(match[1]):  # `datasets` would quietly read the folder instead
        raise UserError(f"--source '{spec}': {match[1]} is also a local path here; pass its files, or run from elsewhere")
    return match.groups()


def _hub_splits(spec: str, name: str, config: str | None) -> list[str]:
    with _reading(spec):
        datasets = _import_datasets()
        return datasets.get_dataset_split_names(name, config)


def _import_datasets():
    import datasets  # slow to import, and not every source needs it
    from huggingface_hub.utils import logging

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    logging.set_verbosity_error()  # retries; the final failure is reported by us
    return datasets


@contextmanager
def _reading(spec: str):
    """Turns whatever `datasets` raises while it reads `spec` into a UserError."""
    try:
        yield
    except Exception as error:
        network = isinstance(error, ConnectionError)
        hint = "no network? local files and stdlib need none" if network else "check its name, config and contents"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"--source '{spec}': cannot be read ({reason}); {hint}") from error


def _rows(source: Source) -> Iterator[str]:
    """The text column, row by row; of text files the whole file or its lines."""
    with _reading(source.spec):
        datasets = _import_datasets()
        if source.kind == "hub":
            name, config = _hub_name(WIKITEXT_103 if source.spec == "wikitext-103" else source.spec)
            table = datasets.load_dataset(name, config, split=source.split, streaming=True)
        else:
            options = {}
            if source.kind == "text":
                options = dict(sample_by="document" if source.style == "file" else "line",
                               keep_linebreaks=source.style == "wikitext")  # fmt: skip
            # escaped: `datasets` would expand a bracket in a file's name once more
            files = [glob.escape(os.path.abspath(name)) for name in source.files]
            table = datasets.load_dataset(source.kind, data_files=files, split="train", streaming=True, **options)
        batches = iter(table.iter(batch_size=1 if source.style == "file" else 1000))
    key, row = "text" if source.kind == "text" else source.text_key, 0
    while True:
        with _reading(source.spec):
            batch = next(batches, None)
        if batch is None:
            return
        if key not in batch:
            raise UserError(f"--source '{source.spec}': no column '{key}'; pass --text-key, one of {', '.join(batch)}")
        for text in batch[key]:
            if not isinstance(text, str):
                kind = type(text).__name__
                raise UserError(f"--source '{source.spec}': '{key}' of record {row} is {kind}, not text; mend the file")
            yield text
            row += 1


def _articles(rows: Iterator[str]) -> Iterator[str]:
    """Join WikiText's lines into articles, verbatim: together they are the published file.

    The Hub holds a blank line as an empty string, the file as ' '.
    """
    article, after_blank, started = [], True, False
    for row in rows:
        line = row if row.endswith("\n") else (row or " ") + "\n"
        if after_blank and re.fullmatch(r" = [^=](.*[^=])? = ", line[:-1]):
            if started:
                yield "".join(article)
                article = []
            started = True
        article.append(line)
        after_blank = not line.strip()
    if article:
        yield "".join(article)
