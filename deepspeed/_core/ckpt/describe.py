"""What a checkpoint folder holds, from the headers of its files: they are memory-mapped, and no tensor is read.

:class:`Opened` also gives the values, a range at a time, by the name of a parameter and what is wanted of it: ``weight`` (in
the model's dtype), ``fp32`` (the master) or a key of the optimizer's state, whatever the stage and world size of the folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from deepspeed._core.ckpt.io import load_file
from deepspeed._core.ckpt.native import OWN_KEYS, check_format, model_states_path, optim_states_paths
from deepspeed._core.ckpt.reader import MASTER, NativeZeroReader, ZeroReader, common_entries
from deepspeed._core.ckpt.universal import UniversalReader, is_universal
from deepspeed._core.ckpt.weights import PartitionedWeights, is_partitioned
from deepspeed._core.layout.spans import ShardLayout, Span
from deepspeed.errors import CheckpointError

__all__ = ["WEIGHT", "Description", "Entry", "Group", "Opened", "files_of", "is_checkpoint", "plain_dtype"]

WEIGHT = "weight"
"""The value that the module holds, beside ``fp32`` and the optimizer's keys."""

_SAFETENSORS = "*.safetensors"


@dataclass(frozen=True)
class Entry:
    """A parameter, a buffer or another value of the module.

    Attributes:
        kind: ``trained``, ``frozen``, ``tied``, ``buffer``, ``value`` (no tensor), or ``parameter`` where the files do
            not tell.
        shape: true shape; None of what is no tensor.
        dtype: such as ``bfloat16``.
        tied_to: the name under which the same tensor came first.
        group: which optimizer group it is in.
    """

    kind: str
    shape: tuple[int, ...] | None
    dtype: str
    tied_to: str | None = None
    group: int | None = None

    @property
    def numel(self) -> int:
        """Number of elements; 0 of what is no tensor."""
        return 0 if self.shape is None else prod(self.shape)


@dataclass(frozen=True)
class Group:
    """An optimizer group: its size, and by key its state (dtype, or one value for all) and options."""

    parameters: int
    numel: int
    state: dict[str, str]
    options: dict[str, Any]


@dataclass(frozen=True)
class Description:
    """Everything about one checkpoint but its values. What a folder does not tell is None or empty."""

    path: str
    kind: str
    """``native``, ``universal`` or ``safetensors``."""
    entries: dict[str, Entry]
    files: dict[str, int]
    """Sizes in bytes."""
    zero_stage: int | None = None
    world_size: int | None = None
    model_parallel_size: int | None = None
    dtype: str | None = None
    """Of most elements of the module."""
    version: str | None = None
    counters: dict[str, Any] = field(default_factory=dict)
    optimizer: str | None = None
    """Its type in the config of the run; files do not name classes."""
    groups: tuple[Group, ...] = ()
    scheduler: dict[str, Any] | None = None
    loss_scaler: dict[str, Any] | None = None
    client_state: dict[str, str] = field(default_factory=dict)
    """What the values are, by key."""

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())


def plain_dtype(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``float32``."""
    return str(dtype).removeprefix("torch.")


def is_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a checkpoint's files itself (and not only folders that do)."""
    place = Path(folder)
    return any(place.glob("*mp_rank_*_states.pt")) or any(place.glob(_SAFETENSORS))


def files_of(folder: Path) -> dict[str, int]:
    """Sizes in bytes of all files below a folder, by relative name."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }


class Opened:
    """A checkpoint folder of any kind, opened for its names, shapes and ranges of values. Not collective.

    Attributes:
        folder: the tag folder, universal folder or folder of safetensors.
        kind: ``native``, ``universal`` or ``safetensors``.

    Raises:
        CheckpointError: files are missing, damaged or contradict each other.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._tensors: Mapping[str, Any] | None = None
        self._reader: ZeroReader | None = None
        self._weights: PartitionedWeights | None = None
        self._state: dict[str, Any] = {}
        #: Of stage 0 folders that do not name the optimizer's parameters: those, by made-up names.
        self._unnamed: dict[str, dict[str, torch.Tensor]] = {}
        self._open()
        self.entries = self._find_entries()
        self._kept = {n: i for i, group in enumerate(self._groups) for n in group.shapes}

    def _open(self) -> None:
        if not any(self.folder.glob("*mp_rank_*_states.pt")) and any(self.folder.glob(_SAFETENSORS)):
            self.kind, self._tensors = "safetensors", _safetensors(self.folder)
            return
        self.kind = "universal" if is_universal(self.folder) else "native"
        if is_partitioned(self.folder):
            self._weights = PartitionedWeights(self.folder)
            self._reader, self._state = self._weights.reader, self._weights.model_file(0)[1]
            return
        path = model_states_path(self.folder)
        self._state = load_file(path)
        if not isinstance(self._state, dict) or not isinstance(self._state.get("module"), Mapping):
            raise CheckpointError(f"{path}: expected a dict with the model's entries under 'module'")
        check_format(self._state, path)
        if self.kind == "universal":
            self._reader = UniversalReader(self.folder)
        elif optim_states_paths(self.folder) or (self._state.get("optimizer") and self._state.get("param_shapes")):
            self._reader = NativeZeroReader(self.folder)
        else:
            self._unnamed = _unnamed(self._state.get("optimizer") or {})

    def reopen(self) -> None:
        """Gives back the memory of what was read: pages stay in the process as long as files are mapped."""
        self._open()

    @property
    def _groups(self) -> tuple[Any, ...]:
        return self._reader.groups if self._reader is not None else ()

    # -- names and shapes ----------------------------------------------------------------------------------------------

    def _find_entries(self) -> dict[str, Entry]:
        if self._tensors is not None:
            return {n: Entry("parameter", shape, dtype) for n, (shape, dtype, _) in self._tensors.items()}
        state, first = self._state, dict[object, str]()
        buffers, shared = set(state.get("buffer_names") or ()), state.get("shared_params") or {}
        frozen = {n: tuple(s) for n, s in (state.get("frozen_param_shapes") or {}).items()}
        trained = {n: (i, shape) for i, group in enumerate(self._groups) for n, shape in group.shapes.items()}
        entries: dict[str, Entry] = {}
        for name, value in state["module"].items():
            if not torch.is_tensor(value):
                entries[name] = Entry("value", None, type(value).__name__)
                continue
            held = self._weights is not None and name in self._weights
            shape = self._weights.shape(name) if self._weights is not None and held else tuple(value.shape)
            place = (value.data_ptr(), value.shape, value.dtype) if value.numel() else name
            tied = shared.get(name) or (first.get(place) if name not in trained else None)
            first.setdefault(place, name)
            group = trained[name][0] if name in trained else None
            if name in buffers:
                kind = "buffer"
            elif name in trained or tied:
                kind = "trained" if name in trained else "tied"
            elif name in frozen or trained:
                kind = "frozen"
            else:
                kind = "parameter"
            entries[name] = Entry(kind, shape, plain_dtype(value.dtype), tied if kind == "tied" else None, group)
        for name, (group, shape) in trained.items():  # weights that were left out, and are in the optimizer's files
            entries.setdefault(name, Entry("trained", shape, "float32", None, group))
        return entries

    def shapes(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """True shapes of all values with elements, by name and key; tied ones once."""
        found: dict[tuple[str, str], tuple[int, ...]] = {}
        for name, entry in self.entries.items():
            if entry.shape is not None and entry.kind != "tied" and (name in self._kept_weights()):
                found[name, WEIGHT] = entry.shape
        for group in self._groups:
            for name, shape in group.shapes.items():
                for key in (MASTER, *group.state_keys):
                    found[name, key] = shape
        for name, tensors in self._unnamed.items():
            found.update({(name, key): tuple(value.shape) for key, value in tensors.items()})
        return found

    def _kept_weights(self) -> Mapping[str, Any]:
        return self._tensors if self._tensors is not None else self._state["module"]

    # -- values --------------------------------------------------------------------------------------------------------

    def fill(self, name: str, key: str, begin: int, out: torch.Tensor) -> None:
        """Copies elements ``[begin, begin + out.numel())`` of a value of :meth:`shapes` into ``out`` (1-D, any dtype)."""
        if name in self._unnamed:
            self._copy(self._unnamed[name][key], begin, out)
        elif key != WEIGHT and self._reader is not None:
            layout = ShardLayout(1, (out.numel(),), (Span(name, begin, 0, 0, out.numel()),))
            self._reader.fill(self._kept[name], key, layout, 0, out)
        elif self._tensors is not None:
            self._copy(self._tensors[name][2](), begin, out)
        elif self._weights is not None and name in self._weights:
            rounded = torch.empty(out.numel(), dtype=self._state["module"][name].dtype)
            self._weights.fill(name, begin, rounded)
            out.copy_(rounded)
        else:
            self._copy(self._state["module"][name], begin, out)

    @staticmethod
    def _copy(tensor: torch.Tensor, begin: int, out: torch.Tensor) -> None:
        out.copy_(tensor.reshape(-1)[begin : begin + out.numel()])

    # -- all of it -----------------------------------------------------------------------------------------------------

    def describe(self) -> Description:
        """Everything but the values."""
        files = files_of(self.folder)
        if self._tensors is not None:
            return Description(str(self.folder), self.kind, self.entries, files, dtype=self._dtype())
        state, reader = self._state, self._reader
        config = state.get("ds_config")
        options = config.get("optimizer") if isinstance(config, Mapping) else None
        common = reader.common if reader is not None else common_entries(state.get("optimizer") or {})
        scaler = common.get("loss_scaler")
        if not isinstance(scaler, Mapping):
            scaler = {key: common[key] for key in ("cur_scale", "cur_iter", "dynamic_loss_scale") if key in common}
        return Description(
            path=str(self.folder),
            kind=self.kind,
            entries=self.entries,
            files=files,
            zero_stage=self._zero_stage(),
            world_size=reader.world_size if reader is not None else _number(state.get("dp_world_size")),
            model_parallel_size=_number(state.get("mp_world_size")),
            dtype=self._dtype(),
            version=state.get("ds_version"),
            counters={k: state[k] for k in ("global_steps", "global_samples", "skipped_steps") if k in state},
            optimizer=str(options["type"]) if isinstance(options, Mapping) and "type" in options else None,
            groups=tuple(map(_group, self._groups)) or _unnamed_groups(state.get("optimizer") or {}, self._unnamed),
            scheduler=state.get("lr_scheduler"),
            loss_scaler=dict(scaler) or None,
            client_state={str(key): _kind(value) for key, value in state.items() if key not in OWN_KEYS},
        )

    def _zero_stage(self) -> int | None:
        if self._reader is not None:
            return self._reader.zero_stage
        return 3 if self._weights is not None else 0

    def _dtype(self) -> str | None:
        totals: dict[str, int] = {}
        for entry in self.entries.values():
            if entry.kind not in ("buffer", "value"):
                totals[entry.dtype] = totals.get(entry.dtype, 0) + entry.numel
        return max(totals, key=lambda dtype: totals[dtype], default=None)


def _number(value: Any) -> int | None:
    return int(value) if value is not None else None


def _group(group: Any) -> Group:
    state = {key: next((plain_dtype(b[key].dtype) for b in group.buffers if key in b), "") for key in group.state_keys}
    state.update({key: _kind(value) for key, value in group.state_scalars.items()})
    numel = sum(prod(shape) for shape in group.shapes.values())
    return Group(len(group.shapes), numel, state, dict(group.param_group))


def _kind(value: Any) -> str:
    """A value if it is short, else what it is."""
    if torch.is_tensor(value):
        if value.numel() == 1:
            return f"{value.item():g}" if value.dtype != torch.bool else str(bool(value))
        return f"tensor {tuple(value.shape)} {plain_dtype(value.dtype)}"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    size = f" of {len(value)}" if hasattr(value, "__len__") else ""
    return type(value).__name__ + size


# -- stage 0 folders that do not name the optimizer's parameters -------------------------------------------------------


def _inner(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = saved.get("optimizer_state_dict", saved)
    return inner if isinstance(inner, Mapping) else {}


def _unnamed(saved: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of the optimizer by the parameter's number."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for number, state in (_inner(saved).get("state") or {}).items():
        tensors = {key: value for key, value in state.items() if torch.is_tensor(value) and value.dim()}
        found[f"optimizer parameter {number}"] = tensors
    masters = [value for group in saved.get("fp32_groups") or () for value in group]
    for number, value in enumerate(masters):
        found.setdefault(f"optimizer parameter {number}", {})[MASTER] = value
    return found


def _unnamed_groups(saved: Mapping[str, Any], tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> tuple[Group, ...]:
    groups = []
    state = _inner(saved).get("state") or {}
    for options in _inner(saved).get("param_groups") or ():
        numbers = options.get("params") or ()
        held = [tensors.get(f"optimizer parameter {number}", {}) for number in numbers]
        keys = {key: plain_dtype(value.dtype) for one in held for key, value in one.items() if key != MASTER}
        first: Mapping[str, Any] = next((state[number] for number in numbers if number in state), {})
        keys.update({key: _kind(value) for key, value in first.items() if key not in keys})
        numel = sum(max((value.numel() for value in one.values()), default=0) for one in held)
        groups.append(Group(len(numbers), numel, keys, {k: v for k, v in options.items() if k != "params"}))
    return tuple(groups)


# -- safetensors -------------------------------------------------------------------------------------------------------


def _safetensors(folder: Path) -> dict[str, tuple[tuple[int, ...], str, Any]]:
    """By name the shape, the dtype, and a function that maps the tensor."""
    try:
        from safetensors import safe_open  # noqa: PLC0415 - only for folders that hold such files
    except ImportError as error:
        raise CheckpointError(
            f"{folder} holds safetensors files: install the package safetensors to read them"
        ) from error

    def take(path: Path, name: str) -> torch.Tensor:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    found: dict[str, tuple[tuple[int, ...], str, Any]] = {}
    for path in sorted(folder.glob(_SAFETENSORS)):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    part = file.get_slice(name)
                    dtype = _SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype().lower())
                    found[name] = tuple(part.get_shape()), dtype, lambda path=path, name=name: take(path, name)
        except Exception as error:  # the library's own classes
            raise CheckpointError(f"{path} is truncated, damaged or something else: {error}") from error
    return found


_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
