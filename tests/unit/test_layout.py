"""Shard layouts and resharding: arithmetic only, no process, no tensor."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed._core.layout.reshard import Copy, reshard
from deepspeed._core.layout.spans import (
    ShardLayout,
    Span,
    bucketed,
    contiguous,
    numels_of,
    per_param,
    replicated,
)

PAD = -1
FIXTURE = {
    "embed.weight": 888,
    "up.weight": 1224,
    "up.bias": 51,
    "down.weight": 1224,
    "down.bias": 24,
    "norm.weight": 24,
    "norm.bias": 24,
}


def buffers_of(layout: ShardLayout) -> list[list[object]]:
    """Each rank's buffer, an element being (name, index) or PAD."""
    rows: list[list[object]] = [[PAD] * numel for numel in layout.buffer_numels]
    for span in layout.spans:
        for i in range(span.numel):
            rows[span.rank][span.offset + i] = (span.name, span.start + i)
    return rows


def run(copies: list[Copy], source: list[list[object]], dst: ShardLayout) -> list[list[object]]:
    rows: list[list[object]] = [[PAD] * numel for numel in dst.buffer_numels]
    for c in copies:
        for i in range(c.numel):
            assert rows[c.dst_rank][c.dst_offset + i] == PAD, "an element is written twice"
            rows[c.dst_rank][c.dst_offset + i] = source[c.src_rank][c.src_offset + i]
    return rows


def make_buckets(
    numels: dict[str, int], per_bucket: int, align: int
) -> tuple[list[list[tuple[str, int, int]]], list[int]]:
    buckets: list[list[tuple[str, int, int]]] = []
    sizes: list[int] = []
    for i, (name, numel) in enumerate(numels.items()):
        if i % per_bucket == 0:
            buckets.append([])
            sizes.append(0)
        start = -(-sizes[-1] // align) * align
        buckets[-1].append((name, start, numel))
        sizes[-1] = start + numel
    return buckets, sizes


@st.composite
def layouts(draw: st.DrawFn, numels: dict[str, int]) -> ShardLayout:
    world = draw(st.integers(1, 7))
    kind = draw(st.sampled_from(["contiguous", "per_param", "bucketed", "replicated", "arbitrary"]))
    if kind == "contiguous":
        return contiguous(numels, world, align=draw(st.integers(1, 4)))
    if kind == "per_param":
        return per_param(numels, world)
    if kind == "replicated":
        return replicated(numels, world)
    if kind == "bucketed":
        return bucketed(*make_buckets(numels, draw(st.integers(1, 3)), draw(st.integers(1, 4))), world)
    ends = [0] * world
    spans = []
    for name, numel in numels.items():
        cuts = sorted({0, numel, *draw(st.lists(st.integers(0, numel), max_size=3))}) if numel else [0, 0]
        for a, b in pairwise(cuts):
            rank = draw(st.integers(0, world - 1))
            offset = ends[rank] + draw(st.integers(0, 2))
            spans.append(Span(name, a, rank, offset, b - a))
            ends[rank] = offset + b - a
    return ShardLayout(world, tuple(ends), tuple(spans))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[dict[str, int], ShardLayout, ShardLayout]:
    sizes = draw(st.lists(st.integers(0, 23), min_size=0, max_size=6))
    numels = {f"p{i}": n for i, n in enumerate(sizes)}
    return numels, draw(layouts(numels)), draw(layouts(numels))


@settings(max_examples=300, deadline=None)
@given(pairs())
def test_any_layout_to_any_layout_and_back_is_identity(pair: tuple[dict[str, int], ShardLayout, ShardLayout]) -> None:
    _, a, b = pair
    there = run(reshard(a, b), buffers_of(a), b)
    assert there == buffers_of(b)
    assert run(reshard(b, a), there, a) == buffers_of(a)


@settings(max_examples=150, deadline=None)
@given(pairs())
def test_one_rank_sees_its_part_of_the_whole_plan(pair: tuple[dict[str, int], ShardLayout, ShardLayout]) -> None:
    _, a, b = pair
    whole = reshard(a, b)
    assert [c for rank in range(b.world_size) for c in reshard(a, b, rank)] == whole
    assert whole == sorted(whole, key=lambda c: (c.dst_rank, c.dst_offset))


@settings(max_examples=150, deadline=None)
@given(pairs())
def test_queries_agree_with_the_elements(pair: tuple[dict[str, int], ShardLayout, ShardLayout]) -> None:
    numels, a, _ = pair
    assert set(a.names) == set(numels)
    for name, numel in numels.items():
        assert a.numel_of(name) == numel
        assert a.gaps(name) == ()
    assert a.padding == tuple(row.count(PAD) for row in buffers_of(a))
    assert sorted(s for r in range(a.world_size) for s in a.of_rank(r)) == sorted(a.spans)


def test_contiguous_cuts_the_group_in_equal_pieces_with_padding_at_the_end() -> None:
    layout = contiguous(FIXTURE, 2)
    assert layout.buffer_numels == (1730, 1730)
    assert layout.padding == (0, 1)
    assert [(s.name, s.offset, s.numel) for s in layout.of_rank(0)] == [
        ("embed.weight", 0, 888),
        ("up.weight", 888, 842),
    ]
    assert layout.of_rank(1)[0] == Span("up.weight", 842, 1, 0, 382)
    assert layout.of_rank(1)[-1] == Span("norm.bias", 0, 1, 1705, 24)


def test_contiguous_alignment_counts_elements_of_a_piece() -> None:
    layout = contiguous({"a": 9}, 2, align=4)
    assert layout.buffer_numels == (8, 8)
    assert layout.spans == (Span("a", 0, 0, 0, 8), Span("a", 8, 1, 0, 1))


def test_per_param_pads_every_parameter() -> None:
    layout = per_param(FIXTURE, 2)
    assert layout.buffer_numels == (1730, 1730)
    assert layout.of_param("up.bias") == (Span("up.bias", 0, 0, 1056, 26), Span("up.bias", 26, 1, 1056, 25))
    assert per_param({"a": 2, "b": 1}, 3).padding == (0, 1, 2)


def test_bucketed_slices_every_bucket() -> None:
    layout = bucketed([[("a", 0, 3), ("b", 4, 3)], [("c", 0, 5)]], [8, 5], 2)
    assert layout.buffer_numels == (7, 7)
    assert layout.spans == (
        Span("a", 0, 0, 0, 3),
        Span("c", 0, 0, 4, 3),
        Span("b", 0, 1, 0, 3),
        Span("c", 3, 1, 4, 2),
    )
    assert layout.padding == (1, 2)


def test_one_bucket_is_the_file_format() -> None:
    entries, begin = [], 0
    for name, numel in FIXTURE.items():
        entries.append((name, begin, numel))
        begin += numel
    assert bucketed([entries], [begin], 3) == contiguous(FIXTURE, 3)


def test_copies_stay_on_the_rank_where_they_can() -> None:
    copies = reshard(replicated({"a": 10}, 3), contiguous({"a": 10}, 3))
    assert copies == [Copy("a", 0, 0, 0, 0, 4), Copy("a", 1, 4, 1, 0, 4), Copy("a", 2, 8, 2, 0, 2)]


def test_a_missing_source_rank_is_filled_from_the_lowest_holder() -> None:
    copies = reshard(replicated({"a": 4}, 2), replicated({"a": 4}, 3), rank=2)
    assert copies == [Copy("a", 0, 0, 2, 0, 4)]


def test_adjacent_copies_are_merged() -> None:
    src = ShardLayout(1, (6,), (Span("a", 0, 0, 0, 2), Span("a", 2, 0, 2, 4)))
    assert reshard(src, contiguous({"a": 6}, 1)) == [Copy("a", 0, 0, 0, 0, 6)]


def test_own_part_first_then_the_others_around_it() -> None:
    src = ShardLayout(2, (9, 3), (Span("a", 0, 0, 0, 9), Span("a", 3, 1, 0, 3)))
    dst = ShardLayout(2, (0, 9), (Span("a", 0, 1, 0, 9),))
    assert reshard(src, dst) == [Copy("a", 0, 0, 1, 0, 3), Copy("a", 1, 0, 1, 3, 3), Copy("a", 0, 6, 1, 6, 3)]


def test_an_element_that_nobody_holds_is_an_error_with_its_name() -> None:
    src = ShardLayout(1, (4,), (Span("a", 0, 0, 0, 2), Span("a", 4, 0, 2, 2)))
    assert src.gaps("a") == ((2, 4),)
    with pytest.raises(ValueError, match=r"'a'.*element 2"):
        reshard(src, contiguous({"a": 6}, 2))
    with pytest.raises(ValueError, match=r"no parameter 'b'.*'a'"):
        reshard(src, contiguous({"b": 1}, 1))


def test_a_large_reshard_is_not_quadratic() -> None:
    """4000 parameters, 8 -> 6 ranks: at most one copy more than there are cuts."""
    numels = {f"p{i}": 100 + i % 7 for i in range(4000)}
    copies = reshard(contiguous(numels, 8), contiguous(numels, 6))
    assert sum(c.numel for c in copies) == sum(numels.values())
    assert len(copies) <= len(numels) + 7 + 5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ShardLayout(0, (), ()), "at least 1"),
        (lambda: ShardLayout(2, (1,), ()), "expected 2 buffer sizes"),
        (lambda: ShardLayout(1, (4,), (Span("a", 0, 1, 0, 1),)), "'a': rank 1"),
        (lambda: ShardLayout(1, (4,), (Span("a", 0, 0, 2, 3),)), "outside the 4 elements"),
        (lambda: ShardLayout(1, (4,), (Span("a", 0, 0, 0, 3), Span("b", 0, 0, 2, 2))), "'b' and 'a' overlap"),
        (lambda: contiguous({"a": -1}, 1), "'a': expected"),
        (lambda: contiguous({"a": 1}, 0), "at least 1"),
        (lambda: contiguous({"a": 1}, 1, align=0), "align"),
        (lambda: bucketed([[("a", 0, 1)], [("a", 0, 1)]], [1, 1], 1), "'a' is in the buckets twice"),
        (lambda: bucketed([[("a", 3, 2)]], [4], 1), "outside bucket 0"),
        (lambda: bucketed([[]], [], 1), "one size for each of 1"),
        (lambda: contiguous({"a": 1}, 1).of_rank(1), "rank 1"),
    ],
)
def test_bad_layouts_say_what_is_wrong(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]


def test_numels_of_shapes() -> None:
    assert numels_of({"w": (3, 4), "s": (), "z": (0, 5)}) == {"w": 12, "s": 1, "z": 0}
