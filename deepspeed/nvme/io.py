"""``ds_io``: how fast one pattern of file reads or writes is (DeepNVMe; flags and defaults as published)."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from deepspeed.accelerator import get_accelerator
from deepspeed.errors import ConfigError, MissingFeatureError
from deepspeed.nvme.flags import check_folder, nbytes_flag, refuse_gds, require_gpu, run_command
from deepspeed.ops.aio import AsyncIOBuilder

__all__ = ["main"]

_ENGINES = ("aio_handle", "aio_basic", "torch_io", "torch_fastio")
# Of a spawned process: all begin a loop together, so that they load the disk together.
_together: Any = None


@dataclass(frozen=True)
class Target:
    """A file's folder, and the device whose memory its bytes go to or come from (None: host)."""

    folder: str
    device: int | None


@dataclass(frozen=True)
class Plan:
    """What one process does."""

    options: argparse.Namespace
    index: int
    targets: tuple[Target, ...]


def main(args: Sequence[str] | None = None) -> int:
    """The ``ds_io`` command. Returns 0; exits with a message if a flag or a file is wrong."""
    return run_command(_command, args, "ds_io")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ds_io",
        description="Measures reads or writes of one file per process and folder. The files are removed at the end.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--folder", help="folder for the files, on the disk to measure")
    pairs = "folders with the GPU each is for: PATH:ID"
    add("--folder_to_device_mapping", nargs="+", default=[], metavar="PATH:ID", help=pairs)
    add("--io_size", type=nbytes_flag, required=True, help="bytes of each file, e.g. 400M")
    add("--fast_io_size", type=nbytes_flag, default=None, help="buffer of the engine torch_fastio (64M)")
    add("--read", action="store_true", help="read; otherwise write")
    add("--multi_process", type=int, default=1, help="processes, each with files of its own")
    add("--block_size", type=nbytes_flag, default="1M", help="bytes of a block")
    add("--queue_depth", type=int, default=32, help="blocks in flight")
    add("--single_submit", action="store_true", help="one block a call")
    add("--sequential_requests", action="store_true", help="a process's files one after the other, not together")
    add("--validate", action="store_true", help="compare what was moved, after the last loop")
    add("--engine", choices=_ENGINES, default="aio_handle", help="aio_basic: blocking calls; torch_io: torch.save")
    add("--loops", type=int, default=3, help="measured passes")
    add("--io_parallel", type=int, default=None, help="threads that share one file")
    add("--gpu", action="store_true", help="from and to GPU memory")
    add("--use_gds", action="store_true", help="GPUDirect Storage; refused: not in this version")
    add("--slow_bounce_buffer", action="store_true", help="with --gpu: pageable buffers (which is all there are)")
    add("--torch_legacy_save", action="store_true", help="with torch_io: the format before zip")
    add("--use_accelerator_pin_memory", action="store_true", help="memory locked by the accelerator")
    add("--warmup_loops", type=int, default=1, help="passes before those that count")
    add("--include_warmup_time", action="store_true", help="count the warm-up, too")
    add("--different_file_each_iteration", action="store_true", help="a new file for each pass")
    return parser


def _check(options: argparse.Namespace) -> None:
    if options.use_gds:
        refuse_gds("--use_gds")
    if options.engine == "torch_fastio":
        raise MissingFeatureError("--engine torch_fastio is not in this version; use aio_handle, aio_basic or torch_io")
    if options.fast_io_size is not None:
        raise ConfigError("--fast_io_size has a meaning with --engine torch_fastio only, which is not in this version")
    if options.gpu:
        require_gpu()
    if options.slow_bounce_buffer and not options.gpu:
        raise ConfigError("--slow_bounce_buffer has a meaning with --gpu only")
    if options.torch_legacy_save and options.engine != "torch_io":
        raise ConfigError("--torch_legacy_save has a meaning with --engine torch_io only")
    if options.io_parallel is not None and options.engine != "aio_handle":
        raise ConfigError(f"--io_parallel has a meaning with --engine aio_handle only, not with {options.engine}")
    for name, least in {"multi_process": 1, "queue_depth": 1, "loops": 1, "io_parallel": 1, "warmup_loops": 0}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} must be at least {least}, but is {value}")


def _targets(options: argparse.Namespace) -> list[Target]:
    if bool(options.folder) == bool(options.folder_to_device_mapping):
        raise ConfigError("give either --folder or --folder_to_device_mapping")
    if options.folder:
        return [Target(check_folder(options.folder, "--folder"), 0 if options.gpu else None)]
    found = []
    for pair in options.folder_to_device_mapping:
        folder, _, device = pair.rpartition(":")
        if not folder or not device.isdigit():
            raise ConfigError(f"--folder_to_device_mapping takes PATH:ID, such as /local_nvme:0, but got {pair!r}")
        check_folder(folder, "--folder_to_device_mapping")
        found.append(Target(folder, int(device) if options.gpu else None))
    return found


def _command(args: Sequence[str] | None) -> None:
    options = _parser().parse_args(args)
    _check(options)
    targets = _targets(options)
    count = options.multi_process
    # Folders are dealt out to processes; if there are fewer than processes, several work in one folder.
    shares = [targets[i::count] or [targets[i % len(targets)]] for i in range(count)]
    plans = [Plan(options, i, tuple(share)) for i, share in enumerate(shares)]
    if count == 1:
        taken = [_run(plans[0])]
    else:
        context = multiprocessing.get_context("spawn")
        initargs = (context.Barrier(count),)
        with ProcessPoolExecutor(count, mp_context=context, initializer=_join, initargs=initargs) as pool:
            taken = list(pool.map(_run, plans))
    loops = options.loops + (options.warmup_loops if options.include_warmup_time else 0)
    moved = sum(len(plan.targets) for plan in plans) * options.io_size * loops
    print(
        f"ds_io: {'read' if options.read else 'write'} with {options.engine}, {count} process(es), "
        f"{options.io_size} bytes a file, {loops} loop(s): {moved / max(taken) / 1e9:.2f} GB/sec"
    )


def _join(barrier: Any) -> None:
    global _together
    _together = barrier


def _run(plan: Plan) -> float:
    """Seconds of the loops that count. Runs in each process."""
    try:
        with _Pass(plan) as work:
            return work.measure()
    except BaseException:
        if _together is not None:
            _together.abort()  # or the others would wait for us
        raise


class _Pass:
    """One process's files and tensors."""

    def __init__(self, plan: Plan) -> None:
        options = plan.options
        self._plan = plan
        self._options = options
        self._handle = (
            AsyncIOBuilder()
            .load()
            .aio_handle(options.block_size, options.queue_depth, options.single_submit, True, options.io_parallel or 1)
        )
        self._tensors = [self._tensor(target) for target in plan.targets]
        self._written: set[str] = set()

    def __enter__(self) -> _Pass:
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._written:
            with suppress(FileNotFoundError):
                os.unlink(path)

    def measure(self) -> float:
        options = self._options
        passes = options.warmup_loops + options.loops
        if options.read:
            for index in range(passes if options.different_file_each_iteration else 1):
                self._move(index, read=False)
        seconds = 0.0
        bar = tqdm(range(passes), desc="ds_io", disable=None if self._plan.index == 0 else True, leave=False)
        for index in bar:
            if _together is not None:
                _together.wait()
            start = time.perf_counter()
            self._move(index, read=options.read)
            if index >= options.warmup_loops or options.include_warmup_time:
                seconds += time.perf_counter() - start
        if options.validate:
            self._validate(passes - 1)
        return seconds

    def _tensor(self, target: Target) -> torch.Tensor:
        nbytes = self._options.io_size
        if target.device is not None:
            return torch.ones(nbytes, dtype=torch.uint8, device=torch.device("cuda", target.device))
        if self._options.use_accelerator_pin_memory:
            return get_accelerator().pin_memory(torch.ones(nbytes, dtype=torch.uint8))
        return self._handle.new_cpu_locked_tensor(nbytes, torch.empty(0, dtype=torch.uint8)).fill_(1)

    def _path(self, target: Target, index: int) -> str:
        number = index if self._options.different_file_each_iteration else 0
        path = os.path.join(target.folder, f"_ds_io_{os.getpid()}_{self._plan.index}_{number}")
        self._written.add(path)
        return path

    def _move(self, index: int, *, read: bool) -> None:
        options, handle = self._options, self._handle
        together = options.engine == "aio_handle" and not options.sequential_requests
        for target, tensor in zip(self._plan.targets, self._tensors, strict=True):
            path = self._path(target, index)
            if options.engine == "torch_io":
                self._torch_io(tensor, path, read)
            elif read:
                handle.pread(tensor, path, False, together)
            else:
                handle.pwrite(tensor, path, False, together)
        if together:
            handle.wait()

    def _torch_io(self, tensor: torch.Tensor, path: str, read: bool) -> None:
        if read:
            tensor.copy_(torch.load(path, weights_only=True))
        else:
            torch.save(tensor, path, _use_new_zipfile_serialization=not self._options.torch_legacy_save)

    def _validate(self, index: int) -> None:
        """Raises ``OSError`` where file and tensor differ."""
        for target, tensor in zip(self._plan.targets, self._tensors, strict=True):
            path = self._path(target, index)
            if self._options.engine == "torch_io":
                if not torch.equal(torch.load(path, weights_only=True).cpu(), tensor.cpu()):
                    raise OSError(f"{path} does not hold what was written")
            else:
                (self._handle.read if self._options.read else self._handle.write)(tensor, path, validate=True)
