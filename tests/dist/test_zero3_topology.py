"""MiCS, hpZ and quantised communication through the engine, against plain stage 3."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deepspeed
from deepspeed import comm
from tests.helpers import preload  # noqa: F401 (imports before the fork)
from tests.helpers.dist import run_ranks

STEPS = 4


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(width, 4 * width)
        self.down = torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def _model(frozen: bool = False) -> torch.nn.Module:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(12, 30), *[Block(30) for _ in range(3)], torch.nn.Linear(30, 5))
    if frozen:
        model[1].requires_grad_(False)
    return model


def _train(rank: int, world: int, zero: dict[str, Any], frozen: bool = False, init: bool = False) -> dict[str, Any]:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **zero},
    }
    if init:
        with deepspeed.zero.MiCS_Init(config_dict_or_path=config):
            torch.manual_seed(3)
            model: torch.nn.Module = _model(frozen)
    else:
        model = _model(frozen)
    engine, optimizer, _, _ = deepspeed.initialize(model=model, config=config)
    losses, gathered, reduced = [], 0, 0
    for step in range(STEPS):
        x = torch.randn(2, 12, generator=torch.Generator().manual_seed(100 * step + rank))
        y = torch.randn(2, 5, generator=torch.Generator().manual_seed(100 * step + rank + 50))
        loss = torch.nn.functional.mse_loss(engine(x), y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    coordinator = optimizer.parameter_offload.coordinator
    with comm.observe() as events:
        loss = torch.nn.functional.mse_loss(engine(torch.randn(2, 12)), torch.randn(2, 5))
    gathered = sum(e.nbytes for e in events if e.op == "isend")
    with comm.observe() as events:
        engine.backward(loss)
    reduced = sum(e.nbytes for e in events if e.op == "isend")
    engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = [p.detach().clone() for p in model.parameters()]
    return {
        "losses": losses,
        "norm": engine.get_global_grad_norm(),
        "weights": weights,
        "forward_bytes": gathered,
        "backward_bytes": reduced,
        "shards": [p.ds_tensor.numel() for p in model.parameters()],
        "live": coordinator.live_numel,
        "group": torch.distributed.get_process_group_ranks(model[0].weight.ds_process_group)
        if model[0].weight.ds_process_group is not None
        else list(range(world)),
    }


def _close(results: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float) -> None:
    for ours, plain in zip(results, expected, strict=True):
        assert ours["losses"] == pytest.approx(plain["losses"], rel=tolerance)
        for a, b in zip(ours["weights"], plain["weights"], strict=True):
            assert torch.allclose(a, b, rtol=tolerance, atol=tolerance), (a - b).abs().max()


@pytest.fixture(scope="module")
def plain() -> list[dict[str, Any]]:
    return run_ranks(_train, 4, {})


def test_mics_equals_plain_sharding_over_all_ranks(plain: list[dict[str, Any]]) -> None:
    results = run_ranks(_train, 4, {"mics_shard_size": 2})
    _close(results, plain, 1e-5)
    assert [r["group"] for r in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert results[0]["shards"] == [-(-w.numel() // 2) for w in results[0]["weights"]]
    assert all(torch.equal(a, b) for a, b in zip(results[0]["weights"], results[3]["weights"], strict=True))
    assert results[0]["norm"] == pytest.approx(plain[0]["norm"], rel=1e-5)
    # Half as many peers send a shard of twice the size, to one rank instead of three.
    assert results[0]["forward_bytes"] < 0.7 * plain[0]["forward_bytes"]


def test_mics_init_and_two_stage_gathers(plain: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    results = run_ranks(_train, 4, {"mics_shard_size": 4, "mics_hierarchical_params_gather": True}, init=True)
    _close(results, plain, 1e-5)


def test_hpz_gathers_from_the_small_group_in_backward(plain: list[dict[str, Any]]) -> None:
    results = run_ranks(_train, 4, {"zero_hpz_partition_size": 2})
    for ours, expected in zip(results, plain, strict=True):
        assert ours["losses"] == expected["losses"]
        assert all(torch.equal(a, b) for a, b in zip(ours["weights"], expected["weights"], strict=True))
        assert ours["forward_bytes"] == expected["forward_bytes"]
        assert ours["backward_bytes"] < expected["backward_bytes"]


def test_quantised_weights_travel_in_a_quarter_of_the_bytes(plain: list[dict[str, Any]]) -> None:
    results = run_ranks(_train, 4, {"zero_quantized_weights": True})
    assert results[0]["forward_bytes"] <= 0.29 * plain[0]["forward_bytes"]  # small shards: a scale costs more
    _close(results, plain, 5e-2)
    assert results[0]["losses"] != plain[0]["losses"]
    assert all(torch.equal(a, b) for a, b in zip(results[0]["weights"], results[1]["weights"], strict=True))


def test_quantised_gradients_with_and_without_error_feedback(plain: list[dict[str, Any]]) -> None:
    for extra in ({}, {"zeropp_loco_param": {"err_beta": 0.5, "reset_T": 100}}):
        results = run_ranks(_train, 4, {"zero_quantized_gradients": True, **extra})
        assert results[0]["losses"] == pytest.approx(plain[0]["losses"], rel=5e-2)
        assert results[0]["losses"] != plain[0]["losses"]
        assert results[0]["backward_bytes"] < 0.75 * plain[0]["backward_bytes"]  # gathers included


def test_frozen_weights_are_stored_in_eight_bits(plain: list[dict[str, Any]]) -> None:
    whole = run_ranks(_train, 2, {}, True)
    results = run_ranks(_train, 2, {"zero_quantized_nontrainable_weights": True}, True)
    _close(results, whole, 5e-2)
    weight = results[0]["weights"][2]  # of the frozen block: packed bytes with a scale a block
    assert results[0]["shards"][2] < 1.1 * weight.numel() / 2
    assert not torch.equal(weight, whole[0]["weights"][2])
    assert torch.allclose(weight, whole[0]["weights"][2], atol=0.01)


def _refused(rank: int, world: int) -> str:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "verify_gradients": 1,
        "optimizer": {"type": "Adam"},
        "zero_optimization": {"stage": 3, "zero_quantized_gradients": True},
    }
    with pytest.raises(deepspeed.DeepSpeedConfigError) as caught:
        deepspeed.initialize(model=_model(), config=config)
    return str(caught.value)


def test_verify_gradients_refuses_quantised_gradients() -> None:
    assert "verify_gradients" in run_ranks(_refused, 1)[0]
