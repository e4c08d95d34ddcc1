"""Engines, training and comparison for the checkpoint tests."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

import deepspeed
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from tests.helpers.models import Tricky, batches


class Noisy(Tricky):
    """With dropout, so that runs agree only if their random numbers do."""

    def forward(self, x: torch.Tensor, target: torch.Tensor, use_extra: bool = True) -> torch.Tensor:
        return super().forward(torch.nn.functional.dropout(x, 0.2, training=self.training), target, use_extra)


ADAMW = {"type": "AdamW", "params": {"lr": 0.02, "weight_decay": 0.1}}


def config(stage: int = 2, dtype: str = "fp32", **extra: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "optimizer": ADAMW,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 6}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 150},
        "steps_per_print": 1000000,
    }
    if dtype == "bf16":
        made["bf16"] = {"enabled": True}
    if dtype == "fp16":
        # Overflows at first, then grows: the scale has a history to be restored.
        made["fp16"] = {"enabled": True, "initial_scale_power": 25, "hysteresis": 1, "loss_scale_window": 3}
    return {**made, **extra}


def build(
    settings: dict[str, Any],
    seed: int = 0,
    model: torch.nn.Module | None = None,
    groups: bool = True,
    **initialize: Any,
) -> Any:
    """An engine with two parameter groups (matrices; the rest without decay), unless an optimizer is given."""
    torch.manual_seed(seed)
    if model is None:
        model = Noisy(tied=True, reused=True, frozen=True)
    if groups and "optimizer" not in initialize:
        trained = [p for p in model.parameters() if p.requires_grad]
        initialize.setdefault(
            "model_parameters",
            [
                {"params": [p for p in trained if p.dim() > 1]},
                {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
            ],
        )
    torch.manual_seed(99)
    return deepspeed.initialize(model=model, config=settings, **initialize)[0]


def train(engine: Any, rank: int, steps: int, seed: int, dropout_seed: int | None = None) -> list[float]:
    if dropout_seed is not None:
        torch.manual_seed(dropout_seed)
    losses = []
    for x, y in batches(rank, steps * engine.gradient_accumulation_steps(), seed=seed):
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def whole(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the values in the module's state dict, partitioned or not. Collective."""
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return {name: value.clone() for name, value in module.state_dict().items()}


def by_name(engine: Any, *, fresh: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """Masters, moments and weights by parameter name, whatever the shards are. Collective.

    Of ``fresh`` parameters, moments that the optimizer has not made yet are zeros.
    """
    values = {f"module.{name}": value for name, value in whole(engine.module).items()}
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            values[name] = safe_get_full_fp32_param(param).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                try:
                    values[f"{name}.{key}"] = safe_get_full_optimizer_state(param, key).clone()
                except ValueError:  # on all ranks
                    if name not in fresh:
                        raise
                    values[f"{name}.{key}"] = torch.zeros_like(values[name])
    return values


def snapshot(engine: Any) -> dict[str, Any]:
    """Everything that a resumed run must have in common with one that went on. Collective."""
    state: dict[str, Any] = {f"module.{k}": v for k, v in whole(engine.module).items()}
    if engine._flat is None:
        return state
    for slot in engine._flat.slots():
        state[f"master.{slot.name}"] = safe_get_full_fp32_param(slot.param).clone()
    for index, bucket in enumerate(engine._flat.buckets):
        for number, master in enumerate(engine._flat.master_of(bucket)):
            for key, value in engine.basic_optimizer.state.get(master, {}).items():
                state[f"state.{index}.{number}.{key}"] = value.clone() if torch.is_tensor(value) else value
    for index, group in enumerate(engine.basic_optimizer.param_groups):
        state[f"group.{index}"] = {k: v for k, v in group.items() if k != "params"}
    state["scaler"] = dict(vars(engine._flat.loss_scaler))
    if hasattr(engine.lr_scheduler, "state_dict"):
        state["scheduler"] = dict(engine.lr_scheduler.state_dict())
    state["counters"] = (engine.global_steps, engine.global_samples, engine.skipped_steps, engine.micro_steps)
    return state


def assert_same(one: dict[str, Any], two: dict[str, Any], what: str = "") -> None:
    """Bit-equal."""
    assert one.keys() == two.keys(), f"{what}: {sorted(one.keys() ^ two.keys())}"
    for key, value in one.items():
        other = two[key]
        if torch.is_tensor(value):
            assert value.dtype == other.dtype and value.shape == other.shape, f"{what}: {key}"
            assert torch.equal(value, other), f"{what}: {key} differs by {(value.float() - other.float()).abs().max()}"
        else:
            assert value == other, f"{what}: {key}: {value} != {other}"
