"""Which plan of gathers is in force, and following it.

At first the units are expected in the order in which the model holds them. The first training iteration records the true
order of uses (as the first evaluation pass does, for those); when all ranks have recorded the same, they adopt the plan
made from it (:mod:`deepspeed._core.params.planner`). When all ranks leave a plan in the same way later, which they learn
with the gradient norm of a step, they adopt the one of that step.

A rank that skips a use gathers for it all the same, because the others wait for its shard. Uses outside of the plan are
gathered on demand, which is right as long as all ranks do so. Hence ranks may differ in what they use of the plan, and
not in what they use beyond it.

[Note: the clock] Gradients are reduced while other parameters are gathered, and all ranks must mix the two in the same way,
or each may wait for what the other does later. The plan's position in the backward is the clock of that: a bucket of
gradients is sent, complete or not, when the clock reaches the point at which its last gradient was seen when the order
was recorded, the latest on any rank.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from deepspeed import comm as dist
from deepspeed._core.params.handle import ParamHandle
from deepspeed._core.params.planner import Budget, Plan, make_plan
from deepspeed._core.params.units import Unit
from deepspeed.utils.logging import log_dist, logger

__all__ = ["PlanBook", "Run", "Trace"]


@dataclass
class Trace:
    """Uses of units in order: a forward pass and the backward of it."""

    forward: list[int] = field(default_factory=list)
    until: list[int] = field(default_factory=list)
    """By forward use, the last one that began before it ended."""
    backward: list[int] = field(default_factory=list)
    ready: dict[int, int] = field(default_factory=dict)
    """By parameter, how many uses had begun backward when its gradient was complete."""

    def begin(self, unit: int) -> int:
        """A unit begins forward; returns the use's place."""
        self.forward.append(unit)
        self.until.append(len(self.until))
        return len(self.forward) - 1

    def end(self, place: int) -> None:
        """That use ends."""
        self.until[place] = len(self.forward) - 1


class Follower(Protocol):
    """Who carries out a plan; all parameters are given by their ids."""

    def start_planned(self, ids: Sequence[int]) -> None:
        """Gathers these together, whatever is there already. Collective."""

    def let_go(self, ids: Iterable[int]) -> None:
        """Releases these, now or when nobody holds them any more."""

    def keep(self, ids: Iterable[int]) -> bool:
        """Holds these, if there is room for what was gathered and not used; tells whether."""

    def unkeep(self, ids: Iterable[int]) -> None:
        """Ends that."""

    def read_ahead(self, ids: Iterable[int], ticket: int) -> bool:
        """Begins to read the shards of these for use ``ticket`` where they rest elsewhere; False if there is no room."""

    def forget_ahead(self, before: int) -> None:
        """Gives up what was read for earlier uses."""


class Run:
    """Follows one phase of a plan by position.

    What a rank skips stays for a while, in case that it only comes later than planned: then the data is there, and the
    other ranks need not know. ``tick`` is called with the number of uses of the phase that come before what comes now.
    """

    def __init__(
        self, plan: Plan, begin: int, end: int, owner: Follower, tick: Callable[[int], None] | None = None
    ) -> None:
        self._tick = tick
        self._plan, self._begin, self._at, self._end, self._owner = plan, begin, begin, end, owner
        self._settled = begin
        self._live: set[int] = set()
        for position in range(begin):
            self._live.update(i for group in plan.issue[position] for i in group)
            self._live.difference_update(plan.release[position])
        self._skipped: dict[int, list[int]] = {}
        self._ahead = begin
        """All shards for uses before this one are being read."""
        self.deviated = False

    def advance(self, unit: int) -> int | None:
        """Issues all gathers up to the unit's next use and those ahead of it; None if the plan has no such use."""
        if self._skipped.get(unit):
            position = self._skipped[unit].pop()
            self._owner.unkeep(self._plan.release[position])
            return position
        found = next((p for p in range(self._at, self._end) if self._plan.uses[p] == unit), None)
        if found is None:
            self.deviated = True
            return None
        self._serve(found)
        self._issue(found)
        return found

    def has(self, param: int) -> bool:
        """Whether the plan counts on this parameter's being whole now; others may go."""
        return param in self._live

    def settle(self) -> None:
        """Releases what the plan releases with the uses so far, as far as nobody holds it."""
        while self._settled < self._at:
            released = self._plan.release[self._settled]
            self._settled += 1
            self._live.difference_update(released)
            self._owner.let_go(released)

    def complete(self) -> None:
        """Issues what is left, for the ranks that do use it."""
        self._serve(self._end)
        if self._tick is not None:
            self._tick(self._end - self._begin)
        for positions in self._skipped.values():
            for position in positions:
                self._owner.unkeep(self._plan.release[position])
        self.settle()

    def _serve(self, end: int) -> None:
        while self._at < end:
            self.deviated = True
            position = self._at
            self._issue(position)
            if self._owner.keep(self._plan.release[position]):
                self._skipped.setdefault(self._plan.uses[position], []).append(position)

    def _issue(self, position: int) -> None:
        if self._tick is not None:
            self._tick(position - self._begin)
        self.settle()
        self._at = position + 1
        for group in self._plan.issue[position]:
            self._live.update(group)
            self._owner.start_planned(group)
        self._read_ahead()

    def _read_ahead(self) -> None:
        """Shards that rest on a disk are read in the order of the plan, as far as there are buffers; no communication."""
        self._owner.forget_ahead(self._at)
        self._ahead = max(self._ahead, self._at)
        while self._ahead < len(self._plan.issue):
            ids = [i for group in self._plan.issue[self._ahead] for i in group]
            if not self._owner.read_ahead(ids, self._ahead):
                return
            self._ahead += 1


class PlanBook:
    """The plans in force, with gradients and without."""

    def __init__(self, handles: Sequence[ParamHandle], budget: Budget) -> None:
        self._handles = list(handles)
        self._budget = budget
        self.plans: dict[bool, Plan | None] = {True: None, False: None}
        """By whether gradients are wanted."""
        self.recorded = {True: False, False: False}
        """Whether the plan comes from a recorded order."""
        self.ready: dict[int, int] = {}
        """By trained parameter, when its gradient is complete in a backward of the plan; see [Note: the clock]."""
        self._tried = False
        self._latest: tuple[Trace, int] | None = None
        self.deviated = False
        """Whether this rank left the plan of training since the last step."""
        self.talkative = False
        """``log_trace_cache_warnings``."""

    def expect(self, units: Sequence[Unit]) -> None:
        """Forgets what was recorded, and plans for ``units`` in the order in which their modules are held."""
        self._tried, self._latest, self.deviated = False, None, False
        self.recorded = {True: False, False: False}
        for grad in (True, False):
            trace = expected_trace(units)
            if not grad:
                trace.backward = []
            else:
                self.ready = expected_ready(trace, units, self._trained())
            self.plans[grad] = self._plan(trace, units)

    def end_iteration(self, trace: Trace, units: Sequence[Unit]) -> None:
        """A forward and its backward are over. The first time, adopts their order if it is the same on all ranks.

        Collective the first time.
        """
        self._latest = (trace, self._digest(trace, units))
        if self._tried:
            return
        self._tried = True
        if self._same_on_all_ranks(self._latest[1]):
            self.adopt(units)
            return
        log_dist(
            "ZeRO-3: ranks use modules in different orders, so that all of them gather every module in the order of the "
            "model. Modules whose parts are used as the data wants can be marked as one unit with "
            "deepspeed.utils.set_z3_leaf_modules",
            level=logging.WARNING,
        )

    def adopt(self, units: Sequence[Unit]) -> None:
        """Plans by the order of the last iteration, which all ranks must have in common. Collective."""
        if self._latest is None:
            raise AssertionError("a plan is to be adopted, and no iteration was recorded; please report this")
        trace = self._latest[0]
        trained = self._trained()
        seen = self._latest_on_any_rank([trace.ready.get(handle.id, -1) for handle in trained])
        guess = expected_ready(trace, units, trained)
        self.ready = {h.id: guess[h.id] if at < 0 else at for h, at in zip(trained, seen, strict=True)}
        self.plans[True] = self._plan(trace, units)
        self.recorded[True] = True
        self.deviated = False
        self._say(True)

    def end_evaluation(self, trace: Trace, units: Sequence[Unit]) -> None:
        """A pass without gradients is over: adopts its order if it is the same on all ranks. Collective until then."""
        if not self.recorded[False] and self._same_on_all_ranks(self._digest(trace, units)):
            self.plans[False] = self._plan(trace, units)
            self.recorded[False] = True
            self._say(False)

    def flags(self) -> list[float]:
        """What the sum over ranks must tell :meth:`same_deviation`; forgets that this rank deviated."""
        if not self.deviated or self._latest is None:
            return [0.0, 0.0, 0.0]
        self.deviated = False
        if self.talkative:
            logger.warning("ZeRO-3: this rank used modules in another order than before, or not all of them")
        digest = float(self._latest[1] % (1 << 20))  # squares and their sums over ranks stay exact
        return [1.0, digest, digest * digest]

    @staticmethod
    def same_deviation(sums: Sequence[float], world_size: int) -> bool:
        """Whether all ranks left the plan, and in the same way."""
        return sums[0] == world_size and world_size * sums[2] == sums[1] * sums[1]

    def _plan(self, trace: Trace, units: Sequence[Unit]) -> Plan:
        uses = trace.forward + trace.backward
        until = trace.until + list(range(len(trace.forward), len(uses)))
        alive = [handle for handle in self._handles if handle.alive]
        numels = {handle.id: handle.numel for handle in alive}
        pinned = frozenset(handle.id for handle in alive if handle.param.requires_grad)
        members = _members(uses, units)
        return make_plan(uses, len(trace.forward), members, numels, self._budget, pinned, until)

    @staticmethod
    def _digest(trace: Trace, units: Sequence[Unit]) -> int:
        members = _members(trace.forward + trace.backward, units)
        return zlib.crc32(repr((trace.forward, trace.until, trace.backward, members)).encode())

    def _trained(self) -> list[ParamHandle]:
        return [handle for handle in self._handles if handle.alive and handle.param.requires_grad]

    def _same_on_all_ranks(self, value: int) -> bool:
        high, low = self._latest_on_any_rank([value, -value])
        return high == -low

    def _latest_on_any_rank(self, values: list[int]) -> list[int]:
        """The largest of each over the ranks. Collective."""
        transport = self._handles[0].transport if self._handles else None
        if transport is None or transport.world_size == 1:
            return values
        largest = torch.tensor(values, dtype=torch.int64, device=self._handles[0].device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=transport.group)
        found: list[int] = largest.tolist()
        return found

    def _say(self, grad: bool) -> None:
        plan = self.plans[grad]
        if plan is None:
            return
        said = (
            f"ZeRO-3: the order of modules in {'training' if grad else 'evaluation'} is known: {len(plan.uses)} uses, "
            f"{plan.gathers} gathers, at most {plan.peak_live} elements at a time"
        )
        if self.talkative:
            log_dist(said, level=logging.WARNING)
        else:
            logger.debug(said)


def _members(uses: Sequence[int], units: Sequence[Unit]) -> dict[int, list[int]]:
    return {i: [h.id for h in units[i].members if not h.persistent] for i in sorted(set(uses))}


def expected_trace(units: Sequence[Unit]) -> Trace:
    """The order of uses if modules run in the order in which they are held, each once. Pure.

    ``units``: parents before children. Backward begins with a parent, too: with its output.
    """
    known = [unit for unit in units if unit.parent is None and (unit.members or not unit.name)]
    trace = Trace()

    def visit(begin: int, end: int) -> list[int]:
        """Records units ``begin`` to ``end`` forward; returns their backward order."""
        backward: list[int] = []
        while begin < end:
            unit = known[begin]
            inside = f"{unit.name}." if unit.name else ""
            stop = begin + 1
            while stop < end and known[stop].name.startswith(inside):
                stop += 1
            place = trace.begin(unit.index)
            backward = [unit.index, *visit(begin + 1, stop), *backward]
            trace.end(place)
            begin = stop
        return backward

    trace.backward = visit(0, len(known))
    return trace


def expected_ready(trace: Trace, units: Sequence[Unit], trained: Sequence[ParamHandle]) -> dict[int, int]:
    """When gradients are complete by the structure of the model: how many uses have begun backward by then. Pure.

    A unit's own are, when the last of the units inside it has run. Parameters of modules that are no units come after those
    of the next module in the order of the model. ``trained``: in that order.
    """
    ready: dict[int, int] = {}
    for position, index in enumerate(trace.backward):
        unit, end = units[index], position + 1
        inside = f"{unit.name}." if unit.name else ""
        while end < len(trace.backward) and units[trace.backward[end]].name.startswith(inside):
            end += 1
        for handle in unit.completes:
            ready[handle.id] = max(end, ready.get(handle.id, 0))
    latest = 0
    for handle in reversed(trained):
        latest = ready.setdefault(handle.id, latest)
    return ready
