"""What else Transformers relies on: checkpoints that change their stage, and models that are loaded, made and resized."""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the client is not installed: make test-clients installs it")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate: make test-clients installs it")

import torch
import transformers
from transformers.integrations import HfDeepSpeedConfig

import deepspeed
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint, load_state_dict_from_zero_checkpoint
from tests.clients.test_transformers import make_trainer
from tests.clients.test_transformers_contract import SHORT, assert_near, assert_same, learned, train
from tests.clients.test_zero3_transformers import BERT, INFERENCE, SMALL, T5, config, is_partitioned, whole
from tests.helpers.clients import assert_identical, run_clients, tiny_gpt2

pytestmark = pytest.mark.client

# -- saving and resuming -----------------------------------------------------------------------------------------------


def from_stage_to_stage(rank: int, world_size: int, out: str, stages: list[int]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    own = {"optimizer": True, "scheduler": True}
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    for stage in stages:
        found[stage] = train(f"{out}/{stage}", config(stage, **own), **saving)
    for before, after in itertools.permutations(stages, 2):
        source = f"{out}/{before}/checkpoint-2"
        found[before, after] = train(f"{out}/again", config(after, **own), resume=source, max_steps=4)
    return found


@pytest.mark.parametrize("stages", [[2, 3], pytest.param([0, 1, 2, 3], marks=pytest.mark.slow)])
def test_resuming_at_another_stage(stages: list[int], tmp_path: Path) -> None:
    for found in run_clients(from_stage_to_stage, 2, str(tmp_path), stages):
        assert len(found) == len(stages) ** 2
        for pair in [key for key in found if isinstance(key, tuple)]:
            assert_near(found[pair], found[pair[1]], relative=1e-6, weight=1e-5)


def save_everything(rank: int, world_size: int, out: str) -> dict[str, Any]:
    """Stage 3 without the permission to gather: the Trainer saves a checkpoint where it would save a model."""
    result = {}
    for own in (True, False):
        ds = config(3, optimizer=own, scheduler=own)
        ds["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False
        trainer = make_trainer(f"{out}/{own}", ds, save_strategy="steps", save_steps=3, **SHORT)
        trainer.train()
        trainer.save_model(f"{out}/{own}/model")
        result[own] = learned(trainer)
        loaded = load_state_dict_from_zero_checkpoint(trainer.model, f"{out}/{own}/checkpoint-3")
        assert loaded is trainer.model and not any(hasattr(p, "ds_id") for p in loaded.parameters())
        result[own]["loaded"] = {n: t.clone() for n, t in loaded.state_dict().items()}
        ids = torch.arange(5).reshape(1, -1)
        plain = tiny_gpt2(seed=3)
        plain.load_state_dict(result[own]["loaded"])
        assert torch.equal(loaded.eval()(ids).logits, plain.eval()(ids).logits)
    return result


def test_what_lies_in_the_folders(tmp_path: Path) -> None:
    results = run_clients(save_everything, 2, str(tmp_path))
    for own in (True, False):
        weights = results[0][own]["weights"]
        checkpoint, model = (tmp_path / str(own) / name for name in ("checkpoint-3", "model"))
        assert (checkpoint / "scheduler.pt").exists() == (not own)
        names = {path.name for path in (checkpoint / "global_step3").glob("*_states.pt")}
        kinds = ("model", "optim")
        assert names == {f"zero_pp_rank_{r}_mp_rank_00_{kind}_states.pt" for r in (0, 1) for kind in kinds}
        for folder in (checkpoint, model):
            assert not list(folder.glob("*.safetensors")) and (folder / "latest").read_text() == "global_step3"
            saved = get_fp32_state_dict_from_zero_checkpoint(str(folder))
            assert_identical({n: t for n, t in weights.items() if n in saved}, saved)
        for result in results:
            assert_identical(result[own]["loaded"], weights)
    # As Transformers' own tests run it: by its path, in a shell, with the name of a file.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = '"$0"/zero_to_fp32.py "$0" "$0"/out.bin'
    ran = subprocess.run(
        ["sh", "-c", command, str(checkpoint)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    written = checkpoint / "out.bin"
    written = written if written.is_file() else written / "pytorch_model.bin"
    assert_identical(torch.load(written, weights_only=True), saved)


def each_node_saves(rank: int, world_size: int, out: str) -> Any:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "warmup_steps": 1, "save_on_each_node": True}
    trainer = make_trainer(out, config(3), **saving)
    trainer.train()
    section = trainer.model_wrapped.config["checkpoint"]
    one = learned(trainer)
    trainer.model_wrapped.destroy()
    return section, one, train(f"{out}-again", config(3), resume=f"{out}/checkpoint-2", **saving)


@pytest.mark.slow
def test_checkpoints_on_each_node(tmp_path: Path) -> None:
    for section, one, two in run_clients(each_node_saves, 2, str(tmp_path / "out")):
        assert section == {"use_node_local_storage": True}
        assert_same(two, one)


def evaluate_first(rank: int, world_size: int, out: str) -> list[float]:
    """The ``scheduler`` section stays in the config of an engine that has no optimizer."""
    plain = make_trainer(out, None).evaluate()["eval_loss"]
    ds = config(3, optimizer=True)
    ds["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": 5e-3, "warmup_num_steps": 2}}
    trainer = make_trainer(out, ds)
    before = trainer.evaluate()["eval_loss"]
    assert trainer.model_wrapped.config["scheduler"] == ds["scheduler"]
    return [before, plain]


def test_a_schedule_without_an_optimizer_is_left_alone(tmp_path: Path) -> None:
    for ours, plain in run_clients(evaluate_first, 2, str(tmp_path)):
        assert ours == pytest.approx(plain, rel=1e-5)


# -- models without the Trainer ----------------------------------------------------------------------------------------

GPTJ = {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "n_positions": 2048, "vocab_size": 48}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
SIGLIP = {**SMALL, "image_size": 8, "patch_size": 4}


def build(name: str) -> Any:
    torch.manual_seed(1)
    if name == "gptj":
        return transformers.GPTJForCausalLM(transformers.GPTJConfig(**GPTJ))
    if name == "resnet":
        made = transformers.ResNetModel(transformers.ResNetConfig(**RESNET))
        for buffer in made.buffers():  # as if it had seen images
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
        return made
    coder = transformers.BertConfig(**BERT)
    return transformers.EncoderDecoderModel(
        transformers.EncoderDecoderConfig.from_encoder_decoder_configs(coder, copy.deepcopy(coder))
    )


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def load_models(rank: int, world_size: int, folder: str) -> None:
    ids = torch.randint(4, 48, (2, 5), generator=torch.Generator().manual_seed(rank))
    inputs = {
        "gptj": {"input_ids": torch.arange(600).reshape(1, -1) % 48},
        "resnet": {"pixel_values": pixels()},
        "coders": {"input_ids": ids, "decoder_input_ids": ids},
    }
    for name, given in inputs.items():
        kind = type(build(name))
        for dtype in (torch.float32, torch.bfloat16) if name == "gptj" else (torch.float32,):
            ds = {**INFERENCE, "bf16": {"enabled": dtype == torch.bfloat16}}
            plain = kind.from_pretrained(f"{folder}/{name}", dtype=dtype).eval()
            holder = HfDeepSpeedConfig(copy.deepcopy(ds))
            torch.manual_seed(rank)
            model = kind.from_pretrained(f"{folder}/{name}", dtype=dtype)
            assert is_partitioned(model) and model.dtype == dtype, name
            engine = deepspeed.initialize(model=model, config_params={**ds, "train_batch_size": world_size})[0]
            engine.eval()
            with torch.no_grad():
                made, expected = engine(**given), plain(**given)
            for one, other in zip(made.values(), expected.values(), strict=True):
                if isinstance(one, torch.Tensor):
                    assert torch.equal(one, other), name
            assert all(torch.equal(b, dict(plain.named_buffers())[n]) for n, b in model.named_buffers())
            engine.destroy()
            del holder


def fresh_models(rank: int, world_size: int) -> None:
    """Spreads that follow from the fans of whole weights, and a dtype from the config whatever torch's is."""
    settings = transformers.SiglipVisionConfig(**{**SIGLIP, "hidden_size": 64, "intermediate_size": 256})
    torch.manual_seed(0)
    plain = transformers.SiglipVisionModel(settings).state_dict()
    for section, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        holder = HfDeepSpeedConfig({**INFERENCE, "bf16": {}, section: {"enabled": True}})
        torch.manual_seed(rank)
        model = transformers.SiglipVisionModel._from_config(settings)
        assert is_partitioned(model) and model.dtype == dtype and torch.get_default_dtype() == torch.float32
        for name, tensor in whole(model).items():
            if plain[name].numel() > 2000:
                assert float(tensor.std()) == pytest.approx(float(plain[name].std()), rel=0.1), name
        del holder


def resized_models(rank: int, world_size: int, folder: str) -> None:
    """With means of what is there (the default), a multiple to pad to, a head with a bias; and in shards."""
    ids = torch.randint(4, 48, (2, 5), generator=torch.Generator().manual_seed(0))
    for kind in (transformers.BertForMaskedLM, transformers.T5ForConditionalGeneration):
        given = {"input_ids": ids, **({} if kind is transformers.BertForMaskedLM else {"decoder_input_ids": ids})}
        path = f"{folder}/{kind.__name__}"
        expected = kind.from_pretrained(path).eval()(**given).logits
        holder = HfDeepSpeedConfig(copy.deepcopy(INFERENCE))
        model = kind.from_pretrained(path)
        model.resize_token_embeddings(50, pad_to_multiple_of=8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ds = {**INFERENCE, "train_batch_size": world_size, "zero_allow_untested_optimizer": True}
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=ds)[0]
        engine.eval()
        logits = engine(**given).logits
        assert logits.shape[-1] == 56 == model.config.vocab_size and logits.isfinite().all()
        torch.testing.assert_close(logits[..., :48], expected)
        engine.backward(engine(**given, labels=ids + 8).loss)  # up to the last of the new tokens
        engine.step()
        changed = engine(**given).logits
        assert not torch.equal(changed[..., 48:], logits[..., 48:]) and changed.isfinite().all()
        engine.destroy()
        del holder


def without_the_trainer(rank: int, world_size: int, folder: str) -> None:
    load_models(rank, world_size, folder)
    fresh_models(rank, world_size)
    resized_models(rank, world_size, folder)


@pytest.mark.slow
def test_models_loaded_made_and_resized(tmp_path: Path) -> None:
    for name in ("gptj", "resnet", "coders"):
        build(name).save_pretrained(tmp_path / name, max_shard_size="20KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > (1 if name != "resnet" else 0)
    torch.manual_seed(1)
    transformers.BertForMaskedLM(transformers.BertConfig(**BERT)).save_pretrained(tmp_path / "BertForMaskedLM")
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    t5.save_pretrained(tmp_path / "T5ForConditionalGeneration")
    run_clients(without_the_trainer, 2, str(tmp_path))


def test_the_trainer_finds_what_it_asks_signatures_for() -> None:
    saving = inspect.signature(deepspeed.DeepSpeedEngine.save_checkpoint).parameters
    assert list(saving)[1:3] == ["save_dir", "tag"] and "exclude_frozen_parameters" in saving
