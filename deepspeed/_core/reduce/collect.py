"""Bringing the pieces of one tensor to one rank, and to no other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as torch_dist

from deepspeed import comm as dist
from deepspeed._core.reduce.transport import Pending

__all__ = ["collect_spans"]


def collect_spans(
    own: torch.Tensor,
    spans: Sequence[tuple[int, int]],
    out: torch.Tensor | None,
    *,
    group: torch_dist.ProcessGroup | None,
    rank: int,
    root: int,
    tag: int,
) -> Pending:
    """Starts filling ``out`` on rank ``root`` from every rank's piece. Collective over the ranks that have a piece.

    Args:
        own: this rank's piece, 1-D; must not change until ``wait``.
        spans: ``[begin, end)`` of each rank's piece in ``out``; empty for those without.
        out: on the root, 1-D, of the pieces' dtype, maybe on the host; None elsewhere, where nothing is allocated.
        group: the ranks; None for all.
        rank: this one's in the group.
        root: who gets the tensor; its rank in the group.
        tag: the same for this tensor on all ranks, different for others in flight.
    """
    begin, end = spans[rank]
    if rank != root:
        if begin == end:
            return Pending()
        work = dist.isend(own, dist.get_global_rank(group, root), group=group, tag=tag)
        return Pending([work], [own], op="send", nbytes=own.nbytes, group=group)
    if out is None:
        raise AssertionError("the root of a collection has nowhere to put it; please report this")
    # Other devices cannot receive into host memory.
    target, whole = out, out if out.device == own.device else own.new_empty(out.numel())
    whole[begin:end].copy_(own)
    works = [
        dist.irecv(whole[low:high], dist.get_global_rank(group, peer), group=group, tag=tag)
        for peer, (low, high) in enumerate(spans)
        if peer != root and low < high
    ]

    def copy_out() -> None:
        if whole is not target:
            target.copy_(whole)

    return Pending(works, [whole], copy_out, op="recv", nbytes=whole.nbytes, group=group)
