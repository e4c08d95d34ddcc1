"""A step with optimizer states, or parameters, too, on the host or in files, beside the same stage without and the peer.

    python benchmarks/offload.py --reference-python REF/bin/python --nvme /scratch
    python benchmarks/offload.py --tiers optimizer_nvme --dtype fp32

For each tier, two runs of train_step.py's harness (same model, same ranks): the stage without it, for us; then with it, for
us and the released package in turns. `optimizer_cpu` is stage 2, the others are stage 3. On a machine without an accelerator
the host tiers move nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from train_step import Result, run
from train_step import parse as parse_step

TIERS = ("optimizer_cpu", "optimizer_cpu_stage3", "optimizer_nvme", "both_nvme")


def config_of(tier: str, nvme: str) -> tuple[int, dict[str, Any]]:
    """ZeRO stage and ``zero_optimization`` section of a tier."""
    file = {"device": "nvme", "nvme_path": nvme}
    piped = {**file, "pipeline_read": True, "pipeline_write": True}
    if tier == "optimizer_cpu":
        return 2, {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    if tier == "optimizer_cpu_stage3":
        return 3, {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    if tier == "optimizer_nvme":
        return 3, {"stage": 3, "offload_optimizer": piped}
    # Room for the largest shard of a rank, that of the embedding or the head.
    return 3, {"stage": 3, "offload_optimizer": piped, "offload_param": {**file, "buffer_size": 4 << 20}}


def row(name: str, result: Result | None, base: float | None) -> str:
    if result is None:
        return f"{name:32} failed"
    ratio = f"{result.median / base:6.3f}" if base else f"{'':6}"
    return (
        f"{name:32} {result.median:7.3f} {ratio} {result.initialize_s:8.2f} {result.rss / 2**20:8.0f} "
        f"{max(result.peak_start, result.peak_steps) / 2**20:8.0f} {result.loss:8.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiers", default=",".join(TIERS), help=f"comma-separated, of {', '.join(TIERS)}")
    parser.add_argument("--nvme", default=tempfile.gettempdir(), help="folder on the disk to use")
    given, rest = parser.parse_known_args()
    lines = [
        f"{'tier, candidate':32} {'step s':>7} {'/plain':>6} {'init s':>8} {'RSS MiB':>8} {'peak MiB':>8} {'loss':>8}"
    ]
    for tier in given.tiers.split(","):
        stage, zero = config_of(tier, given.nvme)
        sys.argv[1:] = rest
        args = parse_step()
        plain: dict[str, Result] = {}
        with tempfile.TemporaryDirectory() as logs:
            args.candidates = [f"ours{stage}"]
            plain, _ = run(args, Path(logs))
            args.candidates = [f"ours{stage}", *([f"reference{stage}"] if args.reference_python else [])]
            args.config = json.dumps({"zero_optimization": zero})
            found, failed = run(args, Path(logs))
        base = plain[f"ours{stage}"].median if plain else None
        lines.append(row(f"stage {stage}, ours", plain.get(f"ours{stage}"), base))
        lines += [row(f"{tier}, {name}", found.get(name), base) for name in args.candidates]
        lines += [f"  {name}: {text[-300:]}" for name, text in failed.items()]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
