"""How the ranks find each other, decided from arguments and environment alone: pure, so every case is a unit test.

Sources, first match wins: explicit rank and world size; ``RANK`` and ``WORLD_SIZE`` (torch's ``env://``, set by our
launcher, torchrun, accelerate); the variables of an MPI or Slurm launcher; nothing, which is a world of one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .._core.slurm import expand_nodelist
from ..errors import ConfigError

__all__ = ["Rendezvous", "resolve_rendezvous"]

#: (rank, world size, local rank, local size) as Open MPI, MPICH and Intel MPI (Hydra), MVAPICH and Slurm name them.
_MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Rendezvous:
    """Arguments of ``torch.distributed.init_process_group`` and what the environment lacks for it."""

    #: ``None``: this process alone, which needs no address and no port.
    init_method: str | None
    rank: int
    world_size: int
    #: ``None`` where nothing tells it.
    local_rank: int | None
    #: Variables to set before (RANK, ...): clients and the logger read them.
    environment: dict[str, str] = field(default_factory=dict)

    #: Whether all ranks certainly run on this host.
    on_this_host_only: bool = False


def resolve_rendezvous(
    environment: Mapping[str, str],
    *,
    init_method: str | None = None,
    rank: int = -1,
    world_size: int = -1,
    distributed_port: int = 29500,
    mpi_discovery: bool = True,
) -> Rendezvous:
    """Decides as the module's docstring says.

    Raises:
        ConfigError: only a part of what is needed is given (the message names what is missing), or values that are
            not numbers, or a rank outside the world.
    """
    if (rank < 0) != (world_size < 0):
        raise ConfigError(
            f"init_distributed got rank={rank} and world_size={world_size}: give both, or neither to have them read "
            "from the environment"
        )
    local_rank: int | None = None
    found = "the arguments"
    if rank < 0:
        found, rank, world_size, local_rank = _from_environment(environment, mpi_discovery)
    if rank < 0 and init_method not in (None, "env://"):
        if "rank=" in str(init_method) and "world_size=" in str(init_method):
            return Rendezvous(init_method, -1, -1, None)  # torch reads both from the address itself
        raise ConfigError(
            f"init_method={init_method!r} needs to know this process's place: pass rank= and world_size=, or set "
            "RANK and WORLD_SIZE"
        )
    if rank < 0:
        return _alone(environment)
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"rank {rank} is outside a world of {world_size} (from {found}): expected 0 <= rank < world size"
        )
    settled = {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    if init_method in (None, "env://"):
        if world_size == 1:
            init_method = None  # one process needs no meeting point, so no port that could be taken
        else:
            init_method = "env://"
            settled |= _address(environment, found, distributed_port)
    here = init_method is None or _is_loopback(settled.get("MASTER_ADDR") or init_method)
    if environment.get("LOCAL_RANK"):
        local_rank = _number(environment, "LOCAL_RANK")
    elif local_rank is None and here:
        local_rank = rank
    if local_rank is not None:
        settled["LOCAL_RANK"] = str(local_rank)
    return Rendezvous(init_method, rank, world_size, local_rank, settled, here)


def _from_environment(environment: Mapping[str, str], mpi_discovery: bool) -> tuple[str, int, int, int | None]:
    """(where found, rank, world size, local rank); rank -1 when nothing is set."""
    has_rank, has_size = bool(environment.get("RANK")), bool(environment.get("WORLD_SIZE"))
    if has_rank != has_size:
        have, lack = ("RANK", "WORLD_SIZE") if has_rank else ("WORLD_SIZE", "RANK")
        raise ConfigError(
            f"{have}={environment[have]} is set but {lack} is missing: set both (launchers do: deepspeed, torchrun), "
            "or neither to run one process"
        )
    if has_rank:
        return "the environment", _number(environment, "RANK"), _number(environment, "WORLD_SIZE"), None
    if mpi_discovery:
        for rank_name, size_name, local_rank_name, _ in _MPI_VARIABLES:
            # A Slurm batch script itself runs with SLURM_PROCID=0 and SLURM_NTASKS of the whole job. Only what srun
            # started is a rank, and that carries a step.
            batch_script = rank_name == "SLURM_PROCID" and not environment.get("SLURM_STEP_ID")
            if environment.get(rank_name) and environment.get(size_name) and not batch_script:
                local = _number(environment, local_rank_name) if environment.get(local_rank_name) else None
                return rank_name, _number(environment, rank_name), _number(environment, size_name), local
    return "nothing", -1, -1, None


def _alone(environment: Mapping[str, str]) -> Rendezvous:
    address = environment.get("MASTER_ADDR")
    if address and not _is_loopback(address):
        raise ConfigError(
            f"MASTER_ADDR={address} is set but RANK and WORLD_SIZE are missing: set them (launchers do: deepspeed, "
            "torchrun), or unset MASTER_ADDR to run one process"
        )
    return Rendezvous(None, 0, 1, 0, on_this_host_only=True)


def _address(environment: Mapping[str, str], found: str, distributed_port: int) -> dict[str, str]:
    given = _number(environment, "MASTER_PORT") if environment.get("MASTER_PORT") else distributed_port
    if not 0 < given < 65536:  # ranks that look for rank 0 at such a port would wait until the timeout
        raise ConfigError(f"MASTER_PORT (or distributed_port) expects a port from 1 to 65535, got {given}")
    port = str(given)
    address = environment.get("MASTER_ADDR") or _first_host_of_slurm(environment, found)
    if not address:
        if found != "the arguments" and not _mpi_on_one_host(environment, found):
            raise ConfigError(
                f"rank and world size are known (from {found}) but MASTER_ADDR is missing: set it to the name or "
                "address of the host of rank 0 (127.0.0.1 when all ranks run on this host)"
            )
        address = "127.0.0.1"
    return {"MASTER_ADDR": address, "MASTER_PORT": port}


def _first_host_of_slurm(environment: Mapping[str, str], found: str) -> str | None:
    """Slurm puts task 0 on the first host of the step, and all of them know that list."""
    listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not listed or found != "SLURM_PROCID":
        return None
    hosts = expand_nodelist(listed)
    return "127.0.0.1" if len(hosts) == 1 else hosts[0]


def _mpi_on_one_host(environment: Mapping[str, str], found: str) -> bool:
    for rank_name, size_name, _, local_size_name in _MPI_VARIABLES:
        if found == rank_name:
            return environment.get(local_size_name) == environment[size_name]
    return False


def _is_loopback(address: str) -> bool:
    """Whether ``host`` or ``tcp://host:port`` means this host to this host only."""
    host = address.removeprefix("tcp://")
    host = host[: host.index("]") + 1].strip("[]") if host.startswith("[") else host.rsplit(":", 1)[0]
    return host in _LOOPBACK or address in _LOOPBACK


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ConfigError(f"{name}={environment[name]!r} is not a whole number") from None
