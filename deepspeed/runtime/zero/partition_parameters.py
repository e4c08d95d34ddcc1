"""Parameter partitioning (ZeRO-3). Stages 0 to 2 keep parameters whole, so here is only what code shared with them calls."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.errors import MissingFeatureError

__all__ = ["GatheredParameters", "Init", "ZeroParamStatus", "get_accelerator"]


class ZeroParamStatus(enum.Enum):
    """Where the data of a partitioned parameter is."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class GatheredParameters:
    """Inside, partitioned parameters are whole. Parameters that are whole anyway are left alone.

    ``params``: a parameter, or any iterable of parameters, tensors and ``None``. This version partitions none, so that
    the context changes nothing; ``modifier_rank`` matters to partitioned parameters only.
    """

    def __init__(
        self,
        params: torch.Tensor | Iterable[torch.Tensor | None] | None,
        modifier_rank: int | None = None,
        fwd_module: torch.nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        self.enabled = enabled
        self.params = [params] if isinstance(params, torch.Tensor) or params is None else list(params)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class Init:
    """Constructs models partitioned (ZeRO-3), which this version does not do yet: only ``enabled=False`` is accepted."""

    def __init__(self, *args: Any, enabled: bool = True, **kwargs: Any) -> None:
        if enabled:
            raise MissingFeatureError(
                "deepspeed.zero.Init: partitioned construction (ZeRO stage 3) is not available in this version; use "
                "stages 0 to 2, or pass enabled=False"
            )

    def __enter__(self) -> Init:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None
