"""Tests that nobody runs prove nothing."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def test_every_folder_with_tests_is_collected(pytestconfig: pytest.Config) -> None:
    """pytest passes over folders by their names, by default also over "dist"."""
    skipped = pytestconfig.getini("norecursedirs")
    folders = {path.parent.relative_to(TESTS.parent) for path in TESTS.rglob("test_*.py")}
    assert {Path("tests/unit"), Path("tests/dist"), Path("tests/clients")} <= folders
    lost = {str(folder) for folder in folders for part in folder.parts if any(fnmatch(part, name) for name in skipped)}
    assert lost == set()
