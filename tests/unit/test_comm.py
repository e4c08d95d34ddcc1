"""How ranks find each other (pure), and deepspeed.comm in a world of one process."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import deepspeed.comm as comm
from deepspeed.comm.rendezvous import Rendezvous, resolve_rendezvous
from deepspeed.errors import ConfigError, MissingFeatureError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "1234",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


# -- rendezvous --------------------------------------------------------------------------------------------------------
def test_nothing_set_is_a_world_of_one_with_no_port():
    assert resolve_rendezvous({}) == Rendezvous(None, 0, 1, 0, {}, True)
    assert resolve_rendezvous({"MASTER_PORT": "29500", "LOCAL_RANK": "0"}).environment == {}


def test_environment_of_a_launcher():
    place = resolve_rendezvous(TORCHRUN)
    assert place == Rendezvous("env://", 3, 4, 1, TORCHRUN, False)


def test_world_of_one_from_the_environment_needs_no_port():
    place = resolve_rendezvous({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert place.init_method is None and place.environment["RANK"] == "0"


def test_explicit_place_wins_and_defaults_to_this_host():
    place = resolve_rendezvous({"RANK": "9", "WORLD_SIZE": "10"}, rank=1, world_size=2, distributed_port=4321)
    assert (place.init_method, place.rank, place.world_size, place.local_rank) == ("env://", 1, 2, 1)
    assert place.environment == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "4321",
    }
    assert place.on_this_host_only


def test_port_defaults_to_the_parameter():
    environment = {name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"}
    assert resolve_rendezvous(environment, distributed_port=777).environment["MASTER_PORT"] == "777"


@pytest.mark.parametrize(
    ("method", "local_rank"), [("tcp://10.0.0.1:5", None), ("tcp://[::1]:5", 1), ("tcp://localhost:5", 1)]
)
def test_tcp_with_explicit_place(method, local_rank):
    place = resolve_rendezvous({}, init_method=method, rank=1, world_size=2)
    assert (place.init_method, place.rank, place.world_size, place.local_rank) == (method, 1, 2, local_rank)
    assert "MASTER_ADDR" not in place.environment
    assert place.on_this_host_only == (local_rank is not None)


def test_file_takes_the_place_from_the_environment():
    place = resolve_rendezvous({"RANK": "0", "WORLD_SIZE": "3"}, init_method="file:///tmp/x")
    assert (place.init_method, place.rank, place.world_size, place.local_rank) == ("file:///tmp/x", 0, 3, None)


def test_place_inside_the_address_is_left_to_torch():
    method = "tcp://10.0.0.1:5?rank=0&world_size=2"
    assert resolve_rendezvous({}, init_method=method) == Rendezvous(method, -1, -1, None)


def test_mpi_variables_only_where_present_and_wanted():
    place = resolve_rendezvous(OPENMPI)
    assert (place.rank, place.world_size, place.local_rank) == (1, 2, 1)
    assert place.environment["MASTER_ADDR"] == "127.0.0.1" and place.environment["LOCAL_RANK"] == "1"
    assert resolve_rendezvous(OPENMPI, mpi_discovery=False).world_size == 1
    assert resolve_rendezvous({**TORCHRUN, **OPENMPI}).rank == 3


def test_hydra_variables():
    place = resolve_rendezvous({"PMI_RANK": "5", "PMI_SIZE": "6", "MPI_LOCALRANKID": "2", "MASTER_ADDR": "a"})
    assert (place.rank, place.world_size, place.local_rank) == (5, 6, 2)


def test_slurm_step_is_a_rank_but_a_batch_script_is_not():
    job = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "MASTER_ADDR": "a"}
    place = resolve_rendezvous({**job, "SLURM_STEP_ID": "0"})
    assert (place.rank, place.world_size, place.local_rank) == (1, 2, 0)
    del job["MASTER_ADDR"]
    assert resolve_rendezvous(job).world_size == 1


@pytest.mark.parametrize(
    ("environment", "kwargs", "message"),
    [
        ({"RANK": "0"}, {}, "RANK=0 is set but WORLD_SIZE is missing"),
        ({"WORLD_SIZE": "2"}, {}, "WORLD_SIZE=2 is set but RANK is missing"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, {}, "MASTER_ADDR is missing"),
        ({"MASTER_ADDR": "node-0"}, {}, "RANK and WORLD_SIZE are missing"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, {}, "RANK='x' is not a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, {}, "rank 2 is outside a world of 2"),
        ({**TORCHRUN, "MASTER_PORT": "0"}, {}, "from 1 to 65535, got 0"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, {}, "MASTER_PORT='http' is not a whole number"),
        ({}, {"rank": 0}, "rank=0 and world_size=-1: give both"),
        ({}, {"world_size": 2}, "rank=-1 and world_size=2: give both"),
        ({}, {"init_method": "tcp://h:1"}, "pass rank= and world_size="),
        ({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, {}, "from OMPI_COMM_WORLD_RANK.*MASTER_ADDR is missing"),
    ],
)
def test_incomplete_information_names_what_is_missing(environment, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        resolve_rendezvous(environment, **kwargs)


# -- init_distributed, one process -------------------------------------------------------------------------------------
@pytest.fixture
def no_group(monkeypatch):
    """No default group before or after, and no rank in the environment."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DEEPSPEED_TIMEOUT"):
        monkeypatch.setenv(name, "")  # noted even if absent, so that what init_distributed sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert not dist.is_initialized()
    yield monkeypatch
    if dist.is_initialized():
        dist.destroy_process_group()


def test_one_process_and_idempotence(no_group):
    comm.init_distributed()
    world = comm.get_world_group()
    comm.init_distributed(dist_init_required=True)
    assert comm.get_world_group() is world
    assert (comm.get_rank(), comm.get_world_size(), comm.get_local_rank()) == (0, 1, 0)
    assert comm.get_backend() == "gloo"
    assert comm.get_all_ranks_from_group() == [0] and comm.get_global_rank(world, 0) == 0
    comm.init_distributed(dist_init_required=False)


def test_group_must_exist_when_told_so(no_group):
    with pytest.raises(ConfigError, match="dist_init_required=False"):
        comm.init_distributed(dist_init_required=False)


def test_unknown_backend_lists_what_there_is(no_group):
    with pytest.raises(ConfigError, match=r"no backend 'smoke'; it has gloo"):
        comm.init_distributed("smoke")
    assert not comm.is_initialized()


def test_other_backend_than_the_existing_one_is_said(no_group, capsys):
    comm.init_distributed("gloo")
    comm.init_distributed("nccl")
    assert "initialized before with 'gloo'" in capsys.readouterr().err


def test_timeout(no_group):
    with pytest.raises(ConfigError, match="timedelta above zero, got 30"):
        comm.init_distributed(timeout=30)
    no_group.setenv("DEEPSPEED_TIMEOUT", "soon")
    with pytest.raises(ConfigError, match="DEEPSPEED_TIMEOUT='soon'"):
        comm.init_distributed()
    seen = []
    real = dist.init_process_group
    no_group.setattr(dist, "init_process_group", lambda *a, **k: (seen.append(k["timeout"]), real(*a, **k)))
    no_group.setenv("DEEPSPEED_TIMEOUT", "2.5")
    comm.init_distributed(timeout=None)
    dist.destroy_process_group()
    comm.init_distributed(timeout=timedelta(seconds=7))
    assert seen == [timedelta(seconds=150), timedelta(seconds=7)]


def test_comms_logger_is_refused_rather_than_ignored(no_group):
    comm.configure({"comms_logger": {"enabled": False}})
    with pytest.raises(MissingFeatureError, match="comms_logger"):
        comm.init_distributed(config={"comms_logger": {"enabled": True}})
    with pytest.raises(MissingFeatureError, match="log_summary"):
        comm.log_summary()


def test_local_rank_is_never_guessed_in_a_larger_world(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert comm.get_local_rank() == 2
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="LOCAL_RANK is not set"):
        comm.get_local_rank()


# -- the hook ----------------------------------------------------------------------------------------------------------
def test_hook_sees_operation_size_and_group(no_group):
    comm.init_distributed()
    world = comm.get_world_group()
    vector, pair = torch.ones(5), torch.ones(2, dtype=torch.bfloat16)
    with comm.observe() as events:
        comm.all_reduce(vector)
        comm.all_gather([torch.empty(5)], vector, group=world)
        comm.all_reduce_coalesced([vector, pair], async_op=True).wait()
        comm.barrier(world)
    comm.all_reduce(vector)
    assert events == [
        ("all_reduce", 20, None),
        ("all_gather", 20, world),
        ("all_reduce_coalesced", 24, None),
        ("barrier", 0, world),
    ]


def test_hook_gets_the_result_after_and_is_restored(no_group):
    comm.init_distributed()
    order = []

    def hook(event):
        order.append(event.op)
        return lambda result: order.append(type(result).__name__)

    assert comm.set_comm_hook(hook) is None
    try:
        with comm.observe() as events:
            comm.broadcast(torch.ones(1), 0)
        comm.all_reduce(torch.ones(1), async_op=True).wait()
        assert comm.comm_hook() is hook
    finally:
        assert comm.set_comm_hook(None) is hook
    assert [e.op for e in events] == ["broadcast"]
    assert order[:3] == ["broadcast", "NoneType", "all_reduce"] and "Work" in order[3]


def test_observe_restores_after_an_exception(no_group):
    with pytest.raises(RuntimeError, match="inside"), comm.observe():
        raise RuntimeError("inside")
    assert comm.comm_hook() is None
