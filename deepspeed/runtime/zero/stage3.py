"""ZeRO-3: gradients, optimizer states and parameters partitioned.

Buckets hold a piece of each of their parameters (:mod:`deepspeed._core.params.bucket`); the parameters' comings and goings
are the coordinator's (:mod:`deepspeed._core.params.lifecycle`). Everything else is as in stages 1 and 2.

Source: ZeRO (Rajbhandari et al. 2020) section 5.3; the ZeRO chapter of the API documentation.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import torch

from deepspeed._core.ckpt.guard import before_change
from deepspeed._core.params.bucket import Rows, ShardBucket, plan_shard_buckets
from deepspeed._core.params.handle import ParamHandle, handle_of
from deepspeed._core.reduce.bucket import Bucket, Slot
from deepspeed._core.reduce.transport import Pending
from deepspeed.comm.agreement import together
from deepspeed.runtime.flat_optimizer import FlatOptimizer, check_trainable
from deepspeed.runtime.zero.estimate import (
    estimate_zero3_model_states_mem_needs,
    estimate_zero3_model_states_mem_needs_all_cold,
    estimate_zero3_model_states_mem_needs_all_live,
)
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

__all__ = [
    "DeepSpeedZeroOptimizer_Stage3",
    "estimate_zero3_model_states_mem_needs",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
]


class DeepSpeedZeroOptimizer_Stage3(FlatOptimizer):
    """ZeRO stage 3 around a torch optimizer, whose groups hold this rank's fp32 shards."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, *args: Any, parameter_offload: DeepSpeedZeRoOffload, **kwargs: Any
    ) -> None:
        self.parameter_offload = parameter_offload
        self._rows: Rows | None = None
        super().__init__(optimizer, *args, **kwargs)
        coordinator = parameter_offload.coordinator
        coordinator.on_tick, coordinator.on_backward_end = self._send_due, self.reducer.end_backward
        self.reducer.may_wait, self.reducer.sends_when_ready = self._is_due, self._sends_when_ready
        self._known_ready: dict[int, int] | None = None
        self._points: list[int] = []

    # -- construction ------------------------------------------------------------------------------------------------

    def _make_buckets(self, names: Mapping[torch.nn.Parameter, str], device: torch.device) -> list[Bucket]:
        buckets: list[Bucket] = []
        precision, settings = self.settings.precision, self.settings
        for group_index, group in enumerate(self.optimizer.param_groups):
            kinds: dict[tuple[torch.dtype, torch.dtype], list[ParamHandle]] = {}
            for param in group["params"]:
                if not param.requires_grad:
                    continue
                check_trainable(names[param], param)
                handle = handle_of(param)
                if handle is None:
                    raise ValueError(
                        f"parameter {names[param]} of optimizer group {group_index} is not in the model: ZeRO-3 trains "
                        "parameters that it has partitioned. Make it a part of the model"
                    )
                handle.name = names[param]
                dtype = precision.param_dtype or param.dtype
                kinds.setdefault((dtype, precision.comm_dtype_of(names[param], dtype)), []).append(handle)
            for (dtype, comm_dtype), handles in kinds.items():
                plans = plan_shard_buckets(
                    handles, limit_numel=settings.bucket_numel, shard_limit_numel=max(1, settings.sub_group_numel)
                )
                for members in plans:
                    bucket = ShardBucket(
                        len(buckets),
                        group_index,
                        [(handles[i].name, handles[i].param) for i in members],
                        rank=self.transport.rank,
                        world_size=self.transport.world_size,
                        weight_dtype=dtype,
                        comm_dtype=comm_dtype,
                        accum_dtype=precision.accum_dtype_of(dtype),
                        device=device,
                    )
                    if self.parameter_offload.store is None:
                        bucket.adopt_shards()
                    else:
                        together(bucket.adopt_shards)
                    if bucket.away:
                        bucket.rows = self._rows = self._rows or Rows()
                    self.states.adopt(bucket)
                    buckets.append(bucket)
        return buckets

    @property
    def _shard_buckets(self) -> list[ShardBucket]:
        return [bucket for bucket in self.buckets if isinstance(bucket, ShardBucket)]

    # -- what users and clients read ---------------------------------------------------------------------------------

    @property
    def fp32_partitioned_groups_flat(self) -> list[torch.Tensor]:
        """The fp32 masters that this rank updates, 1-D, one a bucket; copies of what is in files."""
        return self.single_partition_of_fp32_groups

    @property
    def fp16_partitioned_groups(self) -> list[list[torch.Tensor]]:
        """This rank's weight shards, by optimizer group."""
        groups: list[list[torch.Tensor]] = [[] for _ in self.optimizer.param_groups]
        for bucket in self.buckets:
            groups[bucket.group_index] += [slot.param.ds_tensor for slot in bucket.slots]  # type: ignore[attr-defined]
        return groups

    # -- the step ----------------------------------------------------------------------------------------------------

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        coordinator = self.parameter_offload.coordinator
        try:
            super().backward(loss, **kwargs)
        except BaseException:
            coordinator.abort()
            raise

    # Gradients are sent at agreed points of the backward: [Note: the clock] in _core.params.agreement, and
    # [Note: other collectives] in _core.reduce.reducer.

    def _sending_points(self) -> list[int]:
        """When each bucket is sent, on the coordinator's clock; from the last bucket to the first."""
        ready = self.parameter_offload.coordinator.book.ready
        if ready is not self._known_ready:
            self._known_ready, self._points, latest = ready, [], 0
            for bucket in reversed(self.buckets):
                latest = max([latest, *(ready.get(slot.param.ds_id, sys.maxsize) for slot in bucket.slots)])  # type: ignore[attr-defined]
                self._points.append(latest)
        return self._points

    def _send_due(self) -> None:
        clock = self.parameter_offload.coordinator.clock
        due = bisect_right(self._sending_points(), clock) if clock is not None else 0
        if due:
            self.reducer.send_through(len(self.buckets) - due)

    def _is_due(self, bucket: Bucket) -> bool:
        clock = self.parameter_offload.coordinator.clock
        return clock is None or self._sending_points()[len(self.buckets) - 1 - bucket.index] <= clock

    def _sends_when_ready(self) -> bool:
        # On gloo the messages of buckets and of parameters do not meet; elsewhere their order must be the same everywhere.
        return self.parameter_offload.coordinator.clock is None or self.buckets[0].device.type == "cpu"

    def _backward_returned(self) -> None:
        self.parameter_offload.coordinator.end_backward()

    def _before_update(self) -> None:
        self.parameter_offload.coordinator.before_update()

    def _after_update(self) -> None:
        coordinator = self.parameter_offload.coordinator
        self._settle_rows()
        coordinator.refresh_persistent(stepped=True)
        coordinator.read_first(coordinator.book.plans[True])

    def _settle_rows(self) -> None:
        """Returns when the weights are where they rest; what fails on any rank is raised on all. Collective."""
        if self._rows is None:
            return
        try:
            together(self._rows.drain)
        except Exception as error:
            self._broken = f"weights could not be written ({error})"
            raise

    def _extra_flags(self) -> list[float]:
        return self.parameter_offload.coordinator.book.flags()

    def _take_extra(self, sums: list[float]) -> None:
        coordinator = self.parameter_offload.coordinator
        if coordinator.book.same_deviation(sums, self.transport.world_size):
            coordinator.book.adopt(coordinator.units)

    def publish_bucket(self, bucket: Bucket) -> Pending:
        if isinstance(bucket, ShardBucket):
            bucket.send_away()
        return Pending()

    def _check_usable(self) -> None:
        self._require_alive()
        self.settle_weights()

    def settle_weights(self) -> None:
        for bucket in self._shard_buckets:
            bucket.settle_rebound()

    # -- state -------------------------------------------------------------------------------------------------------

    def refresh_master(self) -> None:
        before_change()
        for bucket in self._shard_buckets:
            if not bucket.full_precision:
                for position, slot in enumerate(bucket.slots):
                    self.states.write(bucket, None, slot.start, bucket.weights_of(position))

    def publish_weights(self) -> None:
        before_change()
        coordinator = self.parameter_offload.coordinator
        coordinator.release_all()
        coordinator.forget_copies()
        failure: OSError | None = None
        for bucket in self._shard_buckets:
            if not bucket.full_precision:
                failure = self._master_to_weights(bucket) or failure
                bucket.send_away()
        self.agree_on_files(failure)
        self._settle_rows()
        coordinator.refresh_persistent()

    def release_weights(self) -> None:
        coordinator = self.parameter_offload.coordinator
        coordinator.release_all()
        coordinator.forget_copies()

    def restore_weights(self) -> None:
        self.parameter_offload.coordinator.refresh_persistent()

    def store_weight(self, slot: Slot, begin: int, values: torch.Tensor) -> None:
        handle = handle_of(slot.param)
        if handle is None:
            raise AssertionError(f"{slot.name} is not partitioned; please report this")
        own_begin, own_end = handle.own_range
        low, high = max(begin, own_begin), min(begin + values.numel(), own_end)
        if low < high:
            handle.store(values[low - begin : high - begin], low - own_begin)
        if handle.available:
            slot.param.data.view(-1)[begin : begin + values.numel()].copy_(values)

    def weight_written(self, slot: Slot) -> None:
        """Takes changed elements of a weight's shard into its master; others keep their precision."""
        bucket = slot.bucket
        if bucket.full_precision:
            return
        _, at, numel = slot.overlap(self.transport.rank)
        new = bucket.own_part(slot)
        master = self.states.read(bucket, None, at, at + numel)
        changed = master.to(new.dtype) != new
        if bool(changed.any()):
            self.states.write(bucket, None, at, torch.where(changed, new.to(master.dtype), master))

    def destroy(self) -> None:
        super().destroy()
        coordinator = self.parameter_offload.coordinator
        coordinator.on_tick = coordinator.on_backward_end = None
        self.parameter_offload.destroy()

    def empty_partition_cache(self) -> None:
        """Releases all gathered parameters."""
        self.parameter_offload.empty_partition_cache()
