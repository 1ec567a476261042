"""A port for ranks to meet at."""
from __future__ import annotations

import socket


def free_port() -> int:
    """One of 127.0.0.1 that nothing listens on now; another process may take it before it is used."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
