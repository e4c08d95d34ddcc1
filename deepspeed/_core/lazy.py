"""Lazy submodules (PEP 562), so that ``import deepspeed`` costs next to nothing and still has everything as attributes."""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

__all__ = ["attach", "load_now", "no_collection", "on_first_use"]


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Pauses the garbage collector while many small objects are made that stay.

    Importing our config models starts a full collection of everything that torch has on the heap: 100 ms of 230.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def attach(
    package: str,
    submodules: Iterable[str] = (),
    names: Mapping[str, str] | None = None,
    absent: Mapping[str, str] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` for a package.

    ``submodules`` are imported when first asked for. ``names`` maps an attribute to ``"module:attribute"``, or to
    ``"module"`` for a module under another name. ``absent`` says of names that programs may look for why they are not here.
    """
    known = set(submodules)
    elsewhere = dict(names or {})

    def __getattr__(name: str) -> Any:
        if name in elsewhere:
            module_name, _, attribute = elsewhere[name].partition(":")
            module = importlib.import_module(module_name)
            value = getattr(module, attribute) if attribute else module
        elif name in known:
            value = importlib.import_module(f"{package}.{name}")
        else:
            why = f": {absent[name]}" if absent and name in absent else ""
            raise AttributeError(f"module {package!r} has no attribute {name!r}{why}")
        # Cached as an ordinary attribute: the next access is free and mock.patch finds it.
        setattr(importlib.import_module(package), name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), *known, *elsewhere})

    return __getattr__, __dir__


class _OnFirstUse(types.ModuleType):
    """Stands for the module of its name, which is imported when an attribute is asked for."""

    def __getattr__(self, name: str) -> Any:
        load_now(self)
        return getattr(sys.modules[self.__name__], name)


def on_first_use(name: str) -> types.ModuleType:
    """The module ``name``, imported by the first use of an attribute. Type checkers want an import of their own."""
    return _OnFirstUse(name)


def load_now(*modules: types.ModuleType) -> None:
    """Imports what :func:`on_first_use` gave. Costs nothing where that has happened."""
    missing = [module.__name__ for module in modules if module.__name__ not in sys.modules]
    if missing:
        with no_collection():
            for name in missing:
                importlib.import_module(name)
