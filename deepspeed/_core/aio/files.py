"""An open file that knows whether it can be read and written past the page cache.

[Note: two descriptors] Direct I/O takes only aligned memory, offsets and lengths. So a file has a second descriptor,
through the page cache, for the bytes before the first and after the last page of a request. To write these by reading and
rewriting a page would lose what a neighbour (a thread, a process) writes into the same page at the same time. The kernel
keeps both ways coherent: a direct read writes cached pages back first, a direct write drops them. Requests are cut at
pages, so that both ways never meet in one page of a request, and read-ahead is off, so that the cache holds only pages
that were asked for.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
from contextlib import suppress
from types import TracebackType
from typing import Any

from deepspeed._core.aio.memory import PAGE_NBYTES

__all__ = ["DataFile", "StrPath"]

StrPath = str | os.PathLike[str]

_O_DIRECT = getattr(os, "O_DIRECT", 0)
# From linux/stat.h: the request for, and the places of, what direct I/O on a file has to be aligned to (Linux 6.1).
_STATX_DIOALIGN = 0x2000
_DIOALIGN_AT = 152
_ANSWER_NBYTES = 256  # at least what statx and statfs fill
_AT_FDCWD = -100
# tmpfs and ramfs (linux/magic.h) take O_DIRECT since Linux 6.6, and ignore it.
_IN_MEMORY = (0x01021994, 0x858458F6)


@functools.cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    for name in ("statx", "statfs", "fallocate"):
        if not hasattr(library, name):
            return None
    library.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
    library.statfs.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
    library.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return library


def _direct_alignment(path: str) -> tuple[int, int]:
    """``(memory, offset)`` in bytes; pages where the system cannot tell; zeros where the file has no direct I/O."""
    library = _libc()
    if library is not None:
        answer = ctypes.create_string_buffer(_ANSWER_NBYTES)
        if library.statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_DIOALIGN, answer) == 0:
            (known,) = struct.unpack_from("I", answer, 0)
            if known & _STATX_DIOALIGN:
                memory, offset = struct.unpack_from("II", answer, _DIOALIGN_AT)
                return memory, offset
        if library.statfs(os.fsencode(path), answer) == 0 and struct.unpack_from("l", answer, 0)[0] in _IN_MEMORY:
            return 0, 0
    return PAGE_NBYTES, PAGE_NBYTES


class DataFile:
    """An open file for :class:`~deepspeed._core.aio.FileIO`; see [Note: two descriptors].

    Args:
        path: kept as an absolute path, for messages and :meth:`unlink`.
        write: open for reading and writing, and create it if it is not there; nothing is truncated.
        direct: go past the page cache if the filesystem can. ``file.direct`` tells what came of it.

    Raises:
        OSError: of the class that fits (``FileNotFoundError``, ``PermissionError``, ...), with the path.
    """

    def __init__(self, path: StrPath, *, write: bool = False, direct: bool = True) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self.writable = write
        self.memory_alignment = 1
        self.alignment = 1
        flags = os.O_CLOEXEC | (os.O_RDWR | os.O_CREAT if write else os.O_RDONLY)
        self._buffered = os.open(self.path, flags, 0o666)
        self._direct = self._open_direct(flags & ~os.O_CREAT) if direct and _O_DIRECT else -1
        if self._direct >= 0:
            with suppress(OSError):
                os.posix_fadvise(self._buffered, 0, 0, os.POSIX_FADV_RANDOM)

    def _open_direct(self, flags: int) -> int:
        memory, offset = _direct_alignment(self.path)
        if not memory or not offset:
            return -1
        try:
            descriptor = os.open(self.path, flags | _O_DIRECT)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return -1
            self.close()
            raise
        if not os.path.samestat(os.fstat(descriptor), os.fstat(self._buffered)):
            os.close(descriptor)
            self.close()
            raise OSError(errno.ESTALE, "the file was replaced by another while it was opened", self.path)
        self.memory_alignment = memory
        self.alignment = max(offset, PAGE_NBYTES)
        return descriptor

    @property
    def direct(self) -> bool:
        """Whether aligned parts of requests go past the page cache."""
        return self._direct >= 0 and self.alignment > 1

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._buffered < 0

    def descriptor(self, direct: bool) -> int:
        """The descriptor for direct I/O, or the one through the page cache."""
        return self._direct if direct else self._buffered

    def give_up_direct(self) -> None:
        """From now on everything goes through the page cache: the filesystem refused what it said it takes."""
        self.memory_alignment = self.alignment = 1

    @property
    def nbytes(self) -> int:
        """Length of the file."""
        return os.fstat(self._buffered).st_size

    def reserve(self, nbytes: int, offset: int = 0) -> bool:
        """Gets disk space for ``nbytes`` bytes at ``offset``, and makes the file that long; contents stay as they are.

        So a full disk shows now, not in the middle of a write, and parallel writes need not queue for new space.

        Returns:
            False where the filesystem cannot reserve: nothing was changed then.

        Raises:
            OSError: no space (ENOSPC), or beyond a limit (EFBIG, EDQUOT), with the bytes and the path.
        """
        library = _libc()
        if library is None or nbytes <= 0:
            return False
        while library.fallocate(self._buffered, 0, offset, nbytes) != 0:
            code = ctypes.get_errno()
            if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                return False
            if code != errno.EINTR:
                what = f"cannot reserve {nbytes} bytes at offset {offset}: {os.strerror(code)}"
                raise OSError(code, what, self.path)
        return True

    def truncate(self, nbytes: int) -> None:
        """Makes the file this long."""
        os.ftruncate(self._buffered, nbytes)

    def sync(self) -> None:
        """Returns when what was written is on the disk; raises what went wrong on the way."""
        os.fsync(self._buffered)

    def unlink(self) -> None:
        """Removes the name; the contents stay until the file is closed, however the process ends."""
        os.unlink(self.path)

    def close(self) -> None:
        """Closes both descriptors; no transfer may be under way. Can be called again."""
        for name in ("_direct", "_buffered"):
            descriptor = getattr(self, name, -1)
            setattr(self, name, -1)
            if descriptor >= 0:
                os.close(descriptor)

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"DataFile({self.path!r}, {'direct' if self.direct else 'buffered'})"
