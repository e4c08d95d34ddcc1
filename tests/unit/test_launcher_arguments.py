"""Flags of the launcher: the published surface, what is refused, and what one node does not use."""

from __future__ import annotations

import socket

import pytest

from deepspeed.errors import ConfigError, MissingFeatureError
from deepspeed.launcher import machine, runner
from deepspeed.launcher.arguments import check_runner, parse_node, parse_runner


def test_surface_and_defaults():
    """Frozen: a flag that goes, or a default that changes, breaks command lines that exist."""
    assert vars(parse_runner(["train.py"])) == {
        "hostfile": "/job/hostfile",
        "include": "",
        "exclude": "",
        "num_nodes": -1,
        "min_elastic_nodes": -1,
        "max_elastic_nodes": -1,
        "num_gpus": -1,
        "master_port": None,
        "master_addr": "",
        "node_rank": -1,
        "launcher": "pdsh",
        "launcher_args": "",
        "module": False,
        "no_python": False,
        "no_local_rank": False,
        "no_ssh": False,
        "no_ssh_check": False,
        "force_multi": False,
        "save_pid": False,
        "enable_each_rank_log": "None",
        "autotuning": "",
        "elastic_training": False,
        "bind_cores_to_rank": False,
        "bind_core_list": None,
        "ssh_port": None,
        "venv_script": None,
        "log_level": "info",
        "quiet": False,
        "user_script": "train.py",
        "user_args": [],
    }
    node = vars(parse_node(["--world_info", "x", "train.py"]))
    assert node["master_addr"] == "127.0.0.1" and node["master_port"] == 29500 and node["save_pid"] == 0


def test_all_after_the_script_is_the_scripts():
    parsed = parse_runner(["--num_accelerators", "2", "train.py", "--num_gpus", "9", "--", "-q", "--deepspeed"])
    assert parsed.num_gpus == 2 and not parsed.quiet
    assert parsed.user_args == ["--num_gpus", "9", "--", "-q", "--deepspeed"]


@pytest.mark.parametrize("text", ["-i key", "--cpus-per-task=8", "-o 'A b' -v", ""])
def test_launcher_args_may_begin_with_a_dash(text):
    script = ["-q", "train.py", "--launcher_args", "-i x"]
    parsed = parse_runner(["--launcher", "ssh", "--launcher_args", text, *script])
    assert (parsed.launcher_args, parsed.quiet, parsed.user_args) == (text, True, script[2:])
    assert parse_runner([f"--launcher_args={text}", *script]).launcher_args == text


@pytest.mark.parametrize("flags", [["--num_gpu", "2"], ["--bogus"], ["--num_gpus", "two"], ["--launcher", "rsh"], []])
def test_unknown_flags_end_with_usage(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_runner([*flags, "train.py"] if flags else [])
    assert ended.value.code == 2
    assert "usage: deepspeed" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["tune", "run"])
def test_what_is_not_there_yet_is_refused_by_name(mode):
    with pytest.raises(MissingFeatureError, match=f"--autotuning {mode}: this version has no autotuner yet"):
        check_runner(parse_runner(["--autotuning", mode, "train.py"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--module", "--no_python"], "exclude each other"),
        (["--bind_core_list", "0"], "needs --bind_cores_to_rank"),
        (["--master_port", "0"], "from 1 to 65535"),
        (["--include", "localhost:0", "--num_gpus", "1"], "name the resources already"),
        (["--exclude", "localhost:0", "--num_nodes", "1"], "name the resources already"),
        (["--node_rank", "1"], "--node_rank 1 needs --no_ssh"),
        (["--no_ssh", "--force_multi"], "give one of them"),
        (["--launcher_args", "-o 'x"], '--launcher_args "-o \'x": No closing quotation'),
        (["--min_elastic_nodes", "1"], "need --elastic_training"),
        (["--max_elastic_nodes", "1"], "need --elastic_training"),
        (["--elastic_training", "--launcher", "slurm"], "slurm ends the whole job with its first node"),
        (["--elastic_training", "--min_elastic_nodes", "0"], "--min_elastic_nodes expects a number above 0, got 0"),
        (["--elastic_training", "--min_elastic_nodes", "3", "--max_elastic_nodes", "2"], "2 is below"),
    ],
)
def test_contradictions(flags, message):
    with pytest.raises(ConfigError, match=message):
        check_runner(parse_runner([*flags, "train.py"]))


def test_flags_without_effect_are_said():
    parsed = parse_runner(["--launcher", "SLURM", "--ssh_port", "22", "--venv_script", "v", "train.py"])
    assert check_runner(parsed) == [
        "--launcher slurm has no effect on one node",
        "--ssh_port 22 has no effect on one node",
        "--venv_script v has no effect on one node",
    ]
    assert check_runner(parse_runner(["--no_ssh_check", "train.py"])) == []


# -- from flags to slots -----------------------------------------------------------------------------------------------
def _pool(*flags, devices=0):
    return runner._pool(parse_runner([*flags, "train.py"]), devices)


@pytest.mark.parametrize(
    ("flags", "devices", "slots"),
    [
        ([], 0, [0]),
        (["--num_gpus", "3"], 0, [0, 1, 2]),
        (["--include", "localhost:0,3"], 0, [0, 3]),
        (["--include", "localhost"], 0, [0]),
        ([], 4, [0, 1, 2, 3]),
        (["--num_gpus", "2"], 4, [0, 1]),
        (["--include", "localhost:2,1"], 4, [1, 2]),
        (["--exclude", "localhost:0"], 4, [1, 2, 3]),
        (["--hostfile", "None"], 4, [0, 1, 2, 3]),
        (["--num_nodes", "1"], 4, [0, 1, 2, 3]),
    ],
)
def test_slots_of_this_host(flags, devices, slots):
    assert _pool(*flags, devices=devices) == {"localhost": slots}


@pytest.mark.parametrize(
    ("flags", "devices", "message"),
    [
        (["--num_gpus", "5"], 4, "--num_gpus/--num_accelerators 5, but localhost has 4"),
        (["--num_gpus", "0"], 0, "above 0, got 0"),
        (["--include", "localhost:4"], 4, "no slot 4"),
        (["--exclude", "localhost"], 4, "leaves no slot"),
        (["--include", "elsewhere"], 4, "no host 'elsewhere'"),
        (["--hostfile", "/nonexistent"], 4, "'/nonexistent' does not exist"),
        (["--num_nodes", "2"], 4, "--num_nodes 2, but there is only localhost"),
    ],
)
def test_slots_that_are_not_there(flags, devices, message):
    with pytest.raises(ConfigError, match=message):
        _pool(*flags, devices=devices)


def test_hostfile_with_several_hosts(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("localhost slots=2\nworker-1 slots=2\n")
    assert _pool("--hostfile", str(hostfile)) == {"localhost": [0, 1], "worker-1": [0, 1]}
    assert _pool("--hostfile", str(hostfile), "--include", "localhost:1") == {"localhost": [1]}
    assert _pool("--hostfile", str(hostfile), "--num_nodes", "1") == {"localhost": [0, 1]}
    assert _pool("--hostfile", str(hostfile), "--exclude", "localhost@worker-1:0") == {"worker-1": [1]}
    with pytest.raises(ConfigError, match=f"{hostfile}:2: expected '<host> slots=<count>'"):
        hostfile.write_text("localhost slots=2\nworker-1\n")
        _pool("--hostfile", str(hostfile))


def test_hosts_of_a_slurm_allocation(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[07-08]")
    assert _pool("--launcher", "slurm", devices=2) == {"gpu07": [0, 1], "gpu08": [0, 1]}
    assert _pool("--launcher", "slurm", "--num_gpus", "1", "--num_nodes", "1", devices=2) == {"gpu07": [0]}
    assert _pool(devices=2) == {"localhost": [0, 1]}


# -- the machine -------------------------------------------------------------------------------------------------------
def test_cpu_needs_no_torch(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "CPU")
    assert machine.count_cuda_devices() == 0
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(machine, "_DEVICE_FILES", ())
    assert machine.count_cuda_devices() == 0


def test_port_in_use_is_left_only_if_it_was_the_default(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not machine.port_is_free(port)
        monkeypatch.setattr(runner, "DEFAULT_PORT", port)
        other = runner._port(None)
        assert other != port and machine.port_is_free(other)
        assert runner._port(port) == port
    monkeypatch.setattr(runner, "port_is_free", lambda candidate: True)
    assert runner._port(None) == port


def test_environment_files(monkeypatch, tmp_path):
    home, here = tmp_path / "home", tmp_path / "here"
    for folder, text in ((home, "A=home\nB=home\n"), (here, "A=here\nRANK=3\n")):
        folder.mkdir()
        (folder / ".deepspeed_env").write_text(text)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    found = machine.read_environment_files(".deepspeed_env")
    assert found == {"A": "here", "B": "home", "RANK": "3"}
    assert machine.without_launcher_variables(found) == {"A": "here", "B": "home"}
    assert machine.read_environment_files(str(home / ".deepspeed_env")) == {"A": "home", "B": "home"}
    assert machine.read_environment_files("absent") == {}


def test_this_host():
    assert machine.is_this_host("localhost") and machine.is_this_host(socket.gethostname())
    assert not machine.is_this_host("worker-1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nope.py"], "script 'nope.py' does not exist"),
        (["pkg.train"], "a module needs --module"),
        (["--no_python", "no-such-program"], "no program 'no-such-program'"),
        (["--bind_cores_to_rank", "--bind_core_list", "99999", "x.py"], "core 99999 is not usable here"),
    ],
)
def test_bad_input_is_one_line_and_code_2(flags, message, capsys):
    assert runner.main(flags) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(said) == 1 and message in said[0]
