"""The example that users copy, end to end: launched, saved, resumed, exported, and loaded without deepspeed."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--layers", "1", "--width", "64", "--context", "32", "--print_every", "1"]

pytestmark = pytest.mark.slow


def run(*command: str, folder: Path, code: int = 0) -> str:
    """Output of a command, both streams together, run with the package of this checkout."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def train(*args: str, stage: int, folder: Path, ranks: int = 2, torchrun: bool = False, code: int = 0) -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    if torchrun:
        launcher = ["torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port]
    else:
        launcher = ["deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", port]
    config = ROOT / f"examples/configs/zero{stage}.json"
    script = [str(ROOT / "examples/train_gpt.py"), "--deepspeed", "--deepspeed_config", str(config), *SMALL, *args]
    return run(sys.executable, "-m", *launcher, *script, folder=folder, code=code)


def losses(text: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step +(\d+) \| loss ([\d.]+)", text)}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_resumed_run_is_the_run_that_was_never_stopped(stage: int, tmp_path: Path) -> None:
    whole = losses(train("--steps", "6", stage=stage, folder=tmp_path))
    first = train("--steps", "3", "--save", "ckpt", stage=stage, folder=tmp_path)
    more = ("--resume", "ckpt", "--steps", "6", "--save", "ckpt", "--export", "weights", "--sample", "20")
    second = train(*more, stage=stage, folder=tmp_path, torchrun=stage == 1)
    assert "resumed at step 3" in second
    assert "def " in second
    stopped = losses(first) | losses(second)
    assert list(stopped) == list(whole) == [1, 2, 3, 4, 5, 6]
    assert stopped == pytest.approx(whole, abs=1e-4)

    script = str(ROOT / "examples/eval_plain_torch.py")
    plain = run(sys.executable, script, "weights", "--expect", "ckpt/result.json", folder=tmp_path)
    assert "torch.float32" in plain
    result = tmp_path / "ckpt/result.json"
    facts = json.loads(result.read_text())
    result.write_text(json.dumps(facts | {"validation_loss": facts["validation_loss"] + 0.1}))
    wrong = run(sys.executable, script, "weights", "--expect", "ckpt/result.json", folder=tmp_path, code=1)
    assert "do not have the validation loss" in wrong
    high = run(sys.executable, script, "weights", "--below", "0.5", folder=tmp_path, code=1)
    assert "below 0.5" in high


def test_a_missing_config_file_ends_the_run_with_its_name(tmp_path: Path) -> None:
    output = train("--deepspeed_config", "nowhere.json", stage=0, folder=tmp_path, ranks=1, code=1)
    assert "nowhere.json" in output
