"""What Lightning relies on beside training: inference, configs, wrapped optimizers, checkpoints, summaries."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("lightning", reason="the client is not installed: make test-clients installs it")
pytest.importorskip("transformers", reason="the tests train a GPT-2 of transformers: make test-clients installs it")

import lightning
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy as TrainerStrategy
from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import deepspeed
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from tests.clients.test_lightning import LR, MICRO, Counting, batches, fabric_strategy, loader, trainer, whole
from tests.helpers.clients import assert_identical, assert_weights_close, run_clients, tiny_gpt2
from tests.helpers.lightning import TrainerOnCPU

pytestmark = pytest.mark.client


# -- inference ---------------------------------------------------------------------------------------------------------


class Predicting(Counting):
    def predict_step(self, batch: Any, index: int) -> Any:
        return self.gpt2(**batch).logits


def infer(rank: int, world_size: int, folder: str, stage: int) -> dict[str, Any]:
    module, runner = Predicting(), trainer(folder, stage, "32-true", world_size, 1)
    held_out, data = loader(16, 5), loader(48, 0, rank, world_size)
    (scores,) = runner.validate(module, held_out, verbose=False)
    result: dict[str, Any] = {"validated": scores["eval_loss"], "predicted": runner.predict(module, held_out)}
    assert runner.strategy.deepspeed_engine.lr_scheduler is None
    runner.fit(module, data)  # another engine over the same module
    result["losses"] = module.losses
    fresh = Counting()
    trainer(folder + "/fresh", stage, "32-true", world_size, 1).fit(fresh, data)
    assert module.losses == fresh.losses
    assert_identical(whole(module.gpt2), whole(fresh.gpt2))

    strategy = fabric_strategy(stage)
    fabric = lightning.Fabric(strategy=strategy, devices=world_size)
    fabric.launch()
    with fabric.init_module():
        model = tiny_gpt2()
    wrapped = fabric.setup_module(model)
    with torch.no_grad():
        result["fabric"] = [wrapped(**batch).logits for batch in held_out]
    return result


@pytest.mark.parametrize("stage", [1, 3])
def test_validating_and_predicting_before_training(stage: int, tmp_path: Path) -> None:
    model = tiny_gpt2().eval()
    with torch.no_grad():
        expected = [model(**batch) for batch in loader(16, 5)]
    mean = float(torch.stack([output.loss for output in expected]).mean())
    for result in run_clients(infer, 2, str(tmp_path), stage):
        assert result["validated"] == pytest.approx(mean, rel=1e-5)
        for name in ("predicted", "fabric"):
            for logits, output in zip(result[name], expected, strict=True):
                torch.testing.assert_close(logits, output.logits)


# -- configs -----------------------------------------------------------------------------------------------------------


class NoOptimizer(Counting):
    def configure_optimizers(self) -> None:
        return None


def use_config(rank: int, world_size: int, folder: str, config: dict[str, Any]) -> dict[str, Any]:
    file = Path(folder) / f"config{rank}.json"
    file.write_text(json.dumps(config))
    with mock.patch.dict("os.environ", {"PL_DEEPSPEED_CONFIG_PATH": str(file)}):
        strategy = TrainerStrategy(accelerator=TrainerOnCPU(), logging_level=logging.ERROR)
    assert deepspeed.utils.logging.logger is deepspeed.utils.logger is logging.getLogger("DeepSpeed")
    assert deepspeed.utils.logger.level == logging.ERROR
    module = NoOptimizer()
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_checkpointing": False, "logger": False}
    runner = lightning.Trainer(
        default_root_dir=folder,
        strategy=strategy,
        devices=world_size,
        max_epochs=1,
        use_distributed_sampler=False,
        **quiet,
    )
    rates: list[float] = []
    original = Counting.training_step

    def step(self: Any, batch: Any, index: int) -> Any:
        rates.append(runner.lr_scheduler_configs[0].scheduler.get_last_lr()[0])
        return original(self, batch, index)

    with mock.patch.object(NoOptimizer, "training_step", step):
        runner.fit(module, loader(48, 0, rank, world_size))
    engine = runner.strategy.deepspeed_engine
    kind = DeepSpeedZeroOptimizer if config["zero_optimization"]["stage"] < 3 else DeepSpeedZeroOptimizer_Stage3
    assert type(engine.optimizer) is kind
    assert engine.device.type == "cpu" and engine.global_steps == runner.global_step == len(module.losses)
    return {"losses": module.losses, "rates": rates, "weights": whole(module.gpt2)}


@pytest.mark.parametrize("stage", [2, 3])
def test_optimizer_and_scheduler_in_a_config_file(stage: int, tmp_path: Path) -> None:
    """The file is found by the environment variable; Lightning steps our scheduler."""
    config = {
        "train_micro_batch_size_per_gpu": MICRO,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 40},
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.01}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": LR, "warmup_num_steps": 4, "warmup_type": "linear"},
        },
    }
    ours = run_clients(use_config, 2, str(tmp_path), config)
    model = tiny_gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    scheduler = deepspeed.runtime.lr_schedules.WarmupLR(optimizer, **config["scheduler"]["params"])
    assert ours[0]["rates"][0] == 0 and ours[0]["rates"][-1] > LR / 2
    for step, rate in enumerate(ours[0]["rates"]):
        assert rate == optimizer.param_groups[0]["lr"]
        for rank in range(2):
            loss = model(**batches(rank, 2, 1)[step]).loss
            (loss / 2).backward()
            assert ours[rank]["losses"][step] == pytest.approx(float(loss.detach()), rel=5e-5)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    for result in ours:
        assert_weights_close(result["weights"], whole(model), atol=1e-4)


def test_members_can_be_patched() -> None:
    """Lightning's own tests do so; they patch what it looks up at call time."""
    from lightning.fabric.plugins.precision import DeepSpeedPrecision

    with mock.patch("deepspeed.initialize") as initialize:
        initialize.return_value = ("engine", "optimizer", None, "scheduler")
        strategy = fabric_strategy(2)
        strategy.parallel_devices = [torch.device("cpu", 0)]
        model = torch.nn.Linear(1, 1)
        made = strategy.setup_module_and_optimizers(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
        assert made == ("engine", ["optimizer"], "scheduler")
        assert initialize.call_args.kwargs["args"].device_rank == 0
    with mock.patch("deepspeed.init_distributed", autospec=True) as initialized:
        deepspeed.init_distributed("gloo", distributed_port=1234, timeout=None)
        initialized.assert_called_once()
    with mock.patch("deepspeed.zero.Init") as init:
        strategy._config_initialized = True
        strategy.module_sharded_context()
        assert init.call_args.kwargs["enabled"] is False
    with mock.patch("deepspeed.DeepSpeedEngine", autospec=True):
        pass
    engine = mock.Mock(spec=deepspeed.DeepSpeedEngine, optimizer=None)
    loss = torch.ones(())
    DeepSpeedPrecision("32-true").backward(loss, engine)
    engine.backward.assert_called_once_with(loss)
    with pytest.raises(AttributeError):
        engine.no_such_member  # noqa: B018


# -- optimizers --------------------------------------------------------------------------------------------------------


def wrap(rank: int, world_size: int, stage: int) -> None:
    from lightning.fabric.wrappers import _FabricOptimizer

    strategy = fabric_strategy(stage)
    fabric = lightning.Fabric(strategy=strategy, devices=world_size)
    fabric.launch()
    with fabric.init_module():
        model = tiny_gpt2()
    given = torch.optim.AdamW(model.parameters(), lr=LR)
    group = given.param_groups[0]
    wrapped_model, wrapped = fabric.setup(model, given)
    engine = strategy.model
    assert isinstance(wrapped, (_FabricOptimizer, DeepSpeedOptimizer)) and isinstance(
        engine.optimizer, DeepSpeedOptimizer
    )
    assert engine.optimizer.optimizer is given and wrapped.optimizer is engine.optimizer
    assert engine.optimizer.param_groups[0] is group and wrapped.param_groups[0] is group
    assert any(module is engine for module in engine.modules())
    batch = batches(rank, world_size)[0]

    def learn() -> torch.Tensor:
        fabric.backward(wrapped_model(**batch).loss, model=wrapped_model)
        wrapped.step()
        wrapped.zero_grad()
        return whole(engine.module)["lm_head.weight"]

    first = learn()
    wrapped.param_groups[0]["lr"] = 0.0  # a schedule's change, seen through the wrapper
    group["weight_decay"] = 0.0
    assert torch.equal(learn(), first)
    state = wrapped.state_dict()
    group["lr"] = LR
    second = learn()
    assert not torch.equal(second, first)
    wrapped.load_state_dict(state)
    torch.testing.assert_close(learn(), second, rtol=0, atol=1e-6)
    engine.backward(engine(**batch).loss)
    engine.step(lr_kwargs={"epoch": 1})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_wrapped_optimizers(stage: int) -> None:
    run_clients(wrap, 2, stage)


# -- checkpoints -------------------------------------------------------------------------------------------------------


class Frozen(Counting):
    def configure_model(self) -> None:
        super().configure_model()
        self.gpt2.transformer.wpe.requires_grad_(False)


def save_trained(rank: int, world_size: int, folder: str, stage: int) -> dict[str, Any]:
    module, runner = Frozen(), trainer(folder, stage, "32-true", world_size, 1, exclude_frozen_parameters=True)
    data = loader(48, 0, rank, world_size)
    runner.fit(module, data)
    result = {"losses": module.losses, "weights": whole(module.gpt2)}
    module = Frozen()
    module.strict_loading = False
    runner = trainer(folder + "/again", stage, "32-true", world_size, 2, exclude_frozen_parameters=True)
    runner.fit(module, data, ckpt_path=f"{folder}/epoch=0.ckpt")
    result["again"] = module.losses
    return result


@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_parameters_are_left_out(stage: int, tmp_path: Path) -> None:
    for result in run_clients(save_trained, 2, str(tmp_path), stage):
        assert torch.equal(result["weights"]["transformer.wpe.weight"], tiny_gpt2().transformer.wpe.weight)
        assert result["again"][0] < result["losses"][0] - 0.1
    saved = tmp_path / "epoch=0.ckpt"
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    state = torch.load(saved / "checkpoint" / name, weights_only=True)
    assert not any("wpe" in name for shapes in state["param_shapes"] for name in shapes)
    assert not any("wpe" in name for name in state["module"])
    assert (saved / "latest").read_text().strip() == "checkpoint"
    states = saved / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    assert torch.load(states, weights_only=False)["optimizer_state_dict"]["zero_stage"] == stage


def save_colliding(rank: int, world_size: int, folder: str, empty: str) -> dict[str, Any]:
    strategy = fabric_strategy(3)
    fabric = lightning.Fabric(strategy=strategy, devices=world_size)
    fabric.launch()
    with fabric.init_module():
        model = tiny_gpt2()
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=LR))
    mine = {"model": model, "optimizer": optimizer, "epoch": 7, "nested": {"a": [1, 2.5, "b"]}}
    with pytest.raises(ValueError, match="dp_world_size"):  # Lightning only warns that it may be lost
        fabric.save(folder, {**mine, "dp_world_size": 99})
    fabric.save(folder, mine)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "epoch": 0, "nested": None}
    fabric.load(folder, state)
    with pytest.raises(deepspeed.errors.CheckpointError, match=r"expected mp_rank_00_model_states\.pt"):
        fabric.load(empty, {"model": model})  # with a tag
    with pytest.raises(
        MisconfigurationException, match="unable to load"
    ):  # without one, and nothing named in ``latest``
        trainer(folder + "/other", 3, "32-true", world_size, 1).validate(Counting(), loader(16, 5), ckpt_path=empty)
    return {"epoch": state["epoch"], "nested": state["nested"]}


def test_client_state(tmp_path: Path) -> None:
    """What the program saves beside the model comes back, and stays in the converted file; engine keys do not."""
    (tmp_path / "empty" / "checkpoint").mkdir(parents=True)
    for result in run_clients(save_colliding, 2, str(tmp_path / "one"), str(tmp_path / "empty")):
        assert result == {"epoch": 7, "nested": {"a": [1, 2.5, "b"]}}
    convert_zero_checkpoint_to_fp32_state_dict(str(tmp_path / "one"), str(tmp_path / "one.ckpt"), tag="checkpoint")
    loaded = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert loaded["epoch"] == 7 and loaded["nested"] == {"a": [1, 2.5, "b"]}
    gone = {"module", "optimizer", "lr_scheduler", "skipped_steps", "global_steps", "dp_world_size", "mp_world_size"}
    assert not gone & loaded.keys()


def load_single(rank: int, world_size: int, folder: str, file: str) -> dict[str, torch.Tensor]:
    module, runner = Counting(), trainer(folder, 3, "32-true", world_size, 1, load_full_weights=True)
    runner.validate(module, loader(16, 5), ckpt_path=file, verbose=False, weights_only=True)
    return whole(module.gpt2)


def test_the_trainer_loads_a_single_file_into_partitions(tmp_path: Path) -> None:
    module = Counting()
    module.gpt2 = tiny_gpt2(seed=4)
    file = {"state_dict": module.state_dict(), "pytorch-lightning_version": lightning.__version__}
    torch.save({**file, "epoch": 0, "global_step": 0}, tmp_path / "single.ckpt")
    for weights in run_clients(load_single, 2, str(tmp_path), str(tmp_path / "single.ckpt")):
        assert_identical(weights, module.gpt2.state_dict())


# -- what is shown and recomputed --------------------------------------------------------------------------------------


def summarize(rank: int, world_size: int, folder: str) -> tuple[int, list[int]]:
    from lightning.pytorch.utilities.model_summary import DeepSpeedSummary

    module, runner = Counting(), trainer(folder, 3, "32-true", world_size, 1)
    runner.validate(module, loader(16, 5), verbose=False)
    summary = DeepSpeedSummary(module, max_depth=1)
    return summary.total_parameters, summary.parameters_per_layer


def test_summary_of_partitioned_models(tmp_path: Path) -> None:
    total = sum(param.numel() for param in tiny_gpt2().parameters())
    for found, (per_device,) in run_clients(summarize, 2, str(tmp_path)):
        assert found == total and total / 2 <= per_device <= total / 2 + len(list(tiny_gpt2().parameters()))


def recompute(rank: int, world_size: int) -> tuple[list[float], list[float]]:
    """A program that checkpoints with our function, which the strategy configures."""

    class Small(lightning.LightningModule):
        def __init__(self, recomputes: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
            self.recomputes = recomputes
            self.losses: list[float] = []

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            points = batch[0].requires_grad_()
            out = deepspeed.checkpointing.checkpoint(self.inner, points) if self.recomputes else self.inner(points)
            loss = torch.nn.functional.mse_loss(out, points.detach().sum(1, keepdim=True))
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    points = torch.randn(32, 8, generator=torch.Generator().manual_seed(rank))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(points), batch_size=8)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_checkpointing": False, "logger": False}
    quiet["use_distributed_sampler"] = False
    losses = []
    for recomputes in (False, True):
        module, strategy = Small(recomputes), TrainerStrategy(accelerator=TrainerOnCPU(), stage=2)
        with mock.patch("deepspeed.checkpointing.configure", wraps=deepspeed.checkpointing.configure) as configured:
            lightning.Trainer(strategy=strategy, devices=world_size, max_epochs=2, **quiet).fit(module, data)
        off = dict.fromkeys(("partition_activations", "contiguous_checkpointing", "checkpoint_in_cpu"), False)
        configured.assert_called_once_with(mpu_=None, profile=None, **off)
        losses.append(module.losses)
    strategy = TrainerStrategy(accelerator=TrainerOnCPU(), stage=2, cpu_checkpointing=True)
    with pytest.raises(deepspeed.errors.MissingFeatureError, match="cpu_checkpointing"):
        lightning.Trainer(strategy=strategy, devices=world_size, max_epochs=2, **quiet).fit(Small(True), data)
    return losses[0], losses[1]


def test_activation_checkpointing_is_configured() -> None:
    for kept, recomputed in run_clients(recompute, 2):
        assert recomputed == kept and kept[-1] < kept[0]
