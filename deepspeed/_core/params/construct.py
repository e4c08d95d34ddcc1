"""Watching modules being constructed, for ``zero.Init``: what must be patched in torch meanwhile, and nothing after.

[Note: end of construction] A module's parameters may change until its outermost ``__init__`` has returned, and only a
wrapper around ``__init__`` sees that moment. So while a context is open each subclass of ``torch.nn.Module`` that defines
``__init__`` has a wrapper, new subclasses too; what is constructed past them (an ``__init__`` generated later, as by
``dataclass``) is found when the context ends, since every module passes through ``torch.nn.Module.__init__``.

[Note: borrowed parameters] A module's ``__init__`` may use what its children own, which is partitioned by then:
``torch.nn.MultiheadAttention`` zeroes the bias of its projection. A mode that sees every call of a torch function makes
such a parameter whole until that ``__init__`` ends, and rank 0's values are kept. If nothing refers to the data any more
when the next one is borrowed, it goes back then: a loop over all parameters borrows one at a time.

[Note: threads] Contexts belong to the thread that opened them. The patches are there for all threads, and do nothing in
those without a context.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from deepspeed._core.params.handle import ParamHandle, handle_of

__all__ = [
    "CONSTRUCTORS",
    "ORIGINALS",
    "Builder",
    "Loan",
    "building",
    "construction",
    "handles_among",
    "unwatched",
    "uses_data",
]

CONSTRUCTORS = ("tensor", "empty", "zeros", "ones", "full", "arange", "eye", "randn")
"""Functions of ``torch`` that make tensors of the context's dtype and device inside ``zero.Init``."""

ORIGINALS: dict[str, Callable[..., torch.Tensor]] = {name: getattr(torch, name) for name in CONSTRUCTORS}

unwatched = torch._C.DisableTorchFunction
"""Context for our own code inside ``zero.Init``: torch as it is."""

# Attributes of tensors through which their data is reached; all others are facts about them.
_DATA_ATTRIBUTES = {"data", "T", "mT", "H", "mH", "real", "imag"}
# Functions that need no data: a released parameter stays released.
_FACTS = {
    *("__deepcopy__", "__dir__", "__format__", "__hash__", "__len__", "__reduce_ex__", "__repr__", "_is_view"),
    *(
        "backward",
        "data_ptr",
        "dim",
        "element_size",
        "get_device",
        "has_names",
        "is_complex",
        "is_conj",
        "is_contiguous",
    ),
    *(
        "is_floating_point",
        "is_inference",
        "is_neg",
        "is_pinned",
        "is_same_size",
        "is_shared",
        "is_signed",
        "ndimension",
    ),
    *("nelement", "numel", "register_hook", "register_post_accumulate_grad_hook", "requires_grad_", "retain_grad"),
    *("size", "storage", "storage_offset", "stride", "untyped_storage"),
    *("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like"),
    *("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros"),
}


class Loan(abc.ABC):
    """Parameters that are whole for a while."""

    @abc.abstractmethod
    def unused(self) -> bool:
        """Whether nothing on any rank refers to their data. Collective."""

    @abc.abstractmethod
    def close(self, failed: bool) -> None:
        """Releases them; rank 0's values are kept unless ``failed``. Collective unless ``failed``."""


class Builder(abc.ABC):
    """What a context does with what is constructed in it."""

    constructors: Mapping[Callable[..., Any], Callable[..., Any]]
    """What is called in the place of torch's functions."""

    @abc.abstractmethod
    def constructed(self, module: torch.nn.Module) -> None:
        """The module's ``__init__`` has returned. Called children first, perhaps more than once."""

    @abc.abstractmethod
    def lend(self, handles: list[ParamHandle]) -> Loan:
        """Makes the parameters whole. Collective."""

    @abc.abstractmethod
    def lend_for_apply(self, module: torch.nn.Module) -> Loan | None:
        """For ``module.apply(fn)``, whose ``fn`` will use the module's own parameters. Collective."""


class _Here(threading.local):
    """What this thread constructs."""

    def __init__(self) -> None:
        self.builders: list[Builder] = []
        self.loans: list[list[Loan]] = []
        """Of each ``__init__`` that runs now, the innermost last."""
        self.under_construction: set[int] = set()
        self.begun: list[weakref.ref[torch.nn.Module]] = []


_here = _Here()


def building() -> bool:
    """Whether this thread constructs in a context."""
    return bool(_here.builders)


@contextlib.contextmanager
def construction(builder: Builder) -> Iterator[None]:
    """Tells ``builder`` what this thread constructs. Nested: the innermost builder is told.

    Patches are gone when the last context ends, however it ends.
    """
    _patches.take()
    _here.builders.append(builder)
    begun_before = len(_here.begun)
    try:
        with _Mode(builder), _loans():
            yield
            with unwatched():
                for known in _here.begun[begun_before:]:
                    module = known()
                    if module is not None and id(module) not in _here.under_construction:
                        builder.constructed(module)
    finally:
        del _here.begun[begun_before:]
        _here.builders.pop()
        _patches.give_back()


@contextlib.contextmanager
def _loans() -> Iterator[None]:
    """A time at whose end what is borrowed in it goes back."""
    loans: list[Loan] = []
    _here.loans.append(loans)
    failed = True
    try:
        yield
        failed = False
    finally:
        _here.loans.pop()
        if loans:
            with unwatched(), contextlib.ExitStack() as stack:
                for loan in loans:
                    stack.callback(loan.close, failed)


class _Mode(TorchFunctionMode):
    """Sees each call of a torch function; see [Note: borrowed parameters]."""

    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self.builder = builder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if _here.builders and _here.builders[-1] is self.builder:
            made = self.builder.constructors.get(func)
            if made is not None:
                return made(*args, **kwargs)
            if uses_data(func):
                released = [h for h in handles_among((*args, *kwargs.values())) if not h.available]
                if released:
                    self._borrow(released)
        return func(*args, **kwargs)

    def _borrow(self, handles: list[ParamHandle]) -> None:
        loans = _here.loans[-1]
        with unwatched():
            for loan in list(loans):
                if loan.unused():
                    loans.remove(loan)
                    loan.close(failed=False)
            loans.append(self.builder.lend([h for h in handles if not h.available]))


def uses_data(func: Any, *, assignments: bool = True) -> bool:
    """Whether a torch function, as a mode sees it, needs its arguments' data; ``assignments``: also ``tensor.data``."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        return attribute in _DATA_ATTRIBUTES and (assignments or attribute != "data")
    return name not in _FACTS


def handles_among(values: Any) -> list[ParamHandle]:
    """Handles of the partitioned parameters among the arguments of a function."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            handle = handle_of(value)
            if handle is not None:
                found.append(handle)
        elif isinstance(value, (list, tuple)):
            found += handles_among(value)
    return found


# -- patches -----------------------------------------------------------------------------------------------------------


class _Patches:
    """What is patched while any thread has a context."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._users = 0
        self._undo: list[tuple[type, str, Any, Any]] = []

    def take(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._apply()

    def give_back(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                undo, self._undo = self._undo, []
                for kind, name, before, ours in reversed(undo):
                    if kind.__dict__.get(name) is not ours:
                        continue  # someone else has patched it since, and will put our inert wrapper back
                    if before is None:
                        delattr(kind, name)
                    else:
                        setattr(kind, name, before)

    def _apply(self) -> None:
        base = torch.nn.Module
        self._set(base, "__init__", _beginning(base.__dict__["__init__"]))
        self._set(base, "apply", _lending_apply(base.__dict__["apply"]))
        self._set(base, "_save_to_state_dict", _unwatched(base.__dict__["_save_to_state_dict"]))
        for kind in _subclasses(base):
            self.wrap(kind)
        self._set(base, "__init_subclass__", classmethod(_wrap_subclass(base.__dict__.get("__init_subclass__"))))

    def _set(self, kind: type, name: str, ours: Any) -> None:
        self._undo.append((kind, name, kind.__dict__.get(name), ours))
        setattr(kind, name, ours)

    def wrap(self, kind: type) -> None:
        """Puts a wrapper around the class's own ``__init__``, if it has one."""
        original = kind.__dict__.get("__init__")
        if original is None or not callable(original) or kind.__module__.startswith("torch.jit"):
            return
        with self._lock:
            if self._users:
                self._set(kind, "__init__", _watched(original))


_patches = _Patches()


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


def _beginning(original: Callable[..., None]) -> Callable[..., None]:
    """``torch.nn.Module.__init__`` that notes the module."""

    @functools.wraps(original)
    def begin(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if _here.builders:
            _here.begun.append(weakref.ref(self))

    return begin


def _watched(original: Callable[..., None]) -> Callable[..., None]:
    """A subclass's ``__init__`` that tells the builder when the outermost one of a module has returned."""

    @functools.wraps(original)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        # No attribute of the module is looked up: it may have a __getattr__ that needs what __init__ sets.
        if not _here.builders or id(self) in _here.under_construction:
            original(self, *args, **kwargs)
            return
        _here.under_construction.add(id(self))
        try:
            with _loans():
                original(self, *args, **kwargs)
                with unwatched():
                    _here.builders[-1].constructed(self)
        finally:
            _here.under_construction.discard(id(self))

    return construct


def _lending_apply(original: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.nn.Module.apply`` that makes each module's own parameters whole around the call."""

    @functools.wraps(original)
    def apply(self: torch.nn.Module, fn: Callable[[torch.nn.Module], None]) -> torch.nn.Module:
        if not _here.builders:
            return original(self, fn)  # type: ignore[no-any-return]
        for child in self.children():
            child.apply(fn)
        with unwatched():
            loan = _here.builders[-1].lend_for_apply(self)
        failed = True
        try:
            fn(self)
            failed = False
        finally:
            if loan is not None:
                with unwatched():
                    loan.close(failed)
        return self

    return apply


def _unwatched(original: Callable[..., None]) -> Callable[..., None]:
    """A method that uses no parameter's data: a state dict shows released parameters on the meta device."""

    @functools.wraps(original)
    def method(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        with unwatched():
            original(self, *args, **kwargs)

    return method


def _wrap_subclass(original: Any) -> Callable[..., None]:
    def on_subclass(cls: type[torch.nn.Module], **kwargs: Any) -> None:
        if original is not None:
            original.__get__(None, cls)(**kwargs)
        else:
            super(torch.nn.Module, cls).__init_subclass__(**kwargs)
        _patches.wrap(cls)

    return on_subclass
