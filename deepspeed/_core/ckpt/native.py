"""Native checkpoint folders: what the files are called, where they are, and whether all are there.

Below the checkpoint folder, where ``latest`` holds the newest tag (no newline)::

    <tag>/mp_rank_00_model_states.pt                           weights (stages 0-2), counters, client state
    <tag>/[bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt   ZeRO partition of rank r
    <tag>/zero_pp_rank_<r>_mp_rank_00_model_states.pt          stage 3, instead of the first one

Only names and folders here; ``reader.py`` reads the partitions, ``io.py`` the bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed._core.ckpt.staging import visible
from deepspeed.errors import CheckpointError
from deepspeed.version import __version__

__all__ = [
    "LATEST",
    "NATIVE_FORMAT",
    "OWN_KEYS",
    "RNG",
    "check_format",
    "find_tag_dir",
    "is_optim_states",
    "model_states_name",
    "model_states_path",
    "optim_states_name",
    "optim_states_paths",
    "read_latest",
    "read_zero_group_shapes",
]

StrPath = str | os.PathLike[str]

LATEST = "latest"

NATIVE_FORMAT = 1
"""What files are marked with, as ``ds_format``, and the newest that this version reads. Files without it are older."""

RNG = "ds_rng_states"
"""Key of the random number generators' states of all ranks."""

# Keys of the model file that are ours (or the reference's); all others are the user's client state.
OWN_KEYS = {
    "module",
    "universal_checkpoint_info",
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "shared_params",
    "frozen_param_fragments",
    "lr_scheduler",
    "data_sampler",
    "random_ltd",
    "sparse_tensor_module_names",
    "skipped_steps",
    "global_steps",
    "global_samples",
    "dp_world_size",
    "mp_world_size",
    "checkpoint_parallel_dimensions",
    "ds_config",
    "ds_format",
    "ds_version",
    RNG,
}

# The underscore before "optim" is missing in very old runs.
_OPTIM_STATES = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")


def model_states_name(mp_rank: int = 0, *, dp_rank: int | None = None) -> str:
    """File of weights and counters; with ``dp_rank``, the stage 3 file of that data-parallel rank."""
    prefix = "" if dp_rank is None else f"zero_pp_rank_{dp_rank}_"
    return f"{prefix}mp_rank_{mp_rank:02d}_model_states.pt"


def optim_states_name(dp_rank: int, *, bf16: bool, mp_rank: int = 0) -> str:
    """File of the ZeRO partition of ``dp_rank``; the name tells whether the weights are bf16."""
    return f"{'bf16_' if bf16 else ''}zero_pp_rank_{dp_rank}_mp_rank_{mp_rank:02d}_optim_states.pt"


def read_latest(checkpoint_dir: StrPath, name: str = LATEST) -> str | None:
    """The tag in ``<checkpoint_dir>/latest``, or in another file of its kind; None when there is no such file.

    Raises:
        CheckpointError: the file is empty or not text.
    """
    path = Path(checkpoint_dir) / name
    try:
        tag = path.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: expected a file with one tag name: {error}") from error
    if not tag:
        raise CheckpointError(f"{path} is empty; expected a tag name such as 'global_step100'. Pass the tag instead.")
    return tag


def find_tag_dir(checkpoint_dir: StrPath, tag: str | None = None) -> Path:
    """The folder of ``tag``, or of the tag that ``latest`` names.

    Raises:
        CheckpointError: no such folder, or no tag given and no ``latest``; the message lists the tags that are there.
    """
    root = Path(checkpoint_dir)
    if not root.is_dir():
        raise CheckpointError(f"{root}: expected a checkpoint folder, but there is no such folder")
    found = tag if tag is not None else read_latest(root)
    if found is None:
        raise CheckpointError(f"{root} has no file '{LATEST}', so a tag must be given; {_tags_in(root)}")
    folder = visible(root, str(found))
    if not folder.is_dir():
        source = "the given tag" if tag is not None else f"the tag in {root / LATEST}"
        raise CheckpointError(f"{source} is {str(found)!r}, but {folder} is not a folder; {_tags_in(root)}")
    return folder


def model_states_path(tag_dir: StrPath, mp_rank: int = 0) -> Path:
    """The model file of stages 0-2, or that of rank 0 of stage 3.

    Raises:
        CheckpointError: neither is there.
    """
    folder = Path(tag_dir)
    names = (model_states_name(mp_rank), model_states_name(mp_rank, dp_rank=0))
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: expected {names[0]} (or, of stage 3, {names[1]}), but neither is there")


def optim_states_paths(tag_dir: StrPath, mp_rank: int = 0) -> dict[int, Path]:
    """Files of ZeRO partitions by data-parallel rank, in rank order; empty for a stage 0 folder.

    Raises:
        CheckpointError: two files claim the same rank (leftovers of a run in another precision).
    """
    found: dict[int, Path] = {}
    for path in sorted(Path(tag_dir).iterdir()):
        match = _OPTIM_STATES.fullmatch(path.name)
        if match is None or int(match[2]) != mp_rank:
            continue
        rank = int(match[1])
        if rank in found:
            raise CheckpointError(
                f"{tag_dir} has two optimizer files of rank {rank}, {found[rank].name} and {path.name}; "
                "one is left over from a run in another precision: remove it"
            )
        found[rank] = path
    return dict(sorted(found.items()))


def is_optim_states(name: str) -> bool:
    """Whether a file of this name holds a partition of optimizer state."""
    return _OPTIM_STATES.fullmatch(name) is not None


def read_zero_group_shapes(model_state: Mapping[str, Any]) -> list[dict[str, tuple[int, ...]]] | None:
    """``param_shapes`` of a model file: per parameter group, the shapes of its trained parameters by name.

    The order in a group is the order in its flat vector. None when the file has none (stage 0 of the reference).
    """
    groups = model_state.get("param_shapes")
    if groups is None:
        return None
    if isinstance(groups, Mapping):
        groups = [groups]
    return [{name: tuple(shape) for name, shape in group.items()} for group in groups]


def check_format(state: Mapping[str, Any], path: StrPath) -> None:
    """Refuses what a later version wrote in a way that this one does not know.

    Raises:
        CheckpointError: names the version that wrote the file.
    """
    found = state.get("ds_format", NATIVE_FORMAT)
    if not isinstance(found, int) or found > NATIVE_FORMAT:
        writer = state.get("ds_version")
        raise CheckpointError(
            f"{path} has checkpoint format {found}, written by deepspeed {writer}; this version, {__version__}, reads "
            f"formats up to {NATIVE_FORMAT}. Upgrade to deepspeed {writer} or later"
        )


def _tags_in(root: Path) -> str:
    found = (p for p in root.iterdir() if not p.name.startswith(".") and p.is_dir())
    tags = sorted(p.name for p in found if any(p.glob("*_states.pt")))
    return f"tags in this folder: {', '.join(tags)}" if tags else "there is no folder with checkpoint files in it"
