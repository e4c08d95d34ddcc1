"""Unmodified PEFT on two CPU processes: adapters on bases in parts learn what plain torch teaches them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="the client is not installed: make test-clients installs it")
pytest.importorskip("transformers", reason="the tests adapt models of transformers: make test-clients installs it")

import peft
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

import deepspeed
from tests.clients.test_zero3_transformers import is_partitioned, llama
from tests.helpers.clients import Sequences, assert_identical, run_clients, tiny_gpt2
from tests.helpers.zero3 import whole

pytestmark = pytest.mark.client

WORLD, LR = 2, 0.1
TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
LINEAR: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], **TASK}
QUERY: dict[str, Any] = {"target_modules": ["q_proj"], **TASK}
CONV: dict[str, Any] = {"target_modules": ["c_attn"], "fan_in_fan_out": True, **TASK}

# Those of Conv1D layers (GPT-2) read the layers' sizes from ``ds_shape``; some initialise from the base's weights.
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, **LINEAR),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, **LINEAR),
    "ia3": lambda: peft.IA3Config(
        target_modules=["c_attn", "c_proj"], feedforward_modules=["c_proj"], fan_in_fan_out=True, **TASK
    ),
    "modules_to_save": lambda: peft.LoraConfig(r=4, modules_to_save=["lm_head"], **LINEAR),
    "target_parameters": lambda: peft.LoraConfig(r=4, target_modules=[], target_parameters=["q_proj.weight"], **TASK),
    "sampled prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB", **TASK),
    "lora of embeddings": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], **TASK),
    "lora of conv1d": lambda: peft.LoraConfig(r=4, **CONV),
    "pissa": lambda: peft.LoraConfig(r=4, init_lora_weights="pissa", **LINEAR),
    "olora": lambda: peft.LoraConfig(r=4, init_lora_weights="olora", **LINEAR),
    "mica": lambda: peft.LoraConfig(r=4, init_lora_weights="mica", **LINEAR),
    "adalora": lambda: peft.AdaLoraConfig(init_r=6, target_r=4, total_step=100, **LINEAR),
    "loha": lambda: peft.LoHaConfig(r=4, **LINEAR),
    "lokr": lambda: peft.LoKrConfig(r=4, **LINEAR),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, **LINEAR),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, **LINEAR),
    "vera": lambda: peft.VeraConfig(r=4, **QUERY),
    "norms": lambda: peft.LNTuningConfig(**TASK),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **TASK),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **TASK),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **TASK),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=10, **CONV),
    "hra": lambda: peft.HRAConfig(r=4, **LINEAR),
    "hira": lambda: peft.HiraConfig(r=4, **LINEAR),
    "vblora": lambda: peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=8, **QUERY),
    "randlora": lambda: peft.RandLoraConfig(r=4, **QUERY),
    "gralora": lambda: peft.GraloraConfig(r=4, gralora_k=2, **LINEAR),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=10, **LINEAR),
    "shira": lambda: peft.ShiraConfig(r=2, **LINEAR),
    "psoft": lambda: peft.PsoftConfig(r=4, **LINEAR),
    "trainable tokens": lambda: peft.TrainableTokensConfig(
        token_indices=[1, 2, 3], target_modules=["embed_tokens"], **TASK
    ),
    # These read the base's weights when they are made and do not ask for them; see docs/clients/peft.md.
    "deft": lambda: peft.DeftConfig(r=4, **LINEAR),
    "delora": lambda: peft.DeloraConfig(r=4, **LINEAR),
}
ASKS_FOR_NOTHING = ("deft", "delora")
GPT2 = ("ia3", "lora of conv1d", "fourierft")
FAST = ("lora", "dora", "ia3", "modules_to_save", "sampled prompt", "delora")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bases")
    llama().save_pretrained(folder / "llama")
    tiny_gpt2().save_pretrained(folder / "gpt2")
    return str(folder)


def config(stage: int, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **more.pop("zero", {})}
    untested = {"zero_allow_untested_optimizer": True}
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **untested, **more}


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def adapted(kind: str, bases: str, dtype: torch.dtype | None = None) -> Any:
    base = AutoModelForCausalLM.from_pretrained(f"{bases}/{'gpt2' if kind in GPT2 else 'llama'}", dtype=dtype)
    asked = list(base.parameters()) if kind in ASKS_FOR_NOTHING else []
    torch.manual_seed(3)
    with deepspeed.zero.GatheredParameters(asked):
        made = peft.get_peft_model(base, KINDS[kind]())
    with torch.no_grad():
        for param in trainable(made):
            if not hasattr(param, "ds_id"):  # away from initial values at which adapters do nothing
                param.add_(0.02 * torch.randn(param.shape, generator=torch.Generator().manual_seed(param.numel())))
    return made.train()


def loss_of(model: Any, row: int) -> torch.Tensor:
    tokens = Sequences(16)[row]["input_ids"][None]
    return model(input_ids=tokens, labels=tokens).loss  # type: ignore[no-any-return]


def learn_plainly(model: Any, steps: int = 3, kind: Any = torch.optim.SGD) -> list[float]:
    optimizer, losses = kind(trainable(model), lr=LR if kind is torch.optim.SGD else 1e-2), []
    for step in range(steps):
        parts = [loss_of(model, step * WORLD + rank) / WORLD for rank in range(WORLD)]
        for part in parts:
            part.backward()
        losses.append(float(sum(part.detach() for part in parts)))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def learn(engine: Any, rank: int, first: int = 0, last: int = 3, between: Callable[[int], None] | None = None) -> Any:
    losses = []
    for step in range(first, last):
        loss = loss_of(engine, step * WORLD + rank)
        engine.backward(loss)
        if between is not None:
            between(step)
        engine.step()
        total = loss.detach().float().clone()
        dist.all_reduce(total)
        losses.append(float(total) / WORLD)
    return losses


# -- every kind --------------------------------------------------------------------------------------------------------


def learn_kinds(rank: int, world_size: int, bases: str, kinds: list[str]) -> None:
    for kind in kinds:
        plain = adapted(kind, bases)
        expected = learn_plainly(plain)
        for stage in (2,) if kind == "trainable tokens" else (2, 3):  # at stage 3 PEFT calls CUDA
            holder = HfDeepSpeedConfig(copy.deepcopy(config(stage)))
            model = adapted(kind, bases)
            assert model.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters(), kind
            engine = deepspeed.initialize(
                model=model, optimizer=torch.optim.SGD(trainable(model), lr=LR), config=config(stage)
            )[0]
            assert is_partitioned(model) == (stage == 3)
            assert learn(engine, rank) == pytest.approx(expected, rel=1e-6), f"{kind} at stage {stage}"
            trained = whole(model)
            for name, param in plain.named_parameters():
                torch.testing.assert_close(
                    trained[name], param, rtol=0, atol=1e-6, msg=lambda text, n=f"{kind} {stage} {name}": f"{n}: {text}"
                )
            engine.destroy()
            del holder


@pytest.mark.parametrize(
    "kinds", [FAST, pytest.param(tuple(kind for kind in KINDS if kind not in FAST), marks=pytest.mark.slow)]
)
def test_kinds_of_adapters_learn_as_in_plain_torch(kinds: tuple[str, ...], bases: str) -> None:
    run_clients(learn_kinds, WORLD, bases, list(kinds))


# -- bf16: training, saving, resuming, merging -------------------------------------------------------------------------


def live(rank: int, world_size: int, bases: str, out: str, kind: str, stage: int) -> None:
    settings = config(stage, bf16={"enabled": True})
    plain = adapted(kind, bases, torch.bfloat16).float()  # the base's weights are rounded
    expected = learn_plainly(plain, 5, torch.optim.AdamW)
    holder = HfDeepSpeedConfig(copy.deepcopy(settings))

    def start(model: Any = None) -> Any:
        made = adapted(kind, bases, torch.bfloat16) if model is None else model
        optimizer = torch.optim.AdamW(trainable(made), lr=1e-2)
        return deepspeed.initialize(model=made, optimizer=optimizer, config=copy.deepcopy(settings))[0]

    engine = start()
    losses = learn(engine, rank, 0, 3)
    engine.save_checkpoint(f"{out}/state", exclude_frozen_parameters=True)
    losses += learn(engine, rank, 3, 5)
    assert losses == pytest.approx(expected, rel=1e-2)  # bf16 has 8 bits of mantissa
    trained = whole(engine.module)
    engine.destroy()

    engine = start()
    assert engine.load_checkpoint(f"{out}/state", load_module_strict=False)[0] is not None
    assert learn(engine, rank, 3, 5) == losses[3:]
    assert_identical(whole(engine.module), trained)

    # The adapter alone, in both ways that there are; PEFT warns of tensors that are not whole.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if stage == 3:
            state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
            assert (state is None) == (rank != 0)
            if rank == 0:
                engine.module.save_pretrained(f"{out}/consolidated", state_dict=state)
        with deepspeed.zero.GatheredParameters(list(engine.parameters())):
            if rank == 0:
                engine.module.save_pretrained(f"{out}/gathered")
    dist.barrier()
    own = peft.get_peft_model_state_dict(plain)
    for folder in ("consolidated", "gathered") if stage == 3 else ("gathered",):
        saved = load_file(f"{out}/{folder}/adapter_model.safetensors")
        assert {name: t.shape for name, t in saved.items()} == {name: t.shape for name, t in own.items()}
        weights = {name.replace(".default", ""): value for name, value in trained.items()}
        assert all(torch.equal(weights[name].to(t.dtype), t) for name, t in saved.items())

    # Merged in place, with the values of rank 0 on all: the engine's own forward shows it, and unmerging takes it back.
    row = Sequences(16)[9]["input_ids"][None]
    engine.eval()
    names = [name for name in trained if "base_layer.weight" in name]
    with torch.no_grad():
        before = engine(input_ids=row).logits
        for merge, same in ((engine.module.merge_adapter, False), (engine.module.unmerge_adapter, True)):
            with deepspeed.zero.GatheredParameters(list(engine.parameters()), modifier_rank=0):
                merge()
            torch.testing.assert_close(engine(input_ids=row).logits, before, rtol=0, atol=5e-2)
            now = whole(engine.module)
            assert any(torch.allclose(now[n], trained[n], rtol=2e-2, atol=2e-3) == same for n in names)
            assert not same or all(torch.allclose(now[n], trained[n], rtol=2e-2, atol=2e-3) for n in names)
    # Merged for good, it is the base with the adapter's weights added, and an ordinary model.
    with deepspeed.zero.GatheredParameters(list(engine.parameters())):
        merged = engine.module.merge_and_unload()
        ours = {name: t.detach().float().clone() for name, t in merged.named_parameters()}
    engine.destroy()
    del holder, engine
    base = AutoModelForCausalLM.from_pretrained(f"{bases}/{'gpt2' if kind in GPT2 else 'llama'}", dtype=torch.bfloat16)
    loaded = peft.PeftModel.from_pretrained(base, f"{out}/gathered").eval()
    theirs = loaded.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=row).logits, before, rtol=0, atol=5e-2)
    for name, param in theirs.named_parameters():
        torch.testing.assert_close(ours[name], param.float(), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_bf16_from_training_to_merging(kind: str, stage: int, bases: str, tmp_path: Path) -> None:
    run_clients(live, WORLD, bases, str(tmp_path), kind, stage)


def go_on(rank: int, world_size: int, bases: str, out: str) -> None:
    """An adapter made by plain PEFT is loaded onto a base in parts, and trained on."""
    plain = adapted("lora", bases)
    learn_plainly(plain, 2)
    if rank == 0:
        plain.save_pretrained(out)
    holder = HfDeepSpeedConfig(config(3))
    base = AutoModelForCausalLM.from_pretrained(f"{bases}/llama")
    dist.barrier()  # loading at stage 3 has made the group
    model = peft.PeftModel.from_pretrained(base, out, is_trainable=True).train()
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trainable(model), lr=LR), config=config(3))[0]
    assert learn(engine, rank) == pytest.approx(learn_plainly(plain), rel=1e-6)
    del holder


def test_a_saved_adapter_is_trained_on(bases: str, tmp_path: Path) -> None:
    run_clients(go_on, WORLD, bases, str(tmp_path))


# -- what single kinds ask for -----------------------------------------------------------------------------------------


def allocate(rank: int, world_size: int, bases: str) -> None:
    """AdaLoRA reads whole gradients between backward and step, wherever a config is alive."""
    plain = adapted("adalora", bases)
    optimizer = torch.optim.SGD(trainable(plain), lr=LR)
    for step in range(2):
        for other in range(WORLD):
            (loss_of(plain, step * WORLD + other) / WORLD).backward()
        plain.base_model.update_and_allocate(step)
        optimizer.step()
        optimizer.zero_grad()
    expected = plain.base_model.rankallocator
    for stage in (0, 1, 2, 3):
        settings = config(stage, zero={"stage3_param_persistence_threshold": 1e5})
        holder = HfDeepSpeedConfig(copy.deepcopy(settings))
        model = adapted("adalora", bases)
        engine = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(trainable(model), lr=LR), config=copy.deepcopy(settings)
        )[0]
        learn(engine, rank, 0, 2, between=model.base_model.update_and_allocate)
        ours = model.base_model.rankallocator
        assert ours.ipt.keys() == expected.ipt.keys() and len(ours.ipt) == 12
        for name, value in expected.exp_avg_ipt.items():
            torch.testing.assert_close(ours.exp_avg_ipt[name], value, rtol=1e-4, atol=1e-9)
            assert ours.ipt[name].any()
        engine.destroy()
        del holder


def test_ranks_are_allocated_by_whole_gradients(bases: str) -> None:
    run_clients(allocate, WORLD, bases)


def construct(rank: int, world_size: int, bases: str) -> None:
    """Adapters inside ``zero.Init`` are in parts from the start, and PEFT's helpers see through an engine."""
    from peft.tuners.lora import loraga
    from peft.utils.integrations import gather_params_ctx

    holder = HfDeepSpeedConfig(config(3))
    base = AutoModelForCausalLM.from_pretrained(f"{bases}/llama")
    with deepspeed.zero.Init(config_dict_or_path=config(3)):
        torch.manual_seed(3 + rank)
        model = peft.get_peft_model(base, KINDS["lora"]())
    assert is_partitioned(model)
    optimizer = torch.optim.SGD(trainable(model), lr=LR)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config(3))[0]
    before = whole(model)
    learn(engine, rank)
    assert any(not torch.equal(t, before[name]) for name, t in whole(model).items())
    assert loraga.get_model_device(engine) == engine.device
    norm = model.base_model.model.model.norm
    for given in (norm.weight, [norm.weight], norm.parameters()):
        with gather_params_ctx(given, fwd_module=norm):
            if rank == 0:
                norm.weight.data.add_(1.0)
    total = torch.full_like(before["base_model.model.model.norm.weight"], 4.0)
    torch.testing.assert_close(whole(model)["base_model.model.model.norm.weight"], total)
    mixed = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(f"{bases}/llama"),
        peft.LoHaConfig(r=4, target_modules=["q_proj"]),
        mixed=True,
    )
    assert mixed.get_nb_trainable_parameters()[1] > 10000
    # What is not whole is not written.
    with pytest.raises(Exception, match="meta tensor"):
        model.save_pretrained(f"{bases}/never{rank}")
    assert not list(Path(bases).glob("never*/*.safetensors"))
    del holder


def test_construction_and_helpers(bases: str) -> None:
    run_clients(construct, WORLD, bases)
