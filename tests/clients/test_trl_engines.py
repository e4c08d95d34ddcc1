"""What TRL does with engines beside training them: its own functions, called on ours."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="the client is not installed: make test-clients installs it")
pytest.importorskip("datasets", reason="TRL needs it: make test-clients installs it")

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, set_seed

import deepspeed
from tests.clients.test_trl import pretrained, whole
from tests.helpers.clients import Sequences, free_port, run_clients, tiny_gpt2

pytestmark = pytest.mark.client

__all__ = ["pretrained"]  # a fixture

ROOT = Path(__file__).parents[2]


def test_the_installation_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    from packaging.version import Version
    from trl.scripts.env import print_env

    print_env()
    (version,) = re.findall(r"DeepSpeed version: (.*)", capsys.readouterr().out)
    assert version == importlib.metadata.version("deepspeed") == deepspeed.__version__
    assert Version(version) >= Version("0.18.6")  # what TRL's extra asks for


def accelerator(stage: int) -> Any:
    AcceleratorState._reset_state()
    zero_options = {"stage": stage, "stage3_param_persistence_threshold": 40}  # more than the models' vectors have
    plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": zero_options, "train_micro_batch_size_per_gpu": 4})
    return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])


def assert_released(model: torch.nn.Module) -> None:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    for param in model.parameters():  # a released one reads as NaN
        assert (param.ds_status == ZeroParamStatus.AVAILABLE) == bool(param.isfinite().all())
    assert any(param.ds_status == ZeroParamStatus.NOT_AVAILABLE for param in model.parameters())


def generate(model: Any, data: Any, sample: bool = True) -> Any:
    set_seed(3)
    return model.generate(data["input_ids"][:, :4], do_sample=sample, max_new_tokens=6, pad_token_id=0).tolist()


def frozen_engine(rank: int, world_size: int, stage: int) -> list[Any]:
    """A reference's engine: it has no optimizer. At stage 3 the object with the hooks is in its place."""
    from trl.models.utils import add_hooks, prepare_deepspeed, remove_hooks, unwrap_model_for_generation

    state = accelerator(stage)
    engine = prepare_deepspeed(tiny_gpt2(), state)
    assert type(engine) is deepspeed.DeepSpeedEngine is deepspeed.runtime.engine.DeepSpeedEngine
    assert not engine.module.training and engine.config is not None and engine.global_steps == 0
    assert engine.generation_config is engine.module.generation_config  # members of the module are found through it
    assert engine.zero_optimization_stage() == (3 if stage == 3 else 0)
    assert getattr(engine.config, "_name_or_path", "unnamed") == "unnamed"
    assert deepspeed.comm.is_initialized() and deepspeed.comm.get_rank() == rank
    data = {key: torch.stack([Sequences(4)[i][key] for i in range(4)]) for key in ("input_ids", "labels")}
    results = []
    with torch.no_grad():
        results.append(engine(**data).logits)
        for gather in (True, False):
            with unwrap_model_for_generation(engine, state, gather_deepspeed3_params=gather) as model:
                assert model is engine.module
                if stage == 3 and gather:
                    assert engine.optimizer.forward_hooks == engine.optimizer.backward_hooks == []
                    assert all(param.isfinite().all() for param in model.parameters())
                results.append(generate(model, data))
            if stage == 3:
                assert_released(engine.module)
            results.append(engine(**data).logits)
        if stage == 3:
            root = engine.optimizer.module
            assert root is engine.module and list(root.ds_external_parameters()) == []
            remove_hooks(engine)
            assert engine.module(**data).logits.isnan().all()  # nothing gathers
            add_hooks(engine)
            results.append(engine(**data).logits)
    return results


@pytest.mark.parametrize("stage", [2, 3])
def test_a_frozen_engine_generates(stage: int) -> None:
    model = tiny_gpt2().eval()
    data = {key: torch.stack([Sequences(4)[i][key] for i in range(4)]) for key in ("input_ids", "labels")}
    with torch.no_grad():
        logits, tokens = model(**data).logits, generate(model, data)
    for results in run_clients(frozen_engine, 2, stage):
        for result in results:
            if isinstance(result, list):
                assert result == tokens
            else:
                torch.testing.assert_close(result, logits)


class Inference:
    """Stands for vLLM's server: it keeps what it is sent."""

    def __init__(self) -> None:
        self.metadata: list[Any] = []
        self.weights: dict[str, torch.Tensor] = {}

    def update_named_params(self, metadata: list[Any], params: Any) -> None:
        self.metadata = list(metadata)
        self.weights = {name: tensor.detach().float().clone() for name, tensor in params}

    def reset_prefix_cache(self) -> None: ...


def send_weights(rank: int, world_size: int, stage: int, adapters: bool) -> dict[str, Any]:
    from trl.distributed import DistributedBackend
    from trl.generation.vllm_generation import VLLMGeneration

    state = accelerator(stage)
    model: Any = tiny_gpt2()
    if adapters:
        peft = pytest.importorskip("peft")
        settings = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": False}
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    data = torch.utils.data.DataLoader(Sequences(32), batch_size=4)
    engine, optimizer, data = state.prepare(model, optimizer, data)
    losses = []
    sender = object.__new__(VLLMGeneration)  # its constructor wants vLLM, what follows does not
    for name, value in {"mode": "server", "accelerator": state, "_dist": DistributedBackend(state)}.items():
        setattr(sender, name, value)
    sender.model, sender._weight_metadata, sender.vllm_client = model, None, Inference()
    before: dict[str, Any] = {}
    for step, batch in enumerate(data):
        loss = engine(**batch).loss
        state.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step == 1:
            before = whole(model)
            sender.sync_weights()
            after = whole(model)
            for name, tensor in before.items():  # merged and unmerged in fp32, or dropped with the gathered copies
                torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6 if stage != 3 else 0)
            if stage == 3:
                assert_released(model)
    if adapters:
        peft_model = tiny_gpt2()
        peft_model = peft.get_peft_model(peft_model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
        peft_model.load_state_dict(before)
        before = peft_model.merge_and_unload().state_dict()
    return {
        "losses": losses,
        "sent": sender.vllm_client.weights,
        "metadata": sender.vllm_client.metadata,
        "whole": before,
    }


@pytest.mark.parametrize("adapters", [False, True])
def test_weights_for_an_inference_server(adapters: bool) -> None:
    """Gathered one by one, or all at once and with the adapters merged, while a generator is suspended; training goes on."""
    two, three = (run_clients(send_weights, 2, stage, adapters) for stage in (2, 3))
    for one, other in zip(two, three, strict=True):
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-5)
    sent, expected = three[0]["sent"], three[0]["whole"]
    assert three[1]["sent"] == {}
    assert len(sent) >= 28 and sent.keys() <= expected.keys()
    for name, tensor in sent.items():
        torch.testing.assert_close(tensor, expected[name].float(), rtol=0, atol=1e-6 if adapters else 0)
        torch.testing.assert_close(tensor, two[0]["sent"][name], rtol=0, atol=1e-4)
    for name, dtype, shape in three[0]["metadata"]:
        assert (dtype, tuple(shape)) == ("float32", tuple(sent[name].shape))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_configs_that_trl_ships(stage: int, pretrained: str, tmp_path: Path) -> None:
    """``accelerate launch`` with TRL's own files and script, with as many processes as there are cores here."""
    import trl

    shipped = Path(trl.__file__).parent
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"text": "abcdefgh"[i % 4 :]}) for i in range(16)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows))
    launch = f"--config_file {shipped}/accelerate_configs/zero{stage}.yaml --num_processes 2"
    script = f"{shipped}/scripts/sft.py --model_name_or_path {pretrained}/gpt2 --dataset_name {tmp_path}/data --use_cpu"
    options = f"--output_dir {tmp_path}/out --ddp_backend gloo --max_steps 4 --max_length 10 --learning_rate 1e-2"
    options += " --per_device_train_batch_size 2 --report_to none --logging_steps 1 --save_strategy no"
    launch += f" --main_process_port {free_port()}"
    command = [sys.executable, "-m", "accelerate.commands.launch", *f"{launch} {script} {options}".split()]
    alone = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env={**os.environ, **alone}, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-6000:]
    trained, start = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", f"{pretrained}/gpt2")
    )
    changed = (
        trained.state_dict()["transformer.h.0.mlp.c_fc.weight"] - start.state_dict()["transformer.h.0.mlp.c_fc.weight"]
    )
    assert changed.shape == (32, 128) and changed.abs().max() > 5e-3
