"""Fingerprints tell contents apart, and do not depend on how they come or on what is installed."""

from __future__ import annotations

import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed._core import checksum
from deepspeed._core.checksum import crc32, fingerprint


@given(st.binary(max_size=1000), st.integers(0, 1000))
def test_the_sum_is_zlibs(data: bytes, cut: int) -> None:
    assert crc32(data[cut:], crc32(data[:cut])) == zlib.crc32(data)


@given(st.binary(max_size=200), st.integers(0, 200))
def test_parts_are_as_the_whole(data: bytes, cut: int) -> None:
    assert fingerprint([data[:cut], data[cut:]]) == fingerprint([data])
    assert 0 <= fingerprint([data]) < 1 << 63


@given(st.binary(min_size=1, max_size=200), st.data())
def test_one_bit_shows(data: bytes, draw: st.DataObject) -> None:
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    other = bytearray(data)
    other[bit // 8] ^= 1 << bit % 8
    assert fingerprint([other]) != fingerprint([data])


def test_ranks_with_and_without_isal_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 33
    fast = fingerprint([data]), crc32(data, 5)
    monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    checksum._routines.cache_clear()
    try:
        assert checksum._routines().__name__ == "zlib"
        assert (fingerprint([data]), crc32(data, 5)) == fast
    finally:
        checksum._routines.cache_clear()
