"""The live model as Hugging Face-style safetensors: every rank writes some of the files, none holds the whole model.

A weight goes into a file block by block from where it lies: in stages 0 to 2 every rank has it. In stage 3, and for fp32
masters in stages 1 and 2, its pieces travel to the rank that writes it, and to no other, into one buffer that is as
large as the largest weight.

[Note: order] All ranks walk one list of weights, ordered by how far each writer's files have got. A rank takes part in
the collections of its group in this order, and waits only for earlier ones, so that none can wait in a circle.

[Note: failures] A rank that cannot write goes on giving its pieces to the others; at the end it raises on all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deepspeed import comm as dist
from deepspeed._core.ckpt.blockfile import BlockFile
from deepspeed._core.ckpt.io import atomic_write_text, fsync_folder
from deepspeed._core.params.bucket import ShardBucket
from deepspeed._core.params.handle import ParamHandle, handle_of
from deepspeed._core.precision.dtypes import FLOAT_DTYPES, parse_dtype
from deepspeed._core.reduce.bucket import Slot
from deepspeed._core.reduce.collect import collect_spans
from deepspeed._core.reduce.transport import Pending
from deepspeed.comm.agreement import everyone, together
from deepspeed.errors import CheckpointError
from deepspeed.runtime.flat_optimizer import FlatOptimizer
from deepspeed.runtime.partitioned_state import check_written
from deepspeed.runtime.zero.module_state import check_has_data, named_handles
from deepspeed.utils.logging import log_dist, warning_once
from deepspeed.utils.zero_to_fp32 import SAFETENSORS_DTYPES, parse_size, safetensors_header, split_into_shards

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

__all__ = ["assign_writers", "export_safetensors"]

_STEM, _SUFFIX = "model", ".safetensors"
_INDEX = f"{_STEM}{_SUFFIX}.index.json"
_OURS = re.compile(rf"{_STEM}(-\d{{5}}-of-\d{{5}})?{re.escape(_SUFFIX)}")
_SCRATCH = re.compile(rf"\.{_OURS.pattern}\.[0-9a-f]{{12}}\.tmp")

# Elements that are converted and written at a time.
_BLOCK_NUMEL = 1 << 20
# Weights that are on their way at a time share a buffer of this size, or of that of the largest.
_BUFFER_NBYTES = 8 << 20
_FILE_BUFFER_NBYTES = 4 << 20  # two of them
_IN_FLIGHT = 8
_ALIGNMENT = 64
# Apart from the tags of parameters and buckets on their way.
_TAG_BASE, _TAG_COUNT = 1_200_000, 800_000


@dataclass(frozen=True)
class _Source:
    """Where a weight's values are.

    ``own`` gives this rank's part, 1-D and contiguous; its ``spans`` entry says which elements these are. Without
    ``spans`` every rank has all of them.
    """

    own: Callable[[], torch.Tensor]
    held: torch.dtype
    spans: tuple[tuple[int, int], ...] | None = None
    group: torch.distributed.ProcessGroup | None = None
    copies: bool = False
    """Whether ``own`` takes memory."""


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the result, as it is stored."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class _File:
    """A file of the result: what is in it, in order, and which rank writes it."""

    name: str
    writer: int
    header: bytes = field(repr=False)
    tensors: tuple[_Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class _Plan:
    files: tuple[_File, ...]
    sources: Mapping[str, _Source]

    def digest(self) -> str:
        """The same on all ranks, or they do not hold the same model."""
        named = [(f.name, f.writer, [(t.name, t.shape, str(t.dtype)) for t in f.tensors]) for f in self.files]
        return hashlib.sha256(repr(named).encode()).hexdigest()

    def walk(self) -> list[tuple[_File, _Tensor]]:
        """See [Note: order]."""
        begun: dict[int, int] = {}
        steps = []
        for file in self.files:
            at = begun.get(file.writer, 0)
            for tensor in file.tensors:
                steps.append((at, file.writer, file, tensor))
                at += tensor.nbytes
            begun[file.writer] = at
        steps.sort(key=lambda step: step[:2])  # stable: empty tensors stay where they are in their file
        return [(file, tensor) for _, _, file, tensor in steps]


def export_safetensors(
    engine: DeepSpeedEngine,
    save_dir: str,
    dtype: torch.dtype | str | None,
    max_shard_size: int | str | None,
    exclude_frozen: bool,
) -> list[str]:
    """See ``DeepSpeedEngine.export_safetensors``."""
    if engine._flat is not None:
        engine._flat.settle_weights()
    plan = together(lambda: _make_plan(engine, dtype, parse_size(max_shard_size), exclude_frozen), CheckpointError)
    _agree(plan)
    folder = Path(save_dir)
    steps = plan.walk()

    def prepare() -> torch.Tensor:
        folder.mkdir(parents=True, exist_ok=True)
        if dist.get_rank() == 0:
            _remove(folder, _SCRATCH)
        return torch.empty(_buffer_nbytes(plan, steps), dtype=torch.uint8, device=engine.device)

    buffer = together(prepare, CheckpointError)
    writer = _Writer(folder)
    try:
        _stream(plan, steps, writer, buffer)
        del buffer
        together(writer.check, CheckpointError)
        _publish(plan, folder, writer)
    finally:
        writer.discard()
    log_dist(f"exported {sum(file.nbytes for file in plan.files)} bytes in {len(plan.files)} files to {folder}")
    return [file.name for file in plan.files]


# -- what is written ---------------------------------------------------------------------------------------------------


def _make_plan(
    engine: DeepSpeedEngine, dtype: torch.dtype | str | None, limit: int | None, exclude_frozen: bool
) -> _Plan:
    wanted = parse_dtype(dtype, key="dtype", allowed=FLOAT_DTYPES)
    parts = getattr(engine.mpu, "get_model_parallel_world_size", lambda: 1)()
    if parts > 1:
        raise ValueError(
            f"this rank has one of {parts} parts of the model (mpu), which are not put together: use save_checkpoint"
        )
    # Parameters themselves: nothing is cloned, and they tell who holds them.
    state = engine.module_state_dict(keep_vars=True, exclude_frozen_parameters=exclude_frozen)
    handles = {name: h for name, value in state.items() if (h := handle_of(value)) is not None}
    handles = {name: h for name, h in named_handles(engine.module).items() if name in state} | handles
    check_has_data({name: value for name, value in state.items() if name not in handles})
    check_written(handles)
    slots = {id(slot.param): slot for slot in engine._flat.slots()} if engine._flat is not None else {}

    tensors: dict[str, _Tensor] = {}
    sources: dict[str, _Source] = {}
    aliases: dict[str, str] = {}
    owners: dict[object, str] = {}
    others: list[str] = []
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            others.append(name)
            continue
        _check_storable(name, value)
        handle = handles.get(name)
        owner = owners.setdefault(_identity(value) if handle is None else handle.id, name)
        if owner != name:
            aliases[name] = owner
            continue
        param: Any = value if handle is None else handle.param
        source = _source_of(engine, param, handle, slots.get(id(param)), wanted)
        is_weight = isinstance(param, torch.nn.Parameter) and source.held.is_floating_point
        tensors[name] = _Tensor(name, tuple(param.shape), wanted if is_weight and wanted is not None else source.held)
        sources[name] = source
    if others:
        warning_once(f"safetensors files hold tensors only, so that these entries were left out: {', '.join(others)}")
    if not tensors:
        raise ValueError(
            "there is nothing to export: the model has no buffers, and no parameters that are not left out"
        )
    return _Plan(_files(tensors, aliases, limit, dist.get_world_size()), sources)


def _check_storable(name: str, value: torch.Tensor) -> None:
    plain = value.layout is torch.strided and not hasattr(value, "placements")
    if not plain or value.dtype not in SAFETENSORS_DTYPES:
        kind = "a DTensor" if hasattr(value, "placements") else f"{value.dtype}, {value.layout}"
        raise ValueError(f"{name!r} is {kind}, which safetensors files cannot hold: save it by save_checkpoint")


def _identity(tensor: torch.Tensor) -> object:
    """Equal for the same elements only."""
    if not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _source_of(
    engine: DeepSpeedEngine,
    value: torch.Tensor,
    handle: ParamHandle | None,
    slot: Slot | None,
    wanted: torch.dtype | None,
) -> _Source:
    """Masters where the model's own weights are not the dtype that is wanted, and rounded; else the weights."""
    flat = engine._flat
    rounded = slot is not None and not slot.bucket.full_precision and wanted not in (None, slot.bucket.weight_dtype)
    if slot is not None and flat is not None and rounded:
        return _master(flat, slot, handle)
    if handle is not None:
        return _shards(handle, handle.dtype, lambda: handle.shard)
    if isinstance(value, torch.nn.Parameter) or dist.get_world_size() == 1:
        return _Source(lambda: value.detach().reshape(-1), value.dtype, copies=not value.is_contiguous())
    # Each rank may have buffers of its own (running averages): those of rank 0 count, all of them.
    spans = ((0, value.numel()), *(((0, 0),) * (dist.get_world_size() - 1)))
    first = dist.get_rank() == 0
    return _Source(
        lambda: (value.detach() if first else value.new_empty(0)).reshape(-1).to(engine.device), value.dtype, spans
    )


def _master(flat: FlatOptimizer, slot: Slot, handle: ParamHandle | None) -> _Source:
    flat._require_alive()
    bucket = slot.bucket
    position = bucket.position[id(slot)]
    if handle is not None and isinstance(bucket, ShardBucket):
        end = slot.start + -(-slot.numel // bucket.world_size)
        return _shards(handle, torch.float32, lambda: flat.states.read(bucket, None, slot.start, end))
    if flat.stage == 0:
        return _Source(lambda: flat.master_of(bucket)[position].detach().reshape(-1), torch.float32)
    parts = [slot.overlap(rank) for rank in range(flat.transport.world_size)]
    spans = tuple((begin, begin + numel) for begin, _, numel in parts)
    _, at, numel = parts[flat.transport.rank]
    return _Source(lambda: flat.states.read(bucket, None, at, at + numel), torch.float32, spans, flat.transport.group)


def _shards(handle: ParamHandle, held: torch.dtype, shard: Callable[[], torch.Tensor]) -> _Source:
    transport = handle.transport.plain
    size, numel = handle.shard_numel, handle.numel
    spans = tuple((min(numel, r * size), min(numel, (r + 1) * size)) for r in range(transport.world_size))
    begin, end = handle.own_range
    return _Source(
        lambda: shard().detach()[: end - begin],
        held,
        spans if transport.world_size > 1 else None,
        transport.group,
        copies=handle.packed is not None,
    )


def _files(
    tensors: Mapping[str, _Tensor], aliases: Mapping[str, str], limit: int | None, world_size: int
) -> tuple[_File, ...]:
    shards = split_into_shards(tensors, limit)
    writers = assign_writers([sum(t.nbytes for t in shard.values()) for shard in shards], world_size)
    files = []
    for number, (shard, writer) in enumerate(zip(shards, writers, strict=True), start=1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        header, order = safetensors_header(shard, {a: name for a, name in aliases.items() if name in shard})
        files.append(_File(_STEM + part + _SUFFIX, writer, header, tuple(shard[name] for name in order)))
    return tuple(files)


def assign_writers(sizes: Sequence[int], world_size: int) -> list[int]:
    """Which rank writes each file, so that ranks write about as many bytes: the largest first, to whoever has least."""
    loads = [0] * world_size
    writers = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        writers[index] = loads.index(min(loads))
        loads[writers[index]] += sizes[index]
    return writers


def _agree(plan: _Plan) -> None:
    digests = everyone(plan.digest, CheckpointError)
    other = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if other:
        raise CheckpointError(
            f"ranks {other} would export other names, shapes or dtypes than rank 0: give all ranks the same arguments, "
            "and build the same model on each"
        )


# -- writing -----------------------------------------------------------------------------------------------------------


def _room(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _arriving(plan: _Plan, steps: Sequence[tuple[_File, _Tensor]]) -> Iterator[int]:
    """Bytes in the buffer of each weight that this rank collects."""
    for file, tensor in steps:
        source = plan.sources[tensor.name]
        if file.writer == dist.get_rank() and source.spans is not None:
            yield _room(tensor.numel * source.held.itemsize)


def _buffer_nbytes(plan: _Plan, steps: Sequence[tuple[_File, _Tensor]]) -> int:
    sizes = list(_arriving(plan, steps))
    return max([min(sum(sizes), _BUFFER_NBYTES), *sizes])


@dataclass(frozen=True)
class _Travelling:
    pending: Pending
    file: _File
    tensor: _Tensor
    whole: torch.Tensor | None


def _stream(plan: _Plan, steps: Sequence[tuple[_File, _Tensor]], writer: _Writer, buffer: torch.Tensor) -> None:
    """Brings each weight to who writes it, and writes. Collective; see [Note: order]."""
    travelling: deque[_Travelling] = deque()
    rank, filled = dist.get_rank(), 0

    def land(leave: int) -> None:
        while len(travelling) > leave:
            item = travelling.popleft()
            item.pending.wait()
            if item.whole is not None:
                writer.write(item.file, item.tensor, item.whole)

    for index, (file, tensor) in enumerate(steps):
        source = plan.sources[tensor.name]
        own = file.writer == rank
        members = [rank] if source.spans is None else dist.get_all_ranks_from_group(source.group)
        if file.writer not in members:
            continue  # the writer has it, or another group that holds it, too
        if source.copies:
            land(0)
        if source.spans is None:
            travelling.append(_Travelling(Pending(), file, tensor, source.own()))
            land(_IN_FLIGHT)
            continue
        whole = None
        if own:
            room = _room(tensor.numel * source.held.itemsize)
            if filled + room > buffer.numel():
                land(0)
                filled = 0
            whole = buffer[filled : filled + tensor.numel * source.held.itemsize]
            filled += room
        pending = _collect(source, whole, members, file.writer, index)
        travelling.append(_Travelling(pending, file, tensor, None if whole is None else whole.view(source.held)))
        land(_IN_FLIGHT)
    land(0)


def _collect(source: _Source, whole: torch.Tensor | None, members: Sequence[int], writer: int, index: int) -> Pending:
    """In bytes: backends do not know every dtype that a module may hold."""
    size = source.held.itemsize
    return collect_spans(
        source.own().view(torch.uint8),
        [(begin * size, end * size) for begin, end in source.spans or ()],
        whole,
        group=source.group,
        rank=members.index(dist.get_rank()),
        root=members.index(writer),
        tag=_TAG_BASE + index % _TAG_COUNT,
    )


class _Writer:
    """This rank's files, one after the other, under temporary names. After a failure it writes nothing more."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._staged: dict[str, Path] = {}
        self._open = contextlib.ExitStack()
        self._stream: BlockFile | None = None
        self._left = 0
        self._error: Exception | None = None

    def write(self, file: _File, tensor: _Tensor, value: torch.Tensor) -> None:
        """Appends the next tensor of ``file``; ``value`` is 1-D."""
        if self._error is not None:
            return
        try:
            if file.name not in self._staged:
                self._begin(file)
            self._append(tensor, value)
            self._left -= 1
            if not self._left:
                self._open.close()
        except Exception as error:  # whatever it is, see [Note: failures]
            self._error = error
            with contextlib.suppress(Exception):
                self._open.__exit__(type(error), error, error.__traceback__)

    def _begin(self, file: _File) -> None:
        scratch = self._folder / f".{file.name}.{secrets.token_hex(6)}.tmp"
        self._staged[file.name] = scratch
        self._stream = self._open.enter_context(BlockFile(scratch, buffer_nbytes=_FILE_BUFFER_NBYTES))
        self._stream.write(file.header)
        self._left = len(file.tensors)

    def _append(self, tensor: _Tensor, value: torch.Tensor) -> None:
        if self._stream is None:
            raise AssertionError("a tensor comes before its file; please report this")
        for part in value.split(_BLOCK_NUMEL):
            block = part.to(tensor.dtype).cpu().contiguous()
            narrowed = tensor.dtype == torch.float16 and part.dtype != torch.float16
            if narrowed and bool((block.isinf() & part.isfinite().cpu()).any()):
                raise ValueError(
                    f"{tensor.name!r} has values up to {float(part.abs().max()):g}, which are infinite in float16: "
                    "export with dtype=torch.bfloat16 or torch.float32"
                )
            if block.numel():
                self._stream.write(block.view(torch.uint8).numpy())

    def check(self) -> None:
        """Raises what has gone wrong."""
        if self._error is not None:
            raise self._error

    def commit(self) -> None:
        """Gives the files their names."""
        for name, scratch in self._staged.items():
            scratch.replace(self._folder / name)
        self._staged.clear()
        fsync_folder(self._folder)

    def discard(self) -> None:
        """Removes what has not got its name. Idempotent."""
        with contextlib.suppress(Exception):
            self._open.close()
        for scratch in self._staged.values():
            scratch.unlink(missing_ok=True)


# -- making it visible -------------------------------------------------------------------------------------------------


def _remove(folder: Path, pattern: re.Pattern[str], keep: Sequence[str] = ()) -> None:
    for path in list(folder.iterdir()):
        if pattern.fullmatch(path.name) and path.name not in keep:
            path.unlink(missing_ok=True)  # another rank may be removing its own, after a failure


def _publish(plan: _Plan, folder: Path, writer: _Writer) -> None:
    """Complete files get their names, the index comes after them, then what an earlier export left goes. Collective."""
    first, names = dist.get_rank() == 0, [file.name for file in plan.files]

    def make_way() -> None:
        # Else the old index would speak of old and new files at once, should this process die now.
        if first and len(names) > 1 and any((folder / name).exists() for name in names):
            (folder / _INDEX).unlink(missing_ok=True)

    def finish() -> None:
        if not first:
            return
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} on rank 0 lacks {', '.join(missing[:3])}, which other ranks have written: every rank must see "
                "the same folder"
            )
        if len(names) > 1:
            where = {tensor.name: file.name for file in plan.files for tensor in file.tensors}
            total = sum(file.nbytes for file in plan.files)
            body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            atomic_write_text(folder / _INDEX, json.dumps(body, indent=2) + "\n")
        else:
            (folder / _INDEX).unlink(missing_ok=True)
        _remove(folder, _OURS, keep=names)
        fsync_folder(folder)

    together(make_way, CheckpointError)
    together(writer.commit, CheckpointError)
    together(finish, CheckpointError)
