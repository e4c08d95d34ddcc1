"""The ``deepspeed`` command: ``deepspeed [flags] script [script arguments]``.

It decides which hosts and slots the job has, and runs it. This version runs jobs on this host; ones on several
hosts are refused with the reason.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, MissingFeatureError
from .arguments import DEFAULT_HOSTFILE, DEFAULT_PORT, check_runner, parse_runner
from .launch import cores_to_bind, run_node
from .machine import (
    count_cuda_devices,
    free_port,
    is_this_host,
    port_is_free,
    read_environment_files,
    without_launcher_variables,
)
from .plan import NodeJob
from .resources import Pool, apply_filters, parse_filter, parse_hostfile, take
from .supervise import logger, set_up_logging

__all__ = ["DEEPSPEED_ENVIRONMENT_NAME", "main"]

#: File of variables for every rank, looked for in the home folder and in the current one; clients append to it.
DEEPSPEED_ENVIRONMENT_NAME = os.environ.get("DS_ENV_FILE") or ".deepspeed_env"


def main(args: Sequence[str] | None = None) -> int:
    """Runs the job; returns its exit code (that of the rank that failed first), 2 for flags that do not work."""
    parsed = parse_runner(args)
    set_up_logging("error" if parsed.quiet else parsed.log_level)
    try:
        for remark in check_runner(parsed):
            logger.warning(remark)
        devices = count_cuda_devices()
        job = _job(parsed, _slots(parsed, devices), cuda=devices > 0)
        return run_node(
            job,
            log_folder=parsed.enable_each_rank_log,
            pid_file_number=os.getpid() if parsed.save_pid else 0,
        )
    except ConfigError as error:
        print(f"deepspeed: error: {error}", file=sys.stderr)
        return 2


def _slots(parsed: argparse.Namespace, devices: int) -> list[int]:
    """Slots to use on this host.

    Raises:
        MissingFeatureError: the job needs another host.
        ConfigError: the hostfile or the filters do not work out.
    """
    pool = _hostfile(parsed.hostfile)
    if pool is None:
        pool = {"localhost": list(range(devices or _cpu_ranks(parsed)))}
    pool = apply_filters(pool, parsed.include, parsed.exclude)
    pool = take(pool, parsed.num_nodes, parsed.num_gpus)
    elsewhere = [host for host in pool if not is_this_host(host)]
    if elsewhere or len(pool) > 1:
        raise MissingFeatureError(
            f"this job would run on {', '.join(pool)}, but jobs on other hosts than this one are not in this version "
            "yet: choose this host with --include, or start the script on each host with torchrun"
        )
    return next(iter(pool.values()))


def _hostfile(name: str) -> Pool | None:
    """The pool in the file; ``None`` where there is no file and none was asked for."""
    path = Path(name)
    if path.is_file():
        return parse_hostfile(path.read_text(encoding="utf-8").splitlines(), name)
    if name not in (DEFAULT_HOSTFILE, "None"):  # accelerate passes "None" for none
        raise ConfigError(f"--hostfile {name!r} does not exist; leave the flag out to use this host alone")
    return None


def _cpu_ranks(parsed: argparse.Namespace) -> int:
    """On CPU a slot is only a number, so there are as many as are asked for."""
    if parsed.num_gpus != -1:
        return max(parsed.num_gpus, 1)
    named = parse_filter(parsed.include).get("localhost") if parsed.include else None
    if named:
        return max(named) + 1
    logger.info("no accelerator here: one rank on CPU; --num_accelerators N starts more")
    return 1


def _job(parsed: argparse.Namespace, slots: list[int], cuda: bool) -> NodeJob:
    return NodeJob(
        script=parsed.user_script,
        script_args=parsed.user_args,
        slots_by_node=[slots],
        master_addr=parsed.master_addr or "127.0.0.1",
        master_port=_port(parsed.master_port),
        module=parsed.module,
        no_python=parsed.no_python,
        no_local_rank=parsed.no_local_rank,
        cuda=cuda,
        cores=cores_to_bind(parsed.bind_core_list),
        bind_cores=parsed.bind_cores_to_rank,
        extra_environment=without_launcher_variables(read_environment_files(DEEPSPEED_ENVIRONMENT_NAME)),
    )


def _port(given: int | None) -> int:
    """The port that was asked for, else the default, else one that is free: two jobs on a host must not meet."""
    if given is not None:
        if not port_is_free(given):
            logger.warning(f"--master_port {given} is in use; rank 0 will not be able to listen there")
        return given
    if port_is_free(DEFAULT_PORT):
        return DEFAULT_PORT
    port = free_port()
    logger.info(f"port {DEFAULT_PORT} is in use; taking {port}")
    return port


if __name__ == "__main__":
    sys.exit(main())
