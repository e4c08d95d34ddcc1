"""``TiledLinear`` against ``torch.nn.Linear``.

Values are small whole numbers where results are compared exactly: then no order of summation rounds.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

from deepspeed.runtime.zero import tiling
from deepspeed.runtime.zero.tiling import TiledLinear, TiledLinearReturnBias

GRIDS = [(1, 1), (1, 3), (4, 1), (2, 2), (3, 5), (7, 5)]  # in_splits, out_splits of a 7 -> 5 layer: most are uneven


def whole_numbers(*shape: int) -> torch.Tensor:
    return torch.randint(-4, 5, shape).float()


def linear(bias: bool = True, ins: int = 7, outs: int = 5) -> nn.Linear:
    layer = nn.Linear(ins, outs, bias=bias)
    for param in layer.parameters():
        param.data = whole_numbers(*param.shape)
    return layer


def tiled(layer: nn.Linear, in_splits: int, out_splits: int, cls=TiledLinear, **kwargs) -> TiledLinear:
    return cls(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        in_splits=in_splits,
        out_splits=out_splits,
        init_linear=layer,
        **kwargs,
    )


def whole(module: TiledLinear, of) -> torch.Tensor:
    """The tiles' weights (``of`` picks them, or their gradients) put together again."""
    parts = [of(tile.weight) for tile in module.tiles]
    rows = [torch.cat(parts[i * module.in_splits :][: module.in_splits], dim=1) for i in range(module.out_splits)]
    return torch.cat(rows)


def whole_bias(module: TiledLinear, of) -> torch.Tensor:
    return torch.cat([of(tile.bias) for tile in module.tiles if tile.bias is not None])


class Doubled(nn.Linear):
    """A class of ours, with a forward of its own and one more argument."""

    def __init__(self, *args, factor: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = factor

    def forward(self, x):
        return super().forward(x) * self.factor


class Apart(nn.Linear):
    """Leaves adding the bias to the caller."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight), self.bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 1, 3, 7), (0, 7), (2, 0, 7)])
def test_forward_and_gradients_are_those_of_the_whole_layer(grid, bias, shape):
    layer = linear(bias)
    module = tiled(layer, *grid)
    x, weights = whole_numbers(*shape), whole_numbers(*shape[:-1], 5)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = module(ours), layer(theirs)
    assert torch.equal(out, expected)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(whole(module, lambda w: w.grad), layer.weight.grad)
    if bias:
        assert torch.equal(whole_bias(module, lambda b: b.grad), layer.bias.grad)
    else:
        assert all(tile.bias is None for tile in module.tiles)


@pytest.mark.parametrize("grid", GRIDS)
def test_tiles_are_even_and_modules_of_their_own(grid):
    module = TiledLinear(7, 5, in_splits=grid[0], out_splits=grid[1])
    assert len(module.tiles) == grid[0] * grid[1]
    assert sum(tile.weight.numel() for tile in module.tiles) == 35
    assert sum(tile.bias.numel() for tile in module.tiles if tile.bias is not None) == 5
    for sizes in (module.in_sizes, module.out_sizes):
        assert max(sizes) - min(sizes) <= 1
    assert all(isinstance(tile, nn.Linear) for tile in module.tiles)
    assert module._z3_fetch_separately
    seen = []
    for tile in module.tiles:
        tile.register_forward_hook(lambda tile, *_: seen.append(tile))
    module(torch.zeros(2, 7))
    assert seen == list(module.tiles)


def test_an_input_that_is_split_already():
    layer = linear()
    module = tiled(layer, 3, 2, input_is_already_split=True)
    x = whole_numbers(2, 4, 7)
    parts = [part.clone().requires_grad_() for part in x.split(module.in_sizes, dim=-1)]
    out = module(parts)
    assert torch.equal(out, layer(x)) and torch.equal(module(tuple(parts)), out)
    out.sum().backward()
    assert torch.equal(torch.cat([part.grad for part in parts], -1), layer.weight.sum(0).expand(2, 4, 7))


def test_outputs_may_stay_apart_and_feed_the_next_layer():
    first, second = linear(), linear(ins=5, outs=4)
    module = tiled(first, 2, 3, combine_out_splits=False)
    x = whole_numbers(2, 4, 7)
    outs = module(x)
    assert isinstance(outs, list) and [out.shape for out in outs] == [(2, 4, size) for size in module.out_sizes]
    assert torch.equal(torch.cat(outs, -1), first(x))
    following = tiled(second, 3, 2, input_is_already_split=True)
    assert torch.equal(following(outs), second(first(x)))
    lone = tiled(first, 2, 1, combine_out_splits=False)(x)
    assert isinstance(lone, list) and len(lone) == 1 and torch.equal(lone[0], first(x))


@pytest.mark.parametrize("grid", GRIDS)
def test_tiles_of_another_class(grid):
    layer = linear()
    module = tiled(layer, *grid, linear_cls=Doubled, factor=2.0)
    assert all(type(tile) is Doubled and tile.factor == 2.0 for tile in module.tiles)
    x = whole_numbers(2, 3, 7)
    assert torch.equal(module(x), 2 * layer(x))
    split = tiled(layer, *grid, linear_cls=Doubled, input_is_already_split=True, combine_out_splits=False)
    assert torch.equal(torch.cat(split(x.split(split.in_sizes, -1)), -1), layer(x))


def test_keywords_reach_the_tiles():
    module = TiledLinear(7, 5, in_splits=2, dtype=torch.float64, device="meta")
    assert {(p.dtype, p.device.type) for p in module.parameters()} == {(torch.float64, "meta")}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bias", [True, False])
def test_biases_returned_apart(grid, bias):
    layer = linear(bias)
    x = whole_numbers(2, 3, 7)
    out, found = tiled(layer, *grid, cls=TiledLinearReturnBias, linear_cls=Apart)(x)
    assert torch.equal(out, nn.functional.linear(x, layer.weight))
    assert torch.equal(found, layer.bias) if bias else found is None
    module = tiled(layer, *grid, cls=TiledLinearReturnBias, linear_cls=Apart, combine_out_splits=False)
    outs, biases = module(x)
    assert torch.equal(torch.cat(outs, -1), nn.functional.linear(x, layer.weight))
    if bias:
        assert [b.shape for b in biases] == [(size,) for size in module.out_sizes]
        assert torch.equal(torch.cat(biases), layer.bias)


def test_what_a_tile_returns_must_fit_the_class():
    with pytest.raises(TypeError, match="use TiledLinearReturnBias"):
        TiledLinear(7, 5, linear_cls=Apart)(torch.zeros(7))
    with pytest.raises(TypeError, match="use TiledLinear"):
        TiledLinearReturnBias(7, 5)(torch.zeros(7))


def test_fresh_layers_are_initialised_as_the_whole_layer():
    torch.manual_seed(0)
    module = TiledLinear(400, 300, in_splits=4, out_splits=3)
    for values in (whole(module, lambda w: w.detach()), whole_bias(module, lambda b: b.detach())):
        bound = 1 / math.sqrt(400)  # torch's: uniform within 1 / sqrt(in_features)
        assert 0.95 * bound < values.abs().max() <= bound
        assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    module.tiles[1].reset_parameters()
    assert module.tiles[1].weight.abs().max() <= bound


@pytest.mark.parametrize("splits", [0, -1, 8, 1.5, None])
def test_splits_out_of_range(splits):
    with pytest.raises(ValueError, match=r"in_splits: expected a whole number from 1 to in_features = 7, got"):
        TiledLinear(7, 9, in_splits=splits)
    with pytest.raises(ValueError, match=r"out_splits: expected a whole number from 1 to out_features = 7, got"):
        TiledLinear(9, 7, out_splits=splits)


def test_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match=r"expected a tensor \(\.\.\., 7\), got a tensor \(2, 6\)"):
        TiledLinear(7, 5, in_splits=2)(torch.zeros(2, 6))
    with pytest.raises(ValueError, match="got 2 of them"):
        TiledLinear(7, 5, in_splits=2)([torch.zeros(4), torch.zeros(3)])
    module = TiledLinear(7, 5, in_splits=2, input_is_already_split=True)
    for wrong in (torch.zeros(7), [torch.zeros(3), torch.zeros(4)], [torch.zeros(4)]):
        with pytest.raises(ValueError, match=r"list of 2 tensors with last dimensions \(4, 3\)"):
            module(wrong)


def test_copying_from_a_layer_that_does_not_fit_changes_nothing():
    module = TiledLinear(7, 5, in_splits=2)
    before = copy.deepcopy(module.state_dict())
    for other, name in ((nn.Linear(5, 7), "weight"), (nn.Linear(7, 5, bias=False), "bias"), (nn.ReLU(), "weight")):
        with pytest.raises(ValueError, match=rf"{type(other).__name__}\.{name}: expected a tensor"):
            module.copy_params_from(other)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_copying_leaves_out_a_bias_that_has_no_place():
    layer = linear()
    module = TiledLinear(7, 5, bias=False, in_splits=2, init_linear=layer)
    x = whole_numbers(3, 7)
    assert torch.equal(module(x), nn.functional.linear(x, layer.weight))


def test_copying_zeroes_biases_that_a_class_adds_on_its_own():
    class Stubborn(nn.Linear):
        def __init__(self, ins, outs, bias):
            super().__init__(ins, outs, bias=True)

    layer = linear()
    x = whole_numbers(3, 7)
    assert torch.equal(tiled(layer, 3, 2, linear_cls=Stubborn)(x), layer(x))


def test_copying_casts_and_records_no_gradient():
    layer = linear()
    module = TiledLinear(7, 5, in_splits=2, init_linear=layer, dtype=torch.bfloat16)
    assert torch.equal(whole(module, lambda w: w.float()), layer.weight)
    assert all(p.grad_fn is None and p.requires_grad and p.is_leaf for p in module.parameters())


def test_copying_gathers_the_source_whole_and_tile_after_tile(monkeypatch):
    """The contract with ZeRO-3: rank 0 is the modifier, and never is more than one tile whole."""
    held: list[tuple[list[int], int | None]] = []
    most = []

    class Recorded:
        def __init__(self, params, modifier_rank=None):
            self.entry = ([id(p) for p in params if p is not None], modifier_rank)

        def __enter__(self):
            held.append(self.entry)
            most.append(list(held))

        def __exit__(self, *error):
            held.remove(self.entry)

    monkeypatch.setattr(tiling, "GatheredParameters", Recorded)
    layer = linear()
    module = TiledLinear(7, 5, in_splits=3, out_splits=2)
    # As ZeRO-3 presents partitioned parameters to code that asks for shapes.
    for param in (*layer.parameters(), *module.parameters()):
        param.ds_shape = param.shape
    module.copy_params_from(layer)
    source = ([id(layer.weight), id(layer.bias)], None)
    assert most == [[source]] + [[source, ([id(p) for p in tile.parameters()], 0)] for tile in module.tiles]
    assert not held
    assert torch.equal(whole(module, lambda w: w), layer.weight)


def output_of_first_tile(module: TiledLinear, x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The layer's output, and whether it lies in the memory of the first tile's."""
    seen = []
    handle = module.tiles[0].register_forward_hook(lambda tile, args, out: seen.append(out.data_ptr()))
    out = module(x)
    handle.remove()
    return out, seen[0] == out.data_ptr()


def test_partial_sums_are_added_in_place():
    layer = linear()
    x = whole_numbers(2, 3, 7)
    out, in_place = output_of_first_tile(tiled(layer, 3, 1), x)
    assert in_place and torch.equal(out, layer(x))
    # The result of another class may be needed by its backward, or by somebody else.
    out, in_place = output_of_first_tile(tiled(layer, 3, 1, linear_cls=Doubled), x)
    assert not in_place and torch.equal(out, layer(x))
    module = tiled(layer, 3, 1)
    module.tiles[0].forward = module.tiles[0].forward  # what hook managers do
    out, in_place = output_of_first_tile(module, x)
    assert not in_place and torch.equal(out, layer(x))


@pytest.mark.parametrize("shape", [(6, 7), (2, 3, 7)])
def test_backward_keeps_views_of_the_input_and_no_partial_sums(shape):
    module = TiledLinear(7, 5, in_splits=3, out_splits=2)
    x = torch.randn(shape, requires_grad=True)
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x).sum()
    allowed = {t.untyped_storage().data_ptr() for t in (x, *(tile.weight for tile in module.tiles))}
    assert set(kept) == allowed


def watch(module: TiledLinear, note) -> None:
    """Calls ``note(number, gradient)`` when the gradient reaches a tile's output: so ZeRO-3 learns that it is next."""

    def hook(number):
        def after_forward(tile, args, out):
            out.register_hook(lambda grad: note(number, grad))  # returns nothing: the output stays

        return after_forward

    for number, tile in enumerate(module.tiles):
        tile.register_forward_hook(hook(number))


def test_a_hook_on_an_output_that_is_added_to_later_still_gets_its_gradient():
    module = tiled(linear(), 3, 1)
    seen = {}
    watch(module, lambda number, grad: seen.update({number: grad}))
    module(whole_numbers(2, 7).requires_grad_()).sum().backward()
    assert sorted(seen) == [0, 1, 2] and all(torch.equal(grad, torch.ones(2, 5)) for grad in seen.values())


@pytest.mark.parametrize("linear_cls", [nn.Linear, Doubled])
def test_backward_is_done_with_a_tile_before_it_needs_the_next(linear_cls):
    module = tiled(linear(), 2, 2, linear_cls=linear_cls)
    order = []
    watch(module, lambda number, grad: order.append(f"output {number}"))
    for number, tile in enumerate(module.tiles):
        tile.weight.register_post_accumulate_grad_hook(lambda _, number=number: order.append(f"weight {number}"))
    module(whole_numbers(3, 7)).sum().backward()
    assert order == [f"{what} {number}" for number in (3, 2, 1, 0) for what in ("output", "weight")]


def test_full_backward_hooks_on_tiles():
    layer = linear()
    module = tiled(layer, 3, 2)
    seen = []
    for tile in module.tiles:
        tile.register_full_backward_hook(lambda tile, *_: seen.append(tile))
    x = whole_numbers(2, 3, 7).requires_grad_()
    out = module(x)
    assert torch.equal(out, layer(x))
    out.sum().backward()
    assert set(seen) == set(module.tiles)
    assert torch.equal(x.grad, layer.weight.sum(0).expand(2, 3, 7))


def test_frozen_tiles_and_no_grad():
    layer = linear()
    module = tiled(layer, 2, 2)
    x = whole_numbers(3, 7)
    for trained in range(4):
        for number, tile in enumerate(module.tiles):
            tile.requires_grad_(number == trained)
        module.zero_grad()
        module(x).sum().backward()
        assert [tile.weight.grad is not None for tile in module.tiles] == [n == trained for n in range(4)]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(module(x), layer(x))


def test_gradients_of_gradients():
    module = TiledLinear(4, 3, in_splits=2, out_splits=2, dtype=torch.float64)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    names, params = zip(*module.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,)).sin()

    assert torch.autograd.gradcheck(run, (x, *params))
    assert torch.autograd.gradgradcheck(run, (x, *params))


def test_autocast():
    layer = linear()
    x = whole_numbers(2, 3, 7).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = tiled(layer, 3, 2)(x)
        assert out.dtype == torch.bfloat16 and torch.equal(out, layer(x))


def test_training_equals_the_whole_layer_s():
    torch.manual_seed(0)
    layer = nn.Linear(7, 5, dtype=torch.float64)
    module = tiled(layer, 3, 2, dtype=torch.float64)
    x = torch.linspace(-1, 1, 42, dtype=torch.float64).view(2, 3, 7)
    start = layer.weight.detach().clone()
    for _, model in itertools.product(range(5), (layer, module)):
        model.zero_grad()
        model(x).square().mean().backward()
        with torch.no_grad():
            for param in model.parameters():
                param -= 0.5 * param.grad
    assert (layer.weight - start).abs().max() > 0.01
    torch.testing.assert_close(whole(module, lambda w: w.detach()), layer.weight.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(whole_bias(module, lambda b: b.detach()), layer.bias.detach(), rtol=1e-10, atol=1e-12)


def test_copies_pickles_and_prints():
    module = tiled(linear(), 3, 2)
    x = whole_numbers(2, 7)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
    assert repr(module).startswith(
        "TiledLinear(\n  in_features=7, out_features=5, bias=True, in_splits=3, out_splits=2"
    )
    assert set(module.state_dict()) == {f"tiles.{i}.weight" for i in range(6)} | {"tiles.0.bias", "tiles.3.bias"}
