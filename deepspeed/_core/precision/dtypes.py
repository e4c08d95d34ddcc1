"""Names of dtypes, in one place: which spellings a config may use and what each means."""

from __future__ import annotations

import torch

from deepspeed.errors import ConfigError

__all__ = ["DTYPE_SPELLINGS", "FLOAT_DTYPES", "dtype_name", "parse_dtype"]

# Spellings are compared in lower case, with a leading "torch." removed (config reference, section 6).
DTYPE_SPELLINGS: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "float": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}

#: What gradients may be reduced, accumulated and communicated in.
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "int8"}


def parse_dtype(
    value: str | torch.dtype | None, *, key: str = "", allowed: tuple[torch.dtype, ...] | None = None
) -> torch.dtype | None:
    """The dtype that a config value names; ``None`` stays ``None``.

    ``key`` is used in the message only. ``allowed`` limits the answer, for example to :data:`FLOAT_DTYPES`.
    Raises :class:`ConfigError` for an unknown spelling, another type, or a dtype outside ``allowed``.
    """
    if value is None:
        return None
    where = f"{key}: " if key else ""
    if isinstance(value, torch.dtype):
        found = value
    elif isinstance(value, str):
        spelling = value.strip().lower().removeprefix("torch.")
        if spelling not in DTYPE_SPELLINGS:
            raise ConfigError(f"{where}unknown dtype {value!r}; write one of {_spellings(allowed)}")
        found = DTYPE_SPELLINGS[spelling]
    else:
        raise ConfigError(f"{where}expected the name of a dtype ({_spellings(allowed)}), got {value!r}")
    if allowed is not None and found not in allowed:
        raise ConfigError(f"{where}{found} cannot be used here; write one of {_spellings(allowed)}")
    return found


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """The short config spelling (``"bf16"``) of a dtype, or ``str(dtype)`` where there is none."""
    return None if dtype is None else _SHORT.get(dtype, str(dtype))


def _spellings(allowed: tuple[torch.dtype, ...] | None) -> str:
    return ", ".join(name for name, dtype in DTYPE_SPELLINGS.items() if allowed is None or dtype in allowed)
