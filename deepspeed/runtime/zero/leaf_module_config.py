"""``zero_optimization.leaf_module``: modules that ZeRO-3 gathers and releases as one."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator

from deepspeed.runtime.config_utils import DeepSpeedConfigModel, key

__all__ = ["DEFAULT_LEAF_CLASSES", "DeepSpeedZeroLeafModuleConfig", "StrList"]

DEFAULT_LEAF_CLASSES = [
    "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StrList = Annotated[list[str], BeforeValidator(_as_list)]


class DeepSpeedZeroLeafModuleConfig(DeepSpeedConfigModel):
    """Which modules are leaves. A lone string is accepted where a list is expected."""

    place: ClassVar[str] = "zero_optimization.leaf_module"

    classes: StrList = key(DEFAULT_LEAF_CLASSES, "Class names, plain or with their module path.", since="0.18.0")
    names: StrList = key([], "Exact module paths inside the model.", since="0.18.0")
    name_suffixes: StrList = key([], "Endings of module paths inside the model.", since="0.18.0")
