"""``ds_nvme_tune``: tries settings of the ``aio`` section on a disk, and prints the best (DeepNVMe tutorial, tuning)."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from deepspeed._core.ckpt.io import atomic_write_text
from deepspeed.errors import ConfigError
from deepspeed.nvme.flags import check_folder, nbytes_flag, refuse_gds, require_gpu, run_command
from deepspeed.nvme.sizes import parse_nbytes
from deepspeed.ops.aio import AsyncIOBuilder

__all__ = ["BEST_NAME", "RESULTS_NAME", "best_setting", "main", "settings_of"]

BEST_NAME = "best_aio.json"
RESULTS_NAME = "results.json"

# overlap_events changes nothing here, see `aio_handle`, and single_submit only costs.
_DEFAULT_SWEEP: dict[str, list[Any]] = {
    "block_size": ["1M", "8M"],
    "queue_depth": [8, 32, 128],
    "intra_op_parallelism": [1, 8],
    "single_submit": [False],
    "overlap_events": [True],
}
_ALIASES = {"io_parallel": "intra_op_parallelism", "thread_count": "intra_op_parallelism"}
_DROP_CACHES = "/proc/sys/vm/drop_caches"

Setting = dict[str, Any]


def main(args: Sequence[str] | None = None) -> int:
    """The ``ds_nvme_tune`` command. Returns 0; exits with a message if a flag or a file is wrong."""
    return run_command(_command, args, "ds_nvme_tune")


def settings_of(sweep: Mapping[str, Any]) -> list[Setting]:
    """Every combination of a sweep: lists of values by name; names that are not given keep their default list.

    Raises:
        ConfigError: an unknown name, or a value that the setting cannot have.
    """
    lists = dict(_DEFAULT_SWEEP)
    for name, values in sweep.items():
        own = _ALIASES.get(name, name)
        if own not in lists:
            raise ConfigError(f"--sweep_config: {name!r} is unknown; it takes {', '.join([*lists, *_ALIASES])}")
        lists[own] = [_value(own, value) for value in (values if isinstance(values, list) else [values])]
    lists["block_size"] = [_value("block_size", value) for value in lists["block_size"]]
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _value(name: str, value: Any) -> int | bool:
    if name in ("single_submit", "overlap_events"):
        known = {"true": True, "false": False}.get(str(value).lower())
        if known is None:
            raise ConfigError(f"--sweep_config: {name} must be true or false, but is {value!r}")
        return known
    if isinstance(value, str) and name == "block_size":
        try:
            return parse_nbytes(value)
        except ValueError as error:
            raise ConfigError(f"--sweep_config: block_size: {error}") from error
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"--sweep_config: {name} must be a whole number above 0, but is {value!r}")
    return value


def best_setting(results: Sequence[Mapping[str, Any]]) -> Setting:
    """The setting that takes the least time to read and write a byte. ``results`` have ``aio``, ``read``, ``write``.

    Rates are in GB/s, None where not measured. One that is a little slower than another in both loses to it, but one that
    reads fast and writes slowly loses to one that is fair at both: an offloaded step does as much of each.
    """
    return dict(min(results, key=lambda row: sum(1 / row[name] for name in ("read", "write") if row[name]))["aio"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ds_nvme_tune",
        description="Reads and writes files with many settings, and prints the best 'aio' section for the config.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--nvme_dir", nargs="+", required=True, help="folders on the disks that will be used together")
    add("--sweep_config", default=None, help="JSON file: lists of values to try, by name of the aio section's keys")
    add("--no_read", action="store_true", help="do not measure reads")
    add("--no_write", action="store_true", help="do not measure writes")
    add("--io_size", type=nbytes_flag, default="400M", help="bytes of the file in each folder")
    add("--gpu", action="store_true", help="from and to GPU memory")
    add("--gds", action="store_true", help="GPUDirect Storage; refused: not in this version")
    add("--flush_page_cache", action="store_true", help="empty the system's page cache before each read (as root)")
    add("--log_dir", default="./_aio_bench_logs", help="folder for the results")
    add("--loops", type=int, default=1, help="passes for each setting; the mean counts")
    add("--verbose", action="store_true", help="a line for each setting")
    return parser


def _command(args: Sequence[str] | None) -> None:
    options = _parser().parse_args(args)
    _check(options)
    settings = settings_of(_read_sweep(options.sweep_config))
    folders = [os.path.abspath(check_folder(folder, "--nvme_dir")) for folder in options.nvme_dir]
    os.makedirs(options.log_dir, exist_ok=True)
    print(f"Running DeepNVMe performance tuning on {options.nvme_dir}", flush=True)
    results = []
    with _Files(folders, options) as files:
        for setting in tqdm(settings, desc="ds_nvme_tune", disable=None, leave=False):
            row = {"aio": setting, **files.measure(setting)}
            results.append(row)
            if options.verbose:
                tqdm.write(json.dumps(row))
    best = {name: max((row[name] for row in results if row[name]), default=None) for name in ("read", "write")}
    print("Best performance (GB/sec): " + ", ".join(f"{n} = {v:5.2f}" for n, v in best.items() if v is not None))
    section = json.dumps({"aio": _printed(best_setting(results))}, indent=3)
    print(section)
    folder = Path(options.log_dir)
    atomic_write_text(folder / RESULTS_NAME, json.dumps(results, indent=1) + "\n")
    atomic_write_text(folder / BEST_NAME, section + "\n")


def _check(options: argparse.Namespace) -> None:
    if options.gds:
        refuse_gds("--gds")
    if options.gpu:
        require_gpu()
    if options.no_read and options.no_write:
        raise ConfigError("--no_read and --no_write leave nothing to measure")
    if options.loops < 1:
        raise ConfigError(f"--loops must be at least 1, but is {options.loops}")
    if options.flush_page_cache and not os.access(_DROP_CACHES, os.W_OK):
        raise ConfigError(f"--flush_page_cache: {_DROP_CACHES} can be written by root only; direct I/O needs no flush")


def _read_sweep(path: str | None) -> Mapping[str, Any]:
    if path is None:
        return {}
    try:
        found = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ConfigError(f"--sweep_config: {path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--sweep_config: {path} must hold an object of lists, but holds {type(found).__name__}")
    return found


def _printed(setting: Mapping[str, Any]) -> Setting:
    """As the published output has it: truth values are strings (which the config takes), and in its order."""
    order = ("single_submit", "overlap_events", "intra_op_parallelism", "queue_depth", "block_size")
    values = {name: setting[name] for name in order}
    return {name: str(value).lower() if isinstance(value, bool) else value for name, value in values.items()}


class _Files:
    """A file in each folder, and a tensor for each; gone when left."""

    def __init__(self, folders: Sequence[str], options: argparse.Namespace) -> None:
        self._options = options
        self._folders = [tempfile.TemporaryDirectory(prefix="ds_nvme_tune_", dir=folder) for folder in folders]
        self._paths = [os.path.join(folder.name, "file") for folder in self._folders]
        self._tensors: list[torch.Tensor] = []

    def __enter__(self) -> _Files:
        try:
            handle = AsyncIOBuilder().load().aio_handle()
            for path in self._paths:
                self._tensors.append(self._tensor(handle))
                handle.sync_pwrite(self._tensors[-1], path)  # reads need it, and first writes would pay for the space
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for folder in self._folders:
            folder.cleanup()

    def _tensor(self, handle: Any) -> torch.Tensor:
        nbytes = self._options.io_size
        if self._options.gpu:
            return torch.ones(nbytes, dtype=torch.uint8, device="cuda")
        return handle.new_cpu_locked_tensor(nbytes, torch.empty(0, dtype=torch.uint8)).fill_(1)

    def measure(self, setting: Setting) -> dict[str, float | None]:
        """GB/s of reads and of writes over all folders together; None if not wanted."""
        handles = [AsyncIOBuilder().load().aio_handle(**setting) for _ in self._paths]
        return {
            name: sum(rates) / len(rates) if (rates := list(self._rates(name, handles))) else None
            for name in ("write", "read")
        }

    def _rates(self, name: str, handles: Sequence[Any]) -> Iterator[float]:
        if getattr(self._options, f"no_{name}"):
            return
        for _ in range(self._options.loops):
            if name == "read" and self._options.flush_page_cache:
                os.sync()
                Path(_DROP_CACHES).write_text("1")
            start = time.perf_counter()
            for handle, path, tensor in zip(handles, self._paths, self._tensors, strict=True):
                (handle.async_pread if name == "read" else handle.async_pwrite)(tensor, path)
            for handle in handles:
                handle.wait()
            yield len(handles) * self._options.io_size / (time.perf_counter() - start) / 1e9
