"""Operators: optimizers whose step is one pass over memory, and what this machine can run of the rest.

Nothing here is compiled at install or import time: an operator is usable or it is not.
"""

from __future__ import annotations

from deepspeed.ops import adagrad, adam, aio, lamb, lion
from deepspeed.ops.aio import AsyncIOBuilder

__all__ = ["__compatible_ops__", "adagrad", "adam", "aio", "lamb", "lion"]

__compatible_ops__: dict[str, bool] = {
    "cpu_adam": True,
    "cpu_adagrad": True,
    "cpu_lion": True,
    "fused_adam": True,
    "fused_lamb": True,
    "fused_lion": True,
    AsyncIOBuilder.NAME: AsyncIOBuilder().is_compatible(),
}
"""Operator name -> can it be used here. The optimizers run on every device that torch runs on."""
