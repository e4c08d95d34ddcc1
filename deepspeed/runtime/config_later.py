"""Sections whose model is imported when a document names them, or when somebody reads them.

Most programs use few of the sections: the 50 models of the others would cost each start of a program some 0.05 s.

A field's annotation is then a stand-in (:func:`later`) for the model. As long as nothing is known but the defaults, the
section is absent from the document's values; :class:`HasSectionsLater` puts the model's defaults there on first access.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator, Set
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import SerializerFunctionWrapHandler, model_serializer
from pydantic_core import core_schema

from deepspeed.runtime.config_utils import DeepSpeedConfigModel, StandIn

__all__ = ["HasSectionsLater", "is_read", "later"]


def later(where: str) -> type[StandIn]:
    """A stand-in for the model at ``"module:Class"``. Type checkers want an import of their own."""
    return type(where.rpartition(":")[2], (_Later,), {"where": where})


class _Later(StandIn):
    where: ClassVar[str]

    @classmethod
    @cache
    def model(cls) -> type[DeepSpeedConfigModel]:
        module, _, name = cls.where.partition(":")
        found: type[DeepSpeedConfigModel] = getattr(importlib.import_module(module), name)
        return found

    @classmethod
    def model_construct(cls) -> _Later:
        """What a field has by default: an instance says that nothing of the section has been read."""
        return cls()

    def __eq__(self, other: object) -> bool:
        # For ``exclude_defaults``, which compares sections with this.
        return isinstance(other, type(self)) or other == self.model().model_construct()

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def _validate(cls, value: Any) -> Any:
        return value if isinstance(value, cls) else cls.model().model_validate(value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(cls._validate)


@cache
def _later_sections(model: type[DeepSpeedConfigModel]) -> dict[str, type[_Later]]:
    """The sections of a model that always exist and are read later."""
    found = ((name, field.annotation) for name, field in model.model_fields.items())
    return {name: kind for name, kind in found if isinstance(kind, type) and issubclass(kind, _Later)}


def is_read(model: DeepSpeedConfigModel, name: str) -> bool:
    """Whether a section's values are there. If not, they are the defaults, and reading them imports their model."""
    return name in model.__dict__ or name not in _later_sections(type(model))


class HasSectionsLater(DeepSpeedConfigModel):
    """Base of a model with such sections. To those who use it they look like any others."""

    def model_post_init(self, context: Any, /) -> None:
        """Leaves out the sections that the document does not name."""
        for name, kind in _later_sections(type(self)).items():
            if isinstance(self.__dict__.get(name), kind):
                del self.__dict__[name]

    if not TYPE_CHECKING:  # or type checkers would take any name for an attribute

        def __getattr__(self, name: str) -> Any:
            kind = _later_sections(type(self)).get(name)
            if kind is None:
                return super().__getattr__(name)
            # As an ordinary value from now on. Not validated: defaults are right by construction.
            return self.__dict__.setdefault(name, kind.model().model_construct())

    @classmethod
    def _always_there(cls) -> Set[str]:
        return cls.model_fields.keys() - _later_sections(cls).keys()

    def _read_all(self) -> None:
        for name in _later_sections(type(self)):
            getattr(self, name)
        # In the order of the fields, as pydantic has them.
        values = {name: self.__dict__[name] for name in type(self).model_fields}
        self.__dict__.clear()
        self.__dict__.update(values)

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        self._read_all()
        whole: dict[str, Any] = handler(self)
        return whole

    def __iter__(self) -> Generator[tuple[str, Any], None, None]:
        self._read_all()
        return super().__iter__()

    def __repr_args__(self) -> Any:
        self._read_all()
        return super().__repr_args__()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HasSectionsLater):
            return NotImplemented
        self._read_all()
        other._read_all()
        return super().__eq__(other)
