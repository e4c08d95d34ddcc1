"""When parameters are whole: fetched before a unit runs, forward and backward, held while it may need them, then freed.

Glossary. *Unit*: parameters gathered together (:mod:`deepspeed._core.params.units`). *Call*: one run of a unit's
module, from its forward until its backward is done. *Hold*: a reason to keep a parameter whole; it goes when the last
hold and the plan let it go. *Pass*: a forward of the root module, from which the order of uses is recorded.

[Note: the same on all ranks] A gather needs every rank. What a rank has whole may depend on its data (a parameter that its
branch did not use is held longer), and so must not decide what it gathers. With a plan, the plan alone decides. Without
one, a parameter is gathered for its first use in a backward where it is missing, which is the same everywhere; later
uses gather it again in any case, unless the use before it had it, too: until then nothing is let go. A rank that has a
parameter takes part in its gather, with memory that nobody reads.

[Note: graph tasks] A backward inside a backward (reentrant checkpoints) is a graph task of its own. A parameter's
accumulation ends its holds of that task only: the outer one may still want the data. A second backward over the same
graph is another task, too, and fetches again.

[Note: recompute] A forward inside a backward is a checkpoint's recomputation. What it fetched stays until the gradients
are done, since they come next.

[Note: graphs of gradients] A backward with ``create_graph`` leaves operations that want the data again, and no hook tells
when those are done: everything stays until the next pass or step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from deepspeed._core.params.agreement import PlanBook, Run, Trace
from deepspeed._core.params.calls import BackwardHold, Call, graph_task
from deepspeed._core.params.compress import SecondaryShards
from deepspeed._core.params.handle import ParamHandle
from deepspeed._core.params.planner import Budget, Plan
from deepspeed._core.params.residency import Residency
from deepspeed._core.params.units import Unit
from deepspeed.comm import doctor

__all__ = ["Coordinator"]


class Coordinator(Residency):
    """Decides for the parameters of one model. Methods that fetch are collective."""

    def __init__(
        self, handles: Sequence[ParamHandle], budget: Budget, secondary: SecondaryShards | None = None
    ) -> None:
        super().__init__(handles, budget, secondary)
        self.units: list[Unit] = []
        self.book = PlanBook(self.handles, budget)
        self._stack: list[Call] = []
        self._orphans: list[tuple[ParamHandle, Any]] = []
        self._epoch = 0
        self._in_pass = False
        self._depth = 0
        self._forward_run: Run | None = None
        self._trace = Trace()
        self._passed: Trace | None = None
        """The last training pass, whose backward is to come or running."""
        self._passes = 0
        self._backward_run: Run | None = None
        self.clock: int | None = None
        """Place of a backward that follows a plan, in uses, see :mod:`deepspeed._core.params.agreement`; else None."""
        self.on_tick: Callable[[], None] | None = None
        """Called when the clock moves on. May communicate."""
        self.on_backward_end: Callable[[], None] | None = None
        """Called when a backward is over and all that it gathers is on its way. May communicate."""
        self._open: list[Call] = []
        self._watch: dict[int, list[Call]] = {}
        self._lazy: list[int] = []
        self._last_use: dict[int, int] = {}
        self._backward_uses = 0
        self._first_ended = sys.maxsize
        """The first graph task of this backward that ended holds."""
        self._graph_made = False

    # -- plans -------------------------------------------------------------------------------------------------------

    def _tick(self, uses: int) -> None:
        self.clock = uses
        if self.on_tick is not None:
            self.on_tick()

    def _let_go_unplanned(self, ids: Iterable[int], run: Run | None) -> None:
        """As :meth:`let_go`, but for what a plan still counts on."""
        self.let_go(i for i in ids if run is None or not run.has(i))

    # -- a pass over the model ---------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether some module is running forward."""
        return bool(self._stack)

    def begin_pass(self) -> None:
        """The root's forward begins."""
        if graph_task() != -1:
            return
        if self._in_pass:  # a model that calls itself
            self._depth += 1
            return
        self.end_backward()
        self._clear_stack()
        self._drop_orphans()
        self.release_all()
        self._in_pass, self._depth = True, 0
        self._trace = Trace()
        plan = self.book.plans[torch.is_grad_enabled()]
        self._forward_run = Run(plan, 0, plan.forward_len, self) if plan is not None else None

    def end_pass(self, *, failed: bool) -> None:
        """The root's forward is over."""
        if graph_task() != -1 or not self._in_pass:
            return
        if self._depth:
            self._depth -= 1
            return
        self._in_pass = False
        run, self._forward_run = self._forward_run, None
        if failed:
            self.abort()
            return
        if run is not None:
            run.complete()
            self.book.deviated |= run.deviated and torch.is_grad_enabled()
        if torch.is_grad_enabled():
            self._passed = self._trace
            self._passes += 1
        else:
            self.release_all()
            self.book.end_evaluation(self._trace, self.units)
            self.forget_ahead()
            self.read_first(self.book.plans[False])

    def enter(self, unit: Unit) -> Call:
        """The unit's module is about to run: its parameters are whole when this returns. Collective."""
        call = Call(unit)
        unit.active += 1
        for handle in call.handles:
            self.hold(handle, call)
        self._stack.append(call)
        try:
            self._need(call, in_backward=graph_task() != -1)
        except BaseException:
            self.leave(call, failed=True)
            raise
        return call

    def _need(self, call: Call, *, in_backward: bool) -> None:
        """A use begins: gathers by the plan, or what is missing."""
        if in_backward:
            self.begin_backward()
        doctor.now.module = call.unit.name
        run = self._backward_run if in_backward else self._forward_run
        if in_backward:
            if self._passed is not None:
                self._passed.backward.append(call.unit.index)
        elif self._in_pass:
            call.place = self._trace.begin(call.unit.index)
        if run is not None:
            call.position = run.advance(call.unit.index)
        self._fetch(call.handles, in_backward=in_backward, planned=run is not None and call.position is not None)

    def _fetch(self, handles: Sequence[ParamHandle], *, in_backward: bool, planned: bool) -> None:
        """Makes parameters whole for a use, see [Note: the same on all ranks]."""
        if not in_backward:
            self.start(handles)
        else:
            own = {handle.id for handle in handles}
            lazy, self._lazy = self._lazy, []
            self._lazy = [i for i in lazy if i in own]
            self._let_go_unplanned((i for i in lazy if i not in own), self._backward_run)
            used, latest = self._last_use, self._backward_uses
            joining = [] if planned else [h for h in handles if used.get(h.id, latest) != latest]
            self.start(handles, joining=joining)
            self._backward_uses += 1
            used.update(dict.fromkeys(own, self._backward_uses))
        for handle in handles:
            handle.finish()

    def touch(self, handle: ParamHandle) -> None:
        """A running module reads a parameter that is not its unit's: it is fetched and remembered. Collective."""
        call = self._stack[-1]
        if call in handle.holds:
            return
        call.handles.append(handle)
        call.unit.externals[handle.id] = handle
        self.hold(handle, call)
        self._fetch([handle], in_backward=graph_task() != -1, planned=False)

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
            call.recomputed, call.task, call.epoch = True, task, self._epoch
            for handle in call.handles:
                self.hold(handle, call.back)
                self.unhold(handle, call)
            self._open.append(call)
            return
        if call.place is not None and self._in_pass:
            self._trace.end(call.place)
        if call.sticky and not failed and torch.is_grad_enabled():
            for handle in call.handles:
                self._orphans.append((handle, call))
            return
        self._drop(call)

    def _drop(self, call: Call) -> None:
        for handle in call.handles:
            self.unhold(handle, call)
        if call.position is None or self._forward_run is None:
            self._let_go_unplanned((h.id for h in call.handles), self._forward_run)
        else:
            self._forward_run.settle()
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
        else:
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
        self._last_use, self._backward_uses = {}, 0
        self._first_ended, self._graph_made = sys.maxsize, False
        plan = self.book.plans[True]
        # Several passes share their parameters, whose gradients are complete later than the plan of one pass has it.
        if plan is not None and self._passed is not None and self._passes == 1:
            self.clock = 0
            self._backward_run = Run(plan, plan.forward_len, len(plan.uses), self, self._tick)

    def backward_of(self, call: Call) -> None:
        """The gradient of a call's output has come: its parameters are whole when this returns. Collective."""
        self.begin_backward()
        task = graph_task()
        seen = call.epoch == self._epoch
        if seen and call.task == task:
            return
        call.task, call.epoch = task, self._epoch
        if not seen:
            for handle in call.handles:
                self.hold(handle, call.back)
            self._open.append(call)
            self._need(call, in_backward=True)
        elif not call.recomputed:
            for handle in call.handles:
                handle.holds[call.back] = 1
            if self._first_ended < task:  # an earlier backward over this graph has let go of something
                self._fetch(call.handles, in_backward=True, planned=False)
        if call.inputs is not None:
            parts = [h.id for h in call.unit.trainable if h.param.requires_grad]
            call.left = call.inputs.union(parts)
            for part in parts:
                self._watch.setdefault(part, []).append(call)

    def gradient_done(self, handle: ParamHandle) -> None:
        """The parameter's gradient is accumulated: nothing of this graph task needs its data any more."""
        if torch.is_grad_enabled():
            self._graph_made = True
            return
        if self._passed is not None:
            self._passed.ready[handle.id] = len(self._passed.backward)
        task = graph_task()
        ended = [t for t in handle.holds if isinstance(t, BackwardHold) and t.call.task == task]
        if ended:
            self._end_holds(handle, ended)
        for call in self._watch.pop(handle.id, ()):
            self.part_done(call, handle.id)

    def part_done(self, call: Call, part: int) -> None:
        """One of the things has happened for which a call's frozen parameters wait."""
        if torch.is_grad_enabled():
            self._graph_made = True
            return
        if part not in call.left or call.epoch != self._epoch:
            return
        call.left.discard(part)
        if call.left:
            return
        for handle in call.handles:
            if not handle.param.requires_grad:
                ended = [t for t in handle.holds if isinstance(t, BackwardHold) and t.same_run(call)]
                self._end_holds(handle, ended)

    def _end_holds(self, handle: ParamHandle, ended: Sequence[BackwardHold]) -> None:
        """Drops holds of the backward; releases the parameter where the plan, or the next use, says so."""
        self._first_ended = min(self._first_ended, graph_task())
        planned = self._backward_run is not None
        for token in ended:
            handle.holds.pop(token, None)
            planned = planned and token.call.position is not None
        if self._backward_run is None or not planned:
            self._lazy.append(handle.id)
            return
        self._backward_run.settle()
        if handle.id in self._due:
            self.let_go([handle.id])

    def end_backward(self) -> None:
        """The backward has returned: everything goes, the plan is finished or made. Collective. Idempotent."""
        if not self._in_backward:
            return
        run, self._backward_run = self._backward_run, None
        if run is not None:
            run.complete()
            self.book.deviated |= run.deviated
        self._in_backward, self.clock = False, None
        if self.on_backward_end is not None:
            self.on_backward_end()
        self._end_calls()
        self.forget_ahead()
        trace, self._passed = self._passed, None
        passes, self._passes = self._passes, 0
        if trace is not None and passes == 1:
            self.book.end_iteration(trace, self.units)

    def _end_calls(self) -> None:
        self._drop_orphans()
        for call in self._open:
            for handle in call.handles:
                if self._graph_made and call.back in handle.holds:
                    self._orphans.append((handle, call.back))
                else:
                    handle.holds.pop(call.back, None)
            call.end_backward()
        self._graph_made = False
        self._open, self._watch, self._lazy = [], {}, []
        self.release_all()

    def abort(self) -> None:
        """After an exception: ends what is in flight, drops all holds of calls, releases. Not collective."""
        self._forward_run = self._backward_run = self._passed = None
        self._in_pass = self._in_backward = self._graph_made = False
        self.clock = None
        self._depth = self._passes = 0
        self._clear_stack()
        self.finish_all()
        self._end_calls()
        self.forget_ahead()

    def _clear_stack(self) -> None:
        """Forgets modules that seem to run: an exception that is no ``Exception`` passes their hooks by."""
        for call in self._stack:
            call.unit.active -= 1
            for handle in call.handles:
                handle.holds.pop(call, None)
        self._stack = []

    def before_update(self) -> None:
        """The shards are about to change: nothing may stay whole that would be stale. Collective."""
        self.end_backward()
        self._clear_stack()
        self._drop_orphans()
        self._in_pass = False
        self.release_all()
        self.forget_copies()
        self.forget_ahead()

    # -- the plan ----------------------------------------------------------------------------------------------------

    def forget_plan(self) -> None:
        """Goes back to the order of the model, and records anew. Every rank must do it at the same point."""
        self.book.expect(self.units)

    @property
    def plan(self) -> Plan | None:
        """The plan of a training iteration from a recorded order, if there is one yet."""
        return self.book.plans[True] if self.book.recorded[True] else None
