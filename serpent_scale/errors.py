"""Errors a user can mend, and how an entry point ends on one."""
from __future__ import annotations

import functools
import os
import sys
import time
from importlib.metadata import version

# Exit codes of a run; 0: all done. docs/operations.md says what a scheduler makes of them.
EXIT_FAILED = 1  # a crash, or another rank died: start it again, unless it fails the same way again
EXIT_USER = 2  # a UserError: nothing to retry before it is mended
EXIT_HANG = 71  # no progress for training.hang_timeout: start it again
EXIT_REQUEUE = 75  # a signal ended it early, all is saved: start it again to go on

OLDEST_TORCH = (2, 10)  # older ones unpickle more than weights_only promises (CVE-2025-32434, CVE-2026-24747)


class UserError(Exception):
    """Something the user can mend: one line that names the file or key, what is wrong, and what to do."""


def check_torch(found: str) -> None:
    """Raises UserError for a torch version that is too old to be safe."""
    major, minor = (int(part) for part in found.split(".")[:2])
    if (major, minor) < OLDEST_TORCH:
        raise UserError(f"torch {found} is too old; install torch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} (see constraints.txt)")


def exit_on_user_error(main):
    """Decorate an entry point: a `UserError` becomes one line on stderr and exit code 2.

    Ranks that fail together would all say the same: rank 0 speaks first, upon which launchers end the others.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            check_torch(version("torch"))
            return main(*args, **kwargs)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            sys.exit(130)
        except UserError as error:
            if (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") != "0":
                time.sleep(3)
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(EXIT_USER)

    return wrapped
