"""The doctor of this process: a thread that looks at the record, and the hooks through which a rank says good-bye.

[Note: traffic] In normal running a look costs one check of a key a second. Only when a wait lasts for ``WAITED`` of the
timeout does its rank raise an alarm, which makes all ranks leave words, and those that wait read them. An alarm that
nobody prolongs lapses.

[Note: parting] With ``env://`` or ``tcp://`` the store lives in rank 0's process unless torchrun keeps it, so words are
lost when that ends. So rank 0 stays for a moment: for others to finish, too, or to read why it goes. A rank that raised
stays so as well, whichever it is: a launcher ends the others as soon as it is gone.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import sys
import threading
import time
from types import TracebackType

import torch.distributed as dist

from ...utils.logging import logger
from . import evidence
from .board import Board
from .record import now
from .verdict import WAITED, Kind, Sight, State, Status, Verdict, all_heard, blame, judge, report
from .views import OthersView, OwnView

__all__ = ["EXIT_CODE", "Doctor"]

#: Of a process that ends because of a verdict: sysexits' "protocol error", no shell's and no signal's.
EXIT_CODE = 76

#: How long a rank stays, see [Note: parting]: as long as nobody waits, and if someone has to read.
_LINGER_S, _LINGER_FOR_READERS_S = 1.2, 4.0

#: Ends the word of an alarm whose rank waits, rather than leaves.
_WAITS = "waits"
#: Up to so many ranks, each looks at all others to find those on its host, if nothing tells.
_SMALL_WORLD = 64


class Doctor:
    """Watches the thread that makes it. See :mod:`deepspeed.comm.doctor` for what it does."""

    def __init__(self, board: Board, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._board: Board | None = board
        self._world, self._world_size = dist.group.WORLD, dist.get_world_size()
        self._own = OwnView(board.port, WAITED * timeout_s)
        self._others = OthersView(self._own)
        self._rank, self._pid = self._own.rank, self._own.pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="deepspeed-doctor", daemon=True)
        self._previous_hook = sys.excepthook
        self._complained = False
        self._unmet = _possible_mates(self._rank, self._world_size)
        self._alarm, self._alarm_at_s, self._raised_at_s = "", -timeout_s, -timeout_s
        self._warn_after_s = timeout_s
        #: This rank's last word, if it has said one.
        self._final: Status | None = None
        #: The last failed wait; and whether the program still deals with it.
        self._failure: BaseException | None = None
        self._failed_at_s, self._failing = -timeout_s, False

    # -- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Installs the hooks and starts the thread."""
        board = self._need_board()
        self._alarm = board.alarm()  # of an earlier doctor in this group: none of ours
        board.post(self._own.status())
        now.waits.clear()
        now.on, now.on_failure, now.page = True, self._on_failure, self._own.page
        now.device = self._own.device
        sys.excepthook = self._hook
        atexit.register(self._at_exit)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, gives the store's connection back and takes the hooks out."""
        now.reset()
        if sys.excepthook == self._hook:
            sys.excepthook = self._previous_hook
        atexit.unregister(self._at_exit)
        self._say(State.STOPPED)
        self._end_thread()

    @property
    def serves_this_group(self) -> bool:
        """Whether this process and its default group are those that the doctor was made for."""
        return self._pid == os.getpid() and dist.is_initialized() and dist.group.WORLD is self._world

    def _end_thread(self) -> None:
        self._stop.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            # It ends at once, but for a store that answers late. Python must not end while it is in torch's code.
            self._thread.join(timeout=2.0)
        board, self._board = self._board, None
        if board is not None:
            board.close()
        self._others.close()
        if self._own.page is not None:
            self._own.page.close()

    def _need_board(self) -> Board:
        """The board, if it can still be used."""
        board = self._board
        if board is None or not board.is_open():
            raise ConnectionError("the rendezvous store is gone")
        return board

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        # Not so often that a large world keeps rank 0's store busy, see [Note: traffic].
        period_s = max(min(1.0, self.timeout_s / 10), self._world_size / 1000)
        pause_s = min(0.05, period_s)  # soon, to meet those that start at the same time
        while not self._stop.wait(pause_s):
            pause_s = min(2 * pause_s, period_s / 2 if self._is_alarm() else period_s)
            try:
                if not self.serves_this_group:
                    break
                self._look()
            except ConnectionError as error:
                logger.debug(f"the hang doctor ends: {error}")
                break
            except Exception as error:  # whatever it is: it must not hurt the training
                if not self._complained:
                    logger.debug(f"the hang doctor's look failed: {type(error).__name__}: {error}")
                self._complained = True

    def _look(self) -> None:
        clock_s = time.monotonic()
        if self._own.look(clock_s, closely=self._is_alarm()):
            self._warn_after_s = self.timeout_s
            if self._failing:  # the program has dealt with the failed wait, and goes on
                self._failing = False
                self._own.leave_word(None)
        board = self._need_board()
        if self._unmet:
            self._meet(board)
        if self._final is not None or self._failing:
            return
        status = self._own.status()
        if status.state is State.WAITING and status.waited_s >= WAITED * self.timeout_s:
            self._raise_alarm(clock_s)
        word = board.alarm()
        if word != self._alarm:
            if not self._is_alarm():
                self._others.forget()
            self._alarm, self._alarm_at_s = word, clock_s
        if not self._is_alarm():
            return
        board.post(status)
        if status.state is State.WAITING:
            self._judge(board, status)
        else:
            self._tell_slowness(clock_s)

    def _meet(self, board: Board) -> None:
        """Once, when all ranks have started: learns who runs on this host."""
        for rank in list(self._unmet):
            status = board.read(rank)
            if status is None:
                return
            self._others.meet(status)
            self._unmet.remove(rank)

    def _is_alarm(self) -> bool:
        return time.monotonic() - self._alarm_at_s < self.timeout_s

    def _raise_alarm(self, clock_s: float) -> None:
        if clock_s - self._raised_at_s >= self.timeout_s / 4:
            self._raised_at_s = clock_s
            self._need_board().raise_alarm(f"{self._rank} {clock_s} {_WAITS}")

    def _judge(self, board: Board, status: Status) -> None:
        text = self._published(board, status)
        if text:
            self._leave(text)
        sights = self._others.see(board.read_all(), status)
        verdict = judge(sights, self._world_size, self.timeout_s)
        if verdict.kind.fatal:
            self._leave(self._publish(board, verdict, sights))
        elif verdict.kind is Kind.NOTHING or verdict.waiting[0] != self._rank:
            return
        elif status.waited_s >= self._warn_after_s:
            self._warn_after_s *= 2
            logger.warning(report(verdict, sights, self._world_size, self.timeout_s))

    def _published(self, board: Board, own: Status) -> str:
        """Another rank's verdict; empty if there is none, or if this rank has moved since."""
        verdict = json.loads(board.verdict() or "{}")
        return str(verdict["text"]) if verdict.get("moves", {}).get(str(self._rank)) == own.moves else ""

    def _publish(self, board: Board, verdict: Verdict, sights: dict[int, Sight]) -> str:
        """Leaves the verdict for the others, who follow it if they have not moved since, and returns its text."""
        text = report(verdict, self._others.for_report(sights), self._world_size, self.timeout_s)
        moves = {str(rank): sight.status.moves for rank, sight in sights.items()}
        board.publish(json.dumps({"text": text, "moves": moves}))
        return text

    def _tell_slowness(self, clock_s: float) -> None:
        """Others wait, and this rank computes: says so on this rank, with the place, ever less often."""
        idle_s = clock_s - self._own.communicated_at_s
        if idle_s < self._warn_after_s or not self._alarm.endswith(_WAITS):
            return
        self._warn_after_s *= 2
        logger.warning(
            f"hang doctor: other ranks wait for rank {self._rank}, which has been busy for {idle_s:.1f} s since its "
            f"last collective, #{now.count} {now.op or 'none'} (step {now.step}, phase {now.phase or '-'}, module "
            f"{now.module or '-'}). Nothing is ended. Its main thread is at\n" + evidence.stack_of(self._own.thread)
        )

    def _leave(self, text: str) -> None:
        """Prints the verdict and ends the process, unless it has moved in this very moment."""
        if now.moves != self._own.marks or self._failing or self._stop.is_set():
            return
        text += f"\nRank {self._rank} exits with code {EXIT_CODE}. Its main thread is at\n"
        logger.critical(text + evidence.stack_of(self._own.thread))
        self._say(State.LEAVING)
        self._linger(_LINGER_FOR_READERS_S)
        # The others' waits would raise as soon as this process is gone; so they get the time to read the same verdict.
        time.sleep(min(1.0, self.timeout_s / 10))
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(EXIT_CODE)

    # -- last words --------------------------------------------------------------------------------------------------

    def _say(self, state: State, error: str = "", consequence: bool = False) -> None:
        """Leaves this rank's last word; if it has said one, that stays."""
        if self._final is not None:
            return
        self._final = self._own.status(state=state, error=error, consequence=consequence)
        self._own.leave_word(self._final)
        try:
            self._need_board().post(self._final)
        except Exception as failed:  # the store may be gone already: nobody is left to read it then
            logger.debug(f"the hang doctor could not leave a last word: {failed}")

    def _linger(self, longest_s: float, anyone: bool = False) -> None:
        """Waits for the others' last words, see [Note: parting]; ``anyone``: not only the rank that has the store."""
        hosts = self._board is not None and self._board.in_rank_0 and self._rank == 0
        if not (hosts or anyone) or self._final is None:
            return
        start_s, pause_s = time.monotonic(), 0.02 + self._world_size / 1000
        try:
            while time.monotonic() - start_s < longest_s:
                board = self._need_board()
                sights = self._others.see(board.read_all(), self._final)
                if len(sights) == self._world_size and all(s.state.final for s in sights.values()):
                    return
                if not hosts and board.in_rank_0 and sights[0].state.final:
                    return  # the store goes any moment
                if any(s.state is State.WAITING for s in sights.values()):
                    longest_s = max(longest_s, _LINGER_FOR_READERS_S)
                if time.monotonic() - start_s > 0.25:  # no alarm at the usual end, all ranks at nearly the same time
                    board.raise_alarm(f"{self._rank} {time.monotonic()}")
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.2 + self._world_size / 500)
        except Exception as error:
            logger.debug(f"the hang doctor did not wait for the other ranks: {error}")

    def raised(self, error: BaseException) -> None:
        """Tells the other ranks that this one has left its program with ``error``."""
        self._say(State.RAISED, _text_of(error), consequence=self._failure in _chain(error))
        try:
            self._need_board().raise_alarm(f"{self._rank} {time.monotonic()}")
        except Exception as failed:
            logger.debug(f"the hang doctor could not raise an alarm: {failed}")
        if not isinstance(error, KeyboardInterrupt):
            self._linger(_LINGER_FOR_READERS_S, anyone=True)

    def finished(self) -> None:
        """Tells the other ranks that this one's program has ended, and ends the doctor."""
        now.reset()
        if self._final is None:
            self._say(State.FINISHED)
            self._linger(_LINGER_S)
        self._end_thread()

    def _hook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._previous_hook(kind, error, trace)
        if self._pid == os.getpid():
            self.raised(error)

    def _at_exit(self) -> None:
        if self._pid == os.getpid():
            self.finished()

    # -- failed waits ------------------------------------------------------------------------------------------------

    def _on_failure(self, error: BaseException) -> None:
        """A wait has failed. If that is because of another rank, explains it before the exception goes its way."""
        clock_s = time.monotonic()
        if self._final is not None or not _is_about_peers(error):
            return
        if self._failing or clock_s - self._failed_at_s < self.timeout_s:
            return  # what follows from a failure, e.g. of the other operations in flight
        self._failure, self._failed_at_s, self._failing = error, clock_s, True
        own = self._own.status(state=State.RAISED, error=_text_of(error), consequence=True)
        self._own.leave_word(own)
        try:
            text = self._explain(own)
        except Exception as failed:
            logger.debug(f"the hang doctor cannot ask why a collective failed: {failed}")
            text = self._lonely_report(own)
        logger.critical(text)

    def _explain(self, own: Status) -> str:
        board = self._need_board()
        board.post(own)
        board.raise_alarm(f"{self._rank} {time.monotonic()}")
        deadline_s = time.monotonic() + min(_LINGER_FOR_READERS_S, self.timeout_s)
        while True:
            text = self._published(board, own)
            if text:
                return text
            sights = self._others.see(board.read_all(), own)
            verdict = blame(sights)
            known = not sights[verdict.ranks[0]].status.consequence and all_heard(sights, self.timeout_s)
            if known or time.monotonic() > deadline_s:
                return self._publish(board, verdict, sights)
            time.sleep(0.1)

    def _lonely_report(self, own: Status) -> str:
        """All that this rank can say without the store."""
        deadline_s = time.monotonic() + 1.0
        while True:
            # Connections close a moment before a process that was killed has ended.
            statuses = self._others.recall()
            known = any(s.state.final and not s.consequence for s in statuses.values())
            if known or time.monotonic() > deadline_s:
                break
            time.sleep(0.02)
        statuses[self._rank] = own
        if self._board is not None and self._board.in_rank_0 and self._rank and 0 not in statuses:
            statuses[0] = Status(0, State.GONE)
        sights = {rank: Sight(status) for rank, status in sorted(statuses.items())}
        return report(blame(sights), sights, self._world_size, self.timeout_s) + (
            "\n(The rendezvous store is gone, and the other ranks' words with it.)"
        )


def _possible_mates(rank: int, world_size: int) -> list[int]:
    """Ranks that may run on this host: by what launchers say, or all of a small world."""
    local_rank = os.environ.get("LOCAL_RANK", "")
    local_size = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", ""))
    first, last = 0, world_size
    if local_rank.isdecimal() and local_size.isdecimal():
        first = max(0, rank - int(local_rank))
        last = min(world_size, first + int(local_size))
    elif world_size > _SMALL_WORLD:
        return []
    return [other for other in range(first, last) if other != rank]


def _is_about_peers(error: BaseException) -> bool:
    """Whether the transport failed, rather than the call's arguments or this rank's code."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "Connection" in str(error))


def _text_of(error: BaseException) -> str:
    """``"Type: first line"`` without the place in gloo's source, short enough for a table."""
    first = re.sub(r"^\[\S+\] ", "", str(error)).partition("\n")[0].partition(". This is typically")[0]
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return text if len(text) <= 100 else text[:97] + "..."


def _chain(error: BaseException | None) -> list[BaseException]:
    """The exception and those that led to it."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
