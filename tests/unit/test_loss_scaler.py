"""The loss scalers' rules, as the documents and logs of the reference give them."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed.errors import NonFiniteGradientError
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler, make_loss_scaler


def _after(scaler, *overflows: bool) -> list[float]:
    """The scale after each step."""
    scales = []
    for overflow in overflows:
        scaler.update_scale(overflow)
        scales.append(scaler.loss_scale)
    return scales


def _fp16(**keys) -> SimpleNamespace:
    defaults = {
        "enabled": True,
        "loss_scale": 0.0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "min_loss_scale": 1.0,
        "hysteresis": 2,
        "consecutive_hysteresis": False,
        "consecutive_skip_limit": 500,
    }
    return SimpleNamespace(**{**defaults, **keys})


def test_the_config_chooses_the_scaler() -> None:
    off = make_loss_scaler(_fp16(enabled=False))
    assert isinstance(off, LossScaler) and off.loss_scale == 1.0 and not off.dynamic
    static = make_loss_scaler(_fp16(loss_scale=128.0))
    assert isinstance(static, LossScaler) and static.loss_scale == 128.0
    dynamic = make_loss_scaler(_fp16())
    assert isinstance(dynamic, DynamicLossScaler) and dynamic.loss_scale == 65536.0 and dynamic.dynamic
    assert make_loss_scaler(_fp16(initial_scale_power=4)).loss_scale == 16.0


def test_a_static_scale_never_changes() -> None:
    assert _after(LossScaler(64.0), False, True, True, False) == [64.0] * 4


def test_an_overflow_uses_up_the_hysteresis_first() -> None:
    scaler = DynamicLossScaler(init_scale=1024, delayed_shift=3)
    assert _after(scaler, True, True, True, True, True) == [1024, 1024, 512, 256, 128]
    assert scaler.cur_hysteresis == 1


def test_hysteresis_of_one_halves_at_once() -> None:
    assert _after(DynamicLossScaler(init_scale=8, delayed_shift=1), True, True) == [4, 2]


def test_clean_steps_do_not_refill_the_hysteresis() -> None:
    scaler = DynamicLossScaler(init_scale=1024, delayed_shift=2)
    assert _after(scaler, True, False, False, True) == [1024, 1024, 1024, 512]


def test_consecutive_hysteresis_is_refilled_by_a_clean_step() -> None:
    scaler = DynamicLossScaler(init_scale=1024, delayed_shift=2, consecutive_hysteresis=True)
    assert _after(scaler, True, False, True, False, True, True) == [1024, 1024, 1024, 1024, 1024, 512]


def test_the_scale_doubles_after_each_clean_window() -> None:
    scaler = DynamicLossScaler(init_scale=2, scale_window=3)
    assert _after(scaler, *[False] * 7) == [2, 2, 4, 4, 4, 8, 8]


def test_the_window_counts_from_the_last_overflow() -> None:
    scaler = DynamicLossScaler(init_scale=8, scale_window=3, delayed_shift=1)
    assert _after(scaler, False, False, True, False, False, False, False) == [8, 8, 4, 4, 4, 8, 8]


def test_growth_refills_the_hysteresis() -> None:
    scaler = DynamicLossScaler(init_scale=8, scale_window=2, delayed_shift=2)
    assert _after(scaler, True, True, False, False, True, True) == [8, 4, 4, 8, 8, 4]


def test_the_floor_holds_and_steps_go_on_being_skipped() -> None:
    scaler = DynamicLossScaler(init_scale=4, min_scale=2, delayed_shift=1)
    assert _after(scaler, *[True] * 5) == [2, 2, 2, 2, 2]


def test_too_many_skips_at_the_floor_are_an_error() -> None:
    scaler = DynamicLossScaler(init_scale=4, min_scale=1, delayed_shift=1, consecutive_skip_limit=5)
    assert _after(scaler, *[True] * 4) == [2, 1, 1, 1]
    with pytest.raises(NonFiniteGradientError, match=r"5 steps in a row.*minimum of 1 .*consecutive_skip_limit"):
        scaler.update_scale(True)


def test_one_clean_step_starts_the_count_of_skips_again() -> None:
    scaler = DynamicLossScaler(init_scale=1, delayed_shift=1, consecutive_skip_limit=2)
    assert _after(scaler, True, False, True, False, True) == [1] * 5
    with pytest.raises(NonFiniteGradientError):
        scaler.update_scale(True)


def test_skips_above_the_floor_are_no_error() -> None:
    scaler = DynamicLossScaler(init_scale=2.0**16, delayed_shift=1, consecutive_skip_limit=3)
    assert _after(scaler, *[True] * 10)[-1] == 64.0


def test_a_static_scale_gives_up_too() -> None:
    scaler = LossScaler(128.0, consecutive_skip_limit=2)
    scaler.update_scale(True)
    with pytest.raises(NonFiniteGradientError, match=r"2 steps in a row.*constant loss scale 128"):
        scaler.update_scale(True)


@pytest.mark.parametrize("make", [LossScaler, DynamicLossScaler])
def test_limit_zero_tolerates_any_number(make) -> None:
    scaler = make(1.0, consecutive_skip_limit=0)
    assert _after(scaler, *[True] * 1200)[-1] == 1.0


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 60))
def test_state_continues_where_it_was(overflows: list[bool], cut: int) -> None:
    def make() -> DynamicLossScaler:
        return DynamicLossScaler(init_scale=64, scale_window=4, delayed_shift=3, consecutive_skip_limit=0)

    whole, first = make(), make()
    expected = _after(whole, *overflows)
    _after(first, *overflows[:cut])
    second = make()
    second.load_state_dict(first.state_dict())
    assert _after(second, *overflows[cut:]) == expected[cut:]
    assert all(isinstance(value, (int, float, bool)) for value in first.state_dict().values())


@given(st.lists(st.booleans(), max_size=80))
def test_the_scale_stays_a_power_of_two_above_its_floor(overflows: list[bool]) -> None:
    scaler = DynamicLossScaler(init_scale=2.0**10, scale_window=3, min_scale=0.5, consecutive_skip_limit=0)
    for scale in _after(scaler, *overflows):
        assert scale >= 0.5 and scale.hex().split("p")[0] == "0x1.0000000000000"


def test_scalers_pickle_as_plain_objects() -> None:
    scaler = DynamicLossScaler(init_scale=32)
    scaler.update_scale(True)
    copy = pickle.loads(pickle.dumps(scaler))
    assert type(copy) is DynamicLossScaler and vars(copy) == vars(scaler)
