"""How two checkpoints differ: by names, shapes, options, and value by value in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from deepspeed._core.ckpt.describe import Description, Opened

__all__ = ["Contrast", "contrast"]

_TILE_NUMEL = 1 << 20
_MAPPED_NBYTES = 256 << 20

_SHOWN = 20


@dataclass(frozen=True)
class Contrast:
    """How two checkpoints differ.

    Attributes:
        one, two: their folders, with stage and world size, which do not count as differences.
        only_in_one, only_in_two: names of parameters and buffers.
        changed: by name, what is different: shapes, dtypes, whether it is trained.
        facts: by name of a counter or option, the two values.
        values: greatest absolute difference by ``name/key``, of those that differ; infinite where one is not a number.
            None if values were not compared.
        compared, uncompared: how many tensors were compared by value, and how many only one of the two has by that name
            and shape.
    """

    one: str
    two: str
    only_in_one: tuple[str, ...]
    only_in_two: tuple[str, ...]
    changed: dict[str, str]
    facts: dict[str, tuple[str, str]]
    values: dict[str, float] | None = None
    compared: int = 0
    uncompared: int = 0
    different: bool = field(init=False)

    def __post_init__(self) -> None:
        found = (self.only_in_one, self.only_in_two, self.changed, self.facts, self.values)
        object.__setattr__(self, "different", any(found))

    def text(self) -> list[str]:
        """Lines to print."""
        lines = [f"1: {self.one}", f"2: {self.two}"]
        lines += _shown("only in 1", list(self.only_in_one)) + _shown("only in 2", list(self.only_in_two))
        lines += _shown("of another kind", [f"{name}: {what}" for name, what in self.changed.items()])
        lines += [f"{name}: {one} | {two}" for name, (one, two) in self.facts.items()]
        if self.values is not None:
            worst = sorted(self.values.items(), key=lambda item: -item[1])
            lines += _shown("greatest differences", [f"{name}: {difference:g}" for name, difference in worst])
            alone = f"; {self.uncompared} are in one of the two only" if self.uncompared else ""
            lines.append(f"{len(self.values)} of {self.compared} tensors differ{alone}")
        return (
            lines
            if self.different
            else [*lines, "no difference" + ("" if self.values is not None else " but for values")]
        )


def _shown(title: str, names: list[str]) -> list[str]:
    more = [f"  and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return [f"{title}:", *(f"  {name}" for name in names[:_SHOWN]), *more] if names else []


def contrast(
    one: Opened, two: Opened, *, values: bool = False, progress: Callable[[int, int], None] | None = None
) -> Contrast:
    """Compares two opened checkpoints. See :class:`Contrast`.

    Args:
        one, two: the checkpoints, of any stage and world size.
        values: also read and compare all tensors that both have, 1 M elements at a time.
        progress: called with bytes read and bytes in all.
    """
    first, second = one.describe(), two.describe()
    a, b = first.entries, second.entries
    changed = {}
    for name in a.keys() & b.keys():
        pairs = [(a[name].shape, b[name].shape), (a[name].dtype, b[name].dtype)]
        if {a[name].kind, b[name].kind} == {"trained", "frozen"}:
            pairs.append((a[name].kind, b[name].kind))
        differing = [f"{x} | {y}" for x, y in pairs if x != y]
        if differing:
            changed[name] = ", ".join(differing)
    found, compared, uncompared = _values(one, two, progress) if values else (None, 0, 0)
    return Contrast(
        _title(first),
        _title(second),
        tuple(name for name in a if name not in b),
        tuple(name for name in b if name not in a),
        dict(sorted(changed.items())),
        _facts(first, second),
        found,
        compared,
        uncompared,
    )


def _title(found: Description) -> str:
    stage = "" if found.zero_stage is None else f", ZeRO stage {found.zero_stage}, world size {found.world_size}"
    return f"{found.path} ({found.kind}{stage})"


def _facts(first: Description, second: Description) -> dict[str, tuple[str, str]]:
    """Counters, optimizer, options and the like. What a format does not hold, such as safetensors, is left out."""
    if "safetensors" in (first.kind, second.kind):
        return {}
    flat = [_flattened(found) for found in (first, second)]
    names = [*flat[0], *(name for name in flat[1] if name not in flat[0])]
    # What a scaler tells of itself depends on the stage.
    names = [n for n in names if not n.startswith("loss scaler") or (n in flat[0] and n in flat[1])]
    pairs = {name: (flat[0].get(name, "none"), flat[1].get(name, "none")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _flattened(found: Description) -> dict[str, str]:
    facts: dict[str, Any] = {
        **found.counters,
        "optimizer": found.optimizer,
        "scheduler": found.scheduler,
        "loss scaler": found.loss_scaler,
        "client state": found.client_state,
    }
    for index, group in enumerate(found.groups):
        facts[f"group {index}"] = {
            "parameters": group.parameters,
            "elements": group.numel,
            "state": group.state,
            "options": group.options,
        }
    flat: dict[str, str] = {}

    def put(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                put(f"{name} {key}", item)
        elif value is not None:
            flat[name] = str(list(value) if isinstance(value, tuple) else value)

    for name, value in facts.items():
        put(name, value)
    return flat


def _values(one: Opened, two: Opened, progress: Callable[[int, int], None] | None) -> tuple[dict[str, float], int, int]:
    shapes, others = one.shapes(), two.shapes()
    common = {place: shape for place, shape in shapes.items() if others.get(place) == shape}
    total, done, mapped = sum(map(prod, common.values())) * 8, 0, 0
    found: dict[str, float] = {}
    for (name, key), shape in common.items():
        numel, worst = prod(shape), 0.0
        for begin in range(0, numel, _TILE_NUMEL):
            count = min(_TILE_NUMEL, numel - begin)
            worst = max(worst, _difference(one, two, name, key, begin, count))
            done, mapped = done + count * 8, mapped + count * 8
            if progress is not None:
                progress(done, total)
            if mapped > _MAPPED_NBYTES:
                one.reopen()
                two.reopen()
                mapped = 0
        if worst:
            found[f"{name}/{key}"] = worst
    return found, len(common), len(shapes.keys() | others.keys()) - len(common)


def _difference(one: Opened, two: Opened, name: str, key: str, begin: int, count: int) -> float:
    """Greatest absolute difference of a tile. In fp64, which holds all values of the usual dtypes."""
    tiles = [torch.empty(count, dtype=torch.float64) for _ in range(2)]
    for opened, tile in zip((one, two), tiles, strict=True):
        opened.fill(name, key, begin, tile)
    if torch.equal(*tiles):
        return 0.0
    same = (tiles[0] == tiles[1]) | (tiles[0].isnan() & tiles[1].isnan())
    worst = float((tiles[0] - tiles[1]).abs().masked_fill_(same, 0.0).max())
    return math.inf if math.isnan(worst) else worst
