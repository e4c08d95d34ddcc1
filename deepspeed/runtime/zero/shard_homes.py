"""``zero_optimization.offload_param``: which store a model's shards rest in, and which of them stay in memory.

| shard of | rests |
| --- | --- |
| a persistent parameter (``stage3_param_persistence_threshold``) | in memory |
| the first parameters, up to ``max_in_cpu`` elements on this rank | in memory |
| any other | in the file, or with ``device: cpu`` on the host |

Source: ``offload_param`` of the configuration document; ZeRO-Infinity (Rajbhandari et al. 2021) sections 5 and 6.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection, Iterable

import torch

from deepspeed import comm as dist
from deepspeed._core.aio import IoSettings, io_settings
from deepspeed._core.params.handle import ParamHandle, move_shard
from deepspeed._core.params.store import FileShards, HostShards, ShardStore
from deepspeed.comm.agreement import together
from deepspeed.errors import ConfigError, MissingFeatureError
from deepspeed.runtime.config_sections.aio import AioConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig, OffloadDeviceEnum
from deepspeed.utils.logging import log_dist, warning_once

__all__ = ["ShardStore", "describe", "planned_nbytes", "settle", "shard_store"]

# For shards of several MiB; the documented defaults of `aio` are for smaller requests.
_IO = IoSettings(block_nbytes=4 << 20, depth=8, threads=4)

# zero.Init and the engine after it share one, for as long as anybody has it.
_stores: weakref.WeakValueDictionary[tuple[object, ...], ShardStore] = weakref.WeakValueDictionary()


def shard_store(
    zero: DeepSpeedZeroConfig, aio: AioConfig, device: torch.device, *, remote_device: str | None = None
) -> ShardStore | None:
    """The store for this config, the same object as long as it lives; None if shards stay where they are used.

    ``remote_device`` (of ``zero.Init``) goes before the config. Collective if there is one.

    Raises:
        ConfigError: NVMe without ``nvme_path``, or with a feature that keeps weights in memory.
        OSError: no file can be made; on all ranks (``RuntimeError`` where it is another rank's).
    """
    section = zero.offload_param or DeepSpeedZeroOffloadParamConfig()
    target = OffloadDeviceEnum(remote_device) if remote_device is not None else section.device
    if target == OffloadDeviceEnum.none:
        return None
    if target == OffloadDeviceEnum.cpu:
        if device.type == "cpu":
            warning_once(
                "offload_param to the cpu: this accelerator's memory is the host's, where parameters are already"
            )
            return None
        return _stores.setdefault(("cpu", os.getpid(), section.pin_memory), HostShards(pin=section.pin_memory))
    _check_nvme(zero, section, aio)
    return together(lambda: _file_store(section, aio))


def _check_nvme(zero: DeepSpeedZeroConfig, section: DeepSpeedZeroOffloadParamConfig, aio: AioConfig) -> None:
    if section.nvme_path is None:
        raise ConfigError(
            "zero_optimization.offload_param.nvme_path is missing: parameters on NVMe need a directory (with zero.Init, in "
            "config_dict_or_path)"
        )
    if aio.use_gds:
        raise MissingFeatureError("aio.use_gds = true: GPUDirect Storage is not in this version. Set it to false")
    if zero.zero_hpz_partition_size > 1:
        raise ConfigError(
            "zero_hpz_partition_size keeps copies of weights in memory, offload_param to nvme none: use one"
        )
    if zero.zero_quantized_nontrainable_weights:
        raise ConfigError(
            "zero_quantized_nontrainable_weights keeps frozen weights in memory, in 8 bits, and offload_param to nvme does "
            "not: use one of them"
        )


def _file_store(section: DeepSpeedZeroOffloadParamConfig, aio: AioConfig) -> ShardStore:
    folder = section.nvme_path
    if folder is None:
        raise AssertionError("a file store without a folder; please report this")
    given = aio.model_fields_set & set(AioConfig.model_fields)
    settings = (
        io_settings(aio.block_size, aio.queue_depth, aio.single_submit, aio.intra_op_parallelism) if given else _IO
    )
    limits = section.buffer_count, section.buffer_size, section.max_in_cpu, section.pin_memory
    key = (os.path.abspath(folder), os.getpid(), *limits, settings)
    known = _stores.get(key)
    if known is not None:
        return known
    made = FileShards(
        folder,
        buffer_count=section.buffer_count,
        buffer_numel=section.buffer_size,
        keep_numel=section.max_in_cpu,
        settings=settings,
        pin=section.pin_memory,
        rank=dist.get_rank(),
    )
    _stores[key] = made
    return made


def settle(
    handles: Iterable[ParamHandle], store: ShardStore | None, stays: Collection[int], later: Collection[int] = ()
) -> None:
    """Gives each shard its home; those of the ids ``stays`` are at home in memory. No communication.

    What is ``later`` goes away when it is adopted the next time, unless it is away already.

    Raises:
        ConfigError: a shard fits neither ``max_in_cpu`` nor ``buffer_size``.
        OSError: no space, or another error of the disk; with the file and the bytes.
    """
    for handle in handles:
        away = store if _goes_away(handle, store, stays) else None
        if handle.rest is away:
            continue
        handle.release()
        if handle.id in later and handle.away is None:
            handle.rest = away
        else:
            move_shard(handle, away)


def _goes_away(handle: ParamHandle, store: ShardStore | None, stays: Collection[int]) -> bool:
    if store is None or not handle.numel or handle.packed is not None or handle.id in stays:
        handle.kept = None
        return False
    if handle.rest is store or (handle.kept is not None and handle.kept.store is store):
        return handle.rest is store
    handle.kept = store.admit(handle.shard_numel, handle.label)
    return handle.kept is None


def planned_nbytes(handles: Iterable[ParamHandle], store: ShardStore) -> dict[str, int]:
    """Bytes of this rank: ``host`` memory for reading ahead, how much of it is ``pinned``, and ``disk``."""
    staging = store.staging_nbytes(max((h.dtype.itemsize for h in handles), default=0))
    stored = store.stored_nbytes
    on_disk = isinstance(store, FileShards)
    host = staging if on_disk else stored
    return {"host": host, "pinned": host if store.pinned else 0, "disk": stored if on_disk else 0}


def describe(handles: Iterable[ParamHandle], store: ShardStore | None) -> None:
    """Says once where the shards are: bytes on this rank's disk and in its memory."""
    if store is None:
        return
    every = list(handles)
    away = sum(h.shard_numel * h.dtype.itemsize for h in every if h.rest is store)
    here = sum(h.shard_numel * h.dtype.itemsize for h in every if h.rest is not store)
    where = f"in {os.path.dirname(os.path.dirname(store.path))}" if store.path else "on the host"
    log_dist(
        f"parameters of each rank: {away / 2**20:.1f} MiB {where} between uses, {here / 2**20:.1f} MiB in memory, at most "
        f"{store.staging_nbytes(max((h.dtype.itemsize for h in every), default=2)) / 2**20:.1f} MiB read ahead"
    )
