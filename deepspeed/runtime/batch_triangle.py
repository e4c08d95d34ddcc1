"""The relation between the batch sizes, solved in one pure function.

``train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * data-parallel ranks``
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from deepspeed.errors import ConfigError

__all__ = ["BatchSizeError", "BatchSizes", "data_parallel_world_size", "solve_batch_triangle"]

TRAIN = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"
RANKS = "data-parallel ranks"


class BatchSizeError(ConfigError, AssertionError):
    """Batch sizes that do not fit together. Also an ``AssertionError``, which is what clients expect here."""


class BatchSizes(NamedTuple):
    """Batch sizes that fit together; ``train = micro * accumulation * dp_world_size``, all above 0."""

    train_batch_size: int
    train_micro_batch_size_per_gpu: int
    gradient_accumulation_steps: int
    dp_world_size: int


def solve_batch_triangle(
    train_batch: int | None,
    micro_batch: int | None,
    accumulation: int | None,
    dp_world_size: int,
    sources: Mapping[str, str] | None = None,
) -> BatchSizes:
    """Derives the sizes that are ``None``, in samples and steps, and checks that the relation holds exactly.

    Two sizes give the third; of one batch size alone, one accumulation step follows. ``sources`` says in words where a
    given size came from, by its key, for the message. Raises :class:`BatchSizeError` when the sizes do not fit, or when
    no batch size is given. (Config reference, section 2.)
    """
    given = {TRAIN: train_batch, MICRO: micro_batch, ACCUMULATION: accumulation}
    for name, value in (*given.items(), (RANKS, dp_world_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise BatchSizeError(f"{name} must be an integer above 0, got {value!r}")
    if train_batch is None and micro_batch is None:
        raise BatchSizeError(_nothing_given(accumulation, dp_world_size))
    train, micro, steps = _derive(train_batch, micro_batch, accumulation, dp_world_size)
    solved = BatchSizes(train, micro, steps, dp_world_size)
    if min(solved) < 1 or train != micro * steps * dp_world_size:
        raise BatchSizeError(_does_not_close(given, solved, sources or {}))
    return solved


def _derive(train: int | None, micro: int | None, steps: int | None, ranks: int) -> tuple[int, int, int]:
    if train is not None:
        if micro is not None:
            return train, micro, train // micro // ranks if steps is None else steps
        steps = 1 if steps is None else steps
        return train, train // ranks // steps, steps
    if micro is None:
        raise AssertionError("no batch size reached the derivation; please report this")
    steps = 1 if steps is None else steps
    return micro * steps * ranks, micro, steps


def _nothing_given(accumulation: int | None, ranks: int) -> str:
    also = f"; {ACCUMULATION} = {accumulation} alone does not fix them" if accumulation is not None else ""
    return (
        f"no batch size is given{also}. Set one of\n"
        f"  - {MICRO} (samples per rank in one forward), or\n"
        f"  - {TRAIN} (samples per update over all {ranks} data-parallel ranks)"
    )


def _does_not_close(given: Mapping[str, int | None], solved: BatchSizes, sources: Mapping[str, str]) -> str:
    def shown(name: str, value: int) -> str:
        origin = sources.get(name, "given") if name == RANKS or given.get(name) is not None else "derived"
        return f"{value} ({origin})"

    train, micro, steps, ranks = solved
    right = " * ".join([shown(MICRO, micro), shown(ACCUMULATION, steps), shown(RANKS, ranks)])
    return "\n".join(
        [
            "the batch sizes do not fit together:",
            f"  {TRAIN} = {MICRO} * {ACCUMULATION} * {RANKS}",
            f"  {shown(TRAIN, train)} != {right} = {micro * steps * ranks}",
            "Any one of these fits:",
            *(f"  - {fix}" for fix in _fixes(given, ranks)),
        ]
    )


def _fixes(given: Mapping[str, int | None], ranks: int) -> list[str]:
    """Changes of one or two keys after which the relation holds with everything else as given."""
    train, micro, steps = given[TRAIN], given[MICRO], given[ACCUMULATION]
    fixes = []
    if train is not None and micro is not None and train % (micro * ranks) == 0:
        fixes.append(f"{ACCUMULATION} = {train // (micro * ranks)}, or leave it out")
    if train is not None and steps is not None and train % (steps * ranks) == 0:
        fixes.append(f"{MICRO} = {train // (steps * ranks)}, or leave it out")
    unit = (micro or 1) * (steps or 1) * ranks
    if micro is not None and steps is not None:
        fixes.append(f"{TRAIN} = {unit}, or leave it out")
    elif train is not None:
        near = sorted({max(1, train // unit) * unit, -(-train // unit) * unit})
        fixes.append(f"{TRAIN} = {' or '.join(map(str, near))}, a multiple of {unit}")
    per_rank = (micro or 1) * (steps or 1)
    if train is not None and train % per_rank == 0 and train // per_rank != ranks:
        fixes.append(f"start with {train // per_rank} {RANKS}")
    return fixes


def data_parallel_world_size(mpu: Any, world_size: int, sequence_parallel_size: int = 1) -> int:
    """Ranks that see different samples, out of ``world_size``.

    An ``mpu`` with ``get_data_parallel_world_size`` decides; one with only ``get_sequence_parallel_world_size``
    (Ulysses) divides the world by that; without an ``mpu``, ``sequence_parallel_size`` ranks share each sample.
    """
    if mpu is not None and hasattr(mpu, "get_data_parallel_world_size"):
        return int(mpu.get_data_parallel_world_size())
    shared = sequence_parallel_size
    if mpu is not None:
        getter = getattr(mpu, "get_sequence_parallel_world_size", None)
        if getter is None:
            raise ConfigError(
                f"mpu of type {type(mpu).__name__} has neither get_data_parallel_world_size nor "
                "get_sequence_parallel_world_size; one of them must tell the ranks that see different samples"
            )
        shared = int(getter())
    if world_size % shared:
        raise ConfigError(f"{world_size} ranks cannot be divided into groups of {shared} that share a sequence")
    return world_size // shared
