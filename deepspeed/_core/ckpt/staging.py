"""A checkpoint folder appears at once, complete, or not at all.

All ranks write into a hidden folder beside the final one. When all files are on the disk, it is renamed. If the name is
taken, the older folder is moved aside first and removed after; killed between the two renames, both are still there, and
readers find the newer one (:func:`visible`). A hidden folder carries the host and the process that made it, so that later
saves can remove what dead ones left.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path

from deepspeed._core.ckpt.io import fsync_folder
from deepspeed._core.ckpt.manifest import MANIFEST
from deepspeed.errors import CheckpointError

__all__ = ["Staging", "hidden_name", "remove_leftovers", "visible"]

_LEFT = re.compile(r"\.(?P<tag>.+)\.(?P<host>[^.]*)\.(?P<pid>\d+)\.(?P<id>[0-9a-f]{8})\.(?P<kind>new|old|gone)")

# What another host's process left may be in use: it is removed when it has been untouched for so long.
_STALE_S = 7 * 24 * 3600.0

# Files of ours in a tag folder; others belong to the user and move along.
_OURS = re.compile(r".*_(?:model|optim)_?states\.pt|manifest\.json|\..*\.tmp")


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())


def hidden_name(tag: str, kind: str) -> str:
    """A new name of a folder that is not a checkpoint yet (``new``) or any more (``old`` if replaced, else ``gone``)."""
    return f".{tag}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.{kind}"


class Staging:
    """The hidden folder of one save.

    Attributes:
        folder: where files go.
        target: what it becomes.
    """

    def __init__(self, root: Path, tag: str, name: str | None = None) -> None:
        self._root = root
        self.name = name or hidden_name(tag, "new")
        self.folder = root / self.name
        self.target = root / tag

    def create(self) -> None:
        """Makes the folder, and the one that it is in. On one rank."""
        self._root.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir()

    def require(self) -> None:
        """Whether this rank sees the folder that another has made.

        Raises:
            CheckpointError: it does not.
        """
        deadline = time.monotonic() + 10.0  # network file systems may take seconds to show a new folder
        while not self.folder.is_dir():
            with suppress(OSError):
                os.listdir(self._root)  # refreshes what the client has cached
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{self._root} is not the same folder on all nodes: rank 0 made {self.folder.name} in it, which is not "
                    f"here on {socket.gethostname()}. Save to storage that all nodes share, or set "
                    "checkpoint.use_node_local_storage"
                )
            time.sleep(0.05)

    def publish(self) -> None:
        """Gives the complete folder its name; what had it before is gone. On one rank."""
        fsync_folder(self.folder)
        aside = self._root / (self.name.removesuffix("new") + "old")
        replaced = self.target.exists()
        if replaced:
            os.rename(self.target, aside)
        os.rename(self.folder, self.target)
        fsync_folder(self._root)
        if replaced:
            _keep_foreign(aside, self.target)
            shutil.rmtree(aside, ignore_errors=True)

    def discard(self) -> None:
        """Removes it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _keep_foreign(old: Path, new: Path) -> None:
    """Moves what is not a checkpoint's from a replaced folder to the one that replaced it."""
    if not old.is_dir():
        return
    for path in old.iterdir():
        if not _OURS.fullmatch(path.name) and not (new / path.name).exists():
            with suppress(OSError):
                os.rename(path, new / path.name)


def visible(root: str | os.PathLike[str], tag: str) -> Path:
    """The folder of a tag: ``root / tag``, or, if a save was killed while replacing that, the newest complete one."""
    target = Path(root) / tag
    if target.exists() or not Path(root).is_dir():
        return target
    left: dict[str, list[Path]] = {"new": [], "old": [], "gone": []}
    for path in sorted(Path(root).iterdir()):
        match = _LEFT.fullmatch(path.name)
        if match is not None and match["tag"] == tag and path.is_dir():
            left[match["kind"]].append(path)
    if not left["old"]:
        return target  # nothing was being replaced: what lies there was never published
    ends = {path.name.removesuffix("old") for path in left["old"]}
    complete = [p for p in left["new"] if p.name.removesuffix("new") in ends and (p / MANIFEST).is_file()]
    return (complete or left["old"])[-1]


def remove_leftovers(root: Path, *, keep: str = "") -> None:
    """Removes hidden folders whose process has ended; what a killed save had moved aside gets its name back.

    Args:
        root: the folder with the tags.
        keep: name of the folder that is in use.
    """
    if not root.is_dir():
        return
    host = _host()
    for path in sorted(root.iterdir()):
        match = _LEFT.fullmatch(path.name)
        if match is None or path.name == keep or _in_use(match, host, path):
            continue
        with suppress(OSError):
            best = visible(root, match["tag"])
            if best != root / match["tag"]:
                os.rename(best, root / match["tag"])
            if path.exists():
                shutil.rmtree(path, ignore_errors=True)


def _in_use(match: re.Match[str], host: str, path: Path) -> bool:
    if match["host"] != host:
        with suppress(FileNotFoundError):
            return time.time() - path.stat().st_mtime < _STALE_S
        return False
    try:
        os.kill(int(match["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
