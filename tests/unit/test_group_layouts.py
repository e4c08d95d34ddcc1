"""Which ranks belong together: arithmetic only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed._core.layout.groups import blocks_and_lines, fits_nodes, group_of, hpz_groups, mics_groups, node_groups


@given(st.integers(1, 12), st.integers(1, 12))
def test_blocks_and_lines_each_hold_every_rank_once(count, size):
    layout = blocks_and_lines(range(count * size), size)
    for groups in (layout.blocks, layout.lines):
        assert sorted(rank for ranks in groups for rank in ranks) == list(range(count * size))
    assert all(len(block) == size for block in layout.blocks)
    assert all(list(block) == list(range(block[0], block[0] + size)) for block in layout.blocks)
    assert all(len(line) == count for line in layout.lines)
    for rank in range(count * size):
        block, line = layout.block_of(rank), layout.line_of(rank)
        assert set(block) & set(line) == {rank}
        assert line.index(rank) * size + block.index(rank) == rank


def test_mics_and_hpz_at_world_4():
    assert mics_groups(4, 2).blocks == ((0, 1), (2, 3))
    assert mics_groups(4, 2).lines == ((0, 2), (1, 3))
    assert hpz_groups(4, 4).blocks == ((0, 1, 2, 3),)
    assert hpz_groups(4, 1).lines == ((0, 1, 2, 3),)


@pytest.mark.parametrize(("make", "key"), [(mics_groups, "mics_shard_size"), (hpz_groups, "zero_hpz_partition_size")])
def test_a_size_that_does_not_fit_names_the_key_and_those_that_do(make, key):
    for size in (4, 0, -1, 12):
        with pytest.raises(ValueError, match=rf"zero_optimization.{key} .*\[1, 2, 3, 6\], got {size}"):
            make(6, size)


@given(st.integers(1, 6), st.integers(1, 6))
def test_nodes_split_the_world(nodes, size):
    layout = node_groups([range(nodes * size)], size)
    assert layout == blocks_and_lines(range(nodes * size), size)


def test_groups_inside_a_node_are_one_block():
    layout = node_groups(mics_groups(8, 2).blocks, 4)
    assert layout is not None
    assert layout.blocks == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.lines == tuple((rank,) for rank in range(8))


def test_groups_over_several_nodes_are_cut():
    layout = node_groups(mics_groups(8, 4).blocks, 2)
    assert layout is not None
    assert layout.blocks == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.lines == ((0, 2), (1, 3), (4, 6), (5, 7))


def test_replicas_lie_on_a_node_each():
    layout = node_groups(mics_groups(8, 4).lines, 4)
    assert layout is not None
    assert layout.blocks == tuple((rank,) for rank in (0, 4, 1, 5, 2, 6, 3, 7))
    assert layout.lines == ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(
    ("groups", "node_size"),
    [
        ([range(3)], 2),  # the last node holds fewer
        ([[0, 1, 2], [3, 4, 5]], 2),  # groups begin in the middle of a node
        ([[0, 2, 1, 3]], 2),  # not node by node
        ([[]], 2),
    ],
)
def test_where_nodes_do_not_split_equally_there_is_no_hierarchy(groups, node_size):
    assert node_groups(groups, node_size) is None


def test_groups_that_do_not_follow_the_nodes_are_seen_on_every_rank():
    layout = mics_groups(4, 2)
    for rank in range(4):
        block, line = layout.block_of(rank), layout.line_of(rank)
        assert fits_nodes(range(4), rank, block, line)
        assert fits_nodes(block, rank, block, (rank,)) and fits_nodes(line, rank, (rank,), line)
        assert not fits_nodes(range(4), rank, line, block)
        assert not fits_nodes(range(4), rank, block, (rank,))
        assert not fits_nodes(range(4), rank, [], line)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="node_size=0"):
        node_groups([range(4)], 0)
    with pytest.raises(ValueError, match=r"rank 9 is in none of the groups \[\[0, 1\], \[2, 3\]\]"):
        group_of(mics_groups(4, 2).blocks, 9)
