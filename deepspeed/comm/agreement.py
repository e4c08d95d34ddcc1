"""Errors that reach every rank: what only one of them can see must not leave the others waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from deepspeed.comm.comm import all_gather_object, get_world_size

__all__ = ["together"]

T = TypeVar("T")


def together(action: Callable[[], T], error_type: type[Exception] = RuntimeError) -> T:
    """Runs ``action`` on every rank and returns its result; if it fails on any, raises on all.

    The failing ranks raise their own exception, the others ``error_type`` with its text and the rank. Collective over
    the world; ``action`` must not be.
    """
    error: Exception | None = None
    result: T | None = None
    try:
        result = action()
    except Exception as caught:  # whatever it is: the other ranks must not wait for this one
        error = caught
    reports: list[Any] = [None] * get_world_size()
    if get_world_size() > 1:
        all_gather_object(reports, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, report in enumerate(reports):
        if report is not None:
            raise error_type(f"rank {rank} failed: {report}")
    return result  # type: ignore[return-value]
