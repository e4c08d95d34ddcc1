"""Gathering partitioned parameters by hand, and registering those that a module uses without owning them.

Source: chapter 5.1.3 of the API documentation; public through :mod:`deepspeed.runtime.zero.partition_parameters`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType

import torch

from deepspeed import comm as dist
from deepspeed._core.ckpt.guard import before_change
from deepspeed._core.params.construct import unwatched
from deepspeed._core.params.handle import ParamHandle, fetch, handles_of
from deepspeed._core.params.hooks import coordinator_of
from deepspeed.utils.tensor_fragment import weights_written

__all__ = ["GatheredParameters", "gather_exactly", "register_external_parameter", "unregister_external_parameter"]


def gather_exactly(handles: Sequence[ParamHandle]) -> None:
    """Makes the parameters whole, with every bit of their shards. Collective."""
    for handle in handles:
        handle.settle_cast()
    fetch(handles, exact=True)
    for handle in handles:
        handle.finish()
        handle.refine()


class GatheredParameters:
    """Inside, partitioned parameters are whole; afterwards they are released again. Collective, entering and leaving.

    Contexts may be nested, also over the same parameters, and may stay open while a generator yields. One inside another
    with the same parameters and modifier does nothing, so that not every rank needs to open it. Views taken inside
    stay valid afterwards. Persistent parameters, and what a running module needs, stay whole. After an exception inside, the
    values are as before.

    Args:
        params: a parameter, or any iterable of parameters, tensors and None; what is not partitioned is left alone.
        modifier_rank: whose changes to keep: the values of that rank (of the group that shares the parameters) go to all
            shards, and to the fp32 master weights where they differ. None: nothing may change; in-place operations raise
            when the context ends (writes through ``.data`` are not seen, and lost).
        fwd_module: a module that uses the parameters in its forward: they are registered as its external parameters.
        enabled: False makes the context do nothing.

    Raises:
        RuntimeError: on leaving, if a parameter was modified without ``modifier_rank``; it names the parameter.
        ValueError: on leaving, if the modifier's parameter has another shape than before.
        TypeError: ``params`` has modules or pairs of names and parameters in it.
    """

    by_hand = True
    """As a reason to hold a parameter: users have it in their hands."""

    def __init__(
        self,
        params: torch.Tensor | Iterable[torch.Tensor | None] | None,
        modifier_rank: int | None = None,
        fwd_module: torch.nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        self.enabled = enabled
        given = [params] if isinstance(params, torch.Tensor) or params is None else list(params)
        for wrong in given:
            if isinstance(wrong, (torch.nn.Module, tuple)):
                raise TypeError(
                    f"GatheredParameters takes parameters, and was given a {type(wrong).__name__}: pass "
                    "module.parameters(), not a module or named_parameters()"
                )
        self.params = [p for p in given if p is not None]
        self.src_rank = modifier_rank
        self.fwd_module = fwd_module
        self._handles: list[ParamHandle] = []
        self._versions: dict[int, int] = {}
        self._kept: set[int] = set()
        self._private: set[int] = set()
        """Shown as copies of this context's own."""

    def __enter__(self) -> None:
        if not self.enabled:
            return
        # In the order of their making, which is the same on all ranks; that of a set is not.
        self._handles = sorted(handles_of(self.params), key=lambda handle: handle.id)
        if self.fwd_module is not None:
            for handle in self._handles:
                register_external_parameter(self.fwd_module, handle.param)
        self._kept = {handle.id for handle in self._handles if handle.available or handle.in_flight}
        with unwatched():
            gather_exactly(self._handles)
            for handle in self._handles:
                # Edits may have to get lost, but what is whole already, or the only copy, is in use elsewhere.
                shown = handle.id in self._kept or handle.alone
                if shown and not handle.holds and handle.numel:
                    self._private.add(handle.id)
                    handle.detach_copy()
                handle.holds[self] = 1
                self._versions[handle.id] = handle.param._version

    def __str__(self) -> str:
        return "GatheredParameters"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.enabled:
            return
        edited = [handle for handle in self._handles if handle.param._version != self._versions[handle.id]]
        try:
            if self.src_rank is not None and error is None:
                with unwatched(), torch.no_grad():
                    self._share()
        finally:
            self._let_go()
        if self.src_rank is None and error is None:
            lost = [handle for handle in edited if not _modifiers(handle)]
            for handle in lost:
                _noted(handle)
            if lost:
                raise RuntimeError(
                    f"{', '.join(h.label for h in lost[:5])} {'was' if len(lost) == 1 else 'were'} modified inside "
                    "GatheredParameters without modifier_rank, and the change is lost: pass modifier_rank=0 to keep "
                    "rank 0's values"
                )

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.holds.pop(self, None)
            if handle.id in self._private and not _modifiers(handle):
                handle.show_again()
            if handle.id not in self._kept and not handle.holds and not handle.persistent:
                handle.release(by_hand=True)
        self._handles, self._private = [], set()

    def _share(self) -> None:
        """The modifier's values become everyone's."""
        wrong: list[str] = []
        for handle in self._handles:
            if any(context.src_rank == self.src_rank for context in _contexts(handle) if context is not self):
                continue  # it is for that context to do; clients open this one on the modifier alone
            data = handle.param.data
            if data.shape != handle.shape:
                wrong.append(
                    f"{handle.label} of shape {tuple(handle.shape)} was given data of shape {tuple(data.shape)}"
                )
                data = handle.full[: handle.numel]  # the others wait for values
            if handle.numel:
                self._share_one(handle, data.detach().reshape(-1).to(handle.full))
            weights_written(handle.param)
            if any(handle.id in context._private for context in _contexts(handle)):
                handle.detach_copy()
            _noted(handle)
        if wrong:
            raise ValueError(
                f"{'; '.join(wrong)} inside GatheredParameters: a partitioned parameter keeps its shape, and its values "
                "are as before. Put a new parameter into the module instead"
            )

    def _share_one(self, handle: ParamHandle, flat: torch.Tensor) -> None:
        before_change()
        transport, root = handle.transport, int(self.src_rank or 0)
        # With MiCS the modifier is one rank of one of several blocks that hold the same.
        block_rank, block = root % transport.world_size, root // transport.world_size
        stays = handle.id in self._kept or handle.persistent or len(handle.holds) > 1
        if transport.world_size > 1 and not stays:
            shard = handle.shard
            transport.scatter(flat if transport.rank == block_rank else None, shard, root=block_rank)
            transport.replicate(shard, block)
            handle.store(shard)
            return
        if transport.replicas is not None:
            dist.broadcast(flat, src=root)
        elif transport.world_size > 1:
            dist.broadcast(flat, src=transport.global_rank(root), group=transport.group)
        if handle.full.data_ptr() != flat.data_ptr():
            handle.full[: handle.numel].copy_(flat)
        handle.show_again()
        handle.write_back()


def _contexts(handle: ParamHandle) -> list[GatheredParameters]:
    """Those over the parameter that are open."""
    return [hold for hold in handle.holds if isinstance(hold, GatheredParameters)]


def _modifiers(handle: ParamHandle) -> list[GatheredParameters]:
    """Open contexts that will keep changes of the parameter."""
    return [context for context in _contexts(handle) if context.src_rank is not None]


def _noted(handle: ParamHandle) -> None:
    """The changes so far are no outer context's business."""
    for context in _contexts(handle):
        context._versions[handle.id] = handle.param._version


# -- external parameters -----------------------------------------------------------------------------------------------


def register_external_parameter(module: torch.nn.Module, parameter: torch.nn.Parameter) -> None:
    """Makes ``parameter`` whole during the forward and backward of ``module``, which does not own it.

    Raises:
        RuntimeError: ``parameter`` is not a ``torch.nn.Parameter``.
    """
    if not isinstance(parameter, torch.nn.Parameter):
        raise RuntimeError("Parameter is not a torch.nn.Parameter")
    externals = module.__dict__.setdefault("_external_params", {})
    key = getattr(parameter, "ds_id", id(parameter))
    if externals.get(key) is parameter:
        return
    externals[key] = parameter
    coordinator = coordinator_of(module)
    if coordinator is not None:
        coordinator.externals_changed(module)


def unregister_external_parameter(module: torch.nn.Module, parameter: torch.nn.Parameter) -> None:
    """Undoes :func:`register_external_parameter`.

    Raises:
        RuntimeError: the parameter is not registered with the module.
    """
    externals = module.__dict__.get("_external_params", {})
    found = [key for key, value in externals.items() if value is parameter]
    if not found:
        raise RuntimeError("the parameter is not registered with this module")
    for key in found:
        del externals[key]
    coordinator = coordinator_of(module)
    if coordinator is not None:
        coordinator.externals_changed(module)
