"""Backwards at stage 3: several of them, parts of them, over recomputed blocks, over frozen bases, of gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deepspeed.utils import safe_get_full_grad
from tests.helpers.dist import run_ranks
from tests.helpers.zero3 import (
    LR,
    WIDTH,
    Block,
    Stack,
    assert_at_rest,
    assert_same,
    built,
    coordinator,
    data,
    engine_for,
    live,
    plain_training,
    trains_as_plain,
    whole,
)

KEEPING = {"stage3_max_reuse_distance": 10**9}
"""Everything that forward gathers stays for the backward."""


def _several(rank: int, world: int) -> None:
    """Losses over one or two passes, summed or one backward each, through the engine or past it."""

    def losses(model: nn.Module, x: torch.Tensor, passes: str) -> list[torch.Tensor]:
        if passes == "one graph":
            loss = model(x)
            return [loss, loss.square()]
        if passes == "a part":  # the second loss has a graph of its own through some of the modules
            h = torch.tanh(model.entry(x))
            return [model(x), model.blocks[1](h).square().mean()]
        return [model(x), model(x.flip(0) * 0.5)]

    for number, (passes, way) in enumerate(
        itertools.product(("one graph", "a part", "two passes"), ("sum", "engine", "reversed", "plain"))
    ):
        zero = KEEPING if number % 3 == 1 else {}
        expected = plain_training(Stack, lambda m, x, p=passes: sum(losses(m, x, p)), world, 2)
        with engine_for(Stack, zero) as engine:
            for step in range(2):
                made = losses(engine.module, data(rank, step), passes)
                keep = passes == "one graph"
                if way == "sum":
                    engine.backward(sum(made))
                elif way == "plain":
                    # One window of two contributions: what autograd adds up is reduced once, at the step.
                    with engine.no_sync():
                        made[0].backward(retain_graph=keep)
                        made[1].backward()
                else:
                    order = made if way == "engine" else made[::-1]
                    engine.backward(order[0], retain_graph=keep)
                    assert_at_rest(engine)
                    engine.backward(order[1])
                if way != "plain":
                    assert_at_rest(engine)
                engine.step()
                assert_at_rest(engine)
            assert_same(whole(engine.module), expected, f"{passes} {way} {zero}")


def test_several_forwards_and_backwards() -> None:
    run_ranks(_several, 2)


def _plain_backward(rank: int, world: int) -> None:
    """``loss.backward()`` and the optimizer's own ``step``, as in a loop that does not know the engine."""
    for zero in ({}, KEEPING):
        with engine_for(Stack, zero) as engine:
            for step in range(3):
                engine.module(data(rank, step)).backward()
                if step == 1:
                    safe_get_full_grad(engine.module.head.weight)
                engine.optimizer.step()
                engine.optimizer.zero_grad()
                assert_at_rest(engine)
            expected = plain_training(Stack, lambda m, x: m(x), world, 3)
            assert_same(whole(engine.module), expected, str(zero))


def test_plain_backward_and_optimizer_step() -> None:
    run_ranks(_plain_backward, 2)


def _input_gradients(rank: int, world: int) -> None:
    """``torch.autograd.grad`` by itself, before the training backward over the same graph, and as a penalty."""

    def reference() -> tuple[torch.Tensor, nn.Module]:
        model = built(Stack)
        x = data(rank, 0).requires_grad_()
        return torch.autograd.grad(model(x), x)[0], model

    wanted, _ = reference()
    for zero in ({}, KEEPING):
        with engine_for(Stack, zero) as engine:
            x = data(rank, 0).requires_grad_()
            got = torch.autograd.grad(engine(x), x)[0]
            assert torch.equal(got, wanted)
            engine.module.entry(data(rank, 0))
            assert "blocks.0.up.weight" in live(engine)  # nothing tells that it was the last backward of the graph
            with torch.no_grad():
                engine(x)  # but the next pass does
            assert_at_rest(engine)

            loss = engine(x)
            grads = [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2)]
            assert torch.equal(grads[0], wanted) and torch.equal(grads[1], wanted)
            engine.backward(loss)
            assert_at_rest(engine)
            engine.step()
            assert_same(whole(engine.module), plain_training(Stack, lambda m, x: m(x), world, 1))


def test_gradients_of_inputs() -> None:
    run_ranks(_input_gradients, 2)


def penalised(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """As in WGAN-GP: the loss contains the norm of its own gradient."""
    x = x.clone().requires_grad_()
    loss = model(x)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + slope.square().sum()


class PenalisedInside(Stack):
    """The penalty is computed in the forward, on the way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        h = self.blocks[0](self.entry(x))
        (slope,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
        return super().forward(x) + slope.square().mean()


def _penalties(rank: int, world: int) -> None:
    for zero in ({}, KEEPING):
        trains_as_plain(Stack, penalised, rank, world, zero=zero, steps=3)
        trains_as_plain(PenalisedInside, lambda m, x: m(x), rank, world, zero=zero, planned=False)
        # With the engine's own backward making the graph: gradients of inputs that are differentiable again.
        model = built(Stack)
        x = data(rank, 0).requires_grad_()
        model(x).backward(create_graph=True)
        wanted = torch.autograd.grad(x.grad.square().sum(), x)[0]
        with engine_for(Stack, zero) as engine:
            x = data(rank, 0).requires_grad_()
            engine.backward(engine(x), create_graph=True)
            got = torch.autograd.grad(x.grad.square().sum(), x)[0]
            assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-7)
            engine.step()
            assert_at_rest(engine)
            assert_same(whole(engine.module), plain_training(Stack, lambda m, x: m(x), world, 1))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_gradients_of_gradients() -> None:
    run_ranks(_penalties, 2)


# -- checkpoints ---------------------------------------------------------------------------------------------------------


class InnerCheckpoint(Block):
    """A checkpoint inside the block: of two of its layers, called as modules."""

    reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def part(h: torch.Tensor) -> torch.Tensor:
            return self.down(torch.tanh(self.up(h)))

        return x + self.norm(checkpoint(part, x, use_reentrant=self.reentrant))


class InnerReentrant(InnerCheckpoint):
    reentrant = True


class SelfCheckpoint(Block):
    """As Transformers does it: the block's ``__call__`` checkpoints the block's own call, hooks included."""

    reentrant = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().__call__, x, use_reentrant=self.reentrant)


class SelfReentrant(SelfCheckpoint):
    reentrant = True


class Checkpointed(Stack):
    def __init__(self, block: Callable[[], nn.Module], outside: bool | None, depth: int = 3) -> None:
        super().__init__(block, depth)
        self.outside = outside

    def run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return block(x) if self.outside is None else checkpoint(block, x, use_reentrant=self.outside)


KINDS = {
    "none": (Block, None),
    "outside": (Block, False),
    "outside, reentrant": (Block, True),
    "inside": (InnerCheckpoint, None),
    "inside, reentrant": (InnerReentrant, None),
    "by itself": (SelfCheckpoint, None),
    "by itself, reentrant": (SelfReentrant, None),
    "inside and outside": (InnerCheckpoint, False),
    "inside and outside, reentrant": (InnerReentrant, True),
}


def _checkpoints(rank: int, world: int) -> None:
    for kind, (block, outside) in KINDS.items():
        for zero in ({}, {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 1})[:world]:
            make = lambda b=block, o=outside: Checkpointed(b, o)  # noqa: E731
            trains_as_plain(make, lambda m, x: m(x), rank, world, zero=zero, what=f"{kind} {zero}")


@pytest.mark.parametrize("world", [1, 2])
def test_checkpointed_blocks(world: int) -> None:
    run_ranks(_checkpoints, world)


def _saved_elsewhere(rank: int, world: int) -> None:
    """Saved tensors, weights among them, are packed and brought back by the user's hooks."""

    def on_host(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    def as_arrays(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        pack, unpack = lambda t: t.detach().numpy().copy(), torch.from_numpy
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return model(x)

    for use in (on_host, as_arrays):
        trains_as_plain(Stack, use, rank, world)
        trains_as_plain(lambda: Checkpointed(*KINDS["outside, reentrant"]), use, rank, world)


def test_saved_tensors_may_lie_elsewhere() -> None:
    run_ranks(_saved_elsewhere, 2)


# -- frozen bases --------------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen linear layer with a trained low-rank one beside it."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.base = nn.Linear(inner, outer)
        self.base.requires_grad_(False)
        self.down = nn.Linear(inner, 2, bias=False)
        self.up = nn.Linear(2, outer, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def adapted(kind: str, depth: int = 3) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Checkpointed(*KINDS[kind], depth)
        model.requires_grad_(False)
        for part in model.blocks:
            part.up, part.down = Adapted(WIDTH, WIDTH + 3), Adapted(WIDTH + 3, WIDTH)
        return model

    return make


def _adapters(rank: int, world: int) -> None:
    for kind in KINDS:
        # Reentrant checkpoints need an input that requires gradients, as everybody's recipes have it.
        use = lambda m, x: m(x.requires_grad_())  # noqa: E731
        zero = KEEPING if "inside" in kind else {}
        trains_as_plain(adapted(kind), use, rank, world, zero=zero, what=f"{kind} {zero}")
        if kind != "none":
            continue
        trains_as_plain(adapted(kind), lambda m, x: m(x), rank, world, what="no gradient to the input")


def test_adapters_on_frozen_bases() -> None:
    run_ranks(_adapters, 2)


def _most_live(rank: int, world: int, freeze: bool) -> None:
    """Elements whole at a time in the backward, where nothing is fetched ahead or kept, and by default."""
    tight = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    for kind in ("none", "outside", "outside, reentrant", "by itself", "inside"):
        for zero, blocks in ((tight, 2), ({}, 4))[: 1 + (kind == "none")]:
            make = adapted(kind, 6) if freeze else lambda kind=kind: Checkpointed(*KINDS[kind], 6)
            with engine_for(make, zero) as engine:
                stats = coordinator(engine).stats
                for step in range(2):
                    loss = engine(data(rank, step).requires_grad_())
                    stats.reset()
                    stats.peak_live_numel = coordinator(engine).live_numel
                    engine.backward(loss)
                    engine.step()
                block = sum(p.ds_numel for p in engine.module.blocks[0].parameters())
                assert block <= stats.peak_live_numel < blocks * block, (kind, zero, stats.peak_live_numel, block)


@pytest.mark.parametrize("freeze", [False, True])
def test_parameters_go_during_backward_and_not_at_its_end(freeze: bool) -> None:
    """Of six blocks, one at a time is whole; by default two more are fetched ahead."""
    run_ranks(_most_live, 2, freeze)


def _hooks_do_not_pile_up(rank: int, world: int) -> None:
    """An input that is given again and again (an adversarial example) does not collect hooks."""
    with engine_for(adapted("none")) as engine:
        x = data(rank, 0).requires_grad_()
        for _ in range(3):
            engine.backward(engine(x))
            engine.step()
            assert not x._backward_hooks


def test_inputs_do_not_collect_hooks() -> None:
    run_ranks(_hooks_do_not_pile_up, 1)


def _accumulation(rank: int, world: int) -> None:
    """Micro-batches under ``no_sync`` and with the engine's own accumulation, with unused parts in some of them."""
    weights = built(Stack)
    optimizer = torch.optim.SGD(weights.parameters(), lr=LR)
    for step, peer in itertools.product(range(4), range(world)):
        (weights(data(peer, step)) / world / 4).backward()
    optimizer.step()
    expected = {name: p.detach().clone() for name, p in weights.named_parameters()}
    for quiet in (False, True):
        with engine_for(Stack, gradient_accumulation_steps=4) as engine:
            for step in range(4):
                if quiet and step < 3:
                    with engine.no_sync():
                        engine.backward(engine(data(rank, step)))
                else:
                    engine.backward(engine(data(rank, step)))
                assert_at_rest(engine)
                engine.step()
            assert engine.global_steps == 1
            assert_same(whole(engine.module), expected, f"quiet {quiet}")


def test_accumulation() -> None:
    run_ranks(_accumulation, 2)
