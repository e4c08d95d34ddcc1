"""Stage 3 by live storages and by messages: what is in memory, when, and how often ranks talk."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed import comm
from deepspeed._core.params.calls import Call
from tests.dist.test_zero3_use import Auxiliary
from tests.helpers.dist import run_ranks
from tests.helpers.zero3 import (
    RELEASED,
    WIDTH,
    Stack,
    assert_at_rest,
    built,
    coordinator,
    data,
    engine_for,
)

TIGHT = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
"""Nothing is fetched ahead or kept."""


def _storages() -> dict[int, int]:
    """Bytes of every storage that Python can reach, by address; but for what there was when ranks were forked."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and item.layout is torch.strided and item.device.type == "cpu":
            storage = item.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _after_steps(rank: int, world: int) -> None:
    gc.freeze()
    for precision, threshold in (({}, 0), ({}, 9), ({"bf16": {"enabled": True}}, 9), ({}, 10**6)):
        before = _storages()
        model = built(Stack)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        numel = sum(p.numel() for p in model.parameters())
        with _engine(model, optimizer, threshold, precision) as engine:
            for step in range(3):
                engine.backward(engine(data(rank, step).to(model.head.weight.dtype)))
                engine.step()
                assert_at_rest(engine)
            flat = engine._flat
            shards, persistent = [], []
            for bucket in flat.buckets:
                assert bucket.grad_full is None
                assert not bucket.grad_shard.untyped_storage().nbytes()
                shards += [bucket.weights, bucket.master]
                shards += [v for v in flat.optimizer.state[bucket.master].values() if v.numel() == bucket.shard_numel]
            persistent = [h.full for h in coordinator(engine).handles if h.persistent]
            known = {_address(t) for t in shards + persistent}
            found = _storages()
            rest = {a: n for a, n in found.items() if a not in known and a not in before}
            # Placeholders, step counters, the norm and its flags on their way: nothing that grows with the model.
            assert max(rest.values(), default=0) <= 48, sorted(rest.values())[-5:]
            whole = sum(h.numel for h in coordinator(engine).handles if h.persistent)
            assert (whole == 0) == (threshold == 0) and (whole == numel) == (threshold == 10**6)
            row = sum(bucket.shard_numel for bucket in flat.buckets)
            assert numel <= row * world < numel + world * len(list(model.parameters()))
            # fp32: weights and two moments; bf16: another two bytes of weights.
            per_element = 14 if precision else 12
            nbytes = sum(n for a, n in found.items() if a in {_address(t) for t in shards})
            assert nbytes == per_element * row


@contextlib.contextmanager
def _engine(model: nn.Module, optimizer: torch.optim.Optimizer, threshold: int, precision: dict):
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {**RELEASED, "stage3_param_persistence_threshold": threshold},
        **precision,
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    try:
        yield engine
    finally:
        engine.destroy()


@pytest.mark.parametrize("world", [2, 3])
def test_after_a_step_there_are_shards_and_persistent_parameters(world: int) -> None:
    run_ranks(_after_steps, world)


# -- while it runs -------------------------------------------------------------------------------------------------------


class _Meter:
    """Bytes of gathered parameters whenever a module begins, has run, or gets a gradient."""

    def __init__(self, engine) -> None:
        self.engine = engine
        self.reset()
        for module in engine.module.modules():
            if not list(module.children()):
                module.register_forward_pre_hook(self.read)
                module.register_forward_hook(self.read)
        for param in engine.module.parameters():
            param.register_post_accumulate_grad_hook(self.read)

    def reset(self) -> None:
        self.peak = self.gradients = 0

    def read(self, *_) -> None:
        handles = [h for h in coordinator(self.engine).handles if not h.persistent]
        self.peak = max(self.peak, sum(h._full.untyped_storage().nbytes() for h in handles))
        buffers = [b.grad_full for b in self.engine._flat.buckets if b.grad_full is not None]
        loose = [h.param.grad for h in handles if h.param.grad is not None]
        self.gradients = max(self.gradients, sum(t.numel() for t in buffers + loose))


def _numels(engine) -> dict[str, int]:
    found = {}
    for name, child in engine.module.named_children():
        parts = child.named_children() if name == "blocks" else [("", child)]
        found.update({f"{name}{key}": sum(p.ds_numel for p in part.parameters()) for key, part in parts})
    return found


def _budgets(rank: int, world: int) -> None:
    """Peaks by storages are those of the plan, and the plan is within the budget."""
    cases = [
        (TIGHT, lambda sizes: sizes["blocks0"]),
        ({**TIGHT, "stage3_prefetch_bucket_size": 250}, lambda sizes: sizes["blocks0"] + 250),
        ({"stage3_max_reuse_distance": 10**6}, lambda sizes: sum(sizes.values())),
        ({"stage3_max_reuse_distance": 10**6, "stage3_max_live_parameters": 500}, lambda sizes: 500),
        ({"stage3_max_live_parameters": 250}, lambda sizes: 250),
        ({"stage3_max_live_parameters": 1}, lambda sizes: 99),  # blocks come apart: one layer
        ({}, lambda sizes: 4 * sizes["blocks0"]),
    ]
    for zero, bound in cases[:: world - 1]:
        with engine_for(lambda: Stack(depth=5), zero) as engine:
            meter, stats = _Meter(engine), coordinator(engine).stats
            for step in range(3):
                stats.reset()
                meter.reset()
                loss = engine(data(rank, step))
                forward = meter.peak
                engine.backward(loss)
                engine.step()
            sizes = _numels(engine)
            plan = coordinator(engine).plan
            padding = world * len(list(engine.module.parameters()))
            largest = max(p.ds_numel for p in engine.module.parameters())
            assert largest <= plan.peak_live <= max(bound(sizes), largest), (zero, plan.peak_live, sizes)
            assert stats.peak_live_numel <= plan.peak_live, (zero, stats.peak_live_numel, plan)
            assert forward <= meter.peak <= 4 * (plan.peak_live + padding), (zero, meter.peak, plan)
            if zero == TIGHT:
                assert forward >= 4 * sizes["blocks0"]  # the meter does see something


@pytest.mark.parametrize("world", [2, 3])
def test_gathered_parameters_stay_within_the_budget(world: int) -> None:
    run_ranks(_budgets, world)


def _gradient_buffers(rank: int, world: int) -> None:
    """Whole gradients exist for the buckets of one unit and those in flight, and never as ``.grad``."""
    for keys in ({"overlap_comm": True}, {"overlap_comm": False}):
        with engine_for(lambda: Stack(depth=6), {**TIGHT, "reduce_bucket_size": 110, **keys}) as engine:
            meter = _Meter(engine)
            for step in range(2):
                meter.reset()
                engine.backward(engine(data(rank, step)))
                engine.step()
            block = _numels(engine)["blocks0"]
            in_flight = 2 if keys["overlap_comm"] else 0
            assert 0 < meter.gradients <= block + (in_flight + 1) * 110 + world * 10 < 6 * block, meter.gradients


def test_gradients_are_whole_for_a_moment() -> None:
    run_ranks(_gradient_buffers, 2)


# -- messages ------------------------------------------------------------------------------------------------------------


def _messages(rank: int, world: int) -> None:
    """As many collectives as the plan says; each of them is one message to and from every other rank here."""
    for zero, forward, backward in (
        (TIGHT, 5, 4),  # entry, three blocks, head; the head stays for the backward
        ({}, 5, 3),  # so does the block before it
        ({"stage3_max_reuse_distance": 10**6}, 5, 0),
        ({"stage3_max_live_parameters": 1}, 11, 10),  # layer by layer
        ({**TIGHT, "stage3_param_persistence_threshold": 12}, 5, 4),
        ({**TIGHT, "stage3_param_persistence_threshold": 10**6}, 0, 0),
        ({**TIGHT, "reduce_bucket_size": 100}, 5, 4),
    ):
        with engine_for(Stack, zero) as engine:
            for step in range(2):
                engine.backward(engine(data(rank, step)))
                engine.step()
            stats, plan = coordinator(engine).stats, coordinator(engine).plan
            stats.reset()
            with comm.observe() as events:
                loss = engine(data(rank, 2))
            gathers = Counter(e.op for e in events)["irecv"] / (world - 1)
            assert gathers == stats.gathers == forward, (zero, gathers, stats.gathers)
            assert forward == (sum(len(plan.issue[p]) for p in range(plan.forward_len)) if plan else 0)
            with comm.observe() as events:
                engine.backward(loss)
            buckets = len(engine._flat.buckets)
            counts = Counter(e.op for e in events)
            assert stats.gathers - forward == backward
            assert counts == {"irecv": (backward + buckets) * (world - 1), "isend": counts["irecv"]}
            assert stats.gathers == (plan.gathers if plan else 0)
            with comm.observe() as events:
                engine.step()
            persistent = any(h.persistent for h in coordinator(engine).handles)
            expected = Counter(all_reduce=1, irecv=persistent * (world - 1), isend=persistent * (world - 1))
            assert Counter(e.op for e in events) == +expected, (zero, Counter(e.op for e in events))


@pytest.mark.parametrize("world", [2, 3])
def test_collectives_of_a_step_are_those_of_the_plan(world: int) -> None:
    run_ranks(_messages, world)


def _evaluation(rank: int, world: int) -> None:
    with engine_for(Stack) as engine, torch.no_grad():
        for step in range(3):
            coordinator(engine).stats.reset()
            with comm.observe() as events:
                engine(data(rank, step))
            assert coordinator(engine).stats.gathers == 5
            # The first pass agrees on the order; after that there is nothing to agree upon.
            assert Counter(e.op for e in events)["all_reduce"] == (step == 0)
            assert_at_rest(engine)


def test_evaluation_gathers_each_unit_once() -> None:
    run_ranks(_evaluation, 2)


def _no_cycles(rank: int, world: int) -> None:
    """A graph goes when its loss goes, without the collector: hooks of ours make no cycles."""
    for make in (Stack, lambda: Auxiliary("given", False), Frozen):
        with engine_for(make) as engine:
            gc.collect()
            gc.disable()
            try:
                for step in range(3):
                    loss = engine(data(rank, step).requires_grad_())
                    if step < 2:
                        engine.backward(loss)
                        engine.step()
                    engine.module.given = []
                    del loss
                    # The hooks of a graph hold these.
                    assert not any(isinstance(item, Call) for item in gc.get_objects()), (make, step)
            finally:
                gc.enable()


def test_graphs_go_without_the_collector() -> None:
    run_ranks(_no_cycles, 1)


class Frozen(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.head.requires_grad_(True)


def _no_backward_no_gather(rank: int, world: int) -> None:
    """Frozen layers before the first trained one are not gathered again; nor are persistent ones that never change."""
    with engine_for(Frozen, TIGHT) as engine:
        for step in range(3):
            loss = engine(data(rank, step))
            coordinator(engine).stats.reset()
            engine.backward(loss)
            engine.step()
        assert coordinator(engine).stats.gathers == 0  # the head is there still
    with engine_for(Frozen, {**TIGHT, "stage3_param_persistence_threshold": 10**6}) as engine:
        engine.backward(engine(data(rank, 0)))
        with comm.observe() as events:
            engine.step()
        assert [e.nbytes for e in events if e.op == "irecv"] == [3 * WIDTH * 4 // world]


def test_frozen_parameters_do_not_travel_without_need() -> None:
    run_ranks(_no_backward_no_gather, 2)
