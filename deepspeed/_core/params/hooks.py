"""How the lifecycle sees a model run: hooks on modules and on their inputs and outputs, and a guard on attribute access.

[Note: hooks on outputs] The gradient of a module's output tells that its backward begins. A hook on a view is lost when an
in-place operation follows, so that views carry theirs on the base, too. Full backward hooks of modules would turn
outputs into views and make in-place operations on them fail.

[Note: kept tensors] A module may also keep a tensor (an auxiliary loss) as an attribute of itself, or put it into a list
that it was given; from there a gradient comes back before that of any output, or alone. Such tensors are watched as
outputs are.

[Note: frozen parameters] They have no accumulation that would end their use. When all gradients of a call's inputs and
of the trainable parameters in its unit are there, none of its operations is left.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from deepspeed._core.params.calls import Call
from deepspeed._core.params.handle import ParamHandle, handle_of, handles_of
from deepspeed._core.params.lifecycle import Coordinator
from deepspeed._core.params.units import Unit, UnitLimits, find_units
from deepspeed.utils.logging import warning_once

__all__ = ["ModelHooks", "coordinator_of", "tensors_in"]

_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size, torch.nn.Module)
_UNCHANGING = (torch.Tensor, tuple, *_PLAIN)
_MAX_DEPTH = 6


class GuardedParameters(dict):  # type: ignore[type-arg]
    """A module's ``_parameters`` that notices when a running module reads a parameter; copies are plain dicts."""

    coordinator: weakref.ref[Coordinator]

    def __getitem__(self, key: str) -> Any:
        param = dict.__getitem__(self, key)
        coordinator = self.coordinator()
        if coordinator is not None and coordinator.running:
            handle = handle_of(param)
            if handle is not None and not handle.persistent:
                coordinator.touch(handle)
        return param

    def __reduce__(self) -> Any:
        return dict, (dict(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        import copy  # noqa: PLC0415 (rarely called)

        return {key: copy.deepcopy(value, memo) for key, value in self.items()}


# Who hooks a module now; the latest wins.
_hooked: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[ModelHooks]] = weakref.WeakKeyDictionary()


def coordinator_of(module: torch.nn.Module) -> ModelHooks | None:
    """The hooks on the model that the module belongs to, if any."""
    known = _hooked.get(module)
    return known() if known is not None else None


class ModelHooks:
    """The hooks of one model, put there by :meth:`attach` and removed by :meth:`detach`."""

    def __init__(self, root: torch.nn.Module, coordinator: Coordinator, limits: UnitLimits) -> None:
        self.root = root
        self.coordinator = coordinator
        self.limits = limits
        self.forward_hooks: list[RemovableHandle] = []
        self.backward_hooks: list[RemovableHandle] = []
        self._guarded: list[torch.nn.Module] = []
        self._units: dict[int, Unit] = {}

    def attach(self) -> None:
        """Finds the units and hooks their modules; replaces what was attached before."""
        self.detach()
        coordinator = self.coordinator
        coordinator.units = []
        for module in self.root.modules():
            before = coordinator_of(module)
            if before is not None and before is not self:
                before.detach()
            _hooked[module] = weakref.ref(self)
            module.ds_external_parameters = types.MethodType(_external_parameters, module)  # type: ignore[assignment]
        for path, module, whole in find_units(self.root, self.limits):
            unit = self._make_unit(path, module, whole, None)
            if module is self.root or unit.handles or unit.externals:
                self._hook(module, unit)
            if whole:
                for inner_path, inner in module.named_modules():
                    if inner is not module and id(inner) not in self._units:
                        part = self._make_unit(f"{path}.{inner_path}", inner, False, unit)
                        if part.handles or part.externals:
                            self._hook(inner, part)
        coordinator.forget_plan()
        for module in self.root.modules():
            handles = handles_of(module._parameters.values())
            if any(not handle.persistent for handle in handles):
                self._guard(module)
        for handle in coordinator.handles:
            if handle.param.requires_grad:
                self.backward_hooks.append(
                    handle.param.register_post_accumulate_grad_hook(_gradient_hook(self, handle))
                )

    def detach(self) -> None:
        """Removes all hooks and guards. Idempotent."""
        for hook in self.forward_hooks + self.backward_hooks:
            hook.remove()
        self.forward_hooks, self.backward_hooks = [], []
        for module in self._guarded:
            if isinstance(module._parameters, GuardedParameters):
                module.__dict__["_parameters"] = dict(module._parameters)
        self._guarded = []
        self._units = {}

    def release_persistent(self) -> None:
        """Releases persistent parameters, too; the next module that wants one brings all of them back."""
        coordinator = self.coordinator
        coordinator.release_all()
        for handle in coordinator.handles:
            if handle.persistent and not handle.holds:
                handle.release()
        watching: list[RemovableHandle] = []

        def bring_back(*_: Any) -> None:
            while watching:
                watching.pop().remove()
            coordinator.refresh_persistent()

        for module in self.root.modules():
            if any(handle.persistent for handle in handles_of(module.parameters(recurse=False))):
                watching.append(module.register_forward_pre_hook(_no_compile(bring_back), prepend=True))

    def externals_changed(self, module: torch.nn.Module) -> None:
        """Takes the module's external parameters anew, at once if it runs now. Collective then."""
        wanted = handles_of(module.__dict__.get("_external_params", {}).values())
        unit = self._units.get(id(module))
        if unit is None:
            name = next((path for path, known in self.root.named_modules() if known is module), "")
            unit = self._make_unit(name, module, False, None)
            self._hook(module, unit)
        unit.externals = {handle.id: handle for handle in wanted}
        if self.coordinator.running:
            for handle in wanted:
                self.coordinator.touch(handle)

    def _make_unit(self, path: str, module: torch.nn.Module, whole: bool, parent: Unit | None) -> Unit:
        own = handles_of(module.parameters(recurse=whole))
        members = [h for h in own if not h.persistent]
        unit = Unit(len(self.coordinator.units), path, members, parent=parent, whole=whole)
        unit.completes = [h for h in own if h.param.requires_grad]
        unit.trainable = [h for h in handles_of(module.parameters()) if h.param.requires_grad]
        for handle in handles_of(module.__dict__.get("_external_params", {}).values()):
            unit.externals[handle.id] = handle
        self.coordinator.units.append(unit)
        return unit

    def _guard(self, module: torch.nn.Module) -> None:
        guarded = GuardedParameters(module._parameters)
        guarded.coordinator = weakref.ref(self.coordinator)
        module.__dict__["_parameters"] = guarded
        self._guarded.append(module)

    def _hook(self, module: torch.nn.Module, unit: Unit) -> None:
        self._units[id(module)] = unit
        before, after = _module_hooks(module, unit, self.coordinator, is_root=module is self.root)
        self.forward_hooks.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
        self.forward_hooks.append(module.register_forward_hook(after, always_call=True))


def _external_parameters(module: torch.nn.Module) -> Any:
    """``(key, parameter)`` of the parameters that the module uses and does not own."""
    return module.__dict__.get("_external_params", {}).items()


def _gradient_hook(hooks: ModelHooks, handle: ParamHandle) -> Callable[[torch.Tensor], None]:
    coordinator, known = weakref.ref(hooks.coordinator), weakref.ref(handle)

    def on_gradient(param: torch.Tensor) -> None:
        owner, held = coordinator(), known()
        if owner is not None and held is not None:
            owner.gradient_done(held)

    return on_gradient


def _no_compile(function: Any) -> Any:
    """``function``, neither traced nor compiled, nor what it calls. Does not import the compiler, if nobody has."""
    if "torch._dynamo" in sys.modules:
        return torch.compiler.disable(function)
    disabled: list[Any] = []

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if not disabled and "torch._dynamo" in sys.modules:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args) if disabled else function(*args)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call


def _module_hooks(
    module: torch.nn.Module, unit: Unit, owner: Coordinator, *, is_root: bool
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Plain functions, which a deepcopy of the module shares: the copy's calls are none of ours."""
    known, keeper = weakref.ref(module), weakref.ref(owner)
    calls: list[tuple[Call | None, Any]] = []

    def before(mod: torch.nn.Module, args: Any, kwargs: Any) -> None:
        coordinator = keeper()
        if known() is not mod or coordinator is None:
            return
        if unit.parent is not None and unit.parent.active:
            calls.append((None, None))
            return
        error = sys.exc_info()[1]
        if is_root:
            coordinator.begin_pass()
        try:
            call = coordinator.enter(unit)
        except BaseException:
            calls.append((None, None))
            if is_root:
                coordinator.end_pass(failed=True)
            raise
        calls.append((call, error))
        if not torch.is_grad_enabled():
            return
        call.containers = [value for value in (*args, *kwargs.values()) if not isinstance(value, _UNCHANGING)]
        call.given = {id(tensor) for tensor in tensors_in(call.containers)}
        if any(not h.param.requires_grad for h in call.handles):
            _watch_inputs(coordinator, call, args, kwargs)

    def after(mod: torch.nn.Module, args: Any, output: Any) -> None:
        coordinator = keeper()
        if known() is not mod or coordinator is None or not calls:
            return
        call, error_before = calls.pop()
        if call is None:
            return
        error = sys.exc_info()[1]
        failed = error is not None and error is not error_before
        if not failed:
            _watch_outputs(coordinator, call, output, mod)
        call.containers = []  # the hooks of what lies in them refer to the call: a cycle that nobody would collect
        coordinator.leave(call, failed=failed)
        if is_root:
            coordinator.end_pass(failed=failed)

    return _no_compile(before), _no_compile(after)


_parts = itertools.count(-1, -1)  # parameters have the other integers


def _watch_inputs(coordinator: Coordinator, call: Call, args: Any, kwargs: Any) -> None:
    call.inputs = set()
    keeper = weakref.ref(coordinator)
    seen: set[int] = set()
    for tensor in tensors_in((args, kwargs)):
        if not tensor.requires_grad or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        part = next(_parts)
        call.inputs.add(part)

        def on_gradient(_: torch.Tensor, part: int = part) -> None:
            owner = keeper()
            if owner is not None:
                owner.part_done(call, part)

        hook = tensor.register_hook(on_gradient)
        if tensor.is_leaf:  # it may outlive the graph, and be given again
            call.leaf_hooks.append(hook)


def _watch_outputs(coordinator: Coordinator, call: Call, output: Any, module: torch.nn.Module) -> None:
    if not call.handles:
        return
    keeper = weakref.ref(coordinator)

    def on_gradient(_: torch.Tensor) -> None:
        owner = keeper()
        if owner is not None:
            owner.backward_of(call)

    grad = torch.is_grad_enabled()
    unknown: list[str] = []
    addresses = {h.storage_address(): h for h in call.handles}
    seen: set[int] = set()
    for tensor in tensors_in(output, unknown):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        handle = handle_of(tensor) or addresses.get(_address(tensor))
        if handle is not None:
            coordinator.adopt_output(handle, call)
        if grad:
            _watch(tensor, on_gradient)
    if not grad:
        return
    kept = [t for t in tensors_in(call.containers) if id(t) not in call.given]
    for tensor in itertools.chain(kept, _kept_tensors(module, call.unit.whole)):
        if id(tensor) not in seen:
            _watch(tensor, on_gradient)
    if unknown:
        call.sticky = True
        warning_once(
            f"module {call.unit.name or 'at the root'} returns {unknown[0]}, in which gradients cannot be "
            "watched: its parameters stay gathered until the end of backward. Return tensors, or containers or "
            "dataclasses of them"
        )


def _watch(tensor: torch.Tensor, on_gradient: Callable[[torch.Tensor], None]) -> None:
    """Calls the function when the tensor's gradient is there, see [Note: hooks on outputs]."""
    if not tensor.requires_grad:
        return
    if not tensor.is_leaf:
        tensor.register_hook(on_gradient)
    base = tensor._base
    if base is not None and base.requires_grad and not base.is_leaf:
        base.register_hook(on_gradient)


_MODULE_KEYS = frozenset(vars(torch.nn.Module()))


def _kept_tensors(module: torch.nn.Module, whole: bool) -> Iterator[torch.Tensor]:
    """Tensors with a history that the module (``whole``: or one below it) got as attributes, each once in its life."""
    for part in module.modules() if whole else (module,):
        if type(part).__module__.startswith("torch.nn."):
            continue
        for key, value in vars(part).items():
            if key in _MODULE_KEYS:
                continue
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None and not hasattr(tensor, "_ds_kept"):
                    tensor._ds_kept = True  # type: ignore[attr-defined]
                    yield tensor


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse and other tensors without storage
        return 0


def tensors_in(value: Any, unknown: list[str] | None = None, depth: int = 0) -> Iterator[torch.Tensor]:
    """Tensors in tuples, lists, sets, mappings, dataclasses, named tuples and plain objects, to a fixed depth.

    Names of types that cannot be looked into go to ``unknown``.
    """
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, _PLAIN) or depth > _MAX_DEPTH:
        return
    elif isinstance(value, (tuple, list, set, frozenset)):
        for item in value:
            yield from tensors_in(item, unknown, depth + 1)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, unknown, depth + 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name, None), unknown, depth + 1)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        for item in list(vars(value).values()):
            yield from tensors_in(item, unknown, depth + 1)
    elif unknown is not None and not isinstance(value, type) and not callable(value):
        unknown.append(f"a {type(value).__module__}.{type(value).__qualname__}")
