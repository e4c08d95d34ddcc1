"""What modules may return, keep and share at stage 3: weights after a few steps are those of plain torch.

Each block below is a fetch unit (it repeats in a ``ModuleList``), so that its parameters come and go as one.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import deepspeed
from tests.helpers.dist import run_ranks
from tests.helpers.zero3 import (
    WIDTH,
    Block,
    Stack,
    assert_at_rest,
    assert_same,
    coordinator,
    data,
    engine_for,
    live,
    plain_training,
    trains_as_plain,
    whole,
)


@dataclasses.dataclass
class Out:
    hidden: torch.Tensor
    extra: Any = None


class Pair(NamedTuple):
    first: torch.Tensor
    second: list


class Plain:
    def __init__(self, hidden: torch.Tensor) -> None:
        self.inner = {"hidden": hidden}


class Slots:
    __slots__ = ("hidden",)

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


class Opaque:
    """Something that nobody can look into."""

    __slots__ = ("read",)

    def __init__(self, hidden: torch.Tensor) -> None:
        self.read = lambda: hidden


CONTAINERS = {
    "tuple": (lambda h: (None, h), lambda o: o[1]),
    "list in dict": (lambda h: {"a": [h, 3]}, lambda o: o["a"][0]),
    "dataclass": (lambda h: Out(h, {"x": 1}), lambda o: o.hidden),
    "dataclass in tuple": (lambda h: (1, Out(None, Out(h))), lambda o: o[1].extra.hidden),
    "named tuple": (lambda h: Pair(h.detach(), [h]), lambda o: o.second[0]),
    "object": (Plain, lambda o: o.inner["hidden"]),
    "slots": (Slots, lambda o: o.hidden),
    "opaque": (Opaque, lambda o: o.read()),
    "two tensors": (lambda h: (h * 1.0, h * 2.0), lambda o: o[0] + o[1]),
    "first of two": (lambda h: (h * 2.0, h * 3.0), lambda o: o[0]),
    "the same twice": (lambda h: [h, h], lambda o: o[0] + o[1]),
}


class Containers(Stack):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.wrap, self.unwrap = CONTAINERS[kind]
        for block in self.blocks:
            block.register_forward_hook(lambda _, __, out: self.wrap(out))

    def run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.unwrap(block(x))


def _containers(rank: int, world: int) -> None:
    for kind in CONTAINERS:
        trains_as_plain(lambda kind=kind: Containers(kind), lambda m, x: m(x), rank, world, what=kind)


def test_outputs_may_be_containers() -> None:
    run_ranks(_containers, 2)


# What is done with the output of a block, h; a leaf of the graph keeps its gradient hooks through all of it.
OPERATIONS = {
    "in place": lambda h: h.clamp_(min=-0.5),
    "add in place": lambda h: h.add_(1.0).mul_(2.0),
    "view": lambda h: h.view(-1).view(3, WIDTH),
    "view in place": lambda h: h.view(-1).mul_(0.5).view(3, WIDTH),
    "index": lambda h: torch.stack([h[0], h[1], h[2]]),
    "index in place": lambda h: (h[0].mul_(0.5), h)[1],
    "chunk": lambda h: torch.cat(h.chunk(2, 1), 1),
    "unbind": lambda h: torch.stack(h.unbind(0)),
    "split of the transpose": lambda h: torch.cat(h.t().split(3)).t().contiguous(),
}


class Views(Stack):
    """The blocks end in a view of what they computed, on which the caller goes on."""

    def __init__(self, operation: str, outside: bool) -> None:
        super().__init__()
        self.operation, self.outside = OPERATIONS[operation], outside
        self.ends = {
            True: lambda _, __, out: (out * 1.0).view(-1).view(3, WIDTH),
            False: lambda _, __, out: self.operation(out * 1.0),
        }
        for block in self.blocks:
            block.register_forward_hook(self.ends[outside])

    def run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = block(x)
        return self.operation(h) if self.outside else h.mul_(1.5)


def _views(rank: int, world: int) -> None:
    for operation in OPERATIONS:
        for outside in (True, False):
            if not outside and operation in ("chunk", "unbind"):
                continue
            what = f"{operation}, outside {outside}"
            trains_as_plain(lambda o=operation, s=outside: Views(o, s), lambda m, x: m(x), rank, world, what=what)


def test_outputs_may_be_views_and_changed_in_place() -> None:
    run_ranks(_views, 2)


class Bare(nn.Module):
    """Returns a tuple of views, as ``y.chunk(2)`` in the last line of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: torch.Tensor) -> Any:
        return self.two(torch.tanh(self.one(x))).chunk(2, dim=1)


class Chunks(Stack):
    def __init__(self) -> None:
        super().__init__(Bare)

    def run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        scale, shift = block(x)
        return x * torch.sigmoid(scale) + shift


def _chunks(rank: int, world: int) -> None:
    trains_as_plain(Chunks, lambda m, x: m(x), rank, world)


def test_outputs_may_be_views_of_one_tensor() -> None:
    run_ranks(_chunks, 3)


class Keeps(Block):
    """Returns nothing but its hidden state; the auxiliary loss stays on the module, or goes to a list that was given."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.aux: Any = None

    def forward(self, x: torch.Tensor, given: list | None = None) -> torch.Tensor:
        h = torch.tanh(self.up(x))
        aux = (h @ self.up.weight).square().mean()
        if given is not None:
            given.append({"aux": aux})
        else:
            self.aux = aux if self.where == "attribute" else [aux]
        return x + self.norm(self.down(h))


class Auxiliary(Stack):
    def __init__(self, where: str, alone: bool) -> None:
        super().__init__(lambda: Keeps(where))
        self.alone = alone

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.given: list = []
        loss = super().forward(x)
        kept = [block.aux[0] if isinstance(block.aux, list) else block.aux for block in self.blocks]
        if self.given:
            kept = [item["aux"] for item in self.given]
        return sum(kept) if self.alone else loss + 0.5 * sum(kept)

    def run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return block(x, given=self.given) if block.where == "given" else block(x)


def _auxiliary(rank: int, world: int) -> None:
    for where in ("attribute", "list", "given"):
        for alone in (False, True):
            make = lambda where=where, alone=alone: Auxiliary(where, alone)  # noqa: E731
            trains_as_plain(make, lambda m, x: m(x), rank, world, what=f"{where} {alone}")


def test_losses_may_be_kept_aside() -> None:
    """The gradient of such a loss comes back before that of any output of its block."""
    run_ranks(_auxiliary, 2)


class ReturnsBias(nn.Module):
    """A linear layer that leaves the bias to its caller, as Megatron's; ``how`` it hands it over."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> Any:
        bias = {"itself": self.bias, "view": self.bias.view(2, -1), "slice": self.bias[2:]}[self.how]
        return x @ self.weight.t(), {"bias": bias}


class UsesReturned(Stack):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.odd = ReturnsBias(how)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, given = self.odd(x)
        x = y + given["bias"].sum().exp() * 0.1
        return super().forward(x)


def _returned(rank: int, world: int) -> None:
    for how in ("itself", "view", "slice"):
        make = lambda how=how: UsesReturned(how)  # noqa: E731
        trains_as_plain(make, lambda m, x: m(x), rank, world, what=how)
        # Returned to nobody: whoever called the module on its own reads it, with gradients and without.
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with engine_for(make) as engine:
                before = whole(engine.module)["odd.bias"]
                with mode():
                    y, given = engine.module.odd(data(rank, 0))
                    expected = {"itself": before, "view": before.view(2, -1), "slice": before[2:]}[how]
                    assert torch.equal(given["bias"], expected), (how, mode)
                if mode is torch.enable_grad:
                    engine.backward((y.sum() * given["bias"].sum()).square())
                    engine.step()
                engine.module(data(rank, 0))  # the next pass takes it back
                with torch.no_grad():
                    engine.module(data(rank, 0))
                assert not live(engine)


def test_modules_may_return_parameters_and_views_of_them() -> None:
    run_ranks(_returned, 2)


class External(nn.Module):
    """The embedding's weight, and a scale of the first block's norm, used by the root and by a block."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.last = Tied(self.embed) if how != "attribute" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = (x[:, 0].abs() * 3).long() % 11
        h = self.embed(ids)
        for block in self.blocks:
            h = block(h)
        h = h * self.blocks[0].norm.weight
        logits = nn.functional.linear(h, self.embed.weight) if self.last is None else self.last(h)
        return nn.functional.cross_entropy(logits, ids)


class Tied(nn.Module):
    def __init__(self, embed: nn.Embedding) -> None:
        super().__init__()
        self.other = (embed,)  # not a child
        self.bias = nn.Parameter(torch.zeros(11))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(h, self.other[0].weight, self.bias)


class Registered(Tied):
    """Reads the weight past every attribute access that could be noticed."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        weight = next(iter(self.other[0]._parameters.values()))
        return nn.functional.linear(h, weight, self.bias)


def _external(rank: int, world: int) -> None:
    for how in ("attribute", "module"):
        trains_as_plain(lambda how=how: External(how), lambda m, x: m(x), rank, world, what=how)

    def registered() -> nn.Module:
        model = External("registered")
        model.last = Registered(model.embed)
        deepspeed.zero.register_external_parameter(model.last, model.embed.weight)
        return model

    trains_as_plain(registered, lambda m, x: m(x), rank, world, what="registered")
    with engine_for(registered) as engine:
        model = engine.module
        assert [p for _, p in model.last.ds_external_parameters()] == [model.embed.weight]
        assert list(model.embed.ds_external_parameters()) == []
        deepspeed.zero.unregister_external_parameter(model.last, model.embed.weight)
        assert list(model.last.ds_external_parameters()) == []
        assert engine.module(data(rank, 0)).isnan()  # which shows that nothing else noticed
        deepspeed.zero.register_external_parameter(model.last, model.embed.weight)
        engine.zero_grad()
        assert not engine.module(data(rank, 0)).isnan()


def test_parameters_may_be_used_by_other_modules() -> None:
    run_ranks(_external, 2)


class Shared(Stack):
    """One block called several times, one of them inside another module; and a linear layer in two places."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.again = self.blocks[0]
        self.extra = nn.Linear(WIDTH, WIDTH)
        self.blocks[1].extra = self.extra

    def run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.extra(block(block(x))) + self.again(x)


def _shared(rank: int, world: int) -> None:
    for zero in ({}, {"stage3_max_reuse_distance": 10**6}, {"stage3_prefetch_bucket_size": 0}):
        trains_as_plain(Shared, lambda m, x: m(x), rank, world, zero=zero, what=str(zero))


def test_modules_may_be_shared_and_called_again() -> None:
    run_ranks(_shared, 2)


class Lists(Stack):
    """Parameters in lists and dicts, which are modules that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.full((WIDTH,), 0.5 + i)) for i in range(3))
        self.named = nn.ParameterDict({"shift": nn.Parameter(torch.ones(WIDTH)), "unused": nn.Parameter(torch.ones(5))})
        self.blocks[1].inner = nn.ParameterList([nn.Parameter(torch.ones(WIDTH))])

    def run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        index = list(self.blocks).index(block)
        return block(x) * self.scales[index] + self.named["shift"]


def _lists(rank: int, world: int) -> None:
    for zero in ({}, {"stage3_max_reuse_distance": 10**9}):
        trains_as_plain(Lists, lambda m, x: m(x), rank, world, zero=zero)


def test_parameters_may_be_in_lists() -> None:
    run_ranks(_lists, 2)


class Hooked(Stack):
    """The user's hooks: on modules, forward and backward, and on parameters, some of which change what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []
        for block in self.blocks:
            block.register_forward_pre_hook(lambda _, args: (args[0] * 1.1,))
            block.up.register_forward_hook(lambda _, __, out: out * 0.9)
            block.register_full_backward_pre_hook(lambda _, grads: (grads[0] * 1.5,))
            block.register_full_backward_hook(lambda _, grads, __: (grads[0] * 0.5,))
            block.down.register_full_backward_pre_hook(self.look)
        self.blocks[0].up.weight.register_hook(lambda grad: grad * 2.0)
        self.blocks[1].norm.bias.register_hook(lambda grad: grad.flip(0))

    def look(self, module: nn.Module, grads: Any) -> None:
        self.seen.append(float(module.weight.detach().sum()))  # is there when its module's backward begins


def _hooked(rank: int, world: int) -> None:
    for zero in ({}, {"stage3_max_reuse_distance": 10**9}):
        trains_as_plain(Hooked, lambda m, x: m(x), rank, world, zero=zero)
    with engine_for(Hooked) as engine:
        weights = whole(engine.module)
        engine.backward(engine(data(rank, 0)))
        expected = [float(weights[f"blocks.{i}.down.weight"].sum()) for i in (2, 1, 0)]
        assert engine.module.seen == pytest.approx(expected)


def test_users_hooks() -> None:
    run_ranks(_hooked, 2)


class Logged(Stack):
    """Looks at its weights as arrays, on the way; that makes their memory torch's no more."""

    def run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        assert abs(float(block.up.weight.detach().numpy().mean())) < 1
        return block(x)


def _logged(rank: int, world: int) -> None:
    for zero in ({}, {"stage3_max_reuse_distance": 10**9}):
        trains_as_plain(Logged, lambda m, x: m(x), rank, world, zero=zero)


def test_weights_may_be_looked_at_as_arrays() -> None:
    run_ranks(_logged, 2)


class Recursive(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.own = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
        y = torch.tanh(self.layer(x)) * self.own
        return self(y, depth - 1) + x if depth else y


def _recursive(rank: int, world: int) -> None:
    trains_as_plain(Recursive, lambda m, x: m(x).square().mean(), rank, world)


def test_models_may_call_themselves() -> None:
    run_ranks(_recursive, 2)


def _alone(rank: int, world: int) -> None:
    """Modules called on their own: the inner model, a block, a layer within a block, the inside of a container."""

    def block(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model.blocks[1](x).square().mean()

    def layer(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model.blocks[0].norm(model.blocks[2].down(model.blocks[2].up(x))).exp().mean()

    def body(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = model.entry(x)
        for part in model.blocks:
            h = part(h)
        return h.square().mean()

    for use in (lambda m, x: m(x), block, layer, body):
        trains_as_plain(Stack, use, rank, world, call=lambda e: e.module, planned=False)

    def all_of_them(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x) + block(model, x) + layer(model, x) + body(model, x)

    trains_as_plain(Stack, all_of_them, rank, world, planned=False)
    with engine_for(Stack) as engine:
        weights = whole(engine.module)
        with torch.no_grad():
            got = engine.module.blocks[0].up(data(rank, 0))
        assert torch.equal(got, data(rank, 0) @ weights["blocks.0.up.weight"].t() + weights["blocks.0.up.bias"])
        assert_at_rest(engine)


def test_submodules_may_be_called_alone() -> None:
    run_ranks(_alone, 2)


def _modes(rank: int, world: int) -> None:
    """Evaluation between training steps, in every way to have no gradients."""
    expected = plain_training(Stack, lambda m, x: m(x), world, 4)
    for mode in (torch.no_grad, torch.inference_mode):
        with engine_for(Stack) as engine:
            reference = Stack()
            for step in range(4):
                with mode():
                    engine.eval()
                    losses = [engine(data(rank, 50)), engine.module(data(rank, 50))]
                    assert_at_rest(engine)
                    weights = whole(engine.module)
                    reference.load_state_dict(weights)
                    assert torch.equal(reference(data(rank, 50)), losses[0]) and torch.equal(*losses), (mode, step)
                engine.train()
                loss = engine(data(rank, step))
                if step % 2:
                    with mode():
                        engine(data(rank, 51))  # between a forward and its backward
                engine.backward(loss)
                assert_at_rest(engine)
                engine.step()
            assert_same(whole(engine.module), expected, str(mode))
            assert coordinator(engine).book.recorded == {True: True, False: True}


def test_evaluation_between_training_steps() -> None:
    run_ranks(_modes, 2)


class Parametrised(Stack):
    """Weight norm as torch does it now: the weight is computed by a module of its own, on access."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.head)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.recurrent = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[None]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return super().forward(self.recurrent(x)[0][0])


def _parametrised(rank: int, world: int) -> None:
    trains_as_plain(Parametrised, lambda m, x: m(x), rank, world)
    with engine_for(Parametrised) as engine:
        reference = Parametrised()
        reference.load_state_dict(whole(engine.module))
        engine.eval(), reference.eval()
        with torch.no_grad():  # attention takes another way then, which reads its parameters itself
            torch.testing.assert_close(engine(data(rank, 0)), reference(data(rank, 0)))


def test_modules_that_read_parameters_in_their_own_ways() -> None:
    run_ranks(_parametrised, 2)


@pytest.mark.parametrize("world", [1, 3])
def test_other_numbers_of_ranks(world: int) -> None:
    run_ranks(_other_worlds, world)


def _other_worlds(rank: int, world: int) -> None:
    for make in (
        Chunks,
        Shared,
        lambda: External("module"),
        lambda: UsesReturned("view"),
        lambda: Auxiliary("list", False),
    ):
        trains_as_plain(make, lambda m, x: m(x), rank, world)
