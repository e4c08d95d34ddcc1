"""ds_report: order of its sections, honesty of its states, and its two flags."""

from __future__ import annotations

import pytest
import torch

from deepspeed import env_report
from deepspeed.accelerator import real_accelerator
from deepspeed.version import __version__


def _states(text):
    """Operator -> (installed, compatible) as printed."""
    table = text.split("op name", 1)[1].split("general environment", 1)[0]
    rows = [line.split() for line in table.splitlines() if "......" in line]
    return {row[0]: tuple(word for word in row if word.startswith("[")) for row in rows}


def test_sections_come_in_the_published_order():
    text = env_report.report()
    marks = ["operator report", "NOTE:", "JIT compiled", "ninja .", "op name", "fused_adam", "general environment info"]
    marks += ["torch install path", "torch version", "deepspeed install path", "deepspeed info", "/dev/shm"]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)
    assert f"{torch.__version__}" in text and __version__ in text


def test_operators_that_step_here_are_okay_and_missing_ones_say_so(monkeypatch):
    monkeypatch.setitem(env_report.known_ops, "not_there", False)
    text = env_report.report()
    states = _states(text)
    for name in ("cpu_adam", "cpu_adagrad", "cpu_lion", "fused_adam", "fused_lamb", "fused_lion"):
        assert states[name] == ("[YES]", "[OKAY]")
    assert states["async_io"] == ("[YES]", "[OKAY]")
    assert states["not_there"] == ("[NO]", "[NO]")
    assert "[WARNING]  not_there: not in this version" in text


def _raises(params, lr):
    raise RuntimeError("no such kernel\nsecond line")


class _Idle(torch.optim.SGD):
    def step(self, closure=None):
        return None


@pytest.mark.parametrize(
    ("make", "message"), [(_raises, "RuntimeError: no such kernel"), (_Idle, "a step did not change the weights")]
)
def test_an_operator_that_fails_is_not_called_compatible(monkeypatch, make, message):
    monkeypatch.setitem(env_report._OPTIMIZERS, "cpu_adam", make)
    text = env_report.report()
    assert _states(text)["cpu_adam"] == ("[YES]", "[NO]")
    assert f"[WARNING]  cpu_adam on cpu: {message}" in text and "second line" not in text


def test_a_wrong_setting_is_reported_instead_of_ending_the_report(monkeypatch):
    monkeypatch.setattr(real_accelerator, "_chosen", [])
    monkeypatch.setenv("DS_ACCELERATOR", "bogus")
    text = env_report.report()
    assert "[WARNING]  accelerator: DS_ACCELERATOR='bogus'" in text and "torch version" in text


def test_flags(capsys):
    assert env_report.cli_main(["--hide_operator_status"]) == 0
    assert "op name" not in (text := capsys.readouterr().out) and "torch version" in text
    assert env_report.cli_main(["--hide_errors_and_warnings"]) == 0
    assert "[WARNING]" not in (text := capsys.readouterr().out) and "op name" in text


def test_what_a_cluster_needs(monkeypatch, tmp_path):
    hosts = tmp_path / "hosts"
    monkeypatch.setattr(env_report, "DEFAULT_HOSTFILE", str(hosts))
    monkeypatch.setattr(env_report.shutil, "which", {"ssh": "/usr/bin/ssh"}.get)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)

    def rows():
        lines = env_report.report(hide_operator_status=True).split("Launching on several hosts:\n")[1].splitlines()
        return dict(line.split(" .", 1) for line in lines)

    found = {name: value.lstrip(". ") for name, value in rows().items()}
    assert found["ssh"].startswith("/usr/bin/ssh (--launcher ssh")
    assert all(found[name].startswith("not found (--launcher") for name in ("pdsh", "mpirun", "srun"))
    assert found[f"hostfile {hosts}"].startswith("none")
    assert "127.0.0.1" in found["interface lo"]
    assert found["GLOO_SOCKET_IFNAME"] == "eth7" and found["NCCL_SOCKET_IFNAME"].startswith("not set")
    hosts.write_text("a slots=2\nb slots=1\n")
    assert rows()[f"hostfile {hosts}"].endswith("2 host(s), 3 slots: a, b")
    hosts.write_text("a\n")
    assert f"[WARNING] {hosts}:1: expected" in rows()[f"hostfile {hosts}"]


@pytest.mark.parametrize(
    ("address", "said"),
    [("10.0.0.7", "which is 10.0.0.7"), ("127.0.1.1", "127.0.1.1, this host alone: set GLOO_SOCKET_IFNAME")],
)
def test_own_address(monkeypatch, address, said):
    monkeypatch.setattr(env_report.socket, "gethostbyname", lambda name: address)
    assert said in env_report.report(hide_operator_status=True)


def test_the_probe_of_the_folder_leaves_nothing_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "file I/O" in env_report.report(hide_operator_status=True)
    assert not list(tmp_path.iterdir())
