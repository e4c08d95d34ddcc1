"""Utilities; submodules load when first used."""

from deepspeed._core.lazy import attach

_FRAGMENT = "deepspeed.utils.tensor_fragment:"
_LEAF = "deepspeed.utils.z3_leaf_module:"
_LOGGING = "deepspeed.utils.logging:"

__getattr__, __dir__ = attach(
    __name__,
    ("groups", "logging", "tensor_fragment", "z3_leaf_module", "zero_to_fp32"),
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
        # The function z3_leaf_module is not here: its name is that of the submodule.
        **{
            name: _LEAF + name
            for name in (
                "apply_zero_leaf_module_config",
                "get_z3_leaf_modules",
                "set_z3_leaf_module",
                "set_z3_leaf_modules",
                "set_z3_leaf_modules_by_name",
                "set_z3_leaf_modules_by_suffix",
                "unset_z3_leaf_modules",
                "unset_z3_leaf_modules_by_name",
                "unset_z3_leaf_modules_by_suffix",
                "z3_leaf_parameter",
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
