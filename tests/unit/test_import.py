"""What ``import deepspeed`` costs and does: next to nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path

import pytest

import deepspeed

HEAVY = (
    "pydantic",
    "deepspeed.runtime",
    "deepspeed.ops",
    "deepspeed.launcher",
    "triton",
    "transformers",
    "tensorboard",
)


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert not done.stderr
    return done.stdout


def test_import_loads_nothing_heavy_and_prints_nothing():
    out = run(
        "import torch, sys; before = set(sys.modules); import deepspeed; import json;"
        "print(json.dumps([sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))"
    )
    loaded, cuda = json.loads(out)
    assert not cuda
    assert not [name for name in loaded if name.startswith(HEAVY)]
    assert len(loaded) < 20, loaded


def test_the_engine_class_comes_without_an_engine_s_parts():
    """Accelerate imports it at each ``unwrap_model``, in programs that do not use us, too."""
    out = run(
        "import torch, sys; before = set(sys.modules); from deepspeed import DeepSpeedEngine; import json, threading;"
        "from deepspeed.accelerator import real_accelerator;"
        "print(json.dumps([sorted(set(sys.modules) - before), threading.active_count(), "
        "torch.cuda.is_initialized() or bool(real_accelerator._chosen)]))"
    )
    loaded, threads, device = json.loads(out)
    assert "deepspeed.runtime.engine" in loaded and threads == 1 and not device
    assert [name for name in loaded if not name.startswith("deepspeed")] == []
    assert not [name for name in loaded if name.startswith(("deepspeed.ops", "deepspeed.launcher"))]
    assert len(loaded) <= 36, loaded


def test_an_engine_imports_what_its_run_needs_and_the_first_step_what_a_save_will(tmp_path):
    out = run(
        "import json, sys, torch, deepspeed;"
        f"torch.distributed.init_process_group('gloo', init_method='file://{tmp_path}/store', rank=0, world_size=1);"
        "config = {'train_batch_size': 1, 'zero_optimization': {'stage': 2}, 'optimizer': {'type': 'Adam'}};"
        "engine, *_ = deepspeed.initialize(model=torch.nn.Linear(2, 2), config=config);"
        "before = sorted(sys.modules); engine.backward(engine(torch.ones(1, 2)).sum()); engine.step();"
        "after = sorted(sys.modules); engine.save_checkpoint(sys.argv[1]); engine.load_checkpoint(sys.argv[1]);"
        "engine.export_safetensors(sys.argv[1] + '/weights');"
        "print(json.dumps([before, after, sorted(sys.modules)])); engine.destroy()",
        str(tmp_path / "checkpoints"),
    )
    before, after, later = ({n for n in found if n.startswith("deepspeed.")} for found in json.loads(out))
    rest = (
        "deepspeed._core.params.",
        "deepspeed.runtime.zero.stage3",
        "deepspeed.runtime.engine_saving",
        "deepspeed._core.quant",
    )
    assert not [name for name in before if name.startswith(rest)] and len(before) < 130, sorted(before)
    # By the time of a save, hours later, the files on disk may be those of another version.
    assert later == after


def test_attributes_exist_after_a_bare_import():
    out = run(
        "import deepspeed as d; d.runtime.lr_schedules.VALID_LR_SCHEDULES; d.utils.logging.logger;"
        "print(*[getattr(d, n).__name__ for n in "
        "('zero', 'comm', 'ops', 'runtime', 'utils', 'checkpointing', 'accelerator')])"
    )
    assert out.split() == [
        "deepspeed.runtime.zero",
        "deepspeed.comm",
        "deepspeed.ops",
        "deepspeed.runtime",
        "deepspeed.utils",
        "deepspeed.runtime.activation_checkpointing.checkpointing",
        "deepspeed.accelerator",
    ]


def test_version_is_the_distribution_s():
    assert deepspeed.__version__ == version("deepspeed")


PUBLIC = {
    "deepspeed": {
        "DeepSpeedConfig",
        "DeepSpeedConfigError",
        "DeepSpeedEngine",
        "DeepSpeedOptimizer",
        "ZeROOptimizer",
        "__version__",
        "accelerator",
        "add_config_arguments",
        "add_tuning_arguments",
        "checkpoint",
        "checkpointing",
        "comm",
        "dist",
        "env_report",
        "errors",
        "get_accelerator",
        "init_distributed",
        "initialize",
        "launcher",
        "log_dist",
        "logger",
        "ops",
        "runtime",
        "utils",
        "zero",
    },
    "deepspeed.zero": {
        "DeepSpeedZeroConfig",
        "GatheredParameters",
        "Init",
        "MiCS_Init",
        "TiledLinear",
        "TiledLinearReturnBias",
        "ZeroParamStatus",
        "ZeroStageEnum",
        "config",
        "estimate",
        "offload_config",
        "parameter_offload",
        "partition_parameters",
        "register_external_parameter",
        "stage3",
        "stage_1_and_2",
        "tiling",
        "topology",
        "unregister_external_parameter",
    },
    "deepspeed.utils": {
        "RepeatingLoader",
        "apply_zero_leaf_module_config",
        "get_z3_leaf_modules",
        "groups",
        "is_initialized",
        "log_dist",
        "logger",
        "logging",
        "safe_get_full_fp32_param",
        "safe_get_full_grad",
        "safe_get_full_optimizer_state",
        "safe_get_local_fp32_param",
        "safe_get_local_grad",
        "safe_get_local_optimizer_state",
        "safe_set_full_fp32_param",
        "safe_set_full_grad",
        "safe_set_full_optimizer_state",
        "safe_set_local_fp32_param",
        "safe_set_local_grad",
        "safe_set_local_optimizer_state",
        "set_log_level_from_string",
        "set_z3_leaf_module",
        "set_z3_leaf_modules",
        "set_z3_leaf_modules_by_name",
        "set_z3_leaf_modules_by_suffix",
        "tensor_fragment",
        "unset_z3_leaf_modules",
        "unset_z3_leaf_modules_by_name",
        "unset_z3_leaf_modules_by_suffix",
        "warning_once",
        "z3_leaf_module",
        "z3_leaf_parameter",
        "zero_to_fp32",
    },
}


NOT_API = {"annotations", "attach", "no_collection", "TYPE_CHECKING", "Any", "Callable", "Iterable"}


def test_public_surface_is_frozen():
    """A name that appears or disappears here changes the public API: change this list on purpose, and the changelog."""
    for name, expected in PUBLIC.items():
        module = deepspeed if name == "deepspeed" else getattr(deepspeed, name.partition(".")[2])
        for attribute in expected:
            getattr(module, attribute)
        ours = {n for n in dir(module) if (not n.startswith("_") or n == "__version__") and n not in NOT_API}
        # Submodules that something imported become attributes; only those that we offer by name are API.
        loaded = {n for n in ours - expected if isinstance(getattr(module, n), types.ModuleType)}
        assert ours - loaded == expected


@pytest.mark.parametrize(
    ("name", "way_out"), [("tp_model_init", "unset autotp_size"), ("init_inference", "ZeRO-3"), ("OnDevice", "meta")]
)
def test_what_programs_may_look_for_in_vain_says_why(name: str, way_out: str) -> None:
    assert not hasattr(deepspeed, name)
    with pytest.raises(AttributeError, match=rf"no attribute '{name}': .*{way_out}"):
        getattr(deepspeed, name)
