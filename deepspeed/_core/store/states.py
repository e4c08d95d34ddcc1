"""Masters and element-wise optimizer state of all shards, wherever they rest: the one way to read, write and update them.

The optimizer's ``state`` is keyed by tiles (:mod:`deepspeed._core.store.tiles`), whose tensors have their true shapes at all
times and their values only while they are open. What is the same for a whole tensor (step counts) is in memory always.
Nothing here is collective.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from deepspeed._core.ckpt.source import Live, Part
from deepspeed._core.reduce.bucket import Bucket
from deepspeed._core.store.files import FileStore, IoCount
from deepspeed._core.store.live import Stored
from deepspeed._core.store.memory import DeviceStore
from deepspeed._core.store.tiles import MASTER, Tile, is_elementwise

__all__ = ["ShardStates", "ShardStore", "Update"]

_TILE_NBYTES = 16 << 20


class ShardStore(Protocol):
    """A place for shards that are in memory all the time: :class:`DeviceStore`, :class:`HostStore`."""

    def adopt(self, bucket: Bucket) -> list[Tile]: ...


class Update(Protocol):
    """An update of tiles that is under way."""

    def open(self, tile: Tile) -> contextlib.AbstractContextManager[None]:
        """Inside, the tile's tensors have their values, and may be changed."""


class _InMemory:
    def open(self, tile: Tile) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class _Mixed:
    """Tiles of files and of memory in one pass."""

    def __init__(self, walk: Update) -> None:
        self._walk = walk

    def open(self, tile: Tile) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if tile.region is None else self._walk.open(tile)


class ShardStates:
    """See the module.

    Args:
        states: the optimizer's ``state``.
        elsewhere: the store for buckets for which ``offloaded`` holds; None if all stay on the device.
        offloaded: asked once a bucket.
        dtypes: element-wise state that the optimizer will keep for a bucket; for files.
    """

    def __init__(
        self,
        states: Callable[[], dict[Any, dict[str, Any]]],
        elsewhere: ShardStore | FileStore | None = None,
        offloaded: Callable[[Bucket], bool] = lambda bucket: False,
        dtypes: Callable[[Bucket], Mapping[str, torch.dtype]] = lambda bucket: {},
    ) -> None:
        self._states, self._dtypes, self._offloaded = states, dtypes, offloaded
        self._device: ShardStore = DeviceStore()
        self._host: ShardStore | None = elsewhere if not isinstance(elsewhere, FileStore) else None
        self.files: FileStore | None = elsewhere if isinstance(elsewhere, FileStore) else None
        self._tiles: dict[int, list[Tile]] = {}
        self._away: set[int] = set()
        self.failure: OSError | None = None
        """What went wrong while laying out, on this rank: others are still at it, and are to hear of it after that."""

    def adopt(self, bucket: Bucket) -> None:
        """Takes over the bucket's master, which exists now. Errors of files go to :attr:`failure`."""
        away = self._offloaded(bucket)
        if away:
            self._away.add(bucket.index)
        if not away or self.failure is not None:
            tiles = self._device.adopt(bucket)
        elif self.files is not None:
            try:
                tiles = self.files.adopt(bucket, self._dtypes(bucket))
            except OSError as error:
                self.failure = error
                tiles = self._device.adopt(bucket)
        else:
            tiles = (self._host or self._device).adopt(bucket)
        self._tiles[bucket.index] = tiles

    def finish(self) -> None:
        """Every bucket was adopted: waits for what is being written. Errors go to :attr:`failure`."""
        if self.files is None or self.failure is not None:
            return
        try:
            self.files.check()
        except OSError as error:
            self.failure = error

    def tiles(self, bucket: Bucket) -> list[Tile]:
        """In order; together they are the shard."""
        return self._tiles[bucket.index]

    def state_of(self, tile: Tile) -> dict[str, Any]:
        """What the optimizer keeps for a tile; tensors without values, if the tile is in a file."""
        return self._states().get(tile.param, {})

    def names(self, bucket: Bucket) -> list[str]:
        """Names of the element-wise states of a bucket; none before the first step."""
        found = {k for tile in self.tiles(bucket) for k, v in self.state_of(tile).items() if is_elementwise(v)}
        return sorted(found)

    def is_offloaded(self, bucket: Bucket) -> bool:
        """Whether its states rest elsewhere than on the device, which may be the same memory."""
        return bucket.index in self._away

    def in_memory(self, bucket: Bucket) -> bool:
        """Whether its states are tensors with values at all times."""
        return all(tile.region is None for tile in self.tiles(bucket))

    @property
    def count(self) -> IoCount:
        """What went through files so far."""
        return self.files.count if self.files is not None else IoCount()

    def scalars(self, bucket: Bucket) -> dict[str, Any]:
        """What the optimizer keeps for the shard as a whole."""
        state = self.state_of(self.tiles(bucket)[0])
        return {key: value for key, value in state.items() if not is_elementwise(value)}

    def parts(self, bucket: Bucket, key: str | None) -> list[Part]:
        """The shard of a state (None: the master), for a checkpoint. Zeros where there is no such state yet."""
        found: list[Part] = []
        for tile in self.tiles(bucket):
            if key is not None and key not in self.state_of(tile):
                found.append(Live(torch.zeros_like(tile.param)))
            elif self._has_values(tile, key) or self.files is None:
                found.append(Live(self._tensor(tile, key)))
            else:
                found.append(Stored(self.files, tile, MASTER if key is None else key))
        return found

    # -- reading and writing -----------------------------------------------------------------------------------------

    def read(self, bucket: Bucket, key: str | None, begin: int, end: int) -> torch.Tensor:
        """Elements ``[begin, end)`` of this rank's shard of a state (None: of the master), 1-D.

        A view where that is possible, else a copy.
        """
        parts = []
        for tile, low, high in self._parts(bucket, begin, end):
            parts.append(self._read(tile, key, low, high))
        if len(parts) == 1:
            return parts[0]
        like = self.tiles(bucket)[0].param
        return torch.cat(parts) if parts else torch.empty(0, dtype=like.dtype, device=like.device)

    def write(self, bucket: Bucket, key: str | None, begin: int, values: torch.Tensor) -> None:
        """Replaces elements of this rank's shard from ``begin`` on by the given ones, 1-D and of any dtype."""
        for tile, low, high in self._parts(bucket, begin, begin + values.numel()):
            part = values[tile.begin + low - begin : tile.begin + high - begin]
            if self._has_values(tile, key):
                self._tensor(tile, key)[low:high].copy_(part)
            elif self.files is not None:
                self.files.write(tile, MASTER if key is None else key, low, part)

    def copy_master(self, bucket: Bucket, out: torch.Tensor) -> None:
        """Copies the whole master into ``out``, a few MiB at a time."""
        step = _TILE_NBYTES // bucket.master.element_size()
        for begin in range(0, bucket.shard_numel, step):
            end = min(begin + step, bucket.shard_numel)
            out[begin:end].copy_(self.read(bucket, None, begin, end))

    def _parts(self, bucket: Bucket, begin: int, end: int) -> Iterator[tuple[Tile, int, int]]:
        for tile in self.tiles(bucket):
            low, high = max(begin, tile.begin), min(end, tile.end)
            if low < high:
                yield tile, low - tile.begin, high - tile.begin

    def _has_values(self, tile: Tile, key: str | None) -> bool:
        if tile.region is None:
            return True
        return key is None and all(field.name != MASTER for field in tile.region.fields)

    def _tensor(self, tile: Tile, key: str | None) -> torch.Tensor:
        tensor: torch.Tensor = tile.param if key is None else self.state_of(tile)[key]
        return tensor.detach().view(-1)

    def _read(self, tile: Tile, key: str | None, low: int, high: int) -> torch.Tensor:
        if self._has_values(tile, key):
            return self._tensor(tile, key)[low:high]
        if self.files is None:
            raise AssertionError("a tile is in a file, but there is no file; please report this")
        return self.files.read(tile, MASTER if key is None else key, low, high)

    # -- changing ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def updating(self, buckets: Sequence[Bucket]) -> Iterator[Update]:
        """For changing all tiles of these buckets, in order. On leaving, everything is where it rests.

        Raises:
            OSError: a file could not be read or written; some tiles were changed and others not.
        """
        tiles = [tile for bucket in buckets for tile in self.tiles(bucket) if tile.region is not None]
        if not tiles or self.files is None:
            yield _InMemory()
            return
        with self.files.walk(tiles) as walk:
            yield _Mixed(walk)

    @contextlib.contextmanager
    def editing(self, tile: Tile) -> Iterator[None]:
        """Inside, one tile's tensors have their values; what is changed, or put into the optimizer's state, stays."""
        if tile.region is None or self.files is None:
            yield
            return
        with self.files.walk([tile]) as walk, walk.open(tile):
            yield

    def close(self) -> None:
        """Gives files back. What was in them is gone."""
        if self.files is not None:
            self.files.close()
