"""A tile: the elements of a shard that the optimizer updates as one tensor, and where they lie in a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from deepspeed._core.aio.memory import PAGE_NBYTES
from deepspeed._core.reduce.bucket import Bucket

__all__ = ["MASTER", "Field", "Region", "Tile", "absent", "cut", "is_elementwise", "make_region"]

MASTER = "master"
"""The field that holds the fp32 weights; the others are named by the optimizer."""

# Tiles begin at multiples of this, so that vector loops have their remainders where those over the whole shard have them.
_ALIGN_NUMEL = 1 << 10
_LEAST_ALIGN_NUMEL = 64
# Fields begin at another offset in the page each: streams in step with each other would meet in the same cache sets.
_STAGGER_NBYTES = 1088
_FIELD_ALIGN_NBYTES = 64


class Field(NamedTuple):
    """One value an element: its name, dtype, and first byte in the region."""

    name: str
    dtype: torch.dtype
    begin: int

    def view(self, buffer: torch.Tensor, numel: int) -> torch.Tensor:
        """Its elements in a buffer (uint8, 1-D) that holds the region."""
        return buffer[self.begin : self.begin + numel * self.dtype.itemsize].view(self.dtype)


@dataclass(frozen=True)
class Region:
    """The bytes of a tile in a file: its fields, one after the other. Offset and size are whole pages."""

    offset: int
    nbytes: int
    fields: tuple[Field, ...]

    def find(self, name: str) -> Field:
        """The field of that name; ``KeyError`` if there is none."""
        for known in self.fields:
            if known.name == name:
                return known
        raise KeyError(name)


@dataclass(eq=False)
class Tile:
    """Elements ``[begin, begin + numel)`` of a bucket's shard.

    Attributes:
        param: 1-D, of the true shape at all times; the key of ``optimizer.state``. While its values are elsewhere it reads
            as NaN, like the state tensors of ``optimizer.state[param]``.
        region: its place in a file; None if it is always in memory.
    """

    bucket: Bucket
    begin: int
    numel: int
    param: torch.Tensor
    region: Region | None = field(default=None, repr=False)

    @property
    def end(self) -> int:
        """One past its last element in the shard."""
        return self.begin + self.numel


def absent(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of that shape which holds nothing: it reads as NaN, and writing to it in place raises."""
    if not numel:
        return torch.empty(0, dtype=dtype)
    return torch.full((1,), math.nan, dtype=dtype).expand(numel)


def is_elementwise(value: Any) -> bool:
    """Whether a state of a flat tensor has a value for each element."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def cut(numel: int, limit_numel: int) -> list[tuple[int, int]]:
    """``(begin, numel)`` of tiles of at most ``limit_numel`` elements each, rounded up to a multiple of 64 or 1024. Pure.

    As few as there can be, of nearly equal size: kernels choose their loop by the size of a tensor, and a small rest would
    be rounded otherwise than the whole.
    """
    count = max(1, -(-numel // max(1, limit_numel)))
    size = -(-numel // count)
    align = _ALIGN_NUMEL if size >= _ALIGN_NUMEL else _LEAST_ALIGN_NUMEL
    size = max(align, -(-size // align) * align)
    return [(begin, min(size, numel - begin)) for begin in range(0, numel, size)] or [(0, 0)]


def make_region(offset: int, numel: int, dtypes: Mapping[str, torch.dtype]) -> Region:
    """Lays out the fields of ``numel`` elements from byte ``offset`` (a whole page) of a file on. Pure."""
    fields: list[Field] = []
    end = 0
    for name, dtype in dtypes.items():
        fields.append(Field(name, dtype, end))
        end = _round_up(end + numel * dtype.itemsize, _FIELD_ALIGN_NBYTES)
        if numel >= _ALIGN_NUMEL:
            end += _STAGGER_NBYTES
    last: Sequence[Field] = fields[-1:]
    nbytes = last[0].begin + numel * last[0].dtype.itemsize if last else 0
    return Region(offset, _round_up(nbytes, PAGE_NBYTES), tuple(fields))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
