"""ZeRO: ``deepspeed.zero``."""

from deepspeed._core.lazy import attach

_PARTITION = "deepspeed.runtime.zero.partition_parameters:"

__getattr__, __dir__ = attach(
    __name__,
    ("config", "offload_config", "partition_parameters", "stage_1_and_2"),
    {
        "GatheredParameters": _PARTITION + "GatheredParameters",
        "Init": _PARTITION + "Init",
        "ZeroParamStatus": _PARTITION + "ZeroParamStatus",
        "DeepSpeedZeroConfig": "deepspeed.runtime.zero.config:DeepSpeedZeroConfig",
        "ZeroStageEnum": "deepspeed.runtime.zero.config:ZeroStageEnum",
    },
)
