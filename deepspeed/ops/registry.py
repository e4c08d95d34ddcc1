"""From ``optimizer.type`` and ``optimizer.params`` of a config to an optimizer (config reference, Optimizer)."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from deepspeed.errors import ConfigError, MissingFeatureError
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.flat_optimizer import FlatOptimizer
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.utils.logging import warning_once

__all__ = ["KNOWN_OPTIMIZERS", "build_optimizer", "is_zero_tested", "take_max_grad_norm"]

Factory = Callable[..., torch.optim.Optimizer]

_MISSING = ("onebitadam", "onebitlamb", "zerooneadam", "muadam", "muadamw", "musgd", "muon")

KNOWN_OPTIMIZERS: tuple[str, ...] = ("adam", "adamw", "adagrad", "lamb", "lion", "sgd", *_MISSING)
"""Names with a meaning of their own, in lower case; every other name is looked up in ``torch.optim``."""

# Needs a closure that runs forward and backward again, which an engine's step() cannot give.
_NEED_CLOSURE = ("lbfgs",)


def build_optimizer(
    type_name: str,
    params: Mapping[str, Any] | None,
    param_groups: Iterable[Any],
    *,
    use_cpu_offload: bool = False,
) -> torch.optim.Optimizer:
    """Builds the optimizer of a config over ``param_groups`` (parameters or group dicts, kept as the same objects).

    Args:
        type_name: ``optimizer.type``. Adam, AdamW, Adagrad, Lamb, Lion, SGD in any case; or a class of ``torch.optim``.
        params: ``optimizer.params``: constructor arguments. Values ``"auto"`` leave the constructor's default. For
            Adam and AdamW also ``torch_adam`` (False; True takes ``torch.optim``'s class) and ``adam_w_mode``
            (True: decoupled weight decay, also for the type Adam; AdamW is always decoupled). ``max_grad_norm`` is
            not an argument of any of them: see :func:`take_max_grad_norm`.
        param_groups: parameters, ``(name, parameter)`` pairs, or group dicts.
        use_cpu_offload: weights and state live in host memory; picks the class that is named for it.

    Raises:
        ConfigError: unknown type or argument, or a value that the class rejects; the message names it.
        MissingFeatureError: a documented optimizer that this version does not have.
    """
    if not isinstance(type_name, str):
        raise ConfigError(f"optimizer.type must be a string such as 'AdamW', but is {type_name!r}")
    if params is not None and not isinstance(params, Mapping):
        raise ConfigError(f"optimizer.params must be a dict of constructor arguments, but is {params!r}")
    kwargs = {k: v for k, v in (params or {}).items() if not (isinstance(v, str) and v == "auto")}
    if "max_grad_norm" in kwargs:
        kwargs, _ = take_max_grad_norm(kwargs, fp16=False)
    factory, extra = _resolve(type_name, kwargs, use_cpu_offload)
    valid = [n for n in inspect.signature(factory).parameters if n not in ("params", "model_params")]
    for name in kwargs:
        if name not in valid:
            choices = sorted({*valid, *extra})
            raise ConfigError(
                f"optimizer.params.{name}: {type_name} has no such argument"
                f"{_nearest(name, choices)}. It takes: {', '.join(choices)}"
            )
    try:
        return factory(param_groups, **kwargs)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{k}={v!r}" for k, v in kwargs.items()) or "none"
        raise ConfigError(f"optimizer {type_name} rejects its settings: {error} (optimizer.params: {given})") from error


def take_max_grad_norm(params: Mapping[str, Any], *, fp16: bool) -> tuple[dict[str, Any], float | None]:
    """Takes the legacy ``max_grad_norm`` out of ``optimizer.params``. Returns the rest and the norm to clip to, if any.

    In fp16 it is honoured with a warning, as if it were ``gradient_clipping``; elsewhere it is ignored with a
    warning, as documented, and None is returned. Raises ``ConfigError`` if it is not a number >= 0.
    """
    rest = dict(params)
    value = rest.pop("max_grad_norm", None)
    if value is None or value == "auto":
        return rest, None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ConfigError(f"optimizer.params.max_grad_norm must be a number >= 0, but is {value!r}")
    if value == 0:
        return rest, None
    if fp16:
        warning_once(
            f"optimizer.params.max_grad_norm = {value} clips gradients in fp16; use the top-level gradient_clipping"
        )
        return rest, float(value)
    warning_once(
        f"optimizer.params.max_grad_norm = {value} has no effect outside fp16; use the top-level gradient_clipping"
    )
    return rest, None


def is_zero_tested(optimizer: object) -> bool:
    """True for optimizers whose update is tested on ZeRO's shards: ours, and torch's Adam and AdamW.

    Others need ``zero_allow_untested_optimizer`` when a client passes them in: an update that looks at more than one
    element at a time (norms, factored moments, orthogonalization) is wrong on a shard.
    """
    if isinstance(optimizer, FlatOptimizer):
        return True
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)


def _resolve(type_name: str, kwargs: dict[str, Any], use_cpu_offload: bool) -> tuple[Factory, tuple[str, ...]]:
    """The constructor for a type, and the config keys that it has beside its arguments. Takes these from ``kwargs``."""
    name = type_name.lower()
    if name in ("adam", "adamw"):
        return _resolve_adam(name, kwargs, use_cpu_offload), ("torch_adam", "adam_w_mode")
    if name in _MISSING:
        raise MissingFeatureError(
            f"optimizer.type {type_name!r} is documented, but this version does not have it; use Adam, AdamW, Adagrad, "
            "Lamb, Lion, SGD or a class of torch.optim"
        )
    if name == "adagrad":
        return DeepSpeedCPUAdagrad, ()
    if name == "lamb":
        return FusedLamb, ()
    if name == "lion":
        return (DeepSpeedCPULion if use_cpu_offload else FusedLion), ()
    classes = _torch_optimizers()
    found = classes.get(type_name) or {n.lower(): c for n, c in classes.items()}.get(name)
    if name in _NEED_CLOSURE:
        raise ConfigError(f"optimizer.type {type_name!r} needs a closure in step(), which the engine cannot give it")
    if found is None:
        names = sorted({*classes, "Adam", "AdamW", "Adagrad", "Lamb", "Lion", "SGD"} - {"LBFGS"})
        raise ConfigError(
            f"optimizer.type {type_name!r} is unknown{_nearest(type_name, names)}. Known: {', '.join(names)}"
        )
    return found, ()


def _resolve_adam(name: str, kwargs: dict[str, Any], use_cpu_offload: bool) -> Factory:
    torch_adam = _take_bool(kwargs, "torch_adam", False)
    decoupled = _take_bool(kwargs, "adam_w_mode", True)
    if name == "adamw" and not decoupled:
        warning_once(
            "optimizer.params.adam_w_mode = false has no effect with type AdamW; use type Adam for an L2 penalty"
        )
        decoupled = True
    if torch_adam:
        return torch.optim.AdamW if decoupled else torch.optim.Adam
    if use_cpu_offload:
        kwargs.setdefault("adamw_mode", decoupled)
        return DeepSpeedCPUAdam
    kwargs["adam_w_mode"] = decoupled
    return FusedAdam


def _take_bool(kwargs: dict[str, Any], name: str, default: bool) -> bool:
    value = kwargs.pop(name, default)
    if not isinstance(value, bool):
        raise ConfigError(f"optimizer.params.{name} must be true or false, but is {value!r}")
    return value


def _torch_optimizers() -> dict[str, Factory]:
    base = torch.optim.Optimizer
    found = {
        n: c for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, base) and c is not base
    }
    return dict(found)


def _nearest(name: str, choices: Iterable[str]) -> str:
    by_lower = {c.lower(): c for c in choices}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(by_lower[c] for c in close)}?" if close else ""
