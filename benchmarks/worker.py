"""One rank of one candidate of train_step.py: sets up, then runs steps when told and blocks on its pipe when not.

Speaks JSON lines: a command on stdin ({"do": "steps", "count": 3}), one answer on the descriptor that was stdout.
Everything else that a library prints goes to stderr, which the driver keeps as this rank's log. This file, gpt.py and
ready.py import nothing of the repository, so that the released package can be measured by the same code from its own venv.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ADAM = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
"""Given in full to every candidate: their defaults differ."""

Step = Callable[[list[tuple[Any, Any]]], Any]
"""Takes one optimizer step over a list of micro-batches (x, y); returns the last micro-batch's loss, a tensor."""


def zero_config(args: argparse.Namespace, stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": args.micro_batch,
        "gradient_accumulation_steps": args.accumulation,
        "gradient_clipping": args.clipping,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {**ADAM, "betas": list(ADAM["betas"])}},
        "bf16": {"enabled": args.dtype == "bf16"},
        "zero_optimization": {"stage": stage},
        **json.loads(args.config),
    }


def stage_of(candidate: str) -> int:
    """The ZeRO stage in a name such as `ours3` or `reference3_init`."""
    return int(candidate.removesuffix("_init")[-1])


def deepspeed_step(args: argparse.Namespace, model: Any, stage: int) -> Step:
    """Ours or the released package: the same calls; which one it is was decided by the interpreter and PYTHONPATH."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=zero_config(args, stage))

    def step(batches: list[tuple[Any, Any]]) -> Any:
        for x, y in batches:
            loss = engine(x, y)
            engine.backward(loss)
            engine.step()
        return loss

    return step


def ddp_step(args: argparse.Namespace, model: Any, variant: str) -> Step:
    """DDP with torch's fused AdamW.

    In bf16 `ddp` is the cheapest that there is: a pure bf16 module with bf16 optimizer state and no fp32 masters
    (less arithmetic and memory than any ZeRO stage, and worse training); `ddp_autocast` keeps fp32 weights.
    `ddp_view` is `ddp` with gradient_as_bucket_view, which saves the second copy of the gradients.
    """
    import torch
    from torch.nn.parallel import DistributedDataParallel

    autocast = variant == "ddp_autocast" and args.dtype == "bf16"
    if args.dtype == "bf16" and not autocast:
        model = model.to(torch.bfloat16)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=variant == "ddp_view")
    optimizer = torch.optim.AdamW(ddp.parameters(), fused=True, **ADAM)

    def step(batches: list[tuple[Any, Any]]) -> Any:
        for i, (x, y) in enumerate(batches):
            with ddp.no_sync() if i + 1 < len(batches) else contextlib.nullcontext():
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = ddp(x, y)
                (loss / len(batches)).backward()
        if args.clipping:
            torch.nn.utils.clip_grad_norm_(ddp.parameters(), args.clipping)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def fsdp2_step(args: argparse.Namespace, model: Any) -> Step:
    """fully_shard of each block and of the root; in bf16 with fp32 shards and fp32 reduction, as ZeRO keeps masters."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (args.world,))
    bf16 = args.dtype == "bf16"
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else None
    options = {"mesh": mesh, **({"mp_policy": policy} if policy else {})}
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAM)

    def step(batches: list[tuple[Any, Any]]) -> Any:
        for i, (x, y) in enumerate(batches):
            model.set_requires_gradient_sync(i + 1 == len(batches))
            loss = model(x, y)
            (loss / len(batches)).backward()
        if args.clipping:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clipping)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def build(args: argparse.Namespace, model: Any) -> Step:
    if args.candidate.startswith(("ours", "reference")):
        return deepspeed_step(args, model, stage_of(args.candidate))
    if args.candidate == "fsdp2":
        return fsdp2_step(args, model)
    return ddp_step(args, model, args.candidate)


def memory() -> dict[str, int]:
    """Resident, unique and peak resident bytes of this process. Reading starts a new peak where the kernel allows."""
    import psutil

    info = psutil.Process().memory_full_info()
    status = Path("/proc/self/status").read_text()
    peak_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return {"rss": info.rss, "uss": info.uss, "peak": peak_kb * 1024}


def serve(args: argparse.Namespace, answer: Any) -> None:
    started = time.perf_counter()
    import torch
    import torch.distributed as dist

    torch_s = time.perf_counter() - started
    torch.set_num_threads(args.threads)
    facts: dict[str, Any] = {"import_torch_s": torch_s, "import_s": 0.0, "origin": ""}
    if args.candidate.startswith(("ours", "reference")):
        started = time.perf_counter()
        import deepspeed

        facts |= {"import_s": time.perf_counter() - started, "origin": f"{deepspeed.__version__} {deepspeed.__file__}"}
    from gpt import GPT, Shape
    from ready import memory_ready

    facts["base"] = memory()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    shape = Shape(**json.loads(args.shape))
    if args.candidate.endswith("_init"):
        with deepspeed.zero.Init(config_dict_or_path=zero_config(args, stage_of(args.candidate))):
            model = GPT(shape)
    else:
        model = GPT(shape)
    facts["parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    dist.barrier()
    with memory_ready(args.ready_mib << 20):
        started = time.perf_counter()
        step = build(args, model)
        facts["initialize_s"] = time.perf_counter() - started
    del model
    print(json.dumps(facts), file=answer, flush=True)

    generator = torch.Generator().manual_seed(1 + args.rank)  # ranks differ, candidates do not
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "stop":
            return
        if command["do"] == "memory":
            print(json.dumps(memory()), file=answer, flush=True)
            continue
        times, loss = [], None
        for _ in range(command["count"]):
            size = (args.accumulation, args.micro_batch, shape.sequence + 1)
            tokens = torch.randint(shape.vocabulary, size, generator=generator)
            batches = [(t[:, :-1], t[:, 1:]) for t in tokens]
            dist.barrier()
            started = time.perf_counter()
            loss = step(batches)
            times.append(time.perf_counter() - started)
        print(json.dumps({"times": times, "loss": float(loss.detach())}), file=answer, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--candidate", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--micro-batch", type=int, required=True)
    parser.add_argument("--accumulation", type=int, required=True)
    parser.add_argument("--clipping", type=float, required=True)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), required=True)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--core", type=int)
    parser.add_argument("--ready-mib", type=int, default=0)
    args = parser.parse_args()
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(args, answer)
    answer.flush()
    os._exit(0)  # interpreter shutdown with live process groups is slow and not what is measured


if __name__ == "__main__":
    main()
