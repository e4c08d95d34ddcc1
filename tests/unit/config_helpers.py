"""What the config tests share: the warnings that a config causes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from deepspeed.utils import logging as package_logging


@contextmanager
def warnings_said() -> Iterator[list[str]]:
    """The messages that the package logs inside, also those that this process has seen before."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    before = set(package_logging._said)
    package_logging._said.clear()
    package_logging.logger.addHandler(handler)
    try:
        yield said
    finally:
        package_logging.logger.removeHandler(handler)
        package_logging._said.update(before)
