"""When to gather which parameter and when to let go: one pure plan from an agreed order of uses.

A *use* is a unit (see :mod:`deepspeed._core.params.units`) running forward or backward. The plan says, for each use,
what to gather when it begins (its own missing parameters first, then those of the uses after it, within a budget) and
what to release when it ends. All ranks compute the same plan from the same trace, and follow it by position, so that a rank
that skips a use gathers all the same, and none is left waiting.

A use may contain others (a module with parameters of its own around its children): its parameters stay until the last
of them has ended. A parameter with a gradient that several uses share stays from the first to the last of them in
backward, because only the last one completes the gradient, which is what tells that nobody needs the data any more.

Source: the keys ``stage3_max_live_parameters``, ``stage3_max_reuse_distance`` and ``stage3_prefetch_bucket_size`` of the
configuration document; Belady's rule for what to drop when the budget is short.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Budget", "Plan", "make_plan"]


@dataclass(frozen=True)
class Budget:
    """Limits in parameter elements."""

    max_live: int
    """Gathered at a time, other than persistent ones; a single use may exceed it."""
    max_reuse_distance: int
    """Keep what is used again before so many elements have been used."""
    prefetch: int
    """Gathered ahead of use."""
    follow_units: bool = False
    """Bound prefetching by two of the largest uses and reuse by one, for a small live set whatever the model's size."""

    def for_largest(self, numel: int) -> Budget:
        """The limits for uses of at most so many elements."""
        if not self.follow_units:
            return self
        return Budget(self.max_live, min(self.max_reuse_distance, numel), min(self.prefetch, 2 * numel))


@dataclass(frozen=True)
class Plan:
    """``issue[i]``: groups of parameters to gather when use ``i`` begins, each group together and in order, those of the
    use itself first; ``release[i]``: parameters to free when it ends."""

    uses: tuple[int, ...]
    forward_len: int
    issue: tuple[tuple[tuple[int, ...], ...], ...]
    release: tuple[tuple[int, ...], ...]
    peak_live: int
    """Most elements gathered at a time."""

    @property
    def gathers(self) -> int:
        """Gather operations in all uses."""
        return sum(len(groups) for groups in self.issue)


class _Simulation:
    """State of one walk over the uses; :func:`make_plan` is its interface."""

    def __init__(
        self,
        uses: Sequence[int],
        forward_len: int,
        members: Mapping[int, Sequence[int]],
        numels: Mapping[int, int],
        budget: Budget,
        pinned: frozenset[int],
        until: Sequence[int],
    ) -> None:
        self.uses, self.members, self.numels, self.budget = uses, members, numels, budget
        self.forward_len, self.pinned, self.until = forward_len, pinned, until
        self.positions: dict[int, list[int]] = {}
        self.passed = [0]
        for position, unit in enumerate(uses):
            self.passed.append(self.passed[-1] + sum(numels[p] for p in members[unit]))
            for param in members[unit]:
                self.positions.setdefault(param, []).append(position)
        self.live: set[int] = set()
        self.live_numel = self.peak = 0
        self.ahead: dict[int, int] = {}
        """Prefetched, to the position it is for."""
        self.complete = 0
        """All uses that are to come before this one have everything already."""
        self.open: list[int] = []
        """Uses that have begun and not ended."""
        self.issue: list[list[tuple[int, ...]]] = [[] for _ in uses]
        self.release: list[list[int]] = [[] for _ in uses]

    def next_use(self, param: int, after: int) -> int | None:
        found = self.positions[param]
        index = bisect_right(found, after)
        return found[index] if index < len(found) else None

    def needed(self, at: int) -> set[int]:
        """What may not go while use ``at`` runs: of the uses that run, and what waits for its gradient."""
        own = {p for position in self.open for p in self.members[self.uses[position]]}
        return own | {p for p in self.live if self.waits_for_gradient(p, at)}

    def waits_for_gradient(self, param: int, at: int) -> bool:
        """Whether use ``at`` lies between the first and the last backward use of a parameter with a gradient."""
        found = self.positions[param]
        begun = bisect_left(found, self.forward_len)
        return param in self.pinned and begun < len(found) and found[begun] < at <= found[-1]

    def stays(self, param: int, ended: int, upcoming: int) -> bool:
        """Whether a parameter whose use ended with use ``ended`` is kept for use ``upcoming``."""
        if self.waits_for_gradient(param, upcoming):
            return True
        return self.passed[upcoming] - self.passed[ended + 1] <= self.budget.max_reuse_distance

    def take(self, params: Sequence[int], at: int) -> None:
        if params:
            self.issue[at].append(tuple(params))
            self.live.update(params)
            self.live_numel += sum(self.numels[p] for p in params)
            self.peak = max(self.peak, self.live_numel)

    def drop(self, param: int, at: int) -> None:
        self.release[at].append(param)
        self.live.discard(param)
        self.live_numel -= self.numels[param]
        upcoming = self.next_use(param, at)
        if upcoming is not None:
            self.complete = min(self.complete, upcoming)

    def begin(self, at: int) -> None:
        own = self.members[self.uses[at]]
        self.open.append(at)
        for param in own:
            self.ahead.pop(param, None)
        missing = [p for p in own if p not in self.live]
        self.make_room(sum(self.numels[p] for p in missing), at)
        self.take(missing, at)

    def make_room(self, wanted: int, at: int) -> None:
        """Before use ``at``: drops what is kept for later, farthest use first, until so many more fit."""
        if at == 0 or self.live_numel + wanted <= self.budget.max_live:
            return
        needed = self.needed(at)
        kept = [p for p in self.live if p not in needed and p not in self.ahead]
        kept.sort(key=lambda p: (-(self.next_use(p, at - 1) or len(self.uses)), p))
        for param in kept:
            if self.live_numel + wanted <= self.budget.max_live:
                return
            self.drop(param, at - 1)

    def prefetch(self, at: int, end: int) -> None:
        """Takes for later uses of the same phase, in order, until something does not fit."""
        room = self.budget.prefetch - sum(self.numels[p] for p in self.ahead)
        for position in range(max(at + 1, self.complete), end):
            wanted = [p for p in self.members[self.uses[position]] if p not in self.live]
            cost = sum(self.numels[p] for p in wanted)
            if cost > room or self.live_numel + cost > self.budget.max_live:
                return
            self.take(wanted, at)
            self.ahead.update(dict.fromkeys(wanted, position))
            room -= cost
            self.complete = position + 1

    def finish(self, at: int) -> None:
        """Ends the uses that end with use ``at``."""
        over = [position for position in self.open if self.until[position] == at]
        self.open = [position for position in self.open if self.until[position] > at]
        running = {p for position in self.open for p in self.members[self.uses[position]]}
        for param in dict.fromkeys(p for position in over for p in self.members[self.uses[position]]):
            upcoming = self.next_use(param, at)
            if param in running:
                continue
            if upcoming == at + 1:
                continue  # whatever the limits are, that use needs it
            too_many = self.live_numel > self.budget.max_live and not self.waits_for_gradient(param, at + 1)
            if upcoming is None or too_many or not self.stays(param, at, upcoming):
                self.drop(param, at)


def make_plan(
    uses: Sequence[int],
    forward_len: int,
    members: Mapping[int, Sequence[int]],
    numels: Mapping[int, int],
    budget: Budget,
    pinned: frozenset[int] = frozenset(),
    until: Sequence[int] | None = None,
) -> Plan:
    """Plans ``uses`` (units; the first ``forward_len`` are the forward) of parameters ``members[unit]``. Pure.

    ``numels`` maps a parameter to its elements; ``pinned`` are those that get gradients. ``until[i]`` is the last use
    that begins before use ``i`` ends, at least ``i`` itself (the default).
    """
    largest = max((sum(numels[p] for p in members[unit]) for unit in uses), default=0)
    ends = range(len(uses)) if until is None else until
    sim = _Simulation(uses, forward_len, members, numels, budget.for_largest(largest), pinned, ends)
    for at in range(len(uses)):
        sim.begin(at)
        sim.prefetch(at, forward_len if at < forward_len else len(uses))
        sim.finish(at)
    return Plan(tuple(uses), forward_len, tuple(map(tuple, sim.issue)), tuple(map(tuple, sim.release)), sim.peak)
