"""Reading and writing what lies behind a parameter, and the gradient check."""

from __future__ import annotations

import pytest
import torch

from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)
from tests.helpers.dist import run_ranks
from tests.helpers.models import batches
from tests.helpers.training import BATCH, make_engine, make_model, trained

MODES = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 64}},
}


def _everywhere(rank: int, world: int, check, kind: str = "tied", **config) -> None:
    for mode, section in MODES.items():
        for stage in (0, 1, 2):
            for bucket_numel in (64, 10**6):
                model = make_model(kind)
                zero = {"stage": stage, "reduce_bucket_size": bucket_numel}
                optimizer = torch.optim.Adam(trained(model).values(), lr=0.01)
                engine = make_engine(model, {"zero_optimization": zero, **section, **config}, optimizer)
                try:
                    check(engine, model, rank, stage)
                except BaseException as error:
                    error.add_note(f"{mode} stage {stage} bucket {bucket_numel}")
                    raise
                engine.destroy()


def _window(engine, rank: int, seed: int = 0, step: bool = True) -> None:
    for x, y in batches(rank, engine.gradient_accumulation_steps(), BATCH, seed=seed):
        engine.backward(engine(x, y))
        if step or not engine.is_gradient_accumulation_boundary():
            engine.step()


def _whole(local: torch.Tensor, param: torch.Tensor, stage: int) -> torch.Tensor:
    """All ranks' local parts put together; in stage 0 every rank has everything."""
    parts = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, local.cpu())
    return (parts[0] if stage == 0 else torch.cat(parts)).view(param.shape)


def _reads(engine, model, rank: int, stage: int) -> None:
    params = trained(model)
    given = {n: p.detach().float() for n, p in make_model("tied").named_parameters()}
    for name, param in params.items():
        # The fp32 values that the model was built with, also where its weights are 16 bit.
        full = safe_get_full_fp32_param(param)
        assert full.dtype == torch.float32 and torch.equal(full, given[name]), name
        assert torch.equal(_whole(safe_get_local_fp32_param(param), param, stage), full)
        with pytest.raises(ValueError, match=r"exp_avg.*none yet: states are made by the first step"):
            safe_get_full_optimizer_state(param, "exp_avg")
        for read in (safe_get_full_grad, safe_get_local_grad):
            with pytest.raises(RuntimeError, match=f"no reduced gradient of {name} now"):
                read(param)
    (x, y), *_ = batches(rank, 1, BATCH)
    engine.backward(engine(x, y))
    if engine.zero_optimization_stage() < 2:
        with pytest.raises(RuntimeError, match="no reduced gradient"):  # accumulated, not reduced yet
            safe_get_full_grad(model.head.weight)
    engine.step()
    engine.backward(engine(x, y))
    grads = {}
    for name, param in params.items():
        grads[name] = safe_get_full_grad(param)
        assert grads[name].dtype == torch.float32 and grads[name].shape == param.shape
        local = safe_get_local_grad(param)
        assert local.dim() == 1
        # Stage 0 without fp32 sums shares means in 16 bit.
        torch.testing.assert_close(_whole(local, param, stage), grads[name], rtol=2.0**-8, atol=1e-6)
    assert float(grads["head.weight"].abs().sum()) > 0
    engine.step()
    with pytest.raises(RuntimeError, match="before step"):
        safe_get_full_grad(model.head.weight)
    for name, param in params.items():
        # The first Adam step from nothing: exp_avg is 0.1 of the gradient.
        moment = safe_get_full_optimizer_state(param, "exp_avg")
        torch.testing.assert_close(moment, 0.1 * grads[name], rtol=2.0**-7, atol=1e-6)
        assert torch.equal(_whole(safe_get_local_optimizer_state(param, "exp_avg"), param, stage), moment)
        assert bool((safe_get_full_optimizer_state(param, "exp_avg_sq") >= 0).all())
        with pytest.raises(ValueError, match=r"'momentum' of .* does not exist; there are: exp_avg, exp_avg_sq"):
            safe_get_full_optimizer_state(param, "momentum")
        assert torch.equal(safe_get_full_fp32_param(param).to(param.dtype), param)


@pytest.mark.parametrize("world", [1, 3])
def test_reading(world: int) -> None:
    run_ranks(_everywhere, world, _reads, gradient_accumulation_steps=2)


def _frozen(engine, model, rank: int, stage: int) -> None:
    frozen = model.mid.weight
    assert not frozen.requires_grad
    _window(engine, rank, step=False)
    for value in (
        safe_get_full_fp32_param(frozen),
        safe_get_full_grad(frozen),
        safe_get_full_optimizer_state(frozen, "exp_avg"),
        safe_get_local_fp32_param(frozen),
        safe_get_local_grad(frozen),
        safe_get_local_optimizer_state(frozen, "exp_avg"),
    ):
        assert value is None
    value = torch.zeros(frozen.shape)
    for write in (
        lambda: safe_set_full_fp32_param(frozen, value),
        lambda: safe_set_full_grad(frozen, value),
        lambda: safe_set_full_optimizer_state(frozen, value, "exp_avg"),
        lambda: safe_set_local_fp32_param(frozen, value),
        lambda: safe_set_local_grad(frozen, value),
        lambda: safe_set_local_optimizer_state(frozen, value, "exp_avg"),
    ):
        with pytest.raises(ValueError, match="this parameter is frozen"):
            write()
    foreign = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"shape \(2,\) is not trained by a live DeepSpeed engine"):
        safe_get_full_fp32_param(foreign)


def test_frozen_and_foreign_parameters() -> None:
    run_ranks(_everywhere, 2, _frozen, "frozen")


def _writes(engine, model, rank: int, stage: int) -> None:
    params = trained(model)
    generator = torch.Generator().manual_seed(1)
    _window(engine, rank)
    weight = {n: torch.randn(p.shape, generator=generator) for n, p in params.items()}
    first = {n: torch.randn(p.shape, generator=generator) for n, p in params.items()}
    second = {n: torch.rand(p.shape, generator=generator) for n, p in params.items()}
    grad = {n: torch.randn(p.shape, generator=generator).bfloat16().float() / 8 for n, p in params.items()}
    local = stage > 0 and engine.train_micro_batch_size_per_gpu() == BATCH
    _window(engine, rank, 1, step=False)
    for name, param in params.items():
        safe_set_full_fp32_param(param, weight[name])
        safe_set_full_optimizer_state(param, first[name], "exp_avg")
        safe_set_full_optimizer_state(param, second[name], "exp_avg_sq")
        safe_set_full_grad(param, grad[name])
    for name, param in params.items():
        assert torch.equal(safe_get_full_fp32_param(param), weight[name])
        assert torch.equal(param.detach(), weight[name].to(param.dtype)), "the model's weights follow at once"
        assert torch.equal(safe_get_full_optimizer_state(param, "exp_avg"), first[name])
        assert torch.equal(safe_get_full_grad(param), grad[name])
        assert torch.equal(_whole(safe_get_local_grad(param), param, stage), grad[name])
        wrong = torch.zeros(3, 3, 3)
        with pytest.raises(ValueError, match=rf"{name} has shape .* has \(3, 3, 3\)"):
            safe_set_full_fp32_param(param, wrong)
        with pytest.raises(ValueError, match=rf"{name} has shape .* has \(3, 3, 3\)"):
            safe_set_full_grad(param, wrong)
    if local:
        _write_local(params, rank)
    engine.step()
    # Adam's second step, from what was written.
    for name, param in params.items():
        factor = 2.0 if local else 1.0
        m = 0.9 * first[name] * factor + 0.1 * grad[name] * factor
        v = 0.999 * second[name] + 0.001 * (grad[name] * factor).square()
        expected = weight[name] * factor - 0.01 * (m / (1 - 0.9**2)) / ((v / (1 - 0.999**2)).sqrt() + 1e-8)
        torch.testing.assert_close(safe_get_full_fp32_param(param), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(param.detach().float(), expected, rtol=2.0**-7, atol=1e-5)


def _write_local(params: dict[str, torch.nn.Parameter], rank: int) -> None:
    """Doubles this rank's parts."""
    for name, param in params.items():
        mine = safe_get_local_fp32_param(param)
        safe_set_local_fp32_param(param, mine * 2)
        safe_set_local_optimizer_state(param, safe_get_local_optimizer_state(param, "exp_avg") * 2, "exp_avg")
        safe_set_local_grad(param, safe_get_local_grad(param) * 2)
        for write in (
            lambda v, p=param: safe_set_local_fp32_param(p, v),
            lambda v, p=param: safe_set_local_grad(p, v),
            lambda v, p=param: safe_set_local_optimizer_state(p, v, "exp_avg"),
        ):
            with pytest.raises(ValueError, match=f"owns {mine.numel()} elements of {name}; .* has {mine.numel() + 1}"):
                write(torch.zeros(mine.numel() + 1))


@pytest.mark.parametrize("world", [1, 3])
def test_what_is_written_is_what_the_step_uses(world: int) -> None:
    run_ranks(_everywhere, world, _writes)


def _local_writes_of_stage_0(rank: int, world: int) -> None:
    model = make_model("plain")
    engine = make_engine(model, {}, torch.optim.SGD(model.parameters(), lr=1.0))
    _window(engine, rank, step=False)
    before = model.head.weight.detach().clone()
    safe_set_local_grad(model.head.weight, torch.full((7 * 13,), 0.5))
    assert torch.equal(safe_get_full_grad(model.head.weight), torch.full((7, 13), 0.5))
    engine.step()
    assert torch.equal(model.head.weight.detach(), before - 0.5)
    safe_set_local_fp32_param(model.head.weight, torch.ones(7 * 13))
    assert bool((model.head.weight == 1).all())
    engine.destroy()


def test_local_writes_of_stage_0_are_whole() -> None:
    run_ranks(_local_writes_of_stage_0, 2)


def _verify(rank: int, world: int) -> None:
    for kind in ("tied", "reused", "unused_somewhere"):
        for mode, section in MODES.items():
            for stage in (0, 1, 2):
                model = make_model(kind)
                zero = {"stage": stage, "overlap_comm": True, "reduce_bucket_size": 200}
                config = {"zero_optimization": zero, "gradient_accumulation_steps": 2, "verify_gradients": 2}
                engine = make_engine(model, {**config, "prescale_gradients": kind == "tied", **section})
                check = engine._flat._check
                for seed in range(3):
                    assert bool(check._handles) == (seed < 2), "the check ends after its steps"
                    for index, (x, y) in enumerate(batches(rank, 2, BATCH, seed=seed)):
                        engine.backward(engine(x, y, (rank + index) % 2 == 0))
                        engine.step()
                    assert engine.was_step_applied(), (kind, mode, stage)
                engine.destroy()


def test_the_gradient_check_agrees_with_right_gradients() -> None:
    run_ranks(_verify, 2)


def _corrupt(rank: int, world: int) -> None:
    for stage in (0, 1, 2):
        for overlap in (False, True):
            model = make_model("plain")
            zero = {"stage": stage, "overlap_comm": overlap}
            engine = make_engine(model, {"zero_optimization": zero, "verify_gradients": 3})
            _window(engine, rank)
            transport, slot = engine._flat.transport, next(s for s in engine._flat.slots() if s.name == "mid.weight")
            reduce = transport.reduce_scatter

            def faulty(full, out, *, reduce=reduce, slot=slot, **kwargs):
                pending = reduce(full, out, **kwargs)
                pending.wait()
                _, at, numel = slot.overlap(rank)
                if numel:
                    out[at] += 0.05
                return pending

            transport.reduce_scatter = faulty
            before = model.mid.weight.detach().clone()
            with pytest.raises(AssertionError, match=r"verify_gradients: .* of mid\.weight differs"):
                _window(engine, rank, 1)
            assert torch.equal(model.mid.weight, before)
            engine.destroy()


def test_the_gradient_check_names_a_corrupted_parameter() -> None:
    run_ranks(_corrupt, 2)
