"""Unmodified TRL on CPU processes: what ZeRO-3 learns is what ZeRO-2 and the plain trainer learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="the client is not installed: make test-clients installs it")
pytest.importorskip("datasets", reason="TRL needs it: make test-clients installs it")

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)

from deepspeed import zero
from tests.helpers.clients import assert_weights_close, run_clients, tiny_gpt2

pytestmark = pytest.mark.client

DATA: dict[str, list[dict[str, Any]]] = {
    "sft": [{"text": "abcdefgh"[i % 4 :]} for i in range(16)],
    "dpo": [{"prompt": "a" + "b" * (i % 3), "chosen": "cd", "rejected": "ef"} for i in range(16)],
    "kto": [{"prompt": "a" + "b" * (i % 3), "completion": "cd" if i % 2 else "ef", "label": i % 2 == 1} for i in range(16)],
    "grpo": [{"prompt": "a" + "b" * (i % 3)} for i in range(16)],
}  # fmt: skip
DATA["rloo"] = DATA["distillation"] = DATA["grpo"]
DATA["online"] = DATA["grpo"]
DATA["reward"] = DATA["dpo"]
NAMES = {
    "sft": "SFT",
    "dpo": "DPO",
    "kto": "KTO",
    "grpo": "GRPO",
    "rloo": "RLOO",
    "reward": "Reward",
    "online": "OnlineDPO",
}
ONLINE = {"max_completion_length": 4, "num_generations": 2, "beta": 0.1}
OPTIONS: dict[str, dict[str, Any]] = {
    "sft": {"max_length": 10},
    "dpo": {"max_length": 10},
    "kto": {"max_length": 10},
    "reward": {"max_length": 10},
    "grpo": {**ONLINE, "scale_rewards": "none"},
    "rloo": ONLINE,
    "online": {"max_new_tokens": 4, "max_length": 12, "beta": 0.1},
    "distillation": {"max_completion_length": 4},
}


def config(stage: int, zero_optimization: Any = (), **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 40,  # more than the models' vectors have
            **dict(zero_optimization),
        },
        **more,
    }


def tiny_llama(seed: int, kind: Any = LlamaForCausalLM) -> Any:
    """Its head is not its embedding, unlike GPT-2's."""
    set_seed(seed)
    return kind(
        LlamaConfig(
            vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=12, bos_token_id=1, eos_token_id=1, pad_token_id=0, num_labels=1,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Models with a tokenizer of single letters, and the data of each trainer, on disk."""
    folder = tmp_path_factory.mktemp("trl")
    letters = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = {"gpt2": tiny_gpt2(), "llama": tiny_llama(0), "teacher": tiny_llama(1)}
    for name, model in {**made, "judge": tiny_llama(2, LlamaForSequenceClassification)}.items():
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
        ).save_pretrained(folder / name)
        model.save_pretrained(folder / name)
    for name, rows in DATA.items():
        Dataset.from_list(rows).save_to_disk(folder / f"data-{name}")
    return str(folder)


def low_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward with something to learn: the share of tokens from the first half of the vocabulary."""
    return [sum(token < 24 for token in ids) / len(ids) for ids in completion_ids]


def made(folder: str, kind: str, stage: int | None, model: Any, base: str, out: str, options: dict[str, Any]) -> Any:
    """A trainer of a kind. Options of ours: ``deepspeed`` (more for its config), ``peft_config``, ``judge`` (rewards)."""
    import trl

    options = {**OPTIONS[kind], **options}
    more, peft_config, judge = (options.pop(key, None) for key in ("deepspeed", "peft_config", "judge"))
    name = NAMES.get(kind, kind.capitalize())
    where: Any = trl
    if kind == "online":
        import trl.experimental.online_dpo as where
    arguments = getattr(where, f"{name}Config")(
        out,
        **{
            "use_cpu": True,
            "bf16": False,
            "ddp_backend": "gloo",
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            **options,
        },
        deepspeed=None if stage is None else config(stage, **(more or {})),
    )
    classifier = AutoModelForSequenceClassification.from_pretrained
    if model is None:
        load = classifier if kind == "reward" else AutoModelForCausalLM.from_pretrained
        model = load(f"{folder}/{base}")
        assert all(hasattr(param, "ds_id") for param in model.parameters()) == (stage == 3)
    extra: dict[str, Any] = {"peft_config": peft_config} if peft_config else {}
    if kind in ("grpo", "rloo", "online"):
        extra["reward_funcs"] = classifier(f"{folder}/judge") if judge else low_ids
    if kind == "online":
        extra["ref_model"] = AutoModelForCausalLM.from_pretrained(f"{folder}/{base}")
    if kind == "distillation":
        extra["teacher_model"] = AutoModelForCausalLM.from_pretrained(f"{folder}/teacher")
    return getattr(where, f"{name}Trainer")(
        model,
        args=arguments,
        train_dataset=Dataset.load_from_disk(f"{folder}/data-{kind}"),
        processing_class=PreTrainedTokenizerFast.from_pretrained(f"{folder}/{base}"),
        **extra,
    )


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state as fp32 copies. Collective."""
    with zero.GatheredParameters(model.parameters()):
        return {name: tensor.detach().float().clone() for name, tensor in model.state_dict().items()}


def learn(
    rank: int, world_size: int, out: str, folder: str, kind: str, runs: list[Any], base: str
) -> list[dict[str, Any]]:
    """Losses, rewards and weights of each run; a run is a stage (None: without deepspeed) and options."""
    results = []
    for number, (stage, options) in enumerate(runs):
        AcceleratorState._reset_state()
        # Before a config is alive, and so it is whole: TRL's hash of it needs that.
        early = AutoModelForCausalLM.from_pretrained(f"{folder}/gpt2")
        model = early if "precompute_ref_log_probs" in options else None
        trainer = made(folder, kind, stage, model, base, f"{out}/{number}", options)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        results.append(
            {
                "losses": [entry["loss"] for entry in logged],
                "rewards": [entry.get("reward", 0.0) for entry in logged],
                "weights": whole(trainer.model),
                "dtypes": {param.dtype for param in trainer.model.parameters()},
            }
        )
        if stage is not None:
            assert trainer.model_wrapped.zero_optimization_stage() == stage
            trainer.model_wrapped.destroy()
    return results


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    return float(sum((tensor - two[name]).square().sum() for name, tensor in one.items())) ** 0.5


def compare(kind: str, folder: str, out: Path, base: str = "gpt2", stages: Any = (2, 3), **options: Any) -> Any:
    """Runs the plain trainer and the stages in the same processes, and compares them. Returns the plain run of rank 0."""
    runs = [(stage, options) for stage in (None, *stages)]
    for plain, *ours in run_clients(learn, 2, str(out), folder, kind, runs, base):
        bf16 = bool(options.get("bf16"))
        for other in ours:
            assert other["losses"] == pytest.approx(
                plain["losses"], rel=1e-2 if bf16 else 1e-4, abs=1e-3 if bf16 else 1e-5
            )
            assert other["rewards"] == pytest.approx(plain["rewards"], abs=1e-6)
            if bf16 and "peft_config" in options:
                assert {str(tensor) for tensor in other["dtypes"]} == {"torch.bfloat16"}  # adapters, too
            elif bf16:
                start = whole(AutoModelForCausalLM.from_pretrained(f"{folder}/{base}"))
                assert distance(other["weights"], plain["weights"]) < 0.15 * distance(plain["weights"], start)
            else:
                assert_weights_close(other["weights"], plain["weights"], atol=2e-4)
    return plain


# -- from data ---------------------------------------------------------------------------------------------------------

OFFLINE = [("sft", "gpt2"), ("sft", "llama"), ("dpo", "gpt2"), ("kto", "gpt2"), ("reward", "judge")]


@pytest.mark.parametrize(("kind", "base"), OFFLINE)
def test_stages_learn_alike(kind: str, base: str, pretrained: str, tmp_path: Path) -> None:
    """DPO and KTO: a reference model beside the policy, both partitioned. Llama's head is not tied: TRL's fused loss then
    reads it outside of its module, and gathers it for that, again in its own backward."""
    plain = compare(kind, pretrained, tmp_path, base, learning_rate=5e-3)
    assert plain["losses"][-1] < plain["losses"][0] - 0.02


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_bf16(kind: str, pretrained: str, tmp_path: Path) -> None:
    plain = compare(kind, pretrained, tmp_path, bf16=True, learning_rate=5e-3)
    assert plain["losses"][-1] < plain["losses"][0] - 0.01


def test_accumulated_gradients(pretrained: str, tmp_path: Path) -> None:
    plain = compare("sft", pretrained, tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.5)
    assert plain["losses"][-1] < plain["losses"][0] - 0.1


def test_the_config_has_an_optimizer_and_the_reference_does_not(pretrained: str, tmp_path: Path) -> None:
    """TRL takes optimizer, scheduler and offload out of the reference's config, and puts dotted keys into it."""
    optimizer = {"type": "AdamW", "params": {key: "auto" for key in ("lr", "betas", "eps", "weight_decay")}}
    rate = {"warmup_min_lr": 5e-3, "warmup_max_lr": 5e-3, "warmup_num_steps": "auto"}
    more = {
        "optimizer": optimizer,
        "scheduler": {"type": "WarmupLR", "params": rate},
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
    }
    compare("dpo", pretrained, tmp_path, learning_rate=5e-3, lr_scheduler_type="constant", deepspeed=more)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_precomputed_reference(kind: str, pretrained: str, tmp_path: Path) -> None:
    """An engine over the policy computes them, and the policy is wrapped again to train. TRL hashes the weights first, and
    so they have to be whole: the model is made before the config; see docs/clients/trl.md."""
    early = {"precompute_ref_log_probs": True}
    # Each in processes of its own, where no earlier config is alive.
    runs = [(3, {}), (3, early), (2, early)]
    ran = [run_clients(learn, 2, str(tmp_path), pretrained, kind, [run], "gpt2") for run in runs]
    for (plain,), (three,), (two,) in zip(*ran, strict=True):
        for other in (three, two):
            assert other["losses"] == pytest.approx(plain["losses"], rel=1e-5)
            assert_weights_close(other["weights"], plain["weights"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_the_reference_follows_the_policy(kind: str, pretrained: str, tmp_path: Path) -> None:
    """Both are gathered, and what rank 0 writes into the reference reaches the partitions of all ranks."""
    sync = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    options = {"learning_rate": 1e-2, **sync}
    plain = compare(kind, pretrained, tmp_path, **options)
    (still,), _ = run_clients(learn, 2, str(tmp_path), pretrained, kind, [(3, {"learning_rate": 1e-2})], "gpt2")
    assert still["losses"][-1] != pytest.approx(plain["losses"][-1], rel=1e-2)


# -- generating --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("whole_model", [True, False])
def test_online(kind: str, whole_model: bool, pretrained: str, tmp_path: Path) -> None:
    """Both ways of generating under ZeRO-3: all weights gathered and no hooks, or module by module."""
    options = {"learning_rate": 1e-2, "ds3_gather_for_generation": whole_model}
    plain = compare(kind, pretrained, tmp_path, "llama", gradient_accumulation_steps=2, max_steps=6, **options)
    assert max(plain["rewards"][2:]) > plain["rewards"][0] + 0.1


def test_online_dpo(pretrained: str, tmp_path: Path) -> None:
    plain = compare("online", pretrained, tmp_path, "llama", learning_rate=1e-2)
    start = whole(AutoModelForCausalLM.from_pretrained(f"{pretrained}/llama"))
    assert distance(plain["weights"], start) > 0.1


@pytest.mark.slow
def test_online_with_more(pretrained: str, tmp_path: Path) -> None:
    """Generation switches checkpointing off and on; a model judges; the reference follows the policy; bf16."""
    sync = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    compare("grpo", pretrained, tmp_path / "one", learning_rate=1e-2, gradient_checkpointing=True, judge=True, **sync)
    compare("grpo", pretrained, tmp_path / "two", learning_rate=1e-3, bf16=True)


def test_distillation(pretrained: str, tmp_path: Path) -> None:
    """A frozen teacher engine, and both models' backbones called through their engines with another ``forward``."""
    plain = compare("distillation", pretrained, tmp_path, "llama", learning_rate=5e-3, beta=1.0)
    assert plain["losses"][-1] < plain["losses"][0]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bf16"), [("sft", False), ("sft", True), ("dpo", False), ("grpo", False)])
def test_adapters(kind: str, bf16: bool, pretrained: str, tmp_path: Path) -> None:
    """TRL wants reentrant checkpointing for adapters under ZeRO-3; the reference is the base without the adapter."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    options = {"peft_config": lora, "gradient_checkpointing": True, "learning_rate": 2e-2, "bf16": bf16}
    plain = compare(kind, pretrained, tmp_path, "llama", **options)
    changed = [name for name in plain["weights"] if "lora_B" in name and plain["weights"][name].abs().max() > 1e-3]
    assert len(changed) == 4
