"""What a load matches, by name; what it refuses, and that a refusal changes nothing; what it reads and allocates."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepspeed._core.ckpt.blockreader import Ranges
from deepspeed._core.ckpt.manifest import MANIFEST
from deepspeed.errors import CheckpointError
from deepspeed.utils.logging import logger
from tests.helpers import preload  # noqa: F401 - before ranks are forked
from tests.helpers.ckpt import assert_same, build, by_name, config, snapshot, train, whole
from tests.helpers.dist import run_ranks
from tests.helpers.models import Tricky

STAGES = (0, 1, 2, 3)


def made(stage: int, dtype: str = "fp32", **extra: Any) -> dict[str, Any]:
    settings = config(stage, dtype, **extra)
    if stage == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 12
    return settings


def tricky(seed: int, **kinds: bool) -> Tricky:
    torch.manual_seed(seed)
    return Tricky(**kinds)


@contextlib.contextmanager
def warnings() -> Iterator[list[str]]:
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def said(messages: list[str], text: str) -> int:
    return sum(text in message for message in messages)


# -- parameter groups --------------------------------------------------------------------------------------------------


def split(model: nn.Module, *kinds: Callable[[str, nn.Parameter], bool], **options: list[Any]) -> list[dict[str, Any]]:
    """Groups of the trained parameters, by the first predicate that holds; ``options`` has one entry a group."""
    groups: list[dict[str, Any]] = [{"params": []} for _ in kinds]
    for name, param in model.named_parameters():
        if param.requires_grad:
            next(g for g, kind in zip(groups, kinds, strict=True) if kind(name, param))["params"].append(param)
    for key, values in options.items():
        for group, value in zip(groups, values, strict=True):
            group[key] = value
    return groups


def matrix(name: str, param: nn.Parameter) -> bool:
    return param.dim() > 1


def anything(name: str, param: nn.Parameter) -> bool:
    return True


def engine_with_groups(stage: int, seed: int, kinds: Any, dtype: str = "fp32", **options: list[Any]) -> Any:
    settings = made(stage, dtype)
    del settings["scheduler"], settings["optimizer"]
    model = tricky(seed, tied=True, frozen=True)
    optimizer = torch.optim.AdamW(split(model, *kinds, **options), lr=0.01, eps=1e-3)
    step = lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5)  # noqa: E731
    return build(settings, seed, model, optimizer=optimizer, lr_scheduler=step)


def regrouped(rank: int, world: int, folder: str) -> None:
    for stage in STAGES:
        options = {"lr": [0.02, 0.004], "weight_decay": [0.3, 0.0]}
        engine = engine_with_groups(stage, 0, (matrix, anything), **options)
        train(engine, rank, 3, seed=1)
        engine.save_checkpoint(folder, tag=f"{stage}")
        saved = by_name(engine)
        after = train(engine, rank, 3, seed=2)
        final = by_name(engine)
        for target in {stage, (stage + 1) % 4}:
            # The other way round: options, rates and schedules go with the parameters.
            other = engine_with_groups(target, 5, (lambda n, p: p.dim() <= 1, anything), lr=[0.7, 0.9])
            with warnings() as messages:
                other.load_checkpoint(folder, tag=f"{stage}")
            assert not said(messages, "loading ")
            assert_same(by_name(other), saved)
            assert [g["weight_decay"] for g in other.basic_optimizer.param_groups] == [0.0, 0.3]
            assert other.get_lr() == [0.002, 0.01] and other.lr_scheduler.base_lrs == [0.004, 0.02]
            torch.testing.assert_close(train(other, rank, 3, seed=2), after, rtol=1e-5, atol=0)
            torch.testing.assert_close(by_name(other), final, rtol=1e-4, atol=1e-5)

            # One group of two: the options are those of most of its parameters.
            one = engine_with_groups(target, 5, (anything,), lr=[0.7])
            with warnings() as messages:
                one.load_checkpoint(folder, tag=f"{stage}")
            assert said(messages, "group 0 are from groups [0, 1] of the checkpoint") == (rank == 0)
            assert_same(by_name(one), saved)
            (group,) = one.basic_optimizer.param_groups
            assert (group["lr"], group["weight_decay"]) == (0.002, 0.0), "most parameters are vectors"
            train(one, rank, 1, seed=2)

            # Three of two.
            three = engine_with_groups(target, 5, (lambda n, p: "head" in n, matrix, anything), lr=[0.7, 0.8, 0.9])
            three.load_checkpoint(folder, tag=f"{stage}")
            assert_same(by_name(three), saved)
            assert three.get_lr() == [0.01, 0.01, 0.002]
            assert three.lr_scheduler.base_lrs == [0.02, 0.02, 0.004]
            train(three, rank, 1, seed=2)


def test_groups_are_matched_by_the_names_of_their_parameters(tmp_path: Path) -> None:
    run_ranks(regrouped, 2, str(tmp_path))


# -- parameters --------------------------------------------------------------------------------------------------------


def frozen_then_trained(rank: int, world: int, folder: str) -> None:
    for stage, dtype in itertools.product(STAGES, ("fp32", "bf16")):
        tag = f"{stage}-{dtype}"
        engine = build(made(stage, dtype), 0, tricky(0, frozen=True))
        train(engine, rank, 2, seed=1)
        engine.save_checkpoint(folder, tag=tag)
        saved = by_name(engine)
        for target in (stage, 3 - stage):
            thawed = build(made(target, dtype), 5, tricky(5))
            with warnings() as messages:
                thawed.load_checkpoint(folder, tag=tag)
            assert said(messages, "start with a fresh one: 'mid.weight'") == (rank == 0), messages
            got = by_name(thawed, fresh=["mid.weight"])
            assert torch.equal(got["mid.weight"], saved["module.mid.weight"].float())
            assert not got["mid.weight.exp_avg"].any() and not got["mid.weight.exp_avg_sq"].any()
            assert_same({key: got[key] for key in saved}, saved, f"{tag} into {target}")
            train(thawed, rank, 1, seed=3)
            assert not torch.equal(by_name(thawed)["mid.weight"], got["mid.weight"])
            thawed.save_checkpoint(folder, tag="thawed")
            all_of_it = by_name(thawed)

            again = build(made(stage, dtype), 6, tricky(6, frozen=True))
            with warnings() as messages:
                again.load_checkpoint(folder, tag="thawed")
            assert said(messages, "not trained here, left aside: 'mid.weight'") == (rank == 0), messages
            got = by_name(again)
            assert_same(got, {key: all_of_it[key] for key in got})
            train(again, rank, 1, seed=3)


def test_frozen_parameters_that_are_trained_now_and_the_reverse(tmp_path: Path) -> None:
    run_ranks(frozen_then_trained, 2, str(tmp_path), timeout_s=180)


def new_and_gone(rank: int, world: int, folder: str) -> None:
    extra = ["extra.bias", "extra.weight"]
    for stage in STAGES:
        small, large = f"{stage}-small", f"{stage}-large"
        for tag, kinds in ((small, {}), (large, {"unused": True})):
            engine = build(made(stage, "bf16"), 0, tricky(0, **kinds))
            train(engine, rank, 2, seed=1)
            engine.save_checkpoint(folder, tag=tag)
        saved = by_name(engine)  # of the large one

        target = build(made(3 - stage, "bf16"), 5, tricky(5))
        before = snapshot(target)
        for options in ({}, {"load_optimizer_states": False}):
            with pytest.raises(
                CheckpointError, match=r"in the checkpoint only: 'extra.weight' \(11, 11\), 'extra.bias'"
            ):
                target.load_checkpoint(folder, tag=large, **options)
            assert_same(snapshot(target), before)
        with warnings() as messages:
            target.load_checkpoint(folder, tag=large, load_module_strict=False)
        assert said(messages, "in the checkpoint only, so left aside: 'extra.weight', 'extra.bias'") == (rank == 0)
        assert said(messages, "not trained here, left aside: 'extra.weight', 'extra.bias'") == (rank == 0)
        got = by_name(target)
        assert_same(got, {key: saved[key] for key in got})
        train(target, rank, 1, seed=3)

        grown = build(made(3 - stage, "bf16"), 6, tricky(6, unused=True))
        train(grown, rank, 1, seed=8)
        own, before = by_name(grown), snapshot(grown)
        with pytest.raises(CheckpointError, match=r"not in the checkpoint: 'extra.weight' \(11, 11\), 'extra.bias'"):
            grown.load_checkpoint(folder, tag=small)
        assert_same(snapshot(grown), before)
        grown.load_checkpoint(folder, tag=small, load_module_strict=False)
        got = by_name(grown, fresh=extra)
        for name in extra:
            assert torch.equal(got[name], own[name]), "the masters of new parameters keep their precision"
            assert not got[f"{name}.exp_avg"].any() and not got[f"{name}.exp_avg_sq"].any()
        assert not torch.equal(got["inp.weight"], own["inp.weight"])
        train(grown, rank, 1, seed=3)


def test_new_and_gone_parameters(tmp_path: Path) -> None:
    run_ranks(new_and_gone, 2, str(tmp_path), timeout_s=180)


class TiedEitherWay(nn.Module):
    """One weight under two names; which comes first is a matter of order."""

    def __init__(self, order: tuple[str, str]) -> None:
        super().__init__()
        weight = nn.Parameter(torch.randn(7, 13) * 0.1)
        for name in order:
            setattr(self, name, nn.Linear(13, 7, bias=False))
            getattr(self, name).weight = weight
        self.bias = nn.Parameter(torch.zeros(7))

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x = x.to(self.bias.dtype)
        logits = self.first(x) + self.second(x.abs()) + self.bias
        return nn.functional.cross_entropy(logits.float(), target)


def tied(rank: int, world: int, folder: str) -> None:
    for stage in STAGES:
        engine = build(made(stage, "bf16"), 0, TiedEitherWay(("first", "second")))
        train(engine, rank, 2, seed=1)
        engine.save_checkpoint(folder, tag=f"{stage}")
        saved = by_name(engine)
        for target in STAGES:
            other = build(made(target, "bf16"), 4, TiedEitherWay(("second", "first")))
            with warnings() as messages:
                other.load_checkpoint(folder, tag=f"{stage}")
            assert not said(messages, "loading ")
            got = {key.replace("second", "first"): value for key, value in by_name(other).items()}
            assert_same(got, {key: saved[key] for key in got})


def test_tied_parameters_by_any_of_their_names(tmp_path: Path) -> None:
    run_ranks(tied, 2, str(tmp_path))


def fresh_group(rank: int, world: int, folder: str) -> None:
    """New parameters in a group of their own have a step count of their own."""
    for stage in STAGES:
        engine = build(made(stage), 0, tricky(0), groups=False)
        train(engine, rank, 3, seed=1)
        engine.save_checkpoint(folder, tag=f"{stage}")
        model = tricky(4, unused=True)
        groups = split(model, lambda n, p: "extra" not in n, anything)
        other = build(made(stage), 4, model, model_parameters=groups)
        other.load_checkpoint(folder, tag=f"{stage}", load_module_strict=False)
        train(other, rank, 1, seed=2)
        first, second = (
            {float(other.basic_optimizer.state[p]["step"]) for p in group["params"] if p.numel()}
            for group in other.basic_optimizer.param_groups
        )
        assert (first, second) == ({4.0}, {1.0})


def test_new_parameters_in_a_group_of_their_own(tmp_path: Path) -> None:
    run_ranks(fresh_group, 2, str(tmp_path))


# -- parts and orders --------------------------------------------------------------------------------------------------


def parts(rank: int, world: int, folder: str) -> None:
    for stage in STAGES:
        engine = build(made(stage, "bf16"), 0, tricky(0, tied=True, frozen=True))
        train(engine, rank, 3, seed=1)
        engine.save_checkpoint(folder, tag=f"{stage}")
    weights = whole(engine.module)  # all stages are close, but each file has its own
    for stage, target in itertools.product(STAGES, STAGES):
        other = build(made(target, "bf16"), 7, tricky(7, tied=True, frozen=True))
        seen: list[dict[str, torch.Tensor]] = []

        def custom(src: dict[str, torch.Tensor], dst: nn.Module, seen: list = seen) -> None:
            seen.append(src)
            dst.load_state_dict(src)

        for options in (
            {"load_module_only": True},
            {"load_module_only": True, "custom_load_fn": custom},
            {"load_optimizer_states": False},
            {"load_lr_scheduler_states": False},
            {"load_optimizer_states": False, "custom_load_fn": custom},
        ):
            train(other, rank, 1, seed=3)
            before = snapshot(other)
            other.load_checkpoint(folder, tag=f"{stage}", **options)
            after = snapshot(other)
            kept = ["counters", "scheduler", "group.0", "state"] if "load_module_only" in options else []
            kept += ["state", "group.0"] if options.get("load_optimizer_states") is False else []
            kept += ["scheduler"] if "load_lr_scheduler_states" in options else []
            if "load_optimizer_states" in options:  # the schedule writes rates into the groups
                before["group.0"]["lr"] = after["group.0"]["lr"]
            for key in after:
                if key.startswith(tuple(kept)):
                    assert_same({key: after[key]}, {key: before[key]}, f"{stage} into {target}: {options}")
            if kept != ["scheduler"]:
                for key in (k for k in after if k.startswith("master.")):
                    assert torch.equal(after[key], after[f"module.{key[7:]}"].float()), "masters follow the weights"
            for name, value in weights.items():
                torch.testing.assert_close(after[f"module.{name}"], value, rtol=0.1, atol=0.05)
        assert len(seen) == 2 and seen[0].keys() == weights.keys()


def test_parts_at_other_stages(tmp_path: Path) -> None:
    run_ranks(parts, 2, str(tmp_path), timeout_s=180)


def any_order(rank: int, world: int, folder: str, stage: int) -> None:
    """Train, save and load in many orders, over the same tags, with two engines in the process."""
    chance = random.Random(stage)
    engines = [build(made(stage, dtype), seed, tricky(seed, tied=True)) for seed, dtype in ((0, "bf16"), (1, "bf16"))]
    files: dict[str, dict[str, Any]] = {}
    for turn in range(24):
        engine, tag = chance.choice(engines), chance.choice("abc")
        action = chance.choice(("train", "save", "load", "load", "parts"))
        if action == "train":
            train(engine, rank, 1, seed=turn)
        elif action == "save" or tag not in files:
            engine.save_checkpoint(folder, tag=tag)
            files[tag] = snapshot(engine)
        elif action == "load":
            engine.load_checkpoint(folder, tag=tag)
            assert_same(snapshot(engine), files[tag], f"turn {turn}")
        else:
            engine.load_checkpoint(folder, tag=tag, load_module_only=True)
            got = whole(engine.module)
            assert_same(got, {name: files[tag][f"module.{name}"] for name in got}, f"turn {turn}")


@pytest.mark.parametrize("stage", STAGES)
def test_saves_and_loads_in_any_order(tmp_path: Path, stage: int) -> None:
    run_ranks(any_order, 2, str(tmp_path), stage)


CLIENT = {
    "none": None,
    "numbers": [0, -1, 2**70, 1.5, float("inf"), 1 + 2j, True],
    "texts": ("a", "", "\u00e9\n", b"\x00\xff", bytearray(b"xy")),
    "sets": [{1, 2}, {"a"}, set()],
    "deep": {"a": [{"b": ({"c": [[], {}, ()]},)}], 3: "int key", (1, "x"): "tuple key", None: 0},
    "ordered": OrderedDict(b=1, a=OrderedDict(c=2)),
    "torch": [torch.Size([2, 3]), torch.bfloat16, torch.device("cpu")],
}


def client_state(rank: int, world: int, folder: str) -> None:
    tensors = {"t": [torch.arange(3), (torch.ones(2, dtype=torch.bfloat16), {"x": torch.tensor(2.5)})]}
    for stage in (0, 2, 3):
        engine = build(made(stage), 0, tricky(0))
        engine.save_checkpoint(folder, client_state={**CLIENT, "tensors": tensors})
        for _ in range(2):
            _, got = engine.load_checkpoint(folder)
            found = got.pop("tensors")
            assert got == CLIENT and type(got["ordered"]) is OrderedDict and type(got["texts"]) is tuple
            assert torch.equal(found["t"][0], torch.arange(3)) and found["t"][1][0].dtype == torch.bfloat16
            found["t"][0].zero_()  # the caller's own
        torch.distributed.barrier()


def test_client_state_of_any_plain_nesting(tmp_path: Path) -> None:
    run_ranks(client_state, 2, str(tmp_path))


# -- bad input ---------------------------------------------------------------------------------------------------------


class Many(nn.Module):
    """Another model, with more differences than a message shows."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(13, 7)
        self.more = nn.ParameterList(torch.randn(i + 1) for i in range(14))

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.inp(x) + sum(p.sum() for p in self.more), target)


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    path.unlink()
    torch.save(content, path)


def bad_input(rank: int, world: int, folder: str, stage: int) -> None:
    engine, untouched = (build(made(stage), 0, tricky(0, tied=True)) for _ in range(2))
    good = Path(folder, "good")
    for twin in (engine, untouched):
        train(twin, rank, 2, seed=1)
    engine.save_checkpoint(str(good), tag="t")
    engine.save_checkpoint(str(good), tag="u")
    train(untouched, rank, 0, seed=1)
    other_model = build(made(stage), 1, Many())
    other_model.save_checkpoint(f"{folder}/many", tag="t")
    lion = made(stage, optimizer={"type": "Lion", "params": {"lr": 0.001}})
    foreign = build(lion, 1, tricky(1, tied=True))
    train(foreign, rank, 2, seed=1)
    foreign.save_checkpoint(f"{folder}/lion", tag="t")
    later = build(made(stage), 1, tricky(1, tied=True))
    train(later, rank, 5, seed=1)
    later.save_checkpoint(f"{folder}/later", tag="t")
    model_file = f"{'zero_pp_rank_{}_' if stage == 3 else ''}mp_rank_00_model_states.pt"
    optim_file = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    # In the middle of a window, whose gradients must survive as well.
    micro = torch.randn(4, 13), torch.randint(0, 7, (4,))
    for twin in (engine, untouched):
        twin.backward(twin(*micro))
        twin.step()
    before = snapshot(engine)

    def expect(source: str, damage: Callable[[Path], Any], *messages: str, **options: Any) -> None:
        place = Path(folder, "bad")
        torch.distributed.barrier()
        if rank == 0:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(Path(folder, source), place)
            # With it, all damage is found before anything is opened: see test_checkpoint_damage.py.
            (place / "t" / MANIFEST).unlink(missing_ok=True)
            damage(place / "t")
        torch.distributed.barrier()
        with pytest.raises((CheckpointError, KeyError)) as caught:  # on all ranks
            engine.load_checkpoint(str(place), tag="t", **options)
        for message in messages:
            assert message in str(caught.value)
        assert_same(snapshot(engine), before, str(messages))

    as_it_is = lambda path: None  # noqa: E731
    expect(
        "many", as_it_is,
        "not in the checkpoint: 'empty' (0, 3), 'scalar' (), ", " more; in the checkpoint only: 'more.0' (1,), ",
        "'more.9' (10,) and 4 more; of another shape: 'inp.weight' (11, 13) in the model and (7, 13) in the checkpoint",
    )  # fmt: skip
    expect("many", as_it_is, "of another shape: 'inp.weight' (11, 13)", load_module_strict=False)
    expect("many", as_it_is, "holds the optimizer state of another model", custom_load_fn=lambda src, dst: None)
    expect("lion", as_it_is, "another kind of optimizer", "load_optimizer_states=False")
    expect("good", lambda p: (p / model_file.format(0)).unlink(), "expected mp_rank_00_model_states.pt")
    expect("good", lambda p: (p / model_file.format(0)).write_bytes(b"PK\x03\x04"), "truncated, damaged")
    newer = {"ds_format": 9, "ds_version": "9.1.0"}
    expect("good", lambda p: rewrite(p / model_file.format(0), lambda c: c.update(newer)), "Upgrade to deepspeed 9.1.0")
    expect(
        "good", lambda p: rewrite(p / model_file.format(0), lambda c: c["lr_scheduler"].clear()), "last_batch_iteration"
    )

    def failing(src: dict[str, torch.Tensor], dst: nn.Module) -> None:
        dst.load_state_dict({name: torch.zeros_like(value) for name, value in src.items()})
        if rank == 1:
            raise KeyError("mine")

    expect("good", as_it_is, "mine", custom_load_fn=failing)
    if stage:
        missing = "optimizer files of 2 ranks, but those of rank 1 are missing"
        expect("good", lambda p: (p / optim_file.format(1)).unlink(), missing)
        mixed = Path(folder, "later", "t", optim_file.format(1))
        expect(
            "good", lambda p: shutil.copy(mixed, p / mixed.name), f"{mixed.name} has a step count", "mixes two saves"
        )
    if stage == 3:
        missing = "model files of 2 ranks, but those of rank 1 are missing"
        expect("good", lambda p: (p / model_file.format(1)).unlink(), missing)
        mixed = Path(folder, "later", "t", model_file.format(1))
        expect("good", lambda p: shutil.copy(mixed, p / mixed.name), "has global_steps", "mixes two saves")
    for place, tag in ((good, "tu"[rank]), (f"{folder}/{['good', 'later'][rank]}", "t")):
        with pytest.raises(CheckpointError, match="ranks would load different checkpoints"):
            engine.load_checkpoint(str(place), tag=tag)
        assert_same(snapshot(engine), before)

    for twin in (engine, untouched):
        twin.backward(twin(*micro))
        twin.step()
    assert engine.global_steps == 3
    assert train(engine, rank, 1, seed=4) == train(untouched, rank, 1, seed=4)
    assert_same(snapshot(engine), snapshot(untouched), "goes on as the engine that never tried")


@pytest.mark.parametrize("stage", STAGES)
def test_bad_input_changes_nothing(tmp_path: Path, stage: int) -> None:
    run_ranks(bad_input, 2, str(tmp_path), stage)


# -- memory ------------------------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Bytes that were read from files, mapped or not, and the most that lay in new storages at once."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.peak = 0
        self._mapped: set[int] = set()
        self._new: dict[int, tuple[StorageWeakRef, int]] = {}
        self._real_run = Ranges.run

    def __enter__(self) -> Traffic:
        def run(ranges: Ranges, progress: Callable[[int], object]) -> None:
            self.read += ranges.nbytes
            self._real_run(ranges, progress)

        Ranges.run = run  # type: ignore[method-assign]
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        Ranges.run = self._real_run  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("copy_", "_to_copy", "clone", "cat", "add_", "mul_"):
            given = [t for t in tree_leaves(args[1:] if name == "copy_" else args) if isinstance(t, torch.Tensor)]
            self.read += sum(t.nbytes for t in given if self._address(t) in self._mapped)
        known = {self._address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in (t for t in tree_leaves(made) if isinstance(t, torch.Tensor) and t.device.type == "cpu"):
            storage = tensor.untyped_storage()
            if name == "set_":
                self._mapped.add(storage.data_ptr())
            elif storage.nbytes() and storage.data_ptr() not in known | self._mapped:
                self._new[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self._new = {at: (ref, size) for at, (ref, size) in self._new.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._new.values()))
        return made

    @staticmethod
    def _address(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage().data_ptr() if tensor.device.type == "cpu" else 0


class Wide(nn.Module):
    """Eight matrices of 64 KiB in fp32, one of 256 KiB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128, bias=False) for _ in range(8))
        self.last = nn.Linear(128, 512, bias=False)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        h = nn.functional.pad(x, (0, 115)).to(self.last.weight.dtype)
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return nn.functional.cross_entropy(self.last(h).float(), target)


NUMEL, LARGEST, SLACK = 8 * 128 * 128 + 128 * 512, 128 * 512, 24 * 1024


def wide(stage: int, seed: int, **extra: Any) -> Any:
    settings = made(stage, "bf16", **extra)
    settings["zero_optimization"]["reduce_bucket_size"] = 10**6  # one bucket
    torch.manual_seed(seed)
    return build(settings, seed, Wide(), groups=False)


def save_wide(rank: int, world: int, folder: str, stage: int) -> None:
    engine = wide(stage, 0)
    train(engine, rank, 1, seed=1)
    engine.save_checkpoint(folder, tag=f"{stage}-{world}")


def load_wide(rank: int, world: int, folder: str) -> None:
    for tag, target, trained in itertools.product(sorted(os.listdir(folder)), STAGES, (False, True)):
        if not Path(folder, tag).is_dir():
            continue
        source, what = int(tag[0]), f"{tag} into {target}"
        engine = wide(target, 5)
        if trained:
            train(engine, rank, 1, seed=2)
        own = NUMEL if target == 0 else NUMEL // world
        with Traffic() as traffic:
            engine.load_checkpoint(folder, tag=tag)
        # Two moments in fp32 are made anew (before, the old ones go); masters and weights have their places. A fresh engine
        # reads its masters beside those, so that damage changes nothing.
        made_anew = 8 if trained or target == 0 else 12
        assert traffic.peak <= made_anew * own + 4 * LARGEST + SLACK, f"{what}: {traffic.peak} bytes were allocated at once"
        # Master and moments, this rank's part of each.
        assert 12 * own <= traffic.read <= 12 * own + SLACK, f"{what}: {traffic.read} bytes were read"

        with Traffic() as traffic:
            engine.load_checkpoint(folder, tag=tag, load_optimizer_states=False)
        held = NUMEL if target < 3 else NUMEL // world
        assert traffic.peak <= 2 * own + 4 * LARGEST + SLACK, f"{what}, weights: {traffic.peak} bytes were allocated at once"
        size = 4 if source == 3 else 2  # stage 3 folders hold masters only
        assert size * held <= traffic.read <= size * held + SLACK, f"{what}, weights: {traffic.read} bytes were read"


def test_a_rank_reads_its_own_ranges_and_allocates_its_own_shards(tmp_path: Path) -> None:
    for stage, world in ((0, 1), (2, 1), (1, 3), (3, 1), (3, 3)):
        run_ranks(save_wide, world, str(tmp_path), stage)
    run_ranks(load_wide, 2, str(tmp_path), timeout_s=180)
