"""The one logger of the package. It is named ``DeepSpeed`` and quiet by default.

Every rank owns the logger; messages meant once per job go through :func:`log_dist`, which picks the ranks.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

__all__ = ["log_dist", "logger", "set_log_level_from_string", "warning_once"]

_FORMAT = "[%(asctime)s] [%(levelname)s] [rank %(ds_rank)s] %(message)s"
_LEVELS = ("debug", "info", "warning", "error", "critical")


class _RankFilter(logging.Filter):
    """Adds the global rank (from the environment, so that no process group is needed) to each record."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.ds_rank = os.environ.get("RANK", "0")
        return True


class _CurrentStderr(logging.StreamHandler):
    """Writes to whatever ``sys.stderr`` is at the time of the message, so that redirections and captures work."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    @property
    def stream(self):  # type: ignore[no-untyped-def,override]
        return sys.stderr

    @stream.setter
    def stream(self, value: object) -> None:
        del value


def _make_logger() -> logging.Logger:
    made = logging.getLogger("DeepSpeed")
    if not any(isinstance(h, _CurrentStderr) for h in made.handlers):
        handler = _CurrentStderr()
        handler.setFormatter(logging.Formatter(_FORMAT))
        handler.addFilter(_RankFilter())
        made.addHandler(handler)
        made.propagate = False
        made.setLevel(logging.WARNING)
        set_level = os.environ.get("DS_LOG_LEVEL", "").lower()
        if set_level in _LEVELS:
            made.setLevel(set_level.upper())
    return made


logger = _make_logger()
_said: set[str] = set()


def _this_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Logs on the given global ranks only; ``None`` means rank 0, an entry of -1 means every rank."""
    wanted = [0] if ranks is None else list(ranks)
    if -1 in wanted or _this_rank() in wanted:
        logger.log(level, message)


def warning_once(message: str, *, all_ranks: bool = False) -> None:
    """Warns the first time this process sees the message; on rank 0 unless ``all_ranks``."""
    if message not in _said:
        _said.add(message)
        log_dist(message, ranks=[-1] if all_ranks else [0], level=logging.WARNING)


def set_log_level_from_string(level: str) -> None:
    """Sets the level by its lower-case name (debug, info, warning, error, critical)."""
    if level.lower() not in _LEVELS:
        raise ValueError(f"log level {level!r} is unknown; choose one of {', '.join(_LEVELS)}")
    logger.setLevel(level.upper())
