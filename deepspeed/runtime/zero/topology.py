"""Who shares a partitioned model's shards, and how they travel: plain, MiCS, or the parts of ZeRO++.

| key | parameters | gradients |
| --- | --- | --- |
| (none) | gathered from all ranks | reduced to all ranks |
| ``mics_shard_size`` | gathered from a block of ranks that holds a whole model | reduced in the block, then over blocks |
| ``mics_hierarchical_params_gather`` | between nodes first, then inside | |
| ``zero_quantized_weights`` (qwZ) | travel in 8-bit blocks | |
| ``zero_quantized_nontrainable_weights`` | frozen ones are stored in 8-bit blocks | |
| ``zero_hpz_partition_size`` (hpZ) | backward gathers from copies in a block of ranks | |
| ``zero_quantized_gradients`` (qgZ) | | travel in 4 bits, ``zeropp_loco_param`` carries errors over |

Source: MiCS (Zhang et al. 2022); ZeRO++ (Wang et al. 2023); the ZeRO chapter of the API documentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepspeed import comm as dist
from deepspeed._core.layout.groups import hpz_groups, mics_groups
from deepspeed._core.params.compress import QuantisedGather, SecondaryShards, make_hierarchical_gather
from deepspeed._core.params.transport import AllReduceGather, ParamTransport, make_param_transport
from deepspeed._core.quant.loco import ErrorFeedback
from deepspeed._core.reduce.compress import GroupedReduce, QuantisedReduce, make_quantised_reduce
from deepspeed._core.reduce.transport import Transport, make_transport
from deepspeed.comm.subgroups import make_groups
from deepspeed.errors import ConfigError
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

__all__ = ["ShardTopology", "is_quantised", "param_transport", "shard_topology"]

_Key = tuple[object, ...]
_transports: dict[_Key, ParamTransport] = {}


@dataclass(frozen=True)
class ShardTopology:
    """The parts that the config chose; see the module."""

    gather: ParamTransport
    reduce: Transport
    secondary: SecondaryShards | None = None
    pack_frozen: bool = False
    """Frozen weights are stored in 8-bit blocks."""
    feedback: ErrorFeedback | None = None
    replica: int = 0
    """Which copy of the model this rank has a part of (MiCS)."""


def param_transport(
    group: torch.distributed.ProcessGroup | None, device: torch.device, zero: DeepSpeedZeroConfig | None = None
) -> ParamTransport:
    """The gathering side alone, the same object each time, so that parameters of a group are gathered together.

    Collective over the world with MiCS.
    """
    mics = zero.mics_shard_size if zero is not None and zero.mics_shard_size > 0 else -1
    two_stages = mics > 0 and zero is not None and zero.mics_hierarchical_params_gather
    quantise = zero is not None and zero.zero_quantized_weights
    pack = zero is not None and zero.zero_quantized_nontrainable_weights
    if mics > 0 and group is not None and dist.get_world_size(group) != dist.get_world_size():
        raise ConfigError("zero_optimization.mics_shard_size works over all ranks; leave out the group (or mpu)")
    by_sums = zero is not None and zero.use_all_reduce_for_fetch_params
    key: _Key = (group, device.type, mics, two_stages, quantise, pack, by_sums)
    known = _transports.get(key)
    if known is not None and not _stale(known):
        return known
    blocks: Sequence[Sequence[int]] | None = None
    replicas = None
    if mics > 0 and dist.get_world_size() > 1:
        layout = mics_groups(dist.get_world_size(), mics)
        blocks, group, replicas = layout.blocks, make_groups(layout.blocks), make_groups(layout.lines)
    made = make_param_transport(group, device)
    if by_sums:
        made = AllReduceGather(made)
    if two_stages:
        made = make_hierarchical_gather(made, device, groups=blocks)
    if quantise or pack:
        made = QuantisedGather(made, quantise=quantise)
    if replicas is not None and dist.get_world_size(replicas) > 1:
        made.replicas = replicas
    _transports[key] = made
    return made


def _stale(transport: ParamTransport) -> bool:
    """Whether it belongs to a world that has ended since."""
    size = dist.get_world_size(transport.group) if dist.is_initialized() else 1
    rank = dist.get_rank(transport.group) if dist.is_initialized() else 0
    return (transport.world_size, transport.rank) != (size, rank)


def shard_topology(
    zero: DeepSpeedZeroConfig, group: torch.distributed.ProcessGroup | None, device: torch.device
) -> ShardTopology:
    """Both sides, as the config says. Collective over the world."""
    gather = param_transport(group, device, zero)
    world = dist.get_world_size(group) if dist.is_initialized() else 1
    blocks: Sequence[Sequence[int]] | None = None
    replica = 0
    shard_group, lines = group, None
    if zero.mics_shard_size > 0 and world > 1:
        layout = mics_groups(world, zero.mics_shard_size)
        blocks, shard_group, lines = layout.blocks, make_groups(layout.blocks), make_groups(layout.lines)
        replica = dist.get_rank() // zero.mics_shard_size
    reduce = make_transport(shard_group, device)
    feedback = None
    if zero.zero_quantized_gradients:
        loco = zero.zeropp_loco_param
        feedback = ErrorFeedback(err_beta=loco.err_beta, reset_T=loco.reset_T) if loco is not None else None
        reduce = make_quantised_reduce(reduce, device, groups=blocks, feedback=feedback)
    if lines is not None:
        reduce = GroupedReduce(reduce, make_transport(lines, device))
    return ShardTopology(
        gather,
        reduce,
        secondary=_secondary(zero, group, device, world),
        pack_frozen=zero.zero_quantized_nontrainable_weights,
        feedback=feedback,
        replica=replica,
    )


def _secondary(
    zero: DeepSpeedZeroConfig, group: torch.distributed.ProcessGroup | None, device: torch.device, world: int
) -> SecondaryShards | None:
    size = zero.zero_hpz_partition_size
    if size <= 1 or world == 1:
        return None
    if zero.mics_shard_size > 0:
        raise ConfigError("zero_hpz_partition_size and mics_shard_size both choose who holds weights: use one of them")
    if group is not None and world != dist.get_world_size():
        raise ConfigError(
            "zero_optimization.zero_hpz_partition_size works over all ranks; leave out the group (or mpu)"
        )
    return SecondaryShards(make_param_transport(make_groups(hpz_groups(world, size).blocks), device))


def is_quantised(reduce: Transport) -> bool:
    """Whether gradients lose bits on the way."""
    return isinstance(getattr(reduce, "within", reduce), QuantisedReduce)
