"""A checkpoint folder appears at once or not at all, whatever is killed, renamed or in the way."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deepspeed._core.ckpt import staging as staging_module
from deepspeed._core.ckpt.manifest import Manifest, check_complete, known_tags, write_manifest
from deepspeed._core.ckpt.staging import (
    Staging,
    check_tag,
    hidden_name,
    leftovers,
    remove_leftovers,
    tag_of,
    visible,
)
from deepspeed.errors import CheckpointError

TAG = "step.1"


class Killed(BaseException):
    """Passes through everything, and nothing is cleaned up."""


@pytest.fixture(scope="session")
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def fill(folder: Path, step: int) -> None:
    (folder / "mp_rank_00_model_states.pt").write_text(str(step))
    (folder / f"only_{step}_optim_states.pt").write_text("")
    write_manifest(folder, Manifest(TAG, step, step, 0, 1, "0"))


def save(root: Path, step: int, tag: str = TAG) -> None:
    staging = Staging(root, tag)
    staging.create()
    staging.require()
    fill(staging.folder, step)
    staging.publish()
    staging.remove_replaced()


def step_of(folder: Path) -> int:
    manifest = check_complete(folder)
    assert manifest is not None
    step = manifest.global_steps
    # All files are of the same save.
    assert (folder / "mp_rank_00_model_states.pt").read_text() == str(step)
    assert [p.name for p in folder.glob("only_*")] == [f"only_{step}_optim_states.pt"]
    return step


def hidden(root: Path) -> list[str]:
    return sorted(name for name in os.listdir(root) if name.startswith("."))


def test_a_folder_appears_complete_and_replaces_the_older_one(tmp_path: Path) -> None:
    root = tmp_path / "not" / "there"
    staging = Staging(root, TAG)
    staging.create()
    fill(staging.folder, 1)
    assert known_tags(root) == []
    assert not visible(root, TAG).exists()
    staging.publish()
    assert os.listdir(root) == [TAG]
    save(root, 2)
    assert os.listdir(root) == [TAG]
    assert step_of(visible(root, TAG)) == 2


def test_a_large_one_that_is_replaced_goes_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(content: str) -> None:
        staging = Staging(tmp_path, "t")
        staging.create()
        (staging.folder / "weights").write_text(content)
        staging.publish()
        staging.remove_replaced()

    go, real = threading.Event(), staging_module.remove_folder
    monkeypatch.setattr(staging_module, "remove_folder", lambda path: go.wait(60) and real(path))
    monkeypatch.setattr(staging_module, "_SMALL_NBYTES", 5)
    save("first of all")
    save("2nd")
    assert (tmp_path / "t" / "weights").read_text() == "2nd"
    [old] = [path for path in tmp_path.iterdir() if path.name != "t"]
    assert (old / "weights").exists() and old.name.endswith(".old")
    waiting = threading.Thread(target=save, args=("3rd",))
    waiting.start()  # it would need room for three
    assert not any(path.name.endswith(".new") for path in tmp_path.iterdir())
    go.set()
    waiting.join(60)
    assert (tmp_path / "t" / "weights").read_text() == "3rd"
    assert [path.name for path in tmp_path.iterdir()] == ["t"]  # a small one goes at once


def test_files_of_others_stay(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = tmp_path / TAG
    (folder / "notes.txt").write_text("mine")
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "scores").write_text("7")
    (folder / "zero").mkdir()
    (folder / "zero" / "optimizer_state.pt").write_text("of a universal folder")
    for name in ("zero_pp_rank_5_mp_rank_00optim_states.pt", "layer_01-model_00-model_states.pt", ".a.tmp"):
        (folder / name).write_text("ours")
    save(tmp_path, 2)
    assert step_of(folder) == 2
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "evaluation" / "scores").read_text() == "7"
    assert len(os.listdir(folder)) == 5
    assert hidden(tmp_path) == []


def test_discarded_folders_are_gone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    staging = Staging(tmp_path, TAG)
    staging.create()
    fill(staging.folder, 2)
    staging.discard()
    assert os.listdir(tmp_path) == [TAG]
    assert step_of(tmp_path / TAG) == 1


def test_a_failed_rename_leaves_the_older_folder_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    staging = Staging(tmp_path, TAG)
    staging.create()
    fill(staging.folder, 2)
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if source == staging.folder:
            raise PermissionError(13, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(PermissionError):
        staging.publish()
    staging.discard()
    assert os.listdir(tmp_path) == [TAG]
    assert step_of(tmp_path / TAG) == 1


# -- killed ------------------------------------------------------------------------------------------------------------


def kill_at(patch: pytest.MonkeyPatch, point: int) -> list[str]:
    """Kills at the ``point``-th change of the file system, before it. Gives what was done."""
    done: list[str] = []

    def watch(owner: object, name: str) -> None:
        real: Callable[..., object] = getattr(owner, name)

        def wrapped(*args: object, **options: object) -> object:
            if len(done) == point:
                raise Killed
            done.append(name)
            return real(*args, **options)

        patch.setattr(owner, name, wrapped)

    for name in ("rename", "mkdir", "unlink", "rmdir", "fsync"):
        watch(os, name)
    return done


def test_killed_at_any_point_of_replacing_it_the_old_or_the_new_one_is_found(tmp_path: Path, dead_pid: int) -> None:
    """And the next save, killed at any point of tidying up, loses neither that nor the user's files."""
    found: list[int] = []
    for point in range(1000):
        root = tmp_path / str(point)
        save(root, 1)
        (root / TAG / "notes.txt").write_text("mine")
        (root / TAG / "more").mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getpid", lambda: dead_pid)
            done = kill_at(patch, point)
            try:
                save(root, 2)
            except Killed:
                pass
            else:
                assert len(done) == point
                break
        folder = visible(root, TAG)
        assert tag_of(folder) == TAG
        found.append(step_of(folder))
        for again in range(4):
            with pytest.MonkeyPatch.context() as patch:
                kill_at(patch, again)
                try:
                    remove_leftovers(root)
                except Killed:
                    assert step_of(visible(root, TAG)) == found[-1]
        remove_leftovers(root)
        assert os.listdir(root) == [TAG]
        assert step_of(root / TAG) == found[-1]
        assert (root / TAG / "notes.txt").read_text() == "mine"
        assert (root / TAG / "more").is_dir()
    assert found == sorted(found)
    assert set(found) == {1, 2}


def test_the_next_save_makes_room_first(tmp_path: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: dead_pid)
        killed = Staging(tmp_path, "a")
        killed.create()
        fill(killed.folder, 1)
    staging = Staging(tmp_path, "c")
    staging.create()
    assert hidden(tmp_path) == [staging.name]


# -- leftovers ---------------------------------------------------------------------------------------------------------


def leave(
    root: Path, tag: str = TAG, *, pid: int, kind: str = "new", host: str | None = None, age_s: float = 0
) -> Path:
    name = f".{tag}.{staging_module.host_key() if host is None else host}.{pid}.0123abcd.{kind}"
    (root / name).mkdir()
    fill(root / name, 5)
    then = time.time() - age_s
    os.utime(root / name, (then, then))
    return root / name


@pytest.mark.parametrize("kind", ["new", "gone"])
def test_what_dead_processes_left_is_removed_and_nothing_else(tmp_path: Path, dead_pid: int, kind: str) -> None:
    leave(tmp_path, pid=dead_pid, kind=kind)
    leave(tmp_path, "other tag", pid=dead_pid, kind=kind)
    leave(tmp_path, "old", pid=7, host="elsewhere", age_s=48 * 3600, kind=kind)
    kept = [
        leave(tmp_path, pid=os.getpid(), kind=kind),
        leave(tmp_path, pid=1, kind=kind),  # alive, of another user perhaps
        leave(tmp_path, pid=dead_pid, host="elsewhere", age_s=3600, kind=kind),
        tmp_path / ".hidden",
        tmp_path / "plain",
    ]
    for path in kept[3:]:
        path.mkdir()
    (tmp_path / f".file.host.{dead_pid}.0123abcd.new").write_text("no folder")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*(p.name for p in kept), f".file.host.{dead_pid}.0123abcd.new"])
    remove_leftovers(tmp_path / "nowhere")


def test_what_was_moved_aside_gets_its_name_back(tmp_path: Path, dead_pid: int) -> None:
    leave(tmp_path, "a", pid=dead_pid, kind="old")
    leave(tmp_path, "b", pid=dead_pid, kind="old")
    save(tmp_path, 7, "b")
    assert step_of(visible(tmp_path, "a")) == 5
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert step_of(tmp_path / "a") == 5
    assert step_of(tmp_path / "b") == 7


def test_what_a_running_save_has_moved_aside_is_left_to_it(tmp_path: Path) -> None:
    aside = leave(tmp_path, pid=os.getpid(), kind="old")
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [aside.name]


def test_the_only_copy_stays_if_it_cannot_be_renamed(
    tmp_path: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = leave(tmp_path, pid=dead_pid, kind="old")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [left.name]
    assert step_of(visible(tmp_path, TAG)) == 5


def test_what_was_never_published_is_not_visible(tmp_path: Path, dead_pid: int) -> None:
    leave(tmp_path, pid=dead_pid, kind="new")
    assert visible(tmp_path, TAG) == tmp_path / TAG
    assert visible(tmp_path / "nowhere", TAG) == tmp_path / "nowhere" / TAG
    assert tag_of(tmp_path / TAG) == TAG


def test_hidden_names_carry_the_tag_and_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("node", "node-1.example.org", "ä" * 30, "x" * 200):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        for tag in ("a", "a.b", "a b.new", ".".join("x" * 20), "ключ", "a" * 187):
            check_tag(tag)
            (tmp_path / hidden_name(tag, "old")).mkdir()
            (one,) = leftovers(tmp_path)
            assert (one.tag, one.pid, one.kind, one.host) == (tag, os.getpid(), "old", staging_module.host_key())
            assert tag_of(one.path) == tag
            shutil.rmtree(one.path)
    names = set()
    for host in ("x" * 50 + "1", "x" * 50 + "2"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        names.add(staging_module.host_key())
    assert len(names) == 2


def test_containers_of_one_host_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not see each other's processes, which would seem dead."""
    real, names = os.stat, set()
    for number in (staging_module._FIRST_PID_NAMESPACE, 4026532000, 4026532001):

        def stat(path: object, *args: object, number: int = number, **options: object) -> object:
            if path != "/proc/self/ns/pid":
                return real(path, *args, **options)  # type: ignore[arg-type]
            return os.stat_result((0, number, *[0] * 8))

        monkeypatch.setattr(os, "stat", stat)
        names.add(staging_module.host_key())
    assert len(names) == 3


# -- odd places --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tag", ["", ".", "..", ".a", "a/b", "/a", "a/", "a\0b", " a", "a ", "a\n", "a\nb", "a\udcff", "x" * 200, "ä" * 100]
)
def test_tags_that_cannot_be_folders_are_refused(tmp_path: Path, tag: str) -> None:
    with pytest.raises(ValueError, match="tag "):
        check_tag(tag)
    with pytest.raises(ValueError, match="tag "):
        Staging(tmp_path / "root", tag).create()
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("tag", ["a.b", "step 1", "ключ-🙂", "x" * 187, "a'b\"c", "-rf", "*"])
def test_odd_tags_work(tmp_path: Path, tag: str) -> None:
    save(tmp_path, 1, tag)
    save(tmp_path, 2, tag)
    assert os.listdir(tmp_path) == [tag]
    assert step_of(visible(tmp_path, tag)) == 2


def test_the_folder_stays_the_same_when_the_process_or_a_link_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("one")
    monkeypatch.chdir(tmp_path)
    for root in (Path("one"), Path("link")):
        staging = Staging(root, root.name)
        staging.create()
        fill(staging.folder, 3)
        monkeypatch.chdir("two")
        (tmp_path / "link").unlink()
        (tmp_path / "link").symlink_to("two")
        staging.publish()
        monkeypatch.chdir(tmp_path)
        (tmp_path / "link").unlink()
        (tmp_path / "link").symlink_to("one")
    assert sorted(os.listdir("one")) == ["link", "one"]
    assert os.listdir("two") == []


def test_a_tag_that_is_a_link_is_replaced_and_its_folder_kept(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere", 1)
    root = tmp_path / "root"
    root.mkdir()
    (root / TAG).symlink_to(tmp_path / "elsewhere" / TAG)
    save(root, 2)
    assert os.listdir(root) == [TAG]
    assert not (root / TAG).is_symlink()
    assert step_of(root / TAG) == 2
    assert step_of(tmp_path / "elsewhere" / TAG) == 1


def test_a_file_in_the_place_of_the_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / TAG).write_text("mine")
    with pytest.raises(CheckpointError, match=r"step\.1 exists and is not a folder"):
        save(tmp_path, 1)
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"dangling exists"):
        save(tmp_path, 1, "dangling")
    assert sorted(os.listdir(tmp_path)) == ["dangling", TAG]
    assert (tmp_path / TAG).read_text() == "mine"


def test_a_folder_that_others_do_not_see_is_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging_module.time, "sleep", lambda _: None)
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(staging_module.time, "monotonic", lambda: next(clock))
    with pytest.raises(CheckpointError, match="not the same folder on all nodes"):
        Staging(tmp_path, TAG).require()


def test_saves_of_two_runs_at_the_same_moment_do_not_mix(tmp_path: Path) -> None:
    """Into one folder, under one tag: all succeed, and one of them stays, whole."""
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            for step in range(15):
                save(tmp_path, 100 * number + step)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert os.listdir(tmp_path) == [TAG]
    assert step_of(tmp_path / TAG) % 100 == 14
