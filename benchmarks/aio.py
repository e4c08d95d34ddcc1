"""How fast tensors go to a file and back: ours against fio with the same block size, depth and file.

    python benchmarks/aio.py --folder /local_nvme
    python benchmarks/aio.py --folder /local_nvme --block-size 1M --depth 8 --threads 4 --rounds 7

Candidates take turns on one file that is there already, so that what drifts on the machine and what space costs to get
meets them alike; direct I/O all. Medians and best rounds are compared. Without fio, the yardstick is a loop of one
``pread`` or ``pwrite`` after the other. The file is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable

import torch

from deepspeed._core.aio import DataFile, FileIO, aligned_empty
from deepspeed.nvme.sizes import parse_nbytes


def fio(path: str, nbytes: int, block_nbytes: int, depth: int, engine: str) -> Callable[[str], float]:
    """One pass over the file by fio; GB/s as it reports them."""

    def run(operation: str) -> float:
        command = ["fio", "--name=pass", f"--filename={path}", f"--size={nbytes}", f"--bs={block_nbytes}"]
        command += [f"--iodepth={depth}", f"--ioengine={engine}", "--direct=1", f"--rw={operation}", "--thread"]
        command += ["--output-format=json", "--fallocate=none", "--overwrite=1"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        report = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][operation]
        return float(report["bw_bytes"]) / 1e9

    return run


def plain(path: str, nbytes: int, block_nbytes: int) -> Callable[[str], float]:
    """One call after the other, as dd does."""
    view = memoryview(mmap.mmap(-1, block_nbytes))

    def run(operation: str) -> float:
        descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
        call = os.preadv if operation == "read" else os.pwritev
        start = time.perf_counter()
        for offset in range(0, nbytes, block_nbytes):
            call(descriptor, [view], offset)
        seconds = time.perf_counter() - start
        os.close(descriptor)
        return nbytes / seconds / 1e9

    return run


def ours(path: str, tensor: torch.Tensor, block_nbytes: int, depth: int, threads: int) -> Callable[[str], float]:
    io = FileIO(block_nbytes, depth, threads)

    def run(operation: str) -> float:
        with DataFile(path, write=True) as file:
            if not file.direct:
                raise SystemExit(f"{path}: this filesystem has no direct I/O, there is nothing to compare")
            start = time.perf_counter()
            (io.read if operation == "read" else io.write)(tensor, file).wait()
            return tensor.numel() / (time.perf_counter() - start) / 1e9

    return run


def measure(args: argparse.Namespace, path: str) -> None:
    nbytes, block_nbytes = parse_nbytes(args.size), parse_nbytes(args.block_size)
    tensor = aligned_empty(nbytes).random_()
    candidates = {"plain loop": plain(path, nbytes, block_nbytes)}
    if shutil.which("fio"):
        for engine in args.engines:
            candidates[f"fio {engine}"] = fio(path, nbytes, block_nbytes, args.depth, engine)
    yardsticks = [name for name in candidates if name.startswith("fio")] or ["plain loop"]
    for threads in args.threads:
        candidates[f"ours, {threads} thread(s)"] = ours(path, tensor, block_nbytes, args.depth, threads)
    # fio's buffers lie in pages of 4 KiB, which a disk takes in more parts: what our memory alone gains.
    small = torch.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
    candidates["ours, 4 KiB pages"] = ours(path, small.copy_(tensor), block_nbytes, args.depth, args.threads[-1])
    with FileIO() as io:
        io.write(tensor, path).wait()
    print(f"{nbytes >> 20} MiB in {path}, block {args.block_size}, depth {args.depth}, {args.rounds} rounds; GB/s")
    for operation in ("write", "read"):
        rates: dict[str, list[float]] = {name: [] for name in candidates}
        for index in range(args.rounds + 1):
            for name, run in candidates.items():
                rate = run(operation)
                if index:  # the first round warms up
                    rates[name].append(rate)
        median = max(statistics.median(rates[name]) for name in yardsticks)
        best = max(max(rates[name]) for name in yardsticks)
        for name, found in rates.items():
            middle, most = statistics.median(found), max(found)
            print(
                f"  {operation:5}  {name:20} median {middle:5.2f}  {middle / median:4.2f} x best yardstick"
                f"   best {most:5.2f}  {most / best:4.2f} x"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=None, help="on the disk to measure (default: the temp folder)")
    parser.add_argument("--size", default="512M", help="of the file")
    parser.add_argument("--block-size", default="1M")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=[4], help="of ours; several are compared")
    parser.add_argument("--engines", nargs="+", default=["libaio", "io_uring"], help="of fio")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deepspeed-aio-", dir=args.folder) as folder:
        measure(args, os.path.join(folder, "file"))


if __name__ == "__main__":
    main()
