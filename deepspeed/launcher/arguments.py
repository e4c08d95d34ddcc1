"""The command lines of the launcher and of its per-node part: flags, types and defaults as published for 0.14.1+.

Pure: nothing is looked up on the machine. A flag whose feature is not there yet is known and refused, not unknown.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..errors import ConfigError, MissingFeatureError

__all__ = ["DEFAULT_HOSTFILE", "DEFAULT_PORT", "check_runner", "parse_node", "parse_runner"]

DEFAULT_HOSTFILE = "/job/hostfile"
DEFAULT_PORT = 29500
_LEVELS = ("debug", "info", "warning", "error", "critical")
_BACKENDS = ("pdsh", "openmpi", "mpich", "impi", "slurm", "mvapich")


def parse_runner(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses ``deepspeed [flags] script [script arguments]``; everything after the script belongs to it."""
    parser = argparse.ArgumentParser(
        prog="deepspeed",
        allow_abbrev=False,
        description="Starts one process per accelerator (or per CPU rank) of a training script on this host.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("-H", "--hostfile", default=DEFAULT_HOSTFILE, help="resource pool: lines '<host> slots=<count>'")
    add("-i", "--include", default="", help="use only these: NAME[:SLOT[,SLOT...]][@NAME...], e.g. localhost:0,1")
    add("-e", "--exclude", default="", help="leave these out; same form as --include")
    add("--num_nodes", type=int, default=-1, help="use the first N hosts of the hostfile")
    add("--min_elastic_nodes", type=int, default=-1, help="not in this version")
    add("--max_elastic_nodes", type=int, default=-1, help="not in this version")
    add(
        *("--num_gpus", "--num_accelerators"),
        type=int,
        default=-1,
        dest="num_gpus",
        help="number of ranks: devices 0..N-1, or on CPU that many processes (default: all devices; 1 on CPU)",
    )
    add("--master_port", type=int, default=None, help=f"rendezvous port (default: {DEFAULT_PORT}, or a free one)")
    add("--master_addr", default="", help="address of node 0 (one node: 127.0.0.1)")
    add("--node_rank", type=int, default=-1, help="this node's number; with --no_ssh only")
    add("--launcher", default="pdsh", type=str.lower, choices=_BACKENDS, help="multi-node backend; unused on one node")
    add("--launcher_args", default="", help="arguments of the multi-node backend")
    add("--module", action="store_true", help="run the script as 'python -m'")
    add("--no_python", action="store_true", help="run the script without the interpreter")
    add("--no_local_rank", action="store_true", help="do not pass --local_rank=N to the script")
    add("--no_ssh", action="store_true", help="not in this version for several nodes")
    add("--no_ssh_check", action="store_true", help="skip the ssh check; there is none on one node")
    add("--force_multi", action="store_true", help="not in this version")
    add(
        "--save_pid",
        action="store_true",
        help="write the ranks' pids to <temp folder>/<launcher pid>.ds while they run",
    )
    add("--enable_each_rank_log", default="None", metavar="DIR", help="write each rank's output to a file in DIR")
    add("--autotuning", default="", choices=("", "tune", "run"), help="not in this version")
    add("--elastic_training", action="store_true", help="not in this version")
    _add_binding(parser)
    add("--ssh_port", type=int, default=None, help="ssh port for several nodes")
    add("--venv_script", default=None, help="not in this version")
    _add_logging(parser)
    _add_script(parser)
    return parser.parse_args(args)


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
    add("--master_addr", default="127.0.0.1", help="address of node 0")
    add("--master_port", type=int, default=DEFAULT_PORT, help="rendezvous port on node 0")
    add("--world_info", default="None", help="base64 of a JSON map from host to its list of slots")
    add("--module", action="store_true", help="run the script as 'python -m'")
    add("--no_python", action="store_true", help="run the script without the interpreter")
    add("--enable_elastic_training", action="store_true", help="not in this version")
    add("--min_elastic_nodes", type=int, default=-1, help="not in this version")
    add("--max_elastic_nodes", type=int, default=-1, help="not in this version")
    add("--no_local_rank", action="store_true", help="do not pass --local_rank=N to the script")
    add("--save_pid", type=int, default=0, metavar="PID", help="write the ranks' pids to <temp folder>/<PID>.ds")
    add("--enable_each_rank_log", default="None", metavar="DIR", help="write each rank's output to a file in DIR")
    _add_binding(parser)
    _add_logging(parser)
    _add_script(parser)
    parsed = parser.parse_args(args)
    _refuse(parsed, ("enable_elastic_training", False), ("min_elastic_nodes", -1), ("max_elastic_nodes", -1))
    _check_common(parsed)
    return parsed


def check_runner(parsed: argparse.Namespace) -> list[str]:
    """Checks what does not depend on the machine; returns remarks on flags that have no effect on one node.

    Raises:
        ConfigError: flags that exclude each other, or (MissingFeatureError) that ask for what is not there yet.
    """
    _refuse(
        parsed,
        ("autotuning", ""),
        ("elastic_training", False),
        ("min_elastic_nodes", -1),
        ("max_elastic_nodes", -1),
        ("force_multi", False),
        ("venv_script", None),
    )
    _check_common(parsed)
    if (parsed.include or parsed.exclude) and (parsed.num_gpus != -1 or parsed.num_nodes != -1):
        raise ConfigError(
            "--include/--exclude name the resources already: leave out --num_nodes and --num_gpus/--num_accelerators"
        )
    if parsed.node_rank not in (-1, 0):
        raise MissingFeatureError(f"--node_rank {parsed.node_rank}: jobs on several nodes are not in this version yet")
    unused = {"launcher": "pdsh", "launcher_args": "", "ssh_port": None}
    return [
        f"--{flag} {getattr(parsed, flag)} has no effect on one node"
        for flag, default in unused.items()
        if getattr(parsed, flag) != default
    ]


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


def _refuse(parsed: argparse.Namespace, *flags: tuple[str, object]) -> None:
    for flag, default in flags:
        if getattr(parsed, flag) != default:
            raise MissingFeatureError(f"--{flag} is not in this version yet: leave it out")


def _check_common(parsed: argparse.Namespace) -> None:
    if parsed.module and parsed.no_python:
        raise ConfigError("--module and --no_python exclude each other: a module needs the interpreter")
    if parsed.bind_core_list is not None and not parsed.bind_cores_to_rank:
        raise ConfigError("--bind_core_list needs --bind_cores_to_rank, which turns binding on")
    if parsed.master_port is not None and not 0 < parsed.master_port < 65536:
        raise ConfigError(f"--master_port expects a port from 1 to 65535, got {parsed.master_port}")
