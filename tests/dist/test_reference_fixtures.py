"""The reference package's folders load into our engine, give exactly its weights, and go on with its losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from tests.helpers import preload  # noqa: F401 - before ranks are forked
from tests.helpers.dist import run_ranks
from tests.helpers.fixture_model import FIXTURES, FixtureModel, expected_weights, facts, rank_batches

FOLDERS = [f"z{stage}_{dtype}" for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")]


def build(name: str, stage: int | None = None, seed: int = 0) -> Any:
    """An engine with the configuration of folder ``name``, or of another stage; not with its weights."""
    config = facts(name)["config"]
    if stage is not None:
        config["zero_optimization"]["stage"] = stage
    model = FixtureModel(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]


def full_weights(engine: Any) -> dict[str, torch.Tensor]:
    """fp32 masters of trained parameters, frozen ones as they are."""
    weights = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            weights[name] = param.detach().clone()
        if param.requires_grad:
            weights[name] = safe_get_full_fp32_param(param)
    return weights


def train(engine: Any, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[list[float], list[float]]:
    losses, rates = [], []
    for ids, labels in batches:
        loss = engine(ids, labels)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
        rates += engine.get_lr()
    return losses, rates


def assert_losses(got: list[float], wanted: list[float], name: str) -> None:
    tolerance = 1e-5 if name.endswith("fp32") else 2e-2
    torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=tolerance, atol=0.0)


def assert_same(engine: Any, name: str) -> None:
    """Equal to the last bit. Frozen weights are held in the model's dtype, which is that of the files."""
    got, wanted = full_weights(engine), expected_weights(name)
    if name == "z0_bf16":
        # What was expected there are the bf16 weights; the masters lie in the file, in the order of the parameters.
        for key, param in engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([param]):
                assert torch.equal(param.float(), wanted[key]), key
        file = torch.load(FIXTURES / name / "ckpt/step3/mp_rank_00_model_states.pt", weights_only=True)
        trained = [key for key, param in engine.module.named_parameters() if param.requires_grad]
        wanted.update(zip(trained, file["optimizer"]["fp32_groups"][0], strict=True))
    for key, param in got.items():
        assert torch.equal(param, wanted[key].to(param.dtype)), key


def load_and_go_on(rank: int, world: int, name: str) -> None:
    known = facts(name)
    engine = build(name)
    path, client = engine.load_checkpoint(str(FIXTURES / name / "ckpt"))
    own = f"zero_pp_rank_{rank}_" if "z3" in name else ""
    assert path is not None and path.endswith(f"step3/{own}mp_rank_00_model_states.pt")
    assert client == {"epoch": 2, "note": "fixture"}
    assert (engine.global_steps, engine.global_samples, engine.skipped_steps) == (3, 36, 0)
    assert engine.loaded_checkpoint_tag == "step3"
    assert_same(engine, name)
    assert engine.get_lr() == [0.005]
    losses, rates = train(engine, rank_batches(name, rank)["after"])
    assert_losses(losses, known["losses_after"][rank], name)
    assert rates[0] == 0.005 and [rates[-1]] == known["lr_after_save"]


@pytest.mark.parametrize("name", FOLDERS)
def test_weights_are_exact_and_training_goes_on(name: str) -> None:
    run_ranks(load_and_go_on, 2, name)


def from_the_start(rank: int, world: int, name: str) -> None:
    engine = build(name, seed=7)
    batches = rank_batches(name, rank)
    losses, _ = train(engine, batches["before"])
    assert_losses(losses, facts(name)["losses_before"][rank], name)
    trained = {n: w for n, w in full_weights(engine).items() if n != "frozen.weight"}
    for key, weight in trained.items():
        tolerance = 1e-5 if name.endswith("fp32") else 2e-2
        torch.testing.assert_close(weight, expected_weights(name)[key], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_same_run_from_the_start(name: str) -> None:
    run_ranks(from_the_start, 2, name)


def load_elsewhere(rank: int, world: int, name: str, stage: int) -> None:
    engine = build(name, stage)
    engine.load_checkpoint(str(FIXTURES / name / "ckpt"))
    assert_same(engine, name)
    moment = safe_get_full_optimizer_state(engine.module.down.weight, "exp_avg_sq")
    assert moment.shape == (24, 51) and float(moment.min()) >= 0 and float(moment.max()) > 0
    before = full_weights(engine)
    train(engine, rank_batches(name, 0)["after"][:2])
    after = full_weights(engine)
    assert not torch.equal(before["up.weight"], after["up.weight"])
    assert torch.equal(before["frozen.weight"], after["frozen.weight"])


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("name", ["z0_fp32", "z0_bf16", "z1_fp32", "z2_bf16"])
def test_at_another_world_size_and_stage(name: str, world: int, stage: int) -> None:
    run_ranks(load_elsewhere, world, name, stage)


def load_elsewhere_at_3(rank: int, world: int) -> None:
    for name in ("z0_fp32", "z0_bf16", "z1_bf16", "z2_fp32", "z3_fp32", "z3_bf16"):
        load_elsewhere(rank, world, name, 3)
    for stage in (0, 1, 2):
        load_elsewhere(rank, world, "z3_bf16", stage)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_from_and_to_stage_3(world: int) -> None:
    run_ranks(load_elsewhere_at_3, world)


def step_counts(rank: int, world: int, name: str) -> tuple[list[float], list[float]]:
    engine = build(name)
    engine.load_checkpoint(str(FIXTURES / name / "ckpt"))

    def counts() -> list[float]:
        return sorted({float(state["step"]) for state in engine.basic_optimizer.state.values()})

    loaded = counts()
    train(engine, rank_batches(name, rank)["after"][:2])
    return loaded, counts()


@pytest.mark.parametrize(
    ("name", "stored"), [("z0_fp32", 3.0), ("z0_bf16", 4.0), ("z1_bf16", 3.0), ("z2_fp32", 3.0), ("z3_bf16", 3.0)]
)
def test_step_count_is_taken_as_stored(name: str, stored: float) -> None:
    """The reference's stage 0 bf16 run counted a step more than it made: its bias correction must go on from there."""
    assert run_ranks(step_counts, 2, name) == [([stored], [stored + 1])] * 2
