"""Checkpoint tools; submodules load when first used."""

from deepspeed._core.lazy import attach

__getattr__, __dir__ = attach(__name__, ("ds_to_universal", "inspect", "utils"))
