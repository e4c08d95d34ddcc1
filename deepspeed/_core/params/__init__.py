"""Partitioned parameters (ZeRO-3): who holds them, when they are whole, and how they travel."""

from __future__ import annotations

from typing import Any

__all__ = ["is_partitioned"]


def is_partitioned(tensor: Any) -> bool:
    """Whether it is a partitioned parameter. Here, so that who has none imports nothing for the answer."""
    return getattr(tensor, "_ds_handle", None) is not None
