"""How this rank looks, and how the others look from here."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from typing import Any

import torch.distributed as dist

from . import evidence
from .blackbox import Page, make_page, open_page
from .record import now
from .verdict import Sight, State, Status

__all__ = ["OthersView", "OwnView"]

#: Growth of the TCP counters between two looks that counts as a move; less may be a logger's or a tracker's.
_MOVED_NBYTES = 1 << 16


class OwnView:
    """What can be seen of the thread that makes this object; looked at from the doctor's thread."""

    def __init__(self, except_port: int | None, ask_device_after_s: float) -> None:
        self._ask_device_after_s = ask_device_after_s
        self.rank = dist.get_rank()
        self.thread = threading.get_ident()
        self.host, self.pid = evidence.host_id(), os.getpid()
        self._birth = evidence.birth_of(self.pid)
        self._world, self._except_port = dist.group.WORLD, except_port
        self.page = make_page()
        self.device = evidence.make_device_mark()
        #: When a wait last ended, and when anything at all moved.
        self.communicated_at_s = self.moved_at_s = time.monotonic()
        #: Marks seen up to the last look.
        self.marks = 0
        self._beat = -1
        self._moves = 0
        self._sure = True
        self._position = 0
        self._nbytes: int | None = None
        self._unmarked, self._unmarked_since_s = ("", 0), self.moved_at_s

    def look(self, clock_s: float, closely: bool) -> bool:
        """Notices moves since the last look and says whether a wait has ended; ``closely``: asks the system, too."""
        communicated = now.moves != self.marks
        moved = communicated
        if communicated:
            self.marks, self.communicated_at_s = now.moves, clock_s
        position = evidence.position_of(self.thread)
        if closely:
            nbytes = evidence.tcp_nbytes(self._except_port)
            self._sure = nbytes is not None
            if nbytes is not None and self._nbytes is not None:
                moved |= nbytes >= self._nbytes + _MOVED_NBYTES
            self._nbytes = nbytes
            moved |= position != self._position
        else:
            self._nbytes = None
        self._position = position
        if moved:
            self._moves, self.moved_at_s = self._moves + 1, clock_s
        unmarked = (evidence.torch_operation(self.thread), position)
        if unmarked != self._unmarked:
            self._unmarked, self._unmarked_since_s = unmarked, clock_s
        return communicated

    def status(self, **said: Any) -> Status:
        """This rank's next word about itself; ``said`` goes before what is seen."""
        self._beat += 1
        clock_s, waits = time.monotonic(), list(now.waits)
        status = Status(
            self.rank,
            step=now.step,
            phase=now.phase,
            module=now.module,
            parameter=now.parameter,
            op=now.op,
            nbytes=now.nbytes,
            count=now.count,
            moves=self._moves,
            sure=self._sure,
            beat=self._beat,
            host=self.host,
            pid=self.pid,
            birth=self._birth,
            page=-1 if self.page is None else self.page.descriptor,
        )
        if waits:
            first, last = waits[0], waits[-1]
            status = dataclasses.replace(
                status,
                state=State.WAITING,
                waits_for=first.op,
                detail=first.detail,
                part=last.op if last.op != first.op else "",
                group=self._ranks(first.group),
                waited_s=clock_s - max(first.since_s, self.communicated_at_s),
            )
        elif self._unmarked[0]:
            # A call of torch.distributed that nobody marked.
            waited_s = clock_s - self._unmarked_since_s
            status = dataclasses.replace(status, state=State.WAITING, waits_for=self._unmarked[0], waited_s=waited_s)
        elif self._device_is_behind(clock_s):
            waited_s = clock_s - self.communicated_at_s
            status = dataclasses.replace(
                status, state=State.WAITING, waits_for=now.op, waited_s=waited_s, on_device=True
            )
        return dataclasses.replace(status, **said)

    def _device_is_behind(self, clock_s: float) -> bool:
        """Asked late, since asking disturbs some things that devices do, and a queue is usually a step long."""
        quiet = clock_s - self.communicated_at_s >= self._ask_device_after_s
        return quiet and self.device is not None and self.device.is_behind()

    def leave_word(self, status: Status | None) -> None:
        """Puts the last word where it outlives this process and the store; ``None`` takes it back."""
        if self.page is not None:
            self.page.write_word("" if status is None else status.to_json())

    def sight(self, status: Status) -> Sight:
        return Sight(status, unmoved_s=time.monotonic() - self.moved_at_s)

    def _ranks(self, group: Any) -> tuple[int, ...]:
        """World ranks of the group, empty for the world."""
        if group is None or group is self._world:
            return ()
        return tuple(dist.get_process_group_ranks(group))


@dataclasses.dataclass
class _Track:
    """When a word of another rank was fresh, and when it last showed a move; on this process's clock."""

    first_beat: int
    beat: int = -1
    moves: int = -1
    fresh_at_s: float = 0.0
    moved_at_s: float = 0.0


class OthersView:
    """What the other ranks' words show over time."""

    def __init__(self, own: OwnView) -> None:
        self._own = own
        self._tracks: dict[int, _Track] = {}
        #: First words of ranks on this host, and their pages where those can be had.
        self._mates: dict[int, tuple[Status, Page | None]] = {}

    def forget(self) -> None:
        """Words of an earlier alarm say nothing about now."""
        self._tracks.clear()

    def meet(self, status: Status) -> None:
        """Opens the page of a rank of this host, so that it outlives that rank."""
        if status.rank not in self._mates and status.host == self._own.host and status.rank != self._own.rank:
            page = open_page(status.pid, status.page) if status.page >= 0 else None
            self._mates[status.rank] = (status, page)

    def recall(self) -> dict[int, Status]:
        """What can be known of this host's other ranks without their words."""
        return {
            rank: self._recalled(status, State.GONE if self._is_gone(status) else State.UNHEARD)
            for rank, (status, _) in self._mates.items()
        }

    def close(self) -> None:
        for _, page in self._mates.values():
            if page is not None:
                page.close()
        self._mates.clear()

    def for_report(self, sights: dict[int, Sight]) -> dict[int, Sight]:
        """These, but for ranks whose last word is an old one what their pages show."""
        old = [r for r, s in sights.items() if not s.fresh and not s.state.final and s.state is not State.STOPPED]
        recalled = {r: Sight(self._recalled(sights[r].status, State.UNHEARD)) for r in old if r in self._mates}
        return sights | recalled

    def _recalled(self, status: Status, state: State) -> Status:
        """The rank as its page shows it: by its last word, else by what it did last."""
        _, page = self._mates.get(status.rank, (None, None))
        if page is None:
            return dataclasses.replace(status, state=state)
        word = page.read_word()
        return Status.from_json(word) if word else dataclasses.replace(status, state=state, **page.read())

    def see(self, words: dict[int, Status], own: Status) -> dict[int, Sight]:
        """All ranks that ever left a word, in order; this one as it says of itself."""
        clock_s = time.monotonic()
        sights = {}
        for rank, status in sorted((words | {self._own.rank: own}).items()):
            if rank == self._own.rank:
                sights[rank] = self._own.sight(own)
                continue
            track = self._tracks.setdefault(rank, _Track(status.beat))
            if status.beat != track.beat:
                track.beat, track.fresh_at_s = status.beat, clock_s
                if status.moves != track.moves:
                    track.moves, track.moved_at_s = status.moves, clock_s
            if self._is_gone(status):
                ended = State.FINISHED if status.state is State.STOPPED else State.GONE
                status = self._recalled(status, ended)
            sights[rank] = Sight(
                status,
                unmoved_s=track.fresh_at_s - track.moved_at_s,
                silent_s=clock_s - track.fresh_at_s,
                fresh=track.beat != track.first_beat,
            )
        return sights

    def _is_gone(self, status: Status) -> bool:
        here = status.host == self._own.host and not status.state.final
        return here and evidence.is_gone(status.pid, status.birth)
