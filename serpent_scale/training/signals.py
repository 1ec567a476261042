"""Signals that ask a run to end soon: SIGTERM (preemption, launchers), SIGUSR2 (what our SLURM scripts ask for before the time
limit; NCCL is said to catch SIGUSR1). The handler only makes a note: the training loop acts on it at the next step, when the
ranks have agreed. Imports nothing heavy, so that it can be installed before anything slow is imported."""
from __future__ import annotations

import signal

_received: list[str] = []


def install() -> None:
    """To be called by the main thread, as early as it can."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: _received.append(signal.Signals(number).name))


def received() -> str | None:
    """Name of the first signal that came, if one did."""
    return _received[0] if _received else None
