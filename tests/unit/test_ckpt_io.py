"""Checkpoint file I/O: all or nothing on writing, nothing executed on reading."""

from __future__ import annotations

import argparse
import fractions
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from deepspeed._core.ckpt.io import FragmentAddress, InertObject, atomic_save, atomic_write_text, load_file
from deepspeed.errors import CheckpointError

FIXTURES = Path(__file__).parents[1] / "data" / "reference-checkpoints"
OPTIM = FIXTURES / "z1_bf16/ckpt/step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


class Evil:
    """Pickles as a call that leaves a trace."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_round_trip_of_what_checkpoints_and_client_state_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    saved = {
        "tensor": torch.arange(6, dtype=torch.bfloat16),
        "size": torch.Size([2, 3]),
        "names": {"x"},
        "pair": (1, None, 2.5),
        "bytes": (b"", b"x"),
        "frozen": frozenset({1, "a"}),
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(3.5),
        "count": np.int64(7),
        "flags": np.array([True, False]),
        "label": np.str_("run"),
        "numpy_rng": np.random.RandomState(3).get_state(),
        "torch_rng": torch.get_rng_state(),
    }
    atomic_save(saved, path)
    back = load_file(path)
    assert torch.equal(back["tensor"], saved["tensor"])
    assert torch.equal(back["torch_rng"], saved["torch_rng"])
    assert np.array_equal(back["numpy_rng"][1], saved["numpy_rng"][1])
    assert np.array_equal(back["flags"], saved["flags"])
    for key in ("size", "names", "pair", "bytes", "frozen", "args", "best", "count", "label"):
        assert back[key] == saved[key]
        assert type(back[key]) is type(saved[key])


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*/ckpt/step3/*.pt")), ids=lambda p: f"{p.parts[-4]}/{p.name}")
def test_files_of_the_reference_load(path: Path) -> None:
    state = load_file(path)
    assert state["ds_version"] == "0.19.6"


def test_classes_of_the_reference_come_back_as_plain_values() -> None:
    state = load_file(OPTIM)["optimizer_state_dict"]
    assert state["zero_stage"] == 1
    assert type(state["zero_stage"]) is int
    assert isinstance(state["loss_scaler"], InertObject)
    assert vars(state["loss_scaler"]) == {"cur_scale": 1.0, "dynamic": False}
    assert state["param_slice_mappings"][0]["up.bias"] == FragmentAddress(numel=51, start=382)


def test_given_classes_go_before_the_stand_ins() -> None:
    class Scaler:
        pass

    state = load_file(OPTIM, classes={"deepspeed.runtime.fp16.loss_scaler.LossScaler": Scaler})
    assert isinstance(state["optimizer_state_dict"]["loss_scaler"], Scaler)


def test_loading_is_mapped_and_private(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    atomic_save({"x": torch.zeros(1000)}, path)
    before = path.read_bytes()
    loaded = load_file(path)["x"]
    loaded.fill_(1)
    assert path.read_bytes() == before
    assert load_file(path, mmap=False)["x"].sum() == 0


def test_the_old_file_format_of_torch_loads(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_file(tmp_path / "old.pt")["x"], torch.ones(3))


def test_a_foreign_class_is_refused_by_name_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"x": Evil(trace)}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil\.pt.*mkdir"):
        load_file(tmp_path / "evil.pt")
    assert not trace.exists()
    torch.save({"x": fractions.Fraction(1, 2), "y": np.array([object], dtype=object)}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match=r"fractions\.Fraction"):
        load_file(tmp_path / "b.pt")


@pytest.mark.parametrize("keep", [0, 1, 3, 100, 10_000, -1])
def test_truncated_files_say_so(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.pt"
    path.write_bytes(OPTIM.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cut\.pt.*bytes\).*truncated"):
        load_file(path)


def test_damaged_and_missing_files_say_so(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match=r"text\.pt"):
        load_file(tmp_path / "text.pt")
    with pytest.raises(CheckpointError, match=r"gone\.pt.*no such file"):
        load_file(tmp_path / "gone.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        load_file(tmp_path)


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    atomic_save({"step": 1}, path)
    with pytest.raises(Exception, match=r"pickle|local"):
        atomic_save({"weights": torch.ones(10), "bad": lambda: None}, path)
    assert os.listdir(tmp_path) == ["a.pt"]
    assert load_file(path) == {"step": 1}


def test_an_interrupt_while_saving_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(obj: object, stream: object) -> None:
        stream.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic_save({}, tmp_path / "a.pt")
    assert os.listdir(tmp_path) == []


def test_text_is_replaced_with_mode_and_exact_bytes(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    atomic_write_text(path, "global_step1\n\n")
    atomic_write_text(path, "global_step20", mode=0o755)
    assert path.read_bytes() == b"global_step20"
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert os.listdir(tmp_path) == ["latest"]


def test_saved_files_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        atomic_save({}, tmp_path / "a.pt")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.pt").stat().st_mode) == 0o644


def test_saving_into_a_missing_folder_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        atomic_save({}, tmp_path / "nowhere" / "a.pt")
