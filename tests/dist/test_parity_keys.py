"""Every key that changes how gradients travel leaves their values alone, or changes them as documented."""

from __future__ import annotations

import copy

import pytest
import torch

from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from tests.helpers.dist import run_ranks
from tests.helpers.models import batches
from tests.helpers.training import (
    BATCH,
    assert_close,
    make_engine,
    make_model,
    run_ddp,
    run_emulated,
    run_engine,
    trained,
    use_extra,
)

ZERO_KEYS = {
    "all-reduce": {"reduce_scatter": False},
    "all-reduce, overlapping": {"reduce_scatter": False, "overlap_comm": True, "reduce_bucket_size": 64},
    "gradients copied late": {"contiguous_gradients": False},
    "copied late, overlapping": {"contiguous_gradients": False, "overlap_comm": True, "reduce_bucket_size": 64},
    "broadcast": {"allgather_partitions": False},
    "gather in pieces": {"allgather_bucket_size": 10},
    "round robin": {"round_robin_gradients": True},
    "all at once": {
        "reduce_scatter": False,
        "contiguous_gradients": False,
        "allgather_partitions": False,
        "round_robin_gradients": True,
        "reduce_bucket_size": 200,
    },
}
TOP_KEYS = {
    "prescale": {"prescale_gradients": True},
    "predivide": {"gradient_predivide_factor": 4.0},
    "predivide by an odd number": {"prescale_gradients": True, "gradient_predivide_factor": 3.0},
    "prescale, buckets": {"prescale_gradients": True, "zero_optimization": {"overlap_comm": True}},
    "fp32 on the wire": {"communication_data_type": "fp32"},
    "fp32 sums": {"data_types": {"grad_accum_dtype": "fp32"}},
}


def _keys_in_fp32(rank: int, world: int) -> None:
    for accumulation in (1, 3) if world == 2 else (3,):
        expected = run_ddp("tied", rank, accumulation=accumulation, clip=0.5, optimizer="adam")
        base = {"gradient_accumulation_steps": accumulation, "gradient_clipping": 0.5}
        for stage in (0, 1, 2):
            for what, keys in ZERO_KEYS.items():
                config = {**base, "zero_optimization": {"stage": stage, **keys}}
                got = run_engine("tied", rank, config, optimizer="adam")
                assert_close(got, expected, rtol=1e-6, atol=1e-6, what=f"{what} stage {stage} x{accumulation}")
            for what, keys in TOP_KEYS.items():
                zero = {"stage": stage, **keys.get("zero_optimization", {})}
                got = run_engine("tied", rank, {**base, **keys, "zero_optimization": zero}, optimizer="adam")
                assert_close(got, expected, rtol=1e-6, atol=1e-6, what=f"{what} stage {stage} x{accumulation}")


@pytest.mark.parametrize("world", [2, 3])
def test_keys_leave_fp32_training_as_it_is(world: int) -> None:
    run_ranks(_keys_in_fp32, world)


def _dtype_keys(rank: int, world: int) -> None:
    for stage in (0, 1, 2):
        for accumulation in (1, 3):
            zero = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": accumulation}
            fp32 = run_ddp("reused", rank, accumulation=accumulation, clip=0.0, optimizer="momentum")
            # fp32 weights, 16 bits on the wire or in the sums: a gradient keeps 8 (bf16) or 11 (fp16) bits.
            for keys, tolerance in (
                ({"communication_data_type": "bf16"}, 2.0**-7),
                ({"communication_data_type": "fp16"}, 2.0**-10),
                ({"data_types": {"grad_accum_dtype": "bf16"}}, 2.0**-6),
                ({"data_types": {"grad_accum_dtype": "fp16"}}, 2.0**-9),
            ):
                got = run_engine("reused", rank, {**zero, **keys}, optimizer="momentum")
                assert_close(got, fp32, rtol=tolerance, atol=tolerance, what=f"{keys} stage {stage} x{accumulation}")
                exact = all(torch.equal(got.grads[name], value) for name, value in fp32.grads.items())
                assert not exact, f"{keys} had no effect at stage {stage}"
            # bf16 weights with fp32 on the wire: as stage 2 without accumulation, which rounds nothing on the way.
            keys = {"bf16": {"enabled": True}, "communication_data_type": "fp32"}
            expected = run_emulated(
                "reused", rank, torch.bfloat16, accumulation=accumulation, clip=0.0, optimizer="momentum", stage=2
            )
            got = run_engine("reused", rank, {**zero, **keys}, optimizer="momentum")
            assert_close(got, expected, rtol=2.0**-8, atol=2.0**-8, what=f"{keys} stage {stage} x{accumulation}")


def test_dtype_keys_round_where_they_say() -> None:
    run_ranks(_dtype_keys, 2)


def _unused_is_an_error(rank: int, world: int) -> None:
    (x, y), *_ = batches(rank, 1, BATCH)
    for stage in (0, 1, 2):
        zero = {"stage": stage, "ignore_unused_parameters": False}
        # Used by rank 0 only: every rank learns which one.
        model = make_model("unused_somewhere")
        engine = make_engine(model, {"zero_optimization": zero})
        engine.backward(engine(x, y, rank == 0))
        with pytest.raises(RuntimeError, match=r"ignore_unused_parameters.*extra\.weight, extra\.bias\."):
            engine.step()
        # A window in which all take part still works after the error.
        engine.micro_steps = 0
        engine.backward(engine(x, y, True))
        engine.step()
        assert engine.was_step_applied()
        engine.destroy()
        # One use in the window is enough, at stage 2 as well.
        engine = make_engine(
            make_model("unused_somewhere"), {"zero_optimization": zero, "gradient_accumulation_steps": 3}
        )
        for index in range(3):
            engine.backward(engine(x, y, index == 1))
            engine.step()
        assert engine.was_step_applied()
        engine.destroy()


def test_unused_parameters_are_an_error_if_asked() -> None:
    run_ranks(_unused_is_an_error, 2)


def _groups(rank: int, world: int) -> None:
    for stage in (0, 1, 2):
        for precision in ({}, {"bf16": {"enabled": True}}):
            model = make_model("frozen")
            decayed = [p for p in model.parameters() if p.ndim >= 2]
            others = [p for p in model.parameters() if p.ndim < 2]
            groups = [{"params": decayed, "weight_decay": 0.1, "lr": 0.05}, {"params": others, "lr": 0.2, "mine": "x"}]
            optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
            reference = copy.deepcopy(model)
            names = {id(p): n for n, p in model.named_parameters()}
            theirs = dict(reference.named_parameters())
            ref_groups = [{**g, "params": [theirs[names[id(p)]] for p in g["params"]]} for g in groups]
            ref_optimizer = torch.optim.SGD(ref_groups, lr=0.1, momentum=0.9)
            given = optimizer.param_groups[0], optimizer.param_groups[1]

            engine = make_engine(model, {"zero_optimization": {"stage": stage}, **precision}, optimizer)
            assert engine.optimizer.param_groups[0] is given[0] is groups[0]
            assert engine.optimizer.param_groups[1] is given[1] and given[1]["mine"] == "x"
            assert engine.get_lr() == [0.05, 0.2]
            for step, (x, y) in enumerate(batches(0, 3, BATCH)):  # the same data everywhere: no reference reduction
                if step == 2:
                    groups[1]["lr"] = ref_optimizer.param_groups[1]["lr"] = 0.0
                engine.backward(engine(x, y))
                engine.step()
                reference(x, y).backward()
                ref_optimizer.step()
                ref_optimizer.zero_grad()
            limit = 2e-6 if not precision else 2.0**-6
            for name, param in trained(model).items():
                torch.testing.assert_close(param.float(), theirs[name].detach(), rtol=limit, atol=limit, msg=name)
            engine.destroy()
            assert [id(p) for p in groups[0]["params"]] == [id(p) for p in decayed]


def test_parameter_groups_stay_live() -> None:
    run_ranks(_groups, 2)


PROTOCOLS = ("boundary by hand", "no_sync", "scaled by the caller", "direct, by hand", "direct, no_sync")


def _accumulate(rank: int, world: int, protocol: str) -> None:
    """Two windows of 3 and a last one of 2 micro-batches; scaled by 1/3 throughout, as the clients do."""
    data = list(enumerate(batches(rank, 8, BATCH)))
    windows = [data[:3], data[3:6], data[6:]]
    for kind in ("tied", "unused_somewhere"):
        reference = None
        for stage in (0, 1, 2):
            for overlap in (False, True):
                model = make_model(kind)
                zero = {"stage": stage, "overlap_comm": overlap, "reduce_bucket_size": 200}
                engine = make_engine(model, {"zero_optimization": zero, "gradient_accumulation_steps": 3})
                if protocol == "direct, no_sync":
                    engine.set_gradient_accumulation_boundary(is_boundary=True)
                for window in windows:
                    for place, (index, (x, y)) in enumerate(window):
                        _micro_batch(engine, protocol, x, y, use_extra(kind, rank, index), place + 1 == len(window))
                weights = {n: p.detach().clone() for n, p in trained(model).items()}
                assert engine.global_steps == 3
                engine.destroy()
                reference = reference or _plain_windows(kind, rank, world, windows)
                for name, value in reference.items():
                    torch.testing.assert_close(
                        weights[name], value, rtol=2e-6, atol=2e-6, msg=lambda m, n=name, s=stage: f"{s} {n} {m}"
                    )


def _micro_batch(engine, protocol: str, x, y, extra: bool, last: bool) -> None:
    if protocol in ("boundary by hand", "direct, by hand"):
        engine.set_gradient_accumulation_boundary(is_boundary=last)
        assert engine.is_gradient_accumulation_boundary() == last
    if "no_sync" in protocol and not last:
        with engine.no_sync():
            loss = engine(x, y, extra)
            engine.scale(loss).backward() if "direct" in protocol else engine.backward(loss)
        return
    if protocol == "no_sync":
        engine.set_gradient_accumulation_boundary(is_boundary=True)
    loss = engine(x, y, extra)
    if protocol == "scaled by the caller":
        engine.set_gradient_accumulation_boundary(is_boundary=last)
        engine.backward(loss / 3, scale_wrt_gas=False)
    elif protocol.startswith("direct"):
        engine.scale(loss).backward()
    else:
        engine.backward(loss)
    if last:
        safe_get_full_grad(engine.head.weight)  # is reduced by now, also after a plain backward
        engine.step()


def _plain_windows(kind: str, rank: int, world: int, windows) -> dict[str, torch.Tensor]:
    model = make_model(kind)
    params = trained(model)
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    for window in windows:
        for index, (x, y) in window:
            (model(x, y, use_extra(kind, rank, index)) / 3).backward()
        for param in params.values():
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad
            torch.distributed.all_reduce(param.grad)
            param.grad /= world
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach() for n, p in params.items()}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_windows_by_hand(protocol: str) -> None:
    run_ranks(_accumulate, 2, protocol)


def _direct(rank: int, world: int) -> None:
    """``engine.scale(loss).backward()`` and ``step`` every time, against ``engine.backward``."""
    for precision in ({}, {"fp16": {"enabled": True, "loss_scale": 64}}):
        for stage in (0, 1, 2):
            results = []
            for direct in (False, True):
                model = make_model("tied")
                zero = {"stage": stage, "overlap_comm": True, "reduce_bucket_size": 200}
                config = {"zero_optimization": zero, "gradient_accumulation_steps": 3, **precision}
                engine = make_engine(model, config)
                for x, y in batches(rank, 6, BATCH):
                    loss = engine(x, y)
                    if direct:
                        engine.scale(loss).backward()
                    else:
                        engine.backward(loss)
                    engine.step()
                assert engine.global_steps == 2 and engine.was_step_applied()
                results.append({n: p.detach().clone() for n, p in trained(model).items()})
                engine.destroy()
            for name in results[0]:
                assert torch.equal(results[0][name], results[1][name]), (name, stage, precision)


def test_a_plain_backward_is_the_engines() -> None:
    run_ranks(_direct, 2)


def _several_backwards(rank: int, world: int) -> None:
    for stage in (0, 1, 2):
        for accumulation in (1, 2):
            for keys in ({}, {"overlap_comm": True, "reduce_bucket_size": 64}, {"contiguous_gradients": False}):
                runs = []
                for together in (True, False):
                    model = make_model("unused_somewhere")
                    config = {
                        "zero_optimization": {"stage": stage, **keys},
                        "gradient_accumulation_steps": accumulation,
                    }
                    engine = make_engine(model, config)
                    for index in range(2 * accumulation):
                        (x, y), (u, v) = batches(rank, 2, BATCH, seed=index)
                        one, two = engine(x, y, index % 2 == 0), engine(u, v, index % 2 == 1)
                        if together:
                            engine.backward(one + two)
                        else:
                            engine.backward(one)
                            engine.backward(two, retain_graph=index == 0)
                        engine.step()
                    runs.append({n: p.detach().clone() for n, p in trained(model).items()})
                    engine.destroy()
                for name, value in runs[0].items():
                    torch.testing.assert_close(runs[1][name], value, rtol=2e-6, atol=2e-6)


def test_several_backwards_in_a_micro_batch() -> None:
    run_ranks(_several_backwards, 2)


def _create_graph(rank: int, world: int) -> None:
    for stage in (0, 1, 2):
        runs = []
        for create_graph in (False, True):
            model = make_model("tied")
            engine = make_engine(model, {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": 3})
            for x, y in batches(rank, 6, BATCH):
                engine.backward(engine(x, y), create_graph=create_graph)
                engine.step()
            runs.append({n: p.detach().clone() for n, p in trained(model).items()})
            for bucket in engine._flat.buckets:
                assert not bucket.grad_shard.requires_grad and not bucket.weights.requires_grad
            engine.destroy()
        for name, value in runs[0].items():
            torch.testing.assert_close(runs[1][name], value, rtol=1e-6, atol=1e-6, msg=f"{name} stage {stage}")


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_create_graph_does_not_count_gradients_twice() -> None:
    run_ranks(_create_graph, 2)


def _masters_from(rank: int, world: int, folder: str) -> None:
    for stage in (1, 2):
        zero = {"stage": stage}
        model = make_model("plain")
        engine = make_engine(model, {"zero_optimization": zero, "bf16": {"enabled": True}}, "adam")
        for x, y in batches(rank, 2, BATCH):
            engine.backward(engine(x, y))
            engine.step()
        engine.save_checkpoint(f"{folder}/{stage}")
        saved = {n: safe_get_full_fp32_param(p) for n, p in trained(model).items()}
        engine.destroy()
        for from_fp32 in (True, False):
            model = make_model("plain", seed=8)
            config = {"zero_optimization": {**zero, "load_from_fp32_weights": from_fp32}, "bf16": {"enabled": True}}
            engine = make_engine(model, config, "adam")
            engine.load_checkpoint(f"{folder}/{stage}")
            for name, value in saved.items():
                expected = value if from_fp32 else value.bfloat16().float()
                assert torch.equal(safe_get_full_fp32_param(trained(model)[name]), expected), (name, from_fp32)
            engine.destroy()
        assert not torch.equal(saved["head.weight"], saved["head.weight"].bfloat16().float())


def test_load_from_fp32_weights_chooses_the_source_of_the_masters(tmp_path) -> None:
    run_ranks(_masters_from, 2, str(tmp_path))
