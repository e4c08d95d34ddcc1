"""Saving in the background: what is written is the state at the call, training does not notice, and nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed._core.ckpt import archive, guard, source
from deepspeed._core.ckpt.io import InertObject, load_file
from deepspeed.errors import CheckpointError
from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state, safe_set_local_fp32_param
from tests.helpers import preload  # noqa: F401 - before ranks are forked
from tests.helpers.ckpt import assert_same, build, by_name, config, snapshot, train, whole
from tests.helpers.crash import failing
from tests.helpers.dist import run_ranks
from tests.helpers.scripts import run_scripts

TILE_NBYTES = 256
FOREVER = 1 << 60


def in_background(stage: int = 2, dtype: str = "fp32", **extra: Any) -> dict[str, Any]:
    return config(stage, dtype, checkpoint={"async_save": True}, **extra)


class Gate:
    """Stops the writing of training state before its ``after``-th tile until it is opened."""

    def __init__(self, after: int, action: Callable[[], Any] | None = None) -> None:
        self.after, self._action = after, action
        self.reached, self.opened = threading.Event(), threading.Event()
        self._reads = 0

    def pass_(self) -> None:
        self._reads += 1
        if self._reads == self.after + 1:
            self.reached.set()
            if self._action is not None:
                self._action()
            if not self.opened.wait(60):
                raise AssertionError("the gate was never opened")

    def arrive(self) -> bool:
        """Waits until the writing of this rank is held; False if it has ended before, or nothing holds it."""
        while not self.reached.is_set():
            if self.after == FOREVER or not guard._in_flight:
                return False
            time.sleep(0.001)
        return True


@contextlib.contextmanager
def gated(after: int, stage: int = 3, action: Callable[[], Any] | None = None) -> Iterator[Gate]:
    """Small tiles, no early copies, and a gate for saves that begin in the block.

    Below stage 3 the ranks write in step with the first: the others have no gate, or would hold each other up.
    """
    held = stage == 3 or torch.distributed.get_rank() == 0
    gate = Gate(after if held or action is not None else FOREVER, action)
    real, small, tile = source.Live.read, archive._SMALL_NBYTES, source._TILE_NBYTES

    def read(self: source.Live, *args: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            gate.pass_()
        real(self, *args)

    source.Live.read, archive._SMALL_NBYTES, source._TILE_NBYTES = read, 0, TILE_NBYTES  # type: ignore[method-assign]
    try:
        yield gate
    finally:
        gate.opened.set()
        source.Live.read, archive._SMALL_NBYTES, source._TILE_NBYTES = real, small, tile  # type: ignore[method-assign]


def content_of(folder: Path) -> dict[str, Any]:
    """All files of a tag, without what tells how it was saved."""
    files = {p.name: load_file(p) for p in sorted(folder.glob("*.pt"))}
    for state in files.values():
        state.pop("ds_config", None)
    return files


def assert_equal_values(one: Any, two: Any, where: str) -> None:
    """Bit-equal, whatever is nested in what."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and one.shape == two.shape, where
        assert torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8)), where
    elif isinstance(one, dict):
        assert list(one) == list(two), f"{where}: {sorted(map(str, one.keys() ^ two.keys()))}"
        for key, value in one.items():
            assert_equal_values(value, two[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for index, value in enumerate(one):
            assert_equal_values(value, two[index], f"{where}/{index}")
    elif isinstance(one, InertObject):
        assert vars(one) == vars(two), where
    else:
        assert one == two, where


# -- content, and training meanwhile ------------------------------------------------------------------------------------


def while_training(rank: int, world: int, root: str, places: list[tuple[int, str]]) -> None:
    for number, (stage, dtype) in enumerate(places):
        untouched = build(config(stage, dtype))
        losses = train(untouched, rank, 2, seed=1) + train(untouched, rank, 3, seed=2)
        final = snapshot(untouched)
        untouched.destroy()

        sync = build(config(stage, dtype))
        assert train(sync, rank, 2, seed=1) == losses[:4]
        sync.save_checkpoint(f"{root}/{number}/sync", tag="t", client_state={"x": torch.arange(3.0)})
        assert train(sync, rank, 3, seed=2) == losses[4:]
        sync.destroy()

        for after in (0, 7, 30):
            what, folder = f"stage {stage}, {dtype}, held at {after}", f"{root}/{number}/async{after}"
            engine = build(in_background(stage, dtype))
            mine = torch.arange(3.0)
            assert train(engine, rank, 2, seed=1) == losses[:4], what
            with gated(after, stage) as gate:
                engine.save_checkpoint(folder, tag="t", client_state={"x": mine})
                mine.zero_()
                held = gate.arrive()
                assert held or rank or after > 7, what
                assert not held or (engine._saver.busy and not Path(folder, "t").exists()), what
                assert train(engine, rank, 3, seed=2) == losses[4:], what
                torch.distributed.barrier()
                gate.opened.set()
                engine._saver.settle()
            assert_same(snapshot(engine), final, what)
            engine.destroy()
            assert_equal_values(content_of(Path(folder, "t")), content_of(Path(root, f"{number}/sync/t")), what)
            torch.distributed.barrier()


PLACES = [(stage, dtype) for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")]


@pytest.mark.parametrize("world", [1, 2])
def test_content_is_that_of_a_synchronous_save_and_training_goes_on(tmp_path: Path, world: int) -> None:
    run_ranks(while_training, world, str(tmp_path), PLACES[world % 2 :: 3] if world == 2 else PLACES[::3])


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_content_at_all_stages_and_dtypes(tmp_path: Path, world: int) -> None:
    run_ranks(while_training, world, str(tmp_path), [*PLACES, (2, "fp16")], timeout_s=300)


def edit_weights(engine: Any) -> None:
    param = next(p for p in engine.module.parameters() if p.requires_grad and p.numel() > 60)
    with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
        if torch.distributed.get_rank() == 0 or engine.zero_optimization_stage() < 3:
            with torch.no_grad():
                param.add_(1.0)


def set_full(engine: Any) -> None:
    for param in engine.module.parameters():
        if param.requires_grad and param.numel():
            shape = getattr(param, "ds_shape", param.shape)
            safe_set_full_fp32_param(param, torch.full(shape, 0.5))
            safe_set_full_optimizer_state(param, torch.full(shape, 0.25), "exp_avg_sq")


def set_local(engine: Any) -> None:
    for slot in engine._flat.slots():
        if engine._flat.stage == 0:
            numel = slot.numel
        else:
            numel = slot.overlap(engine._flat.transport.rank)[2]
        safe_set_local_fp32_param(slot.param, torch.full((numel,), 0.5))


def load_weights(engine: Any) -> None:
    state = whole(engine.module)
    engine.load_module_state_dict({name: value * 0 + 2 for name, value in state.items()})


def set_buffer(engine: Any) -> None:
    engine.module.shift.fill_(9.0)


EDITS = {"gathered": edit_weights, "safe_set_full": set_full, "safe_set_local": set_local, "load": load_weights}


def edited_meanwhile(rank: int, world: int, root: str, stages: list[int]) -> None:
    for stage in stages:
        for name, edit in {**EDITS, "buffer": set_buffer}.items():
            if name == "gathered" and stage < 3:
                continue  # below stage 3 it is a plain edit of a weight, which is refused: see below
            folder = f"{root}/{stage}-{name}"
            engine = build(in_background(stage))
            train(engine, rank, 1, seed=1)
            before = by_name(engine)
            with gated(5, stage) as gate:
                engine.save_checkpoint(folder)
                gate.arrive()
                edit(engine)
                gate.opened.set()
                engine._saver.settle()
            after = by_name(engine)
            assert any(not torch.equal(after[key], value) for key, value in before.items()), name
            engine.load_checkpoint(folder)
            assert_same(by_name(engine), before, f"stage {stage}, {name}")
            engine.destroy()
            torch.distributed.barrier()


def test_edits_of_the_state_do_not_reach_the_file(tmp_path: Path) -> None:
    run_ranks(edited_meanwhile, 2, str(tmp_path), [0, 2, 3])


def edited_behind(rank: int, world: int, root: str) -> None:
    """A plain edit of a weight while it is being written: no mixture of old and new is ever published."""
    engine = build(in_background(2))
    train(engine, rank, 1, seed=1)
    engine.save_checkpoint(root, tag="good")
    engine._saver.settle()
    with gated(3, 2) as gate:
        engine.save_checkpoint(root, tag="torn")
        gate.arrive()
        with torch.no_grad():
            for param in engine.module.parameters():
                param.add_(1.0)
        gate.opened.set()
        with pytest.raises(CheckpointError, match=r"changed by other code than engine\.step"):
            engine.save_checkpoint(root, tag="next")
    torch.distributed.barrier()
    assert sorted(p.name for p in Path(root).iterdir()) == ["good", "latest", "zero_to_fp32.py"]
    engine.save_checkpoint(root, tag="next")
    engine.destroy()
    assert Path(root, "latest").read_text() == "next"


def test_a_plain_edit_meanwhile_is_refused(tmp_path: Path) -> None:
    run_ranks(edited_behind, 2, str(tmp_path))


def in_a_row(rank: int, world: int, root: str, seed: int, saves: int) -> None:
    """Saves, steps and loads as they come; every checkpoint is what it was to be."""
    draw = random.Random(seed)
    stage = draw.choice([0, 2, 3])
    engine, states = build(in_background(stage)), {}
    for number in range(saves):
        train(engine, rank, draw.randint(1, 2), seed=number)
        tag = f"t{number % (saves - 2)}"  # two are overwritten
        states[tag] = by_name(engine)
        with gated(draw.randint(0, 40), stage) as gate:
            engine.save_checkpoint(root, tag=tag)
            train(engine, rank, draw.randint(0, 2), seed=50 + number)
            gate.opened.set()
            if draw.random() < 0.3:
                _, client = engine.load_checkpoint(root)
                assert client == {}
                assert_same(by_name(engine), states[tag])
            engine._saver.settle()
    for tag, state in states.items():
        engine.load_checkpoint(root, tag=tag)
        assert_same(by_name(engine), state, tag)
    engine.destroy()


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_many_in_a_row(tmp_path: Path, seed: int) -> None:
    run_ranks(in_a_row, 2, str(tmp_path), seed, 6)


def two_engines(rank: int, world: int, root: str) -> None:
    """Both save at once; steps of one do not stop the other."""
    one, two = build(in_background(2), seed=1), build(in_background(3), seed=2)
    train(one, rank, 1, seed=1)
    train(two, rank, 1, seed=2)
    first, second = by_name(one), by_name(two)
    with gated(4, 2) as gate:
        one.save_checkpoint(f"{root}/one")
        two.save_checkpoint(f"{root}/two")
        gate.arrive()
        train(two, rank, 1, seed=3)
        train(one, rank, 1, seed=4)
        gate.opened.set()
        two.destroy()
        one.destroy()
    loader = build(config(0), seed=5)
    for folder, state in (("one", first), ("two", second)):
        loader.load_checkpoint(f"{root}/{folder}")
        assert_same(by_name(loader), state, folder)


def test_two_engines_in_one_process(tmp_path: Path) -> None:
    run_ranks(two_engines, 2, str(tmp_path))


# -- memory -------------------------------------------------------------------------------------------------------------


def tensor_nbytes() -> int:
    """Bytes of all tensors that are reachable, each storage once."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor):
            with contextlib.suppress(RuntimeError, NotImplementedError):
                storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return sum(storages.values())


def memory(rank: int, world: int, root: str, stages: list[int]) -> None:
    for stage in stages:
        engine = build(in_background(stage))
        train(engine, rank, 2, seed=1)
        engine.save_checkpoint(root, tag="warm")
        engine._saver.settle()
        train(engine, rank, 1, seed=1)
        before = tensor_nbytes()
        frozen: list[weakref.ref[Any]] = []
        real = source.empty_flat

        def noted(*args: Any, real: Any = real, frozen: Any = frozen) -> torch.Tensor:
            made = real(*args)
            frozen.append(weakref.ref(made))
            return made

        source.empty_flat = noted  # type: ignore[assignment]
        with gated(2, stage) as gate:
            engine.save_checkpoint(root, tag=f"t{stage}")
            gate.arrive()
            train(engine, rank, 1, seed=2)
            gate.opened.set()
            thread = engine._saver._thread
            thread.join()
        source.empty_flat = real  # type: ignore[assignment]
        assert frozen or (stage == 0 and rank), "nothing was copied, so that nothing is proved"
        del thread, noted
        gc.collect()
        # Before anyone asks for the result.
        assert [copy for copy in frozen if copy() is not None] == [] and guard._in_flight == []
        assert [item for item in gc.get_objects() if isinstance(item, source.Live)] == []
        assert tensor_nbytes() == before, stage
        engine.destroy()


@pytest.mark.parametrize("world", [1, 2])
def test_memory_returns_to_where_it_was(tmp_path: Path, world: int) -> None:
    run_ranks(memory, world, str(tmp_path), [0, 2, 3])


# -- errors -------------------------------------------------------------------------------------------------------------


def errors(rank: int, world: int, root: str) -> None:
    """On rank 1 the disk is full: said once, by whatever is called next, on all ranks."""
    for name in ("save_checkpoint", "load_checkpoint", "destroy"):
        engine = build(in_background(2))
        full = failing(os, "pwrite", OSError(errno.ENOSPC, "No space left on device"))
        with full if rank == 1 else contextlib.nullcontext():
            engine.save_checkpoint(root, tag="x")
            engine._saver._thread.join()
        train(engine, rank, 1, seed=1)
        arguments = () if name == "destroy" else (root,)
        with pytest.raises(CheckpointError, match=r"in the background was not: .*No space left"):
            getattr(engine, name)(*arguments)
        assert os.listdir(root) == []
        torch.distributed.barrier()
        engine.destroy()  # and no second time


def test_errors_reach_the_next_call_on_all_ranks(tmp_path: Path) -> None:
    run_ranks(errors, 2, str(tmp_path))


def dies(rank: int, world: int, root: str, stage: int) -> None:
    engine = build(in_background(stage))
    train(engine, rank, 1, seed=1)
    engine.save_checkpoint(root, tag="a")
    engine._saver.settle()
    torch.distributed.barrier()
    with gated(6, stage, (lambda: os.kill(os.getpid(), signal.SIGKILL)) if rank == 1 else None) as gate:
        engine.save_checkpoint(root, tag="b")
        if rank == 0:
            gate.opened.set()
        engine.destroy()


_ENTERED: list[Any] = []


def raises(rank: int, world: int, root: str, stage: int) -> None:
    engine = build(in_background(stage))
    train(engine, rank, 1, seed=1)
    _ENTERED.append(gated(6, stage))  # never left: the other rank's tiles must stay as small
    gate = _ENTERED[-1].__enter__()
    engine.save_checkpoint(root, tag="b")
    gate.arrive()
    gate.opened.set()
    if rank == 1:
        raise ValueError("of the user's")
    train(engine, rank, 1, seed=2)
    engine.destroy()


@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_that_dies_meanwhile_is_an_error(tmp_path: Path, stage: int) -> None:
    survivor, dead = run_scripts(dies, 2, str(tmp_path), stage, timeout_s=40)
    assert dead.code == -9 and survivor.code == 1, (survivor, dead)
    assert "in the background failed" in survivor.text and "in the background was not" in survivor.text, survivor.text
    assert not (tmp_path / "b").exists() and (tmp_path / "latest").read_text() == "a"


def test_an_exception_meanwhile_is_an_error(tmp_path: Path) -> None:
    ended = run_scripts(raises, 2, str(tmp_path), 2, timeout_s=40)
    assert ended[0].code in (1, 76) and ended[1].code == 1, ended  # 76: the hang doctor knows why
    assert "of the user's" in ended[1].text


# -- the end of the program -----------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys, time
import torch
torch.set_num_threads(1)
import deepspeed
from deepspeed._core.ckpt import blockfile

real = blockfile.BlockFile._put
def slow(self, *args):
    time.sleep(0.5)
    real(self, *args)
blockfile.BlockFile._put = slow

deepspeed.init_distributed("gloo")
model = torch.nn.Linear(8, 8)
config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam"}, "checkpoint": {"async": True},
          "zero_optimization": {"stage": int(sys.argv[2])}}
engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
loss = engine(torch.ones(1, 8)).sum()
engine.backward(loss)
engine.step()
engine.save_checkpoint(sys.argv[1], tag="last")
assert engine._saver.busy
how = sys.argv[3]
if how == "groups destroyed":
    torch.distributed.destroy_process_group()
if how == "comm destroyed":
    deepspeed.comm.destroy_process_group()
if how == "engine dropped":
    del engine, loss, model
if how == "raises" or (how == "one raises" and engine.global_rank == 0):
    raise KeyError("of the user's")
if how == "sys.exit":
    sys.exit(3)
"""

ENDS = {
    "falls off": 0,
    "groups destroyed": 0,
    "comm destroyed": 0,
    "engine dropped": 0,
    "raises": 1,
    "one raises": 1,
    "sys.exit": 3,
}


def run_program(folder: Path, world: int, stage: int, how: str) -> list[tuple[int, str]]:
    """The script in processes of its own."""
    (folder / "script.py").write_text(SCRIPT)
    started = []
    for rank in range(world):
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(deepspeed.__file__).parent.parent),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(20000 + os.getpid() % 20000),
        }
        command = [sys.executable, "script.py", "out", str(stage), how]
        started.append(
            subprocess.Popen(
                command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    ended = []
    try:
        for process in started:
            text, _ = process.communicate(timeout=60)
            ended.append((process.returncode, text))
    finally:
        for process in started:
            process.kill()
    return ended


def check_program(folder: Path, world: int, stage: int, how: str) -> None:
    ended = run_program(folder, world, stage, how)
    codes = [1] + [0] * (world - 1) if how == "one raises" else [ENDS[how]] * world
    assert [code for code, _ in ended] == codes, (how, ended)
    assert (folder / "out" / "latest").read_text() == "last", (how, ended)
    (loaded,) = run_ranks(loads_tiny, 1, str(folder / "out"), stage)
    assert loaded == 1


def loads_tiny(rank: int, world: int, folder: str, stage: int) -> int:
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Adam"},
        "zero_optimization": {"stage": stage},
    }
    engine = build(settings, model=torch.nn.Linear(8, 8), groups=False)
    engine.load_checkpoint(folder)
    return int(engine.global_steps)


def test_the_interpreter_waits(tmp_path: Path) -> None:
    check_program(tmp_path, 2, 2, "groups destroyed")


@pytest.mark.slow
@pytest.mark.parametrize("how", ENDS)
def test_the_interpreter_waits_however_it_ends(tmp_path: Path, how: str) -> None:
    check_program(tmp_path, 2, 2 if how in ("raises", "groups destroyed") else 3, how)
