"""A run that is saved at one stage and world size and goes on at another is the run that was never interrupted."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed.runtime.lr_schedules import WarmupLR
from tests.helpers import preload  # noqa: F401 - before ranks are forked
from tests.helpers.ckpt import assert_same, build, by_name, config
from tests.helpers.dist import run_ranks
from tests.helpers.models import Tricky, batches

STAGES, WORLDS = (0, 1, 2, 3), (1, 2, 3, 4)
BATCH, BEFORE, AFTER = 12, 3, 3
# A large eps keeps Adam from turning rounding noise of tiny gradients into full steps.
ADAM = {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-3}
WARMUP = {"warmup_max_lr": 0.02, "warmup_num_steps": 4}

Place = tuple[int, int]  # stage, world size

# Every stage and every world size twice on each side, and never the same on both.
SAMPLE: list[tuple[Place, Place]] = [
    ((0, 1), (3, 4)),
    ((1, 2), (0, 3)),
    ((2, 3), (3, 2)),
    ((3, 4), (1, 1)),
    ((3, 2), (2, 4)),
    ((0, 3), (2, 1)),
    ((1, 4), (0, 2)),
    ((2, 1), (1, 3)),
]
PRODUCT = [(a, b) for a in itertools.product(STAGES, WORLDS) for b in itertools.product(STAGES, WORLDS)]


def model(seed: int) -> Tricky:
    """Tied, reused, frozen, odd, empty and scalar parameters."""
    torch.manual_seed(seed)
    return Tricky(tied=True, reused=True, frozen=True)


def micro_batches(step: int, rank: int, world: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's part of the global batch of a step, in ``count`` pieces."""
    ((x, y),) = batches(0, 1, BATCH, seed=step)
    pieces = zip(x.chunk(world * count), y.chunk(world * count), strict=True)
    return list(pieces)[rank * count : (rank + 1) * count]


def engine_at(stage: int, world: int, dtype: str, seed: int) -> Any:
    accumulation = 1 if world == 4 else 2
    made = config(stage, dtype)
    made["train_micro_batch_size_per_gpu"] = BATCH // world // accumulation
    made["gradient_accumulation_steps"] = accumulation
    made["optimizer"] = {"type": "AdamW", "params": ADAM}
    made["scheduler"] = {"type": "WarmupLR", "params": WARMUP}
    if dtype == "fp16":
        made["fp16"].update(initial_scale_power=8, loss_scale_window=2)
    if stage == 3:
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 12
    return build(made, seed, model(seed))


def go_on(engine: Any, rank: int, world: int, first: int, steps: int) -> list[float]:
    """Losses of the global batch by step. Collective."""
    losses = []
    for step in range(first, first + steps):
        parts = micro_batches(step, rank, world, engine.gradient_accumulation_steps())
        total = torch.zeros(())
        for x, y in parts:
            loss = engine(x, y)
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / len(parts) / world
        torch.distributed.all_reduce(total)
        losses.append(float(total))
    return losses


def plain(rank: int, world: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The whole run in plain torch."""
    net = model(0)
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1]},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **ADAM)
    schedule = WarmupLR(optimizer, **WARMUP)
    losses = []
    for step in range(BEFORE + AFTER):
        ((x, y),) = batches(0, 1, BATCH, seed=step)
        loss = net(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss))
    return losses, {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}


def save_all(rank: int, world: int, folder: str, cases: list[tuple[int, str]]) -> dict[tuple[int, str], Any]:
    """Saves after the first steps; returns losses, the state then, and the state of the same run at its end."""
    kept = {}
    for stage, dtype in cases:
        engine = engine_at(stage, world, dtype, seed=0)
        losses = go_on(engine, rank, world, 0, BEFORE)
        engine.save_checkpoint(folder, tag=f"{stage}-{world}-{dtype}")
        saved, scale = by_name(engine), engine.loss_scale
        losses += go_on(engine, rank, world, BEFORE, AFTER)
        kept[stage, dtype] = saved, scale, losses, by_name(engine)
        engine.destroy()
    return kept


def load_all(rank: int, world: int, folder: str, cases: list[tuple[Place, int, str]], runs: Any, truth: Any) -> None:
    for (stage, saved_world), target, dtype in cases:
        what = f"{dtype}: stage {stage} of {saved_world} ranks into stage {target} of {world}"
        saved, scale, losses, final = runs[saved_world][stage, dtype]
        engine = engine_at(target, world, dtype, seed=5)
        engine.load_checkpoint(folder, tag=f"{stage}-{saved_world}-{dtype}")
        assert_same(by_name(engine), saved, what)
        assert {float(state["step"]) for state in engine.basic_optimizer.state.values()} == {float(BEFORE)}
        assert (engine.global_steps, engine.global_samples) == (BEFORE, BEFORE * BATCH)
        assert engine.loss_scale == scale and (dtype != "fp16" or scale == 2**9)
        assert engine.lr_scheduler.last_batch_iteration == BEFORE - 1
        went_on = go_on(engine, rank, world, BEFORE, AFTER)
        got = by_name(engine)
        if (target, world) == (stage, saved_world):
            assert went_on == losses[BEFORE:], what
            assert_same(got, final, what)
        reference, weights = truth if dtype == "fp32" else (losses, final)
        tolerance = 2e-5 if dtype == "fp32" else 3e-2
        torch.testing.assert_close(
            went_on, reference[BEFORE:], rtol=tolerance, atol=0, msg=lambda m, w=what: f"{w}: {m}"
        )
        for name, param in engine.module.named_parameters():
            if param.requires_grad and param.numel():
                close = {"rtol": tolerance, "atol": tolerance * float(weights[name].abs().max())}
                torch.testing.assert_close(
                    got[name], weights[name], **close, msg=lambda m, w=what, n=name: f"{w}: {n}: {m}"
                )
        engine.destroy()


def run(folder: Path, pairs: list[tuple[Place, Place]], dtypes: tuple[str, ...], timeout_s: float = 120) -> None:
    (truth,) = run_ranks(plain, 1)
    runs = {}
    for world in sorted({world for (_, world), _ in pairs}):
        stages = sorted({stage for (stage, w), _ in pairs if w == world})
        cases = [(stage, dtype) for stage in stages for dtype in dtypes]
        runs[world] = run_ranks(save_all, world, str(folder), cases, timeout_s=timeout_s)[0]
        for losses in (runs[world][stage, "fp32"][2] for stage in stages if "fp32" in dtypes):
            torch.testing.assert_close(losses, truth[0], rtol=2e-5, atol=0)
    for world in sorted({world for _, (_, world) in pairs}):
        into = [(a, b[0], dtype) for a, b in pairs if b[1] == world for dtype in dtypes]
        run_ranks(load_all, world, str(folder), into, runs, truth, timeout_s=timeout_s)


def test_a_sample_of_places(tmp_path: Path) -> None:
    run(tmp_path, SAMPLE, ("fp32", "bf16"))


def test_the_loss_scale_goes_along(tmp_path: Path) -> None:
    run(tmp_path, [((2, 2), (3, 3)), ((3, 2), (0, 1)), ((0, 2), (1, 3))], ("fp16",))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_all_places(tmp_path: Path, dtype: str) -> None:
    run(tmp_path, PRODUCT, (dtype,), timeout_s=900)
