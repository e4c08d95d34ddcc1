"""Which parameters of a model are whole: gathers, holds and releases, and the counts of them. Decides nothing.

A *hold* is a reason to keep a parameter whole: any object, with multiplicity. What is let go while it is held is *due*, and
goes with its last hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from deepspeed._core.params.calls import Stats
from deepspeed._core.params.compress import SecondaryShards
from deepspeed._core.params.handle import ParamHandle, fetch
from deepspeed._core.params.planner import Budget, Plan
from deepspeed.comm import doctor

__all__ = ["Residency"]

# Elements that were gathered for modules which this rank has skipped, and may stay in case that they only come later.
_KEPT_AT_LEAST = 1 << 24
_SKIPPED = "plan, for a module that this rank may run later"


class Residency:
    """Moves the parameters of one model; the base of the coordinator. Methods that fetch are collective."""

    def __init__(self, handles: Sequence[ParamHandle], budget: Budget, secondary: SecondaryShards | None) -> None:
        self.handles = list(handles)
        self.by_id = {handle.id: handle for handle in self.handles}
        self.budget = budget
        self.stats = Stats()
        self.live_numel = 0
        """Elements that are whole or on their way, persistent parameters not counted."""
        self.secondary = secondary
        self.one_by_one = False
        """``allgather_sequential``: a gather for each parameter."""
        self._in_backward = False
        self._due: set[int] = set()
        self._room_to_keep = self._most_kept = min(budget.max_live, max(budget.prefetch, _KEPT_AT_LEAST))
        self._stores = list({id(h.rest): h.rest for h in self.handles if h.rest is not None}.values())
        for handle in self.handles:
            handle.on_change = self._on_change
            if secondary is not None:
                handle.on_write = self._forget_copy

    def start(self, handles: Iterable[ParamHandle], *, joining: Iterable[ParamHandle] = ()) -> None:
        """Starts gathering the released ones together, and all of ``joining``. Collective."""
        again = {handle.id for handle in joining if not handle.persistent}
        wanted = [h for h in handles if h.id in again or not (h.available or h.in_flight)]
        if not wanted:
            return
        secondary = self.secondary if self._in_backward else None
        for group in [[handle] for handle in wanted] if self.one_by_one else [wanted]:
            doctor.now.parameter = group[0].label
            self.stats.gathered_numel += fetch(group, secondary=secondary, join=bool(again))
            self.stats.gathers += 1

    def start_planned(self, ids: Sequence[int]) -> None:
        """Gathers these together, whatever is there already. Collective.

        Ranks may have different ones, see [Note: the same on all ranks] in :mod:`deepspeed._core.params.lifecycle`.
        """
        group = [self.by_id[i] for i in ids]
        self.start(group, joining=group)

    def keep(self, ids: Iterable[int]) -> bool:
        """Holds what a plan gathered and this rank did not use, as far as there is room; tells whether."""
        handles = [self.by_id[i] for i in ids]
        numel = sum(handle.numel for handle in handles)
        if numel > self._room_to_keep:
            return False
        self._room_to_keep -= numel
        for handle in handles:
            self.hold(handle, _SKIPPED)
        return True

    def unkeep(self, ids: Iterable[int]) -> None:
        """Ends :meth:`keep`: the module runs now, or the phase is over."""
        for i in ids:
            self.unhold(self.by_id[i], _SKIPPED)
            self._room_to_keep += self.by_id[i].numel
            if i in self._due:
                self.let_go([i])

    def read_ahead(self, ids: Iterable[int], ticket: int) -> bool:
        """Begins to read the shards of these for use ``ticket`` where they rest elsewhere; False if there is no room."""
        if not self._stores:
            return True
        for i in ids:
            region, store = self.by_id[i].away, self.by_id[i].rest
            if region is not None and store is not None and not store.stage(region, ticket):
                return False
        return True

    def forget_ahead(self, before: int | None = None) -> None:
        """Gives up what was read for uses before that one, or all of it."""
        for store in self._stores:
            store.drop_staged(before)

    def read_first(self, plan: Plan | None) -> None:
        """Begins to read what the next pass needs first."""
        for position, groups in enumerate(plan.issue if plan is not None and self._stores else ()):
            if not self.read_ahead([i for group in groups for i in group], position):
                return

    def _on_change(self, handle: ParamHandle, taken: bool) -> None:
        if handle.persistent:
            return
        forward = not self._in_backward and torch.is_grad_enabled()
        if self.secondary is not None and not taken and forward and handle.available:
            # hpZ: backward gathers from copies of what forward used.
            self.secondary.keep(handle.id, handle.full)
        self.live_numel += handle.numel if taken else -handle.numel
        if taken:
            self.stats.peak_live_numel = max(self.stats.peak_live_numel, self.live_numel)

    def _forget_copy(self, handle: ParamHandle) -> None:
        if self.secondary is not None:
            self.secondary.drop(handle.id)

    def forget_copies(self) -> None:
        """hpZ's copies are stale: the weights are about to change."""
        if self.secondary is not None:
            self.secondary.clear()

    def hold(self, handle: ParamHandle, token: Any) -> None:
        handle.holds[token] = handle.holds.get(token, 0) + 1

    def unhold(self, handle: ParamHandle, token: Any) -> None:
        count = handle.holds.get(token, 0)
        if count > 1:
            handle.holds[token] = count - 1
        else:
            handle.holds.pop(token, None)

    def let_go(self, ids: Iterable[int]) -> None:
        """Releases what nobody holds; the rest is due when its last hold goes."""
        for i in ids:
            handle = self.by_id.get(i)
            if handle is None or handle.persistent:
                continue
            if handle.holds:
                self._due.add(i)
            else:
                self._due.discard(i)
                handle.release()

    def release_all(self) -> None:
        """Releases everything that is not persistent and not held."""
        self._due.clear()
        for handle in self.handles:
            if not handle.persistent and not handle.holds:
                handle.release()

    def refresh_persistent(self, *, stepped: bool = False) -> None:
        """Gathers the persistent parameters anew, in one go: their shards changed, or they were released. Collective.

        ``stepped``: only an optimizer changed shards, so that frozen parameters may stay as they are.
        """
        persistent = [h for h in self.handles if h.persistent and (h.trained or not stepped or not h.available)]
        for handle in persistent:
            handle.release()
        fetch(persistent, exact=True)
        for handle in persistent:
            handle.finish()

    def finish_all(self) -> None:
        """Ends what is in flight and what was kept, after an exception. Not collective."""
        self._room_to_keep = self._most_kept
        for handle in self.handles:
            handle.holds.pop(_SKIPPED, None)
            if handle.in_flight:
                # The exception that brought us here is the one to report, not what it did to a gather.
                with contextlib.suppress(RuntimeError):
                    handle.finish()
