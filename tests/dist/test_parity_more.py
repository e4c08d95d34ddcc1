"""Parity where other parts of the engine are in play: our own optimizers, groups of ranks, odd kinds of parameters."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from tests.helpers.dist import run_ranks
from tests.helpers.models import batches
from tests.helpers.training import BATCH, assert_close, make_engine, make_model, run_engine, trained

PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 64}},
}


def _own_optimizers(rank: int, world: int) -> None:
    """Our kernels take gradients unscaled and unclipped, and write 16-bit weights themselves; torch's do neither."""
    settings = {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.1}
    for (mode, section), stage in itertools.product(PRECISIONS.items(), (0, 1, 2)):
        clip = 0.5 if (stage + len(mode)) % 2 else 0.0
        bucket = {"reduce_bucket_size": 200} if clip else {}
        zero = {"zero_optimization": {"stage": stage, **bucket}, "gradient_clipping": clip}
        config = {**zero, **section, "gradient_accumulation_steps": 2}
        expected = run_engine("tied", rank, config, optimizer="adam", windows=3)
        limit = {"fp32": 2e-6, "bf16": 2.0**-8, "fp16": 2.0**-11}[mode]
        named = {"optimizer": {"type": "AdamW", "params": settings}}
        got = run_engine("tied", rank, {**config, **named}, optimizer=None, windows=3)
        assert_close(got, expected, rtol=limit, atol=limit, what=f"AdamW {mode} stage {stage} clip {clip}")
        for kind in (DeepSpeedCPUAdam, FusedAdam):

            def make(params, kind=kind):
                return kind(params, **settings)

            got = run_engine("tied", rank, config, optimizer=make, windows=3)
            assert_close(got, expected, rtol=limit, atol=limit, what=f"{kind} {mode} stage {stage} clip {clip}")


@pytest.mark.parametrize("world", [1, 2])
def test_our_adam_trains_as_torchs(world: int) -> None:
    run_ranks(_own_optimizers, world)


class _Groups:
    """Ranks 0 and 2 share gradients, rank 1 trains alone."""

    def __init__(self, rank: int) -> None:
        pair, alone = torch.distributed.new_group([0, 2]), torch.distributed.new_group([1])
        self.group = alone if rank == 1 else pair

    def get_data_parallel_group(self):
        return self.group


def _data_parallel_groups(rank: int, world: int) -> None:
    mpu = _Groups(rank)
    peers = [1] if rank == 1 else [0, 2]
    for stage, keys in itertools.product((0, 1, 2), ({}, {"allgather_partitions": False, "overlap_comm": True})):
        model = make_model("tied", seed=10 + rank)
        zero = {"stage": stage, "reduce_bucket_size": 200, **keys}
        engine = make_engine(model, {"zero_optimization": zero}, mpu=mpu)
        assert engine.dp_world_size == len(peers) and engine.train_batch_size() == BATCH * len(peers)
        reference = make_model("tied", seed=10 + peers[0])
        optimizer = torch.optim.SGD(trained(reference).values(), lr=0.1)
        for step in range(2):
            (x, y), *_ = batches(rank, 1, BATCH, seed=step)
            engine.backward(engine(x, y))
            for peer in peers:
                (x, y), *_ = batches(peer, 1, BATCH, seed=step)
                (reference(x, y) / len(peers)).backward()
            assert torch.allclose(safe_get_full_grad(model.head.weight), reference.head.weight.grad, atol=1e-6)
            engine.step()
            optimizer.step()
            optimizer.zero_grad()
        for name, value in trained(reference).items():
            torch.testing.assert_close(trained(model)[name], value, rtol=1e-6, atol=1e-6, msg=name)
            got = safe_get_full_fp32_param(trained(model)[name])
            torch.testing.assert_close(got, value.detach(), rtol=1e-6, atol=1e-6, msg=name)
        engine.destroy()


def test_gradients_stay_in_their_data_parallel_group() -> None:
    run_ranks(_data_parallel_groups, 3)


class _Odd(nn.Module):
    """A sparse embedding, a channels-last convolution, a 16-bit layer in an fp32 model, and an fp64 one."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4, sparse=True)
        self.conv = nn.Conv2d(1, 2, 2).to(memory_format=torch.channels_last)
        self.low = nn.Linear(4, 4).to(torch.bfloat16)
        self.fine = nn.Linear(4, 2).double()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.words(ids)
        h = h + self.conv(h[:, None, :, :]).mean((1, 2, 3))[:, None, None]
        h = h + self.low(h.bfloat16()).float()
        return self.fine(h.double()).square().mean()


def _odd_parameters(rank: int, world: int) -> None:
    def data(rank: int, step: int) -> torch.Tensor:
        return torch.randint(0, 9, (3, 5), generator=torch.Generator().manual_seed(rank + 10 * step))

    for stage, accumulation in itertools.product((0, 1, 2), (1, 2)):
        torch.manual_seed(0)
        model = _Odd()
        torch.manual_seed(0)
        reference = _Odd()
        reference.words.sparse = False
        reference.low.float()
        optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
        config = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": accumulation}
        engine = make_engine(model, config, torch.optim.SGD(model.parameters(), lr=0.1))
        assert [p.dtype for p in (model.low.weight, model.fine.weight)] == [torch.bfloat16, torch.float64]
        for step in range(2 * accumulation):
            engine.backward(engine(data(rank, step)))
            engine.step()
            for peer in range(world):
                h = reference.words(data(peer, step))
                h = h + reference.conv(h[:, None, :, :]).mean((1, 2, 3))[:, None, None]
                h = h + reference.low(h)
                (reference.fine(h.double()).square().mean() / world / accumulation).backward()
            if (step + 1) % accumulation == 0:
                optimizer.step()
                optimizer.zero_grad()
        for (name, got), want in zip(model.named_parameters(), reference.parameters(), strict=True):
            # bf16 activations in one layer: everything that meets them is good to 8 bits of the gradients' size.
            torch.testing.assert_close(got.double(), want.double(), rtol=2e-2, atol=4e-3, msg=lambda m, n=name: n + m)
        engine.destroy()


@pytest.mark.parametrize("world", [1, 2])
def test_parameters_of_odd_kinds(world: int) -> None:
    run_ranks(_odd_parameters, world)


def _left_behind(rank: int, world: int) -> None:
    """Gradients that only accumulated are not lost at a step: it reduces them first."""
    for stage, last_only in itertools.product((0, 1, 2), (True, False)):
        runs = []
        for quiet in (False, True):
            model = make_model("tied")
            engine = make_engine(model, {"zero_optimization": {"stage": stage, "reduce_bucket_size": 200}})
            engine.set_gradient_accumulation_boundary(True)
            one, two = batches(rank, 2, BATCH)
            if quiet and not last_only:
                with engine.no_sync():
                    engine.backward(engine(*one))
            else:
                engine.backward(engine(*one))
            if quiet:
                with engine.no_sync():
                    engine.backward(engine(*two))
            else:
                engine.backward(engine(*two))
            engine.step()
            assert engine.was_step_applied()
            runs.append({n: p.detach().clone() for n, p in trained(model).items()})
            engine.destroy()
        for name, value in runs[0].items():
            torch.testing.assert_close(runs[1][name], value, rtol=1e-6, atol=1e-6, msg=f"{name} {stage} {last_only}")


def test_a_step_takes_what_no_sync_left() -> None:
    run_ranks(_left_behind, 2)


def _optimizer_alone(rank: int, world: int) -> None:
    """Lightning's Fabric calls the wrapped optimizer's ``step``, not the engine's."""
    for stage, section in itertools.product((0, 1, 2), PRECISIONS.values()):
        runs = []
        for by_engine in (True, False):
            model = make_model("plain")
            engine = make_engine(model, {"zero_optimization": {"stage": stage}, **section})
            if stage == 0 and not section:
                assert isinstance(engine.optimizer, torch.optim.SGD)  # the user's own: nothing to share or to cast
            for x, y in batches(rank, 2, BATCH):
                engine.backward(engine(x, y))
                if by_engine:
                    engine.step()
                else:
                    engine.optimizer.step()
                    engine.optimizer.zero_grad()
                    engine.zero_grad()
            runs.append({n: p.detach().clone() for n, p in trained(model).items()})
            engine.destroy()
        for name, value in runs[0].items():
            assert torch.equal(runs[1][name], value), (stage, section, name)


def test_the_optimizers_own_step_is_complete() -> None:
    run_ranks(_optimizer_alone, 2)


def _trained_part(rank: int, world: int) -> None:
    """Only what ``model_parameters`` gives is trained; generators are consumed once."""
    for stage in (0, 1, 2):
        model = make_model("plain")
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        config = {
            "train_micro_batch_size_per_gpu": BATCH,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        }
        chosen = (p for n, p in model.named_parameters() if n.startswith("head"))
        engine = deepspeed.initialize(model=model, model_parameters=chosen, config=config)[0]
        (x, y), *_ = batches(rank, 1, BATCH)
        engine.backward(engine(x, y))
        engine.step()
        changed = {n for n, p in model.named_parameters() if not torch.equal(p.detach(), before[n])}
        assert changed == {"head.weight", "head.bias"}
        engine.destroy()


def test_a_part_of_a_model_can_be_trained() -> None:
    run_ranks(_trained_part, 2)


def _nothing_in_a_bucket(rank: int, world: int) -> None:
    """A parameter without elements that is alone in its bucket, or in its group."""

    class Holes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(9, 9)
            self.hole = nn.Parameter(torch.zeros(0, 4))
            self.last = nn.Linear(9, 7)
            self.other = nn.Parameter(torch.zeros(3, 0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x)).square().mean() + self.hole.sum()

    for stage, section in itertools.product((0, 1, 2), PRECISIONS.values()):
        model = Holes()
        groups = [{"params": [p for p in model.parameters() if p is not model.other]}, {"params": [model.other]}]
        zero = {"stage": stage, "reduce_bucket_size": 32, "overlap_comm": True}
        engine = make_engine(model, {"zero_optimization": zero, **section}, torch.optim.Adam(groups, lr=0.1))
        assert len(engine._flat.buckets) == 6
        before = model.first.weight.detach().clone()
        for _ in range(2):
            engine.backward(engine(torch.ones(2, 9, dtype=model.first.weight.dtype)).float())
            assert safe_get_full_grad(model.hole).shape == (0, 4) and safe_get_full_grad(model.other).shape == (3, 0)
            engine.step()
        assert engine.was_step_applied() and not torch.equal(model.first.weight, before)
        engine.destroy()


@pytest.mark.parametrize("world", [1, 3])
def test_empty_parameters_need_no_company(world: int) -> None:
    run_ranks(_nothing_in_a_bucket, world)
