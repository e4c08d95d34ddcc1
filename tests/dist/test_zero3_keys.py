"""Each key of stage 3 does what its documentation says: what is whole, what travels, when, and what is said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed import comm
from deepspeed.runtime.config import DeepSpeedConfig
from tests.helpers.dist import run_ranks
from tests.helpers.zero3 import (
    RELEASED,
    WIDTH,
    Stack,
    assert_same,
    coordinator,
    data,
    engine_for,
    live,
    plain_training,
    trains_as_plain,
    whole,
)
from tests.unit.config_helpers import warnings_said

BLOCK = 2 * WIDTH * (WIDTH + 3) + (WIDTH + 3) + 3 * WIDTH
ENTRY, HEAD = WIDTH * (WIDTH + 1), 3 * WIDTH
FRUGAL = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


def _train(engine, rank: int, steps: int = 3, **kwargs) -> None:
    for step in range(steps):
        engine.backward(engine(data(rank, step), **kwargs))
        engine.step()


def _live_at(engine, rank: int, path: str) -> set[str]:
    """Modules that are whole (or on their way) when a module begins, and after the forward."""
    seen: list[set[str]] = []
    module = engine.module.get_submodule(path)
    hook = module.register_forward_pre_hook(lambda *_: seen.append(live(engine)))
    loss = engine(data(rank, 9))
    hook.remove()
    engine.backward(loss)
    engine.zero_grad()
    return {".".join(name.split(".")[: 2 if name.startswith("blocks") else 1]) for name in seen[0]}


def _after_forward(engine, rank: int) -> set[str]:
    loss = engine(data(rank, 9))
    found = {".".join(name.split(".")[: 2 if name.startswith("blocks") else 1]) for name in live(engine)}
    engine.backward(loss)
    engine.zero_grad()
    return found


def _live_keys(rank: int, world: int) -> None:
    for zero, at_second_block, after in (
        (FRUGAL, {"blocks.1"}, {"head"}),
        # Two more elements than the head: what fits between its use and its backward.
        ({**FRUGAL, "stage3_max_reuse_distance": 2 * HEAD}, {"blocks.1"}, {"head", "blocks.2"}),
        ({**FRUGAL, "stage3_max_reuse_distance": 2 * (HEAD + BLOCK)}, {"blocks.1"}, {"head", "blocks.2", "blocks.1"}),
        ({**FRUGAL, "stage3_max_reuse_distance": 10**9}, {"entry", "blocks.0", "blocks.1"}, None),
        # The budget wins over the distance; what comes back last has to go.
        (
            {**FRUGAL, "stage3_max_reuse_distance": 10**9, "stage3_max_live_parameters": 2 * BLOCK},
            {"blocks.0", "blocks.1"},
            {"head", "blocks.2", "blocks.1"},
        ),
        ({**FRUGAL, "stage3_prefetch_bucket_size": BLOCK}, {"blocks.1", "blocks.2"}, {"head"}),
        ({**FRUGAL, "stage3_prefetch_bucket_size": BLOCK + HEAD}, {"blocks.1", "blocks.2", "head"}, {"head"}),
        ({**FRUGAL, "stage3_prefetch_bucket_size": BLOCK - 1}, {"blocks.1"}, {"head"}),
    ):
        with engine_for(Stack, zero) as engine:
            _train(engine, rank)
            assert _live_at(engine, rank, "blocks.1.up") == at_second_block, zero
            everything = {"entry", "blocks.0", "blocks.1", "blocks.2", "head"}
            assert _after_forward(engine, rank) == (everything if after is None else after), zero
        trains_as_plain(Stack, lambda m, x: m(x), rank, world, zero=zero)


def test_max_live_max_reuse_distance_and_prefetch_decide_what_is_whole() -> None:
    run_ranks(_live_keys, 2)


def _persistence(rank: int, world: int) -> None:
    """Smaller than the threshold stays whole, in the model's order, up to the model's cap."""
    for zero, kept in (
        ({"stage3_param_persistence_threshold": 0}, lambda n, p: False),
        ({"stage3_param_persistence_threshold": WIDTH}, lambda n, p: False),
        ({"stage3_param_persistence_threshold": WIDTH + 1}, lambda n, p: p.numel() <= WIDTH),
        ({"stage3_param_persistence_threshold": 10**9}, lambda n, p: True),
        (
            {"stage3_param_persistence_threshold": 10**9, "stage3_model_persistence_threshold": ENTRY},
            lambda n, p: n.startswith("entry"),
        ),
        (
            {"stage3_param_persistence_threshold": 12, "stage3_model_persistence_threshold": 2 * WIDTH},
            # entry.bias; the next, of eleven, does not fit; the one after it does
            lambda n, p: n in ("entry.bias", "blocks.0.down.bias"),
        ),
        ({"stage3_param_persistence_threshold": 10**9, "stage3_model_persistence_threshold": 0}, lambda n, p: False),
    ):
        with engine_for(Stack, zero) as engine:
            expected = {n for n, p in Stack().named_parameters() if kept(n, p)}
            _train(engine, rank, 1)
            named = dict(engine.module.named_parameters())
            assert {n for n, p in named.items() if p.ds_persist} == expected, zero
            assert {n for n, p in named.items() if not p.isnan().all()} == expected, zero
            weights = whole(engine.module)
            assert all(torch.equal(named[n], weights[n]) for n in expected)


def test_persistence_thresholds_decide_what_stays() -> None:
    run_ranks(_persistence, 2)


def _buckets(rank: int, world: int) -> None:
    """``reduce_bucket_size`` bounds a reduction, ``sub_group_size`` what a rank updates at a time."""
    numel = sum(p.numel() for p in Stack().parameters())
    for zero, least, most in (
        ({"reduce_bucket_size": 10**6}, 1, 1),
        ({"reduce_bucket_size": 300}, numel // 300, 2 * numel // 200),
        ({"reduce_bucket_size": 1}, 21, 21),
        ({"sub_group_size": 100}, numel // world // 100, numel // 100),
        ({"sub_group_size": 1}, 21, 21),
    ):
        with engine_for(Stack, {**FRUGAL, **zero}) as engine:
            buckets = engine._flat.buckets
            assert least <= len(buckets) <= most, (zero, len(buckets))
            limit = zero.get("reduce_bucket_size", 10**9)
            assert all(len(b.slots) == 1 or b.numel <= limit for b in buckets)
            limit = zero.get("sub_group_size", 10**9)
            assert all(len(b.slots) == 1 or b.shard_numel <= limit for b in buckets)
            assert len(engine.optimizer.fp32_partitioned_groups_flat) == len(buckets)
            _train(engine, rank, 2)
            coordinator(engine).stats.reset()
            loss = engine(data(rank, 2))
            forward = coordinator(engine).stats.gathers
            with comm.observe() as events:
                engine.backward(loss)
            gathers = coordinator(engine).stats.gathers - forward
            assert Counter(e.op for e in events)["irecv"] - gathers == len(buckets), zero
            engine.step()


def test_bucket_and_sub_group_sizes_cut_reductions_and_updates() -> None:
    run_ranks(_buckets, 2)


def _moments(engine, rank: int, read: Callable[[], object]) -> list[object]:
    """What ``read`` gives whenever a block's gradient arrives, from the last block to the first."""
    seen: list[object] = []
    loss = None
    hooks = [
        block.register_forward_hook(lambda _, __, out: out.register_hook(lambda _: seen.append(read())) and None)
        for block in engine.module.blocks
    ]
    loss = engine(data(rank, 5))
    for hook in hooks:
        hook.remove()
    engine.backward(loss)
    engine.step()
    return seen


def _gradient_keys(rank: int, world: int) -> None:
    """``overlap_comm``: reductions in flight while backward goes on; ``contiguous_gradients``: no whole ``.grad``."""
    for overlap in (True, False, None):
        with engine_for(Stack, {**FRUGAL, "overlap_comm": overlap, "reduce_bucket_size": 100}) as engine:
            if overlap is None:
                assert engine.zero_overlap_comm() is True  # the default of this stage
            _train(engine, rank, 2)
            flying = _moments(engine, rank, lambda e=engine: len(e._flat.reducer._in_flight))
            assert (max(flying) > 0) == (overlap is not False), (overlap, flying)
    for contiguous in (True, False):
        with engine_for(Stack, {**FRUGAL, "contiguous_gradients": contiguous}) as engine:
            _train(engine, rank, 2)

            def loose(e=engine) -> int:
                return sum(p.grad is not None for p in e.module.parameters())

            grads = _moments(engine, rank, loose)
            assert (max(grads) > 0) == (not contiguous), (contiguous, grads)
        trains_as_plain(Stack, lambda m, x: m(x), rank, world, zero={"contiguous_gradients": contiguous})


def test_overlap_comm_and_contiguous_gradients() -> None:
    run_ranks(_gradient_keys, 2)


class Leafy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Linear(WIDTH, WIDTH)
        self.wide = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.wide(self.entry(x))).square().mean()


def _unit_keys(rank: int, world: int) -> None:
    """How many gathers a forward takes: five layers, of which three may travel as one."""
    for zero, gathers in (
        ({}, 5),
        ({"leaf_module": {"classes": ["Sequential"]}}, 3),
        ({"leaf_module": {"names": ["wide"]}}, 3),
        ({"leaf_module": {"name_suffixes": "ide"}}, 3),
        ({"leaf_module": {"classes": [], "names": ["wide", "head"]}}, 3),
        ({"stage3_module_granularity_threshold": 50}, 5),
        ({"stage3_module_granularity_threshold": 60}, 3),  # 216 elements in four modules
        ({"stage3_module_granularity_threshold": 10**6}, 1),
    ):
        with engine_for(Leafy, {**FRUGAL, **zero}) as engine:
            _train(engine, rank, 2)
            coordinator(engine).stats.reset()
            engine(data(rank, 0))
            assert coordinator(engine).stats.gathers == gathers, zero
        trains_as_plain(Leafy, lambda m, x: m(x), rank, world, zero=zero)


def test_leaf_modules_and_granularity_join_gathers() -> None:
    run_ranks(_unit_keys, 2)


def _transport_keys(rank: int, world: int) -> None:
    """How parameters travel: packed, one by one, or as sums; the same weights arrive."""
    expected = plain_training(Stack, lambda m, x: m(x), world, 3)
    operations = {}
    for name, zero in (
        ("together", {}),
        ("one by one", {"stage3_allgather_sequential": True}),
        ("by sums", {"stage3_use_all_reduce_for_fetch_params": True}),
        ("sums, one by one", {"use_all_reduce_for_fetch_params": True, "allgather_sequential": True}),
    ):
        with engine_for(Stack, {**FRUGAL, **zero}) as engine:
            _train(engine, rank)
            assert_same(whole(engine.module), expected, name)
            with comm.observe() as events, torch.no_grad():
                engine(data(rank, 0))
            # One all-reduce is the agreement on the order of modules, in the first evaluation.
            operations[name] = Counter(e.op for e in events) - Counter(all_reduce=1)
    peers = world - 1
    assert operations["together"] == {"irecv": 5 * peers, "isend": 5 * peers}
    assert operations["one by one"] == {"irecv": 21 * peers, "isend": 21 * peers}
    assert operations["by sums"] == {"all_reduce": 5}
    assert operations["sums, one by one"] == {"all_reduce": 21}


@pytest.mark.parametrize("world", [2, 3])
def test_ways_to_gather(world: int) -> None:
    run_ranks(_transport_keys, world)


def _sums_of_all_kinds(rank: int, world: int) -> None:
    """Sums bring every dtype, also those that do not add up."""

    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low = nn.Parameter(torch.tensor([1.5, -2.0, 65504.0]).half())
            self.brain = nn.Parameter(torch.tensor([3e38, -1e-30]).bfloat16())
            self.count = nn.Parameter(torch.tensor([1, -5, 2**40]), requires_grad=False)
            self.flag = nn.Parameter(torch.tensor([True, False, True, True, False]), requires_grad=False)
            self.byte = nn.Parameter(torch.tensor([255, 3], dtype=torch.uint8), requires_grad=False)

        def forward(self) -> torch.Tensor:
            return torch.zeros(())

    model = Kinds()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    zero = {**RELEASED, "use_all_reduce_for_fetch_params": True}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    engine = deepspeed.initialize(model=model, config=config)[0]
    got = whole(model)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    engine.destroy()


def test_sums_bring_every_dtype() -> None:
    run_ranks(_sums_of_all_kinds, 3)


class Skips(Stack):
    def forward(self, x: torch.Tensor, skip: bool = False) -> torch.Tensor:
        x = self.entry(x)
        for block in self.blocks[1:] if skip else self.blocks:
            x = block(x)
        return self.head(x).square().mean()


def _said(rank: int, world: int) -> None:
    for talk in (False, True):
        with warnings_said() as lines, engine_for(Skips, {"log_trace_cache_warnings": talk}) as engine:
            _train(engine, rank, 2)
            assert sum("the order of modules in training is known" in line for line in lines) == (talk and rank == 0)
            _train(engine, rank, 2, skip=True)
            assert sum("used modules in another order" in line for line in lines) == talk
            assert sum("the order of modules in training is known" in line for line in lines) == 2 * (
                talk and rank == 0
            )


def test_log_trace_cache_warnings_tells_of_plans() -> None:
    run_ranks(_said, 2)


class Spare(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, use: bool = True) -> torch.Tensor:
        return super().forward(x + self.spare(x) if use else x)


def _unused(rank: int, world: int) -> None:
    """Tolerated, or named on every rank, also if one rank alone left them out."""
    with engine_for(Spare, {"ignore_unused_parameters": True}) as engine:
        _train(engine, rank, 2, use=rank == 0)
        assert engine.was_step_applied()
    with engine_for(Spare, {"ignore_unused_parameters": False}) as engine:
        engine.backward(engine(data(rank, 0), use=rank == 0))
        with pytest.raises(RuntimeError, match=r"ignore_unused_parameters.*spare\.weight, spare\.bias\."):
            engine.step()
        engine.micro_steps = 0
        engine.backward(engine(data(rank, 0), use=True))
        engine.step()
        assert engine.was_step_applied()


def test_unused_parameters_are_tolerated_or_named() -> None:
    run_ranks(_unused, 2)


AUTO = (
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential",
    "reduce_bucket_size",
    "sub_group_size",
    "overlap_comm",
    "contiguous_gradients",
    "reduce_scatter",
    "memory_efficient_linear",
    "override_module_apply",
    "round_robin_gradients",
    "ignore_unused_parameters",
    "log_trace_cache_warnings",
    "pipeline_loading_checkpoint",
)


def _auto(rank: int, world: int) -> None:
    zero = {"stage": 3, **dict.fromkeys(AUTO, "auto")}
    with engine_for(Stack, {**zero, "stage3_param_persistence_threshold": "auto"}) as engine:
        assert engine.zero_optimization_stage() == 3
        assert all(p.ds_persist for p in engine.module.parameters())  # all are below the default of 100000
        _train(engine, rank, 2)
        assert_same(whole(engine.module), plain_training(Stack, lambda m, x: m(x), world, 2))
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": "auto", "zero_optimization": zero}):
        assert hasattr(Stack().head.weight, "ds_id")


def test_auto_is_the_default_everywhere() -> None:
    run_ranks(_auto, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [("round_robin_gradients", True), ("memory_efficient_linear", False), ("pipeline_loading_checkpoint", True)],
)
def test_keys_without_effect_say_so(name: str, value: bool) -> None:
    for given in (value, not value, "auto"):
        with warnings_said() as said:
            DeepSpeedConfig({"train_batch_size": 1, "zero_optimization": {"stage": 3, name: given}})
        assert [line.partition(" has no effect")[0] for line in said] == (
            [f"zero_optimization.{name} = {value}"] if given is value else []
        )
