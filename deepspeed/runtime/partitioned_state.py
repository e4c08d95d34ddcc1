"""Weights of a ZeRO-3 model on their way out of it and into it: one state dict, checkpoint content, checkpoint files.

Masters and optimizer state are :mod:`deepspeed.runtime.optimizer_state`'s, files :mod:`deepspeed._core.ckpt`'s.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from deepspeed import comm as dist
from deepspeed._core.ckpt.weights import PartitionedWeights
from deepspeed._core.params.handle import ParamHandle, handle_of
from deepspeed._core.reduce.transport import Pending
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.comm.agreement import together
from deepspeed.runtime.zero.module_state import check_has_data, named_handles

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

__all__ = [
    "check_released",
    "check_written",
    "collect_weights",
    "fragments",
    "load_weights",
    "shard_rank",
    "whole_state_dict",
    "without_data",
]

# Parameters on their way at a time: enough to keep the wire busy, few enough to need no memory.
_IN_FLIGHT = 3


def shard_rank(engine: DeepSpeedEngine) -> tuple[int, int, bool]:
    """``(rank, ranks, writes)``: which part of a model's shards this rank holds, and whether its copy goes to files."""
    if engine._offload is None:
        return dist.get_rank(engine.dp_process_group), engine.dp_world_size, True
    topology = engine._offload.topology
    return topology.gather.rank, topology.gather.world_size, topology.replica == 0


# -- checks ------------------------------------------------------------------------------------------------------------


def check_written(handles: Mapping[str, ParamHandle]) -> None:
    """Raises for parameters that were made on the meta device and have never got values, so that no file holds theirs.

    Raises:
        ValueError: names the parameter.
    """
    for name, handle in handles.items():
        if not handle.born_empty or not handle.numel or not handle.dtype.is_floating_point:
            continue
        if bool(handle.shard.isnan().all()):
            raise ValueError(
                f"{name!r} has no values: it was made on the meta device, and nothing was loaded into it. Load a state "
                "dict before saving"
            )


def check_released(handles: Mapping[str, ParamHandle]) -> None:
    """Raises for parameters that users have gathered: values loaded into their shards would be lost when they let go.

    Raises:
        RuntimeError: names the parameter.
    """
    for name, handle in handles.items():
        if any(getattr(hold, "by_hand", False) for hold in handle.holds):
            raise RuntimeError(
                f"{name!r} is gathered by deepspeed.zero.GatheredParameters: load checkpoints outside of that context"
            )


# -- out of the model --------------------------------------------------------------------------------------------------


def collect_weights(module: torch.nn.Module, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state dict ``state`` of ``module`` with whole values on the CPU, on rank 0; None elsewhere. Collective.

    Parameters travel one after the other, from the shards, to rank 0 only, which allocates nothing but the result. Tied
    parameters stay one tensor.
    """
    handles = named_handles(module)
    first = dist.get_rank() == 0
    rest = {name: value for name, value in state.items() if name not in handles}
    result: dict[str, Any] = OrderedDict()

    def prepare() -> tuple[dict[str, Any], dict[int, torch.Tensor]]:
        """On rank 0, all that takes memory: it may fail there, and the others would wait."""
        if not first:
            return {}, {}
        wanted = {handles[name].id: handles[name] for name in state if name in handles}
        empty = {key: torch.empty(handle.numel, dtype=handle.dtype, device="cpu") for key, handle in wanted.items()}
        return clone_tensors_for_torch_save(rest), empty

    others, collected = together(prepare)
    begun: set[int] = set()
    travelling: deque[Pending] = deque()
    for name in state:
        handle = handles.get(name)
        if handle is None:
            result[name] = others.get(name)
            continue
        transport, out = handle.transport.plain, collected.get(handle.id)
        # With MiCS several groups hold the same; that of rank 0 gives.
        if handle.id not in begun and transport.global_rank(0) == 0:
            begun.add(handle.id)
            travelling.append(transport.collect(handle.shard, handle.numel, out, key=handle.id))
            if out is not None:
                collected[handle.id] = out.view(handle.shape)
            if len(travelling) > _IN_FLIGHT:
                travelling.popleft().wait()
        result[name] = collected.get(handle.id)
    for pending in travelling:
        pending.wait()
    return result if first else None


def without_data(state: Mapping[str, Any], handles: Mapping[str, ParamHandle]) -> dict[str, Any]:
    """A module's state dict for a model file of stage 3, where partitioned parameters are names with empty tensors.

    Raises:
        ValueError: another entry has no data.
    """
    check_has_data({name: value for name, value in state.items() if name not in handles})
    return OrderedDict(
        (name, torch.empty(0, dtype=handles[name].dtype) if name in handles else value) for name, value in state.items()
    )


def fragments(handles: Mapping[str, ParamHandle], names: Collection[str]) -> OrderedDict[str, torch.Tensor]:
    """This rank's shards of the named parameters, live; of those in a file a mapping, which takes no memory."""
    return OrderedDict(
        (name, handles[name].shard.detach() if (away := handles[name].away) is None else away.mapped())
        for name in names
    )


# -- into the model ----------------------------------------------------------------------------------------------------


def load_weights(
    names: Mapping[torch.nn.Parameter, Sequence[str]], weights: PartitionedWeights, skip: Collection[str]
) -> None:
    """Fills the parameters that the checkpoint has, by any of their names, but for ``skip``; of partitioned ones this
    rank's shard.

    No communication: what is whole now is not refreshed.
    """
    for param, known in names.items():
        name = next((name for name in known if name in weights), None)
        if name is None or known[0] in skip:
            continue
        handle = handle_of(param)
        if handle is not None:
            begin, end = handle.own_range
            values = torch.empty(end - begin, dtype=handle.dtype)
            weights.fill(name, begin, values)
            handle.store(values)
        elif param.is_contiguous():
            weights.fill(name, 0, param.data.view(-1))
        else:
            param.data.copy_(weights.whole(name, param.dtype))


def whole_state_dict(module: torch.nn.Module, state: Mapping[str, Any], weights: PartitionedWeights) -> dict[str, Any]:
    """``state`` (the module entries of a stage 3 file) with whole values, in the module's dtypes where it has them."""
    dtypes = {name: param.dtype for name, param in module.named_parameters(remove_duplicate=False)}
    made: dict[str, torch.Tensor] = {}
    result: dict[str, Any] = OrderedDict()
    for name, value in state.items():
        result[name] = value
        if name in weights:
            owner = weights.aliases.get(name, name)
            if owner not in made:
                made[owner] = weights.whole(owner, dtypes.get(name, value.dtype))
            result[name] = made[owner]
    return result
