"""The ``deepspeed`` command: ``deepspeed [flags] script [script arguments]``.

It decides which hosts and slots the job has, and runs it: ranks on this host (:mod:`launch`), or commands that start them on
others (:mod:`backends`, :mod:`nodes`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .._core.slurm import expand_nodelist
from ..errors import ConfigError
from .arguments import (
    DEFAULT_HOSTFILE,
    DEFAULT_PORT,
    MPI_LAUNCHERS,
    check_runner,
    parse_runner,
    split_launcher_args,
)
from .backends import choose_backend, ssh_command
from .cluster import ClusterJob, exported_variables
from .launch import cores_to_bind, run_node
from .machine import (
    count_cuda_devices,
    free_port,
    is_this_host,
    port_is_free,
    read_environment_files,
    without_launcher_variables,
)
from .nodes import NodeSupervisor
from .plan import NodeJob
from .resources import Pool, apply_filters, parse_filter, parse_hostfile, take
from .supervise import logger, set_up_logging

__all__ = ["DEEPSPEED_ENVIRONMENT_NAME", "main"]

#: File of variables for every rank, looked for in the home folder and in the current one; clients append to it.
DEEPSPEED_ENVIRONMENT_NAME = os.environ.get("DS_ENV_FILE") or ".deepspeed_env"
_ASK_TIMEOUT_S = 60


def main(args: Sequence[str] | None = None) -> int:
    """Runs the job; returns its exit code (that of the rank that failed first), 2 for flags that do not work."""
    parsed = parse_runner(args)
    set_up_logging("error" if parsed.quiet else parsed.log_level)
    try:
        remarks = check_runner(parsed)
        devices = count_cuda_devices()
        pool = _pool(parsed, devices)
        if parsed.no_ssh and (len(pool) > 1 or parsed.node_rank > 0):
            return _run_this_node(parsed, pool, devices)
        if len(pool) > 1 or parsed.force_multi or not is_this_host(next(iter(pool))):
            return _run_cluster(parsed, pool)
        for remark in remarks:
            logger.warning(remark)
        return _run_here(parsed, _job(parsed, list(pool.values()), devices > 0))
    except ConfigError as error:
        print(f"deepspeed: error: {error}", file=sys.stderr)
        return 2


# -- where -------------------------------------------------------------------------------------------------------------
def _pool(parsed: argparse.Namespace, devices: int) -> Pool:
    """Hosts and slots to use.

    Raises:
        ConfigError: the hostfile, Slurm's allocation or the filters do not work out.
    """
    pool = _hostfile(parsed.hostfile)
    if pool is None:
        slots = list(range(devices or _cpu_ranks(parsed)))
        allocated = os.environ.get("SLURM_JOB_NODELIST") if parsed.launcher == "slurm" else None
        pool = {host: list(slots) for host in (expand_nodelist(allocated) if allocated else ["localhost"])}
    pool = apply_filters(pool, parsed.include, parsed.exclude)
    return take(pool, parsed.num_nodes, parsed.num_gpus)


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


# -- on this host ------------------------------------------------------------------------------------------------------
def _run_here(parsed: argparse.Namespace, job: NodeJob) -> int:
    elastic = None
    if parsed.elastic_training:
        elastic = _elastic_nodes(parsed, len(job.slots_by_node))
    return run_node(
        job,
        log_folder=parsed.enable_each_rank_log,
        pid_file_number=os.getpid() if parsed.save_pid else 0,
        elastic=elastic,
    )


def _run_this_node(parsed: argparse.Namespace, pool: Pool, devices: int) -> int:
    """This host's part of a job whose other hosts are started by hand, too."""
    if not 0 <= parsed.node_rank < len(pool):
        raise ConfigError(
            f"--no_ssh starts one node of {len(pool)} ({', '.join(pool)}): give its number as --node_rank, 0 to "
            f"{len(pool) - 1}, got {parsed.node_rank}"
        )
    master = parsed.master_addr or next(iter(pool))
    port = parsed.master_port or DEFAULT_PORT  # another one that is free here would be another job's on other nodes
    return _run_here(parsed, _job(parsed, list(pool.values()), devices > 0, max(parsed.node_rank, 0), master, port))


def _job(
    parsed: argparse.Namespace,
    slots_by_node: Sequence[Sequence[int]],
    cuda: bool,
    node_rank: int = 0,
    master_addr: str = "",
    master_port: int | None = None,
) -> NodeJob:
    return NodeJob(
        script=parsed.user_script,
        script_args=parsed.user_args,
        slots_by_node=slots_by_node,
        node_rank=node_rank,
        master_addr=master_addr or parsed.master_addr or "127.0.0.1",
        master_port=master_port or _port(parsed.master_port),
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


# -- on other hosts ----------------------------------------------------------------------------------------------------
def _run_cluster(parsed: argparse.Namespace, pool: Pool) -> int:
    backend = choose_backend(parsed.launcher)
    if backend.name != parsed.launcher:
        logger.info(f"{parsed.launcher} is not installed; using {backend.name}")
    job = _cluster_job(parsed, pool, _master_address(parsed, pool))
    logger.info(
        f"starting {job.world_size} rank(s) on {', '.join(pool)} by {backend.name}, "
        f"rendezvous {job.master_addr or 'on the first of them'}:{job.master_port}"
    )
    minimum = _elastic_nodes(parsed, len(pool))[0] if parsed.elastic_training else None
    return NodeSupervisor(backend.commands(job), minimum).run()


def _cluster_job(parsed: argparse.Namespace, pool: Pool, master_addr: str) -> ClusterJob:
    flags = ("module", "no_python", "no_local_rank", "bind_cores_to_rank")
    rank_flags = [f"--{flag}" for flag in flags if getattr(parsed, flag)]
    if parsed.bind_core_list is not None:
        rank_flags.append(f"--bind_core_list={parsed.bind_core_list}")
    node_flags = [f"--log_level={'error' if parsed.quiet else parsed.log_level}"]
    if parsed.enable_each_rank_log != "None":
        node_flags.append(f"--enable_each_rank_log={parsed.enable_each_rank_log}")
    if parsed.save_pid:
        node_flags.append(f"--save_pid={os.getpid()}")
    if parsed.launcher in MPI_LAUNCHERS and (parsed.save_pid or parsed.enable_each_rank_log != "None"):
        raise ConfigError(
            f"--save_pid and --enable_each_rank_log: {parsed.launcher} starts the ranks itself; see its own options "
            "(--launcher_args), or use --launcher ssh or pdsh"
        )
    if parsed.elastic_training:
        low, high = _elastic_nodes(parsed, len(pool))
        node_flags += ["--enable_elastic_training", f"--min_elastic_nodes={low}", f"--max_elastic_nodes={high}"]
    from_file = without_launcher_variables(read_environment_files(DEEPSPEED_ENVIRONMENT_NAME))
    venv = parsed.venv_script
    return ClusterJob(
        pool=pool,
        script=parsed.user_script,
        script_args=parsed.user_args,
        master_addr=master_addr,
        master_port=parsed.master_port or DEFAULT_PORT,
        folder=os.getcwd(),
        python=sys.executable,
        rank_flags=rank_flags,
        node_flags=node_flags,
        exports=exported_variables(os.environ, from_file),
        venv_script=None if venv is None else os.path.abspath(os.path.expanduser(venv)),
        launcher_args=split_launcher_args(parsed.launcher_args),
        ssh_port=parsed.ssh_port,
    )


def _elastic_nodes(parsed: argparse.Namespace, nodes: int) -> tuple[int, int]:
    """Least and largest number of nodes.

    Raises:
        ConfigError: numbers that the job cannot have.
    """
    low = max(parsed.min_elastic_nodes, 1)
    high = parsed.max_elastic_nodes if parsed.max_elastic_nodes > 0 else nodes
    if low > nodes or low > high:
        raise ConfigError(
            f"--min_elastic_nodes {low}, but the job has {nodes} node(s)"
            + (f", and --max_elastic_nodes is {high}" if high < nodes else "")
        )
    return low, high


def _master_address(parsed: argparse.Namespace, pool: Pool) -> str:
    """Where the ranks meet: as given; else the first host's own word (``hostname -I``), or its name in the hostfile.

    MPI and Slurm know hosts by names that work between them; a name for ssh may be an alias known here alone.

    Raises:
        ConfigError: the host cannot be asked.
    """
    if parsed.master_addr or parsed.launcher == "slurm":
        return str(parsed.master_addr)
    host = next(iter(pool))
    if parsed.launcher in MPI_LAUNCHERS or parsed.no_ssh_check:
        return host
    more = split_launcher_args(parsed.launcher_args) if parsed.launcher == "ssh" or not shutil.which("pdsh") else []
    here = is_this_host(host)
    command = ["hostname", "-I"] if here else ssh_command(host, "hostname -I", parsed.ssh_port, more)
    ways = "pass --master_addr, or --no_ssh_check to use the name as it is"
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_ASK_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"host {host!r} cannot be asked for its address ({error}); {ways}") from None
    if done.returncode != 0 or not done.stdout.split():
        said = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise ConfigError(
            f"host {host!r} cannot be asked for its address: {' '.join(command[:1])} exited with code {done.returncode} "
            f"({said[0]}). ssh to every host must work without a password; {ways}, or start the nodes by hand (--no_ssh)"
        )
    addresses = done.stdout.split()
    if len(addresses) > 1:
        logger.info(f"{host} has the addresses {', '.join(addresses)}; taking the first (--master_addr chooses)")
    return addresses[0]


if __name__ == "__main__":
    sys.exit(main())
