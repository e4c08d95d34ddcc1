"""Watching modules being constructed, for ``zero.Init``: what must be patched in torch meanwhile, and nothing after.

[Note: end of construction] A module's parameters may change until its outermost ``__init__`` has returned, and only a
wrapper around ``__init__`` sees that moment. So for the time of the context each subclass of ``torch.nn.Module`` that defines
``__init__`` gets a wrapper, new subclasses too; what is constructed past them (an ``__init__`` generated later, as by
``dataclass``) is found when the context ends, since every module passes through ``torch.nn.Module.__init__``.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["CONSTRUCTORS", "ORIGINALS", "construction", "plain_constructors", "set_constructors"]

CONSTRUCTORS = ("tensor", "empty", "zeros", "ones", "full", "arange", "eye", "randn")
"""Functions of ``torch`` that make tensors of the context's dtype and device inside ``zero.Init``."""

ORIGINALS: dict[str, Callable[..., torch.Tensor]] = {name: getattr(torch, name) for name in CONSTRUCTORS}

OnConstructed = Callable[[torch.nn.Module], None]


class _Watch:
    """The patches; one at a time, shared by nested contexts."""

    def __init__(self) -> None:
        self.listeners: list[OnConstructed] = []
        self.thread = 0
        self.wrapped: list[tuple[type, Any, Any]] = []
        self.under_construction: set[int] = set()
        self.begun: list[weakref.ref[torch.nn.Module]] = []


_watch = _Watch()


@contextlib.contextmanager
def construction(listener: OnConstructed) -> Iterator[None]:
    """Calls ``listener(module)`` whenever this thread has constructed a module, children before parents.

    Nested: the innermost listener is called. Patches are gone when the outermost context ends, however it ends.
    """
    outermost = not _watch.listeners
    _watch.listeners.append(listener)
    try:
        if outermost:
            _patch()
        begun_before = len(_watch.begun)
        yield
        for known in _watch.begun[begun_before:]:
            module = known()
            if module is not None and id(module) not in _watch.under_construction:
                listener(module)
        del _watch.begun[begun_before:]
    finally:
        _watch.listeners.pop()
        if outermost:
            _unpatch()


def _patch() -> None:
    _watch.thread = threading.get_ident()
    _watch.under_construction.clear()
    _watch.begun.clear()
    base = torch.nn.Module
    original = base.__init__

    @functools.wraps(original)
    def begin(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if threading.get_ident() == _watch.thread:
            _watch.begun.append(weakref.ref(self))

    _watch.wrapped.append((base, original, begin))
    base.__init__ = begin  # type: ignore[method-assign]
    for kind in _subclasses(base):
        _wrap(kind)

    def on_subclass(cls: type[torch.nn.Module], **kwargs: Any) -> None:
        super(torch.nn.Module, cls).__init_subclass__(**kwargs)
        _wrap(cls)

    base.__init_subclass__ = classmethod(on_subclass)  # type: ignore[assignment]


def _unpatch() -> None:
    wrapped, _watch.wrapped = _watch.wrapped, []
    for kind, original, wrapper in wrapped:
        if kind.__dict__.get("__init__") is wrapper:
            kind.__init__ = original  # type: ignore[misc]
    if "__init_subclass__" in torch.nn.Module.__dict__:
        del torch.nn.Module.__init_subclass__
    _watch.under_construction.clear()
    _watch.begun.clear()


def _subclasses(base: type) -> Iterator[type]:
    seen: set[type] = set()
    waiting = [base]
    while waiting:
        found: list[type] = type.__subclasses__(waiting.pop())
        for kind in found:
            if kind not in seen:
                seen.add(kind)
                waiting.append(kind)
                yield kind


def _wrap(kind: type) -> None:
    original = kind.__dict__.get("__init__")
    if original is None or not callable(original) or kind.__module__.startswith("torch.jit"):
        return

    @functools.wraps(original)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        if threading.get_ident() != _watch.thread or id(self) in _watch.under_construction:
            original(self, *args, **kwargs)
            return
        _watch.under_construction.add(id(self))
        try:
            original(self, *args, **kwargs)
        finally:
            _watch.under_construction.discard(id(self))
        if _watch.listeners:
            _watch.listeners[-1](self)

    _watch.wrapped.append((kind, original, construct))
    kind.__init__ = construct  # type: ignore[misc]


def set_constructors(functions: dict[str, Callable[..., torch.Tensor]]) -> dict[str, Callable[..., torch.Tensor]]:
    """Puts ``functions`` in the place of torch's constructors; returns those before, to be set back."""
    before = {name: getattr(torch, name) for name in functions}
    for name, function in functions.items():
        setattr(torch, name, function)
    return before


@contextlib.contextmanager
def plain_constructors() -> Iterator[None]:
    """Torch's own constructors, for our code that runs inside ``zero.Init``."""
    before = set_constructors(ORIGINALS)
    try:
        yield
    finally:
        set_constructors(before)
