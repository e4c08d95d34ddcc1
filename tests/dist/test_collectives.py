"""How often ranks talk in a step: a lost overlap, an extra gather or a reduction too many fails here."""

from __future__ import annotations

from collections import Counter

import torch

from deepspeed import comm
from tests.helpers.dist import run_ranks
from tests.helpers.models import batches
from tests.helpers.training import BATCH, make_engine, make_model

ACCUMULATION = 3


def _traffic(events: list) -> Counter:
    return Counter(event.op for event in events)


def _count(rank: int, world: int, stage: int, overlap: bool) -> None:
    for bucket_numel in (10**6, 100):
        zero = {"stage": stage, "overlap_comm": overlap, "reduce_bucket_size": bucket_numel}
        config = {"zero_optimization": zero, "gradient_accumulation_steps": ACCUMULATION, "gradient_clipping": 1.0}
        engine = make_engine(make_model("tied"), config, "adam")
        buckets, peers = len(engine._flat.buckets), world - 1
        assert buckets == 1 if bucket_numel == 10**6 else buckets > 3
        for step in range(2):
            for micro, (x, y) in enumerate(batches(rank, ACCUMULATION, BATCH, seed=step)):
                boundary = micro == ACCUMULATION - 1
                with comm.observe() as events:
                    loss = engine(x, y)
                assert not events, "forward of stages 0 to 2 needs nobody"
                with comm.observe() as events:
                    engine.backward(loss)
                reductions = buckets if boundary or stage == 2 else 0
                gathers = buckets if boundary and stage == 0 else 0  # the mean goes to all ranks
                rounds = (reductions + gathers) * peers
                assert _traffic(events) == Counter({"isend": rounds, "irecv": rounds}), (stage, micro, events)
                with comm.observe() as events:
                    engine.step()
                gathers = buckets * peers if boundary and stage > 0 else 0
                expected = Counter({"isend": gathers, "irecv": gathers, "all_reduce": int(boundary)})
                assert _traffic(events) == expected, (stage, micro, events)
                scalars = [event.nbytes for event in events if event.op == "all_reduce"]
                assert all(nbytes <= 64 for nbytes in scalars)
        engine.destroy()


def test_one_reduction_and_one_gather_a_bucket() -> None:
    def run(rank: int, world: int) -> None:
        for stage in (0, 1, 2):
            for overlap in (False, True):
                _count(rank, world, stage, overlap)

    run_ranks(run, 2)
    run_ranks(run, 3)


def _no_sync(rank: int, world: int) -> None:
    for stage in (0, 1, 2):
        engine = make_engine(make_model("plain"), {"zero_optimization": {"stage": stage}})
        with comm.observe() as events:
            for x, y in batches(rank, 2, BATCH):
                with engine.no_sync():
                    engine.backward(engine(x, y))
        assert not events, f"stage {stage}: no_sync must not communicate"
        with comm.observe() as events:
            (x, y), *_ = batches(rank, 1, BATCH)
            engine.backward(engine(x, y))
        rounds = (world - 1) * (2 if stage == 0 else 1)
        assert _traffic(events) == Counter({"isend": rounds, "irecv": rounds})
        engine.step()
        engine.destroy()


def test_no_sync_is_silent_at_every_stage() -> None:
    run_ranks(_no_sync, 2)


def _alone(rank: int, world: int) -> None:
    for stage in (0, 1, 2):
        engine = make_engine(make_model("plain"), {"zero_optimization": {"stage": stage}, "gradient_clipping": 0.1})
        with comm.observe() as events:
            for x, y in batches(rank, 2, BATCH):
                engine.backward(engine(x, y))
                engine.step()
        assert not events
        engine.destroy()


def test_a_single_rank_talks_to_nobody() -> None:
    run_ranks(_alone, 1)


def _overlap(rank: int, world: int) -> None:
    """With ``overlap_comm`` the last layers' gradients leave while the first layers' are still being computed."""
    for stage, overlap, expected in ((1, True, True), (2, True, True), (1, False, False)):
        model = make_model("lora")
        zero = {"stage": stage, "overlap_comm": overlap, "reduce_bucket_size": 32}
        engine = make_engine(model, {"zero_optimization": zero})
        seen = []
        with comm.observe() as events:
            model.lora_a.weight.register_hook(lambda grad, e=events, s=seen: s.append(len(e)))
            (x, y), *_ = batches(rank, 1, BATCH)
            engine.backward(engine(x, y))
        assert (seen[0] > 0) == expected, (stage, overlap, seen, len(events))
        engine.step()
        engine.destroy()


def test_overlap_sends_during_backward() -> None:
    run_ranks(_overlap, 2)


def _one_allocation(rank: int, world: int) -> None:
    """The buffers of a run are made once: a step reuses what the step before had; stage 2 keeps only a few."""
    for stage, bucket_numel in ((0, 100), (1, 100), (2, 10**6), (2, 100)):
        zero = {"stage": stage, "reduce_bucket_size": bucket_numel, "overlap_comm": True}
        engine = make_engine(make_model("plain"), {"zero_optimization": zero, "gradient_accumulation_steps": 2})
        flat = engine._flat
        held = []
        for x, y in batches(rank, 6, BATCH):
            engine.backward(engine(x, y))
            engine.step()
            buffers = [b.grad_full for b in flat.buckets if b.grad_full is not None] + list(flat.reducer._pool)
            held.append(sorted(t.untyped_storage().data_ptr() for t in buffers))
        if (stage, bucket_numel) == (2, 100):
            assert max(map(len, held)) <= 3 < len(flat.buckets)
        else:
            assert len(held[1]) == len(flat.buckets) and held[1] == held[3] == held[5], (stage, held)
        engine.destroy()


def test_gradient_buffers_are_reused() -> None:
    run_ranks(_one_allocation, 2)


def _start(rank: int, world: int) -> None:
    zero = {"stage": 2, "reduce_bucket_size": 100}
    for differing in ("nothing", "one bit", "all"):
        torch.manual_seed(rank if differing == "all" else 7)
        model = torch.nn.Sequential(*(torch.nn.Linear(9, 9) for _ in range(3)))
        if differing == "one bit" and rank == world - 1:
            bits = model[1].weight.data.view(torch.int32)
            bits[4, 4] ^= 1
        before = [p.detach().clone() for p in model.parameters()]
        with comm.observe() as events:
            engine = make_engine(model, {"zero_optimization": zero})
        buckets = len(engine._flat.buckets)
        assert buckets > 2
        expected = {"nothing": 0, "one bit": 1, "all": buckets}[differing]
        assert _traffic(events)["broadcast"] == expected, (differing, events)
        for given, mine in zip(before, model.parameters(), strict=True):
            comm.broadcast(given, 0)
            assert torch.equal(given, mine.detach()), differing
        engine.destroy()


def test_weights_that_all_ranks_have_are_not_sent() -> None:
    run_ranks(_start, 2)
    run_ranks(_start, 3)
