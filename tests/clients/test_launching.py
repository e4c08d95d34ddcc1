"""Client programs under real launchers: ours, torchrun, and accelerate's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the client is not installed: make test-clients installs it")
pytest.importorskip("accelerate", reason="the client is not installed: make test-clients installs it")

from tests.helpers.clients import free_port

pytestmark = [pytest.mark.client, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"


def launch(*command: str) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    ran = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-6000:]


def reports(out: Path, ranks: int) -> list[dict[str, Any]]:
    found = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    for report in found:
        assert report["engine"] == "DeepSpeedEngine" and report["ranks"] == ranks
        assert report["losses"][-1] < report["losses"][0] - 0.05
    return found


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_trainer_script(launcher: str, tmp_path: Path) -> None:
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2},
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    script = f"{SCRIPTS / 'trainer.py'} --deepspeed {tmp_path / 'ds.json'} --output_dir {tmp_path} --use_cpu True "
    script += "--bf16 True --ddp_backend gloo --per_device_train_batch_size 4 --num_train_epochs 3 --logging_steps 1 "
    script += "--learning_rate 5e-3 --report_to none --save_strategy no --disable_tqdm True"
    if launcher == "deepspeed":
        place = f"--num_nodes 1 --num_gpus 2 --master_port {free_port()}"
        launch("deepspeed.launcher.runner", *place.split(), *script.split())
    else:
        launch("torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}", *script.split())
    first, second = reports(tmp_path, 2)
    assert first["losses"] == second["losses"]


def test_accelerate_launch(tmp_path: Path) -> None:
    options = "--use_deepspeed --zero_stage 1 --gradient_accumulation_steps 2 --num_processes 2 --num_machines 1 "
    options += f"--mixed_precision bf16 --dynamo_backend no --main_process_port {free_port()} "
    options += f"{SCRIPTS / 'accelerated.py'} {tmp_path}"
    launch("accelerate.commands.launch", *options.split())
    for report in reports(tmp_path, 2):
        assert (report["stage"], report["accumulation"], report["steps"]) == (1, 2, 6)
