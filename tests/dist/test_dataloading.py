"""Loaders of ``initialize`` and ``deepspeed_io``, batch sizes, getters and the engine as a module."""

from __future__ import annotations

import contextlib
import io

import itertools

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, SequentialSampler

import deepspeed
from deepspeed.runtime.dataloader import RepeatingLoader
from tests.helpers.dist import run_ranks
from tests.helpers.models import batches
from tests.helpers.training import BATCH, make_engine, make_model


class Numbers(Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(5))


def _initialize(data, collate_fn=None, **config):
    model = torch.nn.Linear(1, 1)
    full = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}, **config}
    return deepspeed.initialize(model=model, config=full, training_data=data, collate_fn=collate_fn)


def _ids(loader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def _shares(rank: int, world: int) -> dict:
    engine, _, loader, _ = _initialize(Numbers(10))
    assert engine.training_dataloader is loader and len(loader) == 3 if world == 2 else True
    first, second = _ids(loader), _ids(loader)
    _, _, dropping, _ = _initialize(Numbers(11), dataloader_drop_last=True)
    collated = _initialize(Numbers(4), collate_fn=lambda items: {"ids": torch.stack(items)})[2]
    assert sorted(next(iter(collated))) == ["ids"]
    in_order = engine.deepspeed_io(Numbers(6), batch_size=3, route="eval")
    own = engine.deepspeed_io(Numbers(4), data_sampler=SequentialSampler(Numbers(4)))
    stream = _initialize(Stream())[2]
    assert _ids(stream) == [[0, 1], [2, 3], [4]]
    with_collate = engine.deepspeed_io(Numbers(4), collate_fn=lambda items: len(items))
    assert list(with_collate) == [2]
    return {
        "first": first,
        "second": second,
        "dropping": _ids(dropping),
        "eval": _ids(in_order),
        "own": _ids(own),
    }


def test_ranks_share_the_data() -> None:
    results = run_ranks(_shares, 2)
    for epoch in ("first", "second"):
        seen = [[i for batch in r[epoch] for i in batch] for r in results]
        assert [len(s) for s in seen] == [5, 5] and sorted(seen[0] + seen[1]) == list(range(10))
        assert [len(batch) for batch in results[0][epoch]] == [2, 2, 1]
    assert results[0]["first"] != results[0]["second"], "every pass is shuffled anew"
    for result in results:
        assert [len(batch) for batch in result["dropping"]] == [2, 2]
        assert result["own"] == [[0, 1], [2, 3]]
    assert [r["eval"] for r in results] == [[[0, 2, 4]], [[1, 3, 5]]]


def _repeats(rank: int, world: int) -> None:
    _, _, loader, _ = _initialize(Numbers(8))
    endless = RepeatingLoader(loader)
    assert len(endless) == len(loader) and iter(endless) is endless
    passes = [[int(i) for batch in itertools.islice(endless, len(loader)) for i in batch] for _ in range(4)]
    assert all(len(p) == 4 and len(set(p)) == 4 for p in passes)
    assert len({tuple(p) for p in passes}) > 1, "every pass is shuffled anew"
    assert list(itertools.islice(RepeatingLoader([1, 2, 3]), 7)) == [1, 2, 3, 1, 2, 3, 1]
    with pytest.raises(ValueError, match="empty"):
        next(RepeatingLoader([]))


def test_a_repeating_loader_never_ends() -> None:
    run_ranks(_repeats, 2)


def _epochs_can_be_chosen(rank: int, world: int) -> None:
    _, _, loader, _ = _initialize(Numbers(32))
    first = _ids(loader)
    second = _ids(loader)
    loader.set_epoch(0)
    assert _ids(loader) == first != second
    assert _ids(loader) == second


def test_an_epoch_can_be_repeated() -> None:
    run_ranks(_epochs_can_be_chosen, 2)


def _batch_sizes(rank: int, world: int) -> None:
    model = make_model("plain")
    engine = make_engine(model, {"gradient_accumulation_steps": 3})
    assert engine.get_batch_info() == (BATCH * 3 * world, BATCH, 3)
    engine.set_train_batch_size(BATCH * world)
    assert engine.gradient_accumulation_steps() == 1 and engine.train_batch_size() == BATCH * world
    for x, y in batches(rank, 2, BATCH):
        engine.backward(engine(x, y))
        engine.step()
    assert engine.global_steps == 2 and engine.global_samples == 2 * BATCH * world
    engine.set_train_batch_size(2 * BATCH * world)
    for x, y in batches(rank, 2, BATCH):
        assert engine.global_steps == 2
        engine.backward(engine(x, y))
        engine.step()
    assert engine.global_steps == 3
    for wrong in (0, -1, BATCH * world + 1):
        with pytest.raises(ValueError, match=r"not a positive multiple of micro batch x data-parallel ranks"):
            engine.set_train_batch_size(wrong)
    engine.set_train_micro_batch_size(7)
    assert engine.get_batch_info() == (7 * 2 * world, 7, 2)
    with pytest.raises(ValueError, match="positive"):
        engine.set_train_micro_batch_size(0)
    engine.destroy()


def test_batch_sizes_can_change() -> None:
    run_ranks(_batch_sizes, 2)


def _getters(rank: int, world: int) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "steps_per_print": 7,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.25, "betas": [0.8, 0.9]}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}},
        "fp16": {"enabled": True, "loss_scale": 16},
    }
    engine, optimizer, _, scheduler = deepspeed.initialize(model=make_model("plain"), config=config)
    assert engine.config is config
    assert (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()) == (4 * world, 2)
    assert engine.gradient_clipping() == 0.5 and engine.steps_per_print() == 7
    assert engine.zero_optimization() and engine.zero_optimization_stage() == 2
    assert engine.zero_reduce_bucket_size() == 1000 and engine.zero_overlap_comm()
    assert engine.zero_optimization_partition_gradients() and not engine.zero_optimization_partition_weights()
    assert engine.optimizer_name().lower() == "adamw" and engine.scheduler_name() == "WarmupLR"
    assert engine.fp16_enabled() and not engine.bfloat16_enabled() and not engine.dynamic_loss_scale()
    assert engine.loss_scale == 16 and engine.optimizer is optimizer and engine.lr_scheduler is scheduler
    assert engine.get_mom() == [[0.8, 0.9]] or engine.get_mom() == [(0.8, 0.9)]
    assert engine.dp_world_size == engine.world_size == world and engine.global_rank == engine.local_rank == rank
    assert engine.device == torch.device("cpu") and engine.get_global_grad_norm() is None
    engine.destroy()


def test_getters() -> None:
    run_ranks(_getters, 2)


def _delegates(rank: int, world: int) -> None:
    class Named(torch.nn.Linear):
        title = "mine"

        def greet(self) -> str:
            return f"hello from {type(self).__name__}"

    model = Named(2, 2)
    engine = make_engine(model, {}, torch.optim.SGD(model.parameters(), lr=0.1))
    assert engine.title == "mine" and engine.greet() == "hello from Named" and engine.in_features == 2
    assert not hasattr(engine, "nothing") and engine.module is model
    with pytest.raises(AttributeError, match="'Named' object has no attribute 'nothing'"):
        _ = engine.nothing
    assert not engine.eval().training and not model.training and engine.train().training and model.training
    assert [id(p) for p in engine.parameters()] == [id(p) for p in model.parameters()]
    assert next(iter(engine.modules())) is engine and sorted(engine.state_dict()) == ["module.bias", "module.weight"]
    assert sorted(engine.module_state_dict()) == ["bias", "weight"]
    model.weight.requires_grad_(False)
    assert sorted(engine.module_state_dict(exclude_frozen_parameters=True)) == ["bias"]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        engine.print_config()
    assert ("zero_optimization.stage" in said.getvalue()) == (rank == 0) and not engine.zero_optimization_partition_weights()
    new = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
    engine.load_module_state_dict(new)
    assert torch.equal(model.weight, new["weight"])
    assert engine == engine and engine in [engine] and engine.optimizer in [engine.optimizer]
    engine._is_accelerate_prepared = True
    engine.destroy()


def test_the_engine_stands_for_its_module() -> None:
    run_ranks(_delegates, 1)


def _loads_into_masters(rank: int, world: int) -> None:
    for stage in (0, 1, 2):
        model = torch.nn.Linear(3, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        engine = make_engine(model, {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}, optimizer)
        engine.load_module_state_dict({"weight": torch.full((1, 3), 4.0)})
        engine.backward(engine(torch.ones(1, 3, dtype=torch.bfloat16)).sum())
        engine.step()
        assert torch.equal(model.weight.float(), torch.full((1, 3), 3.5)), stage
        engine.destroy()


def test_loaded_weights_are_what_trains_on() -> None:
    run_ranks(_loads_into_masters, 2)


def _same_start(rank: int, world: int) -> list:
    """Every rank starts from rank 0's weights, frozen ones and buffers included, whatever their memory layout."""
    for section in ({}, {"bf16": {"enabled": True}}):
        for stage in (0, 2):
            torch.manual_seed(100 + rank)
            model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
            model[2].weight.requires_grad_(False)
            model[2].weight.data = torch.randn(4, 2).t()
            model.register_buffer("steps", torch.tensor([rank + 5]))
            model.register_buffer("turned", (torch.randn(2, 3) + rank).t())
            engine = make_engine(model, {"zero_optimization": {"stage": stage}, **section})
            mine = [t.detach().float() for t in model.state_dict().values()]
            engine.destroy()
            everyone = [None] * world
            torch.distributed.all_gather_object(everyone, mine)
            for other in everyone[1:]:
                assert all(torch.equal(a, b) for a, b in zip(everyone[0], other, strict=True)), (section, stage)
    return [5]


def test_ranks_start_from_the_weights_of_rank_0() -> None:
    assert run_ranks(_same_start, 2) == [[5], [5]]
