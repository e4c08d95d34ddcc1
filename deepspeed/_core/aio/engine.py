"""Asynchronous file I/O: threads that sit in ``preadv`` and ``pwritev``, where the GIL is released.

[Note: threads, not io_uring] What a disk wants is several requests in flight. Where they are kept waiting, in a ring of the
kernel or in a thread each, does not matter at the sizes used here: a call moves one to sixteen MiB, which takes a disk
about a millisecond and a thread switch ten microseconds. Measured with ``benchmarks/aio.py``, these threads move no less
than ``fio`` with io_uring or libaio in the same file. So a binding would bring a dependency and no speed, and rings are
switched off in many containers.

[Note: pieces] A request is cut at pages of the file. Bytes before the first and after the last page go through the page
cache; all between goes straight between disk and tensor. If the tensor's address does not suit the device, or the tensor
is not on the host, a piece passes through an aligned buffer of the thread: no copy is ever larger than one call.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from deepspeed._core.aio.files import DataFile, StrPath
from deepspeed._core.aio.memory import PAGE_NBYTES, aligned_empty
from deepspeed.errors import MissingFeatureError
from deepspeed.utils.logging import logger

if TYPE_CHECKING:
    from deepspeed.runtime.config_sections.aio import AioConfig

__all__ = ["FileIO", "IoSettings", "Piece", "Transfer", "cut", "io_settings"]

# More bytes in one call are not faster, and Linux takes no more than 2 GiB.
_MAX_CALL_NBYTES = 16 << 20
# Requests in flight come from threads, so a depth is served by a few even where `intra_op_parallelism` is 1; each takes
# several blocks in one call, which the kernel has in flight together.
_LEAST_THREADS = 4
_MOST_THREADS = 32
# A path is reserved ahead if a write makes it longer by this: below it, the call costs more than it saves.
_LEAST_RESERVED_NBYTES = 1 << 20


class IoSettings(NamedTuple):
    """What :class:`FileIO` takes; ``FileIO(*settings)``."""

    block_nbytes: int = 1 << 20
    depth: int = 8
    threads: int = _LEAST_THREADS


def io_settings(
    block_size: int = 1 << 20,
    queue_depth: int = 8,
    single_submit: bool = False,
    intra_op_parallelism: int = 1,
) -> IoSettings:
    """From the documented knobs (config reference, ``aio``; DeepNVMe tutorial) to those of :class:`FileIO`.

    ``queue_depth`` blocks of ``block_size`` bytes are in flight. ``intra_op_parallelism`` threads share a request, but not
    fewer than four (nor more than the depth). With ``single_submit`` each block is a call of its own.
    """
    threads = min(max(intra_op_parallelism, _LEAST_THREADS), queue_depth, _MOST_THREADS)
    if single_submit:
        threads = min(max(threads, queue_depth), _MOST_THREADS)
        return IoSettings(block_size, threads, threads)
    return IoSettings(block_size, queue_depth, threads)


class Piece(NamedTuple):
    """Bytes ``begin`` to ``end`` of a request; ``direct``: past the page cache."""

    begin: int
    end: int
    direct: bool


def cut(offset: int, nbytes: int, alignment: int, call_nbytes: int, *, direct: bool) -> list[Piece]:
    """Cuts a request of ``nbytes`` bytes at file ``offset`` into pieces of at most ``call_nbytes``. Pure.

    With ``direct``, file offsets and lengths of direct pieces are multiples of ``alignment``, of which ``call_nbytes``
    is a multiple; only the bytes before the first and after the last multiple are not direct.
    """
    head = min(-offset % alignment, nbytes) if direct else 0
    tail = (nbytes - head) % alignment if direct else 0
    bulk_end = nbytes - tail
    pieces = [Piece(0, head, False)] if head else []
    pieces += [Piece(at, min(at + call_nbytes, bulk_end), direct) for at in range(head, bulk_end, call_nbytes)]
    if tail:
        pieces.append(Piece(bulk_end, nbytes, False))
    return pieces


class Transfer:
    """A read or write under way; made by :class:`FileIO`. It keeps its tensor alive until it is done."""

    def __init__(self, nbytes: int, file: DataFile, offset: int, writing: bool, pieces: list[Piece]) -> None:
        self.nbytes = nbytes
        self.path = file.path
        self.offset = offset
        self.writing = writing
        self._pieces = deque(pieces)
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._error: tuple[int, str, BaseException] | None = None  # errno, message, cause
        self._claimed = False

    def done(self) -> bool:
        """Whether all of it ended, well or not; does not wait."""
        return self._done.is_set()

    def wait(self) -> None:
        """Returns when all bytes are in place.

        Raises:
            OSError: of the class that fits the cause (``errno``, ``filename``), saying what was asked for and where it
                stopped. The bytes of a failed read are undefined. Every call raises it.
        """
        self._done.wait()
        if self._error is not None:
            self._claimed = True
            code, message, cause = self._error
            # A new one each time: an error that was raised refers to frames, and so to us.
            raise OSError(code, message, self.path) from cause

    def _take(self) -> Piece | None:
        try:
            return self._pieces.popleft()
        except IndexError:
            return None

    def _fail(self, error: BaseException, stopped_at: int) -> None:
        """Keeps the first error, and drops the pieces that nobody has begun."""
        verb = "write" if self.writing else "read"
        what = f"{verb} of {self.nbytes} bytes at offset {self.offset} stopped at offset {stopped_at}"
        code = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        why = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        if isinstance(error, OSError):
            error.__traceback__ = None  # the message has all, and the frames would keep the tensor
        with self._lock:
            self._pieces.clear()
            if self._error is None:
                self._error = (code, f"{what}: {why}", error)

    def __del__(self) -> None:
        if self._error is not None and not self._claimed:
            logger.error(f"a file transfer failed, and nobody waited for it: {self._error[1]} ({self.path})")


class _Bytes:
    """A contiguous tensor as bytes: a numpy array on the host, else a flat tensor and an event that it is ready after."""

    def __init__(self, tensor: torch.Tensor) -> None:
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        self.on_host = flat.device.type == "cpu"
        self.address = flat.data_ptr() if self.on_host else 0
        self.flat = flat
        self.array: Any = flat.numpy() if self.on_host else None
        self.event: torch.Event | None = None
        if not self.on_host:
            # Threads do not share the caller's stream: they wait for what it has queued on the tensor so far.
            self.event = torch.Event(device=flat.device)
            self.event.record()


class FileIO:
    """Reads and writes of tensors at offsets of files, done by threads.

    Requests are begun in the order they were made, and share the threads. They may end in any order, so requests that
    touch the same bytes must wait for each other. With one object for reads and one for writes, neither queues behind
    the other. Make it after forking. Methods may be called from any thread.

    Args:
        block_nbytes: unit of a call, > 0; rounded up to whole pages.
        depth: most blocks in flight at a time, > 0.
        threads: most calls in flight at a time, > 0, and not more than ``depth``; each takes ``depth // threads`` blocks,
            up to 16 MiB. A thread that has to copy keeps a buffer of one call. Beside Python code that holds the GIL, a
            call may have to wait a few ms for it afterwards, so few large calls are better than many small ones.
        direct: open files past the page cache where the filesystem can.
    """

    def __init__(
        self,
        block_nbytes: int = IoSettings().block_nbytes,
        depth: int = IoSettings().depth,
        threads: int = IoSettings().threads,
        direct: bool = True,
    ) -> None:
        for name, value in (("block_nbytes", block_nbytes), ("depth", depth), ("threads", threads)):
            if value < 1:
                raise ValueError(f"FileIO: {name} must be at least 1, but is {value}")
        self.direct = direct
        self.threads = min(threads, depth)
        self._block_nbytes = _round_up(block_nbytes, PAGE_NBYTES)
        blocks = max(1, min(depth // self.threads, _MAX_CALL_NBYTES // self._block_nbytes))
        self.call_nbytes = blocks * self._block_nbytes
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="deepspeed-aio")
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._open: set[Transfer] = set()  # under way, or failed and not yet raised
        self._own = threading.local()

    @classmethod
    def from_config(cls, section: AioConfig, *, direct: bool = True) -> FileIO:
        """As the ``aio`` section says. Raises ``MissingFeatureError`` for ``use_gds``."""
        if section.use_gds:
            raise MissingFeatureError(
                "aio.use_gds = true: GPUDirect Storage is not in this version. Files reach a GPU through page-locked host "
                "memory; set it to false"
            )
        settings = io_settings(
            section.block_size, section.queue_depth, section.single_submit, section.intra_op_parallelism
        )
        return cls(*settings, direct=direct)

    def read(self, tensor: torch.Tensor, file: DataFile | StrPath, offset: int = 0) -> Transfer:
        """Begins to fill ``tensor`` with the file's bytes from ``offset`` on.

        Args:
            tensor: contiguous, any dtype and device; its bytes are undefined until the transfer was waited for.
            file: a path, opened for this request, or an open file, which the caller closes after waiting.
            offset: in bytes, any.

        Raises:
            ValueError: a tensor that is not contiguous, a negative offset, a file that is closed or not for writing, or a
                process that was forked off.
            RuntimeError: this object was closed.
            OSError: the path cannot be opened. What happens later is raised by waiting; also if the file ends early
                (ENODATA).
        """
        return self._begin(tensor, file, offset, writing=False)

    def write(self, tensor: torch.Tensor, file: DataFile | StrPath, offset: int = 0) -> Transfer:
        """Begins to write the bytes of ``tensor`` to the file from ``offset`` on; the rest of the file stays as it is.

        A path is created if it is not there. ``tensor`` must not change until the transfer was waited for; the bytes are
        then in the file for every reader, on the disk after :meth:`DataFile.sync`. Arguments and errors as :meth:`read`.
        """
        return self._begin(tensor, file, offset, writing=True)

    def wait(self) -> None:
        """Waits for every transfer begun so far. Raises the first error that no ``Transfer.wait`` has raised yet."""
        with self._lock:
            waiting = list(self._open)
        for transfer in waiting:
            transfer._done.wait()
        with self._lock:
            self._open.difference_update(waiting)
        failed = [transfer for transfer in waiting if transfer._error is not None and not transfer._claimed]
        for transfer in failed[:0:-1]:  # only one can be raised
            try:
                transfer.wait()
            except OSError as error:
                logger.error(f"one more file transfer failed: {error}")
        if failed:
            failed[0].wait()

    def close(self) -> None:
        """Waits for everything, ends the threads, and raises like :meth:`wait`. Can be called again."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def __enter__(self) -> FileIO:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OSError as ours:
            if error is None:
                raise
            logger.error(str(ours))  # what the body raised goes on; this must not hide it

    # -- a request -----------------------------------------------------------------------------------------------------
    def _begin(self, tensor: torch.Tensor, file: DataFile | StrPath, offset: int, *, writing: bool) -> Transfer:
        verb = "write" if writing else "read"
        if os.getpid() != self._process:
            raise ValueError(
                f"FileIO.{verb}: its threads are in process {self._process}; make one in this process, too"
            )
        if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
            raise ValueError(
                f"FileIO.{verb} needs a contiguous tensor, but has shape {tuple(tensor.shape)}, strides {tensor.stride()}; "
                "pass tensor.contiguous(), or a flat view"
            )
        if offset < 0:
            raise ValueError(f"FileIO.{verb}: offset must be >= 0 bytes, but is {offset}")
        if isinstance(file, DataFile) and (file.closed or (writing and not file.writable)):
            state = "is closed" if file.closed else "was opened for reading; pass write=True to DataFile"
            raise ValueError(f"FileIO.{verb}: {file.path} {state}")
        own = not isinstance(file, DataFile)
        opened = DataFile(file, write=writing, direct=self.direct) if not isinstance(file, DataFile) else file
        try:
            return self._submit(_Bytes(tensor), opened, offset, writing, own)
        except BaseException:
            if own:
                opened.close()
            raise

    def _submit(self, data: _Bytes, file: DataFile, offset: int, writing: bool, own: bool) -> Transfer:
        nbytes = data.flat.numel()
        if writing and own and offset + nbytes - max(offset, file.nbytes) >= _LEAST_RESERVED_NBYTES:
            file.reserve(nbytes, offset)
        head = -offset % file.alignment
        suits = data.on_host and (not file.direct or (data.address + head) % file.memory_alignment == 0)
        share = _round_up(max(1, -(-nbytes // self.threads)), self._block_nbytes)  # small requests are shared out, too
        call_nbytes = _round_up(min(self.call_nbytes, share), file.alignment)
        pieces = cut(offset, nbytes, file.alignment, call_nbytes, direct=file.direct)
        transfer = Transfer(nbytes, file, offset, writing, pieces)
        workers = min(self.threads, len(pieces))
        with self._lock:
            self._open.add(transfer)
        request = _Request(self, transfer, data, file, own_file=own, stages_direct=not suits, workers=workers)
        try:
            for _ in range(workers):
                self._pool.submit(request.run)
        except RuntimeError as error:
            with self._lock:
                self._open.discard(transfer)
            raise RuntimeError(f"FileIO: it was closed, or the system gives no more threads ({error})") from error
        if not workers:
            request.end()
        return transfer

    def _staging(self, nbytes: int) -> torch.Tensor:
        """This thread's buffer of one call; (nbytes,) uint8."""
        buffer: torch.Tensor | None = getattr(self._own, "buffer", None)
        if buffer is None or len(buffer) < nbytes:
            buffer = self._own.buffer = aligned_empty(max(nbytes, self.call_nbytes), reused=True)
        return buffer[:nbytes]

    def _finished(self, transfer: Transfer) -> None:
        if transfer._error is None:
            with self._lock:
                self._open.discard(transfer)


@dataclass
class _Cursor:
    """How far a thread came: a position in the file."""

    at: int


class _Request:
    """What the threads need to work on a transfer; dropped when it is done, and the tensor with it."""

    def __init__(
        self,
        io: FileIO,
        transfer: Transfer,
        data: _Bytes,
        file: DataFile,
        *,
        own_file: bool,
        stages_direct: bool,
        workers: int,
    ) -> None:
        self._io = io
        self._transfer = transfer
        self._data = data
        self._file = file
        self._own_file = own_file
        self._stages_direct = stages_direct
        self._workers = workers
        self._call: Callable[[int, list[Any], int], int] = os.pwritev if transfer.writing else os.preadv

    def run(self) -> None:
        """Works on pieces until none is left; the last thread to leave ends the transfer."""
        transfer = self._transfer
        while (piece := transfer._take()) is not None:
            cursor = _Cursor(transfer.offset + piece.begin)
            try:
                if not self._data.on_host or (piece.direct and self._stages_direct):
                    self._move_staged(piece, cursor)
                else:
                    self._move(self._data.array[piece.begin : piece.end], piece.direct, cursor)
            except BaseException as error:
                transfer._fail(error, cursor.at)
        with transfer._lock:
            self._workers -= 1
            last = self._workers == 0
        if last:
            self.end()

    def end(self) -> None:
        """Closes what was opened for the transfer, and lets those who wait for it go on."""
        transfer = self._transfer
        try:
            if self._own_file:
                self._file.close()
        except OSError as error:  # a network filesystem tells a failed write here
            transfer._fail(error, transfer.offset + transfer.nbytes)
        finally:
            self._io._finished(transfer)
            transfer._done.set()

    def _move(self, view: Any, direct: bool, cursor: _Cursor) -> None:
        """Moves all bytes between ``view`` (numpy, uint8) and the file at the cursor, which goes along."""
        left = view
        while len(left):
            try:
                moved = self._call(self._file.descriptor(direct), [left], cursor.at)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                self._file.give_up_direct()
                direct = False
                continue
            if moved == 0:
                raise self._ended()
            cursor.at += moved
            left = left[moved:]
            # A call may move less than asked for, and end anywhere: the rest goes where nothing has to be aligned.
            direct = direct and moved % self._file.alignment == 0

    def _ended(self) -> OSError:
        if self._transfer.writing:
            return OSError(errno.ENOSPC, "the filesystem takes no more bytes")
        return OSError(errno.ENODATA, f"the file ends there, after {self._file.nbytes} bytes")

    def _move_staged(self, piece: Piece, cursor: _Cursor) -> None:
        """The same by way of this thread's buffer."""
        data = self._data
        if data.event is not None:
            data.event.synchronize()
        staging = self._io._staging(piece.end - piece.begin)
        view = staging.numpy()
        if self._transfer.writing:
            _copy(data, piece, staging, outwards=True)
            self._move(view, piece.direct, cursor)
        else:
            self._move(view, piece.direct, cursor)
            _copy(data, piece, staging, outwards=False)


def _copy(data: _Bytes, piece: Piece, staging: torch.Tensor, *, outwards: bool) -> None:
    """Between a piece of the tensor and the buffer. On the host by numpy: torch would start threads in each of ours."""
    if data.on_host:
        source, target = data.array[piece.begin : piece.end], staging.numpy()
        if not outwards:
            source, target = target, source
        target[:] = source
    elif outwards:
        staging.copy_(data.flat[piece.begin : piece.end])
    else:
        data.flat[piece.begin : piece.end].copy_(staging)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
