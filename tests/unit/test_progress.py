"""The progress line, phase timers and memory report."""

from __future__ import annotations

import logging

import pytest

from deepspeed.runtime.config import parse_document
from deepspeed.runtime.progress import Progress
from deepspeed.utils.logging import logger


@pytest.fixture
def lines():
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield said
    logger.setLevel(level)
    logger.removeHandler(handler)


def run(config, steps=4):
    progress = Progress(parse_document(config)[0])
    for step in range(1, steps + 1):
        for name in ("forward", "backward"):
            with progress.phase(name):
                pass
        progress.after_step(step, 0, [0.1], [(0.9, 0.999)], 8)


def test_a_line_every_so_many_steps(lines):
    run({"steps_per_print": 2})
    assert [line.split(",")[0] for line in lines] == ["step=2", "step=4"]
    assert all("lr=[0.1]" in line and "samples/s=" in line for line in lines)


@pytest.mark.parametrize("never", [0, None, float("inf")])
def test_silence_when_asked_for(lines, never):
    run({"steps_per_print": never})
    assert not lines


def test_throughput_may_be_left_out(lines):
    run({"steps_per_print": 4, "timers": {"throughput": {"enabled": False}}})
    assert len(lines) == 1 and "samples/s" not in lines[0]


def test_phases_are_timed_when_asked_for(lines):
    run({"steps_per_print": 4, "wall_clock_breakdown": True})
    assert lines[1].startswith("time (ms) a step | forward: ") and "backward: " in lines[1]


def test_memory_is_reported_after_each_phase(lines):
    run({"steps_per_print": 4, "memory_breakdown": True}, steps=1)
    assert [line.split(" |")[0] for line in lines] == ["after forward", "after backward"]
