"""The launcher with real processes. Scripts do not import torch, and the launcher is forked, so each test is short."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepspeed.launcher import launch, runner, supervise
from tests.helpers.launcher import SLEEPER, TIMEOUT_S, Launcher, gone, wait_gone


@pytest.fixture
def ds(tmp_path):
    launcher = Launcher(tmp_path)
    yield launcher
    launcher.end()


SHOW = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "EXTRA")
print(json.dumps([{n: os.environ.get(n) for n in names}, sys.argv[1:], __name__, sorted(os.sched_getaffinity(0))]))
"""


def test_ranks_get_their_place_and_arguments(ds):
    (ds.folder / ".deepspeed_env").write_text("EXTRA=from file\n")
    assert ds.run("--num_gpus", "2", ds.script("show.py", SHOW), "--lr", "1") == 0
    shown = [json.loads(line) for line in ds.printed]
    assert [entry[1] for entry in shown] == [["--local_rank=0", "--lr", "1"], ["--local_rank=1", "--lr", "1"]]
    assert shown[1][0] == {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
        "CROSS_RANK": "0",
        "CROSS_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "EXTRA": "from file",
    }
    assert "starting 2 rank(s) of 2 on CPU" in ds.said


def test_module_without_local_rank_and_quiet(ds):
    (ds.folder / "pkg").mkdir()
    ds.script("pkg/show.py", SHOW)
    assert ds.run("-q", "--module", "--no_local_rank", "pkg.show", "a") == 0
    assert json.loads(ds.printed[0])[1:3] == [["a"], "__main__"]
    assert ds.said == ""


def test_program_without_the_interpreter(ds):
    program = ds.script("tool.sh", '#!/bin/sh\necho "$RANK of $WORLD_SIZE: $*"\n')
    os.chmod(program, 0o755)
    assert ds.run("--num_gpus", "2", "--no_python", "--no_local_rank", program, "x", "y") == 0
    assert ds.printed == ["0 of 2: x y", "1 of 2: x y"]


def test_node_part_starts_its_own_ranks_only(ds):
    world = "eyJhIjogWzAsIDFdLCAiYiI6IFswLCAyXX0="  # {"a": [0, 1], "b": [0, 2]}
    show = ds.script("show.py", SHOW)
    args = ("--world_info", world, "--node_rank", "1", "--master_addr", "a", "--master_port", "4", show)
    assert ds.run(*args, main=launch.main) == 0
    shown = [json.loads(line)[0] for line in ds.printed]
    assert [(e["RANK"], e["LOCAL_RANK"], e["WORLD_SIZE"], e["MASTER_ADDR"]) for e in shown] == [
        ("2", "0", "4", "a"),
        ("3", "1", "4", "a"),
    ]
    assert ds.run("--world_info", world, "--node_rank", "2", show, main=launch.main) == 2
    assert "--node_rank 2 is outside --world_info" in ds.said


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_ranks_are_bound_to_cores_of_their_own(ds):
    assert ds.run("--num_gpus", "2", "--bind_cores_to_rank", ds.script("show.py", SHOW)) == 0
    first, second = (set(json.loads(line)[3]) for line in ds.printed)
    assert first and second and not first & second


FAILING = (
    SLEEPER
    + """
ready()
if os.environ["RANK"] == "1":
    while not os.path.exists("up0"):
        time.sleep(0.005)
    def deep():
        raise RuntimeError("the reason")
    try:
        deep()
    except RuntimeError:
        import traceback
        traceback.print_exc()
        raise SystemExit(7)
time.sleep(600)
"""
)


def test_failing_rank_ends_the_job_with_its_code_and_traceback(ds):
    started = time.monotonic()
    assert ds.run("--num_gpus", "3", ds.script("fail.py", FAILING)) == 7
    assert time.monotonic() - started < TIMEOUT_S / 2  # not the sleepers' 600 s
    assert "RuntimeError: the reason" in ds.said and "in deep" in ds.said
    lines = [line for line in ds.said.splitlines() if "exited with" in line]
    assert len(lines) == 1 and "rank 1 (pid " in lines[0] and "code 7; stopping the other 2" in lines[0]
    wait_gone(int(path.read_text()) for path in ds.until("up*", 2))


def test_rank_that_was_killed(ds):
    script = ds.script("die.py", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert ds.run(script) == 128 + signal.SIGKILL
    assert "rank 0" in ds.said and "killed by SIGKILL (the system does that when memory runs out)" in ds.said


def test_rank_that_ignores_sigterm_is_killed(ds, monkeypatch):
    monkeypatch.setitem(supervise.LADDERS, "failure", ((0, signal.SIGTERM), (0.2, signal.SIGKILL)))
    stubborn = FAILING.replace("ready()\nif", "import signal; signal.signal(15, signal.SIG_IGN)\nready()\nif")
    assert ds.run("--num_gpus", "2", ds.script("fail.py", stubborn)) == 7
    assert "rank(s) 0 did not end; sending SIGKILL" in ds.said
    wait_gone([int((ds.folder / "up0").read_text())])


def test_what_a_failed_or_stopped_rank_started_ends_too(ds):
    text = (
        SLEEPER
        + """
import subprocess
child = subprocess.Popen(["sleep", "600"])
with open(f"child{os.environ['RANK']}", "w") as file:
    file.write(str(child.pid))
ready()
while not (os.path.exists("up0") and os.path.exists("up1")):
    time.sleep(0.005)
if os.environ["RANK"] == "1":
    os._exit(3)
time.sleep(600)
"""
    )
    assert ds.run("--num_gpus", "2", ds.script("parent.py", text)) == 3
    wait_gone(int(path.read_text()) for path in ds.until("child*", 2))


HANDLING = (
    SLEEPER
    + """
import signal, sys
def handle(number, frame):
    ready(f"-got{number}-")
    sys.exit(int(os.environ.get("END", "0")))
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, handle)
ready()
time.sleep(600)
"""
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("end", [0, 1])
def test_signals_reach_every_rank(ds, number, end):
    pid = ds.start("--num_gpus", "2", ds.script("handle.py", HANDLING), environment={"END": str(end)})
    ranks = [int(path.read_text()) for path in ds.until("up[01]", 2)]
    os.kill(pid, number)
    assert ds.wait(pid) == (128 + number if end else 0)
    assert len(list(ds.folder.glob(f"up-got{number}-[01]"))) == 2
    assert f"got {number.name}; passing it on to 2 rank(s)" in ds.said
    wait_gone(ranks)


def test_second_signal_does_not_wait(ds):
    deaf = SLEEPER + "import signal\nfor n in (2, 15): signal.signal(n, lambda *_: ready('-got'))\nready()\n"
    deaf += "while True: time.sleep(600)\n"
    pid = ds.start(ds.script("deaf.py", deaf))
    rank = int(ds.until("up0", 1)[0].read_text())
    os.kill(pid, signal.SIGTERM)
    ds.until("up-got0", 1)
    assert not gone(rank)
    os.kill(pid, signal.SIGTERM)
    assert ds.wait(pid) == 128 + signal.SIGTERM
    assert gone(rank) and "not waiting any longer" in ds.said


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_no_rank_outlives_a_killed_launcher(ds):
    pid = ds.start("--num_gpus", "2", ds.script("sleep.py", SLEEPER + "ready()\ntime.sleep(600)\n"))
    ranks = [int(path.read_text()) for path in ds.until("up*", 2)]
    os.kill(pid, signal.SIGKILL)
    assert ds.wait(pid) == -signal.SIGKILL
    wait_gone(ranks)


def test_program_that_cannot_start_leaves_nothing_behind(ds):
    program = ds.script("tool", "not a program\n")
    os.chmod(program, 0o755)
    assert ds.run("--num_gpus", "2", "--no_python", program) == 2
    assert "Exec format error" in ds.said and ds.said.count("deepspeed: error") == 1


def test_log_of_each_rank(ds):
    assert ds.run("--num_gpus", "2", "--enable_each_rank_log", "logs/deep", ds.script("fail.py", FAILING)) == 7
    logs = ds.until("logs/deep/*_rank?.log", 2)
    assert "RuntimeError: the reason" in logs[1].read_text()
    assert ds.printed == [] and f"end of logs/deep/{logs[1].name}" in ds.said and "the reason" in ds.said


def test_pids_are_noted_while_ranks_run(ds, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(ds.folder))
    pid = ds.start("--num_gpus", "2", "--save_pid", ds.script("sleep.py", SLEEPER + "ready()\ntime.sleep(600)\n"))
    ranks = [path.read_text() for path in ds.until("up*", 2)]
    assert ds.until(f"{pid}.ds", 1)[0].read_text() == ",".join(ranks)
    os.kill(pid, signal.SIGTERM)
    assert ds.wait(pid) == 128 + signal.SIGTERM
    assert not list(ds.folder.glob("*.ds"))


def test_port_in_use_is_replaced_and_said(ds, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(runner, "DEFAULT_PORT", port)
        script = ds.script("port.py", "import os\nprint(os.environ['MASTER_PORT'])\n")
        assert ds.run(script) == 0
        assert ds.printed != [str(port)]
        assert f"port {port} is in use; taking {ds.printed[0]}" in ds.said
        assert ds.run("--master_port", str(port), script) == 0
        assert ds.printed == [str(port)] and f"--master_port {port} is in use" in ds.said


def test_lone_rank_can_read_the_terminal(ds):
    script = ds.script("ask.py", "print('said', input('ready? '))\n")
    pid, terminal = pty.fork()
    if pid == 0:
        code = 99
        with contextlib.suppress(BaseException):
            os.environ["HOME"] = str(ds.folder)
            code = runner.main(["-q", script])
        os._exit(code)
    seen = b""
    with contextlib.suppress(OSError):  # the end of a terminal is EIO
        while chunk := os.read(terminal, 1024):
            seen += chunk
            if seen.endswith(b"ready? "):
                os.write(terminal, b"yes\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert b"said yes" in seen
    os.close(terminal)


TRAIN = """
import os, sys, torch
import deepspeed.comm as dist
dist.init_distributed()
total = torch.tensor([float(os.environ["LOCAL_RANK"]) + 1])
dist.all_reduce(total)
line = f"{dist.get_rank()} {dist.get_world_size()} {dist.get_local_rank()} {total.item()} {sys.argv[1:]}\\n"
os.write(1, line.encode())
"""


@pytest.mark.slow
def test_torchrun_and_the_command_give_the_same_job(ds):
    script = ds.script("train.py", TRAIN)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    commands = [
        ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--no_local_rank", script, "x"],
        ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", script, "x"],
    ]
    outputs = [
        subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ds.folder, timeout=90
        )
        for command in commands
    ]
    assert [done.returncode for done in outputs] == [0, 0], [done.stderr for done in outputs]
    ours, theirs = (sorted(done.stdout.splitlines()) for done in outputs)
    assert ours == theirs == ["0 2 0 3.0 ['x']", "1 2 1 3.0 ['x']"]


LEAVING = """
import os, sys, torch
import deepspeed.comm as dist
dist.init_distributed()
dist.all_reduce(torch.ones(1))
if dist.get_rank() == 1:
    sys.exit(7)
dist.all_reduce(torch.ones(1))
"""


@pytest.mark.slow
def test_code_is_that_of_the_rank_that_left_and_not_of_its_peers(ds):
    """A rank's connections stay open until it is gone, so its peers, which fail for their loss, fail later."""
    root = str(Path(__file__).parents[2])
    assert ds.run("--num_gpus", "2", ds.script("leave.py", LEAVING), environment={"PYTHONPATH": root}) == 7
    assert "rank 1 (pid " in ds.said and "exited with code 7; stopping the other 1" in ds.said
