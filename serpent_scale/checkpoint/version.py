"""Which code wrote a checkpoint."""
from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def code_version() -> dict[str, str]:
    """Versions of this project, torch and DeepSpeed, and the git commit, with a + when files differ from it."""
    found = {}
    for package in ("serpent-scale", "torch", "deepspeed"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a folder that is not installed
            found[package] = "unknown"
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        found["commit"] = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found["commit"] = "unknown"
    return found
