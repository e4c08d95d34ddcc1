"""What runs a partitioned model: its parameters' lifecycle and the hooks on its modules.

An engine with an optimizer keeps it as ``engine.optimizer.parameter_offload``; without one it is ``engine.optimizer``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Any

import torch

from deepspeed._core.params.handle import ParamHandle, handle_of, handles_of
from deepspeed._core.params.hooks import ModelHooks
from deepspeed._core.params.lifecycle import Coordinator
from deepspeed._core.params.planner import Budget
from deepspeed._core.params.store import ShardStore
from deepspeed._core.params.strays import StrayUses
from deepspeed._core.params.units import UnitLimits
from deepspeed.comm.agreement import together
from deepspeed.runtime.zero import shard_homes
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.module_state import watch_state
from deepspeed.runtime.zero.partition_parameters import partition_parameter
from deepspeed.runtime.zero.topology import ShardTopology, shard_topology

__all__ = ["DeepSpeedZeRoOffload", "budget_of", "limits_of", "mark_persistent", "partition_module"]

_SMALLEST_UNIT_BOUND = 1 << 24


def budget_of(zero: DeepSpeedZeroConfig) -> Budget:
    """Limits on gathered parameters.

    ``max_reuse_distance`` keeps parameters from forward to backward if the model is smaller than it. Where none of the
    three keys is given, their documented defaults would keep any model of less than a billion parameters whole; then
    parameters are released after the forward, but for the last ones, and two units are fetched ahead.
    """
    keys = {"max_reuse_distance", "max_live_parameters", "prefetch_bucket_size"}
    return Budget(
        max_live=zero.max_live_parameters,
        max_reuse_distance=zero.max_reuse_distance,
        prefetch=zero.prefetch_bucket_size,
        follow_units=not keys & zero.model_fields_set,
    )


def limits_of(zero: DeepSpeedZeroConfig) -> UnitLimits:
    """How large a fetch unit may be."""
    bound = max(zero.prefetch_bucket_size, _SMALLEST_UNIT_BOUND)
    return UnitLimits(min(bound, max(1, zero.max_live_parameters // 2)), zero.module_granularity_threshold)


def mark_persistent(handles: Iterable[ParamHandle], zero: DeepSpeedZeroConfig) -> None:
    """Parameters below the threshold stay whole, as far as the model's cap allows."""
    total = 0
    cap = zero.model_persistence_threshold if zero.model_persistence_threshold is not None else sys.maxsize
    for handle in handles:
        small = handle.numel < zero.param_persistence_threshold and total + handle.numel <= cap
        handle.persistent = small or handle.numel == 0
        handle.param.ds_persist = handle.persistent  # type: ignore[attr-defined]
        total += handle.numel if small else 0


def partition_module(
    module: torch.nn.Module,
    zero: DeepSpeedZeroConfig,
    *,
    group: torch.distributed.ProcessGroup | None,
    device: torch.device,
    dtype: torch.dtype | None,
    keep_dtype: set[torch.nn.Parameter],
    store: ShardStore | None = None,
) -> DeepSpeedZeRoOffload:
    """Partitions what is whole in the module, and makes the object that runs it; hooks come with :meth:`attach`.

    ``dtype``: of floating-point parameters, other than those of ``keep_dtype``, whose shards an optimizer will adopt.
    ``store``: where shards rest. Collective.
    """
    topology = shard_topology(zero, group, device)
    transport = topology.gather
    for name, param in module.named_parameters():
        known = handle_of(param)
        if known is None:
            wanted = None if param in keep_dtype else dtype
            partition_parameter(param, transport, dtype=wanted, device=device, name=name)
            continue
        known.name = name
        if known.transport.world_size != transport.world_size:
            raise ValueError(
                f"parameter {name} was partitioned over {known.transport.world_size} ranks (zero.Init), and this engine "
                f"shares parameters over {transport.world_size}: give both the same group and MiCS settings"
            )
        if dtype is not None and param not in keep_dtype and param.is_floating_point() and known.dtype != dtype:
            known.release()
            known.convert(dtype)
        if known.transport is not transport:
            known.release()
            known.transport = transport
    handles = handles_of(module.parameters())
    if topology.pack_frozen:
        for handle in handles:
            if not handle.param.requires_grad and handle.packed is None and handle.dtype.is_floating_point:
                handle.release()
                handle.pack(handle.shard)
    mark_persistent(handles, zero)
    stays = {handle.id for handle in handles if handle.persistent}
    adopted = {handle.id for handle in handles if handle.param in keep_dtype}
    if store is not None or any(handle.rest is not None for handle in handles):
        together(lambda: shard_homes.settle(handles, store, stays, adopted))
        shard_homes.describe(handles, store)
    watch_state(module)
    return DeepSpeedZeRoOffload(module, handles, zero, topology, store)


class DeepSpeedZeRoOffload:
    """Lifecycle and hooks of one partitioned module. Made by :func:`partition_module`."""

    def __init__(
        self,
        module: torch.nn.Module,
        handles: list[ParamHandle],
        zero: DeepSpeedZeroConfig,
        topology: ShardTopology,
        store: ShardStore | None = None,
    ) -> None:
        self.module = module
        self.store = store
        # One that is replaced in the module later is gathered in vain, but not lost.
        self._params = [handle.param for handle in handles]
        self.topology = topology
        self.coordinator = Coordinator(handles, budget_of(zero), topology.secondary)
        self.coordinator.one_by_one = zero.allgather_sequential
        self.coordinator.book.talkative = zero.log_trace_cache_warnings
        self._hooks = ModelHooks(module, self.coordinator, limits_of(zero))
        self._strays = StrayUses(module, self.coordinator)
        self.param_coordinator = _TraceView(self.coordinator)

    @property
    def forward_hooks(self) -> list[Any]:
        """Handles of the hooks on modules; clients remove them and assign an empty list."""
        return self._hooks.forward_hooks

    @forward_hooks.setter
    def forward_hooks(self, value: list[Any]) -> None:
        self._hooks.forward_hooks = value

    @property
    def backward_hooks(self) -> list[Any]:
        """Handles of the hooks on parameters."""
        return self._hooks.backward_hooks

    @backward_hooks.setter
    def backward_hooks(self, value: list[Any]) -> None:
        self._hooks.backward_hooks = value

    def attach(self) -> None:
        """Hooks the module; persistent parameters become whole. Collective."""
        self._hooks.attach()
        self._strays.forget()
        self.coordinator.refresh_persistent()

    def _register_deepspeed_module(self, module: torch.nn.Module, count: list[int] | None = None) -> None:
        """Puts the hooks back after a client has removed them."""
        self._hooks.attach()
        self._strays.forget()

    def watching(self) -> contextlib.AbstractContextManager[Any]:
        """A context for a pass of the module, in which uses of parameters are found that no hook sees."""
        return self._strays.watching()

    setup_zero_stage3_hooks = attach

    def empty_partition_cache(self) -> None:
        """Releases everything that is gathered, persistent parameters too; they come back when next used."""
        self._hooks.release_persistent()

    def planned_nbytes(self) -> dict[str, int] | None:
        """Bytes of this rank's offloaded shards, see :func:`shard_homes.planned_nbytes`; None if there are none."""
        return None if self.store is None else shard_homes.planned_nbytes(self.coordinator.handles, self.store)

    def refresh(self) -> None:
        """Makes what is whole follow the shards, after somebody wrote to those. Collective."""
        self.coordinator.release_all()
        self.coordinator.forget_copies()
        self.coordinator.refresh_persistent()

    def destroy(self) -> None:
        """Removes the hooks; parameters stay partitioned. Idempotent."""
        self._hooks.detach()
        self.coordinator.abort()


class _TraceView:
    """What clients ask about the order of uses (``param_coordinator``)."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def is_invalid_trace(self) -> bool:
        return self._coordinator.plan is None

    def is_complete_trace(self) -> bool:
        return self._coordinator.plan is not None

    def is_record_trace(self) -> bool:
        return self._coordinator.plan is None

    def _invalidate_trace(self) -> None:
        self._coordinator.forget_plan()

    def reset_step(self) -> None:
        """Nothing to do: every pass starts anew."""
