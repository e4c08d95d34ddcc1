"""Each message that the troubleshooting page quotes is one that the package prints."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
HOLE = "\x00"
ENOUGH = 12
"""Letters that a string must give to a message to be recognised."""


def normalised(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


@cache
def messages() -> list[str]:
    """Every string of the package but docstrings, with a hole for each value that is put in."""
    found = []
    for path in sorted((ROOT / "deepspeed").rglob("*.py")):
        tree = ast.parse(path.read_text())
        skipped = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # docstrings
                skipped.add(id(node.value))
            if isinstance(node, ast.JoinedStr):
                skipped |= {id(value) for value in node.values}
        for node in ast.walk(tree):
            if id(node) in skipped:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else HOLE for v in node.values]
                found.append(normalised("".join(parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(normalised(node.value))
    return found


def quoted() -> list[str]:
    blocks = re.findall(r"^```text\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [normalised(line) for block in blocks for line in block.splitlines() if line.strip()]


def fragments(message: str) -> list[str]:
    """What stands between the values, and between sentences that may be strings of their own."""
    return [piece for piece in (piece.strip() for piece in re.split(r"\.\.\.|(?=; )", message)) if piece]


@cache
def is_one_string(pieces: tuple[str, ...]) -> bool:
    pattern = re.compile(".*?".join(map(re.escape, pieces)))
    return any(pattern.search(text) for text in messages())


def is_said(message: str) -> bool:
    """Whether the message is put together from strings of the package, each of which gives a good part of it, in order."""
    pieces = fragments(message)
    reached = [True] + [False] * len(pieces)
    for end in range(1, len(pieces) + 1):
        reached[end] = any(
            reached[begin] and sum(map(len, pieces[begin:end])) >= ENOUGH and is_one_string(tuple(pieces[begin:end]))
            for begin in range(end)
        )
    return reached[-1]


@pytest.mark.parametrize("message", quoted())
def test_the_package_says_it(message):
    assert is_said(message), f"no strings of the package make up: {message}"


def test_what_nobody_says_is_noticed():
    assert len(quoted()) > 50
    assert not is_said("the batch sizes do not fit together at all:")
    assert not is_said("parameter ... was read while it was partitioned")
    assert is_said("parameter ... was written to while it was partitioned")
    assert is_said("unknown config key ... is ignored; did you mean ...?")
    assert not is_said("unknown config key ... is ignored; do you mean ...?")
