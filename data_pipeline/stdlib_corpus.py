"""A small corpus that is on every machine: Python's language reference and the docstrings of its standard library."""
from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from serpent_scale.errors import UserError

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def stdlib_documents(split: str) -> Iterator[str]:
    """The documents of `split` (train, validation, test: about 90, 5, 5 %), sorted by name.

    Raises UserError when this Python came without its language reference.
    """
    for name, text in _named_documents():
        if split_of(name) == split:
            yield text


def split_of(name: str) -> str:
    """The split of a document, by keyed hash of its name: a new module moves no other."""
    digest = hashlib.blake2b(name.encode(), digest_size=8, key=b"serpent-scale stdlib").digest()
    return {0: "validation", 1: "test"}.get(int.from_bytes(digest, "little") % 20, "train")


@functools.cache  # a few MB, against seconds of parsing for each split
def _named_documents() -> tuple[tuple[str, str], ...]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("stdlib: this Python has no pydoc_data.topics; install its full standard library") from None
    named = [(f"topic:{name}", text.strip() + "\n") for name, text in topics.items()]
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED & set(parts):
            name = ".".join(parts).removesuffix(".__init__")
            text = _docstrings(path, name)
            if text:
                named.append((f"module:{name}", text))
    return tuple(sorted(named))


def _docstrings(path: Path, module: str) -> str:
    """All docstrings of a source file in its order, each under its name; empty when it has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template, not a module
        return ""
    parts = []

    def visit(node, heading: str, prefix: str) -> None:
        doc = ast.get_docstring(node)
        if doc:
            parts.append(f"{heading}\n\n{doc.strip()}\n")
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                bases = ", ".join(map(ast.unparse, child.bases))
                visit(child, f"class {prefix}{child.name}({bases})", f"{prefix}{child.name}.")
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                visit(child, f"{prefix}{child.name}({ast.unparse(child.args)})", f"{prefix}{child.name}.")

    visit(tree, f"module {module}", f"{module}.")
    return "\n".join(parts)
