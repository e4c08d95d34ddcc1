"""``ds_report``: what this machine can do, as a table. Its order is that of the published report.

Every optimizer that the table calls compatible has just made one step here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import mmap
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from deepspeed.accelerator import CPU_Accelerator, DeepSpeedAccelerator, get_accelerator
from deepspeed.errors import ConfigError
from deepspeed.launcher.arguments import DEFAULT_HOSTFILE
from deepspeed.launcher.resources import parse_hostfile
from deepspeed.ops import __compatible_ops__ as known_ops
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.version import __version__

__all__ = ["cli_main", "report"]

_WIDTH = 74
_NAME_WIDTH = 28
_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "cpu_adam": DeepSpeedCPUAdam,
    "cpu_adagrad": DeepSpeedCPUAdagrad,
    "cpu_lion": DeepSpeedCPULion,
    "fused_adam": FusedAdam,
    "fused_lamb": FusedLamb,
    "fused_lion": FusedLion,
}
#: Packages that some feature uses if they are there, with that use.
_OPTIONAL = {
    "safetensors": "weights in .safetensors files",
    "tensorboard": "tensorboard monitor",
    "triton": "kernels for CUDA devices",
    "transformers": "Trainer",
    "accelerate": "Accelerator",
}
#: Programs that reach other hosts, with the --launcher that uses them.
_LAUNCHERS = {
    "pdsh": "--launcher pdsh, the default",
    "ssh": "--launcher ssh, and the default where pdsh is missing",
    "mpirun": "--launcher openmpi, mpich, impi or mvapich",
    "srun": "--launcher slurm",
}


def report(hide_operator_status: bool = False, hide_errors_and_warnings: bool = False) -> str:
    """The whole report as text, no newline at the end."""
    accelerator, problems = _accelerator()
    lines: list[str] = []
    if not hide_operator_status:
        rows, failures = _operators(accelerator)
        problems += failures
        lines += _operator_table(rows)
    if not hide_errors_and_warnings:
        lines += [f" [WARNING]  {problem}" for problem in problems]
    lines += ["-" * _WIDTH, "DeepSpeed general environment info:"]
    lines += [_dotted(name, value) for name, value in _environment(accelerator)]
    lines += ["-" * _WIDTH, "Launching on several hosts:"]
    lines += [_dotted(name, value) for name, value in _cluster()]
    return "\n".join(lines)


def cli_main(args: Sequence[str] | None = None) -> int:
    """The ``ds_report`` command; returns 0."""
    parser = argparse.ArgumentParser(prog="ds_report", description="Shows what this machine can do with DeepSpeed.")
    parser.add_argument("--hide_operator_status", action="store_true", help="leave the table of operators out")
    parser.add_argument("--hide_errors_and_warnings", action="store_true", help="leave the [WARNING] lines out")
    parsed = parser.parse_args(args)
    print(report(parsed.hide_operator_status, parsed.hide_errors_and_warnings))
    return 0


def _accelerator() -> tuple[DeepSpeedAccelerator, list[str]]:
    """The one in use, or the CPU and why: a report is most wanted where something is set wrong."""
    try:
        return get_accelerator(), []
    except ConfigError as error:
        return CPU_Accelerator(), [f"accelerator: {error}"]


# -- operators ---------------------------------------------------------------------------------------------------------
def _operators(accelerator: DeepSpeedAccelerator) -> tuple[list[tuple[str, bool, bool]], list[str]]:
    """Rows (name, installed, compatible) and what is wrong with those that are not."""
    rows, problems = [], []
    for name, declared in known_ops.items():
        make = _OPTIMIZERS.get(name)
        if make is None:
            rows.append((name, declared, declared))
            if not declared:
                problems.append(f"{name}: not in this version")
            continue
        device = "cpu" if name.startswith("cpu_") else accelerator.device_name()
        problem = _try_step(make, device)
        rows.append((name, True, problem is None))
        if problem is not None:
            problems.append(f"{name} on {device}: {problem}")
    return rows, problems


def _try_step(make: Callable[..., torch.optim.Optimizer], device: str) -> str | None:
    """``None`` if one step on the device moves a weight to a finite value, else what went wrong."""
    try:
        weight = torch.nn.Parameter(torch.ones(8, device=device))
        weight.grad = torch.ones_like(weight)
        make([weight], lr=0.1).step()
        moved = bool(torch.isfinite(weight).all()) and bool((weight != 1).all())
    except Exception as error:  # whatever it is, it belongs in the report
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None if moved else "a step did not change the weights to finite values"


def _operator_table(rows: Sequence[tuple[str, bool, bool]]) -> list[str]:
    rule = "-" * _WIDTH
    has_ninja = shutil.which("ninja") is not None
    return [
        rule,
        "DeepSpeed operator report",
        rule,
        "NOTE: Nothing is compiled at install or import, and a compatible optimizer has just made a step",
        "      on this machine. Sharded CPU Adam builds one small loop with the machine's C compiler at its",
        "      first large step; without a compiler, or with DS_NATIVE_STEP=0, torch's kernels do it.",
        rule,
        "JIT compiled operators require ninja (none does in this version)",
        f"{_padded('ninja')} {'[OKAY]' if has_ninja else '[NO]'}",
        rule,
        "op name".ljust(_NAME_WIDTH + 1) + "installed .. compatible",
        rule,
        *(
            f"{_padded(name)} {'[YES]' if installed else '[NO]'} ...... {'[OKAY]' if compatible else '[NO]'}"
            for name, installed, compatible in rows
        ),
        rule,
    ]


# -- environment -------------------------------------------------------------------------------------------------------
def _environment(accelerator: DeepSpeedAccelerator) -> Iterator[tuple[str, str]]:
    package = Path(__file__).resolve().parent
    yield "torch install path", str(list(torch.__path__))
    yield "torch version", torch.__version__
    yield "deepspeed install path", str([str(package)])
    yield "deepspeed info", f"{__version__}, {_git(package)}"
    yield "deepspeed wheel compiled w.", "nothing: pure Python"
    yield "python", f"{sys.version.split()[0]} ({sys.executable})"
    yield "accelerator", _devices(accelerator)
    yield "torch cuda version", str(torch.version.cuda or "none (CPU build)")
    yield "training dtypes", ", ".join(str(d).removeprefix("torch.") for d in accelerator.supported_dtypes())
    yield "communication backends", _backends(accelerator)
    yield "memory", f"{_gib(accelerator.available_memory())} of {_gib(accelerator.total_memory())} available"
    yield "cpu cores", f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} usable"
    yield "file I/O", _file_io()
    for name, use in _OPTIONAL.items():
        yield name, f"{_version(name)} ({use})"
    yield "shared memory (/dev/shm) size", _shared_memory()


def _devices(accelerator: DeepSpeedAccelerator) -> str:
    kind, count = accelerator.device_name(), accelerator.device_count()
    if kind != "cuda":
        return kind
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    return f"{kind}, {count} device(s): {', '.join(names)}"


def _backends(accelerator: DeepSpeedAccelerator) -> str:
    if not torch.distributed.is_available():
        return "none (torch was built without torch.distributed)"
    usable = [name for name in ("gloo", "nccl", "mpi", "ucc") if torch.distributed.is_backend_available(name)]
    return f"{', '.join(usable)}; default here {accelerator.communication_backend_name()}"


def _file_io() -> str:
    """Whether a page can be written to a file of the current folder past the page cache: not every filesystem can."""
    probe = Path.cwd() / f".ds_report_{os.getpid()}"
    if not hasattr(os, "O_DIRECT"):
        return "buffered; direct: no (not on this system)"
    try:
        handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_DIRECT, 0o600)
        try:
            with mmap.mmap(-1, mmap.PAGESIZE) as page:  # direct writes need aligned memory
                os.write(handle, page)
            direct = "yes"
        finally:
            os.close(handle)
            probe.unlink()
    except OSError as error:
        direct = f"no ({error.strerror})"
    return f"buffered; direct in this folder: {direct}"


def _shared_memory() -> str:
    try:
        return _gib(shutil.disk_usage("/dev/shm").total)
    except OSError:
        return "none"


def _version(distribution: str) -> str:
    """Version from the metadata: importing some of these takes seconds."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# -- cluster -----------------------------------------------------------------------------------------------------------
def _cluster() -> Iterator[tuple[str, str]]:
    for program, use in _LAUNCHERS.items():
        yield program, f"{shutil.which(program) or 'not found'} ({use})"
    yield f"hostfile {DEFAULT_HOSTFILE}", _hostfile(Path(DEFAULT_HOSTFILE))
    yield "host name", f"{socket.gethostname()}, which is {_own_address()}"
    for name, addresses in _interfaces():
        yield f"interface {name}", addresses
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        yield name, os.environ.get(name, "not set (the library chooses)")


def _hostfile(path: Path) -> str:
    if not path.is_file():
        return "none (--hostfile names another)"
    try:
        pool = parse_hostfile(path.read_text(encoding="utf-8").splitlines(), str(path))
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        return f"[WARNING] {error}"
    return f"{len(pool)} host(s), {sum(map(len, pool.values()))} slots: {', '.join(pool)}"


def _own_address() -> str:
    """gloo meets its peers at this address unless an interface is named; a loopback one is for this host alone."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return "an unknown name: set GLOO_SOCKET_IFNAME for jobs on several hosts"
    if address.startswith("127."):
        return f"{address}, this host alone: set GLOO_SOCKET_IFNAME for jobs on several hosts"
    return address


def _interfaces() -> list[tuple[str, str]]:
    """Network interfaces that are up and have an address of the internet kind."""
    import psutil  # noqa: PLC0415 (36 ms, and asked for by reports only)

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = []
    for name, entries in psutil.net_if_addrs().items():
        addresses = [e.address.split("%")[0] for e in entries if e.family in (socket.AF_INET, socket.AF_INET6)]
        if name in up and addresses:
            found.append((name, ", ".join(addresses)))
    return found


def _git(package: Path) -> str:
    """Commit and branch when the package runs from a checkout, in the report's words."""
    if not (package.parent / ".git").exists():
        return "unknown, unknown"

    def ask(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() or "unknown"

    try:
        return f"{ask('rev-parse', '--short', 'HEAD')}, {ask('rev-parse', '--abbrev-ref', 'HEAD')}"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown, unknown"


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GB"


def _padded(name: str) -> str:
    return f"{name} " + "." * (_NAME_WIDTH - 1 - len(name))


def _dotted(name: str, value: Any) -> str:
    return f"{name} {'.' * max(2, 32 - len(name))} {value}"


if __name__ == "__main__":
    sys.exit(cli_main())
