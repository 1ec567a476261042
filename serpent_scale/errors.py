"""Errors a user can mend, and how an entry point ends on one."""
from __future__ import annotations

import functools
import sys


class UserError(Exception):
    """Something the user can mend: one line that names the file or key, what is wrong, and what to do."""


def exit_on_user_error(main):
    """Decorate an entry point: a `UserError` becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)

    return wrapped
