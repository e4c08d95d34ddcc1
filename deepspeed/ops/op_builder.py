"""Where documents and clients import operator builders from. Nothing is built: a builder hands out what is there."""

from __future__ import annotations

from deepspeed.ops.aio import AsyncIOBuilder

__all__ = ["AsyncIOBuilder"]
