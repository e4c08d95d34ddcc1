"""Small helpers that clients import from here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["map_tensors", "move_to_device", "see_memory_usage"]

from deepspeed.accelerator import get_accelerator
from deepspeed.utils.logging import log_dist


def map_tensors(fn: Callable[[torch.Tensor], torch.Tensor], item: Any) -> Any:
    """Applies ``fn`` to every tensor in nested lists, tuples, named tuples and dicts; the rest stays as it is."""
    if isinstance(item, torch.Tensor):
        return fn(item)
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(map_tensors(fn, value) for value in item))
    if isinstance(item, (list, tuple)):
        return type(item)(map_tensors(fn, value) for value in item)
    if isinstance(item, dict):
        return {key: map_tensors(fn, value) for key, value in item.items()}
    return item


def move_to_device(
    item: Any, device: torch.device | str | int, criterion_func: Callable[[Any], bool] | None = None
) -> Any:
    """A copy of nested containers with their tensors on ``device``; only those that ``criterion_func`` accepts."""
    return map_tensors(lambda t: t.to(device) if criterion_func is None or criterion_func(t) else t, item)


def see_memory_usage(message: str, force: bool = False) -> None:
    """Logs the accelerator's (or, on CPU, the process's) memory on rank 0, if ``force``."""
    if force:
        accelerator = get_accelerator()
        now, peak = accelerator.memory_allocated() / 2**30, accelerator.max_memory_allocated() / 2**30
        log_dist(f"{message} | allocated {now:.2f} GiB, peak {peak:.2f} GiB")
