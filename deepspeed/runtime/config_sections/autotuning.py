"""``autotuning``: search for the fastest stage, micro batch and ZeRO settings."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, model_validator
from typing_extensions import Self

from deepspeed.errors import ConfigError
from deepspeed.runtime.config_types import Bool, NonNegInt, PosInt
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, key, section

__all__ = ["DeepSpeedAutotuningConfig", "ModelInfoConfig"]


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value  # the documents write FLOPS, the definitions flops


Metric = Annotated[Literal["latency", "throughput", "flops", "forward", "step"], BeforeValidator(_lower)]


class ModelInfoConfig(DeepSpeedConfigModel):
    """Facts about the model that the profiling run would find."""

    place: ClassVar[str] = "autotuning.model_info"

    profile: Bool = key(False, "Profile the model.")
    num_params: PosInt | None = key(None, "Parameters of the model.")
    hidden_size: PosInt | None = key(None, "Hidden size.")
    num_layers: PosInt | None = key(None, "Number of layers.")


class DeepSpeedAutotuningConfig(DeepSpeedConfigModel):
    """The search, its limits and where results go."""

    place: ClassVar[str] = "autotuning"

    enabled: Bool = key(False, "Tune instead of train.")
    fast: Bool = key(True, "Tune only the stage and the micro batch.")
    results_dir: str = key("autotuning_results", "Folder of the results.", min_length=1)
    exps_dir: str = key("autotuning_exps", "Folder of the experiments.", min_length=1)
    overwrite: Bool = key(True, "Run finished experiments again.")
    start_profile_step: NonNegInt = key(3, "First measured step.")
    end_profile_step: NonNegInt = key(5, "Last measured step.")
    metric: Metric = key("throughput", "What is compared: latency, throughput or flops.")
    metric_path: str | None = key(None, "File in which the job reports the metric.")
    tuner_type: Literal["gridsearch", "random", "model_based"] = key("gridsearch", "Order of the search.")
    tuner_early_stopping: NonNegInt = key(5, "Trials without an improvement before stopping.")
    tuner_num_trials: NonNegInt = key(50, "Most trials for each stage.")
    arg_mappings: dict[str, Any] | None = key(None, "Config key to script flag, with its dashes.")
    model_info: ModelInfoConfig = section(ModelInfoConfig, "Known facts about the model.")
    model_info_path: str | None = key(None, "File with these facts.")
    mp_size: PosInt = key(1, "Model-parallel degree.")
    max_train_batch_size: PosInt | None = key(None, "Largest global batch.")
    min_train_batch_size: PosInt = key(1, "Smallest global batch.")
    max_train_micro_batch_size_per_gpu: PosInt = key(1024, "Largest micro batch.")
    min_train_micro_batch_size_per_gpu: PosInt = key(1, "Smallest micro batch.")
    num_tuning_micro_batch_sizes: PosInt = key(3, "Micro batches tried.")

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.end_profile_step < self.start_profile_step:
            raise ConfigError(
                f"end_profile_step ({self.end_profile_step}) lies before start_profile_step ({self.start_profile_step})"
            )
        return self
