"""Where the doctors of a job leave words for each other: keys in the rendezvous store, over a connection of their own.

Nothing here blocks for long: a key is read only once it is known to exist.
"""

from __future__ import annotations

import os
import socket
import threading
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .evidence import sockets
from .verdict import Status

__all__ = ["Board", "open_board"]

_LIMIT = timedelta(seconds=5)
_ALARM, _VERDICT = "alarm", "verdict"


class Board:
    """Words of ranks, an alarm, and a verdict. Any thread may use it; a broken store raises RuntimeError."""

    def __init__(
        self, store: Any, rank: int, world_size: int, *, port: int | None = None, hosted: bool = False
    ) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._lock = threading.Lock()
        self._met: set[int] = set()
        self._line: socket.socket | None = None
        #: The store's port; and whether its server is in rank 0's process.
        self.port = port
        self.in_rank_0 = hosted

    def post(self, status: Status) -> None:
        """Leaves this rank's word, in place of the one before."""
        with self._lock:
            self._store.set(f"rank{self._rank}", status.to_json())

    def read(self, rank: int) -> Status | None:
        """The rank's last word, if it ever left one."""
        with self._lock:
            if rank not in self._met:
                if not self._store.check([f"rank{rank}"]):
                    return None
                self._met.add(rank)
            return Status.from_json(self._store.get(f"rank{rank}"))

    def read_all(self) -> dict[int, Status]:
        """Every rank's last word, without those that never left one."""
        with self._lock:
            ranks = range(self._world_size)
            unmet = [r for r in ranks if r not in self._met]
            if unmet and self._store.check([f"rank{r}" for r in unmet]):
                self._met.update(unmet)
            else:
                self._met.update(r for r in unmet if self._store.check([f"rank{r}"]))
            met = [r for r in ranks if r in self._met]
            return {
                r: Status.from_json(t)
                for r, t in zip(met, self._store.multi_get([f"rank{r}" for r in met]), strict=True)
            }

    def raise_alarm(self, word: str) -> None:
        """Makes every doctor leave words for a while; a new ``word`` prolongs it."""
        with self._lock:
            self._store.set(_ALARM, word)

    def alarm(self) -> str:
        """The last alarm's word; empty if there never was one."""
        return self._optional(_ALARM)

    def publish(self, verdict: str) -> None:
        with self._lock:
            self._store.set(_VERDICT, verdict)

    def verdict(self) -> str:
        """The verdict that was published last; empty if there is none."""
        return self._optional(_VERDICT)

    def _optional(self, key: str) -> str:
        with self._lock:
            return self._store.get(key).decode() if self._store.check([key]) else ""

    def watch_line(self, descriptors: set[int]) -> None:
        """Tells which of these sockets is the store's, so that its end can be seen."""
        for number, each in sockets():
            if number in descriptors and each.getpeername()[1] == self.port:
                self._line = each.dup()

    def is_open(self) -> bool:
        """Whether the store's server is still there. Asked first, since torch writes long complaints if it is not."""
        if self._line is None:
            return True
        try:
            return self._line.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        with self._lock:
            self._store = None
            if self._line is not None:
                self._line.close()
                self._line = None


def open_board() -> Board | None:
    """The board of the default group; ``None`` if its store cannot be shared (MPI has none)."""
    own: Any = dist.distributed_c10d._get_default_store()
    base: Any = own
    while base is not None and getattr(base, "underlying_store", None) is not None:
        base = base.underlying_store
    port = base.port if isinstance(base, dist.TCPStore) else None
    before = {number for number, _ in sockets()} if port else set()
    mine = second_client(own, base)
    if mine is None:
        return None
    mine.set_timeout(_LIMIT)
    in_rank_0 = port is not None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    board = Board(
        dist.PrefixStore("deepspeed_doctor", mine),
        dist.get_rank(),
        dist.get_world_size(),
        port=port,
        hosted=in_rank_0,
    )
    if port:
        board.watch_line({number for number, _ in sockets()} - before)
    return board


def second_client(own: Any, base: Any) -> Any:
    """Another connection to the store, since one serves one request at a time. torch 2.9 has ``clone`` for it."""
    if hasattr(own, "clone"):
        try:
            return own.clone()
        except (RuntimeError, NotImplementedError):  # a store of the user's own making
            return None
    if isinstance(base, dist.TCPStore):
        return dist.TCPStore(base.host, base.port, None, False, wait_for_workers=False)
    if isinstance(base, dist.FileStore):
        return dist.FileStore(base.path)  # type: ignore[attr-defined]
    return None
