"""Weights in a stage 3 folder, by name: masters in the optimizer files, frozen parameters in pieces in the model files.

Everything is memory-mapped; only the ranges that are asked for are read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from deepspeed._core.ckpt.io import load_file
from deepspeed._core.ckpt.native import check_format, model_states_name, optim_states_paths
from deepspeed._core.ckpt.reader import MASTER, NativeZeroReader, ZeroReader
from deepspeed._core.ckpt.universal import UniversalReader, is_universal
from deepspeed._core.layout.spans import ShardLayout, Span
from deepspeed.errors import CheckpointError

__all__ = ["PartitionedWeights", "is_partitioned"]


def is_partitioned(tag_dir: str | os.PathLike[str], mp_rank: int = 0) -> bool:
    """Whether the folder holds a model file for each rank, as stage 3 writes them."""
    folder = Path(tag_dir)
    whole, own = model_states_name(mp_rank), model_states_name(mp_rank, dp_rank=0)
    return not (folder / whole).is_file() and (folder / own).is_file()


class PartitionedWeights:
    """A stage 3 folder, opened for its weights. Not collective.

    Attributes:
        reader: its optimizer state; None if it was saved without an optimizer.
        world_size: number of ranks that saved it.
        shapes: true shapes of all partitioned parameters, trained and frozen.
        aliases: further names of tied parameters, and which name of ``shapes`` they stand for.

    Raises:
        CheckpointError: files are missing, damaged or contradict each other.
    """

    def __init__(self, tag_dir: str | os.PathLike[str], mp_rank: int = 0) -> None:
        self.tag_dir = Path(tag_dir)
        self._mp_rank = mp_rank
        self.reader: ZeroReader | None = None
        if is_universal(tag_dir, mp_rank):
            self.reader = UniversalReader(tag_dir, mp_rank=mp_rank)
        elif optim_states_paths(tag_dir, mp_rank):
            self.reader = NativeZeroReader(tag_dir, mp_rank=mp_rank)
        first = self._first = self._model_file(0)
        if self.reader is None and first.get("param_shapes"):
            raise CheckpointError(
                f"{self.tag_dir} was saved with ZeRO stage 3, which keeps trained weights in the optimizer files, but no "
                "*_optim_states.pt file is there; copy the whole folder"
            )
        self.world_size = self.reader.world_size if self.reader is not None else int(first.get("dp_world_size") or 1)
        missing = [rank for rank in range(self.world_size) if not self._path(rank).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.tag_dir}: expected model files of {self.world_size} ranks, but those of rank "
                f"{', '.join(map(str, missing))} are missing"
            )
        groups = self.reader.groups if self.reader is not None else ()
        self._trained = {name: shape for group in groups for name, shape in group.shapes.items()}
        frozen = {name: tuple(shape) for name, shape in (first.get("frozen_param_shapes") or {}).items()}
        self._fragments = self._read_fragments(first, frozen)
        self.shapes: dict[str, tuple[int, ...]] = {**frozen, **self._trained}
        shared = first.get("shared_params") or {}
        self.aliases: dict[str, str] = {alias: name for alias, name in shared.items() if name in self.shapes}

    def __contains__(self, name: object) -> bool:
        return name in self.shapes or name in self.aliases

    def shape(self, name: str) -> tuple[int, ...]:
        """True shape of a parameter, by any of its names."""
        return self.shapes[self.aliases.get(name, name)]

    def model_file(self, rank: int) -> tuple[Path, dict[str, Any]]:
        """The model file of a rank that saved; that of rank 0 for ranks that did not."""
        rank = rank if rank < self.world_size else 0
        state = self._model_file(rank) if rank else self._first
        for key in ("global_steps", "dp_world_size"):
            if state.get(key) != self._first.get(key):
                raise CheckpointError(
                    f"{self._path(rank)} has {key} {state.get(key)}, {self._path(0).name} has {self._first.get(key)}: the "
                    "folder mixes two saves"
                )
        return self._path(rank), state

    def fill(self, name: str, begin: int, out: torch.Tensor) -> None:
        """Copies elements ``[begin, begin + out.numel())`` of a parameter into ``out`` (1-D, any dtype and device).

        Raises:
            CheckpointError: the files do not hold them.
        """
        name = self.aliases.get(name, name)
        if not out.numel():
            return
        if name in self._trained and self.reader is not None:
            layout = ShardLayout(1, (out.numel(),), (Span(name, begin, 0, 0, out.numel()),))
            self.reader.fill(None, MASTER, layout, 0, out)
            return
        with torch.no_grad():
            at = 0
            for piece in self._fragments[name]:
                low, high = max(begin, at), min(begin + out.numel(), at + piece.numel())
                if low < high:
                    out[low - begin : high - begin].copy_(piece[low - at : high - at])
                at += piece.numel()

    def whole(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A parameter in memory of its own, on the CPU."""
        shape = self.shape(name)
        out = torch.empty(prod(shape), dtype=dtype)
        self.fill(name, 0, out)
        return out.view(shape)

    def _path(self, rank: int) -> Path:
        return self.tag_dir / model_states_name(self._mp_rank, dp_rank=rank)

    def _model_file(self, rank: int) -> dict[str, Any]:
        state = self.reader.model_state if self.reader is not None and not rank else load_file(self._path(rank))
        if not isinstance(state, dict) or not isinstance(state.get("module"), Mapping):
            raise CheckpointError(f"{self._path(rank)}: expected a dict with the model's entries under 'module'")
        check_format(state, self._path(rank))
        return state

    def _read_fragments(
        self, first: dict[str, Any], frozen: Mapping[str, tuple[int, ...]]
    ) -> dict[str, list[torch.Tensor]]:
        if not frozen:
            return {}
        files = [first, *(self._model_file(rank) for rank in range(1, self.world_size))]
        fragments: dict[str, list[torch.Tensor]] = {}
        for name, shape in frozen.items():
            pieces = [(file.get("frozen_param_fragments") or {}).get(name) for file in files]
            held = [piece.reshape(-1) for piece in pieces if torch.is_tensor(piece)]
            if len(held) < len(pieces) or sum(piece.numel() for piece in held) < prod(shape):
                raise CheckpointError(
                    f"{self.tag_dir}: the frozen parameter {name!r} of shape {shape} is not complete in the model files of "
                    f"{self.world_size} ranks"
                )
            fragments[name] = held
        return fragments
