"""Imports what an engine imports with its first instance or step: here, once, before ranks are forked."""

import deepspeed._core.ckpt.save
import deepspeed.runtime.config
import deepspeed.runtime.config_sections.checkpoint
import deepspeed.runtime.dataloader
import deepspeed.runtime.engine
import deepspeed.runtime.engine_loading
import deepspeed.runtime.engine_saving
import deepspeed.runtime.engine_setup
import deepspeed.runtime.export
import deepspeed.runtime.progress
import deepspeed.runtime.zero.offload_states
import deepspeed.runtime.zero.stage3
import deepspeed.utils.z3_leaf_module

__all__ = ["deepspeed"]
