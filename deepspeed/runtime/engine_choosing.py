"""Which checkpoint of a folder to load: the one that is asked for, or the newest that is whole."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deepspeed import comm as dist
from deepspeed._core.bars import bytes_bar
from deepspeed._core.ckpt.blockreader import Ranges, damage
from deepspeed._core.ckpt.manifest import Manifest, check_complete, known_tags
from deepspeed._core.ckpt.native import LATEST, find_tag_dir, read_latest
from deepspeed._core.ckpt.pieces import join
from deepspeed._core.ckpt.universal import LATEST_UNIVERSAL
from deepspeed.errors import CheckpointError
from deepspeed.runtime.engine_checkpoint import everyone, gather
from deepspeed.runtime.engine_local import node_ranks
from deepspeed.utils.logging import log_dist

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

__all__ = ["Choice", "DamagedError", "check_rest", "choose", "require_same"]


class DamagedError(CheckpointError):
    """The content of a checkpoint is not what was written. Raised on all ranks alike."""


@dataclass(frozen=True)
class Choice:
    """A folder to load.

    Attributes:
        folder: its files are all there, and as long as they were.
        manifest: what was written; None in a folder of another program.
        unchecked: blocks of its files (name and index) whose checksums are still to be compared, by :func:`check_rest` at
            the latest.
    """

    folder: Path
    manifest: Manifest | None = None
    unchecked: tuple[tuple[str, int], ...] = ()


def choose(
    engine: DeepSpeedEngine, load_dir: str, tag: str | None, damaged: Mapping[str, str], *, check: bool
) -> Choice | None:
    """The folder to load, whose files are what was written; None if nothing is there. Collective.

    Without a tag, it is what ``latest`` names or, if that is damaged or incomplete, the newest checkpoint that is not.
    The ranks share the reading; a folder of another program has no checksums and is taken as it is.

    Args:
        engine, load_dir, tag: of ``load_checkpoint``.
        damaged: tags that are out of the question, and why.
        check: compare the checksums; without, all blocks are the choice's ``unchecked``.

    Raises:
        CheckpointError: the given one, or all, are missing or damaged; ranks see different folders.
    """
    every = everyone(lambda: _candidates(engine, load_dir, tag))
    require_same([candidates[0] if candidates else None for candidates in every], load_dir)
    candidates = every[0]  # nodes with storage of their own may have kept different ones
    problem = ""
    for candidate in candidates:
        if candidate in damaged:
            found, problem = None, damaged[candidate]
        else:
            found, problem = _examine(engine, load_dir, candidate, check)
        if found is not None:
            return found
        if candidate != candidates[-1]:
            log_dist(f"{problem}. Looking for an older checkpoint in {load_dir}", level=logging.WARNING)
    if candidates:
        raise CheckpointError(problem)
    return None


def _candidates(engine: DeepSpeedEngine, load_dir: str, tag: str | None) -> list[str]:
    """The tag; without one, what ``latest`` names, then complete checkpoints, newest first."""
    if tag is None and engine.load_universal_checkpoint():
        tag = read_latest(load_dir, LATEST_UNIVERSAL)
    if tag is not None:
        find_tag_dir(load_dir, tag)
        return [tag]
    if not os.path.isdir(load_dir):
        raise CheckpointError(f"{load_dir}: expected a checkpoint folder, but there is no such folder")
    complete = known_tags(load_dir)
    try:
        latest = read_latest(load_dir, LATEST)
        if latest is not None:
            find_tag_dir(load_dir)
    except CheckpointError as error:
        if not complete:
            raise
        log_dist(f"{error}. Looking for the newest checkpoint in {load_dir}", level=logging.WARNING)
        return complete
    return ([] if latest is None else [latest]) + [tag for tag in complete if tag != latest]


def _examine(engine: DeepSpeedEngine, load_dir: str, tag: str, check: bool) -> tuple[Choice | None, str]:
    """The folder of a tag if all ranks find it whole; otherwise why not. Collective."""
    choice, problem = None, None
    sharing = node_ranks(engine)
    checksums = engine._config.document.checkpoint.verify_checksums
    try:
        folder = find_tag_dir(load_dir, tag)
        manifest = check_complete(folder)
        blocks = manifest.blocks() if manifest is not None and checksums else []
        choice = Choice(folder, manifest, () if check else tuple(blocks))
        if check:
            _check(choice, blocks, sharing)
    except (CheckpointError, OSError) as error:
        problem = str(error)
    found = gather((problem, choice.folder.name if choice is not None else None))
    problems = [text for text, _ in found if text is not None]
    if problems:
        return None, problems[0]
    require_same([name for _, name in found], load_dir)
    return choice, ""


def _check(choice: Choice, blocks: list[tuple[str, int]], sharing: list[int]) -> None:
    """Compares checksums of this rank's share of the blocks."""
    manifest = choice.manifest
    if manifest is None or not blocks:
        return
    part, parts = sharing.index(dist.get_rank()), len(sharing)
    nbytes = sum(manifest.files[name].block_nbytes for name, _ in blocks) // parts
    with bytes_bar(nbytes, f"checking {choice.folder.name}") as progress:
        manifest.check_content(choice.folder, part, parts, progress, blocks)


def check_rest(choice: Choice, ranges: Ranges | None, problem: str | None) -> None:
    """After files were read: checks what no rank has read. Collective; all ranks see the same folder.

    Args:
        choice: with the blocks that were not checked before.
        ranges: what this rank has read since, and checked.
        problem: what this rank has found wrong.

    Raises:
        DamagedError: a rank has found damage.
    """
    read = (ranges.checked, ranges.pieces) if ranges is not None and problem is None else ({}, {})
    found = gather((problem, *read))
    problems = [text for text, *_ in found if text is not None]
    if not problems and choice.manifest is not None:
        done = {(name, block) for _, checked, _ in found for name, blocks in checked.items() for block in blocks}
        for name, known in choice.manifest.files.items():
            right, wrong = join((piece for *_, pieces in found for piece in pieces.get(name, ())), known)
            if wrong:
                raise DamagedError(str(damage(choice.folder / name, known, wrong[0])))
            done |= {(name, block) for block in right}
        rest = [block for block in choice.unchecked if block not in done]
        if not rest:
            return
        try:
            _check(choice, rest, list(range(dist.get_world_size())))
        except (CheckpointError, OSError) as error:
            problem = str(error)
        problems = [text for text in gather(problem) if text is not None]
    if problems:
        raise DamagedError(problems[0])


def require_same(every: Sequence[str | None], load_dir: str) -> None:
    """Raises if ranks have found different things: other tags, or another content in folders of their own. By rank."""
    if len(set(every)) > 1:
        raise CheckpointError(
            f"ranks would load different checkpoints: {dict(enumerate(every))} in {load_dir}. Give every rank the same "
            "tag, and a folder that all of them see"
        )
