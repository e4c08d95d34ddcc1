"""The launcher over two hosts: network namespaces of this machine, joined by a cable, and a stand-in for ssh."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepspeed.launcher import ds_ssh, supervise
from tests.helpers.launcher import SLEEPER, Launcher, wait_gone
from tests.helpers.netns import Network, two_hosts, why_not

ROOT = str(Path(__file__).parents[2])
LAUNCHERS = [
    "ssh",
    pytest.param("pdsh", marks=pytest.mark.skipif(shutil.which("pdsh") is None, reason="pdsh is not installed")),
]


class Cluster(Launcher):
    """``deepspeed`` with a hostfile of two hosts, the second with two slots."""

    def __init__(self, folder: Path, network: Network) -> None:
        super().__init__(folder)
        self.network = network
        self.first, self.second = network.hosts
        self.script("hosts", f"# the small cluster\n{self.first} slots=1\n\n{self.second} slots=2\n")

    def begin(self, *args: str, launcher: str = "ssh", **environment: str) -> int:
        names = {
            "PATH": f"{self.network.programs}:{os.environ['PATH']}",
            "PYTHONPATH": ROOT,
            "GLOO_SOCKET_IFNAME": "eth0",
            **environment,
        }
        return self.start("--hostfile", "hosts", "--launcher", launcher, *args, environment=names)

    def go(self, *args: str, launcher: str = "ssh", **environment: str) -> int:
        return self.wait(self.begin(*args, launcher=launcher, **environment))

    def inside(self, index: int, *args: str) -> subprocess.Popen[str]:
        """``deepspeed`` started by hand on a host."""
        command = ["ip", "netns", "exec", self.network.namespaces[index], sys.executable]
        environment = {**os.environ, "PYTHONPATH": ROOT, "GLOO_SOCKET_IFNAME": "eth0", "HOME": str(self.folder)}
        return subprocess.Popen(
            [*command, "-m", "deepspeed.launcher.runner", "--hostfile", "hosts", *args],
            env=environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ranks_are_gone(self) -> None:
        wait_gone(int(path.read_text()) for path in self.folder.glob("up[0-9]"))


@pytest.fixture(scope="module")
def namespaces():
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def cluster(tmp_path, namespaces, monkeypatch):
    # A moment is enough for what these scripts have to say when a peer is killed.
    monkeypatch.setitem(supervise.LADDERS, "killed", ((0.3, signal.SIGTERM), (5, signal.SIGKILL)))
    with two_hosts(tmp_path) as network:
        started = Cluster(tmp_path, network)
        yield started
        started.end()


SHOW = """
import json, os, socket, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "EXTRA", "NCCL_X")
own = socket.create_server(("", 0)).getsockname()  # so that a broken network shows here
print(json.dumps([{n: os.environ.get(n) for n in names}, sys.argv[1:], os.getcwd()]))
"""


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_on_both_hosts(cluster, launcher):
    """What a remote shell could change arrives as it was: arguments, variables, the folder."""
    extra = 'it\'s "$HOME" `ls` ; 100% %n \\ *'
    (cluster.folder / ".deepspeed_env").write_text(f"EXTRA=first\nEXTRA={extra}\nRANK=9\n")
    awkward = ["a b", "c'd", "$(hostname)", "%h", ""]
    code = cluster.go(cluster.script("show it.py", SHOW), *awkward, launcher=launcher, NCCL_X="on it")
    assert code == 0, cluster.said
    shown = {}
    for line in cluster.printed:
        host, _, text = line.partition(": ")
        variables, arguments, folder = json.loads(text)
        shown[variables["RANK"]] = host, variables
        assert arguments == [f"--local_rank={variables['LOCAL_RANK']}", *awkward]
        assert folder == str(cluster.folder)
    assert [host for _, (host, _) in sorted(shown.items())] == [cluster.first, cluster.second, cluster.second]
    assert shown["2"][1] == {
        "RANK": "2",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "3",
        "LOCAL_SIZE": "2",
        "CROSS_RANK": "1",
        "CROSS_SIZE": "2",
        "MASTER_ADDR": cluster.first,  # nobody named it: the first host was asked
        "EXTRA": extra,
        "NCCL_X": "on it",
    }


def test_chosen_host_with_an_activation_script(cluster):
    activate = cluster.script("activate it", "export EXTRA=active\n")
    os.symlink(sys.executable, cluster.network.programs / "python")
    flags = ["--include", f"{cluster.second}:1", "--venv_script", activate, "--no_local_rank", "-q"]
    assert cluster.go(*flags, cluster.script("show.py", SHOW)) == 0, cluster.said
    variables, arguments, _ = json.loads(cluster.printed[0].partition(": ")[2])
    assert (variables["WORLD_SIZE"], variables["EXTRA"], variables["MASTER_ADDR"], arguments) == (
        "1",
        "active",
        cluster.second,
        [],
    )
    assert cluster.said == ""


def test_nodes_started_by_hand(cluster):
    """``--no_ssh`` on each host; the same script, world and ranks."""
    script = cluster.script("show.py", SHOW)
    started = [cluster.inside(index, "--no_ssh", "--node_rank", str(index), script) for index in range(2)]
    shown = []
    for process in started:
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        shown += [json.loads(line)[0] for line in out.splitlines()]
    assert sorted((v["RANK"], v["LOCAL_RANK"], v["CROSS_RANK"]) for v in shown) == [
        ("0", "0", "0"),
        ("1", "0", "1"),
        ("2", "1", "1"),
    ]
    assert {(v["WORLD_SIZE"], v["MASTER_ADDR"]) for v in shown} == {("3", cluster.first)}


FAILING = (
    SLEEPER
    + """
ready()
if os.environ["RANK"] == "2":
    while not (os.path.exists("up0") and os.path.exists("up1")):
        time.sleep(0.005)
    raise SystemExit(7)
time.sleep(600)
"""
)
SLEEPING = SLEEPER + "ready()\ntime.sleep(600)\n"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_failing_rank_ends_the_job_on_all_hosts(cluster, launcher):
    assert cluster.go(cluster.script("fail.py", FAILING), launcher=launcher) == 7
    assert f"[deepspeed] node {cluster.second}: rank 2 exited with code 7" in cluster.said
    cluster.ranks_are_gone()


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_host_is_named(cluster, killed):
    pid = cluster.begin(cluster.script("sleep.py", SLEEPING))
    cluster.until("up*", 3)
    cluster.network.kill_host(killed)
    assert cluster.wait(pid) == 128 + signal.SIGKILL
    lost, other = cluster.network.hosts[killed], cluster.network.hosts[1 - killed]
    first = next(line for line in cluster.said.splitlines() if "node" in line and "starting" not in line)
    assert first.startswith(f"[deepspeed] node {lost} was lost") and first.endswith(f"stopping node {other}")
    cluster.ranks_are_gone()


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="pdsh is not installed")
def test_killed_host_under_pdsh(cluster):
    pid = cluster.begin(cluster.script("sleep.py", SLEEPING), launcher="pdsh")
    cluster.until("up*", 3)
    cluster.network.kill_host(1)
    assert cluster.wait(pid) == 128 + signal.SIGKILL
    assert f"[deepspeed] node {cluster.second}: lost or never reached: ssh was killed by SIGKILL" in cluster.said
    cluster.ranks_are_gone()


def test_host_that_cannot_be_reached_is_named(cluster):
    cluster.script("hosts", f"{cluster.first} slots=1\n10.77.1.9 slots=1\n")
    pid = cluster.begin(cluster.script("sleep.py", SLEEPING))
    assert cluster.wait(pid) == 255
    assert "10.77.1.9: ssh: connect to host 10.77.1.9 port 22: No route to host" in cluster.said
    assert "node 10.77.1.9 was lost or never reached (ssh exited with code 255)" in cluster.said
    cluster.ranks_are_gone()
    cluster.script("hosts", f"10.77.1.9 slots=1\n{cluster.first} slots=1\n")
    assert cluster.go("sleep.py") == 2
    assert "host '10.77.1.9' cannot be asked for its address" in cluster.said and "--master_addr" in cluster.said


HANDLING = (
    SLEEPER
    + """
import signal, sys
def handle(number, frame):
    ready(f"-got{number}-")
    sys.exit(1)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, handle)
ready()
time.sleep(600)
"""
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_ranks_of_every_host(cluster, number):
    pid = cluster.begin(cluster.script("handle.py", HANDLING))
    cluster.until("up[0-9]", 3)
    os.kill(pid, number)
    assert cluster.wait(pid) == 128 + number
    assert len(list(cluster.folder.glob(f"up-got{number}-[0-9]"))) == 3
    assert f"got {number.name}; passing it on to 2 node(s)" in cluster.said
    cluster.ranks_are_gone()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_nothing_outlives_a_killed_launcher(cluster, launcher):
    pid = cluster.begin(cluster.script("sleep.py", SLEEPING), launcher=launcher)
    cluster.until("up*", 3)
    os.kill(pid, signal.SIGKILL)
    assert cluster.wait(pid) == -signal.SIGKILL
    cluster.ranks_are_gone()


def test_ds_ssh(cluster):
    def run(*args: str) -> int:
        path = f"{cluster.network.programs}:{os.environ['PATH']}"
        return cluster.run("-f", "hosts", *args, main=ds_ssh.main, environment={"PATH": path})

    assert run("echo $((6 * 7));", "hostname -I | grep -o", "10.77.1.[0-9]") == 0
    expected = {f"{host}: {text}" for host in cluster.network.hosts for text in ("42", host)}
    assert cluster.printed[-1] == "hostfile=hosts" and set(cluster.printed[:-1]) == expected
    assert run(f"hostname -I | grep -q {cluster.first}") == 1
    assert cluster.second in cluster.said and cluster.first not in cluster.said
    assert run() == 2 and "ds_ssh expects a command" in cluster.said


# -- with torch --------------------------------------------------------------------------------------------------------
TRAIN = """
import hashlib, json, os, sys, torch
import deepspeed
import deepspeed.comm as dist
out, steps, stall = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(8, 33), torch.nn.GELU(), torch.nn.Linear(33, 1))
config = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "zero_optimization": {"stage": 2},
    "gradient_clipping": 1.0,
}
engine, *_ = deepspeed.initialize(model=model, config=config)
data = torch.Generator().manual_seed(dist.get_rank())
losses = []
for step in range(steps):
    x = torch.randn(4, 8, generator=data)
    loss = (engine(x) - x.sum(1, keepdim=True)).square().mean()
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
    if step == stall:
        open(f"{out}-at-work-{dist.get_rank()}", "w").close()
weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
result = {"losses": losses, "weights": hashlib.sha256(weights).hexdigest(), "world": dist.get_world_size()}
with open(f"{out}-{dist.get_rank()}.json", "w") as file:
    json.dump(result, file)
"""


@pytest.mark.slow
def test_training_over_two_hosts_gives_what_one_host_gives(cluster):
    script = cluster.script("train.py", TRAIN)
    assert cluster.go("--no_local_rank", script, "two", "6", "-1") == 0, cluster.said
    one = ["--num_gpus", "3", "--no_local_rank", script, "one", "6", "-1"]
    assert cluster.run(*one, environment={"PYTHONPATH": ROOT}) == 0, cluster.said
    for rank in range(3):
        two, one = (json.loads((cluster.folder / f"{name}-{rank}.json").read_text()) for name in ("two", "one"))
        assert two == one and two["world"] == 3
    assert two["losses"][-1] != two["losses"][0]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_host_killed_in_training_is_the_one_that_is_named(cluster, killed):
    """Its peers fail, too, for their lost connections; they are not the reason."""
    pid = cluster.begin("--no_local_rank", cluster.script("train.py", TRAIN), "x", "100000000", "3")
    cluster.until("x-at-work-*", 3)
    killed_at = time.monotonic()
    cluster.network.kill_host(killed)
    assert cluster.wait(pid) == 128 + signal.SIGKILL
    assert time.monotonic() - killed_at < 20
    lost = cluster.network.hosts[killed]
    first = next(line for line in cluster.said.splitlines() if line.startswith("[deepspeed] node"))
    assert first.startswith(f"[deepspeed] node {lost} was lost (ssh was killed by SIGKILL"), cluster.said


ACCELERATED = """
import os, sys, torch
from accelerate import Accelerator, InitProcessGroupKwargs
accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.AdamW(model.parameters())
data = torch.utils.data.DataLoader([torch.ones(4)] * 8, batch_size=2)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
for x in data:
    accelerator.backward(model(x).mean())
    optimizer.step()
    optimizer.zero_grad()
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
print(*[os.environ[n] for n in names], accelerator.distributed_type.value, type(model).__name__, sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.client
def test_accelerate_launch_over_two_hosts(cluster):
    """It writes its environment to .deepspeed_env, again at each launch, and calls ``deepspeed --launcher pdsh``."""
    pytest.importorskip("accelerate")
    program = cluster.network.programs / "deepspeed"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m deepspeed.launcher.runner "$@"\n')
    program.chmod(0o755)
    cluster.script("hosts", f"{cluster.first} slots=1\n{cluster.second} slots=1\n")
    script = cluster.script("train.py", ACCELERATED)
    flags = [
        "--use_deepspeed",
        "--zero_stage",
        "2",
        "--num_machines",
        "2",
        "--num_processes",
        "2",
        "--machine_rank",
        "0",
    ]
    flags += ["--deepspeed_hostfile", "hosts", "--main_process_ip", cluster.first, "--main_process_port", "29511"]
    flags += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    names = {
        "PATH": f"{cluster.network.programs}:{os.environ['PATH']}",
        "PYTHONPATH": ROOT,
        "HOME": str(cluster.folder),
    }
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *flags, script, "a b"],
            env={**os.environ, **names, "GLOO_SOCKET_IFNAME": "eth0"},
            cwd=cluster.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    shown = sorted(line for line in done.stdout.splitlines() if " DEEPSPEED " in line)
    assert shown == [
        f"{host}: {rank} 0 2 {cluster.first} 29511 DEEPSPEED DeepSpeedEngine ['a b']"
        for rank, host in enumerate(cluster.network.hosts)
    ]
    assert (cluster.folder / ".deepspeed_env").read_text().count("ACCELERATE_USE_DEEPSPEED=") == 2


ELASTIC = """
import os, sys, time, torch
import deepspeed
import deepspeed.comm as dist
deepspeed.init_distributed()
total = torch.ones(1)
dist.all_reduce(total)
world = dist.get_world_size()
open(f"world{world}-{dist.get_rank()}", "w").close()
assert total.item() == world and sys.argv[1] == f"--local_rank={os.environ['LOCAL_RANK']}"
while world == 3:
    dist.all_reduce(total)
    time.sleep(0.05)
"""


@pytest.mark.slow
def test_elastic_job_goes_on_without_a_killed_host(cluster):
    pid = cluster.begin("--elastic_training", "--min_elastic_nodes", "1", cluster.script("elastic.py", ELASTIC))
    cluster.until("world3-*", 3)
    cluster.network.kill_host(1)
    cluster.until("world1-0", 1)
    assert cluster.wait(pid) == 0, cluster.said
    assert f"node {cluster.second} was lost" in cluster.said and "; 1 node(s) go on" in cluster.said
