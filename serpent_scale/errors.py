"""Errors a user can mend, and how an entry point ends on one."""
from __future__ import annotations

import functools
import sys
from importlib.metadata import version

OLDEST_TORCH = (2, 10)  # older ones unpickle more than weights_only promises (CVE-2025-32434, CVE-2026-24747)


class UserError(Exception):
    """Something the user can mend: one line that names the file or key, what is wrong, and what to do."""


def check_torch(found: str) -> None:
    """Raises UserError for a torch version that is too old to be safe."""
    major, minor = (int(part) for part in found.split(".")[:2])
    if (major, minor) < OLDEST_TORCH:
        raise UserError(f"torch {found} is too old; install torch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} (see constraints.txt)")


def exit_on_user_error(main):
    """Decorate an entry point: a `UserError` becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            check_torch(version("torch"))
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)

    return wrapped
