"""What ``state_dict`` and ``load_state_dict`` of modules do with partitioned parameters.

[Note: state dicts] A released parameter appears as a tensor on the meta device, of the true shape and dtype: nobody can save
its placeholder by mistake. Loading into a released parameter needs no gathering: every rank has the whole value and
takes its own part of it. One that is gathered by hand (``GatheredParameters``) is written as any parameter; whose values
count is for the context to say.

[Note: how loading is diverted] Torch calls ``param.copy_(value)`` for each name in the state dict, after checking the shape.
For the time of the module's load, the parameters carry a ``copy_`` of their own, which writes the shard.

[Note: no traces] Whoever pickles a module pickles ordinary parameters, and so none of the hooks here: the dicts that hold
them leave them out. Copies in memory keep them, since copies of released parameters are partitioned, too.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from deepspeed._core.params.construct import unwatched
from deepspeed._core.params.handle import ParamHandle, handle_of, handles_of
from deepspeed._core.params.hooks import coordinator_of
from deepspeed.utils.tensor_fragment import weights_written

__all__ = ["check_has_data", "make_ordinary", "named_handles", "unwatch_state", "watch_state", "write_shard"]

_HOOK_DICTS = ("_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


class _Hooks(OrderedDict):  # type: ignore[type-arg]
    """A module's dict of hooks, whose pickles are plain and lack ours; see [Note: no traces]."""

    def __reduce__(self) -> Any:
        return OrderedDict, ([(key, hook) for key, hook in self.items() if not is_state_hook(hook)],)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hooks:
        made = memo[id(self)] = _Hooks()
        for key, hook in self.items():
            made[key] = copy.deepcopy(hook, memo)
        return made


def is_state_hook(hook: Any) -> bool:
    """Whether a hook of a module is one of this file."""
    return getattr(hook, "hook", hook) in (_hide_released, _divert, _undivert)


def watch_state(root: torch.nn.Module) -> None:
    """Makes the state dicts of every module in ``root`` that has partitioned parameters behave. Idempotent."""
    for module in root.modules():
        if not any(handle_of(param) is not None for param in module._parameters.values()):
            continue
        if _hide_released in module._state_dict_hooks.values():
            continue
        for name in _HOOK_DICTS:
            # A dict with hooks stays: their handles know it, and would no longer remove them.
            if not getattr(module, name):
                module.__dict__[name] = _Hooks()
        module._register_state_dict_hook(_hide_released)
        module._register_load_state_dict_pre_hook(_divert, with_module=True)
        module.register_load_state_dict_post_hook(_undivert)


def unwatch_state(root: torch.nn.Module) -> None:
    """Undoes :func:`watch_state`. Idempotent."""
    for module in root.modules():
        for name in _HOOK_DICTS:
            hooks = getattr(module, name)
            for key in [key for key, hook in hooks.items() if is_state_hook(hook)]:
                del hooks[key]


def make_ordinary(root: torch.nn.Module) -> None:
    """Gives partitioned parameters whole data of unknown content on the CPU, and takes ZeRO-3's hooks off the modules.

    For someone who writes all of that data. Not collective; an engine around ``root`` is of no use afterwards.
    """
    for handle in handles_of(root.parameters()):
        handle.dissolve(torch.empty(handle.shape, dtype=handle.dtype))
    for module in root.modules():
        coordinator = coordinator_of(module)
        if coordinator is not None:
            coordinator.detach()
    unwatch_state(root)


def named_handles(root: torch.nn.Module) -> dict[str, ParamHandle]:
    """Handles of all partitioned parameters by name; tied ones under each of their names."""
    named = root.named_parameters(remove_duplicate=False)
    return {name: handle for name, param in named if (handle := handle_of(param)) is not None}


# -- state_dict --------------------------------------------------------------------------------------------------------


def _hide_released(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name, param in module._parameters.items():
        handle, key = handle_of(param), prefix + name
        if handle is None or key not in state_dict or state_dict[key] is param:  # itself: keep_vars=True
            continue
        if not handle.available:
            state_dict[key] = handle.param.new_empty(handle.shape, device="meta")
        elif handle.transport.world_size > 1 and handle.numel and not _by_hand(handle):
            # Its memory is freed at the next release, whoever looks at it.
            state_dict[key] = state_dict[key].clone()


def check_has_data(state_dict: Mapping[str, Any]) -> None:
    """Raises for tensors without data: nobody may write the placeholder of a released parameter to a file.

    Raises:
        ValueError: names the entry.
    """
    for name, value in state_dict.items():
        if not isinstance(value, torch.Tensor) or not value.numel():
            continue
        placeholder = (
            value.layout is torch.strided and value.dim() > 0 and not any(value.stride()) and value.numel() > 1
        )
        if value.is_meta or (placeholder and value.is_floating_point() and bool(value.reshape(-1)[0].isnan())):
            raise ValueError(
                f"{name!r} has no data: it is the placeholder of a partitioned parameter, or on the meta device, and "
                "must not be saved. Gather the parameter first (deepspeed.zero.GatheredParameters), or leave it out"
            )


# -- load_state_dict ---------------------------------------------------------------------------------------------------


def _by_hand(handle: ParamHandle) -> bool:
    return any(getattr(hold, "by_hand", False) for hold in handle.holds)


def _own(module: torch.nn.Module, state_dict: Mapping[str, Any], prefix: str) -> Iterator[ParamHandle]:
    for name, param in module._parameters.items():
        handle = handle_of(param)
        if handle is not None and handle.numel and prefix + name in state_dict and not _by_hand(handle):
            yield handle


def _divert(
    module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    counts: dict[int, int] = {}
    handles = list(_own(module, state_dict, prefix))
    for handle in handles:
        counts[handle.id] = counts.get(handle.id, 0) + 1
        vars(handle.param)["copy_"] = _copier(handle, counts)
    if handles and local_metadata.get("assign_to_params_buffers"):
        # A partitioned parameter keeps its identity: what load_state_dict(assign=True) gives is copied.
        local_metadata["assign_to_params_buffers"] = False


def _undivert(module: torch.nn.Module, _: Any) -> None:
    for param in module._parameters.values():
        if handle_of(param) is not None:
            vars(param).pop("copy_", None)


def _copier(handle: ParamHandle, counts: dict[int, int]) -> Callable[..., torch.Tensor]:
    def copy_(source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        counts[handle.id] -= 1
        if counts[handle.id] <= 0:
            vars(handle.param).pop("copy_", None)
        write_shard(handle, source)
        return handle.param

    return copy_


def write_shard(handle: ParamHandle, value: torch.Tensor) -> None:
    """Takes this rank's part of the whole ``value`` (of the true shape), and the rest if the parameter is whole now.

    No communication: every rank calls it with the same value. Whoever trains the parameter is told.

    Raises:
        ValueError: ``value`` has no data itself, or another shape.
    """
    given = handle_of(value)
    if value.is_meta or (given is not None and not given.available):
        raise ValueError(
            f"the value for {handle.label} has no data: it comes from a state dict that was taken while the parameter "
            "was partitioned"
        )
    if value.shape != handle.shape:
        raise ValueError(f"the value for {handle.label} has shape {tuple(value.shape)}, not {tuple(handle.shape)}")
    begin, end = handle.own_range
    with unwatched(), torch.no_grad():
        handle.finish()
        handle.store(value.detach().reshape(-1)[begin:end])
        if handle.available:
            handle.param.data.copy_(value)  # .data: no operation that autograd has recorded becomes stale
        weights_written(handle.param)
