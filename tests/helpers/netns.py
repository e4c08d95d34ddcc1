"""Hosts of a small network on this machine: network namespaces with their own addresses, and a stand-in for ssh."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: What takes the place of ``ssh``: it accepts what we call ssh with, and runs the command in the host's namespace.
SSH = """#!/bin/bash
while :; do
    case "$1" in
        -o|-p) shift 2;;
        -o*|-l*|-2|-a|-x) shift;;  # what pdsh adds
        --) shift; break;;
        -*) echo "ssh stand-in: unexpected option $1" >&2; exit 64;;
        *) break;;
    esac
done
host=$1; shift
namespace={folder}/$host
[ -e "$namespace" ] || {{ echo "ssh: connect to host $host port 22: No route to host" >&2; exit 255; }}
exec ip netns exec "$(cat "$namespace")" sh -c "$*"
"""


@dataclass
class Network:
    """Two hosts; ``hosts`` are their addresses, which are their names, too."""

    hosts: tuple[str, str]
    namespaces: tuple[str, str]
    #: Holds the stand-in, to be put first on PATH.
    programs: Path

    def pids(self, index: int) -> list[int]:
        """Processes on a host."""
        done = subprocess.run(["ip", "netns", "pids", self.namespaces[index]], capture_output=True, text=True)
        return [int(word) for word in done.stdout.split()]

    def kill_host(self, index: int) -> None:
        """Ends a host as a loss of power does: every process at once, with no word."""
        for pid in self.pids(index):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def why_not() -> str | None:
    """Why namespaces cannot be made here; ``None`` if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("hostname") is None or shutil.which("bash") is None:
        return "network namespaces need the programs ip, hostname and bash"
    name = f"dsprobe{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode != 0:
        return f"ip netns add failed: {done.stderr.strip()}"
    made = subprocess.run(
        ["ip", "-n", name, "link", "add", "a0", "type", "veth", "peer", "name", "a1"], capture_output=True, text=True
    )
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None if made.returncode == 0 else f"veth links cannot be made: {made.stderr.strip()}"


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Network]:
    """A network of two hosts on one cable; ``folder`` gets the stand-in."""
    number = os.getpid()
    namespaces, hosts = (f"ds{number}a", f"ds{number}b"), ("10.77.1.1", "10.77.1.2")
    programs = folder / "bin"
    programs.mkdir()
    try:
        for namespace in namespaces:
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        cable = ("type", "veth", "peer", "name", "eth0", "netns", namespaces[1])
        _ip("-n", namespaces[0], "link", "add", "eth0", *cable)
        for namespace, host in zip(namespaces, hosts, strict=True):
            _ip("-n", namespace, "address", "add", f"{host}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
            (programs / host).write_text(namespace)
        ssh = programs / "ssh"
        ssh.write_text(SSH.format(folder=programs))
        ssh.chmod(0o755)
        network = Network(hosts, namespaces, programs)
        try:
            yield network
        finally:
            for index in range(2):
                network.kill_host(index)
    finally:
        for namespace in namespaces:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
