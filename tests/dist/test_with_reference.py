"""The released reference package loads what this one writes, and goes on with the same losses; as a black box.

Opt-in: ``DS_REFERENCE_PYTHON`` names an interpreter that has the reference (and a CPU build of torch).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deepspeed.checkpoint.ds_to_universal import convert
from tests.helpers.fixture_model import facts

REFERENCE = os.environ.get("DS_REFERENCE_PYTHON", "")
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REFERENCE, reason="DS_REFERENCE_PYTHON names no interpreter with the reference package"),
]

KINDS = [(stage, dtype, groups) for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16") for groups in (1, 2)]


def config(name: str, stage: int, universal: bool = False) -> dict[str, Any]:
    made = facts(name)["config"]
    made["zero_optimization"] = {"stage": stage}
    if stage == 3:
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return {**made, "checkpoint": {"load_universal": True}} if universal else made


def run(python: str, jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What came of each job; see ``tests/helpers/black_box.py``."""
    file = folder / f"jobs-{len(list(folder.iterdir()))}.json"
    file.write_text(json.dumps(jobs))
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29613")
    if python == sys.executable:
        env["PYTHONPATH"] = str(ROOT)
    script = ROOT / "tests" / "helpers" / "black_box.py"
    subprocess.run([python, str(script), str(file)], env=env, check=True, capture_output=True, cwd=folder)
    return [json.loads(line) for line in Path(f"{file}.out").read_text().splitlines()]


def assert_same_runs(theirs: list[dict[str, Any]], ours: list[dict[str, Any]], jobs: list[dict[str, Any]]) -> None:
    problems = []
    for one, two, job in zip(theirs, ours, jobs, strict=True):
        what = f"{job['load']} at stage {job['config']['zero_optimization']['stage']}, {job['world']} ranks"
        if "error" in one or "error" in two:
            problems.append(f"{what}: {one.get('error') or two.get('error')}")
            continue
        tolerance = 2e-3 if "bf16" in job["config"] else 1e-5
        for mine, other in zip(one["ranks"], two["ranks"], strict=True):
            assert (mine["epoch"], mine["steps"], mine["lr"]) == (other["epoch"], other["steps"], other["lr"]), what
            worst = max(abs(a - b) / abs(b) for a, b in zip(mine["losses"], other["losses"], strict=True))
            if worst > tolerance:
                problems.append(f"{what}: losses differ by {worst}")
    assert not problems, "\n".join(problems)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str, int], Path]:
    """Native folders of ours, two ranks; with a frozen and a tied parameter and a buffer."""
    root = tmp_path_factory.mktemp("saved")
    folders = {kind: root / "z{}_{}_{}".format(*kind) for kind in KINDS}
    jobs = []
    for (stage, dtype, groups), folder in folders.items():
        name = f"z{stage}_{dtype}"
        job = {"world": 2, "config": config(name, stage), "batches": [name, "before"], "groups": groups}
        jobs.append({**job, "save": str(folder)})
    assert all("ranks" in outcome for outcome in run(sys.executable, jobs, root))
    return folders


def test_native_folders(saved: dict[tuple[int, str, int], Path], tmp_path: Path) -> None:
    jobs = []
    for (stage, dtype, groups), folder in saved.items():
        name = f"z{stage}_{dtype}"
        job = {"world": 2, "config": config(name, stage), "batches": [name, "after"], "groups": groups, "seed": 0}
        jobs.append({**job, "load": str(folder)})
    assert_same_runs(run(REFERENCE, jobs, tmp_path), run(sys.executable, jobs, tmp_path), jobs)


def test_universal_folders(saved: dict[tuple[int, str, int], Path], tmp_path: Path) -> None:
    """At the same and another world size.

    The reference leaves frozen weights as they are, so the seed is that of the save. Its stage 3 mixes up the options of
    several groups, whoever converted the folder, so it is asked for one.
    """
    jobs = []
    for (stage, dtype, groups), folder in saved.items():
        if groups == 1 and stage != 1:
            continue
        target = convert(folder / "step3", tmp_path / folder.name / "step3_universal").parent
        name = f"z{stage}_{dtype}"
        for other in (1, 2, 3) if groups == 1 else (1, 2):
            world = 3 if other == 3 - stage else 2
            job = {"world": world, "config": config(name, other, universal=True), "batches": [name, "after"]}
            jobs.append({**job, "groups": groups, "load": str(target)})
    assert_same_runs(run(REFERENCE, jobs, tmp_path), run(sys.executable, jobs, tmp_path), jobs)
