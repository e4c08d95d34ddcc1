"""The optimizer of ZeRO stages 0, 1 and 2: buckets, reducer, precision and stepper composed; a stage is a choice of parts.

| stage | gradients | this rank updates |
| --- | --- | --- |
| 0 | reduced at the boundary, gathered | every parameter |
| 1 | reduced at the boundary | its slice of each bucket |
| 2 | reduced in each backward | its slice of each bucket |

Source: ZeRO (Rajbhandari et al. 2020) sections 5.1-5.2; the ZeRO chapter of the API documentation.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed import comm as dist
from deepspeed._core.ckpt.guard import before_change
from deepspeed._core.layout.flat import plan_buckets
from deepspeed._core.precision.norm import clip_factor, squared_norm
from deepspeed._core.precision.policy import PrecisionPolicy
from deepspeed._core.reduce.bucket import Bucket, Slot
from deepspeed._core.reduce.reducer import GradReducer, ReducePolicy
from deepspeed._core.reduce.transport import Pending, Transport, make_transport
from deepspeed._core.reduce.verify import GradientCheck
from deepspeed._core.step.handover import carry_state
from deepspeed._core.step.stepper import make_stepper
from deepspeed._core.store import OffloadPolicy
from deepspeed.comm import doctor
from deepspeed.runtime import optimizer_offload
from deepspeed.runtime.fp16.loss_scaler import LossScaler, LossScalerBase
from deepspeed.runtime.shard_owner import ShardOwner, StateInFiles
from deepspeed.utils.logging import log_dist, warning_once
from deepspeed.utils.tensor_fragment import register_owner, unregister_owner

__all__ = ["FlatOptimizer", "FlatSettings", "check_trainable", "take_back"]

# Who holds a torch optimizer now; weak on both sides.
_wrappers: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.ref[FlatOptimizer]] = weakref.WeakKeyDictionary()


def take_back(optimizer: torch.optim.Optimizer) -> None:
    """Takes the optimizer back from an earlier engine, whose shards are in its groups."""
    wrapper = _wrappers.get(optimizer)
    holder = wrapper() if wrapper is not None else None
    if holder is not None:
        holder.destroy()


@dataclass(frozen=True)
class FlatSettings:
    """What the config says about partitioning and the step; see the keys of ``zero_optimization``."""

    stage: int
    precision: PrecisionPolicy
    reduce: ReducePolicy
    bucket_numel: int
    allgather_numel: int
    allgather_partitions: bool = True
    gradient_clipping: float = 0.0
    fail_on_unused: bool = False
    """``ignore_unused_parameters: false``."""
    verify_steps: int = 0
    sub_group_numel: int = 1_000_000_000
    """``sub_group_size``: elements of this rank that one tile of the step holds; stage 3."""
    offload: OffloadPolicy | None = None
    """``offload_optimizer``; stages 1 to 3."""


def check_trainable(name: str, param: torch.Tensor) -> None:
    """Raises for parameters that cannot be put into shards."""
    if param.is_meta or not param.is_floating_point() or hasattr(param, "placements"):
        kind = "a DTensor" if hasattr(param, "placements") else f"{param.dtype} on {param.device}"
        raise ValueError(
            f"parameter {name} is {kind}: training needs plain floating-point tensors with data. Give meta tensors "
            "storage first, give plain tensors in place of DTensors, or freeze the parameter"
        )


class FlatOptimizer(ShardOwner):
    """Takes over the parameters of ``optimizer`` (re-pointed into flat buckets) and updates them shard by shard.

    ``names`` maps parameters to their full names in the model. ``reduce_now`` is asked at the start of each backward.
    Construction is collective: rank 0's weights are broadcast.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: Mapping[torch.nn.Parameter, str],
        settings: FlatSettings,
        *,
        device: torch.device,
        group: torch.distributed.ProcessGroup | None,
        loss_scaler: LossScalerBase | None = None,
        reduce_now: Callable[[], bool] = lambda: True,
        transport: Transport | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.settings = settings
        self.dp_process_group = group
        self.transport: Transport = transport if transport is not None else make_transport(group, device)
        self.loss_scaler = loss_scaler or LossScaler(1.0)
        self.overflow = False
        self.applied = False
        self.skipped_steps = 0
        self._global_grad_norm: float | None = None
        self._whole = settings.stage == 0
        take_back(optimizer)
        self._given_params = [list(group["params"]) for group in optimizer.param_groups]
        self._broken = ""
        self.moved = []
        self.states = optimizer_offload.make_states(optimizer, settings.offload, self.transport.rank)
        try:
            self.buckets = self._make_buckets(names, device)
            self.states.finish()
            optimizer_offload.agree(self.states.failure, group, device)
            self._masters = self._hand_over_masters()
        except BaseException:
            self.states.close()
            raise
        self._stepper = make_stepper(
            optimizer,
            self._masters,
            None if self._whole else self.states,
            optimizer_offload.make_transit(self.states, self.buckets, settings.offload, device),
        )
        self.reducer = GradReducer(self.buckets, self.transport, settings.reduce, reduce_now)
        self._check = GradientCheck(self.buckets, self.transport, settings.verify_steps)
        self._alive = True
        _wrappers[optimizer] = weakref.ref(self)
        for slot in self.slots():
            register_owner(slot.param, self, slot)

    # -- construction ------------------------------------------------------------------------------------------------

    def _make_buckets(self, names: Mapping[torch.nn.Parameter, str], device: torch.device) -> list[Bucket]:
        buckets: list[Bucket] = []
        precision = self.settings.precision
        for group_index, group in enumerate(self.optimizer.param_groups):
            trainable = [p for p in group["params"] if p.requires_grad]
            for param in trainable:
                check_trainable(names[param], param)
            kinds: dict[tuple[torch.dtype, torch.dtype], list[tuple[str, torch.nn.Parameter]]] = {}
            for param in trainable:
                dtype = precision.param_dtype or param.dtype
                kinds.setdefault((dtype, precision.comm_dtype_of(names[param], dtype)), []).append(
                    (names[param], param)
                )
            for (dtype, comm_dtype), named in kinds.items():
                plans = plan_buckets(
                    [p.numel() for _, p in named],
                    limit_numel=self.settings.bucket_numel,
                    world_size=self.transport.world_size,
                )
                for plan in plans:
                    bucket = Bucket(
                        len(buckets),
                        group_index,
                        plan,
                        named,
                        rank=self.transport.rank,
                        world_size=self.transport.world_size,
                        weight_dtype=dtype,
                        comm_dtype=comm_dtype,
                        accum_dtype=precision.accum_dtype_of(dtype),
                        device=device,
                    )
                    buckets.append(bucket)
        self._move_into(buckets)
        return buckets

    def _move_into(self, buckets: Sequence[Bucket]) -> None:
        """Fills the buckets with rank 0's values, which copies one while another travels; those that all have stay."""
        waiting: list[tuple[Bucket, torch.Tensor, Any]] = []

        def finish() -> None:
            bucket, source, work = waiting.pop(0)
            if work is not None:
                with doctor.waiting("broadcast", "initial weights"):
                    work.wait()
            bucket.adopt(source, sharded_master=not self._whole)
            if not self._whole:
                self.states.adopt(bucket)

        first = self.transport.global_rank(0)
        sends = self.transport.rank == 0
        for bucket, known in zip(buckets, self._known_to_all(buckets), strict=True):
            source, work = bucket.collect(values=sends or known), None
            if not known:
                work = dist.broadcast(source, src=first, group=self.dp_process_group, async_op=True)
            waiting.append((bucket, source, work))
            # Who copies nothing meanwhile frees the parameters of one bucket before it touches the memory of the next.
            while len(waiting) > (1 if sends and work is not None else 0):
                finish()
        while waiting:
            finish()

    def _known_to_all(self, buckets: Sequence[Bucket]) -> list[bool]:
        """For each bucket, whether all ranks have the same values, as they do after seeding alike or reading one file.

        Then there is nothing to send. Summing is ten times faster than sending, but needs the values in host memory.
        """
        count, rank = len(buckets), self.transport.rank
        if self.transport.world_size == 1 or not buckets:
            return [True] * count
        # A rank that cannot tell says what no other says.
        mine = torch.tensor([b.fingerprint() if b.in_host_memory else rank for b in buckets], dtype=torch.int64)
        extremes = torch.cat((mine, -mine)).to(buckets[0].device)
        with doctor.waiting("all_reduce", "fingerprints of the initial weights"):
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.dp_process_group)
        most, least = extremes.cpu().split(count)
        return (most == -least).tolist()  # type: ignore[no-any-return]

    def _hand_over_masters(self) -> dict[int, list[torch.Tensor]]:
        """Puts the tensors to update into the optimizer's own group dicts, in place of the model's parameters."""
        masters: dict[int, list[torch.Tensor]] = {}
        for bucket in self.buckets:
            if not self._whole:
                masters[bucket.index] = [tile.param for tile in self.states.tiles(bucket)]
            elif bucket.full_precision:
                masters[bucket.index] = [slot.param for slot in bucket.slots]
            else:
                masters[bucket.index] = [slot.view(bucket.master) for slot in bucket.slots]
        carry_state(self.optimizer, self.buckets, masters, None if self._whole else self.states)
        for group_index, group in enumerate(self.optimizer.param_groups):
            group["params"] = [m for b in self.buckets if b.group_index == group_index for m in masters[b.index]]
        return masters

    # -- what users and clients read ---------------------------------------------------------------------------------

    def slots(self) -> list[Slot]:
        """Every trained parameter's place, in bucket order."""
        return [slot for bucket in self.buckets for slot in bucket.slots]

    @property
    def stage(self) -> int:
        return self.settings.stage

    @property
    def single_partition_of_fp32_groups(self) -> list[torch.Tensor]:
        """The fp32 masters that this rank updates, 1-D, one a bucket; copies of what is in files."""
        return [self.master_shard(bucket) for bucket in self.buckets]

    @property
    def bit16_groups(self) -> list[list[torch.nn.Parameter]]:
        """The model's trained parameters, by optimizer group."""
        groups: list[list[torch.nn.Parameter]] = [[] for _ in self.optimizer.param_groups]
        for bucket in self.buckets:
            groups[bucket.group_index] += [slot.param for slot in bucket.slots]
        return groups

    fp16_groups = bit16_groups

    @property
    def averaged_gradients(self) -> dict[int, list[torch.Tensor]]:
        """This rank's reduced gradient shards by optimizer group; still times the loss scale."""
        result: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(self.optimizer.param_groups))}
        for bucket in self.buckets:
            if bucket.reduced:
                result[bucket.group_index].append(bucket.grad_shard)
        return result

    def get_fp32_grad_partitions(self) -> dict[int, dict[int, torch.Tensor]]:
        """Reduced gradient shards in fp32, by optimizer group and bucket."""
        result: dict[int, dict[int, torch.Tensor]] = {}
        for bucket in self.buckets:
            if bucket.reduced:
                result.setdefault(bucket.group_index, {})[bucket.index] = bucket.grad_shard.float()
        return result

    @property
    def loss_scale(self) -> float:
        return self.loss_scaler.loss_scale

    cur_scale = loss_scale

    @property
    def dynamic_loss_scale(self) -> bool:
        return self.loss_scaler.dynamic

    @property
    def grad_norm(self) -> float | None:
        """Global norm of the last step's gradients before clipping; None before the first step."""
        return self._global_grad_norm

    def master_of(self, bucket: Bucket) -> list[torch.Tensor]:
        """The tensors of a bucket that are keys of ``optimizer.state``."""
        return self._masters[bucket.index]

    # -- the step ----------------------------------------------------------------------------------------------------

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """``loss.backward()`` with loss scaling and the reduction that is due. Collective at reducing backwards."""
        self._check_usable()
        self.reducer.end_backward()
        self.reducer.begin_backward(fresh=bool(kwargs.get("create_graph")))
        try:
            (loss * self.loss_scale if self.loss_scale != 1.0 else loss).backward(**kwargs)
            self._backward_returned()
            self.reducer.end_backward()
        except BaseException:
            self.reducer.abort()
            self._check.reset()
            raise

    def end_backward(self) -> None:
        """Closes a plain ``loss.backward()``: what comes next is another micro-batch. Collective if that reduces."""
        self._check_usable()
        self._backward_returned()
        self.reducer.end_backward()

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Applies the reduced gradients of the window, or skips them if they are not finite. Collective."""
        if closure is not None:
            raise ValueError("closures are not supported: gradients come from engine.backward(loss)")
        self._check_usable()
        self._backward_returned()
        self.reducer.reduce_rest()
        self.applied = False
        if not self.reducer.has_gradients:
            warning_once("step() found no gradients to apply: there was no backward since the last step")
            self.overflow = False
            return
        norm = self._agree_on_norm()
        self._check.compare(self.settings.reduce, self.loss_scale)
        self._global_grad_norm = norm
        self.overflow = self.settings.precision.check_overflow and not math.isfinite(norm)
        if self.overflow:
            self._report_skip()
        else:
            factor = clip_factor(norm, self.settings.gradient_clipping) / self.loss_scale
            before_change()
            self._before_update()
            self._update(factor)
            self._after_update()
        self.applied = not self.overflow
        self.reducer.end_window()
        self.loss_scaler.update_scale(self.overflow)

    def _update(self, factor: float) -> None:
        """Updates the shards; if a file of any rank fails, all raise, and this optimizer steps no more until a load."""
        if self.states.files is None:
            self._stepper.update(self.buckets, factor, self.publish_bucket)
            return
        self._broken = "the last step did not end"
        failure: OSError | None = None
        try:
            self._stepper.update(self.buckets, factor, self.publish_bucket)
        except OSError as error:
            failure = error
        try:
            self.agree_on_files(failure)
        except OSError as error:
            self._broken = f"the last step failed in the middle ({error})"
            self._drop_window()
            raise
        self._broken = ""

    def _backward_returned(self) -> None:
        """A backward is over; for stages that keep more than gradients."""

    def _before_update(self) -> None:
        """The step is about to change the shards."""

    def _after_update(self) -> None:
        """The shards have changed."""

    def _extra_flags(self) -> list[float]:
        """Values that travel with the norm, to be summed over the ranks."""
        return []

    def _take_extra(self, sums: list[float]) -> None:
        """Gets the sums of :meth:`_extra_flags`."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of the window. ``step`` does this by itself."""
        self._drop_window()

    def _drop_window(self) -> None:
        self.reducer.abort()
        self._check.reset()

    def settle_gradients(self) -> None:
        """Ends an open backward and takes late gradients in, so that the reduced ones are complete. Collective."""
        self.reducer.end_backward()
        if self.reducer.settled or not self.reducer.has_gradients:
            return
        late = torch.tensor([float(self.reducer.late)], dtype=torch.float64, device=self.buckets[0].device)
        if self.transport.sum_scalars(late).item():
            self.reducer.reduce_late()
        self.reducer.settled = True

    def _check_usable(self) -> None:
        """Refuses to train what is no longer ours: silently, nothing would reach the model."""
        self._require_alive()
        for bucket in self.buckets:
            base = bucket.weights.data_ptr()
            for slot in bucket.slots:
                at = base + slot.start * bucket.weights.element_size()
                if slot.numel and (slot.param.data_ptr() != at or slot.param.dtype != bucket.weights.dtype):
                    raise RuntimeError(
                        f"the data of {slot.name} was replaced after deepspeed.initialize (by .to(), .half(), or by "
                        "assigning .data), so that training would not reach it. Convert the model before initialize, "
                        "and write values in place: param.data.copy_(values)"
                    )

    def _require_alive(self) -> None:
        if not self._alive:
            raise RuntimeError(
                "this engine does not train any more: it was destroyed, or a later deepspeed.initialize took over "
                "its parameters. Use the later engine"
            )
        self.require_intact()
        self.require_here()

    def release_weights(self) -> None:
        """The weights are about to be moved; for stages that keep more than one copy."""

    def restore_weights(self) -> None:
        """They are back."""

    def _agree_on_norm(self) -> float:
        """The unscaled global norm, the same float on all ranks; takes late gradients in, refuses unused ones."""
        total, late, unused = self._sum_over_ranks()
        if late:
            self.reducer.reduce_late()
            total, late, unused = self._sum_over_ranks()
        if unused:
            names = self._names_of(self.reducer.unused())
            self._drop_window()
            raise RuntimeError(
                "zero_optimization.ignore_unused_parameters is false, and these parameters had no gradient on at least "
                f"one rank since the last step: {', '.join(names)}. Use them in the forward, freeze them, or set "
                "ignore_unused_parameters to true"
            )
        return math.sqrt(total) / self.loss_scale if math.isfinite(total) else math.inf

    def _sum_over_ranks(self) -> tuple[float, bool, bool]:
        square = squared_norm(bucket.grad_shard for bucket in self.buckets)
        unused_here = self.settings.fail_on_unused and bool(self.reducer.unused())
        flags = torch.tensor([float(self.reducer.late), float(unused_here), *self._extra_flags()], dtype=torch.float64)
        packed = torch.cat([square.reshape(1), flags.to(square.device)])
        total, late, unused, *extra = self.transport.sum_scalars(packed).tolist()
        self._take_extra(extra)
        return total, late > 0, unused > 0

    def publish_bucket(self, bucket: Bucket) -> Pending:
        """Sends this rank's part of a bucket's weights to where the others have it. Collective."""
        if self._whole:
            return Pending()
        if not self.settings.allgather_partitions:
            return self.transport.broadcast_slices(bucket.weights)
        return self.transport.all_gather(bucket.weights, limit_numel=self.settings.allgather_numel)

    def _report_skip(self) -> None:
        """Counts the skip and logs the first parameter with a non-finite gradient. Collective."""
        self.skipped_steps += 1
        found: list[Slot] = []
        for slot in self.slots():
            _, begin, numel = slot.overlap(self.transport.rank)
            if numel and not bool(slot.bucket.grad_shard[begin : begin + numel].isfinite().all()):
                found.append(slot)
                break
        names = self._names_of(found) or ["only their sum of squares is not finite"]
        log_dist(
            f"non-finite gradients: step skipped ({self.skipped_steps} so far), first parameter: {names[0]}",
            level=logging.WARNING,
        )

    def _names_of(self, slots: Sequence[Slot]) -> list[str]:
        """Names of the parameters that any rank gives here, in bucket order. Collective."""
        every = self.slots()
        given = {id(slot) for slot in slots}
        flags = torch.tensor([float(id(s) in given) for s in every], dtype=torch.float64, device=self.buckets[0].device)
        counts = self.transport.sum_scalars(flags).tolist()
        return [slot.name for slot, count in zip(every, counts, strict=True) if count]

    # -- state -------------------------------------------------------------------------------------------------------

    def initialize_optimizer_states(self) -> None:
        """Makes the optimizer allocate its state now, by a step with zero gradients and zero learning rate.

        Weights keep their values; step counts go back to zero.
        """
        if not self.all_in_memory:
            return  # the space is reserved, and the states are made tile by tile in the first step
        saved = [dict(group) for group in self.optimizer.param_groups]
        tensors = [m for bucket in self.buckets for m in self._masters[bucket.index]]
        before = [m.detach().clone() for m in tensors]
        for tensor in tensors:
            tensor.grad = torch.zeros_like(tensor)
        self.optimizer.step()
        for tensor, value in zip(tensors, before, strict=True):
            tensor.grad = None
            tensor.detach().copy_(value)
            for key, entry in self.optimizer.state.get(tensor, {}).items():
                if isinstance(entry, torch.Tensor):
                    entry.zero_()
                elif isinstance(entry, (int, float)) and not isinstance(entry, bool):
                    self.optimizer.state[tensor][key] = type(entry)(0)
        for group, old in zip(self.optimizer.param_groups, saved, strict=True):
            group.update(old)

    def refresh_master(self) -> None:
        """Makes the masters follow the model's weights, after someone wrote to those. No communication."""
        before_change()
        for bucket in self.buckets:
            if bucket.full_precision:
                continue
            if self._whole:
                bucket.master.copy_(bucket.weights)
            else:
                self.states.write(bucket, None, 0, bucket.own_weights)

    def publish_weights(self) -> None:
        """Makes the model's weights on all ranks follow the masters, after those were loaded or set. Collective."""
        before_change()
        failure: OSError | None = None
        for bucket in self.buckets:
            if not bucket.full_precision and self._whole:
                for slot in bucket.slots:
                    slot.view(bucket.weights).copy_(slot.view(bucket.master))
            elif not bucket.full_precision:
                failure = self._master_to_weights(bucket) or failure
            self.publish_bucket(bucket).wait()
        self.agree_on_files(failure)

    def store_weight(self, slot: Slot, begin: int, values: torch.Tensor) -> None:
        """Writes elements of a model weight (flat, from ``begin``), as far as this rank holds them."""
        slot.param.data.view(-1)[begin : begin + values.numel()].copy_(values)

    def settle_weights(self) -> None:
        """Takes back what users have bound elsewhere and may; no communication."""

    def weight_written(self, slot: Slot) -> None:
        """A weight's values were changed from outside: its master follows where they differ."""

    def state_dict(self) -> dict[str, Any]:
        """This rank's part in memory layout: masters by bucket, the inner optimizer's state, the scaler.

        If it is in files, reading what this returns raises ``RuntimeError``.
        """
        if why := self._not_in_memory("state_dict()", "save_checkpoint"):
            return StateInFiles(why)
        return {
            "zero_stage": self.stage,
            "single_partition_of_fp32_groups": [bucket.master for bucket in self.buckets],
            "base_optimizer_state": self.optimizer.state_dict(),
            "loss_scaler": self.loss_scaler.state_dict(),
            "overflow": self.overflow,
        }

    def load_state_dict(self, state_dict: dict[str, Any], **kwargs: Any) -> None:
        """Takes what :meth:`state_dict` gave on the same rank of the same run layout. Collective."""
        if why := self._not_in_memory("load_state_dict()", "load_checkpoint"):
            raise RuntimeError(why)
        given = [tuple(t.shape) for t in state_dict["single_partition_of_fp32_groups"]]
        expected = [tuple(bucket.master.shape) for bucket in self.buckets]
        if given != expected or state_dict["zero_stage"] != self.stage:
            raise ValueError(
                f"this state is of ZeRO stage {state_dict['zero_stage']} with shards {given}; this optimizer is of "
                f"stage {self.stage} with shards {expected}. Use engine.load_checkpoint, which redistributes"
            )
        for bucket, master in zip(self.buckets, state_dict["single_partition_of_fp32_groups"], strict=True):
            bucket.master.detach().copy_(master)
        self.optimizer.load_state_dict(state_dict["base_optimizer_state"])
        self.loss_scaler.load_state_dict(state_dict["loss_scaler"])
        self.publish_weights()

    def destroy(self) -> None:
        """Removes hooks and frees gradient buffers; the model keeps its weights. Idempotent.

        The torch optimizer gets the model's parameters back, without state, so that it can be used again.
        """
        if self._alive:
            self._alive = False
            self._check.detach()
            self.reducer.detach()
            self.states.close()
            for slot in self.slots():
                unregister_owner(slot.param, self)
            _wrappers.pop(self.optimizer, None)
            self.optimizer.state.clear()
            for group, params in zip(self.optimizer.param_groups, self._given_params, strict=False):
                group["params"] = params
