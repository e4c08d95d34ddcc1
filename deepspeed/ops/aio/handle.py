"""``aio_handle``: tensors to files and back, one file or many at a time (DeepNVMe tutorial)."""

from __future__ import annotations

import errno
import weakref
from typing import NamedTuple

import torch

from deepspeed._core.aio import FileIO, Transfer, aligned_empty, io_settings, lock_pages, unlock_pages
from deepspeed._core.aio.files import StrPath
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.logging import warning_once

__all__ = ["aio_handle"]

_VALIDATE_NBYTES = 16 << 20


class _Pending(NamedTuple):
    transfer: Transfer
    buffer: torch.Tensor | None  # to compare with the file afterwards


class aio_handle:
    """Reads files into tensors and writes tensors to files, blocking or not.

    Buffers are contiguous tensors of any dtype, on the host or on a device; a device's go through host memory, a call at
    a time. No buffer or offset needs an alignment, though buffers of :meth:`new_cpu_locked_tensor` are fastest. A request
    moves the whole buffer, from ``file_offset`` bytes on. A write creates the file, and leaves other bytes as they were.

    Args:
        block_size: bytes of a block.
        queue_depth: blocks in flight, at most.
        single_submit: one block a call; else a call takes adjacent blocks together, which is faster.
        overlap_events: accepted; blocks are always begun while others end.
        intra_op_parallelism: threads that share one request. Fewer than four are made four, if the depth allows, because a
            thread is what keeps a block in flight here.

    Raises:
        ValueError: a number that is less than 1.
    """

    def __init__(
        self,
        block_size: int = 1 << 20,
        queue_depth: int = 128,
        single_submit: bool = False,
        overlap_events: bool = False,
        intra_op_parallelism: int = 1,
    ) -> None:
        given = {
            "block_size": block_size,
            "queue_depth": queue_depth,
            "intra_op_parallelism": intra_op_parallelism,
        }
        for name, value in given.items():
            if value < 1:
                raise ValueError(f"aio_handle: {name} must be at least 1, but is {value}")
        self._numbers = given
        self._single_submit = bool(single_submit)
        self._overlap_events = bool(overlap_events)
        self._io = FileIO(*io_settings(block_size, queue_depth, self._single_submit, intra_op_parallelism))
        self._pending: list[_Pending] = []
        self._locked: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()

    # -- requests ------------------------------------------------------------------------------------------------------
    def read(self, buffer: torch.Tensor, filename: StrPath, validate: bool = False, file_offset: int = 0) -> int:
        """Fills ``buffer`` from a file. Arguments, result and errors as :meth:`pread`."""
        return self.pread(buffer, filename, validate, False, file_offset)

    def write(self, buffer: torch.Tensor, filename: StrPath, validate: bool = False, file_offset: int = 0) -> int:
        """Writes ``buffer`` to a file. Arguments, result and errors as :meth:`pread`."""
        return self.pwrite(buffer, filename, validate, False, file_offset)

    def pread(
        self,
        buffer: torch.Tensor,
        filename: StrPath,
        validate: bool = False,
        non_blocking: bool = False,
        file_offset: int = 0,
    ) -> int:
        """Fills ``buffer`` with a file's bytes, blocking or not.

        Args:
            buffer: not to be used, if not blocking, until :meth:`wait` returned.
            filename: the file.
            validate: read the file again afterwards, and compare.
            non_blocking: return at once.
            file_offset: in bytes.

        Returns:
            1, the number of requests that are done; 0 if not blocking.

        Raises:
            OSError: by class and ``errno``; the message names the file, the bytes and where it stopped. Of what was
                begun without blocking, :meth:`wait` raises it; but a file that cannot be opened is told at once.
            ValueError: a buffer that is not contiguous, or a negative offset.
        """
        return self._run(self._io.read(buffer, filename, file_offset), buffer, validate, non_blocking)

    def pwrite(
        self,
        buffer: torch.Tensor,
        filename: StrPath,
        validate: bool = False,
        non_blocking: bool = False,
        file_offset: int = 0,
    ) -> int:
        """Writes ``buffer`` to a file; see :meth:`pread`. The bytes may still be in the disk's cache on return."""
        return self._run(self._io.write(buffer, filename, file_offset), buffer, validate, non_blocking)

    def sync_pread(self, buffer: torch.Tensor, filename: StrPath, file_offset: int = 0) -> int:
        """:meth:`pread`, blocking."""
        return self.pread(buffer, filename, False, False, file_offset)

    def sync_pwrite(self, buffer: torch.Tensor, filename: StrPath, file_offset: int = 0) -> int:
        """:meth:`pwrite`, blocking."""
        return self.pwrite(buffer, filename, False, False, file_offset)

    def async_pread(self, buffer: torch.Tensor, filename: StrPath, file_offset: int = 0) -> int:
        """:meth:`pread`, not blocking."""
        return self.pread(buffer, filename, False, True, file_offset)

    def async_pwrite(self, buffer: torch.Tensor, filename: StrPath, file_offset: int = 0) -> int:
        """:meth:`pwrite`, not blocking."""
        return self.pwrite(buffer, filename, False, True, file_offset)

    def wait(self) -> int:
        """Waits for all requests begun without blocking since the last wait; returns how many there were.

        Raises:
            OSError: the first that failed, after all have ended. The others that failed are named in its message. The
                next wait knows nothing of them.
        """
        waiting, self._pending = self._pending, []
        errors: list[OSError] = []
        for pending in waiting:
            try:
                pending.transfer.wait()
                if pending.buffer is not None:
                    self._validate(pending.transfer, pending.buffer)
            except OSError as error:
                errors.append(error)
        if len(errors) > 1:
            first = errors[0]
            others = "; ".join(str(error) for error in errors[1:])
            what = f"{first.strerror} (and {len(errors) - 1} more of {len(waiting)} requests failed: {others})"
            raise OSError(first.errno, what, first.filename) from first
        if errors:
            raise errors[0]
        return len(waiting)

    def _run(self, transfer: Transfer, buffer: torch.Tensor, validate: bool, non_blocking: bool) -> int:
        if non_blocking:
            self._pending.append(_Pending(transfer, buffer if validate else None))
            return 0
        transfer.wait()
        if validate:
            self._validate(transfer, buffer)
        return 1

    def _validate(self, transfer: Transfer, buffer: torch.Tensor) -> None:
        """Reads what was moved once more, and raises ``OSError`` (EIO) where it is not what the buffer holds."""
        expected = buffer.detach().reshape(-1).view(torch.uint8)
        found = aligned_empty(min(_VALIDATE_NBYTES, len(expected)))
        for begin in range(0, len(expected), _VALIDATE_NBYTES):
            part = expected[begin : begin + _VALIDATE_NBYTES].cpu()
            self._io.read(found[: len(part)], transfer.path, transfer.offset + begin).wait()
            if not torch.equal(part, found[: len(part)]):
                wrong = begin + int((part != found[: len(part)]).nonzero()[0])
                what = (
                    f"the file differs from the buffer at byte {wrong} of {len(expected)}, read from {transfer.offset}"
                )
                raise OSError(errno.EIO, what, transfer.path)

    # -- memory --------------------------------------------------------------------------------------------------------
    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: torch.Tensor) -> torch.Tensor:
        """A flat host tensor that begins at a page and stays in memory; ``num_elem`` elements of the example's dtype.

        Next to a GPU it is page-locked for the GPU's copies. If the system locks no more memory, it is an ordinary
        tensor, with one warning. It lives as long as it is used; :meth:`free_cpu_locked_tensor` unlocks it before.
        """
        if num_elem < 0:
            raise ValueError(f"new_cpu_locked_tensor: num_elem must be >= 0, but is {num_elem}")
        dtype = example_tensor.dtype
        if get_accelerator().device_name() == "cuda":
            made = torch.empty(num_elem, dtype=dtype, pin_memory=True)
        else:
            made = aligned_empty(num_elem, dtype)
            try:
                lock_pages(made)
            except OSError as error:
                warning_once(f"new_cpu_locked_tensor: {error.strerror}; the tensor is not locked", all_ranks=True)
        if num_elem:
            self._locked[made.data_ptr()] = made
        return made

    def free_cpu_locked_tensor(self, locked_tensor: torch.Tensor) -> bool:
        """Unlocks a tensor of :meth:`new_cpu_locked_tensor`; its memory goes when the last reference does.

        Returns:
            False if it is not one of this handle's, or was freed before.
        """
        if self._locked.pop(locked_tensor.data_ptr(), None) is None:
            return False
        if not locked_tensor.is_pinned():
            unlock_pages(locked_tensor)
        return True

    # -- settings ------------------------------------------------------------------------------------------------------
    def get_block_size(self) -> int:
        """As given."""
        return self._numbers["block_size"]

    def get_queue_depth(self) -> int:
        """As given."""
        return self._numbers["queue_depth"]

    def get_intra_op_parallelism(self) -> int:
        """As given."""
        return self._numbers["intra_op_parallelism"]

    def get_single_submit(self) -> bool:
        """As given."""
        return self._single_submit

    def get_overlap_events(self) -> bool:
        """As given."""
        return self._overlap_events
