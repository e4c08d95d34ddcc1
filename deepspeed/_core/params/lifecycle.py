"""When parameters are whole: fetched before a unit runs, forward and backward, held while it may need them, then freed.

Glossary. *Unit*: parameters gathered together (:mod:`deepspeed._core.params.units`). *Call*: one run of a unit's
module, from its forward until its backward is done. *Hold*: a reason to keep a parameter whole; it goes when the last
hold and the plan let it go. *Pass*: a forward of the root module, from which the order of uses is recorded.

[Note: agreed plans] The order of uses is recorded in the first training iteration; when all ranks have recorded the same
one, they follow the plan made from it (:mod:`deepspeed._core.params.planner`), which gathers ahead. A rank that skips a
use later gathers for it all the same, because the others wait for its shard. Uses outside of the plan are gathered on
demand. If all ranks deviate in one step, the order is recorded anew.

[Note: graph tasks] A backward inside a backward (reentrant checkpoints) is a graph task of its own. A parameter's
accumulation ends its holds of that task only: the outer one may still want the data.

[Note: recompute] A forward inside a backward is a checkpoint's recomputation. What it fetched stays until the gradients
are done, since they come next.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from deepspeed import comm as dist
from deepspeed._core.params.compress import SecondaryShards
from deepspeed._core.params.handle import ParamHandle, fetch
from deepspeed._core.params.planner import Budget, Plan, make_plan
from deepspeed._core.params.units import Unit
from deepspeed.utils.logging import logger, warning_once

__all__ = ["Call", "Coordinator", "Stats"]


def graph_task() -> int:
    """Identity of the backward that runs now on this thread; -1 if none does."""
    return torch._C._current_graph_task_id()


class Call:
    """One run of a unit's module."""

    __slots__ = ("backward_task", "epoch", "handles", "left", "position", "sticky", "unit")

    def __init__(self, unit: Unit, handles: list[ParamHandle]) -> None:
        self.unit = unit
        self.handles = handles
        self.position: int | None = None
        self.backward_task = -1
        self.epoch = -1
        self.left: set[Any] | None = None
        """What must still happen before frozen parameters can go: gradients of inputs and of trainable parameters."""
        self.sticky = False
        """Its outputs cannot be watched: hold everything until the end of backward."""

    def __str__(self) -> str:
        return f"forward of {self.unit.name or 'the model'}"


class _BackwardHold:
    """What holds a parameter for a call's backward."""

    __slots__ = ("call",)

    def __init__(self, call: Call) -> None:
        self.call = call

    def __str__(self) -> str:
        return f"backward of {self.call.unit.name or 'the model'}"


class Stats:
    """Counters since the last :meth:`reset`; tests and reports read them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.gathers = 0
        self.gathered_numel = 0
        self.peak_live_numel = 0


class _Run:
    """Follows one phase of a plan by position."""

    def __init__(self, plan: Plan, begin: int, end: int, owner: Coordinator) -> None:
        self.plan, self.at, self.end, self.owner = plan, begin, end, owner
        self.deviated = False

    def advance(self, unit: int) -> int | None:
        """Issues all gathers up to the unit's next use and those ahead of it; None if the plan has no such use."""
        position = next((p for p in range(self.at, self.end) if self.plan.uses[p] == unit), None)
        if position is None:
            self.deviated = True
            return None
        self._serve(position)
        self._issue(position)
        self.at = position + 1
        return position

    def complete(self) -> None:
        """Issues what is left, for the ranks that do use it."""
        self._serve(self.end)

    def _serve(self, end: int) -> None:
        for position in range(self.at, end):
            self.deviated = True
            self._issue(position)
            self.owner.let_go(self.plan.release[position])
        self.at = end

    def _issue(self, position: int) -> None:
        for group in self.plan.issue[position]:
            self.owner.start([self.owner.by_id[i] for i in group if i in self.owner.by_id])


class Coordinator:
    """Decides for the parameters of one model. Methods that fetch are collective."""

    def __init__(
        self, handles: Sequence[ParamHandle], budget: Budget, secondary: SecondaryShards | None = None
    ) -> None:
        self.handles = list(handles)
        self.by_id = {handle.id: handle for handle in self.handles}
        self.budget = budget
        self.units: list[Unit] = []
        self.stats = Stats()
        self.live_numel = 0
        self.before_fetch: Callable[[Sequence[ParamHandle]], None] | None = None
        """Called with what is about to be gathered; for the hang doctor."""
        self.secondary = secondary
        self._stack: list[Call] = []
        self._due: set[int] = set()
        self._orphans: list[tuple[ParamHandle, Any]] = []
        self._open: list[Call] = []
        self._watch: dict[int, list[Call]] = {}
        self._epoch = 0
        self._in_backward = False
        self._in_pass = False
        self._plans: dict[bool, Plan | None] = {True: None, False: None}
        self._run: _Run | None = None
        self._forward: list[int] | None = None
        self._record: list[int] = []
        self._passes = 0
        self.deviated = False
        """Whether this rank left the plan since the last step."""
        for handle in self.handles:
            handle.on_change = self._on_change
            if secondary is not None:
                handle.on_write = self._forget_copy

    # -- moving data -------------------------------------------------------------------------------------------------

    def start(self, handles: Iterable[ParamHandle]) -> None:
        """Starts gathering the released ones together. Collective."""
        missing = [h for h in handles if not h.available and not h.in_flight]
        if not missing:
            return
        if self.before_fetch is not None:
            self.before_fetch(missing)
        numel = fetch(missing, secondary=self.secondary if self._in_backward else None)
        self.stats.gathers += 1
        self.stats.gathered_numel += numel

    def _on_change(self, handle: ParamHandle, taken: bool) -> None:
        if handle.persistent:
            return
        if self.secondary is not None and not taken and not self._in_backward and torch.is_grad_enabled():
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

    def refresh_persistent(self) -> None:
        """Gathers the persistent parameters anew, in one go: their shards changed, or they were released. Collective."""
        persistent = [h for h in self.handles if h.persistent]
        for handle in persistent:
            handle.release()
        fetch(persistent, exact=True)
        for handle in persistent:
            handle.finish()

    # -- a pass over the model ---------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether some module is running forward."""
        return bool(self._stack)

    def begin_pass(self) -> None:
        """The root's forward begins."""
        if graph_task() != -1:
            return
        if self._in_backward:
            self.end_backward()
        self._in_pass = True
        self._drop_orphans()
        self._record = []
        plan = self._plans[torch.is_grad_enabled()]
        self._run = _Run(plan, 0, plan.forward_len, self) if plan is not None else None

    def end_pass(self, *, failed: bool) -> None:
        """The root's forward is over."""
        if graph_task() != -1 or not self._in_pass:
            return
        self._in_pass = False
        run, self._run = self._run, None
        if failed:
            self.abort()
            return
        grad = torch.is_grad_enabled()
        if run is not None:
            run.complete()
            self.deviated |= run.deviated
        if grad:
            self._forward = self._record
            self._passes += 1
        else:
            self.release_all()
            if self._plans[False] is None:
                self._agree(False, self._record, len(self._record))

    def enter(self, unit: Unit) -> Call:
        """The unit's module is about to run: its parameters are whole when this returns. Collective."""
        call = Call(unit, list(unit.members))
        unit.active += 1
        for handle in call.handles:
            self.hold(handle, call)
        self._stack.append(call)
        self._need(call, in_backward=graph_task() != -1)
        return call

    def _need(self, call: Call, *, in_backward: bool) -> None:
        if in_backward and not self._in_backward:
            self.begin_backward()
        run = self._run
        if self._in_pass or in_backward:
            self._record.append(call.unit.index)
        if run is not None:
            call.position = run.advance(call.unit.index)
        self.start(call.handles)
        for handle in call.handles:
            handle.finish()

    def touch(self, handle: ParamHandle) -> None:
        """A running module reads a parameter that is not its unit's: it is fetched and remembered. Collective."""
        call = self._stack[-1]
        if call in handle.holds:
            return
        call.handles.append(handle)
        call.unit.externals[handle.id] = handle
        self.hold(handle, call)
        self.start([handle])
        handle.finish()

    def leave(self, call: Call, *, failed: bool = False) -> None:
        """The unit's module has run (or failed)."""
        if call in self._stack:
            # Whatever lies above was left by an exception that skipped its end.
            while self._stack[-1] is not call:
                left_behind = self._stack.pop()
                left_behind.unit.active -= 1
                self._drop(left_behind)
            self._stack.pop()
            call.unit.active -= 1
        task = graph_task()
        if task != -1:
            call.backward_task, call.epoch = task, self._epoch
            hold = _BackwardHold(call)
            for handle in call.handles:
                self.hold(handle, hold)
                self.unhold(handle, call)
            self._open.append(call)
            return
        if call.sticky and not failed and torch.is_grad_enabled():
            for handle in call.handles:
                self._orphans.append((handle, call))
            return
        self._drop(call)

    def _drop(self, call: Call) -> None:
        for handle in call.handles:
            self.unhold(handle, call)
        if call.position is None:
            self.let_go(h.id for h in call.handles)
        else:
            plan = self._run.plan if self._run is not None else None
            if plan is not None:
                self.let_go(plan.release[call.position])
            self.let_go([h.id for h in call.handles if h.id in self._due])

    def adopt_output(self, handle: ParamHandle, giver: Call) -> None:
        """A call returns a parameter (or a view of it): whoever called it uses it from now on."""
        above = self._stack[:-1] if self._stack and self._stack[-1] is giver else self._stack
        if above:
            user = above[-1]
            if user not in handle.holds:
                user.handles.append(handle)
                user.unit.externals[handle.id] = handle
                self.hold(handle, user)
        elif torch.is_grad_enabled():
            token = f"output of {giver.unit.name or 'the model'}"
            self.hold(handle, token)
            self._orphans.append((handle, token))

    def _drop_orphans(self) -> None:
        orphans, self._orphans = self._orphans, []
        for handle, token in orphans:
            self.unhold(handle, token)
            self.let_go([handle.id])

    # -- backward ----------------------------------------------------------------------------------------------------

    def begin_backward(self) -> None:
        """Gradients begin to flow; the first hook that notices calls this."""
        if self._in_backward:
            return
        self._in_backward = True
        self._epoch += 1
        self._backward_start = len(self._record)
        plan = self._plans[True]
        ready = plan is not None and self._forward is not None
        self._run = _Run(plan, plan.forward_len, len(plan.uses), self) if plan is not None and ready else None

    def backward_of(self, call: Call) -> None:
        """The gradient of a call's output has come: its parameters are whole when this returns. Collective."""
        self.begin_backward()
        task = graph_task()
        if call.epoch == self._epoch and call.backward_task == task:
            return
        again = call.epoch == self._epoch
        call.backward_task, call.epoch = task, self._epoch
        if not again:
            hold = _BackwardHold(call)
            for handle in call.handles:
                self.hold(handle, hold)
            self._open.append(call)
            self._need(call, in_backward=True)
        if call.left is not None:
            call.left.update(h.id for h in call.unit.trainable if h.param.requires_grad)
            for handle in call.unit.trainable:
                self._watch.setdefault(handle.id, []).append(call)

    def gradient_done(self, handle: ParamHandle) -> None:
        """The parameter's gradient is accumulated: nothing of this graph task needs its data any more."""
        task = graph_task()
        ended = [t for t in handle.holds if isinstance(t, _BackwardHold) and t.call.backward_task == task]
        for token in ended:
            handle.holds.pop(token, None)
        if ended and self._may_go(handle, ended[-1].call):
            self.let_go([handle.id])
        for call in self._watch.pop(handle.id, ()):
            self.part_done(call, handle.id)

    def part_done(self, call: Call, part: Any) -> None:
        """One of the things has happened for which a call's frozen parameters wait."""
        if call.left is None or call.epoch != self._epoch:
            return
        call.left.discard(part)
        if call.left:
            return
        for handle in call.handles:
            if handle.param.requires_grad:
                continue
            for token in [t for t in handle.holds if isinstance(t, _BackwardHold)]:
                if token.call.unit is call.unit and token.call.backward_task == call.backward_task:
                    handle.holds.pop(token, None)
            if self._may_go(handle, call):
                self.let_go([handle.id])

    def _may_go(self, handle: ParamHandle, call: Call) -> bool:
        """Whether the plan has no early use for it."""
        run = self._run
        if run is None or call.position is None:
            return True
        return handle.id in run.plan.release[call.position] or handle.id in self._due

    def end_backward(self) -> None:
        """The backward has returned: everything goes, the plan is finished or made. Collective. Idempotent."""
        if not self._in_backward:
            return
        run, self._run = self._run, None
        if run is not None:
            run.complete()
            self.deviated |= run.deviated
        self._in_backward = False
        self._end_calls()
        uses, forward = self._record, self._forward
        if self._plans[True] is None and forward is not None and self._passes == 1:
            self._agree(True, uses, self._backward_start)
        self._forward = None
        self._record = []
        self._passes = 0

    def _end_calls(self) -> None:
        for call in self._open:
            for handle in call.handles:
                for token in [t for t in handle.holds if isinstance(t, _BackwardHold)]:
                    handle.holds.pop(token, None)
        self._open = []
        self._watch = {}
        self._drop_orphans()
        self.release_all()

    def abort(self) -> None:
        """After an exception: ends what is in flight, drops all holds of calls, releases. Not collective."""
        self._run = None
        self._in_pass = self._in_backward = False
        self._forward = None
        self._record = []
        self._passes = 0
        for call in self._stack:
            call.unit.active -= 1
            for handle in call.handles:
                handle.holds.pop(call, None)
        self._stack = []
        for handle in self.handles:
            if handle.in_flight:
                handle.finish()
        self._end_calls()

    # -- the plan ----------------------------------------------------------------------------------------------------

    def forget_plan(self) -> None:
        """Records the order of uses anew. Every rank must do it at the same point."""
        self._plans = {True: None, False: None}
        self.deviated = False

    @property
    def plan(self) -> Plan | None:
        """The agreed plan of a training iteration, if there is one yet."""
        return self._plans[True]

    def _agree(self, grad: bool, uses: Sequence[int], forward_len: int) -> None:
        """Adopts the recorded order if all ranks have the same. Collective."""
        digest = zlib.crc32(repr((forward_len, list(uses))).encode())
        if not self._same_on_all_ranks(digest):
            warning_once(
                "ranks use modules in different orders, so that parameters are not gathered ahead of use; modules "
                "whose use depends on data can be marked with deepspeed.utils.set_z3_leaf_modules"
            )
            return
        members = {unit.index: [h.id for h in unit.members] for unit in self.units}
        numels = {handle.id: handle.numel for handle in self.handles}
        self._plans[grad] = make_plan(uses, forward_len, members, numels, self.budget)
        logger.debug("ZeRO-3 plan: %d uses, %d gathers", len(uses), self._plans[grad].gathers)  # type: ignore[union-attr]

    def _same_on_all_ranks(self, value: int) -> bool:
        transport = self.handles[0].transport if self.handles else None
        if transport is None or transport.world_size == 1:
            return True
        device = self.handles[0].shard.device
        bounds = torch.tensor([value, -value], dtype=torch.int64, device=device)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=transport.group)
        high, low = bounds.tolist()
        return bool(high == -low)
