"""One partitioned parameter: its shard, its whole data while that is needed, and who needs it.

[Note: true shapes] A released parameter's data is one NaN of its own, expanded to the true shape: shape, numel, dtype and
device are right, reading gives NaN, most in-place writes raise. ``zero_`` and ``fill_`` succeed silently on such a
tensor, so that the next fetch looks at the NaN and names the parameter that was written while released.

[Note: one storage] Autograd may have saved a view of the whole data in the forward and read it in the backward, after a
release and another fetch. So a handle keeps one storage for life: released, it is resized to nothing; fetched, it gets
memory again, and old views see the same values. Whoever reads a view in between reads freed memory: the lifecycle must
hold a parameter for as long as an operation may want it. What users gather by hand they also keep views of, so that a
release by hand leaves the memory to those and takes a new storage.

[Note: the source of truth] ``param.ds_tensor`` is this rank's shard, and users may rebind its ``.data``. It is read at each
fetch; no other buffer shadows it. A shard that rests elsewhere (``rest``: a file, or the host) is read straight into this
rank's part of the whole data, which is gathered in place; ``ds_tensor`` is a stand-in that refuses every operation.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from deepspeed._core.aio import Transfer
from deepspeed._core.params.compress import PackedItem, QuantisedShard, SecondaryShards
from deepspeed._core.params.store import AwayShard, Region, ShardStore, Waits
from deepspeed._core.params.transport import GatherItem, ParamTransport
from deepspeed._core.reduce.transport import Pending
from deepspeed.utils.logging import warning_once

__all__ = [
    "ParamHandle",
    "PartitionedParamStatus",
    "ZeroParamStatus",
    "fetch",
    "handle_of",
    "handles_of",
    "move_shard",
    "settle_rebound",
]

_ids = itertools.count()


class ZeroParamStatus(enum.Enum):
    """Where the data of a partitioned parameter is."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class PartitionedParamStatus(enum.Enum):
    """Whether the data of a shard is in memory (``ds_tensor.status``)."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


def shard_numel_of(numel: int, world_size: int) -> int:
    """Elements of a rank's shard: the parameter cut into equal pieces, the last one padded."""
    return -(-numel // world_size)


class ParamHandle:
    """Sole writer of a parameter's ``data`` and ``ds_*`` attributes. Not collective by itself; :func:`fetch` is."""

    def __init__(
        self, param: torch.nn.Parameter, shard: torch.Tensor, transport: ParamTransport, *, name: str = ""
    ) -> None:
        self.id = next(_ids)
        self.name = name
        self.transport = transport
        self.shape = param.shape
        self.numel = param.numel()
        self.shard_numel = shard_numel_of(self.numel, transport.world_size)
        self.persistent = False
        self.holds: dict[Any, int] = {}
        """Who needs the data now, with multiplicity; see :meth:`describe`."""
        self.on_change: Callable[[ParamHandle, bool], None] | None = None
        """Told when memory for the whole data is taken (True) or given back."""
        self.on_write: Callable[[ParamHandle], None] | None = None
        """Told when somebody other than the optimizer writes to the shard."""
        self.exact = True
        """Whether the whole data, while it is there, has every bit of the shards."""
        self.born_empty = False
        """Made from a parameter without data (on the meta device): NaN until somebody writes it."""
        self.trained = False
        """Whether the shard is a part of an engine's buffers."""
        self.packed: QuantisedShard | None = None
        """Holds the shard in 8 bits, in the place of ``ds_tensor``."""
        self.rest: ShardStore | None = None
        """Where :meth:`adopt` puts shards; None for memory."""
        self.away: Region | None = None
        """The shard's place there."""
        self.kept: Any = None
        """A store's permission to stay in memory."""
        self.device = shard.device
        """Where the whole data is used."""
        self._param = weakref.ref(param)
        self._pending: Pending | None = None
        self._full: torch.Tensor | None = None
        self._alone: torch.Tensor | None = None
        self._reading: Waits | None = None
        self._poison: torch.Tensor = torch.empty(0)
        param.ds_id = self.id  # type: ignore[attr-defined]
        param.ds_shape = param.shape  # type: ignore[attr-defined]
        param.ds_numel = self.numel  # type: ignore[attr-defined]
        param.ds_persist = False  # type: ignore[attr-defined]
        param.ds_active_sub_modules = set()  # type: ignore[attr-defined]
        param.ds_process_group = transport.group  # type: ignore[attr-defined]
        param._ds_handle = self  # type: ignore[attr-defined]
        self.status = ZeroParamStatus.NOT_AVAILABLE
        self.adopt(shard)

    # -- facts -------------------------------------------------------------------------------------------------------

    @property
    def param(self) -> torch.nn.Parameter:
        param = self._param()
        if param is None:
            raise AssertionError(f"parameter {self.label} is gone, and its handle still in use; please report this")
        return param

    @property
    def alive(self) -> bool:
        return self._param() is not None

    @property
    def shard(self) -> torch.Tensor:
        """This rank's part, 1-D, ``shard_numel`` elements; the last rank's end is padding.

        A copy if it is packed or rests elsewhere; write with :meth:`store`.
        """
        if self.away is not None:
            return self.away.read(self.device)
        if self.packed is not None:
            out = torch.empty(self.shard_numel, dtype=self.packed.dtype, device=self.packed.packed.device)
            return self.packed.dequantise_into(out)
        return self.param.ds_tensor  # type: ignore[attr-defined,no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.dtype if self.packed is not None else self.param.ds_tensor.dtype  # type: ignore[attr-defined,no-any-return]

    @property
    def alone(self) -> bool:
        """Whether the shard in memory is the whole data, of which there is no other copy."""
        return self._full is None

    def store(self, values: torch.Tensor, begin: int = 0) -> None:
        """Writes elements of the shard, from ``begin``."""
        self.written()
        if self.away is not None:
            self.away.write(values, begin)
            return
        if self.packed is None:
            target = self.shard[begin : begin + values.numel()]
            if target.data_ptr() != values.data_ptr():
                target.copy_(values)
            return
        shard = self.shard
        shard[begin : begin + values.numel()].copy_(values)
        self.pack(shard)

    def begin_store(self, values: torch.Tensor) -> Transfer | None:
        """Writes the whole shard; ``values`` must stay as they are until what is returned was waited for."""
        if self.away is None:
            self.store(values)
            return None
        self.written()
        return self.away.begin_write(values)

    def written(self) -> None:
        """Says that the shard has changed."""
        if self.on_write is not None:
            self.on_write(self)

    def refine(self) -> None:
        """Gathers available data again with all bits, if it has lost some on the way. Collective."""
        if self.available and not self.exact and self.packed is None:
            self.transport.plain.gather([GatherItem(self.shard, self.full, self.id)]).wait()
            self.exact = True

    def pack(self, shard: torch.Tensor) -> None:
        """Keeps ``shard`` in 8-bit blocks from now on; ``ds_tensor`` is their bytes."""
        self.packed = QuantisedShard(shard)
        self.packed.packed.ds_numel = shard.numel()  # type: ignore[attr-defined]
        self.param.ds_tensor = self.packed.packed  # type: ignore[attr-defined]

    @property
    def label(self) -> str:
        return self.name or f"#{self.id} of shape {tuple(self.shape)}"

    @property
    def status(self) -> ZeroParamStatus:
        return self._status

    @status.setter
    def status(self, value: ZeroParamStatus) -> None:
        self._status = value
        self.param.ds_status = value  # type: ignore[attr-defined]

    @property
    def available(self) -> bool:
        return self._status is ZeroParamStatus.AVAILABLE

    @property
    def in_flight(self) -> bool:
        return self._status is ZeroParamStatus.INFLIGHT

    @property
    def own_range(self) -> tuple[int, int]:
        """``[begin, end)`` of the parameter's elements that this rank's shard holds."""
        begin = min(self.numel, self.transport.rank * self.shard_numel)
        return begin, min(self.numel, begin + self.shard_numel)

    def describe(self) -> str:
        """Status and holds, for reports."""
        return f"{self.label}: {self._status.name}, held by {[str(h) for h in self.holds] or 'nobody'}"

    # -- data --------------------------------------------------------------------------------------------------------

    def adopt(self, shard: torch.Tensor) -> None:
        """Takes ``shard`` (1-D, padded; any dtype) as this rank's part and releases the parameter.

        If it is to rest elsewhere, its values go there, and the tensor is free afterwards.
        """
        if shard.numel() != self.shard_numel or shard.dim() != 1:
            raise AssertionError(f"shard of {self.label} has shape {tuple(shard.shape)}; please report this")
        with torch.inference_mode(False):
            shard = shard.detach()
            self.away = self.rest.put(shard, self.away) if self.rest is not None and self.numel else None
            self._present(shard)
            numeric = shard.is_floating_point() or shard.is_complex()
            lowest = 0 if shard.dtype == torch.bool or numeric else torch.iinfo(shard.dtype).min
            poison = float("nan") if numeric else lowest
            self._poison = torch.full((), poison, dtype=shard.dtype, device=shard.device)
            self._full = None
            if self.transport.world_size > 1 or self.away is not None:
                self._full = self._no_memory(shard)
        self._pending = None
        self.packed = None
        self._hide()

    def _present(self, shard: torch.Tensor) -> None:
        """``ds_tensor`` and its attributes."""
        shown = shard if self.away is None else self.away.shown(shard, self.label)
        absent = isinstance(shown, AwayShard)
        status = PartitionedParamStatus.NOT_AVAILABLE if absent else PartitionedParamStatus.AVAILABLE
        shown.ds_numel, shown.status = shard.numel(), status  # type: ignore[attr-defined]
        self.param.ds_tensor = shown  # type: ignore[attr-defined]

    def _no_memory(self, like: torch.Tensor) -> torch.Tensor:
        """A tensor for the whole data, whose storage is empty."""
        whole = like.new_empty(0)
        whole.resize_(self.transport.world_size * self.shard_numel)
        whole.untyped_storage().resize_(0)
        return whole

    def _hide(self) -> None:
        if self.numel == 0:
            self._show(self.shard)  # nothing to fetch, ever
            return
        self.param.data = self._poison.expand(self.shape)
        self.status = ZeroParamStatus.NOT_AVAILABLE

    def _show(self, whole: torch.Tensor) -> None:
        self.param.data = whole[: self.numel].view(self.shape)
        self.status = ZeroParamStatus.AVAILABLE

    @property
    def full(self) -> torch.Tensor:
        """The whole data, 1-D and padded, while it is there; writing to it goes past autograd's version counter."""
        if self._full is not None:
            return self._full
        return self._alone if self.packed is not None and self._alone is not None else self.shard

    def storage_address(self) -> int:
        """Where the whole data lies now; 0 while released. Views of the parameter have the same."""
        return self.full.untyped_storage().data_ptr() if self.available and self.numel else 0

    def check_untouched(self) -> None:
        """Raises if somebody wrote to the released parameter, see [Note: true shapes]. Reads one element.

        A cast of the module (``half()``, ``to(dtype)``) is carried out on the shard, unless an engine trains it.
        """
        poison = self._poison
        if self.param.data_ptr() != poison.data_ptr():
            self._settle_replaced()
        elif poison.device.type == "cpu" and poison.is_floating_point() and not poison.isnan().item():
            poison.fill_(float("nan"))
            raise RuntimeError(
                f"parameter {self.label} was written to while it was partitioned, and the value is lost: write inside "
                "`with deepspeed.zero.GatheredParameters(param, modifier_rank=0):`"
            )

    def _settle_replaced(self) -> None:
        data = self.param.data
        self._hide()
        if data.shape == self.shape and data.device == self._poison.device and data.isnan().all().item():
            # Nothing but the placeholder: cast, or copied, as Transformers does when it pads a bias by nothing.
            if data.dtype == self.dtype:
                return
            if not self.trained:
                self.convert(data.dtype)
                return
        was = f"{data.dtype} data of shape {tuple(data.shape)} on {data.device}"
        raise RuntimeError(
            f"parameter {self.label} was given {was} while it was partitioned, and that is lost. To change its values, "
            "assign inside `with deepspeed.zero.GatheredParameters(param, modifier_rank=0):`; to change its shape, put a "
            "new parameter into the module; dtype and device of what an engine trains come from its config"
        )

    def settle_cast(self) -> None:
        """Carries out on the shard what a cast of the module did to available data, and releases that."""
        if self.available and self.param.dtype != self.dtype and not self.holds and not self.trained:
            dtype = self.param.dtype
            self.release()
            self.convert(dtype)

    def convert(self, dtype: torch.dtype) -> None:
        """Casts the shard of a released parameter."""
        self.adopt(self.shard.to(dtype))

    def prepare(self, *, read: bool = True) -> GatherItem | PackedItem:
        """Allocates the whole data and says what to gather. The parameter is in flight until :meth:`finish`.

        A shard that rests elsewhere is there after :meth:`await_shard`, unless it need not be read.
        """
        if self.on_change is not None:
            self.on_change(self, True)
        if self.packed is not None:
            if self._full is None:
                self._alone = self.shard
                return GatherItem(self._alone, self._alone, self.id)
            self._full.untyped_storage().resize_(self._full.numel() * self._full.element_size())
            self.status = ZeroParamStatus.INFLIGHT
            return PackedItem(self.packed, self._full, self.id)
        if self._full is None:
            return GatherItem(self.shard, self.shard, self.id)
        self._full.untyped_storage().resize_(self._full.numel() * self._full.element_size())
        self.status = ZeroParamStatus.INFLIGHT
        if self.away is None:
            return GatherItem(self.shard, self._full, self.id)
        own = self._full[self.transport.rank * self.shard_numel :][: self.shard_numel]
        if read:
            with _naming(self):
                self._reading = self.away.begin_read(own)
        return GatherItem(own, self._full, self.id)

    def await_shard(self) -> None:
        """Returns when a shard that rests elsewhere has been read. Raises ``OSError``."""
        reading, self._reading = self._reading, None
        if reading is not None:
            with _naming(self):
                reading.wait()

    def lend(self) -> GatherItem | PackedItem:
        """What to give to the ranks that gather this parameter while this one has it, or is about to."""
        if self._full is None:
            return GatherItem(self.full, self.full, self.id)
        unread = torch.empty_like(self._full)
        return PackedItem(self.packed, unread, self.id) if self.packed else GatherItem(self.shard, unread, self.id)

    def track(self, pending: Pending) -> None:
        """Notes the gather that brings the data, or for which the shard is lent."""
        earlier, self._pending = self._pending, pending
        if earlier is not None:

            def finish() -> None:
                earlier.wait()
                pending.wait()

            self._pending = Pending(finish=finish)
        if not self.available:
            self.status = ZeroParamStatus.INFLIGHT

    def finish(self) -> None:
        """Waits for the gather; the parameter is available afterwards. Idempotent."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.wait()
        except BaseException:
            self._free()
            raise
        if self._status is ZeroParamStatus.INFLIGHT:
            self._show(self.full)

    def allocate(self) -> torch.Tensor:
        """Whole data with unknown content, without communication: for someone who fills all of it. Returns ``full``."""
        if self._status is ZeroParamStatus.NOT_AVAILABLE:
            self.check_untouched()
            self.prepare(read=False)
            self._show(self.full)
        return self.full

    def detach_copy(self) -> None:
        """Makes the available data a copy that belongs to nobody else: edits get lost at :meth:`show_again`."""
        with torch.inference_mode(False):
            self.param.data = self.param.data.clone()

    def show_again(self) -> None:
        """Undoes :meth:`detach_copy`, and assignments to the parameter's data."""
        if self.available:
            self._show(self.full)

    def write_back(self) -> None:
        """Takes this rank's part of the whole data into the shard. No communication."""
        if not self.available:
            raise AssertionError(f"write_back of released {self.label}; please report this")
        flat = self.param.data.detach().reshape(-1)
        if flat.numel() != self.numel:
            raise ValueError(
                f"parameter {self.label} of shape {tuple(self.shape)} was given data of shape "
                f"{tuple(self.param.data.shape)} while gathered: a partitioned parameter keeps its shape. Put a new "
                "parameter into the module instead"
            )
        begin, end = self.own_range
        if self.away is not None or flat.data_ptr() != self.shard.data_ptr():
            self.store(flat[begin:end])

    def release(self, *, by_hand: bool = False) -> None:
        """Frees the whole data, whoever holds it. Waits for a gather in flight. Idempotent.

        ``by_hand``: views that somebody still has keep the memory, see [Note: one storage].
        """
        if self._status is ZeroParamStatus.NOT_AVAILABLE or not self.numel:
            return
        self.finish()
        self._free(by_hand=by_hand)

    def _free(self, *, by_hand: bool = False) -> None:
        with contextlib.suppress(OSError):  # threads write to the memory until then
            self.await_shard()
        if self.on_change is not None:
            self.on_change(self, False)
        replaced = self.param.dtype == self.dtype and self.param.data_ptr() != self.full.data_ptr()
        if replaced and self.available and not by_hand:
            warning_once(
                f"parameter {self.label} was given other data while it was gathered (param.data = ..., in a forward?): "
                "that is dropped, since its shards did not change. Write in place, inside "
                "`with deepspeed.zero.GatheredParameters(param, modifier_rank=0):`"
            )
        self._hide()
        self._alone = None
        if self._full is None:
            return
        storage = self._full.untyped_storage()
        if by_hand or not storage.resizable():  # somebody's numpy array, say
            with torch.inference_mode(False):
                self._full = self._no_memory(self._full)
        else:
            storage.resize_(0)

    def dissolve(self, data: torch.Tensor | None = None) -> None:
        """Makes the parameter an ordinary, whole one again: with ``data``, else with its own, which must be available."""
        if data is None and not self.available:
            raise AssertionError(f"dissolving {self.label}, which is not whole; please report this")
        param = self.param
        if data is None:
            data = param.data.clone()
        else:
            self.release()
        param.data = data
        for name in [n for n in vars(param) if n.startswith("ds_")]:
            delattr(param, name)
        for name in ("_ds_handle", "__deepcopy__", "__reduce_ex__", *_METHODS):
            vars(param).pop(name, None)
        # Whoever still has this handle, as an earlier engine, has nothing to release.
        self._status, self.on_change, self._full = ZeroParamStatus.NOT_AVAILABLE, None, None
        self.away = self.rest = self.kept = None


# Names that partition_parameters puts on parameters besides ds_*.
_METHODS = (
    "all_gather",
    "all_gather_coalesced",
    "partition",
    "partition_numel",
    "padding_size",
    "aligned_size",
    "item",
)


@contextlib.contextmanager
def _naming(handle: ParamHandle) -> Iterator[None]:
    """Errors of the disk inside say which parameter they are about."""
    try:
        yield
    except OSError as error:
        said = f"the shard of parameter {handle.label} cannot be read: {error.strerror}"
        raise OSError(error.errno, said, error.filename) from error


def move_shard(handle: ParamHandle, rest: ShardStore | None) -> None:
    """Lets the shard of a released parameter rest there from now on; None: in memory of its own."""
    if rest is not handle.rest:
        shard = handle.shard
        handle.rest = rest
        handle.adopt(shard)


def settle_rebound(handle: ParamHandle) -> None:
    """Takes in what a user has put in the place of a ``ds_tensor`` that rests elsewhere."""
    if handle.away is None:
        return
    shown = handle.param.ds_tensor  # type: ignore[attr-defined]
    if not isinstance(shown, AwayShard) and not handle.away.shows(shown):
        handle.store(shown)
        handle._present(shown)


def handle_of(tensor: Any) -> ParamHandle | None:
    """The handle of a partitioned parameter; None for anything else."""
    handle: ParamHandle | None = getattr(tensor, "_ds_handle", None)
    return handle


def handles_of(tensors: Iterable[Any]) -> list[ParamHandle]:
    """Handles of the partitioned ones among ``tensors``, each once, in order."""
    found: dict[int, ParamHandle] = {}
    for tensor in tensors:
        handle = handle_of(tensor)
        if handle is not None:
            found.setdefault(handle.id, handle)
    return list(found.values())


def fetch(
    handles: Sequence[ParamHandle],
    *,
    exact: bool = False,
    secondary: SecondaryShards | None = None,
    join: bool = False,
) -> int:
    """Starts gathering the released ones, together; returns their elements. Collective.

    Wait with :meth:`ParamHandle.finish`. Handles over different groups are gathered group by group. ``exact``: with all
    bits, whatever the transport; ``secondary``: from these copies (hpZ), where they are; ``join``: gathers all of them,
    for ranks that miss some that are here.
    """
    wanted = [h for h in handles if join or h._status is ZeroParamStatus.NOT_AVAILABLE]
    for handle in wanted:  # before any of them takes memory
        if handle._status is ZeroParamStatus.NOT_AVAILABLE:
            handle.check_untouched()
    total = sum(handle.numel for handle in wanted)
    if secondary is not None and not exact:
        near = [handle for handle in wanted if handle.id in secondary]
        if near:
            wanted = [handle for handle in wanted if handle.id not in secondary]
            _start(near, exact, lambda items: secondary.gather([(i.key, i.full, i.key) for i in items]))
    groups: dict[tuple[int, bool], list[ParamHandle]] = {}
    for handle in wanted:
        groups.setdefault((id(handle.transport), exact and handle.packed is None), []).append(handle)
    for (_, plain), members in groups.items():
        transport = members[0].transport
        chosen = transport.plain if plain else transport
        _start(members, plain or not transport.lossy, chosen.gather)
    return total


def _start(members: Sequence[ParamHandle], exact: bool, gather: Callable[[list[Any]], Pending]) -> None:
    released = [handle for handle in members if handle._status is ZeroParamStatus.NOT_AVAILABLE]
    missing = {handle.id for handle in released}
    begun: list[ParamHandle] = []
    items = []
    try:
        for handle in members:
            if handle.id in missing:
                begun.append(handle)
            items.append(handle.prepare() if handle.id in missing else handle.lend())
        for handle in released:
            handle.await_shard()
        pending = gather(items)
    except BaseException:
        for handle in begun:
            handle._free()
        raise
    for handle in members:
        if handle.id in missing:
            handle.exact = exact
        handle.track(pending)
