"""Marks of modules that ZeRO-3 takes as one."""

from __future__ import annotations

import copy

import pytest
from torch import nn

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import (
    apply_zero_leaf_module_config,
    get_z3_leaf_modules,
    set_z3_leaf_module,
    set_z3_leaf_modules,
    set_z3_leaf_modules_by_name,
    set_z3_leaf_modules_by_suffix,
    unset_z3_leaf_modules,
    unset_z3_leaf_modules_by_name,
    unset_z3_leaf_modules_by_suffix,
    z3_leaf_parameter,
)
from deepspeed.utils import logging as ds_logging
from deepspeed.utils.z3_leaf_module import z3_leaf_module


class Expert(nn.Linear):
    pass


class SparseMoe(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(2, 2)
        self.experts = nn.ModuleList(Expert(2, 2) for _ in range(2))


class NewerSparseMoe(SparseMoe):
    pass


class Block(nn.Module):
    def __init__(self, moe):
        super().__init__()
        self.attn = nn.Linear(2, 2)
        self.moe = moe


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(SparseMoe()), Block(NewerSparseMoe())])
        self.head = nn.Linear(2, 2)


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(ds_logging, "_said", set())
    monkeypatch.setattr(ds_logging, "log_dist", lambda message, **_: said.append(message))
    return said


@pytest.mark.parametrize("wanted", [[SparseMoe], SparseMoe, ["SparseMoe"], "SparseMoe", (f"{__name__}.SparseMoe",)])
def test_classes_and_their_subclasses_are_found(net, wanted):
    moes = [block.moe for block in net.layers]
    assert set_z3_leaf_modules(net, wanted) == moes
    assert all(moe._z3_leaf is True for moe in moes)
    assert get_z3_leaf_modules(net) == moes
    assert [m for m in net.modules() if z3_leaf_module(m)] == moes
    assert not hasattr(net.head, "_z3_leaf")


def test_a_name_finds_no_part_of_it(net):
    assert set_z3_leaf_modules(net, ["NewerSparseMoe"]) == [net.layers[1].moe]
    with pytest.raises(ValueError, match=r"no module with the class Moe"):
        set_z3_leaf_modules(net, ["Moe"])
    with pytest.raises(ValueError, match=r"elsewhere\.SparseMoe"):
        set_z3_leaf_modules(net, ["elsewhere.SparseMoe"])


def test_the_model_itself_can_be_a_leaf(net):
    assert set_z3_leaf_modules(net, [Net]) == [net]
    assert set_z3_leaf_modules_by_name(net, [""]) == [net]


def test_nothing_found_is_an_error_unless_it_may_be(net, warnings):
    with pytest.raises(ValueError, match=r"Net has no module with the class SparseMeo; did you mean SparseMoe\?"):
        set_z3_leaf_modules(net, ["SparseMeo"])
    assert set_z3_leaf_modules(net, ["SparseMeo", nn.Conv2d], raise_if_not_found=False) == []
    with pytest.raises(ValueError, match="class Conv2d"):
        unset_z3_leaf_modules(net, [nn.Conv2d])
    assert unset_z3_leaf_modules(net, [nn.Conv2d], raise_if_not_found=False) == []
    assert set_z3_leaf_modules(net, []) == [] == get_z3_leaf_modules(net)
    assert warnings == []


def test_one_class_of_several_that_is_not_there_is_warned_of(net, warnings):
    for _ in range(2):
        assert len(set_z3_leaf_modules(net, [SparseMoe, "Conv2d"])) == 2
    assert warnings == ["Net has no module with the class Conv2d"]


@pytest.mark.parametrize("wrong", [3, int, nn.ReLU()])
def test_what_is_no_class_is_refused(net, wrong):
    with pytest.raises(TypeError, match=r"subclasses of torch\.nn\.Module or their names"):
        set_z3_leaf_modules(net, [wrong])
    with pytest.raises(TypeError, match="paths of modules"):
        set_z3_leaf_modules_by_name(net, [wrong])


def test_names_are_exact_and_suffixes_are_endings(net):
    first, second = (block.moe for block in net.layers)
    assert set_z3_leaf_modules_by_name(net, ["layers.0.moe"]) == [first]
    with pytest.raises(ValueError, match=r"the name layers\.0\.mo; did you mean layers\.0\.moe"):
        set_z3_leaf_modules_by_name(net, "layers.0.mo")
    assert set_z3_leaf_modules_by_suffix(net, ["oe", "head"]) == [first, second, net.head]
    assert set_z3_leaf_modules_by_suffix(net, "1.moe") == [second]
    assert set_z3_leaf_modules_by_suffix(net, [".head"], raise_if_not_found=False) == []
    with pytest.raises(ValueError, match="name suffix mo; did you mean moe"):
        set_z3_leaf_modules_by_suffix(net, ["mo"])
    with pytest.raises(ValueError, match="empty"):
        set_z3_leaf_modules_by_suffix(net, [""])


def test_a_shared_module_is_found_by_each_of_its_names(net):
    net.again = net.layers[1].moe
    for name in ("again", "layers.1.moe"):
        assert set_z3_leaf_modules_by_name(net, [name]) == [net.again]
    assert set_z3_leaf_modules_by_name(net, ["again", "layers.1.moe"]) == [net.again]


def test_marks_come_off(net):
    set_z3_leaf_modules(net, [SparseMoe, Expert])
    assert unset_z3_leaf_modules(net, ["NewerSparseMoe"]) == [net.layers[1].moe]
    assert get_z3_leaf_modules(net) == [
        net.layers[0].moe,
        *net.layers[0].moe.experts,
        *net.layers[1].moe.experts,
    ]
    unset_z3_leaf_modules_by_suffix(net, ["experts.0"])
    unset_z3_leaf_modules_by_name(net, ["layers.0.moe", "layers.0.moe.experts.1"])
    assert get_z3_leaf_modules(net) == [net.layers[1].moe.experts[1]]
    set_z3_leaf_module(net.layers[1].moe.experts[1], False)
    assert get_z3_leaf_modules(net) == []
    assert not any(z3_leaf_parameter(param) for param in net.parameters())


def leaves_of(module: nn.Module) -> list[nn.Module]:
    return [param.ds_z3_leaf_module for param in module.parameters()]


def test_parameters_know_their_leaf(net):
    moe = net.layers[0].moe
    set_z3_leaf_modules_by_name(net, ["layers.0.moe"])
    inside = {id(param) for param in moe.parameters()}
    assert len(inside) == 6
    assert all(z3_leaf_parameter(param) == (id(param) in inside) for param in net.parameters())
    assert leaves_of(moe) == [moe] * 6


@pytest.mark.parametrize("inner_first", [False, True])
def test_of_leaves_inside_each_other_the_outermost_counts(net, inner_first):
    moe, block = net.layers[0].moe, net.layers[0]
    marked = [*moe.experts, moe, block]
    for module in marked if inner_first else reversed(marked):
        set_z3_leaf_module(module, True)
    assert leaves_of(block) == [block] * 8
    set_z3_leaf_module(block, False)
    assert leaves_of(moe) == [moe] * 6 and not any(z3_leaf_parameter(p) for p in block.attn.parameters())
    set_z3_leaf_module(moe, False)
    assert leaves_of(moe.experts) == [expert for expert in moe.experts for _ in range(2)]
    assert not any(z3_leaf_parameter(p) for p in moe.gate.parameters())


def test_a_model_with_marks_is_copied_with_them(net):
    set_z3_leaf_modules(net, [SparseMoe])
    twin = copy.deepcopy(net)
    assert get_z3_leaf_modules(twin) == [block.moe for block in twin.layers]
    assert set(net.state_dict()) == set(twin.state_dict())


def config(**leaf_module):
    return DeepSpeedZeroConfig(leaf_module=leaf_module).leaf_module


def test_config_marks_by_all_three_keys(net, warnings):
    first, second = (block.moe for block in net.layers)
    found = apply_zero_leaf_module_config(
        net, config(classes=["NewerSparseMoe"], names="head", name_suffixes=["0.moe", "1.moe"])
    )
    assert found == [first, second, net.head] == get_z3_leaf_modules(net)
    assert warnings == []


def test_config_defaults_that_a_model_lacks_are_silent(net, warnings):
    assert apply_zero_leaf_module_config(net, config()) == []
    assert apply_zero_leaf_module_config(net, config(names=["head"])) == [net.head]
    assert warnings == []


def test_config_defaults_mark_known_mixtures(net):
    class MixtralSparseMoeBlock(SparseMoe):
        __module__ = "transformers.models.mixtral.modeling_mixtral"

    MixtralSparseMoeBlock.__qualname__ = "MixtralSparseMoeBlock"
    net.layers[0].moe = MixtralSparseMoeBlock()
    assert apply_zero_leaf_module_config(net, config()) == [net.layers[0].moe]


def test_config_entries_that_fit_nothing_are_warned_of_once(net, warnings):
    wrong = config(classes=["SparseMeo", "Net"], names=["heda"], name_suffixes=["omega"])
    for _ in range(2):
        assert apply_zero_leaf_module_config(net, wrong) == [net]
    assert warnings == [
        "zero_optimization.leaf_module.classes: Net has no module with the class SparseMeo; did you mean SparseMoe?",
        "zero_optimization.leaf_module.names: Net has no module with the name heda; did you mean head?",
        "zero_optimization.leaf_module.name_suffixes: Net has no module with the name suffix omega",
    ]
