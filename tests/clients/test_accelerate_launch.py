"""Where Accelerate's plugin gets its values, and the commands that ``accelerate launch`` makes of its flags."""

from __future__ import annotations

import base64
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="the client is not installed: make test-clients installs it")
pytest.importorskip("transformers", reason="the tests train a GPT-2 of transformers: make test-clients installs it")

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from deepspeed.launcher.arguments import check_runner, parse_runner
from tests.clients.test_accelerate import loader, warmup
from tests.clients.test_accelerate_contract import LR, train
from tests.clients.test_launching import ROOT, SCRIPTS, reports
from tests.helpers.clients import free_port, run_clients, tiny_gpt2

pytestmark = pytest.mark.client


# -- where the plugin gets its values ----------------------------------------------------------------------------------


def from_environment(rank: int, world_size: int, variables: dict[str, str]) -> dict[str, Any]:
    os.environ.update(variables, ACCELERATE_USE_DEEPSPEED="true")
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    model = tiny_gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    made = accelerator.prepare(model, optimizer, loader(), warmup(optimizer))
    losses = train(accelerator, made)["loss"]
    assert losses[-1] != losses[0]
    engine = made[0]
    zero = engine.config["zero_optimization"]
    return {
        "stage": engine.zero_optimization_stage(),
        "clipping": engine.gradient_clipping(),
        "dtype": str(model.dtype),
        "init": accelerator.deepspeed_plugin.is_zero3_init_enabled(),
        "gather": engine.zero_gather_16bit_weights_on_model_save(),
        "devices": [zero.get(key, {}).get("device") for key in ("offload_optimizer", "offload_param")],
        "optimizer": type(made[1].optimizer.optimizer).__name__,
    }


def test_variables_of_the_launcher(tmp_path: Path) -> None:
    prefix = "ACCELERATE_DEEPSPEED_"
    variables = {
        "ACCELERATE_GRADIENT_CLIPPING": "0.5",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        prefix + "ZERO_STAGE": "3",
        prefix + "ZERO3_INIT": "false",
        prefix + "ZERO3_SAVE_16BIT_MODEL": "true",
    }
    for part in ("OPTIMIZER", "PARAM"):
        variables |= {f"{prefix}OFFLOAD_{part}_DEVICE": "nvme", f"{prefix}OFFLOAD_{part}_NVME_PATH": str(tmp_path)}
    (got,) = run_clients(from_environment, 1, variables)
    assert got.pop("dtype") == "torch.bfloat16" and got.pop("devices") == ["nvme", "nvme"]
    assert got == {"stage": 3, "clipping": 0.5, "init": False, "gather": True, "optimizer": "DeepSpeedCPUAdam"}


@pytest.mark.parametrize("form", ["path", "json", "base64"])
def test_config_in_a_file_or_as_text(form: str, tmp_path: Path) -> None:
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": False}, "offload_param": {"device": "cpu"}}
    text = json.dumps({
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.25,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False, **offload},
    })  # fmt: skip
    given = text
    if form == "path":
        given = str(tmp_path / "ds.json")
        Path(given).write_text(text)
    elif form == "base64":
        given = base64.urlsafe_b64encode(text.encode()).decode()
    (got,) = run_clients(from_environment, 1, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": given})
    assert got.pop("dtype") == "torch.bfloat16" and got.pop("devices") == ["cpu", "cpu"]
    assert got == {"stage": 3, "clipping": 0.25, "init": True, "gather": False, "optimizer": "DeepSpeedCPUAdam"}


def mixed_up(rank: int, world_size: int) -> None:
    """As ``accelerate launch`` says what its own config file had beside a DeepSpeed config."""
    os.environ["ACCELERATE_CONFIG_DS_FIELDS"] = "zero_stage,deepspeed_config_file"
    with pytest.raises(ValueError, match="will be ignored"):
        DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 2}})
    os.environ["ACCELERATE_CONFIG_DS_FIELDS"] = "deepspeed_config_file"
    assert DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 2}}).zero_stage == 2


def test_fields_beside_a_config_file() -> None:
    run_clients(mixed_up, 1)


# -- the command line --------------------------------------------------------------------------------------------------

SELECTIONS = {
    (): {"num_gpus": 2},
    ("--deepspeed_inclusion_filter", "a:0,1@b"): {"include": "a:0,1@b"},
    ("--deepspeed-exclusion-filter", "b:1"): {"exclude": "b:1"},
}
LAUNCHERS = ("pdsh", "openmpi", "mvapich", "mpich", "slurm", "nossh")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_commands_for_several_machines(launcher: str) -> None:
    """What Accelerate would run is what our launcher understands, to the last argument."""
    forms: Any = itertools.product(SELECTIONS.items(), (None, "hosts"), ((), ("--module",), ("--no_python",)))
    for (flags, chosen), hostfile, kind in forms:
        given = ["--use_deepspeed", "--deepspeed_multinode_launcher", launcher, "--num_machines", "2", "--machine_rank"]
        given += ["1", "--num_processes", "4", "--main_process_ip", "10.0.0.1", "--main_process_port", "29611", *flags]
        given += [*(("--deepspeed_hostfile", hostfile) if hostfile else ()), *kind, "--mixed_precision", "no"]
        arguments = launch_command_parser().parse_args([*given, "train.py", "--local", "a b"])
        arguments.deepspeed_fields_from_accelerate_config = ""
        command, environment = prepare_deepspeed_cmd_env(arguments)
        parsed = parse_runner(command[1:])
        check_runner(parsed)
        assert command[0] == "deepspeed" and environment["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert parsed.user_script == "train.py" and parsed.user_args == ["--local", "a b"]
        assert {name: getattr(parsed, name) for name in chosen} == chosen
        assert (parsed.master_addr, parsed.master_port, parsed.hostfile) == ("10.0.0.1", 29611, str(hostfile))
        assert (parsed.module, parsed.no_python) == ("--module" in kind, "--no_python" in kind)
        if launcher == "nossh":
            assert parsed.no_ssh and parsed.node_rank == 1
        else:
            assert parsed.no_local_rank and parsed.launcher == launcher


@pytest.mark.parametrize("name", ["", "other_env"])
def test_name_of_the_environment_file(name: str) -> None:
    """Accelerate appends to the file of this name, in the current folder, before each start on several machines."""
    code = "from deepspeed.launcher.runner import DEEPSPEED_ENVIRONMENT_NAME as n; print(n)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ENV_FILE": name}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == (name or ".deepspeed_env")


def started(folder: Path, *options: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def two_machines(folder: Path) -> None:
    """A hostfile that names this machine twice, and our command where ``PATH`` finds it."""
    (folder / "deepspeed").write_text(f'#!/bin/sh\nexec {sys.executable} -m deepspeed.launcher.runner "$@"\n')
    (folder / "deepspeed").chmod(0o755)
    (folder / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    try:
        said = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, out + error) for process, (out, error) in zip(processes, said, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fields", "file"])
def test_files_of_accelerate_config(kind: str, tmp_path: Path) -> None:
    """A YAML file as ``accelerate config`` writes it: the plugin's fields, or the name of a DeepSpeed config."""
    made: dict[str, Any] = {"zero3_init_flag": True}
    if kind == "fields":
        made |= {"zero_stage": 3, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}
        made |= {"offload_optimizer_device": "cpu", "offload_param_device": "none", "zero3_save_16bit_model": True}
    else:
        made["deepspeed_config_file"] = str(tmp_path / "ds.json")
        ds = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 2, "bf16": {"enabled": True}}
        (tmp_path / "ds.json").write_text(json.dumps({**ds, "zero_optimization": {"stage": 3}}))
    settings: dict[str, Any] = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "debug": False}
    settings |= {"num_processes": 2, "use_cpu": False, "main_training_function": "main", "deepspeed_config": made}
    settings["mixed_precision"] = "bf16" if kind == "fields" else None
    ClusterConfig(**settings).to_yaml_file(tmp_path / "accelerate.yaml")
    options = ["--config_file", "accelerate.yaml", "--main_process_port", str(free_port())]
    ((code, said),) = ended([started(tmp_path, *options, str(SCRIPTS / "accelerated.py"), str(tmp_path))])
    assert code == 0, said
    for report in reports(tmp_path, 2):
        assert (report["stage"], report["accumulation"], report["steps"]) == (3, 2, 6)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["standard", "nossh"])
def test_machines_started_by_hand(launcher: str, tmp_path: Path) -> None:
    """Each "machine" with a command of its own."""
    two_machines(tmp_path)
    options = f"--use_deepspeed --zero_stage 2 --num_machines 2 --num_processes 2 --main_process_port {free_port()} "
    options += "--main_process_ip 127.0.0.1 --mixed_precision bf16 --dynamo_backend no --same_network "
    options += f"--deepspeed_multinode_launcher {launcher} --deepspeed_hostfile hosts "
    # Without ssh Accelerate does not say --no_local_rank, and the script is told its rank first.
    script = [str(SCRIPTS / "accelerated.py"), str(tmp_path)]
    if launcher == "nossh":
        run = f"import runpy, sys\nassert sys.argv.pop(1) == '--local_rank=0'\nrunpy.run_path({script[0]!r})\n"
        (tmp_path / "script.py").write_text(run)
        script[0] = "script.py"
    both = [started(tmp_path, *options.split(), "--machine_rank", str(machine), *script) for machine in range(2)]
    for code, said in ended(both):
        assert code == 0, said
    assert [report["steps"] for report in reports(tmp_path, 2)] == [12, 12]
    if launcher == "nossh":
        assert "ACCELERATE_USE_DEEPSPEED=true" in (tmp_path / ".deepspeed_env").read_text()


@pytest.mark.slow
def test_a_failure_is_told(tmp_path: Path) -> None:
    two_machines(tmp_path)
    (tmp_path / "fail.py").write_text("raise SystemExit(7)\n")
    options = "--use_deepspeed --num_machines 2 --num_processes 2 --machine_rank 0 --main_process_ip 127.0.0.1 "
    options += f"--main_process_port {free_port()} --deepspeed_multinode_launcher nossh --deepspeed_hostfile hosts "
    ((code, said),) = ended([started(tmp_path, *options.split(), "--mixed_precision", "no", "fail.py")])
    assert code != 0 and "CalledProcessError" in said and "returned non-zero exit status 7" in said
