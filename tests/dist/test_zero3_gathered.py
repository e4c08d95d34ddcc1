"""What partitioned parameters show of themselves, and ``GatheredParameters`` in all its uses."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed import zero
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_full_fp32_param
from tests.helpers.dist import run_ranks
from tests.helpers.models import Tricky, batches
from tests.helpers.training import make_engine, make_model

CONFIG: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
NONE_PERSIST = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
ALL_PERSIST = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1000000}}
GONE, THERE = ZeroParamStatus.NOT_AVAILABLE, ZeroParamStatus.AVAILABLE


def linear(seed: int = 0, features: int = 5, **keywords: Any) -> nn.Linear:
    torch.manual_seed(seed)
    with zero.Init(config_dict_or_path=CONFIG, **keywords):
        return nn.Linear(3, features)


def values(param: nn.Parameter) -> torch.Tensor:
    with zero.GatheredParameters(param):
        return param.detach().clone()


def assert_released(*params: torch.Tensor) -> None:
    for param in params:
        assert param.ds_status is GONE and not param._ds_handle.holds, param._ds_handle.describe()
        assert param.untyped_storage().nbytes() <= 8


# -- true shapes -------------------------------------------------------------------------------------------------------


def shapes(rank: int, world_size: int) -> None:
    model = linear(dtype=torch.bfloat16)
    weight, bias = model.weight, model.bias
    weight._is_hf_initialized = True
    for state in ("released", "gathered", "released"):
        with zero.GatheredParameters(model.parameters(), enabled=state == "gathered"):
            assert weight.shape == weight.ds_shape == (5, 3) and bias.shape == bias.ds_shape == (5,)
            assert (weight.numel(), weight.dim(), weight.ds_numel, len(weight)) == (15, 2, 15, 5)
            assert weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_leaf
            assert sum(p.numel() for p in model.parameters()) == 20
            assert [n for n, _ in model.named_parameters()] == ["weight", "bias"]
            assert weight.stride() == ((3, 1) if state == "gathered" else (0, 0))
            assert (weight.ds_status, bool(weight.isnan().any())) == ((THERE, False), (GONE, True))[state == "released"]
            assert weight._is_hf_initialized and isinstance(weight, nn.Parameter) and weight.requires_grad
    piece = -(-15 // world_size)
    assert weight.partition_numel() == weight.ds_tensor.ds_numel == piece == weight.ds_tensor.numel()
    assert weight.padding_size() == piece * world_size - 15 and weight.aligned_size() == piece * world_size
    assert weight.ds_summary()["ds_shape"] == (5, 3) and not weight.ds_persist and weight.ds_active_sub_modules == set()
    # Whatever reads a released parameter gets NaN; most of what writes to one raises at once.
    assert (torch.ones(1, 3, dtype=torch.bfloat16) @ weight.t()).isnan().all() and weight.sum().isnan()
    assert float(weight[0, 0]) != float(weight[0, 0]) and weight.detach().clone().isnan().all()
    with torch.no_grad():
        for write in (weight.normal_, lambda: weight.add_(1), lambda: weight.copy_(torch.ones(5, 3))):
            with pytest.raises(RuntimeError, match="single memory location"):
                write()
    assert values(weight).isfinite().all()
    # Others are noticed at the next fetch, which does not believe them.
    kept = values(weight)
    for write in (weight.zero_, lambda: weight.fill_(3), lambda: setattr(weight, "data", torch.ones(5, 3))):
        with torch.no_grad():
            write()
        with pytest.raises(RuntimeError, match=r"Linear\.weight was .* while it was partitioned"):
            values(weight)
        assert torch.equal(values(weight), kept)
    one = nn.Linear(1, 1, bias=False)
    zero.Init(module=one)
    assert one.weight.item() == pytest.approx(float(values(one.weight))) and one.weight.ds_status is GONE
    with pytest.raises((RuntimeError, ValueError)):
        weight.item()
    assert weight.ds_status is GONE


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_true_shapes(world_size: int) -> None:
    run_ranks(shapes, world_size)


def copies(rank: int, world_size: int) -> None:
    model = linear()
    model.weight.tag = {"a": [1]}
    expected = {name: values(param) for name, param in model.named_parameters()}
    tied = nn.ModuleList([model, nn.Linear(3, 5)])
    tied[1].weight = model.weight
    twin = copy.deepcopy(tied)
    with zero.GatheredParameters(model.parameters(), modifier_rank=0):
        inside = copy.deepcopy(model)
        pickled = pickle.loads(pickle.dumps(model))
        torch.save(model, saved := io.BytesIO())
    assert twin[1].weight is twin[0].weight and twin[0].weight.tag == {"a": [1]}
    assert twin[0].weight.tag is not model.weight.tag
    saved.seek(0)
    for made in (twin[0], inside, pickled, torch.load(saved, weights_only=False)):
        for name, param in made.named_parameters():
            assert type(param) is nn.Parameter and param.requires_grad and param.is_contiguous()
            assert torch.equal(param, expected[name]) and not any(key.startswith(("ds_", "_ds")) for key in vars(param))
            assert param.untyped_storage().nbytes() == param.numel() * 4
        made(torch.ones(1, 3)).sum().backward()
        assert made.state_dict()["weight"].device.type == "cpu" and not hasattr(made.weight, "partition")
    assert_released(*model.parameters())
    for dump in (pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
        with pytest.raises(RuntimeError, match=r"Linear\.weight is partitioned.*save_checkpoint"):
            dump(model)


@pytest.mark.parametrize("world_size", [1, 2])
def test_copies_are_ordinary_and_whole(world_size: int) -> None:
    run_ranks(copies, world_size)


def casts(rank: int, world_size: int) -> None:
    """``half()`` and the like on a partitioned module change its shards; not those that an engine trains."""
    model = linear()
    expected = values(model.weight)
    model.to(torch.float64)
    assert torch.equal(values(model.weight), expected.double()) and model.weight.ds_tensor.dtype == torch.float64
    with zero.GatheredParameters(model.parameters(), modifier_rank=0):
        model.half()
        model.weight.data.add_(1)
    assert model.weight.dtype == torch.float64 == model.weight.ds_tensor.dtype, "inside the context the dtype stays"
    assert torch.equal(values(model.weight), (expected.half() + 1).double())
    for config in (NONE_PERSIST, ALL_PERSIST):
        engine = deepspeed.initialize(model=linear(), config={**CONFIG, **config})[0]
        engine.to(torch.bfloat16)
        out = engine(torch.ones(1, 3, dtype=torch.bfloat16))
        assert torch.equal(out, nn.functional.linear(torch.ones(1, 3).bfloat16(), *map(values, engine.parameters())))
        assert {p.dtype for p in engine.parameters()} == {torch.bfloat16} == {out.dtype}
    engine = make_engine(make_model("plain"), NONE_PERSIST)
    engine.module.half()
    with pytest.raises(RuntimeError, match="come from its config"):
        engine(*batches(rank, 1)[0])


@pytest.mark.parametrize("world_size", [1, 2])
def test_casting_a_partitioned_module(world_size: int) -> None:
    run_ranks(casts, world_size)


def surgery(rank: int, world_size: int) -> None:
    """Resizing an embedding as clients do, and new parameters in partitioned modules, before and after initialize."""
    torch.manual_seed(3)
    with zero.Init(config_dict_or_path=CONFIG):
        model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4))
    old = model[0].weight
    expected = values(old)
    new = nn.Embedding(9, 4)
    with zero.GatheredParameters([old, new.weight, None], modifier_rank=0):
        new.weight.data[:7] = old.data
    with zero.GatheredParameters([old, new.weight], modifier_rank=0):
        model[0].weight = new.weight
        model[0].num_embeddings = 9
    assert_released(old)
    assert not hasattr(model[0].weight, "ds_id")
    engine = deepspeed.initialize(model=model, config={**CONFIG, **NONE_PERSIST})[0]
    assert model[0].weight.ds_shape == (9, 4) and torch.equal(values(model[0].weight)[:7], expected)
    out = engine(torch.tensor([8]))
    assert out.isfinite().all()
    # A parameter put in after initialize is used as it is; the old one is gone.
    model[1].weight = nn.Parameter(torch.zeros(4, 4))
    gc.collect()
    with zero.GatheredParameters(model[1].bias, modifier_rank=0):
        model[1].bias.data.fill_(2)
    assert engine(torch.tensor([1])).tolist() == [[2.0] * 4]
    assert engine(torch.tensor([1])).tolist() == [[2.0] * 4]


@pytest.mark.parametrize("world_size", [1, 2])
def test_new_parameters_in_partitioned_modules(world_size: int) -> None:
    run_ranks(surgery, world_size)


def other_stages(rank: int, world_size: int) -> None:
    """What zero.Init or an engine has partitioned, another engine may train at another stage, or partition again."""
    torch.manual_seed(3)
    with zero.Init(config_dict_or_path=CONFIG):
        model = Tricky(tied=True)
    reference = make_engine(make_model("tied"), {"zero_optimization": {"stage": 2}})
    data = iter(batches(rank, 4))
    for stage in (3, 2, 3, 0):
        engine = make_engine(model, {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 50}})
        assert all(hasattr(p, "ds_id") == (stage == 3) for p in model.parameters())
        x, y = next(data)
        for each in (engine, reference):
            each.backward(each(x, y))
            each.step()
        engine.destroy()
        torch.testing.assert_close(values(model.inp.weight), reference.module.inp.weight.detach())
        kind = {tensor.device.type for name, tensor in model.state_dict().items() if name == "inp.weight"}
        assert kind == {"meta" if stage == 3 else "cpu"}


@pytest.mark.parametrize("world_size", [1, 2])
def test_from_stage_to_stage(world_size: int) -> None:
    run_ranks(other_stages, world_size)


# -- forms -------------------------------------------------------------------------------------------------------------


def forms(rank: int, world_size: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 300))
    expected = [p.detach().clone() for p in model.parameters()]
    zero.Init(module=model)
    plain, tensor = nn.Parameter(torch.ones(2)), torch.zeros(3)
    every = list(model.parameters())
    given: dict[str, Callable[[], Any]] = {
        "single": lambda: every[0],
        "list": lambda: every,
        "generator": model.parameters,
        "filter": lambda: filter(lambda p: p.requires_grad, model.parameters()),
        "set": lambda: set(every),
        "twice": lambda: every + every,
        "mixed": lambda: [None, every[0], plain, tensor, None, *every[1:]],
        "state": lambda: {*model.state_dict(keep_vars=True).values()},
        "values": lambda: model.state_dict(keep_vars=True).values(),
    }
    for name, make in given.items():
        for modifier in (None, 0):
            with zero.GatheredParameters(make(), modifier_rank=modifier) as nothing:
                assert nothing is None
                count = 1 if name == "single" else len(every)
                for param, value in zip(every[:count], expected[:count], strict=True):
                    assert param.ds_status is THERE and torch.equal(param, value), name
                assert all(p.ds_status is GONE for p in every[count:])
            assert_released(*every)
    for empty in ([], None, [None], (), iter(()), plain, tensor, {}.values()):
        with zero.GatheredParameters(empty, modifier_rank=0):
            assert_released(*every)
    with zero.GatheredParameters(every, enabled=False):
        assert_released(*every)
    for wrong in ([model], model.named_parameters()):
        with pytest.raises(TypeError, match=r"module\.parameters\(\)"):
            zero.GatheredParameters(wrong)
    assert plain.tolist() == [1, 1] and tensor.tolist() == [0, 0, 0]
    with torch.inference_mode(), zero.GatheredParameters(every):
        inside = every[0].sum()
    with zero.GatheredParameters(every):
        every[0].sum().backward()
    assert inside.is_inference() and torch.equal(every[0].grad, torch.ones(4, 3))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_forms(world_size: int) -> None:
    run_ranks(forms, world_size)


# -- whose changes count -----------------------------------------------------------------------------------------------


def modify(rank: int, world_size: int) -> None:
    model = linear()
    params = list(model.parameters())
    before = [values(p) for p in params]
    for modifier in range(world_size):
        with zero.GatheredParameters(params, modifier_rank=modifier):
            with torch.no_grad():
                params[0].fill_(10 * modifier + rank)
                params[0].data[2, 1] += 0.5
            params[1].data = torch.full((5,), float(rank))
        assert_released(*params)
        assert values(params[0])[2].tolist() == [11 * modifier, 11 * modifier + 0.5, 11 * modifier]
        assert values(params[1]).tolist() == [modifier] * 5
    with zero.GatheredParameters(params, modifier_rank=0):
        if rank == 0:  # loading: the others do nothing
            for param, value in zip(params, before, strict=True):
                param.data.copy_(value)
    # Without a modifier, changes are an error where they can be seen, and lost in any case.
    for change in (
        lambda: params[0].add_(1),
        lambda: params[0][1:].zero_(),
        lambda: nn.init.ones_(params[0]),
    ):
        lost = pytest.raises(RuntimeError, match=r"Linear\.weight was modified .* modifier_rank=0")
        with lost, zero.GatheredParameters(params), torch.no_grad():
            change()
        assert_released(*params)
    with zero.GatheredParameters(params):
        params[0].data.mul_(2)
        params[1].data = torch.zeros(5)
    assert all(torch.equal(values(p), value) for p, value in zip(params, before, strict=True))
    # An exception inside: released, and nothing has changed.
    for modifier in (None, 0):
        with pytest.raises(ZeroDivisionError), zero.GatheredParameters(params, modifier_rank=modifier):
            params[0].data.zero_()
            with torch.no_grad():
                params[1].add_(1)
            raise ZeroDivisionError
        assert_released(*params)
        assert all(torch.equal(values(p), value) for p, value in zip(params, before, strict=True))
    # What was taken inside stays what it was.
    with zero.GatheredParameters(params, modifier_rank=0):
        view, row = params[0].data, params[0].detach()[1]
    if world_size > 1:
        with zero.GatheredParameters(params, modifier_rank=0):
            params[0].data.zero_()
        assert torch.equal(view, before[0]) and torch.equal(row, before[0][1])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_modifier_rank(world_size: int) -> None:
    run_ranks(modify, world_size)


def other_shapes(rank: int, world_size: int) -> None:
    model = linear()
    before = [values(p) for p in model.parameters()]
    for data in (torch.zeros(2, 2), torch.zeros(3, 5), torch.zeros(15)):
        refused = pytest.raises(ValueError, match=r"Linear\.weight of shape \(5, 3\) was given data of shape .* keeps")
        with refused, zero.GatheredParameters(model.parameters(), modifier_rank=0):
            model.weight.data = data
            model.bias.data.add_(1)
        assert_released(*model.parameters())
        assert torch.equal(values(model.weight), before[0])
    assert torch.equal(values(model.bias), before[1] + 3)
    kept = model.weight
    with zero.GatheredParameters(model.weight, modifier_rank=0):
        model.weight = nn.Parameter(model.weight.detach().t().contiguous())
    assert_released(kept)
    assert torch.equal(model.weight, before[0].t())


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_parameter_keeps_its_shape(world_size: int) -> None:
    run_ranks(other_shapes, world_size)


def nested(rank: int, world_size: int) -> None:
    model = nn.Sequential(linear(), linear(1))
    first, second = model[0].weight, model[1].weight
    before = values(first)
    for outer, inner in ((None, 0), (0, None), (0, 0), (None, None)):
        with zero.GatheredParameters([first, second], modifier_rank=outer):
            with zero.GatheredParameters([first, model[0].bias], modifier_rank=inner):
                if outer == inner == 0 or inner == 0:
                    first.data.fill_(rank + 1)
            assert first.ds_status is second.ds_status is THERE and model[0].bias.ds_status is GONE
            if inner == 0:  # shared by now, unless the outer context will
                assert first.unique().tolist() == [1 if outer is None else rank + 1]
            with zero.GatheredParameters(first, modifier_rank=inner):
                if outer == 0 and inner is None:
                    with torch.no_grad():
                        first.add_(rank + 1)  # the outer context keeps it
            assert first.ds_status is THERE and second.isfinite().all()
        assert_released(*model.parameters())
        expected = {(None, 0): torch.ones(5, 3), (0, None): before + 1, (0, 0): torch.ones(5, 3), (None, None): before}
        assert torch.equal(values(first), expected[outer, inner]), (outer, inner)
        with zero.GatheredParameters(first, modifier_rank=0):
            first.data.copy_(before)
    with zero.GatheredParameters(first, modifier_rank=0):  # Transformers initialises like this
        if rank == 0:
            with zero.GatheredParameters(first, modifier_rank=0):
                first.data.fill_(9)
    assert values(first).unique().tolist() == [9]
    with zero.GatheredParameters(first):  # an inner change that is kept, and an outer one that is lost
        with zero.GatheredParameters(first, modifier_rank=0):
            first.data.zero_()
        first.data.fill_(5)
    assert values(first).unique().tolist() == [0]
    with zero.GatheredParameters(first):
        with pytest.raises(RuntimeError, match="modified"), zero.GatheredParameters(first), torch.no_grad():
            first.add_(1)
        assert first.ds_status is THERE
        first._ds_handle.holds.copy()
    assert_released(first)


@pytest.mark.parametrize("world_size", [1, 2])
def test_nesting(world_size: int) -> None:
    run_ranks(nested, world_size)


def one_by_one(rank: int, world_size: int) -> None:
    model = nn.Sequential(linear(), linear(1))

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, param in model.named_parameters():
            with zero.GatheredParameters([param]):
                yield name, param.data

    seen = []
    for name, data in weights():
        seen.append((name, data.clone()))
        assert [p.ds_status for p in model.parameters()].count(THERE) == 1
    for (name, data), (same, param) in zip(seen, model.named_parameters(), strict=True):
        assert name == same and torch.equal(data, values(param))
    stopped = weights()
    next(stopped)
    stopped.close()
    assert_released(*model.parameters())


def test_contexts_across_yields() -> None:
    run_ranks(one_by_one, 2)


def by_hand(rank: int, world_size: int) -> None:
    model = linear()
    weight, bias = model.weight, model.bias
    expected = values(weight)
    weight.all_gather()
    assert torch.equal(weight, expected) and bias.ds_status is GONE
    weight.data.add_(rank)
    weight.partition()
    assert_released(weight)
    assert torch.equal(values(weight), expected) or world_size == 1
    handle = weight.all_gather(param_list=[weight, bias], async_op=True)
    handle.wait()
    weight.data.fill_(3)
    bias.data.fill_(4)
    bias.partition([weight, bias], has_been_updated=True)
    assert_released(weight, bias)
    assert values(weight).unique().tolist() == [3] and values(bias).unique().tolist() == [4]
    weight.all_gather_coalesced([weight, bias]).wait()
    assert weight.unique().tolist() == [3]
    weight.partition(param_list=[weight, bias])
    weight.ds_tensor.data = torch.full_like(weight.ds_tensor, 7)  # the shard is the truth
    assert values(weight).unique().tolist() == [7]


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_gather_and_partition(world_size: int) -> None:
    run_ranks(by_hand, world_size)


def tiled(rank: int, world_size: int) -> None:
    torch.manual_seed(rank)
    whole = nn.Linear(6, 4)
    torch.manual_seed(0)
    expected = nn.Linear(6, 4)
    with zero.Init(config_dict_or_path=CONFIG):
        tiles = zero.TiledLinear(6, 4, in_splits=2, out_splits=2, init_linear=whole)
        source = nn.Linear(6, 4)
    later = zero.TiledLinear(6, 4, in_splits=3)
    zero.Init(module=later)
    with zero.GatheredParameters(source.parameters(), modifier_rank=0):
        source.load_state_dict(expected.state_dict())
    later.copy_params_from(source)
    assert_released(*tiles.parameters(), *later.parameters(), *source.parameters())
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    for layer in (tiles, later):
        with zero.GatheredParameters(layer.parameters()):
            torch.testing.assert_close(layer(x), expected(x))


@pytest.mark.parametrize("world_size", [1, 2])
def test_tiled_linear(world_size: int) -> None:
    run_ranks(tiled, world_size)


# -- under an engine ---------------------------------------------------------------------------------------------------


def masters(rank: int, world_size: int, persist: bool) -> None:
    """A change reaches the fp32 masters where it is one; elsewhere they keep what bf16 cannot hold."""
    config = {**(ALL_PERSIST if persist else NONE_PERSIST), "bf16": {"enabled": True}}
    engine = make_engine(make_model("plain"), config)
    (x, y), *_ = batches(rank, 1)
    engine.backward(engine(x, y))
    engine.step()
    weight = engine.module.mid.weight
    status = THERE if persist else GONE
    assert weight.ds_status is status
    before = safe_get_full_fp32_param(weight)
    assert not torch.equal(before, before.bfloat16().float())
    with zero.GatheredParameters(weight):
        weight.data.zero_()
    assert torch.equal(values(weight).float(), before.bfloat16().float()) and weight.ds_status is status
    with zero.GatheredParameters(engine.module.mid.parameters(), modifier_rank=0):
        if rank == 0:
            weight.data[3, :7] = 0.5
            weight.data[10] += 1
    after = safe_get_full_fp32_param(weight)
    expected = before.clone()
    expected[3, :7] = 0.5
    expected[10] = (before[10].bfloat16() + 1).float()
    assert torch.equal(after, expected)
    assert torch.equal(values(weight), expected.bfloat16()) and weight.ds_status is status
    if persist:
        assert torch.equal(weight, expected.bfloat16())
    frozen = engine.module.inp.bias.requires_grad_(True)
    frozen.all_gather()
    frozen.data.fill_(2)
    frozen.partition(has_been_updated=True)
    assert safe_get_full_fp32_param(frozen).unique().tolist() == [2]
    engine.backward(engine(x, y))
    engine.step()
    assert safe_get_full_fp32_param(weight)[3, :7].isfinite().all()
    assert not torch.equal(safe_get_full_fp32_param(weight), after)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_changes_reach_the_masters(world_size: int) -> None:
    run_ranks(masters, world_size, persist=False)
    run_ranks(masters, world_size, persist=True)


class Product(torch.autograd.Function):
    """A layer that gathers its weight by hand in the backward, as chunked losses do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        with zero.GatheredParameters([weight]):
            return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        with zero.GatheredParameters([weight]):
            assert weight.isfinite().all()
            return grad @ weight, grad.t() @ x


class Special(nn.Module):
    """Gathers by hand in its forward: what another module owns, and in a function's backward."""

    def __init__(self, registered: bool) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5, bias=False)
        self.second = nn.Linear(5, 3)
        self.registered = registered

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (dict(m.named_parameters())["weight"] for m in (self.first, self.second))
        with zero.GatheredParameters([second], fwd_module=self if self.registered else None):
            scale = (second * second).sum() if self.registered else second.detach().sum()
        return (self.second(Product.apply(x, first)) * scale).square().sum()


def in_autograd(rank: int, world_size: int) -> None:
    for registered in (True, False):
        torch.manual_seed(1)
        plain = Special(registered)
        engine = make_engine(copy.deepcopy(plain), NONE_PERSIST)
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        for step in range(3):
            x = torch.randn(2, 3, generator=torch.Generator().manual_seed(step)) * 0.1
            loss, expected = engine(x), plain(x)
            torch.testing.assert_close(loss, expected)
            engine.backward(loss)
            engine.step()
            optimizer.zero_grad()
            expected.backward()
            optimizer.step()
            assert_released(*engine.parameters())
        for ours, theirs in zip(engine.module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(values(ours), theirs.detach())


@pytest.mark.parametrize("world_size", [1, 2])
def test_gathering_in_forward_and_backward(world_size: int) -> None:
    run_ranks(in_autograd, world_size)


def around_engine(rank: int, world_size: int) -> None:
    """Everything whole around evaluation and training; hooks taken off and put back meanwhile, as trl does."""
    for config in (NONE_PERSIST, ALL_PERSIST):
        reference, model = make_model("tied"), make_model("tied")
        engine = make_engine(model, config)
        other = make_engine(reference, {"zero_optimization": {"stage": 2}})
        data = batches(rank, 6)
        for step, (x, y) in enumerate(data):
            with zero.GatheredParameters(engine.parameters(), enabled=step in (1, 3, 4)):
                if step == 3:
                    without_hooks(engine, x, y)
                loss, expected = engine(x, y), other(x, y)
                assert torch.equal(loss, expected), step
                if step == 4:
                    continue
                engine.backward(loss)
            if step == 1:
                assert all(p._ds_handle.persistent or p.ds_status is GONE for p in engine.parameters())
            engine.step()
            other.backward(expected)
            other.step()
        for ours, theirs in zip(engine.module.parameters(), other.module.parameters(), strict=True):
            assert torch.equal(values(ours), theirs)
        engine.empty_partition_cache()
        assert_released(*[p for p in engine.parameters() if p.numel()])


def averaged(rank: int, world_size: int) -> None:
    """A copy of the model that follows it: an ordinary module, or one on an engine of its own."""
    for config in (NONE_PERSIST, ALL_PERSIST):
        engine = make_engine(make_model("reused"), config)
        average = copy.deepcopy(engine.module)
        frozen = deepspeed.initialize(model=copy.deepcopy(engine.module), config={**CONFIG, **config})[0]
        for x, y in batches(rank, 3):
            loss = engine(x, y)
            assert torch.equal(average(x, y), loss) and torch.equal(frozen(x, y), loss)
            engine.backward(loss)
            engine.step()
            pairs = list(zip(engine.module.parameters(), frozen.module.parameters(), average.parameters(), strict=True))
            for ours, theirs, plain in pairs:
                assert not hasattr(plain, "ds_id")
                with zero.GatheredParameters([ours, theirs], modifier_rank=0):
                    if rank == 0:
                        theirs.data.copy_(ours.data)
                    plain.data.copy_(ours.data)
        assert all(torch.equal(values(theirs), plain) for _, theirs, plain in pairs)


@pytest.mark.parametrize("world_size", [1, 2])
def test_averages_of_a_model(world_size: int) -> None:
    run_ranks(averaged, world_size)


def without_hooks(engine: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    offload = engine.optimizer.parameter_offload
    for param in engine.parameters():
        param.ds_active_sub_modules.clear()
    for hook in offload.forward_hooks + offload.backward_hooks:
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []
    assert offload.module is engine.module
    if not offload.param_coordinator.is_invalid_trace():
        offload.param_coordinator._invalidate_trace()
    for _, param in engine.module.ds_external_parameters():
        param.ds_active_sub_modules.clear()
    with torch.no_grad():
        assert engine.module(x, y).isfinite()
    offload._register_deepspeed_module(offload.module)


@pytest.mark.parametrize("world_size", [1, 2])
def test_whole_around_an_engine(world_size: int) -> None:
    run_ranks(around_engine, world_size)


def tricky_under_init(rank: int, world_size: int) -> None:
    """The difficult kinds of parameters, made in the context: empty, scalar, tied, odd."""
    torch.manual_seed(3)
    expected = Tricky(tied=True, frozen=True)
    torch.manual_seed(3)
    with zero.Init(config_dict_or_path=CONFIG):
        model = Tricky(tied=True, frozen=True)
    with zero.GatheredParameters(model.parameters()):
        for (name, param), other in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(param, other) and param.requires_grad == other.requires_grad, name
    assert model.scalar.item() == 1.5 and model.empty.shape == (0, 3)
    with zero.GatheredParameters(model.parameters(), modifier_rank=world_size - 1):
        for param in model.parameters():
            param.data.fill_(rank)
    with zero.GatheredParameters(model.parameters()):
        assert all((param == world_size - 1).all() for param in model.parameters())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_odd_parameters(world_size: int) -> None:
    run_ranks(tricky_under_init, world_size)
