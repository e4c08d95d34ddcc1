"""Errors that the user can act on. All derive from ``ValueError`` or ``RuntimeError`` so that plain handlers catch them.

Broken invariants of this package itself raise ``AssertionError`` and ask for a report.
"""

from __future__ import annotations

__all__ = ["CheckpointError", "ConfigError", "MissingFeatureError", "NonFiniteGradientError"]


class ConfigError(ValueError):
    """A setting that cannot be honoured; the message names the key, the value and the way out."""


class MissingFeatureError(ConfigError, NotImplementedError):
    """A documented setting whose feature this version does not have yet."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another model. Nothing was changed when this is raised."""


class NonFiniteGradientError(RuntimeError):
    """Training cannot go on: too many steps in a row had non-finite gradients."""
