"""The global gradient norm, which is also the overflow test: a non-finite gradient gives a non-finite norm."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

__all__ = ["clip_factor", "squared_norm"]

_CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_


def squared_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum of squares as a 0-d float64 tensor on the tensors' device; fp32 norms a tensor, summed in fp64."""
    total: torch.Tensor | None = None
    for tensor in tensors:
        if tensor.numel():
            norm = torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
            square = norm.to(torch.float64).square()
            total = square if total is None else total + square
    return torch.zeros((), dtype=torch.float64) if total is None else total


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of this norm are multiplied by; 1 when clipping is off (``max_norm`` 0) or not needed."""
    if max_norm <= 0 or not math.isfinite(norm):
        return 1.0
    return min(1.0, max_norm / (norm + _CLIP_EPS))
