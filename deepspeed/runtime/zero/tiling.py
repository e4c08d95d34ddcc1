"""Memory-centric tiling: a linear layer as a grid of smaller ones, which ZeRO-3 fetches and releases one at a time.

Source: API documents, section "Memory-Centric Tiling"; ZeRO-Infinity (arXiv:2104.07857), section 5.1.3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from deepspeed.runtime.zero.partition_parameters import GatheredParameters

__all__ = ["TiledLinear", "TiledLinearReturnBias"]

Tensors: TypeAlias = torch.Tensor | Sequence[torch.Tensor]


def _sizes(name: str, features: int, splits: int) -> tuple[int, ...]:
    """``features`` in ``splits`` parts whose sizes differ by one at most, larger ones first."""
    if not isinstance(splits, int) or not 1 <= splits <= features:
        raise ValueError(
            f"{name}_splits: expected a whole number from 1 to {name}_features = {features}, got {splits!r}"
        )
    small, large = divmod(features, splits)
    return (small + 1,) * large + (small,) * (splits - large)


class _Tile(nn.Linear):
    """A linear layer that is initialised as a piece of a larger one: the bound depends on the larger one's inputs."""

    def __init__(self, in_features: int, out_features: int, whole_in_features: int, **kwargs: Any) -> None:
        self.whole_in_features = whole_in_features  # the constructor below initialises, and needs it
        super().__init__(in_features, out_features, **kwargs)

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.whole_in_features)
        for param in self.parameters(recurse=False):
            nn.init.uniform_(param, -bound, bound)


def _is_plain(tile: nn.Module) -> bool:
    """Whether calling the tile runs ``torch.nn.Linear.forward``, whose result nothing else holds on to."""
    return getattr(type(tile), "forward", None) is nn.Linear.forward and "forward" not in vars(tile)


class TiledLinear(nn.Module):
    """A replacement of ``torch.nn.Linear`` that computes tile after tile.

    The weight, (``out_features``, ``in_features``), is cut into ``out_splits`` x ``in_splits`` tiles, as even as possible;
    each is a module of its own in ``tiles``, row by row (tile ``[o, i]`` is ``tiles[o * in_splits + i]``). So under ZeRO-3
    only one tile's weight and gradient need to be in memory at a time. Use as few tiles as will do: each costs a
    gather of its own, and small matrix products are slower.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        bias: whether there is one; the first tile of each row carries the row's part of it.
        in_splits, out_splits: number of tiles along the input and the output; from 1 to the number of features.
        input_is_already_split: ``forward`` takes a list of ``in_splits`` tensors instead of one tensor.
        combine_out_splits: false makes ``forward`` return the list of ``out_splits`` outputs, not joined.
        linear_cls: class of the tiles, called as ``linear_cls(in_features, out_features, bias=..., **kwargs)``. Tiles
            of the default class are initialised like the whole ``torch.nn.Linear``; others as their class does it.
        init_linear: a linear layer of the whole size to copy the parameters from; see :meth:`copy_params_from`.
        kwargs: passed on to ``linear_cls``, for instance ``dtype`` and ``device``.

    Raises ``ValueError`` for a number of splits out of range.
    """

    # For ZeRO-3's planner: the children are units of their own, also inside a block that is otherwise fetched at once.
    _z3_fetch_separately = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        in_splits: int = 1,
        out_splits: int = 1,
        input_is_already_split: bool = False,
        combine_out_splits: bool = True,
        linear_cls: Callable[..., nn.Module] = nn.Linear,
        init_linear: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = bool(bias)
        self.in_splits = in_splits
        self.out_splits = out_splits
        self.in_sizes = _sizes("in", in_features, in_splits)
        self.out_sizes = _sizes("out", out_features, out_splits)
        self.input_is_already_split = input_is_already_split
        self.combine_out_splits = combine_out_splits
        if linear_cls is nn.Linear:
            linear_cls, kwargs = _Tile, {"whole_in_features": in_features, **kwargs}
        self.tiles = nn.ModuleList(
            linear_cls(ins, outs, bias=self.use_bias and column == 0, **kwargs)
            for outs in self.out_sizes
            for column, ins in enumerate(self.in_sizes)
        )
        if init_linear is not None:
            self.copy_params_from(init_linear)

    def forward(self, input_: Tensors) -> Any:
        """``input_``: (..., ``in_features``), or with ``input_is_already_split`` the list of its parts along the last
        dimension. Returns (..., ``out_features``), or with ``combine_out_splits=False`` the list of its parts.

        Raises ``ValueError`` for an input of another size.
        """
        return self._compute(input_)[0]

    def copy_params_from(self, other: nn.Module) -> None:
        """Copies weight and bias from a layer of the whole size. A bias is left out if this layer has none.

        Collective under ZeRO-3, for partitioned parameters of either layer: every rank has data-parallel rank 0's values
        afterwards. ``other`` is whole meanwhile, and one tile at a time.

        Raises ``ValueError`` if ``other`` does not fit, before anything is copied.
        """
        weight = _param(other, "weight", (self.out_features, self.in_features))
        bias = _param(other, "bias", (self.out_features,)) if self.use_bias else None
        for tile, rows, columns in self._grid():
            _param(tile, "weight", (len(rows), len(columns)))
            if self.use_bias and columns.start == 0:
                _param(tile, "bias", (len(rows),))
        with torch.no_grad(), GatheredParameters([weight, bias]):
            for tile, rows, columns in self._grid():
                # Each rank writes: right for whole parameters, and of partitioned ones rank 0's values are kept.
                with GatheredParameters(tile.parameters(recurse=False), modifier_rank=0):
                    of_tile: Any = tile.weight
                    of_tile.copy_(weight[rows.start : rows.stop, columns.start : columns.stop])
                    of_tile = getattr(tile, "bias", None)
                    if bias is not None and columns.start == 0:
                        of_tile.copy_(bias[rows.start : rows.stop])
                    elif of_tile is not None:  # of a class that has one although it was told not to
                        of_tile.zero_()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.use_bias}, "
            f"in_splits={self.in_splits}, out_splits={self.out_splits}"
        )

    def _grid(self) -> Iterator[tuple[nn.Module, range, range]]:
        """Each tile with the rows and the columns of the whole weight that it holds."""
        ends = [(0, *itertools.accumulate(sizes)) for sizes in (self.out_sizes, self.in_sizes)]
        parts = [[range(a, b) for a, b in itertools.pairwise(edges)] for edges in ends]
        for tile, (rows, columns) in zip(self.tiles, itertools.product(*parts), strict=True):
            yield tile, rows, columns

    def _compute(self, input_: Tensors) -> tuple[Any, list[torch.Tensor]]:
        """The output as ``forward`` documents it, and the biases that tiles returned apart from it."""
        parts = self._checked(input_)
        lead = parts[0].shape[:-1]
        # As matrices, whose products are no views: partial sums can then be added in place, backward hands one gradient
        # on to all of them without copies, and parts of the input are saved as views of it.
        fold = all(_is_plain(tile) for tile in self.tiles)
        if fold:
            parts = [part.reshape(-1, part.shape[-1]) for part in parts]
        if not self.input_is_already_split:
            parts = parts[0].split(self.in_sizes, dim=-1)
        tiles = list(self.tiles)
        outputs, biases = [], []
        for row in range(self.out_splits):  # row by row: one partial sum is held, not one for each row
            output, bias = self._row(tiles[row * self.in_splits :][: self.in_splits], parts, in_place=fold)
            outputs.append(output)
            biases += bias
        if self.combine_out_splits and self.out_splits > 1:
            outputs = [torch.cat(outputs, dim=-1)]
        if fold:
            outputs = [output.view(*lead, output.shape[-1]) for output in outputs]
        return (outputs[0] if self.combine_out_splits else outputs), biases

    def _row(
        self, tiles: Sequence[nn.Module], parts: Sequence[torch.Tensor], in_place: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The sum over one row of tiles. ``in_place``: nothing else holds the tiles' outputs."""
        total: torch.Tensor | None = None
        biases: list[torch.Tensor] = []
        for tile, part in zip(tiles, parts, strict=True):
            output, bias = self._call(tile, part)
            if bias is not None:
                biases.append(bias)
            if total is None:
                total = output
            elif in_place and total._base is None and total.dtype == output.dtype:
                total.add_(output)
            else:  # a full backward hook makes the output a view, which must not be written to
                total = total + output
        if total is None:
            raise AssertionError("a row without tiles")
        return total, biases

    def _call(self, tile: nn.Module, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output = tile(part)
        if not isinstance(output, torch.Tensor):
            raise TypeError(
                f"{type(tile).__name__} returned {type(output).__name__}, expected a tensor; for layers that return "
                "(output, bias) use TiledLinearReturnBias"
            )
        return output, None

    def _checked(self, input_: Tensors) -> Sequence[torch.Tensor]:
        """The input as the list of its tensors, one if it is not split, after a look at their sizes."""
        if not self.input_is_already_split:
            if not isinstance(input_, torch.Tensor) or input_.shape[-1:] != (self.in_features,):
                raise ValueError(f"input: expected a tensor (..., {self.in_features}), got {_describe(input_)}")
            return [input_]
        expected = [(size,) for size in self.in_sizes]
        if isinstance(input_, torch.Tensor) or [tuple(part.shape[-1:]) for part in input_] != expected:
            raise ValueError(
                f"input (input_is_already_split=True): expected a list of {self.in_splits} tensors with last dimensions "
                f"{self.in_sizes}, got {_describe(input_)}"
            )
        return list(input_)


class TiledLinearReturnBias(TiledLinear):
    """Tiles of a ``linear_cls`` whose forward returns ``(output, bias)`` and leaves adding the bias to the caller.

    ``forward`` returns ``(output, bias)``: the output as :class:`TiledLinear`, the bias joined, (``out_features``,), or as
    a list with ``combine_out_splits=False``, or ``None`` if no tile returned one.
    """

    def forward(self, input_: Tensors) -> tuple[Any, Any]:
        """See the class; ``input_`` as :meth:`TiledLinear.forward`."""
        output, biases = self._compute(input_)
        if not biases:
            return output, None
        return output, (torch.cat(biases) if self.combine_out_splits else biases)

    def _call(self, tile: nn.Module, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        result = tile(part)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"{type(tile).__name__} returned {type(result).__name__}, expected a tuple (output, bias); for layers that "
                "return the output alone use TiledLinear"
            )
        return result


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"{len(value)} of them: {', '.join(_describe(item) for item in value)}"
    return type(value).__name__


def _param(layer: nn.Module, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A parameter that must have this shape; ``ds_shape`` is that of the whole where ZeRO-3 has partitioned it."""
    param = getattr(layer, name, None)
    found = tuple(getattr(param, "ds_shape", param.shape)) if isinstance(param, torch.Tensor) else None
    if not isinstance(param, torch.Tensor) or found != shape:
        raise ValueError(f"{type(layer).__name__}.{name}: expected a tensor {shape}, got {found or 'none'}")
    return param
