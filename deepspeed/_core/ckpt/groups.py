"""Collectives of a save in the background.

They go to the group itself, past the functions of ``torch.distributed``: those end with ``destroy_process_group``, which
programs call before their last save is written. And past ``deepspeed.comm``: the hang doctor follows the training's only.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed

__all__ = ["all_gather_values", "exchange"]

_TAG = 0


def exchange(
    arriving: Sequence[tuple[int, torch.Tensor]],
    leaving: Sequence[tuple[int, torch.Tensor]],
    group: torch.distributed.ProcessGroup,
) -> list[torch.distributed.Work]:
    """Begins to fill tensors from other ranks of the group, and to send them theirs; what to wait for.

    Each tensor is 1-D on the CPU, with the other's rank before it; between two ranks, they are sent in the order in which
    they are awaited. Message by message: gloo's own collective took a third longer in saves, see the note in
    ``_core/reduce/transport.py``.
    """
    incoming = [group.recv([piece], rank, _TAG) for rank, piece in arriving]
    return [*incoming, *(group.send([piece], rank, _TAG) for rank, piece in leaving)]


def all_gather_values(value: Any, group: torch.distributed.ProcessGroup) -> list[Any]:
    """A plain value of every rank of the group, by rank."""
    mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    sizes = _gathered(torch.tensor([mine.numel()]), group)
    padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
    padded[: mine.numel()] = mine
    everyone = _gathered(padded, group)
    return [pickle.loads(held[: int(size)].numpy().tobytes()) for held, size in zip(everyone, sizes, strict=True)]


def _gathered(mine: torch.Tensor, group: torch.distributed.ProcessGroup) -> list[torch.Tensor]:
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    group.allgather([everyone], [mine]).wait()
    return everyone
