"""The hang doctor over several gloo processes: ranks that diverge are told apart, ranks that are slow are left alone."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import deepspeed
import deepspeed.comm as comm
import tests.helpers.engine_parts  # noqa: F401
from deepspeed._core.reduce.transport import make_transport
from deepspeed.comm import doctor
from deepspeed.comm.doctor import _process, board, evidence
from deepspeed.comm.doctor.verdict import State
from deepspeed.errors import ConfigError
from tests.helpers.dist import run_ranks
from tests.helpers.models import batches
from tests.helpers.scripts import Ended, run_scripts
from tests.helpers.training import make_model

ROOT = str(Path(__file__).parents[2])
TIMEOUT_S = 1.5
#: What a rank may take for its report, and the same on a machine that is busy with other things.
SOON = {"DS_HANG_TIMEOUT_S": str(TIMEOUT_S)}


def _steps(rank: int, count: int = 3) -> None:
    """Some steps in which all is well, once every rank has met the others."""
    assert doctor.start()
    while _process.doctor._unmet:
        time.sleep(0.01)
    for step in range(count):
        doctor.at(step=step, phase="forward", module="blocks.3.mlp", parameter="blocks.3.mlp.fc.weight")
        comm.all_reduce(torch.ones(250))
        time.sleep(0.05)


def _row(ended: Ended, rank: int) -> str:
    """The report's line about the rank."""
    reports = ended.text.split("hang doctor: ")
    assert len(reports) > 1, f"no report:\n{ended.text}"
    found = re.search(rf"^{rank}  .*$", reports[-1], re.MULTILINE)
    assert found, ended.text
    return found.group()


def _headline(ended: Ended) -> str:
    assert "hang doctor: " in ended.text, f"no report:\n{ended.text}"
    return ended.text.split("hang doctor: ")[-1].splitlines()[0]


def _check_survivors(ranks: list[Ended], survivors: list[int], parameters: dict[int, str] | None = None) -> None:
    """Each has ended with an error and says everything about every rank; ``parameters``: where it is not that of _steps."""
    for survivor in survivors:
        assert ranks[survivor].code not in (0, -signal.SIGKILL), ranks[survivor].text
        assert "last common step: 2" in ranks[survivor].text, ranks[survivor].text
        for rank in range(len(ranks)):
            row = _row(ranks[survivor], rank)
            assert re.search(r" #\d+ \w+ [\d.]+ k?B ", row), row
            assert re.search(rf" blocks\.3\.mlp +{(parameters or {}).get(rank, 'blocks.3.mlp.fc.weight')}$", row), row


# -- divergences -------------------------------------------------------------------------------------------------------


def _other_order(rank, world):
    _steps(rank)
    transport = make_transport(None, torch.device("cpu"))
    sizes = [300, 600] if rank != 1 else [600, 300]
    for numel in sizes:
        transport.all_gather(torch.ones(numel), limit_numel=1 << 20).wait()


def test_another_order_of_collectives_is_told_on_every_rank():
    ranks = run_scripts(_other_order, 3, **SOON)
    _check_survivors(ranks, [0, 1, 2])
    assert [r.code for r in ranks] == [doctor.EXIT_CODE] * 3
    for ended in ranks:
        assert _headline(ended) == "deadlock: all ranks wait, and rank 1 for something else than the others"
        assert "<--" in _row(ended, 1) and "<--" not in _row(ended, 0) + _row(ended, 2)
        assert "#4 all_gather 2.4 kB" in _row(ended, 1) and "#4 all_gather 1.2 kB" in _row(ended, 2)
        assert "set_z3_leaf_modules" in ended.text
        assert "in _other_order" in ended.text  # the own Python stack


def _zero_3_gathers_alone(rank, world):
    model = torch.nn.Sequential(*[torch.nn.Linear(60, 60, bias=False) for _ in range(2)])
    engine, *_ = deepspeed.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
    )
    _steps(rank)
    for step in range(3):
        doctor.at(step=step, phase="")
        if rank == 1 and step == 2:
            with deepspeed.zero.GatheredParameters(engine.module[1].weight):
                pass
        engine.backward(engine(torch.ones(2, 60)).sum())
        engine.step()


def test_a_gather_on_one_rank_alone_with_zero_3():
    ranks = run_scripts(_zero_3_gathers_alone, 2, **SOON)
    for ended in ranks:
        assert ended.code == doctor.EXIT_CODE, ended.text
        assert "deadlock: all ranks wait, not for the same" in _headline(ended)
        assert "last common step: 2" in ended.text
        for rank in range(2):  # which of them depends on the plan: what both ranks gather is gathered
            assert re.search(
                r"in all_gather \(.*  2  .* #\d+ all_gather 14.4 kB  [01] +[01]\.weight", _row(ended, rank)
            )
        assert _row(ended, 0)[1:] != _row(ended, 1)[1:]


def _one_more(rank, world):
    _steps(rank)
    if rank == 1:
        comm.all_reduce(torch.ones(500))
    else:
        time.sleep(1.2 * TIMEOUT_S)


def test_one_collective_more_on_one_rank():
    ranks = run_scripts(_one_more, 2, **SOON)
    _check_survivors(ranks, [1])
    assert "rank 0 has finished" in _headline(ranks[1]) and "#4 all_reduce 2.0 kB" in _row(ranks[1], 1)
    assert ranks[0].code == 0


def _leaves_early(rank, world):
    _steps(rank)
    if rank != 0:
        comm.all_reduce(torch.ones(500))


@pytest.mark.parametrize("store", ["tcp", "file"])
def test_a_rank_that_finishes_early(store):
    """With tcp the store ends with rank 0."""
    ranks = run_scripts(_leaves_early, 3, store=store, **SOON)
    _check_survivors(ranks, [1, 2])
    assert ranks[0].code == 0 and "hang doctor" not in ranks[0].text
    for ended in ranks[1:]:
        assert "rank 0 has finished" in _headline(ended) and "finished" in _row(ended, 0)
        assert "drop_last" in ended.text


def _says_and_ends(rank, world):
    """Rank 0 takes the store with it at once."""
    _steps(rank)
    if rank == 0:
        mine = _process.doctor._own
        mine.leave_word(mine.status(state=State.RAISED, error="ValueError: boom"))
        os._exit(3)
    comm.all_reduce(torch.ones(500))


class _Boom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("boom in backward")


def _raises_in_backward(rank, world):
    engine, *_ = deepspeed.initialize(
        model=make_model("plain"),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "zero_optimization": {"stage": 2},
        },
    )
    _steps(rank)
    doctor.at(phase="backward")
    loss = engine(*batches(rank, 1, size=2)[0])
    engine.backward(_Boom.apply(loss) if rank == 1 else loss)
    engine.step()


@pytest.mark.skipif(sys.platform != "linux", reason="needs memfd")
def test_last_words_outlive_the_store():
    ranks = run_scripts(_says_and_ends, 2, store="tcp", **SOON)
    assert ranks[0].code == 3
    row = _row(ranks[1], 0)
    assert "raised ValueError: boom  <--" in row and "#3 all_reduce" in row


def test_an_exception_on_one_rank_in_backward():
    ranks = run_scripts(_raises_in_backward, 2, **SOON)
    _check_survivors(ranks, [0], {0: "inp.weight"})  # whose gradient came last
    assert ranks[1].code == 1 and "ArithmeticError: boom in backward" in ranks[1].text
    assert "Traceback (most recent call last)" in ranks[1].text
    assert "rank 1 raised ArithmeticError: boom in backward" in _headline(ranks[0])
    assert "reduce_scatter" in _row(ranks[0], 0)


def _gathers_alone(rank, world):
    _steps(rank)
    if rank == 1:
        doctor.at(phase="save_checkpoint")
        comm.all_gather_object([None] * world, {"a": 1})
    else:
        doctor.at(phase="backward")
        full = torch.ones(300)
        make_transport(None, torch.device("cpu")).reduce_scatter(
            full, torch.zeros(300 // world), scale=1.0, accumulate=False
        ).wait()


def test_a_gather_on_one_rank_alone():
    ranks = run_scripts(_gathers_alone, 3, **SOON)
    _check_survivors(ranks, [0, 1, 2])
    for ended in ranks:
        assert "rank 1 gathers alone" in ended.text and "save_checkpoint" in _row(ended, 1)
        assert "all_gather_object" in _row(ended, 1) and "reduce_scatter" in _row(ended, 0)


def _is_killed(rank, world, victim):
    _steps(rank)
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.all_reduce(torch.ones(500))


@pytest.mark.parametrize(("store", "victim"), [("file", 1), ("tcp", 0)])
def test_a_rank_that_is_killed(store, victim):
    """Nothing could be said any more, and with tcp the store is gone, too: the pages tell."""
    ranks = run_scripts(_is_killed, 3, victim, store=store, **SOON)
    survivors = [r for r in range(3) if r != victim]
    _check_survivors(ranks, survivors)
    for survivor in survivors:
        assert f"rank {victim} is gone" in _headline(ranks[survivor])
        assert "#3 all_reduce 1.0 kB" in _row(ranks[survivor], victim)
        # The wait has its own exception, if it comes first.
        assert ranks[survivor].code == (1 if "Traceback" in ranks[survivor].text else doctor.EXIT_CODE)


def _meets_another_size(rank, world):
    _steps(rank)
    comm.all_reduce(torch.ones(100 if rank == 0 else 200))


def test_a_rank_that_gloo_aborts():
    """gloo ends a process that receives more than it expects; the others name what it was doing."""
    ranks = run_scripts(_meets_another_size, 2, **SOON)
    assert ranks[0].code == -signal.SIGABRT
    _check_survivors(ranks, [1])
    assert "#4 all_reduce 400 B" in _row(ranks[1], 0) and "#4 all_reduce 800 B" in _row(ranks[1], 1)


def _unmarked(rank, world):
    _steps(rank)
    if rank == 1:
        dist.all_reduce(torch.ones(1))
    else:
        dist.recv(torch.ones(7), src=1)


def test_calls_of_torch_distributed_that_nobody_marked():
    ranks = run_scripts(_unmarked, 2, **SOON)
    _check_survivors(ranks, [0, 1])
    for ended in ranks:
        assert "in recv" in _row(ended, 0) and "in all_reduce" in _row(ended, 1)


SCRIPT = """
import sys, torch, deepspeed.comm as comm
from deepspeed.comm import doctor
comm.init_distributed()
doctor.start()
comm.all_reduce(torch.ones(3))
if comm.get_rank() == 1:
    raise KeyError("no such batch")
comm.barrier()
print("went on")
"""


def test_scripts_end_with_codes_and_tracebacks(tmp_path):
    """Two real interpreters: their own excepthook, exit and output."""
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {**os.environ, **SOON, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "PYTHONPATH": ROOT, "WORLD_SIZE": "2"}
    env["MASTER_PORT"] = str(_free_port())
    started = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py")],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    texts = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [doctor.EXIT_CODE, 1], texts
    assert "rank 1 raised KeyError: 'no such batch'; rank 0 waits for it" in texts[0][1]
    assert "hang doctor" not in texts[1][1] and "KeyError: 'no such batch'" in texts[1][1]
    assert all("terminate" not in err for _, err in texts), texts


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# -- no divergence -----------------------------------------------------------------------------------------------------


def _slow(rank, world):
    _steps(rank)
    if rank == 1:
        time.sleep(3.5 * TIMEOUT_S)
    total = torch.full((3,), rank + 1.0)
    comm.all_reduce(total)
    assert total.tolist() == [6.0] * 3
    _steps(rank)
    print("all is well")


def test_a_slow_rank_is_named_and_not_ended():
    ranks = run_scripts(_slow, 3, **SOON)
    assert [r.code for r in ranks] == [0, 0, 0], ranks
    assert all("all is well" in r.text for r in ranks)
    said = ranks[1].text.split("hang doctor: ")[1:]
    assert len(said) == 2, ranks[1].text  # after one timeout and after two; four would have been too late
    assert "other ranks wait for rank 1" in said[0] and "time.sleep(3.5 * TIMEOUT_S)" in said[0]
    assert (
        "ranks 0, 2 wait for rank 1, busy with something else" in ranks[0].text and "hang doctor" not in ranks[2].text
    )
    assert all("CRITICAL" not in r.text for r in ranks)


def _catches(rank, world):
    _steps(rank)
    try:
        if rank == 1:
            raise ValueError("a bad sample")
    except ValueError:
        time.sleep(0.3)
    _steps(rank)


def test_an_exception_that_the_program_handles_is_no_divergence():
    ranks = run_scripts(_catches, 2, **SOON)
    assert [r.code for r in ranks] == [0, 0] and all("hang doctor" not in r.text for r in ranks), ranks


class _CountingStore:
    """The store as the board uses it, with the names of the calls."""

    def __init__(self, store):
        self._store, self.calls = store, []

    def __getattr__(self, name):
        def call(*args):
            self.calls.append(name)
            return getattr(self._store, name)(*args)

        return call


def _traffic(rank, world):
    assert doctor.start(timeout_s=1.0)
    while _process.doctor._unmet:
        time.sleep(0.01)
    used = _process.doctor._board
    used._store = store = _CountingStore(used._store)
    start = time.monotonic()
    for _ in range(60):
        comm.all_reduce(torch.ones(10))
        time.sleep(0.02)
    looks = (time.monotonic() - start) / 0.1 + 1
    calls = list(store.calls)
    doctor.stop()
    return set(calls), len(calls) <= looks, len(calls) >= 3


def test_normal_running_costs_one_check_a_look():
    """A look is a tenth of the timeout here, and never more often than once a second at the default."""
    assert run_ranks(_traffic, 2) == [({"check"}, True, True)] * 2


def _lives(rank, world):
    before = (threading.active_count(), len(os.listdir("/proc/self/fd")), sys.excepthook)
    assert doctor.start(timeout_s=5.0) and doctor.start() and doctor.is_running()
    comm.all_reduce(torch.ones(3))
    during = threading.active_count()
    doctor.stop()
    assert doctor.is_running()  # the other start's
    doctor.stop()
    time.sleep(0.05)
    after = (threading.active_count(), len(os.listdir("/proc/self/fd")), sys.excepthook)
    assert not doctor.is_running() and not doctor.now.on and doctor.now.page is None
    assert doctor.start(timeout_s=5.0)
    child = os.fork()
    if child == 0:
        os._exit(int(doctor.is_running() or doctor.now.on))
    forked = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    comm.barrier()
    comm.destroy_process_group()
    return before == after, during - before[0], forked, doctor.is_running()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts file descriptors")
def test_stop_leaves_nothing_behind_and_forks_have_no_doctor():
    assert run_ranks(_lives, 2) == [(True, 1, 0, False)] * 2


def _off(rank, world):
    assert not doctor.start(timeout_s=0)
    os.environ["DS_HANG_TIMEOUT_S"] = "0"
    assert not doctor.start()
    os.environ["DS_HANG_TIMEOUT_S"] = "soon"
    with pytest.raises(ConfigError, match="DS_HANG_TIMEOUT_S='soon'"):
        doctor.start()
    with pytest.raises(ConfigError, match=r"timeout_s=-1\.0"):
        doctor.start(timeout_s=-1.0)
    doctor.stop()
    del os.environ["DS_HANG_TIMEOUT_S"]
    doctor.open_board = lambda: 1 / 0
    assert not doctor.start() and not doctor.is_running()  # what goes wrong here must not stop the training
    return threading.active_count()


def test_off_by_zero_and_alone():
    assert run_ranks(_off, 2)[0] == run_ranks(_off, 1)[0]


def _older_torch(rank, world):
    """Without Store.clone the connection is made by hand."""
    own = dist.distributed_c10d._get_default_store()
    base = own
    while getattr(base, "underlying_store", None) is not None:
        base = base.underlying_store
    other = board.second_client(object(), base)
    assert other is not base and type(other) is type(base)
    other.set(f"hello{rank}", "there")
    comm.barrier()
    seen = [other.get(f"hello{r}") for r in range(world)]
    comm.barrier()  # the store may go with rank 0
    return seen


@pytest.mark.parametrize("store", ["file", "tcp"])
def test_second_connection_without_clone(store):
    if store == "file":
        assert run_ranks(_older_torch, 2) == [[b"there", b"there"]] * 2
    else:
        ranks = run_scripts(_older_torch, 2, store="tcp")
        assert [r.code for r in ranks] == [0, 0], ranks


class _Event:
    """A device's event that is never reached."""

    def record(self):
        pass

    def query(self):
        return False


def _on_the_device(rank, world):
    evidence.make_device_mark = lambda: evidence.DeviceMark(_Event())
    _steps(rank)
    with doctor.collective("reduce_scatter" if rank else "all_gather", 4):
        pass  # as NCCL's operations: the host goes on, and stops where it needs the result
    time.sleep(1.5 * TIMEOUT_S)


def test_a_hang_on_the_device_is_told_and_left_to_others():
    ranks = run_scripts(_on_the_device, 2, **SOON)
    assert [r.code for r in ranks] == [0, 0]
    assert "not for the same, and a device has not finished its operation" in _headline(ranks[0])
    assert "in all_gather on the device" in _row(ranks[0], 0)
    assert "in reduce_scatter on the device" in _row(ranks[0], 1)


def _bytes(rank, world):
    before = evidence.tcp_nbytes()
    comm.all_reduce(torch.ones(1 << 18))
    comm.barrier()
    return evidence.tcp_nbytes() - before


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's counters")
def test_bytes_on_the_wire_are_seen():
    assert all(moved > 1 << 20 for moved in run_ranks(_bytes, 2))
