"""What the ranks' words mean together: statuses in, verdict and text out. No threads, stores, clocks or processes.

[Note: what is fatal] A verdict ends processes, so it needs a proof that waiting cannot help:

- *Lost peer*: a rank waits, unmoved, for a group in which one has raised out of its program, finished, or is gone.
- *Deadlock*: every rank that is left waits, none has moved for a while (no operation, no Python code, no bytes on its TCP
  connections), and they do not all wait for the same: operations that do not match can never complete.

A rank that computes may come. All ranks in the same operation may have a slow network. A device's queue may hold long
computations before the operation that it has not finished. None of these is ended, only named.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections import Counter
from collections.abc import Mapping

__all__ = ["WAITED", "Kind", "Sight", "State", "Status", "Verdict", "all_heard", "blame", "judge", "report"]

#: The share of the timeout after which a wait is long: an alarm is raised then.
WAITED = 0.4

_UNEVEN = ("all_to_all", "all_to_all_single", "gather", "scatter", "broadcast_object_list", "gather_object")
_PAIRWISE = ("recv", "irecv", "send", "isend", "batch_isend_irecv")
_PHASES = ("forward", "backward", "step")


class State(str, enum.Enum):
    """What a rank says of itself, or others say of it. The last four are final: no collective of its will follow."""

    WAITING = "waiting"
    COMPUTING = "computing"
    #: Its doctor was stopped, so nobody can tell.
    STOPPED = "stopped"
    #: Said by others: it lives, and more is not known.
    UNHEARD = "unheard"
    RAISED = "raised"
    FINISHED = "finished"
    #: It has read a verdict and is about to exit.
    LEAVING = "leaving"
    #: Said by others: its process has ended without a word.
    GONE = "gone"

    @property
    def final(self) -> bool:
        return self in (State.RAISED, State.FINISHED, State.LEAVING, State.GONE)


@dataclasses.dataclass(frozen=True)
class Status:
    """One rank's word about itself."""

    rank: int
    state: State = State.COMPUTING
    #: See :class:`deepspeed.comm.doctor.record.Now`.
    step: int = -1
    phase: str = ""
    module: str = ""
    parameter: str = ""
    op: str = ""
    nbytes: int = 0
    count: int = 0
    #: While waiting: for which operation, what it is about (the same on all its ranks), in which part of it, world ranks
    #: of its group (empty: all), and since when.
    waits_for: str = ""
    detail: str = ""
    part: str = ""
    group: tuple[int, ...] = ()
    waited_s: float = 0.0
    #: Whether it is the device that has not come to the end of an operation; it may still compute before that.
    on_device: bool = False
    #: Changes whenever the rank was seen to move; ``sure``: moving bytes would have been seen, too.
    moves: int = 0
    sure: bool = True
    #: Grows with every word, so that others know it is fresh.
    beat: int = 0
    #: Of a rank that raised: ``"Type: message"``; and whether that only followed from another rank's end.
    error: str = ""
    consequence: bool = False
    host: str = ""
    pid: int = 0
    birth: int = 0
    #: File descriptor of its page, see :mod:`deepspeed.comm.doctor.blackbox`; -1 if it has none.
    page: int = -1

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Status:
        values = json.loads(text)
        values["state"], values["group"] = State(values["state"]), tuple(values["group"])
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class Sight:
    """A rank as another sees it."""

    status: Status
    #: How long the rank has been seen not to move, up to its last word.
    unmoved_s: float = 0.0
    #: Age of its last word: of a rank that answers, never much more than its doctor's period.
    silent_s: float = 0.0
    #: Whether its last word is known to be of the present alarm.
    fresh: bool = True

    @property
    def state(self) -> State:
        return self.status.state


class Kind(enum.Enum):
    NOTHING = "nothing to say yet"
    LOST_PEER = "a rank that others wait for will not come"
    DEADLOCK = "the ranks wait for different things, none of which can happen"
    SLOW = "some ranks compute while others wait for them"
    SILENT = "some ranks do not answer"
    STALLED = "all ranks wait, but it is not certain that they always will"

    @property
    def fatal(self) -> bool:
        return self in (Kind.LOST_PEER, Kind.DEADLOCK)


@dataclasses.dataclass(frozen=True)
class Verdict:
    kind: Kind
    #: Whom it is about: the lost, slow or silent ranks; in a deadlock those that differ from the majority.
    ranks: tuple[int, ...] = ()
    #: Ranks that wait.
    waiting: tuple[int, ...] = ()


def judge(sights: Mapping[int, Sight], world_size: int, timeout_s: float) -> Verdict:
    """The verdict over the ranks' words; ``sights`` lacks ranks that never said one. See [Note: what is fatal].

    ``timeout_s`` is the time within which a hang is to be reported. Of it a tenth counts as unmoved for ranks that wait
    for a lost one; in a deadlock all must have waited for ``WAITED`` of it, unmoved for the last fifth, or for all of it
    where nobody could have seen bytes move.
    """
    silent_after_s = max(1.0, timeout_s / 2)
    waiting = tuple(r for r, s in sights.items() if s.state is State.WAITING)
    lost = [r for r, s in sights.items() if s.state.final]
    for rank in waiting:
        awaited = [r for r in lost if not sights[rank].status.group or r in sights[rank].status.group]
        settled_s = timeout_s if sights[rank].status.on_device else timeout_s / 10
        if awaited and sights[rank].unmoved_s >= settled_s and all_heard(sights, timeout_s):
            return blame(sights)
    if not waiting:
        return Verdict(Kind.NOTHING)
    left = [r for r in range(world_size) if r not in lost]
    answering = (State.WAITING, State.COMPUTING)
    silent = tuple(
        r for r in left if r not in sights or (sights[r].state in answering and sights[r].silent_s > silent_after_s)
    )
    if silent:
        return Verdict(Kind.SILENT, silent, waiting)
    slow = tuple(r for r in left if r not in waiting)
    if slow:
        return Verdict(Kind.SLOW, slow, waiting)
    if _agree([sights[r].status for r in waiting]) or any(sights[r].status.on_device for r in waiting):
        return Verdict(Kind.STALLED, (), waiting)
    sure = all(sights[r].status.sure for r in waiting)
    unmoved = all(sights[r].unmoved_s >= (timeout_s / 5 if sure else timeout_s) for r in waiting)
    waited = all(sights[r].status.waited_s >= WAITED * timeout_s for r in waiting)
    if unmoved and waited:
        return Verdict(Kind.DEADLOCK, _minority(sights, waiting), waiting)
    return Verdict(Kind.NOTHING, (), waiting)


def all_heard(sights: Mapping[int, Sight], timeout_s: float) -> bool:
    """Whether each rank has said what it does now, or had time enough to."""
    return all(s.fresh or s.state.final or s.silent_s >= 0.3 * timeout_s for s in sights.values())


def blame(sights: Mapping[int, Sight]) -> Verdict:
    """The verdict that the lost ranks are at fault: of them those that did not merely follow, and of these rather
    those that raised than those that just ended."""
    lost = [r for r, s in sights.items() if s.state.final]
    first = [r for r in lost if not sights[r].status.consequence and sights[r].state is not State.LEAVING]
    first = first or [r for r, s in sights.items() if s.state is State.STOPPED]
    raised = [r for r in first if sights[r].state is State.RAISED]
    waiting = tuple(r for r, s in sights.items() if s.state is State.WAITING)
    return Verdict(Kind.LOST_PEER, tuple(raised or first or lost), waiting)


def _agree(statuses: list[Status]) -> bool:
    """Whether these waits can be one operation: a pair's two ends cannot both be, say, receives."""
    return len({_operation(s) for s in statuses}) == 1 and not statuses[0].waits_for.startswith(_PAIRWISE)


def _operation(status: Status) -> tuple[object, ...]:
    nbytes = 0 if status.op in _UNEVEN else status.nbytes
    return status.count, status.op, nbytes, status.waits_for, status.detail, status.group


def _minority(sights: Mapping[int, Sight], ranks: tuple[int, ...]) -> tuple[int, ...]:
    """Those whose operation is not that of more than half of the ranks; all of them if there is no such majority."""
    operations = {r: _operation(sights[r].status) for r in ranks}
    common, size = Counter(operations.values()).most_common(1)[0]
    return tuple(r for r in ranks if operations[r] != common) if 2 * size > len(ranks) else ranks


# -- the report --------------------------------------------------------------------------------------------------------


def report(verdict: Verdict, sights: Mapping[int, Sight], world_size: int, timeout_s: float) -> str:
    """What is said to the user: a headline, one line a rank, the last common step, who differs, and a hint."""
    rows: list[tuple[str, ...]] = [("rank", "state", "step", "phase", "last collective", "module", "parameter")]
    rows += [_row(rank, sights.get(rank), rank in verdict.ranks) for rank in range(world_size)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = f"hang doctor: {_headline(verdict, sights)}"
    tail = [f"last common step: {_common_step(sights, world_size)}"]
    if verdict.kind.fatal:
        tail.append("hint: " + _hint(verdict, sights))
    else:
        tail.append(
            f"Nothing is ended: this may be right, and is said again in twice the time. DS_HANG_TIMEOUT_S "
            f"(now {timeout_s:g} s, 0 = off) sets when it is said first."
        )
    return "\n".join([head, *lines, *tail])


def _common_step(sights: Mapping[int, Sight], world_size: int) -> str:
    steps = [s.status.step for s in sights.values() if s.status.step >= 0]
    if not steps:
        return "unknown"
    return str(min(steps)) if len(steps) == world_size else f"at most {min(steps)}"


def _row(rank: int, sight: Sight | None, marked: bool) -> tuple[str, ...]:
    mark = "  <--" if marked else ""
    if sight is None:
        return (str(rank), "no word" + mark, "?", "?", "?", "?", "?")
    status, state = sight.status, sight.state.value
    if sight.state is State.WAITING:
        inside = f" in {status.waits_for}" if status.waits_for else ""
        inside += " on the device" if status.on_device else ""
        inside += f", now in {status.part}" if status.part else ""
        state = f"waiting {status.waited_s:.1f} s{inside}{f' ({status.detail})' if status.detail else ''}"
    elif sight.state is State.RAISED:
        state = f"raised {status.error}"
    elif sight.state is State.GONE:
        state = "gone (its process has ended without a word)"
    elif sight.state is State.STOPPED:
        state = "stopped (its engine was destroyed)"
    elif sight.state is State.UNHEARD:
        state = "alive, but not heard"
    unknown = "unknown" if sight.state in (State.GONE, State.UNHEARD) else "none"
    last = f"#{status.count} {status.op} {_size(status.nbytes)}" if status.count else unknown
    step = str(status.step) if status.step >= 0 else "-"
    return (str(rank), state + mark, step, status.phase or "-", last, status.module or "-", status.parameter or "-")


def _size(nbytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes} B"


def _names(ranks: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _headline(verdict: Verdict, sights: Mapping[int, Sight]) -> str:
    who, waiting = _names(verdict.ranks), _names(verdict.waiting)
    wait = "waits" if len(verdict.waiting) == 1 else "wait"
    if verdict.kind is Kind.LOST_PEER:
        first = sights[verdict.ranks[0]]
        one = len(verdict.ranks) == 1
        what = {
            State.RAISED: f"raised {first.status.error}",
            State.FINISHED: "has finished" if one else "have finished",
            State.LEAVING: "left",
            State.STOPPED: "stopped",
        }.get(first.state, "is gone" if one else "are gone")
        return f"{who} {what}" + (f"; {waiting} {wait} for {'it' if one else 'them'}" if verdict.waiting else "")
    if verdict.kind is Kind.DEADLOCK:
        if len(verdict.ranks) < len(verdict.waiting):
            return f"deadlock: all ranks wait, and {who} for something else than the others"
        return "deadlock: all ranks wait, not for the same"
    if verdict.kind is Kind.SLOW:
        return f"{waiting} {wait} for {who}, busy with something else"
    if verdict.kind is Kind.SILENT:
        return (
            f"{waiting} {wait}, and there is no answer from {who}: stopped, unreachable, or in one long call that "
            "keeps Python's lock"
        )
    if _agree([sights[r].status for r in verdict.waiting]):
        return "all ranks wait for the same operation, and nothing moves: a slow or broken network?"
    return "all ranks wait, not for the same, and a device has not finished its operation"


def _hint(verdict: Verdict, sights: Mapping[int, Sight]) -> str:
    who = _names(verdict.ranks)
    if verdict.kind is Kind.LOST_PEER:
        state = sights[verdict.ranks[0]].state
        if state is State.RAISED:
            return f"the traceback of {who} tells the cause."
        if state is State.FINISHED:
            return (
                f"{who} left the program while others went on: do all ranks see the same number of batches "
                "(drop_last, a DistributedSampler), and leave the loop at the same step?"
            )
        return (
            f"{who} was ended from outside (out of memory, a signal) or crashed: see the end of its output. gloo ends "
            "a process whose collective meets one of another size; then compare the ranks' last collectives."
        )
    if len({sights[r].status.step for r in verdict.waiting}) > 1:
        return (
            "the ranks are at different steps: do all see the same number of batches, and does each call the same "
            "collectives a step?"
        )
    outside = [r for r in verdict.waiting if sights[r].status.phase not in _PHASES]
    if 0 < len(outside) < len(verdict.waiting):
        gather = "gathers" if len(outside) == 1 else "gather"
        return (
            f"{_names(tuple(outside))} {gather} alone: state_dict of partitioned parameters, GatheredParameters and "
            "engine.save_checkpoint are collective; call them on every rank, and only then write on one."
        )
    return (
        "the ranks ran different modules, or in different order: with data-dependent control flow, "
        "deepspeed.utils.set_z3_leaf_modules makes a module's parameters travel as one."
    )
