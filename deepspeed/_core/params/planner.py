"""When to gather which parameter and when to let go: one pure plan from an agreed order of uses.

A *use* is a unit (see :mod:`deepspeed._core.params.units`) running forward or backward. The plan says, for each use,
what to gather when it begins (its own missing parameters first, then those of the uses after it, within a budget) and
what to release when it ends. All ranks compute the same plan from the same trace, and follow it by position, so that a rank
that skips a use gathers all the same, and none is left waiting.

Source: the keys ``stage3_max_live_parameters``, ``stage3_max_reuse_distance`` and ``stage3_prefetch_bucket_size`` of the
configuration document; Belady's rule for what to drop when the budget is short.
"""

from __future__ import annotations

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
        self, uses: Sequence[int], members: Mapping[int, Sequence[int]], numels: Mapping[int, int], budget: Budget
    ) -> None:
        self.uses, self.members, self.numels, self.budget = uses, members, numels, budget
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
        self.issue: list[list[tuple[int, ...]]] = [[] for _ in uses]
        self.release: list[list[int]] = [[] for _ in uses]

    def next_use(self, param: int, after: int) -> int | None:
        return next((p for p in self.positions[param] if p > after), None)

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

    def make_room(self, needed: int, at: int, own: set[int]) -> None:
        """Before use ``at``: drops what is kept for later, farthest use first, until ``needed`` more fit."""
        if at == 0:
            return
        kept = [p for p in self.live if p not in own and p not in self.ahead]
        kept.sort(key=lambda p: (-(self.next_use(p, at - 1) or len(self.uses)), p))
        for param in kept:
            if self.live_numel + needed <= self.budget.max_live:
                return
            self.drop(param, at - 1)

    def prefetch(self, at: int, end: int) -> None:
        """Takes for later uses of the same phase, in order, until something does not fit."""
        room = self.budget.prefetch - sum(self.numels[p] for p in self.ahead)
        for position in range(at + 1, end):
            wanted = [p for p in self.members[self.uses[position]] if p not in self.live]
            cost = sum(self.numels[p] for p in wanted)
            if cost > room or self.live_numel + cost > self.budget.max_live:
                return
            self.take(wanted, at)
            self.ahead.update(dict.fromkeys(wanted, position))
            room -= cost

    def finish_use(self, at: int) -> None:
        for param in self.members[self.uses[at]]:
            upcoming = self.next_use(param, at)
            if upcoming is None:
                self.drop(param, at)
                continue
            distance = self.passed[upcoming] - self.passed[at + 1]
            if distance > self.budget.max_reuse_distance or self.live_numel > self.budget.max_live:
                self.drop(param, at)


def make_plan(
    uses: Sequence[int],
    forward_len: int,
    members: Mapping[int, Sequence[int]],
    numels: Mapping[int, int],
    budget: Budget,
) -> Plan:
    """Plans ``uses`` (units; the first ``forward_len`` are the forward) of parameters ``members[unit]``. Pure.

    ``numels`` maps a parameter to its elements.
    """
    largest = max((sum(numels[p] for p in members[unit]) for unit in uses), default=0)
    sim = _Simulation(uses, members, numels, budget.for_largest(largest))
    for at, unit in enumerate(uses):
        own = set(members[unit])
        missing = [p for p in members[unit] if p not in sim.live]
        for param in own:
            sim.ahead.pop(param, None)
        sim.make_room(sum(numels[p] for p in missing), at, own)
        sim.take(missing, at)
        sim.prefetch(at, forward_len if at < forward_len else len(uses))
        sim.finish_use(at)
    return Plan(tuple(uses), forward_len, tuple(map(tuple, sim.issue)), tuple(map(tuple, sim.release)), sim.peak)
