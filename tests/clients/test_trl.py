"""Unmodified TRL on CPU processes: what ZeRO-3 learns is what ZeRO-2 and the plain trainer learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="the client is not installed: make test-clients installs it")
pytest.importorskip("datasets", reason="TRL needs it: make test-clients installs it")

from accelerate.state import AcceleratorState
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.helpers.clients import run_clients, tiny_gpt2

pytestmark = pytest.mark.client

PREFERENCES = [{"prompt": "a" + "b" * (i % 3), "chosen": "cd", "rejected": "ef"} for i in range(16)]
TEXTS = [{"text": "abcdefgh"[i % 4 :]} for i in range(16)]


def config(stage: int) -> dict[str, Any]:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
    }


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model, a tokenizer of single letters and two datasets, on disk."""
    folder = tmp_path_factory.mktemp("trl")
    letters = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    tiny_gpt2().save_pretrained(folder)
    Dataset.from_list(PREFERENCES).save_to_disk(folder / "preferences")
    Dataset.from_list(TEXTS).save_to_disk(folder / "texts")
    return str(folder)


def learn(rank: int, world_size: int, out: str, load: str, kind: str, runs: list[Any]) -> list[list[float]]:
    """Losses of each run; a run is a stage (None: without deepspeed) and more options."""
    import trl

    results = []
    for number, (stage, options) in enumerate(runs):
        AcceleratorState._reset_state()
        early = AutoModelForCausalLM.from_pretrained(load)  # before the config is alive: whole
        settings = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig}[kind](
            f"{out}/{number}",
            use_cpu=True,
            bf16=False,
            ddp_backend="gloo",
            per_device_train_batch_size=2,
            max_steps=4,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            gradient_checkpointing=False,
            max_length=10,
            deepspeed=None if stage is None else config(stage),
            **options,
        )
        whole = "precompute_ref_log_probs" in options
        model = early if whole else AutoModelForCausalLM.from_pretrained(load)
        if not whole:
            assert all(hasattr(param, "ds_id") for param in model.parameters()) == (stage == 3)
        trainer = {"sft": trl.SFTTrainer, "dpo": trl.DPOTrainer}[kind](
            model,
            args=settings,
            train_dataset=Dataset.load_from_disk(f"{load}/{'texts' if kind == 'sft' else 'preferences'}"),
            processing_class=PreTrainedTokenizerFast.from_pretrained(load),
        )
        trainer.train()
        results.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        if stage is not None:
            trainer.model_wrapped.destroy()
    return results


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_stages_learn_alike(kind: str, pretrained: str, tmp_path: Path) -> None:
    """DPO: a reference model beside the policy, both partitioned."""
    runs = [(None, {}), (2, {}), (3, {})]
    for plain, two, three in run_clients(learn, 2, str(tmp_path), pretrained, kind, runs):
        assert plain[-1] < plain[0] - 0.05
        assert two == pytest.approx(plain, rel=1e-4)
        assert three == pytest.approx(two, rel=1e-6)


def test_precomputed_reference(pretrained: str, tmp_path: Path) -> None:
    """TRL hashes the weights first, and so they have to be whole: the model is made before the config; see
    docs/clients/trl.md."""
    runs = [(3, {}), (3, {"precompute_ref_log_probs": True}), (2, {"precompute_ref_log_probs": True})]
    # Each in processes of its own, where no earlier config is alive.
    ran = [run_clients(learn, 2, str(tmp_path), pretrained, "dpo", [run]) for run in runs]
    for (plain,), (early,), (two,) in zip(*ran, strict=True):
        assert early == pytest.approx(plain, rel=1e-5) and two == pytest.approx(plain, rel=1e-5)
