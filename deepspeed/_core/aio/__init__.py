"""Files to tensors and back, asynchronously: an open file, the engine that moves bytes, and page-aligned memory."""

from __future__ import annotations

from deepspeed._core.aio.engine import FileIO, IoSettings, Transfer, io_settings
from deepspeed._core.aio.files import DataFile
from deepspeed._core.aio.memory import aligned_empty, lock_pages, unlock_pages

__all__ = [
    "DataFile",
    "FileIO",
    "IoSettings",
    "Transfer",
    "aligned_empty",
    "io_settings",
    "lock_pages",
    "unlock_pages",
]
