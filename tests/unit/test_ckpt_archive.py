"""Streamed ``torch.save`` files: torch reads them as its own, compact and with ties kept."""

from __future__ import annotations

import argparse
import datetime
import fractions
import io
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed._core.ckpt import archive as archive_module
from deepspeed._core.ckpt.archive import Archive, save_archive
from deepspeed._core.ckpt.io import refused
from deepspeed._core.ckpt.source import Blank, Rope, Source

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.complex64,
    torch.complex128,
)


def of(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    numbers = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed))
    return (numbers * 3 + 1).to(dtype) if dtype != torch.bool else numbers.bool()


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    plain = [t.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1) for t in (one, two)]
    alike = (one.dtype, one.shape, one.requires_grad) == (two.dtype, two.shape, two.requires_grad)
    return alike and torch.equal(*(t.view(torch.uint8) for t in plain))


def assert_alike(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert same(found, wanted)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_alike(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for one, two in zip(found, wanted, strict=True):
            assert_alike(one, two)
    else:
        assert found == wanted


def written(content: Any) -> io.BytesIO:
    stream = io.BytesIO()
    save_archive(content, stream)
    stream.seek(0)
    return stream


def round_trip(content: Any) -> Any:
    stream = written(content)
    with torch.serialization.safe_globals([bytes]):  # how empty ones are spelled; see load_file
        return torch.load(stream, weights_only=True)


def record_sizes(stream: io.BytesIO) -> list[int]:
    infos = zipfile.ZipFile(stream).infolist()
    stream.seek(0)
    return [info.file_size for info in infos if info.filename.startswith("archive/data/")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (4, 3, 2)], ids=str)
def test_every_dtype_and_shape_comes_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = of(dtype, *shape)
    found = round_trip([tensor])[0]
    assert same(found, tensor)
    assert found.is_contiguous()


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("weights_only", [True, False])
def test_all_ways_of_loading_give_what_a_file_of_torch_gives(tmp_path: Path, mmap: bool, weights_only: bool) -> None:
    weight = torch.nn.Parameter(torch.randn(70, 300))
    content = OrderedDict(
        module=OrderedDict(weight=weight, tied=weight, frozen=torch.nn.Parameter(torch.ones(2), requires_grad=False)),
        leaf=torch.ones(3, requires_grad=True),
        step=torch.tensor(7.0),
        sizes=[weight.shape],
        plain=(1, 2.5, None, True, "text", b"bytes", {3, 4}),
    )
    torch.save(content, tmp_path / "torch.pt")
    with (tmp_path / "ours.pt").open("wb") as stream:
        save_archive(content, stream)
    options = {"mmap": mmap, "weights_only": weights_only}
    theirs, ours = (torch.load(tmp_path / f"{name}.pt", **options) for name in ("torch", "ours"))
    assert_alike(ours, theirs)
    assert ours["module"]["tied"] is ours["module"]["weight"]


def test_the_zip_archive_is_sound_and_aligned(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with path.open("wb") as stream:
        save_archive({str(n): torch.arange(n) for n in (1, 7, 1000)}, stream)
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        assert {i.compress_type for i in file.infolist()} == {zipfile.ZIP_STORED}
    reader = torch._C.PyTorchFileReader(str(path))
    for key in range(3):
        assert reader.get_record_offset(f"data/{key}") % 64 == 0


def test_all_records_have_64_bit_sizes(tmp_path: Path) -> None:
    """Which is what lets them be longer than 4 GiB without anybody knowing before."""
    content = [torch.arange(100), torch.arange(1000.0), torch.arange(5), torch.arange(2000)]
    path = tmp_path / "a.pt"
    with path.open("wb") as stream:
        save_archive(content, stream)
    data = path.read_bytes()
    needs_version_45 = data.count(b"PK\x03\x04-\x00")  # which is what 64-bit sizes are called
    assert needs_version_45 == len(zipfile.ZipFile(path).infolist()) == 8
    for mmap in (True, False):
        assert_alike(torch.load(path, mmap=mmap), content)
    assert zipfile.ZipFile(path).testzip() is None


class _Huge(Source):
    """Says it is as long as it likes, and gives one block again and again."""

    def __init__(self, numel: int) -> None:
        super().__init__((numel,), torch.uint8)

    def write(self, use: Any) -> None:
        block = torch.zeros(1 << 24, dtype=torch.uint8)
        for begin in range(0, self.numel, block.numel()):
            use(block[: self.numel - begin])

    def freeze(self) -> None:
        pass


class _Holes:
    """A file of which only the bytes that are not zero are kept."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._at = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) < 1 << 20:
            self._file.seek(self._at)
            self._file.write(view)
        self._at += len(view)
        return len(view)

    def close(self) -> None:
        self._file.close()


@pytest.mark.slow
def test_a_record_of_5_gib(tmp_path: Path) -> None:
    sink = _Holes(tmp_path / "a.pt")
    save_archive({"huge": _Huge(5 << 30), "after": torch.arange(7)}, sink)
    sink.close()
    found = torch.load(tmp_path / "a.pt", mmap=True)
    assert found["huge"].numel() == 5 << 30
    assert found["after"].tolist() == list(range(7))


def test_views_bring_their_own_elements_only() -> None:
    base = torch.arange(1_000_000)
    stream = written({"view": base[10:13], "column": base.view(1000, 1000)[:, 3], "spread": base[5].expand(4, 2)})
    assert record_sizes(stream) == [24, 8000, 64]
    found = torch.load(stream)
    assert found["view"].tolist() == [10, 11, 12]
    assert torch.equal(found["column"], base.view(1000, 1000)[:, 3])
    assert found["spread"].tolist() == [[5, 5]] * 4


@pytest.mark.parametrize(
    "make", [lambda t: t.t(), lambda t: t[:, ::2], lambda t: t.expand(3, *t.shape), lambda t: t[1:]]
)
@pytest.mark.parametrize("size", [4, 400])
def test_other_strides_become_compact(make: Any, size: int) -> None:
    view = make(torch.arange(size * size).view(size, size))
    found = round_trip({"x": view})["x"]
    assert torch.equal(found, view)
    assert found.is_contiguous()


def test_tied_tensors_stay_tied_and_others_apart() -> None:
    weight = torch.arange(100_000.0)
    names = {
        "a": weight,
        "b": weight.detach(),
        "again": weight.view(-1),
        "half": weight[:50_000],
        "copy": weight.clone(),
    }
    stream = written({**names, "parameter": torch.nn.Parameter(weight)})
    assert sorted(record_sizes(stream)) == [200_000, 400_000, 400_000]
    found = torch.load(stream)
    for name in ("b", "again", "parameter"):
        assert found[name].data_ptr() == found["a"].data_ptr()
    found["a"].fill_(1)
    assert found["half"][3] == 3
    assert found["copy"][3] == 3


def test_conjugates_and_negatives_of_one_memory_are_not_tied() -> None:
    values = torch.randn(5, dtype=torch.complex64)
    wanted = [values, values.conj(), values.imag, values.conj().imag]
    for one, two in zip(round_trip(wanted), wanted, strict=True):
        assert same(one, two)


def test_sparse_and_meta_tensors() -> None:
    dense = torch.eye(4) * 3
    found = round_trip({"coo": dense.to_sparse(), "meta": torch.empty(3, 2, device="meta")})
    assert torch.equal(found["coo"].to_dense(), dense)
    assert found["meta"].is_meta and found["meta"].shape == (3, 2)


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_cannot_be_written_say_so() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)
    for tensor in (nested, quantised):
        with pytest.raises(ValueError, match=r"cannot be saved"):
            Archive({"x": tensor})


def test_sources_become_tensors() -> None:
    rope = Rope([torch.arange(3.0), torch.arange(2.0)])
    found = round_trip(
        {"rope": rope, "again": rope, "blank": Blank(4), "empty": Rope([]), "shaped": Rope([torch.arange(6)], (2, 3))}
    )
    assert found["rope"].tolist() == [0, 1, 2, 0, 1]
    assert found["again"].data_ptr() == found["rope"].data_ptr()
    assert found["blank"].tolist() == [0] * 4
    assert found["empty"].shape == (0,)
    assert found["shaped"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_source_that_gives_another_number_of_bytes_is_our_bug() -> None:
    class Short(Blank):
        def write(self, use: Any) -> None:
            use(torch.zeros(3))

    with pytest.raises(AssertionError, match=r"data/0 was to have 16 bytes, but its source gave 12"):
        save_archive(Short(4), io.BytesIO())


def test_frozen_content_no_longer_depends_on_its_tensors() -> None:
    large, small = torch.zeros(100_000), torch.zeros(10)
    archive = Archive({"large": large, "small": small, "count": [1]})
    archive.freeze()
    large.fill_(1)
    small.fill_(1)
    stream = io.BytesIO()
    archive.write(stream)
    stream.seek(0)
    found = torch.load(stream)
    assert not found["large"].any() and not found["small"].any()
    assert not archive.torn


def test_a_change_without_freezing_is_noticed() -> None:
    large = torch.zeros(100_000)
    for view in (large, large[1:], large.view(100, 1000)):
        archive = Archive({"x": view})
        large.add_(1)
        archive.write(io.BytesIO())
        assert archive.torn
    # Values that were copied at once, and those that do not change, are never torn.
    archive = Archive({"small": large[:10], "strided": large.view(100, 1000).t(), "x": large.clone()})
    large.add_(1)
    archive.write(io.BytesIO())
    assert not archive.torn


def test_names_of_foreign_objects() -> None:
    fine = {
        "args": argparse.Namespace(lr=1),
        "best": np.float64(3),
        "text": "x",
        "rng": np.random.RandomState(1).get_state(),
    }
    assert refused(Archive(fine).foreign_names()) == []
    foreign = {**fine, "third": fractions.Fraction(1, 3), "when": datetime.date(2020, 1, 1)}
    assert refused(Archive(foreign).foreign_names()) == ["datetime.date", "fractions.Fraction"]
    with pytest.raises(Exception, match="lambda"):
        Archive({"f": lambda: 0})


def test_the_size_is_about_that_of_the_file() -> None:
    archive = Archive({"x": torch.zeros(1000, 1000)})
    stream = io.BytesIO()
    archive.write(stream)
    assert archive.nbytes == pytest.approx(len(stream.getvalue()), abs=3000)


plain = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary(max_size=5)
)


def turned(dtype: torch.dtype, shape: list[int], seed: int, turn: bool) -> torch.Tensor:
    tensor = of(dtype, *shape, seed=seed)
    return tensor.movedim(0, -1) if turn and shape else tensor


tensors = st.builds(
    turned, st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 1000), st.booleans()
)
trees = st.recursive(
    plain | tensors,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=4)
        | st.dictionaries(st.text(max_size=4), inner, max_size=4).map(OrderedDict)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(trees, st.integers(0, 40))
def test_any_tree(tree: Any, small: int) -> None:
    """Whether tensors are copied at once or kept track of."""
    before, archive_module._SMALL_NBYTES = archive_module._SMALL_NBYTES, small
    try:
        assert_alike(round_trip(tree), tree)
    finally:
        archive_module._SMALL_NBYTES = before
