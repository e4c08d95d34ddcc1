"""Checkpoint files read front to back past the page cache: checked on the way, and copied to where they are wanted.

[Note: past the page cache] Through the page cache, or a mapping, every byte takes a page of fresh memory that nobody uses
again. So parts of files go by direct I/O into a few buffers (:class:`~deepspeed._core.ckpt.filereader.FileReader`), where
checksums are compared and from where ranges are copied into the tensors; the next parts are read meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from deepspeed._core.checksum import crc32
from deepspeed._core.ckpt.blockfile import FileSum, check_size
from deepspeed._core.ckpt.filereader import FileReader, Part, spans_of
from deepspeed._core.ckpt.pieces import Extent, Piece, blocks_of, cut_at_blocks, merged, of_blocks, small_gaps
from deepspeed._core.pages import in_huge_pages
from deepspeed.errors import CheckpointError

__all__ = ["Ranges", "check_blocks", "damage"]

_JOB_NBYTES = 64 << 20
_AHEAD_OF_MANY = 2  # parts: several readers keep a disk busy with less
# Headers and single numbers between what is wanted: summed with it, they leave no block open.
_LEFT_OUT_NBYTES = 64 << 10

Progress = Callable[[int], object]


def damage(path: Path, known: FileSum, block: int) -> CheckpointError:
    """Says that a block has another content than was written."""
    begin, end = block * known.block_nbytes, min((block + 1) * known.block_nbytes, known.nbytes)
    return CheckpointError(
        f"{path} is damaged: its bytes {begin} to {end} are not those that were written (the checksum differs). Copy the "
        "file again, or load another tag"
    )


def _summed(
    parts: Iterable[Part], path: Path, known: FileSum, extents: Iterable[Extent], pieces: list[Piece]
) -> Iterator[Part]:
    """The parts, which have the extents, in order; raises after one that ends a block of other content.

    ``pieces`` gets the checksums of what is no whole block.
    """
    ahead, found = deque(cut_at_blocks(extents, known.block_nbytes)), 0
    for part in parts:
        begin, end, data = part
        damaged = None
        while ahead and ahead[0][1] < end:
            block, low, high = ahead[0]
            at, stop = max(low, begin), min(high, end)
            found = crc32(data[at - begin : stop - begin].numpy(), found if at > low else 0)
            if stop < high:  # goes on in the next part
                break
            ahead.popleft()
            if not _is_whole(block, low, high, known):
                pieces.append(Piece(block, low, high, found))
            elif found != known.crc32[block] and damaged is None:
                damaged = block
        yield part
        if damaged is not None:
            raise damage(path, known, damaged)


def _is_whole(block: int, begin: int, end: int, known: FileSum) -> bool:
    return begin == block * known.block_nbytes and end in (begin + known.block_nbytes, known.nbytes)


def check_blocks(
    path: str | os.PathLike[str],
    known: FileSum,
    blocks: Iterable[int] | None = None,
    progress: Progress | None = None,
    reader: FileReader | None = None,
) -> None:
    """Reads blocks of a file (all by default) and compares their checksums; tells ``progress`` how many bytes it read.

    Raises:
        CheckpointError: the file is missing, has another size, or a block has other content.
    """
    path = Path(path)
    check_size(path, known)
    if reader is None:
        with FileReader() as own:
            check_blocks(path, known, blocks, progress, own)
        return
    extents = of_blocks(range(len(known.crc32)) if blocks is None else blocks, known)
    parts = reader.parts(path, spans_of(extents, known.nbytes))
    for begin, end, _ in _summed(parts, path, known, extents, []):
        if progress is not None:
            progress(end - begin)


@dataclass
class _Wanted:
    """Bytes ``begin`` to ``end`` of a file, as the elements of ``target``, which is 1-D; their dtype in the file."""

    begin: int
    end: int
    target: torch.Tensor
    dtype: torch.dtype


@dataclass
class _Phase:
    """What to read, by name of the file, and what to do beside it, step by step."""

    wanted: dict[str, list[_Wanted]]
    beside: Iterable[object] = ()


class _Job(NamedTuple):
    """What a thread reads at a time: what is wanted of the extents of a file, and whether they are summed."""

    name: str
    known: FileSum
    wanted: list[_Wanted]
    extents: list[Extent]
    sums: bool = True

    @property
    def spans(self) -> Iterator[Extent]:
        """What to read at a time."""
        return spans_of(self.extents, self.known.nbytes)


class Ranges:
    """Copies of ranges of a folder's files, collected first, then made in the order of the files.

    Args:
        folder: where the files are.
        sums: the files to read past the page cache, by name; what belongs to others, or to no file, is copied at once.
        verify: compare the checksums of what is read. Blocks that are touched are then read whole.
        pieces: do not read them whole: :attr:`pieces` is to be put together with that of other ranks.
        workers: number of threads that read, sum and copy, each with a few buffers of 8 MiB.

    Attributes:
        checked: blocks whose checksum was compared, by name of the file.
        pieces: checksums of parts of further blocks, by name of the file.
    """

    def __init__(
        self, folder: Path, sums: Mapping[str, FileSum], *, verify: bool, pieces: bool = False, workers: int = 1
    ) -> None:
        self._folder, self._sums, self._workers = folder, sums, workers
        self._verify, self._whole = verify, verify and not pieces
        self._phases = [_Phase({})]
        self._checks: list[_Job] = []
        self.checked: dict[str, list[int]] = {}
        self.pieces: dict[str, list[Piece]] = {}
        self._new: dict[int, torch.Tensor] = {}

    def _reader(self) -> FileReader:
        return FileReader() if self._workers == 1 else FileReader(_AHEAD_OF_MANY)

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        """A new flat tensor of as many elements, to be filled by copies.

        It gets huge pages when the first is made: to try them takes 0.1 s a GB, which the disk would be idle before.
        """
        made = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        self._new[made.untyped_storage().data_ptr()] = made
        return made

    def copy(self, target: torch.Tensor, held: torch.Tensor) -> None:
        """``target.copy_(held)``, when :meth:`run` comes to it. Both 1-D; ``held`` is a part of a mapped file."""
        place = self._place(held)
        if place is None:
            self._begin(target)
            target.copy_(held)
        elif held.numel():
            name, begin = place
            end = begin + held.numel() * held.element_size()
            self._phases[-1].wanted.setdefault(name, []).append(_Wanted(begin, end, target, held.dtype))

    def then(self, steps: Iterable[object]) -> None:
        """What is asked for from now on is read after all that was asked for before.

        ``steps`` are taken by the thread of :meth:`run` meanwhile: short ones, so that the next parts are asked for in time.
        """
        self._phases.append(_Phase({}, steps))

    def check(self, name: str, known: FileSum, blocks: Sequence[int]) -> None:
        """Compares checksums of blocks of any file of the folder, after everything else was read."""
        if blocks:
            self._checks.append(_Job(name, known, [], of_blocks(blocks, known)))

    @property
    def nbytes(self) -> int:
        """How many are to be copied."""
        every = (found for phase in self._phases for found in phase.wanted.values())
        return sum(wanted.end - wanted.begin for found in every for wanted in found)

    @property
    def check_nbytes(self) -> int:
        """How many more are to be read, because of :meth:`check`."""
        return sum(high - low for job in self._checks for low, high in job.spans)

    def run(self, progress: Progress) -> None:
        """Makes the copies, and tells ``progress`` what it has copied.

        Raises:
            CheckpointError: a file is damaged or cannot be read; some targets have been written to then.
        """
        phases, self._phases = self._phases, [_Phase({})]
        checks, self._checks = self._checks, []
        gaps = {name: self._gaps(name, phases) for name in self._sums}
        stages = []
        for phase in phases:
            jobs = [job for name, wanted in phase.wanted.items() for job in self._jobs(name, wanted, gaps[name])]
            stages.append((jobs, iter(phase.beside)))
        stages[-1][0].extend(checks)
        # No executor where the caller's thread is enough, which it is if it has a core for itself only.
        alone = self._workers == 1 or sum(len(jobs) for jobs, _ in stages) < 2
        with contextlib.ExitStack() as stack:
            readers = [stack.enter_context(self._reader()) for _ in range(1 if alone else self._workers)]
            if alone:
                self._do_all(stages, readers[0], progress)
                return
            for jobs, steps in stages:
                self._share_out(jobs, readers, progress, steps)

    def _do_all(
        self, stages: Sequence[tuple[list[_Job], Iterator[object]]], reader: FileReader, progress: Progress
    ) -> None:
        """Does the jobs of one stage after the other, and a step of it whenever something has come."""
        coming = reader.each((self._folder / job.name, job.spans) for jobs, _ in stages for job in jobs)
        for jobs, steps in stages:

            def tell(nbytes: int, steps: Iterator[object] = steps) -> None:
                progress(nbytes)
                next(steps, None)

            for job in jobs:
                self._do(job, next(coming), tell)
            _finish(steps)

    def _share_out(
        self, jobs: Iterable[_Job], readers: Sequence[FileReader], progress: Progress, steps: Iterator[object]
    ) -> None:
        """Does the jobs in threads, in about this order, and the steps here; ends early with the first error."""
        waiting = deque(jobs)

        def work(reader: FileReader) -> None:
            mine = deque[_Job]()

            def take() -> Iterator[tuple[Path, Iterable[Extent]]]:
                with suppress(IndexError):  # all are taken
                    while True:
                        mine.append(waiting.popleft())
                        yield self._folder / mine[-1].name, mine[-1].spans

            for parts in reader.each(take()):
                self._do(mine.popleft(), parts, progress)

        with ThreadPoolExecutor(len(readers), thread_name_prefix="deepspeed-load") as pool:
            futures = [pool.submit(work, reader) for reader in readers]
            try:
                _finish(steps)
                for future in as_completed(futures):
                    future.result()
            finally:
                waiting.clear()

    def _gaps(self, name: str, phases: Sequence[_Phase]) -> list[Extent]:
        """What is not wanted of a file, where it is so little that it is read anyway."""
        extents = merged((one.begin, one.end) for phase in phases for one in phase.wanted.get(name, ()))
        return small_gaps(extents, self._sums[name].nbytes, _LEFT_OUT_NBYTES) if extents else []

    def _jobs(self, name: str, wanted: list[_Wanted], gaps: Iterable[Extent]) -> list[_Job]:
        wanted.sort(key=lambda one: one.begin)
        known = self._sums[name]
        size = known.block_nbytes
        extents = merged((one.begin, one.end) for one in wanted)
        if self._whole:
            extents = of_blocks(blocks_of(extents, size), known)
        elif self._verify:
            first, ends = extents[0][0], {end for _, end in extents}
            mine = [gap for gap in gaps if gap[0] in ends or (gap[0] == 0 and gap[1] == first)]
            extents = merged([*extents, *mine])
        if self._workers == 1:  # in one go, so that reading ahead never stops
            return [_Job(name, known, wanted, extents, self._verify)]
        jobs = []
        stretch = max(_JOB_NBYTES // size, 1) * size
        for window, cuts in itertools.groupby(cut_at_blocks(extents, stretch), lambda cut: cut[0]):
            begin, end = window * stretch, (window + 1) * stretch
            inside = [one for one in wanted if one.begin < end and one.end > begin]
            jobs.append(_Job(name, known, inside, [(low, high) for _, low, high in cuts], self._verify))
        return jobs

    def _do(self, job: _Job, parts: Iterable[Part], progress: Progress) -> None:
        known, pieces = job.known, list[Piece]()
        if job.sums:
            parts = _summed(parts, self._folder / job.name, known, job.extents, pieces)
        if job.wanted:
            with torch.no_grad():
                _hand_out(parts, job.wanted, self._begin, progress)
        else:
            for begin, end, _ in parts:
                progress(end - begin)
        if job.sums:
            cuts = cut_at_blocks(job.extents, known.block_nbytes)
            whole = [block for block, low, high in cuts if _is_whole(block, low, high, known)]
            self.checked.setdefault(job.name, []).extend(whole)
            self.pieces.setdefault(job.name, []).extend(pieces)

    def _begin(self, target: torch.Tensor) -> None:
        """The first bytes for a target have come."""
        new = self._new.pop(target.untyped_storage().data_ptr(), None)
        if new is not None:
            in_huge_pages(new)

    @functools.cached_property
    def _mapped(self) -> list[tuple[int, int, int, str]]:
        """Where the files are mapped when the first copy is asked for; see :func:`_mapped_files`."""
        return _mapped_files({os.path.realpath(self._folder / name): name for name in self._sums})

    def _place(self, held: torch.Tensor) -> tuple[str, int] | None:
        """File and byte where a mapped tensor's elements begin."""
        if not held.is_contiguous() or held.device.type != "cpu":
            return None
        address = held.data_ptr()
        for begin, end, offset, name in self._mapped:
            if begin <= address < end:
                at = address - begin + offset
                return (name, at) if at % held.element_size() == 0 else None
        return None


def _finish(steps: Iterator[object]) -> None:
    for _ in steps:
        pass


def _hand_out(
    parts: Iterable[Part],
    wanted: list[_Wanted],
    begin_with: Callable[[torch.Tensor], object],
    progress: Progress,
) -> None:
    """Copies what is wanted from the parts; both are in the order of the file."""
    coming, active = deque(wanted), list[_Wanted]()
    for begin, end, data in parts:
        while coming and coming[0].begin < end:
            active.append(coming.popleft())
            begin_with(active[-1].target)
        for one in active:
            low, high = max(one.begin, begin), min(one.end, end)
            if low < high:
                size = one.dtype.itemsize
                values = data[low - begin : high - begin].view(one.dtype)
                one.target[(low - one.begin) // size : (high - one.begin) // size].copy_(values)
                progress(high - low)
        active = [one for one in active if one.end > end]


def _mapped_files(names: Mapping[str, str]) -> list[tuple[int, int, int, str]]:
    """``(first address, end, offset in the file, name)`` where this process has files mapped; ``names`` by real path."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux: everything is copied from the mappings
        return []
    found = []
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in names:
            begin, end = (int(text, 16) for text in fields[0].split("-"))
            found.append((begin, end, int(fields[2], 16), names[fields[5]]))
    return found
