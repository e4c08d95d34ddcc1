"""A field of a tile in a file, as a part of a checkpoint's tensor."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from deepspeed._core.store.files import FileStore
from deepspeed._core.store.tiles import Tile

__all__ = ["Stored"]


class Stored:
    """As :class:`~deepspeed._core.ckpt.source.Live`, for a tensor that is read a piece at a time."""

    torn = False
    error: OSError | None = None

    def __init__(self, store: FileStore, tile: Tile, name: str) -> None:
        if tile.region is None:
            raise AssertionError("a tile without a place in the file has its values in memory; please report this")
        self._store, self._tile, self._name = store, tile, name
        self._lock = threading.Lock()
        self._copy: torch.Tensor | None = None
        self._dropped = False
        self.dtype = tile.region.find(name).dtype
        self.numel = tile.numel

    def read(self, begin: int, end: int, use: Callable[[torch.Tensor], None]) -> None:
        """Gives ``use`` the elements ``[begin, end)``, 1-D on the CPU, which it must not keep."""
        with self._lock:
            values = self._copy[begin:end] if self._copy is not None else self._load(begin, end)
        use(values)

    def freeze(self) -> None:
        """Reads all of it into memory, unless it will not be read again."""
        with self._lock:
            if self._copy is None and not self._dropped:
                self._copy = self._load(0, self.numel)

    def _load(self, begin: int, end: int) -> torch.Tensor:
        try:
            return self._store.read(self._tile, self._name, begin, end)
        except OSError as error:  # other ranks wait for this part: whoever writes the checkpoint tells
            self.error = self.error or error
            return torch.zeros(end - begin, dtype=self.dtype)

    def place(self) -> int | None:
        """It has no address."""
        return None

    def drop(self, before: int) -> None:
        """Elements before this one will not be read again."""
        with self._lock:
            if before >= self.numel:
                self._copy, self._dropped = None, True
