"""Where the bytes of a checkpoint come from: in tiles, frozen at any moment, exchanged between ranks."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepspeed._core.ckpt import source as source_module
from deepspeed._core.ckpt.source import Blank, Exchanged, Live, Rope, Source
from deepspeed._core.layout.reshard import reshard
from deepspeed._core.layout.spans import ShardLayout, bucketed, contiguous


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "_TILE_NBYTES", 28)  # 7 floats


def read(source: Source, after: Callable[[int], None] = lambda _: None) -> torch.Tensor:
    """All that the source gives; ``after`` is called with the number of tiles so far."""
    tiles: list[torch.Tensor] = []

    def use(tile: torch.Tensor) -> None:
        assert tile.dim() == 1
        assert tile.nbytes <= source_module._TILE_NBYTES
        tiles.append(tile.clone())

    if isinstance(source, Rope):
        with between_tiles(lambda: after(len(tiles))):
            source.write(use)
    else:
        source.write(lambda tile: (use(tile), after(len(tiles)))[0])
    return torch.cat(tiles) if tiles else torch.empty(0, dtype=source.dtype)


class between_tiles:
    """Calls something whenever a tile of a rope has been read, and nothing is locked."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def __enter__(self) -> None:
        self._drop = Live.drop

        def drop(live: Live, before: int) -> None:
            self._drop(live, before)
            self._action()

        Live.drop = drop  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        Live.drop = self._drop  # type: ignore[method-assign]


lengths = st.lists(st.integers(0, 30), min_size=1, max_size=5)


@given(lengths)
def test_a_rope_is_its_parts_in_a_row(numels: list[int]) -> None:
    whole = torch.arange(sum(numels), dtype=torch.float32)
    rope = Rope(list(whole.split(numels)))
    assert rope.shape == (len(whole),)
    assert rope.nbytes == whole.nbytes
    assert torch.equal(read(rope), whole)


def test_a_rope_of_other_things_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="cannot be"):
        Rope([torch.zeros(2), torch.zeros(2, dtype=torch.int64)])
    with pytest.raises(AssertionError, match=r"cannot be \(3,\)"):
        Rope([torch.zeros(2)], (3,))
    assert read(Rope([])).numel() == 0


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 100])
def test_blanks_are_zeros(numel: int) -> None:
    blank = Blank(numel)
    blank.freeze()
    assert torch.equal(read(blank), torch.zeros(numel))


@given(lengths, st.integers(0, 30), st.integers(0, 3))
def test_a_rope_frozen_between_any_tiles_has_the_values_of_that_moment(numels: list[int], at: int, more: int) -> None:
    whole = torch.arange(sum(numels), dtype=torch.float32)
    wanted, rope = whole.clone(), Rope(list(whole.split(numels)))

    def step(count: int) -> None:
        if count >= at:
            rope.freeze()
            whole.add_(1000)
            for _ in range(more):
                rope.freeze()  # once is enough

    step(0)
    assert torch.equal(read(rope, step), wanted)
    assert not rope.torn


@given(lengths, st.integers(0, 30))
def test_values_that_change_unfrozen_are_torn(numels: list[int], at: int) -> None:
    whole = torch.zeros(sum(numels))
    rope = Rope(list(whole.split(numels)))
    seen: list[int] = []

    def step(count: int) -> None:
        seen.append(count)
        if count == at:
            whole.add_(1)

    step(0)
    read(rope, step)
    assert rope.torn == (at < seen[-1])


def test_what_was_read_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    real = source_module.empty_flat
    monkeypatch.setattr(source_module, "empty_flat", lambda numel, dtype: (copied.append(numel), real(numel, dtype))[1])
    rope = Rope([torch.arange(20.0), torch.arange(10.0)])
    read(rope, lambda count: rope.freeze() if count == 2 else None)
    assert copied == [10, 6]  # from the end, while the beginning is still being written


def test_what_was_exchanged_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 7: with the second one given, the third is read; parts that end before its end are done with."""
    copied: list[int] = []
    real = source_module.empty_flat

    def counted(numel: int, dtype: torch.dtype) -> torch.Tensor:
        copied.append(numel)
        return real(numel, dtype)

    layout = contiguous({"a": 40}, 1)
    state = torch.arange(40.0)
    source = Exchanged(list(state.split([5, 10, 6, 9, 10])), layout, layout, None, 0)

    def freeze(count: int) -> None:
        if count == 2:
            with monkeypatch.context() as patch:
                patch.setattr(source_module, "empty_flat", counted)
                source.freeze()
            state.zero_()

    assert torch.equal(read(source, freeze), torch.arange(40.0))
    assert copied == [10, 9] and not source.torn


def test_memory_is_let_go_part_by_part() -> None:
    arrays = [np.zeros(20, dtype=np.float32) for _ in range(3)]
    alive = [weakref.ref(array) for array in arrays]
    rope = Rope([torch.from_numpy(array) for array in arrays])
    del arrays
    left: list[int] = []

    def count(_: int) -> None:
        left.append(sum(ref() is not None for ref in alive))

    read(rope, count)
    assert left == [3, 3, 2, 2, 2, 1, 1, 1, 0]


def test_reading_twice_is_our_bug() -> None:
    rope = Rope([torch.zeros(3)])
    read(rope)
    rope.freeze()
    with pytest.raises(AssertionError, match="after it was dropped"):
        read(rope)


def test_freezing_waits_for_the_tile_that_is_being_read() -> None:
    """Training in this thread, the writer in another: no tile mixes two steps."""
    for round_ in range(20):
        state = torch.zeros(7 * 200)
        rope = Rope([state])
        found: list[torch.Tensor] = []
        started = threading.Event()

        def take(tile: torch.Tensor, found: list[torch.Tensor] = found, started: threading.Event = started) -> None:
            found.append(tile.clone())
            started.set()

        thread = threading.Thread(target=rope.write, args=(take,))
        thread.start()
        started.wait()
        for step in range(round_ % 3 + 1):
            rope.freeze()
            state.fill_(step + 1)
        thread.join()
        assert not torch.cat(found).any()


# -- exchanged ---------------------------------------------------------------------------------------------------------


class Wire:
    """A process group of threads, as far as sources use one. Who waits for one that raised gives up."""

    def __init__(self, world: int) -> None:
        self.rank = threading.local()
        self.lines = {(a, b): queue.Queue[torch.Tensor]() for a in range(world) for b in range(world) if a != b}

    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> Any:
        self.lines[self.rank.value, to].put(tensors[0].clone())
        return SimpleNamespace(wait=lambda: None)

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Any:
        line, room = self.lines[source, self.rank.value], tensors[0]
        return SimpleNamespace(wait=lambda: room.copy_(line.get(timeout=20)))


def on_threads(world: int, action: Callable[[int, Any], Any]) -> list[Any]:
    """What ``action(rank, group)`` gives on each rank."""
    wire, results = Wire(world), [None] * world
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        wire.rank.value = rank
        try:
            results[rank] = action(rank, wire)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@st.composite
def exchanges(draw: Any, max_world: int = 3) -> tuple[ShardLayout, ShardLayout, list[int]]:
    """A layout of buckets, the contiguous one of the same parameters, and how a buffer of the first is cut into parts."""
    world = draw(st.integers(1, max_world))
    numels = draw(st.lists(st.integers(0, 25), min_size=1, max_size=6))
    names = {f"p{i}": numel for i, numel in enumerate(numels)}
    cuts = sorted(draw(st.sets(st.integers(1, len(numels) - 1), max_size=3))) if len(numels) > 1 else []
    buckets, sizes = [], []
    for begin, end in zip([0, *cuts], [*cuts, len(numels)], strict=True):
        entries, at = [], 0
        for name in list(names)[begin:end]:
            entries.append((name, at, names[name]))
            at += names[name] + draw(st.integers(0, 3))
        buckets.append(entries)
        sizes.append(at)
    order = draw(st.permutations(list(names)))
    held = bucketed(buckets, sizes, world)
    return held, contiguous({name: names[name] for name in order}, world), [-(-size // world) for size in sizes]


def buffers(layout: ShardLayout) -> list[torch.Tensor]:
    """Distinct numbers for all elements, NaN for padding."""
    made = [torch.full((numel,), torch.nan) for numel in layout.buffer_numels]
    for number, name in enumerate(sorted(layout.names)):
        for span in layout.of_param(name):
            made[span.rank][span.offset : span.offset_stop] = torch.arange(span.start, span.stop) + 1000.0 * (
                number + 1
            )
    return made


def expected(held: ShardLayout, wanted: ShardLayout) -> list[torch.Tensor]:
    given, made = buffers(held), [torch.zeros(numel) for numel in wanted.buffer_numels]
    for c in reshard(held, wanted):
        piece = given[c.src_rank][c.src_offset : c.src_offset + c.numel]
        made[c.dst_rank][c.dst_offset : c.dst_offset + c.numel] = piece
    return made


@given(exchanges())
def test_an_exchange_gives_every_rank_its_part(case: tuple[ShardLayout, ShardLayout, list[int]]) -> None:
    held, wanted, cuts = case

    def action(rank: int, group: Any) -> torch.Tensor:
        parts = list(buffers(held)[rank].split(cuts))
        return read(Exchanged(parts, held, wanted, group, rank))

    found = on_threads(held.world_size, action)
    for one, two in zip(found, expected(held, wanted), strict=True):
        assert torch.equal(one, two)


@given(exchanges(), st.integers(0, 5), st.integers(0, 5))
def test_an_exchange_frozen_at_any_time_has_the_values_of_the_start(
    case: tuple[ShardLayout, ShardLayout, list[int]], at: int, other: int
) -> None:
    """Each rank freezes when its own training goes on."""
    held, wanted, cuts = case

    def action(rank: int, group: Any) -> torch.Tensor:
        state = buffers(held)[rank]
        source = Exchanged(list(state.split(cuts)), held, wanted, group, rank)

        def step(count: int) -> None:
            if count >= (at if rank else other):
                source.freeze()
                state.add_(1e6)

        step(0)
        found = read(source, step)
        assert not source.torn
        return found

    found = on_threads(held.world_size, action)
    for one, two in zip(found, expected(held, wanted), strict=True):
        assert torch.equal(one, two)


def test_only_so_many_elements_are_given_but_all_ranks_exchange_alike() -> None:
    """The last rank's padding is not written; its tiles are exchanged all the same."""
    names = {"a": 9, "b": 24}
    held, wanted = bucketed([[("a", 0, 9), ("b", 9, 24)]], [33], 4), contiguous(names, 4)
    assert wanted.padding == (0, 0, 0, 3)

    def action(rank: int, group: Any) -> tuple[torch.Tensor, tuple[int, ...]]:
        numel = wanted.buffer_numels[rank] - wanted.padding[rank]
        source = Exchanged([buffers(held)[rank]], held, wanted, group, rank, numel)
        return read(source), source.shape

    found = on_threads(4, action)
    assert [shape for _, shape in found] == [(9,), (9,), (9,), (6,)]
    assert torch.equal(torch.cat([tensor for tensor, _ in found]), torch.cat(expected(held, wanted))[:33])


def test_an_exchange_lets_go_of_its_tensors() -> None:
    array = np.zeros(20, dtype=np.float32)
    alive = weakref.ref(array)
    layout = contiguous({"a": 20}, 1)
    source = Exchanged([torch.from_numpy(array)], layout, layout, None, 0)
    del array
    read(source)
    assert alive() is None


def test_changes_under_an_exchange_are_noticed() -> None:
    state, layout = torch.zeros(20), contiguous({"a": 20}, 1)
    source = Exchanged([state], layout, layout, None, 0)
    read(source, lambda _: (state.add_(1), None)[1])
    assert source.torn
