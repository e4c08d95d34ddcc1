"""The training runtime; submodules load when first used."""

from deepspeed._core.lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    (
        "activation_checkpointing",
        "base_optimizer",
        "bf16_optimizer",
        "config",
        "config_utils",
        "dataloader",
        "engine",
        "fp16",
        "lr_schedules",
        "utils",
        "zero",
    ),
)
