"""Utilities; submodules load when first used."""

from deepspeed._core.lazy import attach

_FRAGMENT = "deepspeed.utils.tensor_fragment:"
_LOGGING = "deepspeed.utils.logging:"

__getattr__, __dir__ = attach(
    __name__,
    ("groups", "logging", "tensor_fragment", "zero_to_fp32"),
    {
        **{
            name: _FRAGMENT + name
            for name in (
                "safe_get_full_fp32_param",
                "safe_get_full_grad",
                "safe_get_full_optimizer_state",
                "safe_get_local_fp32_param",
                "safe_get_local_grad",
                "safe_get_local_optimizer_state",
                "safe_set_full_fp32_param",
                "safe_set_full_grad",
                "safe_set_full_optimizer_state",
                "safe_set_local_fp32_param",
                "safe_set_local_grad",
                "safe_set_local_optimizer_state",
            )
        },
        "logger": _LOGGING + "logger",
        "log_dist": _LOGGING + "log_dist",
        "set_log_level_from_string": _LOGGING + "set_log_level_from_string",
        "warning_once": _LOGGING + "warning_once",
        "is_initialized": "deepspeed.comm:is_initialized",
        "RepeatingLoader": "deepspeed.runtime.dataloader:RepeatingLoader",
    },
)
