"""``aio``: how NVMe files are read and written."""

from __future__ import annotations

from typing import ClassVar

from deepspeed.runtime.config_types import Bool, PosInt
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, Forward, key

__all__ = ["AioConfig"]


class AioConfig(DeepSpeedConfigModel):
    """Asynchronous I/O. Read at the top level only; it matters under NVMe offload."""

    place: ClassVar[str] = "aio"

    block_size: PosInt = key(1_048_576, "Bytes in one read or write.")
    queue_depth: PosInt = key(8, "Requests in flight.")
    thread_count: PosInt | None = key(
        None, "Deprecated for intra_op_parallelism.", forward=Forward("intra_op_parallelism")
    )
    intra_op_parallelism: PosInt = key(1, "Threads that share one request.", since="0.16.4")
    single_submit: Bool = key(False, "Submit one request at a time.")
    overlap_events: Bool = key(True, "Submit while completing.")
    use_gds: Bool = key(False, "GPUDirect Storage; CUDA only.", since="0.15.0")
