"""Reading and writing checkpoint files: whole or not at all, and never running code that a file names.

Writing goes to a temporary name in the same folder, then fsync, then rename, so that a reader (or a crash) sees the old
file or the new one. Reading uses torch's ``weights_only`` unpickler with a short list of further names; the classes
that the reference package pickles come back as inert values, and any other class refuses the file.
"""

from __future__ import annotations

import argparse
import codecs
import functools
import os
import pickle
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from deepspeed.errors import CheckpointError

__all__ = [
    "FragmentAddress",
    "InertObject",
    "atomic_save",
    "atomic_write_text",
    "fsync_folder",
    "load_file",
    "refused",
]

StrPath = str | os.PathLike[str]


class InertObject:
    """Stands for an instance of a class that a checkpoint file names: its attributes, none of its behaviour."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in sorted(vars(self).items()))})"


class _LossScalerState(InertObject):
    """Attributes of a pickled loss scaler (``cur_scale``, ``dynamic``; for a dynamic one also window, hysteresis)."""


@dataclass
class FragmentAddress:
    """``numel`` elements at ``start`` of a flat buffer, as files record it in ``param_slice_mappings``."""

    numel: int = 0
    start: int = 0


# Names in files of the reference package (0.14 to 0.19) -> what is built in their place. The stage enum is a plain int:
# only its number matters, and files of this package store a number too.
_REFERENCE_GLOBALS: dict[str, Callable[..., Any]] = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _LossScalerState,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _LossScalerState,
    "deepspeed.runtime.fp16.loss_scaler.LossScalerBase": _LossScalerState,
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "deepspeed.utils.tensor_fragment.fragment_address": FragmentAddress,
}


def _client_globals() -> dict[str, Callable[..., Any]]:
    """What client state holds besides plain values: argparse namespaces, numpy numbers, strings and arrays of those.

    All of these only build values. Arrays of objects and records stay refused. The two numpy builders are taken from
    what a scalar and an array name for themselves; files carry the module spelling of the numpy that wrote them.
    """
    names: dict[str, Callable[..., Any]] = {
        "argparse.Namespace": argparse.Namespace,
        "_codecs.encode": codecs.encode,  # how bytes are spelled in pickle protocol 2, which torch.save uses
        "builtins.bytes": bytes,  # and empty ones
        "builtins.frozenset": frozenset,
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
    }
    for package in ("numpy.core", "numpy._core"):
        names[f"{package}.multiarray.scalar"] = cast("Callable[..., Any]", np.float64(0).__reduce__()[0])
        names[f"{package}.multiarray._reconstruct"] = cast("Callable[..., Any]", np.zeros(0).__reduce__()[0])
    for kind in np.dtypes.__all__:
        if kind not in ("ObjectDType", "VoidDType"):
            names[f"numpy.dtypes.{kind}"] = getattr(np.dtypes, kind)
    return names


def load_file(
    path: StrPath,
    *,
    mmap: bool = True,
    map_location: Any = "cpu",
    classes: Mapping[str, Callable[..., Any]] | None = None,
) -> Any:
    """Load what ``torch.save`` wrote, executing nothing that the file names beyond a fixed list.

    Args:
        path: the file.
        mmap: map tensors instead of reading them; only the bytes that are used are read. The mapping is private:
            writing to a loaded tensor does not change the file.
        map_location: as in ``torch.load``.
        classes: further dotted names -> what to build for them; they go before the inert stand-ins of this module.

    Returns:
        The object. Loss scalers of the reference are ``InertObject``, fragment addresses ``FragmentAddress``, ZeRO
        stages ``int``.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or names a class that is not on the list (the message
            names it).
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a checkpoint file written by torch.save, but there is no such file")
    allowed = {**_client_globals(), **_REFERENCE_GLOBALS, **(classes or {})}
    try:
        with path.open("rb") as stream:
            is_zip = stream.read(4) == b"PK\x03\x04"
        # The format of torch before 1.6 is no zip archive and cannot be mapped.
        load = functools.partial(torch.load, path, map_location=map_location, weights_only=True, mmap=mmap and is_zip)
        if is_zip and not classes:
            # Most files name nothing but what torch knows, and torch looks through a list once a tensor.
            with suppress(pickle.UnpicklingError):
                return load()
        with torch.serialization.safe_globals([(build, name) for name, build in allowed.items()]):
            return load()
    except MemoryError:
        raise
    except Exception as error:
        raise CheckpointError(_explain(path, error, allowed)) from error


def _explain(path: Path, error: Exception, allowed: Mapping[str, Callable[..., Any]]) -> str:
    size = path.stat().st_size if path.exists() else 0
    if isinstance(error, pickle.UnpicklingError):
        with suppress(Exception):  # a damaged pickle cannot be listed either: then the general message holds
            named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            foreign = sorted(name for name in named if name not in allowed)
            if foreign:
                return (
                    f"{path} was not loaded: it names {', '.join(foreign)}, and loading builds plain values, tensors "
                    "and a few known classes only, since a pickled class can run any code. If you trust the file, "
                    "load it with torch.load(..., weights_only=False) and save it again with plain values."
                )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"{path} ({size} bytes): expected a complete file written by torch.save, but it is truncated, damaged or "
        f"something else ({type(error).__name__}: {reason}). Copy it again, or load another tag."
    )


def atomic_save(obj: Any, path: StrPath) -> None:
    """``torch.save(obj, path)`` that leaves the old file or the complete new one, whatever happens.

    A view is saved with the whole storage behind it, as always with ``torch.save``: clone views first.
    """
    with _replacing(Path(path)) as stream:
        torch.save(obj, stream)


def atomic_write_text(path: StrPath, text: str, *, mode: int | None = None, scratch: Path | None = None) -> None:
    """Write ``text`` (UTF-8, newlines as given) so that readers see the old content or the new one.

    Args:
        path: the file.
        text: its content.
        mode: permission bits, such as 0o755 for a script; None leaves them to the umask.
        scratch: the temporary file, in the same folder; None makes up a name.
    """
    with _replacing(Path(path), mode, scratch) as stream:
        stream.write(text.encode("utf-8"))


def refused(names: Iterable[str]) -> list[str]:
    """Those names of classes and functions that :func:`load_file` would refuse."""
    known = {**_client_globals(), **_REFERENCE_GLOBALS}
    return sorted(name for name in names if name not in known)


@contextmanager
def _replacing(path: Path, mode: int | None = None, scratch: Path | None = None) -> Iterator[IO[bytes]]:
    """A stream whose content becomes ``path`` when the block ends well, and leaves nothing behind when it does not."""
    # Same folder: a rename across file systems is a copy. Random: two runs may write the same path. Not mkstemp: it
    # makes the file private, and colleagues who share the folder could not load it.
    scratch = scratch or path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with scratch.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if mode is not None:
            scratch.chmod(mode)
        os.replace(scratch, path)
        fsync_folder(path.parent)
    except BaseException:
        with suppress(FileNotFoundError):
            scratch.unlink()
        raise


def fsync_folder(folder: Path) -> None:
    """Make a rename durable. Some network file systems refuse this on folders; the rename stays atomic there."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)
