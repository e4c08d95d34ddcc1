"""Reading ranges of fp32 masters and optimizer state out of a native folder, whoever saved it on how many ranks.

Glossary. *Group*: parameters that one optimizer parameter group updates. *File buffer*: one flat tensor in a file that
holds a part of a group: the partition of a rank (stages 1, 2), a sub-group of a rank (stage 3), a parameter (stage 0).
Each group has a ``ShardLayout`` over its file buffers, so that filling a shard of any other layout is one ``reshard``;
files are memory-mapped, so that only the ranges asked for are read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepspeed._core.ckpt.io import FragmentAddress, InertObject, load_file
from deepspeed._core.ckpt.native import (
    check_format,
    model_states_path,
    optim_states_paths,
    read_zero_group_shapes,
)
from deepspeed._core.layout.reshard import Copy, reshard
from deepspeed._core.layout.spans import ShardLayout, Span, numels_of
from deepspeed.errors import CheckpointError

__all__ = ["MASTER", "NativeZeroReader", "ZeroGroup", "ZeroReader", "common_entries"]

MASTER = "fp32"
"""Key of the fp32 master weights, beside the optimizer's own state keys such as ``exp_avg``."""


@dataclass(frozen=True)
class ZeroGroup:
    """One parameter group as the files hold it.

    Attributes:
        shapes: parameter names and shapes, in file order.
        layout: where the elements are; its "ranks" are indices into ``buffers``.
        buffers: flat memory-mapped tensors by key (``fp32``, ``exp_avg``, ...).
        state_keys: keys of element-wise optimizer state, sorted; empty before the first step.
        state_scalars: state that is one value for the group, such as ``step`` (a number or a 0-d tensor).
        param_group: the group's entry of the optimizer's ``param_groups`` (lr, betas, ...), without ``params``.
    """

    shapes: dict[str, tuple[int, ...]]
    layout: ShardLayout
    buffers: tuple[dict[str, torch.Tensor], ...]
    state_keys: tuple[str, ...]
    state_scalars: dict[str, Any]
    param_group: dict[str, Any]


class ZeroReader:
    """An opened checkpoint: its parameter groups, and where their elements are. Not collective.

    Attributes:
        tag_dir: the folder.
        model_state: the model file (of stage 3: that of rank 0), memory-mapped.
        zero_stage: 0 to 3.
        world_size: number of data-parallel ranks that saved it.
        groups: the parameter groups, in file order.
        common: what holds for the whole optimizer: ``loss_scaler`` (a dict), ``overflow``, ``clip_grad``, ...
    """

    def __init__(
        self,
        tag_dir: Path,
        model_state: dict[str, Any],
        *,
        zero_stage: int,
        world_size: int,
        groups: tuple[ZeroGroup, ...],
        common: dict[str, Any],
    ) -> None:
        self.tag_dir = tag_dir
        self.model_state = model_state
        self.zero_stage, self.world_size = zero_stage, world_size
        self.groups, self.common = groups, common
        self._group_of = {name: index for index, group in enumerate(groups) for name in group.shapes}
        # By identity of the layout, which is kept, too: comparing layouts would take longer than planning.
        self._plans: dict[tuple[int, int | None, int], tuple[ShardLayout, list[tuple[int, list[Copy]]]]] = {}

    def scalars(self, group: int) -> dict[str, Any]:
        """``{"state": ..., "param_group": ...}`` of a group, as in ``ZeroGroup``; see ``common`` for the rest."""
        return {"state": dict(self.groups[group].state_scalars), "param_group": dict(self.groups[group].param_group)}

    def whole_state(self, name: str) -> dict[str, Any] | None:
        """The optimizer's state of one parameter as it is in a stage 0 file, of any shapes; None in other folders."""
        raise NotImplementedError

    def fill(
        self,
        group: int | None,
        key: str,
        layout: ShardLayout,
        rank: int,
        out: torch.Tensor,
        copy: Callable[[torch.Tensor, torch.Tensor], object] = torch.Tensor.copy_,
    ) -> None:
        """Copy a rank's part of masters or optimizer state into its flat buffer.

        Args:
            group: file group of the wanted parameters; None looks each name up (for another grouping than the saved).
            key: ``"fp32"`` or one of the group's ``state_keys``.
            layout: the destination's layout; its parameters may be in any order, or a part of those in the files.
            rank: the destination rank.
            out: 1-D, at least ``layout.buffer_numels[rank]`` elements, any dtype and device (values are cast).
                Padding is left as it is. State that the files lack for single parameters (never stepped) becomes zero.
            copy: copies to a part of ``out`` from a part of a mapped file; may do so later, see ``Ranges``.

        Raises:
            CheckpointError: a wanted name, key or range is not in the files. ``out`` is untouched then.
            ValueError: ``out`` does not fit ``layout``.
        """
        if out.dim() != 1 or out.numel() < layout.buffer_numels[rank]:
            raise ValueError(
                f"expected a flat buffer of {layout.buffer_numels[rank]} elements for rank {rank}, "
                f"got shape {tuple(out.shape)}"
            )
        moves = []
        for index, copies in self._plan_for(group, layout, rank):
            source = self.groups[index]
            if key != MASTER and key not in source.state_keys:
                known = ", ".join((MASTER, *source.state_keys))
                raise CheckpointError(f"{self.tag_dir}: group {index} has no state {key!r}; it has {known}")
            moves.append((source, copies))
        with torch.no_grad():
            for source, copies in moves:
                for move in copies:
                    target = out[move.dst_offset : move.dst_offset + move.numel]
                    held = source.buffers[move.src_rank].get(key)
                    if held is None:
                        target.zero_()
                    else:
                        copy(target, held[move.src_offset : move.src_offset + move.numel])

    def _plan_for(self, group: int | None, layout: ShardLayout, rank: int) -> list[tuple[int, list[Copy]]]:
        """Copies by file group. Plans are kept: masters and each state are filled by the same one."""
        key = id(layout), group, rank
        if key in self._plans:
            return self._plans[key][1]
        wanted: dict[int, list[Span]] = {}
        for span in layout.of_rank(rank):
            index = self._group_of.get(span.name)
            if index is None or (group is not None and index != group):
                where = "the checkpoint" if group is None else f"group {group} of the checkpoint"
                raise CheckpointError(f"{self.tag_dir}: parameter {span.name!r} is not in {where}")
            wanted.setdefault(index, []).append(span)
        plan: list[tuple[int, list[Copy]]] = []
        for index, spans in wanted.items():
            part = ShardLayout(layout.world_size, layout.buffer_numels, tuple(spans))
            try:
                plan.append((index, _merged(reshard(self.groups[index].layout, part, rank))))
            except ValueError as error:
                raise CheckpointError(f"{self.tag_dir} was saved from another model: {error}") from error
        self._plans[key] = layout, plan
        return plan


class NativeZeroReader(ZeroReader):
    """A native checkpoint folder of stage 0, 1, 2 or 3, opened for reading at any world size. Not collective.

    Args:
        tag_dir: the tag folder.
        param_names: per group, the names of the trained parameters in optimizer order. Needed for stage 0 folders of
            the reference, which store none; elsewhere the files' own names count.
        mp_rank: model-parallel rank whose files to read.
        model_state: content of the model file, if it has been loaded already.

    Raises:
        CheckpointError: files are missing, damaged or contradict each other.
    """

    def __init__(
        self,
        tag_dir: str | os.PathLike[str],
        *,
        param_names: Sequence[Sequence[str]] | None = None,
        mp_rank: int = 0,
        model_state: dict[str, Any] | None = None,
    ) -> None:
        folder = Path(tag_dir)
        path = model_states_path(tag_dir, mp_rank)
        self._whole_state: dict[str, dict[str, Any]] = {}
        model_state = load_file(path) if model_state is None else model_state
        check_format(model_state, path)
        paths = optim_states_paths(tag_dir, mp_rank)
        shapes = read_zero_group_shapes(model_state)
        if paths:
            states = _load_partitions(folder, paths)
            if shapes is None:
                raise CheckpointError(f"{path} has no 'param_shapes', so its ZeRO files cannot be read")
            zero_stage, world_size = int(states[0]["zero_stage"]), len(states)
            groups = (_stage3_groups if zero_stage == 3 else _stage12_groups)(shapes, states, folder)
            common = common_entries(states[0])
        else:
            _require_stage0(folder, model_state)
            if shapes is None and param_names is None:
                raise CheckpointError(f"{path} is a stage 0 file without parameter names; pass those of the optimizer")
            names = [list(group) for group in (param_names if shapes is None else shapes) or ()]
            zero_stage, world_size = 0, int(model_state.get("dp_world_size") or 1)
            groups, self._whole_state = _stage0_groups(names, model_state, path)
            common = common_entries(model_state.get("optimizer") or {})
        super().__init__(
            folder, model_state, zero_stage=zero_stage, world_size=world_size, groups=groups, common=common
        )

    def whole_state(self, name: str) -> dict[str, Any] | None:
        """See :meth:`ZeroReader.whole_state`."""
        return self._whole_state.get(name, {}) if self.zero_stage == 0 else None


def _require_stage0(tag_dir: Path, model_state: Mapping[str, Any]) -> None:
    config = model_state.get("ds_config")
    zero = (config.get("zero_optimization") if isinstance(config, Mapping) else None) or {}
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    if isinstance(stage, int) and stage > 0:
        raise CheckpointError(
            f"{tag_dir} was saved with ZeRO stage {stage}, but no *_optim_states.pt file is there; "
            "copy the whole folder, or load the module only"
        )


def _merged(copies: Sequence[Copy]) -> list[Copy]:
    """Copies of different parameters that adjoin on both sides as one: many small parameters are read at once."""
    merged: list[Copy] = []
    for copy in copies:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.src_rank == copy.src_rank
            and last.src_offset + last.numel == copy.src_offset
            and last.dst_offset + last.numel == copy.dst_offset
        ):
            merged[-1] = last._replace(numel=last.numel + copy.numel)
        else:
            merged.append(copy)
    return merged


def _load_partitions(tag_dir: Path, paths: Mapping[int, Path]) -> list[dict[str, Any]]:
    """The inner state of every rank's optimizer file, after checking that they are one complete set."""
    first = next(iter(paths))
    file = load_file(paths[first])
    world_size = _partition_count(file, paths[first])
    missing = [rank for rank in range(world_size) if rank not in paths]
    if missing:
        raise CheckpointError(
            f"{tag_dir}: expected optimizer files of {world_size} ranks, but those of rank "
            f"{', '.join(map(str, missing))} are missing"
        )
    # Files of higher ranks are left over from an earlier, larger run under this tag.
    files = [file if rank == first else load_file(paths[rank]) for rank in range(world_size)]
    expected = None
    for rank, file in enumerate(files):
        path, count = paths[rank], _partition_count(file, paths[rank])
        check_format(file, path)
        if count != world_size:
            raise CheckpointError(
                f"{path} is of a run on {count} ranks, {paths[first].name} of one on {world_size}: the folder mixes two "
                "saves"
            )
        marks = _marks(file["optimizer_state_dict"])
        expected = marks if expected is None else expected
        for key in marks.keys() & expected.keys():
            if marks[key] != expected[key]:
                raise CheckpointError(
                    f"{path} has {key} {marks[key]}, {paths[0].name} has {expected[key]}: the folder mixes two saves"
                )
    return [file["optimizer_state_dict"] for file in files]


def _marks(state: Mapping[str, Any]) -> dict[str, Any]:
    """What all ranks of one save have in common."""
    marks: dict[str, Any] = {"ZeRO stage": int(state["zero_stage"])}
    inner = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    entries = inner.get("state") if isinstance(inner, Mapping) else None
    for index, entry in entries.items() if isinstance(entries, Mapping) else ():
        step = entry.get("step") if isinstance(entry, Mapping) else None
        if isinstance(step, (int, float)) or (isinstance(step, torch.Tensor) and step.numel() == 1):
            marks[f"a step count (of optimizer tensor {index})"] = float(step)
    return marks


def _partition_count(file: Any, path: Path) -> int:
    state = file.get("optimizer_state_dict") if isinstance(file, Mapping) else None
    if not isinstance(state, Mapping) or "zero_stage" not in state:
        raise CheckpointError(f"{path}: expected a dict with ['optimizer_state_dict']['zero_stage']")
    count = state.get("partition_count", 1)
    return int(max(count)) if isinstance(count, Sequence) else int(count)


def common_entries(state: Mapping[str, Any]) -> dict[str, Any]:
    """Entries for the whole optimizer, the loss scaler as a dict."""
    scaler_keys = ("loss_scaler", "dynamic_loss_scale", "cur_scale", "cur_iter", "last_overflow_iter")
    keys = (*scaler_keys, "overflow", "clip_grad", "ds_version")
    common = {key: state[key] for key in keys if key in state}
    scaler = common.get("loss_scaler")
    if isinstance(scaler, InertObject):
        common["loss_scaler"] = dict(vars(scaler))
    return common


def _stage12_groups(
    shapes: list[dict[str, tuple[int, ...]]], states: list[dict[str, Any]], tag_dir: Path
) -> tuple[ZeroGroup, ...]:
    groups = []
    for index, group_shapes in enumerate(shapes):
        buffers = []
        for rank, state in enumerate(states):
            flats = state.get("single_partition_of_fp32_groups")
            if not isinstance(flats, Sequence) or len(flats) != len(shapes):
                raise CheckpointError(
                    f"{tag_dir}: the optimizer file of rank {rank} should hold 'single_partition_of_fp32_groups' of "
                    f"{len(shapes)} groups, one for each in 'param_shapes'"
                )
            entry, _ = _optimizer_entry(_torch_state(state, "base_optimizer_state", tag_dir), index, 0)
            buffers.append({MASTER: flats[index].reshape(-1), **_flat_state(entry)})
        mappings = [(state.get("param_slice_mappings") or {}) for state in states]
        layout = _partition_layout(
            numels_of(group_shapes),
            [buffer[MASTER].numel() for buffer in buffers],
            [m[index] if isinstance(m, Sequence) and index < len(m) else {} for m in mappings],
            f"{tag_dir}: group {index}",
        )
        entry, param_group = _optimizer_entry(_torch_state(states[0], "base_optimizer_state", tag_dir), index, 0)
        groups.append(_group(group_shapes, layout, buffers, entry, param_group, f"{tag_dir}: group {index}"))
    return tuple(groups)


def _partition_layout(
    numels: Mapping[str, int],
    held: Sequence[int],
    mappings: Sequence[Mapping[str, FragmentAddress]],
    where: str,
) -> ShardLayout:
    """Where each parameter is in the partitions of stages 1 and 2.

    The fragment addresses tell it outright, also when the saving run had its own order of parameters (round-robin
    gradients); without complete ones, the parameters follow each other in the order of ``param_shapes``. The last
    partitions may come without their padding.
    """
    reached = dict.fromkeys(numels, 0)
    spans = []
    for rank, mapping in enumerate(mappings):
        for name, address in mapping.items():
            start, reached[name] = reached.get(name, 0), reached.get(name, 0) + address.numel
            spans.append(Span(name, start, rank, address.start, address.numel))
    if reached != dict(numels):
        if sum(held) < sum(numels.values()):
            raise CheckpointError(
                f"{where} should have {sum(numels.values())} fp32 elements, the files have {sum(held)}"
            )
        spans, rank, offset = [], 0, 0
        for name, numel in numels.items():
            start = 0
            while start < numel:
                if offset == held[rank]:
                    rank, offset = rank + 1, 0
                    continue
                length = min(numel - start, held[rank] - offset)
                spans.append(Span(name, start, rank, offset, length))
                start, offset = start + length, offset + length
    known = {span.name for span in spans}
    spans += [Span(name, 0, 0, 0, 0) for name in numels if name not in known]
    try:
        return ShardLayout(len(held), tuple(held), tuple(spans))
    except ValueError as error:
        raise CheckpointError(f"{where}: the fragment addresses do not fit the partitions: {error}") from error


def _stage3_groups(
    shapes: list[dict[str, tuple[int, ...]]], states: list[dict[str, Any]], tag_dir: Path
) -> tuple[ZeroGroup, ...]:
    """All groups share the file buffers: ``buffer = rank * sub_groups + sub_group``."""
    world = len(states)
    flats = [state.get("fp32_flat_groups") for state in states]
    sizes = [flat.numel() for flat in flats[0]] if isinstance(flats[0], Sequence) else []
    if any(not isinstance(f, Sequence) or [t.numel() for t in f] != sizes for f in flats):
        raise CheckpointError(f"{tag_dir}: expected 'fp32_flat_groups' of the same sizes in every optimizer file")
    inner = [_torch_state(state, "optimizer_state_dict", tag_dir) for state in states]
    buffers = [
        {MASTER: flat.reshape(-1), **_flat_state(state["state"].get(sub) or {})}
        for rank_flats, state in zip(flats, inner, strict=True)
        for sub, flat in enumerate(rank_flats)  # type: ignore[arg-type]
    ]
    pieces = [-(-numel // world) for group in shapes for numel in numels_of(group).values()]
    # A parameter never spans two sub-groups, but padding between them could not be told from parameters.
    if sum(pieces) != sum(sizes) and not (len(sizes) == 1 and sum(pieces) <= sizes[0]):
        raise CheckpointError(f"{tag_dir}: expected {sum(pieces)} fp32 elements a rank, the files have {sum(sizes)}")
    groups, sub, offset = [], 0, 0
    held = tuple(buffer[MASTER].numel() for buffer in buffers)
    for index, group_shapes in enumerate(shapes):
        spans = []
        first: int | None = None
        for name, numel in numels_of(group_shapes).items():
            piece = -(-numel // world)
            while piece and offset == sizes[sub]:
                sub, offset = sub + 1, 0
            first = sub if first is None and piece else first
            for rank in range(world if numel else 1):
                length = max(min(piece, numel - rank * piece), 0)
                if length or not numel:
                    spans.append(Span(name, rank * piece, rank * len(sizes) + sub, offset, length))
            offset += piece
        where = f"{tag_dir}: group {index}"
        try:
            layout = ShardLayout(max(len(held), 1), held or (0,), tuple(spans))
        except ValueError as error:
            raise CheckpointError(f"{where}: the sub-groups do not fit the parameters: {error}") from error
        entry = inner[0]["state"].get(first) or {}
        param_groups = inner[0]["param_groups"]
        param_group = param_groups[index] if index < len(param_groups) else {}
        groups.append(_group(group_shapes, layout, buffers, entry, param_group, where))
    return tuple(groups)


def _stage0_groups(
    names: list[list[str]], model_state: Mapping[str, Any], path: Path
) -> tuple[tuple[ZeroGroup, ...], dict[str, dict[str, Any]]]:
    """One file buffer a parameter; masters are ``fp32_groups`` where the weights are 16-bit, else the weights.

    Also the state of each parameter by name, as it is in the file.
    """
    saved = model_state.get("optimizer") or {}
    torch_state = saved.get("optimizer_state_dict", saved)
    inner = _torch_state({"optimizer": torch_state}, "optimizer", path) if torch_state else None
    masters, module = saved.get("fp32_groups"), model_state["module"]
    elementwise = _elementwise_keys(inner["state"] if inner is not None else {})
    groups = []
    whole: dict[str, dict[str, Any]] = {}
    for index, group_names in enumerate(names):
        where = f"{path}: group {index}"
        tensors = _stage0_masters(group_names, masters[index] if masters is not None else None, module, where)
        buffers = []
        entry: dict[str, Any] = {}
        param_group: dict[str, Any] = {}
        for position, (name, tensor) in enumerate(tensors.items()):
            own: dict[str, Any] = {}
            if inner is not None:
                own, param_group = _optimizer_entry(inner, index, position)
            whole[name] = own
            # Factored state is not elementwise; it can go to the same parameter only, see whole_state.
            parts = {
                k: v.reshape(-1)
                for k, v in own.items()
                if k in elementwise and torch.is_tensor(v) and v.numel() == tensor.numel()
            }
            entry = entry or {k: v for k, v in own.items() if k not in parts}
            buffers.append({MASTER: tensor.reshape(-1), **parts})
        spans = tuple(Span(name, 0, i, 0, tensor.numel()) for i, (name, tensor) in enumerate(tensors.items()))
        layout = ShardLayout(max(len(buffers), 1), tuple(s.numel for s in spans) or (0,), spans)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        groups.append(_group(shapes, layout, buffers, entry, param_group, where))
    return tuple(groups), whole


def _elementwise_keys(state: Mapping[Any, Mapping[str, Any]]) -> set[str]:
    """State keys that hold one value an element. A parameter without dimensions does not tell: the others do."""
    tensors = [(key, value) for entry in state.values() for key, value in entry.items() if torch.is_tensor(value)]
    found = {key for key, value in tensors if value.dim()}
    return found or {key for key, _ in tensors if key != "step"}


def _stage0_masters(
    names: list[str], masters: Sequence[torch.Tensor] | None, module: Mapping[str, torch.Tensor], where: str
) -> dict[str, torch.Tensor]:
    """The fp32 values of a group's parameters by name."""
    unknown = [name for name in names if name not in module]
    if masters is None:
        if unknown:
            raise CheckpointError(f"{where} should hold {unknown[0]!r}, but the module in the file does not")
        return {name: module[name] for name in names}
    misfits = [n in module and module[n].shape != t.shape for n, t in zip(names, masters, strict=False)]
    if len(masters) != len(names) or any(misfits):
        raise CheckpointError(f"{where}: the fp32 copies do not have the shapes of {', '.join(names[:5])}, ...")
    return dict(zip(names, masters, strict=True))


def _group(
    shapes: dict[str, tuple[int, ...]],
    layout: ShardLayout,
    buffers: Sequence[dict[str, torch.Tensor]],
    entry: Mapping[str, Any],
    param_group: Mapping[str, Any],
    where: str,
) -> ZeroGroup:
    """Assemble a group, checking that every state buffer is as long as what the layout finds in it."""
    ends = [0] * len(buffers)
    for span in layout.spans:
        if span.numel:
            ends[span.rank] = max(ends[span.rank], span.offset_stop)
    for buffer, end in zip(buffers, ends, strict=True):
        for key, tensor in buffer.items():
            if tensor.numel() < end:
                raise CheckpointError(f"{where}: {key!r} has {tensor.numel()} elements, expected at least {end}")
    keys = sorted({key for buffer, end in zip(buffers, ends, strict=True) if end for key in buffer} - {MASTER})
    scalars = {key: value for key, value in entry.items() if not (torch.is_tensor(value) and value.dim())}
    settings = {key: value for key, value in param_group.items() if key != "params"}
    return ZeroGroup(shapes, layout, tuple(buffers), tuple(keys), scalars, settings)


def _torch_state(state: Mapping[str, Any], key: str, where: Path) -> dict[str, Any]:
    """The ``state_dict`` of the torch optimizer inside, checked for its two keys."""
    inner = state.get(key)
    if not isinstance(inner, Mapping) or "state" not in inner or "param_groups" not in inner:
        raise CheckpointError(
            f"{where}: expected the optimizer's state under {key!r} as a dict with 'state' and 'param_groups', "
            f"got {type(inner).__name__}"
        )
    return dict(inner)


def _optimizer_entry(inner: Mapping[str, Any], group: int, position: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """State and group entry of the ``position``-th parameter of a group; empty where the optimizer has none."""
    if group >= len(inner["param_groups"]):
        return {}, {}
    entry = inner["param_groups"][group]
    ids = entry["params"]
    return dict(inner["state"].get(ids[position]) or {}) if position < len(ids) else {}, dict(entry)


def _flat_state(entry: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {key: value.reshape(-1) for key, value in entry.items() if torch.is_tensor(value) and value.dim()}
