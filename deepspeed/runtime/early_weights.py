"""Weights that travel between the ranks while the rest of a checkpoint is read.

Optimizer files hold masters and moments, and the weights follow from the masters alone; so once those are read, each rank
sends its part of the weights, and reads the moments meanwhile. Until all of it is checked the masters in memory stay as they
are: if the checkpoint proves to be damaged, the weights follow them again.

Ranks that can read each other's memory do not send: each says when its part is there, and the others fetch it. Where weights
are shards, too, nothing travels, and a rank's own follow its masters meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import torch

from deepspeed import comm as dist
from deepspeed._core.ckpt.groups import all_gather_values
from deepspeed._core.ckpt.guard import before_change
from deepspeed._core.ckpt.neighbours import Neighbours
from deepspeed._core.layout.spans import Span
from deepspeed._core.reduce.bucket import Bucket
from deepspeed._core.reduce.transport import Pending
from deepspeed.runtime.flat_optimizer import FlatOptimizer

__all__ = ["EarlyWeights"]

_STEP_NUMEL = 4 << 20  # 2 ms of work: as long as the parts of files that are read ahead keep a disk busy
_POLL_S = 5e-4


class EarlyWeights:
    """See the module. Every rank makes one, takes the steps of :meth:`send` as far as it comes, and calls :meth:`finish`,
    all between the same collectives.
    """

    def __init__(self, flat: FlatOptimizer) -> None:
        self._flat = flat
        self._way: _Sent | _Fetched = _Sent(flat)
        self._finished = False

    @staticmethod
    def possible(flat: FlatOptimizer) -> bool:
        """Whether weights are in memory, and masters beside them. The same on all ranks."""
        return flat.stage in (1, 2, 3) and not any(bucket.full_precision or bucket.away for bucket in flat.buckets)

    def share(self, neighbours: Neighbours, group: torch.distributed.ProcessGroup) -> None:
        """From now on ranks fetch weights from each other's memory, if all have whole ones on the host. Collective.

        Args:
            neighbours: the ranks that share the optimizer's state.
            group: those ranks.
        """
        weights = [bucket.weights for bucket in self._flat.buckets]
        here = all(held.device.type == "cpu" and held.is_contiguous() for held in weights)
        places = all_gather_values([held.data_ptr() for held in weights] if here else None, group)
        if None not in places:
            self._way = _Fetched(self._flat, neighbours, places)

    def send(self, values: Callable[[Bucket], Iterable[tuple[Span, torch.Tensor]]]) -> Iterator[None]:
        """Casts new values of the masters into this rank's weights and brings those to the other ranks, in small steps.

        Args:
            values: for each bucket, places in this rank's shard of it and what is to be there.
        """
        before_change()
        for bucket in self._flat.buckets:
            own = bucket.own_weights
            for span, master in values(bucket):
                for at in range(0, span.numel, _STEP_NUMEL):
                    end = min(at + _STEP_NUMEL, span.numel)
                    own[span.offset + at : span.offset + end].copy_(master[at:end])
                    yield
            self._way.ready(bucket)
        yield from self._way.steps()

    def finish(self) -> None:
        """Waits until the weights of all ranks are here. What a rank has not got, it gives as it is, to the others."""
        before_change()
        self._finished = True  # on all ranks, also if this one fails
        self._way.finish()

    def take_back(self) -> None:
        """Makes the weights follow the masters in memory again, if any were sent. Collective."""
        if self._finished:
            self._flat.publish_weights()


class _Sent:
    """By messages, bucket by bucket."""

    def __init__(self, flat: FlatOptimizer) -> None:
        self._flat = flat
        self._pending: list[Pending] = []

    def ready(self, bucket: Bucket) -> None:
        """This rank's part of a bucket, the next one, has its new values."""
        self._pending.append(self._flat.publish_bucket(bucket))

    def steps(self) -> Iterator[None]:
        """What is to be done beside reading."""
        return iter(())

    def finish(self) -> None:
        """The rest."""
        for bucket in self._flat.buckets[len(self._pending) :]:
            self.ready(bucket)
        for pending in self._pending:
            pending.wait()


class _Fetched:
    """From the memory of the others.

    Nobody changes weights afterwards before all ranks have agreed on something, and so have fetched theirs.

    Args:
        flat: whose weights.
        neighbours: all ranks.
        places: by rank, the address of each bucket's weights.
    """

    def __init__(self, flat: FlatOptimizer, neighbours: Neighbours, places: list[list[int]]) -> None:
        self._flat, self._neighbours, self._places = flat, neighbours, places
        self._left = len(flat.buckets)
        self._said: torch.distributed.Work | None = None
        self._fetching = self._fetch()

    def ready(self, bucket: Bucket) -> None:
        """See :class:`_Sent`."""
        self._left -= 1

    def _say(self) -> torch.distributed.Work:
        """Tells the others that this rank's weights are there; done when all have."""
        if self._said is None:
            flag = torch.zeros(1)
            self._said = dist.all_reduce(flag, group=self._flat.transport.group, async_op=True)
        return self._said

    def steps(self) -> Iterator[None]:
        """See :class:`_Sent`."""
        while not self._say().is_completed():
            time.sleep(_POLL_S)  # the thread may have nothing else to do
            yield
        yield from self._fetching

    def finish(self) -> None:
        """See :class:`_Sent`."""
        self._say().wait()
        for _ in self._fetching:
            pass

    def _fetch(self) -> Iterator[None]:
        mine = self._flat.transport.rank
        for index, bucket in enumerate(self._flat.buckets):
            itemsize, shard = bucket.weights.element_size(), bucket.shard_numel
            for rank, places in enumerate(self._places):
                if rank == mine:
                    continue
                for at in range(rank * shard, (rank + 1) * shard, _STEP_NUMEL):
                    room = bucket.weights[at : min(at + _STEP_NUMEL, (rank + 1) * shard)]
                    self._neighbours.read(rank, places[index] + at * itemsize, room)
                    yield
