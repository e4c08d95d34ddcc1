"""Engines at stage 3: two of them, one after the other, compiled ones; reading and writing the state behind a parameter."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deepspeed
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
from tests.helpers import preload
from tests.helpers.dist import run_ranks
from tests.helpers.zero3 import (
    LR,
    RELEASED,
    Block,
    Stack,
    assert_at_rest,
    assert_same,
    built,
    coordinator,
    data,
    engine_for,
    engine_of,
    plain_training,
    trains_as_plain,
    whole,
)

assert preload.torch is torch  # the compiler is imported once, before ranks are forked


def _steps(engine, rank: int, steps) -> None:
    for step in steps:
        engine.backward(engine(data(rank, step)))
        engine.step()


def _two_engines(rank: int, world: int) -> None:
    """Their forwards and backwards interleave; one is destroyed, the other goes on."""
    expected = plain_training(Stack, lambda m, x: m(x), world, 4)
    one, two = engine_of(built(Stack)), engine_of(built(Stack), {"stage3_max_reuse_distance": 10**6})
    for step in range(2):
        losses = one(data(rank, step)), two(data(rank, step))
        two.backward(losses[1])
        one.backward(losses[0])
        one.step()
        two.step()
    one.destroy()
    _steps(two, rank, (2, 3))
    assert_same(whole(two.module), expected)
    assert_same(whole(one.module), plain_training(Stack, lambda m, x: m(x), world, 2))
    two.destroy()
    two.destroy()
    with pytest.raises(RuntimeError, match="destroyed"):
        two.backward(two.module(data(rank, 0)) + torch.zeros(1, requires_grad=True).sum())


def test_two_engines() -> None:
    run_ranks(_two_engines, 2)


def _one_after_the_other(rank: int, world: int) -> None:
    """A module goes from engine to engine, of stage 3 and of others."""
    expected = plain_training(Stack, lambda m, x: m(x), world, 4)
    for stages in ((3, 3), (3, 2), (2, 3), (3, 0)):
        model = built(Stack)
        first = engine_of(model, {"stage": stages[0]})
        _steps(first, rank, (0, 1))
        first.backward(first(data(rank, 9)))  # an open window is nobody's any more
        second = engine_of(model, {"stage": stages[1]})
        with pytest.raises(RuntimeError, match=r"later deepspeed\.initialize took over"):
            first.step()
        _steps(second, rank, (2, 3))
        if stages[1] == 3:
            assert_at_rest(second)
        else:
            assert not any(hasattr(p, "ds_id") for p in model.parameters())
        assert_same(whole(model), expected, str(stages))
        second.destroy()
        with torch.no_grad():  # hooks are gone: the module is an ordinary one again, or released for good
            assert model(data(rank, 0)).isnan() == (stages[1] == 3)


def test_one_engine_after_the_other() -> None:
    run_ranks(_one_after_the_other, 2)


def _no_optimizer(rank: int, world: int) -> None:
    """Partitioned inference; a copy of the module is whole and on its own."""
    model = built(Stack)
    expected = model(data(rank, 0)).detach()
    engine = deepspeed.initialize(
        model=model, config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": RELEASED}
    )[0]
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert torch.equal(engine(data(rank, 0)), expected)
    with torch.no_grad():
        engine(data(rank, 0))
    assert_at_rest(engine)
    twin = copy.deepcopy(engine.module)
    with deepspeed.zero.GatheredParameters(twin.parameters()), torch.no_grad():
        assert torch.equal(twin(data(rank, 0)), expected)
    with pytest.raises(RuntimeError, match="needs an optimizer"):
        engine.step()
    engine.destroy()


def test_engines_without_an_optimizer() -> None:
    run_ranks(_no_optimizer, 2)


# -- compiled --------------------------------------------------------------------------------------------------------------


class CompiledBlocks(Stack):
    def __init__(self, backend: str, how: str) -> None:
        super().__init__(depth=2)
        if how == "wrapped":
            self.blocks = nn.ModuleList(torch.compile(block, backend=backend) for block in self.blocks)
        elif how == "in place":
            for block in self.blocks:
                block.compile(backend=backend)


def _compiled(rank: int, world: int, backend: str, how: str) -> None:
    torch._dynamo.config.suppress_errors = False
    with engine_for(lambda: CompiledBlocks(backend, how)) as engine:
        if how == "engine":
            engine.compile(backend=backend)
        for step in range(3):
            if step == 2:
                before = _frames()
            engine.backward(engine(data(rank, step)))
            assert_at_rest(engine)
            engine.step()
        assert _frames() == before, "nothing is compiled anew when parameters come and go"
        with torch.no_grad():
            engine(data(rank, 0))
        assert_at_rest(engine)
        got = {name.replace("_orig_mod.", ""): value for name, value in whole(engine.module).items()}
    expected = plain_training(lambda: Stack(depth=2), lambda m, x: m(x), world, 3)
    assert_same(got, expected)


def _frames() -> int:
    return torch._dynamo.utils.counters["frames"]["total"]


@pytest.mark.parametrize("how", ["wrapped", "engine"])
def test_compiled_blocks_and_engines(how: str) -> None:
    _warm_compiler("aot_eager")
    run_ranks(_compiled, 2, "aot_eager", how)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wrapped", "in place", "engine"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_with_other_backends(backend: str, how: str) -> None:
    run_ranks(_compiled, 2, backend, how)


def _warm_compiler(backend: str) -> None:
    """Imports what compiling needs once, before ranks are forked."""
    torch.compile(nn.Linear(2, 2), backend=backend)(torch.ones(1, 2)).sum().backward()
    torch._dynamo.reset()


class ReadsOutside(Block):
    """A compiled block that reads a parameter of the root."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: tuple = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) @ self.outside[0].weight


class OutsideOfBlocks(Stack):
    def __init__(self, backend: str | None) -> None:
        super().__init__(ReadsOutside, depth=2)
        for block in self.blocks:
            block.outside = (self.entry,)
            deepspeed.zero.register_external_parameter(block, self.entry.weight)
            if backend:
                block.compile(backend=backend)


def _compiled_external(rank: int, world: int) -> None:
    expected = plain_training(lambda: OutsideOfBlocks(None), lambda m, x: m(x), world, 2)
    with engine_for(lambda: OutsideOfBlocks("aot_eager")) as engine:
        _steps(engine, rank, range(2))
        assert_same(whole(engine.module), expected)


@pytest.mark.slow
def test_compiled_blocks_with_registered_parameters() -> None:
    _warm_compiler("aot_eager")
    run_ranks(_compiled_external, 2)


# -- what is behind a parameter --------------------------------------------------------------------------------------------


def _state(rank: int, world: int) -> None:
    for precision in ({}, {"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "loss_scale": 32}}):
        for threshold in (0, 100):
            model = built(Stack)
            optimizer = torch.optim.Adam(model.parameters(), lr=LR)
            config = {
                "train_micro_batch_size_per_gpu": 1,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {**RELEASED, "stage3_param_persistence_threshold": threshold},
                **precision,
            }
            engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
            dtype = model.head.weight.dtype
            for step in range(2):
                engine.backward(engine(data(rank, step).to(dtype)))
                if step == 1:
                    _gradients(model, rank, world)
                engine.step()
            _weights_and_states(engine, model, rank, world)
            engine.destroy()


def _own(param: torch.Tensor, whole_value: torch.Tensor, rank: int) -> torch.Tensor:
    size = param.ds_tensor.numel()
    return whole_value.reshape(-1)[rank * size : (rank + 1) * size]


def _gradients(model: nn.Module, rank: int, world: int) -> None:
    for param in (model.head.weight, model.blocks[1].norm.bias):
        full = safe_get_full_grad(param)
        assert full.shape == param.shape and full.dtype == torch.float32
        assert torch.equal(safe_get_local_grad(param), _own(param, full, rank))
        safe_set_full_grad(param, full * 2)
        assert torch.equal(safe_get_full_grad(param), full * 2)
        safe_set_local_grad(param, _own(param, full, rank) * 3)
        assert torch.allclose(safe_get_full_grad(param), full * 3)


def _weights_and_states(engine, model: nn.Module, rank: int, world: int) -> None:
    dtype = model.head.weight.dtype
    for param in (model.head.weight, model.blocks[1].norm.bias, model.blocks[0].up.weight):
        master = safe_get_full_fp32_param(param)
        assert torch.equal(whole(engine.module)[_name(model, param)], master.to(dtype))
        assert torch.equal(safe_get_local_fp32_param(param), _own(param, master, rank))
        new = torch.arange(param.numel(), dtype=torch.float32).view(param.shape) / 7
        safe_set_full_fp32_param(param, new)
        assert torch.equal(safe_get_full_fp32_param(param), new)
        assert torch.equal(whole(model)[_name(model, param)], new.to(dtype))
        safe_set_local_fp32_param(param, _own(param, new, rank) + 1)
        assert torch.equal(safe_get_full_fp32_param(param), new + 1)
        if param.ds_persist:
            own = torch.arange(param.numel()) // param.ds_tensor.numel() == rank
            assert torch.equal(param.detach().reshape(-1)[own], (new + 1).reshape(-1)[own].to(dtype))
        for key in ("exp_avg", "exp_avg_sq"):
            state = safe_get_full_optimizer_state(param, key)
            assert torch.equal(safe_get_local_optimizer_state(param, key), _own(param, state, rank))
            safe_set_full_optimizer_state(param, state + 1, key)
            safe_set_local_optimizer_state(param, _own(param, state, rank) + 2, key)
            assert torch.equal(safe_get_full_optimizer_state(param, key), state + 2)
        with pytest.raises(ValueError, match="has shape"):
            safe_set_full_fp32_param(param, new.reshape(-1)[:1])
    # The written weights are those of the next forward.
    reference = Stack()
    reference.load_state_dict({name: value.float() for name, value in _masters(model).items()})
    reference.to(dtype)
    engine.optimizer.publish_weights()
    with torch.no_grad():
        torch.testing.assert_close(engine(data(rank, 0).to(dtype)), reference(data(rank, 0).to(dtype)))


def _name(model: nn.Module, param: torch.Tensor) -> str:
    return next(name for name, other in model.named_parameters() if other is param)


def _masters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: safe_get_full_fp32_param(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("world", [1, 3])
def test_state_behind_parameters(world: int) -> None:
    run_ranks(_state, world)


def _rebound(rank: int, world: int) -> None:
    """Users bind ``ds_tensor.data`` to other memory before a forward, and expect it to count."""
    with engine_for(Stack) as engine:
        _steps(engine, rank, (0,))
        for param in engine.module.parameters():
            param.ds_tensor.data = torch.ones_like(param.ds_tensor) * 0.25
        assert all(bool((value == 0.25).all()) for value in whole(engine.module).values())
        reference = Stack()
        for param in reference.parameters():
            param.data.fill_(0.25)
        with torch.no_grad():
            torch.testing.assert_close(engine(data(rank, 3)), reference(data(rank, 3)))
        engine.backward(engine(data(rank, 1)))
        engine.step()
        optimizer = torch.optim.SGD(reference.parameters(), lr=LR)
        for peer in range(world):
            (reference(data(peer, 1)) / world).backward()
        optimizer.step()
        assert_same(whole(engine.module), {n: p.detach() for n, p in reference.named_parameters()})


def test_rebound_shards_count() -> None:
    run_ranks(_rebound, 2)


def _frozen_later(rank: int, world: int) -> None:
    """Parameters that are frozen, or trained again, between steps."""

    def use(model: nn.Module, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
        for param in model.blocks[1].parameters():
            param.requires_grad_(step % 2 == 0)
        return model(x)

    expected = plain_training(Stack, use, world, 4, per_rank=True)
    with engine_for(Stack) as engine:
        for step in range(4):
            engine.backward(use(engine.module, data(rank, step), rank, step))
            assert_at_rest(engine)
            engine.step()
        # Plain SGD leaves what has no gradient alone; a gradient of zero does the same.
        assert_same(whole(engine.module), expected)
        assert coordinator(engine).plan is not None


def test_parameters_frozen_between_steps() -> None:
    run_ranks(_frozen_later, 2)


def _wide(rank: int, world: int) -> None:
    """A block of several layers of which some are persistent and some are not."""
    zero = {"stage3_param_persistence_threshold": 12}
    with engine_for(Stack, zero) as engine:
        kept = {h.name for h in coordinator(engine).handles if h.persistent}
        assert kept == {n for n, p in built(Stack).named_parameters() if p.numel() < 12} and kept
    trains_as_plain(lambda: Stack(Block, 4), lambda m, x: m(x), rank, world, zero=zero)


def test_units_with_persistent_parts() -> None:
    run_ranks(_wide, 2)
