"""Universal folders: a file for each parameter and state, whatever stage and world size they were saved at.

Below the checkpoint folder, where ``latest_universal`` holds the newest one's name (no newline)::

    <folder>/mp_rank_00_model_states.pt               weights, counters, client state
    <folder>/zero/<parameter>/fp32.pt                 the master weight: a tensor, or {"param": tensor, "cat_dim": 0}
    <folder>/zero/<parameter>/exp_avg.pt, step.pt ..  optimizer state, elementwise or one value
    <folder>/zero/optimizer_state.pt                  options of the parameter groups, loss scaler

(Universal checkpointing, arXiv 2406.18820.) Folders that were converted from stage 3 elsewhere hold flat tensors, the step
count in ``optimizer_state.pt``, and model files of stage 3 instead of the first one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from deepspeed._core.ckpt.io import load_file
from deepspeed._core.ckpt.native import check_format, model_states_path, optim_states_paths, read_zero_group_shapes
from deepspeed._core.ckpt.reader import MASTER, ZeroGroup, ZeroReader, common_entries
from deepspeed._core.layout.spans import ShardLayout, Span
from deepspeed.errors import CheckpointError

__all__ = ["LATEST_UNIVERSAL", "OPTIMIZER_STATE", "UniversalReader", "is_universal", "parameter_folder"]

LATEST_UNIVERSAL = "latest_universal"
OPTIMIZER_STATE = "optimizer_state.pt"

_ZERO = "zero"
_CONVERT_AGAIN = (
    "Copy the whole folder again, or convert the checkpoint again with deepspeed.checkpoint.ds_to_universal"
)


def is_universal(tag_dir: str | os.PathLike[str], mp_rank: int = 0) -> bool:
    """Whether a folder is in the universal format: it has ``zero/`` and no optimizer files of ranks."""
    folder = Path(tag_dir)
    return (folder / _ZERO).is_dir() and not optim_states_paths(folder, mp_rank)


def parameter_folder(tag_dir: str | os.PathLike[str], name: str) -> Path:
    """Where the files of a parameter are.

    Raises:
        CheckpointError: the name would lead out of the folder.
    """
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or PurePosixPath(name).is_absolute():
        raise CheckpointError(f"{tag_dir}: parameter name {name!r} cannot be a folder name")
    return Path(tag_dir) / _ZERO / name


class UniversalReader(ZeroReader):
    """A universal folder, opened for reading at any stage and world size. Not collective.

    Every file is opened, and only the ranges that are asked for are read.

    Args:
        tag_dir: the folder.
        param_names: per group, the names of the trained parameters in optimizer order; needed where the model file has no
            ``param_shapes``.
        mp_rank: model-parallel rank whose model file to read.
        model_state: content of the model file, if it has been loaded already.

    Raises:
        CheckpointError: files are missing, damaged or contradict each other.
    """

    def __init__(
        self,
        tag_dir: str | os.PathLike[str],
        *,
        param_names: Sequence[Sequence[str]] | None = None,
        mp_rank: int = 0,
        model_state: dict[str, Any] | None = None,
    ) -> None:
        folder = Path(tag_dir)
        model_path = model_states_path(tag_dir, mp_rank)
        model_state = load_file(model_path) if model_state is None else model_state
        check_format(model_state, model_path)
        shapes = read_zero_group_shapes(model_state)
        if shapes is None and param_names is None:
            raise CheckpointError(f"{model_path} has no 'param_shapes', so the groups of the parameters are unknown")
        names: list[list[str]] = [list(group) for group in (param_names if shapes is None else shapes) or ()]
        _require_parameters(folder, names)
        shared = load_file(folder / _ZERO / OPTIMIZER_STATE)
        if not isinstance(shared, Mapping):
            raise CheckpointError(f"{folder / _ZERO / OPTIMIZER_STATE}: expected a dict, got {type(shared).__name__}")
        held = [_read_group(folder, group, None if shapes is None else shapes[i]) for i, group in enumerate(names)]
        self._states = {name: state for _, states in held for name, state in states.items()}
        super().__init__(
            folder,
            model_state,
            zero_stage=int(shared.get("zero_stage", 1)),
            world_size=int(model_state.get("dp_world_size") or 1),
            groups=tuple(_group(folder, *group, shared, index) for index, group in enumerate(held)),
            common=common_entries(shared),
        )

    def whole_state(self, name: str) -> dict[str, Any] | None:
        """The optimizer's state of one parameter as it is in the files; None unless it was saved at stage 0."""
        if self.zero_stage:
            return None
        return {key: value for key, value in self._states.get(name, {}).items() if key != MASTER}


def _require_parameters(folder: Path, names: Sequence[Sequence[str]]) -> None:
    missing = [n for group in names for n in group if not (parameter_folder(folder, n) / f"{MASTER}.pt").is_file()]
    if missing:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise CheckpointError(
            f"{folder / _ZERO} is not complete: it has no {MASTER}.pt of {', '.join(map(repr, missing[:10]))}{more}. "
            + _CONVERT_AGAIN
        )


def _read_group(
    folder: Path, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]] | None
) -> tuple[dict[str, tuple[int, ...]], dict[str, dict[str, Any]]]:
    """Shapes, and by parameter the contents of its files: tensors of one value an element have the parameter's shape."""
    found: dict[str, tuple[int, ...]] = {}
    states: dict[str, dict[str, Any]] = {}
    for name in names:
        place = parameter_folder(folder, name)
        values = {path.stem: _unwrapped(load_file(path)) for path in sorted(place.glob("*.pt"))}
        master = values[MASTER]
        if not torch.is_tensor(master):
            raise CheckpointError(f"{place / MASTER}.pt: expected a tensor, got {type(master).__name__}")
        shape = tuple(master.shape) if shapes is None else shapes[name]
        if master.numel() != prod(shape) and not (master.dim() == 1 and master.numel() > prod(shape)):
            raise CheckpointError(
                f"{place / MASTER}.pt has shape {tuple(master.shape)}, but the parameter {shape}. {_CONVERT_AGAIN}"
            )
        found[name], states[name] = shape, {k: _trimmed(v, master, shape) for k, v in values.items()}
    return found, states


def _unwrapped(value: Any) -> Any:
    """Tensors come in a dict that says along which dimension model-parallel ranks were put together, or as they are."""
    return value["param"] if isinstance(value, Mapping) and "param" in value else value


def _trimmed(value: Any, master: torch.Tensor, shape: tuple[int, ...]) -> Any:
    """In the parameter's shape; flat tensors may end with the padding of stage 3."""
    if not torch.is_tensor(value) or not value.dim() or value.numel() != master.numel():
        return value
    return value.reshape(-1)[: prod(shape)].view(shape)


def _group(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    states: Mapping[str, Mapping[str, Any]],
    shared: Mapping[str, Any],
    index: int,
) -> ZeroGroup:
    """One file buffer a parameter."""
    keys = sorted(_elementwise_keys(states, shapes))
    lacking = [
        f"{name}/{key}.pt" for name, state in states.items() if prod(shapes[name]) for key in keys if key not in state
    ]
    if lacking:
        more = f" and {len(lacking) - 10} more" if len(lacking) > 10 else ""
        raise CheckpointError(
            f"{folder / _ZERO} is not complete: {', '.join(lacking[:10])}{more} missing. {_CONVERT_AGAIN}"
        )
    buffers = tuple(
        {key: state[key].reshape(-1) for key in (MASTER, *keys) if key in state} for state in states.values()
    )
    spans = tuple(Span(name, 0, i, 0, prod(shape)) for i, (name, shape) in enumerate(shapes.items()))
    layout = ShardLayout(max(len(spans), 1), tuple(span.numel for span in spans) or (0,), spans)
    options = _param_groups(shared)
    scalars = _group_scalars(shared, index)
    for state in states.values():
        scalars.update({key: value for key, value in state.items() if key not in (MASTER, *keys)})
        break
    settings = dict(options[index]) if index < len(options) else {}
    settings.pop("params", None)
    return ZeroGroup(shapes, layout, buffers, tuple(keys), scalars, settings)


def _elementwise_keys(states: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """State of one value an element. Parameters without dimensions do not tell it from one value a parameter."""
    fitting = [
        (key, shapes[name])
        for name, state in states.items()
        for key, value in state.items()
        if key != MASTER and torch.is_tensor(value) and value.numel() and value.shape == shapes[name]
    ]
    return {key for key, shape in fitting if shape} or {key for key, _ in fitting if key != "step"}


def _param_groups(shared: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    inner = shared.get("optimizer_state_dict") or {}
    groups = shared.get("param_groups", inner.get("param_groups", ()))
    return groups if isinstance(groups, Sequence) else ()


def _group_scalars(shared: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Values for a group as a whole that lie in the shared file, as in folders that were converted from stage 3."""
    inner = shared.get("optimizer_state_dict")
    groups = inner.get("param_groups", ()) if isinstance(inner, Mapping) else ()
    if index >= len(groups):
        return {}
    known = inner["state"] if isinstance(inner, Mapping) else {}
    entry: Mapping[str, Any] = next((known[i] for i in groups[index].get("params", ()) if i in known), {})
    return {key: value for key, value in entry.items() if not (torch.is_tensor(value) and value.dim())}
