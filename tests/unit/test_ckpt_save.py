"""One save of one rank: published whole or not at all, now or in the background."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed._core.ckpt import blockfile, guard, staging
from deepspeed._core.ckpt import save as save_module
from deepspeed._core.ckpt.archive import Archive
from deepspeed._core.ckpt.guard import before_change
from deepspeed._core.ckpt.io import load_file
from deepspeed._core.ckpt.manifest import Manifest, check_complete, known_tags
from deepspeed._core.ckpt.save import SaveJob, Saver, WriterOptions
from deepspeed._core.ckpt.source import Source
from deepspeed._core.ckpt.staging import Staging, remove_folder
from deepspeed.errors import CheckpointError

FILE = "mp_rank_00_model_states.pt"


def job(root: Path, tag: str = "a", content: Any = 7, *, keep_last: int | None = None, latest: bool = True) -> SaveJob:
    folder = Staging(root, tag)
    folder.create()
    files = [(FILE, Archive(content)), ("other_optim_states.pt", Archive({"x": 1}))]
    facts = Manifest(tag, 0.0, 3, 0, 1, "1.0")
    return SaveJob(folder, files, facts, [0], latest, keep_last, "# script\n", None, WriterOptions())


def save(root: Path, tag: str = "a", content: Any = 7, **options: Any) -> None:
    job(root, tag, content, **options).run()


def everything(root: Path) -> list[str]:
    return sorted(os.listdir(root))


class Slow(Source):
    """Gives its elements when it is told to."""

    def __init__(self, action: Callable[[], None]) -> None:
        super().__init__((4,), torch.float32)
        self._action = action

    def write(self, use: Callable[[torch.Tensor], None]) -> None:
        self._action()
        use(torch.arange(4.0))

    def freeze(self) -> None:
        pass


def test_a_save_brings_the_files_the_script_and_latest(tmp_path: Path) -> None:
    save(tmp_path, content={"x": torch.arange(5)})
    assert everything(tmp_path) == ["a", "latest", "zero_to_fp32.py"]
    assert (tmp_path / "latest").read_text() == "a"
    assert os.access(tmp_path / "zero_to_fp32.py", os.X_OK)
    assert load_file(tmp_path / "a" / FILE)["x"].tolist() == list(range(5))
    manifest = check_complete(tmp_path / "a")
    assert manifest is not None
    manifest.check_content(tmp_path / "a")
    assert (manifest.tag, manifest.global_steps) == ("a", 3)
    assert manifest.files.keys() == {FILE, "other_optim_states.pt"}
    save(tmp_path, "b", latest=False)
    assert (tmp_path / "latest").read_text() == "a"
    (tmp_path / "zero_to_fp32.py").write_bytes(b"\xff of another version")
    save(tmp_path, "c")
    assert (tmp_path / "zero_to_fp32.py").read_text() == "# script\n"


@pytest.mark.parametrize("name", ["pwrite", "fsync", "ftruncate"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    save(tmp_path, content=1)
    before = threading.active_count()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(blockfile.os, name, full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, content=2)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, "b", content={"x": torch.zeros(20_000_000, dtype=torch.uint8)})
    monkeypatch.undo()
    assert everything(tmp_path) == ["a", "latest", "zero_to_fp32.py"]
    assert load_file(tmp_path / "a" / FILE) == 1
    assert threading.active_count() == before


def test_an_error_that_is_not_the_disks_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("a rank has died")

    saver, before = Saver(), (threading.active_count(), len(os.listdir("/proc/self/fd")))
    for background in (False, True):
        with pytest.raises((RuntimeError, CheckpointError), match="a rank has died"):
            saver.run(job(tmp_path, content=Slow(fail)), background=background, then=lambda: None)
            saver.settle()
        assert everything(tmp_path) == []
        assert guard._in_flight == []
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def test_old_checkpoints_go_beyond_the_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(save_module.time, "time", lambda: float(next(clock)))
    for tag in "edcba":
        save(tmp_path, tag)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("")
    save(tmp_path, "f", keep_last=3)
    assert known_tags(tmp_path) == ["f", "a", "b"]
    save(tmp_path, "g", keep_last=1, latest=False)
    assert known_tags(tmp_path) == ["g", "f"]  # which latest names
    assert everything(tmp_path) == ["broken", "f", "foreign", "g", "latest", "zero_to_fp32.py"]


def test_nothing_is_removed_before_the_checkpoint_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To give gigabytes back takes a disk a while, and what is synced then waits for it."""
    seen: list[tuple[str, str]] = []

    def remove(path: Path) -> None:
        seen.append((path.name, (tmp_path / "latest").read_text()))
        remove_folder(path)

    for tag in ("a", "b"):
        save(tmp_path, tag)
    monkeypatch.setattr(staging, "remove_hidden", remove)
    monkeypatch.setattr(save_module, "remove_hidden", remove)
    save(tmp_path, "a", keep_last=1)
    assert [(name.split(".")[1], latest) for name, latest in seen] == [("a", "a"), ("b", "a")]
    assert everything(tmp_path) == ["a", "latest", "zero_to_fp32.py"]


def test_what_was_replaced_goes_when_latest_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)

    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save_module, "atomic_write_text", fail)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, content=8)
    assert everything(tmp_path) == ["a", "latest", "zero_to_fp32.py"]
    assert load_file(tmp_path / "a" / FILE) == 8


def test_a_save_succeeds_when_older_ones_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(save_module.logger, "warning", lambda text, *args: said.append(text % args))
    save(tmp_path, "a")
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if source == tmp_path / "a":
            raise PermissionError(13, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    save(tmp_path, "b", keep_last=1)
    assert known_tags(tmp_path) == ["b", "a"]
    assert len(said) == 1
    assert "is saved, but older ones could not be removed" in said[0]


def test_in_the_background_the_state_of_the_moment_is_saved(tmp_path: Path) -> None:
    state, go = torch.zeros(100_000), threading.Event()
    saver = Saver()
    done: list[str] = []
    content = {"slow": Slow(lambda: go.wait() and None), "x": state}
    saver.run(job(tmp_path, content=content), background=True, then=lambda: done.append("said"))
    assert saver.busy
    assert not (tmp_path / "a").exists()
    for step in range(3):
        before_change()
        state.fill_(step + 1)
    go.set()
    saver.settle()
    assert not saver.busy
    assert done == ["said"]
    assert guard._in_flight == []
    assert not load_file(tmp_path / "a" / FILE)["x"].any()


def test_a_change_that_nobody_announced_fails_the_save(tmp_path: Path) -> None:
    state, go, saver = torch.zeros(100_000), threading.Event(), Saver()
    save(tmp_path, content=1)
    content = {"slow": Slow(lambda: go.wait() and None), "x": state}
    saver.run(job(tmp_path, content=content), background=True, then=lambda: None)
    state.fill_(1)
    go.set()
    with pytest.raises(CheckpointError, match=r"changed by other code than engine\.step.*async_save"):
        saver.settle()
    assert everything(tmp_path) == ["a", "latest", "zero_to_fp32.py"]
    assert load_file(tmp_path / "a" / FILE) == 1


def test_errors_in_the_background_are_raised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver()
    broken = job(tmp_path)
    os.rmdir(broken.staging.folder)
    saver.run(broken, background=True, then=lambda: pytest.fail("nothing was saved"))
    with pytest.raises(CheckpointError, match=r"in the background was not: .*No such file"):
        saver.run(job(tmp_path, "b"), background=True, then=lambda: None)
    saver.settle()
    saver.run(job(tmp_path, "c"), background=True, then=lambda: None)
    saver.settle()
    assert known_tags(tmp_path) == ["c"]


def test_without_a_thread_it_is_saved_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "deepspeed-checkpoint":
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    saver = Saver()
    saver.run(job(tmp_path), background=True, then=lambda: None)
    assert not saver.busy
    assert known_tags(tmp_path) == ["a"]
    saver.settle()


def test_a_forked_process_has_nothing_in_flight(tmp_path: Path) -> None:
    """Its copy of a lock may be held for ever."""
    go, saver = threading.Event(), Saver()
    saver.run(job(tmp_path, content=Slow(lambda: go.wait() and None)), background=True, then=lambda: None)
    with guard._lock:
        pid = os.fork()
        if pid == 0:
            before_change()
            guard.start_writing([])
            os._exit(len(guard._in_flight))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(guard._in_flight) == 2
    go.set()
    saver.settle()


def test_the_interpreter_waits_for_a_save(tmp_path: Path) -> None:
    script = """
import sys, threading
from pathlib import Path
from tests.unit.test_ckpt_save import Saver, Slow, job

saver = Saver()
content = Slow(threading.main_thread().join)  # which is over when the interpreter waits for other threads
saver.run(job(Path(sys.argv[1]), content=content), background=True, then=lambda: None)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)
    assert known_tags(tmp_path) == ["a"]
