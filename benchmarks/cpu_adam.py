"""How fast the CPU Adam step is: state traffic per second of ours, of one torch fused call, and of the reference.

    python benchmarks/cpu_adam.py --threads 1 2
    python benchmarks/cpu_adam.py --reference-python /path/to/reference/venv/bin/python

Every candidate updates tensors of one size and values in a process of its own (so that memory placement and the
scheduler treat all alike) and waits between calls; calls alternate. Ratios of medians and of minima are printed. Bytes
counted an element: weights and both moments read and written (24), the gradient read (4 or 2), 16-bit weights
written (2). The reference is a pip-installed deepspeed in its own venv, used as a black box.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

HYPER: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}

# Name -> (bytes an element, implementation, gradient dtype, gradient scale, bf16 weights written)
CANDIDATES: dict[str, tuple[int, str, torch.dtype, float, bool]] = {
    "torch._fused_adamw_, fp32": (28, "torch", torch.float32, 1.0, False),
    "ours, fp32": (28, "ours", torch.float32, 1.0, False),
    "ours, fp32, bf16 out": (30, "ours", torch.float32, 1.0, True),
    "ours, fp32 scaled, bf16 out": (30, "ours", torch.float32, 0.5, True),
    "ours, bf16 grad, bf16 out": (28, "ours", torch.bfloat16, 1.0, True),
    "ours, bf16 grad scaled, bf16 out": (28, "ours", torch.bfloat16, 0.5, True),
    "reference DeepSpeedCPUAdam, fp32": (28, "reference", torch.float32, 1.0, False),
}
BASE = next(iter(CANDIDATES))


def make_step(name: str, numel: int) -> Callable[[], object]:
    """One step of a candidate over fresh tensors. For the reference, `deepspeed` is the installed package."""
    _, implementation, grad_dtype, grad_scale, write_out = CANDIDATES[name]
    generator = torch.Generator().manual_seed(0)
    grad = (torch.randn(numel, generator=generator) * 1e-2).to(grad_dtype)
    p = torch.nn.Parameter(torch.randn(numel, generator=generator))
    if implementation == "torch":
        m, v, step = torch.zeros_like(p.data), torch.zeros_like(p.data), torch.tensor(1.0)
        scalars = {"lr": HYPER["lr"], "eps": HYPER["eps"], "weight_decay": HYPER["weight_decay"]}
        beta1, beta2 = HYPER["betas"]

        def torch_step() -> None:
            torch._fused_adamw_(
                [p.data],
                [grad],
                [m],
                [v],
                [],
                [step],
                beta1=beta1,
                beta2=beta2,
                amsgrad=False,
                maximize=False,
                **scalars,
            )

        return torch_step
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer = DeepSpeedCPUAdam([p], **HYPER)
    if implementation == "reference":
        p.grad = grad
        return optimizer.step
    group = optimizer.param_groups[0]
    lowp_out = torch.zeros(numel, dtype=torch.bfloat16) if write_out else None
    return lambda: optimizer.step_tensor(p, grad, group, grad_scale=grad_scale, lowp_out=lowp_out)


def worker(name: str, numel: int, threads: int) -> None:
    """Runs one step for each line read, and prints how long it took."""
    torch.set_num_threads(threads)
    if CANDIDATES[name][1] == "reference":
        # The checkout must not shadow the installed package.
        here = os.path.dirname(os.path.abspath(__file__))
        sys.path[:] = [entry for entry in sys.path if entry not in ("", here, os.path.dirname(here))]
    step = make_step(name, numel)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


class Worker:
    """A candidate in a process of its own."""

    def __init__(self, python: str, name: str, numel: int, threads: int) -> None:
        env = dict(os.environ, OMP_NUM_THREADS=str(threads))
        if CANDIDATES[name][1] == "reference":
            env.pop("PYTHONPATH", None)
        command = [
            python,
            os.path.abspath(__file__),
            "--worker",
            name,
            "--numel",
            str(numel),
            "--threads",
            str(threads),
        ]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def __call__(self) -> float:
        stdin, stdout = self.process.stdin, self.process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the worker has no pipes")
        stdin.write("step\n")
        stdin.flush()
        for line in stdout:
            if line.startswith('{"seconds"'):  # other lines are what the candidate itself prints
                return float(json.loads(line)["seconds"])
        raise RuntimeError(f"the worker ended with exit code {self.process.wait()}")

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(timeout=60)


def measure(numel: int, threads: int, rounds: int, reference_python: str | None) -> None:
    workers: dict[str, Worker] = {}
    seconds: dict[str, list[float]] = {}
    try:
        for name, (_, implementation, *_) in CANDIDATES.items():
            python = reference_python if implementation == "reference" else sys.executable
            if python is not None:
                workers[name], seconds[name] = Worker(python, name, numel, threads), []
        for i in range(rounds + 2):  # two rounds of warm-up: first touch, thread pools, the reference's build
            for name, run in workers.items():
                taken = run()
                if i >= 2:
                    seconds[name].append(taken)
    finally:
        for run in workers.values():
            run.close()

    def rate(name: str, pick: Callable[[list[float]], float]) -> float:
        return numel * CANDIDATES[name][0] / pick(seconds[name]) / 1e9

    print(f"\n{numel} elements, {threads} thread(s), {rounds} alternating calls")
    for name in seconds:
        median, best = rate(name, statistics.median), rate(name, min)
        ratio, best_ratio = median / rate(BASE, statistics.median), best / rate(BASE, min)
        milliseconds = statistics.median(seconds[name]) * 1e3
        print(
            f"  {name:34} {milliseconds:8.2f} ms  {median:6.1f} GB/s  {ratio:5.2f} x torch"
            f"   (fastest call: {best:6.1f} GB/s  {best_ratio:5.2f} x)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=1 << 25, help="elements of the tensor (default: 33.5M)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts to measure")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each candidate")
    parser.add_argument("--reference-python", help="interpreter that has the reference package installed")
    parser.add_argument("--worker", metavar="CANDIDATE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.numel, args.threads[0])
        return
    for threads in args.threads:
        measure(args.numel, threads, args.rounds, args.reference_python)


if __name__ == "__main__":
    main()
