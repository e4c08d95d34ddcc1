"""What a package does behind a program's back: run as a script, this watches a program and says what the package did.

    python import_watch.py REPORT FOLDER PROGRAM

Watched are processes, sockets, dynamic libraries and writing (by Python's audit events) and threads, whenever code under
FOLDER is on the stack. REPORT is a JSON file with what was seen, and what the program put into ``notes``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

WATCHED = (
    "ctypes.dlopen",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.mkdir",
    "os.posix_spawn",
    "os.system",
    "shutil.",
    "socket.bind",
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "tempfile.",
    "urllib.",
)


def watch(folder: str) -> list[str]:
    """The events that code under ``folder`` causes from now on."""
    seen: list[str] = []
    busy = False

    def ours() -> bool:
        frame: Any = sys._getframe(2)
        while frame is not None and not frame.f_code.co_filename.startswith(folder):
            frame = frame.f_back
        return frame is not None

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal busy
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if not busy and (writes or event.startswith(WATCHED)):
            busy = True
            if ours():
                seen.append(f"{event} {str(arguments[0])[:80]}")
            busy = False

    start = threading.Thread.start

    def watched_start(thread: threading.Thread) -> None:
        if ours():
            seen.append(f"thread {thread.name}")
        start(thread)

    threading.Thread.start = watched_start  # type: ignore[assignment,method-assign]
    sys.addaudithook(hook)
    return seen


def main() -> None:
    report, folder, program = sys.argv[1:]
    seen = watch(folder + os.sep)
    notes: dict[str, Any] = {}
    exec(compile(program, "<program>", "exec"), {"notes": notes, "__name__": "__main__"})
    with open(report, "w") as out:
        json.dump({"seen": seen, "notes": notes}, out)


if __name__ == "__main__":
    main()
