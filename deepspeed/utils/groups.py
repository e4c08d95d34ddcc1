"""The process groups of the parallel dimensions. Data parallelism over the whole world is the only one so far."""

from __future__ import annotations

import torch.distributed

from deepspeed import comm as dist

__all__: list[str] = []


def _get_data_parallel_group() -> torch.distributed.ProcessGroup:
    return dist.get_world_group()  # type: ignore[no-any-return]


def _get_data_parallel_world_size() -> int:
    return dist.get_world_size()


def _get_data_parallel_rank() -> int:
    return dist.get_rank()
