"""Which modules are fetched together: blocks, leaves, and else the owners of parameters. No processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepspeed._core.params.agreement import PlanBook, Trace, expected_ready, expected_trace
from deepspeed._core.params.handle import ParamHandle, handles_of
from deepspeed._core.params.hooks import ModelHooks, tensors_in
from deepspeed._core.params.lifecycle import Coordinator
from deepspeed._core.params.planner import Budget
from deepspeed._core.params.transport import make_param_transport
from deepspeed._core.params.units import UnitLimits, find_units
from deepspeed.utils import set_z3_leaf_module

ENDLESS = 10**9


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x)) * self.scale


class Model(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.ones(4))
        self.entry = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.single = nn.ModuleDict({"a": Block()})
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entry(x) + self.own
        for block in self.blocks:
            x = block(x)
        return self.head(self.single["a"](self.plain(x)))


def partitioned(model: nn.Module) -> nn.Module:
    """At world size 1: the shard is the parameter."""
    transport = make_param_transport(None, torch.device("cpu"))
    for name, param in model.named_parameters():
        ParamHandle(param, param.detach().clone().view(-1), transport, name=name)
    return model


def units_of(model: nn.Module, **limits: int) -> dict[str, bool]:
    """Paths of the units; whether they take everything below."""
    found = find_units(partitioned(model), UnitLimits(**{"max_numel": ENDLESS, **limits}))
    return {path: whole for path, _, whole in found}


def test_blocks_are_units_and_the_rest_goes_by_owners() -> None:
    assert units_of(Model()) == {
        "": False,
        "entry": False,
        "blocks.0": True,
        "blocks.1": True,
        "blocks.2": True,
        "plain.0": False,  # a layer without children gains nothing from being a block
        "plain.2": False,
        "single.a": False,  # one of a kind is no block
        "single.a.one": False,
        "single.a.two": False,
        "head": False,
    }


def test_large_blocks_come_apart() -> None:
    numel = sum(p.numel() for p in Block().parameters())
    assert units_of(Model(), max_numel=numel)["blocks.0"] is True
    apart = units_of(Model(), max_numel=numel - 1)
    assert apart["blocks.0"] is False and apart["blocks.0.one"] is False


def test_a_unit_is_never_most_of_the_model() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Block(), Block())
            self.large = nn.Linear(30, 30)

    assert units_of(Two())["blocks.0"] is True
    two = Two()
    del two.large
    assert units_of(two)["blocks.0"] is True
    two.blocks[0].large = nn.Linear(30, 30)
    assert units_of(two)["blocks.0"] is False and units_of(two)["blocks.1"] is True


def test_leaves_are_units_whatever_their_size() -> None:
    model = Model()
    set_z3_leaf_module(model.single, True)
    found = units_of(model, max_numel=1)
    assert found["single"] is True and not any(path.startswith("single.") for path in found)


def test_granularity_joins_small_modules() -> None:
    """Parameters per module, itself and all below: 40 / 4 in the sequence, 44 / 4 in the dict, 250 / 21 in the model."""
    model = Model()
    assert "plain" not in units_of(model, granularity=10)
    found = units_of(Model(), granularity=11)
    assert found["plain"] is True and "plain.0" not in found
    assert found["single.a"] is False
    assert units_of(Model(), granularity=12) == {"": True}


def test_a_module_with_tiles_is_no_unit() -> None:
    model = Model()
    model.blocks[1].one._z3_fetch_separately = True
    found = units_of(model)
    assert found["blocks.0"] is True and found["blocks.1"] is False


def test_shared_modules_are_found_once() -> None:
    model = Model()
    model.blocks[2] = model.blocks[0]
    model.again = model.entry
    assert set(units_of(model)) == set(units_of(Model(2)))


def hooked(model: nn.Module) -> tuple[ModelHooks, Coordinator]:
    handles = handles_of(partitioned(model).parameters())
    coordinator = Coordinator(handles, Budget(ENDLESS, 0, 0))
    hooks = ModelHooks(model, coordinator, UnitLimits(ENDLESS))
    hooks.attach()
    return hooks, coordinator


def test_parts_of_a_block_are_units_of_their_own_inside_it() -> None:
    """So that they can be called alone."""
    _, coordinator = hooked(Model())
    by_name = {unit.name: unit for unit in coordinator.units}
    part, block = by_name["blocks.1.two"], by_name["blocks.1"]
    assert part.parent is block and block.parent is None
    assert [h.name for h in part.handles] == ["blocks.1.two.weight", "blocks.1.two.bias"]
    assert len(block.handles) == 5 and {h.id for h in part.handles} < {h.id for h in block.handles}


def test_expected_order_is_the_order_of_the_model() -> None:
    _, coordinator = hooked(Model())
    names = [unit.name for unit in coordinator.units]
    trace = expected_trace(coordinator.units)
    order = ["", "entry", "blocks.0", "blocks.1", "blocks.2", "plain.0", "plain.2", "single.a", "single.a.one"]
    order += ["single.a.two", "head"]
    assert [names[i] for i in trace.forward] == order
    # Modules around others begin with them, forward and backward, and end after them.
    assert [names[i] for i in trace.backward] == [
        "", "head", "single.a", "single.a.two", "single.a.one", "plain.2", "plain.0", "blocks.2", "blocks.1", "blocks.0",
        "entry",
    ]  # fmt: skip
    assert trace.until == [10, 1, 2, 3, 4, 5, 6, 9, 8, 9, 10]


def test_expected_completion_of_gradients() -> None:
    """In uses begun backward; modules that are no units come with those around them in the order of the model."""
    model = Model()
    _, coordinator = hooked(model)
    for handle in coordinator.handles:
        handle.persistent = handle.name in ("plain.0.weight", "head.bias", "head.weight")
    hooks = ModelHooks(model, coordinator, UnitLimits(ENDLESS))
    hooks.attach()
    trace = expected_trace(coordinator.units)
    names = [unit.name for unit in coordinator.units]
    assert "head" not in [names[i] for i in trace.backward]
    ready = expected_ready(trace, coordinator.units, coordinator.handles)
    by_name = {handle.name: ready[handle.id] for handle in coordinator.handles}
    assert by_name["head.weight"] == by_name["head.bias"] == 0  # before any unit has begun
    assert by_name["single.a.two.bias"] == 3 and by_name["single.a.one.weight"] == 4
    assert by_name["single.a.scale"] == 4  # with the last of what is inside
    assert by_name["plain.0.weight"] == by_name["plain.0.bias"] == 6
    assert by_name["own"] == len(trace.backward)


def test_plans_are_learnt_from_what_runs() -> None:
    model = Model()
    _, coordinator = hooked(model)
    book: PlanBook = coordinator.book
    assert not book.recorded[True] and book.plans[True].forward_len == 11
    x = torch.ones(2, 4)
    for _ in range(2):
        model(x).sum().backward()
        coordinator.end_backward()
        assert book.recorded[True] and not book.deviated
        assert book.plans[True].uses[:11] == tuple(expected_trace(coordinator.units).forward)
    assert coordinator.live_numel == 0
    with torch.no_grad():
        model(x)
    assert book.recorded[False]


def test_same_deviation_needs_all_ranks_and_one_order() -> None:
    def sums(*flags: tuple[float, float, float]) -> list[float]:
        return [sum(column) for column in zip(*flags, strict=True)]

    one, two = (1.0, 7.0, 49.0), (1.0, 9.0, 81.0)
    none = (0.0, 0.0, 0.0)
    assert PlanBook.same_deviation(sums(one, one, one), 3)
    assert not PlanBook.same_deviation(sums(one, one, two), 3)
    assert not PlanBook.same_deviation(sums(one, none, one), 3)
    assert not PlanBook.same_deviation(sums(none, none), 2)
    largest = (1.0, float(2**20 - 1), float((2**20 - 1) ** 2))
    assert PlanBook.same_deviation(sums(*[largest] * 64), 64)
    assert not PlanBook.same_deviation(sums(*[largest] * 63, (1.0, 2.0**20 - 2, (2.0**20 - 2) ** 2)), 64)


def test_a_trace_knows_what_runs_inside_what() -> None:
    trace = Trace()
    outer = trace.begin(5)
    inner = trace.begin(6)
    trace.end(inner)
    trace.begin(7)
    trace.end(outer)
    assert trace.forward == [5, 6, 7] and trace.until == [2, 1, 2]


def test_detached_models_are_as_before() -> None:
    model = Model()
    before = {id(m): (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()}
    hooks, _ = hooked(model)
    assert any(m._forward_hooks for m in model.modules())
    assert type(model.head._parameters) is not dict
    hooks.detach()
    assert all((dict(m._forward_hooks), dict(m._forward_pre_hooks)) == before[id(m)] for m in model.modules())
    assert type(model.head._parameters) is dict


@pytest.mark.parametrize("value", [3, "text", None, torch.float32, Model(), {"a": [1, (2,)]}, lambda: None, Model])
def test_values_without_tensors(value: object) -> None:
    unknown: list[str] = []
    assert list(tensors_in(value, unknown)) == [] and unknown == []


def test_tensors_are_found_in_containers_and_others_are_told() -> None:
    class Slots:
        __slots__ = ("inner",)

    unknown: list[str] = []
    one, two = torch.ones(1), torch.ones(2)
    found = list(tensors_in({"a": [one], "b": ({"c": two}, Slots(), one)}, unknown))
    assert [id(t) for t in found] == [id(one), id(two), id(one)]
    assert len(unknown) == 1 and "Slots" in unknown[0]


def test_cycles_end() -> None:
    loop: list = [torch.ones(1)]
    loop.append(loop)
    assert 1 <= len(list(tensors_in(loop))) <= 10
