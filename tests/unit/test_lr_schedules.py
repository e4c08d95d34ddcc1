"""Schedules against closed formulas written down here once more, from the documented tables."""

from __future__ import annotations

import argparse
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed.errors import CheckpointError, ConfigError
from deepspeed.runtime import lr_schedules as schedules
from deepspeed.runtime.lr_schedules import (
    VALID_LR_SCHEDULES,
    LRRangeTest,
    OneCycle,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
    build_scheduler,
)


def make_optimizer(*lrs: float, kind=torch.optim.AdamW):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": lr} for lr in (lrs or (0.1,))]
    return kind(groups)


def run(schedule, steps: int) -> list[list[float]]:
    rates = []
    for _ in range(steps):
        schedule.step()
        written = [group["lr"] for group in schedule.optimizer.param_groups]
        assert written == schedule.get_last_lr() == schedule.get_lr()
        rates.append(written)
    return rates


def warmup_g(n: int, steps: int, kind: str) -> float:
    steps = max(2, steps)
    return n / steps if kind == "linear" else math.log(n + 1) / math.log(steps)


# ------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("staircase", [False, True])
def test_lr_range_test(staircase):
    schedule = LRRangeTest(make_optimizer(0.5, 0.5), [0.01, 0.02], 3, 2.0, staircase)
    assert schedule.get_last_lr() == [0.01, 0.02]
    for n, got in enumerate(run(schedule, 10)):
        u = (n + 1) // 3 if staircase else (n + 1) / 3
        assert got == pytest.approx([0.01 * (1 + 2 * u), 0.02 * (1 + 2 * u)])


@pytest.mark.parametrize("kind", ["log", "linear"])
@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_warmup_lr(kind, steps):
    schedule = WarmupLR(make_optimizer(), 0.01, 0.2, steps, kind)
    n_warm = max(2, steps)
    for n, got in enumerate(run(schedule, 12)):
        g = warmup_g(n, steps, kind) if n < n_warm else 1.0
        assert got == pytest.approx([0.01 + 0.19 * g])


@pytest.mark.parametrize("kind", ["log", "linear"])
def test_warmup_decay_lr(kind):
    schedule = WarmupDecayLR(make_optimizer(), 15, 0.01, 0.2, 5, kind)
    for n, got in enumerate(run(schedule, 20)):
        g = warmup_g(n, 5, kind) if n < 5 else max(0.0, (15 - n) / 10)
        assert got == pytest.approx([0.01 + 0.19 * g])
    assert got == pytest.approx([0.01])


@pytest.mark.parametrize("kind", ["log", "linear"])
def test_warmup_cosine_lr(kind):
    schedule = WarmupCosineLR(make_optimizer(0.4, 0.2), 15, 0.1, 5, 0.05, kind)
    for n, got in enumerate(run(schedule, 20)):
        if n < 5:
            q = 0.1 + 0.9 * warmup_g(n, 5, kind)
        else:
            q = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, (n - 4) / 10)))
        assert got == pytest.approx([0.4 * q, 0.2 * q])
    assert got == pytest.approx([0.4 * 0.05, 0.2 * 0.05])


@pytest.mark.parametrize(("first", "second"), [(4, None), (3, 5), (5, 2), (4, 0)])
def test_one_cycle_moves_rate_and_momentum_then_decays(first, second):
    optimizer = make_optimizer(0.5, 0.5)
    schedule = OneCycle(
        optimizer,
        0.01,
        [0.1, 0.2],
        decay_lr_rate=0.5,
        cycle_first_step_size=first,
        cycle_second_step_size=second,
        decay_step_size=2,
        cycle_min_mom=0.8,
        cycle_max_mom=0.95,
        decay_mom_rate=0.01,
    )
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.01]
    assert [g["betas"] for g in optimizer.param_groups] == [(0.8, 0.99)] * 2
    down = first if second is None else second
    for n in range(first + down + 6):
        schedule.step()
        b = n + 1
        if n < first + down:
            i = b % (first + down)
            k = i / first if i <= first else (first + down - i) / down
            lrs, beta = [0.01 + 0.09 * k, 0.01 + 0.19 * k], 0.95 - 0.15 * k
        else:
            d = (n - first - down + 1) / 2
            lrs, beta = [0.01 / (1 + 0.5 * d)] * 2, 0.95 * (1 + 0.01 * d)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(lrs)
        for group in optimizer.param_groups:
            assert group["betas"] == pytest.approx((beta, 0.99))


def test_one_cycle_without_decay_rests_at_the_ends():
    optimizer = make_optimizer()
    schedule = OneCycle(optimizer, 0.01, 0.1, decay_lr_rate=0.5, cycle_first_step_size=2, decay_mom_rate=0.5)
    assert run(schedule, 9)[4:] == [[0.01]] * 5
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)


def test_one_cycle_stairs():
    schedule = OneCycle(
        make_optimizer(), 0.0, 1.0, cycle_first_step_size=6, cycle_first_stair_count=2, cycle_second_stair_count=3
    )
    got = [rate for (rate,) in run(schedule, 12)]
    up = [math.floor(i * 2 / 6) / 2 for i in range(1, 7)]
    down = [math.floor((12 - i) * 3 / 6) / 3 for i in range(7, 12)] + [0.0]
    assert got == pytest.approx(up + down)


def test_one_cycle_leaves_an_optimizer_without_betas_alone(caplog):
    optimizer = make_optimizer(kind=torch.optim.SGD)
    schedule = OneCycle(optimizer, 0.01, 0.1)
    schedule.step()
    assert not schedule.cycle_momentum
    assert optimizer.param_groups[0]["momentum"] == 0


@given(
    total=st.integers(0, 40), warm=st.integers(0, 50), kind=st.sampled_from(["log", "linear"]), n=st.integers(0, 120)
)
@settings(max_examples=60, deadline=None)
def test_rates_stay_between_their_bounds(total, warm, kind, n):
    for schedule in (
        WarmupLR(make_optimizer(), 0.01, 0.1, warm, kind),
        WarmupDecayLR(make_optimizer(), total, 0.01, 0.1, warm, kind),
        WarmupCosineLR(make_optimizer(0.1), total, 0.1, warm, 0.1, kind),
    ):
        schedule.step(n)
        assert 0.01 - 1e-12 <= schedule.get_last_lr()[0] <= 0.1 + 1e-12


# --------------------------------------------------------------------------------------- before the first step


@pytest.mark.parametrize(
    ("name", "params", "initial"),
    [
        ("LRRangeTest", {}, 1e-3),
        ("OneCycle", {"cycle_min_lr": 0.02, "cycle_max_lr": 0.1}, 0.02),
        ("WarmupLR", {}, 0.0),
        ("WarmupLR", {"warmup_min_lr": 0.03}, 0.03),
        ("WarmupDecayLR", {"total_num_steps": 2000}, 0.0),
        ("WarmupCosineLR", {"total_num_steps": 2000, "warmup_min_ratio": 0.5}, 0.0),
    ],
)
def test_the_constructor_writes_the_initial_rate(name, params, initial):
    optimizer = make_optimizer(0.7, 0.9)
    schedule = build_scheduler(name, params, optimizer)
    assert type(schedule).__name__ == name
    assert schedule.optimizer is optimizer
    assert schedule.last_batch_iteration == -1
    assert [g["lr"] for g in optimizer.param_groups] == schedule.get_last_lr() == schedule.get_lr() == [initial] * 2


def test_warmup_to_the_groups_own_rates():
    schedule = WarmupLR(make_optimizer(0.7, 0.9), warmup_max_lr=None, warmup_num_steps=4)
    assert schedule.max_lrs == [0.7, 0.9]
    schedule.step(4)
    assert schedule.get_last_lr() == [0.7, 0.9]


def test_rates_held_in_tensors_stay_the_same_tensors():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=torch.tensor(0.1))
    held = optimizer.param_groups[0]["lr"]
    WarmupLR(optimizer, 0.0, 0.5, 2).step(2)
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == 0.5


def test_a_wrapper_with_param_groups_is_enough():
    class Wrapper:
        def __init__(self):
            self.param_groups = [{"lr": 1.0}]

    wrapper = Wrapper()
    WarmupLR(wrapper, 0.0, 0.5, 2).step(2)
    assert wrapper.param_groups[0]["lr"] == 0.5
    with pytest.raises(TypeError, match="param_groups"):
        WarmupLR(object())


# ------------------------------------------------------------------------------------------------------ resume

CONFIGS = [
    ("LRRangeTest", {"lr_range_test_step_size": 3}),
    (
        "OneCycle",
        {
            "cycle_min_lr": 0.01,
            "cycle_max_lr": 0.1,
            "cycle_first_step_size": 3,
            "decay_step_size": 2,
            "decay_lr_rate": 1.0,
        },
    ),
    ("WarmupLR", {"warmup_num_steps": 6}),
    ("WarmupDecayLR", {"warmup_num_steps": 4, "total_num_steps": 11}),
    ("WarmupCosineLR", {"warmup_num_steps": 4, "total_num_steps": 11}),
]


@pytest.mark.parametrize(("name", "params"), CONFIGS)
@pytest.mark.parametrize("at", [1, 5, 9])
def test_resume_continues_where_it_stopped(name, params, at):
    whole = build_scheduler(name, params, make_optimizer(0.3, 0.6))
    expected = run(whole, 14)
    first = build_scheduler(name, params, make_optimizer(0.3, 0.6))
    run(first, at)
    state = first.state_dict()
    assert state == {"last_batch_iteration": at - 1}
    second = build_scheduler(name, params, make_optimizer(0.3, 0.6))
    second.load_state_dict(state)
    assert second.get_last_lr() == expected[at - 1]
    assert [g["lr"] for g in second.optimizer.param_groups] == expected[at - 1]
    assert run(second, 14 - at) == expected[at:]
    third = build_scheduler(name, {**params, "last_batch_iteration": at - 1}, make_optimizer(0.3, 0.6))
    assert run(third, 14 - at) == expected[at:]
    whole.step(at)
    assert whole.get_last_lr() == expected[at]


def test_loading_another_kind_of_state_names_the_key():
    with pytest.raises(CheckpointError, match="last_batch_iteration"):
        WarmupLR(make_optimizer()).load_state_dict({"base_lrs": [1]})


# ------------------------------------------------------------------------------------------------------ errors


def test_valid_names():
    assert VALID_LR_SCHEDULES == ["LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]
    assert all(hasattr(schedules, name) for name in VALID_LR_SCHEDULES)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("warmuplr", {}, "did you mean WarmupLR"),
        ("Nonsense", {}, "is unknown. Known: LRRangeTest"),
        (None, {}, "scheduler.type None"),
        ("WarmupLR", {"warmup_steps": 3}, "scheduler.params.warmup_steps.*did you mean warmup_num_steps"),
        ("WarmupLR", {"optimizer": 3}, "scheduler.params.optimizer"),
        ("WarmupLR", {"warmup_num_steps": -1}, "warmup_num_steps must be an integer >= 0, but is -1"),
        ("WarmupLR", {"warmup_num_steps": 1.5}, "warmup_num_steps must be an integer"),
        ("WarmupLR", {"warmup_max_lr": "1e-3"}, "warmup_max_lr must be a finite number"),
        ("WarmupLR", {"warmup_max_lr": [1.0, 2.0, 3.0]}, "3 values, but the optimizer has 1"),
        ("WarmupLR", [], "scheduler.params must be a dict"),
        ("WarmupDecayLR", {}, "scheduler.params.total_num_steps is required"),
        ("WarmupDecayLR", {"total_num_steps": "auto"}, "scheduler.params.total_num_steps is required"),
        ("WarmupCosineLR", {"total_num_steps": None}, "total_num_steps must be"),
        ("OneCycle", {"cycle_min_lr": 0.1}, "scheduler.params.cycle_max_lr is required"),
        ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0, "cycle_first_step_size": 0}, "cycle_first_step_size"),
        ("LRRangeTest", {"lr_range_test_step_size": 0}, "lr_range_test_step_size must be an integer >= 1"),
    ],
)
def test_bad_settings_are_named(name, params, message):
    with pytest.raises(ConfigError, match=message):
        build_scheduler(name, params, make_optimizer())


def test_auto_leaves_the_default_and_whole_floats_count():
    schedule = build_scheduler(
        "WarmupLR", {"warmup_max_lr": "auto", "warmup_num_steps": 5.0, "warmup_min_lr": 0}, make_optimizer()
    )
    assert schedule.max_lrs == [0.001]
    assert schedule.warmup_num_steps == 5


def test_unknown_warmup_type_acts_as_log():
    odd, log = WarmupLR(make_optimizer(), warmup_type="cubic"), WarmupLR(make_optimizer())
    assert run(odd, 5) == run(log, 5)


def test_a_step_before_the_beginning_is_refused():
    with pytest.raises(ConfigError, match="last_batch_iteration"):
        WarmupLR(make_optimizer()).step(-2)


# ----------------------------------------------------------------------------------------------- command line


def test_tuning_flags_and_the_config_they_describe():
    parser = schedules.add_tuning_arguments(argparse.ArgumentParser())
    args = parser.parse_args([])
    assert (args.lr_schedule, args.cycle_momentum, args.lr_range_test_staircase) == (None, False, False)
    assert (args.warmup_num_steps, args.cycle_second_step_size, args.cos_min_ratio) == (1000, -1, 0.01)
    assert schedules.get_config_from_args(args)[0] is None
    args, others = schedules.parse_arguments(
        ["--lr_schedule", "OneCycle", "--cycle_first_step_size", "7", "--lr_range_test_staircase", "true", "--else"]
    )
    assert others == ["--else"]
    assert args.lr_range_test_staircase is True
    config, reason = schedules.get_config_from_args(args)
    assert reason is None
    assert config["type"] == "OneCycle"
    assert "cycle_second_step_size" not in config["params"]
    schedule = build_scheduler(config["type"], config["params"], make_optimizer())
    assert (schedule.first_step_size, schedule.second_step_size) == (7, 7)


def test_main_rate_of_a_config():
    get = schedules.get_lr_from_config
    assert get({"type": "WarmupLR", "params": {"warmup_max_lr": 0.5}}) == (0.5, "")
    assert get({"type": "OneCycle", "params": {"cycle_max_lr": 0.2}}) == (0.2, "")
    for config in (
        {},
        {"type": "WarmupLR"},
        {"type": "x", "params": {}},
        {"type": "WarmupLR", "params": {}},
        {"type": "WarmupCosineLR", "params": {}},
    ):
        rate, reason = get(config)
        assert rate is None
        assert reason
