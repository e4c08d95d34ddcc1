"""Learning-rate schedules of the config key ``scheduler`` (API documentation, chapter 10).

[Note: the step index]
``n = last_batch_iteration`` is -1 before the first ``step()`` and 0 after it; ``step(k)`` sets ``n = k``. The rates of
step index n are a pure function of n and the constructor's arguments, so the state of a schedule is n alone. The
constructor already writes the initial rates into the optimizer, since the first update happens before the first
``step()``; ``load_state_dict`` writes those of the loaded index.

A schedule drives anything that has ``param_groups``: a torch optimizer or a wrapper around one. None is collective.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from deepspeed.errors import CheckpointError, ConfigError
from deepspeed.utils.logging import log_dist, logger, warning_once

__all__ = [
    "VALID_LR_SCHEDULES",
    "LRRangeTest",
    "OneCycle",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "add_tuning_arguments",
    "build_scheduler",
    "get_config_from_args",
    "get_lr_from_config",
    "parse_arguments",
]

PerGroup = float | Sequence[float]
"""One value for all param groups, or one for each."""

_BETA2 = 0.99  # OneCycle's second beta, fixed by the documented schedule


# ------------------------------------------------------------------------------------------- checks of arguments


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, but is {value!r}")
    return float(value)


def _count(name: str, value: object, minimum: int) -> int:
    number = _number(name, value)
    if number != int(number) or number < minimum:
        raise ConfigError(f"{name} must be an integer >= {minimum}, but is {value!r}")
    return int(number)


def _per_group(name: str, value: object, groups: int) -> list[float]:
    if isinstance(value, (list, tuple)):
        if len(value) != groups:
            raise ConfigError(f"{name} has {len(value)} values, but the optimizer has {groups} param groups")
        return [_number(name, v) for v in value]
    return [_number(name, value)] * groups


def _warmup_kind(kind: object) -> str:
    if kind in ("log", "linear"):
        return str(kind)
    warning_once(f"warmup_type {kind!r} is unknown ('log' and 'linear' are known); 'log' is used")
    return "log"


class _Schedule:
    """Index, writing of rates, and state; subclasses give the rates as a function of the index.

    Subclasses set their own attributes first and call :meth:`_start` last.
    """

    def __init__(self, optimizer: Any, last_batch_iteration: int) -> None:
        if not isinstance(getattr(optimizer, "param_groups", None), (list, tuple)):
            raise TypeError(
                f"{type(self).__name__} needs an optimizer, or a wrapper with `param_groups`; got {type(optimizer)}"
            )
        self.optimizer = optimizer
        self.last_batch_iteration = _count("last_batch_iteration", last_batch_iteration, -1)

    def _start(self) -> None:
        self._write()

    def _group_lrs(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def _lrs(self, n: int) -> list[float]:
        """The rates, one a param group, at step index ``n`` >= -1."""
        raise AssertionError(f"{type(self).__name__} does not define its rates; please report this")

    def _write(self) -> None:
        """Writes what belongs to the current index into the optimizer."""
        self._last_lr = self._lrs(self.last_batch_iteration)
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)  # a rate held in a tensor is captured by graphs: keep the object
            else:
                group["lr"] = lr

    def get_lr(self) -> list[float]:
        """The rates of the current index by the formula, one a param group; before the first step the initial ones."""
        return self._lrs(self.last_batch_iteration)

    def get_last_lr(self) -> list[float]:
        """The rates written last, one a param group; before the first step the initial ones."""
        return list(self._last_lr)

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Moves to the next index, or to the given one (>= 0), and writes its rates into the optimizer."""
        if last_batch_iteration is None:
            self.last_batch_iteration += 1
        else:
            self.last_batch_iteration = _count("last_batch_iteration", last_batch_iteration, 0)
        self._write()

    def print_lr(self, is_verbose: bool, group: int, lr: float, epoch: int | None = None) -> None:
        """Logs the rate of a group if ``is_verbose``; the signature is that of torch's older schedulers."""
        if is_verbose:
            where = "" if epoch is None else f"Epoch {epoch}: "
            log_dist(f"{where}adjusting learning rate of group {group} to {lr:.4e}.")

    def state_dict(self) -> dict[str, int]:
        """``{"last_batch_iteration": n}``: all that a schedule remembers."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, sd: Mapping[str, Any]) -> None:
        """Continues at the saved index and writes its rates. Raises ``CheckpointError`` if the index is missing."""
        if "last_batch_iteration" not in sd:
            raise CheckpointError(
                f"the state of {type(self).__name__} must have 'last_batch_iteration', but has {sorted(sd)}; "
                "it was saved by another kind of scheduler"
            )
        self.last_batch_iteration = _count("last_batch_iteration", sd["last_batch_iteration"], -1)
        self._write()


class LRRangeTest(_Schedule):
    """Learning-rate range test (Smith 2018, https://arxiv.org/abs/1803.09820): grows the rate until training diverges.

    ``lr = min_lr * (1 + step_rate * u)`` with ``u = (n + 1) / step_size``, rounded down with ``staircase``.

    Args:
        optimizer: anything with ``param_groups``.
        lr_range_test_min_lr: initial rate; one value or one a param group.
        lr_range_test_step_size: steps of an interval, >= 1.
        lr_range_test_step_rate: growth of the rate an interval, in units of the initial rate.
        lr_range_test_staircase: grow at the end of intervals only.
        last_batch_iteration: index to continue at; -1 for the beginning.
    """

    def __init__(
        self,
        optimizer: Any,
        lr_range_test_min_lr: PerGroup = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.min_lr = _per_group("lr_range_test_min_lr", lr_range_test_min_lr, len(optimizer.param_groups))
        self.step_size = _count("lr_range_test_step_size", lr_range_test_step_size, 1)
        self.step_rate = _number("lr_range_test_step_rate", lr_range_test_step_rate)
        self.staircase = bool(lr_range_test_staircase)
        self._start()

    def _lrs(self, n: int) -> list[float]:
        u = (n + 1) / self.step_size
        if self.staircase:
            u = float(math.floor(u))
        return [lr * (1.0 + self.step_rate * u) for lr in self.min_lr]


class OneCycle(_Schedule):
    """One cycle (Smith 2018, https://arxiv.org/abs/1803.09820): the rate goes up and down once, then decays.

    With ``cycle_momentum`` the first beta moves against the rate, down and up, and the second is 0.99; this needs an
    optimizer whose groups have ``betas`` and is off, with a warning, otherwise.

    Args:
        optimizer: anything with ``param_groups``.
        cycle_min_lr: rate at both ends of the cycle; one value or one a param group.
        cycle_max_lr: rate at its top; likewise.
        decay_lr_rate: after the cycle, ``lr = min / (1 + decay_lr_rate * d)`` with d the decay intervals since its end.
        cycle_first_step_size: steps of the rising half, >= 1.
        cycle_second_step_size: steps of the falling half, >= 0; None: as the first.
        cycle_first_stair_count: change in this many stairs in the rising half; 0 is smooth.
        cycle_second_stair_count: likewise in the falling half; None: as the first.
        decay_step_size: steps of a decay interval; 0: no decay.
        cycle_momentum: move the momentum too.
        cycle_min_mom: lowest first beta; one value or one a param group.
        cycle_max_mom: highest first beta; likewise.
        decay_mom_rate: after the cycle, ``beta1 = max * (1 + decay_mom_rate * d)``.
        last_batch_iteration: index to continue at; -1 for the beginning.
    """

    def __init__(  # the parameters of the documented signature
        self,
        optimizer: Any,
        cycle_min_lr: PerGroup,
        cycle_max_lr: PerGroup,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: PerGroup = 0.8,
        cycle_max_mom: PerGroup = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        groups = len(optimizer.param_groups)
        self.min_lrs = _per_group("cycle_min_lr", cycle_min_lr, groups)
        self.max_lrs = _per_group("cycle_max_lr", cycle_max_lr, groups)
        self.decay_lr_rate = _number("decay_lr_rate", decay_lr_rate)
        self.first_step_size = _count("cycle_first_step_size", cycle_first_step_size, 1)
        second = cycle_first_step_size if cycle_second_step_size is None else cycle_second_step_size
        self.second_step_size = _count("cycle_second_step_size", second, 0)
        self.first_stair_count = _count("cycle_first_stair_count", cycle_first_stair_count, 0)
        stairs = cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        self.second_stair_count = _count("cycle_second_stair_count", stairs, 0)
        self.total_size = self.first_step_size + self.second_step_size
        self.decay_step_size = _count("decay_step_size", decay_step_size, 0)
        self.decay_mom_rate = _number("decay_mom_rate", decay_mom_rate)
        self.cycle_momentum = bool(cycle_momentum)
        if self.cycle_momentum and not all("betas" in group for group in optimizer.param_groups):
            warning_once("OneCycle: cycle_momentum is off, because the optimizer has no 'betas'")
            self.cycle_momentum = False
        self.min_moms = _per_group("cycle_min_mom", cycle_min_mom, groups)
        self.max_moms = _per_group("cycle_max_mom", cycle_max_mom, groups)
        self._start()

    def _height(self, n: int) -> float:
        """Position between the bottom (0) and the top (1) of the cycle at index n < total_size."""
        batches = n + 1
        i = batches % self.total_size
        rising = i <= self.first_step_size
        stairs = self.first_stair_count if rising else self.second_stair_count
        if stairs > 0:
            done = (
                i * stairs // self.first_step_size
                if rising
                else (self.total_size - i) * stairs // self.second_step_size
            )
            return done / stairs
        x = 1.0 + batches / self.total_size - math.floor(1.0 + batches / self.total_size)
        r = self.first_step_size / self.total_size
        return x / r if x <= r else (x - 1.0) / (r - 1.0)

    def _decays(self, n: int) -> float:
        """Decay intervals since the end of the cycle, as a fraction, at index n >= total_size."""
        return (n - self.total_size + 1) / self.decay_step_size if self.decay_step_size else 0.0

    def _lrs(self, n: int) -> list[float]:
        if n < 0:
            return list(self.min_lrs)
        if n < self.total_size:
            k = self._height(n)
            return [low + (high - low) * k for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]
        return [low / (1.0 + self.decay_lr_rate * self._decays(n)) for low in self.min_lrs]

    def _moms(self, n: int) -> list[float]:
        """The first betas, one a param group, at index n."""
        if n < 0:
            return list(self.min_moms)
        if n < self.total_size:
            k = self._height(n)
            return [high - (high - low) * k for low, high in zip(self.min_moms, self.max_moms, strict=True)]
        return [high * (1.0 + self.decay_mom_rate * self._decays(n)) for high in self.max_moms]

    def _write(self) -> None:
        super()._write()
        if self.cycle_momentum:
            moms = self._moms(self.last_batch_iteration)
            for group, beta1 in zip(self.optimizer.param_groups, moms, strict=True):
                group["betas"] = (beta1, _BETA2)


class _Warmup(_Schedule):
    """The warm-up factor g of step index n < N: ``ln(n + 1) / ln N`` (log) or ``n / N`` (linear)."""

    def __init__(self, optimizer: Any, num_steps: object, kind: object, last_batch_iteration: int) -> None:
        super().__init__(optimizer, last_batch_iteration)
        # The formulas need N >= 2 (ln 1 = 0), so 0 and 1 mean the shortest warm-up, as documented.
        self.warmup_num_steps = max(2, _count("warmup_num_steps", num_steps, 0))
        self.warmup_type = _warmup_kind(kind)

    def _warmup_factor(self, n: int) -> float:
        if n < 0:
            return 0.0
        if self.warmup_type == "linear":
            return n / self.warmup_num_steps
        return math.log(n + 1) / math.log(self.warmup_num_steps)

    def _check_total(self, total_num_steps: object) -> int:
        total = _count("total_num_steps", total_num_steps, 0)
        if total < self.warmup_num_steps:
            logger.warning(
                "%s: total_num_steps %d is less than warmup_num_steps %d",
                type(self).__name__,
                total,
                self.warmup_num_steps,
            )
        return total


class WarmupLR(_Warmup):
    """Raises the rate from its minimum to its maximum over ``warmup_num_steps`` steps, then keeps it there.

    Args:
        optimizer: anything with ``param_groups``.
        warmup_min_lr: initial rate; one value or one a param group.
        warmup_max_lr: final rate; likewise. None: the rate that each group has now.
        warmup_num_steps: steps of the warm-up, >= 0; 0 and 1 act as 2.
        warmup_type: ``"log"`` or ``"linear"``; others warn and act as ``"log"``.
        last_batch_iteration: index to continue at; -1 for the beginning.
    """

    def __init__(
        self,
        optimizer: Any,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)
        groups = len(optimizer.param_groups)
        self.min_lrs = _per_group("warmup_min_lr", warmup_min_lr, groups)
        own = self._group_lrs() if warmup_max_lr is None else warmup_max_lr
        self.max_lrs = _per_group("warmup_max_lr", own, groups)
        self._start()

    def _factor(self, n: int) -> float:
        return self._warmup_factor(n) if n < self.warmup_num_steps else 1.0

    def _lrs(self, n: int) -> list[float]:
        g = self._factor(n)
        return [low + (high - low) * g for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]


class WarmupDecayLR(WarmupLR):
    """:class:`WarmupLR`, then a linear decay from the maximum to the minimum at ``total_num_steps``.

    Args:
        optimizer: anything with ``param_groups``.
        total_num_steps: step index at which the decay ends; less than ``warmup_num_steps`` only warns.
        warmup_min_lr: initial and final rate; one value or one a param group.
        warmup_max_lr: rate at the end of the warm-up; likewise. None: the rate that each group has now.
        warmup_num_steps: steps of the warm-up, >= 0; 0 and 1 act as 2.
        warmup_type: ``"log"`` or ``"linear"``; others warn and act as ``"log"``.
        last_batch_iteration: index to continue at; -1 for the beginning.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = _count("total_num_steps", total_num_steps, 0)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)
        self._check_total(total_num_steps)

    def _factor(self, n: int) -> float:
        if n < self.warmup_num_steps:
            return self._warmup_factor(n)
        return max(0.0, (self.total_num_steps - n) / max(1, self.total_num_steps - self.warmup_num_steps))


class WarmupCosineLR(_Warmup):
    """Raises the rate from a ratio of the group's own rate to that rate, then lowers it along a cosine.

    Args:
        optimizer: anything with ``param_groups``; the rates that the groups have now are the full rates.
        total_num_steps: step index at which the cosine ends; less than ``warmup_num_steps`` only warns.
        warmup_min_ratio: initial rate, in units of the full rate.
        warmup_num_steps: steps of the warm-up, >= 0; 0 and 1 act as 2.
        cos_min_ratio: final rate, in units of the full rate.
        warmup_type: ``"log"`` or ``"linear"``; others warn and act as ``"log"``.
        last_batch_iteration: index to continue at; -1 for the beginning.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)
        self.total_num_steps = self._check_total(total_num_steps)
        self.warmup_min_ratio = _number("warmup_min_ratio", warmup_min_ratio)
        self.cos_min_ratio = _number("cos_min_ratio", cos_min_ratio)
        self.org_lrs = self._group_lrs()
        self._start()

    def _ratio(self, n: int) -> float:
        if n < self.warmup_num_steps:
            return self.warmup_min_ratio + (1.0 - self.warmup_min_ratio) * self._warmup_factor(n)
        span = max(1, self.total_num_steps - self.warmup_num_steps)
        progress = min(1.0, (n - self.warmup_num_steps + 1) / span)
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * (1.0 + math.cos(math.pi * progress)) / 2.0)

    def _lrs(self, n: int) -> list[float]:
        # Before the first step the rate is 0 even with a warmup_min_ratio, as documented; the ratio holds from n = 0.
        q = self._ratio(n) if n >= 0 else 0.0
        return [lr * q for lr in self.org_lrs]


_SCHEDULES: dict[str, type[_Schedule]] = {
    c.__name__: c for c in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}

VALID_LR_SCHEDULES: list[str] = list(_SCHEDULES)
"""Class names of the schedules, which are also the values of ``scheduler.type`` (case matters)."""


# ---------------------------------------------------------------------------------------- config and command line


def build_scheduler(type_name: str, params: Mapping[str, Any] | None, optimizer: Any) -> _Schedule:
    """Builds the schedule of a config over ``optimizer`` (anything with ``param_groups``).

    Args:
        type_name: ``scheduler.type``, one of :data:`VALID_LR_SCHEDULES`.
        params: ``scheduler.params``: constructor arguments. Values ``"auto"`` leave the constructor's default.

    Raises:
        ConfigError: unknown type or argument, a required one that is missing, or a value out of range; it is named.
    """
    if type_name not in _SCHEDULES:
        by_lower = {n.lower(): n for n in VALID_LR_SCHEDULES}
        close = difflib.get_close_matches(str(type_name).lower(), list(by_lower), n=1)
        hint = f"; did you mean {by_lower[close[0]]}?" if close else "."
        raise ConfigError(f"scheduler.type {type_name!r} is unknown{hint} Known: {', '.join(VALID_LR_SCHEDULES)}")
    if params is not None and not isinstance(params, Mapping):
        raise ConfigError(f"scheduler.params must be a dict of constructor arguments, but is {params!r}")
    kwargs = {k: v for k, v in (params or {}).items() if not (isinstance(v, str) and v == "auto")}
    schedule = _SCHEDULES[type_name]
    known = {n: p for n, p in inspect.signature(schedule).parameters.items() if n != "optimizer"}
    for name in kwargs:
        if name not in known:
            close = difflib.get_close_matches(name, list(known), n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise ConfigError(
                f"scheduler.params.{name}: {type_name} has no such argument{hint} It takes: {', '.join(known)}"
            )
    for name, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and name not in kwargs:
            raise ConfigError(f"scheduler.params.{name} is required by {type_name}; give it a value")
    try:
        return schedule(optimizer, **kwargs)
    except ConfigError as error:
        raise ConfigError(f"scheduler {type_name} rejects its settings: scheduler.params.{error}") from error


def add_tuning_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the convergence-tuning flags, one for each schedule and argument; returns the parser."""
    group = parser.add_argument_group("Convergence Tuning", "Convergence tuning configurations")
    group.add_argument("--lr_schedule", type=str, default=None, help="schedule: " + ", ".join(VALID_LR_SCHEDULES))
    for name, (kind, default, text) in _FLAGS.items():
        group.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: {default})")
    group.add_argument("--cycle_momentum", default=False, action="store_true", help="OneCycle: cycle the momentum too")
    return parser


def parse_arguments(args: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parses the convergence-tuning flags of ``args`` (default: the command line). Returns values and other words."""
    return add_tuning_arguments(argparse.ArgumentParser()).parse_known_args(args)


def get_config_from_args(args: argparse.Namespace) -> tuple[dict[str, Any] | None, str | None]:
    """The ``scheduler`` section that the convergence-tuning flags describe, or None and the reason.

    The flags' -1 means "not given". ``total_num_steps`` has no flag.
    """
    name = getattr(args, "lr_schedule", None)
    if name is None:
        return None, "--lr_schedule is not given"
    if name not in _SCHEDULES:
        return None, f"{name!r} is not a supported LR schedule; choose one of {', '.join(VALID_LR_SCHEDULES)}"
    wanted = inspect.signature(_SCHEDULES[name]).parameters
    given = {k: v for k, v in vars(args).items() if k in wanted and not (_FLAGS.get(k, (None,))[0] is int and v < 0)}
    return {"type": name, "params": given}, None


def get_lr_from_config(config: Mapping[str, Any]) -> tuple[float | Sequence[float] | None, str]:
    """The main rate of a ``scheduler`` section: what an optimizer without an own ``lr`` can start from.

    Returns the rate and an empty text, or None and the reason why there is none.
    """
    if "type" not in config:
        return None, "the scheduler section has no 'type'"
    if "params" not in config:
        return None, "the scheduler section has no 'params'"
    name, params = config["type"], config["params"]
    if name not in _SCHEDULES:
        return None, f"{name!r} is not a supported LR schedule; choose one of {', '.join(VALID_LR_SCHEDULES)}"
    key = _MAIN_LR.get(name)
    if key is None:
        return None, f"{name} has no rate of its own; it scales the optimizer's"
    if key not in params:
        return None, f"{name} is configured without {key}"
    return params[key], ""


def _flag_bool(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


_MAIN_LR = {
    "LRRangeTest": "lr_range_test_min_lr",
    "OneCycle": "cycle_max_lr",
    "WarmupLR": "warmup_max_lr",
    "WarmupDecayLR": "warmup_max_lr",
}

# Flag -> type, default, help. -1 of an integer means "not given".
_FLAGS: dict[str, tuple[Any, Any, str]] = {
    "lr_range_test_min_lr": (float, 0.001, "LRRangeTest: initial rate"),
    "lr_range_test_step_rate": (float, 1.0, "LRRangeTest: growth of the rate an interval"),
    "lr_range_test_step_size": (int, 1000, "LRRangeTest: steps of an interval"),
    "lr_range_test_staircase": (_flag_bool, False, "LRRangeTest: grow at the end of intervals only"),
    "cycle_first_step_size": (int, 1000, "OneCycle: steps of the rising half"),
    "cycle_first_stair_count": (int, -1, "OneCycle: stairs of the rising half"),
    "cycle_second_step_size": (int, -1, "OneCycle: steps of the falling half"),
    "cycle_second_stair_count": (int, -1, "OneCycle: stairs of the falling half"),
    "decay_step_size": (int, 1000, "OneCycle: steps of a decay interval after the cycle"),
    "cycle_min_lr": (float, 0.01, "OneCycle: rate at the ends of the cycle"),
    "cycle_max_lr": (float, 0.1, "OneCycle: rate at the top of the cycle"),
    "decay_lr_rate": (float, 0.0, "OneCycle: decay of the rate an interval"),
    "cycle_min_mom": (float, 0.8, "OneCycle: lowest momentum"),
    "cycle_max_mom": (float, 0.9, "OneCycle: highest momentum"),
    "decay_mom_rate": (float, 0.0, "OneCycle: decay of the momentum an interval"),
    "warmup_min_lr": (float, 0.0, "WarmupLR, WarmupDecayLR: initial rate"),
    "warmup_max_lr": (float, 0.001, "WarmupLR, WarmupDecayLR: rate after the warm-up"),
    "warmup_num_steps": (int, 1000, "Warmup*: steps of the warm-up"),
    "warmup_type": (str, "log", "Warmup*: 'log' or 'linear'"),
    "warmup_min_ratio": (float, 0.01, "WarmupCosineLR: initial rate in units of the full rate"),
    "cos_min_ratio": (float, 0.01, "WarmupCosineLR: final rate in units of the full rate"),
}
