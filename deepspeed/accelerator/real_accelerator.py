"""Chooses the accelerator of this process: once, at the first question, not at import."""

from __future__ import annotations

import os

from ..errors import ConfigError
from .abstract_accelerator import DeepSpeedAccelerator
from .cpu_accelerator import CPU_Accelerator
from .cuda_accelerator import CUDA_Accelerator

__all__ = ["get_accelerator", "set_accelerator"]

_KINDS: dict[str, type[DeepSpeedAccelerator]] = {"cpu": CPU_Accelerator, "cuda": CUDA_Accelerator}
_chosen: list[
    DeepSpeedAccelerator
] = []  # empty until chosen; a process has one answer, as torch has one current device


def get_accelerator() -> DeepSpeedAccelerator:
    """The accelerator of this process: what ``DS_ACCELERATOR`` (cpu or cuda) says, else CUDA where there is a device.

    Raises:
        ConfigError: ``DS_ACCELERATOR`` names something else, or cuda on a machine that has no usable CUDA device.
    """
    if not _chosen:
        _chosen.append(_choose(os.environ.get("DS_ACCELERATOR", "")))
    return _chosen[0]


def set_accelerator(accelerator: DeepSpeedAccelerator) -> None:
    """Makes ``accelerator`` the answer of :func:`get_accelerator` from now on."""
    if not isinstance(accelerator, DeepSpeedAccelerator):
        raise TypeError(f"set_accelerator expects a DeepSpeedAccelerator, got {type(accelerator).__name__}")
    _chosen[:] = [accelerator]


def _choose(wanted: str) -> DeepSpeedAccelerator:
    name = wanted.strip().lower()
    if not name:
        cuda = CUDA_Accelerator()
        return cuda if cuda.is_available() else CPU_Accelerator()
    if name not in _KINDS:
        raise ConfigError(
            f"DS_ACCELERATOR={wanted!r} is unknown: set it to one of {', '.join(sorted(_KINDS))}, or unset it to let "
            "the machine decide"
        )
    accelerator = _KINDS[name]()
    if not accelerator.is_available():
        raise ConfigError(
            f"DS_ACCELERATOR={wanted!r}, but torch finds no such device here: unset it, or set DS_ACCELERATOR=cpu"
        )
    return accelerator
