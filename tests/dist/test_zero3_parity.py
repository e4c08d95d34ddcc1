"""Stage 3 against DDP, against torch with the same casts, and bit for bit against stage 2."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from tests.helpers.dist import run_ranks
from tests.helpers.models import batches
from tests.helpers.training import (
    BATCH,
    KINDS,
    Trace,
    assert_close,
    assert_equal,
    make_engine,
    make_model,
    run_ddp,
    run_emulated,
    run_engine,
    trained,
)
from tests.helpers.zero3 import assert_same, whole

# What may change the order of things, and never a bit of the result. The model has 600 elements.
WAYS: tuple[dict, ...] = (
    {"stage3_param_persistence_threshold": 0},
    {"stage3_param_persistence_threshold": 100},
    {"stage3_param_persistence_threshold": 10**6},
    {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 64, "overlap_comm": False},
    {"stage3_param_persistence_threshold": 0, "sub_group_size": 50, "stage3_max_reuse_distance": 10**6},
    {"stage3_param_persistence_threshold": 20, "contiguous_gradients": False, "stage3_prefetch_bucket_size": 0},
)


# Layers that run in another order than the model holds them have late gradients in the first step, which are reduced by
# themselves: exact sums, in another order.
IN_ORDER = ("plain", "tied", "reused", "frozen")


def _optimizer_for(kind: str) -> str:
    return "sgd" if kind.startswith("unused") else "adam"  # DDP leaves what nobody used alone, decay and all


def _config(stage: int, zero: dict, accumulation: int, clip: float = 0.0, **more) -> dict:
    zero = {"stage": stage, **zero}
    return {
        "zero_optimization": zero,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        **more,
    }


def _partitioned_at_birth(kind: str, config: dict) -> nn.Module:
    with deepspeed.zero.Init(config_dict_or_path={"train_micro_batch_size_per_gpu": BATCH, **config}):
        return make_model(kind)


def _fp32(rank: int, world: int) -> int:
    count = 0
    for number, (kind, accumulation) in enumerate(itertools.product(KINDS, (1, 3))):
        if world == 3 and (number + number // 2) % 2:
            continue
        clip = 0.5 if number % 4 > 1 else 0.0
        name = _optimizer_for(kind)
        expected = run_ddp(kind, rank, accumulation=accumulation, clip=clip, optimizer=name)
        stage2 = run_engine(kind, rank, _config(2, {}, accumulation, clip), optimizer=name)
        for turn in range(2):
            zero = WAYS[(2 * number + turn + number // 3) % len(WAYS)]
            config = _config(3, zero, accumulation, clip)
            model = _partitioned_at_birth(kind, config) if turn else None
            got = run_engine(kind, rank, config, optimizer=name, model=model)
            what = f"{kind} x{accumulation} clip {clip} {zero} Init {bool(turn)}"
            assert_close(got, expected, rtol=1e-6, atol=1e-6, what=what)
            if world < 3 and not clip and kind in IN_ORDER:  # a sum of three depends on its order, and so does the norm
                assert_equal(got, stage2, what)
                assert got.norms == pytest.approx(stage2.norms, rel=1e-6)
            count += 1
    return count


@pytest.mark.parametrize("world", [1, 2, 3])
def test_fp32_equals_ddp_and_stage_2(world: int) -> None:
    assert run_ranks(_fp32, world) == [len(KINDS) * (2 if world == 3 else 4)] * world


_MODES = {
    "bf16": ({"bf16": {"enabled": True}}, torch.bfloat16, 1.0, 2.0**-8),
    "fp16": ({"fp16": {"enabled": True, "loss_scale": 128}}, torch.float16, 128.0, 2.0**-11),
    "fp16 dynamic": ({"fp16": {"enabled": True, "initial_scale_power": 8}}, torch.float16, 256.0, 2.0**-11),
}


def _half(rank: int, world: int) -> int:
    count = 0
    for number, (kind, accumulation) in enumerate(itertools.product(KINDS, (1, 3))):
        if world == 3 and (number + number // 2 + 1) % 2:
            continue
        section, dtype, scale, ulp = list(_MODES.values())[(number + number // 3) % 3]
        clip = 0.5 if number % 4 > 1 else 0.0
        zero = WAYS[(number + world) % len(WAYS)]
        what = f"{section} {kind} x{accumulation} clip {clip} {zero}"
        expected = run_emulated(
            kind, rank, dtype, accumulation=accumulation, clip=clip, optimizer="momentum", stage=2, scale=scale
        )
        got = run_engine(kind, rank, _config(3, zero, accumulation, clip, **section), optimizer="momentum")
        assert_close(got, expected, rtol=ulp, atol=ulp, what=what)
        if world < 3 and not clip and kind in IN_ORDER:
            stage2 = run_engine(kind, rank, _config(2, {}, accumulation, **section), optimizer="momentum")
            assert_equal(got, stage2, what)
        count += 1
    return count


@pytest.mark.parametrize("world", [1, 2, 3])
def test_16_bit_equals_torch_with_the_same_casts_and_stage_2(world: int) -> None:
    assert run_ranks(_half, world) == [len(KINDS) * (1 if world == 3 else 2)] * world


def _born_in_16_bit(rank: int, world: int) -> None:
    """``Init`` makes the weights in the config's dtype, and there are no others behind them."""
    for mode in ("bf16", "fp16"):
        config = _config(3, WAYS[0], 2, **_MODES[mode][0])
        born = _partitioned_at_birth("tied", config)
        assert {p.dtype for p in born.parameters()} == {_MODES[mode][1]}
        rounded = make_model("tied").to(_MODES[mode][1])
        rounded.load_state_dict(whole(born), strict=False)
        expected = run_engine("tied", rank, config, optimizer="adam", model=rounded)
        assert_equal(run_engine("tied", rank, config, optimizer="adam", model=born), expected, mode)


def test_models_born_in_16_bit() -> None:
    run_ranks(_born_in_16_bit, 2)


def _own_optimizers(rank: int, world: int) -> None:
    """Our kernels update shards in one pass; each element as at stage 2."""
    settings = {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.1}
    for number, (section, name) in enumerate(
        itertools.product(({}, _MODES["bf16"][0], _MODES["fp16"][0]), ("AdamW", "Lion", "Adagrad"))
    ):
        params = {k: v for k, v in settings.items() if name != "Lion" or k != "eps"}
        more = {"optimizer": {"type": name, "params": params}, **section, "verify_gradients": 2}
        zero = WAYS[number % len(WAYS)]
        got = run_engine("reused", rank, _config(3, zero, 2, **more), optimizer=None)
        expected = run_engine("reused", rank, _config(2, {}, 2, **more), optimizer=None)
        assert_equal(got, expected, f"{name} {section} {zero}")


def test_our_optimizers_train_as_at_stage_2() -> None:
    run_ranks(_own_optimizers, 2)


def _autocast(rank: int, world: int) -> None:
    """Casts are made anew at each use, and their gradients add up in fp32: as at stage 2 but for roundings."""
    section = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    for kind, zero in (("tied", WAYS[0]), ("reused", WAYS[1])):
        got = run_engine(kind, rank, _config(3, zero, 2, **section), optimizer="adam")
        expected = run_engine(kind, rank, _config(2, {}, 2, **section), optimizer="adam")
        assert_close(got, expected, rtol=2.0**-6, atol=2.0**-6, what=kind)
        plain = run_engine(kind, rank, _config(3, zero, 2), optimizer="adam")
        assert got.losses != plain.losses  # the cast does happen


def test_autocast_trains_as_at_stage_2() -> None:
    run_ranks(_autocast, 2)


def _groups(rank: int, world: int) -> None:
    """Several groups stay the user's own dicts; a changed learning rate counts."""
    weights = []
    for stage in (2, 3):
        model = make_model("frozen")
        groups = [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1, "lr": 0.05},
            {"params": [p for p in model.parameters() if p.ndim < 2], "lr": 0.2, "mine": "x"},
        ]
        given = [list(g["params"]) for g in groups]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        engine = make_engine(model, _config(stage, WAYS[1] if stage == 3 else {}, 1), optimizer)
        assert engine.optimizer.param_groups[1] is groups[1] and groups[1]["mine"] == "x"
        assert engine.get_lr() == [0.05, 0.2]
        for step, (x, y) in enumerate(batches(rank, 3, BATCH)):
            if step == 2:
                groups[1]["lr"] = 0.0
            engine.backward(engine(x, y))
            engine.step()
        weights.append(whole(model))
        engine.destroy()
        assert [[id(p) for p in g["params"]] for g in groups] == [[id(p) for p in g] for g in given]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_parameter_groups_stay_live() -> None:
    run_ranks(_groups, 2)


class Odd(nn.Module):
    """Sparse, channels-last, 16-bit, fp64 and integer parameters, and some without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4, sparse=True)
        self.conv = nn.Conv2d(1, 2, 2).to(memory_format=torch.channels_last)
        self.low = nn.Linear(4, 4).to(torch.bfloat16)
        self.fine = nn.Linear(4, 2).double()
        self.count = nn.Parameter(torch.tensor([3, 4, 5]), requires_grad=False)
        self.hole = nn.Parameter(torch.zeros(0, 4))
        self.point = nn.Parameter(torch.tensor(0.5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.words(ids) * self.point
        h = h + self.conv(h[:, None, :, :]).mean((1, 2, 3))[:, None, None]
        h = h + self.low(h.bfloat16()).float()
        return self.fine(h.double()).square().mean() * self.count.sum() + self.hole.sum()


def _odd(rank: int, world: int) -> None:
    weights = []
    for stage, zero in ((2, {}), *((3, way) for way in WAYS[:3])):
        torch.manual_seed(0)
        model = Odd()
        engine = make_engine(model, _config(stage, zero, 2), torch.optim.SGD(trained(model).values(), lr=0.01))
        kinds = (model.low.weight, model.fine.weight, model.count)
        assert [p.dtype for p in kinds] == [torch.bfloat16, torch.float64, torch.int64]
        for step in range(4):
            ids = torch.randint(0, 9, (3, 5), generator=torch.Generator().manual_seed(rank + 10 * step))
            engine.backward(engine(ids))
            engine.step()
        weights.append(whole(model))
        assert torch.equal(weights[-1]["count"], torch.tensor([3, 4, 5]))
        engine.destroy()
    for got in weights[1:]:
        assert_same(got, weights[0])


@pytest.mark.parametrize("world", [1, 3])
def test_parameters_of_odd_kinds(world: int) -> None:
    run_ranks(_odd, world)


class _Pairs:
    """Ranks 0 and 2 share gradients and parameters, rank 1 trains alone."""

    def __init__(self, rank: int) -> None:
        pair, alone = torch.distributed.new_group([0, 2]), torch.distributed.new_group([1])
        self.group = alone if rank == 1 else pair

    def get_data_parallel_group(self):
        return self.group


def _data_parallel_groups(rank: int, world: int) -> None:
    mpu = _Pairs(rank)
    peers = [1] if rank == 1 else [0, 2]
    model = make_model("tied", seed=10 + rank)
    engine = make_engine(model, _config(3, WAYS[1], 1), mpu=mpu)
    assert engine.dp_world_size == len(peers)
    reference = make_model("tied", seed=10 + peers[0])
    optimizer = torch.optim.SGD(trained(reference).values(), lr=0.1)
    for step in range(2):
        (x, y), *_ = batches(rank, 1, BATCH, seed=step)
        engine.backward(engine(x, y))
        for peer in peers:
            (x, y), *_ = batches(peer, 1, BATCH, seed=step)
            (reference(x, y) / len(peers)).backward()
        grad = safe_get_full_grad(model.head.weight)
        assert torch.allclose(grad, reference.head.weight.grad, atol=1e-6)
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(whole(model), whole(reference))
    engine.destroy()


def test_parameters_stay_in_their_data_parallel_group() -> None:
    run_ranks(_data_parallel_groups, 3)


def _part(rank: int, world: int) -> None:
    """Only what ``model_parameters`` gives is trained; the rest of the model is partitioned all the same."""
    model = make_model("plain")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    config = _config(3, WAYS[0], 1, optimizer={"type": "SGD", "params": {"lr": 0.1}})
    engine = deepspeed.initialize(
        model=model,
        model_parameters=(p for n, p in model.named_parameters() if n.startswith("head")),
        config={"train_micro_batch_size_per_gpu": BATCH, **config},
    )[0]
    for x, y in batches(rank, 2, BATCH):
        engine.backward(engine(x, y))
        engine.step()
    changed = {n for n, value in whole(model).items() if not torch.equal(value, before[n])}
    assert changed == {"head.weight", "head.bias"}
    engine.destroy()


def test_a_part_of_a_model_can_be_trained() -> None:
    run_ranks(_part, 2)


def _overflow(rank: int, world: int) -> None:
    """A step with non-finite gradients changes nothing and says so; the next one trains."""
    for section in ({}, _MODES["fp16 dynamic"][0]):
        model = make_model("plain")
        engine = make_engine(model, _config(3, WAYS[1], 1, **section), "adam")
        (x, y), (u, v) = batches(rank, 2, BATCH)
        before = whole(model)
        engine.backward(engine(x, y) * (float("inf") if rank == 1 else 1.0))
        engine.step()
        assert not engine.was_step_applied() and engine.skipped_steps == 1
        assert all(torch.equal(value, before[name]) for name, value in whole(model).items())
        engine.backward(engine(u, v))
        engine.step()
        assert engine.was_step_applied()
        assert not torch.equal(whole(model)["head.weight"], before["head.weight"])
        master = safe_get_full_fp32_param(model.head.weight)
        assert torch.equal(master.to(model.head.weight.dtype), whole(model)["head.weight"])
        engine.destroy()


def test_overflow_skips_the_step() -> None:
    run_ranks(_overflow, 2)


def _losses(rank: int, world: int) -> list[float]:
    trace: Trace = run_engine("unused_somewhere", rank, _config(3, WAYS[0], 1), optimizer="sgd", windows=5)
    return trace.losses


def test_runs_repeat() -> None:
    """The same run twice gives the same losses, while ranks use different modules."""
    assert run_ranks(_losses, 3) == run_ranks(_losses, 3)
