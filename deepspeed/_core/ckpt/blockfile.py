"""Files written front to back at the speed of the disk, with a checksum of each block.

[Note: direct] Writing through the page cache copies everything once more and fills the memory with pages that nobody reads
again; on a machine where fresh memory is expensive it was six times slower (0.26 against 1.6 GB/s). So data goes from two
aligned buffers straight to the disk (``O_DIRECT``) where the file system takes that, while the caller fills the other one.
"""

from __future__ import annotations

import errno
import mmap
import os
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from deepspeed.errors import CheckpointError

__all__ = ["BLOCK_NBYTES", "BlockFile", "FileSum", "check_blocks"]

BLOCK_NBYTES = 64 << 20
"""Bytes that one checksum covers: few numbers a file, and parts of a file can be checked by different ranks."""

_BUFFER_NBYTES = 8 << 20
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
        buffer_nbytes: size of one buffer, a multiple of 4096 that divides 64 MiB.
        buffers: number of buffers, at least 1; with two, filling one and writing the other overlap.
    """

    def __init__(self, path: str | os.PathLike[str], *, buffer_nbytes: int = _BUFFER_NBYTES, buffers: int = 2) -> None:
        if buffer_nbytes % _SECTOR or BLOCK_NBYTES % buffer_nbytes or buffers < 1:
            raise ValueError(
                f"expected buffers of a multiple of {_SECTOR} bytes that divides {BLOCK_NBYTES}: {buffer_nbytes}"
            )
        self._path = Path(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._direct = True
        try:
            self._file = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Some file systems make the file all the same before they refuse.
            with suppress(FileNotFoundError):
                os.unlink(path)
            self._file = os.open(path, flags, 0o666)
            self._direct = False
        self._room = buffer_nbytes
        self._free = [mmap.mmap(-1, buffer_nbytes) for _ in range(buffers)]
        self._all = list(self._free)
        self._filling: mmap.mmap | None = None
        self._filled = 0
        self._position = 0
        self._sums: list[int] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-file")
        self._writing: list[tuple[Future[None], mmap.mmap]] = []

    def __enter__(self) -> BlockFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._thread.shutdown(wait=True)
            os.close(self._file)
            self._writing.clear()
            for buffer in self._all:
                buffer.close()

    @property
    def sum(self) -> FileSum:
        """Size and checksums, once the context has ended."""
        return FileSum(self._position, tuple(self._sums))

    def write(self, data: Any) -> int:
        """Appends bytes, which may be reused afterwards; returns how many.

        Raises:
            OSError: an earlier write has failed: the disk is full, for example.
        """
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            if self._filling is None:
                self._filling = self._free_buffer()
            count = min(self._room - self._filled, len(view) - done)
            self._filling[self._filled : self._filled + count] = view[done : done + count]
            done += count
            self._filled += count
            if self._filled == self._room:
                self._submit()
        return len(view)

    def _free_buffer(self) -> mmap.mmap:
        if not self._free:
            future, buffer = self._writing.pop(0)
            self._free.append(buffer)
            future.result()
        return self._free.pop()

    def _submit(self) -> None:
        if self._filling is None:
            return
        self._writing.append(
            (self._thread.submit(self._put, self._filling, self._filled, self._position), self._filling)
        )
        self._position += self._filled
        self._filling, self._filled = None, 0

    def _put(self, buffer: mmap.mmap, nbytes: int, offset: int) -> None:
        """Runs in the thread."""
        with memoryview(buffer) as view:
            if offset % BLOCK_NBYTES:
                self._sums[-1] = zlib.crc32(view[:nbytes], self._sums[-1])
            else:
                self._sums.append(zlib.crc32(view[:nbytes]))
            # The last part of a file is written with what is behind it in the buffer, and cut off afterwards.
            length = -(-nbytes // _SECTOR) * _SECTOR if self._direct else nbytes
            done = 0
            while done < length:
                try:
                    done += os.pwrite(self._file, view[done:length], offset + done)
                except OSError as error:
                    if error.errno != errno.EINVAL or not self._direct:
                        raise
                    self._go_buffered()
                    length = nbytes
                if done % _SECTOR and done < length:
                    self._go_buffered()  # a short write, after which offsets are no longer aligned

    def _go_buffered(self) -> None:
        """For the rest of this file: its file system accepts the flag, but not the writes."""
        import fcntl  # noqa: PLC0415 - where O_DIRECT is, it is there

        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
        self._direct = False

    def _finish(self) -> None:
        self._submit()
        while self._writing:
            self._free_buffer()
        os.ftruncate(self._file, self._position)
        os.fsync(self._file)


def check_blocks(path: str | os.PathLike[str], known: FileSum, blocks: range | None = None) -> None:
    """Reads blocks of a file (all by default) and compares their checksums.

    Raises:
        CheckpointError: the file is missing, has another size, or a block has other content.
    """
    path = Path(path)
    check_size(path, known)
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(min(_BUFFER_NBYTES, known.nbytes))
        for block in range(len(known.crc32)) if blocks is None else blocks:
            begin, end = block * known.block_nbytes, min((block + 1) * known.block_nbytes, known.nbytes)
            file.seek(begin)
            crc = 0
            with memoryview(buffer) as view:
                while begin < end:
                    count = file.readinto(view[: min(len(view), end - begin)])
                    if not count:
                        break
                    crc = zlib.crc32(view[:count], crc)
                    begin += count
            if begin < end or crc != known.crc32[block]:
                raise CheckpointError(
                    f"{path} is damaged: its bytes {block * known.block_nbytes} to {end} are not those that were written "
                    "(the checksum differs). Copy the file again, or load another tag"
                )


def check_size(path: Path, known: FileSum) -> None:
    """Raises ``CheckpointError`` if the file is not there or is not as long as it was written."""
    try:
        nbytes = path.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, though it was written with the others of its folder") from None
    if nbytes != known.nbytes:
        raise CheckpointError(
            f"{path} has {nbytes} bytes, but {known.nbytes} were written: it is truncated or was replaced. Copy the file "
            "again, or load another tag"
        )
