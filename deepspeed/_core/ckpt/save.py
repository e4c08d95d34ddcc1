"""One save: files into a staging folder, agreement of all ranks, and the folder under its name; now or in the background."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed

from deepspeed._core.bars import bytes_bar
from deepspeed._core.checksum import BlockSums
from deepspeed._core.ckpt import groups
from deepspeed._core.ckpt.archive import Archive
from deepspeed._core.ckpt.blockfile import BLOCK_NBYTES, BlockFile, FileSum
from deepspeed._core.ckpt.guard import end_writing, start_writing
from deepspeed._core.ckpt.io import atomic_write_text, fsync_folder
from deepspeed._core.ckpt.manifest import Manifest, known_tags, write_manifest
from deepspeed._core.ckpt.native import LATEST
from deepspeed._core.ckpt.neighbours import Neighbours, find_neighbours
from deepspeed._core.ckpt.staging import Staging, hidden_name, remove_hidden, remove_leftovers
from deepspeed.errors import CheckpointError
from deepspeed.utils.logging import logger

__all__ = ["SaveJob", "Saver", "WriterOptions"]


@dataclass(frozen=True)
class WriterOptions:
    """How files are written: see :class:`BlockFile`."""

    buffer_nbytes: int = 8 << 20
    buffers: int = 4


@dataclass
class SaveJob:
    """All that a rank has to do for a checkpoint once its content is fixed. Collective over ``group``.

    Attributes:
        staging: the folder being made, shared by ``members``.
        files: this rank's files by name.
        facts: the manifest, without files.
        members: world ranks that write into this folder; the first is the leader, which publishes it.
        latest: whether the file ``latest`` is to name the tag.
        keep_last: how many checkpoints stay; None is all.
        script: content of ``zero_to_fp32.py``.
        group: a group of all ranks that nobody else uses meanwhile; None for a single rank.
        options: how files are written.
        quiet: whether to show no progress.
    """

    staging: Staging
    files: Sequence[tuple[str, Archive]]
    facts: Manifest
    members: Sequence[int]
    latest: bool
    keep_last: int | None
    script: str
    group: torch.distributed.ProcessGroup | None
    options: WriterOptions
    quiet: bool = True

    def run(self) -> None:
        """Writes and publishes; an error on any rank is raised on all, and leaves what was there before.

        Raises:
            CheckpointError, OSError: the checkpoint was not saved.
        """
        nbytes = 0 if self.quiet else sum(archive.nbytes for _, archive in self.files)
        try:
            with bytes_bar(nbytes, f"saving {self.facts.tag}") as progress:
                error, sums = self._write_all(progress)
        except BaseException:  # no matter of this rank's disk: a rank has died, or memory is used up
            if self._leads:
                self.staging.discard()
            raise
        finally:
            end_writing([archive for _, archive in self.files])
        reports = self._agree(error, sums)
        error = None
        if self._leads:
            try:
                self._publish({name: known for rank in self.members for name, known in reports[rank].items()})
            except Exception as caught:
                error = caught
        self._agree(error, {})

    def _write_all(self, progress: Callable[[int], object]) -> tuple[Exception | None, dict[str, FileSum]]:
        """The first error, and what was written.

        Files that need no other rank are written beside those that do: the disk has little to do while ranks exchange.
        """
        sums: dict[str, FileSum] = {}
        errors: list[Exception] = []

        def write(files: Iterable[tuple[str, Archive]]) -> None:
            for name, archive in files:
                sink = _Tolerant(self.staging.folder / name, self.options, progress)
                failed: OSError | None = None
                try:
                    archive.write(sink)
                except OSError as caught:  # another rank's memory: that it has ended, those who wait for it will see
                    failed = caught
                finally:
                    found = sink.close()
                error = sink.error or failed or archive.error or self._torn(archive)
                if error is not None:
                    errors.append(error)
                if found is not None:
                    sums[name] = found

        own = [file for file in self.files if not file[1].collective]
        shared = [file for file in self.files if file[1].collective]
        if not shared:
            own, shared = own[:-1], own[-1:]
        if shared and own:
            with _Beside(lambda: write(own)):
                write(shared)
        else:
            write(self.files)
        return (errors[0] if errors else None), sums

    def _torn(self, archive: Archive) -> CheckpointError | None:
        if not archive.torn:
            return None
        return CheckpointError(
            f"weights or optimizer state were changed by other code than engine.step while checkpoint {self.facts.tag} "
            "was being saved in the background, which would have mixed old and new values. Change them before "
            "save_checkpoint, or set checkpoint.async_save to false"
        )

    @property
    def _leads(self) -> bool:
        return self.group is None or self.group.rank() == self.members[0]

    def _agree(self, error: Exception | None, sums: dict[str, FileSum]) -> list[dict[str, FileSum]]:
        """What each rank wrote; raises on all ranks if one has failed, and removes the staging folder."""
        mine = (None if error is None else f"{type(error).__name__}: {error}", sums)
        every: list[Any] = [mine]
        if self.group is not None:
            every = groups.all_gather_values(mine, self.group)
        failed = {rank: text for rank, (text, _) in enumerate(every) if text is not None}
        if failed:
            if self._leads:
                self.staging.discard()
            if error is not None:
                raise error
            raise CheckpointError("; ".join(f"rank {rank} failed: {text}" for rank, text in failed.items()))
        return [sums for _, sums in every]

    def _publish(self, files: dict[str, FileSum]) -> None:
        root, staging = self.staging.target.parent, self.staging
        write_manifest(staging.folder, replace(self.facts, files=files, saved_at=time.time()))
        try:
            staging.publish()
            self._name_it(root)
        finally:
            staging.remove_replaced()
        try:
            remove_leftovers(root)
            if self.keep_last is not None:
                _retire(root, self.facts.tag, self.keep_last)
        except OSError as error:
            logger.warning("checkpoint %s is saved, but older ones could not be removed: %s", staging.target, error)

    def _name_it(self, root: Path) -> None:
        """Beside the folder: the script, and ``latest``."""
        script = root / "zero_to_fp32.py"
        if not script.is_file() or script.read_bytes() != self.script.encode("utf-8"):
            atomic_write_text(script, self.script, mode=0o755, scratch=root / hidden_name(script.name, "new"))
        if self.latest:
            atomic_write_text(root / LATEST, self.facts.tag, scratch=root / hidden_name(LATEST, "new"))


def _retire(root: Path, newest: str, keep: int) -> None:
    """Removes all but the newest checkpoints of this package; never the one just saved, nor what ``latest`` names."""
    protected = {newest}
    with suppress(OSError):
        protected.add((root / LATEST).read_text(encoding="utf-8").strip())
    others = [tag for tag in known_tags(root) if tag != newest]
    retired = [tag for tag in others[max(keep - 1, 0) :] if tag not in protected]
    hidden = [root / hidden_name(tag, "gone") for tag in retired]
    try:
        for tag, name in zip(retired, hidden, strict=True):
            os.rename(root / tag, name)  # hidden first, so that nobody finds half of it
        fsync_folder(root)
    finally:
        for name in hidden:
            remove_hidden(name)


class _Beside:
    """Runs ``action`` in a thread while the context's block runs, and raises what it raised."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        # No executor and no daemon, see Saver.run.
        self._thread = threading.Thread(target=self._run, name="deepspeed-checkpoint-own")
        try:
            self._thread.start()
        except RuntimeError:  # too many threads
            self._thread = None
            self._run()

    def __exit__(self, *error: object) -> None:
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._action()
        except BaseException as error:
            self._error = error


class _Tolerant:
    """A file that keeps its first error to itself, so that the communication behind the data goes on for the other ranks."""

    def __init__(self, path: Path, options: WriterOptions, progress: Callable[[int], object] = int) -> None:
        self.error: Exception | None = None
        self.sums = BlockSums(BLOCK_NBYTES)
        self._progress = progress
        self._file: BlockFile | None = None
        try:
            self._file = BlockFile(path, buffer_nbytes=options.buffer_nbytes, buffers=options.buffers)
            self.sums = self._file.sums
        except Exception as error:
            self.error = error

    def write(self, data: Any) -> int:
        if self.error is None and self._file is not None:
            try:
                self._progress(self._file.write(data))
            except Exception as error:
                self.error = error
        return memoryview(data).nbytes

    def close(self) -> FileSum | None:
        """Size and checksums; None after an error."""
        if self._file is None:
            return None
        failed = self.error
        try:
            self._file.__exit__(None if failed is None else type(failed), failed, None)
        except Exception as error:
            self.error = self.error or error
        return None if self.error is not None else self._file.sum


class Saver:
    """Runs saves of one engine, at most one at a time.

    Attributes:
        groups: the process groups that saves use, once there are such.
    """

    def __init__(self) -> None:
        self.groups: tuple[torch.distributed.ProcessGroup | None, torch.distributed.ProcessGroup | None] | None = None
        self._neighbours: tuple[Neighbours | None] | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def neighbours(self, group: torch.distributed.ProcessGroup) -> Neighbours | None:
        """The ranks that share optimizer state, if they can read each other's memory. The first call is collective."""
        if self._neighbours is None:
            self._neighbours = (find_neighbours(group),)
        return self._neighbours[0]

    @property
    def busy(self) -> bool:
        """Whether a save is being written in the background."""
        return self._thread is not None and self._thread.is_alive()

    def settle(self) -> None:
        """Waits for the save in the background, if there is one.

        Raises:
            CheckpointError, OSError: it has failed. Said once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise CheckpointError(f"the checkpoint that was being saved in the background was not: {error}") from error

    def run(self, job: SaveJob, *, background: bool, then: Callable[[], None]) -> None:
        """Does the job; in the background it returns at once, and errors wait for :meth:`settle`."""
        self.settle()
        if not background:
            job.run()
            then()
            return

        def work() -> None:
            try:
                job.run()
                then()
            except BaseException as error:
                self._error = error
                logger.error("saving checkpoint %s in the background failed: %s", job.staging.target, error)

        start_writing([archive for _, archive in job.files])
        # Not a daemon: the interpreter waits for it at exit.
        thread = threading.Thread(target=work, name="deepspeed-checkpoint")
        try:
            thread.start()
        except RuntimeError:  # too many threads: the others have begun and wait for this rank's part
            work()
        else:
            self._thread = thread
