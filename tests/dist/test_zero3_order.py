"""Ranks that do not run the same modules, and passes that end early: nobody hangs, and the weights are right."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from deepspeed import comm
from deepspeed.utils import set_z3_leaf_modules
from tests.helpers.dist import run_ranks
from tests.helpers.zero3 import (
    WIDTH,
    Block,
    Stack,
    assert_at_rest,
    assert_same,
    built,
    coordinator,
    data,
    engine_for,
    plain_training,
    trains_as_plain,
    whole,
)


class Branching(Block):
    """Uses its layers as it is told; ``spare`` on some ranks only."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, how: int = 0) -> torch.Tensor:
        if how == 1:
            return x + self.spare(x)
        if how == 2:
            return super().forward(self.spare(x))
        if how == 3:
            return x * self.norm.weight
        return super().forward(x)


class Chooses(Stack):
    """``choices[i]``: how block i runs; None: not at all."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__(Branching, depth)

    def forward(self, x: torch.Tensor, choices: tuple) -> torch.Tensor:
        x = torch.tanh(self.entry(x))
        for block, how in zip(self.blocks, choices, strict=False):
            if how is not None:
                x = block(x, how)
        return self.head(x).square().mean()


INSIDE = ((0, 1, 2), (3, 1, 0), (2, 2, 2), (1, 0, 3), (0, 0, 0), (3, 3, 3))
SKIPPING = ((0, 0, 0), (None, 0, 1), (0, None, None), (1, 2, None), (None, None, None), (0, 0, 0), (None, 1, 0))


def _choice(table: tuple, first_alike: bool):
    def use(model: nn.Module, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
        alike = first_alike and step < 2
        return model(x, table[0] if alike else table[(step + 2 * rank) % len(table)])

    return use


def _control_flow(rank: int, world: int) -> None:
    for table, first_alike in itertools.product((INSIDE, SKIPPING), (False, True)):
        zero: dict = {"reduce_bucket_size": 120, "overlap_comm": first_alike}
        if first_alike == (world == 3):
            zero["stage3_max_reuse_distance"] = 10**6
        use = _choice(table, first_alike)
        what = f"{'inside' if table is INSIDE else 'skipping'} {first_alike} {zero}"
        trains_as_plain(Chooses, use, rank, world, zero=zero, steps=6, per_rank=True, what=what)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_may_use_different_modules(world: int) -> None:
    """Inside of blocks, and whole blocks; in the first step already, or after a plan was agreed upon."""
    run_ranks(_control_flow, world)


def _one_sequence(rank: int, world: int, first_alike: bool) -> list[list[tuple[str, int]]]:
    """Every operation of five steps, in order, as backends want it that run operations in the order of their start."""
    use = _choice(SKIPPING, first_alike)
    sequences = []
    with engine_for(Chooses, {"reduce_bucket_size": 120}) as engine:
        assert len(engine._flat.buckets) > 6
        assert engine._flat.reducer.sends_when_ready()  # messages between pairs do not mind
        engine._flat.reducer.sends_when_ready = lambda: coordinator(engine).clock is None
        for step in range(5):
            with comm.observe() as events:
                engine.backward(use(engine, data(rank, step), rank, step))
                engine.step()
            sequences.append([(e.op, e.nbytes) for e in events])
        got = whole(engine.module)
    expected = plain_training(Chooses, use, world, 5, per_rank=True)
    assert_same(got, expected)
    return sequences


@pytest.mark.parametrize("first_alike", [False, True])
def test_all_ranks_run_the_same_operations_in_the_same_order(first_alike: bool) -> None:
    """Gathers and reductions mixed, whatever each rank uses; so that nobody can wait for ever."""
    first, *others = run_ranks(_one_sequence, 3, first_alike)
    assert all(other == first for other in others)
    assert len({op for op, _ in first[-1]}) == 3 and len(first[-1]) > 60


class TwiceIfAsked(Chooses):
    """One block called twice in a pass; ranks use different parameters of it in either call."""

    def forward(self, x: torch.Tensor, choices: tuple) -> torch.Tensor:
        x = torch.tanh(self.entry(x))
        for how in choices:
            x = self.blocks[0](x, how)
            x = self.blocks[1](x)
        return self.head(x).square().mean()


def _called_twice(rank: int, world: int) -> None:
    """What a rank did not use in one call it holds longer than the others; they must not wait for that."""
    for zero in ({}, {"stage3_prefetch_bucket_size": 0}, {"stage3_max_reuse_distance": 10**6}):
        zero = {"reduce_bucket_size": 120, **zero}
        table = ((0, 3), (3, 0), (1, 2), (2, 1), (0, 0))
        use = _choice(table, False)
        trains_as_plain(TwiceIfAsked, use, rank, world, zero=zero, steps=5, per_rank=True, what=str(zero))

        def two_passes(model: nn.Module, x: torch.Tensor, rank: int, step: int, use=use) -> torch.Tensor:
            return use(model, x, rank, step) + use(model, x * 0.5, rank, step + 1)

        trains_as_plain(TwiceIfAsked, two_passes, rank, world, zero=zero, steps=4, per_rank=True, what=f"two {zero}")


def test_ranks_may_use_different_parts_of_what_is_called_twice() -> None:
    run_ranks(_called_twice, 2)


class Reordered(Chooses):
    """All ranks change the order of modules together, from step to step."""

    def forward(self, x: torch.Tensor, order: tuple) -> torch.Tensor:
        x = torch.tanh(self.entry(x))
        for index in order:
            x = self.blocks[index](x)
        return self.head(x).square().mean()


def _new_orders(rank: int, world: int) -> None:
    orders = ((0, 1, 2), (0, 1, 2), (2, 0), (2, 0), (1, 1, 0, 2), (1,), (2, 1, 0))
    seen = []

    def note(engine, step: int) -> None:
        seen.append(coordinator(engine).plan)

    def use(model: nn.Module, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
        return model(x, orders[step])

    trains_as_plain(Reordered, use, rank, world, steps=len(orders), per_rank=True, between=note)
    assert all(seen) and [plan.forward_len for plan in seen] == [6, 6, 5, 5, 7, 4, 6]
    assert seen[0] is seen[1] and seen[1] is not seen[2], "a plan is made anew when all ranks left the last one alike"


def test_plans_follow_when_all_ranks_change_their_ways() -> None:
    run_ranks(_new_orders, 2)


def _late_use(rank: int, world: int) -> None:
    """A leaf module travels as one, whatever ranks use of it, and in which order."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def forward(self, x: torch.Tensor, chosen: list[int]) -> torch.Tensor:
            for index in chosen:
                x = x + torch.tanh(self.experts[index](x))
            return x

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.entry = nn.Linear(WIDTH, WIDTH)
            self.mixture = Experts()
            self.head = nn.Linear(WIDTH, 2)
            set_z3_leaf_modules(self, [Experts])

        def forward(self, x: torch.Tensor, chosen: list[int]) -> torch.Tensor:
            return self.head(self.mixture(self.entry(x), chosen)).square().mean()

    def use(model: nn.Module, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
        return model(x, [[0, 1], [3, 2, 3], [1], []][(rank + step) % 4])

    trains_as_plain(Mixture, use, rank, world, steps=4, per_rank=True)
    with engine_for(Mixture) as engine:
        for step in range(3):
            with comm.observe() as events:
                use(engine, data(rank, step), rank, step)
            sizes = sorted(e.nbytes for e in events if e.op == "irecv")
        assert len(sizes) == 3 * (world - 1)  # the entry, all experts together, the head


def test_leaf_modules_travel_as_one() -> None:
    run_ranks(_late_use, 2)


# -- passes that fail ----------------------------------------------------------------------------------------------------


class Boom(Exception):
    pass


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, error: type[BaseException]) -> torch.Tensor:
        ctx.error = error
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        raise ctx.error("in backward")


PLACES = ("block", "layer in a block", "entry", "root", "caught in a block", "caught by the root", "no grad", "alone")


def _fail_once(engine, rank: int, place: str, error: type[BaseException]) -> None:
    model = engine.module
    target = {
        "layer in a block": model.blocks[1].down,
        "caught in a block": model.blocks[1].down,
        "entry": model.entry,
        "root": model,
    }.get(place, model.blocks[1])

    def fail(*_) -> None:
        raise error(place)

    hook = target.register_forward_hook(fail, prepend=True)  # before the hooks that see a module end
    x = data(rank, 77)
    try:
        if place == "caught by the root":
            with torch.enable_grad():
                h = model.entry(x)
                with pytest.raises(error):
                    model.blocks[1](h)
                engine.backward(model.blocks[2](h).sum())
        else:
            with torch.set_grad_enabled(place != "no grad"), pytest.raises(error):
                model.blocks[1](x) if place == "alone" else engine(x)
    finally:
        hook.remove()
    engine.zero_grad()


def _fails_forward(rank: int, world: int) -> None:
    expected = plain_training(Stack, lambda m, x: m(x), world, 3)
    for number, (place, error) in enumerate(itertools.product(PLACES, (Boom, KeyboardInterrupt))):
        before = 2 * (number % 4 in (1, 2))
        with engine_for(Stack) as engine:
            for step in range(3):
                if step == before:
                    _fail_once(engine, rank, place, error)
                    if error is Boom:
                        assert_at_rest(engine)
                engine.backward(engine(data(rank, step)))
                assert_at_rest(engine)
                engine.step()
                assert_at_rest(engine)
            assert_same(whole(engine.module), expected, f"{place} {error} {before}")


def test_training_goes_on_after_a_failed_forward() -> None:
    run_ranks(_fails_forward, 2)


def _fails_backward(rank: int, world: int) -> None:
    expected = plain_training(Stack, lambda m, x: m(x), world, 3)
    for where, before, plain in itertools.product((0, 2), (0, 2), (False, True)):
        with engine_for(Stack) as engine:
            for step in range(3):
                if step == before:
                    block = engine.module.blocks[where]
                    hook = block.register_forward_hook(lambda _, __, out: _Fails.apply(out, Boom))
                    loss = engine(data(rank, 77))
                    with pytest.raises(Boom):
                        loss.backward() if plain else engine.backward(loss)
                    hook.remove()
                    if plain:
                        engine.zero_grad()
                    else:
                        assert_at_rest(engine)
                engine.backward(engine(data(rank, step)))
                assert_at_rest(engine)
                engine.step()
            assert_same(whole(engine.module), expected, f"{where} {before} {plain}")


def test_training_goes_on_after_a_failed_backward() -> None:
    run_ranks(_fails_backward, 2)


def _interrupted_and_stepped(rank: int, world: int) -> None:
    """An interrupt leaves a forward that never ended; a step then must not leave stale weights whole."""
    with engine_for(Stack) as engine:
        engine.backward(engine(data(rank, 0)))
        hook = engine.module.blocks[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine(data(rank, 9))
        hook.remove()
        engine.step()
        assert_at_rest(engine)
        expected = plain_training(Stack, lambda m, x: m(x), world, 1)
        assert_same(whole(engine.module), expected)
        model = built(Stack)
        model.load_state_dict(expected)
        with torch.no_grad():
            torch.testing.assert_close(engine(data(rank, 1)), model(data(rank, 1)))


def test_an_interrupted_forward_leaves_nothing_stale() -> None:
    run_ranks(_interrupted_and_stepped, 2)


def _written_while_released(rank: int, world: int) -> None:
    """The mistake is named; what was there before goes on."""
    with engine_for(Stack) as engine:
        engine.backward(engine(data(rank, 0)))
        engine.step()
        with torch.no_grad():
            engine.module.blocks[1].up.bias.zero_()
        with pytest.raises(RuntimeError, match=r"blocks\.1\.up\.bias was written to"):
            engine(data(rank, 1))
        engine.backward(engine(data(rank, 1)))
        engine.step()
        assert_same(whole(engine.module), plain_training(Stack, lambda m, x: m(x), world, 2))


def test_writing_to_released_parameters_is_told() -> None:
    run_ranks(_written_while_released, 2)
