"""The version, as in pyproject.toml (a test compares them)."""

__version__ = "1.0.0.dev0"
