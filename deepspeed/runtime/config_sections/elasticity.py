"""``elasticity``: batch sizes that fit many GPU counts."""

from __future__ import annotations

from typing import ClassVar

from pydantic import model_validator
from typing_extensions import Self

from deepspeed.errors import ConfigError
from deepspeed.runtime.config_types import Bool, Float, NonNegInt, PosInt
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, key

__all__ = ["ElasticityConfig"]


class ElasticityConfig(DeepSpeedConfigModel):
    """The batch is chosen so that many GPU counts divide it."""

    place: ClassVar[str] = "elasticity"

    enabled: Bool = key(False, "Choose batch sizes elastically.")
    max_train_batch_size: PosInt = key(2000, "Largest global batch; required when enabled.")
    micro_batch_sizes: list[PosInt] = key([2, 4, 6], "Micro batches to choose from; required when enabled.")
    min_gpus: PosInt = key(1, "Fewest GPUs.")
    max_gpus: PosInt = key(10_000, "Most GPUs.")
    min_time: NonNegInt = key(0, "Minutes the job should keep its GPUs, a hint to the scheduler; 0 = unknown.")
    prefer_larger_batch: Bool = key(True, "Prefer the larger batch.", aliases=("prefer_large_batch",))
    ignore_non_elastic_batch_info: Bool = key(False, "Override batch sizes given elsewhere; false = an error.")
    version: Float = key(0.2, "Version of the logic: 0.1 or 0.2.")
    num_gpus_per_node: PosInt = key(1, "GPUs in a node; version 0.2.")
    model_parallel_size: PosInt = key(1, "Model-parallel degree; version 0.2.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.version not in (0.1, 0.2):
            raise ConfigError(f"version is 0.1 or 0.2, got {self.version}")
        if self.max_gpus < self.min_gpus:
            raise ConfigError(f"max_gpus ({self.max_gpus}) is below min_gpus ({self.min_gpus})")
        if not self.micro_batch_sizes:
            raise ConfigError("micro_batch_sizes is empty; list at least one positive integer")
        if self.enabled:
            missing = [k for k in ("max_train_batch_size", "micro_batch_sizes") if k not in self.model_fields_set]
            if missing:
                raise ConfigError(f"elasticity is enabled, so {' and '.join(missing)} must be given")
        return self
