"""Runs the ``deepspeed`` command with real processes, and watches what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import textwrap
import time
from collections.abc import Iterable
from pathlib import Path

from deepspeed.launcher import runner

TIMEOUT_S = 30


class Launcher:
    """Forks this process to run ``deepspeed`` in a folder; its output lands in files there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pids: list[int] = []

    def script(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(textwrap.dedent(text))
        return str(path)

    def start(self, *args: str, main=runner.main, environment=None) -> int:
        pid = os.fork()
        if pid == 0:
            code = 99
            with contextlib.suppress(BaseException):
                os.setsid()
                os.chdir(self.folder)
                os.environ.update(HOME=str(self.folder), **(environment or {}))
                for name, fd in (("stdout", 1), ("stderr", 2)):
                    stream = open(self.folder / name, "w")  # noqa: SIM115 (the child keeps it)
                    os.dup2(stream.fileno(), fd)
                    setattr(sys, name, stream)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                try:
                    code = main([*args])
                except SystemExit as ended:
                    code = ended.code
                sys.stderr.flush()
            os._exit(code)
        self._pids.append(pid)
        return pid

    def wait(self, pid: int) -> int:
        """Exit code of the launcher."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self._pids.remove(pid)
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        raise AssertionError(f"the launcher hangs; it said:\n{self.said}")

    def run(self, *args: str, **kwargs) -> int:
        return self.wait(self.start(*args, **kwargs))

    @property
    def said(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def printed(self) -> list[str]:
        return sorted((self.folder / "stdout").read_text().splitlines())

    def until(self, pattern: str, count: int) -> list[Path]:
        """Waits until that many files exist (and are whole: scripts rename them into place)."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            found = sorted(self.folder.glob(pattern))
            if len(found) >= count:
                return found
            time.sleep(0.005)
        raise AssertionError(f"{count} x {pattern} did not appear; the launcher said:\n{self.said}")

    def end(self) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


#: Tells that the rank is ready, with its pid; then sleeps longer than any test takes.
SLEEPER = """
import os, time
def ready(name=""):
    rank = os.environ["RANK"]
    with open(f"tmp{name}{rank}", "w") as file:
        file.write(str(os.getpid()))
    os.rename(f"tmp{name}{rank}", f"up{name}{rank}")
"""


def gone(pid: int) -> bool:
    """Whether the process has ended (a zombie that nobody waited for has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_gone(pids: Iterable[int]) -> None:
    pids, deadline = list(pids), time.monotonic() + TIMEOUT_S
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline, f"still there: {[pid for pid in pids if not gone(pid)]}"
        time.sleep(0.005)
