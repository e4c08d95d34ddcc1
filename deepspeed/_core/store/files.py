"""Optimizer state in a file: tiles that are in memory only while they are computed.

[Note: a step] Tiles pass through a few buffers: while one is computed, the next is read and the one before written, by two
sets of threads, so that neither waits for the other. Nothing is allocated meanwhile. A tile whose state was never made
has its master read only; the optimizer makes the state, and from then on it is in the file.

[Note: trust] The file has no name, and its space is reserved when it is laid out, so that a full disk shows then. Its size
is compared before each step: bytes that are no longer there must not be taken for zeros. A step that fails in the middle
leaves some tiles updated and others not; who runs it must not go on (``FlatOptimizer.step`` does not).
"""

from __future__ import annotations

import contextlib
import errno
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from deepspeed._core.aio import DataFile, FileIO, Transfer, aligned_empty
from deepspeed._core.aio.memory import PAGE_NBYTES
from deepspeed._core.reduce.bucket import Bucket
from deepspeed._core.store.policy import OffloadPolicy
from deepspeed._core.store.tiles import MASTER, Region, Tile, absent, cut, is_elementwise, make_region

__all__ = ["FileStore", "IoCount"]

States = MutableMapping[Any, dict[str, Any]]


class IoCount:
    """Bytes of tiles that went through a store."""

    def __init__(self) -> None:
        self.read_nbytes = 0
        self.written_nbytes = 0


class _Slot:
    """A buffer of one tile; 1-D uint8, from a page on."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = aligned_empty(nbytes)


class FileStore:
    """One file of this rank with the masters and states of tiles.

    Args:
        file: empty, open for writing; closed by :meth:`close`.
        policy: see there.
        states: the optimizer's ``state``; its entries for tiles are kept here.
        key: the config key that named the folder, for messages.
    """

    def __init__(self, file: DataFile, policy: OffloadPolicy, states: Callable[[], States], key: str) -> None:
        self._file, self._policy, self._states, self._key = file, policy, states, key
        self._reader = FileIO(*policy.io)
        self._writer = FileIO(*policy.io)
        self.count = IoCount()
        self.nbytes = 0
        self._largest = 0
        self._free: list[_Slot] | None = None
        self._laying: list[Transfer] = []

    @property
    def path(self) -> str:
        """Where the file was made."""
        return self._file.path

    @property
    def slot_count(self) -> int:
        """Buffers between file and kernel."""
        return self._policy.slots

    @property
    def buffer_nbytes(self) -> int:
        """Host memory of the buffers together."""
        return self._largest * self._policy.slots

    # -- laying out --------------------------------------------------------------------------------------------------

    def adopt(self, bucket: Bucket, dtypes: Mapping[str, torch.dtype]) -> list[Tile]:
        """Takes a bucket's master over, unless it is the weights themselves, and reserves space for the state ``dtypes``.

        Raises:
            OSError: no space, with the bytes and the path.
        """
        self._settle()
        owns_master = not bucket.full_precision
        fields = {MASTER: bucket.master.dtype, **dtypes} if owns_master else dict(dtypes)
        begin = self.nbytes
        tiles = []
        for at, numel in cut(bucket.shard_numel, self._policy.tile_numel):
            region = make_region(self.nbytes, numel, fields)
            self.nbytes += region.nbytes
            self._largest = max(self._largest, region.nbytes)
            values = bucket.master[at : at + numel]
            tiles.append(Tile(bucket, at, numel, absent(numel, values.dtype) if owns_master else values, region))
        reserved = self._reserve(begin)
        for tile in tiles:
            region = _region(tile)
            if owns_master:
                # By way of memory that suits the disk: otherwise each thread would keep a buffer for that.
                page = aligned_empty(tile.numel, bucket.master.dtype)
                page.copy_(bucket.master[tile.begin : tile.end])
                self._laying.append(self._write(page, region.offset + region.find(MASTER).begin))
            if not reserved and not self._policy.fast_init:
                self._fill(tile)
        if owns_master:
            bucket.master = absent(bucket.shard_numel, bucket.master.dtype)
        return tiles

    def _reserve(self, begin: int) -> bool:
        if self.nbytes == begin:
            return True
        try:
            if self._file.reserve(self.nbytes - begin, begin):
                return True
            self._file.truncate(self.nbytes)
        except OSError as error:
            raise type(error)(
                error.errno,
                f"{self._key}: {error.strerror}; the optimizer state of this rank so far takes {self.nbytes} bytes there. "
                "Free some space, choose another folder, or train on more ranks",
                self.path,
            ) from error
        return False

    def _fill(self, tile: Tile) -> None:
        """Writes zeros where the filesystem cannot reserve, so that a full disk shows now."""
        region = _region(tile)
        for known in region.fields:
            if known.name != MASTER:
                zeros = aligned_empty(tile.numel * known.dtype.itemsize)
                self._laying.append(self._write(zeros, region.offset + known.begin))

    def _settle(self) -> None:
        """Waits for what was begun while laying out."""
        for transfer in self._laying:
            transfer.wait()
        self._laying.clear()

    # -- bytes -------------------------------------------------------------------------------------------------------

    def _read(self, out: torch.Tensor, offset: int) -> Transfer:
        self.count.read_nbytes += out.numel() * out.element_size()
        return self._reader.read(out, self._file, offset)

    def _write(self, values: torch.Tensor, offset: int) -> Transfer:
        self.count.written_nbytes += values.numel() * values.element_size()
        return self._writer.write(values, self._file, offset)

    def check(self) -> None:
        """Whether the file is as long as it was made.

        Raises:
            OSError: it is not; with both sizes and the path.
        """
        self._settle()
        found = self._file.nbytes
        if found < self.nbytes:
            raise OSError(
                errno.EIO,
                f"the file was cut from {self.nbytes} to {found} bytes behind our back: optimizer state is lost",
                self.path,
            )

    def read(self, tile: Tile, name: str, begin: int, end: int) -> torch.Tensor:
        """Elements ``[begin, end)`` of a field of the tile, as a new tensor."""
        self.check()
        region = _region(tile)
        field = region.find(name)
        offset = region.offset + field.begin + begin * field.dtype.itemsize
        before = offset % PAGE_NBYTES  # read, too: memory and file are aligned to each other then
        out = aligned_empty(before + (end - begin) * field.dtype.itemsize)
        self._read(out, offset - before).wait()
        return out[before:].view(field.dtype)

    def write(self, tile: Tile, name: str, begin: int, values: torch.Tensor) -> None:
        """Replaces elements from ``begin`` on."""
        self.check()
        region = _region(tile)
        field = region.find(name)
        plain = values.detach().reshape(-1).to(field.dtype).contiguous()
        self._write(plain, region.offset + field.begin + begin * field.dtype.itemsize).wait()

    # -- tiles in memory ---------------------------------------------------------------------------------------------

    def _slots(self) -> list[_Slot]:
        if self._free is None:
            self._settle()
            self._free = [_Slot(self._largest) for _ in range(self._policy.slots)]
        return self._free

    def _known(self, tile: Tile) -> dict[str, torch.Tensor]:
        """The state tensors of a tile that are in the file."""
        return {key: value for key, value in self._states().get(tile.param, {}).items() if is_elementwise(value)}

    def _read_nbytes(self, tile: Tile) -> int:
        """How much of a region, from its beginning, has values."""
        region = _region(tile)
        last = 0
        for field in region.fields:
            if field.name == MASTER or field.name in self._known(tile):
                last = field.begin + tile.numel * field.dtype.itemsize
        return last

    def bind(self, tile: Tile, slot: torch.Tensor) -> None:
        """Makes the tile's tensors those of a buffer that holds its region."""
        region = _region(tile)
        known = self._known(tile)
        for field in region.fields:
            if field.name == MASTER:
                tile.param.data = field.view(slot, tile.numel)
            elif field.name in known:
                known[field.name].data = field.view(slot, tile.numel)

    def unbind(self, tile: Tile, slot: torch.Tensor, *, keep: bool) -> None:
        """Takes the tensors away again; with ``keep``, after copying into the buffer what lies elsewhere.

        Raises:
            RuntimeError: the optimizer keeps state for which there is no room.
        """
        region = _region(tile)
        names = {field.name: field for field in region.fields}
        try:
            for name, value in {MASTER: tile.param, **self._known(tile)}.items() if keep else ():
                if name == MASTER and MASTER not in names:
                    continue
                field = names.get(name)
                if field is None or field.dtype != value.dtype or value.numel() != tile.numel:
                    raise RuntimeError(
                        f"the optimizer keeps {name!r} of {value.numel()} elements and {value.dtype} for a tile of "
                        f"{tile.numel}, for which {self._key} has no room; offload this optimizer to the cpu instead"
                    )
                view = field.view(slot, tile.numel)
                if view.data_ptr() != value.data_ptr():
                    view.copy_(value.detach().reshape(-1))
        finally:
            if MASTER in names:
                tile.param.data = absent(tile.numel, tile.param.dtype)
            for value in self._known(tile).values():
                value.data = absent(tile.numel, value.dtype)

    @contextlib.contextmanager
    def walk(self, tiles: Sequence[Tile]) -> Iterator[_Walk]:
        """Passes through tiles in this order. On leaving, all is written, or an ``OSError`` raised."""
        self.check()
        walk = _Walk(self, tiles, self._policy)
        try:
            yield walk
        except BaseException:
            with contextlib.suppress(OSError):
                walk.finish()
            raise
        walk.finish()

    def close(self) -> None:
        """Waits for transfers and closes the file, and with it everything in it. Can be called again."""
        self._free = None
        for io in (self._reader, self._writer):
            with contextlib.suppress(OSError):
                io.close()
        self._file.close()


class _Walk:
    """One pass through tiles; see [Note: a step]."""

    def __init__(self, store: FileStore, tiles: Sequence[Tile], policy: OffloadPolicy) -> None:
        self._store, self._policy = store, policy
        self._coming = deque(tiles)
        self._free = list(store._slots())
        self._reading: dict[Tile, tuple[_Slot, Transfer]] = {}
        self._writing: deque[tuple[_Slot, Transfer]] = deque()

    @contextlib.contextmanager
    def open(self, tile: Tile) -> Iterator[None]:
        """Inside, the tile's tensors have their values, which are written afterwards; it must be the next one."""
        store = self._store
        if self._coming.popleft() is not tile:
            raise AssertionError("tiles were not opened in the order that was announced; please report this")
        slot, transfer = self._reading.pop(tile) if tile in self._reading else self._begin(tile)
        try:
            transfer.wait()
            if self._policy.read_ahead and self._coming and (self._free or self._writing):
                self._reading[self._coming[0]] = self._begin(self._coming[0])
            store.bind(tile, slot.bytes)
            kept = False
            try:
                yield
                kept = True
            finally:
                store.unbind(tile, slot.bytes, keep=kept)
        except BaseException:
            self._free.append(slot)
            raise
        region = _region(tile)
        self._writing.append((slot, store._write(slot.bytes[: region.nbytes], region.offset)))
        if not self._policy.write_behind:
            self._wait_oldest()

    def _begin(self, tile: Tile) -> tuple[_Slot, Transfer]:
        if not self._free:
            self._wait_oldest()
        slot = self._free.pop()
        try:
            return slot, self._store._read(slot.bytes[: self._store._read_nbytes(tile)], _region(tile).offset)
        except BaseException:
            self._free.append(slot)
            raise

    def _wait_oldest(self) -> None:
        slot, transfer = self._writing.popleft()
        self._free.append(slot)
        transfer.wait()

    def finish(self) -> None:
        """Waits for all; raises the first error."""
        error: OSError | None = None
        for _, transfer in [*self._reading.values(), *self._writing]:
            try:
                transfer.wait()
            except OSError as caught:
                error = error or caught
        self._reading.clear()
        self._writing.clear()
        if error is not None:
            raise error


def _region(tile: Tile) -> Region:
    if tile.region is None:
        raise AssertionError("a tile without a place in the file came to the file store; please report this")
    return tile.region
