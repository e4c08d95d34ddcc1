"""The accelerator interface on CPU, and the choice between kinds."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
import torch

from deepspeed.accelerator import CPU_Accelerator, CUDA_Accelerator, get_accelerator, real_accelerator, set_accelerator
from deepspeed.comm.rendezvous import resolve_rendezvous
from deepspeed.comm.setup import _choose_device
from deepspeed.errors import ConfigError
from deepspeed.runtime import engine_setup


@pytest.fixture
def unchosen(monkeypatch):
    """As in a process that has not asked yet; the answer of the test session comes back afterwards."""
    monkeypatch.setattr(real_accelerator, "_chosen", [])
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    return monkeypatch


def test_environment_chooses_and_choice_is_kept(unchosen):
    unchosen.setenv("DS_ACCELERATOR", " CPU ")
    first = get_accelerator()
    unchosen.setenv("DS_ACCELERATOR", "bogus")
    assert isinstance(first, CPU_Accelerator)
    assert get_accelerator() is first


def test_unknown_name_is_refused_with_the_choices(unchosen):
    unchosen.setenv("DS_ACCELERATOR", "tpu")
    with pytest.raises(ConfigError, match=r"'tpu'.*one of cpu, cuda"):
        get_accelerator()


def test_cuda_is_refused_where_there_is_none(unchosen):
    unchosen.setenv("DS_ACCELERATOR", "cuda")
    unchosen.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="DS_ACCELERATOR=cpu"):
        get_accelerator()


@pytest.mark.parametrize("available", [True, False])
def test_machine_decides_when_nothing_is_set(unchosen, available):
    unchosen.setattr(torch.cuda, "is_available", lambda: available)
    assert isinstance(get_accelerator(), CUDA_Accelerator if available else CPU_Accelerator)


def test_set_accelerator(unchosen):
    mine = CPU_Accelerator()
    set_accelerator(mine)
    assert get_accelerator() is mine
    with pytest.raises(TypeError, match="got str"):
        set_accelerator("cpu")


def test_import_asks_no_device():
    code = (
        "import torch\n"
        "def touched(*args): raise SystemExit('the import touched a device')\n"
        "torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = torch._C._cuda_init = touched\n"
        "import deepspeed.accelerator, deepspeed.comm\n"
        "from deepspeed.accelerator import real_accelerator\n"
        "assert real_accelerator._chosen == []\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_of_devices():
    cpu, cuda = CPU_Accelerator(), CUDA_Accelerator()
    assert (cpu.device_name(), cpu.device_name(3), cpu.current_device_name()) == ("cpu", "cpu", "cpu")
    assert (cuda.device_name(), cuda.device_name(3), cuda.device_name("1")) == ("cuda", "cuda:3", "cuda:1")
    assert (cpu.communication_backend_name(), cuda.communication_backend_name()) == ("gloo", "nccl")
    assert (cpu.current_device(), cpu.device_count()) == (0, 1)
    cpu.set_device(5)  # ranks on one host all pass their LOCAL_RANK
    assert torch.ones(1, device=cpu.current_device_name()).device.type == "cpu"


def test_cpu_takes_all_training_dtypes():
    assert CPU_Accelerator().supported_dtypes() == [torch.float32, torch.float16, torch.bfloat16]


def test_cpu_rng():
    cpu = CPU_Accelerator()
    before = cpu.get_rng_state()
    try:
        cpu.manual_seed(7)
        assert cpu.initial_seed() == 7
        state = cpu.get_rng_state()
        first = torch.rand(3)
        cpu.set_rng_state(state)
        assert torch.equal(torch.rand(3), first)
        assert cpu.default_generator() is torch.default_generator
    finally:
        cpu.set_rng_state(before)


def test_cpu_streams_and_events():
    cpu = CPU_Accelerator()
    with cpu.stream(cpu.Stream()), cpu.device(0):
        start, end = cpu.Event(enable_timing=True), cpu.Event(enable_timing=True)
        start.record()
        cpu.current_stream().wait_event(start)
        end.record(cpu.default_stream())
    assert end.query() and start.elapsed_time(end) == -end.elapsed_time(start) >= 0
    untimed = cpu.Event()
    untimed.record()
    with pytest.raises(ValueError, match="enable_timing"):
        untimed.elapsed_time(end)


def test_cpu_memory_numbers():
    cpu = CPU_Accelerator()
    nbytes = 64 << 20
    before = cpu.memory_allocated()
    block = torch.ones(nbytes, dtype=torch.uint8)
    assert cpu.memory_allocated() - before > nbytes // 2
    peak = cpu.max_memory_allocated()
    assert peak - before > nbytes // 2
    del block
    assert cpu.max_memory_allocated() >= peak - (8 << 20)
    assert 0 < cpu.available_memory() <= cpu.total_memory()
    assert cpu.memory_stats()["peak_rss"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a peak that can be reset")
def test_cpu_peak_can_be_reset():
    cpu = CPU_Accelerator()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    high = cpu.max_memory_allocated()
    del block
    cpu.reset_peak_memory_stats()
    assert cpu.max_memory_allocated() < high - (32 << 20)


def test_pinning_is_the_identity_where_host_memory_is_device_memory():
    tensor = torch.ones(2)
    assert CPU_Accelerator().pin_memory(tensor) is tensor
    assert CPU_Accelerator().on_accelerator(tensor)


def test_visible_devices():
    env: dict[str, str] = {}
    CUDA_Accelerator().set_visible_devices_envs(env, [0, 2])
    CPU_Accelerator().set_visible_devices_envs(env, [0])
    assert env == {"CUDA_VISIBLE_DEVICES": "0,2"}


@pytest.mark.parametrize("accelerator", [CPU_Accelerator(), CUDA_Accelerator()])
def test_lazy_call_runs_once_ready(accelerator, monkeypatch):
    queued = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "_lazy_call", queued.append)
    ran = []
    accelerator.lazy_call(lambda: ran.append(1))
    for callback in queued:
        callback()
    assert ran == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_on_a_device():
    cuda = CUDA_Accelerator()
    cuda.set_device("0")
    assert cuda.current_device_name() == "cuda:0"
    before = cuda.memory_allocated()
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    with cuda.stream(cuda.Stream()):
        start.record()
        block = torch.ones(1 << 20, device=cuda.current_device_name())
        end.record()
    cuda.synchronize()
    assert start.elapsed_time(end) > 0 and cuda.on_accelerator(block)
    assert cuda.memory_allocated() - before >= 4 << 20
    assert cuda.max_memory_allocated() >= cuda.memory_allocated() <= cuda.memory_reserved()
    assert 0 < cuda.available_memory() <= cuda.total_memory()
    assert cuda.is_pinned(cuda.pin_memory(torch.ones(4)))
    state = cuda.get_rng_state()
    first = torch.rand(3, device="cuda")
    cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), first)
    assert cuda.default_generator(0).device.type == "cuda"
    ran = []
    cuda.lazy_call(lambda: ran.append(1))
    assert ran == [1]
    with contextlib.suppress(AttributeError):  # nvtx is absent in some builds
        cuda.range_push("test")
        cuda.range_pop()


class FakeGpus(CUDA_Accelerator):
    """So many devices, of which one can be chosen."""

    def __init__(self, count):
        super().__init__()
        self.count, self.chosen = count, None

    def device_count(self):
        return self.count

    def set_device(self, device_index):
        self.chosen = device_index


def chosen_of(accelerator, monkeypatch, environment):
    """The devices that ``init_distributed`` and ``initialize`` choose."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", *environment):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(real_accelerator, "_chosen", [accelerator])
    _choose_device(resolve_rendezvous(environment))
    first, accelerator.chosen = accelerator.chosen, None
    monkeypatch.setenv("LOCAL_RANK", environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID", ""))
    device = engine_setup.choose_device(None)
    assert device == torch.device("cuda", accelerator.chosen)
    return first, accelerator.chosen


LAUNCHED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node-0", "MASTER_PORT": "1"}
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "MASTER_ADDR": "node-0"}


@pytest.mark.parametrize("environment", [LAUNCHED, SRUN])
def test_a_rank_takes_the_device_with_its_number(monkeypatch, environment):
    assert chosen_of(FakeGpus(4), monkeypatch, environment) == (1, 1)
    assert chosen_of(FakeGpus(4), monkeypatch, {**environment, "CUDA_VISIBLE_DEVICES": "4,5,6,7"}) == (1, 1)


@pytest.mark.parametrize("environment", [LAUNCHED, SRUN])
@pytest.mark.parametrize("visible", ["1", "0"])  # all devices there, or one of them behind a cgroup
def test_a_rank_that_is_shown_one_device_takes_it(monkeypatch, environment, visible):
    """``srun --gpus-per-task=1``."""
    assert chosen_of(FakeGpus(1), monkeypatch, {**environment, "CUDA_VISIBLE_DEVICES": visible}) == (0, 0)


@pytest.mark.parametrize(("count", "visible"), [(1, None), (2, "0,1")])
def test_more_ranks_than_devices_are_refused(monkeypatch, count, visible):
    environment = {**LAUNCHED, "LOCAL_RANK": "3"} | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})
    with pytest.raises(ConfigError, match=rf"LOCAL_RANK=3, but this process sees {count} cuda device"):
        chosen_of(FakeGpus(count), monkeypatch, environment)
