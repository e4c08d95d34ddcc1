"""Optimizer offload, from config to stores: which buckets go where, what that takes, and what ranks agree on.

Source: ZeRO-Offload (Ren et al. 2021), ZeRO-Infinity (Rajbhandari et al. 2021) section 5; the offload options in the ZeRO
chapter of the API documentation.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from deepspeed import comm as dist
from deepspeed._core.aio import IoSettings, io_settings
from deepspeed._core.reduce.bucket import Bucket
from deepspeed._core.step.template import state_template
from deepspeed._core.store import FileStore, HostStore, OffloadPolicy, ShardStates
from deepspeed._core.store.runfile import open_run_file
from deepspeed._core.store.tiles import is_elementwise
from deepspeed._core.store.transit import Transit
from deepspeed.errors import ConfigError
from deepspeed.ops.flat_optimizer import FlatOptimizer as OurOptimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_sections.aio import AioConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, OffloadDeviceEnum
from deepspeed.utils.logging import log_dist

if TYPE_CHECKING:
    from deepspeed.runtime.flat_optimizer import FlatOptimizer

__all__ = [
    "MemoryPlan",
    "agree",
    "announce",
    "make_states",
    "make_transit",
    "offload_policy",
    "plan_memory",
    "require_fitting",
]

_KEY = "zero_optimization.offload_optimizer"
_PATH_KEY = f"{_KEY}.nvme_path"

# For tiles of tens of MiB; the documented defaults of `aio` are for smaller requests.
_IO = IoSettings(block_nbytes=4 << 20, depth=8, threads=4)


def offload_policy(zero: DeepSpeedZeroConfig, aio: AioConfig) -> OffloadPolicy | None:
    """What the config asks for; None if optimizer states stay on the device."""
    section = zero.offload_optimizer
    if section is None or section.device == OffloadDeviceEnum.none:
        return None
    given = {name for name in aio.model_fields_set if name in AioConfig.model_fields}
    return OffloadPolicy(
        device=section.device.value,
        folder=section.nvme_path,
        ratio=float(section.ratio),
        pin_memory=bool(section.pin_memory),
        tile_numel=max(1, min(section.buffer_size, zero.sub_group_size)),
        slots=max(1, min(section.buffer_count, 1 + int(section.pipeline_read) + int(section.pipeline_write))),
        read_ahead=bool(section.pipeline_read),
        write_behind=bool(section.pipeline_write),
        fast_init=bool(section.fast_init),
        io=io_settings(aio.block_size, aio.queue_depth, aio.single_submit, aio.intra_op_parallelism) if given else _IO,
    )


def require_fitting(config: DeepSpeedConfig, optimizer: torch.optim.Optimizer) -> None:
    """As documented, offload asks for an optimizer whose update is made for the CPU, unless the user insists.

    Raises:
        ConfigError: it is another, and ``zero_force_ds_cpu_optimizer`` is not false.
    """
    zero = config.zero_config.offload_optimizer
    if zero is None or zero.device == OffloadDeviceEnum.none or isinstance(optimizer, OurOptimizer):
        return
    if config.zero_force_ds_cpu_optimizer:
        raise ConfigError(
            f"{_KEY} updates on the CPU, for which {type(optimizer).__name__} has no fast loop. Use "
            'deepspeed.ops.adam.DeepSpeedCPUAdam, or name an "optimizer" in the config; or insist on yours with '
            '"zero_force_ds_cpu_optimizer": false'
        )


def make_states(optimizer: torch.optim.Optimizer, policy: OffloadPolicy | None, rank: int) -> ShardStates:
    """The shards' states, in the places that the policy says. Errors of files are in ``failure``. Not collective.

    Raises:
        ConfigError: what the optimizer keeps cannot go into files.
    """

    def states() -> dict[Any, dict[str, Any]]:
        return optimizer.state

    if policy is None:
        return ShardStates(states)
    offloaded = _chooser(optimizer, policy.ratio)
    if policy.device == "cpu":
        return ShardStates(states, HostStore(policy.tile_numel), offloaded)
    dtypes = _state_dtypes(optimizer)
    if policy.folder is None:
        raise AssertionError("offload to nvme without a folder; please report this")
    try:
        file = open_run_file(policy.folder, f"optimizer-rank{rank}", _PATH_KEY)
    except OSError as error:
        failed = ShardStates(states)
        failed.failure = error
        return failed
    return ShardStates(states, FileStore(file, policy, states, _PATH_KEY), offloaded, dtypes)


def _chooser(optimizer: torch.optim.Optimizer, ratio: float) -> Callable[[Bucket], bool]:
    """Asked bucket by bucket, in order: the first ones are offloaded, up to the ratio of all elements."""
    total = sum(p.numel() for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
    seen = 0

    def offloaded(bucket: Bucket) -> bool:
        nonlocal seen
        numel = sum(slot.numel for slot in bucket.slots)
        chosen = ratio >= 1.0 or (seen + numel / 2 <= ratio * total and ratio > 0.0)
        seen += numel
        return chosen

    return offloaded


def _state_dtypes(optimizer: torch.optim.Optimizer) -> Callable[[Bucket], Mapping[str, torch.dtype]]:
    """Element-wise state that the optimizer will keep for a bucket's tiles."""
    made: dict[int, dict[str, Any]] = {}
    for index, group in enumerate(optimizer.param_groups):
        # Some make their state in the constructor, and fail without it.
        made[index] = next((dict(optimizer.state[p]) for p in group["params"] if optimizer.state.get(p)), {})

    def dtypes(bucket: Bucket) -> dict[str, torch.dtype]:
        scrap = torch.zeros(6, dtype=bucket.master.dtype)
        state = state_template(optimizer, optimizer.param_groups[bucket.group_index], scrap)
        if state is None:
            state = made[bucket.group_index]
            if not state:
                raise ConfigError(
                    f"{_KEY}.device = nvme: what {type(optimizer).__name__} keeps for each element cannot be found out, so "
                    'that there is no place for it in a file. Use device "cpu", or Adam, AdamW, Adagrad, Lion or SGD'
                )
        return {key: value.dtype for key, value in sorted(state.items()) if is_elementwise(value)}

    return dtypes


def make_transit(
    states: ShardStates, buckets: Sequence[Bucket], policy: OffloadPolicy | None, device: torch.device
) -> Transit | None:
    """What lies between an accelerator and tiles on the host; None if there are none."""
    if policy is None or device.type == "cpu":
        return None
    return Transit(device, max((tile.numel for b in buckets for tile in states.tiles(b)), default=0), policy.pin_memory)


def agree(failure: OSError | None, group: torch.distributed.ProcessGroup | None, device: torch.device) -> None:
    """Raises on all ranks if one has failed: there its own error, elsewhere one with its text. Collective.

    Raises:
        OSError: see above.
    """
    if dist.get_world_size(group) > 1:
        flag = torch.tensor([float(failure is not None)], device=device)
        dist.all_reduce(flag, group=group)
        if flag.item():
            texts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(texts, None if failure is None else str(failure), group=group)
            if failure is None:
                said = "; ".join(f"rank {rank} failed: {text}" for rank, text in enumerate(texts) if text is not None)
                raise OSError(errno.EIO, said)
    if failure is not None:
        raise failure


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank's model states. What an accelerator would hold counts as device memory on the CPU, too.

    Attributes:
        device: weights, and gradients and states that are not offloaded.
        host: gradient shards, masters and states that are offloaded to the CPU, and buffers of files.
        pinned: of these, page-locked.
        disk: files.
    """

    device: int = 0
    host: int = 0
    pinned: int = 0
    disk: int = 0

    def __add__(self, other: MemoryPlan) -> MemoryPlan:
        return MemoryPlan(
            self.device + other.device, self.host + other.host, self.pinned + other.pinned, self.disk + other.disk
        )


def plan_memory(flat: FlatOptimizer) -> MemoryPlan:
    """What this rank's weights, gradients, masters and optimizer states will take, buffers of files included. Pure."""
    policy, states = flat.settings.offload, flat.states
    per_group = [_state_nbytes(flat.optimizer, group) for group in flat.optimizer.param_groups]
    device = host = 0
    for bucket in flat.buckets:
        whole = flat.stage == 0
        shard = bucket.numel if whole else bucket.shard_numel
        device += bucket.weights.numel() * bucket.weights.element_size()
        if flat.stage < 2:
            device += bucket.numel * bucket.comm_dtype.itemsize  # local gradients of the window
        own = shard * per_group[bucket.group_index]
        own += 0 if bucket.full_precision else shard * bucket.master.element_size()
        grads = bucket.shard_numel * bucket.accum_dtype.itemsize
        if whole or policy is None or not states.is_offloaded(bucket):
            device += own + grads
        else:
            in_file = not states.in_memory(bucket)
            host += (0 if in_file else own) + (grads if bucket.grad_shard.device.type == "cpu" else 0)
            device += 0 if bucket.grad_shard.device.type == "cpu" else grads
    files = states.files
    pinned = 0
    if files is not None:
        host += files.buffer_nbytes
    if policy is not None and flat.buckets and flat.buckets[0].device.type != "cpu":
        largest = max(tile.numel for b in flat.buckets for tile in states.tiles(b))
        transit = Transit(flat.buckets[0].device, largest, policy.pin_memory).nbytes(flat.buckets[0].weight_dtype)
        host += transit
        pinned += transit if policy.pin_memory else 0
    return MemoryPlan(device, host, pinned, files.nbytes if files is not None else 0)


def _state_nbytes(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> int:
    """Bytes an element of the optimizer's state; 0 if that cannot be found out."""
    state = state_template(optimizer, group, torch.zeros(6))
    return sum(value.dtype.itemsize for value in (state or {}).values() if is_elementwise(value))


def announce(flat: FlatOptimizer, more: MemoryPlan | None = None) -> None:
    """Logs the planned bytes of a rank; ``more`` are those of offloaded parameters. Nothing without offload."""
    policy = flat.settings.offload
    if policy is None and more is None:
        return
    plan = plan_memory(flat) + (more or MemoryPlan())
    cpu = bool(flat.buckets) and flat.buckets[0].device.type == "cpu"
    where = "; device memory is host memory here, so that offload to the cpu moves nothing" if cpu else ""
    log_dist(
        f"offload: planned bytes a rank: device {plan.device}, host {plan.host}, pinned {plan.pinned}, disk {plan.disk}"
        f" (without activations and gathered parameters{where})"
    )
