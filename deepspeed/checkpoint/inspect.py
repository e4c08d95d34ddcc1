"""``python -m deepspeed.checkpoint.inspect``: what a checkpoint folder holds, and how two of them differ.

Works on folders of this package and the reference at any ZeRO stage and world size, universal folders and safetensors,
needs no process group and no device, and reads no tensors but for ``--verify`` and ``--values``. Exit status: 0; 1 if the
checkpoint is damaged or the two differ; 2 if there is nothing to inspect.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepspeed._core.ckpt.contrast import Contrast, contrast
from deepspeed._core.ckpt.describe import Description, Opened, files_of, is_checkpoint
from deepspeed._core.ckpt.manifest import MANIFEST, Manifest, read_manifest
from deepspeed._core.ckpt.native import read_latest
from deepspeed._core.ckpt.staging import leftovers, visible
from deepspeed._core.ckpt.universal import LATEST_UNIVERSAL
from deepspeed.errors import CheckpointError

__all__ = ["Report", "Tag", "compare", "inspect", "main"]

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@dataclass(frozen=True)
class Tag:
    """One checkpoint of a folder.

    Attributes:
        status: ``complete`` (all files have the sizes that the manifest says), ``verified`` (and the checksums),
            ``unverified`` (there is no manifest), or ``damaged``.
        problem: what is damaged.
        saved_at: seconds since 1970; without a manifest, when the newest file was written.
        nbytes: size of all files.
    """

    name: str
    path: str
    status: str
    problem: str | None
    saved_at: float
    global_steps: int | None
    nbytes: int


@dataclass(frozen=True)
class Report:
    """What a folder holds.

    Attributes:
        folder: as given.
        latest, latest_universal: the tags that these files name.
        tags: newest first.
        hidden: folders of saves that are running or were killed, with their size in bytes.
        shown: name of the tag that ``checkpoint`` describes.
        checkpoint: None if it cannot be read.
    """

    folder: str
    latest: str | None
    latest_universal: str | None
    tags: tuple[Tag, ...]
    hidden: dict[str, int]
    shown: str | None
    checkpoint: Description | None

    @property
    def damaged(self) -> bool:
        """Whether the tag that is shown is damaged."""
        return any(tag.name == self.shown and tag.status == "damaged" for tag in self.tags)


def inspect(
    folder: str | os.PathLike[str], tag: str | None = None, *, verify: bool = False, progress: Progress | None = None
) -> Report:
    """What a folder holds, without loading tensors. Not collective.

    Args:
        folder: a ``save_dir``, a tag folder, a universal folder, or a folder of safetensors.
        tag: the one to describe; default what ``latest`` names, else the newest.
        verify: read all bytes of it, and compare checksums: those of the manifest or, without one, those inside the
            files.
        progress: called now and then while that goes on.

    Raises:
        CheckpointError: the folder does not exist, or holds no checkpoint, or not that tag.
    """
    root = Path(folder)
    if not root.is_dir():
        raise CheckpointError(f"{root}: expected a checkpoint folder, but there is no such folder")
    itself = _is_tag_folder(root)
    places = [] if itself else _tag_folders(root)
    if tag is None and not places and (itself or is_checkpoint(root)):
        name = Path(os.path.abspath(root)).name
        one, checkpoint = _describe(name, root, verify, progress)
        return Report(str(folder), None, None, (one,), {}, name, checkpoint)
    latest, universal = read_latest(root), read_latest(root, LATEST_UNIVERSAL)
    tags = {one.name: one for one in (_status(name, place) for name, place in places)}
    newest = sorted(tags, key=lambda name: (tags[name].saved_at, tags[name].global_steps or 0, name), reverse=True)
    shown = tag if tag is not None else latest if latest in tags else next(iter(newest), None)
    if shown not in tags:
        known = f"tags in this folder: {', '.join(newest)}" if newest else "there is none in this folder"
        raise CheckpointError(f"{root} holds no checkpoint{'' if tag is None else f' of tag {tag!r}'}; {known}")
    tags[shown], checkpoint = _describe(shown, Path(tags[shown].path), verify, progress)
    hidden = {one.path.name: sum(files_of(one.path).values()) for one in leftovers(root)}
    return Report(str(folder), latest, universal, tuple(tags[name] for name in newest), hidden, shown, checkpoint)


def _is_tag_folder(root: Path) -> bool:
    return any(root.glob("*mp_rank_*_states.pt")) or (root / MANIFEST).is_file()


def _tag_folders(root: Path) -> list[tuple[str, Path]]:
    """Names and folders of all checkpoints; also of one that a killed save had moved aside."""
    plain = [p for p in root.iterdir() if not p.name.startswith(".") and p.is_dir()]
    found = {p.name: p for p in plain if (p / MANIFEST).is_file() or is_checkpoint(p)}
    for one in leftovers(root):
        place = visible(root, one.tag)
        if one.tag not in found and place.is_dir() and is_checkpoint(place):
            found[one.tag] = place
    return sorted(found.items())


def _status(name: str, folder: Path) -> Tag:
    """By what the manifest says; reads no other file."""
    files = files_of(folder)
    nbytes = sum(files.values())
    written = max(((folder / file).stat().st_mtime for file in files), default=0.0)
    manifest, problem = None, None
    try:
        manifest = read_manifest(folder)
        if manifest is not None:
            manifest.check_sizes(folder)
    except CheckpointError as error:
        problem = str(error)
    if manifest is None:
        return Tag(name, str(folder), "unverified" if problem is None else "damaged", problem, written, None, nbytes)
    status = "complete" if problem is None else "damaged"
    return Tag(name, str(folder), status, problem, manifest.saved_at, manifest.global_steps, nbytes)


def _describe(name: str, folder: Path, verify: bool, progress: Progress | None) -> tuple[Tag, Description | None]:
    found = asdict(_status(name, folder))
    checkpoint = None
    try:
        checkpoint = Opened(folder).describe()
        found["global_steps"] = checkpoint.counters.get("global_steps")
        if verify and found["status"] != "damaged":
            _verify(folder, read_manifest(folder), progress or (lambda done, total: None))
            found["status"] = "verified"
    except CheckpointError as error:
        found["status"], found["problem"] = "damaged", found["problem"] or str(error)
    return Tag(**found), checkpoint


def _verify(folder: Path, manifest: Manifest | None, progress: Progress) -> None:
    """Reads all bytes.

    Raises:
        CheckpointError: names the file that is not what was written.
    """
    if manifest is not None:
        nbytes, done = manifest.nbytes, 0

        def tell(count: int) -> None:
            nonlocal done
            done += count
            progress(done, nbytes)

        manifest.check_content(folder, progress=tell)
        return
    sizes = {name: nbytes for name, nbytes in files_of(folder).items() if name.endswith(".pt")}
    done = 0
    for name, nbytes in sizes.items():
        _check_zip(folder / name)
        done += nbytes
        progress(done, sum(sizes.values()))


def _check_zip(path: Path) -> None:
    """The records of a file of ``torch.save`` have checksums of their own."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is truncated, damaged or something else: {error}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of its record {damaged} differs")


def compare(
    one: str | os.PathLike[str],
    two: str | os.PathLike[str],
    *,
    tag: str | None = None,
    tag_two: str | None = None,
    values: bool = False,
    progress: Progress | None = None,
) -> Contrast:
    """How two checkpoints differ in names, shapes, dtypes, counters and options; stage and world size do not count.

    Args:
        one, two: folders as in :func:`inspect`.
        tag, tag_two: of the first and the second folder, where these are not tag folders themselves; ``tag_two`` is
            ``tag`` by default.
        values: also compare all weights, masters and optimizer state, a tile at a time.
        progress: called now and then while that goes on.

    Raises:
        CheckpointError: a folder holds no checkpoint, or a damaged one.
    """
    opened = []
    for folder, wanted in ((one, tag), (two, tag_two if tag_two is not None else tag)):
        report = inspect(folder, None if _is_tag_folder(Path(folder)) else wanted)
        (found,) = (known for known in report.tags if known.name == report.shown)
        if found.status == "damaged":
            raise CheckpointError(f"{found.path} cannot be compared: {found.problem}")
        opened.append(Opened(found.path))
    return contrast(opened[0], opened[1], values=values, progress=progress)


# -- text --------------------------------------------------------------------------------------------------------------


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return str(value)


def _text_of(report: Report) -> list[str]:
    lines = [f"{report.folder}"]
    for tag in report.tags:
        marks = [name for name in ("latest", "latest_universal") if getattr(report, name) == tag.name]
        steps = "" if tag.global_steps is None else f", step {tag.global_steps}"
        lines.append(
            f"  {tag.name}: {tag.status}{steps}, {_size(tag.nbytes)}, {_when(tag.saved_at)}"
            + (f" <- {', '.join(marks)}" if marks else "")
        )
        lines += [f"    {tag.problem}"] if tag.problem else []
    if report.latest is not None and report.latest not in {tag.name for tag in report.tags}:
        lines.append(f"  latest names {report.latest!r}, which is not there")
    lines += [f"  {name}: of a save that is running or was killed, {_size(n)}" for name, n in report.hidden.items()]
    if report.checkpoint is not None:
        lines += ["", f"{report.shown}", *(f"  {line}" for line in _text_of_checkpoint(report.checkpoint))]
    return lines


def _text_of_checkpoint(found: Description) -> list[str]:
    facts = {
        "format": found.kind,
        "ZeRO stage": found.zero_stage,
        "world size": found.world_size,
        "model-parallel size": found.model_parallel_size if (found.model_parallel_size or 1) > 1 else None,
        "dtype": found.dtype,
        "written by": f"deepspeed {found.version}" if found.version else None,
        "counters": _plain(found.counters) or None,
        "optimizer": found.optimizer,
        "scheduler": _plain(found.scheduler) if found.scheduler else None,
        "loss scaler": _plain(found.loss_scaler) if found.loss_scaler else None,
        "client state": _plain(found.client_state) or None,
    }
    lines = [f"{name}: {value}" for name, value in facts.items() if value is not None]
    for index, group in enumerate(found.groups):
        lines += [
            f"group {index}: {group.parameters} parameters of {group.numel:,} elements",
            f"  state: {_plain(group.state) or 'none'}",
            f"  options: {_plain(group.options) or 'none'}",
        ]
    lines += _text_of_entries(found)
    lines.append(f"files: {len(found.files)}, {_size(found.nbytes)}")
    shown = {name: size for name, size in found.files.items() if not name.startswith("zero/")}
    lines += [f"  {name}: {_size(size)}" for name, size in shown.items()]
    rest = [size for name, size in found.files.items() if name not in shown]
    return lines + ([f"  zero/...: {len(rest)} files, {_size(sum(rest))}"] if rest else [])


def _text_of_entries(found: Description) -> list[str]:
    totals: dict[str, list[int]] = {}
    for entry in found.entries.values():
        totals.setdefault(entry.kind, []).append(0 if entry.kind == "tied" else entry.numel)
    counts = [f"{kind} {len(n)} ({sum(n):,} elements)" for kind, n in totals.items()]
    width = max((len(name) for name in found.entries), default=0)
    lines = [f"module: {', '.join(counts)}"]
    for name, entry in found.entries.items():
        shape = "" if entry.shape is None else f"{entry.shape} "
        kind = f"tied to {entry.tied_to}" if entry.tied_to else entry.kind
        group = "" if entry.group is None or len(found.groups) < 2 else f", group {entry.group}"
        lines.append(f"  {name:{width}}  {shape}{entry.dtype}  {kind}{group}")
    return lines


# -- command line ------------------------------------------------------------------------------------------------------


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deepspeed.checkpoint.inspect",
        description="Prints what a checkpoint folder holds, without loading tensors, or how two differ.",
    )
    parser.add_argument("folder", help="save_dir, tag folder, universal folder or folder of safetensors")
    parser.add_argument("--tag", help="checkpoint to describe; default what 'latest' names")
    parser.add_argument("--verify", action="store_true", help="read all bytes and compare checksums")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--compare", metavar="FOLDER", help="another folder, to compare with")
    parser.add_argument("--compare-tag", metavar="TAG", help="checkpoint of the other folder; default as --tag")
    parser.add_argument("--values", action="store_true", help="with --compare: compare the values, too")
    args = parser.parse_args(arguments)
    if args.compare is None and (args.values or args.compare_tag):
        parser.error("--values and --compare-tag need --compare")
    if args.compare is not None and args.verify:
        parser.error("--verify is for one folder; --compare --values reads the values of both")
    return args


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    from tqdm import tqdm  # noqa: PLC0415 - needed here only

    args = _parse(arguments)
    with tqdm(total=0, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            if args.compare is None:
                report = inspect(args.folder, args.tag, verify=args.verify, progress=progress)
                found, lines, status = asdict(report), _text_of(report), int(report.damaged)
            else:
                result = compare(
                    args.folder,
                    args.compare,
                    tag=args.tag,
                    tag_two=args.compare_tag,
                    values=args.values,
                    progress=progress,
                )
                found, lines, status = asdict(result), result.text(), int(result.different)
        except (CheckpointError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    print(json.dumps(_strict(found), indent=1) if args.json else "\n".join(lines))
    return status


def _strict(value: Any) -> Any:
    """What JSON has no word for, as text."""
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
