"""Imports what ranks would otherwise import each by itself: torch's optimizers pull in its compiler when first built."""

import torch._dynamo

from tests.helpers.engine_parts import deepspeed

__all__ = ["deepspeed", "torch"]
