"""Optimizer state in memory: where the weights are, or on the host while those are on an accelerator."""

from __future__ import annotations

import torch

from deepspeed._core.pages import in_huge_pages
from deepspeed._core.reduce.bucket import Bucket
from deepspeed._core.store.tiles import Tile, cut

__all__ = ["DeviceStore", "HostStore"]


class DeviceStore:
    """Masters and states stay on the bucket's device; a shard is one tile."""

    def adopt(self, bucket: Bucket) -> list[Tile]:
        """The bucket's tiles; nothing is moved."""
        return [Tile(bucket, 0, bucket.shard_numel, bucket.master)]


class HostStore(DeviceStore):
    """Masters, states and the update on the host. Where the accelerator's memory is host memory, nothing is moved.

    Args:
        tile_numel: most elements of a tile, which bounds what is on its way between host and device.
    """

    def __init__(self, tile_numel: int) -> None:
        self._tile_numel = tile_numel

    def adopt(self, bucket: Bucket) -> list[Tile]:
        """The bucket's tiles, views of its master, which is on the host from now on."""
        if bucket.device.type == "cpu":
            return super().adopt(bucket)
        host = in_huge_pages(torch.empty(bucket.shard_numel, dtype=bucket.master.dtype))
        bucket.master = host.copy_(bucket.master)
        bucket.separate_master = True
        tiles = cut(bucket.shard_numel, self._tile_numel)
        return [Tile(bucket, at, numel, bucket.master[at : at + numel]) for at, numel in tiles]
