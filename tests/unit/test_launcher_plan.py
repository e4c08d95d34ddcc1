"""Command lines, environments and cores of ranks, with no process started."""

from __future__ import annotations

import sys

import pytest

from deepspeed.errors import ConfigError
from deepspeed.launcher.plan import NodeJob, parse_core_list, parse_environment_file, plan_ranks

TWO = NodeJob(script="train.py", script_args=["--x", "1"], slots_by_node=[[0, 1]], cores=range(4))


def _job(**changes):
    return NodeJob(**{**TWO.__dict__, **changes})


def test_environment_of_each_rank():
    plans = plan_ranks(_job(master_port=5), {"HOME": "/h", "RANK": "77"})
    assert [(p.rank, p.local_rank) for p in plans] == [(0, 0), (1, 1)]
    assert plans[1].environment == {
        "HOME": "/h",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "CROSS_RANK": "0",
        "CROSS_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "5",
        "OMP_NUM_THREADS": "2",
    }
    assert plans[1].cores is None


def test_second_node_counts_on_from_the_first():
    plans = plan_ranks(_job(slots_by_node=[[0, 1, 2], [4, 5]], node_rank=1, master_addr="n0"), {})
    assert [(p.rank, p.local_rank) for p in plans] == [(3, 0), (4, 1)]
    environment = plans[0].environment
    assert {name: environment[name] for name in ("WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")} == {
        "WORLD_SIZE": "5",
        "LOCAL_SIZE": "2",
        "CROSS_RANK": "1",
        "CROSS_SIZE": "2",
    }


@pytest.mark.parametrize(
    ("flags", "argv"),
    [
        ({}, [sys.executable, "-u", "train.py", "--local_rank=1", "--x", "1"]),
        ({"module": True}, [sys.executable, "-u", "-m", "train.py", "--local_rank=1", "--x", "1"]),
        ({"no_python": True}, ["train.py", "--local_rank=1", "--x", "1"]),
        ({"no_local_rank": True}, [sys.executable, "-u", "train.py", "--x", "1"]),
    ],
)
def test_command(flags, argv):
    assert plan_ranks(_job(**flags), {})[1].argv == argv


@pytest.mark.parametrize(
    ("slots", "inherited", "visible"),
    [([0, 2], None, "0,2"), ([0, 2], "", "0,2"), ([1], "5,7", "7"), ([0, 1], "GPU-a, GPU-b", "GPU-a,GPU-b")],
)
def test_devices(slots, inherited, visible):
    environment = {} if inherited is None else {"CUDA_VISIBLE_DEVICES": inherited}
    plans = plan_ranks(_job(slots_by_node=[slots], cuda=True), environment)
    assert {p.environment["CUDA_VISIBLE_DEVICES"] for p in plans} == {visible}
    assert "OMP_NUM_THREADS" not in plans[0].environment


def test_device_outside_the_visible_ones():
    with pytest.raises(ConfigError, match="device 2 was asked for, but CUDA_VISIBLE_DEVICES=5,7 shows 2"):
        plan_ranks(_job(slots_by_node=[[2]], cuda=True), {"CUDA_VISIBLE_DEVICES": "5,7"})


def test_threads_on_cpu():
    assert plan_ranks(_job(cores=range(1)), {})[0].environment["OMP_NUM_THREADS"] == "1"
    assert plan_ranks(TWO, {"OMP_NUM_THREADS": "8"})[0].environment["OMP_NUM_THREADS"] == "8"
    assert "OMP_NUM_THREADS" not in plan_ranks(_job(slots_by_node=[[0]]), {})[0].environment


def test_binding():
    plans = plan_ranks(_job(bind_cores=True, cores=[1, 3, 4, 5, 7]), {"OMP_NUM_THREADS": "8"})
    assert [p.cores for p in plans] == [[1, 3], [4, 5]]
    assert plans[0].environment["OMP_NUM_THREADS"] == "2"
    assert plans[0].environment["KMP_AFFINITY"] == "disabled"
    with pytest.raises(ConfigError, match="2 ranks on this host, but only 1 core"):
        plan_ranks(_job(bind_cores=True, cores=[0]), {})


def test_core_list():
    assert parse_core_list("1,3-5,7") == [1, 3, 4, 5, 7]
    for text in ("", "a", "1-", "-1", "5-3", "1,,2", "1-2-3"):
        with pytest.raises(ConfigError, match="--bind_core_list"):
            parse_core_list(text)
    with pytest.raises(ConfigError, match="twice"):
        parse_core_list("1,0-2")


def test_environment_file():
    lines = ["# comment", "", "A=1", "B=x=y z", "A=2", "C="]
    assert parse_environment_file(lines, "f") == {"A": "2", "B": "x=y z", "C": ""}
    for line in ("A", "=1", "export A=1"):
        with pytest.raises(ConfigError, match=r"f:2: expected VAR=VAL"):
            parse_environment_file(["OK=1", line], "f")


def test_variables_of_the_file_reach_ranks_but_cannot_misplace_them():
    plan = plan_ranks(_job(extra_environment={"A": "file", "RANK": "9"}), {"A": "shell"})[0]
    assert (plan.environment["A"], plan.environment["RANK"]) == ("file", "0")
