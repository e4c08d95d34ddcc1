"""Imports what ranks would otherwise import each by itself: torch's optimizers pull in its compiler when first built."""

import torch._dynamo

import deepspeed.runtime.engine

__all__ = ["deepspeed", "torch"]
