"""Saving, loading and exporting a 300 M-parameter model with Adam state: time, and peak memory beside the training.

    python benchmarks/checkpoint.py --reference-python REF/bin/python --folder /scratch

Two ranks train two steps in bf16 and save, once to warm up and then `--rounds` times. New processes load it, on as many,
half and twice as many ranks, from a cold page cache, `--rounds` times each. Right before and after every save one of the
ranks writes as many bytes in order to a new file, by the faster of buffered and direct I/O; right before and after every
load it reads the same files in order, by direct I/O; both from and to memory in huge pages, which virtual disks need. Times
are medians, and */disk* is the median of the ratios, each to the disk as it was just then: on shared hosts a disk's rate
changes by half within a minute.

| candidate | what it is |
| --- | --- |
| `ours0` .. `ours3` | `save_checkpoint`, `load_checkpoint` of this package at that stage |
| `ours2_async`, `ours3_async` | the same with `checkpoint.async_save`; *blocked* is what training waits for |
| `reference2`, `reference3` | the released package |
| `torch` | DDP; rank 0 `torch.save`s model and optimizer, every rank `torch.load`s them (mmap) |
| `dcp` | FSDP2 with `torch.distributed.checkpoint` |

Memory is the larger rank's peak during the call, above what was resident before it. No load is faster than the new memory
that its moments need, so two processes filling as much are measured, too.

On a virtual machine new memory may come slowly, so loads are measured a second time with *memory ready*: see ready.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ADAM = {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}


# -- one rank ----------------------------------------------------------------------------------------------------------


def _status_nbytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


@contextlib.contextmanager
def _measured(found: dict[str, Any], name: str) -> Iterator[None]:
    """Seconds of a block, and the peak of resident memory above what was there."""
    import torch.distributed as dist

    dist.barrier()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before, started = _status_nbytes("VmRSS"), time.perf_counter()
    yield
    found[f"{name}_s"] = time.perf_counter() - started
    found[f"{name}_peak"] = _status_nbytes("VmHWM") - before
    dist.barrier()


@contextlib.contextmanager
def _paired(args: argparse.Namespace, found: dict[str, Any], folder: Path, turn: int) -> Iterator[None]:
    """One save, and the disk before and after it; both are added to lists. The first warms up."""
    import torch.distributed as dist

    def rate() -> float:
        if args.candidate.startswith("ours"):
            from deepspeed._core.ckpt.staging import wait_for_removals

            wait_for_removals()  # the checkpoint that was replaced
        os.sync()
        dist.barrier()
        # As many bytes as the save: bursts of a disk that throttles are then the same for both.
        warm = [path for name in ("warm", "warm.pt") for path in files(folder / name)]
        return write_rate(folder.parent, sum(path.stat().st_size for path in warm)) if turn and args.rank == 0 else 0.0

    before = rate()
    os.sync()  # the disk hears of what was removed now, not during the save
    with _measured(found, "turn"):
        yield
    after = rate()
    if turn:
        found.setdefault("saves", []).append(found["turn_s"])
        found.setdefault("disk_writes", []).append((before + after) / 2)
        found["save_s"], found["save_peak"] = statistics.median(found["saves"]), found["turn_peak"]


@contextlib.contextmanager
def _measured_load(args: argparse.Namespace, found: dict[str, Any]) -> Iterator[None]:
    """One load, and the disk right before and after it: one process reads the very same files in order."""
    import torch.distributed as dist
    from ready import memory_ready

    rates = []

    def rate() -> None:
        rates.append(read_rate(Path(args.folder)) if args.rank == 0 else 0.0)
        dist.barrier()

    needed = _NEEDED_PER_PARAMETER * found["parameters"] // args.world if args.ready else 0
    with memory_ready(needed, rate), _measured(found, "load"):
        yield
    rate()
    found["disk_read"] = statistics.fmean(rates)


_NEEDED_PER_PARAMETER = 20  # bytes: masters, moments, and room for what is thrown away


def _engine(args: argparse.Namespace, model: Any, found: dict[str, Any]) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": ADAM},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": int(args.candidate.split("_")[0][-1])},
    }
    if args.candidate.endswith("_async"):
        config["checkpoint"] = {"async_save": True}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    found["origin"] = deepspeed.__file__
    return engine


def worker(args: argparse.Namespace) -> dict[str, Any]:
    """Does what the driver asked for, on one rank, and returns what it took."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    sys.path.insert(0, str(HERE))
    from gpt import GPT, Shape

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    shape = Shape(layers=args.layers, hidden=args.hidden, heads=16, vocabulary=8192, sequence=args.tokens)
    model = GPT(shape)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    tokens = torch.randint(8192, (1, args.tokens + 1), generator=torch.Generator().manual_seed(args.rank))
    x, y = tokens[:, :-1], tokens[:, 1:]
    folder = Path(args.folder)
    if args.do == "fill":
        # What a load cannot be faster than: a rank's part of masters and Adam's state, as new memory.
        from deepspeed._core.pages import empty_flat

        numel = found["parameters"] // args.world
        with _measured(found, "fill"):
            held = [empty_flat(numel, torch.float32).fill_(1) for _ in range(2 if args.candidate == "moments" else 3)]
        del held
    elif args.candidate.startswith(("ours", "reference")):
        _drive_engine(args, _engine(args, model, found), x, y, folder, found)
    else:
        _drive_torch(args, model, x, y, folder, found)
    dist.barrier()
    return found


def _drive_engine(args: argparse.Namespace, engine: Any, x: Any, y: Any, folder: Path, found: dict[str, Any]) -> None:
    def step() -> float:
        started = time.perf_counter()
        engine.backward(engine(x, y))
        engine.step()
        return time.perf_counter() - started

    if args.do == "load":
        with _measured_load(args, found):
            path, _ = engine.load_checkpoint(str(folder))
        if path is None:
            raise RuntimeError("nothing was loaded")
        found["step_s"] = step()
        return
    step()
    plain = step()
    background = args.candidate.endswith("_async")
    for turn in range(args.rounds + 1):
        with _paired(args, found, folder, turn):
            engine.save_checkpoint(str(folder), tag="save" if turn else "warm")
        if background:
            frozen = _time_freezing()
            found["beside_s"] = step()
            found["freeze_s"] = frozen[0]
            found["plain_step_s"] = plain
            started = time.perf_counter()
            engine._saver.settle()
            found["settle_s"] = time.perf_counter() - started


def _time_freezing() -> list[float]:
    """Seconds spent from now on with copying what the next step is about to change."""
    from deepspeed._core.ckpt.archive import Archive

    spent = [0.0]
    real = Archive.__dict__["freeze"]

    def timed(self: Any) -> None:
        started = time.perf_counter()
        real(self)
        spent[0] += time.perf_counter() - started

    Archive.freeze = timed  # type: ignore[method-assign]
    return spent


def _drive_torch(args: argparse.Namespace, model: Any, x: Any, y: Any, folder: Path, found: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    if args.candidate == "dcp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (args.world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **{**ADAM, "betas": tuple(ADAM["betas"])})

    def step() -> None:
        model(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    folder.mkdir(exist_ok=True)
    if args.do == "load":
        with _measured_load(args, found):
            if args.candidate == "dcp":
                weights, state = get_state_dict(model, optimizer)
                content = {"model": weights, "optimizer": state}
                dcp.load(content, checkpoint_id=folder / "save")
                set_state_dict(
                    model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"]
                )
            else:
                content = torch.load(folder / "save.pt", mmap=True, weights_only=True)
                model.load_state_dict(content["model"])
                optimizer.load_state_dict(content["optimizer"])
        return
    for turn in range(args.rounds + 1):
        name = "save" if turn else "warm"
        with _paired(args, found, folder, turn):
            if args.candidate == "dcp":
                weights, state = get_state_dict(model, optimizer)
                dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / name)
            elif dist.get_rank() == 0:
                with open(folder / f"{name}.pt", "wb") as stream:
                    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stream)
                    stream.flush()
                    os.fsync(stream.fileno())


# -- the driver --------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(
    args: argparse.Namespace, candidate: str, do: str, world: int, folder: Path, ready: bool = False
) -> dict[str, Any]:
    """Runs one candidate on ``world`` fresh processes; the slower rank's times, the larger one's memory."""
    reference = candidate.startswith("reference")
    python = args.reference_python if reference else sys.executable
    port = free_port()
    ranks = []
    with tempfile.TemporaryDirectory() as place:
        for rank in range(world):
            env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DS_ACCELERATOR")}
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
            env |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(world)}
            env |= {"DS_ACCELERATOR": "cpu"} if reference else {"PYTHONPATH": str(HERE.parent)}
            command = [python, str(HERE / "checkpoint.py"), "--worker", "--candidate", candidate, "--do", do]
            command += ["--rank", str(rank), "--world", str(world), "--folder", str(folder)]
            command += ["--layers", str(args.layers), "--hidden", str(args.hidden), "--tokens", str(args.tokens)]
            command += ["--rounds", str(args.rounds), "--answer", f"{place}/{rank}", *(["--ready"] if ready else [])]
            log = open(f"{place}/{rank}.log", "w")  # noqa: SIM115 - closed with the folder
            ranks.append(
                (subprocess.Popen(command, env=env, cwd=place, stdout=log, stderr=log), Path(f"{place}/{rank}.log"))
            )
        failed = [(rank, path) for rank, (process, path) in enumerate(ranks) if process.wait()]
        if failed:
            raise RuntimeError(f"{candidate} {do}: rank {failed[0][0]} failed:\n{failed[0][1].read_text()[-2000:]}")
        answers = [json.loads(Path(f"{place}/{rank}").read_text()) for rank in range(world)]

    def worst(key: str) -> Any:
        values = [answer[key] for answer in answers]
        if isinstance(values[0], list):
            return [max(turn) for turn in zip(*values, strict=True)]
        return values[0] if isinstance(values[0], str) else max(values)

    return {key: worst(key) for key in answers[0]}


def forget(folder: Path) -> int:
    """Drops the files below from the page cache; returns their size."""
    nbytes = 0
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
            nbytes += path.stat().st_size
    return nbytes


_DISK_BLOCK = 16 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)


def files(path: Path) -> list[Path]:
    """The files below a folder, in order; a file itself; nothing."""
    return sorted(one for one in (path.rglob("*") if path.is_dir() else [path]) if one.is_file())


def _buffer() -> mmap.mmap:
    buffer = mmap.mmap(-1, _DISK_BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.madvise(mmap.MADV_HUGEPAGE)
    buffer.write(os.urandom(_DISK_BLOCK))
    return buffer


def write_rate(folder: Path, nbytes: int) -> float:
    """Bytes a second that one process writes in order to a new file, synced: the faster of buffered and direct."""
    global _write_flag
    if _write_flag is None:
        rates = {flag: _write(folder / "rate.bin", 1 << 30, flag) for flag in (0, _DIRECT)}
        _write_flag = max(rates, key=lambda flag: rates[flag])
    return _write(folder / "rate.bin", nbytes, _write_flag)


_write_flag: int | None = None


def _write(path: Path, nbytes: int, flag: int) -> float:
    with _buffer() as buffer:
        started = time.perf_counter()
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | flag)
        for _ in range(0, nbytes, _DISK_BLOCK):
            os.writev(handle, [buffer])
        os.fsync(handle)
        seconds = time.perf_counter() - started
        os.close(handle)
        path.unlink()
    return nbytes / seconds


def read_rate(folder: Path) -> float:
    """Bytes a second at which one process reads the files of a folder in order, past the page cache."""
    nbytes = 0
    with _buffer() as buffer:
        started = time.perf_counter()
        for path in files(folder):
            handle = os.open(path, os.O_RDONLY | _DIRECT)
            while count := os.readv(handle, [buffer]):
                nbytes += count
            os.close(handle)
        return nbytes / (time.perf_counter() - started)


def export(folder: Path, out: Path) -> dict[str, float]:
    """Seconds and peak memory of the script in the folder, writing safetensors."""
    import resource

    started = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    command = [
        sys.executable,
        str(folder / "zero_to_fp32.py"),
        str(folder),
        str(out),
        "--safe_serialization",
        "-t",
        "save",
    ]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    shutil.rmtree(out, ignore_errors=True)
    return {"export_s": seconds, "export_peak": (peak if peak > before else 0) * 1024}


def measure(args: argparse.Namespace, candidate: str, root: Path) -> dict[str, Any]:
    folder = root / candidate / "checkpoint"
    folder.parent.mkdir()
    found = run(args, candidate, "save", 2, folder)
    shutil.rmtree(folder / "warm", ignore_errors=True)
    (folder / "warm.pt").unlink(missing_ok=True)
    found["nbytes"] = forget(folder)
    found["save_of_disk"] = of_disk(found["nbytes"], found["saves"], found["disk_writes"])
    base = candidate.removesuffix("_async")
    kinds = [(world, ready) for world in args.worlds for ready in ((True, False) if world == 2 else (True,))]
    if candidate != base:
        kinds = []
    elif not candidate.startswith("ours"):
        # The released package refuses other world sizes; for torch's formats they are not the question.
        kinds = [kind for kind in kinds if kind[0] == 2]
    for _ in range(args.rounds):
        for world, ready in kinds:
            try:
                load_once(args, base, world, ready, folder, found)
            except RuntimeError as error:
                print(error, file=sys.stderr)
    for world, ready in kinds:
        name = kind_name(world, ready)
        if name in found:
            found[f"{name}_s"] = statistics.median(found[name])
            found[f"{name}_of_disk"] = of_disk(found["nbytes"], found[name], found[f"{name}_reads"])
    if candidate.startswith("ours") and candidate == base:
        found["moments_s"] = run(args, "moments", "fill", 2, folder)["fill_s"]
        forget(folder)
        found |= export(folder, root / "export")
    shutil.rmtree(folder.parent)
    return found


def kind_name(world: int, ready: bool) -> str:
    return f"load{world}" if ready else f"cold{world}"


def load_once(
    args: argparse.Namespace, candidate: str, world: int, ready: bool, folder: Path, found: dict[str, Any]
) -> None:
    """One load, and the disk around it."""
    forget(folder)
    loaded = run(args, candidate, "load", world, folder, ready)
    name = kind_name(world, ready)
    found.setdefault(name, []).append(loaded["load_s"])
    found.setdefault(f"{name}_reads", []).append(loaded["disk_read"])
    found[f"{name}_peak"] = loaded["load_peak"]


def of_disk(nbytes: int, seconds: list[float], rates: list[float]) -> float:
    """The median ratio of a rate to the disk's."""
    return statistics.median(nbytes / s / rate for s, rate in zip(seconds, rates, strict=True))


def table(results: dict[str, dict[str, Any]]) -> str:
    """One row a candidate."""
    head = ("candidate", 12), ("GB", 5), ("save s", 7), ("GB/s", 5), ("/disk", 6), ("MiB", 6)
    head += (
        ("load s", 7),
        ("GB/s", 5),
        ("/disk", 6),
        ("MiB", 6),
        ("at 1", 6),
        ("at 4", 6),
        ("fresh", 6),
        ("export", 7),
        ("blocked", 8),
    )
    lines = [" ".join(f"{text:{width}}" if text == "candidate" else f"{text:>{width}}" for text, width in head)]
    for name, r in results.items():
        size = r["nbytes"] / 1e9
        background = name.endswith("_async")
        total = r["save_s"] + (r["beside_s"] + r["settle_s"] if background else 0)
        ratio = size / total / statistics.median(r["disk_writes"]) * 1e9 if background else r["save_of_disk"]
        row = f"{name:12} {size:5.2f} {total:7.2f} {size / total:5.2f} {ratio:6.2f} "
        row += f"{r['save_peak'] / 2**20:6.0f} "
        if "load2_s" in r:
            rate = size / r["load2_s"]
            row += f"{r['load2_s']:7.2f} {rate:5.2f} {r['load2_of_disk']:6.2f} {r['load2_peak'] / 2**20:6.0f} "
        else:
            row += f"{'':28}"
        row += " ".join(f"{r[key]:6.2f}" if key in r else f"{'':6}" for key in ("load1_s", "load4_s", "cold2_s")) + " "
        row += f"{r['export_s']:7.2f} " if "export_s" in r else f"{'':8}"
        row += f"{r['save_s'] + r['freeze_s']:8.2f}" if background else ""
        row += f" (step {r['plain_step_s']:.2f} alone, {r['beside_s']:.2f} beside)" if background else ""
        lines.append(row)
    lines += [
        f"{name}: two ranks filled as much new memory as the moments take in {r['moments_s']:.2f} s"
        for name, r in results.items()
        if "moments_s" in r
    ]
    for name, r in results.items():
        for what in ("saves", "load2", "load1", "load4", "cold2"):
            rates = r.get("disk_writes" if what == "saves" else f"{what}_reads")
            if rates:
                turns = ", ".join(f"{s:.2f} ({rate / 1e9:.2f})" for s, rate in zip(r[what], rates, strict=True))
                lines.append(f"{name} {what}: s (the disk then, GB/s): {turns}")
    lines.append("load, at 1, at 4: with memory ready; fresh: the first again, with memory as the machine gives it")
    lines.append(
        "blocked: seconds in save_checkpoint and copying before the next step; the thread shares the cores, too."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", default="ours2,ours2_async,ours3,ours3_async,torch,dcp")
    parser.add_argument("--reference-python", default="", help="interpreter of a venv that has the released package")
    parser.add_argument(
        "--folder", default="", help="where to write (several GB); default: the system's temporary folder"
    )
    parser.add_argument("--layers", type=int, default=23)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a rank's training step")
    parser.add_argument("--worlds", type=lambda text: [int(w) for w in text.split(",")], default=[2, 1, 4])
    parser.add_argument("--rounds", type=int, default=3, help="saves, and loads of each kind")
    parser.add_argument("--json", default="")
    for name in ("--candidate", "--do", "--answer"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--rank", "--world"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    for name in ("--worker", "--ready"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        Path(args.answer).write_text(json.dumps(worker(args)))
        return
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder or None) as root:
        for candidate in args.candidates.split(","):
            print(f"measuring {candidate}", file=sys.stderr, flush=True)
            try:
                results[candidate] = measure(args, candidate, Path(root))
            except RuntimeError as error:
                print(f"FAILED {error}", file=sys.stderr)
            shutil.rmtree(Path(root) / candidate, ignore_errors=True)
            if args.json:  # after each, so that a run that is cut short leaves something
                Path(args.json).write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
