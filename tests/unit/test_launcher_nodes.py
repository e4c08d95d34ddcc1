"""What nodes say, where ranks find themselves, and Slurm's lists of hosts; no process is started."""

from __future__ import annotations

import io
import json
import os
import signal
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed._core.slurm import expand_nodelist
from deepspeed.comm.rendezvous import resolve_rendezvous
from deepspeed.errors import ConfigError
from deepspeed.launcher import launcher_helper, supervise
from deepspeed.launcher.launcher_helper import find_place, in_slurm_order
from deepspeed.launcher.nodes import Relay
from deepspeed.launcher.plan import NodeJob, parse_environment_file, plan_elastic_agent
from deepspeed.launcher.resources import decode_world_info, encode_world_info, parse_hostfile
from deepspeed.launcher.supervise import ANNOUNCEMENT, Ladder, SignalInbox

POOL = {"a": [0, 1], "b": [4]}


# -- output ------------------------------------------------------------------------------------------------------------
def _relay(prefix, *chunks):
    target = io.BytesIO()
    relay = Relay(target, prefix)
    news = [item for chunk in (*chunks, b"") for item in relay.feed(chunk)]
    return target.getvalue(), news


def test_lines_are_prefixed_and_whole():
    said, news = _relay("w1: ", b"one\ntw", b"o\n10%\r", b"20%\rend")
    assert said == b"w1: one\nw1: two\nw1: 10%\rw1: 20%\rw1: end" and news == []


def test_lines_are_passed_on_as_they_end():
    target = io.BytesIO()
    relay = Relay(target, "")
    relay.feed(b"10%\rloss")
    assert target.getvalue() == b"10%\r"


NEWS = {"who": "rank 3", "code": 7, "how": "exited with code 7"}


@pytest.mark.parametrize(("label", "host"), [("", ""), ("w1: ", "w1")])
def test_announcements_are_kept(label, host):
    line = f"{label}{ANNOUNCEMENT}{json.dumps(NEWS)}\n".encode()
    said, news = _relay("", b"before\n" + line[:20], line[20:], b"after\n")
    assert said == b"before\nafter\n" and news == [{"host": host, **NEWS}]


def test_damaged_announcement_is_shown():
    said, news = _relay("", f"{ANNOUNCEMENT}{{\n".encode())
    assert said == f"{ANNOUNCEMENT}{{\n".encode() and news == []


@pytest.mark.parametrize(
    ("line", "who", "code"),
    [
        ("pdsh@head: w1: ssh exited with exit code 255\n", "lost or never reached: ssh", 255),
        ("pdsh@head: w1: ssh killed by signal 9\n", "lost or never reached: ssh", 137),
        ("pdsh@head: w1: ssh exited with exit code 2\n", "ssh", 2),
    ],
)
def test_what_pdsh_says_of_a_host(line, who, code):
    said, ((news),) = _relay("", line.encode())
    assert (news["host"], news["who"], news["code"]) == ("w1", who, code) and said == line.encode()


# -- signals -----------------------------------------------------------------------------------------------------------
def test_leash_carries_names_of_signals_and_its_end():
    read, write = os.pipe()
    with SignalInbox(read) as inbox:
        os.write(write, b"SIGTERM\nSIGKILL\nrubbish\nSIG")
        assert inbox.wait(5) == ["SIGTERM"]  # SIGKILL is not to be passed on by name
        os.write(write, b"INT\n")
        assert inbox.wait(5) == ["SIGINT"]
        os.close(write)
        assert inbox.wait(5) == ["the end of the launching side"]
        assert inbox.wait(0) == []  # said once
    os.close(read)


def test_ladder(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(supervise.time, "monotonic", lambda: now[0])
    ladder = Ladder()
    assert ladder.seconds_to_next_rung() is None and ladder.climb() is None
    ladder.begin("killed")
    assert ladder.seconds_to_next_rung() == 3 and not ladder.sent
    now[0] += 4
    assert ladder.seconds_to_next_rung() == 0
    assert ladder.climb() == (signal.SIGTERM, True) and ladder.sent
    assert ladder.seconds_to_next_rung() == 4
    assert ladder.climb() == (signal.SIGKILL, True)
    assert ladder.seconds_to_next_rung() is None and ladder.climb() is None
    ladder.begin("failure")
    assert ladder.climb() == (signal.SIGTERM, False)


# -- places ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("launcher", "names"),
    [
        ("openmpi", ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")),
        ("mpich", ("PMI_RANK", "MPI_LOCALRANKID")),
        ("impi", ("PMI_RANK", "MPI_LOCALRANKID")),
        ("mvapich", ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK")),
        ("mvapich", ("PMI_RANK", "MPI_LOCALRANKID")),
        ("slurm", ("SLURM_PROCID", "SLURM_LOCALID")),
    ],
)
def test_ranks_fill_hosts_in_order(launcher, names):
    def place(*values):
        return find_place(launcher, POOL, dict(zip(names, values, strict=False)))

    assert [place("0", "0"), place("1", "1"), place("2", "0")] == [(0, 0), (0, 1), (1, 0)]
    assert place("1") == (0, 1)  # not all tell the local rank
    with pytest.raises(ConfigError, match=f"{launcher} placed rank 1 as number 0 on its host, but as number 1 on a"):
        place("1", "0")
    with pytest.raises(ConfigError, match=f"{names[0]}=3, but the job has 3 rank"):
        place("3", "0")
    with pytest.raises(ConfigError, match="is not set, so something else has started this process"):
        place()


def test_slurm_orders_hosts_its_own_way():
    assert list(in_slurm_order(POOL, {"SLURM_STEP_NODELIST": "b,a"})) == ["b", "a"]
    assert in_slurm_order(POOL, {}) == POOL
    with pytest.raises(ConfigError, match="runs this step on a, c, but a, b was asked for"):
        in_slurm_order(POOL, {"SLURM_JOB_NODELIST": "a,c"})


def test_helper_becomes_the_rank(monkeypatch, tmp_path):
    become = []
    monkeypatch.setattr(launcher_helper.os, "execvpe", lambda *args: become.append(args))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name, value in {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "b,a"}.items():
        monkeypatch.setenv(name, value)
    script = tmp_path / "train.py"
    script.touch()
    flags = ["--launcher", "slurm", "--world_info", encode_world_info(POOL), "--no_local_rank", str(script), "x"]
    launcher_helper.main(flags)
    ((program, argv, environment),) = become
    assert (program, argv) == (sys.executable, [sys.executable, "-u", str(script), "x"])
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [environment[name] for name in names] == ["0", "0", "3", "1", "0", "b", "29500"]


def test_helper_says_what_is_wrong(monkeypatch, capsys):
    monkeypatch.delenv("PMI_RANK", raising=False)
    assert launcher_helper.main(["--world_info", encode_world_info(POOL), "train.py"]) == 2
    assert "--launcher mpich: PMI_RANK is not set" in capsys.readouterr().err


# -- Slurm's lists of hosts --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n1,m-2.x", ["n1", "m-2.x"]),
        ("gpu[08-10,2],login", ["gpu08", "gpu09", "gpu10", "gpu2", "login"]),
        ("r[1-2]n[1,3]-ib", ["r1n1-ib", "r1n3-ib", "r2n1-ib", "r2n3-ib"]),
    ],
)
def test_nodelist(text, hosts):
    assert expand_nodelist(text) == hosts


@pytest.mark.parametrize("text", ["", ",", "n[1", "n1]", "n[a-b]", "n[]", "n[1-]"])
def test_bad_nodelist(text):
    with pytest.raises(ConfigError):
        expand_nodelist(text)


STEP = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}


def test_ranks_under_srun_meet_on_the_first_host_of_the_step():
    step = {**STEP, "SLURM_JOB_NODELIST": "gpu[1-4]", "SLURM_STEP_NODELIST": "gpu[03-04]"}
    place = resolve_rendezvous(step)
    assert (place.rank, place.world_size, place.local_rank) == (1, 2, 0)
    assert place.environment["MASTER_ADDR"] == "gpu03" and not place.on_this_host_only
    assert resolve_rendezvous({**step, "MASTER_ADDR": "m"}).environment["MASTER_ADDR"] == "m"
    one = resolve_rendezvous({**STEP, "SLURM_STEP_NODELIST": "gpu03"})
    assert one.environment["MASTER_ADDR"] == "127.0.0.1" and one.on_this_host_only
    with pytest.raises(ConfigError, match=r"from SLURM_PROCID.*MASTER_ADDR is missing"):
        resolve_rendezvous(STEP)


# -- files and texts ---------------------------------------------------------------------------------------------------
def test_quotes_around_a_value_go_and_nothing_else_happens():
    lines = ["A='x y'", 'B="it\'s"', "C='x", 'D="a" "b"', "E=$HOME\\n", "F=''", "G='", "A=last"]
    assert parse_environment_file(lines, "f") == {
        "A": "last",
        "B": "it's",
        "C": "'x",
        "D": 'a" "b',
        "E": "$HOME\\n",
        "F": "",
        "G": "'",
    }


@given(st.dictionaries(st.text(min_size=1), st.lists(st.integers(0, 9), min_size=1, unique=True), min_size=1))
def test_world_info_round_trip(pool):
    text = encode_world_info(pool)
    assert decode_world_info(text) == pool and list(decode_world_info(text)) == list(pool)
    assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_=")


def test_host_that_would_be_an_option():
    with pytest.raises(ConfigError, match="hosts:2: a host name cannot begin with '-', got '-oProxyCommand=x'"):
        parse_hostfile(["# x", "-oProxyCommand=x slots=1"], "hosts")


def test_elastic_agent():
    job = NodeJob("train.py", ["-x"], [[0, 1], [0]], node_rank=1, master_addr="m", master_port=5, cores=range(4))
    plan = plan_elastic_agent(job, {"RANK": "3", "HOME": "/h"}, "10.0.0.2", 1, 2)
    assert plan.argv == [
        *(sys.executable, "-u", "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc_per_node=1"),
        *("--rdzv_backend=c10d", "--rdzv_endpoint=m:5", "--rdzv_id=deepspeed-5"),
        *("--rdzv_conf=is_host=false,last_call_timeout=5", "--local_addr=10.0.0.2", "--max_restarts=100"),
        *("train.py", "--local_rank=${local_rank}", "-x"),
    ]
    assert plan.environment == {"HOME": "/h", "OMP_NUM_THREADS": "4"}
    assert plan.label == "elastic agent of node 1"
