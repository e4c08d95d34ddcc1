"""One run of a module with partitioned parameters, from its forward until its backward is done, and what counts them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from deepspeed._core.params.handle import ParamHandle
from deepspeed._core.params.units import Unit

__all__ = ["BackwardHold", "Call", "Stats", "graph_task"]


def graph_task() -> int:
    """Identity of the backward that runs now on this thread; -1 if none does."""
    return torch._C._current_graph_task_id()


class Call:
    """One run of a unit's module. As a hold on parameters, it stands for the forward; ``back`` for the backward."""

    __slots__ = (
        "_back",
        "containers",
        "epoch",
        "given",
        "handles",
        "inputs",
        "leaf_hooks",
        "left",
        "place",
        "position",
        "recomputed",
        "sticky",
        "task",
        "unit",
    )

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.handles: list[ParamHandle] = list(unit.members)
        self._back: BackwardHold | None = None
        self.place: int | None = None
        """Where the recorded pass has it."""
        self.position: int | None = None
        """Where the plan has it; the backward's place once that has begun."""
        self.task = -1
        """The graph task that runs its backward."""
        self.epoch = -1
        """The backward in which that is."""
        self.recomputed = False
        """It ran inside a backward: a checkpoint's recomputation."""
        self.inputs: set[int] | None = None
        """Its inputs whose gradients are watched, for the sake of frozen parameters."""
        self.containers: list[Any] = []
        """Lists and objects that it was given, and may put tensors into."""
        self.given: set[int] = set()
        """Tensors, by identity, that were in them before."""
        self.leaf_hooks: list[RemovableHandle] = []
        """Of those inputs that may outlive the call; removed when its backward is over."""
        self.left: set[int] = set()
        """What must still happen before frozen parameters can go: gradients of inputs and of trainable parameters."""
        self.sticky = False
        """Its outputs cannot be watched: hold everything until the end of backward."""

    @property
    def back(self) -> BackwardHold:
        """The hold for its backward, the same until :meth:`end_backward`."""
        if self._back is None:
            self._back = BackwardHold(self)
        return self._back

    def end_backward(self) -> None:
        """Nothing of the backward is left here, nor a cycle of references."""
        self._back = None
        for hook in self.leaf_hooks:
            hook.remove()
        self.leaf_hooks = []

    def __str__(self) -> str:
        return f"forward of {self.unit.name or 'the model'}"


class BackwardHold:
    """What holds a parameter for a call's backward."""

    __slots__ = ("call",)

    def __init__(self, call: Call) -> None:
        self.call = call

    def __str__(self) -> str:
        return f"backward of {self.call.unit.name or 'the model'}"

    def same_run(self, call: Call) -> bool:
        """Whether this is for the same work as ``call``'s backward: its own, or a checkpoint's recomputation of it."""
        if self.call is call:
            return True
        related = self.call.unit is call.unit or self.call.unit.parent is call.unit
        return self.call.recomputed and related and self.call.task == call.task


class Stats:
    """Counters since the last :meth:`reset`; tests and reports read them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.gathers = 0
        """Gather operations that this rank took part in; of one unit, or of all persistent parameters."""
        self.gathered_numel = 0
        """Elements of them."""
        self.peak_live_numel = 0
        """Most elements that were whole at a time, persistent parameters not counted."""
