"""Fingerprints tell contents apart, and do not depend on how they come or on what is installed."""

from __future__ import annotations

import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed._core import checksum
from deepspeed._core.checksum import BlockSums, crc32, fingerprint


@given(st.binary(max_size=1000), st.integers(0, 1000))
def test_the_sum_is_zlibs(data: bytes, cut: int) -> None:
    assert crc32(data[cut:], crc32(data[:cut])) == zlib.crc32(data)


@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(1, 16), st.booleans())
def test_one_look_gives_the_sums_of_blocks_and_of_stretches(parts: list[bytes], block: int, have_isal: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not have_isal:
            patch.setattr(checksum, "_routines", lambda: zlib)
        sums, whole = BlockSums(block), b"".join(parts)
        marks = [sums.mark()]
        for part in parts:
            sums.update(part)
            marks.append(sums.mark())
            for mark in marks:
                assert sums.since(mark) == zlib.crc32(whole[mark.position : sums.position])
    assert sums.position == len(whole)
    assert sums.blocks == [zlib.crc32(whole[at : at + block]) for at in range(0, len(whole), block)]


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
