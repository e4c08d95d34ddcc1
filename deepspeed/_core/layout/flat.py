"""Which parameters share a flat buffer. Pure arithmetic: no tensors, no processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ALIGN_NUMEL", "BucketPlan", "plan_buckets"]

ALIGN_NUMEL = 32
"""Each parameter starts at a multiple of this: 64 bytes in 16 bit, which vector and tensor-core kernels want."""


@dataclass(frozen=True)
class BucketPlan:
    """Whole parameters, in order, in one flat buffer that splits into ``world_size`` equal slices.

    ``members`` holds indices into the planned sequence; ``starts`` the element offset of each in the buffer.
    """

    members: tuple[int, ...]
    starts: tuple[int, ...]
    numel: int
    """Elements of the buffer with gaps and padding; a multiple of the world size."""


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def plan_buckets(numels: Sequence[int], *, limit_numel: int, world_size: int) -> list[BucketPlan]:
    """Packs consecutive parameters until a bucket would exceed ``limit_numel``; a larger one gets its own bucket.

    Parameters stay in the given (forward) order, so that backward completes buckets from the last to the first.
    """
    plans: list[BucketPlan] = []
    members: list[int] = []
    starts: list[int] = []
    end = 0

    def close() -> None:
        if members:
            plans.append(BucketPlan(tuple(members), tuple(starts), _round_up(end, ALIGN_NUMEL * world_size)))

    for index, numel in enumerate(numels):
        start = _round_up(end, ALIGN_NUMEL)
        if members and start + numel > limit_numel:
            close()
            members, starts, start = [], [], 0
        members.append(index)
        starts.append(start)
        end = start + numel
    close()
    return plans
