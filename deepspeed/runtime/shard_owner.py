"""What an optimizer over shards knows of where their states rest, and whether they can be used now."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from deepspeed._core.reduce.bucket import Bucket
from deepspeed._core.store import ShardStates
from deepspeed.runtime import optimizer_offload
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer

__all__ = ["ShardOwner", "StateInFiles"]


class StateInFiles(dict[str, Any]):
    """A ``state_dict()`` whose contents are in files: it can be made and thrown away, and refuses to be read, iterated,
    copied or pickled. Lightning's Trainer makes one for each checkpoint and leaves it out of what it saves."""

    def __init__(self, why: str) -> None:
        super().__init__()
        self._why = why

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(self._why)

    __getitem__ = __contains__ = __iter__ = __len__ = __reduce_ex__ = __eq__ = __or__ = __ror__ = _refuse
    get = keys = values = items = copy = pop = _refuse  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{self._why}>"


class ShardOwner(DeepSpeedOptimizer):
    """Base of the flat optimizer: access to masters and states, and the refusals. Its attributes are set there."""

    buckets: list[Bucket]
    states: ShardStates
    dp_process_group: torch.distributed.ProcessGroup | None
    moved: list[str]
    """Kinds of state that ``engine.offload_states`` has moved away."""
    _broken: str
    """Why states and weights are of different steps; empty if they are not."""
    _whole: bool

    def master_shard(self, bucket: Bucket) -> torch.Tensor:
        """What this rank updates of a bucket, 1-D; a copy if it is in a file."""
        return bucket.master if self._whole else self.states.read(bucket, None, 0, bucket.shard_numel)

    def set_master_shard(self, bucket: Bucket, values: torch.Tensor) -> None:
        """Replaces what :meth:`master_shard` gives; the weights do not follow."""
        if self._whole:
            bucket.master.copy_(values)
        else:
            self.states.write(bucket, None, 0, values)

    def agree_on_files(self, failure: OSError | None) -> None:
        """Raises on all ranks what went wrong with the files of any. Collective if states are in files."""
        if self.keeps_files:
            optimizer_offload.agree(failure, self.dp_process_group, self.buckets[0].device)
        elif failure is not None:
            raise failure

    def require_intact(self) -> None:
        """Refuses to go on with, or to save, optimizer state that is partly of one step and partly of another."""
        if self._broken:
            raise RuntimeError(
                f"optimizer states and weights are of different steps: {self._broken}. Load the last checkpoint with "
                "load_checkpoint, or start again from it"
            )

    def require_here(self) -> None:
        """Refuses to use states that ``engine.offload_states`` has moved away."""
        if self.moved:
            raise RuntimeError(f"{', '.join(self.moved)} are offloaded: call engine.reload_states() first")

    def unfinished(self, what: str) -> None:
        """From here to :meth:`mended`, an error leaves states of different steps."""
        self._broken = what

    def mended(self) -> None:
        """All state was replaced: training can go on after a step that failed."""
        self._broken = ""

    @property
    def keeps_files(self) -> bool:
        """Whether optimizer states are in files, on any rank."""
        return self.states.files is not None

    @property
    def all_in_memory(self) -> bool:
        """Whether all optimizer states are tensors with values at all times, on this rank."""
        return self._whole or all(map(self.states.in_memory, self.buckets))

    def _not_in_memory(self, what: str, instead: str) -> str:
        """Why all optimizer state cannot be had at once; empty if it can."""
        if self.all_in_memory:
            return ""
        return (
            f"{what} would hold all optimizer state in memory, which zero_optimization.offload_optimizer keeps in "
            f"files: use engine.{instead}, which goes tile by tile"
        )

    def _master_to_weights(self, bucket: Bucket) -> OSError | None:
        """The weights follow the master; what went wrong, which other ranks must not wait for."""
        try:
            self.states.copy_master(bucket, bucket.own_weights)
        except OSError as error:
            return error
        return None
