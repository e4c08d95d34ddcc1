"""Peak and resident memory of a larger model, one candidate after the other: what each needs to train at all.

    python benchmarks/memory.py --reference-python REF/bin/python
    python benchmarks/memory.py --candidates ddp,ours3_init --dtype bf16 --layers 15 --hidden 1024

The default is a GPT of 206 M parameters, one sample a rank, two ranks. *start* is the peak until the first step has been
taken (construction, initialize, first gradients and optimizer state), *steps* the peak of the three after it, *resident*
what stays; all are the larger rank's, without the memory of Python and torch alone, which is given once.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from train_step import KNOWN, Candidate, CandidateError, Result, leftovers, sweep_after_reference

HERE = Path(__file__).resolve().parent


def measure(name: str, args: argparse.Namespace, logs: Path) -> Result:
    """Starts one candidate, takes four steps, and stops it."""
    before = leftovers()
    candidate = Candidate(name, args, logs)
    try:
        facts, result = candidate._answers(), candidate.result
        result.base_rss = max(f["base"]["rss"] for f in facts)
        result.parameters = facts[0]["parameters"]
        result.initialize_s = max(f["initialize_s"] for f in facts)
        result.first_step_s = candidate.steps(1)[0]
        result.peak_start = max(m["peak"] for m in candidate.ask({"do": "memory"}))
        candidate.record(3)
        after = candidate.ask({"do": "memory"})
        result.rss, result.uss, result.peak_steps = (max(m[key] for m in after) for key in ("rss", "uss", "peak"))
        return result
    finally:
        candidate.stop()
        sweep_after_reference(before)


def table(results: list[Result]) -> str:
    """One row a candidate, MiB above the bare interpreter."""
    lines = [f"{'candidate':16} {'start':>8} {'steps':>8} {'resident':>8} {'step s':>8} {'loss':>8}"]
    for r in results:
        mib = [(value - r.base_rss) / 2**20 for value in (r.peak_start, r.peak_steps, r.rss)]
        lines.append(f"{r.name:16} {mib[0]:8.0f} {mib[1]:8.0f} {mib[2]:8.0f} {r.median:8.2f} {r.loss:8.4f}")
    base = results[0].base_rss / 2**20 if results else 0
    return "\n".join([*lines, f"MiB, the larger rank's, above the {base:.0f} MiB of Python and torch."])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", help=f"comma-separated, of {', '.join(KNOWN)}")
    parser.add_argument("--reference-python", default="", help="interpreter of a venv that has the released package")
    parser.add_argument("--ours-path", type=Path, default=HERE.parent, help="folder that holds our deepspeed/")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for any one answer")
    parser.add_argument("--config", default="{}", help="JSON put over the DeepSpeed config of ours and reference")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args()
    names = ["ddp", "fsdp2", "ours3", "ours3_init"]
    if args.reference_python:
        names += ["reference3", "reference3_init"]
    args.candidates = args.candidates.split(",") if args.candidates else names
    if unknown := [name for name in args.candidates if name not in KNOWN]:
        parser.error(f"unknown candidates {unknown}; known are {', '.join(KNOWN)}")
    args.shape = json.dumps({"layers": args.layers, "hidden": args.hidden, "heads": 16})
    args.micro_batch, args.accumulation, args.clipping, args.bind = 1, 1, 0.0, False
    return args


def main() -> int:
    args = parse()
    results: list[Result] = []
    failed = 0
    with tempfile.TemporaryDirectory(prefix="memory.") as folder:
        for name in args.candidates:
            print(f"measuring {name}", file=sys.stderr, flush=True)
            try:
                results.append(measure(name, args, Path(folder)))
            except CandidateError as error:
                failed = 1
                print(f"FAILED {error}", file=sys.stderr, flush=True)
    count = f"{results[0].parameters / 1e6:.0f} M parameters, " if results else ""
    print(f"{args.world} ranks, {args.dtype}, {count}one sample a rank")
    print(table(results))
    if args.json:
        rows = [{k: v for k, v in vars(r).items() if k != "imports"} for r in results]
        args.json.write_text(json.dumps(rows, indent=1))
    return failed


if __name__ == "__main__":
    sys.exit(main())
