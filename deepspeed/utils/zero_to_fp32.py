#!/usr/bin/env python
"""Put the fp32 weights of a training checkpoint together into one state dict that plain PyTorch loads.

    python zero_to_fp32.py . output_folder

Every ZeRO checkpoint folder holds a copy of this script, so it stands alone: it needs torch 2.6 or later, neither
deepspeed nor a GPU nor the training script. Files of ZeRO stages 0 to 3 are read through a memory map and only values
are built from them (``weights_only``); the outputs are written one shard at a time, each atomically. safetensors are
written in blocks of a few megabytes, whatever the size of the model; .bin files need memory for one of them.

Trained weights come out in fp32 from the master copies, frozen ones in the dtype that they are stored in, floating
point buffers in fp32, and tied weights as one tensor under each of their names.

(Over the limit of 600 lines for that reason: it has to be one file, and repeats what the package does elsewhere.)
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import ctypes
import json
import os
import pickle
import re
import secrets
import struct
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import IO, Any, Protocol, TypeVar

import torch

__all__ = [
    "ZeroCheckpointError",
    "convert_zero_checkpoint_to_fp32_state_dict",
    "get_fp32_state_dict_from_zero_checkpoint",
    "get_model_state_file",
    "get_optim_files",
    "load_state_dict_from_zero_checkpoint",
]


class ZeroCheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or damaged; nothing was written when this is raised."""


# ---- Loading files without running what they name -------------------------------------------------------------------


class _Inert:
    """Stands for an instance of a pickled class: its attributes only."""

    numel: int
    start: int


_STAND_INS: dict[str, Callable[..., Any]] = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Inert,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _Inert,
    "deepspeed.runtime.fp16.loss_scaler.LossScalerBase": _Inert,
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "deepspeed.utils.tensor_fragment.fragment_address": _Inert,
    "argparse.Namespace": argparse.Namespace,
}


def _load(path: str) -> Any:
    """What ``torch.save`` wrote at ``path``, memory-mapped."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: expected a checkpoint file, but there is no such file")
    stand_ins = {**_STAND_INS, **_numpy_builders()}
    try:
        with torch.serialization.safe_globals([(build, name) for name, build in stand_ins.items()]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except MemoryError:
        raise
    except Exception as error:
        foreign: list[str] = []
        if isinstance(error, pickle.UnpicklingError):
            with contextlib.suppress(Exception):  # a damaged pickle cannot be listed
                named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
                foreign = sorted(name for name in named if name not in stand_ins)
        if foreign:
            raise ZeroCheckpointError(
                f"{path} was not loaded: it names {', '.join(foreign)}, and this script builds plain values and "
                "tensors only, since a pickled class can run any code. If you trust the file, load it with "
                "torch.load(..., weights_only=False) and save it again without that value."
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ZeroCheckpointError(
            f"{path} ({os.path.getsize(path)} bytes): expected a complete file written by torch.save, but it is "
            f"truncated, damaged or something else ({type(error).__name__}: {reason})"
        ) from error


def _can_be_mapped(path: str) -> bool:
    """Files of torch before 1.6 cannot; those of machines with another byte order change as they are loaded."""
    with open(path, "rb") as stream:
        if stream.read(4) != b"PK\x03\x04":
            return False
    with zipfile.ZipFile(path) as archive:
        orders = [archive.read(name) for name in archive.namelist() if name.endswith("/byteorder")]
    return orders in ([], [sys.byteorder.encode()])


def _numpy_builders() -> dict[str, Callable[..., Any]]:
    """Numbers, strings and arrays of numpy, which client state in the model file may hold."""
    try:
        import numpy as np  # noqa: PLC0415 - optional: torch runs without numpy
    except ImportError:
        return {}
    builders: dict[str, Any] = {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype, "_codecs.encode": codecs.encode}
    for package in ("numpy.core", "numpy._core"):
        builders[f"{package}.multiarray.scalar"] = np.float64(0).__reduce__()[0]
        builders[f"{package}.multiarray._reconstruct"] = np.zeros(0).__reduce__()[0]
    kinds = [kind for kind in np.dtypes.__all__ if kind not in ("ObjectDType", "VoidDType")]
    return {**builders, **{f"numpy.dtypes.{kind}": getattr(np.dtypes, kind) for kind in kinds}}


# ---- Finding files --------------------------------------------------------------------------------------------------

_OPTIM_STATES = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")


def get_model_state_file(checkpoint_dir: str, zero_stage: int) -> str:
    """Path of the model file in a tag folder: ``mp_rank_00_...`` of stages 0 to 2, rank 0's file of stage 3.

    Raises:
        FileNotFoundError: the folder or the file is not there.
    """
    if not os.path.isdir(checkpoint_dir):
        raise FileNotFoundError(f"{checkpoint_dir}: expected a tag folder, but there is no such folder")
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if int(zero_stage) == 3 else "mp_rank_00_model_states.pt"
    path = os.path.join(checkpoint_dir, name)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: expected the model file of a ZeRO stage {int(zero_stage)} checkpoint")
    return path


def get_optim_files(checkpoint_dir: str) -> list[str]:
    """Paths of the optimizer files in a tag folder, rank 0 first.

    Raises:
        FileNotFoundError: there are none.
        ZeroCheckpointError: two files claim the same rank, or the checkpoint is model-parallel.
    """
    found: dict[int, str] = {}
    names = sorted(os.listdir(checkpoint_dir)) if os.path.isdir(checkpoint_dir) else []
    for name in names:
        match = _OPTIM_STATES.fullmatch(name)
        if match is None:
            continue
        rank, mp_rank = int(match[1]), int(match[2])
        if mp_rank:
            raise ZeroCheckpointError(
                f"{checkpoint_dir}: {name} is of a model-parallel run, which is not supported here"
            )
        if rank in found:
            raise ZeroCheckpointError(
                f"{checkpoint_dir} has two optimizer files of rank {rank}, {found[rank]} and {name}; one is left over "
                "from a run in another precision: remove it"
            )
        found[rank] = name
    if not found:
        raise FileNotFoundError(f"{checkpoint_dir}: expected files *_optim_states.pt, but there are none")
    return [os.path.join(checkpoint_dir, found[rank]) for rank in sorted(found)]


def _tag_dir(checkpoint_dir: str, tag: str | None) -> str:
    latest = os.path.join(checkpoint_dir, "latest")
    source = "the given tag"
    if tag is None:
        if not os.path.isfile(latest):
            beside = sorted(os.listdir(checkpoint_dir)) if os.path.isdir(checkpoint_dir) else []
            tags = [n for n in beside if not n.startswith(".") and os.path.isdir(os.path.join(checkpoint_dir, n))]
            raise FileNotFoundError(
                f"{latest} is not there, so a tag must be given (-t TAG); folders beside it: {', '.join(tags) or 'none'}"
            )
        with open(latest, encoding="utf-8") as stream:
            tag = stream.read().strip()
        source = f"the tag in {latest}"
    folder = os.path.join(checkpoint_dir, tag)
    if tag.startswith("."):
        raise ZeroCheckpointError(f"{source} is {tag!r}: names with a dot are of saves that have not finished")
    if tag and not os.path.lexists(folder):
        folder = _interrupted(checkpoint_dir, tag) or folder
    if not tag or not os.path.isdir(folder):
        raise FileNotFoundError(f"{source} is {tag!r}, but {folder} is not a folder")
    return folder


def _interrupted(checkpoint_dir: str, tag: str) -> str | None:
    """Of a save that was killed while it replaced the tag's folder: the new folder, which was complete, or the old one."""
    replaced = re.compile(rf"\.{re.escape(tag)}\.[^.]*\.[0-9]+\.[0-9a-f]{{8}}\.old")
    names = os.listdir(checkpoint_dir) if os.path.isdir(checkpoint_dir) else []
    old = [os.path.join(checkpoint_dir, name) for name in names if replaced.fullmatch(name)]
    new = [path[: -len("old")] + "new" for path in old]
    complete = [path for path in new if os.path.isfile(os.path.join(path, "manifest.json"))]
    return max(complete or old, key=os.path.getmtime, default=None)


# ---- From files to named weights ------------------------------------------------------------------------------------


_BLOCK_NUMEL = 1 << 20
_MADV_DONTNEED = 4


class _MappedPages:
    """Gives pages of mapped files back once they are read; else a process would seem to need all that it ever read.

    Only memory that the system lists as mapped from a file is touched: other memory would be lost.
    """

    def __init__(self) -> None:
        # Address ranges, each with a tensor that keeps the range from being unmapped and used for something else.
        self._known: list[tuple[int, int, torch.Tensor]] = []

    def give_back(self, part: torch.Tensor) -> None:
        """``part``: 1-D, contiguous. Its values stay readable, and come from the file again."""
        begin, end = part.data_ptr(), part.data_ptr() + part.nbytes
        if begin < end and sys.platform == "linux" and self._is_mapped(begin, end, part):
            page = os.sysconf("SC_PAGESIZE")
            begin -= begin % page
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)

    def _is_mapped(self, begin: int, end: int, part: torch.Tensor) -> bool:
        if any(low <= begin and end <= high for low, high, _ in self._known):
            return True
        with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                addresses, _, _, _, inode, *_ = line.split()
                low, high = (int(address, 16) for address in addresses.split("-"))
                if low <= begin and end <= high and inode != "0":
                    self._known.append((low, high, part))
                    return True
        return False


@dataclass(frozen=True)
class _Weight:
    """A weight that is not in memory yet: flat pieces in mapped files, in order; the last may carry padding."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[torch.Tensor, ...]
    pages: _MappedPages = field(default_factory=_MappedPages, repr=False, compare=False)

    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel() * self.dtype.itemsize

    def contiguous(self) -> torch.Tensor:
        """The weight in memory of its own, which no file backs."""
        out = torch.empty(self.numel(), dtype=self.dtype)
        filled = 0
        for part in self.parts():
            out[filled : filled + part.numel()] = part
            filled += part.numel()
        return out.view(self.shape)

    def parts(self) -> Iterator[torch.Tensor]:
        """The elements in order, 1-D, a block at a time, as they lie in the files (also in their dtype there)."""
        left = self.numel()
        for piece in self.pieces:
            flat = piece.detach().reshape(-1)[:left]
            left -= flat.numel()
            for part in flat.split(_BLOCK_NUMEL):
                yield part
                self.pages.give_back(part)
        if left:
            raise ZeroCheckpointError(f"the files lack {left} of the {self.numel()} elements of a weight")


@dataclass(frozen=True)
class _Checkpoint:
    """All weights of a checkpoint by name, in state dict order, and which names are aliases of others."""

    stage: int
    world_size: int
    weights: dict[str, _Weight]
    aliases: dict[str, str]


def _open_checkpoint(tag_dir: str, exclude_frozen: bool) -> _Checkpoint:
    try:
        optim_files = get_optim_files(tag_dir)
    except FileNotFoundError:
        if os.path.isfile(os.path.join(tag_dir, "zero_pp_rank_0_mp_rank_00_model_states.pt")):
            return _open_untrained(tag_dir, exclude_frozen)
        return _open_stage0(tag_dir, exclude_frozen)
    states = _partitions(optim_files, tag_dir)
    stage, world = int(states[0]["zero_stage"]), len(states)
    model = _module_file(get_model_state_file(tag_dir, stage))
    groups = model.get("param_shapes")
    if groups is None:
        raise ZeroCheckpointError(f"{tag_dir}: the model file has no 'param_shapes'")
    shapes = [{n: tuple(s) for n, s in g.items()} for g in ([groups] if isinstance(groups, Mapping) else groups)]
    pieces = (_stage3_pieces if stage == 3 else _stage12_pieces)(shapes, states, tag_dir)
    trained = {n: _Weight(s, torch.float32, tuple(pieces[n])) for g in shapes for n, s in g.items()}
    aliases = _aliases(model)
    frozen = _frozen_stage3(model, world, tag_dir) if stage == 3 else _frozen_stage12(model, trained, aliases)
    if exclude_frozen:
        recorded = model.get("frozen_param_shapes")
        frozen = {name: weight for name, weight in frozen.items() if recorded is not None and name not in recorded}
    for name, weight in {**trained, **frozen}.items():
        held = sum(piece.numel() for piece in weight.pieces)
        if held < weight.numel():
            raise ZeroCheckpointError(
                f"{tag_dir}: {name!r} should have {weight.numel()} elements, the files have {held}"
            )
    weights = _in_module_order(model, {**trained, **frozen, **_buffers(model)})
    return _Checkpoint(stage, world, weights, {a: t for a, t in aliases.items() if t in weights and a not in weights})


def _partitions(optim_files: Sequence[str], tag_dir: str) -> list[dict[str, Any]]:
    """The optimizer state of every rank, after checking that they are one complete set."""
    ranks = {int(_OPTIM_STATES.fullmatch(os.path.basename(p))[1]): p for p in optim_files}  # type: ignore[index]
    states: dict[int, dict[str, Any]] = {}
    world = None
    for rank, path in sorted(ranks.items()):
        if world is not None and rank >= world:
            break  # left over from an earlier, larger run under this tag
        file = _load(path)
        state = file.get("optimizer_state_dict") if isinstance(file, Mapping) else None
        if not isinstance(state, Mapping) or "zero_stage" not in state:
            raise ZeroCheckpointError(f"{path}: expected a dict with ['optimizer_state_dict']['zero_stage']")
        count = state.get("partition_count", 1)
        count = int(max(count)) if isinstance(count, Sequence) else int(count)
        if world not in (None, count):
            raise ZeroCheckpointError(f"{path} is of a run on {count} ranks, other files of one on {world}")
        world, states[rank] = count, dict(state)
    missing = [rank for rank in range(world or 0) if rank not in states]
    if missing:
        raise ZeroCheckpointError(
            f"{tag_dir}: expected optimizer files of {world} ranks, but those of rank "
            f"{', '.join(map(str, missing))} are missing"
        )
    return [states[rank] for rank in sorted(states)]


def _module_file(path: str) -> dict[str, Any]:
    model = _load(path)
    if not isinstance(model, Mapping) or not isinstance(model.get("module"), Mapping):
        raise ZeroCheckpointError(f"{path}: expected a dict with the weights of one module under 'module'")
    return dict(model)


def _stage12_pieces(
    shapes: Sequence[Mapping[str, tuple[int, ...]]], states: Sequence[Mapping[str, Any]], tag_dir: str
) -> dict[str, list[torch.Tensor]]:
    """A group is one flat vector, cut over the ranks; the fragment addresses, where complete, say what is where."""
    pieces: dict[str, list[torch.Tensor]] = {}
    for index, group in enumerate(shapes):
        flats = []
        for rank, state in enumerate(states):
            held = state.get("single_partition_of_fp32_groups")
            if not isinstance(held, Sequence) or len(held) != len(shapes):
                raise ZeroCheckpointError(f"{tag_dir}: rank {rank} should hold fp32 weights of {len(shapes)} groups")
            flats.append(held[index].reshape(-1))
        addressed: dict[str, list[torch.Tensor]] = {name: [] for name in group}
        for flat, state in zip(flats, states, strict=True):
            mappings = state.get("param_slice_mappings") or ()
            for name, at in (mappings[index] if index < len(mappings) else {}).items():
                addressed.setdefault(name, []).append(flat[at.start : at.start + at.numel])
        if {n: sum(p.numel() for p in ps) for n, ps in addressed.items()} != {n: prod(s) for n, s in group.items()}:
            addressed = _cut(group, flats, f"{tag_dir}: group {index}")
        pieces.update(addressed)
    return pieces


def _cut(
    group: Mapping[str, tuple[int, ...]], flats: Sequence[torch.Tensor], where: str
) -> dict[str, list[torch.Tensor]]:
    """Cut parameters, in order and without gaps, from the concatenation of ``flats``."""
    wanted, held = sum(prod(s) for s in group.values()), sum(flat.numel() for flat in flats)
    if held < wanted:
        raise ZeroCheckpointError(f"{where} should have {wanted} fp32 elements, the files have {held}")
    pieces: dict[str, list[torch.Tensor]] = {}
    rank, offset = 0, 0
    for name, shape in group.items():
        left, pieces[name] = prod(shape), []
        while left:
            if offset == flats[rank].numel():
                rank, offset = rank + 1, 0
                continue
            length = min(left, flats[rank].numel() - offset)
            pieces[name].append(flats[rank][offset : offset + length])
            left, offset = left - length, offset + length
    return pieces


def _stage3_pieces(
    shapes: Sequence[Mapping[str, tuple[int, ...]]], states: Sequence[Mapping[str, Any]], tag_dir: str
) -> dict[str, list[torch.Tensor]]:
    """Each parameter alone is cut over the ranks, padded to equal pieces; a rank's pieces follow each other."""
    world = len(states)
    local = {name: (-(-prod(shape) // world),) for group in shapes for name, shape in group.items()}
    wanted = sum(n for (n,) in local.values())
    pieces: dict[str, list[torch.Tensor]] = {name: [] for name in local}
    for rank, state in enumerate(states):
        flats = [flat.reshape(-1) for flat in state.get("fp32_flat_groups") or ()]
        held = sum(flat.numel() for flat in flats)
        # With several sub-groups, padding between them could not be told from parameters.
        if held != wanted and not (len(flats) == 1 and held > wanted):
            raise ZeroCheckpointError(f"{tag_dir}: rank {rank} should have {wanted} fp32 elements, its file has {held}")
        for name, parts in _cut(local, flats, f"{tag_dir}: rank {rank}").items():
            pieces[name].extend(parts)
    return pieces


def _aliases(model: Mapping[str, Any]) -> dict[str, str]:
    """Names of tied weights -> the name that counts. Where they are whole, they share memory in the file, too."""
    aliases: dict[str, str] = dict(model.get("shared_params") or {})
    owner: dict[tuple[object, ...], str] = {}
    for name, value in model["module"].items():
        if torch.is_tensor(value) and value.device.type == "cpu" and value.numel() and name not in aliases:
            place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            if owner.setdefault(place, name) != name:
                aliases[name] = owner[place]
    return aliases


def _frozen_stage12(
    model: Mapping[str, Any], trained: Mapping[str, _Weight], aliases: Mapping[str, str]
) -> dict[str, _Weight]:
    """Parameters without a master copy: whatever else the module holds, as it is stored."""
    other = {*trained, *aliases, *(model.get("buffer_names") or ())}
    return {
        name: _Weight(tuple(value.shape), value.dtype, (value,))
        for name, value in model["module"].items()
        if torch.is_tensor(value) and name not in other
    }


def _frozen_stage3(model: Mapping[str, Any], world: int, tag_dir: str) -> dict[str, _Weight]:
    """Parameters without a master copy: put together from every rank's fragments."""
    shapes = model.get("frozen_param_shapes") or {}
    models = [model]
    for rank in range(1, world if shapes else 1):
        models.append(_load(os.path.join(tag_dir, f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")))
    frozen = {}
    for name, shape in shapes.items():
        held = [(part.get("frozen_param_fragments") or {}).get(name) for part in models]
        parts = [part for part in held if part is not None]
        if len(parts) < len(held):
            raise ZeroCheckpointError(f"{tag_dir}: the frozen parameter {name!r} is not in the files of every rank")
        frozen[name] = _Weight(tuple(shape), parts[0].dtype, tuple(parts))
    return frozen


def _buffers(model: Mapping[str, Any]) -> dict[str, _Weight]:
    module = model["module"]
    return {name: _stored(module[name]) for name in model.get("buffer_names") or () if name in module}


def _stored(value: torch.Tensor) -> _Weight:
    dtype = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
    return _Weight(tuple(value.shape), dtype, (value,))


def _in_module_order(model: Mapping[str, Any], weights: dict[str, _Weight]) -> dict[str, _Weight]:
    ordered = {name: weights[name] for name in model["module"] if name in weights}
    return {**ordered, **weights}


def _open_untrained(tag_dir: str, exclude_frozen: bool) -> _Checkpoint:
    """Stage 3 without an optimizer: all parameters are frozen ones."""
    model = _module_file(get_model_state_file(tag_dir, 3))
    if model.get("param_shapes"):
        raise FileNotFoundError(f"{tag_dir}: expected files *_optim_states.pt, which hold the trained weights")
    world, aliases = int(model.get("dp_world_size") or 1), _aliases(model)
    frozen = {} if exclude_frozen else _frozen_stage3(model, world, tag_dir)
    weights = _in_module_order(model, {**frozen, **_buffers(model)})
    return _Checkpoint(3, world, weights, {a: t for a, t in aliases.items() if t in weights})


def _open_stage0(tag_dir: str, exclude_frozen: bool) -> _Checkpoint:
    """Without ZeRO the module is whole in its file. Its fp32 masters count where the file says whose they are."""
    path = get_model_state_file(tag_dir, 0)
    model = _module_file(path)
    zero = (model.get("ds_config") or {}).get("zero_optimization") or {}
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    if isinstance(stage, int) and stage > 0:
        raise ZeroCheckpointError(
            f"{tag_dir} was saved with ZeRO stage {stage}, but no *_optim_states.pt file is there; "
            "copy the whole folder"
        )
    masters, aliases = _stage0_masters(model), _aliases(model)
    frozen = dict(model.get("frozen_param_shapes") or {})
    weights: dict[str, _Weight] = {}
    for name, value in model["module"].items():
        if torch.is_tensor(value) and name not in aliases and not (exclude_frozen and name in frozen):
            stored = _Weight(tuple(value.shape), value.dtype, (value,)) if name in frozen else _stored(value)
            weights[name] = masters.get(name, stored)
    if exclude_frozen and model.get("frozen_param_shapes") is None and model.get("param_shapes") is None:
        print(f"{path} does not say which parameters were frozen: all are kept")
    aliases = {alias: target for alias, target in aliases.items() if target in weights}
    return _Checkpoint(0, int(model.get("dp_world_size") or 1), weights, aliases)


def _stage0_masters(model: Mapping[str, Any]) -> dict[str, _Weight]:
    """fp32 masters by name. They lie there by position; without ``param_shapes`` nobody can tell whose they are."""
    optimizer, shapes = model.get("optimizer"), model.get("param_shapes")
    groups = optimizer.get("fp32_groups") if isinstance(optimizer, Mapping) else None
    if not groups or not shapes:
        return {}
    masters = {}
    for names, tensors in zip([shapes] if isinstance(shapes, Mapping) else shapes, groups, strict=False):
        if [tuple(shape) for shape in names.values()] != [tuple(tensor.shape) for tensor in tensors]:
            raise ZeroCheckpointError("the fp32 copies in 'fp32_groups' do not have the shapes in 'param_shapes'")
        for name, tensor in zip(names, tensors, strict=True):
            masters[name] = _Weight(tuple(tensor.shape), torch.float32, (tensor,))
    return masters


def _read(checkpoint_dir: str, tag: str | None, exclude_frozen: bool) -> _Checkpoint:
    tag_dir = _tag_dir(os.fspath(checkpoint_dir), tag)
    print(f"Processing zero checkpoint at {os.path.basename(os.path.normpath(tag_dir))}")
    checkpoint = _open_checkpoint(tag_dir, exclude_frozen)
    pages = _MappedPages()
    shared = {name: replace(weight, pages=pages) for name, weight in checkpoint.weights.items()}
    checkpoint = replace(checkpoint, weights=shared)
    print(f"Detected checkpoint of type zero stage {checkpoint.stage}, world_size: {checkpoint.world_size}")
    return checkpoint


# ---- Writing --------------------------------------------------------------------------------------------------------

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[IO[bytes]]:
    """A stream whose content becomes ``path`` when the block ends well, and leaves nothing behind when it does not."""
    folder, name = os.path.split(os.path.abspath(path))
    scratch = os.path.join(folder, f".{name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(scratch, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)
        raise


def _write_bin(path: str, weights: Mapping[str, _Weight], aliases: Mapping[str, str]) -> None:
    tensors = {name: weights[name].contiguous() for name in _progress(weights)}
    for alias, target in aliases.items():
        tensors[alias] = tensors[target]  # one storage in the file, as in the model
    with _replacing(path) as stream:
        torch.save(tensors, stream)


class _Stored(Protocol):
    """What is to be stored of a tensor."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def nbytes(self) -> int: ...


def safetensors_header(tensors: Mapping[str, _Stored], aliases: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """What a file of these tensors begins with, and in which order their data follows without gaps.

    The published format: header length, JSON header, raw little-endian data. Aliases go into the metadata.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **aliases}}
    # The widest dtypes first: so all data is aligned.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    end = 0
    for name in order:
        tensor = tensors[name]
        kind = SAFETENSORS_DTYPES.get(tensor.dtype)
        if kind is None:
            raise ZeroCheckpointError(f"{name!r} has dtype {tensor.dtype}, which safetensors does not have; use .bin")
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # data begins aligned
    return struct.pack("<Q", len(text)) + text, order


def raw_bytes(tensor: torch.Tensor) -> Any:
    """The data of a contiguous tensor on the host, as something to write; valid for as long as the tensor lives."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.numel() else b""


def _write_safetensors(path: str, weights: Mapping[str, _Weight], aliases: Mapping[str, str]) -> None:
    header, order = safetensors_header(weights, aliases)
    with _replacing(path) as stream:
        stream.write(header)
        for name in _progress(order):
            for part in weights[name].parts():
                block = part.to(weights[name].dtype).contiguous()
                stream.write(raw_bytes(block))


def parse_size(size: int | str | None) -> int | None:
    """Bytes of "5GB" (10**9), "512MiB" (2**20) or a plain number; None is no limit."""
    if size is None or isinstance(size, int):
        limit = size
    else:
        units = {
            "": 1,
            "K": 10**3,
            "M": 10**6,
            "G": 10**9,
            "T": 10**12,
            "KI": 2**10,
            "MI": 2**20,
            "GI": 2**30,
            "TI": 2**40,
        }
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(size).upper())
        if match is None or match[2] not in units:
            raise ValueError(f"max_shard_size: expected a number of bytes such as '5GB' or '512MiB', got {size!r}")
        limit = int(float(match[1]) * units[match[2]])
    if limit is not None and limit <= 0:
        raise ValueError(f"max_shard_size must be positive, got {size!r}")
    return limit


_T = TypeVar("_T", bound=_Stored)


def split_into_shards(weights: Mapping[str, _T], limit: int | None) -> list[dict[str, _T]]:
    """Weights in order, as many to a shard as ``limit`` bytes hold; a larger weight has a shard of its own."""
    shards: list[dict[str, _T]] = [{}]
    nbytes = 0
    for name, weight in weights.items():
        if limit is not None and shards[-1] and nbytes + weight.nbytes > limit:
            shards.append({})
            nbytes = 0
        shards[-1][name] = weight
        nbytes += weight.nbytes
    return shards


def _progress(names: Iterable[str]) -> Iterable[str]:
    """``names``, with a bar on a terminal when tqdm is there."""
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm  # noqa: PLC0415 - optional: a bar only

            return tqdm(list(names), desc="weights", leave=False)
    return names


def _write(checkpoint: _Checkpoint, output: str, limit: int | None, safe: bool) -> None:
    single = output.endswith((".bin", ".pt", ".pth", ".ckpt", ".safetensors")) and not os.path.isdir(output)
    safe = safe or (single and output.endswith(".safetensors"))
    write = _write_safetensors if safe else _write_bin
    stem, suffix = ("model", ".safetensors") if safe else ("pytorch_model", ".bin")
    folder = os.path.dirname(os.path.abspath(output)) if single else output
    os.makedirs(folder, exist_ok=True)
    shards = split_into_shards(checkpoint.weights, None if single else limit)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = stem + (f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else "") + suffix
        path = output if single else os.path.join(folder, name)
        aliases = {alias: target for alias, target in checkpoint.aliases.items() if target in shard}
        numel = sum(weight.numel() for weight in shard.values())
        print(f"Saving fp32 state dict to {path} (total_numel={numel})")
        write(path, shard, aliases)
        index.update(dict.fromkeys([*shard, *(() if safe else aliases)], name))
    if len(shards) > 1:
        total = sum(weight.nbytes for weight in checkpoint.weights.values())
        body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        with _replacing(os.path.join(folder, f"{stem}{suffix}.index.json")) as stream:
            stream.write((json.dumps(body, indent=2) + "\n").encode("utf-8"))
    other = os.path.join(folder, f"{stem}{suffix}" if len(shards) > 1 else f"{stem}{suffix}.index.json")
    if not single and os.path.exists(other):
        print(f"Note: {other} was there before and is not part of this output; loaders may prefer it. Remove it.")


# ---- Public functions -----------------------------------------------------------------------------------------------


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str, tag: str | None = None, exclude_frozen_parameters: bool = False, lazy_mode: bool = False
) -> dict[str, Any]:
    """The whole fp32 state dict of a checkpoint, on CPU; not collective.

    Args:
        checkpoint_dir: folder that holds the tag folder.
        tag: the tag, such as ``global_step14``; None is the one in the file ``latest``.
        exclude_frozen_parameters: leave out parameters that were not trained.
        lazy_mode: values are stand-ins whose ``.contiguous()`` builds the tensor, so that one at a time is in memory.

    Returns:
        Names as in the module's state dict. Tied weights are the same object under each name.

    Raises:
        FileNotFoundError: a folder or file is not there.
        ZeroCheckpointError: files are missing, damaged or contradict each other.
    """
    checkpoint = _read(checkpoint_dir, tag, exclude_frozen_parameters)
    state: dict[str, Any] = dict(checkpoint.weights)
    if not lazy_mode:
        state = {name: weight.contiguous() for name, weight in checkpoint.weights.items()}
    for alias, target in checkpoint.aliases.items():
        state[alias] = state[target]
    return state


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str,
    output_dir: str | None = None,
    max_shard_size: int | str | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    *,
    output_file: str | None = None,
) -> None:
    """Write the fp32 state dict of a checkpoint to files that plain torch or safetensors load.

    Args:
        checkpoint_dir: folder that holds the tag folder.
        output_dir: folder for ``pytorch_model.bin`` (or ``model.safetensors``), or for its numbered shards and an
            index. A name that ends in .bin, .pt, .pth, .ckpt or .safetensors and is no folder is a single file.
        max_shard_size: largest shard in bytes, such as "5GB"; also bounds the memory. None writes one file.
        safe_serialization: write the safetensors format. Tied weights are stored once there, under their first name;
            the file's metadata maps the other names to it.
        tag: the tag, such as ``global_step14``; None is the one in the file ``latest``.
        exclude_frozen_parameters: leave out parameters that were not trained.
        output_file: the name of ``output_dir`` in 0.14.

    Raises:
        FileNotFoundError, ZeroCheckpointError: as in ``get_fp32_state_dict_from_zero_checkpoint``.
        ValueError: bad ``max_shard_size`` or no output.
    """
    output = output_dir if output_dir is not None else output_file
    if output is None:
        raise ValueError("expected output_dir: a folder, or a file name such as pytorch_model.bin")
    limit = parse_size(max_shard_size)
    checkpoint = _read(checkpoint_dir, tag, exclude_frozen_parameters)
    _write(checkpoint, os.fspath(output), limit, safe_serialization)


def load_state_dict_from_zero_checkpoint(
    model: torch.nn.Module, checkpoint_dir: str, tag: str | None = None
) -> torch.nn.Module:
    """Move ``model`` to CPU, load the fp32 weights of a checkpoint into it, and return it.

    Not collective. A model that ZeRO-3 has partitioned becomes an ordinary, whole one if the checkpoint has all its
    parameters. The engine that wrapped the model, if any, can not be used afterwards.

    Raises:
        FileNotFoundError, ZeroCheckpointError: as in ``get_fp32_state_dict_from_zero_checkpoint``; also when the
            checkpoint holds names that the model does not have.
    """
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    own = model.state_dict()
    unknown = [name for name in state if name not in own]
    if unknown:
        raise ZeroCheckpointError(
            f"{checkpoint_dir} is of another model: {len(unknown)} of its {len(state)} names are not in the given one, "
            f"such as {unknown[0]!r}"
        )
    lacking = [name for name in own if name not in state]
    if lacking:
        print(
            f"The checkpoint has no values for {', '.join(lacking[:5])}{', ...' if lacking[5:] else ''}: left as given"
        )
    partitioned = {n for n, p in model.named_parameters(remove_duplicate=False) if hasattr(p, "ds_id")}
    if partitioned and partitioned <= state.keys():
        # Not imported: this file also stands alone. Whoever has such parameters has that module.
        sys.modules["deepspeed.runtime.zero.module_state"].make_ordinary(model)
    model = model.cpu()
    model.load_state_dict(state, strict=False)
    return model


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint_dir", help="folder that holds the tag folder, e.g. path/checkpoint-12")
    parser.add_argument("output", metavar="output_dir", help="folder for pytorch_model.bin, or a file name like x.bin")
    parser.add_argument("--max_shard_size", default="5GB", help="largest output file, e.g. 5GB (default) or 512MiB")
    parser.add_argument("--safe_serialization", action="store_true", help="write safetensors instead of torch.save")
    parser.add_argument("-t", "--tag", default=None, help="the tag, e.g. global_step1; default: what 'latest' says")
    parser.add_argument("--exclude_frozen_parameters", action="store_true", help="leave out untrained parameters")
    parser.add_argument("-d", "--debug", action="store_true", help="show tracebacks")
    given = parser.parse_args(arguments)
    try:
        convert_zero_checkpoint_to_fp32_state_dict(
            given.checkpoint_dir,
            given.output,
            max_shard_size=given.max_shard_size,
            safe_serialization=given.safe_serialization,
            tag=given.tag,
            exclude_frozen_parameters=given.exclude_frozen_parameters,
        )
    except (OSError, ValueError) as error:
        if given.debug:
            traceback.print_exc()
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
