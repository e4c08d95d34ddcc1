"""Unmodified Lightning: Fabric's and the Trainer's DeepSpeed strategies, compared with the same program without deepspeed.

Not from pytest's own environment: ``make test-clients`` has it in one of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="the client is not installed: make test-clients installs it")
pytest.importorskip("transformers", reason="the tests train a GPT-2 of transformers: make test-clients installs it")

import lightning
import torch
from lightning.fabric.strategies import DeepSpeedStrategy as FabricStrategy
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy as TrainerStrategy
from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

import deepspeed
from deepspeed import zero
from tests.helpers.clients import Sequences, assert_identical, assert_weights_close, run_clients, tiny_gpt2
from tests.helpers.lightning import FabricOnCPU, TrainerOnCPU

pytestmark = pytest.mark.client

MICRO, ACCUMULATION, CLIP, LR = 4, 2, 1.0, 5e-3
PERSISTENCE = {"stage3_param_persistence_threshold": 40}  # more than the model's vectors have: the rest is released

# Devices of optimizer states and of parameters, and the stages that can have them.
OFFLOADS = [(1, "cpu", None), (2, "cpu", None), (3, "cpu", None), (3, "cpu", "cpu")]
OFFLOADS += [(1, "nvme", None), (2, "nvme", None), (3, "nvme", None), (3, "cpu", "nvme"), (3, "nvme", "nvme")]


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state as fp32 copies. Collective."""
    with zero.GatheredParameters(model.parameters()):
        return {name: tensor.detach().float().clone() for name, tensor in model.state_dict().items()}


def batches(rank: int, world_size: int, epochs: int = 2) -> list[dict[str, torch.Tensor]]:
    data, made = Sequences(48), []
    for _ in range(epochs):
        for start in range(MICRO * rank, 48, MICRO * world_size):
            rows = [data[i] for i in range(start, start + MICRO)]
            made.append({key: torch.stack([row[key] for row in rows]) for key in rows[0]})
    return made


def schedule(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))


def plain(world_size: int, accumulation: int) -> dict[str, Any]:
    """All ranks' batches in one process: what every strategy must come to.

    The Trainer divides the loss by the accumulation steps before it gives it to the engine, which divides it as well
    (docs/clients/lightning.md); so does this.
    """
    model = tiny_gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    scheduler = schedule(optimizer)
    per_rank = [batches(rank, world_size) for rank in range(world_size)]
    losses: list[list[float]] = [[] for _ in range(world_size)]
    for step in range(len(per_rank[0])):
        for rank in range(world_size):
            loss = model(**per_rank[rank][step]).loss
            (loss / accumulation**2 / world_size).backward()
            losses[rank].append(float(loss.detach()))
        if (step + 1) % accumulation == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return {"losses": losses, "weights": whole(model)}


def assert_learns_as(ours: list[dict[str, Any]], expected: dict[str, Any], half: bool) -> None:
    """In 16 bits (bf16 has 8 of mantissa) the reference computes in fp32, and so losses agree within a percent."""
    for rank, result in enumerate(ours):
        assert expected["losses"][rank][-1] < expected["losses"][rank][0] - 0.1
        assert result["losses"] == pytest.approx(expected["losses"][rank], rel=2e-2 if half else 5e-5)
        if not half:
            assert_weights_close(result["weights"], expected["weights"], atol=1e-4)


# -- Fabric ------------------------------------------------------------------------------------------------------------


def fabric_strategy(stage: int, **extra: Any) -> Any:
    zero_options = extra.pop("zero_optimization", {})
    return FabricStrategy(
        accelerator=FabricOnCPU(),
        config={
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, **PERSISTENCE, **zero_options},
            "gradient_clipping": CLIP,
            "train_micro_batch_size_per_gpu": MICRO,
        },
        **extra,
    )


def use_fabric(rank: int, world_size: int, folder: str, stage: int, precision: str) -> dict[str, Any]:
    strategy = fabric_strategy(stage)
    fabric = lightning.Fabric(strategy=strategy, devices=world_size, precision=precision)
    fabric.launch()
    assert fabric.world_size == world_size and fabric.global_rank == rank

    def made() -> tuple[Any, Any, Any]:
        with fabric.init_module():
            model = tiny_gpt2()
        assert all(hasattr(p, "ds_id") for p in model.parameters()) == (stage == 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        model, optimizer, scheduler = fabric.setup(model, optimizer, scheduler=schedule(optimizer))
        return model, optimizer, scheduler

    def learn(model: Any, optimizer: Any, scheduler: Any, data: list[Any]) -> list[float]:
        losses = []
        for batch in data:
            loss = model(**batch).loss
            fabric.backward(loss, model=model)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            losses.append(float(loss.detach()))
        return losses

    model, optimizer, scheduler = made()
    engine = strategy.model
    assert type(engine) is deepspeed.DeepSpeedEngine and engine.zero_optimization_stage() == stage
    assert isinstance(optimizer, type(engine.optimizer))
    data = batches(rank, world_size)
    result: dict[str, Any] = {"losses": learn(model, optimizer, scheduler, data[:6])}
    fabric.save(f"{folder}/one", {"model": model, "optimizer": optimizer, "scheduler": scheduler, "seen": 6})
    result["losses"] += learn(model, optimizer, scheduler, data[6:])
    result["weights"] = whole(engine.module)

    model, optimizer, scheduler = made()
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "seen": 0}
    fabric.load(f"{folder}/one", state)
    assert state["seen"] == 6 and scheduler.last_epoch == 6
    result["again"] = learn(model, optimizer, scheduler, data[6:])
    result["weights again"] = whole(strategy.model.module)
    fabric.save(f"{folder}/end", {"model": model, "optimizer": optimizer, "seen": len(data)})
    strategy.model.destroy()

    model, *_ = made()
    fabric.load(f"{folder}/end", {"model": model})
    result["weights alone"] = whole(strategy.model.module)
    return result


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    ("world_size", "precision"), [(1, "32-true"), (2, "32-true"), (2, "bf16-true"), (2, "16-true")]
)
def test_fabric(stage: int, world_size: int, precision: str, tmp_path: Path) -> None:
    """Training, saving, resuming, loading the weights alone, and fp32 weights as one file."""
    ours = run_clients(use_fabric, world_size, str(tmp_path), stage, precision)
    assert_learns_as(ours, plain(world_size, 1), precision != "32-true")
    for result in ours:
        assert result["again"] == result["losses"][6:]
        assert_identical(result["weights again"], result["weights"])
        assert_identical(result["weights alone"], result["weights"])
    convert_zero_checkpoint_to_fp32_state_dict(str(tmp_path / "end"), str(tmp_path / "end.ckpt"))
    loaded = torch.load(tmp_path / "end.ckpt", weights_only=True)
    state = {name.removeprefix("_forward_module."): tensor for name, tensor in loaded["state_dict"].items()}
    assert loaded["seen"] == len(batches(0, world_size))
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32
        rtol = 0 if precision == "32-true" else 1e-2  # the model's weights are rounded, to fp16 by up to 3e-8 near 0
        torch.testing.assert_close(tensor, ours[0]["weights"][name], rtol=rtol, atol=1e-7 if rtol else 0)


def offload(
    rank: int, world_size: int, folder: str, stage: int, states: str, params: str | None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    where: dict[str, Any] = {"offload_optimizer": {"device": states, "nvme_path": folder}}
    if params is not None:
        where["offload_param"] = {"device": params, "nvme_path": folder}
    strategy = fabric_strategy(stage, zero_optimization=where)
    fabric = lightning.Fabric(strategy=strategy, devices=world_size)
    fabric.launch()
    with fabric.init_module():
        model = tiny_gpt2()
    optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(model.parameters(), lr=LR, weight_decay=0.01)
    model, optimizer, scheduler = fabric.setup(model, optimizer, scheduler=schedule(optimizer))
    losses = []
    for batch in batches(rank, world_size):
        loss = model(**batch).loss
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(float(loss.detach()))
    return losses, whole(strategy.model.module)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "states", "params"), OFFLOADS)
def test_fabric_with_offload(stage: int, states: str, params: str | None, tmp_path: Path) -> None:
    expected = plain(2, 1)
    ours = run_clients(offload, 2, str(tmp_path), stage, states, params)
    for (losses, weights), other in zip(ours, expected["losses"], strict=True):
        assert losses == pytest.approx(other, rel=5e-5)
        assert_weights_close(weights, expected["weights"], atol=1e-4)


def load_whole(rank: int, world_size: int, file: str) -> dict[str, torch.Tensor]:
    """A plain checkpoint into a partitioned model."""
    strategy = fabric_strategy(3, load_full_weights=True)
    fabric = lightning.Fabric(strategy=strategy, devices=world_size)
    fabric.launch()
    with fabric.init_module():
        model = tiny_gpt2(seed=9)
    model, _ = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=LR))
    fabric.load_raw(file, strategy.model.module)
    return whole(strategy.model.module)


def test_fabric_loads_a_plain_file_into_partitions(tmp_path: Path) -> None:
    expected = tiny_gpt2(seed=4).state_dict()
    torch.save(expected, tmp_path / "plain.pt")
    for loaded in run_clients(load_whole, 2, str(tmp_path / "plain.pt")):
        assert_identical(loaded, expected)


# -- the Trainer -------------------------------------------------------------------------------------------------------


class Counting(lightning.LightningModule):
    """A LightningModule around the tiny GPT-2; the strategy partitions what ``configure_model`` makes."""

    def __init__(self, offload: bool = False) -> None:
        super().__init__()
        self.offload = offload
        self.gpt2: Any = None
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.gpt2 is None:
            self.gpt2 = tiny_gpt2()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.gpt2(**batch).loss
        self.losses.append(float(loss.detach()))
        return loss  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("eval_loss", self.gpt2(**batch).loss, sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        kind: Any = deepspeed.ops.adam.DeepSpeedCPUAdam if self.offload else torch.optim.AdamW
        optimizer = kind(self.gpt2.parameters(), lr=LR, weight_decay=0.01)
        return [optimizer], [{"scheduler": schedule(optimizer), "interval": "step"}]


def trainer(folder: str, stage: int, precision: str, world_size: int, epochs: int, **extra: Any) -> Any:
    strategy = TrainerStrategy(accelerator=TrainerOnCPU(), stage=stage, **extra)
    strategy.config["zero_optimization"].update(PERSISTENCE)  # type: ignore[index]
    return lightning.Trainer(
        default_root_dir=folder,
        strategy=strategy,
        devices=world_size,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=epochs,
        accumulate_grad_batches=ACCUMULATION,
        gradient_clip_val=CLIP,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        callbacks=[
            ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1),
            LearningRateMonitor("step"),
        ],
    )


def loader(size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> Any:
    """A rank's share, in the order of ``batches``."""
    order = [i for i in range(size) if i // MICRO % world_size == rank]
    return torch.utils.data.DataLoader(torch.utils.data.Subset(Sequences(size, seed), order), batch_size=MICRO)


def use_trainer(
    rank: int, world_size: int, folder: str, stage: int, precision: str, extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    extra = extra or {}
    module, runner = Counting(bool(extra)), trainer(folder, stage, precision, world_size, 2, **extra)
    data, held_out = loader(48, 0, rank, world_size), loader(16, 5)
    runner.fit(module, data, held_out)
    engine = runner.strategy.deepspeed_engine
    assert type(engine) is deepspeed.DeepSpeedEngine and engine.zero_optimization_stage() == stage
    assert engine.global_steps == runner.global_step == len(module.losses) // ACCUMULATION
    result: dict[str, Any] = {"losses": module.losses, "weights": whole(module.gpt2)}
    result["eval"] = float(runner.callback_metrics["eval_loss"])
    (tested,) = runner.test(module, held_out, verbose=False)
    result["test"] = tested["eval_loss"]

    module, runner = Counting(bool(extra)), trainer(folder + "/again", stage, precision, world_size, 2, **extra)
    runner.fit(module, data, held_out, ckpt_path=f"{folder}/epoch=0.ckpt")
    result["again"], result["weights again"] = module.losses, whole(module.gpt2)
    return result


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    ("world_size", "precision"), [(1, "32-true"), (2, "32-true"), (2, "bf16-true"), (2, "bf16-mixed"), (2, "16-mixed")]
)
def test_trainer(stage: int, world_size: int, precision: str, tmp_path: Path) -> None:
    """Accumulation, clipping, a schedule of each step, validation, test, checkpoints, resuming, one fp32 file."""
    ours = run_clients(use_trainer, world_size, str(tmp_path), stage, precision)
    check_trainer(ours, tmp_path, world_size, precision)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "states", "params"), OFFLOADS)
def test_trainer_with_offload(stage: int, states: str, params: str | None, tmp_path: Path) -> None:
    """The same, through the strategy's own arguments."""
    extra: dict[str, Any] = {"offload_optimizer": True, "offload_optimizer_device": states, "nvme_path": str(tmp_path)}
    if params is not None:
        extra |= {"offload_parameters": True, "offload_params_device": params, "params_buffer_size": 10_000}
        extra |= {"remote_device": params}
    ours = run_clients(use_trainer, 2, str(tmp_path), stage, "32-true", extra)
    check_trainer(ours, tmp_path, 2, "32-true")


def check_trainer(ours: list[dict[str, Any]], tmp_path: Path, world_size: int, precision: str) -> None:
    assert_learns_as(ours, plain(world_size, ACCUMULATION), precision != "32-true")
    for result in ours:
        assert result["test"] == pytest.approx(result["eval"], rel=1e-6)
        assert result["again"] == result["losses"][len(result["again"]) :] and len(result["again"]) > 3
        assert_identical(result["weights again"], result["weights"])
    assert len({result["eval"] for result in ours}) == 1
    convert_zero_checkpoint_to_fp32_state_dict(str(tmp_path / "epoch=1.ckpt"), str(tmp_path / "one.ckpt"))
    model = Counting.load_from_checkpoint(tmp_path / "one.ckpt", map_location="cpu", weights_only=False)
    for name, tensor in model.gpt2.state_dict().items():
        rtol = 0 if precision == "32-true" else 1e-2
        torch.testing.assert_close(tensor.float(), ours[0]["weights"][name], rtol=rtol, atol=1e-7 if rtol else 0)
