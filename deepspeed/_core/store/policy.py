"""What the config says about where optimizer state rests, as values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from deepspeed._core.aio.engine import IoSettings

__all__ = ["DEFAULT_TILE_NUMEL", "OffloadPolicy"]

DEFAULT_TILE_NUMEL = 3 << 20
"""Elements of a tile: with Adam 36 MiB, which a disk takes in a few large requests and memory does not notice."""


@dataclass(frozen=True)
class OffloadPolicy:
    """``zero_optimization.offload_optimizer``. Device ``none`` is the absence of a policy.

    Attributes:
        device: ``cpu`` or ``nvme``.
        folder: where files go; for ``nvme``.
        ratio: the part of the elements that is offloaded, 0 to 1, to the nearest bucket.
        pin_memory: page-lock what lies between an accelerator and the host.
        tile_numel: most elements of a tile.
        slots: buffers of one tile between file and kernel, at least 1.
        read_ahead, write_behind: whether the next tile is read, and the previous one written, while one is computed.
        fast_init: do not write what the filesystem cannot reserve.
        io: how files are read and written.
    """

    device: str
    folder: Path | None = None
    ratio: float = 1.0
    pin_memory: bool = False
    tile_numel: int = DEFAULT_TILE_NUMEL
    slots: int = 1
    read_ahead: bool = False
    write_behind: bool = False
    fast_init: bool = False
    io: IoSettings = field(default_factory=IoSettings)
