"""Communication and gradients: the top-level keys about what is reduced, in which dtype, and how it is averaged."""

from __future__ import annotations

from typing import Literal

import torch

from deepspeed.runtime.config_types import Bool, FloatDtype, NonNegFloat, NonNegInt, PosFloat, PosInt
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, Forward, key

__all__ = ["CommunicationKeys"]


class CommunicationKeys(DeepSpeedConfigModel):
    """Top-level keys about gradients between backward and the optimizer step."""

    communication_data_type: FloatDtype | None = key(None, "Dtype of gradient reduction; unset = by training mode.")
    seq_parallel_comm_data_type: FloatDtype | None = key(
        None,
        "Deprecated for seq_parallel_communication_data_type.",
        forward=Forward("seq_parallel_communication_data_type"),
    )
    seq_parallel_communication_data_type: FloatDtype = key(
        torch.float32, "Dtype of gradient reduction over sequence-parallel ranks.", since="0.16.5"
    )
    prescale_gradients: Bool = key(False, "Scale gradients before the all-reduce instead of after it.")
    gradient_predivide_factor: PosFloat = key(
        1.0, "Divide gradients by this before averaging, and make up for it after."
    )
    gradient_allreduce_op: Literal["mean", "sum"] = key(
        "mean", "mean over ranks, or the plain sum.", since="unreleased"
    )
    sparse_gradients: Bool = key(False, "Compressed embedding gradients.")
    disable_allgather: Bool = key(False, "Legacy switch.")
    gradient_clipping: NonNegFloat = key(0.0, "Largest global gradient norm; 0 = no clipping.")
    graph_harvesting: Bool = key(False, "Capture graphs of short runs of kernels.")
    use_data_before_expert_parallelism: Bool = key(False, "Rank order of expert and data groups.")
    sequence_parallel_size: PosInt = key(1, "Ranks that share one sequence (Ulysses).", since="0.17.0")
    verify_gradients: NonNegInt = key(
        0,
        "Compare the reduced gradients of the first so many steps with a plain all-reduce and name the first "
        "parameter that differs; 0 = off.",
        since="1.0.0",
    )
