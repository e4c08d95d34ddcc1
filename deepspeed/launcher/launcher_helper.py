"""Becomes one rank of a job: what ``mpirun`` and ``srun`` start, once a rank.

``python -m deepspeed.launcher.launcher_helper --launcher=slurm --world_info=... script ...`` reads this process's place from
the variables of the launcher, sets the variables that torch and clients know (RANK, LOCAL_RANK, ...), chooses devices and
cores as the one-node launcher does, and replaces itself by the script.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from .._core.slurm import expand_nodelist
from ..errors import ConfigError
from .arguments import parse_helper
from .launch import check_script, cores_to_bind
from .machine import count_cuda_devices
from .plan import NodeJob, plan_ranks
from .resources import Pool, decode_world_info

__all__ = ["find_place", "in_slurm_order", "main"]

#: (rank, local rank) as the launchers name them; the first pair that is set counts.
_HYDRA = ("PMI_RANK", "MPI_LOCALRANKID")
_PLACES = {
    "openmpi": (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),),
    "mpich": (_HYDRA,),
    "impi": (_HYDRA,),
    "mvapich": (("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"), _HYDRA),
    "slurm": (("SLURM_PROCID", "SLURM_LOCALID"),),
}


def find_place(launcher: str, pool: Pool, environment: Mapping[str, str]) -> tuple[int, int]:
    """(node rank, local rank) of this process; ranks fill the pool host by host.

    Raises:
        ConfigError: the launcher's variables are not there, or tell another placement.
    """
    pairs = [pair for pair in _PLACES[launcher] if environment.get(pair[0])]
    if not pairs:
        names = " or ".join(pair[0] for pair in _PLACES[launcher])
        raise ConfigError(f"--launcher {launcher}: {names} is not set, so something else has started this process")
    rank_name, local_name = pairs[0]
    rank, first = int(environment[rank_name]), 0
    for node_rank, (host, slots) in enumerate(pool.items()):
        local = rank - first
        first += len(slots)
        if local >= len(slots):
            continue
        told = environment.get(local_name)
        if told and int(told) != local:
            raise ConfigError(
                f"{launcher} placed rank {rank} as number {told} on its host, but as number {local} on {host} was asked "
                "for: check that --launcher_args does not change the placement"
            )
        return node_rank, local
    raise ConfigError(
        f"{rank_name}={rank}, but the job has {first} rank(s): {launcher} started more than was asked for"
    )


def in_slurm_order(pool: Pool, environment: Mapping[str, str]) -> Pool:
    """The pool in the order in which Slurm numbers the hosts, which need not be that of its ``--nodelist``.

    Raises:
        ConfigError: the step runs on other hosts.
    """
    listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not listed:
        return pool
    hosts = expand_nodelist(listed)
    if set(hosts) != set(pool):
        raise ConfigError(f"Slurm runs this step on {', '.join(hosts)}, but {', '.join(pool)} was asked for")
    return {host: pool[host] for host in hosts}


def main(args: Sequence[str] | None = None) -> int:
    """Entry of the module. Returns (2) only if the flags or the place do not work out."""
    parsed = parse_helper(args)
    try:
        pool = decode_world_info(parsed.world_info)
        if parsed.launcher == "slurm":
            pool = in_slurm_order(pool, os.environ)
        node_rank, local_rank = find_place(parsed.launcher, pool, os.environ)
        job = NodeJob(
            script=parsed.user_script,
            script_args=parsed.user_args,
            slots_by_node=list(pool.values()),
            node_rank=node_rank,
            master_addr=parsed.master_addr or next(iter(pool)),
            master_port=parsed.master_port,
            module=parsed.module,
            no_python=parsed.no_python,
            no_local_rank=parsed.no_local_rank,
            cuda=count_cuda_devices() > 0,
            cores=cores_to_bind(parsed.bind_core_list),
            bind_cores=parsed.bind_cores_to_rank,
        )
        check_script(job)
        plan = plan_ranks(job, os.environ)[local_rank]
    except ConfigError as error:
        print(f"deepspeed: error: {error}", file=sys.stderr)
        return 2
    if plan.cores is not None:
        os.sched_setaffinity(0, plan.cores)
    try:
        os.execvpe(plan.argv[0], plan.argv, plan.environment)
    except OSError as error:
        print(
            f"deepspeed: error: {plan.label} cannot be started ({' '.join(plan.argv[:3])} ...): {error}",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
