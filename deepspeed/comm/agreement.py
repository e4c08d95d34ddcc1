"""Errors that reach every rank: what only one of them can see must not leave the others waiting.

[Note: one number first] To gather an object from every rank takes two collectives of growing size, 3 ms between two ranks
of a host and 10 ms between four where the cores are busy; to reduce one number takes 1.5 ms. So ranks first agree that
nothing is wrong, and say what it is only if something is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.comm.comm import ReduceOp, all_gather_object, all_reduce, get_backend, get_world_size

__all__ = ["any_rank", "everyone", "together"]

T = TypeVar("T")


def any_rank(said: bool) -> bool:
    """Whether any rank of the world says so. Collective."""
    if get_world_size() == 1:
        return said
    accelerator, backend = get_accelerator(), get_backend()
    # Groups of several backends take tensors of the host, too.
    alone = backend != "gloo" and backend == accelerator.communication_backend_name()
    flag = torch.tensor([said], dtype=torch.int32, device=accelerator.current_device_name() if alone else "cpu")
    all_reduce(flag, op=ReduceOp.MAX)
    return bool(flag.item())


def together(action: Callable[[], T], error_type: type[Exception] = RuntimeError) -> T:
    """Runs ``action`` on every rank and returns its result; if it fails on any, raises on all.

    The failing ranks raise their own exception, the others ``error_type`` with its text and the rank. Collective over
    the world; ``action`` must not be.
    """
    result, error = _attempt(action)
    if any_rank(error is not None):
        _raise(error, _gathered(_text(error)), error_type)
    return result  # type: ignore[return-value]


def everyone(action: Callable[[], T], error_type: type[Exception] = RuntimeError) -> list[T]:
    """Like :func:`together`, but returns the results of all ranks, which must be picklable, by rank."""
    result, error = _attempt(action)
    if get_world_size() == 1 and error is None:
        return [result]  # type: ignore[list-item]
    reports = _gathered((_text(error), result))
    _raise(error, [text for text, _ in reports], error_type)
    return [found for _, found in reports]


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:  # whatever it is: the other ranks must not wait for this one
        return None, error


def _text(error: Exception | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [value] * get_world_size()
    if get_world_size() > 1:
        all_gather_object(values, value)
    return values


def _raise(error: Exception | None, reports: list[str | None], error_type: type[Exception]) -> None:
    if error is not None:
        raise error
    for rank, report in enumerate(reports):
        if report is not None:
            raise error_type(f"rank {rank} failed: {report}")
