"""``DeepSpeedConfig``: what the engine reads: parsed, with batch sizes once groups exist, and described."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from enum import Enum
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from deepspeed._core.precision.dtypes import dtype_name
from deepspeed.errors import ConfigError, MissingFeatureError
from deepspeed.runtime.batch_triangle import (
    RANKS,
    BatchSizeError,
    BatchSizes,
    data_parallel_world_size,
    solve_batch_triangle,
)
from deepspeed.runtime.config_reader import read_config
from deepspeed.runtime.config_schema import DeepSpeedConfigDocument, prepare_document
from deepspeed.runtime.config_utils import ConfigReport, DeepSpeedConfigModel, explain, facts_of, join, nested_model
from deepspeed.runtime.feature_gates import inert_settings, refuse_missing_features
from deepspeed.runtime.optimizer_config import KNOWN_OPTIMIZERS
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum
from deepspeed.utils.logging import log_dist, logger, set_log_level_from_string

if TYPE_CHECKING:
    from deepspeed.runtime.config_sections.quantization import EigenvalueConfig

__all__ = [
    "BatchSizeError",
    "BatchSizes",
    "ConfigError",
    "DeepSpeedConfig",
    "DeepSpeedConfigError",
    "MissingFeatureError",
    "parse_document",
]

DeepSpeedConfigError = ConfigError

_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_NAME_COLUMNS = 29


def parse_document(raw: Mapping[str, Any]) -> tuple[DeepSpeedConfigDocument, ConfigReport]:
    """A mapping as typed models, with what was found on the way. Nothing is said and no feature is refused.

    ``raw`` is not changed. Raises :class:`ConfigError` naming each key that cannot be used.
    """
    report = ConfigReport()
    prepared = prepare_document(raw, report)
    try:
        document = DeepSpeedConfigDocument.model_validate(prepared)
    except ValidationError as error:
        raise explain(error, report) from None
    _settle_max_grad_norm(document, report)
    return document, report


class DeepSpeedConfig:
    """A resolved config.

    ``config`` is a dict (kept as :attr:`raw`, never changed), the path of a JSON file with optional comments, or
    url-safe base64 of a document. Unknown keys warn with their nearest match (``"strict": true``: raise), and a setting
    whose feature does not exist yet raises :class:`MissingFeatureError`. Not a collective; alike on every rank.

    Every top-level key and section is an attribute of the same name, typed as in the models of this folder:
    ``config.zero_optimization.stage``, ``config.fp16.enabled``, ``config.gradient_clipping``.

    Batch sizes need the number of data-parallel ranks: given ``world_size`` or an ``mpu`` they are solved at once, else
    by :meth:`resolve_batch`; until then they are what the user set, or ``None``.
    """

    document: DeepSpeedConfigDocument
    report: ConfigReport
    raw: dict[str, Any]

    def __init__(
        self, config: str | PathLike[str] | Mapping[str, Any], *, mpu: Any = None, world_size: int | None = None
    ) -> None:
        self.raw = read_config(config)
        self.document, self.report = parse_document(self.raw)
        if self.document.log_level is not None:
            set_log_level_from_string(self.document.log_level)
        self.report.notes += inert_settings(self.document, self.report)
        self.report.say(strict=self.document.strict)
        refuse_missing_features(self.document)
        self.batch: BatchSizes | None = None
        if world_size is not None or hasattr(mpu, "get_data_parallel_world_size"):
            shared = self.document.sequence_parallel_size
            self.resolve_batch(data_parallel_world_size(mpu, world_size or 1, shared))

    def __getattr__(self, name: str) -> Any:
        # Only called for names that are not set on the object: the keys of the document.
        if name.startswith("__") or name == "document":
            raise AttributeError(name)
        try:
            return getattr(self.document, name)
        except AttributeError:
            raise AttributeError(f"no config key is called {name!r}") from None

    @property
    def zero_config(self) -> DeepSpeedZeroConfig:
        """The section ``zero_optimization``."""
        return self.document.zero_optimization

    @property
    def zero_optimization_stage(self) -> ZeroStageEnum:
        """The ZeRO stage, 0 to 3."""
        return self.document.zero_optimization.stage

    @property
    def zero_enabled(self) -> bool:
        """Whether anything is partitioned."""
        return self.document.zero_optimization.stage > ZeroStageEnum.disabled

    @property
    def communication_dtype(self) -> torch.dtype | None:
        """Dtype of gradient reduction, or ``None`` for what the training mode uses."""
        return self.document.communication_data_type

    @property
    def grad_accum_dtype(self) -> torch.dtype | None:
        """Dtype of gradient accumulation, or ``None`` for what the training mode uses."""
        return self.document.data_types.grad_accum_dtype

    @property
    def autocast_dtype(self) -> torch.dtype:
        """Dtype of ``torch_autocast``."""
        return self.document.torch_autocast.dtype or torch.bfloat16

    @property
    def optimizer_name(self) -> str | None:
        """The optimizer's type, known names in lower case; ``None`` if the config names none."""
        section = self.document.optimizer
        name = None if section is None else section.type
        return name.lower() if name is not None and name.lower() in KNOWN_OPTIMIZERS else name

    @property
    def optimizer_params(self) -> dict[str, Any] | None:
        """Arguments of the optimizer's constructor."""
        return None if self.document.optimizer is None else self.document.optimizer.params

    @property
    def optimizer_legacy_fusion(self) -> bool:
        """Whether the older fused optimizers are asked for."""
        return self.document.optimizer is not None and self.document.optimizer.legacy_fusion

    @property
    def scheduler_name(self) -> str | None:
        """The schedule's type; ``None`` if the config names none."""
        return None if self.document.scheduler is None else self.document.scheduler.type

    @property
    def scheduler_params(self) -> dict[str, Any] | None:
        """Arguments of the schedule's constructor."""
        return None if self.document.scheduler is None else self.document.scheduler.params

    @property
    def eigenvalue(self) -> EigenvalueConfig:
        """The section ``quantize_training.eigenvalue``."""
        return self.document.quantize_training.eigenvalue

    @property
    def dynamic_loss_scale(self) -> bool:
        """Whether the fp16 loss scale adapts."""
        return self.document.fp16.dynamic_loss_scale

    @property
    def initial_dynamic_scale(self) -> float:
        """The first dynamic loss scale; 1 in bf16."""
        return 1.0 if self.document.bf16.enabled else 2.0**self.document.fp16.initial_scale_power

    @property
    def postscale_gradients(self) -> bool:
        """Whether gradients are scaled after the reduction."""
        return not self.document.prescale_gradients

    def resolve_batch(self, dp_world_size: int) -> BatchSizes:
        """Solves the batch sizes for so many data-parallel ranks, and remembers them.

        Always starts from what the user gave, so that it may be called again for another number of ranks. Raises
        :class:`BatchSizeError` with the whole equation when the sizes do not fit.
        """
        train, micro, steps = (getattr(self.document, name) for name in _BATCH_KEYS)
        sources = {RANKS: "from the process groups", **{name: "from the config" for name in _BATCH_KEYS}}
        self.batch = solve_batch_triangle(train, micro, steps, dp_world_size, sources=sources)
        return self.batch

    def set_batch(self, *, micro_batch: int | None = None, accumulation: int | None = None) -> BatchSizes:
        """Changes the micro batch or the accumulation of solved sizes; ``train_batch_size`` follows."""
        if self.batch is None:
            raise ConfigError("the batch sizes are not solved yet; call resolve_batch(dp_world_size) first")
        micro = self.batch.train_micro_batch_size_per_gpu if micro_batch is None else micro_batch
        steps = self.batch.gradient_accumulation_steps if accumulation is None else accumulation
        self.batch = solve_batch_triangle(None, micro, steps, self.batch.dp_world_size)
        return self.batch

    @property
    def train_batch_size(self) -> int | None:
        """Samples per update over all ranks."""
        return self.document.train_batch_size if self.batch is None else self.batch.train_batch_size

    @property
    def train_micro_batch_size_per_gpu(self) -> int | None:
        """Samples per rank in one forward."""
        solved = self.batch
        return self.document.train_micro_batch_size_per_gpu if solved is None else solved.train_micro_batch_size_per_gpu

    @property
    def gradient_accumulation_steps(self) -> int | None:
        """Forwards per update."""
        solved = self.batch
        return self.document.gradient_accumulation_steps if solved is None else solved.gradient_accumulation_steps

    def origin(self, place: str) -> str:
        """Where the value at a dotted key (``zero_optimization.stage``) came from.

        ``user``, ``default``, ``auto, so the default``, ``derived``, or ``forwarded from`` a deprecated key.
        """
        if place in _BATCH_KEYS and self.batch is not None and getattr(self.document, place) is None:
            return "derived"
        if place == "zero_optimization.overlap_comm" and self.report.origin(place) == "default":
            return "derived"
        return self.report.origin(place)

    def given(self, place: str) -> bool:
        """Whether the user set the dotted key, directly or by a deprecated one; ``"auto"`` does not count."""
        return self.report.origin(place).startswith(("user", "forwarded"))

    def describe(self) -> str:
        """The resolved config: sorted ``name ... value  [origin]`` lines, then ``json = `` and the user's document."""
        lines = []
        for place, value in sorted(_leaves(self.document, "")):
            if place in _BATCH_KEYS:
                value = getattr(self, place)
            dots = "." * max(3, _NAME_COLUMNS - len(place))
            lines.append(f"  {place} {dots} {_plain(value)}  [{self.origin(place)}]")
        document = json.dumps(self.raw, indent=4, default=str)
        return "\n".join([*lines, f"  json = {document}"])

    def print(self, name: str = "DeepSpeedConfig") -> None:
        """Logs :meth:`describe` under a heading, on rank 0. Shown whatever the level: it was asked for."""
        log_dist(f"{name}:\n{self.describe()}", ranks=[0], level=max(logging.INFO, logger.getEffectiveLevel()))

    def __repr__(self) -> str:
        return f"DeepSpeedConfig(stage={int(self.zero_optimization_stage)}, batch={self.batch})"


def _settle_max_grad_norm(document: DeepSpeedConfigDocument, report: ConfigReport) -> None:
    """``optimizer.params.max_grad_norm``, the older way to clip: used under fp16, dropped otherwise; said once.

    The entry is taken out of the constructor arguments: where a constructor knows it, its default (0, off) holds.
    """
    optimizer = document.optimizer
    if optimizer is None or "max_grad_norm" not in optimizer.params:
        return
    place = "optimizer.params.max_grad_norm"
    legacy = optimizer.params["max_grad_norm"]
    optimizer.params = {name: value for name, value in optimizer.params.items() if name != "max_grad_norm"}
    if not isinstance(legacy, (int, float)) or isinstance(legacy, bool) or legacy < 0:
        raise ConfigError(f"{place}: expected a number of at least 0, got {legacy!r}; write gradient_clipping instead")
    if legacy == 0:
        return
    if not document.fp16.enabled:
        report.notes.append(f"{place} = {legacy} is set to 0 outside fp16 training; write gradient_clipping instead")
    elif document.gradient_clipping > 0:
        report.notes.append(f"{place} = {legacy} gives way to gradient_clipping = {document.gradient_clipping}")
    else:
        document.gradient_clipping = float(legacy)
        report.origins["gradient_clipping"] = f"forwarded from {place}"
        report.notes.append(f"{place} = {legacy} is used as gradient_clipping; write gradient_clipping instead")


def _leaves(model: DeepSpeedConfigModel, place: str) -> Iterator[tuple[str, Any]]:
    kind = type(model)
    for name in kind.model_fields:
        if facts_of(kind, name).forward is not None:  # a deprecated key: its value stands at the key it became
            continue
        value, here = getattr(model, name), join(place, name)
        if isinstance(value, DeepSpeedConfigModel):
            yield from _leaves(value, here)
        elif isinstance(value, dict) and nested_model(kind, name) is not None:
            for inner, one in value.items():
                yield from _leaves(one, join(here, inner))
        else:
            yield here, value
    for name, value in (model.model_extra or {}).items():
        yield join(place, name), value


def _plain(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(dtype_name(value))
    if isinstance(value, DeepSpeedConfigModel):
        return str(value.model_dump(exclude_defaults=True))
    return str(value.value) if isinstance(value, Enum) else str(value)
