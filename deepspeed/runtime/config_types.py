"""Value types of the config: what a number, a switch or a dtype may look like in a JSON or YAML document."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field

from deepspeed._core.precision.dtypes import FLOAT_DTYPES, parse_dtype
from deepspeed.errors import ConfigError

__all__ = [
    "AnyDtype",
    "Bool",
    "Float",
    "FloatDtype",
    "Fraction",
    "Int",
    "NonNegFloat",
    "NonNegInt",
    "PosFloat",
    "PosInt",
    "PrintInterval",
]

_SWITCH_WORDS = {"true": True, "false": False}


def as_int(value: Any) -> Any:
    """Integers, and numbers or text of integral value: JSON writers and YAML loaders turn 5e8 into either."""
    if isinstance(value, bool):
        raise ConfigError(f"expected an integer, got the boolean {value}")
    if isinstance(value, str):
        try:
            value = float(value) if any(c in value for c in ".eE") else int(value)
        except ValueError:
            raise ConfigError(f"expected an integer, got the text {value!r}") from None
    if isinstance(value, float):
        if not value.is_integer():  # also infinities and NaN
            raise ConfigError(f"expected an integer, got {value}")
        return int(value)
    return value


def as_float(value: Any) -> Any:
    """Numbers and text of numbers; booleans are refused, since ``true`` for 1.0 is a mistake in every known key."""
    if isinstance(value, bool):
        raise ConfigError(f"expected a number, got the boolean {value}")
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"expected a number, got the text {value!r}") from None
    return value


def as_bool(value: Any) -> Any:
    """true and false, 0 and 1, and their text; nothing else, so that a number in the wrong place is found."""
    if isinstance(value, str) and value.strip().lower() in _SWITCH_WORDS:
        return _SWITCH_WORDS[value.strip().lower()]
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise ConfigError(f"expected true or false, got {value!r}")


def as_print_interval(value: Any) -> Any:
    """A step count; 0, null and infinity all mean "never" and become ``None``."""
    if value is None or (isinstance(value, float) and math.isinf(value)):
        return None
    value = as_int(value)
    return None if value == 0 else value


def _float_dtype(value: Any) -> torch.dtype | None:
    return parse_dtype(value, allowed=FLOAT_DTYPES)


Int = Annotated[int, BeforeValidator(as_int)]
NonNegInt = Annotated[int, BeforeValidator(as_int), Field(ge=0)]
PosInt = Annotated[int, BeforeValidator(as_int), Field(gt=0)]
Float = Annotated[float, BeforeValidator(as_float), Field(allow_inf_nan=False)]
NonNegFloat = Annotated[float, BeforeValidator(as_float), Field(ge=0, allow_inf_nan=False)]
PosFloat = Annotated[float, BeforeValidator(as_float), Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, BeforeValidator(as_float), Field(ge=0, le=1)]
Bool = Annotated[bool, BeforeValidator(as_bool)]
FloatDtype = Annotated[torch.dtype, BeforeValidator(_float_dtype)]
AnyDtype = Annotated[torch.dtype, BeforeValidator(parse_dtype)]
PrintInterval = Annotated[PosInt | None, BeforeValidator(as_print_interval)]
