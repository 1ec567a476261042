"""Finds ranks that died or hang, outside the collective library, which would wait for them for minutes or for ever.

Every rank holds a TCP connection to rank 0, used by threads of their own. A connection that ends without a farewell is a dead
rank: all others leave at once, with exit code 1. A rank whose main thread has not called `beat` for `timeout` seconds tells
all; every rank prints the stacks of its threads and leaves with exit code 71. A rank that cannot answer, stopped or stuck
in a library, is named, and left to the launcher. Keep-alives find hosts that vanish.
"""
from __future__ import annotations

import faulthandler
import os
import secrets
import selectors
import socket
import sys
import threading
import time

import torch.distributed

from serpent_scale.errors import EXIT_HANG
from serpent_scale.parallel.processes import Processes, broadcast_object

DUMP, DUMPED, BYE, DEAD = b"D", b"A", b"B", b"X"  # messages are one of these and a rank, 5 bytes
FAREWELL = 3.0  # seconds between the news of a hang and leaving: all print their stacks meanwhile
GRACE = 1.0  # seconds for the main thread to say what it met itself
_active: _Watchdog | None = None


def start(processes: Processes, timeout: float) -> None:
    """Watch this rank and all others; `timeout` in seconds, 0: dead ranks only. All ranks together."""
    global _active
    _active = _Watchdog(processes.rank, processes.world_size, timeout)


def beat(doing: str) -> None:
    """The main thread makes progress: it begins with `doing`. Does nothing where no watchdog was started."""
    if _active is not None:
        _active.beat(doing)


def stop(failed: bool = False) -> None:
    """Say farewell; with `failed`, do not: the other ranks are to leave too."""
    global _active
    if _active is not None:
        _active.close(failed)
        _active = None


def _message(kind: bytes, rank: int) -> bytes:
    return kind + rank.to_bytes(4, "big")


class _Watchdog:
    def __init__(self, rank: int, world_size: int, timeout: float):
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self._beat, self._doing, self._closing, self._lock = time.monotonic(), "starting", False, threading.Lock()
        self._leaving, self._answered = False, {rank}
        self._peers: dict[int, socket.socket] = {}  # of rank 0: all others; of another rank: rank 0
        self._meet()
        if world_size > 1:
            threading.Thread(target=self._listen, name="watchdog, peers", daemon=True).start()
        if timeout:
            threading.Thread(target=self._watch, name="watchdog, time", daemon=True).start()
        self.beat("starting")

    def beat(self, doing: str) -> None:
        self._beat, self._doing = time.monotonic(), doing
        if self.timeout:
            # For a main thread that never lets go of the interpreter's lock, under which the thread below would not run.
            faulthandler.dump_traceback_later(self.timeout + 2 * FAREWELL)

    def close(self, failed: bool) -> None:
        if self.timeout:
            faulthandler.cancel_dump_traceback_later()
        self._closing = True
        for peer in list(self._peers.values()):
            if not failed:
                self._send(peer, _message(BYE, self.rank))
            peer.close()

    def _meet(self) -> None:
        """Connect everyone with rank 0, on the interface of the rendezvous; a token keeps strangers out."""
        if self.world_size == 1:
            return
        server = address = None
        if self.rank == 0:
            server = socket.create_server((os.environ["MASTER_ADDR"], 0), backlog=self.world_size)
            address = (server.getsockname()[:2], secrets.token_bytes(16))
        (host, port), token = broadcast_object(address)
        if self.rank:
            self._peers[0] = socket.create_connection((host, port), timeout=60)
            self._peers[0].sendall(token + self.rank.to_bytes(4, "big"))
        while server and len(self._peers) < self.world_size - 1:
            server.settimeout(60)
            peer, _ = server.accept()
            peer.settimeout(60)
            greeting = _receive(peer, 20)
            if secrets.compare_digest(greeting[:16], token):
                self._peers[int.from_bytes(greeting[16:], "big")] = peer
        for peer in self._peers.values():
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        if server:
            server.close()
        torch.distributed.barrier()

    def _listen(self) -> None:
        selector = selectors.DefaultSelector()
        for rank, peer in self._peers.items():
            selector.register(peer, selectors.EVENT_READ, rank)
        waiting = set(self._peers)
        while waiting:
            for key, _ in selector.select():
                try:
                    message = _receive(key.fileobj, 5)
                except (OSError, ValueError):
                    message = b""
                if self._closing:
                    return
                kind, rank = message[:1], int.from_bytes(message[1:], "big") if message else key.data
                if kind in (DUMP, DUMPED):
                    self._answered.add(rank)
                if kind == DUMP:
                    self._tell(message)
                    threading.Thread(target=self._leave_hanging, args=(rank,), daemon=True).start()
                elif kind != DUMPED:  # a farewell, or the connection ended, or rank 0 says that one did
                    selector.unregister(key.fileobj)
                    waiting.discard(key.data)
                    if kind != BYE:
                        self._tell(_message(DEAD, rank))
                        self._leave_dead(rank)

    def _watch(self) -> None:
        while not self._closing:
            late = time.monotonic() - self._beat
            if late > self.timeout:
                self._tell(_message(DUMP, self.rank))
                self._leave_hanging(self.rank)
            time.sleep(min(1.0, max(0.05, self.timeout - late)))

    def _tell(self, message: bytes) -> None:
        """Rank 0 passes on to all, the others have rank 0 do so."""
        for peer in list(self._peers.values()):
            self._send(peer, message)

    def _send(self, peer: socket.socket, message: bytes) -> None:
        try:
            peer.sendall(message)
        except OSError:
            pass  # it is gone; the listener knows

    def _leave_hanging(self, first: int) -> None:
        with self._lock:  # held until the end: one report per rank
            self._leaving = True
            if self.rank:
                self._tell(_message(DUMPED, self.rank))
            late = time.monotonic() - self._beat
            sys.stderr.write(f"watchdog: rank {self.rank} of {self.world_size} has been at '{self._doing}' for {late:.0f} s; "
                             f"rank {first} raised the alarm after {self.timeout:.0f} s. Stacks of its threads:\n")
            sys.stderr.flush()
            faulthandler.dump_traceback(all_threads=True)
            time.sleep(FAREWELL)
            silent = sorted(set(range(self.world_size)) - self._answered)
            if self.rank == 0 and silent:
                sys.stderr.write(f"watchdog: no answer from ranks {silent}: stopped, or stuck in a library\n")
            os._exit(EXIT_HANG)

    def _leave_dead(self, rank: int) -> None:
        if self._leaving:  # ranks that report a hang go one by one
            return
        time.sleep(GRACE)
        sys.stderr.write(f"watchdog: rank {rank} is dead; rank {self.rank}, at '{self._doing}', leaves too\n")
        sys.stderr.flush()
        os._exit(1)


def _receive(peer: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes. Raises ValueError at the end of the stream, OSError."""
    found = b""
    while len(found) < size:
        part = peer.recv(size - len(found))
        if not part:
            raise ValueError("the connection ended")
        found += part
    return found
