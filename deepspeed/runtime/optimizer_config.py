"""``optimizer`` and ``scheduler``: which classes, with which arguments."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, model_validator
from typing_extensions import Self

from deepspeed.errors import ConfigError
from deepspeed.runtime.config_types import Bool
from deepspeed.runtime.config_utils import AUTO, DeepSpeedConfigModel, key

__all__ = ["KNOWN_OPTIMIZERS", "KNOWN_SCHEDULERS", "OptimizerConfig", "OptimizerKeys", "SchedulerConfig"]

#: Names matched in any case; every other name is looked up in torch.optim.
KNOWN_OPTIMIZERS = (
    "adagrad",
    "adam",
    "adamw",
    "lamb",
    "onebitadam",
    "onebitlamb",
    "zerooneadam",
    "muadam",
    "muadamw",
    "musgd",
    "lion",
    "muon",
)
#: Matched exactly.
KNOWN_SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")


def _without_auto(value: Any) -> Any:
    """Constructor arguments, less those that are ``"auto"``: the constructor's own default holds there."""
    if not isinstance(value, dict):
        return value
    return {name: arg for name, arg in value.items() if not (isinstance(arg, str) and arg == AUTO)}


Params = Annotated[dict[str, Any], BeforeValidator(_without_auto)]


class OptimizerConfig(DeepSpeedConfigModel):
    """The optimizer that the engine builds when none is given to ``initialize``."""

    place: ClassVar[str] = "optimizer"

    type: str | None = key(None, "A known name in any case, or the name of a class of torch.optim.")
    params: Params = key({}, 'Arguments of the constructor; "auto" ones are left at its defaults.')
    legacy_fusion: Bool = key(False, "Older path of the fused optimizers.")

    @model_validator(mode="after")
    def _check_type(self) -> Self:
        if self.type is None and self.params:
            raise ConfigError(f"params are given but no type; known types: {', '.join(KNOWN_OPTIMIZERS)}")
        return self


class SchedulerConfig(DeepSpeedConfigModel):
    """The learning-rate schedule that the engine steps after each optimizer step."""

    place: ClassVar[str] = "scheduler"

    type: str | None = key(None, f"One of {', '.join(KNOWN_SCHEDULERS)}, spelled exactly.")
    params: Params = key({}, 'Arguments of the constructor; "auto" ones are left at its defaults.')

    @model_validator(mode="after")
    def _check_type(self) -> Self:
        if self.type is None:
            if self.params:
                raise ConfigError(f"params are given but no type; write one of {', '.join(KNOWN_SCHEDULERS)}")
        elif self.type not in KNOWN_SCHEDULERS:
            folded = {name.lower(): name for name in KNOWN_SCHEDULERS}
            near = difflib.get_close_matches(self.type.lower(), list(folded), n=1)
            meant = f"; did you mean {folded[near[0]]!r}?" if near else "."
            raise ConfigError(f"no scheduler is called {self.type!r}{meant} Known: {', '.join(KNOWN_SCHEDULERS)}")
        return self


class OptimizerKeys(DeepSpeedConfigModel):
    """Top-level keys about the optimizer and the schedule."""

    optimizer: OptimizerConfig | None = key(None, "The optimizer that the engine builds.")
    scheduler: SchedulerConfig | None = key(None, "The learning-rate schedule that the engine steps.")
    zero_allow_untested_optimizer: Bool = key(False, "Allow optimizers that were not tested with ZeRO.")
    zero_force_ds_cpu_optimizer: Bool = key(
        True, "Under CPU offload, insist on the optimizers made for the CPU; false lets any run there."
    )
