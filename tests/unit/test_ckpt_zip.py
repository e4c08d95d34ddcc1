"""Zip archives from our writer, by the judgement of Python's ``zipfile``."""

from __future__ import annotations

import io
import zipfile
import zlib

from hypothesis import given
from hypothesis import strategies as st

from deepspeed._core.ckpt.zip import ZipWriter

NAMES = st.text("abcdefghij/._0123456789", min_size=1, max_size=40).filter(lambda name: not name.endswith("/"))


@given(
    st.dictionaries(NAMES, st.lists(st.binary(max_size=200), max_size=4), max_size=5), st.sampled_from([1, 64, 4096])
)
def test_records_come_back(records: dict[str, list[bytes]], alignment: int) -> None:
    stream = io.BytesIO()
    archive = ZipWriter(stream, alignment)
    for name, pieces in records.items():
        count = archive.record(name, lambda take, pieces=pieces: [take(piece) for piece in pieces])
        assert count == sum(map(len, pieces))
    archive.close()
    with zipfile.ZipFile(stream) as file:
        assert file.testzip() is None
        assert file.namelist() == list(records)
        for info in file.infolist():
            content = b"".join(records[info.filename])
            assert file.read(info) == content
            assert zlib.crc32(content) == info.CRC
            start = (
                info.header_offset
                + 30
                + len(info.filename)
                + int.from_bytes(stream.getvalue()[info.header_offset + 28 : info.header_offset + 30], "little")
            )
            assert start % alignment == 0
            assert stream.getvalue()[start : start + len(content)] == content


def test_more_records_than_16_bits_count() -> None:
    stream = io.BytesIO()
    archive = ZipWriter(stream, 1)
    for index in range(70_000):
        archive.record(str(index), lambda take: take(b"x"))
    archive.close()
    with zipfile.ZipFile(stream) as file:
        assert len(file.infolist()) == 70_000
        assert file.read("69999") == b"x"
