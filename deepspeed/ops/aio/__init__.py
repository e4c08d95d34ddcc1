"""Asynchronous file I/O. The builder is here because clients ask it whether the feature can be used."""

from __future__ import annotations

from typing import NoReturn

from deepspeed.errors import MissingFeatureError

__all__ = ["AsyncIOBuilder"]


class AsyncIOBuilder:
    """Tells whether the asynchronous I/O operator can be used on this machine (not in this version)."""

    NAME = "async_io"

    def is_compatible(self, verbose: bool = False) -> bool:
        """False: this version has no asynchronous I/O operator."""
        del verbose
        return False

    def load(self, verbose: bool = False) -> NoReturn:
        """Raises ``MissingFeatureError``."""
        del verbose
        raise MissingFeatureError(
            "async_io: this version has no asynchronous file I/O operator; NVMe offload (device 'nvme') needs it. "
            "Use offload_optimizer.device 'cpu' or 'none' instead"
        )
