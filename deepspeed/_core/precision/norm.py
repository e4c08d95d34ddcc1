"""The global gradient norm, which is also the overflow test: a non-finite gradient gives a non-finite norm."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

__all__ = ["clip_factor", "squared_norm"]

_CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_

_ROW_NUMEL = 4096
_PART_NUMEL = 1 << 18  # of 16-bit elements: its fp32 copy stays in the cache


def squared_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum of squares as a 0-d float64 tensor on the tensors' device; fp32 within rows of 4096 elements, then fp64.

    On the CPU torch adds up a whole tensor in a few fp32 sums, which are off by 5e-4 at 13 M elements, and is twelve times
    slower with 16-bit elements; rows cost no more than one sum.
    """
    total: torch.Tensor | None = None
    for tensor in tensors:
        if tensor.numel():
            square = _square_on_cpu(tensor) if tensor.device.type == "cpu" else _norm(tensor).to(torch.float64).square()
            total = square if total is None else total + square
    return torch.zeros((), dtype=torch.float64) if total is None else total


def _norm(tensor: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor, dim=dim, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _square_on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    flat, total = tensor.detach().reshape(-1), torch.zeros((), dtype=torch.float64)
    for part in [flat] if flat.dtype.itemsize >= 4 else flat.split(_PART_NUMEL):
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        rows = part.numel() // _ROW_NUMEL * _ROW_NUMEL
        if rows:
            total += _norm(part[:rows].view(-1, _ROW_NUMEL), dim=1).to(torch.float64).square_().sum()
        if rows < part.numel():
            total += _norm(part[rows:]).to(torch.float64).square()
    return total


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of this norm are multiplied by; 1 when clipping is off (``max_norm`` 0) or not needed."""
    if max_norm <= 0 or not math.isfinite(norm):
        return 1.0
    return min(1.0, max_norm / (norm + _CLIP_EPS))
