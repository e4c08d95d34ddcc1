"""Data loading for the engine: a distributed ``DataLoader`` sized to the micro-batch, and a loader that never ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

__all__ = ["DeepSpeedDataLoader", "RepeatingLoader"]


class RepeatingLoader:
    """Wraps an iterable so that it starts again when it ends; ``next()`` and ``for`` never stop.

    A distributed sampler gets a new epoch number at each start, so that every pass is shuffled anew.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.epoch = 0
        self._iterator: Iterator[Any] = iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __next__(self) -> Any:
        try:
            return next(self._iterator)
        except StopIteration:
            self.epoch += 1
            set_epoch = getattr(getattr(self.loader, "sampler", None), "set_epoch", None)
            if set_epoch is not None:
                set_epoch(self.epoch)
            self._iterator = iter(self.loader)
        try:
            return next(self._iterator)
        except StopIteration:
            raise ValueError("RepeatingLoader: the wrapped loader is empty, there is nothing to repeat") from None


class DeepSpeedDataLoader:
    """Gives this rank its share of a dataset in micro-batches.

    Map-style datasets are split by a ``DistributedSampler`` over the data-parallel ranks (unless a sampler is given);
    iterable ones are taken as they are and must split themselves.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        rank: int,
        world_size: int,
        shuffle: bool = True,
        drop_last: bool = False,
        pin_memory: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        sampler: Sampler[Any] | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if sampler is None and not isinstance(dataset, IterableDataset):
            sampler = DistributedSampler(
                dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed, drop_last=drop_last
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.sampler = sampler
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=drop_last,
            pin_memory=pin_memory and torch.cuda.is_available(),
            collate_fn=collate_fn,
            num_workers=num_workers,
        )
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the shuffle of the next pass; without a call, passes count by themselves."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.set_epoch(self._epoch)
        self._epoch += 1
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)
