"""The commands that reach other hosts, compared word by word; nothing is started."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed.errors import ConfigError
from deepspeed.launcher import backends, ds_ssh, runner
from deepspeed.launcher.arguments import parse_helper, parse_node, parse_runner
from deepspeed.launcher.backends import choose_backend
from deepspeed.launcher.cluster import ClusterJob, exported_variables
from deepspeed.launcher.resources import decode_world_info

JOB = ClusterJob(
    pool={"w0": [0, 1], "w1": [0, 1]},
    script="train.py",
    script_args=["--name", "a b"],
    master_addr="10.0.0.1",
    master_port=29500,
    folder="/home/me/my job",
    python="/venv/bin/python",
    exports={"NCCL_DEBUG": "INFO", "NOTE": "it's 5%"},
)
WORLD = "--world_info=eyJ3MCI6IFswLCAxXSwgIncxIjogWzAsIDFdfQ=="
TO_ALL = [WORLD, "--master_addr=10.0.0.1", "--master_port=29500"]
NODE = ["/venv/bin/python", "-u", "-m", "deepspeed.launcher.launch", *TO_ALL]
RANK = ["/venv/bin/python", "-u", "-m", "deepspeed.launcher.launcher_helper", *TO_ALL]
SCRIPT = ["train.py", "--name", "a b"]
SSH_OPTIONS = ["-o", "BatchMode=yes", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"]


def _job(**changes):
    return dataclasses.replace(JOB, **changes)


def _has(*programs):
    return lambda name: f"/usr/bin/{name}" if name in programs else None


@pytest.fixture
def mpi(monkeypatch):
    """What ``mpirun --version`` says."""
    said = {"text": ""}

    def run(command, **kwargs):
        assert command == ["mpirun", "--version"]
        return subprocess.CompletedProcess(command, 0, said["text"], "")

    monkeypatch.setattr(backends.subprocess, "run", run)
    return said


def _commands(name, job=JOB):
    return backends._BACKENDS[name]().commands(job)


# -- ssh and pdsh ------------------------------------------------------------------------------------------------------
def test_ssh():
    first, second = _commands("ssh", _job(ssh_port=2222, launcher_args=["-i", "my key"]))
    line = "cd '/home/me/my job' && exec env NCCL_DEBUG=INFO 'NOTE=it'\"'\"'s 5%' " + shlex.join(
        [*NODE, "--node_rank=1", "--leashed", *SCRIPT]
    )
    assert second.argv == ["ssh", *SSH_OPTIONS, "-p", "2222", "-i", "my key", "--", "w1", line]
    assert (second.label, second.prefix, second.leashed, second.nodes, second.environment) == (
        "node w1",
        "w1: ",
        True,
        1,
        {},
    )
    assert "--node_rank=0" in first.argv[-1] and first.argv[-2] == "w0"


def test_pdsh():
    (command,) = _commands("pdsh", _job(script_args=["100%", "%n"], exports={}))
    line = "cd '/home/me/my job' && exec " + shlex.join(
        [*NODE, "--node_rank=%n", "--leashed", "train.py", "100%%", "%%n"]
    )
    assert command.argv == ["pdsh", "-S", "-b", "-f", "1024", "-w", "w0,w1", line]
    assert command.environment == {"PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": " ".join(SSH_OPTIONS)}
    assert (command.label, command.prefix, command.leashed, command.nodes) == ("pdsh", "", False, 2)
    assert "-p 7" in _commands("pdsh", _job(ssh_port=7))[0].environment["PDSH_SSH_ARGS_APPEND"]


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"))),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
)
def test_a_shell_reads_back_every_word(words, value):
    job = _job(script_args=words, exports={"A": value}, folder=f"/{value}")
    cd, folder, et, execute, env, variable, *command = shlex.split(job.remote_line("1"))
    assert (cd, folder, et, execute, env, variable) == ("cd", f"/{value}", "&&", "exec", "env", f"A={value}")
    assert command == job.node_command("1")
    assert parse_node(command[4:]).user_args == words


def test_activation_script_comes_after_the_variables_and_chooses_the_interpreter():
    job = _job(venv_script="/v/bin/activate me")
    words = shlex.split(job.remote_line("0"))
    assert words[4:12] == [
        "env",
        "NCCL_DEBUG=INFO",
        "NOTE=it's 5%",
        "bash",
        "-c",
        '. "$0" && exec "$@"',
        "/v/bin/activate me",
        "python",
    ]
    assert job.rank_command("slurm", "")[:5] == ["bash", "-c", '. "$0" && exec "$@"', "/v/bin/activate me", "python"]


def test_what_the_node_reads_is_what_was_meant():
    flags = ["--module", "--no_local_rank", "--bind_cores_to_rank", "--bind_core_list=1,3-5"]
    job = _job(rank_flags=flags, node_flags=["--log_level=debug", "--save_pid=7"])
    node = parse_node(job.node_command("1")[4:])
    assert decode_world_info(node.world_info) == JOB.pool
    assert (node.node_rank, node.master_addr, node.master_port, node.leashed) == (1, "10.0.0.1", 29500, True)
    assert (node.module, node.no_local_rank, node.bind_core_list, node.save_pid) == (True, True, "1,3-5", 7)
    assert (node.log_level, node.user_script, node.user_args) == ("debug", "train.py", ["--name", "a b"])
    helper = parse_helper(job.rank_command("impi", "")[4:])
    assert (helper.launcher, helper.master_addr, helper.module, helper.user_args) == (
        "impi",
        "",
        True,
        ["--name", "a b"],
    )


# -- MPI and Slurm -----------------------------------------------------------------------------------------------------
def test_openmpi():
    (command,) = _commands("openmpi", _job(ssh_port=2222, launcher_args=["--allow-run-as-root"]))
    assert command.argv == [
        *("mpirun", "-n", "4", "--host", "w0:2,w1:2", "--map-by", "slot", "--bind-to", "none"),
        *("--wdir", "/home/me/my job", "--mca", "plm_rsh_args", "-p 2222", "-x", "NCCL_DEBUG", "-x", "NOTE"),
        *("--allow-run-as-root", *RANK, "--launcher=openmpi", *SCRIPT),
    ]
    assert command.environment == JOB.exports
    assert (command.prefix, command.leashed, command.nodes) == (None, False, 2)


def test_mpich_and_mvapich():
    hosts = ["mpirun", "-n", "3", "-hosts", "w0:2,w1:1", "-wdir", "/home/me/my job"]
    job = _job(pool={"w0": [0, 1], "w1": [3]})
    (command,) = _commands("mpich", job)
    assert command.argv[:9] == [*hosts, "-genvlist", "NCCL_DEBUG,NOTE"]
    assert command.argv[-4:] == ["--launcher=mpich", *SCRIPT]
    (command,) = _commands("mvapich", job)
    assert command.argv[:9] == [*hosts, "-genvlist", "MV2_ENABLE_AFFINITY,NCCL_DEBUG,NOTE"]
    assert command.environment == {"MV2_ENABLE_AFFINITY": "0", **JOB.exports}
    assert "-genvlist" not in _commands("mpich", _job(exports={}))[0].argv
    for name in ("mpich", "mvapich", "slurm"):
        with pytest.raises(ConfigError, match=rf"--ssh_port 22: {name} has no setting for it"):
            _commands(name, _job(ssh_port=22))


def test_impi():
    (command,) = _commands("impi", _job(ssh_port=22, exports={"I_MPI_PIN": "1"}))
    assert command.argv == [
        *("mpirun", "-n", "4", "-ppn", "2", "-hosts", "w0,w1", "-wdir", "/home/me/my job", "-genvlist", "I_MPI_PIN"),
        *(*RANK, "--launcher=impi", *SCRIPT),
    ]
    assert command.environment == {"I_MPI_PIN": "1", "I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS": "-p 22"}


def test_slurm():
    (command,) = _commands("slurm", _job(launcher_args=["--cpus-per-task=8"], master_addr=""))
    assert command.argv == [
        *("srun", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--nodelist=w0,w1", "--distribution=block"),
        *("--chdir=/home/me/my job", "--export=ALL", "--kill-on-bad-exit=1", "--quit-on-interrupt"),
        *("--cpus-per-task=8", *RANK[:4], WORLD, "--master_port=29500", "--launcher=slurm", *SCRIPT),
    ]
    assert command.environment == JOB.exports
    assert "--master_addr=10.0.0.1" in _commands("slurm")[0].argv


@pytest.mark.parametrize("name", ["impi", "slurm"])
def test_unequal_hosts_are_refused_where_they_cannot_be_said(name):
    with pytest.raises(ConfigError, match=f"--launcher {name} needs as many slots.*got w0: 1, w1: 2"):
        _commands(name, _job(pool={"w0": [1], "w1": [0, 1]}))


# -- what is there -----------------------------------------------------------------------------------------------------
def test_ssh_stands_in_for_pdsh():
    assert choose_backend("pdsh", _has("pdsh", "ssh")).name == "pdsh"
    assert choose_backend("pdsh", _has("ssh")).name == "ssh"


@pytest.mark.parametrize(
    ("name", "program"),
    [("pdsh", "pdsh"), ("ssh", "ssh"), ("slurm", "srun"), ("openmpi", "mpirun"), ("impi", "mpirun")],
)
def test_missing_program_names_the_way_out(name, program):
    with pytest.raises(ConfigError, match=rf"--launcher {name}: no program '{program}' on PATH: install it.*--no_ssh"):
        choose_backend(name, _has())


@pytest.mark.parametrize(
    ("text", "fitting"),
    [
        ("mpirun (Open MPI) 4.1.4\n", {"openmpi"}),
        ("HYDRA build details:\n    Version: 4.0.2\n", {"mpich", "mvapich"}),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9\n", {"mpich", "mvapich", "impi"}),
    ],
)
def test_another_mpi_on_path_is_noticed(mpi, text, fitting):
    mpi["text"] = text
    for name in ("openmpi", "mpich", "mvapich", "impi"):
        if name in fitting:
            assert choose_backend(name, _has("mpirun")).name == name
        else:
            with pytest.raises(ConfigError, match=r"is of another MPI \(its --version says"):
                choose_backend(name, _has("mpirun"))


def test_ds_ssh():
    hosts = ["w0", "w1"]
    (command,) = ds_ssh.commands_for(hosts, ["ls", "*.py;", "uptime"], _has("pdsh", "ssh"))
    assert command.argv == ["pdsh", "-S", "-b", "-f", "1024", "-w", "w0,w1", "ls *.py; uptime"]
    first, second = ds_ssh.commands_for(hosts, ["ls", "*.py;", "uptime"], _has("ssh"))
    assert second.argv == ["ssh", *SSH_OPTIONS, "--", "w1", "ls *.py; uptime"]
    assert (first.prefix, first.leashed) == ("w0: ", False)


# -- from flags to a job -----------------------------------------------------------------------------------------------
def test_exported_variables():
    shell = {
        "PYTHONPATH": "/p",
        "NCCL_DEBUG": "INFO",
        "GLOO_SOCKET_IFNAME": "eth0",
        "HOME": "/h",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    found = exported_variables(shell, {"NCCL_DEBUG": "WARN", "MINE": "x"})
    assert found == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_DEBUG": "WARN", "PYTHONPATH": "/p", "MINE": "x"}


def _parsed(*flags):
    return parse_runner([*flags, "train.py", "-x"])


def test_flags_travel_to_the_nodes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".deepspeed_env").write_text("A=1\nMASTER_ADDR=elsewhere\nLOCAL_RANK=3\n")
    flags = ["--module", "--bind_cores_to_rank", "--bind_core_list", "0-3", "--enable_each_rank_log", "logs", "-q"]
    flags += ["--launcher_args", "-o 'A b'", "--ssh_port", "7", "--venv_script", "~/v/activate", "--master_port", "5"]
    job = runner._cluster_job(_parsed(*flags, "--save_pid"), JOB.pool, "10.0.0.9")
    assert job.rank_flags == ["--module", "--bind_cores_to_rank", "--bind_core_list=0-3"]
    assert job.node_flags[:2] == ["--log_level=error", "--enable_each_rank_log=logs"]
    assert job.node_flags[2].startswith("--save_pid=")
    assert (job.launcher_args, job.ssh_port, job.venv_script) == (["-o", "A b"], 7, f"{tmp_path}/v/activate")
    assert (job.folder, job.python, job.master_addr, job.master_port) == (str(tmp_path), sys.executable, "10.0.0.9", 5)
    assert job.exports["A"] == "1" and not {"MASTER_ADDR", "LOCAL_RANK"} & set(job.exports)
    assert (job.script, job.script_args) == ("train.py", ["-x"])


def test_elastic_flags():
    parsed = _parsed("--elastic_training", "--max_elastic_nodes", "2")
    assert runner._cluster_job(parsed, JOB.pool, "a").node_flags[1:] == [
        "--enable_elastic_training",
        "--min_elastic_nodes=1",
        "--max_elastic_nodes=2",
    ]
    with pytest.raises(ConfigError, match="--min_elastic_nodes 3, but the job has 2"):
        runner._elastic_nodes(_parsed("--elastic_training", "--min_elastic_nodes", "3"), 2)


def test_logs_of_ranks_that_we_do_not_start():
    with pytest.raises(ConfigError, match="slurm starts the ranks itself"):
        runner._cluster_job(_parsed("--launcher", "slurm", "--save_pid"), JOB.pool, "")


@pytest.fixture
def first_host(monkeypatch):
    """Answers for the first host; keeps what it was asked."""
    answer = {"returncode": 0, "stdout": "10.0.0.1 172.17.0.1 \n", "stderr": "", "asked": []}

    def run(command, **kwargs):
        answer["asked"].append(command)
        return subprocess.CompletedProcess(command, answer["returncode"], answer["stdout"], answer["stderr"])

    monkeypatch.setattr(runner.subprocess, "run", run)
    monkeypatch.setattr(runner.shutil, "which", _has("ssh"))
    return answer


@pytest.mark.parametrize(
    ("flags", "address", "asked"),
    [
        (["--master_addr", "m"], "m", []),
        (["--no_ssh_check"], "w0", []),
        (["--launcher", "mpich"], "w0", []),
        (["--launcher", "slurm"], "", []),
        ([], "10.0.0.1", [["ssh", *SSH_OPTIONS, "--", "w0", "hostname -I"]]),
        (
            ["--ssh_port", "7", "--launcher_args", "-i key"],
            "10.0.0.1",
            [["ssh", *SSH_OPTIONS, "-p", "7", "-i", "key", "--", "w0", "hostname -I"]],
        ),
    ],
)
def test_address_of_the_first_host(first_host, flags, address, asked):
    assert runner._master_address(_parsed(*flags), JOB.pool) == address
    assert first_host["asked"] == asked


def test_this_host_is_asked_without_ssh(first_host):
    assert runner._master_address(_parsed(), {"localhost": [0], "w1": [0]}) == "10.0.0.1"
    assert first_host["asked"] == [["hostname", "-I"]]


def test_first_host_that_does_not_answer(first_host):
    first_host.update(returncode=255, stdout="", stderr="banner\nPermission denied (publickey).\n")
    with pytest.raises(ConfigError, match=r"Permission denied \(publickey\)\.\).*without a password.*--master_addr"):
        runner._master_address(_parsed(), JOB.pool)


@pytest.mark.parametrize(
    ("flags", "way"),
    [
        ([], "cluster"),
        (["--include", "localhost"], "here"),
        (["--include", "localhost", "--force_multi"], "cluster"),
        (["--include", "w1"], "cluster"),
        (["--no_ssh", "--node_rank", "1"], "node"),
        (["--no_ssh", "--include", "localhost"], "here"),
    ],
)
def test_which_way_a_job_goes(monkeypatch, tmp_path, flags, way):
    (tmp_path / "hosts").write_text("localhost slots=1\nw1 slots=1\n")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    ways = []
    for name in ("_run_cluster", "_run_this_node", "_run_here"):
        monkeypatch.setattr(runner, name, lambda *args, name=name: ways.append(name) or 0)
    assert runner.main(["--hostfile", str(tmp_path / "hosts"), *flags, "train.py"]) == 0
    assert ways == [{"cluster": "_run_cluster", "here": "_run_here", "node": "_run_this_node"}[way]]


@pytest.mark.parametrize("rank", ["-1", "2"])
def test_no_ssh_needs_the_number_of_the_node(rank, capsys, tmp_path):
    (tmp_path / "hosts").write_text("w0 slots=1\nw1 slots=1\n")
    flags = ["--hostfile", str(tmp_path / "hosts"), "--no_ssh", "--node_rank", rank]
    assert runner.main([*flags, "train.py"]) == 2
    assert f"--no_ssh starts one node of 2 (w0, w1): give its number as --node_rank, 0 to 1, got {rank}" in (
        capsys.readouterr().err
    )
