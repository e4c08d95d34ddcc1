"""Programs of the clients that merely have the package installed: it does nothing, says nothing and loads next to nothing.

Times are measured by ``benchmarks/imports.py``; here modules and deeds are counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="the client is not installed: make test-clients installs it")
pytest.importorskip("transformers", reason="the client is not installed: make test-clients installs it")

import deepspeed

pytestmark = pytest.mark.client

PACKAGE = Path(deepspeed.__file__).parent
WATCHER = Path(__file__).parents[1] / "helpers" / "import_watch.py"

# Each ends in `loaded`: our modules after the client was imported, after it was used, and after unwrap_model.
HEAD = """
import sys, threading, torch
def ours():
    return sorted(name for name in sys.modules if name.partition(".")[0] == "deepspeed")
loaded = notes["loaded"] = []
"""
TRANSFORMERS = (
    HEAD
    + """
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, integrations
loaded.append(ours())
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8, n_positions=4)).eval()
tokens = torch.arange(4)[None]
model(tokens, labels=tokens).loss.backward()
model.generate(tokens[:, :2], max_new_tokens=1, do_sample=False, pad_token_id=0)
notes["there"] = integrations.is_deepspeed_available()
loaded.append(ours())
"""
)
ACCELERATE = (
    HEAD
    + """
import accelerate
loaded.append(ours())
accelerator = accelerate.Accelerator(cpu=True)
model = torch.nn.Linear(2, 2)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
accelerator.backward(model(torch.ones(1, 2)).sum())
optimizer.step()
notes["there"] = accelerate.utils.is_deepspeed_available()
loaded.append(ours())
before = set(sys.modules)
assert accelerator.unwrap_model(model) is not None
loaded.append(ours())
notes["more"] = sorted(set(sys.modules) - before - set(ours()))
"""
)
TAIL = """
notes["threads"] = threading.active_count()
notes["cuda"] = torch.cuda.is_initialized()
notes["group"] = torch.distributed.is_initialized()
chosen = sys.modules.get("deepspeed.accelerator.real_accelerator")
notes["chosen"] = bool(chosen and chosen._chosen)
"""
PROGRAMS = {"transformers": TRANSFORMERS + TAIL, "accelerate": ACCELERATE + TAIL}


def watched(program: str, folder: Path, tmp_path: Path, *paths: str) -> tuple[dict[str, Any], str]:
    """Runs a program with these on its path and no site hooks; what was seen and noted, and all that was printed."""
    report = tmp_path / "report.json"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DS_", "DEEPSPEED"))}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    environment |= {
        "PYTHONPATH": os.pathsep.join([*paths, sysconfig.get_path("purelib")]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    ran = subprocess.run(
        # Without site, an editable install of ours is not there unless it is on the path.
        [sys.executable, "-S", str(WATCHER), str(report), str(folder), program],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(report.read_text()), ran.stdout + ran.stderr


@pytest.mark.parametrize("client", PROGRAMS)
def test_installed_and_not_used_it_does_nothing(client: str, tmp_path: Path) -> None:
    if PACKAGE.is_relative_to(sysconfig.get_path("purelib")):
        pytest.skip("the package is installed beside the clients; an editable install can be left out of the path")
    plain, said_without = watched(PROGRAMS[client], PACKAGE, tmp_path)
    here, said = watched(PROGRAMS[client], PACKAGE, tmp_path, str(PACKAGE.parent))
    assert not plain["notes"]["there"] and here["notes"]["there"]
    assert said == said_without
    assert here["seen"] == []
    notes = here["notes"]
    assert notes["threads"] == plain["notes"]["threads"]
    assert not notes["cuda"] and not notes["group"] and not notes["chosen"]
    assert notes["loaded"][:2] == [[], []]


def test_unwrapping_a_model_loads_little(tmp_path: Path) -> None:
    """Accelerate asks for the class of our engines at each ``unwrap_model``, in every program."""
    notes = watched(PROGRAMS["accelerate"], PACKAGE, tmp_path, str(PACKAGE.parent))[0]["notes"]
    after = notes["loaded"][2]
    assert "deepspeed.runtime.engine" in after and len(after) <= 36, after
    assert notes["more"] == []


DEEDS = """
import ctypes, os, socket, subprocess, threading
thread = threading.Thread(target=int)
thread.start()
thread.join()
subprocess.run(["true"], check=True)
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
with open(os.devnull, "w"):
    pass
print("hello")
"""


def test_the_watcher_sees_what_a_package_does(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "busy.py").write_text(DEEDS)
    program = f"{DEEDS}\nprint('now')\nimport busy"
    found, said = watched(program, tmp_path / "package", tmp_path, str(tmp_path / "package"))
    deeds = [line.split()[0] for line in found["seen"]]
    for deed in ("thread", "subprocess.Popen", "socket.bind", "open"):
        assert deeds.count(deed) == 1, (deed, found["seen"])  # and what the program itself did is not the package's
    assert said.split() == ["hello", "now", "hello"]
