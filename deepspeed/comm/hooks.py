"""The one place from which communication can be watched: a comms logger, or a test that counts collectives.

Unset, it costs one attribute read per operation. It watches what goes through :mod:`deepspeed.comm`, on this rank.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from .doctor import record

__all__ = ["CommEvent", "CommHook", "comm_hook", "observe", "observed", "set_comm_hook"]


class CommEvent(NamedTuple):
    """One operation that is about to start on this rank."""

    #: Public name of the function in :mod:`deepspeed.comm`, e.g. ``"all_reduce"``.
    op: str
    #: Size of the largest buffer that the caller passed: the whole vector for gathers and scatters, never one piece.
    #: 0 where no tensor is passed (barriers, objects).
    nbytes: int
    #: The group as passed; ``None`` is the world.
    group: Any


#: Called before the operation. What it returns, if anything, is called after it with the operation's result: the
#: ``Work`` for asynchronous ones, else what the function returns.
CommHook = Callable[[CommEvent], Callable[[Any], None] | None]

P = ParamSpec("P")
R = TypeVar("R")


class _Slot:
    hook: CommHook | None = None


_slot = _Slot()  # torch.distributed is one per process, and so is its watcher


def comm_hook() -> CommHook | None:
    """The hook that is set, if any."""
    return _slot.hook


def set_comm_hook(hook: CommHook | None) -> CommHook | None:
    """Sets the hook (``None`` for none) and returns the one before, to be set back or called by the new one."""
    previous, _slot.hook = _slot.hook, hook
    return previous


@contextlib.contextmanager
def observe() -> Iterator[list[CommEvent]]:
    """Collects this rank's operations while the block runs; a hook set before goes on being called::

    with deepspeed.comm.observe() as events:
        engine.step()
    assert [e.op for e in events] == ["all_reduce", "all_gather_into_tensor"]
    """
    events: list[CommEvent] = []
    before = _slot.hook

    def collect(event: CommEvent) -> Callable[[Any], None] | None:
        events.append(event)
        return None if before is None else before(event)

    set_comm_hook(collect)
    try:
        yield events
    finally:
        set_comm_hook(before)


def observed(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a communication function announce itself to the hook, and to the hang doctor's record."""
    signature = inspect.signature(function)
    place = list(signature.parameters).index("group") if "group" in signature.parameters else len(signature.parameters)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        hook, watched = _slot.hook, record.now.on
        if hook is None and not watched:
            return function(*args, **kwargs)
        group = args[place] if len(args) > place else kwargs.get("group")
        with (
            record.operation(function.__name__, args or tuple(kwargs.values()), group)
            if watched
            else contextlib.nullcontext()
        ):
            if hook is None:
                return function(*args, **kwargs)
            arguments = signature.bind(*args, **kwargs).arguments
            nbytes = max((_nbytes(value) for value in arguments.values()), default=0)
            done = hook(CommEvent(function.__name__, nbytes, arguments.get("group")))
            result = function(*args, **kwargs)
            if done is not None:
                done(result)
            return result

    return call


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(_nbytes(item) for item in value)
    return 0
