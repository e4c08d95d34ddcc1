"""Progress bars for long work with files: on a terminal, on one rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["bytes_bar"]

# Below this there is nothing to wait for.
_LEAST_NBYTES = 256 << 20


@contextmanager
def bytes_bar(total_nbytes: int, text: str) -> Iterator[Callable[[int], object]]:
    """Shows how many of ``total_nbytes`` are done; yields what adds to them. Nothing is shown where nobody looks."""
    if total_nbytes < _LEAST_NBYTES or not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield lambda nbytes: None
        return
    from tqdm import tqdm  # noqa: PLC0415 - needed here only

    with tqdm(total=total_nbytes, unit="B", unit_scale=True, desc=text, leave=False) as bar:
        yield bar.update
