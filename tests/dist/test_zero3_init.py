"""``zero.Init``: whatever is constructed in it has rank 0's values, in shards, and torch is as before afterwards."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import json
import os
import pickle
import socket
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch import zeros as imported_zeros

import deepspeed
from deepspeed import zero
from deepspeed.errors import ConfigError
from deepspeed.runtime.zero import partition_parameters as pp
from tests.helpers.dist import RankFailed, run_ranks

CONFIG: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
BF16 = {**CONFIG, "bf16": {"enabled": True}}


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer with its values, as copies. Collective."""
    with zero.GatheredParameters(model.parameters()):
        return {n: t.detach().clone() for n, t in model.state_dict(keep_vars=True).items()}


def assert_partitioned(model: nn.Module, world_size: int) -> None:
    for name, param in model.named_parameters():
        assert param.ds_status is pp.ZeroParamStatus.NOT_AVAILABLE, name
        assert param.ds_tensor.shape == (-(-param.numel() // world_size),), name
        assert param.untyped_storage().nbytes() <= 8, name


# -- what can be constructed -------------------------------------------------------------------------------------------


class Base(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.randn(width, 3))


class Derived(Base):
    def __init__(self) -> None:
        super().__init__(5)
        self.derived = nn.Linear(3, 5)
        self.base.data.mul_(2)  # still whole: the outermost __init__ has not returned


class NoInit(Derived):
    pass


class Late(NoInit):
    """Attaches after the constructor of the base, and replaces what the base has made."""

    def __init__(self) -> None:
        Derived.__init__(self)
        self.add_module("late", nn.Conv1d(2, 3, 2))
        self.register_parameter("scalar", nn.Parameter(torch.tensor(1.5)))
        self.derived.weight = nn.Parameter(torch.randn(7, 3))
        self.register_buffer("table", torch.arange(6.0))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4, padding_idx=0)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight


@dataclasses.dataclass(eq=False)
class Data(nn.Module):
    width: int = 3

    def __post_init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(self.width, self.width)
        self.own = nn.Parameter(torch.ones(5))


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ParameterList([nn.Parameter(torch.randn(i + 1)) for i in range(3)])
        self.rows.append(nn.Parameter(torch.randn(2, 2)))
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.randn(3)), "b": nn.Parameter(torch.randn(1))})
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.frozen = nn.Parameter(torch.tensor([3, 4]), requires_grad=False)


class Initialises(nn.Module):
    """Its __init__ initialises and reads what its children own, in all the usual ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 4)
        self.c = nn.Conv2d(2, 3, 3)
        self.apply(self.set_up)
        for name, param in self.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(param, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data.normal_(0, 0.1)
                module.bias.data.zero_()
        nn.init.orthogonal_(self.b.weight)
        nn.init.trunc_normal_(self.a.weight[:2], std=0.5)
        with torch.no_grad():
            self.b.bias.copy_(self.a.bias[:4])
            self.a.weight[0] = 3
            self.a.bias += 1
            torch.eye(4, 6, out=self.b.weight.data)
        self.scale = nn.Parameter(self.a.weight.detach().norm())
        self.register_buffer("first", self.b.weight.data)
        self.alias = nn.Parameter(self.a.bias.data)
        self.c.weight.data = self.c.weight.data * 2

    def set_up(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.constant_(module.bias, 0.25)


def weight_normed() -> nn.Module:
    layers = [nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.utils.spectral_norm(nn.Linear(3, 3))]
    return nn.Sequential(*layers, nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)))


def dynamic() -> nn.Module:
    def begin(self: nn.Module) -> None:
        nn.Linear.__init__(self, 3, 2)  # type: ignore[arg-type]
        self.extra = nn.Parameter(torch.randn(2))

    class Inside(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.more = nn.Parameter(torch.randn(3))

    kind = type("Dynamic", (nn.Linear,), {"__init__": begin})
    fresh = dataclasses.make_dataclass("Fresh", [], bases=(Data,), eq=False)
    return nn.ModuleDict({"a": kind(), "b": Inside(), "c": fresh(width=2)})


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    layer.linear1.weight.marked = True  # type: ignore[attr-defined]
    return nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(8))


KINDS = {
    "subclasses": NoInit,
    "late": Late,
    "tied": Tied,
    "dataclass": Data,
    "lists": Lists,
    "initialises": Initialises,
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "transformer": lambda: nn.Transformer(8, 2, 2, 2, 16),
    "encoder": encoder,
    "recurrent": lambda: nn.LSTM(3, 4, num_layers=2),
    "parametrised": weight_normed,
    "dynamic": dynamic,
    "factory": lambda: nn.Sequential(*[functools.partial(nn.Linear, 3)(out) for out in (2, 3)]),
}


def construct(rank: int, world_size: int) -> dict[str, Any]:
    results = {}
    for kind, make in KINDS.items():
        torch.manual_seed(7)
        plain = make().state_dict()
        torch.manual_seed(7 + rank)  # rank 0's values count
        with zero.Init(config_dict_or_path=CONFIG):
            model = make()
            late = kind == "late"
            if late:
                model.attached = nn.Parameter(torch.full((3,), float(rank)))
        assert_partitioned(model, world_size)
        assert all(model.state_dict()[n].is_meta for n, _ in model.named_parameters())
        state = whole(model)
        if late:
            assert torch.equal(state.pop("attached"), torch.zeros(3))
        if kind == "tied":
            assert model.head.weight is model.embedding.weight
        if kind == "encoder":
            assert all(layer.linear1.weight.marked for layer in model.layers)
        results[kind] = (plain, state, {n for n, _ in model.named_buffers()})
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_is_constructed_has_rank_0s_values(world_size: int) -> None:
    results = run_ranks(construct, world_size)
    for kind in KINDS:
        expected = results[0][kind][0]
        for result in results:
            state = result[kind][1]
            assert list(state) == list(expected), kind
            for name, tensor in expected.items():
                if name in result[kind][2] and result is not results[0]:
                    continue  # buffers are each rank's own
                assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype, f"{kind} {name}"


# -- memory ------------------------------------------------------------------------------------------------------------


def live_numel() -> int:
    """Elements of all tensors that are alive, each storage once; nothing is collected before."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.dtype == torch.float32 and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes() // 4
    return sum(storages.values())


WIDTH, DEPTH = 64, 8
PEAKS: list[int] = []


class Watched(nn.Linear):
    """Looks at what is alive when it is about to be partitioned."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH, bias=False)
        PEAKS.append(live_numel())


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Watched() for _ in range(DEPTH)])
        self.copies = nn.ModuleList(copy.deepcopy(self.layers[0]) for _ in range(DEPTH))
        PEAKS.append(live_numel())
        for layer in self.modules():
            if isinstance(layer, Watched):
                nn.init.xavier_normal_(layer.weight)
                layer.weight.data.mul_(2)
                PEAKS.append(live_numel())


def peak(rank: int, world_size: int) -> tuple[list[int], int]:
    gc.collect()
    gc.freeze()  # what is there already need not be looked at again and again
    gc.disable()
    before = live_numel()
    with zero.Init(config_dict_or_path=CONFIG):
        model = Chain()
    assert_partitioned(model, world_size)
    after = live_numel()
    del model
    return [value - before for value in PEAKS], (after - before, live_numel() - before)


def test_at_most_one_module_is_whole() -> None:
    one = WIDTH * WIDTH
    for peaks, (after, end) in run_ranks(peak, 2):
        for count, value in enumerate(peaks[:DEPTH]):
            assert value <= count * one // 2 + one + 100, f"while constructing layer {count}"
        assert peaks[DEPTH] <= 2 * DEPTH * one // 2 + 200, "deep copies"
        assert max(peaks[DEPTH + 1 :]) <= 2 * DEPTH * one // 2 + one + 200, "initialising one after the other"
        assert after <= 2 * DEPTH * one // 2 + 200
        assert end <= 100, "a partitioned model is freed without the help of the collector"


# -- tensors made inside -----------------------------------------------------------------------------------------------


def make_all() -> dict[str, torch.dtype]:
    made = {
        "tensor": torch.tensor([1.0, 2.0]),
        "empty": torch.empty(2),
        "zeros": torch.zeros(2, dtype=torch.float32),
        "ones": torch.ones((2,)),
        "full": torch.full((2,), 0.5),
        "arange": torch.arange(0.0, 2.0),
        "eye": torch.eye(2),
        "randn": torch.randn(2),
        "imported": imported_zeros(2),
        "integers": torch.arange(3),
        "flags": torch.tensor([True]),
        "longs": torch.zeros(2, dtype=torch.long),
        "linspace": torch.linspace(0, 1, 3),
        "like": torch.zeros_like(torch.linspace(0, 1, 3)),
    }
    assert made["arange"].tolist() == [0, 1] and made["full"].tolist() == [0.5, 0.5]
    return {name: tensor.dtype for name, tensor in made.items()}


OTHERS = {
    "integers": torch.int64,
    "flags": torch.bool,
    "longs": torch.int64,
    "linspace": torch.float32,
    "like": torch.float32,
}


def dtypes_inside(rank: int, world_size: int) -> None:
    outside = make_all()
    assert outside["zeros"] == torch.float32
    constructed = {name: getattr(torch, name) for name in (*pp.CONSTRUCTORS, "linspace")}
    with zero.Init(config_dict_or_path=BF16):
        inside = make_all()
        for name, dtype in inside.items():
            assert dtype == OTHERS.get(name, torch.bfloat16), name
        with zero.Init(dtype=torch.float16):
            assert torch.zeros(1).dtype == torch.float16
            inner = nn.Linear(2, 2)
            with zero.Init(config_dict_or_path=BF16, enabled=False):
                assert torch.zeros(1).dtype == torch.float16
        outer = nn.Sequential(nn.Linear(2, 2, dtype=torch.float32), inner)
        assert torch.zeros(1).dtype == torch.bfloat16
        buffer = nn.BatchNorm1d(3)
    assert make_all() == outside
    assert {name: getattr(torch, name) for name in constructed} == constructed
    assert {p.dtype for p in outer[0].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in inner.parameters()} == {torch.float16} == {p.ds_tensor.dtype for p in inner.parameters()}
    assert buffer.running_mean.dtype == torch.bfloat16 and buffer.num_batches_tracked.dtype == torch.long
    with zero.Init():  # neither config nor dtype: everything as asked for
        assert torch.zeros(1, dtype=torch.float64).dtype == torch.float64
        assert nn.Linear(2, 2, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with zero.Init(config_dict_or_path=CONFIG):
            assert nn.Linear(2, 2).weight.dtype == torch.float32 == torch.ones(1).dtype
    finally:
        torch.set_default_dtype(before)


def test_constructors_take_the_contexts_dtype() -> None:
    run_ranks(dtypes_inside, 1)


def replaced_wrapper(rank: int, world_size: int) -> None:
    """As Transformers does it, to keep the dtype of rotary embeddings' positions."""
    seen: list[Any] = []
    original = pp.zero_wrapper_for_fp_tensor_constructor

    def wrapper(fn: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((fn, sorted(kwargs), args))
        if fn is pp._orig_torch_arange:
            return lambda *a, **k: fn(*a, **{"device": kwargs["target_device"], **k})
        return original(fn, *args, **kwargs)

    pp.zero_wrapper_for_fp_tensor_constructor = wrapper
    try:
        with zero.Init(config_dict_or_path=BF16):
            assert torch.arange(0.0, 4.0).dtype == torch.float32
            assert torch.arange(4, dtype=torch.float32).dtype == torch.float32
            assert torch.ones(1).dtype == torch.bfloat16
            with zero.Init(config_dict_or_path=BF16):
                assert torch.arange(0.0, 4.0).dtype == torch.float32
    finally:
        pp.zero_wrapper_for_fp_tensor_constructor = original
    assert pp._orig_torch_arange is torch.arange
    assert {name for _, names, args in seen for name in names if not args} == {"target_fp_dtype", "target_device"}
    assert [fn for fn, _, _ in seen[:8]] == [getattr(torch, name) for name in pp.CONSTRUCTORS]


def test_the_constructor_wrapper_can_be_replaced() -> None:
    run_ranks(replaced_wrapper, 1)


# -- no traces ---------------------------------------------------------------------------------------------------------


def torch_now() -> dict[str, Any]:
    kinds = [nn.Module]
    for kind in kinds:
        kinds += [k for k in type.__subclasses__(kind) if k not in kinds]
    state: dict[str, Any] = {f"{k.__module__}.{k.__qualname__} {id(k)}": k.__dict__.get("__init__") for k in kinds}
    for name in ("apply", "__init_subclass__", "_apply", "__setattr__", "__getattr__", "register_parameter"):
        state[name] = nn.Module.__dict__.get(name)
    for space in (torch, nn.functional, nn.init, nn.Parameter, torch.Tensor):
        state.update({f"{space} {name}": value for name, value in vars(space).items() if callable(value)})
    return state


class Fails(nn.Module):
    def __init__(self, deep: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.layer.bias.data.zero_()
        if deep:
            Fails(False)
        raise KeyError("on purpose")


def leaves_no_traces(rank: int, world_size: int) -> None:
    before = torch_now()
    with zero.Init(config_dict_or_path=CONFIG):
        assert torch_now() != before
        kept = dynamic()
    assert before.items() <= torch_now().items()
    made_inside = {key: value for key, value in torch_now().items() if key not in before}
    assert made_inside and not any(hasattr(value, "__wrapped__") for value in made_inside.values())
    before = torch_now()
    for deep in (False, True):
        with pytest.raises(KeyError), zero.Init(config_dict_or_path=BF16), zero.Init(dtype=torch.float16):
            Fails(deep)
        assert torch_now() == before
    with pytest.raises(ZeroDivisionError), zero.Init(config_dict_or_path=CONFIG):
        raise ZeroDivisionError
    assert torch_now() == before and not any(hasattr(f, "__wrapped__") for f in (nn.Linear.__init__, nn.Module.apply))
    with zero.Init(config_dict_or_path=CONFIG):  # and it works again
        model = Initialises()
    assert_partitioned(model, world_size)
    context = zero.Init(config_dict_or_path=CONFIG)
    for _ in range(2):  # a context can be used again
        with context:
            assert nn.Linear(2, 2).weight.ds_numel == 4
    assert torch_now() == before
    assert not hasattr(nn.Linear(2, 2).weight, "ds_id")
    assert_partitioned(kept, world_size)  # and its classes were alive


def test_torch_is_as_before() -> None:
    run_ranks(leaves_no_traces, 1)


def other_threads(rank: int, world_size: int) -> None:
    entered, done = threading.Event(), threading.Event()
    theirs: list[Any] = []

    def elsewhere() -> None:
        entered.wait()
        for _ in range(50):
            layer = nn.TransformerEncoderLayer(4, 2, 8)
            layer.apply(lambda m: None)
            theirs.append((torch.zeros(1).dtype, layer.linear1.weight.dtype, hasattr(layer.linear1.weight, "ds_id")))
        done.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    with zero.Init(config_dict_or_path=BF16):
        entered.set()
        while not done.is_set():
            assert nn.Linear(2, 2).weight.ds_numel == 4
    thread.join()
    assert theirs == [(torch.float32, torch.float32, False)] * 50


def test_other_threads_construct_as_ever() -> None:
    run_ranks(other_threads, 1)


# -- arguments ---------------------------------------------------------------------------------------------------------


class Unit:
    """What Init needs of an mpu."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def get_data_parallel_group(self) -> Any:
        return self.group


def arguments(rank: int, world_size: int, folder: str) -> None:
    path = f"{folder}/config{rank}.json"
    with open(path, "w") as file:
        json.dump(BF16, file)
    auto = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "offload_param": {"device": "none"},
        },
    }
    given = copy.deepcopy(auto)
    for keywords, dtype in (
        ({"config_dict_or_path": BF16}, torch.bfloat16),
        ({"config": BF16}, torch.bfloat16),
        ({"config_dict_or_path": path}, torch.bfloat16),
        ({"config_dict_or_path": auto}, torch.float32),
        ({"config_dict_or_path": {**CONFIG, "fp16": {"enabled": True}}}, torch.float16),
        ({"config_dict_or_path": CONFIG, "dtype": torch.float64}, torch.float64),
        ({"remote_device": "cpu", "pin_memory": True, "mem_efficient_linear": False}, torch.float32),
        ({"remote_device": "none", "dtype": torch.bfloat16}, torch.bfloat16),
    ):
        with zero.Init(**keywords) as context:
            model = nn.Linear(3, 5)
        assert_partitioned(model, world_size)
        assert model.weight.dtype == model.weight.ds_tensor.dtype == dtype, keywords
        assert context.get_partition_rank() == rank
    assert auto == given
    with zero.Init(enabled=False, config_dict_or_path={"zero_optimization": {"stage": 2}}, remote_device="nvme"):
        assert not hasattr(nn.Linear(2, 2).weight, "ds_id") and not hasattr(nn.Linear.__init__, "__wrapped__")
    model = nn.Linear(3, 5, dtype=torch.bfloat16)
    before = model.weight.detach().clone()
    zero.Init(module=model)
    assert_partitioned(model, world_size)
    assert model.weight.dtype == torch.bfloat16 and torch.equal(whole(model)["weight"], before)
    zero.Init(module=model, dtype=torch.float32)  # what is partitioned stays as it is
    for keywords, error, text in (
        ({"remote_device": "nvme"}, ConfigError, "nvme_path is missing"),
        ({"remote_device": "disk"}, ConfigError, "remote_device"),
        ({"param_swapper": object()}, ConfigError, "param_swapper"),
        ({"config_dict_or_path": {"zero_optimization": {"stage": 2}}}, ConfigError, "stage"),
    ):
        with pytest.raises(error, match=text):
            zero.Init(**keywords)
        assert torch_now() == torch_now()
    group = torch.distributed.new_group([0, 1])
    if rank < 2:
        for keywords in (
            {"data_parallel_group": group},
            {"sequence_data_parallel_group": group},
            {"mpu": Unit(group)},
        ):
            with zero.Init(config_dict_or_path=CONFIG, **keywords) as context:
                model = nn.Linear(3, 5)
                model.bias.data.fill_(rank + 1)
            assert_partitioned(model, 2)
            assert context.get_dp_process_group() is group and model.weight.ds_process_group is group
            assert whole(model)["bias"].tolist() == [1.0] * 5


def test_arguments(tmp_path: Any) -> None:
    run_ranks(arguments, 3, str(tmp_path))


def without_a_group(rank: int, world_size: int, variables: dict[str, str]) -> Any:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"):
        if variables:
            os.environ[name] = os.environ[name]
        else:
            del os.environ[name]
    os.environ.update(variables)
    with zero.Init(config_dict_or_path=CONFIG):
        model = nn.Linear(4, 4)
    assert torch.distributed.is_initialized()
    return torch.distributed.get_world_size(), model.weight.ds_tensor.numel()


def test_a_missing_group_is_made() -> None:
    assert run_ranks(without_a_group, 1, {}, init=False) == [(1, 16)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    assert run_ranks(without_a_group, 2, where, init=False) == [(2, 8)] * 2


# -- at the edges ------------------------------------------------------------------------------------------------------


def with_apply(rank: int, world_size: int) -> None:
    """``Module.apply`` gathers each module's own parameters once; without that, each use of them does."""
    for override in (True, False):
        config = {**CONFIG, "zero_optimization": {"stage": 3, "override_module_apply": override}}
        with zero.Init(config_dict_or_path=config):
            model = Derived()
            shown: dict[str, Any] = {}

            def set_up(module: nn.Module, shown: dict[str, Any] = shown) -> None:
                own = list(module.parameters(recurse=False))
                shown[type(module).__name__] = [p.ds_status.name for p in own]
                for param in own:
                    nn.init.constant_(param, float(rank + 3))

            assert model.apply(set_up) is model
        status = "AVAILABLE" if override else "NOT_AVAILABLE"
        assert shown == {"Linear": [status] * 2, "Derived": [status]}
        assert_partitioned(model, world_size)
        assert all(torch.equal(t, torch.full_like(t, 3)) for t in whole(model).values())


def test_apply() -> None:
    run_ranks(with_apply, 2)


def lazy(rank: int, world_size: int) -> None:
    with zero.Init(config_dict_or_path=CONFIG):
        model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    assert not hasattr(model[0].weight, "ds_id") and hasattr(model[1].weight, "ds_id")
    with pytest.raises(ValueError, match=r"0\.weight is lazy"):
        deepspeed.initialize(model=model, config=CONFIG)
    with zero.GatheredParameters(model.parameters()):
        model(torch.ones(1, 3))
    engine = deepspeed.initialize(model=model, config=CONFIG)[0]
    assert engine(torch.ones(1, 3)).shape == (1, 2) and model[0].weight.ds_shape == (4, 3)


def test_lazy_modules_are_partitioned_when_they_have_shapes() -> None:
    run_ranks(lazy, 2)


class Cautious(nn.Linear):
    """Must not be looked at before its __init__ has set what its __getattr__ needs."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.ready = True

    def __getattr__(self, name: str) -> Any:
        if not vars(self):
            raise RuntimeError(f"{name} was looked up before __init__")
        return super().__getattr__(name)


def wrapped_by_others(rank: int, world_size: int) -> None:
    """A library wraps ``__init__`` while the context is open, before or after us, and takes its wrapper back later."""
    original = nn.Linear.__init__

    def wrapper(inner: Any) -> Any:
        @functools.wraps(inner)
        def begin(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            assert hasattr(self, "base_layer") is False
            inner(self, *args, **kwargs)

        return begin

    nn.Linear.__init__ = wrapper(original)  # type: ignore[method-assign]
    with zero.Init(config_dict_or_path=CONFIG):
        assert nn.Linear(2, 2).weight.ds_numel == 4
    nn.Linear.__init__ = original  # type: ignore[method-assign]
    context = zero.Init(config_dict_or_path=CONFIG)
    context.__enter__()
    ours = nn.Linear.__init__
    nn.Linear.__init__ = wrapper(ours)  # type: ignore[method-assign]
    assert nn.Linear(2, 2).weight.ds_numel == 4
    context.__exit__(None, None, None)
    assert not hasattr(nn.Linear(2, 2).weight, "ds_id")
    nn.Linear.__init__ = ours  # type: ignore[method-assign]
    assert not hasattr(nn.Linear(2, 2).weight, "ds_id")
    nn.Linear.__init__ = original  # type: ignore[method-assign]
    with zero.Init(config_dict_or_path=CONFIG):
        assert Cautious().weight.ds_numel == 4


def test_other_wrappers_of_init() -> None:
    run_ranks(wrapped_by_others, 1)


def gathers_inside(rank: int, world_size: int) -> None:
    """Manual gathering in a constructor, and a layer replaced by its parametrisation meanwhile (wav2vec2)."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3)
            with zero.GatheredParameters(self.conv.weight, modifier_rank=0):
                self.before = self.conv.weight.detach().clone()
                self.conv = nn.utils.parametrizations.weight_norm(self.conv, name="weight", dim=2)
            own = self.conv.parametrizations.weight
            zero.register_external_parameter(self, own.original1)
            zero.register_external_parameter(self, own.original0)

    torch.manual_seed(rank)
    with zero.Init(config_dict_or_path=CONFIG):
        model = Positions()
    assert_partitioned(model, world_size)
    with zero.GatheredParameters(model.parameters()):
        torch.testing.assert_close(model.conv.weight.detach(), model.before)
        torch.testing.assert_close(model.conv.parametrizations.weight.original1.detach(), model.before)
    assert len(dict(model._external_params)) == 2


def test_gathering_in_a_constructor() -> None:
    run_ranks(gathers_inside, 1)
    run_ranks(gathers_inside, 2)


def reads_on_one_rank(rank: int, world_size: int) -> None:
    with zero.Init(config_dict_or_path=CONFIG):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        if rank == 0:  # facts about parameters and their text need nobody else
            assert "nan" in repr(model[0].weight) and model[0].weight.shape == (3, 3)
            assert sum(p.numel() for p in model.parameters()) == 24
            assert model[0].weight.requires_grad_(False).dim() == 2
            assert {t.device.type for t in model.state_dict().values()} == {"meta"}
            with pytest.raises(RuntimeError, match="partitioned, and pickling it"):
                pickle.dumps(model)
    assert_partitioned(model, world_size)


def loads_inside(rank: int, world_size: int) -> None:
    expected = Lists()
    with zero.Init(config_dict_or_path=CONFIG):
        model = Lists()
        model.load_state_dict(expected.state_dict())
        twin = copy.deepcopy(model)
        twin.rows[0].data.add_(1)
    assert_partitioned(model, world_size)
    assert_partitioned(twin, world_size)
    for name, tensor in whole(model).items():
        assert torch.equal(tensor, expected.state_dict()[name])
        assert torch.equal(whole(twin)[name], tensor + (name == "rows.0"))


def test_loading_and_copying_inside() -> None:
    run_ranks(loads_inside, 1)
    run_ranks(loads_inside, 2)


def test_facts_about_parameters_are_not_collective() -> None:
    run_ranks(reads_on_one_rank, 2, timeout_s=30)


def written_outside(rank: int, world_size: int) -> None:
    with zero.Init(config_dict_or_path=CONFIG):
        model = nn.Linear(3, 3)
    nn.init.zeros_(model.weight)
    whole(model)


def test_initialising_after_the_context_is_an_error() -> None:
    with pytest.raises(RankFailed, match=r"Linear\.weight was written to while it was partitioned.*GatheredParameters"):
        run_ranks(written_outside, 2)
