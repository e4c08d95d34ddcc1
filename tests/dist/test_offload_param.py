"""Parameters on NVMe (and on the host): the same training bit for bit, what is in memory, and what a disk can do."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import os
import re
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed._core.params.store import AwayShard, HostShards
from deepspeed.comm import doctor
from deepspeed.runtime.zero import shard_homes
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
)
from tests.helpers.dist import RankFailed, run_ranks
from tests.helpers.scripts import run_scripts
from tests.helpers.training import BATCH, KINDS, assert_equal, make_model, run_engine
from tests.helpers.zero3 import (
    RELEASED,
    Stack,
    assert_at_rest,
    assert_same,
    built,
    coordinator,
    data,
    engine_for,
    engine_of,
    plain_training,
    trains_as_plain,
    whole,
)

BF16 = {"bf16": {"enabled": True}}


def _nvme(folder: Path | str, **more: Any) -> dict[str, Any]:
    section = {"device": "nvme", "nvme_path": str(folder), "max_in_cpu": 0, "buffer_size": 4096, **more}
    return {"offload_param": section}


def _store(engine: Any) -> Any:
    return engine._offload.store


def _away(engine: Any) -> list[Any]:
    return [handle for handle in coordinator(engine).handles if handle.away is not None]


def _model(kind: str, config: dict[str, Any], at_birth: bool) -> nn.Module:
    if not at_birth:
        return make_model(kind)
    with deepspeed.zero.Init(config_dict_or_path={"train_micro_batch_size_per_gpu": BATCH, **config}):
        return make_model(kind)


# The same, more or less: everything away; some in memory; hardly any buffers; rows of many parameters, some of them here.
WAYS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"stage3_param_persistence_threshold": 0}, {}),
    ({"stage3_param_persistence_threshold": 0}, {"max_in_cpu": 150, "buffer_count": 1, "buffer_size": 600}),
    ({"stage3_param_persistence_threshold": 20}, {"buffer_count": 0}),
    ({"stage3_param_persistence_threshold": 20, "reduce_bucket_size": 64, "sub_group_size": 50}, {}),
)


def _parity(rank: int, world: int, folder: str) -> int:
    count = 0
    for number, (kind, accumulation) in enumerate(itertools.product(KINDS, (1, 2))):
        if (number + number // 2) % world:  # each world its share
            continue
        for turn in range(2):
            zero, section = WAYS[(number + 2 * turn + number // 4) % len(WAYS)]
            at_birth = bool((number + turn) % 2)
            config = {
                "gradient_accumulation_steps": accumulation,
                "gradient_clipping": 0.5 if number % 3 == 0 else 0.0,
                **(BF16 if (number // 2 + turn) % 2 else {}),
            }
            optimizer = ("adam", None)[(number // 2) % 2]  # torch's, or ours of the config
            if optimizer is None:
                config["optimizer"] = {"type": "AdamW", "params": {"lr": 0.01, "eps": 1e-4}}
            runs = []
            both = _nvme(folder, **section)
            if optimizer is None and (number + turn) % 2:  # the states, too; in fp32 the masters with them
                both["offload_optimizer"] = {"device": "nvme", "nvme_path": folder, "pipeline_read": True}
            for offload in ({}, both):
                full = {**config, "zero_optimization": {"stage": 3, **zero, **offload}}
                model = _model(kind, full, at_birth)
                runs.append(run_engine(kind, rank, full, optimizer=optimizer, model=model))
            what = f"{kind} {config} {zero} {section} zero.Init {at_birth}"
            assert_equal(runs[1], runs[0], what)
            assert runs[1].norms == runs[0].norms, what
            count += 1
    assert not os.listdir(folder)
    assert count >= 4 * len(KINDS) // world - 2
    return count


@pytest.mark.parametrize("world", [1, 2, 3])
def test_bit_equal_to_stage_3_without_offload(world: int, tmp_path: Path) -> None:
    run_ranks(_parity, world, str(tmp_path))


class Checkpointed(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return self.head(x).square().mean()


def _blocks(rank: int, world: int, folder: str) -> None:
    for make in (Stack, Checkpointed):
        trains_as_plain(make, lambda model, x: model(x), rank, world, zero=_nvme(folder), steps=3, what=make.__name__)


@pytest.mark.parametrize("world", [1, 2])
def test_blocks_and_recomputation(world: int, tmp_path: Path) -> None:
    run_ranks(_blocks, world, str(tmp_path))


def _residency(rank: int, world: int, folder: str) -> None:
    for precision, threshold in (({}, 0), (BF16, 9)):
        zero = {**_nvme(folder), "stage3_param_persistence_threshold": threshold}
        with engine_for(Stack, zero, **precision) as engine:
            store, found = _store(engine), coordinator(engine)
            for step in range(4):
                before = store.reads - store.staged_left, store.writes
                found.stats.reset()
                engine.backward(engine(data(rank, step).to(engine.module.head.weight.dtype)))
                assert_at_rest(engine)
                assert store.pool.nbytes <= store.pool.limit_nbytes
                reads = store.reads - before[0]
                plan = found.plan
                assert plan is not None
                if step == 3:
                    ids = [i for groups in plan.issue for group in groups for i in group]
                    assert reads == sum(found.by_id[i].away is not None for i in ids), "one read a gather"
                    assert not store.staged_left, "what was read ahead was used"
                    assert store.staged_hits > 0, "nothing was read ahead of use"
                engine.step()
                assert store.writes - before[1] == len(_away(engine)), "each shard is written once"
                assert_at_rest(engine)
            memory = {h.param.data.untyped_storage().data_ptr() for h in found.handles if h.persistent}
            for handle in _away(engine):
                assert handle.param.isnan().all()
                assert not handle.persistent and handle.param.data.untyped_storage().data_ptr() not in memory
            for bucket in engine._flat.buckets:
                assert not bucket.away or not bucket.weights.numel(), "a row of weights stayed"
            assert not engine._flat._rows._pool.nbytes, "rows' memory stayed"


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_in_memory_and_how_often_the_disk_is_read(world: int, tmp_path: Path) -> None:
    run_ranks(_residency, world, str(tmp_path))


def _in_memory(rank: int, world: int, folder: str) -> None:
    """Bytes of all storages that hold a model's values, by zero.Init and without."""
    gc.freeze()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {**RELEASED, **_nvme(folder, buffer_size=10**5)},
    }

    def live() -> int:
        gc.collect()
        tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and type(t) is not AwayShard]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
        return sum(storages.values())

    layers, width = 6, 128
    most = 0

    class Layer(nn.Linear):
        def __init__(self) -> None:
            nonlocal most
            super().__init__(width, width)
            most = max(most, live() - before)

    before = live()
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = nn.Sequential(*[Layer() for _ in range(layers)])
    one = 4 * (width * width + width)
    assert live() - before < 1000, "shards stayed in memory"
    assert most <= one + 1000, "more than a module was in memory"
    engine = deepspeed.initialize(model=model, config=config)[0]
    with torch.no_grad():
        for _ in range(3):
            engine(torch.zeros(1, width))
    pool = _store(engine).pool
    assert live() - before <= pool.nbytes + 4000 and pool.nbytes <= 5 * 4 * 10**5
    engine.destroy()


def test_zero_init_never_holds_more_than_a_module(tmp_path: Path) -> None:
    run_ranks(_in_memory, 2, str(tmp_path))


def _by_hand(rank: int, world: int, folder: str) -> None:
    for precision in ({}, BF16):
        with engine_for(Stack, _nvme(folder), **precision) as engine:
            weight = engine.module.head.weight
            shard = weight.ds_tensor
            handle = weight._ds_handle
            assert (
                shard.shape == (handle.shard_numel,) and shard.dtype == weight.dtype and shard.ds_numel == shard.numel()
            )
            assert shard.status is PartitionedParamStatus.NOT_AVAILABLE and weight.ds_status.name == "NOT_AVAILABLE"
            assert "NVMe" in repr(shard) and weight.ds_summary()["ds_tensor.shape"] == (handle.shard_numel,)
            for use in (torch.clone, torch.sum, lambda t: t[:1], lambda t: t.copy_(t)):
                with pytest.raises(RuntimeError, match=r"head\.weight rests on NVMe"):
                    use(shard)
            for modifier in (0, world - 1):
                with deepspeed.zero.GatheredParameters(weight, modifier_rank=modifier):
                    before = weight.detach().clone()
                    if rank == modifier:
                        with torch.no_grad():
                            weight.mul_(2)
                assert torch.equal(whole(engine.module)["head.weight"], before * 2)
                assert torch.equal(safe_get_full_fp32_param(weight), before.float() * 2)
            said = pytest.raises(RuntimeError, match="without modifier_rank")
            with said, deepspeed.zero.GatheredParameters(weight), torch.no_grad():
                weight.zero_()
            assert torch.equal(whole(engine.module)["head.weight"], before * 2), "an edit that was refused stayed"
            safe_set_full_fp32_param(weight, torch.ones(weight.shape))
            assert (whole(engine.module)["head.weight"] == 1).all()
            low, high = handle.own_range
            assert safe_get_local_fp32_param(weight)[: high - low].eq(1).all()
            weight.all_gather()
            weight.data.fill_(3)
            weight.partition(has_been_updated=True)
            assert (whole(engine.module)["head.weight"] == 3).all()
            weight.ds_tensor = torch.full((handle.shard_numel,), 4.0, dtype=weight.dtype)  # clients assign shards
            engine._flat.settle_weights()
            assert type(weight.ds_tensor) is AwayShard and (whole(engine.module)["head.weight"] == 4).all()
            state = engine.module.state_dict()
            assert state["head.weight"].is_meta and state["head.weight"].shape == weight.shape
            values = {name: torch.randn(value.shape) for name, value in state.items()}
            for value in values.values():
                deepspeed.comm.broadcast(value, 0)
            engine.module.load_state_dict(values)
            assert_same(whole(engine.module), {n: v.to(weight.dtype) for n, v in values.items()})
            engine.backward(engine(data(rank, 0).to(weight.dtype)))
            engine.step()
            assert_at_rest(engine)


@pytest.mark.parametrize("world", [1, 2])
def test_by_hand(world: int, tmp_path: Path) -> None:
    run_ranks(_by_hand, world, str(tmp_path))


def _failing(rank: int, world: int, folder: str) -> None:
    class Flaky(Stack):
        fails = ""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](x)
            if self.fails == "forward":
                raise ValueError("in forward")
            if self.fails == "backward":
                x = _Refuse.apply(x)
            for block in self.blocks[1:]:
                x = block(x)
            return self.head(x).square().mean()

    with engine_for(Flaky, _nvme(folder)) as engine:
        for step in range(3):
            for way in ("forward", "backward"):
                engine.module.fails = way
                with pytest.raises(ValueError, match=f"in {way}"):
                    engine.backward(engine(data(rank, 7)))
                assert_at_rest(engine)
            engine.module.fails = ""
            engine.backward(engine(data(rank, step)))
            engine.step()
        got = whole(engine.module)
    assert_same(got, plain_training(Flaky, lambda model, x: model(x), world, 3))


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise ValueError("in backward")


@pytest.mark.parametrize("world", [1, 2])
def test_exceptions_leave_the_engine_ready(world: int, tmp_path: Path) -> None:
    run_ranks(_failing, world, str(tmp_path))


# -- inference ---------------------------------------------------------------------------------------------------------


def _inference(rank: int, world: int, folder: str) -> None:
    plain = built(Stack).eval()
    x = data(rank, 0)
    with torch.no_grad():
        expected = plain(x)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {**RELEASED, **_nvme(folder)}}
    for at_birth in (False, True):
        with deepspeed.zero.Init(config_dict_or_path=config) if at_birth else contextlib.nullcontext():
            model = built(Stack)
        model.requires_grad_(False)
        before = 0 if not at_birth else model.head.weight._ds_handle.rest.writes - sum(1 for _ in model.parameters())
        engine = deepspeed.initialize(model=model, config=config)[0]
        engine.eval()
        with torch.no_grad():
            for number in range(4):
                got = engine(x) if number % 2 else engine.module(x)
                assert torch.equal(got, expected)
                assert_at_rest(engine)
        store = _store(engine)
        assert store.staged_hits >= len(_away(engine)), "shards were not read ahead"
        assert store.writes - before == len(_away(engine)), "frozen shards were written more than once"
        engine.destroy()


@pytest.mark.parametrize("world", [1, 2])
def test_inference(world: int, tmp_path: Path) -> None:
    run_ranks(_inference, world, str(tmp_path))


def _generation(rank: int, world: int, folder: str) -> None:
    from tests.helpers.clients import tiny_gpt2

    plain = tiny_gpt2().eval()
    tokens = torch.tensor([[1, 2, 3 + rank]])
    more = {"do_sample": False, "max_new_tokens": 4 + rank, "pad_token_id": 0}
    expected = plain.generate(tokens, **more)
    model = tiny_gpt2().eval()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {**RELEASED, **_nvme(folder, buffer_size=10**5)},
    }
    engine = deepspeed.initialize(model=model, config=config)[0]
    for form in (engine.module, engine):
        got = form.generate(tokens, synced_gpus=world > 1, **more)
        assert torch.equal(got, expected)
    assert _store(engine).reads > 0
    engine.destroy()


def test_generation(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    import tests.helpers.clients  # noqa: F401 - once, before ranks are forked

    run_ranks(_generation, 2, str(tmp_path))


# -- files -------------------------------------------------------------------------------------------------------------


def _checkpoints(rank: int, world: int, folder: str) -> None:
    nvme, kind = _nvme(folder), "lora"
    tiers = {"memory": {}, "nvme": nvme, "some": _nvme(folder, max_in_cpu=100)}
    full = {"stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0, "stage": 3}
    saved = {}
    for name, tier in tiers.items():
        config = {"zero_optimization": {**full, **tier}, **BF16}
        engine = _trained(kind, config, rank)
        engine.save_checkpoint(f"{folder}/{name}", tag="it")
        engine.save_16bit_model(f"{folder}/{name}", "weights.bin")
        engine.export_safetensors(f"{folder}/{name}/export")
        saved[name] = whole(engine.module)
        engine.destroy()
        assert_same(saved[name], saved["memory"])
    for name, to in itertools.product(("memory", "nvme"), tiers):
        config = {"zero_optimization": {**full, **tiers[to]}, **BF16}
        engine = _trained(kind, config, rank, steps=0)
        engine.load_checkpoint(f"{folder}/{name}", tag="it")
        got = whole(engine.module)
        for key, value in saved["memory"].items():
            assert torch.equal(got[key], value), f"{name} into {to}: {key}"
        engine.destroy()
    if rank == 0:
        one, two = (torch.load(f"{folder}/{n}/weights.bin", weights_only=True) for n in ("memory", "nvme"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
        for path in Path(f"{folder}/memory/export").glob("*.safetensors"):
            assert path.read_bytes() == Path(f"{folder}/nvme/export/{path.name}").read_bytes()
        from deepspeed.utils.zero_to_fp32 import (
            get_fp32_state_dict_from_zero_checkpoint,
        )

        one, two = (get_fp32_state_dict_from_zero_checkpoint(f"{folder}/{n}", "it") for n in ("memory", "nvme"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def _trained(kind: str, config: dict[str, Any], rank: int, steps: int = 2) -> Any:
    from tests.helpers.models import batches
    from tests.helpers.training import make_engine

    engine = make_engine(make_model(kind, seed=3 if steps else 4), config, "adam")
    for x, y in batches(rank, steps, BATCH):
        engine.backward(engine(x, y, False))
        engine.step()
    return engine


@pytest.mark.parametrize("world", [1, 2])
def test_files_from_and_into_any_tier(world: int, tmp_path: Path) -> None:
    run_ranks(_checkpoints, world, str(tmp_path))


def _moving(rank: int, world: int, folder: str) -> None:
    """A model goes from engine to engine, and its shards from tier to tier."""
    model = built(Stack)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for number, zero in enumerate((_nvme(folder), {}, _nvme(folder, max_in_cpu=50), {"stage": 0}, _nvme(folder))):
        engine = engine_of(model, zero)
        for name, value in whole(model).items():
            assert torch.equal(value, expected[name]), f"{number}: {name}"
        if engine._offload is not None:
            kept = sum(h.shard_numel for h in coordinator(engine).handles if h.away is None)
            assert kept <= {0: 0, 2: 50, 4: 0}.get(number, 10**9)
        engine.destroy()


def test_a_model_moves_between_tiers(tmp_path: Path) -> None:
    run_ranks(_moving, 2, str(tmp_path))


def _host(rank: int, world: int, folder: str) -> None:
    """What a machine with an accelerator does for ``device: cpu``; here the accelerator's memory plays itself."""
    kept = HostShards()
    shard_homes.shard_store = lambda *args, **kwargs: kept  # type: ignore[assignment]
    for make in (Stack, Checkpointed):
        trains_as_plain(make, lambda model, x: model(x), rank, world, steps=3)
    with engine_for(Stack) as engine:
        weight = engine.module.head.weight
        assert weight.ds_tensor.status is PartitionedParamStatus.AVAILABLE, "shards on the host can be read"
        gathered = whole(engine.module)["head.weight"].flatten()
        low, high = weight._ds_handle.own_range
        assert torch.equal(weight.ds_tensor[: high - low], gathered[low:high])


@pytest.mark.parametrize("world", [1, 2])
def test_host_tier(world: int) -> None:
    run_ranks(_host, world, "")


def _cpu(rank: int, world: int) -> None:
    with engine_for(Stack, {"offload_param": {"device": "cpu", "pin_memory": True}}) as engine:
        assert _store(engine) is None, "the CPU's memory is the host's"
        engine.backward(engine(data(rank, 0)))
        engine.step()
    with deepspeed.zero.Init(remote_device="cpu"):
        model = built(Stack)
    assert model.head.weight.ds_tensor.device.type == "cpu"


def test_cpu_tier_on_a_cpu() -> None:
    run_ranks(_cpu, 2)


# -- faults ------------------------------------------------------------------------------------------------------------


def _refused(rank: int, world: int, folder: str) -> None:
    os.makedirs(f"{folder}/ok", exist_ok=True)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        (_nvme(f"{folder}/nowhere"), f"nvme_path.*{folder}/nowhere"),
        ({"offload_param": {"device": "nvme"}}, "nvme_path is missing"),
        (_nvme(f"{folder}/ok", buffer_size=10), r"buffer_size = 10 .* set it to at least \d+"),
        ({**_nvme(f"{folder}/ok"), "zero_hpz_partition_size": 2}, "zero_hpz_partition_size"),
        ({**_nvme(f"{folder}/ok"), "zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights"),
        ({**_nvme(f"{folder}/ok"), "stage": 2}, "needs stage 3"),
    )
    for zero, said in cases:
        with pytest.raises((ValueError, OSError, RuntimeError), match=said):
            engine_of(built(Stack), zero)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with pytest.raises(ValueError, match="nvme_path is missing"):
        deepspeed.zero.Init(remote_device="nvme", config_dict_or_path=config)
    assert not os.listdir(f"{folder}/ok")


def test_refusals_name_the_key(tmp_path: Path) -> None:
    run_ranks(_refused, 2, str(tmp_path))


def _one_rank_fails(rank: int, world: int, folder: str, where: str) -> str:
    if where == "disk full" and rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    if where == "no folder" and rank == 1:
        folder = f"{folder}/rank1"
    try:
        if where == "disk full at birth":
            if rank == 1:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            zero = {**RELEASED, **_nvme(folder)}
            with deepspeed.zero.Init(
                config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
            ):
                built(Stack)
        else:
            engine_of(built(Stack), _nvme(folder))
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize("where", ["no folder", "disk full", "disk full at birth"])
def test_what_one_rank_cannot_do_is_said_on_all(where: str, tmp_path: Path) -> None:
    first, second = run_ranks(_one_rank_fails, 2, str(tmp_path), where)
    assert first.startswith("RuntimeError: rank 1 failed:"), first
    for said in (first, second):
        assert str(tmp_path) in said and ("nvme_path" in said if where == "no folder" else "4096 bytes" in said), said
    assert not os.listdir(tmp_path)


def _cut(rank: int, world: int, folder: str, when: str) -> str:
    """The file loses its end behind our back."""
    engine = engine_of(built(Stack), _nvme(folder, buffer_count=0 if when == "forward" else 5))
    engine.backward(engine(data(rank, 0)))
    engine.step()
    _store(engine).file.truncate(0)
    if when == "forward":
        with pytest.raises(OSError, match=r"shard of parameter \S+ cannot be read: read of \d+ bytes at offset"):
            engine(data(rank, 1))
        assert_at_rest(engine)
    else:
        with pytest.raises(OSError, match=r"read of \d+ bytes at offset \d+ stopped") as caught:
            for step in range(2):
                engine.backward(engine(data(rank, step)))
        assert folder in str(caught.value)
    return "said"


@pytest.mark.parametrize("when", ["forward", "ahead"])
def test_a_file_that_was_cut_is_noticed(when: str, tmp_path: Path) -> None:
    assert run_ranks(_cut, 1, str(tmp_path), when) == ["said"]


def _cut_on_one_rank(rank: int, world: int, folder: str) -> None:
    engine = engine_of(built(Stack), _nvme(folder, buffer_count=0))
    engine.backward(engine(data(rank, 0)))
    engine.step()
    if rank == 1:
        _store(engine).file.truncate(0)
    engine(data(rank, 1))
    raise AssertionError("the forward went on")


def test_a_rank_that_cannot_read_is_named_to_those_who_wait_for_it(tmp_path: Path) -> None:
    waiting, failing = run_scripts(_cut_on_one_rank, 2, str(tmp_path), DS_HANG_TIMEOUT_S="1.5")
    assert failing.code == 1 and re.search(r"OSError: .*shard of parameter \S+ cannot be read: read of", failing.text)
    assert waiting.code == doctor.EXIT_CODE
    assert re.search(r"rank 1 raised OSError: .*shard of parameter \S+ .*; rank 0 waits for it", waiting.text), waiting.text


def _unwritable(rank: int, world: int, folder: str) -> str:
    engine = engine_of(built(Stack), _nvme(folder))
    engine.backward(engine(data(rank, 0)))
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        _store(engine).file.truncate(0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try:
        engine.step()
    except (OSError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with pytest.raises(RuntimeError, match="different steps"):
        engine.backward(torch.zeros(1, requires_grad=True).sum())
    return said


def test_a_step_that_cannot_write_fails_on_all_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(_unwritable, 2, str(tmp_path))
    assert first.startswith("RuntimeError: rank 1 failed: OSError") and "write of" in second
    assert all(str(tmp_path) in said for said in (first, second))


def _killed(rank: int, world: int, folder: str) -> None:
    engine = engine_of(built(Stack), _nvme(folder))
    engine(data(rank, 0))
    os.kill(os.getpid(), signal.SIGKILL)


def test_nothing_stays_behind_a_killed_process(tmp_path: Path) -> None:
    with pytest.raises(RankFailed):
        run_ranks(_killed, 1, str(tmp_path))
    assert not list(tmp_path.iterdir())


def _two_jobs(rank: int, world: int, folder: str) -> None:
    """Two engines with files in one folder, each with its own values."""
    one, two = engine_of(built(Stack, 3), _nvme(folder)), engine_of(built(Stack, 4), _nvme(folder, buffer_count=2))
    assert _store(one) is not _store(two)
    for step in range(2):
        for engine in (one, two):
            engine.backward(engine(data(rank, step)))
            engine.step()
    assert_same(whole(one.module), plain_training(Stack, lambda model, x: model(x), world, 2))


def test_two_engines_share_a_folder(tmp_path: Path) -> None:
    run_ranks(_two_jobs, 1, str(tmp_path))


# -- a model that does not fit -----------------------------------------------------------------------------------------

_LAYERS, _WIDTH, _BUDGET = 16, 1024, 96 << 20
_STATES = 18 * _LAYERS * _WIDTH * (_WIDTH + 1)


class _Big(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH) for _ in range(_LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x.float().square().mean()


def _limit_memory() -> None:
    """From now on this process gets no more than the budget: writable memory of its own, as the system counts it."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 16)  # what is freed goes back to the system, and not into a heap that only grows
    libc.mallopt(-1, 1 << 16)
    libc.malloc_trim(0)
    used = int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_DATA, (used + _BUDGET, resource.RLIM_INFINITY))


def _big(rank: int, world: int, offload: dict[str, Any], limited: bool) -> list[float]:
    threading.stack_size(1 << 18)  # the system counts stacks whole
    config = {
        "train_micro_batch_size_per_gpu": 2,
        **BF16,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1 << 20, **offload},
    }
    if limited:
        _limit_memory()
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = _Big()
    engine = deepspeed.initialize(model=model, config=config)[0]
    losses = []
    for _ in range(3):
        loss = engine(data(rank, 0, 2, _WIDTH).bfloat16())
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def _big_with_ddp(rank: int, world: int) -> str:
    _limit_memory()
    try:
        model = nn.parallel.DistributedDataParallel(_Big())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model(data(rank, 0, 2, _WIDTH)).backward()
        optimizer.step()
    except (RuntimeError, MemoryError) as error:
        return str(error)
    return "it fits"


@pytest.mark.slow
def test_a_model_of_three_times_the_memory_trains(tmp_path: Path) -> None:
    assert _STATES >= 3 * _BUDGET
    states = {"device": "nvme", "nvme_path": str(tmp_path), "buffer_size": 1 << 18}
    offload = {
        **_nvme(tmp_path, buffer_size=1 << 20, buffer_count=4),
        "offload_optimizer": {**states, "pipeline_read": True, "pipeline_write": True},
    }
    limited = run_ranks(_big, 2, offload, True)
    assert limited == run_ranks(_big, 2, {}, False)
    assert limited[0][-1] < limited[0][0]
    assert all("alloc" in said for said in run_ranks(_big_with_ddp, 2))
