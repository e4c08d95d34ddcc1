"""State dicts of partitioned modules: what they show, what can be loaded into them, and what leaves a model whole."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import deepspeed
from deepspeed.utils import safe_get_full_fp32_param
from tests.helpers import preload  # noqa: F401 - before ranks are forked
from tests.helpers.ckpt import assert_same, build, config, train, whole
from tests.helpers.dist import run_ranks
from tests.helpers.models import Tricky

CONFIG: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def settings(dtype: str = "fp32", persistent: int = 0, gather: bool = True) -> dict[str, Any]:
    made = config(3, dtype)
    made["zero_optimization"]["stage3_param_persistence_threshold"] = persistent
    made["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = gather
    return made


def other_values(module: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Random values, the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator).to(value.dtype)
        for name, value in module.state_dict().items()
        if name != "tied_back.weight"
    }


def tied(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**values, "tied_back.weight": values["inp.weight"]}


# -- what a state dict shows -------------------------------------------------------------------------------------------


def shown(rank: int, world: int) -> None:
    engine = build(settings("bf16", persistent=12))
    module = engine.module
    plain = Tricky(tied=True, reused=True, frozen=True).bfloat16().state_dict()
    state = module.state_dict()
    assert list(state) == list(plain)
    for name, value in state.items():
        wanted = plain[name]
        assert value.shape == wanted.shape and not value.requires_grad and type(value) is torch.Tensor
        small = value.numel() < 12
        assert value.is_meta != small, name
        assert value.dtype == (torch.float32 if name == "shift" else torch.bfloat16)
    params = dict(module.named_parameters(remove_duplicate=False))
    kept = module.state_dict(keep_vars=True)
    assert all(kept[name] is param for name, param in params.items())
    assert [*module.back.state_dict(prefix="x.")] == ["x.weight"] and module.back.state_dict()["weight"].is_meta
    with deepspeed.zero.GatheredParameters([module.back.weight]):
        now = module.state_dict()
        assert now["back.weight"].data_ptr() == module.back.weight.data_ptr() and now["head.weight"].is_meta
        taken, seen = module.back.weight.data.cpu(), now["back.weight"].clone()
    # What was taken out of the context stays what it was, also while the parameter comes and goes.
    assert module.back.weight.isnan().all()
    train(engine, rank, 3, seed=1)  # the first two have no learning rate yet
    assert torch.equal(now["back.weight"], seen) and torch.equal(taken, seen)
    with deepspeed.zero.GatheredParameters([module.back.weight]):
        assert not torch.equal(module.back.weight, seen)
    # A small parameter is whole; its entry survives when even that is released.
    bias = state["inp.bias"].clone()
    engine.empty_partition_cache()
    assert torch.equal(state["inp.bias"], bias) and module.state_dict()["inp.bias"].is_meta


@pytest.mark.parametrize("world", [2, 3])
def test_released_parameters_are_on_the_meta_device(world: int) -> None:
    run_ranks(shown, world)


def no_traces(rank: int, world: int) -> None:
    called: list[str] = []
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2, bias=False))
    handle = model[1]._register_state_dict_hook(lambda *a: called.append("mine"))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        plain = copy.deepcopy(model)
        values = {name: value.clone() for name, value in model.state_dict().items()}
    handle.remove()
    called.clear()
    assert model[1].state_dict()["weight"].is_meta and not called
    assert_same(dict(plain.state_dict()), values)
    assert b"deepspeed" not in pickle.dumps(plain[0])
    plain.load_state_dict({name: value + 1 for name, value in values.items()})
    assert_same(dict(plain.state_dict()), {name: value + 1 for name, value in values.items()})
    engine = deepspeed.initialize(model=model, config={**CONFIG, "zero_optimization": {"stage": 0}})[0]
    assert_same(dict(engine.module.state_dict()), values)
    assert not any(module._state_dict_hooks or module._load_state_dict_pre_hooks for module in model.modules())


def test_copies_pickles_and_united_models_have_no_traces() -> None:
    run_ranks(no_traces, 2)


def copied_in_parts(rank: int, world: int) -> None:
    """Copies that are made while the model is being built, as of a layer, are partitioned and behave as their original."""
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        layer = nn.Linear(5, 3)
        twin = copy.deepcopy(layer)
        assert twin.state_dict()["weight"].is_meta
        twin.load_state_dict({"weight": torch.ones(3, 5), "bias": torch.zeros(3)})
        layer.load_state_dict({"weight": torch.zeros(3, 5), "bias": torch.zeros(3)})
    assert whole(twin)["weight"].eq(1).all() and whole(layer)["weight"].eq(0).all()
    again = copy.deepcopy(twin)
    assert again.state_dict()["weight"].eq(1).all() and not hasattr(again.weight, "ds_id")


def test_copies_of_layers_under_construction() -> None:
    run_ranks(copied_in_parts, 2)


def own_hooks(rank: int, world: int) -> None:
    """Hooks that users registered before can still be removed after."""
    model = nn.Linear(5, 3)
    called: list[int] = []
    handles = [
        model.register_state_dict_post_hook(lambda *a: called.append(1)),
        model.register_load_state_dict_pre_hook(lambda *a: called.append(2)),
        model.register_load_state_dict_post_hook(lambda *a: called.append(3)),
    ]
    engine = deepspeed.initialize(model=model, config=CONFIG)[0]
    wanted = {"weight": torch.ones(3, 5), "bias": torch.ones(3)}
    model.load_state_dict(wanted)
    model.state_dict()
    assert called == [2, 3, 1]
    for handle in handles:
        handle.remove()
    model.load_state_dict(wanted)
    assert model.state_dict()["weight"].is_meta or engine.module.weight.ds_persist
    assert called == [2, 3, 1]
    assert_same(whole(model), wanted)


def test_hooks_of_users() -> None:
    run_ranks(own_hooks, 2)


# -- loading -----------------------------------------------------------------------------------------------------------


def loading(rank: int, world: int, dtype: str, persistent: int) -> None:
    engine = build(settings(dtype, persistent))
    module = engine.module
    train(engine, rank, 1, seed=1)
    stats, before = engine._offload.coordinator.stats, whole(module)
    stats.reset()
    new = tied(other_values(module, 3))
    assert module.load_state_dict(new) == ([], [])
    assert stats.gathers == 0, "no rank needs the others to take its part of what it has whole"
    for name, param in module.named_parameters():
        piece = -(-param.numel() // world)
        own = new[name].reshape(-1)[rank * piece : (rank + 1) * piece]
        assert torch.equal(param.ds_tensor[: own.numel()], own), name
        assert "copy_" not in vars(param)
    assert_same(whole(module), new)
    for name, param in module.named_parameters():
        if param.requires_grad:
            assert torch.equal(safe_get_full_fp32_param(param), new[name].float()), name
    partly = {"back.weight": before["back.weight"].t().contiguous().t().double(), "mid.bias": before["mid.bias"]}
    missing, unexpected = module.load_state_dict(partly, strict=False)
    assert set(missing) == set(new) - set(partly) and not unexpected
    assert_same(whole(module), {**new, **{name: value.to(new[name].dtype) for name, value in partly.items()}})
    engine.load_module_state_dict(before)
    assert_same(whole(module), before)
    losses = train(engine, rank, 2, seed=2, dropout_seed=4)
    twin = build(settings(dtype, persistent), seed=8)
    train(twin, rank, 1, seed=1)
    twin.load_module_state_dict(before)
    assert abs(train(twin, rank, 1, seed=2, dropout_seed=4)[0] - losses[0]) < 1e-6


@pytest.mark.parametrize(
    ("world", "dtype", "persistent"), [(1, "fp32", 0), (2, "bf16", 0), (2, "bf16", 40), (3, "fp32", 40)]
)
def test_loading_without_gathering(world: int, dtype: str, persistent: int) -> None:
    run_ranks(loading, world, dtype, persistent)


def refused(rank: int, world: int) -> None:
    engine = build(settings())
    module, plain = engine.module, Tricky(tied=True, reused=True, frozen=True)
    values = tied(other_values(module, 1))
    module.load_state_dict(values)
    bad = {**values, "head.bias": torch.zeros(3), "surplus": torch.zeros(1), "back.weight": [1, 2]}
    del bad["mid.bias"]
    texts = []
    for target in (module, plain):
        with pytest.raises(RuntimeError) as caught:
            target.load_state_dict(bad)
        texts.append(str(caught.value).replace("Noisy", "Tricky"))
    assert texts[0] == texts[1] and "size mismatch for head.bias" in texts[0]
    assert not any("copy_" in vars(param) for param in module.parameters())
    with pytest.raises(RuntimeError, match=r"back.weight has no data: it comes from a state dict that was taken while"):
        module.load_state_dict(module.state_dict())
    with pytest.raises(RuntimeError, match=r"back.weight has no data"):
        module.load_state_dict(module.state_dict(keep_vars=True))
    assert_same(whole(module), values)
    with pytest.raises(RuntimeError):
        module.back.weight.data.copy_(values["back.weight"])


def test_errors_are_those_of_torch() -> None:
    run_ranks(refused, 2)


class Odd(nn.Module):
    """One parameter under two names, a name that was another one once, a value that is made on loading."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.zeros(7))
        self.two = self.one
        self.scale = nn.Parameter(torch.zeros(()))
        self.grown = nn.Parameter(torch.zeros(2, 3))
        self._register_load_state_dict_pre_hook(self._rename)

    def _rename(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if prefix + "old_scale" in state:
            state[prefix + "scale"] = state.pop(prefix + "old_scale")

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        state[prefix + "grown"] = state[prefix + "grown"].expand(2, 3)
        super()._load_from_state_dict(state, prefix, *rest)

    def get_extra_state(self) -> Any:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        self.version = state["version"]


def odd(rank: int, world: int) -> None:
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        model = nn.ModuleDict({"odd": Odd()})
    given = {
        "odd.one": torch.arange(7.0),
        "odd.two": torch.arange(7.0) * 2,
        "odd.old_scale": torch.tensor([4.0]),
        "odd.grown": torch.tensor([1.0, 2.0, 3.0]),
        "odd._extra_state": {"version": 5},
    }
    model.load_state_dict(given)
    got = whole_named(model)
    assert got["odd.one"].tolist() == got["odd.two"].tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert got["odd.scale"] == 4 and got["odd.grown"].tolist() == [[1, 2, 3]] * 2 and model["odd"].version == 5
    before = model["odd"].one
    model.load_state_dict({**given, "odd.two": nn.Parameter(torch.ones(7))}, assign=True)
    assert model["odd"].one is before, "a partitioned parameter keeps its identity"
    assert whole_named(model)["odd.one"].tolist() == [1] * 7


def whole_named(module: nn.Module) -> dict[str, torch.Tensor]:
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return {name: p.detach().clone() for name, p in module.named_parameters(remove_duplicate=False)}


def test_modules_that_translate_what_they_load() -> None:
    run_ranks(odd, 2)


def gathered(rank: int, world: int) -> None:
    engine = build(settings("bf16"))
    module = engine.module
    first, second = tied(other_values(module, 1)), tied(other_values(module, 2))
    params = list(module.parameters())
    with deepspeed.zero.GatheredParameters(params, modifier_rank=0):
        if rank == 0:
            module.load_state_dict(first)
    assert_same(
        {k: v for k, v in whole(module).items() if k != "shift"}, {k: v for k, v in first.items() if k != "shift"}
    )
    with deepspeed.zero.GatheredParameters(params, modifier_rank=1):
        module.load_state_dict(second if rank == 1 else first)
    got = whole(module)
    assert torch.equal(got["back.weight"], second["back.weight"])
    assert torch.equal(safe_get_full_fp32_param(module.back.weight), second["back.weight"].float())
    with (
        pytest.raises(RuntimeError, match="modified inside GatheredParameters without modifier_rank"),
        deepspeed.zero.GatheredParameters([module.back.weight]),
    ):
        module.back.load_state_dict({"weight": first["back.weight"]})
    assert torch.equal(whole(module)["back.weight"], second["back.weight"])
    # As clients do it: a module's own parameters, on one rank, past load_state_dict.
    with deepspeed.zero.GatheredParameters(list(module.head.parameters()), modifier_rank=0):
        if rank == 0:
            errors: list[str] = []
            state = {f"head.{name}": first[f"head.{name}"] for name in ("weight", "bias")}
            module.head._load_from_state_dict(state, "head.", {}, True, [], [], errors)
            assert not errors
    assert torch.equal(whole(module)["head.bias"], first["head.bias"])


def test_loading_into_gathered_parameters() -> None:
    run_ranks(gathered, 2)


# -- the whole model on one rank ---------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Bytes that operations allocate inside, and the most that lived at a time; what was there before does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
        there = [t.untyped_storage() for t in tensors if not t.is_meta and t.layout is torch.strided]
        self._known: dict[int, Any] = {storage._cdata: storage for storage in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            if self._known.pop(key, None) is not None:
                self.live -= nbytes

        self._known[key] = weakref.ref(storage, gone)
        self.live += nbytes
        self.peak = max(self.peak, self.live)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 63) for _ in range(12))
        self.big = nn.Linear(64, 257)
        self.alias = nn.Linear(64, 257, bias=False)
        self.alias.weight = self.big.weight
        self.register_buffer("table", torch.arange(5))


def consolidating(rank: int, world: int, persistent: int) -> None:
    made = {**settings("bf16", persistent), "optimizer": {"type": "Adam"}}
    engine = deepspeed.initialize(model=Wide(), config=made)[0]
    expected = whole(engine.module)
    model_nbytes = sum(v.nbytes for name, v in expected.items() if name != "alias.weight")
    largest = expected["big.weight"].nbytes
    gc.collect()
    with Peak() as memory:
        state = engine._zero3_consolidated_16bit_state_dict()
    if rank:
        assert state is None and memory.peak < 1024, f"{memory.peak} bytes on a rank that gets nothing"
    else:
        assert model_nbytes <= memory.peak <= model_nbytes + largest, (memory.peak, model_nbytes, largest)
        assert_same(state, expected)
        assert list(state) == list(expected)
        assert state["big.weight"].data_ptr() == state["alias.weight"].data_ptr(), "tied weights stay one tensor"
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in state.values())


@pytest.mark.parametrize(("world", "persistent"), [(2, 0), (3, 0), (2, 10**6)])
def test_memory_of_the_whole_model(world: int, persistent: int) -> None:
    run_ranks(consolidating, world, persistent)


def saving(rank: int, world: int, folder: str) -> None:
    engine = build(settings("bf16", persistent=12))
    train(engine, rank, 1, seed=1)
    expected = whole(engine.module)
    assert engine.save_16bit_model(folder) is True
    saved = torch.load(f"{folder}/pytorch_model.bin", weights_only=True)
    torch.distributed.barrier()
    assert_same(saved, expected)
    assert saved["inp.weight"].data_ptr() == saved["tied_back.weight"].data_ptr()
    engine.save_16bit_model(folder, "trained.bin", exclude_frozen_parameters=True)
    trained = torch.load(f"{folder}/trained.bin", weights_only=True)
    assert_same(trained, {name: value for name, value in expected.items() if name != "mid.weight"})
    some = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    assert (some is None) == (rank > 0) and (some is None or some.keys() == trained.keys())
    plain = Tricky(tied=True, reused=True, frozen=True).bfloat16()
    plain.load_state_dict(saved)

    without = build(settings(gather=False))
    assert without.save_16bit_model(f"{folder}/off") is False and not os.path.exists(f"{folder}/off")
    with pytest.raises(ValueError, match="stage3_gather_16bit_weights_on_model_save is false"):
        without._zero3_consolidated_16bit_state_dict()
    adapters = without._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)  # not the whole model
    assert (adapters is None) == (rank > 0) and (adapters is None or adapters.keys() == trained.keys())
    for param in without.module.parameters():
        param.requires_grad_(True)
    with pytest.raises(ValueError, match="stage3_gather_16bit_weights_on_model_save is false"):
        without._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)


@pytest.mark.parametrize("world", [1, 2])
def test_save_16bit_model(tmp_path: Any, world: int) -> None:
    run_ranks(saving, world, str(tmp_path))


class Renamed(nn.Module):
    """Gives its weight another name in state dicts, past anyone who looks for parameters by name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "renamed"] = self.weight.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def placeholders(rank: int, world: int, folder: str) -> None:
    made = settings()
    del made["optimizer"], made["scheduler"]
    engine = deepspeed.initialize(model=nn.Sequential(Renamed()), config=made)[0]
    for write in (
        lambda: engine.save_checkpoint(folder),
        lambda: engine.save_16bit_model(folder),
        engine._zero3_consolidated_16bit_state_dict,
    ):
        with pytest.raises((ValueError, RuntimeError), match=r"'0.renamed' has no data"):
            write()
    assert os.listdir(folder) == []

    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        empty = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    engine = deepspeed.initialize(model=empty, config=made)[0]
    for write in (lambda: engine.save_checkpoint(folder), engine._zero3_consolidated_16bit_state_dict):
        with pytest.raises(
            (ValueError, RuntimeError), match=r"'1.weight' has no values: it was made on the meta device"
        ):
            write()
    assert os.listdir(folder) == []
    empty.load_state_dict({"1.weight": torch.ones(3, 3), "1.bias": torch.ones(3)}, strict=False)
    engine.save_checkpoint(folder)
    assert torch.equal(whole(empty)["1.weight"], torch.ones(3, 3))


def test_placeholders_are_never_written(tmp_path: Any) -> None:
    run_ranks(placeholders, 2, str(tmp_path))
