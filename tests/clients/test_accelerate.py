"""The unmodified Accelerate on CPU processes: its own loops, compared with the same loop without deepspeed."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="the client is not installed: make test-clients installs it")
pytest.importorskip("transformers", reason="the tests train a GPT-2 of transformers: make test-clients installs it")

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler
from transformers import AutoModelForCausalLM

import deepspeed
from tests.helpers.clients import Sequences, assert_identical, assert_weights_close, run_clients, tiny_gpt2

pytestmark = pytest.mark.client

ACCUMULATION, CLIP, STEPS = 2, 1.0, 6


def config(stage: int, **extra: Any) -> dict[str, Any]:
    """As in Accelerate's documentation: "auto" where Accelerate knows the value."""
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True, "adam_w_mode": True},
        },
        **extra,
    }


WARMUP = {
    "type": "WarmupLR",
    "params": {
        "warmup_min_lr": "auto",
        "warmup_max_lr": "auto",
        "warmup_num_steps": "auto",
        "warmup_type": "linear",
    },
}


def plugin(stage: int, ds: dict[str, Any] | None = None) -> DeepSpeedPlugin:
    given = {"hf_ds_config": copy.deepcopy(ds)} if ds is not None else {"zero_stage": stage}
    return DeepSpeedPlugin(gradient_accumulation_steps=ACCUMULATION, gradient_clipping=CLIP, **given)


def make_accelerator(plugins: Any, precision: str = "no") -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)  # what an earlier one of this process chose
    return Accelerator(
        cpu=plugins is None,  # it turns DeepSpeed off; with plugins the device is found to be the CPU
        mixed_precision=precision,
        deepspeed_plugin=plugins if isinstance(plugins, DeepSpeedPlugin) else None,
        deepspeed_plugins=plugins if isinstance(plugins, dict) else None,
        gradient_accumulation_steps=ACCUMULATION,
        # Without it Accelerate takes a CPU program with DeepSpeed for one process.
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )


def loader(seed: int = 0) -> Any:
    # 12 micro-batches of 4 on one rank, 6 on two.
    return torch.utils.data.DataLoader(Sequences(48, seed), batch_size=4)


def warmup(optimizer: Any, ranks: int = 1) -> Any:
    """Accelerate steps a scheduler of its own once for every rank, the engine once."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step // ranks + 1) / 3))


def prepare(accelerator: Accelerator, model: Any, dummies: str = "", lr: float = 5e-3) -> tuple[Any, ...]:
    optimizer: Any
    if dummies:
        optimizer = DummyOptim(model.parameters(), lr=lr, weight_decay=0.01)
        scheduler = (
            DummyScheduler(optimizer, lr_scheduler_callable=warmup)
            if dummies == "callable"
            else DummyScheduler(optimizer, total_num_steps=STEPS, warmup_num_steps=3)
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
        scheduler = warmup(optimizer, accelerator.num_processes)
    return accelerator.prepare(model, optimizer, loader(), scheduler)  # type: ignore[no-any-return]


def run_epoch(accelerator: Accelerator, model: Any, optimizer: Any, data: Any, scheduler: Any, record: Any) -> None:
    model.train()
    for batch in data:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), CLIP)
                record["norm"].append(float(norm))
                record["lr"].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        record["loss"].append(float(accelerator.gather(loss.detach()).mean()))


def weights(accelerator: Accelerator, model: Any) -> dict[str, torch.Tensor]:
    return {n: t.detach().float().clone() for n, t in accelerator.unwrap_model(model).state_dict().items()}


def fit(stage: int | None, precision: str = "no", dummies: str = "", epochs: int = 2) -> dict[str, Any]:
    plugins = None
    if stage is not None:
        extra = {"scheduler": copy.deepcopy(WARMUP)} if dummies == "config" else {}
        plugins = plugin(stage, config(stage, **extra) if dummies else None)
    accelerator = make_accelerator(plugins, precision)
    model, optimizer, data, scheduler = prepare(accelerator, tiny_gpt2(), dummies)
    record: dict[str, Any] = {"loss": [], "norm": [], "lr": [], "world": accelerator.num_processes}
    for _ in range(epochs):
        run_epoch(accelerator, model, optimizer, data, scheduler, record)
    record["weights"] = weights(accelerator, model)
    if stage is not None:
        assert type(model) is deepspeed.DeepSpeedEngine
        assert model.zero_optimization_stage() == stage
        assert model.global_steps == len(record["norm"])
        assert not isinstance(accelerator.unwrap_model(model), deepspeed.DeepSpeedEngine)
        full = accelerator.get_state_dict(model)
        assert all(torch.equal(full[n].float(), t) for n, t in record["weights"].items())
    accelerator.free_memory()
    return record


def fit_many(rank: int, world_size: int, runs: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [fit(*run) for run in runs]


def assert_close(one: dict[str, Any], two: dict[str, Any], relative: float, norm: float, weight: float) -> None:
    assert one["world"] == two["world"]
    assert one["loss"] == pytest.approx(two["loss"], rel=relative)
    assert one["norm"] == pytest.approx(two["norm"], rel=norm)
    assert_weights_close(one["weights"], two["weights"], atol=weight)


# The same arithmetic but for the order of sums over ranks and within Adam, whose 1/sqrt(v) enlarges a difference in the
# last bit of a tiny gradient to about 1e-5 in a weight.
FP32 = {"relative": 5e-5, "norm": 2e-4, "weight": 1e-4}


@pytest.mark.parametrize("world_size", [1, 2])
def test_fp32_loop_is_that_without_deepspeed(world_size: int) -> None:
    """A torch optimizer and scheduler; Accelerate sets the boundary and steps the scheduler, the engine clips."""
    for results in run_clients(fit_many, world_size, [(None,), (0,), (1,), (2,)]):
        plain = results[0]
        assert plain["world"] == world_size
        assert plain["loss"][-1] < plain["loss"][0] - 0.1 and max(plain["norm"]) > CLIP
        for ours in results[1:]:
            assert_close(ours, plain, **FP32)
            assert ours["lr"] == plain["lr"]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_bf16_loop(world_size: int) -> None:
    """Without deepspeed: autocast on fp32 weights; with: bf16 weights (8 bits of mantissa) and fp32 masters."""
    for results in run_clients(fit_many, world_size, [(s, "bf16") for s in (None, 0, 1, 2)]):
        for ours in results[1:]:
            assert_close(ours, results[0], relative=1e-2, norm=0.1, weight=3e-2)
            assert all(torch.equal(t, t.bfloat16().float()) for t in ours["weights"].values())


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_fp16_loop(world_size: int) -> None:
    """The initial scale 2^16 overflows nothing here; fp16 has 11 bits of mantissa."""
    for results in run_clients(fit_many, world_size, [(None,), (0, "fp16"), (1, "fp16"), (2, "fp16")]):
        for ours in results[1:]:
            assert_close(ours, results[0], relative=5e-3, norm=3e-2, weight=3e-2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_optimizer_and_schedule_of_the_config(stage: int) -> None:
    """``DummyOptim`` with a callable schedule trains like the loop's own objects; with the config's, like that schedule."""
    runs = [(None,), (stage, "no", "callable"), (stage, "no", "config")]
    for plain, called, own in run_clients(fit_many, 2, runs):
        assert_close(called, plain, **FP32)
        # The engine has stepped the schedule when the loop reads the rate.
        assert called["lr"][:-1] == pytest.approx(plain["lr"][1:])
        assert own["lr"][:4] == pytest.approx([0.0, 5e-3 / 3, 2 * 5e-3 / 3, 5e-3])
        assert own["loss"][-1] < own["loss"][0]


# -- saving ------------------------------------------------------------------------------------------------------------


def save_and_load(rank: int, world_size: int, out: str, stage: int, dummies: str) -> dict[str, Any]:
    ds = config(stage, **({"scheduler": copy.deepcopy(WARMUP)} if dummies == "config" else {})) if dummies else None

    def start() -> tuple[Accelerator, Any]:
        accelerator = make_accelerator(plugin(stage, ds), "bf16")
        return accelerator, prepare(accelerator, tiny_gpt2(dropout=0.1), dummies)

    def empty() -> dict[str, Any]:
        return {"loss": [], "norm": [], "lr": []}

    accelerator, (model, optimizer, data, scheduler) = start()
    run_epoch(accelerator, model, optimizer, data, scheduler, empty())
    accelerator.save_state(f"{out}/state")
    after = empty()
    run_epoch(accelerator, model, optimizer, data, scheduler, after)
    result: dict[str, Any] = {"went_on": after, "weights": weights(accelerator, model)}
    # Back in the same program, then in a new one.
    for name in ("back", "new"):
        if name == "new":
            accelerator.free_memory()
            accelerator, (model, optimizer, data, scheduler) = start()
        accelerator.load_state(f"{out}/state")
        again = empty()
        run_epoch(accelerator, model, optimizer, data, scheduler, again)
        result[name] = again
        result[f"{name}_weights"] = weights(accelerator, model)
    accelerator.save_model(model, f"{out}/model")
    accelerator.unwrap_model(model).save_pretrained(
        f"{out}/pretrained", is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(model)
    )
    return result


@pytest.mark.parametrize(
    ("stage", "world_size", "dummies"),
    [
        (2, 2, ""),
        pytest.param(2, 1, "config", marks=pytest.mark.slow),
        pytest.param(1, 2, "config", marks=pytest.mark.slow),
        pytest.param(1, 1, "callable", marks=pytest.mark.slow),
        pytest.param(0, 2, "callable", marks=pytest.mark.slow),
    ],
)
def test_load_state_is_bit_equal(stage: int, world_size: int, dummies: str, tmp_path: Path) -> None:
    results = run_clients(save_and_load, world_size, str(tmp_path), stage, dummies)
    for result in results:
        for name in ("back", "new"):
            assert result[name] == result["went_on"], name
            assert_identical(result[f"{name}_weights"], result["weights"])
    assert (tmp_path / "state" / "pytorch_model" / "mp_rank_00_model_states.pt").is_file()
    assert (tmp_path / "state" / "scheduler.bin").is_file() == (dummies == "")
    assert_identical(
        AutoModelForCausalLM.from_pretrained(tmp_path / "pretrained").float().state_dict(), results[0]["weights"]
    )
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(t.float(), results[0]["weights"][n]) for n, t in saved.items()) and len(saved) > 10


# -- several models ----------------------------------------------------------------------------------------------------


def two_models(rank: int, world_size: int) -> dict[str, Any]:
    """Two trained models under two plugins, each with its Accelerator, and a frozen reference as trl sets it up."""
    plugins = {"student": plugin(2, config(2)), "teacher": plugin(1, config(1))}
    accelerators = {"student": make_accelerator(plugins, "bf16"), "teacher": Accelerator()}
    models, initial = {}, {}
    for number, (name, accelerator) in enumerate(accelerators.items()):
        accelerator.state.select_deepspeed_plugin(name)
        model = tiny_gpt2(seed=number)
        initial[name] = copy.deepcopy(model.state_dict())
        models[name] = prepare(accelerator, model, "callable")
    reference_config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    for key in ("optimizer", "scheduler"):
        reference_config.pop(key, None)
    reference_config["zero_optimization"]["stage"] = 0
    reference_config["zero_optimization.reduce_bucket_size"] = 32 * 32
    reference_config["zero_optimization.stage3_param_persistence_threshold"] = 10 * 32
    reference_config["zero_optimization.stage3_prefetch_bucket_size"] = 0.9 * 32 * 32
    frozen = tiny_gpt2(seed=0)
    reference, *_ = deepspeed.initialize(model=frozen, config=reference_config)
    reference.eval()
    losses: dict[str, list[float]] = {name: [] for name in plugins}
    apart = []
    for batch in models["student"][2]:
        with torch.no_grad():
            fixed = reference(**batch).logits
        for name, (model, optimizer, _, scheduler) in models.items():
            with accelerators[name].accumulate(model):
                made = model(**batch)
                accelerators[name].backward(made.loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses[name].append(float(made.loss))
            if name == "student":
                apart.append(float((made.logits - fixed).detach().abs().max()))
    return {
        "stages": [models[name][0].zero_optimization_stage() for name in plugins],
        "losses": losses,
        "apart": apart,
        "moved": {
            name: max(
                float((p.detach().float() - initial[name][n]).abs().max()) for n, p in item[0].module.named_parameters()
            )
            for name, item in models.items()
        },
        "reference": max(
            float((p.detach().float() - initial["student"][n].bfloat16().float()).abs().max())
            for n, p in frozen.named_parameters()
        ),
    }


def test_two_models_and_a_reference_in_one_program() -> None:
    for result in run_clients(two_models, 2):
        assert result["stages"] == [2, 1]
        assert all(moved > 1e-3 for moved in result["moved"].values())
        assert result["losses"]["student"] != result["losses"]["teacher"]
        assert result["reference"] == 0.0
        assert result["apart"][0] == 0.0 and result["apart"][-1] > 0.0


def overflow(rank: int, world_size: int) -> dict[str, Any]:
    ds = config(2)
    ds["fp16"] = {"enabled": True, "initial_scale_power": 40, "hysteresis": 1}
    accelerator = make_accelerator(plugin(2, ds), "fp16")
    model, optimizer, data, scheduler = prepare(accelerator, tiny_gpt2(), "callable")
    before = weights(accelerator, model)
    skipped = []
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            skipped.append(accelerator.optimizer_step_was_skipped)
    same = all(torch.equal(t, before[n]) for n, t in weights(accelerator, model).items())
    return {"skipped": skipped, "same": same, "steps": model.global_steps, "lr": scheduler.get_last_lr()}


@pytest.mark.slow
def test_skipped_steps_are_reported() -> None:
    for result in run_clients(overflow, 2):
        assert result == {"skipped": [True] * 3, "same": True, "steps": 3, "lr": [pytest.approx(5e-3 / 3)]}


# -- being there -------------------------------------------------------------------------------------------------------

IMPORTS = """
import sys, time
import torch, transformers, accelerate
from transformers import Trainer, TrainingArguments
import accelerate.utils.deepspeed
assert accelerate.utils.is_deepspeed_available()
assert transformers.integrations.is_deepspeed_available()
before = sorted(m for m in sys.modules if m == "deepspeed" or m.startswith("deepspeed."))
accelerator = accelerate.Accelerator(cpu=True)
model = accelerator.prepare(torch.nn.Linear(2, 2))
initialized = torch.distributed.is_initialized()
assert accelerator.unwrap_model(model) is not None
assert torch.distributed.is_initialized() == initialized
print(before)
print(sorted(m for m in sys.modules if m.startswith("deepspeed.")))
"""


def test_installed_but_unused_costs_nothing() -> None:
    """The clients import nothing of ours until ``unwrap_model`` asks for the engine's class."""
    ran = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    before, after = (eval(line) for line in ran.stdout.strip().splitlines()[-2:])
    assert before == []
    heavy = [
        m for m in after if m.startswith(("deepspeed.launcher", "deepspeed.env_report", "deepspeed.checkpointing"))
    ]
    assert "deepspeed.runtime.engine" in after and heavy == []
