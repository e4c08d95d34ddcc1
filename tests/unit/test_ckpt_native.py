"""Native folders: names, completeness, and reading any range at any world size."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file as load_safetensors

from deepspeed._core.ckpt.io import FragmentAddress, atomic_save, load_file
from deepspeed._core.ckpt.native import (
    NATIVE_FORMAT,
    find_tag_dir,
    model_states_name,
    model_states_path,
    optim_states_name,
    optim_states_paths,
    read_latest,
    read_zero_group_shapes,
)
from deepspeed._core.ckpt.reader import NativeZeroReader
from deepspeed._core.layout.spans import ShardLayout, Span, contiguous, numels_of, per_param
from deepspeed.errors import CheckpointError

FIXTURES = Path(__file__).parents[1] / "data" / "reference-checkpoints"
NAMES = ["embed.weight", "up.weight", "up.bias", "down.weight", "down.bias", "norm.weight", "norm.bias"]
ALL = sorted(p.name for p in FIXTURES.iterdir() if p.is_dir())
PARTITIONED = [name for name in ALL if not name.startswith("z0")]


def tag_dir(name: str) -> Path:
    return FIXTURES / name / "ckpt" / "step3"


def open_fixture(name: str) -> NativeZeroReader:
    return NativeZeroReader(tag_dir(name), param_names=[NAMES])


def gather(reader: NativeZeroReader, key: str, layout: ShardLayout, group: int | None = 0) -> dict[str, torch.Tensor]:
    """Whole flat parameters, put together from what ``fill`` gives each rank."""
    whole = {name: torch.full((layout.numel_of(name),), torch.nan) for name in layout.names}
    for rank in range(layout.world_size):
        out = torch.full((layout.buffer_numels[rank],), 777.0)
        reader.fill(group, key, layout, rank, out)
        used = torch.zeros_like(out, dtype=torch.bool)
        for span in layout.of_rank(rank):
            whole[span.name][span.start : span.stop] = out[span.offset : span.offset_stop]
            used[span.offset : span.offset_stop] = True
        assert (out[~used] == 777.0).all(), "padding was written"
    return whole


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tag_dir("z2_fp32"), tmp_path / "step3"))


def resave(path: Path, **changes: object) -> None:
    """Write the optimizer file again with other entries (mapped tensors are read first)."""
    state = load_file(path, mmap=False)
    state["optimizer_state_dict"].update(changes)
    for key in ("loss_scaler", "param_slice_mappings"):  # their stand-ins have no public place to be pickled from
        state["optimizer_state_dict"].pop(key, None)
    atomic_save(state, path)


@pytest.mark.parametrize("name", PARTITIONED)
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_masters_are_the_expected_weights_at_any_world_size(name: str, world: int) -> None:
    reader = open_fixture(name)
    expected = load_safetensors(FIXTURES / name / "expected.safetensors")
    for make in (contiguous, per_param):
        whole = gather(reader, "fp32", make(numels_of(reader.groups[0].shapes), world))
        assert list(whole) == NAMES or set(whole) == set(NAMES)
        for key, value in whole.items():
            assert torch.equal(value, expected[key].reshape(-1)), key


def test_stage_0_masters_are_the_weights_before_rounding() -> None:
    for name in ("z0_fp32", "z0_bf16"):
        reader = open_fixture(name)
        expected = load_safetensors(FIXTURES / name / "expected.safetensors")
        whole = gather(reader, "fp32", contiguous(numels_of(reader.groups[0].shapes), 2))
        for key, value in whole.items():
            rounded = value.bfloat16().float() if name == "z0_bf16" else value
            assert torch.equal(rounded, expected[key].reshape(-1)), key


def test_stages_agree_on_optimizer_state() -> None:
    """The same run in fp32 at every stage has the same moments up to the order of float additions."""
    states = {}
    for name in ("z0_fp32", "z1_fp32", "z2_fp32", "z3_fp32"):
        reader = open_fixture(name)
        assert reader.groups[0].state_keys == ("exp_avg", "exp_avg_sq")
        states[name] = gather(reader, "exp_avg", contiguous(numels_of(reader.groups[0].shapes), 3))
    for name, state in states.items():
        for key, value in state.items():
            torch.testing.assert_close(value, states["z0_fp32"][key], rtol=1e-3, atol=1e-5, msg=f"{name} {key}")


@pytest.mark.parametrize("name", ALL)
def test_what_is_not_per_element(name: str) -> None:
    reader = open_fixture(name)
    assert reader.zero_stage == int(name[1])
    assert reader.world_size == 2
    scalars = reader.scalars(0)
    assert scalars["param_group"]["lr"] == 0.005
    assert scalars["param_group"]["betas"] == (0.9, 0.99)
    assert "params" not in scalars["param_group"]
    assert float(scalars["state"]["step"]) == (4.0 if name == "z0_bf16" else 3.0)
    if name in PARTITIONED:
        assert reader.common["loss_scaler"] == {"cur_scale": 1.0, "dynamic": False}
    assert reader.model_state["note"] == "fixture"


def test_a_part_of_the_parameters_in_another_order_and_dtype() -> None:
    reader = open_fixture("z1_bf16")
    expected = load_safetensors(FIXTURES / "z1_bf16" / "expected.safetensors")
    wanted = ShardLayout(1, (60,), (Span("norm.bias", 3, 0, 0, 20), Span("up.weight", 830, 0, 30, 25)))
    out = torch.zeros(60, dtype=torch.float64)
    reader.fill(None, "fp32", wanted, 0, out)
    assert torch.equal(out[:20].float(), expected["norm.bias"][3:23])
    assert torch.equal(out[30:55].float(), expected["up.weight"].reshape(-1)[830:855])
    assert not out[20:30].any()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=4), min_size=1, max_size=3), st.integers(1, 4))
def test_stage_3_sub_groups_and_empty_parameters(sizes: list[list[int]], world: int) -> None:
    """Every parameter group is its own sub-group here; the values of a parameter are its index and position."""
    from deepspeed._core.ckpt import reader as module

    shapes = [{f"g{g}.p{i}": (n,) for i, n in enumerate(group)} for g, group in enumerate(sizes)]
    whole = {n: torch.arange(s[0]) + 100.0 * i for i, (n, s) in enumerate(kv for g in shapes for kv in g.items())}
    states = []
    for rank in range(world):
        flats = []
        for group in shapes:
            layout = per_param(numels_of(group), world)
            flat = torch.full((layout.buffer_numels[rank],), -1.0)
            for s in layout.of_rank(rank):
                flat[s.offset : s.offset_stop] = whole[s.name][s.start : s.stop]
            flats.append(flat)
        inner = {"state": {}, "param_groups": [{"params": [g], "lr": g} for g in range(len(shapes))]}
        states.append({"fp32_flat_groups": flats, "optimizer_state_dict": inner})
    groups = module._stage3_groups(shapes, states, Path("x"))
    for group, group_shapes in zip(groups, shapes, strict=True):
        assert set(group.layout.names) == set(group_shapes)
        for span in group.layout.spans:
            held = group.buffers[span.rank]["fp32"][span.offset : span.offset_stop] if span.numel else torch.empty(0)
            assert torch.equal(held, whole[span.name][span.start : span.stop])
        assert all(group.layout.gaps(n) == () and group.layout.numel_of(n) == s[0] for n, s in group_shapes.items())


def test_fragment_addresses_go_before_the_order_of_shapes() -> None:
    """A run with its own order of parameters (b, then a): only the addresses know it."""
    from deepspeed._core.ckpt import reader as module

    flat = torch.tensor([10.0, 11, 12, 0, 1, 2, 3, 99])
    mappings = [
        {"b": FragmentAddress(3, 0), "a": FragmentAddress(1, 3)},
        {"a": FragmentAddress(3, 0)},
    ]
    layout = module._partition_layout({"a": 4, "b": 3}, [4, 4], mappings, "here")
    buffers = [flat[:4], flat[4:]]
    got = {n: torch.cat([buffers[s.rank][s.offset : s.offset_stop] for s in layout.of_param(n)]) for n in "ab"}
    assert got["a"].tolist() == [0, 1, 2, 3]
    assert got["b"].tolist() == [10, 11, 12]
    plain = module._partition_layout({"b": 3, "a": 4}, [4, 3], [{}, {}], "here")
    assert plain.of_param("a") == (Span("a", 0, 0, 3, 1), Span("a", 1, 1, 0, 3))


def test_names() -> None:
    assert model_states_name() == "mp_rank_00_model_states.pt"
    assert model_states_name(dp_rank=12) == "zero_pp_rank_12_mp_rank_00_model_states.pt"
    assert optim_states_name(3, bf16=False) == "zero_pp_rank_3_mp_rank_00_optim_states.pt"
    assert optim_states_name(10, bf16=True, mp_rank=1) == "bf16_zero_pp_rank_10_mp_rank_01_optim_states.pt"


def test_optimizer_files_come_in_rank_order_and_old_names_count(tmp_path: Path) -> None:
    for rank in range(11):
        (tmp_path / f"zero_pp_rank_{rank}_mp_rank_00optim_states.pt").touch()
    (tmp_path / "zero_pp_rank_0_mp_rank_01_optim_states.pt").touch()
    (tmp_path / ".zero_pp_rank_0_mp_rank_00_optim_states.pt.12ab.tmp").touch()
    assert list(optim_states_paths(tmp_path)) == list(range(11))
    assert len(optim_states_paths(tmp_path, mp_rank=1)) == 1
    (tmp_path / "bf16_zero_pp_rank_4_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(CheckpointError, match="two optimizer files of rank 4"):
        optim_states_paths(tmp_path)


def test_latest_and_tags(tmp_path: Path) -> None:
    assert read_latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="no file 'latest'"):
        find_tag_dir(tmp_path)
    (tmp_path / "latest").write_text("global_step7\n")
    assert read_latest(tmp_path) == "global_step7"
    (tmp_path / "global_step5").mkdir()
    (tmp_path / "global_step5" / model_states_name()).touch()
    with pytest.raises(CheckpointError, match=r"global_step7.*not a folder; tags in this folder: global_step5"):
        find_tag_dir(tmp_path)
    with pytest.raises(CheckpointError, match="given tag is 'x'"):
        find_tag_dir(tmp_path, "x")
    assert find_tag_dir(tmp_path, "global_step5") == tmp_path / "global_step5"
    (tmp_path / "latest").write_text(" ")
    with pytest.raises(CheckpointError, match="is empty"):
        find_tag_dir(tmp_path)
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="one tag name"):
        find_tag_dir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        find_tag_dir(tmp_path / "gone")


def test_group_shapes_keep_their_order() -> None:
    state = load_file(model_states_path(tag_dir("z2_fp32")))
    groups = read_zero_group_shapes(state)
    assert groups is not None
    assert list(groups[0]) == NAMES
    assert groups[0]["embed.weight"] == (37, 24)
    assert read_zero_group_shapes({"param_shapes": None}) is None


def test_missing_ranks_are_listed(copied: Path) -> None:
    (copied / optim_states_name(1, bf16=False)).unlink()
    with pytest.raises(CheckpointError, match=r"optimizer files of 2 ranks.*rank 1 are missing"):
        NativeZeroReader(copied)
    (copied / optim_states_name(0, bf16=False)).unlink()
    with pytest.raises(CheckpointError, match=r"ZeRO stage 2, but no \*_optim_states"):
        NativeZeroReader(copied)


def test_leftover_ranks_are_ignored_and_mixed_saves_are_not(copied: Path) -> None:
    first, second = (copied / optim_states_name(rank, bf16=False) for rank in range(2))
    shutil.copy(second, copied / optim_states_name(2, bf16=False))
    assert NativeZeroReader(copied).world_size == 2
    resave(second, partition_count=[3])
    with pytest.raises(CheckpointError, match="mixes two saves"):
        NativeZeroReader(copied)
    resave(second, partition_count=[2], zero_stage=1)
    with pytest.raises(
        CheckpointError, match=r"rank_1_mp.* has ZeRO stage 1, zero_pp_rank_0.* has 2: .*mixes two saves"
    ):
        NativeZeroReader(copied)
    state = load_file(first, mmap=False)["optimizer_state_dict"]["base_optimizer_state"]
    state["state"][0]["step"] = torch.tensor(7.0)
    resave(second, zero_stage=2, base_optimizer_state=state)
    with pytest.raises(CheckpointError, match=r"rank_1_mp.* step count .* 7.0, .* has 3.0: the folder mixes two saves"):
        NativeZeroReader(copied)
    state["state"][0]["step"] = torch.tensor(3.0)
    resave(second, base_optimizer_state=state)
    resave(first, single_partition_of_fp32_groups=[torch.zeros(9)])
    with pytest.raises(CheckpointError, match="group 0"):
        NativeZeroReader(copied)


def test_truncated_and_missing_files(copied: Path) -> None:
    path = copied / optim_states_name(1, bf16=False)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(CheckpointError, match=r"rank_1_mp.*truncated"):
        NativeZeroReader(copied)
    (copied / model_states_name()).unlink()
    with pytest.raises(CheckpointError, match=r"expected mp_rank_00_model_states\.pt"):
        NativeZeroReader(copied)


def test_a_file_of_something_else(copied: Path) -> None:
    atomic_save({"hello": 1}, copied / optim_states_name(0, bf16=False))
    with pytest.raises(CheckpointError, match="expected a dict with"):
        NativeZeroReader(copied)


def test_another_model_is_refused_before_anything_is_written() -> None:
    reader = open_fixture("z2_fp32")
    out = torch.zeros(2000)
    with pytest.raises(CheckpointError, match="'extra' is not in group 0"):
        reader.fill(0, "fp32", contiguous({"up.bias": 51, "extra": 1}, 1), 0, out)
    with pytest.raises(CheckpointError, match=r"another model.*'up.bias'"):
        reader.fill(0, "fp32", contiguous({"up.weight": 1224, "up.bias": 52}, 1), 0, out)
    with pytest.raises(CheckpointError, match=r"no state 'momentum'; it has fp32, exp_avg, exp_avg_sq"):
        reader.fill(0, "momentum", contiguous({"up.bias": 51}, 1), 0, out)
    with pytest.raises(ValueError, match="flat buffer of 51"):
        reader.fill(0, "fp32", contiguous({"up.bias": 51}, 1), 0, torch.zeros(50))
    assert not out.any()


def test_files_of_a_later_version_are_refused_by_its_name(copied: Path) -> None:
    for name in (model_states_name(), optim_states_name(1, bf16=False)):
        state = load_file(copied / name, mmap=False)
        inner = state.get("optimizer_state_dict", {})
        for key in ("loss_scaler", "param_slice_mappings"):
            inner.pop(key, None)
        atomic_save({**state, "ds_format": NATIVE_FORMAT, "ds_version": "7.1"}, copied / name)
        NativeZeroReader(copied)
        atomic_save({**state, "ds_format": NATIVE_FORMAT + 1, "ds_version": "7.1"}, copied / name)
        with pytest.raises(CheckpointError, match=f"{name} has checkpoint format 2, .*Upgrade to deepspeed 7.1"):
            NativeZeroReader(copied)
        atomic_save({**state, "ds_format": NATIVE_FORMAT}, copied / name)


def test_neighbours_are_read_in_one_copy() -> None:
    """All parameters of a partition, in the order of the file: one copy from each file, not one a parameter."""
    reader = open_fixture("z2_fp32")
    layout = contiguous(numels_of(reader.groups[0].shapes), 1)
    out = torch.zeros(layout.buffer_numels[0])
    counted = []
    reader.fill(None, "fp32", layout, 0, out, lambda to, held: (counted.append(to.numel()), to.copy_(held)))
    assert len(counted) == 2 and sum(counted) == out.numel()


def test_stage_0_needs_names_and_fills_unstepped_state_with_zeros(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="stage 0 file without parameter names"):
        NativeZeroReader(tag_dir("z0_fp32"))
    with pytest.raises(CheckpointError, match="'nope'"):
        NativeZeroReader(tag_dir("z0_fp32"), param_names=[["nope"]])
    model = load_file(tag_dir("z0_fp32") / model_states_name(), mmap=False)
    del model["optimizer"]["state"][2]
    atomic_save(model, tmp_path / model_states_name())
    reader = NativeZeroReader(tmp_path, param_names=[NAMES])
    out = torch.ones(75)
    reader.fill(0, "exp_avg", contiguous({"up.bias": 51, "norm.weight": 24}, 1), 0, out)
    assert not out[:51].any()
    assert out[51:].all()
