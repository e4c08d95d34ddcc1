"""What a folder holds, and how two differ, on folders of the reference and damaged copies of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed._core.ckpt import contrast as contrast_module
from deepspeed._core.ckpt.archive import save_archive
from deepspeed._core.ckpt.describe import Opened
from deepspeed._core.ckpt.io import load_file
from deepspeed._core.ckpt.staging import hidden_name
from deepspeed.checkpoint.inspect import compare, inspect, main
from deepspeed.errors import CheckpointError
from tests.helpers.fixture_model import FIXTURES, expected_weights
from tests.unit.test_ckpt_save import save

NATIVE = [f"z{stage}_{dtype}/ckpt" for stage in range(4) for dtype in ("fp32", "bf16")]
UNIVERSAL = ["z1_bf16/universal", "z3_bf16/universal"]


@pytest.fixture
def copy(tmp_path: Path) -> Any:
    def made(name: str) -> Path:
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return made


@pytest.mark.parametrize("name", NATIVE + UNIVERSAL)
def test_folders_of_the_reference(name: str) -> None:
    report = inspect(FIXTURES / name)
    (tag,) = report.tags
    found = report.checkpoint
    assert found is not None
    assert (tag.status, tag.global_steps, report.damaged) == ("unverified", 3, False)
    assert found.kind == ("universal" if "universal" in name else "native")
    assert found.zero_stage == int(name[1])
    assert (found.world_size, found.version) == (2, "0.19.6")
    assert found.dtype == ("bfloat16" if "bf16" in name else "float32")
    assert found.counters == {"global_steps": 3, "global_samples": 36, "skipped_steps": 0}
    assert found.optimizer == "AdamW"
    assert found.scheduler == {"last_batch_iteration": 2}
    assert found.client_state == {"epoch": "2", "note": "'fixture'"}
    entries, weights = found.entries, expected_weights(name.split("/")[0])
    assert {n: e.shape for n, e in entries.items() if e.kind not in ("tied", "buffer")} == {
        n: tuple(w.shape) for n, w in weights.items() if n not in ("scale", "head.weight")
    }
    assert entries["scale"].kind == "buffer"
    assert (entries["head.weight"].kind, entries["head.weight"].tied_to) == ("tied", "embed.weight")
    stage0 = name.startswith("z0")  # where the files do not tell
    assert entries["frozen.weight"].kind == ("parameter" if stage0 else "frozen")
    assert entries["up.bias"].kind == ("parameter" if stage0 else "trained")
    (group,) = found.groups
    assert (group.parameters, group.numel) == (7, 3459)
    assert {key: group.state[key] for key in ("exp_avg", "exp_avg_sq")} == dict.fromkeys(
        ("exp_avg", "exp_avg_sq"), "float32"
    )
    assert group.options["lr"] == pytest.approx(0.005)
    folder = Path(tag.path)
    assert found.files == {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", [*NATIVE[2:], *UNIVERSAL])
def test_values_are_given_by_name_whatever_the_stage(name: str) -> None:
    opened = Opened(inspect(FIXTURES / name).tags[0].path)
    weights = expected_weights(name.split("/")[0])
    for (parameter, key), shape in opened.shapes().items():
        if key == "fp32":
            out = torch.empty(torch.Size(shape).numel())
            opened.fill(parameter, key, 0, out)
            assert torch.equal(out.view(shape), weights[parameter])
            part = torch.empty(5)
            opened.fill(parameter, key, 3, part)
            assert torch.equal(part, out[3:8])


def test_nothing_is_read_but_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.load

    def load(*args: Any, **options: Any) -> Any:
        assert options["mmap"] and options["weights_only"]
        return real(*args, **options)

    monkeypatch.setattr(torch, "load", load)
    for name in ("to", "sum", "clone", "float", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a tensor was read"))
    for name in NATIVE + UNIVERSAL:
        inspect(FIXTURES / name)


def test_a_folder_of_tags(tmp_path: Path, copy: Any) -> None:
    root = copy("z2_bf16/ckpt")
    save(root, "ours", {"module": {"w": torch.zeros(3)}, "global_steps": 9, "best": 0.5, "names": ["a"] * 3})
    save(root, "broken", {"module": {}})
    save(root, "newest", {"module": {}}, latest=False)
    os.truncate(root / "broken" / "mp_rank_00_model_states.pt", 10)
    (root / "latest").write_text("ours")
    (root / "not a tag").mkdir()
    left = root / hidden_name("killed", "new")
    left.mkdir()
    (left / "x").write_bytes(b"12345")
    report = inspect(root)
    assert [(tag.name, tag.status) for tag in report.tags][:2] == [("newest", "complete"), ("broken", "damaged")]
    assert {tag.name: tag.status for tag in report.tags} == {
        "newest": "complete",
        "broken": "damaged",
        "ours": "complete",
        "step3": "unverified",
    }
    assert (report.latest, report.shown, report.hidden) == ("ours", "ours", {left.name: 5})
    assert report.checkpoint is not None
    assert report.checkpoint.client_state == {"best": "0.5", "names": "list of 3"}
    assert not report.damaged
    broken = inspect(root, "broken")
    assert broken.damaged
    assert broken.checkpoint is None
    assert "has 10 bytes" in str(next(tag.problem for tag in broken.tags if tag.name == "broken"))
    with pytest.raises(CheckpointError, match="no checkpoint of tag 'gone'; tags in this folder: newest, "):
        inspect(root, "gone")


def test_a_tag_that_a_killed_save_was_replacing_is_shown(tmp_path: Path) -> None:
    save(tmp_path, "a", {"module": {}, "global_steps": 1})
    os.rename(tmp_path / "a", tmp_path / hidden_name("a", "old"))
    report = inspect(tmp_path)
    assert [(tag.name, tag.status, tag.global_steps) for tag in report.tags] == [("a", "complete", 1)]
    assert len(report.hidden) == 1


def test_places_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        inspect(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="holds no checkpoint; there is none"):
        inspect(tmp_path)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_verification_reads_all_bytes(tmp_path: Path, copy: Any) -> None:
    done: list[tuple[int, int]] = []
    root = copy("z2_bf16/ckpt")
    save(root, "ours", {"module": {"w": torch.arange(30_000)}})
    for tag in ("ours", "step3"):
        report = inspect(root, tag, verify=True, progress=lambda *at: done.append(at))
        assert {one.name: one.status for one in report.tags}[tag] == "verified"
        assert done[-1][0] == done[-1][1] > 60_000
        (file,) = (root / tag).glob("mp_rank_00_model_states.pt")
        flip(file, file.stat().st_size // 2)  # in a tensor: no size tells, and it loads
        assert not inspect(root, tag).damaged
        damaged = inspect(root, tag, verify=True)
        assert damaged.damaged
        assert damaged.checkpoint is not None
        assert "mp_rank_00_model_states.pt is damaged" in str([one.problem for one in damaged.tags])


def test_missing_rank_files_are_said_to_be(copy: Any) -> None:
    root = copy("z2_bf16/ckpt")
    (root / "step3" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    report = inspect(root)
    assert report.damaged
    assert "rank 1 are missing" in str(report.tags[0].problem)
    with pytest.raises(CheckpointError, match=r"cannot be compared.*rank 1 are missing"):
        compare(root, FIXTURES / "z2_bf16/ckpt")


@pytest.mark.parametrize(
    ("one", "two"),
    [("z1_bf16/ckpt", "z1_bf16/universal"), ("z3_bf16/universal", "z3_bf16/ckpt"), ("z0_fp32/ckpt", "z0_fp32/ckpt")],
)
@pytest.mark.parametrize("tile", [7, 1 << 20])
def test_the_same_in_another_format_does_not_differ(
    monkeypatch: pytest.MonkeyPatch, one: str, two: str, tile: int
) -> None:
    monkeypatch.setattr(contrast_module, "_TILE_NUMEL", tile)
    monkeypatch.setattr(contrast_module, "_MAPPED_NBYTES", 3000)
    found = compare(FIXTURES / one, FIXTURES / two, values=True)
    assert not found.different
    assert found.values == {}
    assert found.compared == (23 if "fp32" in one else 30)
    assert found.uncompared == 0


def rewrite(path: Path, change: Any) -> None:
    state = load_file(path, mmap=False)
    change(state)
    with path.open("wb") as file:
        save_archive(state, file)


def test_differences_are_named(copy: Any) -> None:
    root = copy("z2_fp32/ckpt")
    folder = root / "step3"

    def change_model(state: dict[str, Any]) -> None:
        module = state["module"]
        module["new"] = module.pop("scale")
        module["frozen.weight"] = module["frozen.weight"][:50]
        module["up.bias"] = module["up.bias"].double()
        module["down.bias"][3] += 0.25
        module["norm.bias"][0] = torch.nan
        state["global_steps"] = 4
        state["lr_scheduler"] = {"last_batch_iteration": 3}

    def change_optimizer(state: dict[str, Any]) -> None:
        state["optimizer_state_dict"].pop("param_slice_mappings")
        state["optimizer_state_dict"]["loss_scaler"] = {"cur_scale": 1.0, "dynamic": False}
        inner = state["optimizer_state_dict"]["base_optimizer_state"]
        inner["param_groups"][0]["lr"] = 0.5
        inner["state"][0]["exp_avg"][0] -= 2

    rewrite(folder / "mp_rank_00_model_states.pt", change_model)
    rewrite(folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt", change_optimizer)
    found = compare(root, FIXTURES / "z2_fp32/ckpt", values=True)
    assert found.different
    assert (found.only_in_one, found.only_in_two) == (("new",), ("scale",))
    assert found.changed == {"frozen.weight": "(50, 51) | (51, 51)", "up.bias": "float64 | float32"}
    assert {name: pair for name, pair in found.facts.items() if "lr" not in name} == {
        "global_steps": ("4", "3"),
        "scheduler last_batch_iteration": ("3", "2"),
    }
    assert found.facts["group 0 options lr"][0] == "0.5"
    assert found.values is not None
    assert found.values == {
        "down.bias/weight": pytest.approx(0.25),
        "norm.bias/weight": float("inf"),
        "embed.weight/exp_avg": pytest.approx(2),
    }
    assert found.uncompared == 3  # two names, and the other shape
    text = "\n".join(found.text())
    for part in ("only in 1:\n  new", "only in 2:\n  scale", "global_steps: 4 | 3", "norm.bias/weight: inf", "3 of 28"):
        assert part in text
    assert compare(root, FIXTURES / "z2_fp32/ckpt").values is None


def test_safetensors(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "z1_fp32" / "expected.safetensors", tmp_path / "model.safetensors")
    report = inspect(tmp_path)
    assert report.checkpoint is not None
    assert report.checkpoint.kind == "safetensors"
    assert report.checkpoint.entries["up.weight"].shape == (51, 24)
    found = compare(tmp_path, FIXTURES / "z1_fp32/ckpt", values=True)
    assert found.values == {}
    assert found.facts == {}
    assert found.compared >= 8
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    assert inspect(tmp_path).damaged


def test_the_command(capsys: pytest.CaptureFixture[str], copy: Any, tmp_path: Path) -> None:
    root = str(FIXTURES / "z2_bf16/ckpt")
    assert main([root, "--verify"]) == 0
    out = capsys.readouterr().out
    for line in (
        "step3: verified, step 3, ",
        "<- latest",
        "ZeRO stage: 2",
        "group 0: 7 parameters of 3,459 elements",
        "head.weight    (37, 24) bfloat16  tied to embed.weight",
        "trained 7 (3,459 elements)",
        "mp_rank_00_model_states.pt: ",
    ):
        assert line in out
    assert main([root, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"]["entries"]["up.bias"]["shape"] == [51]
    assert main([root, "--compare", root, "--values"]) == 0
    assert "no difference" in capsys.readouterr().out
    assert main([root, "--compare", str(FIXTURES / "z3_bf16/ckpt"), "--values", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["different"] is True
    assert main([str(tmp_path / "gone")]) == 2
    assert "no such folder" in capsys.readouterr().err
    damaged = copy("z2_bf16/ckpt")
    os.truncate(damaged / "step3" / "mp_rank_00_model_states.pt", 99)
    assert main([str(damaged)]) == 1
    assert "damaged" in capsys.readouterr().out
    for wrong in (["--values"], ["--compare", root, "--verify"], ["--compare-tag", "x"]):
        with pytest.raises(SystemExit):
            main([root, *wrong])
        capsys.readouterr()
