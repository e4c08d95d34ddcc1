"""Leaf modules: modules that ZeRO-3 gathers and releases as one, together with all their children.

Marking suits modules whose children run in an order that depends on the data, such as the experts of a mixture: ranks
then agree on the gathers, whichever children each of them uses. It also saves gathers where modules have many small
children. A mark is the attribute ``_z3_leaf`` of the module; mark before ``deepspeed.initialize``. Nothing here is
collective. The marks have no effect below stage 3.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from deepspeed.utils.logging import warning_once

if TYPE_CHECKING:
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig

__all__ = [
    "apply_zero_leaf_module_config",
    "get_z3_leaf_modules",
    "set_z3_leaf_module",
    "set_z3_leaf_modules",
    "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix",
    "unset_z3_leaf_modules",
    "unset_z3_leaf_modules_by_name",
    "unset_z3_leaf_modules_by_suffix",
    "z3_leaf_module",
    "z3_leaf_parameter",
]

LeafClass: TypeAlias = "type[nn.Module] | str"


def z3_leaf_module(module: nn.Module) -> bool:
    """Whether the module is marked. The children of a leaf are not, unless they are leaves themselves."""
    return bool(getattr(module, "_z3_leaf", False))


def z3_leaf_parameter(param: nn.Parameter) -> bool:
    """Whether the parameter belongs to a leaf module or one of its children, as of when the leaf was marked.

    ``param.ds_z3_leaf_module`` is that module; of leaves inside each other, the outermost.
    """
    return hasattr(param, "ds_z3_leaf_module")


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """The marked modules among ``model`` and all below it, parents first."""
    return [module for module in model.modules() if z3_leaf_module(module)]


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Marks this one module as a leaf, or takes the mark off."""
    model._z3_leaf = bool(flag)  # type: ignore[assignment]
    if flag:
        _claim_parameters(model)
        return
    for param in model.parameters():
        if getattr(param, "ds_z3_leaf_module", None) is model:
            del param.ds_z3_leaf_module  # type: ignore[attr-defined]
    for inner in reversed(get_z3_leaf_modules(model)):
        _claim_parameters(inner)


def _claim_parameters(leaf: nn.Module) -> None:
    """Parameters remember their outermost leaf."""
    inside: dict[int, bool] = {}  # by leaf, whether it holds this one
    for param in leaf.parameters():
        other = getattr(param, "ds_z3_leaf_module", None)
        if other is not None and id(other) not in inside:
            inside[id(other)] = any(module is leaf for module in other.modules())
        if other is None or not inside[id(other)]:
            param.ds_z3_leaf_module = leaf  # type: ignore[attr-defined]


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[LeafClass] | LeafClass, raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Marks all modules of the given classes, among ``model`` and all below it, as leaves and returns them.

    A class is given as such or by name, plain (``"MixtralSparseMoeBlock"``) or with its module path; instances of its
    subclasses count. With ``raise_if_not_found``, raises ``ValueError`` if there is no such module at all, and warns of
    single classes that have none.
    """
    return _change(model, _BY_CLASS, _classes(leaf_module_classes), True, raise_if_not_found)


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[LeafClass] | LeafClass, raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Takes the marks off all modules of the given classes; see :func:`set_z3_leaf_modules`."""
    return _change(model, _BY_CLASS, _classes(leaf_module_classes), False, raise_if_not_found)


def set_z3_leaf_modules_by_name(
    model: nn.Module, names: Iterable[str] | str, raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Marks the modules with exactly these paths, as in ``model.named_modules()``; see :func:`set_z3_leaf_modules`."""
    return _change(model, _BY_NAME, _strings(names), True, raise_if_not_found)


def unset_z3_leaf_modules_by_name(
    model: nn.Module, names: Iterable[str] | str, raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Takes the marks off the modules with exactly these paths."""
    return _change(model, _BY_NAME, _strings(names), False, raise_if_not_found)


def set_z3_leaf_modules_by_suffix(
    model: nn.Module, suffixes: Iterable[str] | str, raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Marks the modules whose paths end so, at any character (``"moe"`` finds ``layers.0.sparse_moe`` too; ``".moe"`` does
    not); see :func:`set_z3_leaf_modules`."""
    return _change(model, _BY_SUFFIX, _strings(suffixes), True, raise_if_not_found)


def unset_z3_leaf_modules_by_suffix(
    model: nn.Module, suffixes: Iterable[str] | str, raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Takes the marks off the modules whose paths end so."""
    return _change(model, _BY_SUFFIX, _strings(suffixes), False, raise_if_not_found)


def apply_zero_leaf_module_config(model: nn.Module, config: DeepSpeedZeroLeafModuleConfig) -> list[nn.Module]:
    """Marks what ``zero_optimization.leaf_module`` names and returns the marked modules.

    Entries that the user gave and that fit no module are warned of, once; the default classes are known mixtures of
    experts, which most models do not have.
    """
    place = config.place
    entries: list[tuple[_Kind, Sequence[LeafClass], str]] = [
        (_BY_CLASS, config.classes, "classes"),
        (_BY_NAME, config.names, "names"),
        (_BY_SUFFIX, config.name_suffixes, "name_suffixes"),
    ]
    found: dict[int, nn.Module] = {}
    for kind, wanted, key in entries:
        modules, missing = _find(model, kind, wanted)
        if key in config.model_fields_set:
            for item in missing:
                warning_once(f"{place}.{key}: {_not_found(model, kind, [item])}")
        found.update((id(module), module) for module in modules)
    leaves = [module for module in model.modules() if id(module) in found]
    for module in leaves:
        set_z3_leaf_module(module, True)
    return leaves


@dataclass(frozen=True)
class _Kind:
    """A way of naming modules: the word for it, whether an entry fits a module, and what entries would fit a module."""

    word: str
    fits: Callable[[Any, str, nn.Module], bool]
    names: Callable[[str, nn.Module], Iterable[str]]


def _class_names(cls: type) -> tuple[str, str]:
    return cls.__name__, f"{cls.__module__}.{cls.__qualname__}"


def _is_of_class(wanted: LeafClass, path: str, module: nn.Module) -> bool:
    if isinstance(wanted, str):
        return any(wanted in _class_names(cls) for cls in type(module).__mro__)
    return isinstance(module, wanted)


_BY_CLASS = _Kind("class", _is_of_class, lambda path, module: _class_names(type(module)))
_BY_NAME = _Kind("name", lambda wanted, path, module: path == wanted, lambda path, module: [path])
_BY_SUFFIX = _Kind(
    "name suffix", lambda wanted, path, module: path.endswith(wanted), lambda path, module: [path.rpartition(".")[2]]
)


def _classes(given: Iterable[LeafClass] | LeafClass) -> list[LeafClass]:
    classes = [given] if isinstance(given, (str, type)) else list(given)
    for item in classes:
        if not (isinstance(item, str) or (isinstance(item, type) and issubclass(item, nn.Module))):
            raise TypeError(f"leaf_module_classes: expected subclasses of torch.nn.Module or their names, got {item!r}")
    return classes


def _strings(given: Iterable[str] | str) -> list[str]:
    strings = [given] if isinstance(given, str) else list(given)
    for item in strings:
        if not isinstance(item, str):
            raise TypeError(f"expected paths of modules, as in model.named_modules(), got {item!r}")
    return strings


def _find(model: nn.Module, kind: _Kind, wanted: Sequence[LeafClass]) -> tuple[list[nn.Module], list[LeafClass]]:
    """The modules that an entry fits, parents first, and the entries that fit none."""
    if kind is _BY_SUFFIX and "" in wanted:
        raise ValueError("a name suffix is empty, which would fit every module; give the end of a module's path")
    found: dict[int, nn.Module] = {}
    used: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):  # a shared module has several paths
        fitting = [number for number, item in enumerate(wanted) if kind.fits(item, path, module)]
        used.update(fitting)
        if fitting:
            found[id(module)] = module
    return list(found.values()), [item for number, item in enumerate(wanted) if number not in used]


def _change(
    model: nn.Module, kind: _Kind, wanted: Sequence[LeafClass], flag: bool, raise_if_not_found: bool
) -> list[nn.Module]:
    found, missing = _find(model, kind, wanted)
    if missing and raise_if_not_found:
        if not found:
            raise ValueError(f"{_not_found(model, kind, missing)} (raise_if_not_found=False accepts that)")
        warning_once(_not_found(model, kind, missing))
    for module in found:
        set_z3_leaf_module(module, flag)
    return found


def _not_found(model: nn.Module, kind: _Kind, missing: Sequence[LeafClass]) -> str:
    words = [item if isinstance(item, str) else item.__name__ for item in missing]
    there = list(dict.fromkeys(name for path, module in model.named_modules() for name in kind.names(path, module)))
    near = list(dict.fromkeys(match for word in words for match in difflib.get_close_matches(word, there, n=1)))
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{type(model).__name__} has no module with the {kind.word} {', '.join(words)}{hint}"
