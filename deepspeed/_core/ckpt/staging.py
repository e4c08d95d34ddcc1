"""A checkpoint folder appears at once, complete, or not at all.

All ranks write into a hidden folder beside the final one. When all files are on the disk, it is renamed. If the name is
taken, the older folder is moved aside first and removed after; killed between the two renames, both are still there, and
readers find the newer one (:func:`visible`). A hidden folder carries the host and the process that made it, so that later
saves can remove what dead ones left.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from deepspeed._core.ckpt.io import fsync_folder
from deepspeed._core.ckpt.manifest import MANIFEST
from deepspeed.errors import CheckpointError

__all__ = [
    "Staging",
    "check_tag",
    "hidden_name",
    "host_key",
    "leftovers",
    "remove_folder",
    "remove_hidden",
    "remove_leftovers",
    "tag_of",
    "visible",
    "wait_for_removals",
]

_HIDDEN = re.compile(
    r"\.(?P<tag>.+)\.(?P<host>[^.]*)\.(?P<pid>\d+)\.(?P<id>[0-9a-f]{8})\.(?P<kind>new|old|gone)", re.DOTALL
)

# Network file systems may take seconds to show a new folder to other nodes.
_PATIENCE_S = 10.0

# What another host's process left may be in use: it is removed when it has been untouched for so long.
_STALE_S = 24 * 3600.0

# Files of ours in a tag folder, and what network file systems make of deleted ones; others belong to the user.
_OURS = re.compile(r".*(?:model|optim)_?states\.pt|manifest\.json|\..*\.tmp|\.nfs[0-9a-f]+")

_HOST_NBYTES = 40
_TAG_NBYTES = 255 - _HOST_NBYTES - len("....1234567890.12345678.gone")  # 255: the longest name that file systems take

_FIRST_PID_NAMESPACE = 0xEFFFFFFC  # the host's own, by its number in Linux


def host_key() -> str:
    """Where a process number names one process: this host and, in a container, this container."""
    name = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())
    with suppress(OSError):
        namespace = os.stat("/proc/self/ns/pid").st_ino
        name += "" if namespace == _FIRST_PID_NAMESPACE else f"-{namespace:x}"
    if len(name) > _HOST_NBYTES:
        name = f"{name[: _HOST_NBYTES - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def hidden_name(tag: str, kind: str) -> str:
    """A new name of a folder that is not a checkpoint yet (``new``) or any more (``old`` if replaced, else ``gone``)."""
    return f".{tag}.{host_key()}.{os.getpid()}.{secrets.token_hex(4)}.{kind}"


def check_tag(tag: str) -> None:
    """Whether a tag can name a folder, and be read back from ``latest``.

    Raises:
        ValueError: it cannot; says why.
    """
    if not tag or Path(tag).name != tag or tag.startswith(".") or "\0" in tag:
        raise ValueError(f"tag {tag!r} cannot be a folder name; it must be one path component that begins with no dot")
    if tag != tag.strip() or "\n" in tag or "\r" in tag:
        raise ValueError(
            f"tag {tag!r} cannot be read back from the file 'latest': leave out line ends and outer spaces"
        )
    try:
        nbytes = len(tag.encode("utf-8"))
    except UnicodeEncodeError:
        raise ValueError(f"tag {tag!r} has characters that are not Unicode text; use others") from None
    if nbytes > _TAG_NBYTES:
        raise ValueError(f"tag {tag[:40]!r}... has {nbytes} bytes; file systems leave room for {_TAG_NBYTES}")


class Staging:
    """The hidden folder of one save.

    Attributes:
        folder: where files go.
        target: what it becomes.
    """

    def __init__(self, root: Path, tag: str, name: str | None = None) -> None:
        # A save in the background must not follow when the process changes its folder, or somebody a link.
        self._root = Path(os.path.realpath(root))
        self._tag = tag
        self.name = name or hidden_name(tag, "new")
        self.folder = self._root / self.name
        self.target = self._root / tag
        self._replaced: Path | None = None

    def create(self) -> None:
        """Makes the folder, and the one that it is in, after removing what killed saves left there. On one rank.

        Raises:
            ValueError: the tag cannot be a folder name.
            CheckpointError: a file is in the place of the tag's folder.
            OSError: the disk is full, or the folder is read-only.
        """
        check_tag(self._tag)
        wait_for_removals()  # there may be no room for three checkpoints
        self._root.mkdir(parents=True, exist_ok=True)
        # Not "is there, but is no folder": another run may be replacing the folder between two questions.
        if self.target.is_file() or (self.target.is_symlink() and not self.target.exists()):
            raise CheckpointError(f"{self.target} exists and is not a folder: remove it, or choose another tag")
        with suppress(OSError):
            remove_leftovers(self._root)
        self.folder.mkdir()

    def require(self) -> None:
        """Whether this rank sees the folder that another has made.

        Raises:
            CheckpointError: it does not.
        """
        deadline = time.monotonic() + _PATIENCE_S
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
        """Gives the complete folder its name; what had it before has none, but for files of others. On one rank.

        Raises:
            OSError: it has no name then, and what had it before has it still.
        """
        fsync_folder(self.folder)
        aside = self._root / (self.name.removesuffix("new") + "old")
        while not self._swap(aside):  # another run has put its own there at this moment: the later one stays
            _keep_foreign(aside, self.folder)
            remove_folder(aside)
        fsync_folder(self._root)
        _keep_foreign(aside, self.target)
        self._replaced = aside if os.path.lexists(aside) else None

    def remove_replaced(self) -> None:
        """Removes what had the name before. When nothing is to be synced any more: that would wait for gigabytes to go."""
        if self._replaced is not None:
            remove_hidden(self._replaced)

    def _swap(self, aside: Path) -> bool:
        """The two renames; False if the name was taken in between."""
        with suppress(FileNotFoundError):
            os.rename(self.target, aside)
        try:
            os.rename(self.folder, self.target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            with suppress(OSError):
                os.rename(aside, self.target)
            raise
        return True

    def discard(self) -> None:
        """Removes it."""
        remove_folder(self.folder)


def remove_folder(path: Path) -> None:
    """Removes a folder as far as possible; of a link to one, the link. Or a file."""
    if path.is_symlink() or path.is_file():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


# A folder with more than this is removed in a thread: to give back the 4 GB of a checkpoint took 1 s, and training waited.
_SMALL_NBYTES = 64 << 20

_removals: list[threading.Thread] = []


def remove_hidden(path: Path) -> None:
    """Removes a folder that nobody finds any more, a large one in the background; see :func:`wait_for_removals`.

    The interpreter waits for it at exit. What a killed process leaves, later saves remove.
    """
    try:
        large = sum(found.stat().st_size for found in path.iterdir()) > _SMALL_NBYTES
    except OSError:  # it is gone, or will be as far as possible
        large = False
    if large:
        thread = threading.Thread(target=remove_folder, args=(path,), name="deepspeed-checkpoint-removal")
        with suppress(RuntimeError):  # too many threads
            thread.start()
            _removals.append(thread)
            return
    remove_folder(path)


def wait_for_removals() -> None:
    """Returns when what this process has begun to remove in the background is gone."""
    while _removals:
        with suppress(IndexError):  # another thread waits, too
            _removals.pop().join()


def _keep_foreign(old: Path, new: Path) -> None:
    """Moves what is not a checkpoint's from a replaced folder to the one that replaced it."""
    if old.is_symlink() or not old.is_dir():
        return
    for path in old.iterdir():
        universal = path.name == "zero" and (path / "optimizer_state.pt").is_file()
        if not universal and not _OURS.fullmatch(path.name) and not os.path.lexists(new / path.name):
            with suppress(OSError):
                os.rename(path, new / path.name)


class Leftover(NamedTuple):
    """A hidden folder, or a file such as ``latest`` to be: of a save which is running or was killed."""

    path: Path
    tag: str
    host: str
    pid: int
    kind: str
    """``new``, ``old`` or ``gone``: see :func:`hidden_name`."""

    @property
    def save(self) -> str:
        """Equal for the two folders of one save."""
        return self.path.name.removesuffix(self.kind)


def leftovers(root: str | os.PathLike[str]) -> list[Leftover]:
    """The hidden folders and files of saves, running or killed, by name."""
    found = []
    for path in sorted(Path(root).iterdir()):
        match = _HIDDEN.fullmatch(path.name)
        if match is not None and (path.is_dir() or path.is_file()):
            found.append(Leftover(path, match["tag"], match["host"], int(match["pid"]), match["kind"]))
    return found


def visible(root: str | os.PathLike[str], tag: str) -> Path:
    """The folder of a tag: ``root / tag``, or, if a save was killed while replacing that, the newest complete one."""
    target = Path(root) / tag
    if target.exists() or not Path(root).is_dir():
        return target
    return _interrupted(leftovers(root), tag) or target


def _interrupted(left: list[Leftover], tag: str) -> Path | None:
    """Of saves that were replacing a tag: the newest complete folder."""
    old = [one for one in left if one.tag == tag and one.kind == "old"]
    saves = {one.save for one in old}  # others were never to be published
    new = [one for one in left if one.kind == "new" and one.save in saves and (one.path / MANIFEST).is_file()]
    return max((one.path for one in new or old), key=_changed_at, default=None)


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def tag_of(folder: Path) -> str:
    """The tag of a folder that :func:`visible` found."""
    match = _HIDDEN.fullmatch(folder.name)
    return match["tag"] if match is not None else folder.name


def remove_leftovers(root: Path) -> None:
    """Removes hidden folders and files whose process has ended; what a killed save had moved aside gets its name back."""
    if not root.is_dir():
        return
    host = host_key()
    left = [one for one in leftovers(root) if not _in_use(one, host)]
    for tag in {one.tag for one in left}:
        best = _interrupted(left, tag)
        if best is not None and not os.path.lexists(root / tag):
            with suppress(OSError):
                os.rename(best, root / tag)
    for one in left:
        if one.kind != "gone" and not (root / one.tag).is_dir() and _interrupted(left, one.tag) is not None:
            continue  # it could not be renamed, and may be all that there is
        if one.kind == "old":
            _keep_foreign(one.path, root / one.tag)
        remove_folder(one.path)


def _in_use(one: Leftover, host: str) -> bool:
    if one.host != host:
        return time.time() - _changed_at(one.path) < _STALE_S
    try:
        os.kill(one.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
