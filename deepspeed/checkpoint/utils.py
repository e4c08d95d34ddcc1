"""Helpers for saving state with ``torch.save`` (API documentation of 0.14.1, "Avoiding ZeRO checkpoint bloat")."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch

__all__ = ["clone_tensors_for_torch_save"]

T = TypeVar("T")


def clone_tensors_for_torch_save(item: T, device: torch.device | str = torch.device("cpu")) -> T:  # noqa: B008 - documented
    """A copy of ``item`` whose tensors are clones of their own on ``device``.

    ZeRO keeps parameters as views of large flat buffers, and ``torch.save`` writes the whole buffer behind a view. The
    clones carry their own elements only. Tied weights (one tensor in two places) become one clone in both.

    Args:
        item: a tensor, or lists, tuples and dicts (of any nesting and subclass) of tensors and other values.
        device: where the clones are; default CPU.

    Returns:
        The copy: containers are new and of the same type, clones are detached and of the same dtype and shape, other
        values are the same objects.
    """
    clones: dict[object, torch.Tensor] = {}
    return _clone(item, torch.device(device), clones)


def _clone(item: Any, device: torch.device, clones: dict[object, torch.Tensor]) -> Any:
    if torch.is_tensor(item):
        key = _identity(item)
        if key not in clones:
            clones[key] = item.detach().to(device, copy=True).contiguous()
        return clones[key]
    if isinstance(item, tuple):
        values = [_clone(value, device, clones) for value in item]
        return type(item)(*values) if hasattr(item, "_fields") else type(item)(values)
    if isinstance(item, list):
        return type(item)(_clone(value, device, clones) for value in item)
    if isinstance(item, dict):
        # A copy keeps what a subclass adds (a default factory, the metadata of a state dict).
        copied = copy.copy(item)
        for key, value in item.items():
            copied[key] = _clone(value, device, clones)
        return copied
    return item


def _identity(tensor: torch.Tensor) -> object:
    """Equal for the same elements only: a state dict holds a new object for each name of a tied weight.

    Views that merely share storage are what bloats the file, and are told apart.
    """
    if tensor.layout is not torch.strided or tensor.device.type == "meta" or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
