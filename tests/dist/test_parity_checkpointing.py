"""Activation checkpointing: recomputation inside backward, and gradients that arrive after their bucket has left."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deepspeed.utils import safe_get_full_grad
from tests.helpers.dist import run_ranks
from tests.helpers.training import make_engine


class Shared(nn.Module):
    """A layer used inside two checkpoints: with reentrant ones its gradient comes in two parts in one backward."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.first = nn.Linear(5, 7)
        self.shared = nn.Linear(7, 7)
        self.between = nn.Linear(7, 7)
        self.last = nn.Linear(7, 1)

    def forward(self, x: torch.Tensor, uses: int) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        if uses > 0:
            h = self._block(h)
        h = torch.tanh(self.between(h))
        if uses > 1:
            h = self._block(h)
        return self.last(h).square().mean()

    def _block(self, h: torch.Tensor) -> torch.Tensor:
        def run(h: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.shared(h))

        return run(h) if self.mode == "none" else checkpoint(run, h, use_reentrant=self.mode == "reentrant")


def _model(mode: str) -> Shared:
    torch.manual_seed(5)
    return Shared(mode)


def _data(rank: int, index: int) -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(100 * rank + index))


def _uses(rank: int, index: int) -> int:
    """How often the shared layer is used: differs by rank, and late gradients meet micro-batches without it."""
    return (2, 0, 1, 2, 2, 1)[(index + 2 * rank) % 6]


def _reference(world: int, windows: int, accumulation: int) -> list[dict[str, torch.Tensor]]:
    """Gradients and weights of each window, from all ranks' data in one process."""
    model = _model("none")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trace = []
    for window in range(windows):
        for micro in range(accumulation):
            index = window * accumulation + micro
            for rank in range(world):
                (model(_data(rank, index), _uses(rank, index)) / accumulation / world).backward()
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        trace.append(grads)
        optimizer.step()
        optimizer.zero_grad()
        trace.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return trace


KEYS: tuple = ({}, {"overlap_comm": True}, {"overlap_comm": True, "contiguous_gradients": False})


def _run(rank: int, world: int, mode: str) -> dict[str, int]:
    late = 0
    for accumulation in (1, 3):
        expected = _reference(world, 2, accumulation)
        for stage in (0, 1, 2):
            for keys in KEYS if mode == "reentrant" else KEYS[1:2]:
                for read in (True, False):
                    model = _model(mode)
                    zero = {"stage": stage, "reduce_bucket_size": 8, **keys}
                    config = {"zero_optimization": zero, "gradient_accumulation_steps": accumulation}
                    engine = make_engine(model, {**config, "verify_gradients": 2})
                    for window in range(2):
                        for micro in range(accumulation):
                            index = window * accumulation + micro
                            engine.backward(engine(_data(rank, index), _uses(rank, index)))
                            late += engine._flat.reducer.late
                            if micro + 1 == accumulation and read:
                                got = {n: safe_get_full_grad(p) for n, p in model.named_parameters()}
                                _compare(got, expected[2 * window], (stage, keys, "gradients"))
                            engine.step()
                        weights = {n: p.detach() for n, p in model.named_parameters()}
                        _compare(weights, expected[2 * window + 1], (stage, keys, "weights"))
                    engine.destroy()
    return {"late": late}


def _compare(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: object) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{what} {n}: {m}")


@pytest.mark.parametrize("mode", ["none", "reentrant", "plain"])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointed_models_train_as_others(mode: str, world: int) -> None:
    late = sum(result["late"] for result in run_ranks(_run, world, mode))
    # The case this file is about does occur, and only there.
    assert (late > 0) == (mode == "reentrant")
