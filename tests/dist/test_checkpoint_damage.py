"""Full disks, folders that cannot be written, damaged files, two runs in one folder, and what retention leaves alone."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed._core.ckpt.manifest import MANIFEST, read_manifest
from deepspeed._core.ckpt.staging import hidden_name, leftovers
from deepspeed.errors import CheckpointError
from deepspeed.utils.logging import logger
from tests.helpers import preload  # noqa: F401 - before ranks are forked
from tests.helpers.ckpt import assert_same, build, by_name, config, snapshot, train
from tests.helpers.crash import failing
from tests.helpers.dist import run_ranks


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """What the package logs in the block."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def files_in(folder: str | Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


# -- writes that fail ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file can grow beyond a sector."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def creating(path: Any, flags: int, *_: Any, **__: Any) -> bool:
    return bool(flags & os.O_CREAT)


def the_new_one(source: Any, target: Any) -> bool:
    return str(source).endswith(".new")


FULL, READ_ONLY = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "Read-only file system")
FAULTS: dict[str, tuple[Callable[[], Any], str, tuple[int, ...]]] = {
    # how it fails, the message, on which ranks it can
    "full at the first byte": (lambda: failing(os, "pwrite", FULL), "No space left", (0, 1)),
    "full at the second file": (lambda: failing(os, "pwrite", FULL, after=1), "No space left", (0,)),
    "full when written out": (lambda: failing(os, "fsync", FULL), "No space left", (0, 1)),
    "full at the manifest": (lambda: failing(io, "open", FULL, after=1), "No space left", (0,)),
    "full at closing": (lambda: failing(os, "close", FULL), "No space left", (1,)),
    "files limited": (small_files, "File too large", (0, 1)),
    "no folder can be made": (lambda: failing(os, "mkdir", READ_ONLY), "Read-only file system", (0,)),
    "no file can be made": (lambda: failing(os, "open", READ_ONLY, when=creating), "Read-only file system", (0, 1)),
    "no folder can be renamed": (lambda: failing(os, "rename", READ_ONLY), "Read-only file system", (0,)),
    "the new one cannot be": (
        lambda: failing(os, "rename", READ_ONLY, when=the_new_one),
        "Read-only file system",
        (0,),
    ),
}


def faults(rank: int, world: int, folder: str, stage: int, background: bool) -> None:
    engine = build(config(stage, checkpoint={"async": background}))
    train(engine, rank, 1, seed=1)
    engine.save_checkpoint(folder, tag="a")
    engine._saver.settle()
    first = snapshot(engine)
    train(engine, rank, 1, seed=2)
    second = snapshot(engine)
    torch.distributed.barrier()
    disk = files_in(folder)
    for number, (name, (fault, message, ranks)) in enumerate(FAULTS.items()):
        for failing_rank in ranks:
            if stage == 0 and (failing_rank or name == "full at the second file"):  # there is one file only
                continue
            torch.distributed.barrier()
            broken = fault() if rank == failing_rank else contextlib.nullcontext()
            with logged() as lines, pytest.raises((OSError, CheckpointError), match=message), broken:
                engine.save_checkpoint(folder, tag="a" if number % 2 else "b")
                if engine._saver._thread is not None:
                    engine._saver._thread.join()  # at once in the log, at the next call as an error
                    assert any("in the background failed" in line and "/" in line for line in lines), name
                (engine.load_checkpoint, engine.save_checkpoint)[number % 2](folder)
            torch.distributed.barrier()
            assert files_in(folder) == disk, name
            assert sorted(os.listdir(folder)) == ["a", "latest", "zero_to_fp32.py"], name
            assert_same(snapshot(engine), second, name)
    engine.load_checkpoint(folder)
    assert_same(snapshot(engine), first)
    engine.destroy()


@pytest.mark.parametrize(("stage", "background"), [(2, False), (3, True), (0, False)])
def test_a_save_that_cannot_write_changes_nothing(tmp_path: Path, stage: int, background: bool) -> None:
    run_ranks(faults, 2, str(tmp_path), stage, background)


@contextlib.contextmanager
def mounted(*arguments: str, at: Path) -> Iterator[None]:
    """A file system for the time of the block; skips where that is not allowed."""
    at.mkdir()
    if os.geteuid() or subprocess.run(["mount", *arguments, str(at)], capture_output=True).returncode:
        pytest.skip("only where file systems can be mounted")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def until_full(rank: int, world: int, folder: str, background: bool) -> None:
    """Saves under new tags until the disk is full, and then once more."""
    engine = build(config(2, checkpoint={"async": background}))
    kept: dict[str, Any] = {}
    failures = 0
    for number in range(40):
        train(engine, rank, 1, seed=number)
        state = by_name(engine)
        try:
            engine.save_checkpoint(folder, tag=f"t{number}")
            engine.destroy() if background else None  # waits; the engine can still save
        except (OSError, CheckpointError) as error:
            assert "No space left" in str(error)
            failures += 1
        else:
            kept[f"t{number}"] = state
        if failures == 2:
            break
    assert failures == 2 and kept
    torch.distributed.barrier()
    assert leftovers(folder) == []
    loader = build(config(2), seed=5)
    for tag in kept:
        loader.load_checkpoint(folder, tag=tag)
        assert_same(by_name(loader), kept[tag])
    loader.load_checkpoint(folder)
    assert_same(by_name(loader), kept[Path(folder, "latest").read_text()])
    torch.distributed.barrier()
    if rank == 0:  # room again
        shutil.rmtree(Path(folder, "t0"))
    torch.distributed.barrier()
    loader.save_checkpoint(folder, tag="after")
    loader.load_checkpoint(folder, tag="after")


def test_a_full_disk(tmp_path: Path) -> None:
    with mounted("-t", "tmpfs", "-o", "size=400k", "none", at=tmp_path / "small"):
        run_ranks(until_full, 2, str(tmp_path / "small"), False)


def loads_read_only(rank: int, world: int, folder: str) -> None:
    engine = build(config(2), seed=4)
    engine.load_checkpoint(folder)
    before = snapshot(engine)
    with pytest.raises((OSError, CheckpointError), match="Read-only file system"):
        engine.save_checkpoint(folder)
    assert_same(snapshot(engine), before)
    engine.load_checkpoint(folder)


def saves_once(rank: int, world: int, folder: str) -> None:
    engine = build(config(2))
    train(engine, rank, 1, seed=1)
    engine.save_checkpoint(folder)


def test_a_read_only_disk(tmp_path: Path) -> None:
    run_ranks(saves_once, 2, str(tmp_path / "saved"))
    with mounted("--bind", "-o", "ro", str(tmp_path / "saved"), at=tmp_path / "seen"):
        if os.access(tmp_path / "seen", os.W_OK):
            pytest.skip("bind mounts cannot be read-only here")
        run_ranks(loads_read_only, 2, str(tmp_path / "seen"))


# -- files that are not what was written --------------------------------------------------------------------------------


def flip(path: Path, at: float, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[min(int(at * len(content)), len(content) - 1)] ^= 1 << bit
    path.write_bytes(content)


def truncate(path: Path, keep: float) -> None:
    os.truncate(path, int(keep * path.stat().st_size))


def rename_key(path: Path, key: bytes) -> None:
    """One bit that leaves a file that can be read, with another key in a dict."""
    content = path.read_bytes()
    at = content.index(bytes([len(key), 0, 0, 0]) + key) + 4
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def damages(names: list[str], seed: int, count: int) -> list[tuple[str, str, Callable[[Path], Any]]]:
    """File, what happens to it, and how."""
    draw = random.Random(seed)
    made: list[tuple[str, str, Callable[[Path], Any]]] = []
    for name in names:
        for _ in range(count):
            at, bit = draw.random(), draw.randrange(8)
            made.append((name, f"bit {bit} flipped at {at:.3f}", lambda p, at=at, bit=bit: flip(p, at, bit)))
        keep = draw.random()
        made.append((name, f"truncated to {keep:.3f}", lambda p, keep=keep: truncate(p, keep)))
        made.append((name, "last bit flipped", lambda p: flip(p, 1.0, 0)))
        made.append((name, "emptied", lambda p: truncate(p, 0)))
        if name.endswith("optim_states.pt"):
            for key in (b"params", b"optimizer_state_dict", b"param_groups"):
                made.append((name, f"{key!r} renamed", lambda p, key=key: rename_key(p, key)))
        made.append((name, "longer", lambda p: p.write_bytes(p.read_bytes() + b"x")))
        if name != MANIFEST:  # a folder without one is that of another program, and has no checksums
            made.append((name, "removed", os.unlink))
    return made


def damaged(rank: int, world: int, root: str, stage: int, count: int) -> None:
    engine = build(config(stage))
    train(engine, rank, 1, seed=1)
    engine.save_checkpoint(f"{root}/good", tag="older")
    older = snapshot(engine)
    train(engine, rank, 1, seed=2)
    engine.save_checkpoint(f"{root}/good", tag="newer")
    train(engine, rank, 1, seed=3)
    now = snapshot(engine)
    for number, (name, what, damage) in enumerate(damages(sorted(os.listdir(f"{root}/good/newer")), stage, count)):
        folder = Path(root, str(number))
        if rank == 0:
            shutil.copytree(f"{root}/good", folder)
            damage(folder / "newer" / name)
        torch.distributed.barrier()
        disk = files_in(folder)
        with pytest.raises(CheckpointError) as caught:
            engine.load_checkpoint(str(folder), tag="newer")
        assert str(folder / "newer" / name) in str(caught.value), f"{name} {what}: {caught.value}"
        assert_same(snapshot(engine), now, what)
        loader = build(config(stage), seed=5)
        with logged() as lines:
            path, _ = loader.load_checkpoint(str(folder))
        assert Path(path).parent == folder / "older", what
        warned = [line for line in lines if str(folder / "newer" / name) in line and "Looking for an older" in line]
        assert len(warned) == (rank == 0), (name, what, lines)
        assert_same(snapshot(loader), older, what)
        loader.destroy()
        assert files_in(folder) == disk
        torch.distributed.barrier()
        if rank == 0:
            shutil.rmtree(folder)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_damaged_checkpoint_is_named_and_the_one_before_loads(tmp_path: Path, stage: int) -> None:
    run_ranks(damaged, 2, str(tmp_path), stage, 1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_many_damaged_checkpoints(tmp_path: Path, stage: int) -> None:
    run_ranks(damaged, 2, str(tmp_path), stage, 20, timeout_s=300)


def broken_latest(rank: int, world: int, root: str) -> None:
    engine = build(config(2))
    for step, tag in ((1, "older"), (2, "newer")):
        train(engine, rank, 1, seed=step)
        engine.save_checkpoint(root, tag=tag)
    newer = snapshot(engine)
    for content in (b"", b"\xff\xfe", b"oewer", b"newe", b"newer\x00", b"../newer/..", b"latest"):
        torch.distributed.barrier()
        if rank == 0:
            Path(root, "latest").write_bytes(content)
        torch.distributed.barrier()
        loader = build(config(2), seed=5)
        with logged() as lines:
            loader.load_checkpoint(root)
        assert any(f"{root}/latest" in line for line in lines) == (rank == 0), (content, lines)
        assert_same(snapshot(loader), newer)
        loader.destroy()
    torch.distributed.barrier()
    if rank == 0:
        os.unlink(Path(root, "latest"))
    torch.distributed.barrier()
    loader = build(config(2), seed=5)
    loader.load_checkpoint(root)
    assert_same(snapshot(loader), newer)


def test_a_broken_latest_gives_way_to_the_newest(tmp_path: Path) -> None:
    run_ranks(broken_latest, 2, str(tmp_path))


def test_every_flipped_bit_of_a_manifest_is_seen(tmp_path: Path) -> None:
    run_ranks(saves_once, 1, str(tmp_path))
    folder = tmp_path / "global_step1"
    path, good = folder / MANIFEST, read_manifest(folder)
    content = path.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            assert read_manifest(folder) == good, f"byte {position}: {bytes(changed[position - 20 : position + 20])!r}"
        except CheckpointError as error:
            assert str(path) in str(error)


# -- two runs, one folder -----------------------------------------------------------------------------------------------


def one_of_two(rank: int, world: int, root: str, same_tag: bool) -> dict[int, Any]:
    """Ranks 0 and 1 are one run, 2 and 3 another; both save all the time. States by number of the save, of this run."""
    run, mine = divmod(rank, 2)
    os.environ.update(RANK=str(mine), LOCAL_RANK=str(mine), WORLD_SIZE="2", LOCAL_SIZE="2")
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/store{run}", rank=mine, world_size=2)
    engine = build(config(2, checkpoint={"async": bool(run)}), seed=run)
    states = {}
    for number in range(6):
        train(engine, mine, 1, seed=10 * run + number)
        states[number] = by_name(engine)
        tag = "same" if same_tag else f"run{run}-{number}"
        engine.save_checkpoint(f"{root}/saved", tag=tag, client_state={"run": run, "number": number})
    engine.destroy()
    return states


def check_both(rank: int, world: int, root: str, runs: list[dict[int, Any]], tags: list[str | None]) -> None:
    loader = build(config(2), seed=5)
    for tag in tags:
        _, client = loader.load_checkpoint(f"{root}/saved", tag=tag)
        assert tag in (None, "same", f"run{client['run']}-{client['number']}")
        assert_same(by_name(loader), runs[client["run"]][client["number"]])
        if tag in (None, "same"):
            assert client["number"] == 5
    loader.save_checkpoint(f"{root}/saved", tag="after")
    if rank == 0:
        assert leftovers(f"{root}/saved") == []


@pytest.mark.parametrize("same_tag", [True, False])
def test_two_runs_in_one_folder_do_not_mix(tmp_path: Path, same_tag: bool) -> None:
    states = run_ranks(one_of_two, 4, str(tmp_path), same_tag, init=False)
    tags = ["same"] if same_tag else [f"run{run}-{number}" for run in (0, 1) for number in range(6)]
    run_ranks(check_both, 2, str(tmp_path), [states[0], states[2]], [None, *tags])


# -- retention ----------------------------------------------------------------------------------------------------------


def retains(rank: int, world: int, folder: str) -> None:
    root = Path(folder)
    engine = build(config(2, checkpoint={"keep_last": 2}))

    def tags() -> list[str]:
        torch.distributed.barrier()
        found = sorted(p.name for p in root.iterdir() if p.is_dir())
        torch.distributed.barrier()
        return found

    engine.save_checkpoint(folder, tag="a")
    if rank == 0:
        (root / "mine").mkdir()
        (root / "mine" / "notes.txt").write_text("x")
        shutil.copytree(root / "a", root / "other program")
        (root / "other program" / MANIFEST).unlink()
        shutil.copytree(root / "a", root / "damaged")
        os.truncate(root / "damaged" / "mp_rank_00_model_states.pt", 10)
        # Another host's save, which may be running.
        (root / hidden_name("b", "new").replace(hidden_name("b", "new").split(".")[2], "elsewhere")).mkdir()
    always = ["damaged", "mine", "other program"]
    hidden = [name for name in tags() if name.startswith(".")]
    assert len(hidden) == 1
    always = sorted([*always, *hidden])
    for tag in "bc":
        engine.save_checkpoint(folder, tag=tag)
    assert tags() == sorted([*always, "b", "c"])
    for tag in "def":
        engine.save_checkpoint(folder, tag=tag, save_latest=False)
    assert tags() == sorted([*always, "c", "e", "f"]), "what latest names stays"
    engine.save_checkpoint(folder, tag="e")  # over an old one, which is the newest then
    assert tags() == sorted([*always, "e", "f"])
    assert (root / "mine" / "notes.txt").read_text() == "x"


def test_retention_leaves_alone_what_is_not_its_own(tmp_path: Path) -> None:
    run_ranks(retains, 2, str(tmp_path))
