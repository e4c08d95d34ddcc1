"""From what a user passes as a config to a mapping: a dict, a file with comments, or base64 text."""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed.errors import ConfigError

__all__ = ["read_config"]


def read_config(config: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The document as a mapping. A dict is returned as it is (the same object).

    Text is the path of a file, or url-safe base64 of a document. Files may have comments and trailing commas (Hjson).
    Raises :class:`ConfigError` for other input, a missing file, text that cannot be parsed, and a key that stands twice
    in one section.
    """
    if isinstance(config, dict):
        return config
    if isinstance(config, Mapping):
        return dict(config)
    if not isinstance(config, (str, os.PathLike)):
        raise ConfigError(
            "expected a config as a dict, the path of a JSON file, or url-safe base64 text; "
            f"got {type(config).__name__}"
        )
    path = Path(config)
    if _is_file(path):
        try:
            return _parse(path.read_text(encoding="utf-8"), f"config file {path}")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"config file {path} cannot be read: {error}") from None
    text = _from_base64(str(config)) if isinstance(config, str) else None
    if text is None:
        shown = str(config) if len(str(config)) <= 200 else f"{str(config)[:200]}..."
        json_text = "; for JSON text pass json.loads(text)" if shown.lstrip().startswith("{") else ""
        raise ConfigError(
            f"config {shown!r} is neither an existing file (looked in {Path.cwd()}) nor base64 of a document{json_text}"
        )
    return _parse(text, "base64 config")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # longer than a path may be, or with a NUL: not a path
        return False


def _from_base64(text: str) -> str | None:
    """The decoded text; ``None`` where the input is not base64 of text. Missing padding is made up for."""
    stripped = text.strip().replace("+", "-").replace("/", "_")
    try:
        padded = (stripped + "=" * (-len(stripped) % 4)).encode("ascii")
        decoded = base64.b64decode(padded, altchars=b"-_", validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    return decoded if decoded.lstrip().startswith(("{", "#", "/")) else None


def _parse(text: str, source: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [name for name, _ in pairs]
        twice = sorted({name for name in keys if keys.count(name) > 1})
        if twice:
            raise ConfigError(
                f"{source}: duplicate keys {', '.join(map(repr, twice))} in one section; keep one of each"
            )
        return dict(pairs)

    try:
        # Strict JSON first: it is the common case, and Hjson would read a bare word as text.
        document = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError:
        import hjson  # noqa: PLC0415 - most files are plain JSON

        try:
            document = hjson.loads(text, object_pairs_hook=unique)
        except hjson.HjsonDecodeError as error:
            raise ConfigError(f"{source} is not JSON (comments and trailing commas are allowed): {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{source}: expected a JSON object at the top, got {type(document).__name__}")
    return document
