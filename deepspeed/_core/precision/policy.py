"""Which dtype each thing has. Decided once, from the config; engine code reads only this."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["PrecisionPolicy"]


@dataclass(frozen=True)
class PrecisionPolicy:
    """Dtypes of a run. ``None`` for ``param_dtype`` leaves parameters as they are given (fp32 mode).

    Gradients are summed over ranks and micro-batches in ``accum_dtype``; ``comm_dtype`` is what travels.
    """

    param_dtype: torch.dtype | None = None
    comm_dtype: torch.dtype | None = None
    accum_dtype: torch.dtype | None = None
    loss_scaling: bool = False
    check_overflow: bool = True
    cast_inputs: bool = False
    autocast_dtype: torch.dtype | None = None
    autocast_names: frozenset[str] = frozenset()
    """Parameters whose gradients travel in ``autocast_dtype``: those of torch_autocast's safe modules."""

    def comm_dtype_of(self, name: str, weight_dtype: torch.dtype) -> torch.dtype:
        """Wire dtype for a parameter's gradient: as configured, else autocast's, else the weights' own."""
        if self.comm_dtype is None and self.autocast_dtype is not None and name in self.autocast_names:
            return self.autocast_dtype
        return self.comm_dtype or weight_dtype

    def accum_dtype_of(self, weight_dtype: torch.dtype) -> torch.dtype:
        """Dtype of gradient sums: as configured, else fp32, whose rounding does not depend on the number of terms."""
        return self.accum_dtype or (torch.float64 if weight_dtype == torch.float64 else torch.float32)
