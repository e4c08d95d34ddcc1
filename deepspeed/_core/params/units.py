"""Fetch units: which parameters are gathered together. Pure but for looking at modules.

A unit is a block (one of several equal children of a ``ModuleList``, ``Sequential`` or ``ModuleDict``), a module marked as
a leaf, or else the module that owns the parameters. So one block costs one gather, and ranks that take different ways
inside a block still gather the same. A block that is too large is taken apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from deepspeed._core.params.handle import ParamHandle, handles_of

__all__ = ["Unit", "UnitLimits", "find_units", "owned_handles"]

_CONTAINERS = (torch.nn.ModuleList, torch.nn.Sequential, torch.nn.ModuleDict)


@dataclass(frozen=True)
class UnitLimits:
    """Bounds on what becomes one unit, in parameter elements."""

    max_numel: int
    granularity: int = 0
    """``stage3_module_granularity_threshold``: modules with fewer elements per descendant are units."""


@dataclass(eq=False)
class Unit:
    """Parameters that are gathered together, for the module at ``name``."""

    index: int
    name: str
    handles: list[ParamHandle]
    """Not persistent ones only."""
    trainable: list[ParamHandle] = field(default_factory=list)
    """Everything in the unit that gets gradients, persistent or not."""
    parent: Unit | None = None
    """The unit around it, whose call covers this one's parameters."""
    active: int = 0
    """Calls that run forward now."""
    externals: dict[int, ParamHandle] = field(default_factory=dict)
    """Used by this unit's module, but owned by others."""
    completes: list[ParamHandle] = field(default_factory=list)
    """Whose gradients its backward makes: of its own parameters (``whole``: and of those below), persistent ones too."""
    whole: bool = False
    """With everything below its module."""

    @property
    def members(self) -> list[ParamHandle]:
        extra = [h for i, h in self.externals.items() if all(i != own.id for own in self.handles)]
        return self.handles + extra if extra else self.handles

    @property
    def numel(self) -> int:
        return sum(h.numel for h in self.members)


def owned_handles(module: torch.nn.Module, *, recurse: bool) -> list[ParamHandle]:
    """Handles of the module's partitioned parameters, each once."""
    return handles_of(module.parameters(recurse=recurse))


def find_units(root: torch.nn.Module, limits: UnitLimits) -> Iterator[tuple[str, torch.nn.Module, bool]]:
    """``(path, module, whole)`` of each unit's module; ``whole``: with everything below it, else its own parameters."""
    total = sum(h.numel for h in owned_handles(root, recurse=True))
    seen: set[int] = set()

    def visit(path: str, module: torch.nn.Module, repeated: bool) -> Iterator[tuple[str, torch.nn.Module, bool]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if _is_whole(module, repeated and module is not root, total, limits):
            yield path, module, True
            return
        if module is root or any(True for _ in module.parameters(recurse=False)):
            yield path, module, False
        kinds = Counter(type(child) for child in module.children())
        for name, child in module.named_children():
            twin = isinstance(module, _CONTAINERS) and kinds[type(child)] > 1
            yield from visit(f"{path}.{name}" if path else name, child, twin)

    yield from visit("", root, False)


def _is_whole(module: torch.nn.Module, repeated: bool, total: int, limits: UnitLimits) -> bool:
    if getattr(module, "_z3_leaf", False):
        return True
    if not repeated and not limits.granularity:
        return False
    if any(getattr(part, "_z3_fetch_separately", False) for part in module.modules()):
        return False  # a tiled layer wants its tiles one at a time
    numel = sum(h.numel for h in owned_handles(module, recurse=True))
    descendants = sum(1 for _ in module.modules()) - 1
    if limits.granularity and descendants and numel / (1 + descendants) < limits.granularity:
        return True
    # Half of the model in one unit would leave nothing to save.
    return repeated and descendants > 0 and numel <= min(limits.max_numel, total // 2)
