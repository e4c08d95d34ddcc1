"""What a complete checkpoint folder consists of: a list of its files with sizes and checksums, written last.

A folder that has one is complete by construction: it got its name when everything in it, the list included, was on the
disk. Folders of other programs have none; they are taken as they are.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deepspeed._core.ckpt.blockfile import BLOCK_NBYTES, FileSum, check_size
from deepspeed._core.ckpt.blockreader import check_blocks
from deepspeed._core.ckpt.filereader import FileReader
from deepspeed._core.ckpt.io import atomic_write_text
from deepspeed.errors import CheckpointError

__all__ = ["MANIFEST", "Manifest", "check_complete", "known_tags", "read_manifest", "runs", "write_manifest"]

MANIFEST = "manifest.json"

FORMAT = 1

_WAY_OUT = "Load another tag, or remove it to skip all checks"


@dataclass(frozen=True)
class Manifest:
    """A complete checkpoint.

    Attributes:
        tag: name of the folder when it was saved.
        saved_at: seconds since 1970, by the clock of the rank that finished the save.
        global_steps: optimizer steps taken.
        zero_stage, world_size: of the run that saved it.
        ds_version: of this package.
        files: size and checksums by file name.
    """

    tag: str
    saved_at: float
    global_steps: int
    zero_stage: int
    world_size: int
    ds_version: str
    files: Mapping[str, FileSum] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of all files together."""
        return sum(known.nbytes for known in self.files.values())

    def check_sizes(self, folder: Path) -> None:
        """Whether all files are there and as long as they were. Reads none of them.

        Raises:
            CheckpointError: names the first that is not.
        """
        for name, known in self.files.items():
            check_size(folder / name, known)

    def check_content(
        self,
        folder: Path,
        part: int = 0,
        parts: int = 1,
        progress: Callable[[int], object] | None = None,
        blocks: Sequence[tuple[str, int]] | None = None,
    ) -> None:
        """Reads one of ``parts`` equal parts of ``blocks`` (a file's name and an index; all by default).

        Compares checksums, and tells ``progress`` how many bytes it has read.

        Raises:
            CheckpointError: names the file and the damaged bytes.
        """
        blocks = self.blocks() if blocks is None else blocks
        low, high = len(blocks) * part // parts, len(blocks) * (part + 1) // parts
        with FileReader() as reader:
            for name, run in runs(blocks[low:high]):
                check_blocks(folder / name, self.files[name], run, progress, reader)

    def blocks(self) -> list[tuple[str, int]]:
        """All blocks that have a checksum: name of the file, and index."""
        return [(name, block) for name, known in self.files.items() for block in range(len(known.crc32))]


def runs(blocks: Iterable[tuple[str, int]]) -> Iterable[tuple[str, list[int]]]:
    """The blocks of each file together."""
    found: dict[str, list[int]] = {}
    for name, block in blocks:
        found.setdefault(name, []).append(block)
    return found.items()


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode("utf-8"))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes it into a folder whose other files are complete."""
    content = asdict(manifest)
    content["files"] = {
        name: {"nbytes": known.nbytes, "crc32": list(known.crc32)} for name, known in sorted(manifest.files.items())
    }
    content = {"format": FORMAT, "block_nbytes": BLOCK_NBYTES, **content}
    atomic_write_text(folder / MANIFEST, json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n")


def read_manifest(folder: str | os.PathLike[str]) -> Manifest | None:
    """The manifest of a folder; None if it has none.

    Raises:
        CheckpointError: it is damaged, or of a later version of this package.
    """
    path = Path(folder) / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. {_WAY_OUT}") from error
    if not isinstance(content, dict) or "checksum" not in content:
        raise CheckpointError(f"{path} is no manifest of this package. {_WAY_OUT}")
    checksum = content.pop("checksum")
    if isinstance(content.get("format"), int) and content["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {content['format']}, written by deepspeed {content.get('ds_version')}; this version reads "
            f"formats up to {FORMAT}: upgrade deepspeed"
        )
    if checksum != _checksum(content):
        raise CheckpointError(f"{path} is damaged: its own checksum differs. {_WAY_OUT}")
    block = content["block_nbytes"]
    files = {name: FileSum(known["nbytes"], tuple(known["crc32"]), block) for name, known in content["files"].items()}
    fields = {name: content[name] for name in Manifest.__dataclass_fields__ if name != "files"}
    return Manifest(files=files, **fields)


def check_complete(folder: str | os.PathLike[str]) -> Manifest | None:
    """The manifest of a folder all of whose files are there and as long as they were; None if it has none.

    Raises:
        CheckpointError: says what is missing or damaged.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        manifest.check_sizes(Path(folder))
    return manifest


def known_tags(root: str | os.PathLike[str]) -> list[str]:
    """Tags of checkpoints of this package in a folder, newest first; damaged ones are left out."""
    found: list[tuple[float, int, str]] = []
    for folder in Path(root).iterdir():
        if folder.name.startswith(".") or not folder.is_dir():  # hidden: see staging.py
            continue
        try:
            manifest = check_complete(folder)
        except CheckpointError:
            continue
        if manifest is not None:
            found.append((manifest.saved_at, manifest.global_steps, folder.name))
    return [tag for *_, tag in sorted(found, reverse=True)]
