"""Training at stage 3 against plain torch in one process that sees all ranks' data, and what is whole meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import deepspeed
import tests.helpers.engine_parts  # noqa: F401
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

# What torch and we make at first use is made here, once, before ranks are forked.
torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1).step()
DeepSpeedConfig({"train_batch_size": 1, "zero_optimization": {"stage": 3}})

LR = 0.1
WIDTH = 8
RELEASED = {"stage": 3, "stage3_param_persistence_threshold": 0}
"""Nothing is persistent."""

LossOf = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def data(rank: int, step: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (3, WIDTH)), generator=torch.Generator().manual_seed(1000 * step + rank))


def built(make: Callable[[], nn.Module], seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def engine_of(model: nn.Module, zero: dict | None = None, **config: Any):
    """An engine at stage 3 with plain SGD over what is trainable."""
    params = [p for p in model.parameters() if p.requires_grad]
    full = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {**RELEASED, **(zero or {})},
        **config,
    }
    optimizer = torch.optim.SGD(params, lr=LR) if params else None
    return deepspeed.initialize(model=model, optimizer=optimizer, config=full)[0]


def coordinator(engine):
    return engine._offload.coordinator


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters of a partitioned (or ordinary) model. Collective."""
    with deepspeed.zero.GatheredParameters(model.parameters()):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def live(engine) -> set[str]:
    """Names of the parameters that are whole or on their way, other than persistent ones."""
    found = set()
    for handle in coordinator(engine).handles:
        if handle.status is ZeroParamStatus.NOT_AVAILABLE or handle.persistent:
            continue
        found.add(handle.name)
    return found


def assert_at_rest(engine) -> None:
    """Nothing is whole, held or in flight that is not persistent; storages say so, too."""
    for handle in coordinator(engine).handles:
        assert not handle.holds, handle.describe()
        if not handle.persistent:
            assert handle.param.ds_status is ZeroParamStatus.NOT_AVAILABLE, handle.describe()
            if handle._full is not None:
                assert handle._full.untyped_storage().nbytes() == 0, handle.describe()
            assert handle.numel == 0 or handle.param.isnan().all(), handle.describe()
    assert coordinator(engine).live_numel == 0


def plain_training(
    make: Callable[[], nn.Module], loss_of: LossOf, world: int, steps: int, *, per_rank: bool = False
) -> dict[str, torch.Tensor]:
    """Weights after ``steps`` of SGD on the mean over all ranks' data. ``loss_of(model, x[, rank])``."""
    model = built(make)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    for step in range(steps):
        for rank in range(world):
            extra = (rank, step) if per_rank else ()
            (loss_of(model, data(rank, step), *extra) / world).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str = "") -> None:
    assert got.keys() == expected.keys(), what
    for name, value in expected.items():
        limit = 1e-5 * max(1.0, float(value.abs().max()) if value.numel() else 0.0)
        difference = float((got[name] - value).abs().max()) if value.numel() else 0.0
        assert difference <= limit, f"{what}: {name} differs by {difference:g}"


def trains_as_plain(
    make: Callable[[], nn.Module],
    loss_of: LossOf,
    rank: int,
    world: int,
    *,
    zero: dict | None = None,
    steps: int = 2,
    per_rank: bool = False,
    what: str = "",
    call: Callable[[Any], Any] = lambda engine: engine,
    between: Callable[[Any, int], None] | None = None,
    planned: bool = True,
) -> None:
    """Trains a few steps at stage 3 and compares the weights; checks after each backward that nothing is left whole.

    ``planned``: the last step follows the plan of the one before to the letter, unless ranks are told what to do.
    """
    with engine_for(make, zero) as engine:
        for step in range(steps):
            extra = (rank, step) if per_rank else ()
            coordinator(engine).stats.reset()
            loss = loss_of(call(engine), data(rank, step), *extra)
            engine.backward(loss)
            if planned and not per_rank and step == steps - 1:
                plan = coordinator(engine).plan
                assert not coordinator(engine).book.deviated and not engine._flat.reducer.late, what
                assert plan is not None and coordinator(engine).stats.gathers == plan.gathers, what
            assert_at_rest(engine)
            engine.step()
            if between is not None:
                between(engine, step)
            assert_at_rest(engine)
        got = whole(engine.module)
    assert_same(got, plain_training(make, loss_of, world, steps, per_rank=per_rank), what)


@contextlib.contextmanager
def engine_for(make: Callable[[], nn.Module], zero: dict | None = None, **config: Any) -> Iterator[Any]:
    """An engine over ``make()`` with the usual seed, destroyed afterwards."""
    engine = engine_of(built(make), zero, **config)
    try:
        yield engine
    finally:
        engine.destroy()


class Block(nn.Module):
    """Two layers of odd sizes and a norm; what repeats in :class:`Stack`."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up = nn.Linear(width, width + 3)
        self.down = nn.Linear(width + 3, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.down(torch.tanh(self.up(x))))


class Stack(nn.Module):
    """An entry, blocks that are fetch units, and a head. Returns the mean square of its output."""

    def __init__(self, block: Callable[[], nn.Module] = Block, depth: int = 3) -> None:
        super().__init__()
        self.entry = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 3, bias=False)

    def run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return block(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.entry(x))
        for block in self.blocks:
            x = self.run(block, x)
        return self.head(x).square().mean()
