"""What else Transformers relies on: each behaviour with the smallest unmodified program that shows it."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the client is not installed: make test-clients installs it")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate: make test-clients installs it")

import torch
import transformers
from accelerate.state import AcceleratorState
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer
from transformers.trainer_utils import BestRun, HPSearchBackend

import deepspeed
from tests.clients.test_transformers import DS_OPTIMIZER, make_trainer
from tests.clients.test_zero3_transformers import T5, config, whole
from tests.helpers.clients import Sequences, assert_identical, assert_weights_close, run_clients, tiny_gpt2

pytestmark = pytest.mark.client

SHORT: dict[str, Any] = {"max_steps": 3, "warmup_steps": 1}


def guide(device: str, folder: str = "/local_nvme", precision: str = "fp16") -> dict[str, Any]:
    """The config of Transformers' guide for ZeRO-Infinity, with smaller buffers: it would keep 2.5 GB for parameters."""
    offload = {"device": device, "pin_memory": True}
    files = {"nvme_path": folder} if device == "nvme" else {}
    zero_section: dict[str, Any] = {
        "stage": 3,
        "offload_optimizer": {**offload, **files, "buffer_count": 4, "fast_init": False},
        "offload_param": {**offload, **files, "buffer_count": 5, "buffer_size": 1e5, "max_in_cpu": 1e4},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    made: dict[str, Any] = {
        "fp16": {
            "enabled": "auto",
            "loss_scale": 0,
            "loss_scale_window": 1000,
            "initial_scale_power": 10,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "bf16": {"enabled": "auto"},
        "optimizer": copy.deepcopy(DS_OPTIMIZER),
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
        },
        "zero_optimization": zero_section,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    }
    if device == "nvme":
        made["aio"] = {
            "block_size": 262144,
            "queue_depth": 32,
            "thread_count": 1,
            "single_submit": False,
            "overlap_events": True,
        }
    if device == "none":
        for name in ("offload_optimizer", "offload_param"):
            zero_section[name] = {"device": "none", "nvme_path": None}
    if precision == "bf16":
        del made["fp16"]
    return made


def learned(trainer: Trainer) -> dict[str, Any]:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "loss": [entry["loss"] for entry in logs],
        "lr": [entry["learning_rate"] for entry in logs],
        "weights": whole(trainer.model),
        "steps": trainer.state.global_step,
    }


def train(out: str, ds: Any, resume: str | None = None, **extra: Any) -> dict[str, Any]:
    trainer = make_trainer(out, ds, **{**SHORT, **extra})
    trainer.train(resume_from_checkpoint=resume)
    engine = trainer.model_wrapped
    result = {**learned(trainer), "optimizer": type(getattr(engine.optimizer, "optimizer", None)).__name__}
    engine.destroy()
    return result


def train_many(rank: int, world_size: int, out: str, runs: list[tuple[Any, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [train(out, ds, **extra) for ds, extra in runs]


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["loss"] == two["loss"] and one["lr"] == two["lr"] and one["steps"] == two["steps"]
    assert_identical(one["weights"], two["weights"])


def assert_near(one: dict[str, Any], two: dict[str, Any], relative: float = 1e-5, weight: float = 1e-4) -> None:
    assert one["loss"] == pytest.approx(two["loss"], rel=relative) and one["steps"] == two["steps"]
    assert_weights_close(one["weights"], two["weights"], atol=weight)


# -- what the engine is given ------------------------------------------------------------------------------------------


def given_to_initialize(rank: int, world_size: int, out: str) -> list[dict[str, Any]]:
    results = []
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    deepspeed.utils.logger.addHandler(handler)
    initialize = deepspeed.initialize
    for stage in (1, 3):
        calls: list[tuple[dict[str, Any], Any]] = []

        def watched(calls: Any = calls, **given: Any) -> Any:
            calls.append((given, copy.deepcopy(given["config_params"])))
            return initialize(**given)

        deepspeed.initialize = watched
        ds = config(stage, optimizer=True, scheduler=True, communication_data_type="fp32")
        ds["zero_optimization"]["stage3_prefetch_bucket_size"] = "auto"
        # No warmup: Transformers writes 1 step all the same.
        trainer = make_trainer(out, ds, bf16=True, max_steps=3, warmup_steps=0, log_level="info", max_grad_norm=0.5)
        trainer.train()
        deepspeed.initialize = initialize
        ((given, before),) = calls
        engine = trainer.model_wrapped
        masters = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
        results.append(
            {
                "old_keyword": "config" not in given,
                "very_dict": engine.config is given["config_params"] is not trainer.model.config,
                "unchanged": given["config_params"] == before,
                "silent": before["steps_per_print"] == float("inf"),
                "sizes": {k: v for k, v in before["zero_optimization"].items() if "size" in k or "threshold" in k},
                "batch": (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()),
                "accumulation": engine.gradient_accumulation_steps(),
                "clipping": engine.gradient_clipping(),
                "reduced": str(engine.communication_data_type()),
                "rates": [group["lr"] for group in engine.optimizer.param_groups],
                "decay": [group["weight_decay"] for group in engine.optimizer.param_groups],
                "masters": {str(t.dtype) for t in getattr(engine.optimizer, masters)},
                "dtype": str(trainer.model.dtype),
                "item": engine.optimizer is given.get("model") or engine.optimizer is trainer.optimizer.optimizer,
                "attribute": engine.config_class is trainer.model.config_class,
                "info": any("DeepSpeed info" in text for text in messages),
                "level": deepspeed.utils.logger.level,
                "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            }
        )
        engine.destroy()
        messages.clear()
    return results


def test_what_the_engine_is_given_and_gives_back(tmp_path: Path) -> None:
    for rank, results in enumerate(run_clients(given_to_initialize, 2, str(tmp_path))):
        for result in results:
            assert result["old_keyword"] and result["very_dict"] and result["unchanged"] and result["silent"]
            assert result["sizes"]["reduce_bucket_size"] == 32 * 32
            assert result["sizes"]["stage3_prefetch_bucket_size"] == int(0.9 * 32 * 32)
            assert result["sizes"]["stage3_param_persistence_threshold"] == 10 * 32
            assert result["batch"] == (4 * 2 * 2, 4) and result["accumulation"] == 2 and result["clipping"] == 0.5
            assert result["reduced"] == "torch.float32" and result["masters"] == {"torch.float32"}
            assert result["dtype"] == "torch.bfloat16" and result["item"] and result["attribute"]
            assert set(result["rates"]) == {5e-3} and len(result["loss"]) == 3
            assert set(result["decay"]) == {0.0}
            assert result["info"] == (rank == 0)
            assert result["level"] == (logging.INFO if rank == 0 else logging.WARNING)


def environment_report(rank: int, world_size: int) -> str:
    from transformers.cli.system import env

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        env()
    return printed.getvalue()


def test_the_environment_report_names_the_version() -> None:
    (text,) = run_clients(environment_report, 1)
    assert f"DeepSpeed version: {deepspeed.__version__}" in text


def switched_on_by_accelerate(rank: int, world_size: int, out: str) -> list[dict[str, Any]]:
    results = []
    os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_MIXED_PRECISION="bf16")
    for name, value in (
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", f"{out}/ds.json"),
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3"),
    ):
        os.environ[name] = value
        if name.endswith("STAGE"):
            os.environ.update(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="2", ACCELERATE_GRADIENT_CLIPPING="1.0")
        trainer = make_trainer(out, None, bf16=True, use_cpu=True, **SHORT)
        trainer.train()
        engine = trainer.model_wrapped
        results.append({"stage": engine.zero_optimization_stage(), **learned(trainer)})
        engine.destroy()
        del os.environ[name]
    return results


@pytest.mark.slow
def test_accelerates_variables_switch_the_trainer(tmp_path: Path) -> None:
    """As `accelerate launch` sets them, with a config file and without; ``TrainingArguments`` say nothing."""
    ds = config(2, optimizer=True)
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    given = run_clients(train_many, 2, str(tmp_path), [(ds, {"bf16": True}), (config(3), {"bf16": True})])
    for results, expected in zip(run_clients(switched_on_by_accelerate, 2, str(tmp_path)), given, strict=True):
        assert [result["stage"] for result in results] == [2, 3]
        assert_same(results[0], expected[0])
        assert_near(results[1], expected[1], relative=1e-6, weight=1e-6)  # other buckets: sums in another order


# -- the guide ---------------------------------------------------------------------------------------------------------


def in_a_notebook(rank: int, world_size: int, folder: str, port: str) -> list[dict[str, Any]]:
    """A file of the first cell and the five variables; the same as a dict; and without offload."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
    os.environ["MASTER_ADDR"] = "localhost"
    os.environ["MASTER_PORT"] = port
    os.environ["RANK"] = "0"
    os.environ["LOCAL_RANK"] = "0"
    os.environ["WORLD_SIZE"] = "1"
    os.chdir(folder)
    Path("ds_config_zero3.json").write_text(json.dumps(guide("cpu")))
    return [train("out", ds, fp16=True) for ds in ("ds_config_zero3.json", guide("cpu"), guide("none"))]


def test_a_notebook_emulates_a_launcher(tmp_path: Path) -> None:
    from tests.helpers.clients import free_port

    ((path, given, plain),) = run_clients(in_a_notebook, 1, str(tmp_path), str(free_port()))
    assert len(path["loss"]) == 3 and path["optimizer"] == "DeepSpeedCPUAdam"
    assert_same(path, given)
    assert_near(path, plain, relative=1e-3, weight=2e-3)


def test_the_guides_offload_changes_nothing(tmp_path: Path) -> None:
    runs = [(guide(device, str(tmp_path), "bf16"), {"bf16": True}) for device in ("none", "cpu", "nvme")]
    for none, cpu, nvme in run_clients(train_many, 2, str(tmp_path), runs):
        assert len(none["loss"]) == 3 and none["loss"][-1] != none["loss"][0]
        for offloaded in (cpu, nvme):
            assert_near(offloaded, none, relative=1e-3, weight=2e-3)
        assert_same(cpu, nvme)


@pytest.mark.slow
def test_optimizers_of_the_trainer_under_offload(tmp_path: Path) -> None:
    """Accelerate replaces torch's AdamW by our CPU optimizer, unless it is told not to; both with either schedule."""
    runs: list[Any] = []
    for stage, scheduler in ((2, True), (3, False)):
        for device, forced in (("none", True), ("cpu", True), ("cpu", False)):
            ds = config(stage, scheduler=scheduler, zero_force_ds_cpu_optimizer=forced)
            ds["zero_optimization"]["offload_optimizer"] = {"device": device}
            runs.append((ds, {}))
    for results in run_clients(train_many, 2, str(tmp_path), runs):
        names = [result["optimizer"] for result in results]
        assert names == ["AdamW", "DeepSpeedCPUAdam", "AdamW"] * 2
        for plain, *offloaded in (results[:3], results[3:]):
            for result in offloaded:
                assert_near(result, plain)
                assert result["lr"] == plain["lr"]


@pytest.mark.slow
def test_optimizers_and_schedules_mix_at_stage_3(tmp_path: Path) -> None:
    pairs = [(True, False), (False, True)]
    runs = [(config(stage, optimizer=o, scheduler=s), {}) for stage in (2, 3) for o, s in pairs]
    for results in run_clients(train_many, 2, str(tmp_path), runs):
        for two, three in zip(results[:2], results[2:], strict=True):
            assert_near(three, two, relative=1e-6, weight=1e-6)
            assert three["lr"] == two["lr"]


@pytest.mark.slow
def test_recomputed_activations_at_stage_3(tmp_path: Path) -> None:
    runs: list[Any] = [(config(3), {})]
    for reentrant in (True, False):
        extra = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        runs.append((config(3), extra))
    for plain, *recomputed in run_clients(train_many, 2, str(tmp_path), runs):
        for result in recomputed:
            assert_near(result, plain, relative=1e-6, weight=1e-6)


# -- other ways to train -----------------------------------------------------------------------------------------------


class Line(torch.nn.Module):
    """a x + b, with parameters of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor([1.0]))
        self.b = torch.nn.Parameter(torch.tensor([-1.0]))
        self.seen: set[torch.dtype] = set()

    def forward(self, input_x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        self.seen.add(input_x.dtype)
        made = input_x * self.a + self.b
        return (made,) if labels is None else (torch.nn.functional.mse_loss(made, labels), made)


def points() -> list[dict[str, Any]]:
    x = torch.linspace(-1, 1, 36)
    return [{"input_x": v.reshape(1), "labels": (2 * v + 3).reshape(1)} for v in x]


def line_trainer(out: str, stage: int, **extra: Any) -> Trainer:
    ds = config(stage, optimizer=True, scheduler=True, **extra.pop("sections", {}))
    ds["zero_optimization"] = {"stage": stage}  # there is no hidden size to make "auto" of
    trainer = make_trainer(out, ds, model=Line(), **{"learning_rate": 0.1, "max_steps": 4, "warmup_steps": 1, **extra})
    trainer.train_dataset = trainer.eval_dataset = points()
    return trainer


def other_models(rank: int, world_size: int, out: str) -> list[dict[str, Any]]:
    results = []
    for stage in (2, 3):
        trainer = line_trainer(out, stage, bf16=True)
        backward = trainer.accelerator.backward
        # As the Trainer does for LOMO, whose rate goes to backward.
        trainer.accelerator.backward = lambda loss, b=backward, **more: b(loss, learning_rate=0.1, **more)  # type: ignore[method-assign]
        trainer.train()
        engine = trainer.model_wrapped
        state = {p.ds_status.name for p in engine.module.parameters()} if stage == 3 else None
        before = trainer.evaluate()["eval_loss"]
        results.append(
            {
                "seen": [str(dtype) for dtype in trainer.model.seen],
                "values": (trainer.model.a.item(), trainer.model.b.item()),
                "state": state,
                "eval": before,
                "predicted": trainer.predict(points()).predictions.shape,
                "scheduler": type(trainer.lr_scheduler).__name__,
            }
        )
        engine.destroy()
    return results


def test_models_that_are_not_transformers(tmp_path: Path) -> None:
    for results in run_clients(other_models, 2, str(tmp_path)):
        for result in results:
            assert result["seen"] == ["torch.bfloat16"]
            assert result["predicted"] == (36, 1)
            assert result["values"] == results[0]["values"] != (1.0, -1.0)
        assert results[1]["state"] == {"AVAILABLE"}  # below the persistence threshold


def early_rates(rank: int, world_size: int, out: str) -> list[Any]:
    results = []
    for stage in (2, 3):
        sections = {"fp16": {"enabled": "auto", "initial_scale_power": 40, "hysteresis": 1}}
        trainer = line_trainer(out, stage, fp16=True, sections=sections)
        trainer.train()
        rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((rates, trainer.model.a.item(), trainer.model_wrapped.skipped_steps))
        trainer.model_wrapped.destroy()
    return results


def test_rates_are_known_before_the_first_step_that_counts(tmp_path: Path) -> None:
    """All steps overflow, so that the engine's schedule never begins."""
    (results,) = run_clients(early_rates, 1, str(tmp_path))
    assert results == [([0.0] * 4, 1.0, 4)] * 2


def train_twice(rank: int, world_size: int, out: str) -> list[Any]:
    pairs = []
    for stage in (2, 3):
        ds = config(stage, optimizer=True, scheduler=True)
        results = []
        for anew in (False, True):
            trainer = make_trainer(out, ds, **SHORT)
            trainer.train()
            if anew:
                trainer = make_trainer(out, ds, model=trainer.model, **SHORT)
            else:
                # The Trainer would go on with the engine that it has destroyed: docs/clients/transformers.md
                trainer.model_wrapped = trainer.model
            trainer.train()
            results.append(learned(trainer))
            trainer.model_wrapped.destroy()
        pairs.append(results)
    return pairs


@pytest.mark.slow
def test_a_trainer_trains_again(tmp_path: Path) -> None:
    """A new engine takes over the model from the one before, whether or not the Trainer is the same."""
    for pairs in run_clients(train_twice, 2, str(tmp_path)):
        for one, other in pairs:
            assert_same(one, other)
            assert one["loss"][0] < 3.5  # it went on from what was learned


class OneAfterAnother:
    """A search backend as Transformers' own are, that tries what it is told to."""

    name = "wandb"  # the one whose trials are plain dicts

    def ensure_available(self) -> None:
        pass

    def default_hp_space(self, trial: Any) -> Any:
        return None

    def run(self, trainer: Trainer, n_trials: int, direction: str, trials: Any, **_: Any) -> BestRun:
        runs = []
        for number, trial in enumerate(trials[:n_trials]):
            trainer.objective = None
            trainer.train(trial=dict(trial))
            trainer.objective = trainer.compute_objective(trainer.evaluate())
            runs.append(BestRun(str(number), trainer.objective, learned(trainer)))
        return min(runs, key=lambda run: run.objective)


def search(rank: int, world_size: int, out: str, stage: int) -> list[Any]:
    transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS[HPSearchBackend.WANDB] = OneAfterAnother
    transformers.integrations.integration_utils.is_wandb_available = lambda: True
    trials = [
        {"learning_rate": 1e-4},
        {"learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ]
    ds = config(stage, optimizer=True, scheduler=True)

    def make(**extra: Any) -> Trainer:
        arguments = make_trainer(out, ds, **{**SHORT, **extra}).args
        AcceleratorState._reset_state()
        data = {"train_dataset": Sequences(36), "eval_dataset": Sequences(16, seed=5)}
        return Trainer(args=arguments, model_init=lambda: tiny_gpt2(), **data)

    trainer = make()
    trainer._get_output_dir = lambda trial: out  # type: ignore[method-assign]  # it would ask wandb for a name
    best = trainer.hyperparameter_search(
        backend="wandb", n_trials=2, direction="minimize", trials=trials, hp_space=lambda trial: None
    )
    engine = trainer.model_wrapped
    again = make(**trials[1])
    again.train()
    return [best.run_id, best.hyperparameters, learned(again), engine.train_micro_batch_size_per_gpu()]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_hyperparameters_are_searched_with_an_engine_each(stage: int, tmp_path: Path) -> None:
    for run, found, again, micro in run_clients(search, 2, str(tmp_path), stage):
        assert run == "1" and micro == 2
        assert_same(found, again)


def translate(rank: int, world_size: int, out: str) -> dict[str, Any]:
    def make(ds: Any) -> Seq2SeqTrainer:
        AcceleratorState._reset_state()
        torch.manual_seed(0)
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
        arguments = Seq2SeqTrainingArguments(
            out,
            use_cpu=True,
            ddp_backend="gloo",
            deepspeed=ds,
            predict_with_generate=True,
            generation_max_length=8,
            max_steps=2,
            learning_rate=1e-2,
            report_to=[],
            disable_tqdm=True,
            per_device_eval_batch_size=1,
        )
        # Ranks have sentences that end at different lengths.
        rows = [
            {"input_ids": row["input_ids"][: 4 + i], "labels": row["labels"][:6]} for i, row in enumerate(Sequences(6))
        ]
        trainer = Seq2SeqTrainer(model, arguments, train_dataset=Sequences(16), eval_dataset=rows)
        trainer.train()
        return trainer

    plain = make(None)
    expected = plain.predict(plain.eval_dataset)
    trainer = make(config(3))
    assert trainer.model_wrapped.zero_optimization_stage() == 3
    made = trainer.predict(trainer.eval_dataset)
    return {
        "made": made.predictions.tolist(),
        "expected": expected.predictions.tolist(),
        "loss": made.metrics["test_loss"],
        "expected_loss": expected.metrics["test_loss"],
    }


@pytest.mark.slow
def test_generating_while_predicting(tmp_path: Path) -> None:
    for result in run_clients(translate, 2, str(tmp_path)):
        assert result["made"] == result["expected"]
        assert result["loss"] == pytest.approx(result["expected_loss"], rel=1e-4)
