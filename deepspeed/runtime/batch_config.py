"""Batch sizes and accumulation. How the three sizes relate is in ``batch_triangle.py``."""

from __future__ import annotations

from deepspeed.runtime.config_types import Bool, PosInt
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, key

__all__ = ["BatchKeys"]


class BatchKeys(DeepSpeedConfigModel):
    """Two of the three sizes are enough, or one of the two batch sizes; the rest is derived."""

    train_batch_size: PosInt | None = key(None, "Samples per optimizer update over all ranks.")
    train_micro_batch_size_per_gpu: PosInt | None = key(None, "Samples per rank in one forward and backward.")
    gradient_accumulation_steps: PosInt | None = key(None, "Forwards and backwards per optimizer update.")
    managed_gradient_accumulation: Bool = key(
        True, "The engine finds the accumulation boundary; false = every step() updates.", since="0.19.4"
    )
    dataloader_drop_last: Bool = key(False, "Drop the last batch of an epoch when it is not full.")
    vocabulary_size: PosInt | None = key(None, "Only checked: a warning when it is not a multiple of 8.")
