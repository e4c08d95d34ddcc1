"""The unmodified Transformers Trainer on CPU processes: every run is compared with the same Trainer without deepspeed."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the client is not installed: make test-clients installs it")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate: make test-clients installs it")

import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.integrations import HfDeepSpeedConfig

import deepspeed
from deepspeed.checkpoint.ds_to_universal import convert
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint, load_state_dict_from_zero_checkpoint
from tests.helpers.clients import Sequences, assert_identical, assert_weights_close, run_clients, tiny_gpt2

pytestmark = pytest.mark.client

DS_OPTIMIZER = {
    "type": "AdamW",
    "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
}
# Linear like the Trainer's own default schedule; WarmupLR's default warmup is logarithmic.
DS_SCHEDULER = {
    "type": "WarmupDecayLR",
    "params": {
        "warmup_min_lr": "auto",
        "warmup_max_lr": "auto",
        "warmup_num_steps": "auto",
        "total_num_steps": "auto",
        "warmup_type": "linear",
    },
}


def config(stage: int, optimizer: bool = False, scheduler: bool = False, **extra: Any) -> dict[str, Any]:
    """What the Trainer's documentation recommends: "auto" wherever the Trainer has a say."""
    made: dict[str, Any] = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": stage,
            "allgather_partitions": True,
            "allgather_bucket_size": 2e8,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": "auto",
            "contiguous_gradients": True,
            "stage3_param_persistence_threshold": "auto",
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    }
    if optimizer:
        made["optimizer"] = copy.deepcopy(DS_OPTIMIZER)
    if scheduler:
        made["scheduler"] = copy.deepcopy(DS_SCHEDULER)
    return {**made, **extra}


class OneLater(Trainer):
    """Its schedule is that of the config's ``scheduler``: index 0 holds for two steps, since the engine's first update
    comes before the schedule's first step; the Trainer's own schedule is at index k in step k + 1."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        made = super().create_scheduler(num_training_steps, optimizer)
        factor = made.lr_lambdas[0]
        made.lr_lambdas = [lambda step: factor(max(0, step - 1))] * len(made.lr_lambdas)
        return made


def make_trainer(
    out: str, ds: dict[str, Any] | None, model: Any = None, dropout: float = 0.0, later: bool = False, **extra: Any
) -> Trainer:
    AcceleratorState._reset_state()  # what an earlier Trainer of this process chose; the process group stays
    settings: dict[str, Any] = {
        "output_dir": out,
        "use_cpu": True,
        "ddp_backend": "gloo",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 1.0,
        "learning_rate": 5e-3,
        "warmup_steps": 2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "deepspeed": copy.deepcopy(ds),
        "seed": 7,
        **extra,
    }
    # 36 samples on one or two ranks: 9 and 5 micro-batches an epoch, so that the last window has only one.
    kind = OneLater if later else Trainer
    return kind(
        model=tiny_gpt2(dropout=dropout) if model is None else model,
        args=TrainingArguments(**settings),
        train_dataset=Sequences(36),
        eval_dataset=Sequences(16, seed=5),
    )


def outcome(trainer: Trainer) -> dict[str, Any]:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "loss": [entry["loss"] for entry in logs],
        "grad_norm": [float(entry["grad_norm"]) for entry in logs],
        "lr": [entry["learning_rate"] for entry in logs],
        "weights": {name: t.detach().float().clone() for name, t in trainer.model.state_dict().items()},
        "steps": trainer.state.global_step,
        "ahead": getattr(trainer.model_wrapped, "lr_scheduler", None) is not None,
    }


def fit(out: str, ds: dict[str, Any] | None, **extra: Any) -> dict[str, Any]:
    trainer = make_trainer(out, ds, **extra)
    trainer.train()
    result = {"eval": trainer.evaluate()["eval_loss"], **outcome(trainer)}
    if ds is not None:
        engine = trainer.model_wrapped
        assert type(engine) is deepspeed.DeepSpeedEngine
        assert engine.zero_optimization_stage() == ds["zero_optimization"]["stage"]
        assert engine.global_steps == trainer.state.global_step
        engine.destroy()
    return result


def fit_many(rank: int, world_size: int, out: str, runs: list[tuple[Any, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Several Trainers after one another in one process."""
    return [fit(out, ds, **extra) for ds, extra in runs]


# The same arithmetic but for the order of sums over ranks and within Adam, whose 1/sqrt(v) enlarges a difference in the
# last bit of a tiny gradient to about 1e-5 in a weight.
FP32 = {"relative": 5e-5, "norm": 2e-4, "weight": 1e-4}


def assert_close(one: dict[str, Any], two: dict[str, Any], relative: float, norm: float, weight: float) -> None:
    assert one["steps"] == two["steps"]
    assert one["loss"] == pytest.approx(two["loss"], rel=relative)
    assert one["eval"] == pytest.approx(two["eval"], rel=relative)
    if one["ahead"]:  # the engine has stepped the schedule when the Trainer logs the rate
        assert one["lr"][:-1] == pytest.approx(two["lr"][1:], abs=1e-9)
    else:
        assert one["lr"] == pytest.approx(two["lr"], abs=1e-9)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=norm)
    assert_weights_close(one["weights"], two["weights"], atol=weight)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
def test_fp32_training_is_that_of_the_plain_trainer(world_size: int, tmp_path: Path) -> None:
    """HF optimizer and schedule, accumulation with a short last window, clipping."""
    runs = [(None, {}), *((config(stage), {}) for stage in (0, 1, 2))]
    for results in run_clients(fit_many, world_size, str(tmp_path), runs):
        plain = results[0]
        assert plain["loss"][-1] < plain["loss"][0] - 0.1  # it learns, so that equality means something
        assert max(plain["grad_norm"]) > 1.0  # and clips
        for ours in results[1:]:
            assert_close(ours, plain, **FP32)


@pytest.mark.parametrize("world_size", [1, 2])
def test_bf16_with_everything_auto(world_size: int, tmp_path: Path) -> None:
    """Optimizer and schedule of the config, values from TrainingArguments. The plain Trainer computes in autocast on
    fp32 weights, the engine on bf16 weights (8 bits of mantissa) with fp32 masters: losses agree within a percent."""
    runs: list[Any] = [(None, {"bf16": True, "later": True})]
    runs += [(config(stage, optimizer=True, scheduler=True), {"bf16": True}) for stage in (0, 1, 2)]
    for results in run_clients(fit_many, world_size, str(tmp_path), runs):
        for ours in results[1:]:
            assert_close(ours, results[0], relative=1e-2, norm=0.1, weight=3e-2)
            assert_identical(ours["weights"], {n: t.bfloat16().float() for n, t in ours["weights"].items()})


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_all_pairs_of_optimizer_and_scheduler_train_alike(stage: int, tmp_path: Path) -> None:
    runs: list[Any] = [(None, {}), (None, {"later": True})]
    runs += [(config(stage, optimizer=o, scheduler=s), {}) for s in (False, True) for o in (False, True)]
    for results in run_clients(fit_many, 2, str(tmp_path), runs):
        for ours, plain in zip(results[2:], [0, 0, 1, 1], strict=True):
            assert_close(ours, results[plain], **FP32)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_accumulation_equals_one_larger_batch(stage: int, tmp_path: Path) -> None:
    runs = [
        (config(stage), {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}),
        (config(stage), {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}),
    ]
    (results,) = run_clients(fit_many, 1, str(tmp_path), runs)
    assert_close(results[1], results[0], relative=1e-4, norm=1e-3, weight=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["gradient_checkpointing", "adafactor", "sgd", "full_eval", "cosine", "fp16"])
def test_options_of_the_trainer(option: str, tmp_path: Path) -> None:
    extra: dict[str, Any] = {
        "gradient_checkpointing": {"gradient_checkpointing": True},
        "adafactor": {"optim": "adafactor", "warmup_steps": 0},
        "sgd": {"optim": "sgd"},
        "full_eval": {"bf16": True, "bf16_full_eval": True},
        "cosine": {"lr_scheduler_type": "cosine"},
        "fp16": {"fp16": True},
    }[option]
    stage = 0 if option == "adafactor" else 2  # Adafactor's factors are of whole matrices
    ds = config(stage)
    if option == "fp16":
        ds["fp16"] = {"enabled": "auto", "initial_scale_power": 10}
    for results in run_clients(fit_many, 2, str(tmp_path), [(None, {} if option == "fp16" else extra), (ds, extra)]):
        if option in ("fp16", "full_eval"):
            assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=2e-2)
        elif option == "adafactor":
            # It divides by the gradient's size whatever that is: the keys' biases, whose gradients are zero but for
            # rounding, go anywhere in both runs; no output depends on them.
            assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-4)
        else:
            assert_close(results[1], results[0], **FP32)


def after_running_out_of_memory(rank: int, world_size: int, out: str, stage: int) -> dict[str, Any]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    deepspeed.utils.logger.addHandler(handler)
    ds = config(stage, optimizer=True, scheduler=True)
    trainer = make_trainer(out, ds, max_steps=3, bf16=True, auto_find_batch_size=True, log_level="info")
    trained, sizes = trainer.training_step, []

    def too_large(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise RuntimeError("CUDA out of memory.")
        return trained(model, inputs, *args, **kwargs)

    trainer.training_step = too_large  # type: ignore[method-assign]
    trainer.train()
    return {
        "info": any("DeepSpeed info" in text for text in records),
        "sizes": sizes,
        "stage": trainer.model_wrapped.config.get("zero_optimization", {}).get("stage"),
        "dtype": str(trainer.model.dtype),
        **outcome(trainer),
    }


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])  # Transformers refuses stage 3
def test_the_batch_size_finder_wraps_the_model_again(stage: int, tmp_path: Path) -> None:
    for rank, result in enumerate(run_clients(after_running_out_of_memory, 2, str(tmp_path), stage)):
        assert result["info"] == (rank == 0)
        assert result["sizes"][0] == 4 and min(result["sizes"]) == 2
        assert result["steps"] == len(result["loss"]) == 3
        assert result["stage"] == stage and result["dtype"] == "torch.bfloat16"


# -- saving and resuming -----------------------------------------------------------------------------------------------

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "dropout": 0.1}


def save_and_resume(rank: int, world_size: int, out: str, ds: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """An uninterrupted run that saves, and a second one from its checkpoint."""
    trainer = make_trainer(out, ds, **SAVING, **extra)
    trainer.train()
    result: dict[str, Any] = {"whole": outcome(trainer)}
    trainer.model_wrapped.destroy()
    trainer = make_trainer(out + "-again", ds, **SAVING, **extra)
    trainer.train(resume_from_checkpoint=f"{out}/checkpoint-4")
    result["resumed"] = outcome(trainer)
    result["eval"] = trainer.evaluate()["eval_loss"]
    trainer.save_model(out + "-model")
    trainer.model_wrapped.destroy()
    return result


def check_checkpoint(folder: Path, step: int, stage: int, world_size: int, bf16: bool) -> None:
    tag = folder / f"global_step{step}"
    assert (tag / "mp_rank_00_model_states.pt").is_file()
    assert (folder / "latest").read_text() == tag.name
    prefix = "bf16_" if bf16 else ""
    names = {f"{prefix}zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(world_size)} if stage else set()
    assert {p.name for p in tag.glob("*optim_states.pt")} == names
    assert os.access(folder / "zero_to_fp32.py", os.X_OK)


@pytest.mark.parametrize(
    ("stage", "world_size", "own"),
    [
        (2, 2, True),
        pytest.param(0, 1, True, marks=pytest.mark.slow),
        pytest.param(0, 2, False, marks=pytest.mark.slow),
        pytest.param(1, 1, False, marks=pytest.mark.slow),
        pytest.param(1, 2, True, marks=pytest.mark.slow),
        pytest.param(2, 1, True, marks=pytest.mark.slow),
        pytest.param(2, 2, False, marks=pytest.mark.slow),
    ],
)
def test_resuming_is_bit_equal(stage: int, world_size: int, own: bool, tmp_path: Path) -> None:
    """Weights, losses, rates and norms after the checkpoint, with dropout, are those of the run that went on."""
    out = tmp_path / "out"
    ds = config(stage, optimizer=own, scheduler=own)
    for result in run_clients(save_and_resume, world_size, str(out), ds, {"bf16": True}):
        whole, resumed = result["whole"], result["resumed"]
        assert resumed["steps"] == whole["steps"] > 4
        for key in ("loss", "grad_norm", "lr"):
            assert resumed[key] == whole[key], key
        assert_identical(resumed["weights"], whole["weights"])
    last = out / f"checkpoint-{whole['steps']}"
    check_checkpoint(out / "checkpoint-4", 4, stage, world_size, bf16=True)
    check_checkpoint(last, whole["steps"], stage, world_size, bf16=True)
    check_exports(last, Path(f"{out}-model"), whole["weights"], stage)


def resume_universal(rank: int, world_size: int, out: str, ds: dict[str, Any]) -> dict[str, Any]:
    """An uninterrupted run that saves, and a second one from its checkpoint in universal form, which is all that is left."""
    trainer = make_trainer(out, ds, **SAVING)
    trainer.train()
    result: dict[str, Any] = {"whole": outcome(trainer)}
    trainer.model_wrapped.destroy()
    if rank == 0:
        checkpoint = Path(out) / "checkpoint-4"
        convert(checkpoint / "global_step4", checkpoint / "global_step4_universal")
        shutil.rmtree(checkpoint / "global_step4")
    torch.distributed.barrier()
    trainer = make_trainer(out + "-again", {**ds, "checkpoint": {"load_universal": True}}, **SAVING)
    trainer.train(resume_from_checkpoint=f"{out}/checkpoint-4")
    result["resumed"] = outcome(trainer)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_resuming_from_a_universal_folder_is_bit_equal(stage: int, tmp_path: Path) -> None:
    for result in run_clients(resume_universal, 2, str(tmp_path / "run"), config(stage, optimizer=True)):
        whole, resumed = result["whole"], result["resumed"]
        assert resumed["steps"] == whole["steps"] > 4
        for key in ("loss", "grad_norm", "lr"):
            assert resumed[key] == whole[key], key
        if stage < 3:  # partitioned weights are not in a state dict
            assert_identical(resumed["weights"], whole["weights"])


def check_exports(checkpoint: Path, model_dir: Path, weights: dict[str, torch.Tensor], stage: int) -> None:
    for folder in (checkpoint, model_dir):
        loaded = AutoModelForCausalLM.from_pretrained(folder).float().state_dict()
        assert_identical(weights, loaded)
    if stage == 0:
        return
    script = [str(checkpoint / "zero_to_fp32.py"), str(checkpoint), str(checkpoint / "fp32")]
    # By path, as the Trainer's users do; through this interpreter, since `env python3` may have no torch.
    ran = subprocess.run([sys.executable, *script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    files = sorted((checkpoint / "fp32").glob("*.bin"))
    assert files, ran.stdout
    fp32 = torch.load(files[0], weights_only=True)
    assert all(t.dtype == torch.float32 for t in fp32.values())
    assert_identical(
        {n: t for n, t in weights.items() if n in fp32}, {n: t.bfloat16().float() for n, t in fp32.items()}
    )
    assert_identical(fp32, get_fp32_state_dict_from_zero_checkpoint(str(checkpoint)))
    model = load_state_dict_from_zero_checkpoint(tiny_gpt2(seed=3), str(checkpoint))
    assert_identical(fp32, model.state_dict())


def best_model(rank: int, world_size: int, out: str, stage: int) -> dict[str, Any]:
    trainer = make_trainer(
        out,
        config(stage, optimizer=True, scheduler=True),
        bf16=True,
        # Each pass overshoots after a while, so that the best is not the last.
        learning_rate=0.3,
        max_grad_norm=0.0,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        save_total_limit=2,
    )
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    after = trainer.evaluate()["eval_loss"]
    return {
        "losses": losses,
        "after": after,
        "best": trainer.state.best_metric,
        "checkpoint": trainer.state.best_model_checkpoint,
        "kept": sorted(p.name for p in Path(out).glob("checkpoint-*")),
    }


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_the_best_model_comes_back_at_the_end(stage: int, tmp_path: Path) -> None:
    for result in run_clients(best_model, 2, str(tmp_path / "out"), stage):
        step = min(result["losses"], key=result["losses"].get)
        assert step != max(result["losses"]), "the data should make the last model a worse one"
        assert result["checkpoint"].endswith(f"checkpoint-{step}")
        assert result["after"] == pytest.approx(result["losses"][step], rel=1e-6)
        assert len(result["kept"]) == 2 and f"checkpoint-{step}" in result["kept"]


def overflow_run(rank: int, world_size: int, out: str) -> dict[str, Any]:
    ds = config(2)
    ds["fp16"] = {"enabled": "auto", "initial_scale_power": 40, "hysteresis": 1}
    trainer = make_trainer(out, ds, fp16=True, max_steps=3, save_strategy="steps", save_steps=1)
    before = {n: t.detach().clone().half() for n, t in trainer.model.state_dict().items()}
    trainer.train()
    engine = trainer.model_wrapped
    same = all(torch.equal(t, before[n]) for n, t in trainer.model.state_dict().items())
    return {"skipped": engine.skipped_steps, "steps": engine.global_steps, "same": same, "lr": engine.get_lr()}


@pytest.mark.slow
def test_skipped_steps_keep_checkpoint_names_in_step(tmp_path: Path) -> None:
    for result in run_clients(overflow_run, 1, str(tmp_path)):
        assert result == {"skipped": 3, "steps": 3, "same": True, "lr": [0.0, 0.0]}
    for step in (1, 2, 3):
        assert (tmp_path / f"checkpoint-{step}" / f"global_step{step}").is_dir()


def failing_resume(rank: int, world_size: int, out: str) -> list[str]:
    errors = []
    for checkpoint in (True, f"{out}/checkpoint-77"):
        trainer = make_trainer(out, config(2), max_steps=1)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


@pytest.mark.slow
def test_resuming_from_nothing_is_an_error(tmp_path: Path) -> None:
    ((first, second),) = run_clients(failing_resume, 1, str(tmp_path))
    assert "No valid checkpoint found" in first
    assert "checkpoint-77" in second


# -- adapters ----------------------------------------------------------------------------------------------------------


def lora(rank: int, world_size: int, out: str, ds: dict[str, Any] | None) -> dict[str, Any]:
    import peft

    def wrapped() -> Any:
        settings = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
        )
        return peft.get_peft_model(tiny_gpt2(), settings)

    extra = {"save_strategy": "steps", "save_steps": 4, "bf16": ds is not None}
    trainer = make_trainer(out, ds, model=wrapped(), **extra)
    trainer.train()
    result = {"whole": outcome(trainer)}
    trainer.save_model(out + "-adapter")
    trainer = make_trainer(out + "-again", ds, model=wrapped(), **extra)
    trainer.train(resume_from_checkpoint=f"{out}/checkpoint-4")
    result["resumed"] = outcome(trainer)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_lora(world_size: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the client is not installed: make test-clients installs it")
    plain = run_clients(lora, world_size, str(tmp_path / "plain"), None)
    ours = run_clients(lora, world_size, str(tmp_path / "ours"), config(2))
    for result, reference in zip(ours, plain, strict=True):
        assert result["whole"]["loss"] == pytest.approx(reference["whole"]["loss"], rel=2e-2)  # bf16 against fp32
        assert result["resumed"]["loss"] == result["whole"]["loss"]
        assert_identical(result["whole"]["weights"], result["resumed"]["weights"])
    model = peft.PeftModel.from_pretrained(tiny_gpt2(), str(tmp_path / "ours-adapter"))
    loaded = model.state_dict()
    trained = {n: t for n, t in ours[0]["whole"]["weights"].items() if "lora_" in n}
    assert {n: t.shape for n, t in trained.items()} == {n: loaded[n].shape for n in trained}
    assert any(t.abs().max() > 0 for n, t in trained.items() if "lora_B" in n)
    assert_identical(trained, {n: loaded[n].float() for n in trained})
    # Only what is trained is in the checkpoint; the frozen model is where it came from.
    saved = torch.load(
        tmp_path / "ours" / "checkpoint-4" / "global_step4" / "mp_rank_00_model_states.pt", weights_only=True
    )
    assert saved["module"] and all("lora_" in name for name in saved["module"])


# -- around it ---------------------------------------------------------------------------------------------------------


def config_object(rank: int, world_size: int) -> dict[str, Any]:
    """``HfDeepSpeedConfig`` alive while a model is loaded, without ZeRO-3: nothing changes."""
    ds = config(2)
    ds.update(
        train_batch_size=4, train_micro_batch_size_per_gpu=4, gradient_accumulation_steps=1, gradient_clipping=1.0
    )
    ds["zero_optimization"].pop("reduce_bucket_size")
    ds["zero_optimization"].pop("stage3_param_persistence_threshold")
    ds["bf16"], ds["fp16"] = {"enabled": True}, {"enabled": False}
    ds["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2}}
    holder = HfDeepSpeedConfig(ds)
    model = tiny_gpt2()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds)
    losses = []
    batch = {k: torch.stack([Sequences(4)[i][k] for i in range(4)]) for k in ("input_ids", "labels")}
    for _ in range(5):
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    made = engine.generate(batch["input_ids"][:1, :4], max_new_tokens=4, do_sample=False)
    return {"stage": holder.is_zero2(), "losses": losses, "generated": tuple(made.shape)}


def test_transformers_without_the_trainer() -> None:
    (result,) = run_clients(config_object, 1)
    assert result["stage"] and result["generated"] == (1, 8)
    assert result["losses"][-1] < result["losses"][0] - 0.3
