"""How a checkpoint and a model differ, in words. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["another_shape", "differences", "listed"]

LIMIT = 10
"""Names of one kind that a message shows; it counts the others."""

Shapes = Mapping[str, Sequence[int] | None]


def another_shape(saved: Shapes, wanted: Shapes) -> dict[str, str]:
    """Names in both whose shapes are known and differ, with both shapes as text."""
    return {
        name: f"{_shape(shape)} in the model and {_shape(saved[name])} in the checkpoint"
        for name, shape in wanted.items()
        if shape is not None and saved.get(name) is not None and tuple(shape) != tuple(saved[name] or ())
    }


def differences(saved: Shapes, wanted: Shapes, *, names: bool = True) -> list[str]:
    """What hinders loading ``saved`` into ``wanted``: a clause for each kind, the first 10 of it by name and shape.

    Args:
        saved: shapes in the checkpoint; None for entries that are no tensors.
        wanted: shapes in the model.
        names: whether missing and extra names count, too.

    Returns:
        Clauses; empty if nothing differs.
    """
    clauses = []
    if names:
        missing = {name: _shape(shape) for name, shape in wanted.items() if name not in saved}
        extra = {name: _shape(shape) for name, shape in saved.items() if name not in wanted}
        clauses += [f"not in the checkpoint: {listed(missing)}"] if missing else []
        clauses += [f"in the checkpoint only: {listed(extra)}"] if extra else []
    other = another_shape(saved, wanted)
    return clauses + ([f"of another shape: {listed(other)}"] if other else [])


def listed(names: Mapping[str, str] | Sequence[str]) -> str:
    """``'a' (2, 3), 'b' (4,) and 5 more``: names, with what is known of them."""
    known = names if isinstance(names, Mapping) else dict.fromkeys(names, "")
    shown = ", ".join(f"{name!r} {text}".rstrip() for name, text in list(known.items())[:LIMIT])
    return shown if len(known) <= LIMIT else f"{shown} and {len(known) - LIMIT} more"


def _shape(shape: Sequence[int] | None) -> str:
    return "" if shape is None else str(tuple(shape))
