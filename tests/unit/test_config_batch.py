"""The batch triangle: every row of the documented table, the relation for any sizes, and messages that help."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed.errors import ConfigError
from deepspeed.runtime.batch_triangle import (
    BatchSizeError,
    BatchSizes,
    data_parallel_world_size,
    solve_batch_triangle,
)
from deepspeed.runtime.config import DeepSpeedConfig

SIZES = st.integers(1, 64)


@pytest.mark.parametrize(
    ("train", "micro", "steps", "ranks", "solved"),
    [
        (48, 4, 3, 4, (48, 4, 3)),
        (48, 4, None, 4, (48, 4, 3)),
        (48, None, 3, 4, (48, 4, 3)),
        (None, 4, 3, 4, (48, 4, 3)),
        (48, None, None, 4, (48, 12, 1)),
        (None, 4, None, 4, (16, 4, 1)),
    ],
)
def test_documented_rows(train, micro, steps, ranks, solved):
    assert solve_batch_triangle(train, micro, steps, ranks) == BatchSizes(*solved, ranks)


@given(micro=SIZES, steps=SIZES, ranks=SIZES)
def test_any_two_sizes_give_the_third(micro, steps, ranks):
    whole = BatchSizes(micro * steps * ranks, micro, steps, ranks)
    train = whole.train_batch_size
    assert solve_batch_triangle(train, micro, steps, ranks) == whole
    assert solve_batch_triangle(train, micro, None, ranks) == whole
    assert solve_batch_triangle(train, None, steps, ranks) == whole
    assert solve_batch_triangle(None, micro, steps, ranks) == whole
    assert solve_batch_triangle(micro * ranks, None, None, ranks) == (micro * ranks, micro, 1, ranks)
    assert solve_batch_triangle(None, micro, None, ranks) == (micro * ranks, micro, 1, ranks)


@given(train=st.none() | st.integers(1, 500), micro=st.none() | SIZES, steps=st.none() | SIZES, ranks=st.integers(1, 9))
def test_what_is_solved_obeys_the_relation_and_what_is_not_has_fixes_that_work(train, micro, steps, ranks):
    try:
        solved = solve_batch_triangle(train, micro, steps, ranks)
    except BatchSizeError as error:
        message = str(error)
        if train is None and micro is None:
            assert "no batch size is given" in message
            return
        fixes = [line for line in message.splitlines() if line.startswith("  - ")]
        assert fixes
        for fix in fixes:
            numbers = [int(n) for n in re.findall(r"\d+", fix.partition(",")[0])]
            for n in numbers:
                if "train_batch_size" in fix:
                    solve_batch_triangle(n, micro, steps, ranks)
                elif "micro" in fix:
                    solve_batch_triangle(train, n, steps, ranks)
                elif "accumulation" in fix:
                    solve_batch_triangle(train, micro, n, ranks)
                else:
                    solve_batch_triangle(train, micro, steps, n)
    else:
        assert min(solved) >= 1
        assert (
            solved.train_batch_size
            == solved.train_micro_batch_size_per_gpu * solved.gradient_accumulation_steps * solved.dp_world_size
        )
        for given_size, found in zip((train, micro, steps), solved, strict=False):
            assert given_size in (None, found)


def test_message_has_the_equation_the_origins_and_the_fixes():
    with pytest.raises(BatchSizeError) as caught:
        DeepSpeedConfig({"train_batch_size": 30, "train_micro_batch_size_per_gpu": 4}, world_size=2)
    assert str(caught.value).splitlines() == [
        "the batch sizes do not fit together:",
        "  train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * data-parallel ranks",
        "  30 (from the config) != 4 (from the config) * 3 (derived) * 2 (from the process groups) = 24",
        "Any one of these fits:",
        "  - train_batch_size = 24 or 32, a multiple of 8",
    ]


def test_errors_are_of_every_kind_that_callers_catch():
    for kind in (ConfigError, ValueError, AssertionError):
        with pytest.raises(kind):
            solve_batch_triangle(1, None, None, 2)


@pytest.mark.parametrize("bad", [0, -4, True, 2.5])
@pytest.mark.parametrize("place", range(4))
def test_sizes_must_be_integers_above_zero(bad, place):
    sizes = [8, 4, 2, 1]
    sizes[place] = bad
    with pytest.raises(BatchSizeError, match="must be an integer above 0"):
        solve_batch_triangle(*sizes)


def test_config_solves_when_groups_exist():
    config = DeepSpeedConfig({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 4})
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (None, 4)
    assert config.resolve_batch(3) == (12, 4, 1, 3)
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (12, 1)
    assert config.resolve_batch(5).train_batch_size == 20  # from what the user gave, not from the last answer
    assert config.set_batch(accumulation=3) == (60, 4, 3, 5)
    assert config.set_batch(micro_batch=2) == (30, 2, 3, 5)
    assert config.train_batch_size == 30


def test_set_batch_before_groups_exist_is_refused():
    with pytest.raises(ConfigError, match="resolve_batch"):
        DeepSpeedConfig({"train_batch_size": 4}).set_batch(accumulation=2)


def test_no_batch_size_at_all():
    with pytest.raises(AssertionError, match="gradient_accumulation_steps = 2 alone"):
        DeepSpeedConfig({"gradient_accumulation_steps": 2}, world_size=1)


def test_data_parallel_size():
    both = SimpleNamespace(get_data_parallel_world_size=lambda: 3)
    ulysses = SimpleNamespace(get_sequence_parallel_world_size=lambda: 4)
    assert data_parallel_world_size(None, 8) == 8
    assert data_parallel_world_size(None, 8, sequence_parallel_size=2) == 4
    assert data_parallel_world_size(both, 8) == 3
    assert data_parallel_world_size(ulysses, 8) == 2
    with pytest.raises(ConfigError, match="groups of 4"):
        data_parallel_world_size(ulysses, 6)
    with pytest.raises(ConfigError, match="get_data_parallel_world_size"):
        data_parallel_world_size(SimpleNamespace(), 6)


def test_mpu_decides_at_construction():
    mpu = SimpleNamespace(get_data_parallel_world_size=lambda: 2)
    assert DeepSpeedConfig({"train_batch_size": 8}, mpu=mpu).batch == (8, 4, 1, 2)
