"""Memory estimates: the documented tables to the letter, and every formula behind them."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from deepspeed.runtime.zero import estimate, stage_1_and_2
from deepspeed.runtime.zero.estimate import ModelSize, model_size, zero2_memory_needs, zero3_memory_needs

# The sample outputs of the API documents (t5-3b, one node of 8 GPUs) and of the Transformers guide (T0_3B, one GPU).
T5_3B_ZERO2 = """\
Estimated memory needed for params, optim states and gradients for a:
HW: Setup with 1 node, 8 GPUs per node.
SW: Model with 2851M total params.
  per CPU  |  per GPU |   Options
  127.48GB |   5.31GB | offload_optimizer=cpu
  127.48GB |  15.93GB | offload_optimizer=none
"""
T5_3B_ZERO3 = """\
Estimated memory needed for params, optim states and gradients for a:
HW: Setup with 1 node, 8 GPUs per node.
SW: Model with 2851M total params, 32M largest layer params.
  per CPU  |  per GPU |   Options
   71.71GB |   0.12GB | offload_param=cpu , offload_optimizer=cpu , zero_init=1
  127.48GB |   0.12GB | offload_param=cpu , offload_optimizer=cpu , zero_init=0
   63.74GB |   0.79GB | offload_param=none, offload_optimizer=cpu , zero_init=1
  127.48GB |   0.79GB | offload_param=none, offload_optimizer=cpu , zero_init=0
    1.47GB |   6.10GB | offload_param=none, offload_optimizer=none, zero_init=1
  127.48GB |   6.10GB | offload_param=none, offload_optimizer=none, zero_init=0
"""
T5_3B_ZERO2_COLD = """\
Estimated memory needed for params, optim states and gradients for a:
HW: Setup with 1 node, 8 GPUs per node.
SW: Model with 2851M total params.
  per CPU  |  per GPU |   Options
  127.45GB |   5.31GB | offload_optimizer=cpu
  127.45GB |  15.93GB | offload_optimizer=none
"""
T5_3B_ZERO3_COLD = """\
Estimated memory needed for params, optim states and gradients for a:
HW: Setup with 1 node, 8 GPUs per node.
SW: Model with 2851M total params, 32M largest layer params.
  per CPU  |  per GPU |   Options
   71.69GB |   0.12GB | offload_param=cpu , offload_optimizer=cpu , zero_init=1
  127.45GB |   0.12GB | offload_param=cpu , offload_optimizer=cpu , zero_init=0
   63.72GB |   0.78GB | offload_param=none, offload_optimizer=cpu , zero_init=1
  127.45GB |   0.78GB | offload_param=none, offload_optimizer=cpu , zero_init=0
    1.43GB |   6.09GB | offload_param=none, offload_optimizer=none, zero_init=1
  127.45GB |   6.09GB | offload_param=none, offload_optimizer=none, zero_init=0
"""
T0_3B_ZERO3 = """\
Estimated memory needed for params, optim states and gradients for a:
HW: Setup with 1 node, 1 GPU per node.
SW: Model with 2783M total params, 65M largest layer params.
  per CPU  |  per GPU |   Options
   70.00GB |   0.25GB | offload_param=cpu , offload_optimizer=cpu , zero_init=1
   70.00GB |   0.25GB | offload_param=cpu , offload_optimizer=cpu , zero_init=0
   62.23GB |   5.43GB | offload_param=none, offload_optimizer=cpu , zero_init=1
   62.23GB |   5.43GB | offload_param=none, offload_optimizer=cpu , zero_init=0
    0.37GB |  46.91GB | offload_param=none, offload_optimizer=none, zero_init=1
   15.56GB |  46.91GB | offload_param=none, offload_optimizer=none, zero_init=0
"""


def weight(*shape: int) -> nn.Module:
    """A module that owns one parameter of this shape, without data."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.empty(shape, device="meta"))
    return module


def attention(width: int, inner: int, bias_heads: int = 0) -> list[nn.Module]:
    parts = [*(weight(inner, width) for _ in "qkv"), weight(width, inner), weight(width)]
    return [*parts, weight(32, bias_heads)] if bias_heads else parts


def t5(width: int, hidden: int, heads: int, head_width: int, gated: bool) -> nn.Module:
    """The parameters of a T5 of 24 layers: an embedding that encoder and decoder share, and two stacks."""
    model = nn.Module()
    model.shared = weight(32128, width)
    for name in ("encoder", "decoder"):
        stack = nn.ModuleList([weight(32128, width), weight(width)])
        stack[0].weight = model.shared.weight
        for layer in range(24):
            stack.extend(attention(width, heads * head_width, heads if layer == 0 else 0))
            if name == "decoder":
                stack.extend(attention(width, heads * head_width))
            stack.extend(weight(hidden, width) for _ in range(2 if gated else 1))
            stack.extend([weight(width, hidden), weight(width)])
        setattr(model, name, stack)
    return model


@pytest.fixture(scope="module")
def t5_3b() -> nn.Module:
    return t5(1024, 16384, 32, 128, gated=False)


def test_zero2_prints_the_documented_table(t5_3b, capsys):
    stage_1_and_2.estimate_zero2_model_states_mem_needs_all_live(t5_3b, num_gpus_per_node=8, num_nodes=1)
    assert capsys.readouterr().out == T5_3B_ZERO2
    stage_1_and_2.estimate_zero2_model_states_mem_needs_all_cold(total_params=2851e6, num_gpus_per_node=8, num_nodes=1)
    assert capsys.readouterr().out == T5_3B_ZERO2_COLD


def test_zero3_prints_the_documented_table(t5_3b, capsys):
    estimate.estimate_zero3_model_states_mem_needs_all_live(t5_3b, num_gpus_per_node=8, num_nodes=1)
    assert capsys.readouterr().out == T5_3B_ZERO3
    estimate.estimate_zero3_model_states_mem_needs_all_cold(
        total_params=2851e6, largest_layer_params=32e6, num_gpus_per_node=8, num_nodes=1
    )
    assert capsys.readouterr().out == T5_3B_ZERO3_COLD


def test_zero3_prints_the_table_of_the_transformers_guide(capsys):
    model = t5(2048, 5120, 32, 64, gated=True)
    estimate.estimate_zero3_model_states_mem_needs_all_live(model, num_gpus_per_node=1, num_nodes=1)
    assert capsys.readouterr().out == T0_3B_ZERO3


def test_the_documented_discussion_s_example():
    """t5-large on four GPUs: 125 MB for the largest layer, and 3291, 125 and 477 MB a GPU in its three cases."""
    total, largest = 737_670_000, 32_899_072
    by_option = {(n.offload_param, n.offload_optimizer): n for n in zero3_memory_needs(total, largest, 4)}
    assert {k: n.gpu_bytes >> 20 for k, n in by_option.items()} == {
        ("none", "none"): 3291,
        ("cpu", "cpu"): 125,
        ("none", "cpu"): 477,
    }
    assert estimate.estimate_zero3_model_states_mem_needs(total, largest, 4)[2] >> 20 == 125


def test_several_nodes_are_plural(capsys):
    estimate.estimate_zero2_model_states_mem_needs_all_cold(10**9, 1, 2)
    assert "HW: Setup with 2 nodes, 1 GPU per node." in capsys.readouterr().out


@given(
    total=st.integers(0, 10**12),
    largest=st.integers(0, 10**9),
    gpus=st.integers(1, 16),
    nodes=st.integers(1, 64),
    factor=st.sampled_from([1.0, 1.5, 2.0]),
)
def test_every_row_follows_its_formula(total, largest, gpus, nodes, factor):
    world, share = gpus * nodes, 1 / nodes
    two = [(n.offload_optimizer, n.cpu_bytes, n.gpu_bytes) for n in zero2_memory_needs(total, gpus, nodes, factor)]
    three = [
        (n.offload_param, n.offload_optimizer, n.zero_init, n.cpu_bytes, n.gpu_bytes)
        for n in zero3_memory_needs(total, largest, gpus, nodes, factor)
    ]

    def near(value):
        return pytest.approx(value, rel=1e-12, abs=1)

    assert two == [
        ("cpu", near(total * max(4 * gpus, 16) * factor), near(2 * total)),
        ("none", near(total * 4 * gpus * factor), near(4 * total + 16 * total / world)),
    ]
    layer = 4 * largest
    assert three == [
        ("cpu", "cpu", True, near(total * 18 * share * factor), near(layer)),
        ("cpu", "cpu", False, near(total * max(4 * gpus, 18 * share) * factor), near(layer)),
        ("none", "cpu", True, near(total * 16 * share * factor), near(layer + 2 * total / world)),
        ("none", "cpu", False, near(total * max(4 * gpus, 16 * share) * factor), near(layer + 2 * total / world)),
        ("none", "none", True, near(largest * 4 * gpus * factor), near(layer + 18 * total / world)),
        ("none", "none", False, near(total * 4 * gpus * factor), near(layer + 18 * total / world)),
    ]


def test_single_estimates_are_rows_of_the_table():
    two = {n.offload_optimizer: (n.cpu_bytes, n.gpu_bytes) for n in zero2_memory_needs(7_000_001, 4, 3, 1.25)}
    for offload in (True, False):
        found = estimate.estimate_zero2_model_states_mem_needs(7_000_001, 4, 3, offload, 1.25)
        assert found == two["cpu" if offload else "none"]
    for need in zero3_memory_needs(7_000_001, 1_001, 4, 3, 1.25):
        found = estimate.estimate_zero3_model_states_mem_needs(
            7_000_001, 1_001, 4, 3, need.offload_optimizer == "cpu", need.offload_param == "cpu", need.zero_init, 1.25
        )
        assert found == (need.cpu_bytes, need.gpu_bytes, 4004)
    plain = estimate.estimate_zero3_model_states_mem_needs(1000, 10, cpu_offload=False, cpu_offload_params=True)
    assert plain == estimate.estimate_zero3_model_states_mem_needs(
        1000, 10, cpu_offload=False, cpu_offload_params=False
    )


def test_documented_signatures():
    common = ["num_gpus_per_node", "num_nodes", "additional_buffer_factor"]
    first = {"2_all_live": ["model"], "2_all_cold": ["total_params"], "3_all_live": ["model"]}
    first["3_all_cold"] = ["total_params", "largest_layer_params"]
    for key, names in first.items():
        stage, _, kind = key.partition("_")
        parameters = inspect.signature(
            getattr(estimate, f"estimate_zero{stage}_model_states_mem_needs_{kind}")
        ).parameters
        assert list(parameters) == names + common
        assert [parameters[name].default for name in common] == [1, 1, 1.5]


def test_shared_parameters_count_once_in_the_total():
    one, other = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
    whole = nn.Sequential(one, other)
    assert model_size(whole) == ModelSize(24, 12)
    other.weight = one.weight  # the same parameter
    assert model_size(whole) == ModelSize(12, 12)
    other.weight = nn.Parameter(one.weight.data)  # the same memory
    assert model_size(whole) == ModelSize(12, 12)
    flat = torch.zeros(24)  # neighbours in one buffer share nothing
    one.weight, other.weight = nn.Parameter(flat[:12].view(4, 3)), nn.Parameter(flat[12:].view(4, 3))
    assert model_size(whole) == ModelSize(24, 12)


def test_a_layer_is_what_one_module_owns():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 2)))
    assert model_size(model) == ModelSize(12 + 4 + 20 + 10 + 2, 20)
    model.extra = nn.Parameter(torch.zeros(21))
    model[0].requires_grad_(False)
    assert model_size(model) == ModelSize(48 + 21, 21)
    assert model_size(nn.ReLU()) == ModelSize(0, 0)


def test_models_without_data_are_measured():
    real = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    with FakeTensorMode():
        fake = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
        found = model_size(fake)
    assert model_size(real) == model_size(meta) == found == ModelSize(41, 25)


def test_partitioned_parameters_count_whole():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False))
    for layer in model:
        layer.weight.data = torch.empty(0)
        layer.weight.ds_numel = 12
    assert model_size(model) == ModelSize(24, 12)


def test_wrong_numbers_say_which():
    with pytest.raises(ValueError, match="num_gpus_per_node: expected a whole number of at least 1, got 0"):
        zero2_memory_needs(10, num_gpus_per_node=0)
    with pytest.raises(ValueError, match="num_nodes"):
        zero3_memory_needs(10, 1, num_nodes=1.5)
    with pytest.raises(ValueError, match="total_params"):
        zero3_memory_needs(-1, 1)
    with pytest.raises(ValueError, match="largest_layer_params"):
        zero3_memory_needs(10, float("nan"))
    with pytest.raises(ValueError, match="additional_buffer_factor"):
        zero2_memory_needs(10, additional_buffer_factor=0)
    with pytest.raises(ValueError, match="LazyLinear"):
        model_size(nn.Sequential(nn.LazyLinear(4)))
