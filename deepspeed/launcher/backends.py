"""How other hosts are reached: one class a launcher, each turning a job into the commands that this host runs.

ssh and pdsh start the per-node part on each host (:mod:`launch`); the MPI launchers and Slurm start each rank themselves
(:mod:`launcher_helper`). Options are those of the tools' manuals: ssh(1), pdsh(1), mpirun(1) of Open MPI, the Hydra guide of
MPICH, Intel MPI's reference, srun(1).
"""

from __future__ import annotations

import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ..errors import ConfigError
from .cluster import ClusterJob

__all__ = ["Backend", "NodeCommand", "SshBackend", "choose_backend", "ssh_command"]

#: Finds a program on PATH, as :func:`shutil.which` does.
Which = Callable[[str], str | None]
_OTHER_WAYS = "or start the nodes by hand (--no_ssh), with torchrun, or with another --launcher"


@dataclass(frozen=True)
class NodeCommand:
    """One process on this host that stands for one or more hosts of the job."""

    #: For messages: ``"node worker-1"``.
    label: str
    argv: list[str]
    #: Number of nodes behind it.
    nodes: int
    #: Set on top of this process's environment.
    environment: dict[str, str] = field(default_factory=dict)
    #: Its standard input reaches the node as a leash (see :mod:`supervise`); otherwise it gets signals itself.
    leashed: bool = False
    #: Its output is read for announcements, and each line begins with this; ``None``: it goes to the terminal as it is.
    prefix: str | None = None


class Backend(ABC):
    """A launcher. ``program`` must be on PATH; ``install`` says how it gets there."""

    name: ClassVar[str]
    program: ClassVar[str]
    install: ClassVar[str]

    def check(self, which: Which = shutil.which) -> None:
        """Raises ConfigError if the launcher cannot work on this host."""
        if which(self.program) is None:
            raise ConfigError(
                f"--launcher {self.name}: no program {self.program!r} on PATH: install it ({self.install}), {_OTHER_WAYS}"
            )

    @abstractmethod
    def commands(self, job: ClusterJob) -> list[NodeCommand]:
        """What to run here. Raises ConfigError where the launcher cannot express the job."""


class SshBackend(Backend):
    """One ssh a host. Its standard input and output tie the node to this process: nothing outlives either side."""

    name, program, install = "ssh", "ssh", "the OpenSSH client"

    def commands(self, job: ClusterJob) -> list[NodeCommand]:
        return [
            NodeCommand(
                label=f"node {host}",
                argv=ssh_command(host, job.remote_line(str(node_rank)), job.ssh_port, job.launcher_args),
                nodes=1,
                leashed=True,
                prefix=f"{host}: ",
            )
            for node_rank, host in enumerate(job.pool)
        ]


class PdshBackend(Backend):
    """One pdsh for all hosts. It labels lines by itself, and closes the nodes' leashes when it ends."""

    name, program, install = "pdsh", "pdsh", "apt-get install pdsh, dnf install pdsh"

    def commands(self, job: ClusterJob) -> list[NodeCommand]:
        # pdsh replaces %n by the host's place in -w, and %% by %.
        mark = "DEEPSPEED-NODE-RANK"
        line = job.remote_line(mark).replace("%", "%%").replace(mark, "%n")
        environment = {"PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": " ".join(_ssh_options(job.ssh_port))}
        argv = ["pdsh", "-S", "-b", "-f", "1024", "-w", ",".join(job.pool), *job.launcher_args, line]
        return [NodeCommand("pdsh", argv, len(job.pool), environment, prefix="")]


class _RankStarter(Backend):
    """Launchers that start each rank: variables travel by name, from the launcher's own environment."""

    #: What ``program --version`` prints, in part; empty: nothing to tell apart.
    version_marks: ClassVar[tuple[str, ...]] = ()
    #: Binding and the like that would harm ranks with threads of their own; the user's own values win.
    defaults: ClassVar[Mapping[str, str]] = {}

    def check(self, which: Which = shutil.which) -> None:
        super().check(which)
        if not self.version_marks:
            return
        command = [self.program, "--version"]
        said = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
        if not any(mark in said.stdout + said.stderr for mark in self.version_marks):
            first = (said.stdout + said.stderr).strip().splitlines()[:1] or ["nothing"]
            raise ConfigError(
                f"--launcher {self.name}: {which(self.program)} is of another MPI (its --version says {first[0]!r}): put "
                f"the right one first on PATH ({self.install}), or choose the launcher that fits"
            )

    def commands(self, job: ClusterJob) -> list[NodeCommand]:
        exports = {**self.defaults, **job.exports}
        argv = [self.program, *self._options(job, list(exports)), *job.launcher_args]
        argv += job.rank_command(self.name, self._master_addr(job))
        return [NodeCommand(self.program, argv, len(job.pool), {**exports, **self._environment(job)})]

    @abstractmethod
    def _options(self, job: ClusterJob, exported: list[str]) -> list[str]:
        """Number of ranks, placement, folder, names of exported variables."""

    def _environment(self, job: ClusterJob) -> dict[str, str]:
        """Variables for the launcher itself."""
        if job.ssh_port is not None:
            raise ConfigError(
                f"--ssh_port {job.ssh_port}: {self.name} has no setting for it; name the port in ~/.ssh/config, or use "
                "--launcher ssh"
            )
        return {}

    def _master_addr(self, job: ClusterJob) -> str:
        return job.master_addr or next(iter(job.pool))

    def _slots_each(self, job: ClusterJob) -> int:
        counts = {host: len(slots) for host, slots in job.pool.items()}
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{host}: {count}" for host, count in counts.items())
            raise ConfigError(
                f"--launcher {self.name} needs as many slots on each host as on the others, got {shown}: choose with "
                "--num_gpus or --include, or use --launcher ssh"
            )
        return next(iter(counts.values()))


def _with_counts(job: ClusterJob) -> str:
    return ",".join(f"{host}:{len(slots)}" for host, slots in job.pool.items())


class OpenMpiBackend(_RankStarter):
    name, program, install = "openmpi", "mpirun", "Open MPI"
    version_marks = ("Open MPI", "OpenRTE", "PRRTE")

    def _options(self, job: ClusterJob, exported: list[str]) -> list[str]:
        port = [] if job.ssh_port is None else ["--mca", "plm_rsh_args", f"-p {job.ssh_port}"]
        return [
            *("-n", str(job.world_size), "--host", _with_counts(job)),
            # Without these, ranks may be dealt to sockets in turn, and be bound to one core each.
            *("--map-by", "slot", "--bind-to", "none"),
            *("--wdir", job.folder),
            *port,
            *(word for name in exported for word in ("-x", name)),
        ]

    def _environment(self, job: ClusterJob) -> dict[str, str]:
        return {}  # the port is an option


class MpichBackend(_RankStarter):
    name, program, install = "mpich", "mpirun", "MPICH"
    version_marks = ("HYDRA", "MPICH", "Intel(R) MPI")

    def _options(self, job: ClusterJob, exported: list[str]) -> list[str]:
        hosts = ["-n", str(job.world_size), "-hosts", _with_counts(job), "-wdir", job.folder]
        return [*hosts, *(["-genvlist", ",".join(exported)] if exported else [])]


class MvapichBackend(MpichBackend):
    name, program, install = "mvapich", "mpirun", "MVAPICH2"
    defaults: ClassVar[Mapping[str, str]] = {"MV2_ENABLE_AFFINITY": "0"}


class IntelMpiBackend(_RankStarter):
    name, program, install = "impi", "mpirun", "Intel MPI"
    version_marks = ("Intel(R) MPI",)
    defaults: ClassVar[Mapping[str, str]] = {"I_MPI_PIN": "0"}

    def _options(self, job: ClusterJob, exported: list[str]) -> list[str]:
        return [
            *("-n", str(job.world_size), "-ppn", str(self._slots_each(job)), "-hosts", ",".join(job.pool)),
            *("-wdir", job.folder),
            *("-genvlist", ",".join(exported)),
        ]

    def _environment(self, job: ClusterJob) -> dict[str, str]:
        return {} if job.ssh_port is None else {"I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS": f"-p {job.ssh_port}"}


class SlurmBackend(_RankStarter):
    """srun, inside an allocation or making one. Slurm orders the hosts its own way, so ranks ask it where they are."""

    name, program, install = "slurm", "srun", "Slurm; on a machine that is part of the cluster"

    def _options(self, job: ClusterJob, exported: list[str]) -> list[str]:
        each = self._slots_each(job)
        return [
            *(f"--nodes={len(job.pool)}", f"--ntasks={job.world_size}", f"--ntasks-per-node={each}"),
            *(f"--nodelist={','.join(job.pool)}", "--distribution=block", f"--chdir={job.folder}", "--export=ALL"),
            *("--kill-on-bad-exit=1", "--quit-on-interrupt"),
        ]

    def _master_addr(self, job: ClusterJob) -> str:
        return job.master_addr  # else the first host in Slurm's order, which the ranks know


_BACKENDS: dict[str, type[Backend]] = {
    backend.name: backend
    for backend in (
        SshBackend,
        PdshBackend,
        OpenMpiBackend,
        MpichBackend,
        MvapichBackend,
        IntelMpiBackend,
        SlurmBackend,
    )
}


def choose_backend(name: str, which: Which = shutil.which) -> Backend:
    """The launcher of that name, checked. For ``pdsh`` where it is not installed: ssh, which does the same job.

    Raises:
        ConfigError: the launcher cannot work on this host; the message tells the way out.
    """
    if name == "pdsh" and which("pdsh") is None and which("ssh") is not None:
        name = "ssh"
    backend = _BACKENDS[name]()
    backend.check(which)
    return backend


def ssh_command(host: str, line: str, port: int | None = None, more: Sequence[str] = ()) -> list[str]:
    """``ssh`` to a host, without questions; ``line`` is for the shell there."""
    return ["ssh", *_ssh_options(port), *more, "--", host, line]


def _ssh_options(port: int | None) -> list[str]:
    # A question would wait for an answer that nobody can give; a host that is gone is noticed after 15 seconds.
    options = ["-o", "BatchMode=yes", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"]
    return options if port is None else [*options, "-p", str(port)]
