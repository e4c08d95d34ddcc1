"""The inspect tool on folders that engines have saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepspeed.checkpoint.ds_to_universal import convert
from deepspeed.checkpoint.inspect import compare, inspect
from tests.helpers.ckpt import build, config, train
from tests.helpers.dist import run_ranks


def save(rank: int, world_size: int, root: str, stage: int, dtype: str) -> dict[str, tuple[int, ...]]:
    engine = build(config(stage, dtype))
    train(engine, rank, 2, seed=3)
    engine.save_checkpoint(root, client_state={"epoch": 4})
    engine.save_checkpoint(root, tag="again", save_latest=False)
    train(engine, rank, 1, seed=5)
    engine.save_checkpoint(root, tag="later")
    shape = "ds_shape" if stage == 3 else "shape"
    return {name: tuple(getattr(param, shape)) for name, param in engine.module.named_parameters()}


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16"), (3, "fp32")])
def test_folders_of_engines(tmp_path: Path, stage: int, dtype: str) -> None:
    shapes = run_ranks(save, 2, str(tmp_path), stage, dtype)[0]
    report = inspect(tmp_path, "global_step2", verify=True)
    assert [tag.name for tag in report.tags] == ["later", "again", "global_step2"]
    assert [tag.status for tag in report.tags] == ["complete", "complete", "verified"]
    assert (report.latest, report.shown) == ("later", "global_step2")
    found = report.checkpoint
    assert found is not None
    assert (found.zero_stage, found.world_size) == (stage, 2)
    assert found.dtype == {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    assert found.counters["global_steps"] == 2
    assert found.client_state == {"epoch": "4"}
    assert {n: e.shape for n, e in found.entries.items() if e.kind in ("trained", "frozen")} == shapes
    assert {"trained", "frozen", "tied"} <= {entry.kind for entry in found.entries.values()}
    assert len(found.groups) == 2
    assert [group.options["weight_decay"] for group in found.groups] == [0.1, 0.0]
    trained = [entry for entry in found.entries.values() if entry.kind == "trained"]
    assert sum(group.numel for group in found.groups) == sum(entry.numel for entry in trained)

    same = compare(tmp_path, tmp_path, tag="global_step2", tag_two="again", values=True)
    assert same.values == {}
    assert same.facts == {"client state epoch": ("4", "none")}
    other = compare(tmp_path, tmp_path, tag="again", tag_two="later", values=True)
    assert other.values
    assert other.facts["global_steps"] == ("2", "3")

    universal = convert(tmp_path / "again", tmp_path / "converted" / "again", workers=1)
    assert not (difference := compare(tmp_path, universal, tag="again", values=True)).values, difference.values
    assert (difference.compared, difference.uncompared) == (same.compared, 0)
