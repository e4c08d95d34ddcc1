"""Process groups for parts of the world, made together and once.

torch makes a group with the help of *all* ranks of the world, members or not, and gives no error where they disagree: it
hangs or mixes groups up. So groups are made here from lists that all ranks compute alike.
"""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as torch_dist

from .comm import all_reduce, get_rank, get_world_group, get_world_size, is_initialized, new_group

__all__ = ["make_groups", "ranks_per_node"]

# By the default group, so that a world that ended takes its groups along.
_made: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = weakref.WeakKeyDictionary()


def make_groups(groups: Sequence[Sequence[int]]) -> torch_dist.ProcessGroup | None:
    """Makes (or finds) a group for each list of world ranks and returns the one this rank is in, ``None`` if in none.

    Collective over the world; every rank passes the same lists in the same order. A list of all ranks in order gives the
    world's own group; any other is made once and used by all that ask again. They live as long as the world's group.

    Raises:
        ValueError: a rank is in two of the groups, twice in one, or not in the world; or there is no world.
    """
    if not is_initialized():
        raise ValueError("process groups need torch.distributed: call deepspeed.init_distributed() first")
    world_size = get_world_size()
    times = Counter(rank for ranks in groups for rank in ranks)
    wrong = sorted(rank for rank, count in times.items() if count > 1 or not 0 <= rank < world_size)
    if wrong:
        raise ValueError(
            f"groups that are made together are disjoint and of ranks 0..{world_size - 1}; ranks {wrong} are given twice "
            f"or do not exist in {[list(ranks) for ranks in groups]}"
        )
    world = get_world_group()
    cache = _made.setdefault(world, {})
    own = None
    for ranks in groups:
        key = tuple(ranks)
        if key not in cache:
            cache[key] = world if key == tuple(range(world_size)) else new_group(key)
        if get_rank() in key:
            own = cache[key]
    return own


def ranks_per_node(device: torch.device) -> int | None:
    """Ranks on each node as the launcher says (``LOCAL_WORLD_SIZE`` or ``LOCAL_SIZE``); ``None`` where it differs.

    Also ``None`` where no launcher said it on some rank. Collective over the world: the answer is the same on all ranks.

    Args:
        device: where the world's backend takes tensors.
    """
    if not is_initialized() or get_world_size() == 1:
        return 1
    text = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "0"
    said = int(text) if text.isdigit() else 0
    extremes = torch.tensor([said, -said], dtype=torch.int64, device=device)
    all_reduce(extremes, torch_dist.ReduceOp.MAX)
    largest, smallest = extremes[0].item(), -extremes[1].item()
    return int(largest) if largest == smallest and largest > 0 else None
