"""Parameters that a model uses without reading them as attributes: iterated over, kept in lists, closed over."""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

import pytest
import torch
from torch import nn

from deepspeed import zero
from deepspeed.utils.logging import logger
from tests.helpers.dist import run_ranks
from tests.helpers.training import make_engine

RELEASED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


class Closed(nn.Module):
    """A function of another module's weight, which it does not own."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))
        self.product = functools.partial(lambda x, w: x @ w.t(), w=weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x) + self.bias


class Stray(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.kept = [self.second.bias]
        self.closed = Closed(self.second.weight)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, regularise: bool = True) -> torch.Tensor:
        x = self.closed(torch.tanh(self.first(x))) + self.kept[0]
        loss = x.square().mean()
        if regularise:  # as AdaLoRA does
            for name, param in self.named_parameters():
                if name.endswith("weight") and "unused" not in name:
                    loss = loss + 0.1 * (param @ param.T - torch.eye(4)).norm()
        return loss


def train(rank: int, world_size: int) -> None:
    torch.manual_seed(0)
    plain = Stray()
    model = Stray()
    model.load_state_dict(plain.state_dict())
    engine = make_engine(model, RELEASED)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    depth = torch._C._len_torch_function_stack()
    for step in range(4):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        loss, expected = engine(x), plain(x)
        torch.testing.assert_close(loss, expected, msg=lambda text, s=step: f"step {s}: {text}")
        engine.backward(loss)
        engine.step()
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(engine.module(x, regularise=step % 2 == 0), plain(x, regularise=step % 2 == 0))
        assert torch._C._len_torch_function_stack() == depth
        assert all(param.ds_status.name == "NOT_AVAILABLE" for param in model.parameters())
    with zero.GatheredParameters(model.parameters()):
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.detach(), theirs.detach(), msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_is_that_of_the_plain_model(world_size: int) -> None:
    run_ranks(train, world_size)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.modes: list[int] = []
        self.fail = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.modes.append(torch._C._len_torch_function_stack())
        dtype = next(self.parameters()).dtype  # needs no data
        for layer in self.layers:
            x = layer(x.to(dtype))
        if self.fail:
            raise KeyError("on purpose")
        return x.sum()


def watched(rank: int, world_size: int) -> None:
    x = torch.ones(1, 4)
    engine = make_engine(Counting(), RELEASED)
    module = engine.module
    module.fail = True
    with pytest.raises(KeyError):
        engine(x)
    module.fail = False
    engine.eval()
    with torch.no_grad():
        engine(x)
    engine.train()
    for _ in range(2):
        engine.backward(engine(x))
        engine.step()
    assert module.modes == [1, 1, 1, 0], "one pass of each kind, that does not fail"
    units = engine.optimizer.parameter_offload.coordinator.units
    assert not any(unit.externals for unit in units)
    inference = make_engine(copy.deepcopy(Counting()), RELEASED)
    with torch.no_grad():
        inference(x)
        inference(x)
    inference(x)
    assert inference.module.modes == [1, 0, 1]


def test_only_first_passes_are_watched() -> None:
    run_ranks(watched, 2)


def noted(rank: int, world_size: int) -> Any:
    """Looking at a gathered parameter inside a forward does not make it one that the module needs."""

    class Looks(Counting):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), zero.GatheredParameters(dict(self.named_parameters()).values()):
                self.norm = sum(float(p.norm()) for p in self.parameters())
            return super().forward(x)

    engine = make_engine(Looks(), RELEASED)
    engine.backward(engine(torch.ones(1, 4)))
    engine.step()
    assert engine.module.norm == engine.module.norm
    assert not any(unit.externals for unit in engine.optimizer.parameter_offload.coordinator.units)


def test_looking_is_no_use() -> None:
    run_ranks(noted, 2)


class Assigning(nn.Module):
    """Gives a parameter other data while it runs, which its shards never hear of."""

    def __init__(self, assigns: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.assigns = assigns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if self.assigns:
            self.linear.weight.data = self.linear.weight.data * 2
        return y.square().mean()


def assign(rank: int, world_size: int) -> None:
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    for assigns in (False, True):
        engine = make_engine(Assigning(assigns), RELEASED)
        for _ in range(2):
            engine.backward(engine(torch.ones(1, 4)))
            engine.step()
        told = [line for line in lines if "given other data while it was gathered" in line]
        assert len(told) == (assigns and rank == 0), told  # once, on rank 0
        assert not told or "linear.weight" in told[0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_data_assigned_in_a_forward_is_dropped_and_that_is_told(world_size: int) -> None:
    run_ranks(assign, world_size)
