"""The per-node part of the launcher: ``python -m deepspeed.launcher.launch --world_info=... --node_rank=... script``.

``deepspeed`` calls :func:`run_node` in its own process for this host, and starts this module on other hosts.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError
from .arguments import parse_node
from .machine import address_towards, count_cuda_devices, usable_cores
from .plan import NodeJob, RankPlan, parse_core_list, plan_elastic_agent, plan_ranks
from .resources import decode_world_info
from .supervise import logger, run_ranks, set_up_logging

__all__ = ["check_script", "cores_to_bind", "main", "run_node"]

#: Least and largest number of nodes of an elastic job.
Elastic = tuple[int, int]


def run_node(
    job: NodeJob,
    *,
    log_folder: str = "None",
    pid_file_number: int = 0,
    leash: int | None = None,
    elastic: Elastic | None = None,
) -> int:
    """Runs the job's ranks on this host to their end; returns the exit code (see :func:`supervise.run_ranks`).

    Args:
        job: what to run.
        log_folder: where each rank's output goes; the text ``"None"`` (the flag's default) means the terminal.
        pid_file_number: if not 0, the ranks' pids are in ``<temp folder>/<number>.ds`` (commas between) while they run.
        leash: file descriptor that ties the node to a launching side, see :mod:`supervise`.
        elastic: run the node as an agent of an elastic job.

    Raises:
        ConfigError: the script or program does not exist, or the plan does not work out.
    """
    check_script(job)
    plans = plan_ranks(job, os.environ) if elastic is None else _plan_elastic(job, elastic)
    slots, world = job.slots_by_node[job.node_rank], sum(map(len, job.slots_by_node))
    logger.info(
        f"starting {len(slots)} rank(s) of {world} on "
        f"{'CUDA devices ' + plans[0].environment['CUDA_VISIBLE_DEVICES'] if job.cuda else 'CPU'}, "
        f"rendezvous {job.master_addr}:{job.master_port}"
    )
    pid_file = Path(tempfile.gettempdir()) / f"{pid_file_number}.ds" if pid_file_number else None

    def note_pids(pids: list[int]) -> None:
        if pid_file is not None:
            pid_file.write_text(",".join(map(str, pids)))

    try:
        return run_ranks(plans, None if log_folder == "None" else Path(log_folder), note_pids, leash)
    finally:
        if pid_file is not None:
            pid_file.unlink(missing_ok=True)


def cores_to_bind(core_list: str | None) -> list[int]:
    """Cores that ranks may have: those named, else all that this process may use.

    Raises:
        ConfigError: a core that this process may not use.
    """
    usable = usable_cores()
    wanted = usable if core_list is None else parse_core_list(core_list)
    foreign = sorted(set(wanted) - set(usable))
    if foreign:
        raise ConfigError(
            f"--bind_core_list {core_list}: core {foreign[0]} is not usable here; this process may use "
            f"{','.join(map(str, usable))}"
        )
    return wanted


def main(args: Sequence[str] | None = None) -> int:
    """Entry of the module; returns the exit code, 2 for flags that do not work."""
    try:
        parsed = parse_node(args)
        set_up_logging("error" if parsed.quiet else parsed.log_level)
        pool = decode_world_info(parsed.world_info)
        if not 0 <= parsed.node_rank < len(pool):
            raise ConfigError(f"--node_rank {parsed.node_rank} is outside --world_info, which has {len(pool)} node(s)")
        job = NodeJob(
            script=parsed.user_script,
            script_args=parsed.user_args,
            slots_by_node=list(pool.values()),
            node_rank=parsed.node_rank,
            master_addr=parsed.master_addr,
            master_port=parsed.master_port,
            module=parsed.module,
            no_python=parsed.no_python,
            no_local_rank=parsed.no_local_rank,
            cuda=count_cuda_devices() > 0,
            cores=cores_to_bind(parsed.bind_core_list),
            bind_cores=parsed.bind_cores_to_rank,
        )
        low, high = parsed.min_elastic_nodes, parsed.max_elastic_nodes
        return run_node(
            job,
            log_folder=parsed.enable_each_rank_log,
            pid_file_number=parsed.save_pid,
            leash=sys.stdin.fileno() if parsed.leashed else None,
            elastic=(max(low, 1), high if high > 0 else len(pool)) if parsed.enable_elastic_training else None,
        )
    except ConfigError as error:
        print(f"deepspeed: error: {error}", file=sys.stderr)
        return 2


def _plan_elastic(job: NodeJob, elastic: Elastic) -> list[RankPlan]:
    if job.bind_cores:
        raise ConfigError(
            "--bind_cores_to_rank and --elastic_training exclude each other: torch's agent starts the ranks"
        )
    own = job.master_addr if job.node_rank == 0 else address_towards(job.master_addr, job.master_port)
    return [plan_elastic_agent(job, os.environ, own, *elastic)]


def check_script(job: NodeJob) -> None:
    """Raises ConfigError if the script or program does not exist here."""
    if job.no_python:
        if shutil.which(job.script) is None:
            raise ConfigError(f"--no_python: no program {job.script!r} is executable here or found on PATH")
    elif not job.module and not os.path.exists(job.script):
        hint = "; a module needs --module" if "." in job.script and not job.script.endswith(".py") else ""
        raise ConfigError(f"script {job.script!r} does not exist in {os.getcwd()}{hint}")


if __name__ == "__main__":
    sys.exit(main())
