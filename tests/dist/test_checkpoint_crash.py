"""A save that is killed anywhere loses nothing: the one before still loads, or the new one does, whole."""

from __future__ import annotations

import functools
import itertools
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed._core.ckpt.staging import leftovers
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from tests.helpers import preload  # noqa: F401 - before ranks are forked
from tests.helpers.ckpt import assert_same, build, by_name, config, snapshot, train
from tests.helpers.crash import Moments, kill_all
from tests.helpers.dist import run_ranks
from tests.helpers.scripts import run_scripts

State = dict[str, torch.Tensor]

# What the killed save was doing, and its tag. ``keep``: it was to remove the one before.
MODES = {"first": "b", "new": "b", "over": "a", "keep": "b"}


def settings(stage: int, background: bool, mode: str = "new") -> dict[str, Any]:
    checkpoint = {"async": background, **({"keep_last": 1} if mode == "keep" else {})}
    return config(stage, checkpoint=checkpoint)


def save_and_go_on(engine: Any, folder: str, mode: str, rank: int, background: bool) -> None:
    engine.save_checkpoint(folder, tag=MODES[mode])
    if background:
        train(engine, rank, 1, seed=3)  # while it is being written
    engine.destroy()  # waits


def check_exported(folder: Path, expected: dict[int, State], tag: str | None = None) -> None:
    """What the export gives is one of the states that were saved."""
    exported = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=tag)
    for state in expected.values():
        if all(torch.equal(state[name], value) for name, value in exported.items() if name in state):
            return
    raise AssertionError(f"{folder}: the exported weights are of no step that was saved")


def check_survives(loader: Any, folder: Path, mode: str, expected: dict[int, State], what: str) -> int:
    """Loads what a killed save left, exports it, saves; nothing is left over. The step that was loaded. Collective."""
    rank = torch.distributed.get_rank()
    left = folder / "latest"
    path, _ = loader.load_checkpoint(str(folder))
    if path is None:
        assert mode == "first", f"{what}: nothing to load in {sorted(os.listdir(folder))}"
        step = 0
    else:
        step = loader.global_steps
        assert_same(by_name(loader), expected[step], what)
        if rank == 0:
            check_exported(folder, {step: expected[step]}, None if left.exists() else Path(path).parent.name)
    torch.distributed.barrier()
    loader.save_checkpoint(str(folder), tag="next")
    mine = snapshot(loader)
    if rank == 0:
        assert leftovers(folder) == [], what
        assert set(os.listdir(folder)) <= {"a", "b", "next", "latest", "zero_to_fp32.py"}, what
        assert [str(p) for p in folder.rglob("*.tmp")] == [], what
        assert left.read_text() == "next"
    torch.distributed.barrier()
    loader.load_checkpoint(str(folder))
    assert_same(snapshot(loader), mine, what)
    return step


# -- every moment, on one rank: a fork of the same process dies at each -------------------------------------------------


def every_moment(rank: int, world: int, root: str, stage: int, background: bool, mode: str, stride: int) -> int:
    engine = build(settings(stage, background, mode))
    train(engine, rank, 1, seed=1)
    base = Path(root, "base")
    base.mkdir()
    expected = {1: by_name(engine)}
    if mode != "first":
        engine.save_checkpoint(str(base), tag="a")
    train(engine, rank, 1, seed=2)
    engine._saver.settle()
    expected[2] = by_name(engine)
    loader = build(settings(stage, False), seed=5)
    steps: list[int] = []
    for at in itertools.count(1, stride):
        folder = Path(root, f"killed{at}")
        shutil.copytree(base, folder)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with Moments(at, lambda: kill_all([os.getpid()])):
                    save_and_go_on(engine, str(folder), mode, rank, background)
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -9), f"before call {at}: exit code {code}"
        steps.append(check_survives(loader, folder, mode, expected, f"killed before call {at}"))
        shutil.rmtree(folder)
        if code == 0:
            break
    # Once the new one is there it stays, whatever comes after.
    assert steps == sorted(steps) and steps[0] == (0 if mode == "first" else 1) and steps[-1] == 2, steps
    engine.destroy()
    return len(steps) - 1


@pytest.mark.parametrize(("stage", "background", "mode", "stride"), [(2, False, "over", 2), (3, True, "keep", 4)])
def test_killed_at_every_moment(tmp_path: Path, stage: int, background: bool, mode: str, stride: int) -> None:
    (moments,) = run_ranks(every_moment, 1, str(tmp_path), stage, background, mode, stride)
    assert moments * stride >= 40


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_killed_at_every_moment_in_every_mode(tmp_path: Path, stage: int, background: bool, mode: str) -> None:
    (moments,) = run_ranks(every_moment, 1, str(tmp_path), stage, background, mode, 1, timeout_s=300)
    assert moments >= 25


# -- several ranks ------------------------------------------------------------------------------------------------------

Case = tuple[
    int, bool, str, int, bool, int
]  # stage, background, mode, who, everyone with it, before which of its calls


def killed(rank: int, world: int, folder: str, case: Case) -> None:
    stage, background, mode, victim, everyone, at = case
    engine = build(settings(stage, background, mode))
    train(engine, rank, 1, seed=1)
    if mode != "first":
        engine.save_checkpoint(folder, tag="a")
    train(engine, rank, 1, seed=2)
    pids: list[int] = [0] * world
    torch.distributed.all_gather_object(pids, os.getpid())
    engine._saver.settle()
    torch.distributed.barrier()
    doomed = pids if everyone else [pids[victim]]
    with Moments(at, functools.partial(kill_all, doomed) if rank == victim else None):
        save_and_go_on(engine, folder, mode, rank, background)


def truth(rank: int, world: int, stages: list[int]) -> dict[int, dict[int, State]]:
    """What was trained, by stage and steps, without saves."""
    states: dict[int, dict[int, State]] = {}
    for stage in stages:
        engine = build(settings(stage, False))
        states[stage] = {}
        for step in (1, 2):
            train(engine, rank, 1, seed=step)
            states[stage][step] = by_name(engine)
        engine.destroy()
    return states


def check_all(rank: int, world: int, root: str, cases: list[Case], states: dict[int, dict[int, State]]) -> list[int]:
    steps = []
    for number, case in enumerate(cases):
        loader = build(settings(case[0], False), seed=5)
        steps.append(check_survives(loader, Path(root, str(number)), case[2], states[case[0]], str(case)))
        loader.destroy()
    return steps


def run_cases(root: Path, cases: list[Case]) -> None:
    """Kills, and sees that the others end with an error; then a fresh run, for all cases together."""
    died = 0
    for number, case in enumerate(cases):
        *_, victim, everyone, _ = case
        folder = root / str(number)
        folder.mkdir()
        ended = run_scripts(killed, 2, str(folder), case, timeout_s=40)  # which says who hangs
        codes = [one.code for one in ended]
        if codes == [0, 0]:  # the save has fewer calls
            continue
        died += 1
        assert codes[victim] == -9, (case, ended)
        others = {-9} if everyone else {1}
        assert set(codes[:victim] + codes[victim + 1 :]) == others, (case, ended)
    assert died >= len(cases) / 2
    states = run_ranks(truth, 2, sorted({case[0] for case in cases}))[0]
    run_ranks(check_all, 2, str(root), cases, states, timeout_s=90 + 2 * len(cases))


def test_killed_with_other_ranks(tmp_path: Path) -> None:
    run_cases(
        tmp_path,
        [
            (2, False, "over", 0, False, 31),  # between the two renames
            (2, True, "over", 1, False, 6),
            (3, False, "new", 1, False, 9),
            (3, True, "keep", 0, True, 20),
        ],
    )


def script_exports(folder: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-I", str(folder / "zero_to_fp32.py"), str(folder), str(folder / "out")],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr


def between_renames(rank: int, world: int, folder: str) -> None:
    """Ends at the second rename of publishing."""
    engine = build(settings(2, False))
    train(engine, rank, 1, seed=1)
    engine.save_checkpoint(folder, tag="a")
    train(engine, rank, 1, seed=2)
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if str(source).endswith(".new"):
            kill_all([os.getpid()])
        real(source, target)

    os.rename = rename
    engine.save_checkpoint(folder, tag="a")


def test_the_script_exports_what_is_there_between_the_renames(tmp_path: Path) -> None:
    (ended,) = run_scripts(between_renames, 1, str(tmp_path))
    assert ended.code == -9 and not (tmp_path / "a").exists(), ended
    script_exports(tmp_path)
    exported = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    expected = run_ranks(truth, 1, [2])[0][2][2]
    assert all(torch.equal(expected[name], value) for name, value in exported.items() if name in expected)


def random_cases(seed: int, count: int) -> list[Case]:
    draw = random.Random(seed)
    cases: list[Case] = []
    for _ in range(count):
        victim = draw.choice([0, 0, 1])
        at = draw.randint(1, 55 if victim == 0 else 22)
        cases.append(
            (draw.choice([0, 2, 3]), draw.random() < 0.5, draw.choice([*MODES]), victim, draw.random() < 0.3, at)
        )
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_with_other_ranks_at_random(tmp_path: Path, seed: int) -> None:
    run_cases(tmp_path, random_cases(seed, 20))
