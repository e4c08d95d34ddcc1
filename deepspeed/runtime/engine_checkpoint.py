"""What saving and loading an engine share: the keys of model files, and ranks that succeed or fail together."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch

from deepspeed import comm as dist
from deepspeed._core.ckpt.native import OWN_KEYS, RNG
from deepspeed.comm import agreement
from deepspeed.errors import CheckpointError

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

__all__ = [
    "OWN_KEYS",
    "RNG",
    "everyone",
    "gather",
    "mp_rank_of",
    "rng_state",
    "saving_groups",
    "set_rng_state",
    "together",
]

T = TypeVar("T")


def together(action: Callable[[], T]) -> T:
    """``action`` on every rank; if it fails on any, raises on all. Collective over the world."""
    return agreement.together(action, CheckpointError)


def everyone(action: Callable[[], T]) -> list[T]:
    """``action``'s result on every rank, by rank; if it fails on any, raises on all. Collective over the world."""
    return agreement.everyone(action, CheckpointError)


def gather(value: Any) -> list[Any]:
    """``value`` of every rank. Collective."""
    return agreement.everyone(lambda: value)


def mp_rank_of(engine: DeepSpeedEngine) -> int:
    """Which model-parallel part of the model this rank holds; 0 without model parallelism."""
    for getter in ("get_model_parallel_rank", "get_tensor_model_parallel_rank"):
        if hasattr(engine.mpu, getter):
            return int(getattr(engine.mpu, getter)())
    return 0


def rng_state(engine: DeepSpeedEngine) -> dict[str, Any]:
    """The generators that code draws from without naming one, as plain values."""
    kind, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    state: dict[str, Any] = {
        "cpu": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(keys.astype(np.int64)), *map(float, rest)),
    }
    if engine.device.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(engine.device)
    return state


def set_rng_state(engine: DeepSpeedEngine, state: dict[str, Any]) -> None:
    """Puts back what :func:`rng_state` returned."""
    torch.set_rng_state(state["cpu"].clone())
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), int(position), int(has_gauss), gauss))
    if "device" in state and engine.device.type == "cuda":
        torch.cuda.set_rng_state(state["device"].clone(), engine.device)


def saving_groups(
    engine: DeepSpeedEngine,
) -> tuple[torch.distributed.ProcessGroup | None, torch.distributed.ProcessGroup | None]:
    """All ranks, and those that share optimizer state, as groups for saving only. The first call is collective."""
    if engine._saver.groups is None:
        world = dist.get_world_size()
        everyone: Any = torch.distributed.new_group(backend="gloo") if world > 1 else None
        sharing = everyone
        if world > 1 and engine.dp_world_size < world:
            found = gather(torch.distributed.get_process_group_ranks(engine.dp_process_group))
            for ranks in sorted({tuple(ranks) for ranks in found}):
                group: Any = torch.distributed.new_group(list(ranks), backend="gloo")
                if dist.get_rank() in ranks:
                    sharing = group if len(ranks) > 1 else None
        engine._saver.groups = everyone, sharing
    return engine._saver.groups
