"""Quantised, hierarchical and grouped transports: values within their bounds, same bits everywhere, bytes on the wire."""

from __future__ import annotations

import pytest
import torch

from deepspeed import comm
from deepspeed._core.layout.groups import hpz_groups, mics_groups
from deepspeed._core.params.compress import (
    HierarchicalGather,
    PackedItem,
    QuantisedGather,
    QuantisedShard,
    SecondaryShards,
    make_hierarchical_gather,
)
from deepspeed._core.params.transport import GatherItem, make_param_transport
from deepspeed._core.quant.blocks import INT4, INT8
from deepspeed._core.quant.loco import ErrorFeedback
from deepspeed._core.reduce.compress import GroupedReduce, QuantisedReduce, make_quantised_reduce
from deepspeed._core.reduce.transport import make_transport
from deepspeed.comm.subgroups import make_groups, ranks_per_node
from tests.helpers.dist import run_ranks

CPU = torch.device("cpu")
# (ranks, ranks on a node): one node, several, and nodes that do not split the ranks.
PLACES = [(1, 1), (2, 2), (2, 1), (3, 3), (3, 2), (4, 4), (4, 2), (4, 1)]


def contribution(rank: int, numel: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """A rank's gradient: any rank can make any other's."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randn(numel, generator=generator).to(dtype)


def plain_sum(world: int, numel: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.stack([contribution(r, numel, dtype, seed).double() for r in range(world)]).sum(0)


def qgz_bound(world: int, node_size: int, largest: float) -> float:
    """As documented in deepspeed/_core/reduce/compress.py."""
    node_size = node_size if world % node_size == 0 else world
    nodes, c = world // node_size, INT4.relative_error
    return c * largest * ((node_size - 1) * nodes + (nodes - 1) * node_size * (1 + c)) + 1e-5


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Relative to the largest element. (``torch.testing`` takes 0.7 s to import, in every forked rank.)"""
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    return bool(((got.double() - expected.double()).abs() <= tolerance * largest).all())


def sent_nbytes(events: list) -> int:
    assert {event.op for event in events} <= {"isend", "irecv"}, events
    return sum(event.nbytes for event in events if event.op == "isend")


# -- qgZ -----------------------------------------------------------------------------------------------------------


def _quantised_reduce(rank: int, world: int, node_size: int) -> None:
    plain = make_transport(None, CPU)
    reduce = make_quantised_reduce(plain, CPU, node_size=node_size)
    for shard_numel, dtype in ((1, torch.float32), (33, torch.float32), (1000, torch.bfloat16), (0, torch.float32)):
        full = contribution(rank, world * shard_numel, dtype)
        before = full.clone()
        largest = max(
            (float(contribution(r, full.numel(), dtype).abs().max()) for r in range(world) if full.numel()), default=0.0
        )
        own = slice(rank * shard_numel, (rank + 1) * shard_numel)
        exact = plain_sum(world, full.numel(), dtype)[own]
        out = torch.full((shard_numel,), 3.0)
        reduce.reduce_scatter(full, out, scale=0.5, accumulate=False).wait()
        assert torch.equal(full, before), "the gradient must not be written to"
        limit = 0.5 * qgz_bound(world, node_size, largest)
        assert ((out.double() - 0.5 * exact).abs() <= limit).all()
        if world == 1:
            assert torch.equal(out, 0.5 * full.float())
        first = out.clone()
        reduce.reduce_scatter(full, out, scale=0.5, accumulate=True).wait()
        assert close(out, 2 * first, 1e-6)
        reduce.reduce_scatter(full, full[own], scale=1.0, accumulate=False).wait()  # in place
        assert close(full[own], 2 * first, 1e-2)


def test_quantised_sums_are_within_the_bound() -> None:
    for world, node_size in PLACES:
        run_ranks(_quantised_reduce, world, node_size)


def _in_flight(rank: int, world: int) -> None:
    reduce = make_quantised_reduce(make_transport(None, CPU), CPU, node_size=2)
    outs, pending = [], []
    for index in range(3):
        full = contribution(rank, world * 50, seed=index)
        outs.append(torch.zeros(50))
        pending.append(reduce.reduce_scatter(full, outs[-1], scale=1.0, accumulate=False, eager=True))
        if rank % 2 and index == 1:
            pending.pop(0).wait()  # ranks wait in the same order, not at the same moment
    for one in pending:
        one.wait()
    for index, out in enumerate(outs):
        exact = plain_sum(world, world * 50, seed=index)[rank * 50 : (rank + 1) * 50]
        assert ((out.double() - exact).abs() <= qgz_bound(world, 2, 5.0)).all()


def test_several_quantised_reductions_are_in_flight() -> None:
    run_ranks(_in_flight, 4)


def _reduce_bytes(rank: int, world: int, node_size: int) -> None:
    plain = make_transport(None, CPU)
    reduce = make_quantised_reduce(plain, CPU, node_size=node_size)
    full, out = torch.randn(world * 5001), torch.zeros(5001)
    with comm.observe() as events:
        plain.reduce_scatter(full, out, scale=1.0, accumulate=False).wait()
    expected = sent_nbytes(events)
    with comm.observe() as events:
        reduce.reduce_scatter(full, out, scale=1.0, accumulate=False).wait()
    assert expected == (world - 1) * 5001 * 4
    assert 0.125 * expected < sent_nbytes(events) <= 0.15 * expected
    if world == 4 and node_size == 2:
        inter = [event for event in events if event.op == "isend" and event.nbytes == INT4.packed_nbytes(5001)]
        assert len(inter) == 1, "one slice, a quarter of the gradient, leaves the node"


def test_quantised_gradients_take_at_most_0_15_of_fp32_bytes() -> None:
    for world, node_size in ((2, 2), (3, 2), (4, 4), (4, 2)):
        run_ranks(_reduce_bytes, world, node_size)


def _non_finite(rank: int, world: int, node_size: int) -> None:
    reduce = make_quantised_reduce(make_transport(None, CPU), CPU, node_size=node_size, feedback=ErrorFeedback())
    for source in range(world):
        for owner in range(world):
            full = contribution(rank, world * 100)
            if rank == source:
                full[owner * 100 + 40] = float("inf") if owner % 2 else float("nan")
            out = torch.zeros(100)
            reduce.reduce_scatter(full, out, scale=1.0, accumulate=False, key="w").wait()
            assert not out[40].isfinite() if rank == owner else out.isfinite().all()
            assert out[:32].isfinite().all() and out[64:].isfinite().all(), "other blocks are not touched"


def test_non_finite_gradients_stay_visible_to_their_owner() -> None:
    for world, node_size in ((1, 1), (3, 3), (4, 2)):
        run_ranks(_non_finite, world, node_size)


def _loco(rank: int, world: int, node_size: int) -> None:
    plain = make_transport(None, CPU)
    gradient = contribution(rank, world * 200)
    summed = plain_sum(world, world * 200)[rank * 200 : (rank + 1) * 200]
    errors = {}
    for name, feedback in (("without", None), ("with", ErrorFeedback(err_beta=0.8, reset_T=1024))):
        reduce = make_quantised_reduce(plain, CPU, node_size=node_size, feedback=feedback)
        for steps in (25, 100):
            total, exact = torch.zeros(200), torch.zeros(200, dtype=torch.float64)
            for step in range(steps):
                # A gradient that drifts slowly: rounding it is the same mistake again and again.
                drift = 1 + 0.001 * step
                full = gradient * drift
                reduce.reduce_scatter(full, total, scale=1.0, accumulate=True, key=("bucket", 0)).wait()
                exact += summed * drift
            errors[name, steps] = float((total.double() - exact).norm())
            if feedback is not None:
                assert feedback.nbytes > 0
                feedback.clear()
    assert errors["with", 100] < errors["without", 100] / 5, errors
    # The error of a sum of errors: it grows without feedback, and stays with it.
    assert errors["without", 100] > 2 * errors["without", 25]
    assert errors["with", 100] < 2 * errors["with", 25]


def test_error_feedback_bounds_the_accumulated_error() -> None:
    run_ranks(_loco, 2, 2)
    run_ranks(_loco, 4, 2)


def _no_key_no_feedback(rank: int, world: int) -> None:
    feedback = ErrorFeedback()
    reduce = make_quantised_reduce(make_transport(None, CPU), CPU, node_size=2, feedback=feedback)
    full, out = contribution(rank, world * 64), torch.zeros(64)
    reduce.reduce_scatter(full, out, scale=1.0, accumulate=False).wait()
    assert feedback.nbytes == 0
    first = out.clone()
    reduce.reduce_scatter(full, out, scale=1.0, accumulate=False).wait()
    assert torch.equal(out, first)
    # The rest goes through the plain transport, exactly.
    whole = contribution(rank, world * 64)
    reduce.all_reduce(whole, scale=1.0).wait()
    assert close(whole, plain_sum(world, world * 64), 1e-6)
    assert reduce.sum_scalars(torch.tensor([float(rank)])).item() == world * (world - 1) / 2
    gathered = torch.zeros(world)
    gathered[rank] = rank
    reduce.all_gather(gathered, limit_numel=world).wait()
    assert gathered.tolist() == list(range(world))
    assert reduce.global_rank(1) == 1 and reduce.rank == rank and reduce.world_size == world


def test_without_a_key_there_is_no_feedback_and_the_rest_is_plain() -> None:
    run_ranks(_no_key_no_feedback, 2)


def _wrong_groups(rank: int, world: int) -> None:
    plain = make_transport(None, CPU)
    layout = mics_groups(4, 2)
    blocks, lines = make_groups(layout.blocks), make_groups(layout.lines)
    with pytest.raises(ValueError, match=r"node by node.*make_quantised_reduce"):
        QuantisedReduce(plain, blocks, None)
    with pytest.raises(ValueError, match=r"node by node.*make_quantised_reduce"):
        QuantisedReduce(plain, lines, blocks)
    params = [make_param_transport(group, CPU) for group in (None, lines, blocks)]
    with pytest.raises(ValueError, match=r"node by node.*make_hierarchical_gather"):
        HierarchicalGather(params[0], params[2], params[1])


def _groups(rank: int, world: int) -> None:
    layout = mics_groups(4, 2)
    first = make_groups(layout.blocks)
    assert make_groups(layout.blocks) is first, "made once"
    assert comm.get_all_ranks_from_group(first) == list(layout.block_of(rank))
    assert make_groups([range(4)]) is comm.get_world_group()
    own = make_groups([[3, 1]])
    assert (own is not None) == (rank in (1, 3))
    with pytest.raises(ValueError, match=r"ranks \[1\] are given twice"):
        make_groups([[0, 1], [1, 2]])
    with pytest.raises(ValueError, match=r"ranks \[4\] are given twice or do not exist"):
        make_groups([[0, 4]])
    assert ranks_per_node(CPU) == 4  # as run_ranks says it
    import os

    os.environ["LOCAL_WORLD_SIZE"] = "2" if rank < 3 else "1"
    assert ranks_per_node(CPU) is None, "not the same on all ranks"
    reduce = make_quantised_reduce(make_transport(None, CPU), CPU)
    assert reduce._between is None and reduce._locals == 4
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    reduce = make_quantised_reduce(make_transport(None, CPU), CPU)
    assert reduce._between is not None and reduce._locals == 2


def test_groups() -> None:
    run_ranks(_groups, 4)
    run_ranks(_wrong_groups, 4)


# -- MiCS ----------------------------------------------------------------------------------------------------------


def _grouped(rank: int, world: int, shard_size: int) -> None:
    layout = mics_groups(world, shard_size)
    within = make_transport(make_groups(layout.blocks), CPU)
    across = make_transport(make_groups(layout.lines), CPU)
    grouped = GroupedReduce(within, across)
    assert (grouped.world_size, grouped.rank) == (shard_size, rank % shard_size)
    for numel in (1, 33, 1000):
        low = grouped.rank * numel
        # Integers, so that sums are exact in any order.
        ranks = [contribution(r, shard_size * numel).mul(16).round() for r in range(world)]
        exact = torch.stack(ranks).sum(0)
        full = ranks[rank].clone()
        out = torch.full((numel,), 5.0)
        grouped.reduce_scatter(full, out, scale=0.5, accumulate=True).wait()
        assert torch.equal(out, 5 + 0.5 * exact[low : low + numel])
        grouped.reduce_scatter(full, out, scale=0.25, accumulate=False, eager=True).wait()
        assert torch.equal(out, 0.25 * exact[low : low + numel])
        # The second level may come once, after several micro-batches.
        grouped.within.reduce_scatter(full, out, scale=1.0, accumulate=False).wait()
        grouped.within.reduce_scatter(full, out, scale=1.0, accumulate=True).wait()
        grouped.across_replicas(out).wait()
        assert torch.equal(out, 2 * exact[low : low + numel])
        whole = ranks[rank].clone()
        grouped.all_reduce(whole, scale=1.0).wait()
        assert torch.equal(whole, exact)
    # A norm counts one copy; a flag of any rank reaches all.
    values = torch.tensor([float(rank % shard_size), float(rank == world - 1)], dtype=torch.float64)
    total, flag = grouped.sum_scalars(values).tolist()
    assert total == sum(range(shard_size)) and flag > 0


def test_mics_reduction_is_the_plain_sum() -> None:
    for world, shard_size in ((1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (4, 4)):
        run_ranks(_grouped, world, shard_size)


def _grouped_and_quantised(rank: int, world: int) -> None:
    layout = mics_groups(world, 2)
    plain = make_transport(make_groups(layout.blocks), CPU)
    feedback = ErrorFeedback()
    within = make_quantised_reduce(plain, CPU, groups=layout.blocks, node_size=4, feedback=feedback)
    grouped = GroupedReduce(within, make_transport(make_groups(layout.lines), CPU))
    full, out = contribution(rank, 200), torch.zeros(100)
    grouped.reduce_scatter(full, out, scale=1.0, accumulate=False, key=0).wait()
    exact = plain_sum(world, 200)[grouped.rank * 100 :][:100]
    assert ((out.double() - exact).abs() <= 2 * qgz_bound(2, 2, 5.0)).all()
    assert feedback.nbytes == INT8.packed_nbytes(100)
    gathered: list = [None] * world
    comm.all_gather_object(gathered, out)
    assert torch.equal(out, gathered[(rank + 2) % 4]), "replicas hold the same bits"


def test_mics_with_quantised_gradients() -> None:
    run_ranks(_grouped_and_quantised, 4)


# -- gathers -------------------------------------------------------------------------------------------------------


def weights(numels: list[int], rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [contribution(rank, numel, dtype, seed=index) for index, numel in enumerate(numels)]


def items_for(shards: list[torch.Tensor], world: int) -> list[GatherItem]:
    return [GatherItem(s, torch.full((world * s.numel(),), 9, dtype=s.dtype), key) for key, s in enumerate(shards)]


NUMELS = [1, 0, 130, 20_000, 33]


def _quantised_gather(rank: int, world: int, dtype: torch.dtype) -> None:
    plain = make_param_transport(None, CPU)
    gather = QuantisedGather(plain)
    shards = [*weights(NUMELS, rank, dtype), torch.arange(5) + rank]  # integers travel as they are
    items = items_for(shards, world)
    pending = gather.gather(items)
    pending.wait()
    assert items[-1].full.tolist() == [i + r for r in range(world) for i in range(5)]
    for index, item in enumerate(items[:-1]):
        exact = torch.cat([weights(NUMELS, r, dtype)[index] for r in range(world)]).double()
        limit = INT8.relative_error * exact.abs().max() if exact.numel() else 0.0
        rounding = torch.finfo(dtype).eps * exact.abs()
        assert ((item.full.double() - exact).abs() <= limit + rounding).all()
        everyone: list = [None] * world
        comm.all_gather_object(everyone, item.full)
        assert all(torch.equal(item.full, other) for other in everyone), "ranks hold different weights"
        if world > 1 and exact.numel() > 1000:
            assert not torch.equal(item.full.double(), exact)
    if world == 1:
        assert torch.equal(items[3].full, shards[3]), "nothing travels, nothing is lost"


def test_quantised_weights_are_close_and_the_same_on_all_ranks() -> None:
    for world in (1, 2, 3, 4):
        run_ranks(_quantised_gather, world, torch.bfloat16 if world == 3 else torch.float32)


def _gather_bytes(rank: int, world: int) -> None:
    plain = make_param_transport(None, CPU)
    for dtype, limit in ((torch.float32, 0.27), (torch.bfloat16, 0.53)):
        sent = []
        for transport in (plain, QuantisedGather(plain)):
            items = items_for(weights([1001, 50_003, 130], rank, dtype), world)
            with comm.observe() as events:
                transport.gather(items).wait()
            sent.append(sent_nbytes(events))
        assert sent[0] == (world - 1) * (1001 + 50_003 + 130) * dtype.itemsize
        assert 0.25 * 4 / dtype.itemsize * sent[0] < sent[1] <= limit * sent[0]


def test_quantised_weights_take_at_most_0_27_of_fp32_and_0_53_of_bf16_bytes() -> None:
    run_ranks(_gather_bytes, 2)
    run_ranks(_gather_bytes, 4)


def _frozen(rank: int, world: int) -> None:
    plain = make_param_transport(None, CPU)
    kept = [QuantisedShard(shard) for shard in weights([130, 20_000], rank, torch.bfloat16)]
    assert [k.nbytes for k in kept] == [INT8.packed_nbytes(130), INT8.packed_nbytes(20_000)]
    trained = contribution(rank, 70, torch.bfloat16)
    for quantise in (False, True):
        gather = QuantisedGather(plain, quantise=quantise)
        fulls = [torch.zeros(world * k.numel, dtype=k.dtype) for k in kept]
        items = items_for([trained], world)
        packed = [PackedItem(k, full, 7 + i) for i, (k, full) in enumerate(zip(kept, fulls, strict=True))]
        gather.gather([*items, *packed]).wait()
        exact = torch.cat([contribution(r, 70, torch.bfloat16) for r in range(world)])
        assert torch.equal(items[0].full, exact) == (not quantise or world == 1)
        for shard, full, index in zip(kept, fulls, range(2), strict=True):
            own = shard.dequantise_into(torch.empty(shard.numel, dtype=shard.dtype))
            assert torch.equal(full.view(world, -1)[rank], own)
            for r in range(world):
                theirs = QuantisedShard(weights([130, 20_000], r, torch.bfloat16)[index])
                assert torch.equal(full.view(world, -1)[r], theirs.dequantise_into(torch.empty_like(own)))


def test_quantised_frozen_weights_travel_as_they_rest() -> None:
    for world in (1, 3):
        run_ranks(_frozen, world)


def _hierarchical(rank: int, world: int, node_size: int) -> None:
    plain = make_param_transport(None, CPU)
    gather = make_hierarchical_gather(plain, CPU, node_size=node_size)
    assert isinstance(gather, HierarchicalGather) == (world == 4 and node_size == 2)
    for transport in (gather, QuantisedGather(gather)):
        shards = weights(NUMELS, rank, torch.float32)
        items, expected = items_for(shards, world), items_for(shards, world)
        transport.gather(items).wait()
        (plain if transport is gather else QuantisedGather(plain)).gather(expected).wait()
        for one, other in zip(items, expected, strict=True):
            assert torch.equal(one.full, other.full)
    full = torch.arange(world * 3.0) if rank == 0 else None
    shard = torch.zeros(3)
    gather.scatter(full, shard)
    assert shard.tolist() == [3.0 * rank, 3.0 * rank + 1, 3.0 * rank + 2] and gather.global_rank(world - 1) == world - 1


def test_hierarchical_gather_is_the_plain_gather() -> None:
    for world, node_size in ((1, 1), (2, 1), (3, 2), (4, 4), (4, 2)):
        run_ranks(_hierarchical, world, node_size)


def _hierarchical_bytes(rank: int, world: int) -> None:
    plain = make_param_transport(None, CPU)
    gather = make_hierarchical_gather(plain, CPU, node_size=2)
    items = items_for([torch.ones(20_000)], world)
    with comm.observe() as events:
        gather.gather(items).wait()
    sends = [(event.nbytes, comm.get_all_ranks_from_group(event.group)) for event in events if event.op == "isend"]
    # One shard leaves the node; two travel inside it. (The plain gather sends two out of the node.)
    across, inside = [rank % 2, rank % 2 + 2], [rank - rank % 2, rank - rank % 2 + 1]
    assert sends == [(80_000, across), (80_000, inside), (80_000, inside)]


def test_hierarchical_gather_sends_a_shard_to_each_node_once() -> None:
    run_ranks(_hierarchical_bytes, 4)


def _secondary(rank: int, world: int, size: int) -> None:
    layout = hpz_groups(world, size)
    plain = make_param_transport(None, CPU)
    block = make_param_transport(make_groups(layout.blocks), CPU)
    secondary = SecondaryShards(block)
    for source in (plain, QuantisedGather(plain)):
        items = items_for(weights([4, 20_000], rank, torch.float32), world)
        source.gather(items).wait()
        for item in items:
            secondary.keep(item.key, item.full)
        assert secondary.nbytes == sum(item.full.numel() * 4 for item in items) // size
        again = [torch.zeros_like(item.full) for item in items]
        with comm.observe() as events:
            secondary.gather([(item.key, full, item.key) for item, full in zip(items, again, strict=True)]).wait()
        for event in events:
            assert comm.get_all_ranks_from_group(event.group) == list(layout.block_of(rank)), "backward left the block"
        for item, full in zip(items, again, strict=True):
            assert torch.equal(full, item.full), "backward must see the bits that forward saw"
    assert 0 in secondary and 2 not in secondary
    secondary.drop(0)
    assert 0 not in secondary and 1 in secondary
    secondary.clear()
    assert secondary.nbytes == 0
    if size > 1:
        with pytest.raises(ValueError, match=f"{size} equal pieces, which {size + 1} elements"):
            secondary.keep(5, torch.zeros(size + 1))


def test_hpz_gathers_again_inside_the_block() -> None:
    for world, size in ((1, 1), (3, 3), (4, 1), (4, 2), (4, 4)):
        run_ranks(_secondary, world, size)
