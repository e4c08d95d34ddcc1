"""The whole config document: top-level keys, section by section, and the checks between sections."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import model_validator
from typing_extensions import Self

from deepspeed.errors import ConfigError
from deepspeed.runtime.batch_config import BatchKeys
from deepspeed.runtime.comm_config import CommunicationKeys
from deepspeed.runtime.config_later import HasSectionsLater, later
from deepspeed.runtime.config_sections.aio import AioConfig
from deepspeed.runtime.config_types import Bool, NonNegInt, as_bool
from deepspeed.runtime.config_utils import ConfigReport, key, prepare, section, walk_fields
from deepspeed.runtime.logging_config import LoggingKeys
from deepspeed.runtime.optimizer_config import OptimizerKeys
from deepspeed.runtime.precision_config import (
    AmpConfig,
    BF16Config,
    DataTypesConfig,
    FP16Config,
    TorchAutocastConfig,
)
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

if TYPE_CHECKING:
    from deepspeed.runtime.activation_checkpointing.config import DeepSpeedActivationCheckpointingConfig
    from deepspeed.runtime.config_sections.autotuning import DeepSpeedAutotuningConfig
    from deepspeed.runtime.config_sections.checkpoint import CheckpointConfig, DataStatesConfig, DeepSpeedNebulaConfig
    from deepspeed.runtime.config_sections.compression import CompressionConfig
    from deepspeed.runtime.config_sections.data_efficiency import DataEfficiencyConfig, LegacyCurriculumConfig
    from deepspeed.runtime.config_sections.elasticity import ElasticityConfig
    from deepspeed.runtime.config_sections.engines import (
        CompileConfig,
        HybridEngineConfig,
        PLDConfig,
        SparseAttentionConfig,
    )
    from deepspeed.runtime.config_sections.monitor import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.config_sections.parallel import ExpertParallelConfig, PipelineConfig, TensorParallelConfig
    from deepspeed.runtime.config_sections.profiling import CommsLoggerConfig, DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.config_sections.quantization import QuantizeTrainingConfig, WeightQuantizationConfig
else:
    DeepSpeedActivationCheckpointingConfig = later(
        "deepspeed.runtime.activation_checkpointing.config:DeepSpeedActivationCheckpointingConfig"
    )
    DeepSpeedAutotuningConfig = later("deepspeed.runtime.config_sections.autotuning:DeepSpeedAutotuningConfig")
    CheckpointConfig = later("deepspeed.runtime.config_sections.checkpoint:CheckpointConfig")
    DataStatesConfig = later("deepspeed.runtime.config_sections.checkpoint:DataStatesConfig")
    DeepSpeedNebulaConfig = later("deepspeed.runtime.config_sections.checkpoint:DeepSpeedNebulaConfig")
    CompressionConfig = later("deepspeed.runtime.config_sections.compression:CompressionConfig")
    DataEfficiencyConfig = later("deepspeed.runtime.config_sections.data_efficiency:DataEfficiencyConfig")
    LegacyCurriculumConfig = later("deepspeed.runtime.config_sections.data_efficiency:LegacyCurriculumConfig")
    ElasticityConfig = later("deepspeed.runtime.config_sections.elasticity:ElasticityConfig")
    CompileConfig = later("deepspeed.runtime.config_sections.engines:CompileConfig")
    HybridEngineConfig = later("deepspeed.runtime.config_sections.engines:HybridEngineConfig")
    PLDConfig = later("deepspeed.runtime.config_sections.engines:PLDConfig")
    SparseAttentionConfig = later("deepspeed.runtime.config_sections.engines:SparseAttentionConfig")
    CometConfig = later("deepspeed.runtime.config_sections.monitor:CometConfig")
    CSVConfig = later("deepspeed.runtime.config_sections.monitor:CSVConfig")
    TensorBoardConfig = later("deepspeed.runtime.config_sections.monitor:TensorBoardConfig")
    WandbConfig = later("deepspeed.runtime.config_sections.monitor:WandbConfig")
    ExpertParallelConfig = later("deepspeed.runtime.config_sections.parallel:ExpertParallelConfig")
    PipelineConfig = later("deepspeed.runtime.config_sections.parallel:PipelineConfig")
    TensorParallelConfig = later("deepspeed.runtime.config_sections.parallel:TensorParallelConfig")
    CommsLoggerConfig = later("deepspeed.runtime.config_sections.profiling:CommsLoggerConfig")
    DeepSpeedFlopsProfilerConfig = later("deepspeed.runtime.config_sections.profiling:DeepSpeedFlopsProfilerConfig")
    QuantizeTrainingConfig = later("deepspeed.runtime.config_sections.quantization:QuantizeTrainingConfig")
    WeightQuantizationConfig = later("deepspeed.runtime.config_sections.quantization:WeightQuantizationConfig")

__all__ = ["CLIENT_KEYS", "DeepSpeedConfigDocument", "prepare_document"]

#: Top-level keys that clients write for themselves or for patches of theirs; taken without a word and not read here.
CLIENT_KEYS = frozenset({"msamp", "inference"})

_ALLGATHER_SIZE = 500_000_000


class DeepSpeedConfigDocument(OptimizerKeys, CommunicationKeys, LoggingKeys, BatchKeys, HasSectionsLater):
    """A whole config. Parsing only: batch sizes are not yet solved and no feature is refused."""

    strict: Bool = key(False, "Unknown keys are errors instead of warnings.", since="1.0.0")

    fp16: FP16Config = section(FP16Config, "fp16 training.")
    bf16: BF16Config = section(BF16Config, "bf16 training.", aliases=("bfloat16",))
    amp: AmpConfig = section(AmpConfig, "Apex AMP.")
    torch_autocast: TorchAutocastConfig = section(TorchAutocastConfig, "torch.autocast.", since="0.17.2")
    data_types: DataTypesConfig = section(DataTypesConfig, "Dtypes of single kinds of tensors.")
    zero_optimization: DeepSpeedZeroConfig = section(
        DeepSpeedZeroConfig, "Partitioning of optimizer state, gradients and parameters."
    )
    allgather_size: NonNegInt = key(
        _ALLGATHER_SIZE, "Deprecated; read only beside a boolean zero_optimization, as its allgather_bucket_size."
    )
    activation_checkpointing: DeepSpeedActivationCheckpointingConfig = section(
        DeepSpeedActivationCheckpointingConfig, "Recomputing activations."
    )
    flops_profiler: DeepSpeedFlopsProfilerConfig = section(DeepSpeedFlopsProfilerConfig, "Profile of one step.")
    comms_logger: CommsLoggerConfig = section(CommsLoggerConfig, "Log of the collectives.")
    tensorboard: TensorBoardConfig = section(TensorBoardConfig, "Curves for TensorBoard.")
    wandb: WandbConfig = section(WandbConfig, "Curves for Weights & Biases.")
    csv_monitor: CSVConfig = section(CSVConfig, "Curves as CSV files.")
    comet: CometConfig = section(CometConfig, "Curves for Comet.", since="0.14.3")
    autotuning: DeepSpeedAutotuningConfig = section(DeepSpeedAutotuningConfig, "Search for fast settings.")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "How checkpoints are written and read.")
    aio: AioConfig = section(AioConfig, "Asynchronous I/O.")
    nebula: DeepSpeedNebulaConfig = section(DeepSpeedNebulaConfig, "Nebula checkpointing.")
    datastates_ckpt: DataStatesConfig | None = key(None, "Asynchronous checkpoints; absent = off.", since="0.18.1")
    elasticity: ElasticityConfig = section(ElasticityConfig, "Batch sizes that fit many GPU counts.")
    data_efficiency: DataEfficiencyConfig = section(DataEfficiencyConfig, "Data sampling and routing.")
    curriculum_learning: LegacyCurriculumConfig = section(LegacyCurriculumConfig, "Legacy curriculum.")
    compression_training: CompressionConfig = section(CompressionConfig, "Compression while training.")
    progressive_layer_drop: PLDConfig = section(PLDConfig, "Progressive layer dropping.")
    quantize_training: QuantizeTrainingConfig = section(QuantizeTrainingConfig, "MoQ.", since="documents")
    weight_quantization: WeightQuantizationConfig | None = key(None, "Weight-only quantisation; absent = off.")
    pipeline: PipelineConfig = section(PipelineConfig, "Pipeline engine.")
    hybrid_engine: HybridEngineConfig = section(HybridEngineConfig, "One engine that trains and generates.")
    compile: CompileConfig = section(CompileConfig, "torch.compile and DeepCompile.")
    sparse_attention: SparseAttentionConfig | None = key(None, "Block-sparse attention; absent = off.")
    tensor_parallel: TensorParallelConfig = section(TensorParallelConfig, "AutoTP training.", since="0.16.4")
    expert_parallel: ExpertParallelConfig = section(ExpertParallelConfig, "Experts over ranks.", since="0.19.2")

    @model_validator(mode="after")
    def _check_precision(self) -> Self:
        modes = [name for name in ("fp16", "bf16", "amp") if getattr(self, name).enabled]
        if len(modes) > 1:
            raise ConfigError(f"{' and '.join(modes)} are both enabled; a run has one of fp16, bf16 and amp")
        if self.amp.enabled and self.zero_optimization.stage > 0:
            raise ConfigError("amp does not go with ZeRO; use fp16 or bf16, or zero_optimization.stage 0")
        return self

    @model_validator(mode="after")
    def _check_sum(self) -> Self:
        if self.gradient_allreduce_op == "sum" and self.zero_optimization.stage == 3:
            raise ConfigError("gradient_allreduce_op 'sum' does not go with zero_optimization.stage 3")
        if self.gradient_allreduce_op == "sum" and (self.prescale_gradients or self.gradient_predivide_factor != 1.0):
            raise ConfigError(
                "prescale_gradients and gradient_predivide_factor are parts of a mean; they do not go with "
                "gradient_allreduce_op 'sum'"
            )
        return self


def prepare_document(raw: Mapping[Any, Any], report: ConfigReport) -> dict[str, Any]:
    """:func:`prepare` for a whole document, with what only the top level has.

    A boolean ``zero_optimization`` (deprecated) becomes a section, ``bf16`` wins over ``bfloat16``, and keys that
    clients write for themselves are passed over: :data:`CLIENT_KEYS`, and dotted copies of known keys
    (``"zero_optimization.reduce_bucket_size"``).
    """
    report.homes = _homes
    top: dict[Any, Any] = {}
    sections = DeepSpeedConfigDocument.model_fields
    for name, value in raw.items():
        is_dotted = isinstance(name, str) and name.partition(".")[1] == "." and name.partition(".")[0] in sections
        if name in CLIENT_KEYS or is_dotted or (name == "bfloat16" and "bf16" in raw):
            continue
        top[name] = value
    switch = top.get("zero_optimization")
    if isinstance(switch, bool):
        asked = {"stage": 1, "allgather_bucket_size": top.get("allgather_size", _ALLGATHER_SIZE)}
        top["zero_optimization"] = asked if as_bool(switch) else {"stage": 0}
        report.notes.append(
            f"zero_optimization: {str(switch).lower()} is deprecated; write "
            f'"zero_optimization": {{"stage": {int(switch)}}} instead'
        )
    elif "allgather_size" in top:
        report.notes.append("allgather_size has no effect; write zero_optimization.allgather_bucket_size instead")
    return prepare(DeepSpeedConfigDocument, top, "", report)


@cache
def _homes() -> dict[str, str]:
    """Each key's place in the document, for hints: names at the top level, and names that occur only once."""
    places: dict[str, list[str]] = {}
    for place, _, name in walk_fields(DeepSpeedConfigDocument):
        places.setdefault(name, []).append(place)
    return {
        name: name if name in found else found[0] for name, found in places.items() if name in found or len(found) == 1
    }
