"""Weights that travel between the ranks while the rest of a checkpoint is read.

Optimizer files hold masters and moments, and the weights follow from the masters alone; so once those are read, each rank
sends its part of the weights, and reads the moments meanwhile. Until all of it is checked the masters in memory stay as they
are: if the checkpoint proves to be damaged, the weights follow them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from deepspeed._core.ckpt.guard import before_change
from deepspeed._core.layout.spans import Span
from deepspeed._core.reduce.bucket import Bucket
from deepspeed._core.reduce.transport import Pending
from deepspeed.runtime.flat_optimizer import FlatOptimizer

__all__ = ["EarlyWeights"]


class EarlyWeights:
    """See the module. Every rank makes one, takes the steps of :meth:`send` as far as it comes, and calls :meth:`finish`,
    all between the same collectives.
    """

    def __init__(self, flat: FlatOptimizer) -> None:
        self._flat = flat
        self._pending: list[Pending] = []

    @staticmethod
    def possible(flat: FlatOptimizer) -> bool:
        """Whether weights are whole on every rank, and masters beside them. The same on all ranks."""
        return flat.stage in (1, 2) and not any(bucket.full_precision for bucket in flat.buckets)

    def send(self, values: Callable[[Bucket], Iterable[tuple[Span, torch.Tensor]]]) -> Iterator[None]:
        """Casts new values of the masters into this rank's weights, and begins to send those; a bucket at each step.

        Args:
            values: for each bucket, places in this rank's shard of it and what is to be there.
        """
        before_change()
        for bucket in self._flat.buckets:
            own = bucket.own_weights
            for span, master in values(bucket):
                own[span.offset : span.offset_stop].copy_(master)
            self._pending.append(self._flat.publish_bucket(bucket))
            yield

    def finish(self) -> None:
        """Waits until the weights of all ranks are here. What a rank has not got, it sends as it is, for the others."""
        before_change()
        for bucket in self._flat.buckets[len(self._pending) :]:
            self._pending.append(self._flat.publish_bucket(bucket))
        for pending in self._pending:
            pending.wait()

    def take_back(self) -> None:
        """Makes the weights follow the masters in memory again, if any were sent. Collective."""
        if self._pending:
            self._flat.publish_weights()
