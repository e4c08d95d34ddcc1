"""``checkpoint``, ``nebula`` and ``datastates_ckpt``: how checkpoints are written and read."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from deepspeed.runtime.config_types import Bool, NonNegFloat, PosInt
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, key, section

__all__ = [
    "CheckpointConfig",
    "CheckpointWriterConfig",
    "DataStatesConfig",
    "DeepSpeedNebulaConfig",
    "ParallelWriteConfig",
]


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


class ParallelWriteConfig(DeepSpeedConfigModel):
    """Who writes at the same time."""

    place: ClassVar[str] = "checkpoint.parallel_write"

    pipeline_stage: Bool = key(False, "Pipeline stages write their layers in parallel.")


class CheckpointWriterConfig(DeepSpeedConfigModel):
    """The fast writer."""

    place: ClassVar[str] = "checkpoint.writer"

    type: Annotated[Literal["MOCK", "PYTHON", "FAST"], BeforeValidator(_upper)] = key(
        "FAST", "Kind of writer.", since="0.17.1"
    )
    io_buffer_size: PosInt = key(67_108_864, "Bytes of the write buffer.", since="0.17.1")
    io_buffer_double: Bool = key(True, "Two buffers, so that filling and writing overlap.", since="0.17.1")
    io_multiplier: PosInt = key(1, "Buffers per writer.", since="0.17.1")
    show_statistics: Bool = key(False, "Print write statistics.", since="0.17.1")
    data_parallel: Annotated[Literal["REPLICA", "SOCKET", "MACHINE"] | None, BeforeValidator(_upper)] = key(
        None, "Which data-parallel ranks share the writing.", since="0.17.1"
    )
    decoupled: Bool = key(False, "Write while training goes on.", since="0.17.1")


class CheckpointConfig(DeepSpeedConfigModel):
    """Checks at saving, format at loading."""

    place: ClassVar[str] = "checkpoint"

    tag_validation: Annotated[Literal["IGNORE", "WARN", "FAIL"], BeforeValidator(_upper)] = key(
        "WARN", "What happens when ranks save under different tags: Ignore, Warn or Fail (any case)."
    )
    load_universal: Bool = key(False, "Load the universal format.")
    use_node_local_storage: Bool = key(False, "Each node has its own storage; its local rank 0 writes shared files.")
    async_save: Bool = key(
        False,
        "Save in the background: save_checkpoint returns at once, and what training changes before it is written is copied "
        "first. The next save, load_checkpoint, destroy and the end of the program wait for it.",
        aliases=("async",),
        since="1.0.0",
    )
    keep_last: PosInt | None = key(
        None, "Keep so many of the newest checkpoints of a folder, remove older ones after a save.", since="1.0.0"
    )
    verify_checksums: Bool = key(
        True,
        "Compare all bytes of a checkpoint with its checksums before loading; the ranks share the work.",
        since="1.0.0",
    )
    parallel_write: ParallelWriteConfig = section(ParallelWriteConfig, "Who writes at the same time.")
    checkpoint_serialization: Bool = key(True, "Serialise through torch.save.", since="0.17.1")
    writer: CheckpointWriterConfig | None = key(None, "The fast writer.", since="0.17.1")


class DeepSpeedNebulaConfig(DeepSpeedConfigModel):
    """Nebula checkpointing."""

    place: ClassVar[str] = "nebula"

    enabled: Bool = key(False, "Save through Nebula.")
    nebula_load_path: str | None = key(None, "Folder to load from.")
    enable_nebula_load: Bool = key(True, "Load through Nebula.")
    persistent_storage_path: str | None = key(None, "Folder to save in.")
    persistent_time_interval: PosInt = key(100, "Seconds between persistent saves.")
    num_of_version_in_retention: PosInt = key(2, "Versions kept in memory.")


class DataStatesConfig(DeepSpeedConfigModel):
    """Asynchronous checkpoints through a host cache."""

    place: ClassVar[str] = "datastates_ckpt"

    host_cache_size: NonNegFloat | None = key(None, "Host cache in GB.", since="0.18.1")
