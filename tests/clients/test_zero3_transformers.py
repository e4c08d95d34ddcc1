"""Unmodified Transformers, Trainer and PEFT on ZeRO-3: models are partitioned as they are loaded, and nobody notices."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the client is not installed: make test-clients installs it")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate: make test-clients installs it")

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, TrainingArguments
from transformers.integrations import HfDeepSpeedConfig

import deepspeed
from deepspeed import zero
from tests.clients.test_transformers import SAVING, assert_close, check_exports, make_trainer
from tests.clients.test_transformers import config as make_config
from tests.helpers.clients import assert_identical, free_port, run_clients, tiny_gpt2

pytestmark = pytest.mark.client

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 48,
}


def config(stage: int, **options: Any) -> dict[str, Any]:
    made = make_config(stage, **options)
    made["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return made


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state as fp32 copies. Collective."""
    with zero.GatheredParameters(model.parameters()):
        return {name: tensor.detach().float().clone() for name, tensor in model.state_dict().items()}


def is_partitioned(model: torch.nn.Module) -> bool:
    return all(hasattr(param, "ds_id") for param in model.parameters())


def outcome(trainer: Any) -> dict[str, Any]:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "loss": [entry["loss"] for entry in logs],
        "grad_norm": [float(entry["grad_norm"]) for entry in logs],
        "lr": [entry["learning_rate"] for entry in logs],
        "weights": whole(trainer.model),
        "steps": trainer.state.global_step,
        "ahead": False,
    }


# -- the Trainer -------------------------------------------------------------------------------------------------------


def fit(rank: int, world_size: int, out: str, pretrained: str, own: bool, bf16: bool) -> list[dict[str, Any]]:
    results = []
    for stage, load in ((2, False), (3, False), (3, True)):
        ds = config(stage, optimizer=own, scheduler=own)
        model = None
        if load:  # what is loaded while such arguments are alive is partitioned at once
            arguments = TrainingArguments(out, use_cpu=True, deepspeed=copy.deepcopy(ds), bf16=bf16, report_to=[])
            torch.manual_seed(rank)
            model = AutoModelForCausalLM.from_pretrained(pretrained)
            assert is_partitioned(model) and model.dtype == (torch.bfloat16 if bf16 else torch.float32)
            del arguments
        trainer = make_trainer(out, ds, model=model, bf16=bf16)
        trainer.train()
        result = {"eval": trainer.evaluate()["eval_loss"], **outcome(trainer)}
        assert trainer.model_wrapped.zero_optimization_stage() == stage
        generated = trainer.model.generate(torch.tensor([[1, 2, 3 + rank]]), max_new_tokens=3 + rank, do_sample=False)
        result["generated"] = generated.tolist()
        if stage == 3 and not load:
            trainer.save_model(out + "/model")
        trainer.model_wrapped.destroy()
        results.append(result)
    return results


@pytest.mark.parametrize(
    ("world_size", "own", "bf16"),
    [(2, True, True), (1, False, False), pytest.param(2, False, False, marks=pytest.mark.slow)],
)
def test_the_trainer_learns_as_with_stage_2(world_size: int, own: bool, bf16: bool, tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "pretrained")
    results = run_clients(fit, world_size, str(tmp_path), str(tmp_path / "pretrained"), own, bf16)
    for two, three, loaded in results:
        assert two["loss"][-1] < two["loss"][0] - 0.1
        assert_close(three, two, relative=1e-6, norm=1e-5, weight=1e-6)
        assert three["generated"] == two["generated"]
        # bf16: the weights were rounded when they were loaded, and so the masters
        assert loaded["loss"] == pytest.approx(two["loss"], rel=1e-3 if bf16 else 1e-6)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").float()
    assert_identical(results[0][1]["weights"], saved.state_dict())


def save_and_resume(rank: int, world_size: int, out: str) -> dict[str, Any]:
    ds = config(3, optimizer=True, scheduler=True)
    trainer = make_trainer(out, ds, bf16=True, **SAVING)
    trainer.train()
    result: dict[str, Any] = {"whole": outcome(trainer)}
    trainer.model_wrapped.destroy()
    trainer = make_trainer(out + "-again", ds, bf16=True, **SAVING)
    trainer.train(resume_from_checkpoint=f"{out}/checkpoint-4")
    result["resumed"] = outcome(trainer)
    trainer.save_model(out + "-model")
    return result


def test_resuming_is_bit_equal(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for result in run_clients(save_and_resume, 2, str(out)):
        one, two = result["whole"], result["resumed"]
        for key in ("loss", "grad_norm", "lr", "steps"):
            assert two[key] == one[key], key
        assert_identical(two["weights"], one["weights"])
    names = {path.name for path in (out / "checkpoint-4" / "global_step4").iterdir()}
    for rank in (0, 1):
        assert f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" in names
        assert f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" in names
    check_exports(out / f"checkpoint-{one['steps']}", Path(f"{out}-model"), one["weights"], 3)


def evaluate_then_train(rank: int, world_size: int, out: str) -> tuple[float, float, list[float]]:
    """A second Trainer wraps the model again, which the first one's engine runs."""
    expected = make_trainer(out, None).evaluate()["eval_loss"]
    trainer = make_trainer(out, config(3, optimizer=True))
    before = trainer.evaluate()["eval_loss"]
    assert type(trainer.model_wrapped) is deepspeed.DeepSpeedEngine and is_partitioned(trainer.model)
    trainer = make_trainer(out, config(3, optimizer=True), model=trainer.model)
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer = make_trainer(out, config(3), model=trainer.model, bf16=True, bf16_full_eval=True)
    again = trainer.evaluate()["eval_loss"]
    assert trainer.model.dtype == torch.bfloat16
    return before, expected, [after, again]


def test_evaluating_before_training(tmp_path: Path) -> None:
    for before, expected, (after, again) in run_clients(evaluate_then_train, 2, str(tmp_path)):
        assert before == pytest.approx(expected, rel=1e-5)
        assert after < before - 0.1 and again == pytest.approx(after, rel=1e-2)


def evaluate_and_train_one(rank: int, world_size: int, out: str) -> tuple[dict[str, Any], dict[str, Any]]:
    results = []
    for first in (True, False):
        trainer = make_trainer(out, config(3))
        if first:
            trainer.evaluate()
            # The Trainer would go on with the engine for evaluation, which it has destroyed: docs/clients/transformers.md
            trainer.model_wrapped = trainer.model
        trainer.train()
        results.append({"eval": trainer.evaluate()["eval_loss"], **outcome(trainer)})
        trainer.model_wrapped.destroy()
    return results[0], results[1]


def test_one_trainer_evaluates_and_then_trains(tmp_path: Path) -> None:
    for one, other in run_clients(evaluate_and_train_one, 2, str(tmp_path)):
        assert one["loss"] == other["loss"] and one["eval"] == other["eval"] and one["lr"] == other["lr"]
        assert_identical(one["weights"], other["weights"])


def adapters_alone(rank: int, world_size: int, out: str, load: str, whole_modules: list[str] | None) -> dict[str, Any]:
    import peft

    ds = make_config(3)  # nobody may gather the model
    arguments = TrainingArguments(out, use_cpu=True, deepspeed=copy.deepcopy(ds), report_to=[])
    torch.manual_seed(3)
    settings = peft.LoraConfig(
        r=4, target_modules=["c_attn"], modules_to_save=whole_modules, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(load), settings)
    del arguments
    trainer = make_trainer(out, ds, model=model, save_strategy="steps", save_steps=4, learning_rate=3e-2)
    trainer.train()
    trainer.save_model(out + "-adapter")
    return whole(model)


@pytest.mark.parametrize("whole_modules", [None, ["lm_head"]])
def test_adapters_are_saved_without_gathering_the_model(whole_modules: Any, tmp_path: Path) -> None:
    """``stage3_gather_16bit_weights_on_model_save`` is about the model; the Trainer asks for what is trained."""
    peft = pytest.importorskip("peft", reason="the client is not installed: make test-clients installs it")
    made = tiny_gpt2()
    made.config.tie_word_embeddings = False
    made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.detach().clone())
    made.save_pretrained(tmp_path / "base")
    weights = run_clients(adapters_alone, 2, str(tmp_path / "out"), str(tmp_path / "base"), whole_modules)[0]
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "out-adapter"))
    assert_identical(loaded.state_dict(), weights)


def lora(rank: int, world_size: int, out: str, stage: int, load: str | None) -> dict[str, Any]:
    import peft

    def adapted() -> Any:
        settings = peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["c_attn"],
            modules_to_save=["lm_head"],
            fan_in_fan_out=True,
            task_type="CAUSAL_LM",
        )
        arguments = TrainingArguments(out, use_cpu=True, deepspeed=config(stage), bf16=True, report_to=[])
        base = AutoModelForCausalLM.from_pretrained(load)
        assert is_partitioned(base) == (stage == 3)
        torch.manual_seed(3)
        made = peft.get_peft_model(base, settings)
        del arguments
        return made

    extra: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "bf16": True, "learning_rate": 3e-2}
    trainer = make_trainer(out, config(stage), model=adapted(), **extra)
    trainer.train()
    result = {"whole": outcome(trainer)}
    trainer.save_model(out + "-adapter")
    engine = trainer.model_wrapped
    trainable = {name for name, p in engine.module.named_parameters() if p.requires_grad}
    with zero.GatheredParameters(list(engine.parameters())):  # as trl hands the weights to another program
        before = {n: p.detach().clone() for n, p in engine.module.named_parameters() if "c_attn.base" in n}
        engine.module.merge_adapter()
        changed = [n for n, p in engine.module.named_parameters() if n in before and not torch.equal(p, before[n])]
        engine.module.unmerge_adapter()
    result["merged"] = (len(changed), len(before), len(trainable))
    if stage == 3:
        trainer = make_trainer(out + "-again", config(stage), model=adapted(), **extra)
        trainer.train(resume_from_checkpoint=f"{out}/checkpoint-4")
        result["resumed"] = outcome(trainer)
    return result


def test_lora(tmp_path: Path) -> None:
    """Frozen bases loaded in shards, adapters made afterwards, a whole module to save that peft copies."""
    peft = pytest.importorskip("peft", reason="the client is not installed: make test-clients installs it")
    made = tiny_gpt2().bfloat16()
    made.config.tie_word_embeddings = False
    made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.detach().clone())
    made.save_pretrained(tmp_path / "base")
    load = str(tmp_path / "base")
    two = run_clients(lora, 2, str(tmp_path / "two"), 2, load)
    three = run_clients(lora, 2, str(tmp_path / "three"), 3, load)
    for ours, theirs in zip(three, two, strict=True):
        assert theirs["whole"]["loss"][-1] < theirs["whole"]["loss"][0] - 0.1
        assert ours["whole"]["loss"] == pytest.approx(theirs["whole"]["loss"], rel=2e-3)
        assert ours["merged"] == theirs["merged"] == (2, 4, 5)
        for key in ("loss", "weights"):
            assert ours["resumed"].keys() >= {key}
        assert ours["resumed"]["loss"] == ours["whole"]["loss"]
        assert_identical(ours["resumed"]["weights"], ours["whole"]["weights"])
    base = AutoModelForCausalLM.from_pretrained(load)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "three-adapter")).state_dict()
    weights = three[0]["whole"]["weights"]
    assert_identical({n: t.float() for n, t in loaded.items()}, weights)


def adalora(rank: int, world_size: int, out: str, stage: int) -> list[float]:
    import peft

    settings = peft.AdaLoraConfig(
        init_r=12,
        target_r=4,
        total_step=100,
        tinit=10,
        tfinal=10,
        orth_reg_weight=0.5,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny_gpt2(), settings)
    trainer = make_trainer(out, config(stage), model=model, learning_rate=3e-2)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_forward_that_iterates_over_parameters(tmp_path: Path) -> None:
    """AdaLoRA adds a function of all its adapters to the loss, and does not read them as attributes."""
    pytest.importorskip("peft", reason="the client is not installed: make test-clients installs it")
    two, three = (run_clients(adalora, 2, str(tmp_path), stage) for stage in (2, 3))
    assert three[0][-1] < three[0][0] - 0.1
    for ours, theirs in zip(three, two, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


# -- without the Trainer -----------------------------------------------------------------------------------------------

INFERENCE: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": "auto"},
    "bf16": {"enabled": "auto"},
}


def llama(**options: Any) -> Any:
    settings = {**SMALL, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0, **options}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(max_position_embeddings=32, **settings))


def infer(rank: int, world_size: int, folder: str) -> None:
    """The documented recipe: a live config, from_pretrained, initialize without an optimizer, generate."""
    ids = torch.randint(4, 48, (2, 5), generator=torch.Generator().manual_seed(rank))
    for kind in ("gpt2", "llama", "tied"):
        path = f"{folder}/{kind}"
        plain = AutoModelForCausalLM.from_pretrained(path).eval()
        expected = plain(ids).logits
        holder = HfDeepSpeedConfig(copy.deepcopy(INFERENCE))
        torch.manual_seed(rank)
        model = AutoModelForCausalLM.from_pretrained(path)
        assert is_partitioned(model) and all(p.ds_status.name == "NOT_AVAILABLE" for p in model.parameters())
        assert model.num_parameters() == plain.num_parameters()
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert tied == (kind != "llama")
        engine = deepspeed.initialize(model=model, config_params={**INFERENCE, "train_batch_size": world_size})[0]
        engine.eval()
        assert torch.equal(engine(ids).logits, expected)
        for length in (4 + 3 * rank, 6 - rank):  # ranks are done at different times
            made = engine.generate(ids, max_new_tokens=length, do_sample=False, synced_gpus=True)
            assert torch.equal(made, plain.generate(ids, max_new_tokens=length, do_sample=False))
        assert torch.equal(engine.module(ids).logits, expected)
        engine.destroy()

        resized = AutoModelForCausalLM.from_pretrained(path)
        resized.resize_token_embeddings(53, mean_resizing=False)
        resized.resize_token_embeddings(50)
        engine = deepspeed.initialize(model=resized, config_params={**INFERENCE, "train_batch_size": world_size})[0]
        logits = engine(ids).logits
        assert logits.shape[-1] == 50 == resized.config.vocab_size and torch.equal(logits[..., :48], expected)
        assert logits.isfinite().all() and is_partitioned(resized)
        engine.destroy()

        torch.manual_seed(5 + rank)
        fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
        assert is_partitioned(fresh)
        for name, tensor in whole(fresh).items():
            assert tensor.isfinite().all() and (tensor.dim() < 2 or 0.005 < tensor.std() < 0.08), name
        headless = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3)
        score = whole(headless)["score.weight"]
        assert score.shape == (3, 32) and 0.005 < score.std() < 0.08
        del holder
    torch.manual_seed(0)
    assert not hasattr(AutoModelForCausalLM.from_pretrained(path).lm_head.weight, "ds_id")


@pytest.mark.parametrize("world_size", [1, 2])
def test_inference_without_the_trainer(world_size: int, tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    llama().save_pretrained(tmp_path / "llama")
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    run_clients(infer, world_size, str(tmp_path))


def tokens() -> torch.Tensor:
    return torch.randint(4, 48, (2, 6), generator=torch.Generator().manual_seed(0))


def sound() -> torch.Tensor:
    return torch.randn(1, 2000, generator=torch.Generator().manual_seed(0))


# Tied biases that clients pad by nothing, relative positions shared by layers, experts, convolutions with weight norm
# that are replaced while gathered.
WAV2VEC2 = {
    **{**SMALL, "vocab_size": 32},
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
}
T5 = {
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 48,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
BERT = {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS: dict[str, Any] = {
    "BertForMaskedLM": ("BertConfig", BERT, lambda: {"input_ids": tokens(), "labels": tokens()}),
    "T5ForConditionalGeneration": ("T5Config", T5, lambda: {"input_ids": tokens(), "labels": tokens()}),
    "MixtralForCausalLM": (
        "MixtralConfig",
        {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4},
        lambda: {"input_ids": tokens(), "labels": tokens()},
    ),
    "Wav2Vec2ForCTC": ("Wav2Vec2Config", WAV2VEC2, lambda: {"input_values": sound(), "labels": tokens()[:1] % 32}),
    "SEWForCTC": (
        "SEWConfig",
        {**WAV2VEC2, "squeeze_factor": 2},
        lambda: {"input_values": sound(), "labels": tokens()[:1, :3] % 32},
    ),
}


def train_models(rank: int, world_size: int, folder: str) -> None:
    ds = {**INFERENCE, "train_batch_size": world_size, "zero_allow_untested_optimizer": True}
    for name, (_, _, inputs) in MODELS.items():
        kind = getattr(transformers, name)
        plain = kind.from_pretrained(f"{folder}/{name}").train()
        holder = HfDeepSpeedConfig(copy.deepcopy(ds))
        torch.manual_seed(rank)
        model = kind.from_pretrained(f"{folder}/{name}").train()
        assert is_partitioned(model), name
        fresh = kind._from_config(plain.config)
        assert is_partitioned(fresh), name
        for path, tensor in whole(fresh).items():  # Transformers leaves parametrised weights as they are
            assert tensor.isfinite().all() or "parametrizations" in path, path
        del holder
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        ours = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = deepspeed.initialize(model=model, optimizer=ours, config=ds)[0]
        for _ in range(2):
            loss, expected = engine(**inputs()).loss, plain(**inputs()).loss
            torch.testing.assert_close(loss, expected, msg=lambda text, n=name: f"{n}: {text}")
            engine.backward(loss)
            engine.step()
            optimizer.zero_grad()
            expected.backward()
            optimizer.step()
        for (path, param), other in zip(whole(model).items(), plain.state_dict().values(), strict=True):
            torch.testing.assert_close(param, other.float(), msg=lambda text, n=f"{name} {path}": f"{n}: {text}")
        engine.destroy()


def test_models_of_many_kinds(tmp_path: Path) -> None:
    for name, (settings, options, _) in MODELS.items():
        torch.manual_seed(1)
        getattr(transformers, name)(getattr(transformers, settings)(**options)).save_pretrained(tmp_path / name)
    run_clients(train_models, 2, str(tmp_path))


@pytest.mark.slow
def test_the_example(tmp_path: Path) -> None:
    """Launched as its users do; what it saves is a whole model for plain Transformers."""
    root = Path(__file__).resolve().parents[2]
    launch = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    script = [str(root / "examples/transformers_zero3.py"), "--output", str(tmp_path / "out"), "--steps", "8"]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    options = ["--layers", "2", "--width", "64", "--context", "32"]
    ran = subprocess.run(
        [*launch, *script, *options], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    held = re.search(r"(\d+) parameters, of which this rank holds (\d+)", ran.stdout)
    assert held is not None and int(held[2]) <= int(held[1]) / 2 + 100
    assert "validation loss" in ran.stdout and "def " in ran.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.num_parameters() == int(held[1])
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
