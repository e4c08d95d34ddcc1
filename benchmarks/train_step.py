"""Training-step benchmark: ours against DDP, FSDP2 and the released package, alternating on an otherwise idle machine.

Every candidate is a group of long-lived rank processes. They are started one after the other and then take turns:
the driver tells one candidate to run a few steps while all the others are blocked on a pipe, and goes round. What
drifts on the machine (clock, neighbours, page cache) so hits all of them alike. See README.md in this folder.

    python benchmarks/train_step.py --candidates ddp,ours0,ours1,ours2,fsdp2 --rounds 10
    python benchmarks/train_step.py --reference-python /path/to/venv/bin/python --dtype bf16 --json out.json
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KNOWN = (
    "ddp",
    "ddp_view",
    "ddp_autocast",
    "fsdp2",
    *(f"{w}{s}" for w in ("ours", "reference") for s in (0, 1, 2, 3, "3_init")),
)


class CandidateError(RuntimeError):
    """A rank of a candidate died or did not answer in time."""


@dataclass
class Result:
    """Times in seconds, memory in bytes (the larger of the ranks'), one entry of `times` a step (the slowest rank's)."""

    name: str
    times: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)  # median step time of each round
    imports: list[float] = field(default_factory=list)
    initialize_s: float = 0.0
    first_step_s: float = 0.0
    base_rss: int = 0
    rss: int = 0
    uss: int = 0
    peak_start: int = 0
    peak_steps: int = 0
    parameters: int = 0
    loss: float = float("nan")
    origin: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.times)


class Candidate:
    """The rank processes of one candidate and the pipes to them."""

    def __init__(self, name: str, args: argparse.Namespace, logs: Path) -> None:
        self.result = Result(name)
        self.timeout_s = args.timeout
        self.logs = [logs / f"{name}.{rank}.log" for rank in range(args.world)]
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        cores = sorted(os.sched_getaffinity(0))
        self.ranks = []
        for rank in range(args.world):
            env = environment(name, args) | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(args.world)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            command = [interpreter(name, args), str(HERE / "worker.py"), "--candidate", name, "--rank", str(rank)]
            for option in (
                "world",
                "threads",
                "micro_batch",
                "accumulation",
                "clipping",
                "dtype",
                "shape",
                "config",
                "ready_mib",
            ):
                command += ["--" + option.replace("_", "-"), str(getattr(args, option))]
            if args.bind:
                command += ["--core", str(cores[rank % len(cores)])]
            with self.logs[rank].open("w") as log:
                pipe = subprocess.PIPE
                # cwd is an empty folder: `deepspeed` must come from the venv or from PYTHONPATH, never from here.
                self.ranks.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, env=env, cwd=logs))

    def start(self, args: argparse.Namespace) -> None:
        """Wait for the set-up, take the first ten steps, and note memory before and after them."""
        facts, r = self._answers(), self.result
        r.imports = [max(f["import_s"] for f in facts)]
        r.initialize_s = max(f["initialize_s"] for f in facts)
        r.base_rss = max(f["base"]["rss"] for f in facts)
        r.parameters, r.origin = facts[0]["parameters"], facts[0]["origin"]
        ours = str(args.ours_path.resolve()) in r.origin
        if (r.name.startswith("ours") and not ours) or (r.name.startswith("reference") and ours):
            raise CandidateError(f"{r.name} imported the wrong package: {r.origin}")
        r.first_step_s = self.steps(1)[0]
        r.peak_start = max(m["peak"] for m in self.ask({"do": "memory"}))  # and starts a new peak
        self.steps(9)
        after = self.ask({"do": "memory"})
        r.rss, r.uss, r.peak_steps = (max(m[key] for m in after) for key in ("rss", "uss", "peak"))

    def ask(self, command: dict[str, Any]) -> list[dict[str, Any]]:
        try:
            for rank in self.ranks:
                rank.stdin.write(json.dumps(command).encode() + b"\n")
                rank.stdin.flush()
        except BrokenPipeError:
            raise CandidateError(self._why("a rank has ended")) from None
        return self._answers()

    def steps(self, count: int) -> list[float]:
        """Run steps now; returns the slowest rank's time of each, in seconds."""
        answers = self.ask({"do": "steps", "count": count})
        self.result.loss = statistics.fmean(a["loss"] for a in answers)
        return [max(times) for times in zip(*(a["times"] for a in answers), strict=True)]

    def record(self, count: int) -> None:
        times = self.steps(count)
        self.result.times += times
        self.result.rounds.append(statistics.median(times))

    def _answers(self) -> list[dict[str, Any]]:
        deadline = time.monotonic() + self.timeout_s
        got: dict[int, bytes] = {}
        with selectors.DefaultSelector() as selector:
            for i, rank in enumerate(self.ranks):
                selector.register(rank.stdout, selectors.EVENT_READ, i)
            while len(got) < len(self.ranks):
                ready = selector.select(deadline - time.monotonic())
                if not ready:
                    raise CandidateError(self._why(f"no answer within {self.timeout_s:.0f} s"))
                for key, _ in ready:
                    got[key.data] = line = key.fileobj.readline()
                    selector.unregister(key.fileobj)
                    if not line:
                        raise CandidateError(self._why(f"rank {key.data} has ended"))
        return [json.loads(got[i]) for i in range(len(self.ranks))]

    def _why(self, what: str) -> str:
        time.sleep(0.5)  # so that a rank that has just closed its pipe has an exit code to show
        lines = [f"{self.result.name}: {what}"]
        for i, (rank, log) in enumerate(zip(self.ranks, self.logs, strict=True)):
            lines += [f"--- rank {i}, exit code {rank.poll()}", *log.read_text().splitlines()[-12:]]
        return "\n".join(lines)

    def stop(self) -> None:
        for rank in self.ranks:
            if rank.poll() is None:
                try:
                    rank.stdin.write(b'{"do": "stop"}\n')
                    rank.stdin.close()
                except OSError:
                    pass
        for rank in self.ranks:
            try:
                rank.wait(10)
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()


def interpreter(name: str, args: argparse.Namespace) -> str:
    return args.reference_python if name.startswith("reference") else sys.executable


def environment(name: str, args: argparse.Namespace) -> dict[str, str]:
    """The caller's environment without what could carry one candidate's package into another's process."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "DS_", "OMP_", "MKL_"))}
    env |= {"OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": ""}
    if name.startswith("ours"):
        env["PYTHONPATH"] = str(args.ours_path.resolve())
    if name.startswith("reference"):
        env["DS_ACCELERATOR"] = "cpu"
        env["PATH"] = (
            f"{Path(args.reference_python).parent}:{env['PATH']}"  # its kernels are built with that venv's ninja
        )
    return env


def package(name: str) -> str:
    """`ours` or `reference` for a candidate that is one of them, else nothing."""
    return next((kind for kind in ("ours", "reference") if name.startswith(kind)), "")


def measure_imports(results: list[Result], args: argparse.Namespace) -> None:
    """Seconds of `import deepspeed` after `import torch`, in fresh processes, alternating, warm page cache."""
    code = "import torch,time;t=time.perf_counter();import deepspeed;print('seconds',time.perf_counter()-t)"
    packages = {
        r.name.removesuffix("_init").rstrip("0123"): r
        for r in reversed(results)
        if r.name.startswith(("ours", "reference"))
    }
    times: dict[str, list[float]] = {name: [] for name in packages}
    with tempfile.TemporaryDirectory() as empty:
        for _ in range(args.import_repeats):
            for name in packages:
                env = environment(name, args)
                command = [interpreter(name, args), "-c", code]
                done = subprocess.run(command, env=env, cwd=empty, capture_output=True, text=True, check=True)
                times[name].append(float(done.stdout.rsplit("seconds", 1)[1]))
    for r in results:
        r.imports = times.get(package(r.name), []) or r.imports


def ratio(results: dict[str, Result], name: str, base: str) -> float | None:
    """Ratio of median step times, if the base was measured."""
    return results[name].median / results[base].median if base in results else None


def table(results: dict[str, Result], tokens: int) -> str:
    head = ["candidate", "step s", "p10", "p90", "tokens/s", "/ddp", "/ref", "RSS", "USS", "peak", "1st peak", "import"]
    rows = [[*head, "init", "1st step", "loss"]]
    for name, r in results.items():
        tenths = statistics.quantiles(r.times, n=10) if len(r.times) > 1 else r.times * 9
        same_stage = (
            f"reference{name.removeprefix('ours').removeprefix('reference')}"
            if name.startswith(("ours", "reference"))
            else ""
        )
        ratios = (ratio(results, name, "ddp"), ratio(results, name, same_stage))
        row = [name, f"{r.median:.4f}", f"{tenths[0]:.4f}", f"{tenths[8]:.4f}", f"{tokens / r.median:.0f}"]
        row += ["" if x is None else f"{x:.3f}" for x in ratios]
        row += [f"{m / 2**20:.0f}" for m in (r.rss, r.uss, r.peak_steps, r.peak_start)]
        row += [f"{s:.2f}" for s in (statistics.median(r.imports), r.initialize_s, r.first_step_s)]
        rows.append([*row, f"{r.loss:.4f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))) for r in rows
    ]
    return "\n".join(
        [*aligned, "RSS, USS after 10 steps and peaks in MiB, the larger rank's; times in s; loss: mean of ranks."]
    )


def targets(results: dict[str, Result], args: argparse.Namespace) -> list[tuple[str, float | None, float]]:
    """(what, measured, at most) for everything that this run can say about the project's targets."""
    out: list[tuple[str, float | None, float]] = []
    for stage in (0, 1, 2):
        ours = results.get(f"ours{stage}")
        if ours is None:
            continue
        if "ddp" in results and args.dtype == "fp32":
            out.append((f"stage {stage}: step / ddp", ratio(results, ours.name, "ddp"), 1.05 if stage else 1.02))
            sharded = 8 * ours.parameters * (1 - 1 / args.world) if stage else 0  # the two fp32 moments of AdamW
            out.append((f"stage {stage}: resident MiB", ours.rss / 2**20, (results["ddp"].rss - sharded) * 1.1 / 2**20))
        if stage and f"reference{stage}" in results:
            out.append((f"stage {stage}: step / reference", ratio(results, ours.name, f"reference{stage}"), 0.90))
        out.append((f"stage {stage}: initialize s", ours.initialize_s, 0.5))
        out.append((f"stage {stage}: import s", statistics.median(ours.imports), 0.4))
    return out + stage3_targets(results)


def stage3_targets(results: dict[str, Result]) -> list[tuple[str, float | None, float]]:
    """As :func:`targets`, for parameters partitioned: against those who partition them, too."""
    ours, fsdp2, reference = (results.get(name) for name in ("ours3", "fsdp2", "reference3"))
    out: list[tuple[str, float | None, float]] = []
    if ours is not None and fsdp2 is not None:
        out.append(("stage 3: step / fsdp2", ratio(results, "ours3", "fsdp2"), 0.95))
        out.append(("stage 3: resident MiB, fsdp2", ours.rss / 2**20, fsdp2.rss / 2**20))
    if ours is not None and reference is not None:
        out.append(("stage 3: step / reference", ratio(results, "ours3", "reference3"), 0.88))
        out.append(("stage 3: resident MiB, reference", ours.rss / 2**20, 0.75 * reference.rss / 2**20))
    return out


def sweep_after_reference(before: set[Path]) -> None:
    """The released package leaves shared-memory files, and build locks when it is killed: remove those of this run."""
    for path in leftovers() - before:
        path.unlink(missing_ok=True)


def leftovers() -> set[Path]:
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache/torch_extensions"))
    return {*Path("/dev/shm").glob("deepspeed_*"), *cache.glob("*/*/lock")}


def free_memory() -> int:
    """Bytes that new processes can take without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024


def attempt(candidate: Candidate, active: list[Candidate], failed: dict[str, str], action: Callable[[], None]) -> None:
    """A candidate that fails leaves the round and the others go on."""
    try:
        action()
    except CandidateError as error:
        print(f"FAILED {error}", file=sys.stderr, flush=True)
        failed[candidate.result.name] = str(error)
        active.remove(candidate)
        candidate.kill()


def run(args: argparse.Namespace, logs: Path) -> tuple[dict[str, Result], dict[str, str]]:
    active: list[Candidate] = []
    failed: dict[str, str] = {}
    before = leftovers()
    # As an installed package: without this the first start after an edit would compile sources inside initialize().
    compileall.compile_dir(args.ours_path / "deepspeed", quiet=2)
    try:
        for name in args.candidates:
            print(f"starting {name}", file=sys.stderr, flush=True)
            needed = 1.2 * args.world * max((c.result.peak_start for c in active), default=0)
            if free_memory() < needed:  # a rank that the kernel kills in the middle of a run would be worse
                failed[name] = f"not started: {free_memory() / 2**30:.1f} GiB free; measure fewer candidates in one run"
                print(f"FAILED {name} {failed[name]}", file=sys.stderr, flush=True)
                continue
            candidate = Candidate(name, args, logs)
            active.append(candidate)
            attempt(candidate, active, failed, lambda: candidate.start(args))  # noqa: B023 - called at once
        for index in range(args.rounds):
            turn = index % len(active) if active else 0
            for candidate in active[turn:] + active[:turn]:
                attempt(candidate, active, failed, lambda: candidate.record(args.steps))  # noqa: B023 - called at once
            line = "  ".join(f"{c.result.name} {c.result.rounds[-1]:.3f}" for c in active)
            print(f"round {index + 1}/{args.rounds}: {line}", file=sys.stderr, flush=True)
    finally:
        for candidate in active:
            candidate.stop()
        sweep_after_reference(before)
    return {c.result.name: c.result for c in active}, failed


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", help=f"comma-separated, of {', '.join(KNOWN)}")
    parser.add_argument("--stages", default="0,1,2", help="stages of ours and reference when --candidates is not given")
    parser.add_argument("--stage", type=int, help="one stage, short for --stages")
    parser.add_argument("--reference-python", default="", help="interpreter of a venv that has the released package")
    parser.add_argument("--ours-path", type=Path, default=HERE.parent, help="folder that holds our deepspeed/")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--clipping", type=float, default=0.0)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bind", action="store_true", help="pin rank r to the r-th core")
    parser.add_argument(
        "--ready-mib",
        type=int,
        default=0,
        help="memory that is ready for each rank when initialize begins; see ready.py",
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="steps a round")
    parser.add_argument("--import-repeats", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds to wait for any one answer")
    parser.add_argument("--shape", default="{}", help='JSON over gpt.Shape, such as {"layers": 2}')
    parser.add_argument("--config", default="{}", help="JSON put over the DeepSpeed config of ours and reference")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args()
    if args.stage is not None:
        args.stages = str(args.stage)
    if args.candidates is None:
        names = ["ddp", "fsdp2", *(f"ours{s}" for s in args.stages.split(","))]
        if args.reference_python:
            names += [f"reference{s}" for s in args.stages.split(",")]
    else:
        names = args.candidates.split(",")
    if unknown := [n for n in names if n not in KNOWN]:
        parser.error(f"unknown candidates {unknown}; known are {', '.join(KNOWN)}")
    if any(n.startswith("reference") for n in names) and not args.reference_python:
        parser.error(
            "reference candidates need --reference-python, the interpreter of a venv with the released package"
        )
    args.candidates = names
    return args


def main() -> int:
    args = parse()
    with tempfile.TemporaryDirectory(prefix="train_step.") as folder:
        results, failed = run(args, Path(folder))
    if args.import_repeats:
        measure_imports(list(results.values()), args)
    print(
        f"{args.world} ranks of {args.threads} thread(s), {args.dtype}, micro-batch {args.micro_batch}, accumulation "
        f"{args.accumulation}, clipping {args.clipping}, {args.rounds} rounds of {args.steps} steps, "
        f"load average {os.getloadavg()[0]:.1f}"
    )
    tokens = args.world * args.micro_batch * args.accumulation * json.loads(args.shape).get("sequence", 128)
    print(table(results, tokens))
    for what, measured, limit in targets(results, args):
        print(f"{what:32} {measured:9.3f}  at most {limit:9.3f}  {'ok' if measured <= limit else 'OVER'}")
    if args.json:
        options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        everything = {"options": options, "results": {n: asdict(r) for n, r in results.items()}, "failed": failed}
        args.json.write_text(json.dumps(everything, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
