"""The base of every config section: aliases, ``"auto"``, deprecated keys, unknown keys, and where each value came from.

Reading has two passes. :func:`prepare` walks the user's mapping beside the model's fields, without changing it: it maps
aliases to field names, drops ``"auto"``, forwards deprecated keys and collects what it found in a
:class:`ConfigReport`. Pydantic then checks types and bounds of what is left.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterator, Mapping, Set
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from deepspeed.errors import ConfigError
from deepspeed.utils.logging import warning_once

__all__ = ["ConfigReport", "DeepSpeedConfigModel", "Forward", "explain", "key", "prepare", "section"]

AUTO = "auto"

# Pydantic hands a model's own values to the "before" validator when a field is assigned; this tells the two apart.
_assigning: ContextVar[bool] = ContextVar("assigning", default=False)


@dataclass(frozen=True)
class Forward:
    """What a deprecated key becomes: the sibling field ``to`` (``None``: nothing), with its value converted.

    A conversion result of ``None`` sets nothing (``cpu_offload: false`` asks for nothing).
    """

    to: str | None
    convert: Callable[[Any], Any] = lambda value: value
    note: str = ""


@dataclass(frozen=True)
class KeyFacts:
    """Facts about a key beside its type and default. ``inert`` says why a value other than the default does nothing."""

    aliases: tuple[str, ...] = ()
    since: str = "0.14.1"
    forward: Forward | None = None
    inert: str = ""


def key(
    default: Any,
    doc: str,
    *,
    aliases: tuple[str, ...] = (),
    since: str = "0.14.1",
    forward: Forward | None = None,
    inert: str = "",
    **bounds: Any,
) -> Any:
    """A config key: its default, its documentation, and :class:`KeyFacts`; ``bounds`` are pydantic's (``ge``, ...)."""
    extra: Any = {"facts": KeyFacts(aliases, since, forward, inert)}
    if isinstance(default, (list, dict)):
        return Field(default_factory=lambda: type(default)(default), description=doc, json_schema_extra=extra, **bounds)
    return Field(default, description=doc, json_schema_extra=extra, **bounds)


def section(
    model: type[DeepSpeedConfigModel], doc: str, *, aliases: tuple[str, ...] = (), since: str = "0.14.1"
) -> Any:
    """A sub-section that always exists, with the model's defaults."""
    extra: Any = {"facts": KeyFacts(aliases, since)}
    # Built without validation: defaults are right by construction, and compiling 48 validators would cost each program
    # that trains 30 ms.
    return Field(default_factory=model.model_construct, description=doc, json_schema_extra=extra)


class StandIn:
    """Base of what stands in a field's annotation for a section model that is imported later; see ``config_later``."""

    @classmethod
    def model(cls) -> type[DeepSpeedConfigModel]:
        """The model itself."""
        raise NotImplementedError(cls.__name__)


class PreparedSection(dict[str, Any]):
    """A mapping that :func:`prepare` has been over; nested models take it as it is."""


class DeepSpeedConfigModel(BaseModel):
    """Base of the typed sections. Keys are accepted by field name or alias; assignment is validated.

    An unknown key warns with its nearest match (``keeps_unknown`` sections keep it without a word), ``"auto"`` means
    the default, and a deprecated key moves its value to the key that replaced it.
    """

    model_config = ConfigDict(
        extra="ignore",
        validate_default=True,
        validate_assignment=True,
        arbitrary_types_allowed=True,
        protected_namespaces=(),  # the documented keys model_info, model_parallel_size, ... start with "model_"
        defer_build=True,  # validators are built at first use: importing costs little
    )

    place: ClassVar[str] = ""
    keeps_unknown: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _prepare_keys(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, Mapping) or isinstance(data, PreparedSection):
            return data
        if _assigning.get() and data.keys() >= cls._always_there():
            return data  # the values of a whole model, one of them new: nothing that a user wrote
        report = ConfigReport()
        prepared = prepare(cls, data, cls.place, report)
        report.say()
        return prepared

    @classmethod
    def _always_there(cls) -> Set[str]:
        """Fields that have a value in every instance."""
        return cls.model_fields.keys()

    def __setattr__(self, name: str, value: Any) -> None:
        token = _assigning.set(True)
        try:
            super().__setattr__(name, value)
        finally:
            _assigning.reset(token)


@dataclass
class ConfigReport:
    """What reading a document found. Places are dotted paths of field names; ``written`` has them as the user wrote."""

    origins: dict[str, str] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    unknown: list[tuple[str, str]] = field(default_factory=list)  # place and hint
    notes: list[str] = field(default_factory=list)
    homes: Callable[[], Mapping[str, str]] = dict  # gives key -> its place in the whole document, for hints

    def origin(self, place: str) -> str:
        """Where the value at a place came from; ``default`` if the user said nothing."""
        return self.origins.get(place, "default")

    def say(self, *, strict: bool = False) -> None:
        """Warns once about each finding; with ``strict``, unknown keys raise :class:`ConfigError` instead."""
        if strict and self.unknown:
            lines = [f"  {place!r}{also}" for place, also in self.unknown]
            raise ConfigError("\n".join(["the config is strict and has unknown keys:", *lines]))
        for place, also in self.unknown:
            warning_once(f"unknown config key {place!r} is ignored{also}")
        for note in self.notes:
            warning_once(note)


def prepare(
    model: type[DeepSpeedConfigModel], data: Mapping[Any, Any], place: str, report: ConfigReport
) -> PreparedSection:
    """The user's mapping with field names for keys, ready for validation; findings go to ``report``.

    ``data`` is not changed. Raises :class:`ConfigError` for a key that is given twice under two names with different
    values, or together with its deprecated form.
    """
    names = field_names(model)
    out = PreparedSection()
    forwarded: list[tuple[str, Any]] = []
    for written, value in data.items():
        here = join(place, str(written))
        name = names.get(written) if isinstance(written, str) else None
        if name is None:
            if model.keeps_unknown:
                out[str(written)] = value
            else:
                report.unknown.append((here, hint(str(written), model, place, report)))
            continue
        facts = facts_of(model, name)
        if facts.forward is not None:
            if value is not None and value != AUTO:
                forwarded.append((name, value))
            continue
        _take(model, out, name, value, here, place, report)
    for name, value in forwarded:
        _forward(model, out, name, value, place, report)
    return out


def _take(
    model: type[DeepSpeedConfigModel],
    out: PreparedSection,
    name: str,
    value: Any,
    here: str,
    place: str,
    report: ConfigReport,
) -> None:
    canonical = join(place, name)
    if isinstance(value, str) and value == AUTO:
        report.origins.setdefault(canonical, "auto, so the default")
        return
    nested = nested_model(model, name)
    if nested is not None:
        if value is None:  # a null section is an absent one
            return
        value = _prepare_nested(nested, value, canonical, report)
    if name in out and out[name] != value:
        raise ConfigError(f"{report.written[canonical]!r} and {here!r} are two names of one key, with different values")
    out[name] = value
    report.origins[canonical] = "user"
    report.written[canonical] = here
    facts = facts_of(model, name)
    if facts.inert and value != model.model_fields[name].get_default(call_default_factory=True):
        report.notes.append(f"{here} = {value!r} has no effect: {facts.inert}")


def _prepare_nested(nested: tuple[str, type[DeepSpeedConfigModel]], value: Any, here: str, report: ConfigReport) -> Any:
    shape, model = nested
    if shape == "one" and isinstance(value, Mapping):
        return prepare(model, value, here, report)
    if shape == "map" and isinstance(value, Mapping):
        return {
            str(k): prepare(model, v, join(here, str(k)), report) if isinstance(v, Mapping) else v
            for k, v in value.items()
        }
    if shape == "list" and isinstance(value, (list, tuple)):
        return [
            prepare(model, v, join(here, str(i)), report) if isinstance(v, Mapping) else v for i, v in enumerate(value)
        ]
    return value  # of another type: pydantic says so, with the place


def _forward(
    model: type[DeepSpeedConfigModel], out: PreparedSection, name: str, value: Any, place: str, report: ConfigReport
) -> None:
    forward = facts_of(model, name).forward
    if forward is None:
        raise AssertionError(f"{name} of {model.__name__} is not deprecated; please report this")
    old = join(place, name)
    if forward.to is None:
        report.notes.append(f"{old} is deprecated and has no effect. {forward.note}".rstrip())
        return
    new = join(place, forward.to)
    if forward.to in out:
        raise ConfigError(f"{old} is deprecated for {new}, and both are set; remove {old}")
    report.notes.append(f"{old} is deprecated; write {new} instead. {forward.note}".rstrip())
    try:
        converted = forward.convert(value)
    except ValueError as error:
        raise ConfigError(f"{old}: {error}") from None
    if converted is None:
        return
    nested = nested_model(model, forward.to)
    out[forward.to] = converted if nested is None else _prepare_nested(nested, converted, new, report)
    for found in [new, *(p for p in report.origins if p.startswith(new + "."))]:
        report.origins[found] = f"forwarded from {old}"
        report.written[found] = old


def join(place: str, name: str) -> str:
    """``"a.b"`` from ``"a"`` and ``"b"``."""
    return f"{place}.{name}" if place else name


@cache
def field_names(model: type[DeepSpeedConfigModel]) -> dict[str, str]:
    """Every accepted spelling of a key, field names and aliases, with the field it sets."""
    names = {name: name for name in model.model_fields}
    for name in model.model_fields:
        names.update(dict.fromkeys(facts_of(model, name).aliases, name))
    return names


def facts_of(model: type[DeepSpeedConfigModel], name: str) -> KeyFacts:
    """The :class:`KeyFacts` of a field."""
    extra = model.model_fields[name].json_schema_extra
    found: Any = extra.get("facts") if isinstance(extra, dict) else None
    return found if isinstance(found, KeyFacts) else KeyFacts()


@cache
def nested_model(model: type[DeepSpeedConfigModel], name: str) -> tuple[str, type[DeepSpeedConfigModel]] | None:
    """The section model a field holds, and how: ``one``, ``map`` (by user's names) or ``list``. ``None`` for values."""
    return _model_in(model.model_fields[name].annotation)


def _model_in(annotation: Any) -> tuple[str, type[DeepSpeedConfigModel]] | None:
    if isinstance(annotation, type) and issubclass(annotation, DeepSpeedConfigModel):
        return "one", annotation
    if isinstance(annotation, type) and issubclass(annotation, StandIn):
        return "one", annotation.model()
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        found = [m for m in map(_model_in, args) if m is not None]
        return found[0] if found else None
    inner = _model_in(args[-1]) if origin in (dict, list) and args else None
    if inner is None:
        return None
    return ("map" if origin is dict else "list"), inner[1]


def walk_fields(
    model: type[DeepSpeedConfigModel], place: str = ""
) -> Iterator[tuple[str, type[DeepSpeedConfigModel], str]]:
    """Every key of a model and of the sections in it: ``(place, model, field name)``, in documented order."""
    for name in model.model_fields:
        here = join(place, name)
        yield here, model, name
        nested = nested_model(model, name)
        if nested is not None:
            shape, inner = nested
            yield from walk_fields(inner, here if shape == "one" else f"{here}.<{'name' if shape == 'map' else 'i'}>")


def hint(written: str, model: type[DeepSpeedConfigModel], place: str, report: ConfigReport) -> str:
    """``"; did you mean ...?"`` for an unknown key, looked for in its own section first and then elsewhere."""
    names = list(field_names(model))
    flat = {n.lower().replace("-", "_"): n for n in names}
    near = flat.get(written.lower().replace("-", "_"))
    homes = report.homes()
    if near is None and written not in homes:
        close = difflib.get_close_matches(written.lower(), names, n=1, cutoff=0.6)
        near = close[0] if close else None
    if near is not None:
        return f"; did you mean {join(place, near)!r}?"
    if written in homes:
        home = homes[written]
        return f"; did you mean {home!r}{'' if '.' in home else ' at the top level'}?"
    far = difflib.get_close_matches(written.lower(), list(homes), n=1, cutoff=0.8)
    if far:
        return f"; did you mean {homes[far[0]]!r}?"
    return f"; the keys of {place or 'the top level'} are listed in docs/config-reference.md"


def explain(error: ValidationError, report: ConfigReport) -> ConfigError:
    """A pydantic error in words: one line a key, with its place as the user wrote it, its value, and what is wrong."""
    lines = []
    for one in error.errors(include_url=False):
        place = ".".join(str(part) for part in one["loc"])
        place = report.written.get(place, place)
        wrong = one["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        wrong = wrong[:1].lower() + wrong[1:]
        if one["type"] in ("model_type", "model_attributes_type", "dict_type"):
            wrong = "expected a section, that is a JSON object"
        given = one.get("input")
        shown = "" if isinstance(given, (Mapping, BaseModel)) or repr(given) in wrong else f" = {given!r}"
        lines.append(f"{place}{shown}: {wrong}" if place else wrong)
    return ConfigError("\n".join(["the config cannot be used:", *(f"  {line}" for line in lines)]))
