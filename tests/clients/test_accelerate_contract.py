"""What the unmodified Accelerate asks of a DeepSpeed: calls, attributes, keys and variables, one by one."""

from __future__ import annotations

import copy
import datetime
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="the client is not installed: make test-clients installs it")
pytest.importorskip("transformers", reason="the tests train models of transformers: make test-clients installs it")

import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler, TorchDynamoPlugin, compare_versions
from accelerate.utils.operations import GatheredParameters
from transformers import AutoModelForCausalLM

import deepspeed
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.lion import DeepSpeedCPULion
from deepspeed.runtime.lr_schedules import WarmupDecayLR, WarmupLR
from tests.clients.test_accelerate import (
    ACCUMULATION,
    CLIP,
    FP32,
    WARMUP,
    assert_close,
    config,
    loader,
    make_accelerator,
    plugin,
    prepare,
    run_epoch,
    warmup,
)
from tests.helpers.clients import assert_identical, assert_weights_close, run_clients, tiny_gpt2
from tests.helpers.zero3 import whole

pytestmark = pytest.mark.client

LR = 5e-3


def record() -> dict[str, list[float]]:
    return {"loss": [], "norm": [], "lr": []}


def test_versions_and_gates() -> None:
    """Each version at which Accelerate unlocks something."""
    for gate in ("0.3.1", "0.5.5", "0.9.3", "0.11.0", "0.14.0", "0.14.4", "0.14.5", "0.15.2", "0.16.4", "0.18.2"):
        assert compare_versions("deepspeed", ">=", gate), gate


# -- how prepare() calls initialize ------------------------------------------------------------------------------------


class Spy:
    """``deepspeed.initialize``, which notes its arguments and that the config came back unchanged."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.real, deepspeed.initialize = deepspeed.initialize, self

    def __call__(self, **given: Any) -> Any:
        before = copy.deepcopy(given["config_params"])
        self.calls.append(given)
        made = self.real(**given)
        assert given["config_params"] == before
        assert made[0].config is given["config_params"] and made[0].optimizer is made[1]
        return made


def groups_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [p for _, p in named if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]


def composed(rank: int, world_size: int) -> None:
    met: dict[str, Any] = {}
    meet = deepspeed.comm.init_distributed

    def init_distributed(**given: Any) -> None:
        met.update(given)
        meet(**given)

    deepspeed.comm.init_distributed = init_distributed  # type: ignore[assignment]
    spy = Spy()
    decay = {"type": "WarmupDecayLR", "params": {**WARMUP["params"], "total_num_steps": "auto"}}
    more = {"communication_data_type": "fp32", "msamp": {"enabled": True, "opt_level": "O1"}}
    ds = config(2, scheduler=decay, **more)
    ds["zero_optimization"].update(stage="auto", allgather_bucket_size=5e8, stage3_param_persistence_threshold="auto")
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds, zero_stage=1),
        mixed_precision="bf16",
        gradient_accumulation_steps=4,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=77))],
    )
    assert met["dist_backend"] is None and met["timeout"].seconds == 77 and met["auto_mpi_discovery"] is False
    assert torch.distributed.is_initialized()
    model = tiny_gpt2()
    optimizer = DummyOptim(groups_of(model), lr=LR)
    scheduler = DummyScheduler(optimizer, total_num_steps=20, warmup_num_steps=0)
    made = accelerator.prepare(model, optimizer, loader(), scheduler)
    (given,) = spy.calls
    assert (
        given.keys() == {"model", "config_params", "model_parameters"} and given["model_parameters"] is optimizer.params
    )
    engine = made[0]
    assert type(engine) is deepspeed.DeepSpeedEngine and engine._is_accelerate_prepared
    assert engine.config is accelerator.deepspeed_config and engine.config["steps_per_print"] == float("inf")
    assert engine.config.get("zero_optimization", {}).get("stage") == 1
    assert engine.config["zero_optimization"]["reduce_bucket_size"] == 32 * 32
    assert engine.config["zero_optimization"]["stage3_param_persistence_threshold"] == 10 * 32
    assert engine.get_batch_info() == (16, 4, 4) and engine.config["fp16"] == {"enabled": False}
    assert engine.config["gradient_clipping"] == 1.0 and engine.config["msamp"]["enabled"]
    assert engine.module.dtype == torch.bfloat16 and accelerator.unwrap_model(engine) is model
    assert [group["weight_decay"] for group in made[1].param_groups] == [0.1, 0.0]
    assert type(made[3].scheduler) is WarmupDecayLR and made[3].scheduler is engine.lr_scheduler
    assert made[3].scheduler.total_num_steps == 20
    assert accelerator.clip_grad_norm_(model.parameters(), 1.0) is None  # before any step

    for number, (stage, schedule) in enumerate([(0, "native"), (2, "torch"), (3, "callable")], 1):
        accelerator.free_memory()
        accelerator = make_accelerator(
            plugin(stage, config(stage) if schedule == "callable" else None), "bf16" if stage else "no"
        )
        model = tiny_gpt2()
        if schedule == "callable":
            optimizer = DummyOptim(model.parameters(), lr=LR)
            made = accelerator.prepare(
                model, optimizer, loader(), DummyScheduler(optimizer, lr_scheduler_callable=warmup)
            )
            assert made[3].scheduler is made[0].lr_scheduler
            assert isinstance(made[3].scheduler, torch.optim.lr_scheduler.LambdaLR)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
            own = WarmupLR(optimizer, 0.0, LR, 4) if schedule == "native" else warmup(optimizer)
            made = accelerator.prepare(model, optimizer, loader(), own)
            groups = [id(group) for group in optimizer.param_groups]
            assert [id(group) for group in made[1].param_groups] == groups
            assert made[3].scheduler is own and (made[0].lr_scheduler is own) == (schedule == "native")
            section = made[0].config["zero_optimization"]
            assert section["offload_optimizer"] == section["offload_param"] == {"device": "none", "nvme_path": None}
        assert ("lr_scheduler" in spy.calls[number]) == (schedule != "torch")
        assert hasattr(made[1].optimizer, "overflow") == (stage > 0)
    spy.calls.clear()
    inference = make_accelerator(plugin(3, {**INFERENCE, "train_batch_size": world_size}), "bf16")
    assert inference.prepare(tiny_gpt2()).optimizer is not None  # what runs the model
    assert spy.calls[0].keys() == {"model", "config_params"}


INFERENCE: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def test_how_prepare_calls_initialize() -> None:
    run_clients(composed, 1)


def train(accelerator: Accelerator, prepared: Any, steps: int = 2) -> dict[str, list[float]]:
    model, optimizer, data, scheduler = prepared
    kept = record()
    batches = [batch for batch, _ in zip(data, range(ACCUMULATION * steps), strict=False)]
    run_epoch(accelerator, model, optimizer, batches, scheduler, kept)
    return kept


def on_the_cpu(rank: int, world_size: int) -> None:
    """Accelerate replaces a torch optimizer by ours where its states are offloaded."""
    kinds: list[tuple[Any, Any]] = [
        (torch.optim.AdamW, DeepSpeedCPUAdam),
        (torch.optim.Adam, DeepSpeedCPUAdam),
        (torch.optim.Adagrad, DeepSpeedCPUAdagrad),
        (torch.optim.SGD, None),
    ]
    for kind, expected in kinds:
        results = []
        for device in ("none", "cpu"):
            ds: dict[str, Any] = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": device}}}
            ds.update(train_micro_batch_size_per_gpu=4, gradient_accumulation_steps="auto", gradient_clipping="auto")
            if expected is None:
                ds["zero_force_ds_cpu_optimizer"] = False
            accelerator = make_accelerator(plugin(2, ds))
            model = tiny_gpt2()
            optimizer = kind(model.parameters(), lr=LR, weight_decay=0.01)
            made = accelerator.prepare(model, optimizer, loader(), warmup(optimizer))
            inner = made[1].optimizer.optimizer
            assert type(inner) is (kind if device == "none" or expected is None else expected)
            assert all(one is two for one, two in zip(made[1].param_groups, optimizer.param_groups, strict=True))
            if expected is DeepSpeedCPUAdam and device == "cpu":
                assert inner.adam_w_mode == (kind is torch.optim.AdamW)
            results.append((train(accelerator, made), whole(made[0].module)))
            accelerator.free_memory()
        (losses, weights), (offloaded, moved) = results
        assert losses["loss"][0] > losses["loss"][-1] and losses["lr"][0] < LR
        assert offloaded["loss"] == pytest.approx(losses["loss"], rel=1e-5), kind
        assert_weights_close(moved, weights, atol=1e-4)
    # As for an optimizer of bitsandbytes, which is not installed here.
    ours = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=LR, foreach=True)
    lion = DeepSpeedCPULion(ours.param_groups, lr=LR, weight_decay=0.0, adamw_mode=False)
    assert lion.param_groups[0] is ours.param_groups[0]


def test_optimizers_on_the_cpu() -> None:
    run_clients(on_the_cpu, 1)


# -- members -----------------------------------------------------------------------------------------------------------


class Switched(torch.optim.AdamW):
    """As schedule-free optimizers: told when the model is evaluated."""

    training = True

    def train(self) -> None:
        self.training = True

    def eval(self) -> None:
        self.training = False


def members(rank: int, world_size: int) -> None:
    for stage in (0, 2, 3):
        accelerator = make_accelerator(plugin(stage), "bf16")
        model = tiny_gpt2()
        inner = Switched(model.parameters(), lr=LR)
        engine, optimizer, data, schedule = accelerator.prepare(model, inner, loader(), WarmupLR(inner, 0.0, LR, 4))
        assert engine in list(engine.modules()) and engine in [engine] and optimizer in [optimizer]
        assert engine.device == accelerator.device and engine.module is model
        assert len(list(engine.parameters())) == len(list(model.parameters()))
        assert engine.get_global_grad_norm() is None

        optimizer.eval()
        assert not inner.training
        optimizer.train()
        assert inner.training and optimizer.defaults["lr"] == LR
        assert isinstance(optimizer.param_groups, list) and optimizer.state is not None
        with pytest.raises(RuntimeError, match="parameter groups cannot be added"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        assert optimizer.step_was_skipped is False
        engine.eval()
        assert not model.training
        engine.train()
        assert model.training and schedule.get_last_lr() == [0.0]
        schedule.get_lr()
        schedule.print_lr(False, 0, LR)

        batch = next(iter(data))
        norms = []
        for scale in (True, False):  # what backward() is given is handed on
            for boundary in (False, True):
                accelerator.gradient_state._set_sync_gradients(boundary)
                accelerator.backward(engine(**batch).loss, **({} if scale else {"scale_wrt_gas": False}))
                assert engine.is_gradient_accumulation_boundary() is boundary
            norms.append(accelerator.clip_grad_norm_(model.parameters(), CLIP))
            assert isinstance(norms[-1], float)
        assert engine.global_steps == 2
        assert norms[1] == pytest.approx(ACCUMULATION * norms[0], rel=1e-2)  # the first step's rate was zero
        saved, rate = schedule.state_dict(), schedule.get_last_lr()
        schedule.step()  # the engine has done it
        assert schedule.state_dict() == saved and rate[0] > 0.0
        schedule.scheduler.step()
        assert schedule.get_last_lr() != rate
        schedule.load_state_dict(saved)
        assert schedule.state_dict() == saved
        optimizer.load_state_dict(optimizer.state_dict())
        accelerator.free_memory()
        assert accelerator.deepspeed_engine_wrapped is None


def test_members_of_engine_optimizer_and_schedule() -> None:
    run_clients(members, 1)


def test_move_to_device() -> None:
    from deepspeed.runtime.utils import move_to_device

    given = {"a": torch.ones(2), "b": [torch.zeros(1), (3, "text")]}
    moved = move_to_device(given, torch.device("cpu"))
    assert moved["b"][1] == (3, "text") and torch.equal(moved["a"], given["a"])


# -- stage 3 -----------------------------------------------------------------------------------------------------------


def partitioned(model: torch.nn.Module) -> bool:
    return all(hasattr(param, "ds_id") for param in model.parameters())


def train_at(stage: int, out: str, precision: str) -> dict[str, Any]:
    """Loads (at stage 3: in parts), trains, saves in every way, and goes on in a new program."""

    def start() -> tuple[Accelerator, Any]:
        options = {"zero_stage": stage, "zero3_save_16bit_model": True}
        own = DeepSpeedPlugin(gradient_accumulation_steps=ACCUMULATION, gradient_clipping=CLIP, **options)
        accelerator = make_accelerator(own, precision)
        model = AutoModelForCausalLM.from_pretrained(f"{out}/pretrained")
        assert partitioned(model) == (stage == 3)
        return accelerator, prepare(accelerator, model)

    accelerator, made = start()
    first = train(accelerator, made)
    accelerator.save_state(f"{out}/state{stage}")
    result: dict[str, Any] = {**train(accelerator, made), "world": accelerator.num_processes}
    result = {**result, "loss": first["loss"] + result["loss"], "norm": first["norm"] + result["norm"]}
    result["weights"] = {name: tensor.float() for name, tensor in whole(made[0].module).items()}
    full = accelerator.get_state_dict(made[0])
    assert (full is None) == (stage == 3 and not accelerator.is_main_process)
    assert full is None or all(torch.equal(full[name].float(), t) for name, t in result["weights"].items())
    accelerator.save_model(made[0], f"{out}/model{stage}")
    accelerator.unwrap_model(made[0]).save_pretrained(
        f"{out}/saved{stage}", is_main_process=accelerator.is_main_process, state_dict=full
    )
    accelerator.free_memory()
    accelerator, made = start()
    accelerator.load_state(f"{out}/state{stage}")
    again = train(accelerator, made)
    assert again["loss"] == result["loss"][-len(again["loss"]) :] and again["lr"] == result["lr"]
    assert_identical({name: tensor.float() for name, tensor in whole(made[0].module).items()}, result["weights"])
    accelerator.free_memory()
    return result


def stages(rank: int, world_size: int, out: str, precision: str) -> list[dict[str, Any]]:
    return [train_at(stage, out, precision) for stage in (2, 3)]


@pytest.mark.parametrize("precision", ["bf16", pytest.param("no", marks=pytest.mark.slow)])
def test_stage_3_is_stage_2_in_parts(precision: str, tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "pretrained")
    # bf16: stage 3's weights are rounded as they are loaded, and so are its masters.
    close = FP32 if precision == "no" else {"relative": 2e-3, "norm": 2e-2, "weight": 2e-2}
    for two, three in run_clients(stages, 2, str(tmp_path), precision):
        assert two["loss"][-1] < two["loss"][0]
        assert_close(three, two, **close)
    from safetensors.torch import load_file

    model = load_file(tmp_path / "model3" / "model.safetensors")
    assert len(model) > 10 and all(torch.equal(t.float(), three["weights"][n]) for n, t in model.items())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved3")
    assert_identical({n: p.detach().float() for n, p in saved.named_parameters()}, three["weights"])


def construct(rank: int, world_size: int, out: str) -> None:
    """Models made while a stage-3 plugin is chosen; "auto" values that nobody has filled mean the default."""
    tiny_gpt2().save_pretrained(f"{out}/{rank}")
    ds = config(3, scheduler=copy.deepcopy(WARMUP))
    ds["zero_optimization"]["stage3_param_persistence_threshold"] = "auto"
    accelerator = make_accelerator(plugin(3, ds), "bf16")
    chosen = accelerator.deepspeed_plugin
    assert chosen.is_zero3_init_enabled()
    model = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(f"{out}/{rank}"))
    assert partitioned(model) and model.dtype == torch.bfloat16
    weight = model.transformer.wte.weight
    with chosen.zero3_init_context_manager(enable=False), GatheredParameters([weight]):
        # The flag is about Accelerate's own context, which then does nothing.
        assert not chosen.is_zero3_init_enabled() and weight.ds_status.name == "NOT_AVAILABLE"
    assert partitioned(AutoModelForCausalLM.from_pretrained(f"{out}/{rank}"))
    before = whole(model)["transformer.wte.weight"]
    for modifier, expected in ((None, before), (0, torch.full_like(before, 2.0))):
        with GatheredParameters([weight], modifier_rank=modifier, fwd_module=None, enabled=True):
            if rank == 0:
                weight.data.fill_(2.0)
        assert torch.equal(whole(model)["transformer.wte.weight"], expected)
    optimizer = DummyOptim(model.parameters(), lr=LR)
    model, *_ = accelerator.prepare(model, optimizer, loader(), DummyScheduler(optimizer, warmup_num_steps=2))
    assert not model.zero_gather_16bit_weights_on_model_save()
    with pytest.raises(ValueError, match="stage3_gather_16bit_weights_on_model_save"):
        accelerator.get_state_dict(model)


def test_construction_while_a_plugin_is_chosen(tmp_path: Path) -> None:
    run_clients(construct, 2, str(tmp_path))


def experts(rank: int, world_size: int) -> list[float]:
    ds = {**config(3), "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    os.environ["ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES"] = "MixtralSparseMoeBlock"
    accelerator = make_accelerator(DeepSpeedPlugin(hf_ds_config=ds), "bf16")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 48}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))
    optimizer = DummyOptim(model.parameters(), lr=LR)
    made = accelerator.prepare(model, optimizer, loader(), DummyScheduler(optimizer, lr_scheduler_callable=warmup))
    leaves = {name for name, module in model.named_modules() if getattr(module, "_z3_leaf", False)}
    assert leaves == {"model.layers.0.mlp", "model.layers.1.mlp"}
    return train(accelerator, made)["loss"]


def test_experts_are_leaves() -> None:
    for losses in run_clients(experts, 2):
        assert losses[-1] < losses[0]


# -- several models ----------------------------------------------------------------------------------------------------


def distil(rank: int, world_size: int, out: str) -> None:
    """A teacher in parts, for inference only, beside a student that is trained."""
    # Accelerators of one program share the accumulation steps.
    teacher_config = {**INFERENCE, "gradient_accumulation_steps": "auto", "bf16": {"enabled": False}}
    plugins = {"student": plugin(2), "teacher": plugin(3, teacher_config)}
    train_it, infer = make_accelerator(plugins), Accelerator(gradient_accumulation_steps=ACCUMULATION)
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    expected = tiny_gpt2(seed=1)
    student = copy.deepcopy(expected)
    optimizer: Any = torch.optim.SGD(student.parameters(), lr=0.1)
    student, optimizer, data = train_it.prepare(student, optimizer, loader())
    infer.state.select_deepspeed_plugin("teacher")
    teacher = AutoModelForCausalLM.from_pretrained(out)
    assert partitioned(teacher) and not any(hasattr(p, "ds_id") for p in student.parameters())
    teacher = infer.prepare(teacher).eval()
    assert teacher.zero_optimization_stage() == 3 and student.zero_optimization_stage() == 2
    for batch in data:
        with torch.no_grad():
            wanted = teacher(**batch).logits
        torch.testing.assert_close(wanted, plain(**batch).logits)
        with train_it.accumulate(student):
            loss = torch.nn.functional.mse_loss(student(**batch).logits, wanted)
            train_it.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert student.global_steps == 3
    moved = whole(student.module)
    assert any(not torch.equal(p, moved[name]) for name, p in expected.named_parameters())
    assert_identical(whole(teacher.module), dict(plain.named_parameters()))


def test_a_teacher_in_parts_beside_a_student(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    run_clients(distil, 2, str(tmp_path))


def networks() -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    layers = [
        torch.nn.Sequential(torch.nn.Linear(i, 16), torch.nn.Tanh(), torch.nn.Linear(16, o))
        for i, o in ((4, 2), (2, 1))
    ]
    return layers[0], layers[1]


def adversaries(rank: int, world_size: int, at: tuple[int, int] | None, freeze: bool) -> list[dict[str, torch.Tensor]]:
    """Two models that train against each other; without ``at`` in plain torch, on all ranks' data."""
    generator, judge = networks()
    models: list[Any] = [generator, judge]
    optimizers: list[Any] = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    backwards: list[Any] = [torch.Tensor.backward] * 2
    if at is not None:
        ds = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
        plugins = {
            str(i): DeepSpeedPlugin(hf_ds_config={**ds, "zero_optimization": {"stage": s}}) for i, s in enumerate(at)
        }
        AcceleratorState._reset_state(reset_partial_state=True)
        gloo = [InitProcessGroupKwargs(backend="gloo")]
        accelerators = [Accelerator(deepspeed_plugins=plugins, kwargs_handlers=gloo), Accelerator()]
        for i, accelerator in enumerate(accelerators):
            accelerator.state.select_deepspeed_plugin(str(i))
            models[i], optimizers[i] = accelerator.prepare(models[i], optimizers[i])
            assert models[i].zero_optimization_stage() == at[i]
        backwards = [accelerator.backward for accelerator in accelerators]
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    for step in range(4):
        seeds = [10 * step + r for r in (range(world_size) if at is None else [rank])]
        sources = [torch.Generator().manual_seed(seed) for seed in seeds]
        real = torch.cat([torch.randn(8, 2, generator=source) + 2 for source in sources])
        fake = models[0](torch.cat([torch.randn(8, 4, generator=source) for source in sources]))
        ones = torch.ones(len(real), 1)
        models[1].zero_grad()  # the model's: the wrapped optimizer's does nothing
        backwards[1](loss(models[1](real), ones) + loss(models[1](fake.detach()), 0 * ones))
        optimizers[1].step()
        judge.requires_grad_(not freeze)
        models[0].zero_grad()
        backwards[0](loss(models[1](fake), ones))
        optimizers[0].step()
        judge.requires_grad_(True)
    return [whole(model) for model in (generator, judge)]


@pytest.mark.parametrize(
    ("stages", "freeze"),
    [((2, 2), False), ((3, 2), True), *(pytest.param((s, s), s > 1, marks=pytest.mark.slow) for s in (0, 1, 3))],
)
def test_adversaries(stages: tuple[int, int], freeze: bool) -> None:
    expected = adversaries(0, 2, None, freeze)
    assert all(not torch.equal(a, b) for a, b in zip(expected[0].values(), networks()[0].parameters(), strict=True))
    for got in run_clients(adversaries, 2, stages, freeze):
        for ours, plain in zip(got, expected, strict=True):
            for name, tensor in plain.items():
                torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)


def two_in_one_program(rank: int, world_size: int, out: str) -> None:
    """One Accelerator takes two models, one after the other; in one call it refuses them."""

    def start() -> tuple[Accelerator, Any, Any]:
        accelerator = make_accelerator(plugin(2), "bf16")
        made = prepare(accelerator, tiny_gpt2())
        helper = tiny_gpt2(seed=1)
        for param in list(helper.parameters())[4:]:
            param.requires_grad_(False)
        return accelerator, made, accelerator.prepare(helper, torch.optim.SGD(helper.parameters(), lr=0.1))[0]

    accelerator, made, helper = start()
    with pytest.raises(AssertionError, match="multiple models"):
        accelerator.prepare(tiny_gpt2(), tiny_gpt2())
    train(accelerator, made)
    before = whole(helper.module)
    helper.backward(helper(**next(iter(made[2]))).loss, scale_wrt_gas=False)
    helper.set_gradient_accumulation_boundary(True)
    helper.step()
    assert any(not torch.equal(p, before[name]) for name, p in whole(helper.module).items())
    accelerator.save_state(out, exclude_frozen_parameters=True)  # handed on to save_checkpoint
    expected = [whole(made[0].module), whole(helper.module)]
    accelerator.free_memory()
    accelerator, made, helper = start()
    accelerator.load_state(out, load_module_strict=False)  # and to load_checkpoint
    for weights, model in zip(expected, (made[0], helper), strict=True):
        assert_identical(whole(model.module), weights)
    saved = [set(os.listdir(f"{out}/{tag}")) for tag in ("pytorch_model", "pytorch_model_1")]
    assert all("mp_rank_00_model_states.pt" in names for names in saved)


def test_state_of_two_models(tmp_path: Path) -> None:
    run_clients(two_in_one_program, 2, str(tmp_path))


# -- compiling ---------------------------------------------------------------------------------------------------------


def compiled(rank: int, world_size: int) -> None:
    plain = None
    for regional in (None, False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        dynamo = None if regional is None else TorchDynamoPlugin(backend="eager", use_regional_compilation=regional)
        accelerator = Accelerator(
            deepspeed_plugin=plugin(2), dynamo_plugin=dynamo, gradient_accumulation_steps=ACCUMULATION
        )
        torch.manual_seed(0)
        blocks = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(3)]
        model = torch.nn.Sequential(torch.nn.ModuleDict({"blocks": torch.nn.Sequential(*blocks)})["blocks"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        data = torch.utils.data.DataLoader(list(torch.randn(16, 8)), batch_size=4)
        engine, optimizer, data = accelerator.prepare(model, optimizer, data)
        losses = []
        for batch in data:
            with accelerator.accumulate(engine):
                loss = engine(batch).square().mean()
                accelerator.backward(loss)
                optimizer.step()
            losses.append(float(loss.detach()))
        if plain is None:
            plain = losses
        assert losses == pytest.approx(plain, rel=1e-5) and losses[-1] < losses[0]
        own = [module for module in model.modules() if module._compiled_call_impl is not None]
        assert (engine._compiled_call_impl is not None or len(own) > 0) == (regional is not None)
        accelerator.free_memory()


def test_dynamo_plugin() -> None:
    run_clients(compiled, 1)
