"""Where masters and optimizer states rest: on the device, on the host, or in a file. Stages never ask."""

from __future__ import annotations

from deepspeed._core.store.files import FileStore
from deepspeed._core.store.memory import DeviceStore, HostStore
from deepspeed._core.store.policy import OffloadPolicy
from deepspeed._core.store.states import ShardStates, ShardStore
from deepspeed._core.store.tiles import Tile

__all__ = ["DeviceStore", "FileStore", "HostStore", "OffloadPolicy", "ShardStates", "ShardStore", "Tile"]
