"""The examples of docs/clients run as they are printed."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.client, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]

# Lightning wants CUDA devices, or an accelerator of ours. The example is the page's.
LIGHTNING_ON_CPU = """
import functools, runpy
import lightning.pytorch.strategies as strategies
from tests.helpers.lightning import TrainerOnCPU
strategies.DeepSpeedStrategy = functools.partial(strategies.DeepSpeedStrategy, accelerator=TrainerOnCPU())
runpy.run_path("example.py", run_name="__main__")
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("client", ["accelerate", "lightning", "peft", "trl"])
def test_the_example_of_the_page(client: str, tmp_path: Path) -> None:
    pytest.importorskip(client, reason="the client is not installed: make test-clients installs it")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "clients" / f"{client}.md").read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    env = {**os.environ, **alone, "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    program = ["-c", LIGHTNING_ON_CPU] if client == "lightning" else ["example.py"]
    ran = subprocess.run([sys.executable, *program], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    if client == "lightning":
        assert re.search(r"loss 0\.\d+; \d", ran.stdout), ran.stdout
    if client == "peft":
        assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 4000
