"""Where shards of partitioned parameters rest between uses when they are not in memory of their own: files, or the host.

Glossary. *Region*: one shard's place. *Staged*: read ahead into a buffer of the pool, on its way to the device. A shard is
read from its region for each gather and never changed in place: whoever writes, writes the region.

A file has no name (:mod:`deepspeed._core.store.runfile`), and its space is reserved region by region, so that a full disk
shows before training begins.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import mmap
import weakref
from pathlib import Path
from typing import Any, Protocol

import torch

from deepspeed._core.aio import FileIO, IoSettings, Transfer, aligned_empty
from deepspeed._core.aio.memory import PAGE_NBYTES, lock_pages
from deepspeed._core.store.runfile import open_run_file
from deepspeed.errors import ConfigError
from deepspeed.utils.logging import warning_once

__all__ = ["BufferPool", "FileShards", "HostShards", "Region", "ShardStore", "Waits"]


class BufferPool:
    """Page-aligned host memory that is used again and again, up to a number of bytes."""

    def __init__(self, limit_nbytes: int, *, pin: bool = False) -> None:
        self.limit_nbytes = limit_nbytes
        self.nbytes = 0
        """Of all buffers, in use or not."""
        self._pin = pin
        self._free: list[torch.Tensor] = []

    def take(self, nbytes: int) -> torch.Tensor | None:
        """A buffer of at least so many bytes; None if the limit does not allow one now."""
        wanted = -(-nbytes // PAGE_NBYTES) * PAGE_NBYTES
        fitting = [b for b in self._free if wanted <= b.numel() <= 2 * wanted]
        if fitting:
            best = min(fitting, key=torch.Tensor.numel)
            self._free = [b for b in self._free if b is not best]
            return best
        while self._free and self.nbytes + wanted > self.limit_nbytes:
            self.nbytes -= self._free.pop(0).numel()
        if self.nbytes + wanted > self.limit_nbytes:
            return None
        self.nbytes += wanted
        return self._make(wanted)

    def give(self, buffer: torch.Tensor) -> None:
        """Takes a buffer back; nobody may use it any more."""
        self._free.append(buffer)

    def clear(self) -> None:
        """Frees what is not in use."""
        self.nbytes -= sum(buffer.numel() for buffer in self._free)
        self._free = []

    def _make(self, nbytes: int) -> torch.Tensor:
        if self._pin and torch.cuda.is_available():
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        buffer = aligned_empty(nbytes)
        if self._pin:
            try:
                lock_pages(buffer)
            except OSError as error:
                warning_once(f"offload_param.pin_memory: {error}; going on with memory that is not locked")
        return buffer


class AwayShard(torch.Tensor):
    """Stands for a shard that is not in memory: true shape, dtype and device; any operation on it raises."""

    label: str

    @staticmethod
    def __new__(cls, like: torch.Tensor, label: str) -> AwayShard:
        made: AwayShard = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, (like.numel(),), dtype=like.dtype, device=like.device, requires_grad=False
        )
        made.label = label
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        label = next((a.label for a in args if isinstance(a, cls)), "a parameter")
        raise RuntimeError(
            f"the shard of parameter {label} rests on NVMe (zero_optimization.offload_param), and ds_tensor has no data "
            "now: read and write inside `with deepspeed.zero.GatheredParameters(param, modifier_rank=0):`, or with "
            "deepspeed.utils.safe_get_local_fp32_param and its kin"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AwayShard({self.label}, numel={self.numel()}, dtype={self.dtype}, on NVMe)"


class Waits(Protocol):
    """Something under way."""

    def wait(self) -> None:
        """Returns when it is done; raises ``OSError``."""


class Region(abc.ABC):
    """A shard's place in a store: ``numel`` elements of ``dtype``."""

    def __init__(self, store: ShardStore, numel: int, dtype: torch.dtype) -> None:
        self.store, self.numel, self.dtype = store, numel, dtype

    @abc.abstractmethod
    def begin_read(self, out: torch.Tensor) -> Waits | None:
        """Fills ``out`` (contiguous, ``numel`` elements, any device); wait for what is returned."""

    @abc.abstractmethod
    def begin_write(self, values: torch.Tensor, begin: int = 0) -> Transfer | None:
        """Writes elements from ``begin``; ``values`` must stay as it is until what is returned was waited for."""

    @abc.abstractmethod
    def shown(self, like: torch.Tensor, label: str) -> torch.Tensor:
        """What ``ds_tensor`` is."""

    def shows(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is this region's own memory."""
        return False

    def read(self, device: torch.device) -> torch.Tensor:
        """A copy of the shard. Raises ``OSError`` with the file, the bytes and where it stopped."""
        out = torch.empty(self.numel, dtype=self.dtype, device=device)
        _wait(self.begin_read(out))
        return out

    def write(self, values: torch.Tensor, begin: int = 0) -> None:
        """Writes and waits."""
        _wait(self.begin_write(values, begin))

    def mapped(self) -> torch.Tensor:
        """The shard on the host, for reading; from a file, pages come as they are read and are no memory of ours."""
        return self.read(torch.device("cpu"))


def _wait(transfer: Waits | None) -> None:
    if transfer is not None:
        transfer.wait()


class ShardStore(abc.ABC):
    """Makes regions. Not collective: every rank has its own."""

    path: str = ""
    """Of the file, for messages."""
    pinned = False
    """Whether its memory is to be page-locked."""

    def __init__(self) -> None:
        self.reads = self.read_nbytes = self.writes = self.written_nbytes = 0
        self.stored_nbytes = 0

    @abc.abstractmethod
    def put(self, shard: torch.Tensor, earlier: Region | None = None) -> Region:
        """A region with these values; ``earlier`` is one of this handle's that may be used again."""

    def admit(self, numel: int, label: str) -> Any:
        """A token if a shard of so many elements stays in memory, for as long as the token lives; None if it goes away.

        Raises ``ConfigError`` if it can do neither.
        """
        return None

    def stage(self, region: Region, ticket: int) -> bool:
        """Begins to read ahead for use ``ticket``; False if that has to come later."""
        return True

    @abc.abstractmethod
    def drop_staged(self, before: int | None = None) -> None:
        """Forgets what was read ahead (for uses before that one): it is not used, or stale."""

    def staging_nbytes(self, itemsize: int) -> int:
        """Most host memory for reading ahead elements of that size."""
        return 0


class _HostRegion(Region):
    def __init__(self, store: ShardStore, tensor: torch.Tensor) -> None:
        super().__init__(store, tensor.numel(), tensor.dtype)
        self.tensor = tensor

    def begin_read(self, out: torch.Tensor) -> Waits | None:
        self.store.reads += 1
        self.store.read_nbytes += out.nbytes
        out.copy_(self.tensor, non_blocking=self.tensor.is_pinned())
        return None

    def begin_write(self, values: torch.Tensor, begin: int = 0) -> Transfer | None:
        self.store.writes += 1
        self.store.written_nbytes += values.nbytes
        self.tensor[begin : begin + values.numel()].copy_(values)
        return None

    def shown(self, like: torch.Tensor, label: str) -> torch.Tensor:
        return self.tensor.detach()

    def shows(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.data_ptr() == self.tensor.data_ptr()

    def mapped(self) -> torch.Tensor:
        return self.tensor.detach()


class HostShards(ShardStore):
    """Shards in host memory of a machine whose devices have their own; page-locked with ``pin``."""

    def __init__(self, *, pin: bool = False) -> None:
        super().__init__()
        self.pinned = pin

    def put(self, shard: torch.Tensor, earlier: Region | None = None) -> Region:
        if isinstance(earlier, _HostRegion) and earlier.store is self and earlier.tensor.dtype == shard.dtype:
            earlier.write(shard)
            return earlier
        pin = self.pinned and torch.cuda.is_available()
        host = torch.empty(shard.numel(), dtype=shard.dtype, device="cpu", pin_memory=pin)
        self.stored_nbytes += host.nbytes
        return _HostRegion(self, host.copy_(shard))

    def drop_staged(self, before: int | None = None) -> None:
        """Nothing is read ahead: a copy from the host is queued on the device."""


class _Kept:
    """Counts a shard in memory against ``max_in_cpu`` while it lives."""

    def __init__(self, store: FileShards, numel: int) -> None:
        store.kept_numel += numel
        self._store = weakref.ref(store)
        weakref.finalize(self, _give_back, weakref.ref(store), numel)

    @property
    def store(self) -> ShardStore | None:
        """Who counts."""
        return self._store()


def _give_back(store: weakref.ref[FileShards], numel: int) -> None:
    found = store()
    if found is not None:
        found.kept_numel -= numel


class FileShards(ShardStore):
    """Shards in a file.

    Args:
        folder: where the file is made.
        buffer_count, buffer_numel: the pool for reading ahead has the bytes of so many buffers; a shard must fit one.
        keep_numel: elements of shards that stay in memory: the first that come, since every pass uses all of them once
            and a fixed part is read less often than with any rule that lets go of what was used longest ago.
        settings: for reading and for writing, each with threads of its own.
        rank: for the file's name in messages.

    Raises:
        OSError: no file can be made in ``folder``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        buffer_count: int,
        buffer_numel: int,
        keep_numel: int,
        settings: IoSettings | None = None,
        pin: bool = False,
        rank: int = 0,
    ) -> None:
        super().__init__()
        self.buffer_count, self.buffer_numel, self.keep_numel = buffer_count, buffer_numel, keep_numel
        self.kept_numel = 0
        self.file = open_run_file(folder, f"parameters-rank{rank}", "zero_optimization.offload_param.nvme_path")
        self.path = self.file.path
        self._settings = settings or IoSettings()
        self._io: tuple[FileIO, FileIO] | None = None
        self._end = 0
        self._free: list[tuple[int, int]] = []
        self.pinned = pin
        self.pool = BufferPool(0, pin=pin)
        self._staged: dict[_FileRegion, int] = {}
        self.staged_hits = 0
        """Gathers whose shard had been read ahead."""

    def admit(self, numel: int, label: str) -> Any:
        if self.kept_numel + numel <= self.keep_numel:
            return _Kept(self, numel)
        if numel > self.buffer_numel:
            raise ConfigError(
                f"zero_optimization.offload_param.buffer_size = {self.buffer_numel} elements is too small for parameter "
                f"{label}, of which this rank's part has {numel}: set it to at least {numel}, or let the parameter stay in "
                "memory (max_in_cpu)"
            )
        return None

    def put(self, shard: torch.Tensor, earlier: Region | None = None) -> Region:
        if isinstance(earlier, _FileRegion) and earlier.store is self and earlier.fits(shard):
            region = earlier
            region.become(shard)
        else:
            region = self._allocate(shard)
        limit = self.buffer_count * self.buffer_numel * shard.element_size()
        self.pool.limit_nbytes = max(self.pool.limit_nbytes, limit)
        if shard.device.type == "cpu" and shard.data_ptr() % PAGE_NBYTES:
            shard = aligned_empty(shard.numel(), shard.dtype).copy_(shard)  # else each thread would need a buffer
        region.write(shard.contiguous())
        return region

    def _allocate(self, shard: torch.Tensor) -> _FileRegion:
        room = -(-shard.nbytes // PAGE_NBYTES) * PAGE_NBYTES
        for place, (offset, nbytes) in enumerate(self._free):
            if nbytes == room:
                del self._free[place]
                return _FileRegion(self, shard, offset, room)
        offset, self._end = self._end, self._end + room
        if not self.file.reserve(room, offset) and self.file.nbytes < self._end:
            self.file.truncate(self._end)
        self.stored_nbytes += room
        return _FileRegion(self, shard, offset, room)

    def free(self, offset: int, nbytes: int) -> None:
        """A region is no longer used."""
        self._free.append((offset, nbytes))

    @property
    def reader(self) -> FileIO:
        return self._threads()[0]

    @property
    def writer(self) -> FileIO:
        return self._threads()[1]

    def _threads(self) -> tuple[FileIO, FileIO]:
        if self._io is None:
            self._io = FileIO(*self._settings), FileIO(*self._settings)
        return self._io

    def stage(self, region: Region, ticket: int) -> bool:
        if not isinstance(region, _FileRegion):
            return True
        known = self._staged.get(region)
        if known is not None:
            return known == ticket
        if not region.stage():
            return False
        self._staged[region] = ticket
        return True

    @property
    def staged_left(self) -> int:
        """Shards that are read ahead now."""
        return len(self._staged)

    def unstaged(self, region: _FileRegion) -> None:
        """The region's buffer was used, or given up."""
        self._staged.pop(region, None)

    def drop_staged(self, before: int | None = None) -> None:
        for region, ticket in list(self._staged.items()):
            if before is None or ticket < before:
                region.unstage()

    def staging_nbytes(self, itemsize: int) -> int:
        return min(self.buffer_count * self.buffer_numel * itemsize, self.stored_nbytes)

    def close(self) -> None:
        """Ends the threads and frees the disk's space. Can be called again."""
        io, self._io = self._io, None
        for end in io or ():
            with contextlib.suppress(OSError):
                end.close()
        self.file.close()

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.close()


class _Landing:
    """A read into a buffer of the pool, which then goes where it is wanted."""

    def __init__(self, pool: BufferPool, buffer: torch.Tensor, transfer: Transfer, out: torch.Tensor) -> None:
        self._pool, self._buffer, self._transfer, self._out = pool, buffer, transfer, out

    def wait(self) -> None:
        """As of a transfer; once."""
        try:
            self._transfer.wait()
            self._out.copy_(self._buffer[: self._out.nbytes].view(self._out.dtype))
        finally:
            self._pool.give(self._buffer)


class _FileRegion(Region):
    store: FileShards

    def __init__(self, store: FileShards, shard: torch.Tensor, offset: int, room: int) -> None:
        super().__init__(store, shard.numel(), shard.dtype)
        self.offset, self.room = offset, room
        self._staging: tuple[torch.Tensor, Transfer] | None = None
        self._writing: Transfer | None = None

    def fits(self, shard: torch.Tensor) -> bool:
        return shard.nbytes <= self.room

    def become(self, shard: torch.Tensor) -> None:
        """Holds values of another size or dtype from now on, which are to be written."""
        self.unstage()
        self._settle()
        self.numel, self.dtype = shard.numel(), shard.dtype

    def _settle(self) -> None:
        """Waits for what is being written: reads and writes of the same bytes may not overtake each other."""
        writing, self._writing = self._writing, None
        _wait(writing)

    def stage(self) -> bool:
        buffer = self.store.pool.take(self.numel * self.dtype.itemsize)
        if buffer is None:
            return False
        self._settle()
        self._staging = buffer, self._begin(buffer[: self.numel * self.dtype.itemsize].view(self.dtype))
        return True

    def unstage(self) -> None:
        """Gives up what was read ahead."""
        staging, self._staging = self._staging, None
        self.store.unstaged(self)
        if staging is not None:
            with contextlib.suppress(OSError):  # nobody wants the bytes
                staging[1].wait()
            self.store.pool.give(staging[0])

    def _begin(self, out: torch.Tensor) -> Transfer:
        self.store.reads += 1
        self.store.read_nbytes += out.nbytes
        return self.store.reader.read(out, self.store.file, self.offset)

    def begin_read(self, out: torch.Tensor) -> Waits | None:
        self.store.staged_hits += self._staging is not None
        if self._staging is None and not self.stage():
            self._settle()
            return self._begin(out)  # memory that does not begin at a page: it passes through buffers of the threads
        (buffer, transfer), self._staging = self._staging, None  # type: ignore[misc]
        self.store.unstaged(self)
        return _Landing(self.store.pool, buffer, transfer, out)

    def begin_write(self, values: torch.Tensor, begin: int = 0) -> Transfer | None:
        self.unstage()
        self._settle()
        values = values.detach().to(self.dtype).contiguous()
        self.store.writes += 1
        self.store.written_nbytes += values.nbytes
        at = self.offset + begin * self.dtype.itemsize
        self._writing = self.store.writer.write(values, self.store.file, at)
        return self._writing

    def shown(self, like: torch.Tensor, label: str) -> torch.Tensor:
        return AwayShard(like, label)

    def mapped(self) -> torch.Tensor:
        self._settle()
        nbytes, there = self.numel * self.dtype.itemsize, self.store.file.nbytes
        if there < self.offset + nbytes:  # touching it would end the process
            said = f"{nbytes} bytes at offset {self.offset} are not there: the file ends after {there} bytes"
            raise OSError(errno.ENODATA, said, self.store.path)
        held = mmap.mmap(self.store.file.descriptor(False), nbytes, flags=mmap.MAP_PRIVATE, offset=self.offset)
        return torch.frombuffer(held, dtype=self.dtype, count=self.numel)

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self._settle()
        self.unstage()
        self.store.free(self.offset, self.room)
