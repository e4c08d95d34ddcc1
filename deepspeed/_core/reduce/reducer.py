"""Gradients from autograd to shards: one event-ordered reducer for ZeRO stages 0, 1 and 2.

[Note: order of collectives] Ranks may finish parameters in different orders (unused parameters, data-dependent control
flow), so buckets are launched strictly from the last to the first: a bucket waits for those after it, and what is
still missing when backward returns is filled with zeros and sent then. Every rank thus runs the same collectives.

[Note: late gradients] A parameter used in two reentrant checkpoints fires its hook twice in one backward. If its bucket
has left by then, the second contribution stays in ``param.grad``; the next reduction of the window takes it, or, at the
boundary, an extra one, on which the ranks agree in the all-reduce of the gradient norm. Reduction is linear, so the sum
is the same.

[Note: windows] A *window* is what lies between two optimizer steps. ``grad_full`` holds what was not reduced yet,
``grad_shard`` the sum of the reductions of the window. Stage 2 reduces in each backward and gives the full buffer back
to a pool; stages 0 and 1 keep it and reduce at the boundary; stage 0 also gathers the result. ``no_sync`` turns any
stage's backward into "accumulate in the full buffer, reduce later".

[Note: other collectives] A backward of stage 3 gathers, too. A rank that waits for a bucket must not keep others waiting for
its shards, which they need to come to that bucket, perhaps only at their end, if they do not use one of its parameters.
So the owner sends buckets at agreed points of the backward (:meth:`GradReducer.send_through`), and before a bucket's
point nobody waits for it (``may_wait``).

[Note: who opens a backward] ``engine.backward`` does. A plain ``loss.backward()`` is opened by its first hook, and nothing
tells us that it has ended: the next step, backward or read of a gradient closes it, and until then each hook asks again
whether this backward reduces.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from deepspeed._core.pages import empty_flat
from deepspeed._core.reduce.bucket import Bucket, Slot
from deepspeed._core.reduce.transport import Pending, Transport
from deepspeed.comm import doctor
from deepspeed.utils.logging import warning_once

__all__ = ["GradReducer", "ReducePolicy"]

_MAX_IN_FLIGHT = 2


@dataclass(frozen=True)
class ReducePolicy:
    """What a stage and its keys mean for gradients."""

    every_backward: bool
    """Stage 2: reduce in each backward and free the full buffer. Otherwise once, at the boundary."""
    gather_result: bool
    """Stage 0: every rank gets the whole reduced gradient."""
    overlap: bool = False
    """``overlap_comm``: reductions run behind the rest of backward."""
    contiguous: bool = True
    """``contiguous_gradients``: copy a gradient to its bucket when it is made, not when the bucket is sent."""
    use_reduce_scatter: bool = True
    """``reduce_scatter``: false sends everything to everyone, as an all-reduce."""
    keep_buffers: bool = True
    """Keep the memory of gradients from step to step. False (stage 3, and optimizer offload) gives all of it back after a
    step: gradient shards then come to lie where the activations were that backward has freed."""
    pre_scale: float = 1.0
    """Factor before the sum over ranks (``prescale_gradients``, ``gradient_predivide_factor``)."""
    post_scale: float = 1.0
    """Factor after the sum; ``pre_scale * post_scale`` is 1 / world size."""


class GradReducer:
    """Owns the hooks of the parameters and the gradient side of the buckets.

    ``reduce_now`` tells, when a backward starts, whether it is one that reduces.
    """

    def __init__(
        self, buckets: Sequence[Bucket], transport: Transport, policy: ReducePolicy, reduce_now: Callable[[], bool]
    ) -> None:
        self.buckets = list(buckets)
        self.transport = transport
        self.policy = policy
        self._decide = reduce_now
        self.may_wait: Callable[[Bucket], bool] = lambda bucket: True
        """Whether all ranks send the bucket whatever this one does next, see [Note: other collectives]."""
        self.sends_when_ready: Callable[[], bool] = lambda: True
        """Whether a bucket that is complete goes at once; else at :meth:`send_through`."""
        self._order = list(reversed(self.buckets))
        self._next = 0
        self._open = False
        self._reducing = False
        # Whether a backward of this window accumulated without a reduction after it; the same on all ranks.
        self._unreduced = False
        self.settled = False
        """Whether the ranks agreed, since the last backward, that no late gradient is left; set by our owner."""
        self._in_flight: list[tuple[Bucket, Pending]] = []
        self._late: dict[int, Slot] = {}
        self._pool: list[torch.Tensor] = []
        self._pool_numel = max((bucket.numel for bucket in self.buckets), default=0)
        self._handles = [
            slot.param.register_post_accumulate_grad_hook(self._make_hook(bucket, position))
            for bucket in self.buckets
            for position, slot in enumerate(bucket.slots)
        ]

    # -- a backward ------------------------------------------------------------------------------------------------

    @property
    def has_gradients(self) -> bool:
        """Whether the window holds reduced gradients, ready for a step."""
        return any(bucket.reduced for bucket in self.buckets)

    @property
    def late(self) -> bool:
        """Whether this rank holds contributions that no reduction has taken, see [Note: late gradients]."""
        return bool(self._late)

    def unused(self) -> list[Slot]:
        """Parameters that had no gradient on this rank since the last step."""
        return [s for b in self.buckets for i, s in enumerate(b.slots) if s.numel and i not in b.seen]

    def begin_backward(self, *, fresh: bool = False) -> None:
        """Opens a backward; the first hook does it, if nobody else.

        ``fresh``: autograd must not add to gradients that are in a bucket already, but make new tensors; with
        ``create_graph`` it adds out of place, and the sum would be taken for a new contribution.
        """
        if self._open:
            return
        self._open, self._reducing, self._next = True, self._decide(), 0
        self._unreduced = not self._reducing
        self.settled = False
        if fresh:
            for bucket in self.buckets:
                self._hide_views(bucket)
        if self.policy.gather_result:
            # What stage 0 shows in .grad after a reduction is a result; autograd must not add to it, nor may the full
            # buffer's next gradients overwrite it.
            for bucket in self.buckets:
                if bucket.reduced:
                    self._hide_views(bucket)
                    if bucket.grad_shard._base is not None:
                        bucket.grad_shard = bucket.grad_shard.clone()

    def send_through(self, index: int) -> None:
        """Sends the buckets from the last to bucket ``index``; gradients still missing are late. Collective."""
        if not self._open or not self._reducing:
            return
        while self._next < len(self._order) and self._order[self._next].index >= index:
            self._launch(self._order[self._next])
            self._next += 1
        self._wait_for_all_but(_MAX_IN_FLIGHT if self.policy.overlap else 0)

    def end_backward(self) -> None:
        """Sends what is missing and waits for all. Collective if this backward reduces. Idempotent."""
        if not self._open:
            return
        if self._reducing:
            while self._next < len(self._order):
                # One bucket's first piece travels while the one before is summed.
                self._launch(self._order[self._next], keep_in_flight=1)
                self._next += 1
            self._drain()
            self._share_results(self._order)
            for bucket in self.buckets:
                bucket.ready.clear()
                bucket.launched = False
        self._open = False

    def reduce_rest(self) -> None:
        """Reduces what backwards that accumulate only (``no_sync``) left behind. Collective if there is any."""
        self.end_backward()
        if self._unreduced:
            self._open, self._reducing, self._next, self._unreduced = True, True, 0, False
            self.end_backward()

    def reduce_late(self) -> None:
        """Reduces the late contributions of all ranks into the shards. Collective; every rank must call it."""
        for bucket in self._order:
            extra = torch.zeros(bucket.numel, dtype=bucket.comm_dtype, device=bucket.device)
            for position, slot in enumerate(bucket.slots):
                if id(slot) in self._late and slot.param.grad is not None:
                    bucket.write(extra, position, _dense(slot).mul(self.policy.pre_scale))
                    slot.param.grad = None
            bucket.hold_shard()
            self.transport.reduce_scatter(
                extra, bucket.grad_shard, scale=self.policy.post_scale, accumulate=bucket.reduced
            ).wait()
            bucket.reduced = True
        self._late.clear()
        self._share_results(self._order)

    def abort(self) -> None:
        """Waits for what is in flight and drops the whole window's gradients: after an exception, by ``zero_grad``."""
        # The exception that brought us here is the one to report, not what it did to a collective.
        with contextlib.suppress(RuntimeError):
            self._drain()
        self._in_flight.clear()
        self._open = False
        self.end_window()

    def end_window(self) -> None:
        """Forgets the gradients; called after a step, applied or skipped."""
        self._late.clear()
        self._unreduced = False
        for bucket in self.buckets:
            bucket.new_window()
            if self.policy.every_backward:
                self._give_back(bucket)
            if not self.policy.keep_buffers:
                bucket.grad_full = None
                bucket.free_shard()
            for slot in bucket.slots:
                slot.param.grad = None
        if not self.policy.keep_buffers:
            self._pool = []
            self.transport.free_buffers()

    def free_buffers(self) -> None:
        """Frees what is kept for the next backward; between windows."""
        self._pool = []
        self.transport.free_buffers()

    def detach(self) -> None:
        """Removes the hooks and frees the buffers. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.abort()
        self._pool = []
        for bucket in self.buckets:
            bucket.grad_full = None
            bucket.grad_shard = torch.zeros(0)

    # -- internals ---------------------------------------------------------------------------------------------------

    def _make_hook(self, bucket: Bucket, position: int) -> Callable[[torch.Tensor], None]:
        # Weak, so that a parameter does not keep an engine alive that nobody uses any more.
        reducer, index = weakref.ref(self), bucket.index

        def on_gradient(param: torch.Tensor) -> None:
            alive = reducer()
            if alive is not None:
                alive._on_gradient(alive.buckets[index], position, param)

        return on_gradient

    def _on_gradient(self, bucket: Bucket, position: int, param: torch.Tensor) -> None:
        if self._open and not self._reducing and self._decide():
            self.end_backward()  # a plain loss.backward() of an earlier micro-batch was left open
        if not self._open:
            self.begin_backward()
        slot = bucket.slots[position]
        doctor.now.parameter = slot.name
        if bucket.launched:
            self._late[id(slot)] = slot
            return
        self._late.pop(id(slot), None)
        if self.policy.contiguous or not self._reducing:
            self._absorb(bucket, position, param)
        if self._reducing:
            bucket.ready.add(position)
            if (self.policy.overlap or self.policy.every_backward) and self.sends_when_ready():
                while self._next < len(self._order) and len(self._order[self._next].ready) == len(
                    self._order[self._next].slots
                ):
                    self._launch(self._order[self._next])
                    self._next += 1

    def _absorb(self, bucket: Bucket, position: int, param: torch.Tensor) -> None:
        if param.grad is None:
            return
        grad = _dense(bucket.slots[position])
        self._ensure_buffer(bucket)
        view = bucket.grad_view(position)
        if view is None:
            bucket.put(position, grad, self.policy.pre_scale)
            param.grad = None
            return
        if grad.data_ptr() != view.data_ptr() or grad.dtype != view.dtype or not view.numel():
            bucket.put(position, grad, self.policy.pre_scale)
        elif position not in bucket.touched:
            raise RuntimeError(
                f"a second backward added to the reduced gradient of {bucket.slots[position].name}: use "
                "engine.backward(loss) instead of loss.backward(), or call engine.step() in between"
            )
        # While accumulating, autograd may add into the bucket by itself; a scaled or wider copy goes through the hook.
        in_place = not self._reducing and view.dtype == param.dtype and self.policy.pre_scale == 1.0
        param.grad = view if in_place else None

    def _hide_views(self, bucket: Bucket) -> None:
        """Takes accumulated sums out of ``.grad``, where the next backward would add to them; late ones stay."""
        for slot in bucket.slots:
            if id(slot) not in self._late:
                slot.param.grad = None

    def _ensure_buffer(self, bucket: Bucket) -> None:
        if bucket.grad_full is not None and bucket.touched:
            return
        dtype = bucket.comm_dtype if self._reducing else bucket.accum_dtype
        if bucket.grad_full is not None:
            if bucket.grad_full.dtype == dtype:
                return
            self._give_back(bucket)
        if self.policy.every_backward:
            for index, buffer in enumerate(self._pool):
                if buffer.dtype == dtype:
                    bucket.use_grad_buffer(self._pool.pop(index)[: bucket.numel])
                    return
            buffer = empty_flat(self._pool_numel, dtype, bucket.device)
            bucket.use_grad_buffer(buffer[: bucket.numel])
        else:
            bucket.use_grad_buffer(empty_flat(bucket.numel, dtype, bucket.device))

    def _launch(self, bucket: Bucket, keep_in_flight: int = 0) -> None:
        """Sends a bucket, and waits until no more than so many (if overlapping, two) are in flight."""
        if not self.policy.contiguous:
            for position, slot in enumerate(bucket.slots):
                if slot.param.grad is not None:
                    self._late.pop(id(slot), None)
                    self._absorb(bucket, position, slot.param)
        self._ensure_buffer(bucket)
        bucket.zero_untouched()
        self._hide_views(bucket)
        full = self._full(bucket)
        if self.policy.gather_result and not bucket.reduced:
            self._place_shard(bucket, full)
        bucket.hold_shard()
        if full.dtype != bucket.comm_dtype:
            full = full.to(bucket.comm_dtype)
        bucket.launched = True
        overlap = self.policy.overlap
        if self.policy.use_reduce_scatter:
            pending = self.transport.reduce_scatter(
                full,
                bucket.grad_shard,
                scale=self.policy.post_scale,
                accumulate=bucket.reduced,
                eager=overlap,
                key=bucket.index,
            )
        else:
            pending = self._all_reduce_instead(bucket, full)
        self._in_flight.append((bucket, pending))
        self._wait_for_all_but(_MAX_IN_FLIGHT if overlap else keep_in_flight)

    def _wait_for_all_but(self, limit: int) -> None:
        while len(self._in_flight) > limit and self.may_wait(self._in_flight[0][0]):
            self._wait_oldest()

    @staticmethod
    def _place_shard(bucket: Bucket, full: torch.Tensor) -> None:
        """Stage 0: the first reduction of a window goes straight to its place in the full buffer, if it has the dtype."""
        if full.dtype == bucket.accum_dtype:
            bucket.grad_shard = bucket.slice_of(full)
        elif bucket.grad_shard._base is not None:
            bucket.grad_shard = empty_flat(bucket.shard_numel, bucket.accum_dtype, bucket.device)

    def _all_reduce_instead(self, bucket: Bucket, full: torch.Tensor) -> Pending:
        whole = self.transport.all_reduce(full, scale=self.policy.post_scale, eager=self.policy.overlap)
        accumulate = bucket.reduced

        def finish() -> None:
            whole.wait()
            own = bucket.slice_of(full)
            if accumulate:
                bucket.grad_shard.add_(own)
            else:
                bucket.grad_shard.copy_(own)

        return Pending(finish=finish)

    def _wait_oldest(self) -> None:
        bucket, pending = self._in_flight.pop(0)
        pending.wait()
        bucket.reduced = True
        bucket.touched.clear()
        if self.policy.every_backward:
            self._give_back(bucket)

    def _drain(self) -> None:
        while self._in_flight:
            self._wait_oldest()

    def _share_results(self, buckets: Sequence[Bucket]) -> None:
        """Stage 0: the reduced gradients go to every rank and show in ``param.grad``."""
        if not self.policy.gather_result:
            return
        pending = []
        for bucket in buckets:
            full = self._full(bucket)
            own = bucket.slice_of(full)
            if own.data_ptr() != bucket.grad_shard.data_ptr():
                own.copy_(bucket.grad_shard)
            pending.append(self.transport.all_gather(full, limit_numel=bucket.numel))
        for bucket, gather in zip(buckets, pending, strict=True):
            gather.wait()
            for slot in bucket.slots:
                if id(slot) not in self._late:
                    view = slot.view(self._full(bucket))
                    slot.param.grad = view if view.dtype == slot.param.dtype else None

    @staticmethod
    def _full(bucket: Bucket) -> torch.Tensor:
        if bucket.grad_full is None:
            raise AssertionError(f"bucket {bucket.index} has no gradient buffer; please report this")
        return bucket.grad_full

    def _give_back(self, bucket: Bucket) -> None:
        if bucket.grad_full is not None:
            whole = bucket.grad_full._base if bucket.grad_full._base is not None else bucket.grad_full
            # One is filled while others are in flight.
            if len(self._pool) <= _MAX_IN_FLIGHT and whole.numel() == self._pool_numel:
                self._pool.append(whole)
            bucket.grad_full = None


def _dense(slot: Slot) -> torch.Tensor:
    """The parameter's gradient, dense and outside any graph."""
    grad = slot.param.grad
    if grad is None:
        raise AssertionError(f"{slot.name} has no gradient; please report this")
    if grad.is_sparse:
        warning_once(f"{slot.name} has a sparse gradient; it is reduced as a dense one")
        grad = grad.to_dense()
    return grad.detach()
