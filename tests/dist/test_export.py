"""``engine.export_safetensors``: the values, who writes them, what is there at any time, and what loads them."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import deepspeed
from deepspeed.runtime import export
from deepspeed.runtime.export import assign_writers
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from tests.helpers import preload  # noqa: F401 - before ranks are forked
from tests.helpers.ckpt import assert_same, build, config, train, whole
from tests.helpers.dist import run_ranks
from tests.helpers.memory import can_measure, peak_nbytes

INDEX = "model.safetensors.index.json"
TIED = {"format": "pt", "tied_back.weight": "inp.weight"}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def read(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of an export and its metadata, as a loader finds them; the index must be right."""
    single = Path(folder, "model.safetensors")
    if single.exists():
        assert not Path(folder, INDEX).exists(), "loaders would find two models"
        where, names = None, [single.name]
    else:
        index = json.loads(Path(folder, INDEX).read_text())
        where = index["weight_map"]
        names = sorted(set(where.values()))
        assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    found: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    for name in names:
        with safe_open(Path(folder, name), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            metadata.update(file.metadata())
        assert where is None or set(tensors) == {key for key, at in where.items() if at == name}
        found.update(tensors)
    if where is not None:
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    return found, metadata


def weight_files(folder: str | Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))


# -- values ------------------------------------------------------------------------------------------------------------


def exact(rank: int, world: int, folder: str, stage: int, dtype: str, zero: dict[str, Any]) -> None:
    made = config(stage, dtype)
    made["zero_optimization"].update(zero)
    engine = build(made)
    if world == 3:  # so that weights take turns in the buffers
        export._BUFFER_NBYTES, export._BLOCK_NUMEL, export._IN_FLIGHT = 400, 7, 3
    while engine.global_steps - engine.skipped_steps < 2:
        train(engine, rank, 1, seed=1)
    own = dict(whole(engine.module))
    own.pop("tied_back.weight")  # one copy, under the first name
    masters = {n: safe_get_full_fp32_param(p) for n, p in engine.module.named_parameters()}
    for wanted in (None, torch.float32, "bf16", torch.float16):
        files = engine.export_safetensors(f"{folder}/{wanted}", wanted, max_shard_size=700)
        kind = {"bf16": torch.bfloat16}.get(wanted, wanted)
        expected = {}
        for name, value in own.items():
            if kind is None or name == "shift":  # the buffer
                expected[name] = value
            elif SHORT[kind] == dtype or masters[name] is None:
                expected[name] = value.to(kind)
            else:
                expected[name] = masters[name].to(kind)
        found, metadata = read(f"{folder}/{wanted}")
        assert_same({name: found[name] for name in expected}, expected, f"{wanted}")
        assert found.keys() == expected.keys() and metadata == TIED
        assert files == weight_files(f"{folder}/{wanted}") and len(files) > 1
        assert not [name for name in os.listdir(f"{folder}/{wanted}") if name.startswith(".")]
    files = engine.export_safetensors(f"{folder}/trained", exclude_frozen_parameters=True)
    assert files == ["model.safetensors"] and os.listdir(f"{folder}/trained") == files
    assert_same(read(f"{folder}/trained")[0], {name: value for name, value in own.items() if name != "mid.weight"})
    engine.save_checkpoint(f"{folder}/checkpoint")
    if rank == 0 and not zero.get("zero_quantized_nontrainable_weights"):
        state = get_fp32_state_dict_from_zero_checkpoint(f"{folder}/checkpoint")
        fp32 = read(f"{folder}/{torch.float32}")[0]
        assert all(torch.equal(fp32[name], state[name].float()) for name in fp32)
    train(engine, rank, 1, seed=2)  # the engine is as it was


@pytest.mark.parametrize(
    ("world", "stage", "dtype", "zero"),
    [
        (1, 0, "fp32", {}),
        (2, 0, "bf16", {}),
        (3, 1, "bf16", {}),
        (2, 2, "fp32", {}),
        (1, 2, "bf16", {}),
        (2, 2, "fp16", {}),
        (1, 3, "bf16", {}),
        (3, 3, "fp32", {}),
        (2, 3, "bf16", {"stage3_param_persistence_threshold": 0}),
        (4, 3, "bf16", {"mics_shard_size": 2, "stage3_param_persistence_threshold": 0}),
        (2, 3, "bf16", {"zero_hpz_partition_size": 2, "zero_quantized_weights": True}),
        (2, 3, "fp32", {"zero_quantized_nontrainable_weights": True}),
        (1, 3, "bf16", {"zero_quantized_nontrainable_weights": True}),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else str(value),
)
def test_values_are_exact(tmp_path: Path, world: int, stage: int, dtype: str, zero: dict[str, Any]) -> None:
    run_ranks(exact, world, str(tmp_path), stage, dtype, zero)


class Kinds(nn.Module):
    """Frozen parameters and buffers of all kinds; buffers differ between ranks."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.w = nn.Linear(6, 5)
        self.crossed = nn.Parameter(torch.arange(12.0).view(3, 4).t(), requires_grad=False)
        self.whole = nn.Parameter(torch.arange(7), requires_grad=False)
        self.flags = nn.Parameter(torch.tensor([True, False, True]), requires_grad=False)
        self.register_buffer("count", torch.tensor(rank))
        self.register_buffer("mask", torch.tensor([rank == 0] * 5))
        self.register_buffer("waves", torch.full((3,), 1j + rank, dtype=torch.complex64))
        self.register_buffer("average", torch.full((9, 2), float(rank)).t())
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)

    def get_extra_state(self) -> Any:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w(x).sum()


def kinds(rank: int, world: int, folder: str, stage: int) -> None:
    made = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    made["optimizer"] = {"type": "SGD", "params": {"lr": 0.1}}
    engine = deepspeed.initialize(model=Kinds(0), config=made)[0]
    for name, buffer in Kinds(rank).named_buffers():
        engine.module.get_buffer(name).copy_(buffer)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        expected = {name: v.clone() for name, v in engine.module.state_dict().items() if isinstance(v, torch.Tensor)}
    first: list[Any] = [
        {name: value for name, value in expected.items() if name in dict(engine.module.named_buffers())}
    ]
    torch.distributed.broadcast_object_list(first, src=0)
    expected.update(first[0])
    files = engine.export_safetensors(folder, max_shard_size=30)
    assert len(files) > 6
    found, metadata = read(folder)
    assert_same({name: found[name] for name in sorted(found)}, {name: expected[name] for name in sorted(expected)})
    assert metadata == {"format": "pt"} and found["average"].eq(0).all() and found["waves"].eq(1j).all()
    # Only floating-point parameters are converted.
    engine.export_safetensors(folder, dtype="fp16")
    dtypes = {name: value.dtype for name, value in read(folder)[0].items()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float16} == {"w.weight", "w.bias", "crossed"}


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (3, 2), (3, 3)])
def test_buffers_of_rank_0_and_every_dtype(tmp_path: Path, world: int, stage: int) -> None:
    run_ranks(kinds, world, str(tmp_path), stage)


# -- who writes, and how much memory it takes --------------------------------------------------------------------------


def test_files_are_dealt_by_bytes() -> None:
    assert assign_writers([5, 5, 5, 5], 2) == [0, 1, 0, 1]
    assert assign_writers([1, 9, 1, 1, 6], 2) == [1, 0, 1, 1, 1]
    assert assign_writers([3], 4) == [0] and assign_writers([], 2) == []
    assert assign_writers([0, 0, 7], 3) == [1, 1, 0]


class Wide(nn.Module):
    def __init__(self, count: int = 12, side: int = 1024) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(side, side, bias=False) for _ in range(count))
        self.big = nn.Linear(side, 2 * side, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.big(x).sum()


def shared_work(rank: int, world: int, folder: str, stage: int) -> Any:
    """Each rank writes its share of the files, and gets only what it writes."""
    made = config(stage)
    del made["scheduler"]
    made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = deepspeed.initialize(model=Wide(9, 16), config=made)[0]
    written: list[str] = []
    begin = export._Writer._begin

    def noting(self: Any, file: Any) -> None:
        written.append(file.name)
        begin(self, file)

    with pytest.MonkeyPatch.context() as patch, deepspeed.comm.observe() as events:
        patch.setattr(export._Writer, "_begin", noting)
        files = engine.export_safetensors(folder, max_shard_size=2048)
    received = sum(event.nbytes for event in events if event.op == "irecv")
    nbytes = sum(t.nbytes for t in read(folder)[0].values() for _ in [0])
    own = sum(t.nbytes for name in written for t in _tensors(f"{folder}/{name}"))
    assert received == (0 if stage < 3 else own - own // world), "every rank has one part in so many of each weight"
    return files, written, own, nbytes


def _tensors(path: str) -> list[torch.Tensor]:
    with safe_open(path, "pt") as file:
        return [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118 - not a dict


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_work(tmp_path: Path, stage: int, world: int) -> None:
    results = run_ranks(shared_work, world, str(tmp_path), stage)
    files = results[0][0]
    assert sorted(name for _, written, _, _ in results for name in written) == sorted(files) and len(files) == 6
    loads = [own for _, _, own, _ in results]
    assert sum(loads) == results[0][3]
    assert max(loads) - min(loads) <= 2048, "no rank writes more than a file above another"


MIB = 1 << 20
LARGEST, MODEL = 8 * MIB, 56 * MIB  # fp32
BUFFERS = export._BUFFER_NBYTES + 2 * export._FILE_BUFFER_NBYTES
BLOCKS = 3 * 4 * export._BLOCK_NUMEL  # a block, the block in another dtype, and what the allocator adds


def peaks(rank: int, world: int, folder: str, stage: int, dtype: str) -> list[int]:
    made: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    made["zero_optimization"] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if dtype == "bf16":
        made["bf16"] = {"enabled": True}
    model = Wide()
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), config=made)[0]
    engine.export_safetensors(f"{folder}/warm", max_shard_size="30MB")
    exported = peak_nbytes(lambda: engine.export_safetensors(folder, torch.float32, max_shard_size="30MB"))
    return [exported, peak_nbytes(lambda: {n: p.detach().float() + 1 for n, p in whole(model).items()})]


@pytest.mark.skipif(not can_measure(), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (2, "bf16"), (3, "bf16")])
def test_peak_memory_is_that_of_a_parameter(tmp_path: Path, stage: int, dtype: str) -> None:
    for exported, everything in run_ranks(peaks, 2, str(tmp_path), stage, dtype):
        assert everything >= MODEL, "the measurement sees nothing"
        assert exported <= LARGEST + BUFFERS + BLOCKS < MODEL, exported / MIB


# -- one export after the other ----------------------------------------------------------------------------------------


def again(rank: int, world: int, folder: str) -> None:
    engine = build(config(3, "bf16"))
    Path(folder).mkdir(exist_ok=True, parents=True)
    if rank == 0:
        Path(folder, "config.json").write_text("{}")
        Path(folder, "model-notes.safetensors").write_text("mine")
        Path(folder, ".model-00001-of-00003.safetensors.0123456789ab.tmp").write_text("of a killed export")
    torch.distributed.barrier()
    for limit in ("200", None, 700, 700, "5GB"):
        train(engine, rank, 1, seed=1)
        files = engine.export_safetensors(folder, max_shard_size=limit)
        expected = whole(engine.module)
        expected.pop("tied_back.weight")
        found = read(folder)[0]
        assert_same({name: found[name] for name in expected}, expected)
        index = [] if len(files) == 1 else [INDEX]
        assert sorted(os.listdir(folder)) == sorted([*files, *index, "config.json", "model-notes.safetensors"])
        torch.distributed.barrier()


def test_a_new_export_replaces_the_old_one(tmp_path: Path) -> None:
    run_ranks(again, 2, str(tmp_path / "deep" / "out"))


def failing(rank: int, world: int, folder: str, stage: int) -> None:
    """One rank's disk is full; then the index cannot be written."""
    engine = build(config(stage, "bf16"))
    engine.export_safetensors(folder, max_shard_size=700)
    before, listed = read(folder)[0], sorted(os.listdir(folder))
    torch.distributed.barrier()
    train(engine, rank, 3, seed=1)

    def full(self: Any, data: Any) -> int:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(export.BlockFile, "write", full)
        with pytest.raises((OSError, ValueError), match="No space left on device"):
            engine.export_safetensors(folder, max_shard_size=700)
    torch.distributed.barrier()
    assert sorted(os.listdir(folder)) == listed
    assert_same(read(folder)[0], before)
    torch.distributed.barrier()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "atomic_write_text", lambda *_: full(None, None))
        with pytest.raises((OSError, ValueError), match="No space left on device"):
            engine.export_safetensors(folder, max_shard_size=700)
        torch.distributed.barrier()
        assert sorted(os.listdir(folder)) == [name for name in listed if name != INDEX], "no index of two exports"
        torch.distributed.barrier()
        with pytest.raises((OSError, ValueError), match="No space left on device"):
            engine.export_safetensors(folder, max_shard_size=200)
    torch.distributed.barrier()
    engine.export_safetensors(folder, max_shard_size=700)
    assert sorted(os.listdir(folder)) == listed
    assert not torch.equal(read(folder)[0]["inp.weight"], before["inp.weight"])


@pytest.mark.parametrize("stage", [1, 3])
def test_a_failure_on_one_rank_is_one_on_all(tmp_path: Path, stage: int) -> None:
    run_ranks(failing, 2, str(tmp_path), stage)


def refused(rank: int, world: int, folder: str) -> None:
    engine = build(config(3))
    for problem, match in (
        ({"dtype": "int8"}, "torch.int8 cannot be used here"),
        ({"dtype": "float17"}, "unknown dtype 'float17'"),
        ({"max_shard_size": "many"}, "max_shard_size: expected a number of bytes"),
        ({"max_shard_size": 200 + rank * 500}, r"ranks \[1\] would export other names"),
        ({"exclude_frozen_parameters": rank == 1}, r"ranks \[1\] would export other names"),
    ):
        with pytest.raises(ValueError, match=match):
            engine.export_safetensors(folder, **problem)
    assert os.listdir(folder) == []
    torch.distributed.barrier()
    if rank == 0:
        Path(folder, "occupied").write_text("a file")
    torch.distributed.barrier()
    with pytest.raises((OSError, ValueError), match="occupied"):
        engine.export_safetensors(f"{folder}/occupied")
    other = f"{folder}/{rank}"
    with pytest.raises(
        ValueError, match=r"on rank 0 lacks model-0000\d-of-00004.safetensors.* must see the same folder"
    ):
        engine.export_safetensors(other, max_shard_size=700)

    engine.load_module_state_dict({**whole(engine.module), "head.bias": torch.tensor([0, 1, -1e5, 2, 3, 4, 5])})
    with pytest.raises(ValueError, match=r"'head.bias' has values up to 100000, which are infinite in float16"):
        engine.export_safetensors(f"{folder}/half", "fp16")
    torch.distributed.barrier()
    assert os.listdir(f"{folder}/half") == []
    engine.export_safetensors(f"{folder}/half", "bf16")


def test_bad_arguments(tmp_path: Path) -> None:
    run_ranks(refused, 2, str(tmp_path))


class Renamed(nn.Module):
    """Gives its weight another name in state dicts, as a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "renamed"] = self.weight.detach()


def placeholders(rank: int, world: int, folder: str) -> None:
    made: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1}
    made["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    engine = deepspeed.initialize(model=nn.Sequential(Renamed()), config=made)[0]
    with pytest.raises(ValueError, match=r"'0.renamed' has no data"):
        engine.export_safetensors(folder)
    with deepspeed.zero.Init(config_dict_or_path=made):
        empty = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    engine = deepspeed.initialize(model=empty, config=made)[0]
    with pytest.raises(ValueError, match=r"'1.weight' has no values: it was made on the meta device"):
        engine.export_safetensors(folder)
    assert os.listdir(folder) == []
    torch.distributed.barrier()
    empty.load_state_dict({"1.weight": torch.ones(3, 3), "1.bias": torch.ones(3)}, strict=False)
    engine.export_safetensors(folder)
    assert_same({n: read(folder)[0][n] for n in whole(empty)}, whole(empty))

    empty.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to export"):
        engine.export_safetensors(folder, exclude_frozen_parameters=True)
    empty.register_buffer("table", torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match=r"'table' is torch.float32, torch.sparse_coo, which safetensors files cannot"):
        engine.export_safetensors(folder)


def test_placeholders_are_never_written(tmp_path: Path) -> None:
    run_ranks(placeholders, 2, str(tmp_path))


def on_meta(rank: int, world: int, folder: str, stage: int) -> None:
    """An entry without data that came after initialize, seen by rank 0 alone where only it collects."""
    made = config(stage)
    made["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    engine = build(made)
    engine.module.register_buffer("late", torch.empty(3, device="meta"))
    for write in (
        lambda: engine.export_safetensors(folder),
        lambda: engine.save_16bit_model(folder),
        engine._zero3_consolidated_16bit_state_dict,
    ):
        with pytest.raises(ValueError, match="'late' has no data"):
            write()
    assert os.listdir(folder) == []
    torch.distributed.barrier()
    engine.module.late = torch.ones(3) * rank
    engine.save_16bit_model(folder)
    engine.export_safetensors(folder)
    torch.distributed.barrier()
    plain = torch.load(f"{folder}/pytorch_model.bin", weights_only=True)
    plain.pop("tied_back.weight")
    found = read(folder)[0]
    assert_same({name: found[name] for name in plain}, plain, "the two ways out")
    assert plain["late"].eq(0).all()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_entries_without_data_are_refused_on_all_ranks(tmp_path: Path, stage: int) -> None:
    run_ranks(on_meta, 2, str(tmp_path), stage)


def ended(rank: int, world: int, folder: str, stage: int) -> None:
    """After ``destroy`` the model's own weights can be exported; masters that a later engine may have passed cannot."""
    engine = build(config(stage, "bf16"))
    train(engine, rank, 1, seed=1)
    expected = whole(engine.module)
    expected.pop("tied_back.weight")
    engine.destroy()
    engine.export_safetensors(folder)
    found = read(folder)[0]
    assert_same({name: found[name] for name in expected}, expected)
    with pytest.raises(RuntimeError, match="does not train any more"):
        engine.export_safetensors(folder, "fp32")


@pytest.mark.parametrize("stage", [2, 3])
def test_after_destroy(tmp_path: Path, stage: int) -> None:
    run_ranks(ended, 2, str(tmp_path), stage)


# -- Transformers ------------------------------------------------------------------------------------------------------


def pretrained(rank: int, world: int, folder: str, stage: int, tied: bool, limit: Any) -> None:
    from transformers import GPT2LMHeadModel

    from tests.helpers.clients import tiny_gpt2

    model = tiny_gpt2()
    if not tied:
        config_ = model.config
        config_.tie_word_embeddings = False
        torch.manual_seed(3)
        model = GPT2LMHeadModel(config_)
    made: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    made.update(bf16={"enabled": True}, optimizer={"type": "AdamW", "params": {"lr": 0.01}})
    made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = deepspeed.initialize(model=model, config=made)[0]
    tokens = torch.arange(8).view(1, 8) + rank
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    for dtype in (None, "fp32"):
        out = f"{folder}/{dtype}"
        engine.export_safetensors(out, dtype, max_shard_size=limit)
        if rank == 0:
            model.config.save_pretrained(out)
        torch.distributed.barrier()
        expected = whole(model)
        for name, param in model.named_parameters(remove_duplicate=False):
            if dtype == "fp32":
                expected[name] = safe_get_full_fp32_param(param)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            back, info = GPT2LMHeadModel.from_pretrained(out, output_loading_info=True, dtype="auto")
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert (back.lm_head.weight is back.transformer.wte.weight) == tied
        assert_same(dict(back.state_dict()), expected, out)


@pytest.mark.client
@pytest.mark.parametrize(
    ("world", "stage", "tied", "limit"),
    [(1, 0, True, "5GB"), (2, 0, True, 20_000), (2, 2, False, 20_000), (1, 3, True, 20_000), (2, 3, True, 20_000)],
)
def test_from_pretrained_loads_it(tmp_path: Path, world: int, stage: int, tied: bool, limit: Any) -> None:
    pytest.importorskip("transformers", reason="the client is not installed: make test-clients installs it")
    from tests.helpers import clients  # noqa: F401 - before ranks are forked

    run_ranks(pretrained, world, str(tmp_path), stage, tied, limit)
