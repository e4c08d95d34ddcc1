"""Moving a sharded vector from one layout to another among the ranks that hold it."""

from __future__ import annotations

import torch

from deepspeed import comm as dist
from deepspeed._core.layout.reshard import reshard
from deepspeed._core.layout.spans import ShardLayout
from deepspeed._core.reduce.transport import Transport

__all__ = ["exchange"]


def exchange(local: torch.Tensor, source: ShardLayout, target: ShardLayout, transport: Transport) -> torch.Tensor:
    """This rank's buffer in ``target``, given every rank's buffer ``local`` (1-D) in ``source``; padding is zero.

    One all-to-all. Both layouts are over the transport's ranks. Collective.
    """
    out = torch.zeros(target.buffer_numels[transport.rank], dtype=local.dtype, device=local.device)
    copies = reshard(source, target)
    world, me = transport.world_size, transport.rank
    outgoing = [[c for c in copies if c.src_rank == me and c.dst_rank == rank] for rank in range(world)]
    incoming = [[c for c in copies if c.dst_rank == me and c.src_rank == rank] for rank in range(world)]
    send = torch.cat([local[c.src_offset : c.src_offset + c.numel] for part in outgoing for c in part] or [local[:0]])
    if world > 1:
        received = torch.empty(sum(c.numel for part in incoming for c in part), dtype=local.dtype, device=local.device)
        dist.all_to_all_single(
            received,
            send,
            [sum(c.numel for c in part) for part in incoming],
            [sum(c.numel for c in part) for part in outgoing],
            group=transport.group,
        )
    else:
        received = send
    at = 0
    for copy in (c for part in incoming for c in part):
        out[copy.dst_offset : copy.dst_offset + copy.numel] = received[at : at + copy.numel]
        at += copy.numel
    return out
