"""What this process is doing, as plain attributes that the training thread writes and the doctor's thread reads.

There is one record a process, as torch.distributed is one per process. Writing costs tens of nanoseconds and takes no
lock: a reader may see a step and a module of two neighbouring moments, which is good enough for a report.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch

from .blackbox import Page
from .evidence import DeviceMark

__all__ = ["Now", "Wait", "at", "collective", "now", "operation", "waiting"]


class Now:
    """The present moment of this process. Write the first four from anywhere; the rest belongs to this file."""

    def __init__(self) -> None:
        #: Optimizer steps that this rank has finished; -1 where nothing tells.
        self.step = -1
        #: What the engine does, e.g. ``"forward"``; empty between its calls.
        self.phase = ""
        #: Path of the module that runs, and name of the parameter that was worked on last.
        self.module = ""
        self.parameter = ""
        #: The collective that was started last, its bytes, and how many were started: the same program gives the same
        #: number at the same place on every rank.
        self.op = ""
        self.nbytes = 0
        self.count = 0
        #: Grows whenever a wait ends well.
        self.moves = 0
        #: Open waits, the outermost first.
        self.waits: list[Wait] = []
        #: Whether a doctor reads this; off, every mark is one attribute read.
        self.on = False
        #: Where the last collective is noted for those who outlive this process.
        self.page: Page | None = None
        #: Put on the device's queue after each wait, where a wait does not block the host (NCCL).
        self.device: DeviceMark | None = None
        #: Gets an exception that ends a wait.
        self.on_failure: Callable[[BaseException], None] | None = None

    def reset(self) -> None:
        """Nobody reads this any more."""
        self.on, self.on_failure, self.page, self.device = False, None, None, None


now = Now()


class Wait:
    """A stretch of time in which this process may depend on others. Use as a context; each object once."""

    __slots__ = ("detail", "group", "nbytes", "op", "since_s")

    def __init__(self, op: str, nbytes: int, group: Any, detail: str) -> None:
        self.op = op
        self.nbytes = nbytes
        #: The process group; ``None`` is the world.
        self.group = group
        self.detail = detail
        self.since_s = 0.0

    def __enter__(self) -> Wait:
        self.since_s = time.monotonic()
        now.waits.append(self)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with contextlib.suppress(ValueError):
            # Not pop(): autograd's threads wait at the same time as the main one.
            now.waits.remove(self)
        if error is None:
            now.moves += 1
            device = now.device
            if device is not None:
                device.put()
        elif now.on_failure is not None:
            now.on_failure(error)


_NO_WAIT = contextlib.nullcontext()


def at(
    step: int | None = None, phase: str | None = None, module: str | None = None, parameter: str | None = None
) -> None:
    """Notes where this process is; what is not given stays. In hot places write to ``now`` directly."""
    if step is not None:
        now.step = step
    if phase is not None:
        now.phase = phase
    if module is not None:
        now.module = module
    if parameter is not None:
        now.parameter = parameter


def waiting(op: str, detail: str = "", *, nbytes: int = 0, group: Any = None) -> Wait | contextlib.nullcontext[None]:
    """Marks a blocking wait for other ranks: ``with doctor.waiting("reduce_scatter", "bucket 3"): work.wait()``.

    ``detail`` tells what it is about, the same on all ranks that take part, since a difference is taken for a divergence.
    ``group`` is the process group that is waited for (``None``: the world). For what :mod:`deepspeed.comm` does itself,
    and for ``Pending.wait``, this is done already.
    """
    return Wait(op, nbytes, group, detail) if now.on else _NO_WAIT


def collective(op: str, nbytes: int = 0, group: Any = None, detail: str = "") -> Wait | contextlib.nullcontext[None]:
    """As :func:`waiting`, for the call that starts a collective: counts it, unless it is a part of a marked one."""
    if not now.on:
        return _NO_WAIT
    if not now.waits:
        now.op = op
        now.nbytes = nbytes
        now.count += 1
        page = now.page
        if page is not None:
            page.write(now.count, nbytes, now.step, op, now.phase, now.module, now.parameter)
    return Wait(op, nbytes, group, detail)


def operation(op: str, args: tuple[Any, ...], group: Any) -> Wait | contextlib.nullcontext[None]:
    """:func:`collective` for a call of torch.distributed's style, whose buffers come first."""
    return collective(op, 0 if now.waits else max((_nbytes(value) for value in args[:2]), default=0), group)


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list):
        return sum(item.numel() * item.element_size() for item in value if isinstance(item, torch.Tensor))
    return 0
