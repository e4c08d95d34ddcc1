"""What the launcher asks of its host: devices, cores, free ports, files. No torch where the answer is clear."""

from __future__ import annotations

import glob
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from ..errors import ConfigError
from .plan import parse_environment_file

__all__ = [
    "address_towards",
    "count_cuda_devices",
    "free_port",
    "is_this_host",
    "port_is_free",
    "read_environment_files",
    "usable_cores",
    "without_launcher_variables",
]

#: Device files of NVIDIA, ROCm and WSL2 drivers.
_DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")


def count_cuda_devices() -> int:
    """Devices that a rank started now would see; 0 means that ranks run on CPU (``DS_ACCELERATOR=cpu`` says so, too).

    Torch is loaded only if a driver's device file exists, since starting takes a second with it and little without.

    Raises:
        ConfigError: ``DS_ACCELERATOR`` names what is unknown or not here.
    """
    wanted = os.environ.get("DS_ACCELERATOR", "").strip().lower()
    if wanted == "cpu" or (not wanted and not any(glob.glob(pattern) for pattern in _DEVICE_FILES)):
        return 0
    from ..accelerator import get_accelerator  # noqa: PLC0415 (loads torch)

    accelerator = get_accelerator()
    return accelerator.device_count() if accelerator.device_name() == "cuda" else 0


def usable_cores() -> list[int]:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def is_this_host(name: str) -> bool:
    """Whether the name is certainly this host's; asks no name server."""
    own = socket.gethostname()
    return name in ("localhost", "127.0.0.1", "::1", own, own.split(".")[0])


def address_towards(host: str, port: int) -> str:
    """This host's address on its way to another, from the routing table; nothing is sent.

    Raises:
        ConfigError: the name is unknown, or no way leads there.
    """
    try:
        kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"no way from this host to --master_addr {host}: {error}") from None


def port_is_free(port: int) -> bool:
    """Whether a server could listen on the port on every interface, as torch's store does."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def read_environment_files(name: str) -> dict[str, str]:
    """Variables of the file ``name`` in the home folder and in the current one; the current one's win.

    Raises:
        ConfigError: a line that is not ``VAR=VAL``.
    """
    found: dict[str, str] = {}
    for path in dict.fromkeys((Path.home() / name, Path.cwd() / name)):  # an absolute name gives the same path twice
        if path.is_file():
            found |= parse_environment_file(path.read_text(encoding="utf-8").splitlines(), str(path))
    return found


def without_launcher_variables(found: Mapping[str, str]) -> dict[str, str]:
    """Drops what the launcher decides for each rank: clients append their whole environment to the file."""
    place = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE")
    own = (*place, "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in found.items() if name not in own}
