"""The command lines of the launcher and of its per-node part: flags, types and defaults as published for 0.14.1+.

Pure: nothing is looked up on the machine. A flag whose feature is not there yet is known and refused, not unknown.
``--launcher ssh`` is ours; the other names are the published ones.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError, MissingFeatureError

__all__ = [
    "DEFAULT_HOSTFILE",
    "DEFAULT_PORT",
    "MPI_LAUNCHERS",
    "check_runner",
    "parse_helper",
    "parse_node",
    "parse_runner",
    "split_launcher_args",
]

DEFAULT_HOSTFILE = "/job/hostfile"
DEFAULT_PORT = 29500
_LEVELS = ("debug", "info", "warning", "error", "critical")
#: Launchers that start each rank themselves.
MPI_LAUNCHERS = ("openmpi", "mpich", "impi", "mvapich", "slurm")
_LAUNCHERS = ("pdsh", "ssh", *MPI_LAUNCHERS)


def parse_runner(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses ``deepspeed [flags] script [script arguments]``; everything after the script belongs to it."""
    parser = _RunnerParser(
        prog="deepspeed",
        allow_abbrev=False,
        description="Starts one process per accelerator (or per CPU rank) of a training script, here or on a cluster.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("-H", "--hostfile", default=DEFAULT_HOSTFILE, help="resource pool: lines '<host> slots=<count>'")
    add("-i", "--include", default="", help="use only these: NAME[:SLOT[,SLOT...]][@NAME...], e.g. localhost:0,1")
    add("-e", "--exclude", default="", help="leave these out; same form as --include")
    add("--num_nodes", type=int, default=-1, help="use the first N hosts of the hostfile")
    add("--min_elastic_nodes", type=int, default=-1, help="go on while this many nodes are left (elastic: 1)")
    add("--max_elastic_nodes", type=int, default=-1, help="never use more nodes (elastic: all of the job's)")
    add(
        *("--num_gpus", "--num_accelerators"),
        type=int,
        default=-1,
        dest="num_gpus",
        help="number of ranks: devices 0..N-1, or on CPU that many processes (default: all devices; 1 on CPU)",
    )
    add("--master_port", type=int, default=None, help=f"rendezvous port (default: {DEFAULT_PORT}, or a free one)")
    add("--master_addr", default="", help="address of node 0 (default: as it says; one node: 127.0.0.1)")
    add("--node_rank", type=int, default=-1, help="this node's number; with --no_ssh only")
    launchers = "how other hosts are reached; ssh itself where pdsh is not installed"
    add("--launcher", default="pdsh", type=str.lower, choices=_LAUNCHERS, help=launchers)
    add("--launcher_args", default="", help="arguments of that launcher, as one quoted string")
    add("--module", action="store_true", help="run the script as 'python -m'")
    add("--no_python", action="store_true", help="run the script without the interpreter")
    add("--no_local_rank", action="store_true", help="do not pass --local_rank=N to the script")
    add("--no_ssh", action="store_true", help="start this node alone; run the command on each, with its --node_rank")
    add(
        "--no_ssh_check", action="store_true", help="do not ask node 0 for its address; its name in the hostfile serves"
    )
    add("--force_multi", action="store_true", help="reach the host by --launcher even if it is one, or this one")
    add(
        "--save_pid",
        action="store_true",
        help="write the ranks' pids to <temp folder>/<launcher pid>.ds while they run",
    )
    add("--enable_each_rank_log", default="None", metavar="DIR", help="write each rank's output to a file in DIR")
    add("--autotuning", default="", choices=("", "tune", "run"), help="not in this version")
    add("--elastic_training", action="store_true", help="go on without nodes that are lost (through torchrun)")
    _add_binding(parser)
    add("--ssh_port", type=int, default=None, help="ssh port of the hosts")
    add("--venv_script", default=None, help="activation script that each host sources first; its 'python' is used")
    _add_logging(parser)
    _add_script(parser)
    return parser.parse_args(parser.with_launcher_args_joined(sys.argv[1:] if args is None else args))


def parse_node(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses ``python -m deepspeed.launcher.launch --world_info=... [flags] script [script arguments]``."""
    parser = argparse.ArgumentParser(
        prog="deepspeed.launcher.launch",
        allow_abbrev=False,
        description="Starts the ranks of one node.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--node_rank", type=int, default=0, help="this node's place in --world_info")
    _add_job(parser, "127.0.0.1")
    add("--enable_elastic_training", action="store_true", help="run the node as an agent of an elastic job")
    add("--min_elastic_nodes", type=int, default=-1, help="elastic: least number of nodes (-1: 1)")
    add("--max_elastic_nodes", type=int, default=-1, help="elastic: largest number of nodes (-1: all)")
    add("--save_pid", type=int, default=0, metavar="PID", help="write the ranks' pids to <temp folder>/<PID>.ds")
    add("--enable_each_rank_log", default="None", metavar="DIR", help="write each rank's output to a file in DIR")
    add("--leashed", action="store_true", help="standard input carries names of signals; at its end the ranks end")
    _add_binding(parser)
    _add_logging(parser)
    _add_script(parser)
    parsed = parser.parse_args(args)
    _check_common(parsed)
    return parsed


def parse_helper(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses ``python -m deepspeed.launcher.launcher_helper --launcher=... --world_info=... script [arguments]``."""
    parser = argparse.ArgumentParser(
        prog="deepspeed.launcher.launcher_helper",
        allow_abbrev=False,
        description="Becomes one rank that an MPI or Slurm launcher has started.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--launcher", default="mpich", type=str.lower, choices=MPI_LAUNCHERS, help="what started this")
    _add_job(parser, "")
    _add_binding(parser)
    _add_script(parser)
    parsed = parser.parse_args(args)
    _check_common(parsed)
    return parsed


def check_runner(parsed: argparse.Namespace) -> list[str]:
    """Checks what does not depend on the machine; returns remarks on flags that have no effect on one node.

    Raises:
        ConfigError: flags that exclude each other, or (MissingFeatureError) that ask for what is not there yet.
    """
    if parsed.autotuning:
        raise MissingFeatureError(
            f"--autotuning {parsed.autotuning}: this version has no autotuner yet: leave the flag out and set the config's "
            "values yourself"
        )
    _check_common(parsed)
    if (parsed.include or parsed.exclude) and (parsed.num_gpus != -1 or parsed.num_nodes != -1):
        raise ConfigError(
            "--include/--exclude name the resources already: leave out --num_nodes and --num_gpus/--num_accelerators"
        )
    if parsed.node_rank != -1 and not parsed.no_ssh:
        raise ConfigError(f"--node_rank {parsed.node_rank} needs --no_ssh: other launchers number the nodes themselves")
    if parsed.no_ssh and parsed.force_multi:
        raise ConfigError(
            "--no_ssh starts this node alone, --force_multi reaches hosts by --launcher: give one of them"
        )
    split_launcher_args(parsed.launcher_args)
    _check_elastic(parsed)
    unused = {"launcher": "pdsh", "launcher_args": "", "ssh_port": None, "venv_script": None}
    return [
        f"--{flag} {getattr(parsed, flag)} has no effect on one node"
        for flag, default in unused.items()
        if getattr(parsed, flag) != default
    ]


def split_launcher_args(text: str) -> list[str]:
    """The words of ``--launcher_args``, quoted as in a shell.

    Raises:
        ConfigError: a quote that does not end.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--launcher_args {text!r}: {error}") from None


def _check_elastic(parsed: argparse.Namespace) -> None:
    low, high = parsed.min_elastic_nodes, parsed.max_elastic_nodes
    if not parsed.elastic_training:
        if low != -1 or high != -1:
            raise ConfigError("--min_elastic_nodes and --max_elastic_nodes need --elastic_training")
        return
    if parsed.launcher in MPI_LAUNCHERS:
        raise ConfigError(
            f"--elastic_training works with --launcher pdsh, ssh or --no_ssh; {parsed.launcher} ends the whole job with "
            "its first node"
        )
    for flag, number in (("--min_elastic_nodes", low), ("--max_elastic_nodes", high)):
        if number != -1 and number < 1:
            raise ConfigError(f"{flag} expects a number above 0, got {number}")
    if high != -1 and high < max(low, 1):
        raise ConfigError(f"--max_elastic_nodes {high} is below --min_elastic_nodes {low}")


class _RunnerParser(argparse.ArgumentParser):
    """argparse takes ``--launcher_args "-i key"`` for a flag without its value and a flag ``-i``; this one does not."""

    def __init__(self, **kwargs: Any) -> None:
        self._with_value: set[str] = set()
        super().__init__(**kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        action = super().add_argument(*args, **kwargs)
        if action.nargs is None:
            self._with_value.update(action.option_strings)
        return action

    def with_launcher_args_joined(self, args: Sequence[str]) -> list[str]:
        """``["--launcher_args", x]`` before the script as ``["--launcher_args=x"]``."""
        joined, at = [], 0
        while at < len(args) and args[at].startswith("-"):
            width = 2 if args[at] in self._with_value and at + 1 < len(args) else 1
            words = list(args[at : at + width])
            joined += ["=".join(words)] if words[0] == "--launcher_args" else words
            at += width
        return [*joined, *args[at:]]


def _add_job(parser: argparse.ArgumentParser, address: str) -> None:
    parser.add_argument("--master_addr", default=address, help="address of node 0")
    parser.add_argument("--master_port", type=int, default=DEFAULT_PORT, help="rendezvous port on node 0")
    parser.add_argument("--world_info", default="None", help="base64 of a JSON map from host to its list of slots")
    parser.add_argument("--module", action="store_true", help="run the script as 'python -m'")
    parser.add_argument("--no_python", action="store_true", help="run the script without the interpreter")
    parser.add_argument("--no_local_rank", action="store_true", help="do not pass --local_rank=N to the script")


def _add_binding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bind_cores_to_rank", action="store_true", help="give each rank its own CPU cores, and sets OMP_NUM_THREADS"
    )
    parser.add_argument("--bind_core_list", default=None, help="cores to share out, such as 1,3-5,7 (default: all)")


def _add_logging(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--log_level", default="info", type=str.lower, choices=_LEVELS, help="level of the launcher")
    parser.add_argument("-q", "--quiet", action="store_true", help="same as --log_level error")


def _add_script(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("user_script", help="training script, module (--module) or program (--no_python)")
    parser.add_argument("user_args", nargs=argparse.REMAINDER, help="arguments of the script")


def _check_common(parsed: argparse.Namespace) -> None:
    if parsed.module and parsed.no_python:
        raise ConfigError("--module and --no_python exclude each other: a module needs the interpreter")
    if parsed.bind_core_list is not None and not parsed.bind_cores_to_rank:
        raise ConfigError("--bind_core_list needs --bind_cores_to_rank, which turns binding on")
    if parsed.master_port is not None and not 0 < parsed.master_port < 65536:
        raise ConfigError(f"--master_port expects a port from 1 to 65535, got {parsed.master_port}")
