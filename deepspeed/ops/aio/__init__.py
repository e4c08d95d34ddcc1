"""Asynchronous file I/O for tensors (DeepNVMe tutorial): ``AsyncIOBuilder().load().aio_handle(...)``.

Nothing is built: the operator is threads on ``preadv`` and ``pwritev``; see ``deepspeed._core.aio``.
"""

from __future__ import annotations

import os
from types import ModuleType

from deepspeed.errors import MissingFeatureError
from deepspeed.ops.aio import handle
from deepspeed.ops.aio.handle import aio_handle

__all__ = ["AsyncIOBuilder", "aio_handle"]


class AsyncIOBuilder:
    """Tells whether the asynchronous I/O operator can be used on this machine, and gives it."""

    NAME = "async_io"

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether this system has positioned vector I/O: Linux has."""
        del verbose
        return hasattr(os, "preadv") and hasattr(os, "pwritev")

    def load(self, verbose: bool = False) -> ModuleType:
        """The module that has :class:`aio_handle`. Raises ``MissingFeatureError`` if it cannot be used here."""
        if not self.is_compatible(verbose):
            raise MissingFeatureError(
                "async_io: this system has no os.preadv and os.pwritev, so tensors cannot be offloaded to NVMe; "
                "use device 'cpu' or 'none' instead"
            )
        return handle
