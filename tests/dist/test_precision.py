"""Skipped steps, 16-bit modes and autocast, on several ranks."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from deepspeed.errors import NonFiniteGradientError
from deepspeed.utils.logging import logger
from tests.helpers.dist import run_ranks
from tests.helpers.models import batches
from tests.helpers.training import BATCH, make_engine, make_model, trained

FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 3}}
MODES = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}, "fp16": FP16}


class _Log(logging.Handler):
    """What the package's logger says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> _Log:
        logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logger.removeHandler(self)


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trained(model).items()}


def _same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], value) for name, value in other.items())


def _step(engine, rank: int, seed: int = 0, poison: str | None = None, value: float = math.inf) -> None:
    """One window; ``poison`` makes an element of that parameter's gradient non-finite on the last rank only."""
    handle = None
    if poison is not None and rank == torch.distributed.get_world_size() - 1:
        param = dict(engine.module.named_parameters())[poison]

        def spoil(grad: torch.Tensor) -> torch.Tensor:
            spoiled = grad.clone()
            spoiled.view(-1)[-1] = value
            return spoiled

        handle = param.register_hook(spoil)
    for x, y in batches(rank, engine.gradient_accumulation_steps(), BATCH, seed=seed):
        engine.backward(engine(x, y))
        engine.step()
    if handle is not None:
        handle.remove()


def _skip(rank: int, world: int) -> None:
    for mode, section in MODES.items():
        for stage in (0, 1, 2):
            for value in (math.inf, math.nan):
                model = make_model("plain")
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
                schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
                config = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": 2, **section}
                engine = make_engine(model, config, optimizer, lr_scheduler=schedule)
                what = (mode, stage, value)
                _step(engine, rank)
                assert engine.was_step_applied() and engine.get_lr() == [0.05], what
                before, state = _weights(model), {k: dict(v) for k, v in optimizer.state.items()}
                moments = {k: v["momentum_buffer"].clone() for k, v in state.items()}
                with _Log() as log:
                    _step(engine, rank, 1, poison="mid.weight", value=value)
                # Every rank skips, though one only saw the bad number.
                assert _same(_weights(model), before), what
                assert all(torch.equal(optimizer.state[k]["momentum_buffer"], v) for k, v in moments.items()), what
                assert not engine.was_step_applied() and engine.overflow and engine.skipped_steps == 1, what
                assert engine.global_steps == 2 and engine.get_lr() == [0.05], what
                assert engine.global_samples == 2 * BATCH * 2 * world
                assert getattr(engine._flat, "overflow", None) is True
                said = [line for line in log.lines if "step skipped" in line and "mid.weight" in line]
                assert len(said) == (1 if rank == 0 else 0), (what, log.lines)
                assert not math.isfinite(engine.get_global_grad_norm())
                assert engine.loss_scale == (128.0 if mode == "fp16" else 1.0), what
                # And the next window trains on.
                _step(engine, rank, 2)
                assert engine.was_step_applied() and not engine.overflow and engine.get_lr() == [0.025], what
                assert not _same(_weights(model), before) and engine.skipped_steps == 1, what
                engine.destroy()


@pytest.mark.parametrize("world", [1, 3])
def test_an_overflow_on_one_rank_skips_the_step_on_all(world: int) -> None:
    run_ranks(_skip, world)


def _as_if_skipped(rank: int, world: int) -> None:
    """Training with a skipped step equals training without that step."""
    for stage in (0, 1, 2):
        results = []
        for poisoned in (True, False):
            model = make_model("tied")
            engine = make_engine(model, {"zero_optimization": {"stage": stage}, **MODES["bf16"]}, "adam")
            _step(engine, rank, 0)
            if poisoned:
                _step(engine, rank, 1, poison="inp.weight")
            _step(engine, rank, 2)
            results.append(_weights(model))
            engine.destroy()
        assert _same(*results), stage


def test_a_skipped_step_leaves_no_trace() -> None:
    run_ranks(_as_if_skipped, 2)


def _scale_follows_the_rule(rank: int, world: int) -> list[float]:
    engine = make_engine(make_model("plain"), {"zero_optimization": {"stage": 2}, **FP16})
    scales = [engine.loss_scale]
    for seed, poison in enumerate((None, None, "head.bias", "head.bias", None, None, None, None)):
        _step(engine, rank, seed, poison)
        scales.append(engine.loss_scale)
    assert engine.optimizer.cur_scale == engine.optimizer.loss_scale == scales[-1] and engine.dynamic_loss_scale()
    engine.destroy()
    return scales


def test_the_dynamic_scale_moves_on_all_ranks_alike() -> None:
    expected = [256, 256, 256, 128, 64, 64, 64, 128, 128]
    assert run_ranks(_scale_follows_the_rule, 2) == [expected, expected]


def _gives_up(rank: int, world: int) -> None:
    fp16 = {"enabled": True, "initial_scale_power": 1, "hysteresis": 1, "consecutive_skip_limit": 4}
    for section in ({"fp16": fp16}, {"fp16": {**fp16, "loss_scale": 8}}):
        engine = make_engine(make_model("plain"), {"zero_optimization": {"stage": 1}, **section})
        for seed in range(3):
            _step(engine, rank, seed, "head.bias")
        with pytest.raises(NonFiniteGradientError, match="4 steps in a row"):
            _step(engine, rank, 3, "head.bias")
        engine.destroy()


def test_endless_skipping_is_an_error_on_every_rank() -> None:
    run_ranks(_gives_up, 2)


def _bf16_unchecked(rank: int, world: int) -> None:
    for stage in (0, 1, 2):
        model = make_model("plain")
        bf16 = {"enabled": True, "check_grad_overflow": False}
        engine = make_engine(model, {"zero_optimization": {"stage": stage}, "bf16": bf16})
        _step(engine, rank, 0, "head.bias", math.nan)
        assert engine.was_step_applied() and engine.skipped_steps == 0
        assert bool(model.head.bias.isnan().any()) and bool(model.inp.weight.isfinite().all())
        engine.destroy()


def test_bf16_applies_what_comes_if_told_not_to_check() -> None:
    run_ranks(_bf16_unchecked, 2)


def _autocast(rank: int, world: int) -> None:
    for stage in (0, 1, 2):
        for dtype in (None, "bfloat16", "float16"):
            model = make_model("plain")
            section = {"enabled": True} if dtype is None else {"enabled": True, "dtype": dtype}
            engine = make_engine(model, {"zero_optimization": {"stage": stage}, "torch_autocast": section})
            expected = torch.float16 if dtype == "float16" else torch.bfloat16
            seen = []
            handle = model.mid.register_forward_hook(lambda m, a, out, s=seen: s.append(out.dtype))
            (x, y), *_ = batches(rank, 1, BATCH)
            loss = engine(x, y)
            assert seen == [expected] and not torch.is_autocast_enabled("cpu")
            with torch.autocast("cpu", dtype=expected):
                assert torch.equal(model(x, y), loss)
            engine.backward(loss)
            engine.step()
            assert engine.was_step_applied() and {p.dtype for p in model.parameters()} == {torch.float32}
            assert engine.torch_autocast_enabled()
            handle.remove()
            engine.destroy()


def test_torch_autocast_wraps_the_forward() -> None:
    run_ranks(_autocast, 2)


def _auto_cast(rank: int, world: int) -> None:
    class Takes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)
            self.register_buffer("steady", torch.ones(3, dtype=torch.float64))
            self.seen: list = []

        def forward(self, x, more, *, index):
            self.seen = [x.dtype, more["deep"][0].dtype, index.dtype]
            return self.layer(x.to(self.layer.weight.dtype)).float().sum()

    for auto_cast in (False, True):
        model = Takes()
        engine = make_engine(model, {"fp16": {"enabled": True, "auto_cast": auto_cast, "loss_scale": 2}})
        x = torch.ones(2, 3)
        loss = engine(x, {"deep": [torch.ones(1)]}, index=torch.tensor([1]))
        floats = torch.float16 if auto_cast else torch.float32
        assert model.seen == [floats, floats, torch.int64] and x.dtype == torch.float32
        assert engine.fp16_auto_cast() == auto_cast
        engine.backward(loss)
        engine.step()
        assert engine.was_step_applied()
        assert model.layer.weight.dtype == torch.float16 and model.steady.dtype == torch.float64
        engine.destroy()


def test_fp16_auto_cast_converts_floating_inputs() -> None:
    run_ranks(_auto_cast, 1)


def _data_types(rank: int, world: int) -> None:
    for config, expected in (
        ({}, (torch.float32, torch.float32)),
        (MODES["bf16"], (torch.bfloat16, torch.float32)),
        (MODES["fp16"], (torch.float16, torch.float32)),
        ({**MODES["bf16"], "data_types": {"grad_accum_dtype": "bf16"}}, (torch.bfloat16, torch.bfloat16)),
    ):
        for stage in (0, 2):
            model = make_model("frozen")
            engine = make_engine(model, {"zero_optimization": {"stage": stage}, **config})
            assert engine.get_data_types() == expected
            assert {p.dtype for p in model.parameters()} == {expected[0]}, "frozen parameters are cast as well"
            assert model.shift.dtype == torch.float32, "buffers keep their dtype"
            bucket = engine._flat.buckets[0]
            assert bucket.master.dtype == torch.float32 and bucket.grad_shard.dtype == expected[1]
            engine.destroy()


def test_dtypes_are_as_configured() -> None:
    run_ranks(_data_types, 2)


def _masters_keep_what_16_bits_lose(rank: int, world: int) -> None:
    """Updates far below a bf16 unit in the last place add up in the master and reach the weights in the end."""
    for stage in (0, 1, 2):
        model = torch.nn.Linear(4, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        engine = make_engine(model, {"zero_optimization": {"stage": stage}, **MODES["bf16"]}, optimizer)
        for step in range(8):
            engine.backward(engine(torch.ones(1, 4, dtype=torch.bfloat16)).sum())
            engine.step()
            if step == 0:
                assert torch.equal(model.weight, torch.ones_like(model.weight))
        assert torch.equal(model.weight, torch.full_like(model.weight, 0.992))
        engine.destroy()


def test_bf16_trains_fp32_masters() -> None:
    run_ranks(_masters_keep_what_16_bits_lose, 2)


def _clip_default(rank: int, world: int) -> None:
    model = make_model("plain")
    engine = make_engine(model, {}, torch.optim.SGD(model.parameters(), lr=1.0))
    assert engine.gradient_clipping() == 0.0
    for x, y in batches(rank, 1, BATCH):
        loss = engine(x * 50, y) * 100
        engine.backward(loss)
        before, grads = _weights(model), {n: p.grad.clone() for n, p in trained(model).items()}
        engine.step()
    assert engine.get_global_grad_norm() > 10
    for name, value in _weights(model).items():
        torch.testing.assert_close(value, before[name] - grads[name])
    engine.destroy()


def test_gradients_are_not_clipped_by_default() -> None:
    run_ranks(_clip_default, 1)
