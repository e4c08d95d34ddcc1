"""``hybrid_engine``, ``compile``, ``progressive_layer_drop`` and ``sparse_attention``."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator
from typing_extensions import Self

from deepspeed.errors import ConfigError
from deepspeed.runtime.config_types import Bool, Fraction, NonNegFloat, NonNegInt, PosInt
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, key

__all__ = ["CompileConfig", "HybridEngineConfig", "PLDConfig", "SparseAttentionConfig"]


class HybridEngineConfig(DeepSpeedConfigModel):
    """One engine that trains and generates."""

    place: ClassVar[str] = "hybrid_engine"

    enabled: Bool = key(False, "Use the hybrid engine.")
    max_out_tokens: PosInt = key(512, "Most tokens of an output.")
    inference_tp_size: PosInt = key(1, "Tensor-parallel degree while generating.")
    release_inference_cache: Bool = key(False, "Free the cache after generating.")
    pin_parameters: Bool = key(True, "Keep parameters in place while generating.")
    tp_gather_partition_size: PosInt = key(8, "Parts gathered at a time.")
    enable_cuda_graph: Bool = key(False, "Capture graphs.", since="unreleased")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.enable_cuda_graph and (self.release_inference_cache or self.inference_tp_size > 1):
            raise ConfigError("enable_cuda_graph goes neither with release_inference_cache nor inference_tp_size > 1")
        return self


class CompileConfig(DeepSpeedConfigModel):
    """torch.compile of the model (to 0.14.3) and DeepCompile (from 0.16.6)."""

    place: ClassVar[str] = "compile"

    enabled: Bool = key(False, "Compile the model.")
    backend: str = key("inductor", "Backend of torch.compile.")
    kwargs: dict[str, Any] = key({}, "Further arguments of torch.compile.")
    deepcompile: Bool = key(False, "Compile ZeRO's communication into the graph.", since="0.16.6")
    free_activation: Bool = key(False, "Free activations early.", since="0.16.6")
    offload_activation: Bool = key(False, "Offload activations.", since="0.16.6")
    offload_opt_states: Bool = key(False, "Offload optimizer state.", since="0.16.6")
    double_buffer: Bool = key(True, "Two buffers for communication.", since="0.16.6")
    symmetric_memory: Bool = key(False, "Use symmetric memory.", since="0.16.6")
    debug_log: Bool = key(False, "Log the passes.", since="0.16.6")
    offload_parameters: Bool = key(False, "Offload parameters.", since="0.16.6")
    sync_before_reduce: Bool = key(False, "Wait for the device before a reduction.", since="0.16.6")
    sync_after_reduce: Bool = key(False, "Wait for the device after a reduction.", since="0.16.6")
    sync_before_allgather: Bool = key(False, "Wait for the device before an all-gather.", since="0.16.6")
    sync_after_allgather: Bool = key(False, "Wait for the device after an all-gather.", since="0.16.6")
    keep_int_input_tensors: Bool = key(True, "Keep integer inputs for profiling.", since="0.17.2")
    keep_all_input_tensors: Bool = key(False, "Keep all inputs for profiling.", since="0.17.2")
    free_activation_threshold: NonNegInt = key(
        10_485_760, "Bytes from which an activation is freed early.", since="0.18.0"
    )
    passes: list[Literal["z1", "z3", "autosp", "autotp"]] | None = key(None, "Passes to run.", since="0.18.9")
    offload_activation_pin_memory: Bool = key(True, "Page-locked memory for activations.", since="unreleased")


class PLDConfig(DeepSpeedConfigModel):
    """Progressive layer dropping."""

    place: ClassVar[str] = "progressive_layer_drop"

    enabled: Bool = key(False, "Drop layers.")
    theta: Fraction = key(1.0, "Keep ratio at the end.")
    gamma: NonNegFloat = key(0.001, "Speed of the schedule.")


class SparseAttentionConfig(DeepSpeedConfigModel):
    """Block-sparse attention. Which keys count depends on the mode."""

    place: ClassVar[str] = "sparse_attention"

    mode: Literal["dense", "fixed", "variable", "bigbird", "bslongformer"] = key("fixed", "Layout.")
    block: PosInt = key(16, "Side of a block; all modes.")
    different_layout_per_head: Bool = key(False, "A layout per head; all modes but dense.")
    num_local_blocks: PosInt = key(4, "Blocks of a local window; fixed.")
    num_global_blocks: NonNegInt = key(1, "Global blocks; fixed, bigbird.")
    attention: Literal["bidirectional", "unidirectional"] = key("bidirectional", "Direction; fixed, variable.")
    horizontal_global_attention: Bool = key(False, "Global blocks attend to all; fixed, variable.")
    num_different_global_patterns: PosInt = key(1, "Global patterns over heads; fixed.")
    num_random_blocks: NonNegInt = key(0, "Random blocks; variable, bigbird.")
    local_window_blocks: list[PosInt] = key([4], "Sizes of local windows; variable.")
    global_block_indices: list[NonNegInt] = key([0], "Global blocks; variable, bslongformer.")
    global_block_end_indices: list[PosInt] | None = key(None, "Ends of global spans; variable, bslongformer.")
    num_sliding_window_blocks: PosInt = key(3, "Blocks of the sliding window; bigbird, bslongformer.")
