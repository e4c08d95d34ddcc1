"""ZeRO: ``deepspeed.zero``."""

from deepspeed._core.lazy import attach

_PARTITION = "deepspeed.runtime.zero.partition_parameters:"
_TILING = "deepspeed.runtime.zero.tiling:"

__getattr__, __dir__ = attach(
    __name__,
    (
        "config",
        "estimate",
        "offload_config",
        "parameter_offload",
        "partition_parameters",
        "stage3",
        "stage_1_and_2",
        "tiling",
        "topology",
    ),
    {
        "GatheredParameters": _PARTITION + "GatheredParameters",
        "Init": _PARTITION + "Init",
        "MiCS_Init": _PARTITION + "MiCS_Init",
        "TiledLinear": _TILING + "TiledLinear",
        "TiledLinearReturnBias": _TILING + "TiledLinearReturnBias",
        "register_external_parameter": _PARTITION + "register_external_parameter",
        "unregister_external_parameter": _PARTITION + "unregister_external_parameter",
        "ZeroParamStatus": _PARTITION + "ZeroParamStatus",
        "DeepSpeedZeroConfig": "deepspeed.runtime.zero.config:DeepSpeedZeroConfig",
        "ZeroStageEnum": "deepspeed.runtime.zero.config:ZeroStageEnum",
    },
)
