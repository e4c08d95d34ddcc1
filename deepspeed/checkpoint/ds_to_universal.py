"""``python -m deepspeed.checkpoint.ds_to_universal``: converts a checkpoint to the universal format.

From any stage and world size, of this package or the reference. Processes convert parameters side by side, each with a tile
of one tensor in memory, and read the ranges that they need from memory-mapped files; so there is no temporary folder. The
result appears complete or not at all, and ``latest_universal`` beside it is written last.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from math import prod
from pathlib import Path
from typing import Any

import torch

from deepspeed._core.ckpt.archive import Archive
from deepspeed._core.ckpt.blockfile import BlockFile
from deepspeed._core.ckpt.io import atomic_write_text, fsync_folder, load_file
from deepspeed._core.ckpt.manifest import check_complete
from deepspeed._core.ckpt.native import find_tag_dir, model_states_name, model_states_path
from deepspeed._core.ckpt.reader import MASTER, NativeZeroReader, ZeroReader
from deepspeed._core.ckpt.source import Source
from deepspeed._core.ckpt.staging import Staging
from deepspeed._core.ckpt.universal import (
    LATEST_UNIVERSAL,
    OPTIMIZER_STATE,
    UniversalReader,
    is_universal,
    parameter_folder,
)
from deepspeed._core.ckpt.weights import PartitionedWeights, is_partitioned
from deepspeed._core.layout.spans import ShardLayout, Span
from deepspeed.errors import CheckpointError
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.utils.logging import logger
from deepspeed.version import __version__

__all__ = ["convert", "main"]

_TILE_NBYTES = 16 << 20
_MAPPED_NBYTES = 256 << 20

# Less than this for each process takes longer to start than to convert.
_WORTH_A_PROCESS_NBYTES = 256 << 20


def main(args: argparse.Namespace | None = None) -> None:
    """The command line; ``args`` has the flags as attributes (cli-and-files: ds_to_universal).

    Raises:
        CheckpointError: the input is incomplete, damaged or no checkpoint; nothing was written.
    """
    args = args if args is not None else _parse()
    if getattr(args, "keep_temp_folder", False):
        logger.info("--keep_temp_folder: this conversion needs no temporary folder, so none is kept")
    convert(
        args.input_folder,
        args.output_folder,
        workers=max(getattr(args, "num_extract_workers", 4), getattr(args, "num_merge_workers", 2)),
        strict=getattr(args, "strict", True),
        inject_missing_state=getattr(args, "inject_missing_state", False),
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deepspeed.checkpoint.ds_to_universal",
        description="Converts a checkpoint of any ZeRO stage and world size to the universal format.",
    )
    parser.add_argument("--input_folder", required=True, help="tag folder, or the folder with the file 'latest'")
    parser.add_argument("--output_folder", required=True, help="folder to make, such as <input_folder>_universal")
    parser.add_argument("--num_extract_workers", type=int, default=4, help="processes (the larger number counts)")
    parser.add_argument("--num_merge_workers", type=int, default=2, help="processes (the larger number counts)")
    parser.add_argument("--keep_temp_folder", action="store_true", help="accepted; there is no temporary folder")
    parser.add_argument(
        "--no_strict", dest="strict", action="store_false", help="skip the check of checksums and of the result"
    )
    parser.add_argument(
        "--inject_missing_state",
        action="store_true",
        help="add universal_checkpoint_info where the model file has none",
    )
    return parser.parse_args()


def convert(
    input_folder: str | os.PathLike[str],
    output_folder: str | os.PathLike[str],
    *,
    workers: int = 4,
    strict: bool = True,
    inject_missing_state: bool = False,
) -> Path:
    """Converts a checkpoint; needs no process group and no device. Returns the universal folder.

    Args:
        input_folder: a tag folder, or a folder with ``latest``.
        output_folder: the folder to make; an older universal folder there is replaced. ``latest_universal`` is written
            beside it.
        workers: processes at most.
        strict: check the input's checksums, where it has a manifest, and open the result before it appears.
        inject_missing_state: see the command line.

    Raises:
        CheckpointError: the input is incomplete, damaged, or cannot be expressed. Nothing was written.
    """
    if workers < 1:
        raise ValueError(f"expected at least one worker, got {workers}")
    source = _input(Path(input_folder))
    target = Path(os.path.abspath(output_folder))
    _check_target(source, target)
    manifest = check_complete(source)
    if manifest is not None and strict:
        manifest.check_content(source)
    job = _Job(source, inject_missing_state)
    staging = Staging(target.parent, target.name)
    staging.create()
    try:
        _run(job, staging.folder, workers)
        _fsync_tree(staging.folder)
        if strict:
            UniversalReader(staging.folder, param_names=job.group_names())
        staging.publish()
    except BaseException:
        staging.discard()
        raise
    atomic_write_text(target.parent / LATEST_UNIVERSAL, target.name)
    logger.info(f"converted {source} to {target}")
    return target


def _input(folder: Path) -> Path:
    if (folder / "latest").is_file():
        folder = find_tag_dir(folder)
    if is_universal(folder):
        raise CheckpointError(f"{folder} is a universal folder already")
    model_states_path(folder)  # says what is missing
    parts = sorted(path.name for path in folder.glob("*mp_rank_*_states.pt") if "mp_rank_00" not in path.name)
    if parts:
        raise CheckpointError(f"{folder} is of a model-parallel run, which is not supported yet: it holds {parts[0]}")
    return Path(os.path.abspath(folder))


def _check_target(source: Path, target: Path) -> None:
    if target == source or source in target.parents or target in source.parents:
        raise ValueError(f"output_folder {target} and input_folder {source} must not contain each other")
    if target.exists() and not (target.is_dir() and (is_universal(target) or not any(target.iterdir()))):
        raise ValueError(f"output_folder {target} exists and is no universal folder: remove it, or choose another name")


# -- what goes into the files ------------------------------------------------------------------------------------------


class _Range(Source):
    """A tensor of the checkpoint, filled tile by tile."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, fill: Callable[[int, torch.Tensor], None]) -> None:
        super().__init__(shape, dtype)
        self._fill = fill

    def write(self, use: Callable[[torch.Tensor], None]) -> None:
        """See :meth:`Source.write`."""
        tile = torch.empty(min(self.numel, _TILE_NBYTES // self.dtype.itemsize), dtype=self.dtype)
        for begin in range(0, self.numel, max(tile.numel(), 1)):
            part = tile[: self.numel - begin]
            self._fill(begin, part)
            use(part)

    def freeze(self) -> None:
        """Files do not change."""


class _Job:
    """An opened checkpoint and the files that it becomes."""

    def __init__(self, source: Path, inject_missing_state: bool) -> None:
        self.source, self.inject_missing_state = source, inject_missing_state
        self._open()
        self.shapes = {name: shape for group in self._reader.groups for name, shape in group.shapes.items()}
        self._group_of = {name: i for i, group in enumerate(self._reader.groups) for name in group.shapes}
        self._sizes = self.tasks()

    def _open(self) -> None:
        self._weights = PartitionedWeights(self.source) if is_partitioned(self.source) else None
        reader = self._weights.reader if self._weights is not None else _open(self.source)
        if reader is None:
            raise CheckpointError(f"{self.source} holds no optimizer state, which a universal folder consists of")
        self._reader: ZeroReader = reader
        self._mapped_nbytes = 0

    def group_names(self) -> list[list[str]]:
        """Names of the trained parameters by group."""
        return [list(group.shapes) for group in self._reader.groups]

    def tasks(self) -> dict[str, int]:
        """What can be written on its own, by name, and the size of that in bytes; parameters by theirs."""
        sizes = {
            name: prod(shape) * 4 * (1 + len(self._reader.groups[self._group_of[name]].state_keys))
            for name, shape in self.shapes.items()
        }
        module = sum(value.nbytes for value in self._reader.model_state["module"].values() if torch.is_tensor(value))
        if self._weights is not None:
            module += 2 * sum(map(prod, self._weights.shapes.values()))
        return {**dict(sorted(sizes.items(), key=lambda item: -item[1])), "": module}

    def write(self, task: str, folder: Path) -> None:
        """Writes the files of a parameter, or, for ``""``, those of the whole model."""
        if task:
            self._write_parameter(task, folder)
        else:
            self._write_model(folder)
        # Pages of files that were read stay in the process as long as the files are mapped.
        self._mapped_nbytes += self._sizes[task]
        if self._mapped_nbytes > _MAPPED_NBYTES:
            self._open()

    def _write_parameter(self, name: str, folder: Path) -> None:
        place = parameter_folder(folder, name)
        place.mkdir(parents=True)
        for key, value in self._state_of(name):
            _write(place / f"{key}.pt", value)

    def _state_of(self, name: str) -> Iterator[tuple[str, Any]]:
        group, shape = self._reader.groups[self._group_of[name]], self.shapes[name]
        yield MASTER, self._elementwise(name, MASTER, shape)
        whole = self._reader.whole_state(name)
        if whole is not None:
            yield from ((key, _entry(key, value)) for key, value in whole.items())
            return
        for key in group.state_keys:
            yield key, self._elementwise(name, key, shape)
        for key, value in group.state_scalars.items():
            yield key, _entry(key, value)
        if "step" in group.param_group and "step" not in group.state_scalars:  # where some optimizers count
            yield "step", _entry("step", group.param_group["step"])

    def _elementwise(self, name: str, key: str, shape: tuple[int, ...]) -> dict[str, Any]:
        def fill(begin: int, out: torch.Tensor) -> None:
            layout = ShardLayout(1, (out.numel(),), (Span(name, begin, 0, 0, out.numel()),))
            self._reader.fill(None, key, layout, 0, out)

        return _wrapped(_Range(shape, torch.float32, fill))

    def _write_model(self, folder: Path) -> None:
        (folder / "zero").mkdir(exist_ok=True)
        shapes = [OrderedDict((n, torch.Size(s)) for n, s in group.shapes.items()) for group in self._reader.groups]
        state = {**self._reader.model_state, "optimizer": None, "param_shapes": shapes}
        if self.inject_missing_state:
            state.setdefault("universal_checkpoint_info", {"universal_checkpoint_version": 0.2})
        module = self._module()
        frozen = state.get("frozen_param_shapes") or {}
        fragments = OrderedDict((name, module[name]) for name in frozen if name in module)
        whole = {**state, "module": module, "frozen_param_fragments": fragments or None}
        _write(folder / model_states_name(), whole)
        # The reference's stage 3 looks for files of stage 3, and takes buffers from them.
        names = {*self.shapes, *frozen, *(state.get("shared_params") or {})}
        blank = OrderedDict(
            (name, torch.empty(0, dtype=value.dtype) if name in names else value) for name, value in module.items()
        )
        partial = {**state, "module": blank, "frozen_param_fragments": None}
        _write(folder / model_states_name(dp_rank=0), partial)
        _write(folder / "zero" / OPTIMIZER_STATE, self._optimizer_state())

    def _module(self) -> OrderedDict[str, Any]:
        """Weights in the model's dtype; tied ones are one entry in the file."""
        entries, weights = self._reader.model_state["module"], self._weights
        if weights is None:
            return OrderedDict(entries)
        found: dict[str, _Range] = {}

        def entry(name: str, value: Any) -> Any:
            if name not in weights:
                return value
            own = weights.aliases.get(name, name)
            if own not in found:
                found[own] = _Range(weights.shape(own), value.dtype, lambda begin, out: weights.fill(own, begin, out))
            return found[own]

        return OrderedDict((name, entry(name, value)) for name, value in entries.items())

    def _optimizer_state(self) -> dict[str, Any]:
        groups = self._reader.groups
        options = [{**group.param_group, "params": [index]} for index, group in enumerate(groups)]
        scalars = {index: {k: _entry(k, v) for k, v in g.state_scalars.items()} for index, g in enumerate(groups)}
        return {
            **_common(self._reader.common),
            "zero_stage": self._reader.zero_stage,
            "partition_count": self._reader.world_size,
            "param_groups": options,
            "optimizer_state_dict": {"state": scalars, "param_groups": options},
            "ds_version": __version__,
        }


def _wrapped(tensor: Any) -> dict[str, Any]:
    """As readers expect tensors; ``cat_dim`` is where model-parallel ranks would be put together."""
    return {"param": tensor, "cat_dim": 0}


def _entry(key: str, value: Any) -> Any:
    """A state's file. Step counts are fp32 tensors without dimensions, as readers expect."""
    if torch.is_tensor(value) and value.dim():
        return _wrapped(value)
    return torch.tensor(float(value), dtype=torch.float32) if key == "step" else value


def _common(common: Mapping[str, Any]) -> dict[str, Any]:
    """What holds for the whole optimizer. A static loss scale is the config's, and left out.

    A dynamic scaler becomes the object that the reference expects; this package reads such as plain values.
    """
    rest = {key: value for key, value in common.items() if key != "loss_scaler"}
    saved = common.get("loss_scaler")
    if not isinstance(saved, Mapping) or not common.get("dynamic_loss_scale"):
        return rest
    scaler = DynamicLossScaler.__new__(DynamicLossScaler)
    vars(scaler).update({**saved, "dynamic": True})
    return {**rest, "loss_scaler": scaler}


def _open(source: Path) -> NativeZeroReader:
    model_state = load_file(model_states_path(source))
    if model_state.get("param_shapes") is not None:
        return NativeZeroReader(source)
    return NativeZeroReader(source, param_names=_stage0_names(model_state, source))


def _stage0_names(model_state: Mapping[str, Any], source: Path) -> list[list[str]]:
    """Names of the trained parameters, which stage 0 files of the reference do not hold: found by order, shape and value.

    Raises:
        CheckpointError: several assignments are possible.
    """
    saved = model_state.get("optimizer") or {}
    inner = saved.get("optimizer_state_dict", saved)
    if not inner:
        raise CheckpointError(f"{source} holds no optimizer state, which a universal folder consists of")
    buffers, seen, candidates = set(model_state.get("buffer_names") or ()), set(), []
    for name, value in model_state["module"].items():
        if name in buffers or value.data_ptr() in seen:  # of tied parameters, the first
            continue
        seen.add(value.data_ptr())
        candidates.append((name, value))
    found = []
    for index, group in enumerate(inner["param_groups"]):
        masters = saved["fp32_groups"][index] if "fp32_groups" in saved else None
        states = [inner["state"].get(i) or {} for i in group["params"]]
        wanted = [masters[i] if masters is not None else _like(state) for i, state in enumerate(states)]
        found.append(_aligned(wanted, candidates, masters is not None))
        if found[-1] is None:
            raise CheckpointError(
                f"{source} is a stage 0 folder that does not tell which parameters were trained, and its shapes leave "
                "several possibilities. Load it into an engine, which knows, and save it from there"
            )
    return [names for names in found if names is not None]


def _like(state: Mapping[str, Any]) -> torch.Tensor | None:
    return next((value for key, value in state.items() if torch.is_tensor(value) and key != "step"), None)


def _aligned(
    wanted: Sequence[torch.Tensor | None], candidates: Sequence[tuple[str, torch.Tensor]], values: bool
) -> list[str] | None:
    """The only way to give each wanted tensor a candidate, in order; None if there is none, or more than one."""

    def fits(tensor: torch.Tensor | None, candidate: torch.Tensor) -> bool:
        if tensor is None or tensor.shape != candidate.shape:
            return False
        return not values or torch.equal(tensor.to(candidate.dtype), candidate)

    def greedy(tensors: Sequence[torch.Tensor | None], pool: Sequence[tuple[str, torch.Tensor]]) -> list[str] | None:
        names, rest = [], iter(pool)
        for tensor in tensors:
            name = next((name for name, candidate in rest if fits(tensor, candidate)), None)
            if name is None:
                return None
            names.append(name)
        return names

    first = greedy(wanted, candidates)
    last = greedy(wanted[::-1], candidates[::-1])
    return first if first is not None and last is not None and first == last[::-1] else None


# -- writing -----------------------------------------------------------------------------------------------------------


def _write(path: Path, content: Any) -> None:
    with BlockFile(path) as file:
        Archive(content).write(file)


def _run(job: _Job, folder: Path, workers: int) -> None:
    """All tasks, in this process or in as many as they are worth."""
    from tqdm import tqdm  # noqa: PLC0415 - needed here only

    tasks = job.tasks()
    total = sum(tasks.values())
    workers = min(workers, len(tasks), os.cpu_count() or 1, max(1, total // _WORTH_A_PROCESS_NBYTES))
    with tqdm(total=total, unit="B", unit_scale=True, desc=folder.parent.name, disable=not sys.stderr.isatty()) as bar:
        if workers == 1:
            for task, nbytes in tasks.items():
                job.write(task, folder)
                bar.update(nbytes)
            return
        # Not forked: the caller may have threads.
        context = multiprocessing.get_context("spawn")
        arguments = (job.source, job.inject_missing_state, folder)
        with ProcessPoolExecutor(workers, context, initializer=_start, initargs=arguments) as pool:
            futures = {pool.submit(_work, task): nbytes for task, nbytes in tasks.items()}
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update(futures[future])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


_worker: tuple[_Job, Path] | None = None


def _start(source: Path, inject: bool, folder: Path) -> None:
    """In a worker: opens the checkpoint, once."""
    global _worker
    torch.set_num_threads(1)
    _worker = _Job(source, inject), folder


def _work(task: str) -> None:
    if _worker is None:
        raise AssertionError("a worker was given a task before it was started")
    job, folder = _worker
    job.write(task, folder)


def _fsync_tree(folder: Path) -> None:
    """Makes the names of all files durable; their contents are."""
    for place, *_ in os.walk(folder):
        fsync_folder(Path(place))


if __name__ == "__main__":
    logger.setLevel(logging.INFO)
    try:
        main()
    except (CheckpointError, ValueError, OSError) as error:
        sys.exit(f"ds_to_universal: {error}")
