"""The ``ds_ssh`` command: ``ds_ssh [-f hostfile] command...`` runs a command on every host of a hostfile at once."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import ConfigError
from .arguments import DEFAULT_HOSTFILE
from .backends import NodeCommand, Which, choose_backend, ssh_command
from .nodes import NodeSupervisor
from .resources import parse_hostfile
from .supervise import set_up_logging

__all__ = ["commands_for", "main"]


def commands_for(hosts: Iterable[str], words: Sequence[str], which: Which = shutil.which) -> list[NodeCommand]:
    """What to run here; the words are joined by spaces and read by each host's shell, as ssh does it.

    By pdsh, or by ssh where pdsh is not installed.

    Raises:
        ConfigError: neither is.
    """
    hosts, line = list(hosts), " ".join(words)
    if choose_backend("pdsh", which).name == "pdsh":
        argv = ["pdsh", "-S", "-b", "-f", "1024", "-w", ",".join(hosts), line]
        return [NodeCommand("pdsh", argv, len(hosts), {"PDSH_RCMD_TYPE": "ssh"})]
    return [NodeCommand(f"node {host}", ssh_command(host, line), 1, prefix=f"{host}: ") for host in hosts]


def main(args: Sequence[str] | None = None) -> int:
    """Returns 0 if the command succeeded on every host, else the code of a host where it did not."""
    parser = argparse.ArgumentParser(prog="ds_ssh", description="Runs a command on every host of a hostfile.")
    parser.add_argument("-f", "--hostfile", default=DEFAULT_HOSTFILE, help="lines '<host> slots=<count>'")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="command with its arguments, for a shell")
    parsed = parser.parse_args(args)
    set_up_logging("info")
    try:
        if not parsed.command:
            raise ConfigError("ds_ssh expects a command, such as: ds_ssh -f hostfile nvidia-smi -L")
        path = Path(parsed.hostfile)
        if not path.is_file():
            raise ConfigError(f"hostfile {parsed.hostfile!r} does not exist; name one with -f")
        print(f"hostfile={parsed.hostfile}", flush=True)
        hosts = parse_hostfile(path.read_text(encoding="utf-8").splitlines(), parsed.hostfile)
        supervisor = NodeSupervisor(commands_for(hosts, parsed.command), minimum_nodes=0)
        code = supervisor.run()
        return code or next(iter(supervisor.failures.values()), 0)
    except ConfigError as error:
        print(f"deepspeed: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
