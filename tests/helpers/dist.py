"""Runs a function on several ranks. They are forked, so torch is imported once; a hang ends in stack traces."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankFailed(AssertionError):
    """At least one rank raised, died or hung; the message holds every rank's traceback."""


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 90, init: bool = True, **kwargs: Any
) -> list[Any]:
    """Returns ``[fn(rank, world_size, *args, **kwargs) for rank in ...]``, each computed in a forked process.

    With ``init`` a gloo group exists when ``fn`` starts; results must be picklable.
    """
    folder = tempfile.mkdtemp(prefix="ranks-")
    pids: list[int] = []
    try:
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                _child(fn, rank, world_size, folder, init, args, kwargs)
            pids.append(pid)
        failures = _wait(pids, folder, timeout_s)
        if failures:
            raise RankFailed("\n".join(failures))
        results = []
        for rank in range(world_size):
            with open(f"{folder}/result{rank}", "rb") as file:
                results.append(pickle.load(file))
        return results
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _child(fn: Callable[..., Any], rank: int, world_size: int, folder: str, init: bool, args: Any, kwargs: Any) -> None:
    code = 1
    try:
        log = open(f"{folder}/log{rank}", "w")  # noqa: SIM115 (kept open for the life of the process)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = log
        faulthandler.enable(log)
        faulthandler.register(signal.SIGUSR1, log, all_threads=True)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size))
        # The first use of torch after a fork makes its thread pool anew. Were that in two threads at once, as where
        # Transformers loads weights, one would find none: "Invalid thread pool!".
        torch.set_num_threads(torch.get_num_threads())
        torch.manual_seed(1234)
        if init:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        result = fn(rank, world_size, *args, **kwargs)
        with open(f"{folder}/result{rank}", "wb") as file:
            pickle.dump(result, file)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(code)


def _wait(pids: list[int], folder: str, timeout_s: float) -> list[str]:
    deadline = time.monotonic() + timeout_s
    codes: dict[int, int] = {}
    failed_at: float | None = None
    while len(codes) < len(pids):
        for rank, pid in enumerate(pids):
            if rank not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    if codes[rank] and failed_at is None:
                        failed_at = time.monotonic()
        now = time.monotonic()
        # Ranks left behind by a failed one get a moment to fail in their own way, for a better report.
        if now > deadline or (failed_at is not None and now > failed_at + 5):
            break
        time.sleep(0.005)
    hung = [r for r in range(len(pids)) if r not in codes]
    for rank in hung:
        os.kill(pids[rank], signal.SIGUSR1)
    if hung:
        time.sleep(0.5)
    failures = []
    for rank in range(len(pids)):
        if codes.get(rank) != 0:
            with open(f"{folder}/log{rank}") as file:
                text = file.read()[-6000:]
            failures.append(f"--- rank {rank}: {'hung' if rank in hung else f'exit code {codes[rank]}'}\n{text}")
    return failures
