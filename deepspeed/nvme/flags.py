"""What both commands' flags have in common."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence

import torch

from deepspeed.errors import ConfigError, MissingFeatureError
from deepspeed.nvme.sizes import parse_nbytes

__all__ = ["check_folder", "nbytes_flag", "refuse_gds", "require_gpu", "run_command"]


def nbytes_flag(text: str) -> int:
    """The argparse type of a size."""
    try:
        return parse_nbytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def refuse_gds(flag: str) -> None:
    """Raises ``MissingFeatureError``."""
    raise MissingFeatureError(
        f"{flag}: GPUDirect Storage is not in this version; without it, --gpu moves data through host memory"
    )


def require_gpu() -> None:
    """Raises ``ConfigError`` where no CUDA device is."""
    if not torch.cuda.is_available():
        raise ConfigError("--gpu: torch finds no CUDA device here; leave the flag out to measure host memory")


def check_folder(folder: str, flag: str) -> str:
    """The folder, if files can be made in it. Raises ``ConfigError``."""
    if not os.path.isdir(folder):
        raise ConfigError(f"{flag}: {folder!r} is not a folder; make it, or name one on the disk to measure")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{flag}: cannot make files in {folder!r} (no permission)")
    return folder


def run_command(command: Callable[[Sequence[str] | None], None], args: Sequence[str] | None, name: str) -> int:
    """Runs a command: 0, or 1 after one line that says what is wrong."""
    try:
        command(args)
    except (ConfigError, OSError) as error:
        raise SystemExit(f"{name}: error: {error}") from error
    return 0
