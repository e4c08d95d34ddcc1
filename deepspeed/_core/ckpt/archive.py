"""Writing ``torch.save`` files from a stream of tiles, without the tensors being in memory.

[Note: format] The file is what ``torch.save`` writes since torch 1.6: a zip archive of uncompressed records, ``data.pkl``
with tensors as references to the records ``data/<n>``, each aligned to 64 bytes. It is written front to back, with
checksums after the data, so that any stream will do.
"""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from deepspeed._core.ckpt.source import Rope, Source
from deepspeed._core.ckpt.zip import Sink, ZipWriter

__all__ = ["Archive", "Sink", "save_archive"]

_ALIGNMENT = 64

# Tensors up to this size are copied when an archive is made: cheaper than keeping track of them.
_SMALL_NBYTES = 64 << 10

_STORAGE_CLASSES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
    torch.complex64: "ComplexFloatStorage",
    torch.complex128: "ComplexDoubleStorage",
}


class _Record:
    """Stands for a storage in the pickle."""

    def __init__(self, source: Source) -> None:
        self.source = source


class _Pickler(pickle.Pickler):
    """Writes tensors and sources as references to records, each with the tensor's own elements and no others."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=2)  # as torch.save
        self.records: list[Source] = []
        self._keys: dict[int, str] = {}
        # Same elements, same record, so that tied tensors stay tied. Values keep the tensors alive, and so their addresses.
        self._seen: dict[object, tuple[Source, torch.Tensor]] = {}

    def persistent_id(self, obj: Any) -> Any:
        """How torch names a storage: its kind, its record, its device and its number of elements."""
        if not isinstance(obj, _Record):
            return None
        source = obj.source
        if id(source) not in self._keys:
            self._keys[id(source)] = str(len(self.records))
            self.records.append(source)
        name = _STORAGE_CLASSES.get(source.dtype)
        kind = getattr(torch, name) if name is not None else torch.UntypedStorage
        return ("storage", kind, self._keys[id(source)], "cpu", source.numel if name is not None else source.nbytes)

    def reducer_override(self, obj: Any) -> Any:
        """Tensors by their elements; everything else as usual."""
        if isinstance(obj, Source):
            return _rebuild(obj, False)
        if isinstance(obj, torch.nn.Parameter):
            return torch._utils._rebuild_parameter, (obj.detach(), obj.requires_grad, OrderedDict())
        if isinstance(obj, torch.Tensor) and (obj.is_quantized or obj.is_nested):
            raise ValueError(
                f"a tensor of dtype {obj.dtype} and layout {obj.layout}{', nested' if obj.is_nested else ''} cannot be "
                "saved: store what it is made of, such as plain tensors of its values and scales"
            )
        if isinstance(obj, torch.Tensor) and obj.layout is torch.strided and obj.device.type != "meta":
            return _rebuild(self._source_of(obj), obj.requires_grad and obj.is_leaf)
        return NotImplemented

    def _source_of(self, tensor: torch.Tensor) -> Source:
        # Conjugates and negatives may be other readings of the same memory.
        reading = tensor.dtype, tensor.is_conj(), tensor.is_neg()
        key = tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), reading
        if not tensor.numel():
            return Rope([tensor], tensor.shape)
        if key not in self._seen:
            data = tensor.detach()
            if data.numel() * data.element_size() <= _SMALL_NBYTES:
                data = data.cpu().clone()
            self._seen[key] = Rope([data], tensor.shape), tensor
        return self._seen[key][0]


def _rebuild(source: Source, requires_grad: bool) -> tuple[Any, ...]:
    strides, step = [], 1
    for size in reversed(source.shape):
        strides.append(step)
        step *= max(size, 1)
    arguments: tuple[Any, ...] = (
        _Record(source),
        0,
        source.shape,
        tuple(reversed(strides)),
        requires_grad,
        OrderedDict(),
    )
    if source.dtype in _STORAGE_CLASSES:
        return torch._utils._rebuild_tensor_v2, arguments
    return torch._utils._rebuild_tensor_v3, (*arguments, source.dtype)


class Archive:
    """An object ready to be written: plain values are fixed now, tensors when they are written or frozen.

    Args:
        content: what ``torch.load`` will give back. Tensors become CPU tensors of the same values, strided and compact,
            whatever storage they share with others; :class:`Source` objects become tensors, too.
    """

    def __init__(self, content: Any) -> None:
        stream = io.BytesIO()
        pickler = _Pickler(stream)
        pickler.dump(content)
        self._pickle = stream.getvalue()
        self.sources: Sequence[Source] = pickler.records

    @property
    def nbytes(self) -> int:
        """About the size of the file."""
        return len(self._pickle) + sum(source.nbytes for source in self.sources)

    @property
    def collective(self) -> bool:
        """Whether writing takes part in communication."""
        return any(source.collective for source in self.sources)

    @property
    def torn(self) -> bool:
        """Whether tensors were changed before they were written, without :meth:`freeze`: the file is worth nothing then."""
        return any(source.torn for source in self.sources)

    @property
    def error(self) -> OSError | None:
        """Why some of its content could not be read."""
        return next((source.error for source in self.sources if source.error is not None), None)

    def freeze(self) -> None:
        """The content from now on does not depend on the tensors that were given."""
        for source in reversed(self.sources):  # whoever writes it comes from the other end
            source.freeze()

    def foreign_names(self) -> list[str]:
        """Classes and functions in the content that torch's ``weights_only`` loading does not know by itself."""
        outline = io.BytesIO()
        with zipfile.ZipFile(outline, "w") as archive:
            archive.writestr("archive/data.pkl", self._pickle)
            archive.writestr("archive/version", "3\n")
        outline.seek(0)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(cast("Any", outline))
        return sorted(names)

    def write(self, sink: Sink) -> None:
        """Writes the file, once. Collective if a source is."""
        archive = ZipWriter(sink, _ALIGNMENT)
        _write_record(archive, "data.pkl", len(self._pickle), lambda take: take(self._pickle))
        for name, text in (("byteorder", sys.byteorder.encode()), (".storage_alignment", str(_ALIGNMENT).encode())):
            _write_record(archive, name, len(text), lambda take, text=text: take(text))  # type: ignore[misc]
        for key, source in enumerate(self.sources):
            _write_record(archive, f"data/{key}", source.nbytes, _tiles_of(source))
        _write_record(archive, "version", 2, lambda take: take(b"3\n"))
        archive.close()


def save_archive(content: Any, sink: Sink) -> None:
    """``torch.save(content, sink)`` for content with sources in it."""
    Archive(content).write(sink)


def _tiles_of(source: Source) -> Callable[[Callable[[Any], None]], None]:
    return lambda take: source.write(
        lambda tile: take(tile.contiguous().view(torch.uint8).numpy()) if tile.numel() else None
    )


def _write_record(archive: ZipWriter, name: str, nbytes: int, fill: Callable[[Callable[[Any], None]], None]) -> None:
    count = archive.record(f"archive/{name}", fill)
    if count != nbytes:
        raise AssertionError(
            f"record {name} was to have {nbytes} bytes, but its source gave {count}; please report this"
        )
