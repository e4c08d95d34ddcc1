"""Runs a function on several ranks as if each were a script: uncaught exceptions, exit hooks and exit codes count."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class Ended:
    """How a rank ended: exit code (negative for a signal), everything it printed, seconds since the start."""

    code: int
    text: str
    after_s: float


def run_scripts(
    fn: Callable[..., None], world_size: int, *args: Any, store: str = "file", timeout_s: float = 45, **env: str
) -> list[Ended]:
    """Runs ``fn(rank, world_size, *args)`` on forked ranks that have a gloo group. ``store`` is "file" or "tcp"."""
    folder = tempfile.mkdtemp(prefix="scripts-")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = "env://" if store == "tcp" else f"file://{folder}/store"
    pids = []
    try:
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                os.environ.update(env, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                _child(fn, rank, world_size, folder, address, args)
            pids.append(pid)
        return _wait(pids, folder, timeout_s)
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        shutil.rmtree(folder, ignore_errors=True)


def _child(fn: Callable[..., None], rank: int, world_size: int, folder: str, address: str, args: Any) -> None:
    code = 0
    try:
        atexit._clear()  # type: ignore[attr-defined]  # what the test runner left is not the script's
        sys.excepthook = sys.__excepthook__
        faulthandler.disable()
        log = open(f"{folder}/log{rank}", "w")  # noqa: SIM115 (kept open for the life of the process)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = log
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size))
        torch.manual_seed(1234)
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
        fn(rank, world_size, *args)
    except BaseException as error:
        code = 1
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        atexit._run_exitfuncs()  # type: ignore[attr-defined]
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(code)


def _wait(pids: list[int], folder: str, timeout_s: float) -> list[Ended]:
    start_s = time.monotonic()
    ended: dict[int, tuple[int, float]] = {}
    while len(ended) < len(pids):
        passed_s = time.monotonic() - start_s
        for rank, pid in enumerate(pids):
            if rank not in ended:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ended[rank] = (os.waitstatus_to_exitcode(status), passed_s)
        if passed_s > timeout_s:
            logs = "\n".join(open(f"{folder}/log{rank}").read() for rank in range(len(pids)))  # noqa: SIM115
            raise AssertionError(f"ranks {sorted(set(range(len(pids))) - set(ended))} hang:\n{logs}")
        time.sleep(0.005)
    return [Ended(*_split(ended[rank], f"{folder}/log{rank}")) for rank in range(len(pids))]


def _split(ended: tuple[int, float], path: str) -> tuple[int, str, float]:
    with open(path) as file:
        return ended[0], file.read(), ended[1]
