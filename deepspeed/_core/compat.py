"""The one file that bridges versions of torch. Everything else may assume what is here.

[Note: the torch floor] We ask for torch 2.6 or newer:

- ``torch.load(weights_only=True)`` is the default from 2.6, with ``torch.serialization.safe_globals`` (2.5) to admit
  the few classes that checkpoint files name. Below it one call means two things, and the unsafe one is the default.
- Fused kernels (``torch._fused_adam_``, ``_fused_adamw_``, ``_fused_sgd_``, ``_fused_adagrad_``) exist on CPU from
  2.4; the step kernels are built on them.
- ``Tensor.register_post_accumulate_grad_hook`` (2.1) tells when a gradient is complete; the reducer needs it.

We go no lower, since that would need second code paths that no test here runs; and no higher, since what came later is
only new names (below).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist

__all__ = ["all_gather_flat", "reduce_scatter_flat", "torch_version"]

FlatCollective = Callable[..., Any]


def torch_version() -> tuple[int, int]:
    """(major, minor) of the torch that runs, e.g. ``(2, 13)``."""
    major, minor, *_ = torch.__version__.split("+")[0].split(".")
    return int(major), int(minor)


def _resolve(new_name: str, old_name: str) -> FlatCollective:
    """Picks the collective by name once: torch 2.13 renamed it, and the old name then warns on every call."""
    if not dist.is_available():

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(f"{new_name} needs a torch that was built with torch.distributed; this one was not")

        return missing
    return cast(FlatCollective, getattr(dist, new_name, None) or getattr(dist, old_name))


#: ``(output, input, group=None, async_op=False)``: ``output`` (world * n elements, flat) becomes every rank's ``input``
#: (n elements), rank by rank. Collective.
all_gather_flat: FlatCollective = _resolve("all_gather_single", "all_gather_into_tensor")

#: ``(output, input, op=SUM, group=None, async_op=False)``: ``output`` (n elements) becomes this rank's piece of the sum
#: of every rank's ``input`` (world * n elements, flat). Collective.
reduce_scatter_flat: FlatCollective = _resolve("reduce_scatter_single", "reduce_scatter_tensor")
