"""Checkpoints on storage that belongs to a node (``checkpoint.use_node_local_storage``).

Each node keeps the files of its own ranks. What a load needs is anybody's guess (another number of ranks, another stage, or
just another cut of the state), so the files that a node lacks are sent to it first, into a hidden folder that goes again.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deepspeed import comm as dist
from deepspeed._core.ckpt.manifest import MANIFEST
from deepspeed._core.ckpt.staging import Staging, tag_of
from deepspeed.runtime.engine_checkpoint import gather, saving_groups, together
from deepspeed.utils.logging import log_dist

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

__all__ = ["gathered_files", "node_ranks"]

_CHUNK_NBYTES = 16 << 20


def node_ranks(engine: DeepSpeedEngine) -> list[int]:
    """World ranks that share this rank's storage: its node's, or with shared storage all. Collective."""
    if not engine.use_node_local_storage():
        return list(range(dist.get_world_size()))
    said = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ""
    node = str(dist.get_rank() // int(said)) if said.isdigit() and int(said) > 0 else socket.gethostname()
    nodes = gather(node)
    return [rank for rank, other in enumerate(nodes) if other == node]


@contextmanager
def gathered_files(engine: DeepSpeedEngine, folder: Path) -> Iterator[Path]:
    """A folder with all files of a checkpoint, of which ``folder`` has those of this node; it goes when the context ends.

    It is ``folder`` itself where nothing lacks. Collective.
    """
    if not engine.use_node_local_storage():
        yield folder
        return
    here = node_ranks(engine)
    leads = dist.get_rank() == here[0]
    own = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != MANIFEST) if leads else None
    lists = gather(own)
    owners: dict[str, int] = {}
    for rank, names in enumerate(lists):
        for name in names or ():
            owners.setdefault(name, rank)
    if all(len(names) == len(owners) for names in lists if names is not None):
        yield folder
        return
    log_dist(f"{folder} is on storage of each node: the {len(owners)} files go to the nodes that lack them")
    proposed = gather(Staging(folder.parent, tag_of(folder)).name)
    place = Staging(folder.parent, tag_of(folder), proposed[here[0]])
    try:
        together(lambda: _link(folder, place, own) if own is not None else None)
        together(place.require)
        for name in sorted(owners):
            if any(name not in names for names in lists if names is not None):
                wanted = own is not None and name not in own
                _send(engine, name, owners[name], folder, place.folder if wanted else None)
        yield place.folder
    finally:
        if leads:
            place.discard()


def _link(folder: Path, place: Staging, names: list[str]) -> None:
    place.create()
    for name in names:
        (place.folder / name).symlink_to((folder / name).resolve())


def _send(engine: DeepSpeedEngine, name: str, owner: int, folder: Path, into: Path | None) -> None:
    """One file from its owner to all; written where ``into`` is given. Collective, also after an error on one rank."""
    group, _ = saving_groups(engine)
    mine = dist.get_rank() == owner
    nbytes = gather((folder / name).stat().st_size if mine else 0)[owner]
    error: OSError | None = None
    source = (folder / name).open("rb") if mine else None
    target = (into / name).open("xb") if into is not None else None
    try:
        for begin in range(0, nbytes, _CHUNK_NBYTES):
            chunk = torch.empty(min(_CHUNK_NBYTES, nbytes - begin), dtype=torch.uint8)
            data: Any = chunk.numpy()
            try:
                if source is not None and source.readinto(data) != chunk.numel():
                    raise OSError(f"{folder / name} became shorter while it was read")
            except OSError as caught:
                error = error or caught
            torch.distributed.broadcast(chunk, src=owner, group=group)
            try:
                if target is not None and error is None:
                    target.write(data)
            except OSError as caught:
                error = caught
    finally:
        for file in (source, target):
            if file is not None:
                try:
                    file.close()
                except OSError as caught:  # the end of what was written may not fit
                    error = error or caught

    def check() -> None:
        if error is not None:
            raise error

    together(check)
