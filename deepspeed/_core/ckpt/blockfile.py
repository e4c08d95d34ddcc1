"""Files written front to back at the speed of the disk, with a checksum of each block.

[Note: direct] Writing through the page cache copies everything once more and fills the memory with pages that nobody reads
again; on a machine where fresh memory is expensive it was six times slower (0.26 against 1.6 GB/s). So data goes from two
aligned buffers straight to the disk (``O_DIRECT``) where the file system takes that, while the caller fills the other one.
The thread that writes does nothing else: when it also summed its buffers, the disk had an eighth less to do.
"""

from __future__ import annotations

import errno
import os
import queue
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from deepspeed._core.aio import aligned_empty
from deepspeed._core.checksum import BlockSums
from deepspeed.errors import CheckpointError

__all__ = ["BLOCK_NBYTES", "BlockFile", "FileSum", "check_size"]

BLOCK_NBYTES = 1 << 20
"""Bytes that one checksum covers: few numbers a file (11 MB of text for a TB), and little more to read for those who want a
part of it. More ranks than saved want parts of a few MiB all over a file: by blocks of 16 MiB, each of them read it all."""

_BUFFER_NBYTES = 8 << 20
_Bytes = npt.NDArray[np.uint8]

_SECTOR = 4096  # what O_DIRECT wants lengths and offsets to be multiples of; no disk has larger sectors


@dataclass(frozen=True)
class FileSum:
    """Size of a file in bytes, and the CRC-32 of each block of ``block_nbytes``."""

    nbytes: int
    crc32: tuple[int, ...]
    block_nbytes: int = BLOCK_NBYTES


class BlockFile:
    """A new file that is written in order. Use as a context; it is on the disk when the block ends well.

    Args:
        path: must not exist.
        buffer_nbytes: size of one buffer, a multiple of 4096.
        buffers: number of buffers, at least 1; with two, filling one and writing the other overlap.

    Attributes:
        sums: checksums of what was written so far.
    """

    def __init__(self, path: str | os.PathLike[str], *, buffer_nbytes: int = _BUFFER_NBYTES, buffers: int = 2) -> None:
        if buffer_nbytes < _SECTOR or buffer_nbytes % _SECTOR or buffers < 1:
            raise ValueError(
                f"expected at least one buffer of a multiple of {_SECTOR} bytes: {buffers} of {buffer_nbytes} bytes"
            )
        # As arrays: copying into those lets other threads run.
        self._free: queue.SimpleQueue[_Bytes] = queue.SimpleQueue()
        for _ in range(buffers):
            self._free.put(aligned_empty(buffer_nbytes, reused=True).numpy())
        self._file, self._direct = _create(path)
        self._room = buffer_nbytes
        self._filling: _Bytes | None = None
        self._filled = 0
        self.sums = BlockSums(BLOCK_NBYTES)
        self._error: BaseException | None = None
        self._full: queue.SimpleQueue[tuple[_Bytes, int, int] | bool] = queue.SimpleQueue()
        # Not an executor: those take no work any more while the interpreter waits for the last threads, which may be
        # saving. The context waits for this one.
        self._thread = threading.Thread(target=self._put_all, name="checkpoint-file", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> BlockFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._submit()
        self._full.put(kind is None)
        self._thread.join()
        if kind is None:
            self._check()

    @property
    def sum(self) -> FileSum:
        """Size and checksums, once the context has ended."""
        return FileSum(self.sums.position, tuple(self.sums.blocks))

    def write(self, data: Any) -> int:
        """Appends bytes, which may be reused afterwards; returns how many.

        Raises:
            OSError: an earlier write has failed: the disk is full, for example.
        """
        given = np.frombuffer(data, dtype=np.uint8) if memoryview(data).nbytes else np.empty(0, np.uint8)
        done = 0
        while done < len(given):
            if self._filling is None:
                self._filling = self._free.get()
                self._check()
            count = min(self._room - self._filled, len(given) - done, BLOCK_NBYTES)
            copied = self._filling[self._filled : self._filled + count]
            copied[:] = given[done : done + count]
            self.sums.update(copied.data)  # while the processor still has it at hand
            done += count
            self._filled += count
            if self._filled == self._room:
                self._submit()
        return len(given)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _submit(self) -> None:
        if self._filling is not None:
            self._full.put((self._filling, self._filled, self.sums.position - self._filled))
            self._filling, self._filled = None, 0

    def _put_all(self) -> None:
        """Runs in the thread, which owns the file: whoever waits for it may be interrupted."""
        try:
            while not isinstance(part := self._full.get(), bool):
                try:
                    if self._error is None:
                        self._put(*part)
                except BaseException as error:
                    self._error = error
                self._free.put(part[0])
            if part and self._error is None:
                os.ftruncate(self._file, self.sums.position)
                os.fsync(self._file)
        except BaseException as error:
            self._error = error
        finally:
            try:
                os.close(self._file)
            except OSError as error:  # network file systems may keep a full disk to themselves until now
                self._error = self._error or error

    def _put(self, buffer: _Bytes, nbytes: int, offset: int) -> None:
        # The last part of a file is written with what is behind it in the buffer, and cut off afterwards.
        length = -(-nbytes // _SECTOR) * _SECTOR if self._direct else nbytes
        done = 0
        while done < length:
            try:
                done += os.pwrite(self._file, buffer[done:length].data, offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._go_buffered()
                length = nbytes
            if done % _SECTOR and done < length and self._direct:
                self._go_buffered()  # a short write, after which offsets are no longer aligned

    def _go_buffered(self) -> None:
        """For the rest of this file: its file system accepts the flag, but not the writes."""
        import fcntl  # noqa: PLC0415 - where O_DIRECT is, it is there

        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
        self._direct = False


def _create(path: str | os.PathLike[str]) -> tuple[int, bool]:
    """A descriptor of a new file, and whether it takes direct writes."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    direct = getattr(os, "O_DIRECT", 0)
    try:
        return os.open(path, flags | direct, 0o666), bool(direct)
    except OSError as error:
        if not direct or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    # Some file systems make the file all the same before they refuse.
    with suppress(FileNotFoundError):
        os.unlink(path)
    return os.open(path, flags, 0o666), False


def check_size(path: Path, known: FileSum) -> None:
    """Raises ``CheckpointError`` if the file is not there or is not as long as it was written."""
    try:
        nbytes = path.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, though it was written with the others of its folder") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Load another tag") from error
    if nbytes != known.nbytes:
        raise CheckpointError(
            f"{path} has {nbytes} bytes, but {known.nbytes} were written: it is truncated or was replaced. Copy the file "
            "again, or load another tag"
        )
