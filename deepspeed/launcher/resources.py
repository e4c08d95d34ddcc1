"""Which hosts and slots a job uses: the hostfile and the filters, as pure functions.

Facts: DeepSpeed's getting-started guide (hostfile, filters) and the launcher's own help. A *slot* is one rank's
place: a device on an accelerator host, just a number on CPU.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence

from ..errors import ConfigError

__all__ = ["Pool", "apply_filters", "decode_world_info", "encode_world_info", "parse_filter", "parse_hostfile", "take"]

#: Host name -> its slots, in the order of ranks.
Pool = dict[str, list[int]]


def parse_hostfile(lines: Sequence[str], name: str = "hostfile") -> Pool:
    """Reads lines ``<host> slots=<count>``. Empty lines and what follows ``#`` do not count.

    Raises:
        ConfigError: a line of another form, a host that comes twice, or no host at all.
    """
    pool: Pool = {}
    for number, raw in enumerate(lines, start=1):
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        words = line.split()
        count = words[1].removeprefix("slots=") if len(words) == 2 and words[1].startswith("slots=") else ""
        if not count.isdecimal() or int(count) < 1:
            raise ConfigError(f"{name}:{number}: expected '<host> slots=<count>' with a count above 0, got {line!r}")
        if words[0].startswith("-"):  # a remote shell would take it for an option
            raise ConfigError(f"{name}:{number}: a host name cannot begin with '-', got {words[0]!r}")
        if words[0] in pool:
            raise ConfigError(
                f"{name}:{number}: host {words[0]!r} is listed twice; give it one line with all its slots"
            )
        pool[words[0]] = list(range(int(count)))
    if not pool:
        raise ConfigError(f"{name} lists no host: expected lines '<host> slots=<count>'")
    return pool


def parse_filter(text: str) -> dict[str, list[int] | None]:
    """Reads ``NODE[@NODE...]`` with ``NODE = NAME[:SLOT[,SLOT...]]``; ``None`` stands for all slots of the host.

    ``worker-0@worker-1:0,2`` gives ``{"worker-0": None, "worker-1": [0, 2]}``.

    Raises:
        ConfigError: text of another form, or a host or slot that comes twice.
    """
    wanted: dict[str, list[int] | None] = {}
    for node in text.split("@"):
        host, colon, listed = node.strip().partition(":")
        slots = [slot.strip() for slot in listed.split(",")] if colon else []
        if not host or not all(slot.isdecimal() for slot in slots):
            raise ConfigError(f"filter {text!r}: expected NAME[:SLOT[,SLOT...]][@NAME...], got {node!r}")
        if host in wanted or len(set(slots)) != len(slots):
            raise ConfigError(f"filter {text!r}: {node!r} repeats a host or a slot; name each once")
        wanted[host] = [int(slot) for slot in slots] if colon else None
    return wanted


def apply_filters(pool: Mapping[str, Sequence[int]], include: str = "", exclude: str = "") -> Pool:
    """What is left of the pool. Hosts keep the pool's order; slots are sorted, so that ranks do not depend on spelling.

    Raises:
        ConfigError: both filters, a host or slot that the pool does not have, or nothing left.
    """
    if include and exclude:
        raise ConfigError(f"--include {include!r} and --exclude {exclude!r} exclude each other: give one of them")
    if not include and not exclude:
        return {host: list(slots) for host, slots in pool.items()}
    flag, wanted = ("--include", parse_filter(include)) if include else ("--exclude", parse_filter(exclude))
    for host, listed in wanted.items():
        if host not in pool:
            raise ConfigError(f"{flag}: no host {host!r}; there is {', '.join(pool)}")
        absent = sorted(set(listed or ()) - set(pool[host]))
        if absent:
            raise ConfigError(
                f"{flag}: host {host!r} has no slot {absent[0]}; it has {', '.join(map(str, pool[host]))}"
            )
    left: Pool = {}
    for host, slots in pool.items():
        named = set(wanted[host] or slots) if host in wanted else set()
        kept = sorted(named if include else set(slots) - named)
        if kept:
            left[host] = kept
    if not left:
        raise ConfigError(f"--exclude {exclude!r} leaves no slot to run on")
    return left


def take(pool: Mapping[str, Sequence[int]], num_nodes: int = -1, num_slots: int = -1) -> Pool:
    """The first ``num_nodes`` hosts with the first ``num_slots`` slots of each; -1 means all.

    Raises:
        ConfigError: a number below 1, or more than there are.
    """
    for flag, number in (("--num_nodes", num_nodes), ("--num_gpus/--num_accelerators", num_slots)):
        if number != -1 and number < 1:
            raise ConfigError(f"{flag} expects a number above 0, got {number}")
    if num_nodes > len(pool):
        raise ConfigError(f"--num_nodes {num_nodes}, but there is only {', '.join(pool)}")
    taken = {host: list(slots) for host, slots in list(pool.items())[: num_nodes if num_nodes > 0 else None]}
    if num_slots > 0:
        for host, slots in taken.items():
            if len(slots) < num_slots:
                raise ConfigError(f"--num_gpus/--num_accelerators {num_slots}, but {host} has {len(slots)} slot(s)")
            taken[host] = slots[:num_slots]
    return taken


def encode_world_info(pool: Mapping[str, Sequence[int]]) -> str:
    """The text that :func:`decode_world_info` reads; of letters, digits, ``-``, ``_`` and ``=`` only."""
    return base64.urlsafe_b64encode(json.dumps({host: list(slots) for host, slots in pool.items()}).encode()).decode()


def decode_world_info(text: str) -> Pool:
    """Reads ``--world_info``: base64 (URL-safe or plain) of a JSON map host -> list of slots, in the order of ranks.

    Raises:
        ConfigError: anything else.
    """
    expected = "--world_info expects base64 of a JSON map from host to a list of slots"
    try:
        found = json.loads(base64.b64decode(text.strip().replace("-", "+").replace("_", "/"), validate=True))
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"{expected}, got {text!r} ({error})") from None
    slots_ok = isinstance(found, dict) and all(
        isinstance(slots, list) and slots and all(type(slot) is int and slot >= 0 for slot in slots)
        for slots in found.values()
    )
    if not found or not slots_ok:
        raise ConfigError(f"{expected}, got {json.dumps(found)}")
    return dict(found)
