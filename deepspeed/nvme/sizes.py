"""Byte counts as people write them on command lines."""

from __future__ import annotations

__all__ = ["parse_nbytes"]

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_nbytes(text: str) -> int:
    """``"400M"`` -> 419430400. K, M, G and T are powers of 1024, in any case, with ``B`` or ``iB`` after them or not.

    Raises:
        ValueError: no such size, or none above 0.
    """
    number = text.strip().upper().removesuffix("IB").removesuffix("B")
    unit = number[-1:] if number[-1:].isalpha() else ""
    digits = number.removesuffix(unit)
    if unit not in _UNITS or not (digits.isascii() and digits.isdigit()) or int(digits) == 0:
        raise ValueError(f"a size must be a whole number of bytes above 0, or of K, M, G or T, but is {text!r}")
    return int(digits) << _UNITS[unit]
