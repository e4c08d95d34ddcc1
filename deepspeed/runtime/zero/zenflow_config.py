"""``zero_optimization.zenflow``: asynchronous updates of the less important gradients."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator

from deepspeed.runtime.config_types import Bool, Fraction, NonNegInt, as_int
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, key

__all__ = ["ZenFlowConfig"]


def _interval(value: object) -> object:
    return value if value == "auto" else as_int(value)


Interval = Annotated[int | Literal["auto"], BeforeValidator(_interval)]


class ZenFlowConfig(DeepSpeedConfigModel):
    """ZenFlow: important gradient columns are updated at once on the device, the rest later on the CPU."""

    place: ClassVar[str] = "zero_optimization.zenflow"

    topk_ratio: Fraction = key(0.1, "Share of gradient columns that count as important.", since="0.17.5")
    select_strategy: Literal["auto", "step", "epoch"] = key("auto", "When columns are selected again.", since="0.17.5")
    select_interval: Interval = key("auto", "Steps or epochs between selections, or auto.", since="0.17.5")
    update_interval: Interval = key(
        "auto", "Steps between updates of the unimportant columns, or auto.", since="0.17.5"
    )
    overlap_step: Bool = key(False, "Overlap the CPU step with device work.", since="0.17.5")
    offload: Bool = key(False, "Offload the selective optimizer states.", since="0.17.5")
    auto_ratio: Fraction = key(0.99, "Threshold of the automatic intervals.", since="0.17.5")
    full_warm_up_rounds: NonNegInt = key(0, "Full updates at the start.", since="0.17.5")
    pt_reserved_cores_perc: Fraction = key(0.5, "Share of the cores kept for torch threads.", since="0.17.5")
    steps_per_epoch: NonNegInt | None = key(None, "Internal; not for users.", since="0.17.5")
