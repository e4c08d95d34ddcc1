"""Activation checkpointing: ``deepspeed.checkpointing``. Source: chapter 4.2 of the API documentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.utils.checkpoint

from deepspeed.errors import MissingFeatureError

__all__ = ["checkpoint", "configure", "is_configured", "reset"]


class _State:
    configured = False


_state = _State()  # the documented API is process-wide


def configure(
    mpu_: Any = None,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Configures :func:`checkpoint`. May be called repeatedly; ``None`` and ``False`` leave an option off.

    Raises:
        MissingFeatureError: for an option that is switched on; none is available yet.
    """
    options = {
        "partition_activations": partition_activations,
        "contiguous_checkpointing": contiguous_checkpointing,
        "checkpoint_in_cpu": checkpoint_in_cpu,
        "synchronize": synchronize,
        "profile": profile,
    }
    wanted = [name for name, value in options.items() if value]
    if wanted:
        raise MissingFeatureError(f"activation checkpointing: {', '.join(wanted)} is not available yet; switch it off")
    _state.configured = True


def is_configured() -> bool:
    """Whether :func:`configure` was called."""
    return _state.configured


def reset() -> None:
    """Back to the state before :func:`configure`."""
    _state.configured = False


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """Runs ``function(*args)`` without keeping its activations; backward computes them again, with the same dropout."""
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)
