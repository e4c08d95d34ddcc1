"""Hostfile, filters and world info of the launcher, with no process started."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed.errors import ConfigError
from deepspeed.launcher.resources import apply_filters, decode_world_info, parse_filter, parse_hostfile, take

POOL = {"worker-0": [0, 1, 2, 3], "worker-1": [0, 1, 2, 3]}


def test_hostfile():
    lines = ["# two machines", "", "worker-1 slots=4  # the small one", "worker-0\tslots=2"]
    assert parse_hostfile(lines) == {"worker-1": [0, 1, 2, 3], "worker-0": [0, 1]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["worker-0"], "hostfile:1: expected '<host> slots=<count>'.*'worker-0'"),
        (["", "worker-0 slots=x"], "hostfile:2"),
        (["worker-0 slots=0"], "above 0"),
        (["worker-0 slots=-1"], "above 0"),
        (["worker-0 gpus=4"], "expected"),
        (["worker-0 slots=1 fast"], "expected"),
        (["a slots=1", "a slots=2"], "hostfile:2: host 'a' is listed twice"),
        (["# nothing"], "lists no host"),
    ],
)
def test_bad_hostfile(lines, message):
    with pytest.raises(ConfigError, match=message):
        parse_hostfile(lines)


def test_filter_grammar():
    assert parse_filter("worker-0@worker-1:0,2") == {"worker-0": None, "worker-1": [0, 2]}


@pytest.mark.parametrize("text", ["", "@", "a:", "a:0,", "a:x", "a:-1", ":0", "a@a", "a:1,1", "a:0-2"])
def test_bad_filter(text):
    with pytest.raises(ConfigError, match="filter"):
        parse_filter(text)


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ("", "", POOL),
        ("worker-1:2,0", "", {"worker-1": [0, 2]}),
        ("worker-1@worker-0:1", "", {"worker-0": [1], "worker-1": [0, 1, 2, 3]}),
        ("", "worker-0:0", {"worker-0": [1, 2, 3], "worker-1": [0, 1, 2, 3]}),
        ("", "worker-0@worker-1:0,1", {"worker-1": [2, 3]}),
    ],
)
def test_filters(include, exclude, left):
    filtered = apply_filters(POOL, include, exclude)
    assert filtered == left and list(filtered) == list(left)


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("worker-0", "worker-1", "exclude each other"),
        ("worker-2", "", "no host 'worker-2'; there is worker-0, worker-1"),
        ("worker-0:4", "", "no slot 4; it has 0, 1, 2, 3"),
        ("", "worker-0:9", "no slot 9"),
        ("", "worker-0@worker-1", "leaves no slot"),
    ],
)
def test_bad_filters(include, exclude, message):
    with pytest.raises(ConfigError, match=message):
        apply_filters(POOL, include, exclude)


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 5), min_size=1), st.data())
def test_include_and_exclude_split_the_pool(counts, data):
    pool = {host: list(range(count)) for host, count in counts.items()}
    named = {host: data.draw(st.sets(st.sampled_from(slots))) for host, slots in pool.items()}
    text = "@".join(f"{host}:{','.join(map(str, slots))}" for host, slots in named.items() if slots)
    if not text or all(len(named[host]) == len(pool[host]) for host in pool):
        return  # nothing named, or everything: tested above
    kept, left = apply_filters(pool, text), apply_filters(pool, "", text)
    for host, slots in pool.items():
        assert sorted(kept.get(host, []) + left.get(host, [])) == slots


def test_take():
    assert take(POOL, 1, 2) == {"worker-0": [0, 1]}
    assert take(POOL) == POOL
    for kwargs, message in [
        ({"num_nodes": 3}, "--num_nodes 3"),
        ({"num_nodes": 0}, "--num_nodes expects"),
        ({"num_slots": 5}, "worker-0 has 4 slot"),
        ({"num_slots": -2}, "expects a number above 0, got -2"),
    ]:
        with pytest.raises(ConfigError, match=message):
            take(POOL, **kwargs)


def _encoded(value):
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


def test_world_info():
    assert decode_world_info("eyJ3b3JrZXItMCI6IFswXX0=") == {"worker-0": [0]}  # the CIFAR tutorial's example
    odd = {"h\u00ff?~": [0, 5]}
    assert decode_world_info(_encoded(odd)) == odd


@pytest.mark.parametrize("text", ["None", "!", _encoded([]), _encoded({}), _encoded({"a": [-1]}), _encoded({"a": []})])
def test_bad_world_info(text):
    with pytest.raises(ConfigError, match="--world_info expects base64"):
        decode_world_info(text)
