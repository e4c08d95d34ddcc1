"""Imports what an engine imports with its first instance: here, once, before ranks are forked."""

import deepspeed._core.ckpt.save
import deepspeed.runtime.config
import deepspeed.runtime.dataloader
import deepspeed.runtime.engine
import deepspeed.runtime.engine_loading
import deepspeed.runtime.engine_saving
import deepspeed.runtime.engine_setup
import deepspeed.runtime.export
import deepspeed.runtime.progress
import deepspeed.runtime.zero.offload_states

__all__ = ["deepspeed"]
