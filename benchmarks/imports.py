"""What having the package installed costs programs that do not use it: import times in fresh processes.

    python benchmarks/imports.py
    python benchmarks/imports.py --rounds 15 --json imports.json

Each line of the table is a program that runs with the package on its path and without, by turns; what is printed is the
median of each and of their differences within a round. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What is timed begins after `import torch`, which every program of this kind pays.
PROGRAMS = {
    "import transformers": "import transformers; from transformers import Trainer, TrainingArguments",
    "import accelerate": "import accelerate; from accelerate import Accelerator",
    "unwrap_model, first": """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
model = accelerator.prepare(torch.nn.Linear(2, 2))
import torch._dynamo
begin = time.perf_counter()
accelerator.unwrap_model(model)
""",
    "unwrap_model, next": """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
model = accelerator.prepare(torch.nn.Linear(2, 2))
accelerator.unwrap_model(model)
begin = time.perf_counter()
accelerator.unwrap_model(model)
""",
}
OURS = {
    "import deepspeed": "import deepspeed",
    "from deepspeed import DeepSpeedEngine": "from deepspeed import DeepSpeedEngine",
}
TARGET_S = 0.1


def seconds(program: str, folder: str, *paths: str) -> float:
    """One fresh process; ``paths`` before the installed packages, whose path hooks (editable installs) do not run."""
    timed = f"import time, torch\nbegin = time.perf_counter()\n{program}\nprint('took', time.perf_counter() - begin)"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, sysconfig.get_path("purelib")]),
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "",
    }
    command = [sys.executable, "-S", "-c", timed]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the program failed:\n{program}\n{done.stderr}")
    return float(done.stdout.rsplit("took", 1)[1])


def by_turns(program: str, rounds: int, folder: str) -> dict[str, list[float]]:
    """Times with and without the package; who is first changes from round to round, and one of each does not count."""
    times: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(rounds + 1):
        order = ("with", "without") if number % 2 else ("without", "with")
        for kind in order:
            took = seconds(program, folder, *([str(ROOT)] if kind == "with" else []))
            if number:
                times[kind].append(took)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9, help="fresh processes of each kind (default 9)")
    parser.add_argument("--json", type=Path, help="file for all times")
    given = parser.parse_args()
    if (Path(sysconfig.get_path("purelib")) / "deepspeed").exists():
        parser.error("deepspeed lies in site-packages and cannot be left out; use a venv with an editable install")
    everything: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'':40}{'with ms':>10}{'without ms':>12}{'more ms':>10}")
        for name, program in PROGRAMS.items():
            times = everything[name] = by_turns(program, given.rounds, folder)
            more = statistics.median(a - b for a, b in zip(times["with"], times["without"], strict=True))
            have, lack = (1000 * statistics.median(times[kind]) for kind in ("with", "without"))
            within = "" if more <= TARGET_S else f"  over the target of {1000 * TARGET_S:.0f} ms"
            print(f"{name:40}{have:10.1f}{lack:12.1f}{1000 * more:10.1f}{within}")
        for name, program in OURS.items():
            took = [seconds(program, folder, str(ROOT)) for _ in range(given.rounds + 1)][1:]
            everything[name] = {"with": took}
            print(f"{name:40}{1000 * statistics.median(took):10.1f}")
    if given.json:
        given.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
