"""A job on several hosts, and the command that each host or rank of it runs: pure, compared in tests.

Commands are lists of words. Where a remote shell will read them, they are joined by :func:`remote_line`, which quotes every
word, so what a user typed arrives as it was, whatever is in it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .resources import Pool, encode_world_info

__all__ = ["EXPORTED", "ClusterJob", "exported_variables"]

#: Variables with these beginnings go from the launching side to all hosts. NCCL and PYTHON are the documented ones.
EXPORTED = ("NCCL_", "PYTHON", "MV2_", "UCX_", "GLOO_", "TORCH_", "OMP_", "DS_", "DEEPSPEED_")
#: Sources its first argument and becomes the rest. A fixed text: what the user names are its arguments.
_ACTIVATE = ("bash", "-c", '. "$0" && exec "$@"')


@dataclass(frozen=True)
class ClusterJob:
    """All that decides what runs on the hosts."""

    pool: Pool
    script: str
    script_args: Sequence[str]
    #: Empty: the launcher's first host, whichever that is.
    master_addr: str
    master_port: int
    #: Folder to run in, on every host.
    folder: str
    #: Interpreter, the same on every host; with ``venv_script`` that script decides.
    python: str
    #: ``--module``, ``--no_python``, ``--no_local_rank``, ``--bind_cores_to_rank``, ``--bind_core_list``.
    rank_flags: Sequence[str] = ()
    #: Flags of the per-node part alone: logs, pids, elastic training.
    node_flags: Sequence[str] = ()
    #: Variables for every host.
    exports: Mapping[str, str] = field(default_factory=dict)
    venv_script: str | None = None
    #: Words for the launcher itself.
    launcher_args: Sequence[str] = ()
    ssh_port: int | None = None

    @property
    def world_size(self) -> int:
        return sum(map(len, self.pool.values()))

    def node_command(self, node_rank: str) -> list[str]:
        """Starts the per-node part; ``node_rank`` is a number or what the launcher will replace by one."""
        module = "deepspeed.launcher.launch"
        return self._run(module, [f"--node_rank={node_rank}", "--leashed", *self.node_flags], self.master_addr)

    def rank_command(self, launcher: str, master_addr: str) -> list[str]:
        """Becomes one rank, started by an MPI or Slurm launcher."""
        return self._run("deepspeed.launcher.launcher_helper", [f"--launcher={launcher}"], master_addr)

    def remote_line(self, node_rank: str) -> str:
        """:meth:`node_command` with folder and variables, for a POSIX shell on the host."""
        variables = [f"{name}={value}" for name, value in self.exports.items()]
        words = [*(["env", *variables] if variables else []), *self.node_command(node_rank)]
        return f"cd {shlex.quote(self.folder)} && exec {shlex.join(words)}"

    def _run(self, module: str, flags: Sequence[str], master_addr: str) -> list[str]:
        activate = [] if self.venv_script is None else [*_ACTIVATE, self.venv_script]
        return [
            *activate,
            *("python" if activate else self.python, "-u", "-m", module),
            f"--world_info={encode_world_info(self.pool)}",
            *([f"--master_addr={master_addr}"] if master_addr else []),
            f"--master_port={self.master_port}",
            *flags,
            *self.rank_flags,
            self.script,
            *self.script_args,
        ]


def exported_variables(environment: Mapping[str, str], from_file: Mapping[str, str]) -> dict[str, str]:
    """What every host gets: variables of :data:`EXPORTED` kinds, and those of the file, which win."""
    own = {name: value for name, value in environment.items() if name.startswith(EXPORTED)}
    return {**dict(sorted(own.items())), **from_file}
