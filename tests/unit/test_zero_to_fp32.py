"""zero_to_fp32: exact weights from every stage, as a library and as the script that lies in a checkpoint folder."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections import OrderedDict, defaultdict, namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save_file as save_safetensors

from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.utils import zero_to_fp32 as script
from deepspeed.utils.zero_to_fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    get_model_state_file,
    get_optim_files,
    load_state_dict_from_zero_checkpoint,
)
from tests.helpers.memory import can_measure

FIXTURES = Path(__file__).parents[1] / "data" / "reference-checkpoints"
ALL = sorted(p.name for p in FIXTURES.iterdir() if p.is_dir())
ORDER = [
    "embed.weight",
    "up.weight",
    "up.bias",
    "frozen.weight",
    "down.weight",
    "down.bias",
    "norm.weight",
    "norm.bias",
]
NUMEL = 6061  # all of the above and the one element of the buffer


class TinyModel(torch.nn.Module):
    """The model of the fixtures, without its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(37, 24)
        self.up = torch.nn.Linear(24, 51)
        self.frozen = torch.nn.Linear(51, 51, bias=False)
        self.down = torch.nn.Linear(51, 24)
        self.norm = torch.nn.LayerNorm(24)
        self.head = torch.nn.Linear(24, 37, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor([0.0]))


def expected(name: str) -> dict[str, torch.Tensor]:
    return load_safetensors(FIXTURES / name / "expected.safetensors")


def assert_expected(state: dict[str, torch.Tensor], name: str) -> None:
    """Exactly the expected names and values; plus the buffer and the tied name, which the fixture leaves out."""
    want = expected(name)
    assert set(state) == {*want, "scale", "head.weight"}
    for key, value in want.items():
        assert torch.equal(state[key].float(), value), key
        assert state[key].dtype == torch.float32 or key == "frozen.weight", key
    assert state["scale"].tolist() == [1.5]
    assert torch.equal(state["head.weight"], state["embed.weight"])


def run_script(path: Path, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """As in a fresh environment: isolated, so neither this package's folder nor PYTHONPATH is seen."""
    return subprocess.run(
        [sys.executable, "-I", str(path), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "z2_fp32" / "ckpt", tmp_path / "ckpt"))


@pytest.mark.parametrize("name", ALL)
def test_every_stage_gives_the_expected_weights(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    state = get_fp32_state_dict_from_zero_checkpoint(str(FIXTURES / name / "ckpt"))
    assert_expected(state, name)
    assert state["head.weight"] is state["embed.weight"]
    frozen = torch.bfloat16 if name in ("z1_bf16", "z2_bf16", "z3_bf16") else torch.float32
    assert state["frozen.weight"].dtype == frozen, "frozen weights keep their stored dtype"
    assert [key for key in state if key not in ("scale", "head.weight")] == ORDER
    assert capsys.readouterr().out.splitlines() == [
        "Processing zero checkpoint at step3",
        f"Detected checkpoint of type zero stage {name[1]}, world_size: 2",
    ]


@pytest.mark.parametrize("name", ["z1_bf16", "z2_bf16", "z3_bf16", "z3_fp32", "z2_fp32", "z1_fp32"])
def test_frozen_parameters_can_be_left_out(name: str) -> None:
    state = get_fp32_state_dict_from_zero_checkpoint(str(FIXTURES / name / "ckpt"), "step3", True)
    assert set(state) == {*ORDER, "scale", "head.weight"} - {"frozen.weight"}


def test_lazy_values_build_the_tensors_on_demand() -> None:
    lazy = get_fp32_state_dict_from_zero_checkpoint(str(FIXTURES / "z3_bf16" / "ckpt"), lazy_mode=True)
    assert not any(torch.is_tensor(value) for value in lazy.values())
    assert lazy["up.weight"].shape == (51, 24)
    assert_expected({name: value.contiguous() for name, value in lazy.items()}, "z3_bf16")


def test_the_state_dict_does_not_depend_on_the_files(copied: Path) -> None:
    state = get_fp32_state_dict_from_zero_checkpoint(str(copied))
    for path in (copied / "step3").iterdir():
        with path.open("r+b") as stream:
            stream.write(b"\0" * path.stat().st_size)
    assert_expected(state, "z2_fp32")


@pytest.mark.parametrize("name", ["z0_bf16", "z2_bf16", "z3_fp32"])
def test_a_model_is_loaded_whole(name: str) -> None:
    model = TinyModel()
    back = load_state_dict_from_zero_checkpoint(model, str(FIXTURES / name / "ckpt"), tag="step3")
    assert back is model
    assert model.head.weight is model.embed.weight
    assert_expected(dict(model.state_dict()), name)


def test_another_model_is_refused_unchanged(copied: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="another model: 10 of its 10 names"):
        load_state_dict_from_zero_checkpoint(model, str(copied))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ALL)
def test_script_stands_alone_in_the_folder(name: str, tmp_path: Path) -> None:
    """Run by path from a copy beside ``latest``, with nothing of this package importable."""
    folder = Path(shutil.copytree(FIXTURES / name / "ckpt", tmp_path / "ckpt"))
    copy = Path(shutil.copy(script.__file__, folder))
    done = run_script(copy, ".", "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "Processing zero checkpoint at step3",
        f"Detected checkpoint of type zero stage {name[1]}, world_size: 2",
        f"Saving fp32 state dict to out/pytorch_model.bin (total_numel={NUMEL})",
    ]
    assert done.stderr == ""
    assert os.listdir(folder / "out") == ["pytorch_model.bin"]
    state = torch.load(folder / "out" / "pytorch_model.bin", weights_only=True)
    assert_expected(state, name)
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()


def test_script_needs_torch_and_the_standard_library_only() -> None:
    tree = ast.parse(Path(script.__file__).read_text())
    names = {n.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    names |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names - set(sys.stdlib_module_names) == {"torch", "numpy", "tqdm"}
    top = {n.name for node in tree.body if isinstance(node, ast.Import) for n in node.names}
    assert not top & {"numpy", "tqdm"}, "these two are optional"
    assert Path(script.__file__).read_text().startswith("#!/usr/bin/env python")
    assert os.access(script.__file__, os.X_OK)


def test_script_without_numpy_and_tqdm(copied: Path, tmp_path: Path) -> None:
    block = (
        "import sys, runpy; sys.modules['numpy'] = None; sys.modules['tqdm'] = None;"
        f"sys.argv = ['x', {str(copied)!r}, {str(tmp_path / 'w.safetensors')!r}]; sys.stderr.isatty = lambda: True;"
        f"runpy.run_path({script.__file__!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-I", "-c", block], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(load_safetensors(tmp_path / "w.safetensors")) == {*ORDER, "scale"}


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".safetensors"])
def test_a_file_name_gives_one_file(suffix: str, copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / f"w{suffix}"
    convert_zero_checkpoint_to_fp32_state_dict(str(copied), str(out), max_shard_size=1)
    assert os.listdir(out.parent) == [out.name]
    if suffix == ".safetensors":
        assert torch.equal(load_safetensors(out)["up.bias"], expected("z2_fp32")["up.bias"])
    else:
        assert_expected(torch.load(out, weights_only=True), "z2_fp32")


def test_an_existing_folder_with_a_file_like_name_is_a_folder(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "out.bin").mkdir()
    convert_zero_checkpoint_to_fp32_state_dict(str(copied), output_file=str(tmp_path / "out.bin"))
    assert os.listdir(tmp_path / "out.bin") == ["pytorch_model.bin"]


def test_bin_shards_with_index(copied: Path, tmp_path: Path) -> None:
    convert_zero_checkpoint_to_fp32_state_dict(str(copied), str(tmp_path / "out"), max_shard_size="6KB", tag="step3")
    index = json.loads((tmp_path / "out" / "pytorch_model.bin.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.bin"))
    assert files == [f"pytorch_model-{i:05d}-of-{len(files):05d}.bin" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    assert index["metadata"]["total_size"] == 4 * NUMEL
    whole = {}
    for name in files:
        shard = torch.load(tmp_path / "out" / name, weights_only=True)
        assert {key for key, where in index["weight_map"].items() if where == name} == set(shard)
        unique = {t.data_ptr(): t.nbytes for t in shard.values()}
        assert sum(unique.values()) <= 6000 or len(unique) == 1
        whole.update(shard)
    assert_expected(whole, "z2_fp32")
    assert index["weight_map"]["head.weight"] == index["weight_map"]["embed.weight"]


def test_safetensors_shards_and_the_tied_name(copied: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    done = run_script(
        Path(script.__file__),
        copied,
        tmp_path / "out",
        "--safe_serialization",
        "--max_shard_size",
        "6000",
        "-t",
        "step3",
    )
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {*ORDER, "scale"}
    whole, metadata = {}, {}
    for name in sorted(set(index["weight_map"].values())):
        whole.update(load_safetensors(tmp_path / "out" / name))
        with safe_open(tmp_path / "out" / name, "pt") as opened:
            metadata.update(opened.metadata())
    assert metadata == {"format": "pt", "head.weight": "embed.weight"}
    whole["head.weight"] = whole["embed.weight"]
    assert_expected(whole, "z2_fp32")


def test_safetensors_bytes_are_those_of_the_library(copied: Path, tmp_path: Path) -> None:
    """Same data section as the reference writer of the format, for every dtype and for empty and 0-d tensors."""
    kinds = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
        torch.uint16,
        torch.complex64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ]
    tensors = {str(kind): torch.tensor([[0, 1, 2], [3, 4, 5]]).to(kind) for kind in kinds}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    weights = {n: script._Weight(tuple(t.shape), t.dtype, (t.reshape(-1),)) for n, t in tensors.items()}
    script._write_safetensors(str(tmp_path / "a.safetensors"), weights, {})
    save_safetensors(tensors, tmp_path / "b.safetensors")
    raw = (tmp_path / "a.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.itemsize == 0, f"{name} is not aligned"
    back, other = load_safetensors(tmp_path / "a.safetensors"), load_safetensors(tmp_path / "b.safetensors")
    assert set(back) == set(other)
    for name, tensor in other.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("1.5MB", 1_500_000), ("2 KiB", 2048), ("1gib", 2**30), ("700", 700), (12, 12), (None, None)],
)
def test_shard_sizes(text: object, nbytes: object) -> None:
    assert script.parse_size(text) == nbytes  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "five", "5XB", "-1GB", "0", 0, "step3"])
def test_bad_shard_sizes_write_nothing(text: object, copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_size"):
        convert_zero_checkpoint_to_fp32_state_dict(str(copied), str(tmp_path / "out"), text)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_tags(copied: Path) -> None:
    shutil.copytree(copied / "step3", copied / "other")
    (copied / "latest").write_text("other\n")
    assert_expected(get_fp32_state_dict_from_zero_checkpoint(str(copied)), "z2_fp32")
    (copied / "latest").write_text("gone")
    with pytest.raises(FileNotFoundError, match=r"tag in .*latest is 'gone'"):
        get_fp32_state_dict_from_zero_checkpoint(str(copied))
    with pytest.raises(FileNotFoundError, match="given tag is 'x'"):
        get_fp32_state_dict_from_zero_checkpoint(str(copied), "x")
    (copied / "latest").unlink()
    with pytest.raises(FileNotFoundError, match="tag must be given"):
        get_fp32_state_dict_from_zero_checkpoint(str(copied))
    assert_expected(get_fp32_state_dict_from_zero_checkpoint(str(copied), "step3"), "z2_fp32")


def test_missing_ranks_leftovers_and_truncated_files(copied: Path, tmp_path: Path) -> None:
    tag = copied / "step3"
    first, second = (tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2))
    shutil.copy(second, tag / "zero_pp_rank_2_mp_rank_00_optim_states.pt")
    assert_expected(get_fp32_state_dict_from_zero_checkpoint(str(copied)), "z2_fp32")
    (tag / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    whole = second.read_bytes()
    second.write_bytes(whole[:9000])
    done = run_script(Path(script.__file__), copied, tmp_path / "out")
    assert done.returncode == 1
    assert "rank_1_mp_rank_00_optim_states.pt (9000 bytes)" in done.stderr
    assert "Traceback" not in done.stderr
    second.unlink()
    with pytest.raises(ValueError, match="those of rank 1 are missing"):
        get_fp32_state_dict_from_zero_checkpoint(str(copied))
    first.unlink()
    with pytest.raises(ValueError, match=r"ZeRO stage 2, but no \*_optim_states\.pt"):
        convert_zero_checkpoint_to_fp32_state_dict(str(copied), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_a_foreign_class_is_named_and_not_run(copied: Path, tmp_path: Path) -> None:
    torch.save({"module": Evil(tmp_path / "trace")}, copied / "step3" / "mp_rank_00_model_states.pt")
    done = run_script(Path(script.__file__), copied, tmp_path / "out", "--debug")
    assert done.returncode == 1
    assert "mkdir" in done.stderr
    assert "Traceback" in done.stderr, "--debug shows where"
    assert not (tmp_path / "trace").exists()
    assert not (tmp_path / "out").exists()


def test_files_by_stage_and_rank(tmp_path: Path) -> None:
    for name, stage, model in (("z0_fp32", 0, "mp"), ("z2_bf16", 2, "mp"), ("z3_bf16", 3, "zero_pp_rank_0_mp")):
        path = get_model_state_file(str(FIXTURES / name / "ckpt" / "step3"), stage)
        assert os.path.basename(path) == f"{model}_rank_00_model_states.pt"
    with pytest.raises(FileNotFoundError, match="model file of a ZeRO stage 3"):
        get_model_state_file(str(FIXTURES / "z2_bf16" / "ckpt" / "step3"), 3)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        get_model_state_file(str(tmp_path / "gone"), 1)
    with pytest.raises(FileNotFoundError, match="there are none"):
        get_optim_files(str(tmp_path))
    for rank in range(12):
        (tmp_path / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    assert [os.path.basename(p).split("_")[4] for p in get_optim_files(str(tmp_path))] == [str(r) for r in range(12)]
    (tmp_path / "zero_pp_rank_3_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(ValueError, match="two optimizer files of rank 3"):
        get_optim_files(str(tmp_path))
    (tmp_path / "zero_pp_rank_0_mp_rank_01_optim_states.pt").touch()
    with pytest.raises(ValueError, match="model-parallel"):
        get_optim_files(str(tmp_path))


def write_own_stage2(folder: Path, world: int) -> dict[str, torch.Tensor]:
    """A folder as this package writes it: plain values only, padding kept, two groups, empty and 0-d parameters."""
    groups = [OrderedDict(a=(3, 5), e=(0, 4)), OrderedDict(s=(), b=(7,))]
    torch.manual_seed(0)
    whole = {name: torch.randn(shape) for group in groups for name, shape in group.items()}
    pieces = []
    for group in groups:
        flat = torch.cat([whole[name].reshape(-1) for name in group])
        piece = -(-flat.numel() // world)
        flat = torch.cat([flat, torch.full((piece * world - flat.numel(),), torch.nan)])
        pieces.append(flat.split(piece) if piece else [flat] * world)
    (folder / "t").mkdir()
    (folder / "latest").write_text("t")
    model = {
        "module": {name: value.half() for name, value in whole.items()},
        "param_shapes": [OrderedDict((n, torch.Size(s)) for n, s in group.items()) for group in groups],
        "buffer_names": [],
        "shared_params": {"z": "b"},
    }
    torch.save(model, folder / "t" / "mp_rank_00_model_states.pt")
    for rank in range(world):
        state = {
            "zero_stage": 2,
            "partition_count": [world, world],
            "single_partition_of_fp32_groups": [p[rank].clone() for p in pieces],
        }
        torch.save({"optimizer_state_dict": state}, folder / "t" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return whole


@pytest.mark.parametrize("world", [1, 2, 3, 5, 11])
def test_own_files_at_any_world_size(world: int, tmp_path: Path) -> None:
    whole = write_own_stage2(tmp_path, world)
    state = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    assert set(state) == {*whole, "z"}
    for name, value in whole.items():
        assert torch.equal(state[name], value), name
        assert state[name].shape == value.shape
    assert state["z"] is state["b"]


def test_stage_0_masters_count_where_the_file_names_them(tmp_path: Path) -> None:
    master = torch.randn(4, 3)
    model = {
        "module": {"w": master.bfloat16(), "f": torch.ones(2).bfloat16(), "n": torch.tensor([3])},
        "optimizer": {"fp32_groups": [[master]]},
        "param_shapes": [OrderedDict(w=torch.Size([4, 3]))],
        "frozen_param_shapes": {"f": torch.Size([2])},
        "buffer_names": ["n"],
    }
    (tmp_path / "t").mkdir()
    torch.save(model, tmp_path / "t" / "mp_rank_00_model_states.pt")
    state = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), "t")
    assert torch.equal(state["w"], master)
    assert state["f"].dtype == torch.bfloat16
    assert state["n"].dtype == torch.int64
    assert set(get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), "t", True)) == {"w", "n"}


def test_clones_own_their_memory_and_keep_the_structure() -> None:
    flat = torch.arange(1000.0)
    Pair = namedtuple("Pair", "x y")
    tied = flat[:10]
    item = {
        "view": tied,
        "again": tied,
        "list": [flat[10:12], {"k": (flat[5], "text", None)}],
        "pair": Pair(flat[:2], 3),
        "default": defaultdict(list, a=[flat[1:3]]),
        "ordered": OrderedDict(b=torch.nn.Parameter(torch.ones(2))),
    }
    item["ordered"]._metadata = {"version": 1}
    out = clone_tensors_for_torch_save(item)
    assert torch.equal(out["view"], tied)
    assert out["view"].untyped_storage().nbytes() == 40
    assert out["again"] is out["view"]
    assert out["list"][1]["k"][1:] == ("text", None)
    assert isinstance(out["pair"], Pair)
    assert out["default"]["new"] == []
    assert out["ordered"]._metadata == {"version": 1}
    assert not out["ordered"]["b"].requires_grad
    out["view"].zero_()
    assert flat[5] == 5
    assert item["view"] is tied
    assert clone_tensors_for_torch_save(flat, torch.device("meta")).device.type == "meta"


def test_clones_save_small(tmp_path: Path) -> None:
    flat = torch.zeros(100_000)
    torch.save(clone_tensors_for_torch_save({"w": flat[:10]}), tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 5000


def test_other_files_and_unfinished_saves_beside_the_tags(copied: Path, tmp_path: Path) -> None:
    (copied / "step3" / "manifest.json").write_text("{}")
    shutil.copytree(copied / "step3", copied / ".step4.x1.tmp")
    (copied / "step3" / ".zero_pp_rank_5_mp_rank_00_optim_states.pt.ab.tmp").write_text("half")
    for tag, out in (("step3", "by_tag"), (None, "by_latest")):
        convert_zero_checkpoint_to_fp32_state_dict(str(copied), str(tmp_path / out), tag=tag)
        assert_expected(torch.load(tmp_path / out / "pytorch_model.bin", weights_only=True), "z2_fp32")
    with pytest.raises(
        ValueError, match=r"the given tag is '\.step4\.x1\.tmp': names with a dot are of saves that have not"
    ):
        get_fp32_state_dict_from_zero_checkpoint(str(copied), ".step4.x1.tmp")
    (copied / "latest").unlink()
    with pytest.raises(FileNotFoundError, match=r"a tag must be given \(-t TAG\); folders beside it: step3$"):
        get_fp32_state_dict_from_zero_checkpoint(str(copied))


def test_pieces_that_no_file_backs_are_left_alone() -> None:
    """Giving pages back must never touch other memory: there it would erase values."""
    value = torch.arange(3_000_000.0).view(1000, 3000)
    for given in (value, value.t()):
        weight = script._Weight(tuple(given.shape), torch.float32, (given,))
        for _ in range(2):
            assert torch.equal(weight.contiguous(), given)
    short = script._Weight((5,), torch.float32, (torch.zeros(3),))
    with pytest.raises(ValueError, match="lack 2 of the 5 elements"):
        short.contiguous()


def test_strided_pieces_are_written_as_they_read(tmp_path: Path) -> None:
    column = torch.arange(12.0).view(4, 3)[:, 1]
    weights = {"c": script._Weight((4,), torch.float32, (column,))}
    script._write_safetensors(str(tmp_path / "a.safetensors"), weights, {})
    assert torch.equal(load_safetensors(tmp_path / "a.safetensors")["c"], column)


# -- memory ------------------------------------------------------------------------------------------------------------

MIB = 1 << 20
SMALL, LARGE, COUNT = 1 << 20, 1 << 21, 8  # elements of a small and of the large parameter; number of small ones
MODEL_NBYTES = 4 * (COUNT * SMALL + LARGE)
SLACK = 8 * MIB  # a block, and what the interpreter and the allocator take


def write_large(folder: Path, stage: int) -> None:
    """A folder of two ranks with 40 MiB of masters, and with bf16 weights beside them in stage 2."""
    shapes = OrderedDict((f"w{i}", torch.Size([1024, SMALL // 1024])) for i in range(COUNT))
    shapes["large"] = torch.Size([LARGE])
    (folder / "t").mkdir()
    (folder / "latest").write_text("t")
    module = {n: torch.ones(0 if stage == 3 else s, dtype=torch.bfloat16) for n, s in shapes.items()}
    model = {"module": module, "param_shapes": [shapes], "buffer_names": [], "shared_params": {}}
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    torch.save(model, folder / "t" / name)
    for rank in range(2):
        flat = torch.arange(MODEL_NBYTES // 8, dtype=torch.float32)
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        state = {"zero_stage": stage, "partition_count": 2 if stage == 3 else [2], key: [flat]}
        torch.save({"optimizer_state_dict": state}, folder / "t" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


MEASURE = """
import contextlib, importlib.util, io, json, sys
sys.path.insert(0, sys.argv[4])
from tests.helpers.memory import peak_nbytes
spec = importlib.util.spec_from_file_location("script", sys.argv[1])
script = sys.modules["script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
small, folder = sys.argv[2:4]
convert = script.convert_zero_checkpoint_to_fp32_state_dict

def one_by_one(source):
    lazy = script.get_fp32_state_dict_from_zero_checkpoint(source, lazy_mode=True)
    for name in list(lazy):
        lazy[name].contiguous()

actions = {
    "bin": lambda source: convert(source, source + "/out", max_shard_size="9MB"),
    "safetensors": lambda source: convert(source, source + "/safe", max_shard_size="9MB", safe_serialization=True),
    "one": lambda source: convert(source, source + "/one.safetensors"),
    "lazy": one_by_one,
    "whole": lambda source: script.get_fp32_state_dict_from_zero_checkpoint(source),
}
found = {}
with contextlib.redirect_stdout(io.StringIO()):
    for name, action in actions.items():
        action(small)
        found[name] = peak_nbytes(lambda: action(folder))
print(json.dumps(found))
"""


@pytest.mark.skipif(not can_measure(), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize("stage", [2, 3])
def test_peak_memory_is_that_of_a_shard(stage: int, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "small").mkdir()
    write_large(tmp_path / "large", stage)
    write_own_stage2(tmp_path / "small", 2)
    paths = [script.__file__, tmp_path / "small", tmp_path / "large", Path(__file__).parents[2]]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout)
    largest, shard = 4 * LARGE, 9 * 10**6
    assert peak["whole"] >= MODEL_NBYTES, f"the measurement sees nothing: {peak}"
    assert peak["bin"] <= shard + largest + SLACK, peak
    assert peak["safetensors"] <= SLACK, f"nothing but blocks is ever in memory: {peak}"
    assert peak["one"] <= SLACK, f"one file takes no more than several: {peak}"
    assert peak["lazy"] <= largest + SLACK, peak
    assert peak["whole"] <= MODEL_NBYTES + SLACK, peak
