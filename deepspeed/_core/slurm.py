"""Slurm's short form of lists of hosts, as its environment variables have it: ``gpu[01-03,7],login`` (scontrol(1))."""

from __future__ import annotations

import re

from ..errors import ConfigError

__all__ = ["expand_nodelist"]

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def expand_nodelist(text: str) -> list[str]:
    """Host names in Slurm's order: ``"gpu[08-10,2]"`` gives ``["gpu08", "gpu09", "gpu10", "gpu2"]``.

    Several brackets in a name count like digits, the last one fastest.

    Raises:
        ConfigError: text of another form.
    """
    hosts: list[str] = []
    for entry in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        names = [""]
        for plain, listed in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", entry):
            names = [name + end for name in names for end in ([plain] if plain else _numbers(listed, text))]
        hosts += names
    if not hosts or text.count("[") != text.count("]") or any(host != host.strip() or not host for host in hosts):
        raise ConfigError(f"expected a list of hosts as Slurm writes it, such as gpu[01-03,7],login, got {text!r}")
    return hosts


def _numbers(listed: str, text: str) -> list[str]:
    found: list[str] = []
    for piece in listed.split(","):
        match = _RANGE.fullmatch(piece)
        if match is None:
            raise ConfigError(f"list of hosts {text!r}: expected numbers such as 01-03,7 in brackets, got {piece!r}")
        low, high = match[1], match[2] or match[1]
        found += [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
    return found
