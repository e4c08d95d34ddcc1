"""``data_efficiency`` and the legacy ``curriculum_learning``: which samples and tokens are trained on, and when."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator
from typing_extensions import Self

from deepspeed.errors import ConfigError
from deepspeed.runtime.config_types import Bool, Int, NonNegInt, PosInt
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, key, section

__all__ = ["DataEfficiencyConfig", "LegacyCurriculumConfig"]

Pacing = Literal["fixed_linear", "fixed_root", "fixed_discrete", "custom"]


class ScheduleConfig(DeepSpeedConfigModel):
    """Numbers of a pacing function; which ones it needs depends on the function."""

    total_curriculum_step: PosInt | None = key(None, "Steps until the largest difficulty (fixed_linear, fixed_root).")
    difficulty_step: PosInt | None = key(None, "Difficulties are multiples of this (fixed_linear, fixed_root).")
    root_degree: PosInt | None = key(None, "Degree of the root (fixed_root).")
    difficulty: list[Int] | None = key(None, "The difficulties, one after the other (fixed_discrete).")
    max_step: list[Int] | None = key(None, "Last step of each difficulty but the last one (fixed_discrete).")


class CurriculumMetricConfig(DeepSpeedConfigModel):
    """One difficulty metric of a curriculum."""

    index_to_sample_path: str | None = key(None, "Index file from metric to samples.")
    index_to_metric_path: str | None = key(None, "Index file from sample to metric.")
    difficulty_type: Literal["value", "percentile"] | None = key(None, "What the limits are measured in.")
    clustering_type: Literal["schedule_based", "single_cluster"] | None = key(None, "How samples are clustered.")
    min_difficulty: Int | None = key(None, "First limit.")
    max_difficulty: Int | None = key(None, "Last limit.")
    schedule_type: Pacing | None = key(None, "Pacing function.")
    schedule_config: ScheduleConfig = section(ScheduleConfig, "Numbers of the pacing function.")


class CurriculumLearningConfig(DeepSpeedConfigModel):
    """Curriculum over a sampled data set."""

    enabled: Bool = key(False, "Sample by difficulty.")
    data_cluster_path: str | None = key(None, "Folder of the cluster index.")
    curriculum_metrics: dict[str, CurriculumMetricConfig] | None = key(None, "One section for each metric, by name.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.enabled and not self.curriculum_metrics:
            raise ConfigError("curriculum_learning is enabled, so curriculum_metrics must name at least one metric")
        return self


class DynamicBatchingConfig(DeepSpeedConfigModel):
    """Batches of about equal token counts."""

    enabled: Bool = key(False, "Batch by tokens.", since="0.16.5")
    metrics_path: str | None = key(None, "Folder with the lengths of samples.", since="0.16.5")
    max_tokens: PosInt | None = key(None, "Tokens in a batch; required when enabled.", since="0.16.5")
    lr_scaling_method: Literal["linear", "sqrt", "none"] = key(
        "linear", "How the learning rate follows the batch size.", since="0.16.5"
    )
    min_batch_size: PosInt = key(1, "Fewest samples.", since="0.16.5")
    max_batch_size: PosInt | None = key(None, "Most samples.", since="0.16.5")
    sequence_picking_order: Literal["random", "seqlen", "dataloader"] = key(
        "dataloader", "Order in which samples join batches.", since="0.16.5"
    )
    verbose: Bool = key(False, "Log the batches.", since="0.16.5")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.enabled and self.max_tokens is None:
            raise ConfigError("dynamic_batching is enabled, so max_tokens must be given")
        return self


class DataSamplingConfig(DeepSpeedConfigModel):
    """How the loader samples."""

    enabled: Bool = key(False, "Use the sampling of the library.")
    num_epochs: PosInt = key(1000, "Most epochs.")
    num_workers: NonNegInt = key(0, "Workers of the loader.")
    pin_memory: Bool = key(False, "Page-locked memory in the loader.", since="0.16.5")
    curriculum_learning: CurriculumLearningConfig = section(CurriculumLearningConfig, "Curriculum.")
    dynamic_batching: DynamicBatchingConfig = section(DynamicBatchingConfig, "Batching by tokens.", since="0.16.5")


class RandomLtdStepsConfig(DeepSpeedConfigModel):
    """Speed of the schedule."""

    require_steps: PosInt | None = key(None, "Steps until the last length.")
    seq_per_step: PosInt | None = key(None, "Lengths are multiples of this.")


class RandomLtdScheduleConfig(DeepSpeedConfigModel):
    """Kept sequence length over time."""

    min_value: PosInt | None = key(None, "First length.")
    max_value: PosInt | None = key(None, "Last length.")
    schedule_type: Literal["fixed_linear"] = key("fixed_linear", "Pacing.")
    schedule_config: RandomLtdStepsConfig = section(RandomLtdStepsConfig, "Speed of the schedule.")


class LayerTokenLrConfig(DeepSpeedConfigModel):
    """Learning rate by layer tokens."""

    enabled: Bool = key(False, "Schedule the learning rate by layer tokens.")
    total_layer_tokens: PosInt | None = key(None, "Layer tokens of the whole run.")
    warmup_type: str | None = key(None, "Kind of warm-up.")
    warmup_layer_tokens: NonNegInt | None = key(None, "Layer tokens of the warm-up.")


class RandomLtdConfig(DeepSpeedConfigModel):
    """Random layerwise token dropping."""

    enabled: Bool = key(False, "Drop tokens in some layers.")
    total_layer_num: PosInt | None = key(None, "Layers of the model.")
    random_ltd_layer_num: NonNegInt | None = key(None, "Layers that drop tokens.")
    random_ltd_layer_id: list[NonNegInt] | None = key(None, "Which layers; as many as random_ltd_layer_num.")
    model_mask_name: str | None = key(None, "Name of the attention mask argument.")
    model_type: Literal["decoder", "encoder"] | None = key(None, "Kind of model.")
    hidden_state_order: Literal["batch_seq_dim", "seq_batch_dim"] | None = key(None, "Order of the dimensions.")
    micro_batch_size: PosInt | None = key(None, "Micro batch.")
    global_batch_size: PosInt | None = key(None, "Global batch.")
    random_ltd_schedule: RandomLtdScheduleConfig = section(RandomLtdScheduleConfig, "Length over time.")
    layer_token_lr_schedule: LayerTokenLrConfig = section(LayerTokenLrConfig, "Learning rate by layer tokens.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        ids, wanted = self.random_ltd_layer_id, self.random_ltd_layer_num
        if ids is not None and wanted is not None and len(ids) != wanted:
            raise ConfigError(f"random_ltd_layer_id lists {len(ids)} layers and random_ltd_layer_num says {wanted}")
        return self


class DataRoutingConfig(DeepSpeedConfigModel):
    """Which tokens go through which layers."""

    enabled: Bool = key(False, "Route tokens.")
    random_ltd: RandomLtdConfig = section(RandomLtdConfig, "Random layerwise token dropping.")


class DataEfficiencyConfig(DeepSpeedConfigModel):
    """Data sampling and data routing."""

    place: ClassVar[str] = "data_efficiency"

    enabled: Bool = key(False, "Turn the parts below on.")
    seed: Int = key(1234, "Seed of the sampling.")
    data_sampling: DataSamplingConfig = section(DataSamplingConfig, "How the loader samples.")
    data_routing: DataRoutingConfig = section(DataRoutingConfig, "Which tokens go through which layers.")


class LegacyCurriculumConfig(DeepSpeedConfigModel):
    """The older curriculum over sequence lengths, at the top level."""

    place: ClassVar[str] = "curriculum_learning"

    enabled: Bool = key(False, "Train on short sequences first.")
    curriculum_type: str | None = key(None, "seqlen.")
    min_difficulty: Int | None = key(None, "First length.")
    max_difficulty: Int | None = key(None, "Last length.")
    schedule_type: Pacing | None = key(None, "Pacing function.")
    schedule_config: ScheduleConfig = section(ScheduleConfig, "Numbers of the pacing function.")
