"""Trains the fixture model with whichever ``deepspeed`` the interpreter has, on several ranks, told what by JSON.

Run by path, with another interpreter than that of the tests: it must import nothing of ``tests`` or of this repository's
package. The only argument is a file with a list of jobs. A job has ``world``, ``config``, ``batches`` (a folder of
fixtures and which of its lists) and optionally ``groups`` (2: vectors without weight decay), ``seed``, ``load``, ``tag``,
``save``; what came of it is appended to the file ``<jobs>.out``, a line of JSON a job: ``ranks`` (losses and what was
loaded, by rank) or ``error`` (tracebacks by rank). Ranks are forked, so that the package is imported once.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from typing import Any

import torch
from fixture_model import FixtureModel, rank_batches

import deepspeed


def train(rank: int, job: dict[str, Any]) -> dict[str, Any]:
    model = FixtureModel(job.get("seed", 7))
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[Any] = trained
    if job.get("groups", 1) == 2:
        matrices, vectors = ([p for p in trained if (p.dim() > 1) == flag] for flag in (True, False))
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    engine = deepspeed.initialize(model=model, model_parameters=groups, config=job["config"])[0]
    result: dict[str, Any] = {}
    if job.get("load"):
        path, client = engine.load_checkpoint(job["load"], tag=job.get("tag"))
        result.update(path=path, epoch=(client or {}).get("epoch"), steps=engine.global_steps, lr=engine.get_lr())
    name, which = job["batches"]
    result["losses"] = []
    for ids, labels in rank_batches(name, rank % 2)[which]:
        loss = engine(ids, labels)
        engine.backward(loss)
        engine.step()
        result["losses"].append(float(loss.detach()))
    if job.get("save"):
        engine.save_checkpoint(job["save"], tag="step3", client_state={"epoch": 2})
    return result


def what_failed() -> str:
    """The exception that is being handled: its message, and functions on the way; no source, which is not ours to read."""
    kind, error, at = sys.exc_info()
    frames = [f"{frame.name} ({os.path.basename(frame.filename)})" for frame in traceback.extract_tb(at)]
    return f"{' > '.join(frames)}: {kind.__name__ if kind else ''}: {error}"


def run_rank(rank: int, job: dict[str, Any], folder: str) -> None:
    """In a process of its own, which ends here."""
    result: dict[str, Any] = {}
    try:
        with open(f"{folder}/log{rank}", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        world = job["world"]
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world))
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        deepspeed.init_distributed("gloo")
        result = {"rank": train(rank, job)}
    except BaseException:
        result = {"error": what_failed()}
    with open(f"{folder}/result{rank}", "w") as file:
        json.dump(result, file)
    os._exit("error" in result)


def run_job(job: dict[str, Any], timeout_s: float = 60) -> dict[str, Any]:
    """Forks the ranks and waits; when one has failed, the others have five seconds left."""
    folder = tempfile.mkdtemp(prefix="black-box-")
    pids: dict[int, int] = {}
    try:
        for rank in range(job["world"]):
            pids[rank] = os.fork()
            if not pids[rank]:
                run_rank(rank, job, folder)
        deadline = time.monotonic() + timeout_s
        waiting = dict(pids)
        while waiting and time.monotonic() < deadline:
            for rank, pid in list(waiting.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    del waiting[rank]
                    deadline = min(deadline, time.monotonic() + 5) if status else deadline
            time.sleep(0.01)
        for pid in waiting.values():
            os.kill(pid, signal.SIGUSR1)  # where it waits
            time.sleep(0.5)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        results = []
        for rank in pids:
            found = os.path.exists(f"{folder}/result{rank}")
            with open(f"{folder}/{'result' if found else 'log'}{rank}") as file:
                results.append(json.load(file) if found else {"error": file.read()[-2000:]})
        errors = {str(rank): result["error"] for rank, result in enumerate(results) if "error" in result}
        return {"error": errors} if errors else {"ranks": [result["rank"] for result in results]}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    with open(sys.argv[1]) as jobs:
        for one in json.load(jobs):
            outcome = run_job(one)
            with open(f"{sys.argv[1]}.out", "a") as out:
                print(json.dumps(outcome), file=out)
