"""What happens around the good path: exceptions, several engines, destroy, calls in the wrong order."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch

import deepspeed
from deepspeed.errors import ConfigError
from deepspeed.utils import safe_get_full_grad
from deepspeed.utils.logging import logger
from tests.helpers.dist import run_ranks
from tests.helpers.models import batches
from tests.helpers.training import BATCH, make_engine, make_model, trained


class Boom(RuntimeError):
    pass


class _Fails(torch.autograd.Function):
    """Raises in backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise Boom("in backward")


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trained(model).items()}


def _good_window(engine, rank: int, accumulation: int, seed: int) -> None:
    for x, y in batches(rank, accumulation, BATCH, seed=seed):
        engine.backward(engine(x, y))
        engine.step()


def _fail(engine, model, rank: int, where: str, accumulation: int) -> None:
    """One whole micro-batch (if the window has several), then one that fails."""
    data = batches(rank, accumulation, BATCH, seed=99)
    for x, y in data[:-1]:
        engine.backward(engine(x, y))
        engine.step()
    x, y = data[-1]
    hooked = model.back if where == "forward" else model.inp

    def fail(module, args, output):
        if where == "forward":
            raise Boom("in forward")
        return _Fails.apply(output)

    handle = hooked.register_forward_hook(fail)
    try:
        with pytest.raises(Boom):
            engine.backward(engine(x, y))
    finally:
        handle.remove()
    if where == "forward":
        engine.zero_grad()  # a failed forward leaves the window as it was; the caller gives it up here
        engine.micro_steps = 0


def _exceptions(rank: int, world: int) -> None:
    for stage in (0, 1, 2):
        for keys in ({}, {"overlap_comm": True, "reduce_bucket_size": 64}):
            for precision in ({}, {"bf16": {"enabled": True}}):
                for accumulation in (1, 3) if not precision else (3,):
                    results = []
                    for where in (None, "forward", "backward"):
                        model = make_model("tied")
                        zero = {"stage": stage, **keys}
                        config = {"zero_optimization": zero, "gradient_accumulation_steps": accumulation, **precision}
                        engine = make_engine(model, {**config, "verify_gradients": 9}, "adam")
                        if where is not None:
                            before = _weights(model)
                            _fail(engine, model, rank, where, accumulation)
                            assert all(torch.equal(v, before[n]) for n, v in _weights(model).items())
                        for seed in (0, 1):
                            _good_window(engine, rank, accumulation, seed)
                        assert engine.was_step_applied() and engine.global_steps == 2
                        results.append(_weights(model))
                        engine.destroy()
                    for other in results[1:]:
                        for name, value in results[0].items():
                            assert torch.equal(other[name], value), (stage, keys, accumulation, name)


def test_a_good_window_after_an_exception_is_as_if_nothing_had_happened() -> None:
    run_ranks(_exceptions, 2)


def _two_engines(rank: int, world: int) -> None:
    def alone(kind: str, config: dict) -> dict[str, torch.Tensor]:
        model = make_model(kind)
        engine = make_engine(model, config, "adam")
        for seed in range(2):
            _good_window(engine, rank, 2, seed)
        engine.destroy()
        return _weights(model)

    one = {"zero_optimization": {"stage": 2, "overlap_comm": True}, "gradient_accumulation_steps": 2}
    two = {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 2, "bf16": {"enabled": True}}
    expected = alone("plain", one), alone("tied", two)
    models = make_model("plain"), make_model("tied")
    engines = make_engine(models[0], one, "adam"), make_engine(models[1], two, "adam")
    for seed in range(2):
        for first, second in zip(batches(rank, 2, BATCH, seed=seed), batches(rank, 2, BATCH, seed=seed), strict=True):
            losses = engines[0](*first), engines[1](*second)
            engines[1].backward(losses[1])
            engines[0].backward(losses[0])
            for engine in engines:
                engine.step()
    for model, weights in zip(models, expected, strict=True):
        for name, value in _weights(model).items():
            assert torch.equal(value, weights[name]), name
    engines[0].destroy()
    _good_window(engines[1], rank, 2, 5)
    assert engines[1].was_step_applied()
    engines[1].destroy()


def test_two_engines_do_not_disturb_each_other() -> None:
    run_ranks(_two_engines, 2)


def _same_module(rank: int, world: int) -> None:
    for first_stage, second_stage in ((1, 2), (0, 1), (2, 0)):
        model = make_model("plain")
        (x, y), *_ = batches(rank, 1, BATCH)
        first = make_engine(model, {"zero_optimization": {"stage": first_stage}}, "adam")
        _good_window(first, rank, 1, 0)
        first.backward(first(x, y))  # a window left open must not leak into the second engine
        handed_over = _weights(model)
        second = make_engine(model, {"zero_optimization": {"stage": second_stage}}, "adam")
        assert all(torch.equal(v, handed_over[n]) for n, v in _weights(model).items())
        _good_window(second, rank, 1, 1)
        with pytest.raises(RuntimeError, match=r"later deepspeed\.initialize took over"):
            first.backward(second(x, y))
        with pytest.raises(RuntimeError, match=r"later deepspeed\.initialize took over"):
            first.step()
        # As a fresh engine from the same weights.
        other = make_model("plain")
        other.load_state_dict(handed_over, strict=False)
        fresh = make_engine(other, {"zero_optimization": {"stage": second_stage}}, "adam")
        _good_window(fresh, rank, 1, 1)
        for name, value in _weights(model).items():
            assert torch.equal(value, _weights(other)[name]), name
        first.destroy()  # must not take the second engine's parameters away
        _good_window(second, rank, 1, 2)
        assert second.was_step_applied() and safe_get_full_grad is not None
        second.destroy()
        fresh.destroy()


def test_the_later_engine_over_a_module_takes_over() -> None:
    run_ranks(_same_module, 2)


def _same_optimizer(rank: int, world: int) -> None:
    for stage in (0, 1):
        model = make_model("plain")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        names = [id(p) for p in optimizer.param_groups[0]["params"]]
        first = make_engine(model, {"zero_optimization": {"stage": stage}}, optimizer)
        _good_window(first, rank, 1, 0)
        second = make_engine(model, {"zero_optimization": {"stage": stage}}, optimizer)
        before = _weights(model)
        _good_window(second, rank, 1, 1)
        assert any(not torch.equal(v, before[n]) for n, v in _weights(model).items() if v.numel())
        second.destroy()
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == names and not optimizer.state


def test_an_optimizer_can_be_given_again() -> None:
    run_ranks(_same_optimizer, 2)


def _evaluation_engine_first(rank: int, world: int) -> None:
    """Evaluate, then train, on one module: the first engine has no optimizer."""
    model = make_model("plain")
    (x, y), *_ = batches(rank, 1, BATCH)
    config = {"train_micro_batch_size_per_gpu": BATCH}
    evaluation, optimizer, loader, scheduler = deepspeed.initialize(model=model, config=config)
    assert optimizer is None and loader is None and scheduler is None and evaluation.optimizer is None
    with torch.no_grad():
        loss = evaluation(x, y)
    for call in (lambda: evaluation.backward(loss), evaluation.step):
        with pytest.raises(RuntimeError, match="needs an optimizer"):
            call()
    assert evaluation.get_lr() == [] and evaluation.get_global_grad_norm() is None
    evaluation.zero_grad()
    training = make_engine(model, {})
    assert torch.equal(training(x, y).detach(), loss)
    _good_window(training, rank, 1, 0)
    assert training.was_step_applied()
    assert float(evaluation(x, y).detach()) == float(training(x, y).detach()) != float(loss)
    evaluation.destroy()
    evaluation.destroy()
    training.destroy()


def test_an_engine_without_optimizer_evaluates() -> None:
    run_ranks(_evaluation_engine_first, 2)


def _destroy(rank: int, world: int) -> None:
    for stage in (0, 1, 2):
        for overlap in (False, True):
            model = make_model("tied")
            hooks = {n: len(p._post_accumulate_grad_hooks or {}) for n, p in trained(model).items()}
            zero = {"stage": stage, "reduce_bucket_size": 64, "overlap_comm": overlap}
            config = {"zero_optimization": zero, "gradient_accumulation_steps": 2, "verify_gradients": 100}
            engine = make_engine(model, config, "adam")
            _good_window(engine, rank, 2, 0)
            (x, y), *_ = batches(rank, 1, BATCH)
            engine.backward(engine(x, y))  # leave accumulated gradients behind
            held = [b.grad_full for b in engine._flat.buckets] + [b.grad_shard for b in engine._flat.buckets]
            storages = [weakref.ref(t.untyped_storage()) for t in [*held, *engine._flat.reducer._pool] if t is not None]
            assert len(storages) > 3
            weights = _weights(model)
            engine.destroy()
            engine.destroy()
            del held
            gc.collect()
            assert not any(storage() is not None for storage in storages), (stage, overlap)
            for name, param in trained(model).items():
                assert len(param._post_accumulate_grad_hooks or {}) == hooks[name] == 0
                assert not param._backward_hooks and param.grad is None
                assert torch.equal(param.detach(), weights[name])
            # An ordinary module again.
            loss = model(x, y)
            loss.backward()
            assert model.head.weight.grad is not None
            with pytest.raises(RuntimeError, match="destroyed"):
                engine.step()
            with pytest.raises(ValueError, match="not trained by a live DeepSpeed engine"):
                safe_get_full_grad(model.head.weight)


def test_destroy_frees_gradients_and_hooks() -> None:
    run_ranks(_destroy, 2)


def _forgotten(rank: int, world: int) -> None:
    """An engine that is dropped without destroy is collected, and its hooks do nothing any more."""
    for stage in (0, 2):
        model = make_model("plain")
        engine = make_engine(model, {"zero_optimization": {"stage": stage}})
        _good_window(engine, rank, 1, 0)
        flat = weakref.ref(engine._flat)
        del engine
        gc.collect()
        assert flat() is None
        (x, y), *_ = batches(rank, 1, BATCH)
        model(x, y).backward()
        assert model.head.weight.grad is not None and float(model.head.weight.grad.abs().sum()) > 0


def test_a_forgotten_engine_is_collected() -> None:
    run_ranks(_forgotten, 1)


def _wrong_order(rank: int, world: int) -> None:
    (x, y), *_ = batches(rank, 1, BATCH)
    for stage in (0, 1, 2):
        model = make_model("plain")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        engine = make_engine(model, {"zero_optimization": {"stage": stage}}, optimizer, lr_scheduler=schedule)
        before = _weights(model)
        engine.step()
        assert not engine.was_step_applied() and engine.get_lr() == [0.1] and engine.skipped_steps == 0
        assert all(torch.equal(v, before[n]) for n, v in _weights(model).items())
        with torch.no_grad():
            loss = engine(x, y)
        with pytest.raises(ValueError, match="no_grad"):
            engine.backward(loss)
        with pytest.raises(ValueError, match="not float"):
            engine.backward(1.0)
        engine.backward(engine(x, y))
        engine.step()
        assert engine.was_step_applied() and engine.get_lr() == [0.05]
        # zero_grad gives the window up.
        before = _weights(model)
        engine.backward(engine(x, y))
        engine.zero_grad()
        engine.step()
        assert not engine.was_step_applied()
        assert all(torch.equal(v, before[n]) for n, v in _weights(model).items())
        with pytest.raises(RuntimeError, match="pipeline engine"):
            engine.train_batch()
        with pytest.raises(RuntimeError, match="closures"):
            raise RuntimeError("closures") if stage == 0 else _closure(engine)
        engine.destroy()


def _closure(engine) -> Exception:
    try:
        engine.optimizer.step(lambda: None)
    except ValueError as error:
        return RuntimeError(str(error))
    raise AssertionError("a closure was accepted")


def test_calls_in_the_wrong_order_change_nothing() -> None:
    run_ranks(_wrong_order, 2)


def _replaced(rank: int, world: int) -> None:
    (x, y), *_ = batches(rank, 1, BATCH)
    for stage in (0, 1, 2):
        for spoil in (lambda m: m.double(), lambda m: setattr(m.head.weight, "data", torch.zeros(7, 13))):
            model = make_model("plain")
            engine = make_engine(model, {"zero_optimization": {"stage": stage}})
            spoil(engine.module)
            x, y = x.to(model.inp.weight.dtype), y
            with pytest.raises(RuntimeError, match=r"was replaced after deepspeed\.initialize"):
                engine.backward(engine(x, y))
            engine.destroy()


def test_weights_that_were_replaced_are_noticed() -> None:
    run_ranks(_replaced, 1)


def _bad_models(rank: int, world: int) -> None:
    with pytest.raises(ConfigError, match=r"torch\.nn\.Module"):
        deepspeed.initialize(model=[1], config={"train_batch_size": 1})
    with torch.device("meta"):
        meta = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"parameter weight is torch\.float32 on meta"):
        make_engine(meta, {})
    complex_model = torch.nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match="complex64"):
        make_engine(complex_model, {})


def test_models_that_cannot_be_trained_are_refused() -> None:
    run_ranks(_bad_models, 1)


def _state_of_before(rank: int, world: int) -> None:
    """An optimizer that was used before, or that makes state in its constructor, keeps that state."""
    data = batches(0, 4, BATCH)  # the same on all ranks
    makers = {
        "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1, initial_accumulator_value=0.5),
        "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
        "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, eps=1e-4),
    }
    for name, make in makers.items():
        for stage in (0, 1, 2):
            for precision in ({}, {"bf16": {"enabled": True}}):
                model, reference = make_model("plain"), make_model("plain")
                optimizer, expected = make(trained(model).values()), make(trained(reference).values())
                for m, o in ((model, optimizer), (reference, expected)):
                    for x, y in data[:2]:
                        m(x, y).backward()
                        m.empty.grad = torch.zeros_like(m.empty)
                        o.step()
                        o.zero_grad()
                engine = make_engine(model, {"zero_optimization": {"stage": stage}, **precision}, optimizer)
                for x, y in data[2:]:
                    engine.backward(engine(x, y))
                    engine.step()
                    reference(x, y).backward()
                    expected.step()
                    expected.zero_grad()
                limit = 2e-6 if not precision else 2.0**-6
                for key, value in trained(reference).items():
                    got = trained(model)[key].detach().float()
                    torch.testing.assert_close(got, value.detach(), rtol=limit, atol=limit, msg=f"{name} {stage} {key}")
                engine.destroy()


def test_state_that_the_optimizer_has_is_carried_over() -> None:
    run_ranks(_state_of_before, 2)


def _differing_state(rank: int, world: int) -> None:
    model = make_model("plain")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    optimizer.step()
    with pytest.raises(ValueError, match=r"already has state.*head\.weight differs"):
        make_engine(model, {"zero_optimization": {"stage": 1}}, optimizer)


def test_state_of_some_parameters_only_is_refused() -> None:
    run_ranks(_differing_state, 1)


def _schedule_warning(rank: int, world: int) -> list[str]:
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for optimizer_class in (torch.optim.SGD, deepspeed.ops.adam.DeepSpeedCPUAdam):
            for stage in (0, 1):
                model = make_model("plain")
                optimizer = optimizer_class(model.parameters(), lr=0.1)
                schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
                engine = make_engine(model, {"zero_optimization": {"stage": stage}}, optimizer, lr_scheduler=schedule)
                _good_window(engine, rank, 1, 0)
                assert engine.get_lr() == [0.05]
                engine.destroy()
    return [str(w.message) for w in caught if "lr_scheduler" in str(w.message)]


def test_torch_schedulers_do_not_complain_about_the_order() -> None:
    assert run_ranks(_schedule_warning, 1) == [[]]


def test_logger_is_the_public_one() -> None:
    assert isinstance(logger, logging.Logger) and deepspeed.logger is logger
