"""Quantised communication learns as well: the demo's model on its own text, with and without it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _validation_loss(folder: Path, zero: dict[str, object]) -> float:
    config = json.loads((ROOT / "examples/configs/zero2.json").read_text())
    config["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 1000, **zero}
    path = folder / f"{len(zero)}.json"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", str(ROOT / "examples/train_gpt.py")]
    command += ["--deepspeed", "--deepspeed_config", str(path), "--layers", "2", "--width", "128", "--steps", "200"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(r"validation loss ([0-9.]+)", done.stdout + done.stderr)
    assert found, done.stdout[-3000:]
    return float(found[1])


@pytest.mark.slow
def test_eight_bit_weights_and_four_bit_gradients_cost_less_than_one_percent(tmp_path: Path) -> None:
    plain = _validation_loss(tmp_path, {})
    quantised = _validation_loss(tmp_path, {"zero_quantized_weights": True, "zero_quantized_gradients": True})
    assert plain < 2.9  # it has learnt something: an untrained model is at 5.5
    assert quantised == pytest.approx(plain, rel=0.01)
