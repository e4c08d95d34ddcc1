"""How much memory the model states (weights, gradients, optimizer states) of a model need under ZeRO-2 and ZeRO-3.

Closed formulas for mixed precision and Adam, as documented (API documents, chapter "Memory Requirements"): a weight costs
2 bytes in 16 bit; its fp32 copy, gradient, momentum and variance 4 bytes each; a model made without ``zero.Init`` is first
made in fp32 on the CPU by every process of a node. Activations and temporary buffers come on top.

* :func:`model_size` measures a model, :func:`zero2_memory_needs` and :func:`zero3_memory_needs` return one
  :class:`MemoryNeed` per combination of options;
* ``estimate_zero{2,3}_model_states_mem_needs`` return the bytes of one combination;
* ``..._all_live`` (of a model) and ``..._all_cold`` (of numbers) print the table of all combinations.

Nothing here is collective, touches a device or allocates: a model on the meta device, in ``FakeTensorMode`` or
partitioned by ZeRO-3 does as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

__all__ = [
    "MemoryNeed",
    "ModelSize",
    "estimate_zero2_model_states_mem_needs",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
    "estimate_zero3_model_states_mem_needs",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
    "model_size",
    "zero2_memory_needs",
    "zero3_memory_needs",
]

# Bytes of one parameter.
_HALF = 2
_FULL = 4
_ADAM = 16  # fp32 weight, gradient, momentum, variance
_GATHERED = 4  # a gathered layer: 16-bit weight and 16-bit gradient


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model (elements): of all of it, and of the module that owns most of them directly."""

    total_params: int
    largest_layer_params: int


@dataclass(frozen=True)
class MemoryNeed:
    """What one combination of options needs.

    ``cpu_bytes`` are those of one node, ``gpu_bytes`` those of one GPU, both rounded down. ``offload_param`` and
    ``zero_init`` are ``None`` at stage 2, which has no such choice.
    """

    stage: int
    cpu_bytes: int
    gpu_bytes: int
    offload_optimizer: str
    offload_param: str | None = None
    zero_init: bool | None = None

    @property
    def options(self) -> str:
        """The options as the printed table writes them."""
        if self.offload_param is None:
            return f"offload_optimizer={self.offload_optimizer}"
        return (
            f"offload_param={self.offload_param:4}, offload_optimizer={self.offload_optimizer:4}, "
            f"zero_init={int(bool(self.zero_init))}"
        )


@dataclass(frozen=True)
class _Hardware:
    """The machines, and the margin on CPU memory."""

    gpus_per_node: int
    nodes: int
    buffer_factor: float

    def __post_init__(self) -> None:
        for name, value in (("num_gpus_per_node", self.gpus_per_node), ("num_nodes", self.nodes)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
        if not (math.isfinite(self.buffer_factor) and self.buffer_factor > 0):
            raise ValueError(f"additional_buffer_factor: expected a number above 0, got {self.buffer_factor!r}")

    @property
    def gpus(self) -> int:
        return self.gpus_per_node * self.nodes

    @property
    def creation(self) -> int:
        """Bytes per parameter on a node while each of its processes makes the whole model in fp32."""
        return _FULL * self.gpus_per_node

    def node_share(self, bytes_per_param: int) -> float:
        """Bytes per parameter on one node of what is partitioned over all GPUs."""
        return bytes_per_param * self.gpus_per_node / self.gpus


def _whole(name: str, value: float) -> int:
    """A number of parameters; floats such as ``2851e6`` are what people write."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a number of parameters of at least 0, got {value!r}")
    return int(value)


def _numel(param: torch.nn.Parameter, owner: torch.nn.Module) -> int:
    """Elements of the whole parameter, whether ZeRO-3 has partitioned it or not."""
    if hasattr(param, "ds_numel"):
        return int(param.ds_numel)
    if torch.nn.parameter.is_lazy(param):
        raise ValueError(
            f"a parameter of {type(owner).__name__} has no shape yet: run one forward so that lazy modules are "
            "initialised, or give the numbers to the _all_cold estimate"
        )
    return param.numel()


def _place(param: torch.nn.Parameter) -> tuple[int, int]:
    """Equal for parameters that share their memory."""
    if hasattr(param, "ds_numel"):
        return id(param), -1  # what a partitioned parameter's own storage is, is none of our business
    try:
        # The address of the storage object, not of the data: meta and fake tensors have no data.
        return param.untyped_storage()._cdata, int(param.storage_offset())
    except NotImplementedError:  # sparse tensors have no storage
        return id(param), -1


def model_size(model: torch.nn.Module) -> ModelSize:
    """Counts the parameters of ``model``, frozen ones included.

    Parameters that share their memory count once in the total. A "layer" is one module with the parameters that it owns
    directly, not those of its children. A parameter that ZeRO-3 has partitioned counts whole (``ds_numel``).

    Raises ``ValueError`` for lazy modules that have not been run.
    """
    seen: dict[tuple[int, int], int] = {}
    largest = 0
    for module in model.modules():
        own = 0
        for param in module.parameters(recurse=False):
            numel = _numel(param, module)
            own += numel
            place = _place(param)
            seen[place] = max(numel, seen.get(place, 0))
        largest = max(largest, own)
    return ModelSize(sum(seen.values()), largest)


def _zero2(total: int, hw: _Hardware, offload: bool) -> MemoryNeed:
    cpu = total * (max(hw.creation, _ADAM) if offload else hw.creation)
    gpu = total * _HALF if offload else int(total * _FULL + total * _ADAM / hw.gpus)
    return MemoryNeed(2, int(cpu * hw.buffer_factor), gpu, "cpu" if offload else "none")


def _zero3(total: int, largest: int, hw: _Hardware, param: bool, optimizer: bool, zero_init: bool) -> MemoryNeed:
    """``param`` and ``optimizer``: whether each is offloaded to the CPU; parameters only together with the optimizer."""
    gpu: float = _GATHERED * largest
    resident = _ADAM + _HALF if param else _ADAM
    if optimizer:
        share = hw.node_share(resident)
        cpu = total * (share if zero_init else max(hw.creation, share))
        gpu += 0 if param else _HALF * total / hw.gpus
    else:
        cpu = (largest if zero_init else total) * hw.creation
        gpu += (_ADAM + _HALF) * total / hw.gpus
    place = {True: "cpu", False: "none"}
    return MemoryNeed(3, int(cpu * hw.buffer_factor), int(gpu), place[optimizer], place[param], zero_init)


def zero2_memory_needs(
    total_params: float, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> list[MemoryNeed]:
    """The rows of the ZeRO-2 table: with the optimizer offloaded to the CPU, and without.

    ``total_params``: parameters of the model, shared ones once (:func:`model_size`); ``additional_buffer_factor``: margin
    on CPU memory. Raises ``ValueError`` for numbers that make no sense.
    """
    hw = _Hardware(num_gpus_per_node, num_nodes, additional_buffer_factor)
    total = _whole("total_params", total_params)
    return [_zero2(total, hw, offload) for offload in (True, False)]


def zero3_memory_needs(
    total_params: float,
    largest_layer_params: float,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> list[MemoryNeed]:
    """The rows of the ZeRO-3 table: parameters and optimizer on the CPU, the optimizer alone, neither; each with
    ``zero.Init`` and without.

    Arguments as :func:`zero2_memory_needs`, and ``largest_layer_params``: parameters of the largest layer.
    """
    hw = _Hardware(num_gpus_per_node, num_nodes, additional_buffer_factor)
    total, largest = _whole("total_params", total_params), _whole("largest_layer_params", largest_layer_params)
    return [
        _zero3(total, largest, hw, param, optimizer, zero_init)
        for param, optimizer in ((True, True), (False, True), (False, False))
        for zero_init in (True, False)
    ]


def estimate_zero2_model_states_mem_needs(
    total_params: float,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int]:
    """``(bytes on one node's CPU, bytes on one GPU)`` under ZeRO-2; ``cpu_offload``: of the optimizer."""
    hw = _Hardware(num_gpus_per_node, num_nodes, additional_buffer_factor)
    need = _zero2(_whole("total_params", total_params), hw, cpu_offload)
    return need.cpu_bytes, need.gpu_bytes


def estimate_zero3_model_states_mem_needs(
    total_params: float,
    largest_layer_params: float,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    cpu_offload_params: bool = True,
    zero_init: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int, int]:
    """``(bytes on one node's CPU, bytes on one GPU, of those for the largest layer)`` under ZeRO-3.

    ``cpu_offload``: of the optimizer; ``cpu_offload_params``: of the parameters too, which has a meaning only with
    ``cpu_offload`` and does nothing without it; ``zero_init``: the model is made under ``zero.Init``.
    """
    hw = _Hardware(num_gpus_per_node, num_nodes, additional_buffer_factor)
    total, largest = _whole("total_params", total_params), _whole("largest_layer_params", largest_layer_params)
    need = _zero3(total, largest, hw, cpu_offload and cpu_offload_params, cpu_offload, zero_init)
    return need.cpu_bytes, need.gpu_bytes, _GATHERED * largest


def _print_table(model: str, needs: Iterable[MemoryNeed], num_gpus_per_node: int, num_nodes: int) -> None:
    nodes = "node" if num_nodes == 1 else "nodes"
    gpus = "GPU" if num_gpus_per_node == 1 else "GPUs"
    print("Estimated memory needed for params, optim states and gradients for a:")
    print(f"HW: Setup with {num_nodes} {nodes}, {num_gpus_per_node} {gpus} per node.")
    print(f"SW: Model with {model}.")
    print("  per CPU  |  per GPU |   Options")
    for need in needs:
        print(f"  {need.cpu_bytes / 2**30:6.2f}GB | {need.gpu_bytes / 2**30:6.2f}GB | {need.options}")


def _millions(params: float) -> str:
    return f"{int(params) // 10**6}M"


def estimate_zero2_model_states_mem_needs_all_live(
    model: torch.nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Prints what ``model`` needs under ZeRO-2, GB being 2**30 bytes. :func:`zero2_memory_needs` returns the values."""
    estimate_zero2_model_states_mem_needs_all_cold(
        model_size(model).total_params, num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: float, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """As ``..._all_live`` for a model that is not at hand: give its number of parameters."""
    needs = zero2_memory_needs(total_params, num_gpus_per_node, num_nodes, additional_buffer_factor)
    _print_table(f"{_millions(total_params)} total params", needs, num_gpus_per_node, num_nodes)


def estimate_zero3_model_states_mem_needs_all_live(
    model: torch.nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Prints what ``model`` needs under ZeRO-3, GB being 2**30 bytes. :func:`zero3_memory_needs` returns the values."""
    size = model_size(model)
    estimate_zero3_model_states_mem_needs_all_cold(
        size.total_params, size.largest_layer_params, num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: float,
    largest_layer_params: float,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """As ``..._all_live`` for a model that is not at hand: give its number of parameters and its largest layer's."""
    needs = zero3_memory_needs(
        total_params, largest_layer_params, num_gpus_per_node, num_nodes, additional_buffer_factor
    )
    model = f"{_millions(total_params)} total params, {_millions(largest_layer_params)} largest layer params"
    _print_table(model, needs, num_gpus_per_node, num_nodes)
