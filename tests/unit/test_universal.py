"""The universal format: converted and read back at any world size, refused when damaged, never half there."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed._core.ckpt.io import load_file
from deepspeed._core.ckpt.reader import NativeZeroReader, ZeroReader
from deepspeed._core.ckpt.universal import UniversalReader, is_universal, parameter_folder
from deepspeed._core.ckpt.weights import PartitionedWeights
from deepspeed._core.layout.spans import ShardLayout, Span, contiguous, numels_of, per_param
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.ds_to_universal import convert, main
from deepspeed.errors import CheckpointError
from tests.helpers.fixture_model import FIXTURES, FixtureModel, expected_weights

NAMES = [n for n, p in FixtureModel().named_parameters() if p.requires_grad]
ALL = sorted(p.name for p in FIXTURES.iterdir() if p.is_dir())


def native(name: str) -> Path:
    return FIXTURES / name / "ckpt" / "step3"


def values(reader: ZeroReader, key: str, layout: ShardLayout) -> dict[str, torch.Tensor]:
    """Whole flat parameters, put together from what ``fill`` gives each rank."""
    whole = {name: torch.full((layout.numel_of(name),), torch.nan) for name in layout.names}
    for rank in range(layout.world_size):
        out = torch.full((layout.buffer_numels[rank],), 777.0)
        reader.fill(None, key, layout, rank, out)
        for span in layout.of_rank(rank):
            whole[span.name][span.start : span.stop] = out[span.offset : span.offset_stop]
    return whole


def assert_same_state(one: ZeroReader, two: ZeroReader) -> None:
    for first, second in zip(one.groups, two.groups, strict=True):
        assert first.shapes == second.shapes and list(first.shapes) == list(second.shapes)
        assert first.state_keys == second.state_keys
        assert first.param_group == second.param_group
        assert float(first.state_scalars["step"]) == float(second.state_scalars["step"])
        for key in ("fp32", *first.state_keys):
            for make, world in ((contiguous, 3), (per_param, 2)):
                layout = make(numels_of(first.shapes), world)
                got, wanted = values(one, key, layout), values(two, key, layout)
                for name, value in wanted.items():
                    assert torch.equal(got[name], value), (key, name)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("universal")

    def of(name: str) -> Path:
        target = root / name / "step3_universal"
        return target if target.is_dir() else convert(native(name), target)

    return of


def bare(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(native(name), folder / "step3"))


# -- reading the reference's -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["z1_bf16", "z3_bf16"])
def test_folders_of_the_reference_hold_what_their_native_folders_hold(name: str) -> None:
    folder = FIXTURES / name / "universal"
    assert is_universal(folder) and not is_universal(native(name))
    reader = UniversalReader(folder)
    assert (reader.zero_stage, reader.world_size) == (int(name[1]), 2)
    assert reader.common["loss_scaler"] == {"cur_scale": 1.0, "dynamic": False}
    assert reader.model_state["note"] == "fixture"
    assert reader.whole_state("up.bias") is None
    assert_same_state(reader, NativeZeroReader(native(name)))


def test_weights_of_a_folder_from_stage_3() -> None:
    weights = PartitionedWeights(FIXTURES / "z3_bf16" / "universal")
    for name, value in expected_weights("z3_bf16").items():
        if name in weights:
            dtype = torch.bfloat16 if name == "frozen.weight" else torch.float32
            assert torch.equal(weights.whole(name, dtype).float(), value.float()), name


# -- conversion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_conversion_keeps_all_state(name: str, converted: Callable[[str], Path]) -> None:
    folder = converted(name)
    reader = UniversalReader(folder)
    assert_same_state(reader, NativeZeroReader(native(name), param_names=[NAMES]))
    assert (folder.parent / "latest_universal").read_bytes() == b"step3_universal"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["latest_universal", "step3_universal"]


@pytest.mark.parametrize("name", ALL)
def test_conversion_keeps_the_model_file(name: str, converted: Callable[[str], Path]) -> None:
    state = load_file(converted(name) / "mp_rank_00_model_states.pt")
    saved = NativeZeroReader(native(name), param_names=[NAMES]).model_state
    assert state.keys() == saved.keys() and state["optimizer"] is None
    for key in saved.keys() - {"module", "optimizer", "frozen_param_fragments", "param_shapes"}:
        assert state[key] == saved[key], key
    module = state["module"]
    assert list(module) == list(saved["module"])
    for key, value in {**expected_weights(name), "scale": torch.tensor([1.5])}.items():
        kept = saved["module"][key].dtype
        assert module[key].dtype == kept and torch.equal(module[key], value.to(kept)), key
    assert module["head.weight"].data_ptr() == module["embed.weight"].data_ptr()


@pytest.mark.parametrize("name", ALL)
def test_files_are_those_that_the_format_names(name: str, converted: Callable[[str], Path]) -> None:
    folder = converted(name)
    assert {path.name for path in folder.iterdir()} == {
        "mp_rank_00_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_model_states.pt",
        "zero",
    }
    assert {path.name for path in (folder / "zero").iterdir()} == {*NAMES, "optimizer_state.pt"}
    for parameter in NAMES:
        files = {path.stem: torch.load(path, weights_only=True) for path in (folder / "zero" / parameter).iterdir()}
        assert set(files) == {"fp32", "exp_avg", "exp_avg_sq", "step"}
        assert files["step"].shape == () and files["step"].dtype == torch.float32
        shapes = {tuple(files[key]["param"].shape) for key in ("fp32", "exp_avg", "exp_avg_sq")}
        assert shapes == {tuple(FixtureModel().get_parameter(parameter).shape)}
        assert files["fp32"]["cat_dim"] == 0
        for path in (folder / "zero" / parameter).iterdir():
            assert path.stat().st_size < 4 * FixtureModel().get_parameter(parameter).numel() + 4096, "views were saved"
    shared = torch.load(folder / "zero" / "optimizer_state.pt", weights_only=True)
    assert shared["param_groups"][0]["lr"] == 0.005 and shared["zero_stage"] == int(name[1])


def test_conversion_of_what_was_converted_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="universal folder already"):
        convert(FIXTURES / "z1_bf16" / "universal", tmp_path / "out")


def test_a_dynamic_loss_scale_is_kept(tmp_path: Path) -> None:
    folder = bare("z2_fp32", tmp_path)
    progress = {"cur_scale": 512.0, "cur_iter": 7, "last_overflow_iter": 5}
    for path in folder.glob("*optim_states.pt"):
        state = load_file(path, mmap=False)
        state["optimizer_state_dict"].update(loss_scaler=dict(progress), dynamic_loss_scale=True)
        del state["optimizer_state_dict"]["param_slice_mappings"]  # its stand-in has no public place to be pickled from
        torch.save(state, path)
    common = UniversalReader(convert(folder, tmp_path / "out")).common
    assert common["dynamic_loss_scale"] and progress.items() <= common["loss_scaler"].items()


def test_state_before_the_first_step(tmp_path: Path) -> None:
    folder = bare("z2_fp32", tmp_path)
    for path in folder.glob("*optim_states.pt"):
        state = load_file(path, mmap=False)
        state["optimizer_state_dict"]["base_optimizer_state"]["state"] = {}
        for key in ("loss_scaler", "param_slice_mappings"):
            del state["optimizer_state_dict"][key]
        torch.save(state, path)
    (group,) = UniversalReader(convert(folder, tmp_path / "out")).groups
    assert group.state_keys == () and not group.state_scalars


def test_processes_write_what_one_writes(
    tmp_path: Path, converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With workers that run here, since starting two takes seconds; ``test_worker_processes`` starts them."""
    used: list[str] = []

    class Pool:
        def __init__(self, workers: int, context: Any, initializer: Callable[..., None], initargs: Any) -> None:
            assert workers == 2
            initializer(*initargs)

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: Any) -> None: ...

        def submit(self, work: Callable[[str], None], task: str) -> Any:
            used.append(task)
            work(task)
            future: Any = __import__("concurrent.futures").futures.Future()
            future.set_result(None)
            return future

    monkeypatch.setattr(ds_to_universal, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(ds_to_universal, "_WORTH_A_PROCESS_NBYTES", 1)
    monkeypatch.setattr(ds_to_universal, "_MAPPED_NBYTES", 1)  # files are opened anew each time
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    threads = torch.get_num_threads()
    try:
        folder = convert(native("z3_bf16"), tmp_path / "many", workers=2)
    finally:
        torch.set_num_threads(threads)
    assert set(used) == {*NAMES, ""}
    assert_same_files(folder, converted("z3_bf16"))


@pytest.mark.slow
def test_worker_processes(tmp_path: Path, converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ds_to_universal, "_WORTH_A_PROCESS_NBYTES", 1)
    assert_same_files(convert(native("z3_bf16"), tmp_path / "many", workers=2), converted("z3_bf16"))


def assert_same_files(one: Path, two: Path) -> None:
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


# -- refusals ----------------------------------------------------------------------------------------------------------


def missing_optimizer_file(folder: Path) -> None:
    next(folder.glob("*zero_pp_rank_1_*optim_states.pt")).unlink()


def truncated(folder: Path) -> None:
    path = next(folder.glob("*zero_pp_rank_1_*optim_states.pt"))
    path.write_bytes(path.read_bytes()[:-200])


def no_model_file(folder: Path) -> None:
    for path in folder.glob("*model_states.pt"):
        path.unlink()


def model_parallel(folder: Path) -> None:
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / "mp_rank_01_model_states.pt")


@pytest.mark.parametrize(
    ("damage", "name", "said"),
    [
        (missing_optimizer_file, "z2_fp32", "rank 1 are missing"),
        (missing_optimizer_file, "z3_bf16", "rank 1 are missing"),
        (truncated, "z1_bf16", "bf16_zero_pp_rank_1.*truncated"),
        (no_model_file, "z2_fp32", "mp_rank_00_model_states.pt"),
        (model_parallel, "z2_fp32", "mp_rank_01_model_states.pt"),
    ],
)
def test_a_damaged_folder_is_refused_and_nothing_is_left(
    damage: Callable[[Path], None], name: str, said: str, tmp_path: Path
) -> None:
    folder = bare(name, tmp_path / "in")
    damage(folder)
    with pytest.raises(CheckpointError, match=said):
        convert(folder, tmp_path / "out" / "u")
    assert not (tmp_path / "out").exists()


def test_a_failure_on_the_way_leaves_the_older_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = convert(native("z2_fp32"), tmp_path / "u")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    whole = ds_to_universal._write

    def full(path: Path, content: Any) -> None:
        if path.parent.name == "norm.bias":
            raise OSError(28, "No space left on device")
        whole(path, content)

    monkeypatch.setattr(ds_to_universal, "_write", full)
    with pytest.raises(OSError, match="No space"):
        convert(native("z1_fp32"), target)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    convert(native("z1_fp32"), target)
    assert UniversalReader(target).zero_stage == 1


def test_targets_that_would_lose_files(tmp_path: Path) -> None:
    folder = bare("z2_fp32", tmp_path)
    for target in (folder, folder / "u", tmp_path):
        with pytest.raises(ValueError, match="must not contain each other"):
            convert(folder, target)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="no universal folder"):
        convert(folder, tmp_path / "mine")
    with pytest.raises(ValueError, match="at least one worker"):
        convert(folder, tmp_path / "u", workers=0)


def test_stage_0_parameters_that_shapes_do_not_tell(tmp_path: Path) -> None:
    folder = bare("z0_fp32", tmp_path)
    state = load_file(folder / "mp_rank_00_model_states.pt", mmap=False)
    state["module"]["another.bias"] = torch.zeros(24)  # as long as the norm's and the layer's before it
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="several possibilities"):
        convert(folder, tmp_path / "u")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("zero/norm.bias/fp32.pt", "no fp32.pt of 'norm.bias'"),
        ("zero/norm.bias/exp_avg.pt", "norm.bias/exp_avg.pt missing"),
        ("zero/optimizer_state.pt", "no such file"),
        ("mp_rank_00_model_states.pt", "mp_rank_00_model_states.pt"),
    ],
)
def test_incomplete_universal_folders_are_named(
    file: str, said: str, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(converted("z1_bf16"), tmp_path / "u"))
    (folder / "zero_pp_rank_0_mp_rank_00_model_states.pt").unlink()
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=said):
        UniversalReader(folder)


def test_other_damage_of_universal_folders_is_named(converted: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(converted("z1_bf16"), tmp_path / "u"))
    path = folder / "zero" / "norm.bias" / "fp32.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"norm.bias/fp32.pt.*truncated"):
        UniversalReader(folder)
    torch.save({"param": torch.zeros(23), "cat_dim": 0}, path)
    with pytest.raises(CheckpointError, match=r"norm.bias/fp32.pt has shape \(23,\)"):
        UniversalReader(folder)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", ""])
def test_parameter_names_stay_inside(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be a folder name"):
        parameter_folder(tmp_path, name)


# -- odd contents ------------------------------------------------------------------------------------------------------


def test_padded_flat_tensors_and_parameters_without_dimensions(tmp_path: Path) -> None:
    (tmp_path / "zero").mkdir()
    contents = {"a/b": torch.arange(8.0), "scalar": torch.tensor([2.0, 0.0]), "none": torch.zeros(0)}
    shapes = {"a/b": torch.Size([2, 3]), "scalar": torch.Size([]), "none": torch.Size([0, 3])}
    for name, value in contents.items():
        place = parameter_folder(tmp_path, name)
        place.mkdir(parents=True)
        torch.save(value, place / "fp32.pt")
        if value.numel():
            torch.save(value + 10, place / "momentum_buffer.pt")
    torch.save({"zero_stage": 3, "param_groups": [{"lr": 1.0, "params": [0]}]}, tmp_path / "zero/optimizer_state.pt")
    torch.save({"module": {}, "param_shapes": [shapes]}, tmp_path / "mp_rank_00_model_states.pt")
    reader = UniversalReader(tmp_path)
    (group,) = reader.groups
    assert group.state_keys == ("momentum_buffer",) and group.param_group == {"lr": 1.0}
    out = torch.zeros(4)
    wanted = ShardLayout(1, (4,), (Span("a/b", 3, 0, 0, 3), Span("scalar", 0, 0, 3, 1), Span("none", 0, 0, 4, 0)))
    reader.fill(None, "momentum_buffer", wanted, 0, out)
    assert out.tolist() == [13.0, 14.0, 15.0, 12.0]


# -- the command line --------------------------------------------------------------------------------------------------


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(ds_to_universal, "convert", lambda *args, **options: given.update(options, folders=args))
    flags = ["--input_folder", "in", "--output_folder", "out"]
    monkeypatch.setattr(sys, "argv", ["ds_to_universal", *flags])
    main()
    assert given == {"folders": ("in", "out"), "workers": 4, "strict": True, "inject_missing_state": False}
    more = ["--num_extract_workers", "1", "--num_merge_workers", "6", "--no_strict", "--inject_missing_state"]
    monkeypatch.setattr(sys, "argv", ["ds_to_universal", *flags, *more, "--keep_temp_folder"])
    main()
    assert given == {"folders": ("in", "out"), "workers": 6, "strict": False, "inject_missing_state": True}


def test_called_by_a_program(tmp_path: Path) -> None:
    main(argparse.Namespace(input_folder=str(native("z2_fp32").parent), output_folder=str(tmp_path / "u")))
    assert is_universal(tmp_path / "u")
    assert "universal_checkpoint_info" not in load_file(tmp_path / "u" / "mp_rank_00_model_states.pt")
    convert(native("z2_fp32"), tmp_path / "u", inject_missing_state=True)
    assert "universal_checkpoint_info" in load_file(tmp_path / "u" / "mp_rank_00_model_states.pt")
