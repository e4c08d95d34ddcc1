"""A file that belongs to one process: it has no name after it was opened, so nothing stays behind however that ends."""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket
from contextlib import suppress
from pathlib import Path

from deepspeed._core.aio import DataFile

__all__ = ["open_run_file", "remove_dead_folders"]

_FOLDER = re.compile(r"deepspeed-(?P<host>[^-][^/]*)-(?P<pid>\d+)-[0-9a-f]{8}")


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_.]", "_", socket.gethostname())[:60] or "host"


def open_run_file(folder: Path, name: str, key: str) -> DataFile:
    """A new empty file in a folder of its own below ``folder``, both unlinked at once.

    Its ``path``, for messages, is the one it had. What a killed process left before it came so far is removed.

    Args:
        folder: must exist and be writable.
        name: of the file.
        key: the config key that named the folder, for messages.

    Raises:
        OSError: of the class that fits (``FileNotFoundError``, ``PermissionError``, ...), with the path and the way out.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"{key} is not an existing folder: create it on every node, or name another", str(folder)
        )
    with suppress(OSError):
        remove_dead_folders(folder)
    own = folder / f"deepspeed-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        own.mkdir(mode=0o700)
    except OSError as error:
        raise type(error)(
            error.errno,
            f"no file can be made in {key} ({error.strerror}): choose a folder that can be written to",
            str(folder),
        ) from error
    path = own / name
    try:
        file = DataFile(path, write=True)
        file.unlink()
        return file
    finally:
        with suppress(OSError):
            path.unlink()
        with suppress(OSError):
            own.rmdir()


def remove_dead_folders(folder: Path) -> None:
    """Removes what processes of this host left in ``folder`` when they were killed between making and unlinking a file."""
    for path in folder.iterdir():
        match = _FOLDER.fullmatch(path.name)
        if match is None or match["host"] != _host() or _runs(int(match["pid"])):
            continue
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
