"""``init_distributed``: makes torch.distributed's default group, once."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..accelerator import get_accelerator
from ..accelerator.placement import own_device_index
from ..errors import ConfigError, MissingFeatureError
from ..utils.logging import log_dist, logger
from .exit import settle_at_exit
from .rendezvous import Rendezvous, resolve_rendezvous

__all__ = ["configure", "default_pg_timeout", "init_distributed", "log_summary"]

#: 30 minutes; the environment's ``DEEPSPEED_TIMEOUT`` (minutes) stands in for it when the caller gives no timeout.
default_pg_timeout = timedelta(seconds=1800)


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta | None = default_pg_timeout,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Initializes torch.distributed for this process. Collective over all ranks; the second call returns at once.

    Signature as documented for DeepSpeed 0.14.1 (API documentation, section 1.1.3).

    Args:
        dist_backend: torch's name of the backend. Default: gloo on CPU; on CUDA both, each for its kind of tensors.
        auto_mpi_discovery: take rank and size from the variables of an MPI or Slurm launcher where ``RANK`` is not
            set. Needs no mpi4py; nothing happens where no such variable exists.
        distributed_port: port of rank 0 where neither ``init_method`` nor ``MASTER_PORT`` gives one.
        verbose: log what was initialized (level info, rank 0).
        timeout: how long an operation may wait for other ranks; 30 minutes, or ``DEEPSPEED_TIMEOUT`` minutes.
        init_method: ``env://`` (default), ``tcp://host:port`` or ``file:///path`` on a folder that all ranks share.
        dist_init_required: ``False``: the group must exist already; ``None``, ``True``: made where it does not.
        config: DeepSpeed config as a dict; its ``comms_logger`` section is used.
        rank, world_size: this process's place, where the environment does not tell.

    With nothing set and nothing passed the world is this process alone, and no port is opened.

    Raises:
        ConfigError: what is given is incomplete or does not fit; the message names what is missing.
    """
    if isinstance(config, Mapping):
        configure(deepspeed_config=config)
    if dist.is_available() and dist.is_initialized():
        _check_backend_of_existing_group(dist_backend)
        settle_at_exit()
        return
    if dist_init_required is False:
        raise ConfigError(
            "dist_init_required=False says that torch.distributed is initialized already, but it is not: call "
            "deepspeed.init_distributed() or torch.distributed.init_process_group() first, or leave the argument out"
        )
    place = resolve_rendezvous(
        os.environ,
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        distributed_port=distributed_port,
        mpi_discovery=auto_mpi_discovery,
    )
    backend, limit = _backend(dist_backend), _timeout(timeout)
    os.environ.update(place.environment)
    _choose_device(place)
    _avoid_name_lookups(place)
    _create_default_group(place, backend, limit)
    settle_at_exit()
    if verbose:
        log_dist(f"torch.distributed: backend {backend}, {dist.get_world_size()} ranks, timeout {limit}")


def _create_default_group(place: Rendezvous, backend: str, timeout: timedelta) -> None:
    if place.init_method is None:
        # Nobody will connect, so an in-process store serves. An address and a port would only be there to clash.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    elif place.rank < 0:
        dist.init_process_group(backend, init_method=place.init_method, timeout=timeout)
    else:
        dist.init_process_group(
            backend, init_method=place.init_method, rank=place.rank, world_size=place.world_size, timeout=timeout
        )


def configure(
    deepspeed_config: Any = None,
    enabled: bool | None = None,
    prof_all: bool | None = None,
    prof_ops: list[str] | None = None,
    verbose: bool | None = None,
    debug: bool | None = None,
) -> None:
    """Sets up the comms logger from a config dict or from its keys. This version can leave it off only.

    Raises:
        MissingFeatureError: the logger is wanted.
    """
    del prof_all, prof_ops, verbose, debug  # they only shape what the logger would write
    if enabled is None and isinstance(deepspeed_config, Mapping):
        section = deepspeed_config.get("comms_logger")
        enabled = bool(section.get("enabled")) if isinstance(section, Mapping) else False
    if enabled:
        raise MissingFeatureError(
            "comms_logger.enabled is true, but this version has no comms logger yet: set it to false, or watch the "
            "operations with deepspeed.comm.observe() or deepspeed.comm.set_comm_hook()"
        )


def log_summary(show_straggler: bool = False) -> None:
    """Would print what the comms logger recorded.

    Raises:
        MissingFeatureError: always, since this version has no comms logger and so nothing was recorded.
    """
    del show_straggler
    raise MissingFeatureError(
        "deepspeed.comm.log_summary() has nothing to print: this version has no comms logger yet. "
        "deepspeed.comm.observe() collects the operations of a block"
    )


def _backend(wanted: str | None) -> str:
    """``wanted`` checked, or the accelerator's: on a device both backends, so that host tensors can travel too."""
    if not dist.is_available():
        raise ConfigError("this torch was built without torch.distributed; install one that has it")
    if wanted is None:
        own = get_accelerator().communication_backend_name()
        return own if own == "gloo" else f"cpu:gloo,{get_accelerator().device_name()}:{own}"
    if not isinstance(wanted, str):
        raise ConfigError(f"dist_backend expects a name such as 'gloo' or 'nccl', got {wanted!r}")
    names = [part.split(":")[-1] for part in wanted.lower().split(",")]
    for name in names:
        if not dist.is_backend_available(name):
            usable = [b for b in ("gloo", "nccl", "mpi", "ucc", "xccl") if dist.is_backend_available(b)]
            raise ConfigError(
                f"dist_backend={wanted!r}: this torch has no backend {name!r}; it has {', '.join(usable)}. "
                "Leave dist_backend out to choose by the accelerator"
            )
    return wanted.lower()


def _timeout(given: timedelta | None) -> timedelta:
    given = default_pg_timeout if given is None else given
    minutes = os.environ.get("DEEPSPEED_TIMEOUT")
    if given is default_pg_timeout and minutes:
        try:
            given = timedelta(minutes=float(minutes))
        except ValueError:
            raise ConfigError(f"DEEPSPEED_TIMEOUT={minutes!r} is not a number of minutes") from None
    if not isinstance(given, timedelta) or given <= timedelta(0):
        raise ConfigError(f"timeout expects a datetime.timedelta above zero, got {given!r}")
    return given


def _choose_device(place: Rendezvous) -> None:
    accelerator = get_accelerator()
    if accelerator.is_synchronized_device() or (place.local_rank is None and place.rank < 0):
        return
    local_rank = place.local_rank
    if local_rank is None:
        # Nothing tells which ranks share this host. Launchers fill hosts in order of rank, so this is right for them.
        local_rank = place.rank % accelerator.device_count()
    accelerator.set_device(own_device_index(local_rank, accelerator))


def _avoid_name_lookups(place: Rendezvous) -> None:
    """gloo resolves this host's name for each group, which takes seconds where no name server answers.

    Ranks that meet on the loopback address are all here, so that interface serves and no name is asked for.
    """
    if place.on_this_host_only and sys.platform == "linux" and os.path.exists("/sys/class/net/lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _check_backend_of_existing_group(wanted: str | None) -> None:
    if wanted is None:
        return
    have = dist.get_backend()
    if wanted.lower() not in have:
        logger.warning(
            f"init_distributed(dist_backend={wanted!r}): torch.distributed was initialized before with {have!r}, which "
            "stays. Remove the argument, or initialize with the same backend."
        )
