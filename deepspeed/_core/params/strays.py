"""Uses of partitioned parameters that no hook sees: by iteration (``named_parameters()``), from a list or a closure.

A guard notices when a running module reads a parameter as an attribute (:mod:`deepspeed._core.params.hooks`). Whoever got
it in another way would compute with its NaN. So the first pass of training, or of evaluation if that comes first, runs
under a mode that sees each call of a torch function: a released parameter among the arguments is fetched, and remembered
as one that the running module uses. Later passes know it, and run without the mode, which costs some microseconds a call.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from deepspeed._core.params.construct import handles_among, uses_data
from deepspeed._core.params.lifecycle import Coordinator

__all__ = ["StrayUses"]


class StrayUses:
    """When a pass of a model is watched."""

    def __init__(self, root: torch.nn.Module, coordinator: Coordinator) -> None:
        self._root, self._coordinator = root, coordinator
        self.forget()

    def forget(self) -> None:
        """What units use was forgotten: watch anew."""
        self._watched: set[bool] = set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around one pass."""
        grad = torch.is_grad_enabled()
        # A mode would be compiled into the graphs, and they again without it.
        if self._watched & {True, grad} or any(_is_compiled(module) for module in self._root.modules()):
            yield
            return
        with _Watch(self._coordinator):
            yield
        self._watched.add(grad)


def _is_compiled(module: torch.nn.Module) -> bool:
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


class _Watch(TorchFunctionMode):
    def __init__(self, coordinator: Coordinator) -> None:
        super().__init__()
        self._coordinator = weakref.ref(coordinator)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        coordinator = self._coordinator()
        # The lifecycle itself assigns data, and nothing else that is seen here.
        if coordinator is not None and coordinator.running and uses_data(func, assignments=False):
            for handle in handles_among((*args, *kwargs.values())):
                needed = not handle.available or torch.is_grad_enabled()
                if needed and not handle.persistent and coordinator.by_id.get(handle.id) is handle:
                    coordinator.touch(handle)
        return func(*args, **kwargs)
