"""From a job on this node to the exact command, environment and cores of each rank: pure, compared in tests."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import ConfigError

__all__ = ["NodeJob", "RankPlan", "parse_core_list", "parse_environment_file", "plan_elastic_agent", "plan_ranks"]


@dataclass(frozen=True)
class NodeJob:
    """All that decides what runs on one node."""

    script: str
    script_args: Sequence[str]
    #: Slots of every host, by node rank.
    slots_by_node: Sequence[Sequence[int]]
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    #: Run ``python -m script``.
    module: bool = False
    #: Run the script itself, without the interpreter.
    no_python: bool = False
    #: Leave ``--local_rank=N`` out.
    no_local_rank: bool = False
    #: Slots are CUDA devices.
    cuda: bool = False
    #: Cores that the node's ranks may use.
    cores: Sequence[int] = (0,)
    bind_cores: bool = False
    #: Variables of ``.deepspeed_env``.
    extra_environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RankPlan:
    """One process to start."""

    rank: int
    local_rank: int
    argv: list[str]
    environment: dict[str, str]
    #: Cores to be bound to; ``None`` leaves the inherited ones.
    cores: list[int] | None
    #: What to call it where it is not a rank.
    title: str = ""

    @property
    def label(self) -> str:
        return self.title or f"rank {self.rank}"


def plan_ranks(job: NodeJob, environment: Mapping[str, str]) -> list[RankPlan]:
    """The processes of the job's node, by local rank. ``environment`` is what they inherit.

    Raises:
        ConfigError: more ranks than cores to bind, or a device that ``CUDA_VISIBLE_DEVICES`` does not show.
    """
    slots = job.slots_by_node[job.node_rank]
    first = sum(len(before) for before in job.slots_by_node[: job.node_rank])
    common = {
        **environment,
        **job.extra_environment,
        "WORLD_SIZE": str(sum(map(len, job.slots_by_node))),
        "LOCAL_SIZE": str(len(slots)),
        "LOCAL_WORLD_SIZE": str(len(slots)),  # torchrun's name; without it Accelerate writes 1 on CPUs
        "CROSS_RANK": str(job.node_rank),
        "CROSS_SIZE": str(len(job.slots_by_node)),
        "MASTER_ADDR": job.master_addr,
        "MASTER_PORT": str(job.master_port),
    }
    if job.cuda:
        common["CUDA_VISIBLE_DEVICES"] = _visible_devices(slots, common.get("CUDA_VISIBLE_DEVICES"))
    shares = _shares(job.cores, len(slots)) if job.bind_cores else None
    if shares is not None:
        common["OMP_NUM_THREADS"] = str(len(shares[0]))
        common.setdefault("KMP_AFFINITY", "disabled")  # Intel's OpenMP would pin threads by its own idea of cores
    elif not job.cuda and len(slots) > 1:
        # Every rank would otherwise start one thread per core of the machine, and they would fight for them.
        common.setdefault("OMP_NUM_THREADS", str(max(1, len(job.cores) // len(slots))))
    return [
        RankPlan(
            rank=first + local,
            local_rank=local,
            argv=_argv(job, local),
            environment={**common, "RANK": str(first + local), "LOCAL_RANK": str(local)},
            cores=None if shares is None else shares[local],
        )
        for local in range(len(slots))
    ]


def plan_elastic_agent(
    job: NodeJob, environment: Mapping[str, str], own_address: str, min_nodes: int, max_nodes: int
) -> RankPlan:
    """One process: torch's elastic agent, which starts the node's ranks, and again when nodes come or go.

    Node 0 holds the rendezvous. ``own_address`` is where the other nodes reach this one. Ranks get their place from the
    agent; ``${local_rank}`` is its word for a rank's own number.
    """
    slots = job.slots_by_node[job.node_rank]
    common = {**environment, **job.extra_environment}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE"):
        common.pop(name, None)  # true of no world that the agent will make
    if job.cuda:
        common["CUDA_VISIBLE_DEVICES"] = _visible_devices(slots, common.get("CUDA_VISIBLE_DEVICES"))
    else:
        common.setdefault("OMP_NUM_THREADS", str(max(1, len(job.cores) // len(slots))))
    settings = f"is_host={'true' if job.node_rank == 0 else 'false'},last_call_timeout=5"
    argv = [
        *(sys.executable, "-u", "-m", "torch.distributed.run"),
        f"--nnodes={min_nodes}:{max_nodes}",
        f"--nproc_per_node={len(slots)}",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint={job.master_addr}:{job.master_port}",
        f"--rdzv_id=deepspeed-{job.master_port}",
        f"--rdzv_conf={settings}",
        f"--local_addr={own_address}",
        "--max_restarts=100",
        *(["--module"] if job.module else []),
        *(["--no_python"] if job.no_python else []),
        job.script,
        *([] if job.no_local_rank else ["--local_rank=${local_rank}"]),
        *job.script_args,
    ]
    return RankPlan(job.node_rank, 0, argv, common, None, title=f"elastic agent of node {job.node_rank}")


def parse_core_list(text: str) -> list[int]:
    """``"1,3-5,7"`` to ``[1, 3, 4, 5, 7]``.

    Raises:
        ConfigError: text of another form, a range that runs backwards, or a core that comes twice.
    """
    cores: list[int] = []
    for piece in text.split(","):
        low, dash, high = piece.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()) or (dash and int(high) < int(low)):
            raise ConfigError(f"--bind_core_list {text!r}: expected cores such as 1,3-5,7, got {piece!r}")
        cores.extend(range(int(low), int(high if dash else low) + 1))
    if len(set(cores)) != len(cores):
        raise ConfigError(f"--bind_core_list {text!r} names a core twice")
    return cores


def parse_environment_file(lines: Sequence[str], name: str) -> dict[str, str]:
    """Reads lines ``VAR=VAL``; the last of repeated names counts, as clients append to the file.

    A value stands as it is, but for a pair of quotes around all of it, which goes. Nothing in it is expanded.

    Raises:
        ConfigError: a line of another form. Empty lines and lines that begin with ``#`` are passed over.
    """
    values: dict[str, str] = {}
    for number, raw in enumerate(lines, start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        variable, equals, value = line.partition("=")
        if not equals or not variable or any(c.isspace() for c in variable):
            raise ConfigError(f"{name}:{number}: expected VAR=VAL, got {line!r}")
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
        values[variable] = value[1:-1] if quoted else value
    return values


def _argv(job: NodeJob, local_rank: int) -> list[str]:
    # -u: output of a rank that is killed must not be lost in a buffer.
    interpreter = [] if job.no_python else [sys.executable, "-u", *(["-m"] if job.module else [])]
    flag = [] if job.no_local_rank else [f"--local_rank={local_rank}"]
    return [*interpreter, job.script, *flag, *job.script_args]


def _visible_devices(slots: Sequence[int], inherited: str | None) -> str:
    """Slot i is the i-th device that this process sees, so a choice made outside holds."""
    if not inherited:
        return ",".join(map(str, slots))
    visible = [device.strip() for device in inherited.split(",")]
    for slot in slots:
        if slot >= len(visible):
            raise ConfigError(
                f"device {slot} was asked for, but CUDA_VISIBLE_DEVICES={inherited} shows {len(visible)} device(s), "
                "numbered from 0: unset it, or choose among these"
            )
    return ",".join(visible[slot] for slot in slots)


def _shares(cores: Sequence[int], ranks: int) -> list[list[int]]:
    """Neighbouring cores, equally many for each rank; what does not divide is left idle."""
    each = len(cores) // ranks
    if each == 0:
        raise ConfigError(
            f"--bind_cores_to_rank: {ranks} ranks on this host, but only {len(cores)} core(s) to bind: start fewer "
            "ranks or name more cores with --bind_core_list"
        )
    return [list(cores[local * each : (local + 1) * each]) for local in range(ranks)]
