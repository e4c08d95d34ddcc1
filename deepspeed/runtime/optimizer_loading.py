"""A flat optimizer's state from a checkpoint: which saved values go where, by the names of the parameters.

First a plan, which reads no values and changes nothing, and in which all that can be wrong comes to light; then the copies.
What the files hold is :mod:`deepspeed.runtime.optimizer_state`'s to say.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from deepspeed._core.bars import bytes_bar
from deepspeed._core.ckpt.blockreader import Ranges
from deepspeed._core.ckpt.compare import differences, listed
from deepspeed._core.ckpt.reader import MASTER, ZeroGroup, ZeroReader
from deepspeed._core.layout.spans import ShardLayout, Span
from deepspeed._core.pages import empty_flat
from deepspeed._core.reduce.bucket import Bucket, Slot
from deepspeed._core.step.template import state_template
from deepspeed._core.store import Tile
from deepspeed.errors import CheckpointError
from deepspeed.runtime.early_weights import EarlyWeights
from deepspeed.runtime.flat_optimizer import FlatOptimizer
from deepspeed.utils.logging import warning_once

__all__ = [
    "LoadPlan",
    "ModelNames",
    "Staged",
    "follow_weights",
    "load_planned",
    "plan_load",
    "saved_groups",
    "stage_planned",
]

# Group entries that come with the class (in torch, Adam and AdamW differ in the last only): the running program's stay.
_IMPLEMENTATION_KEYS = {"params", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"}

# What a dynamic loss scaler has found out; its other attributes are settings, which the running config decides.
_SCALER_PROGRESS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis", "consecutive_skips")


@dataclass(frozen=True)
class ModelNames:
    """What parameters are called, in the running model and in the checkpoint.

    Attributes:
        live: all names of each parameter of the model, the first of them its name in the optimizer.
        saved: names of everything in the checkpoint's model files.
        aliases: further names of tied parameters in the checkpoint, and the name that its optimizer knows.
    """

    live: Mapping[torch.nn.Parameter, Sequence[str]]
    saved: Collection[str]
    aliases: Mapping[str, str]

    def source_of(self, param: torch.nn.Parameter, known: Collection[str]) -> str | None:
        """The name in ``known``, which are names of the checkpoint, of one of the model's parameters."""
        names = self.live.get(param, ())
        return next((n for n in (*names, *(self.aliases.get(n, "") for n in names)) if n in known), None)


@dataclass(frozen=True)
class _Target:
    """One tensor of the optimizer, and where its elements come from.

    Attributes:
        tensor: the master.
        group: the live parameter group.
        main: the saved group that most elements come from; its step count is taken. None if nothing is in the files.
        parts: for each saved group, the places of its elements in the flattened tensor, by their saved names.
        name: the saved name of the one parameter that the tensor is, in stage 0.
        fresh: ``(begin, numel)`` of elements that the files lack.
        tile: what to open for the tensor to have values; None in stage 0.
    """

    tensor: torch.Tensor
    group: int
    main: int | None
    parts: dict[int, ShardLayout]
    name: str
    fresh: tuple[tuple[int, int], ...]
    tile: Tile | None = None


@dataclass(frozen=True)
class LoadPlan:
    """What :func:`load_planned` will do.

    Attributes:
        reader: the files.
        targets: where the optimizer's tensors come from.
        groups: for each live parameter group, the saved one whose options it takes; None keeps its own.
        templates: for each live group, what a step puts into the optimizer's state.
        matched: live names of the parameters that get masters from the files, and the names there.
        notes: what could not be matched, in sentences for the user.
    """

    reader: ZeroReader
    targets: tuple[_Target, ...]
    groups: tuple[int | None, ...]
    templates: tuple[dict[str, Any] | None, ...]
    matched: dict[str, str]
    notes: tuple[str, ...]


# -- the plan ----------------------------------------------------------------------------------------------------------


def plan_load(flat: FlatOptimizer, reader: ZeroReader, names: ModelNames, strict: bool) -> LoadPlan:
    """Matches the optimizer's parameters with those of the files by name. Changes nothing; not collective.

    Parameters that were frozen when the checkpoint was saved start with fresh state, and the state of parameters that are
    frozen now is left aside; ``notes`` tell. So do, unless ``strict``, parameters that the checkpoint lacks or that only it
    has.

    Raises:
        CheckpointError: the files are of another model or of another kind of optimizer.
    """
    flat.require_here()
    saved = {name: shape for group in reader.groups for name, shape in group.shapes.items()}
    matched = {s.name: n for s in flat.slots() if (n := names.source_of(s.param, saved)) is not None}
    _check_model(flat, reader, names, matched, strict)
    groups = saved_groups(flat, [group.shapes for group in reader.groups], matched)
    notes = [*_notes_on_names(flat, saved, names, matched), *_notes_on_groups(flat, reader, matched, groups)]
    where = {name: index for index, group in enumerate(reader.groups) for name in group.shapes}
    for pair in dict.fromkeys(
        (where[matched[s.name]], s.bucket.group_index) for s in flat.slots() if s.name in matched
    ):
        _check_kind(flat, reader, *pair)
    templates = tuple(
        _state_template(flat, index, reader.groups[source].param_group if source is not None else {})
        for index, source in enumerate(groups)
    )
    targets = tuple(target for bucket in flat.buckets for target in _targets(flat, bucket, matched, where))
    return LoadPlan(reader, targets, groups, templates, matched, tuple(notes))


def saved_groups(
    flat: FlatOptimizer, groups: Sequence[Collection[str]], matched: Mapping[str, str]
) -> tuple[int | None, ...]:
    """For each live parameter group, the index of the saved one that most of its parameters come from; None if none do.

    Of two with equally many, the first.
    """
    where = {name: index for index, group in enumerate(groups) for name in group}
    counts: list[Counter[int]] = [Counter() for _ in flat.param_groups]
    for slot in flat.slots():
        if slot.name in matched:
            counts[slot.bucket.group_index][where[matched[slot.name]]] += 1
    return tuple(min(count, key=lambda index: (-count[index], index)) if count else None for count in counts)


def _check_model(
    flat: FlatOptimizer, reader: ZeroReader, names: ModelNames, matched: Mapping[str, str], strict: bool
) -> None:
    saved = {name: shape for group in reader.groups for name, shape in group.shapes.items()}
    live = {matched.get(slot.name, slot.name): tuple(slot.param.shape) for slot in flat.slots()}
    # A parameter that both know, but only one trains, is no other model.
    everything = {name for aliases in names.live.values() for name in aliases}
    wanted = {name: shape for name, shape in live.items() if name in saved or name not in names.saved}
    held = {name: shape for name, shape in saved.items() if name in live or name not in everything}
    clauses = differences(held, wanted, names=strict)
    if clauses:
        raise CheckpointError(
            f"{reader.tag_dir} holds the optimizer state of another model. {_sentence(clauses)}. Nothing was loaded. Pass "
            "load_optimizer_states=False to load the weights only"
            + (", or load_module_strict=False to take what is known by name" if strict else "")
        )


def _sentence(clauses: Sequence[str]) -> str:
    text = "; ".join(clauses)
    return text[:1].upper() + text[1:]


def _notes_on_names(
    flat: FlatOptimizer, saved: Collection[str], names: ModelNames, matched: Mapping[str, str]
) -> Iterator[str]:
    fresh = [slot.name for slot in flat.slots() if slot.name not in matched]
    if fresh:
        yield f"parameters without optimizer state in the checkpoint, which start with a fresh one: {listed(fresh)}"
    beside = {slot.bucket.index for slot in flat.slots() if slot.name in matched}
    shared = [s.name for s in flat.slots() if s.name not in matched and s.bucket.index in beside]
    if shared and flat.stage:
        yield (
            "the step count of these, for bias correction, is that of the parameters in the same parameter group (a group "
            f"of their own gives them a count of their own): {listed(shared)}"
        )
    used = set(matched.values())
    unused = [name for name in saved if name not in used]
    if unused:
        yield f"optimizer state in the checkpoint of parameters that are not trained here, left aside: {listed(unused)}"


def _notes_on_groups(
    flat: FlatOptimizer, reader: ZeroReader, matched: Mapping[str, str], groups: Sequence[int | None]
) -> Iterator[str]:
    where = {name: index for index, group in enumerate(reader.groups) for name in group.shapes}
    for index, chosen in enumerate(groups):
        if chosen is None:
            continue
        options = _options_of(reader.groups[chosen])
        others = {
            where[matched[s.name]] for s in flat.slots() if s.bucket.group_index == index and s.name in matched
        } - {chosen}
        different = sorted(other for other in others if _options_of(reader.groups[other]) != options)
        if different:
            yield (
                f"the parameters of group {index} are from groups {sorted({chosen, *different})} of the checkpoint; it "
                f"takes the options of group {chosen}, where most of them were: {options}"
            )


def _options_of(group: ZeroGroup) -> dict[str, Any]:
    return {key: value for key, value in group.param_group.items() if key not in _IMPLEMENTATION_KEYS}


def _targets(
    flat: FlatOptimizer, bucket: Bucket, matched: Mapping[str, str], where: Mapping[str, int]
) -> Iterator[_Target]:
    if flat.stage == 0:
        for slot, master in zip(bucket.slots, flat.master_of(bucket), strict=True):
            yield _target(master, [(slot, 0, 0, slot.numel)], matched, where)
        return
    places = [(slot, *slot.overlap(flat.transport.rank)) for slot in bucket.slots]
    for tile in flat.states.tiles(bucket):
        yield _target(tile.param, [_within(tile, *place) for place in places], matched, where, tile)


def _within(tile: Tile, slot: Slot, begin: int, at: int, numel: int) -> tuple[Slot, int, int, int]:
    """A place in the shard as one in a tile of it."""
    low, high = max(at, tile.begin), min(at + numel, tile.end)
    return (slot, begin + low - at, low - tile.begin, high - low) if low < high else (slot, 0, 0, 0)


def _target(
    tensor: torch.Tensor,
    places: Sequence[tuple[Slot, int, int, int]],
    matched: Mapping[str, str],
    where: Mapping[str, int],
    tile: Tile | None = None,
) -> _Target:
    """``places`` are ``(slot, first element in the parameter, place in the tensor, numel)``."""
    spans: dict[int, list[Span]] = {}
    numels: Counter[int] = Counter()
    fresh = []
    for slot, begin, at, numel in places:
        source = matched.get(slot.name)
        if source is None:
            fresh.append((at, numel))
            continue
        # Whole parameters count, so that all ranks choose the same group.
        numels[where[source]] += slot.numel
        if numel:
            spans.setdefault(where[source], []).append(Span(source, begin, 0, at, numel))
    main = min(numels, key=lambda index: (-numels[index], index)) if numels else None
    parts = {index: ShardLayout(1, (tensor.numel(),), tuple(found)) for index, found in spans.items()}
    first = places[0][0]
    name = matched.get(first.name, first.name)
    return _Target(tensor, first.bucket.group_index, main, parts, name, tuple(fresh), tile)


def _check_kind(flat: FlatOptimizer, reader: ZeroReader, saved_index: int, live_index: int) -> None:
    saved, live = reader.groups[saved_index], flat.param_groups[live_index]
    template = _state_template(flat, live_index, saved.param_group)
    saved_keys = set(saved.state_keys)
    if template is not None and (saved_keys or saved.state_scalars) and any(map(prod, saved.shapes.values())):
        wrong = saved_keys != {k for k, v in template.items() if _elementwise(v)}
        wrong = wrong or ("step" in template and _scalar_of(saved, "step") is None)
    else:
        # Saved before the first step, or by an optimizer without state: only the options tell.
        telling = {"betas", "momentum", "eps"}
        wrong = bool(saved.param_group) and telling & set(saved.param_group) != telling & set(live)
    if wrong:
        raise CheckpointError(
            f"{reader.tag_dir} holds the state of another kind of optimizer: state {sorted(saved_keys)} and group "
            f"options {sorted(set(saved.param_group) - _IMPLEMENTATION_KEYS)}; {type(flat.optimizer).__name__} here "
            f"has state {sorted(template or ())} and options {sorted(set(live) - _IMPLEMENTATION_KEYS)}. Pass "
            "load_optimizer_states=False to load the weights only"
        )


def _elementwise(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _scalar_of(group: ZeroGroup, key: str) -> Any:
    """A value for the group as a whole; some optimizers keep their step count among the options."""
    return group.state_scalars.get(key, group.param_group.get(key))


def _state_template(flat: FlatOptimizer, group_index: int, saved: dict[str, Any]) -> dict[str, Any] | None:
    """What a step of the running optimizer, with the options it will have after loading, puts into its state.

    None where that cannot be found out, or where the state is not elementwise.
    """
    live = flat.param_groups[group_index]
    options = {**live, **{k: v for k, v in saved.items() if k in live and k not in _IMPLEMENTATION_KEYS}}
    return state_template(flat.optimizer, options, torch.zeros((2, 3) if flat.stage == 0 else (6,)))


# -- the copies --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Staged:
    """Values that were read for a target, in memory of their own; ``state`` is what the optimizer gets with them."""

    target: _Target
    values: torch.Tensor
    state: dict[str, Any]

    def pieces(self) -> Iterator[tuple[Span, torch.Tensor]]:
        """Places in the target, flattened, and the values that the files had for them."""
        for layout in self.target.parts.values():
            for span in layout.spans:
                yield span, self.values[span.offset : span.offset_stop]

    def take(self) -> None:
        """Gives the values to the target's tensor, with their memory where that tensor's is nobody else's."""
        tile, master = self.target.tile, self.target.tensor.detach().view(-1)
        if tile is None or tile.param is not tile.bucket.master or tile.bucket.full_precision:
            for span, values in self.pieces():
                master[span.offset : span.offset_stop].copy_(values)
            return
        end = 0  # padding and what the files lack stay as they are
        for span in sorted((span for span, _ in self.pieces()), key=lambda span: span.offset):
            self.values[end : span.offset] = master[end : span.offset]
            end = max(end, span.offset_stop)
        self.values[end:] = master[end:]
        tile.param.data = self.values


def stage_planned(plan: LoadPlan, ranges: Ranges, early: EarlyWeights | None = None) -> list[Staged]:
    """Reads masters, then optimizer state, and changes nothing but ``early``'s weights. Not collective without it.

    Takes as much memory as the state itself and the masters; :func:`load_planned` gives that of the masters back.

    Args:
        plan: what to take.
        ranges: how to read it.
        early: sends the weights while the state is read.

    Raises:
        CheckpointError: the files are not what was written.
    """
    staged: list[Staged] = []
    for target in plan.targets:
        values = ranges.empty(target.tensor)
        staged.append(Staged(target, values, {}))
        _read_master(plan, target, values, ranges)
    if early is not None:
        read = _by_bucket(staged)
        ranges.then(early.send(lambda bucket: read.get(bucket.index, ())))
    staged = [replace(one, state=_read_state(plan, one.target, ranges)) for one in staged]
    _run(plan, ranges)
    return staged


def _by_bucket(staged: Iterable[Staged]) -> dict[int, list[tuple[Span, torch.Tensor]]]:
    """Places in the shards of buckets, by their index, and what is read for them."""
    found: dict[int, list[tuple[Span, torch.Tensor]]] = {}
    for one in staged:
        tile = one.target.tile
        if tile is not None:
            pieces = ((span._replace(offset=tile.begin + span.offset), values) for span, values in one.pieces())
            found.setdefault(tile.bucket.index, []).extend(pieces)
    return found


def _run(plan: LoadPlan, ranges: Ranges) -> None:
    with bytes_bar(ranges.nbytes + ranges.check_nbytes, f"loading {plan.reader.tag_dir.name}") as progress:
        ranges.run(progress)


def load_planned(flat: FlatOptimizer, plan: LoadPlan, staged: list[Staged] | None, ranges: Ranges | None) -> None:
    """Fills masters, optimizer state, group options and scaler from the files; reads this rank's ranges only.

    Takes no memory but that of the state itself. Not collective; the weights on other ranks follow with
    ``publish_weights``.

    Args:
        flat: its states change.
        plan: what to take.
        staged: values that were read before; they are used up.
        ranges: how to read the others; None copies them from mapped files, one by one.
    """
    flat.unfinished("loading a checkpoint did not end")
    while staged:
        read = staged.pop()
        read.take()
        _clear(flat, plan, read.target)
        _put(flat, read.target, read.state)
    if staged is None:
        _load_in_place(flat, plan, ranges)
    for live, source in zip(flat.param_groups, plan.groups, strict=True):
        # Into the live dicts, which clients and schedulers hold.
        options = _options_of(plan.reader.groups[source]) if source is not None else {}
        live.update({key: value for key, value in options.items() if key in live})
    _load_scaler(flat, plan.reader)
    flat.overflow = False


def _load_in_place(flat: FlatOptimizer, plan: LoadPlan, ranges: Ranges | None) -> None:
    later = ranges if flat.all_in_memory else None
    for target in plan.targets:
        with contextlib.nullcontext() if target.tile is None else flat.states.editing(target.tile):
            # Before the new state is made, so that both are never there together.
            _clear(flat, plan, target)
            _read_master(plan, target, target.tensor.detach().view(-1), later)
            _put(flat, target, _read_state(plan, target, later))
    if ranges is not None:
        _run(plan, ranges)


def _clear(flat: FlatOptimizer, plan: LoadPlan, target: _Target) -> None:
    if target.main is None and plan.templates[target.group] is None:
        return  # the optimizer may rely on the state that its constructor made
    flat.optimizer.state.pop(target.tensor, None)


def _put(flat: FlatOptimizer, target: _Target, state: dict[str, Any]) -> None:
    if state:
        flat.optimizer.state[target.tensor] = state


def _read_master(plan: LoadPlan, target: _Target, values: torch.Tensor, ranges: Ranges | None) -> None:
    """Fills ``values``, the flat master, when the ranges are read; at once without."""
    for layout in target.parts.values():
        plan.reader.fill(None, MASTER, layout, 0, values, _copy(ranges))


def _copy(ranges: Ranges | None) -> Callable[[torch.Tensor, torch.Tensor], object]:
    return ranges.copy if ranges is not None else torch.Tensor.copy_


def _read_state(plan: LoadPlan, target: _Target, ranges: Ranges | None) -> dict[str, Any]:
    """What the optimizer keeps of a master, filled when the ranges are read; at once without."""
    reader, template = plan.reader, plan.templates[target.group]
    if target.main is None:
        return {}
    saved = reader.groups[target.main]
    whole = reader.whole_state(target.name) if target.tile is None else None
    if whole is not None:
        # Views of the file, and of any shape.
        scalars = {key: value for key, value in whole.items() if not _elementwise(value)}
        tensors = {k: v.to(target.tensor.device, copy=True) for k, v in whole.items() if _elementwise(v)}
    else:
        scalars = dict(saved.state_scalars)
        tensors = {key: _state_tensor(reader, target, key, template, ranges) for key in _keys(reader, target, saved)}
    return _like(template, tensors, scalars, saved, target.tensor) if scalars or tensors else {}


def _keys(reader: ZeroReader, target: _Target, saved: ZeroGroup) -> list[str]:
    """Element-wise state of any of the groups that a tensor comes from."""
    return sorted({*saved.state_keys, *(key for index in target.parts for key in reader.groups[index].state_keys)})


def _state_tensor(
    reader: ZeroReader, target: _Target, key: str, template: Mapping[str, Any] | None, ranges: Ranges | None
) -> torch.Tensor:
    master = target.tensor
    flat = ranges.empty(master) if ranges is not None else empty_flat(master.numel(), master.dtype, master.device)
    parts = [part for index, part in target.parts.items() if key in reader.groups[index].state_keys]
    end = 0
    for span in sorted((s for part in parts for s in part.spans), key=lambda span: span.offset):
        flat[end : span.offset].zero_()  # padding, and what the files lack
        end = max(end, span.offset_stop)
    flat[end:].zero_()
    for part in parts:
        reader.fill(None, key, part, 0, flat, _copy(ranges))
    start = (template or {}).get(key)
    if _elementwise(start):
        for begin, numel in target.fresh:
            flat[begin : begin + numel].fill_(float(start.view(-1)[0]))  # type: ignore[union-attr]
    return flat.view(target.tensor.shape)


def _like(
    template: Mapping[str, Any] | None,
    tensors: dict[str, torch.Tensor],
    scalars: dict[str, Any],
    saved: ZeroGroup,
    master: torch.Tensor,
) -> dict[str, Any]:
    """A state with the types that the optimizer itself uses (a step count may be int or tensor)."""
    like = template or {}
    loaded: dict[str, Any] = dict(tensors)
    if "step" in like:
        scalars = {"step": _scalar_of(saved, "step"), **scalars}
    for key, value in scalars.items():
        example = like.get(key)
        if isinstance(example, torch.Tensor) and not example.dim():
            loaded[key] = torch.tensor(float(value), dtype=example.dtype)
        elif isinstance(example, (int, float)) and not isinstance(example, bool):
            loaded[key] = type(example)(value)
        elif isinstance(value, torch.Tensor):
            # A number for the tensor as a whole, or the element-wise state of a parameter without dimensions.
            loaded[key] = value.to(master.device if _elementwise(example) else value.device, copy=True)
        else:
            loaded[key] = value
    for key, example in like.items():
        if key not in loaded and _elementwise(example):
            loaded[key] = torch.zeros_like(master)  # parameters without elements have no state in the files
    return loaded


def _load_scaler(flat: FlatOptimizer, reader: ZeroReader) -> None:
    """A dynamic scale goes on where it was; a static one is the config's, whatever the files had."""
    common = reader.common
    if not flat.dynamic_loss_scale:
        return
    if not common.get("dynamic_loss_scale", False):
        warning_once("the checkpoint has no dynamic loss scale: it starts anew, as configured")
        return
    saved = {**common, **(common.get("loss_scaler") or {})}
    flat.loss_scaler.load_state_dict({key: saved[key] for key in _SCALER_PROGRESS if key in saved})


def follow_weights(flat: FlatOptimizer, names: Collection[str]) -> None:
    """Makes the masters of the named parameters follow the model's weights. No communication."""
    for slot in flat.slots():
        bucket = slot.bucket
        if slot.name not in names or bucket.full_precision:
            continue
        if flat.stage == 0:
            slot.view(bucket.master).copy_(slot.view(bucket.weights))
        else:
            _, at, numel = slot.overlap(flat.transport.rank)
            bucket.master[at : at + numel].copy_(bucket.own_part(slot))
