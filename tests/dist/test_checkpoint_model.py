"""Whatever is done with checkpoints, and whenever a run is killed: it is the run in plain torch that nothing interrupted.

Hypothesis makes up histories: lives of a run, each at its own stage and world size, with training, saves, loads, exports
and kills between and within them. What has to be true is kept in a model: which states are on the disk, and which steps
of the one uninterrupted run they are.
"""

from __future__ import annotations

import functools
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepspeed._core.ckpt.staging import leftovers
from deepspeed.runtime.lr_schedules import WarmupLR
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from tests.helpers import preload  # noqa: F401 - before ranks are forked
from tests.helpers.ckpt import assert_same, build, by_name, config
from tests.helpers.crash import Moments, kill_all
from tests.helpers.dist import run_ranks
from tests.helpers.models import Tricky, batches
from tests.helpers.scripts import run_scripts

BATCH, STEPS = 12, 12
# A large eps keeps Adam from turning rounding noise of tiny gradients into full steps.
ADAM = {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-3}
WARMUP = {"warmup_max_lr": 0.02, "warmup_num_steps": 4}
TOLERANCE = 5e-5
TAGS = ("a", "b", "c")

Exact = tuple[int, ...]
"""How a state came about: stage and world size of each step. Equal histories have equal bits."""


# -- one uninterrupted run in plain torch ---------------------------------------------------------------------------------


def model(seed: int) -> Tricky:
    """Tied, reused, frozen, odd, empty and scalar parameters."""
    torch.manual_seed(seed)
    return Tricky(tied=True, reused=True, frozen=True)


def plain(rank: int, world: int) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Losses of all steps, and the weights before each and after the last."""
    net = model(0)
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1]},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **ADAM)
    schedule = WarmupLR(optimizer, **WARMUP)

    def weights() -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in net.named_parameters()}

    losses, states = [], [weights()]
    for step in range(STEPS):
        ((x, y),) = batches(0, 1, BATCH, seed=step)
        loss = net(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss))
        states.append(weights())
    return losses, states


@functools.cache
def truth() -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    return run_ranks(plain, 1)[0]  # type: ignore[no-any-return]


# -- histories ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """``train`` (steps), ``save`` (tag, whether ``latest`` names it), ``load`` (tag, or the newest), ``export``."""

    kind: str
    count: int = 0
    tag: str | None = None
    latest: bool = True


@dataclass(frozen=True)
class Life:
    """One launch: it goes on from the newest checkpoint, does ``ops``, and is killed in a last save or ends well."""

    stage: int
    world: int
    background: bool
    keep_last: int | None
    ops: tuple[Op, ...]
    kill: tuple[str, int, int] | None
    """Tag of the last save, the rank that is killed in it (-1: all), and before which of its calls."""


OPS = st.one_of(
    st.builds(Op, st.just("train"), st.integers(1, 2)),
    st.builds(Op, st.just("save"), tag=st.sampled_from(TAGS), latest=st.sampled_from([True, True, True, False])),
    st.builds(Op, st.just("load"), tag=st.sampled_from([None, *TAGS])),
    st.just(Op("export")),
)
LIVES = st.builds(
    Life,
    stage=st.integers(0, 3),
    world=st.integers(1, 3),
    background=st.booleans(),
    keep_last=st.sampled_from([None, None, 1, 2]),
    ops=st.lists(OPS, min_size=1, max_size=5).map(tuple),
    kill=st.none() | st.tuples(st.sampled_from(TAGS), st.integers(-1, 2), st.integers(1, 60)),
)
HISTORIES = st.lists(LIVES, min_size=2, max_size=4)


@dataclass
class Disk:
    """What is to be on the disk: the state that each tag holds, and what ``latest`` names; after a kill, what may be."""

    tags: dict[str, State] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    """Tags by the time of their save."""
    latest: str | None = None

    def saved(self, tag: str, state: State, latest: bool, keep: int | None) -> None:
        self.tags[tag] = state
        self.order = [other for other in self.order if other != tag] + [tag]
        if latest:
            self.latest = tag
        if keep is not None:
            for other in self.order[: max(len(self.order) - keep, 0)]:
                if other not in (tag, self.latest):
                    del self.tags[other]
            self.order = [other for other in self.order if other in self.tags]

    @property
    def newest(self) -> str | None:
        return self.latest if self.latest is not None else (self.order[-1] if self.order else None)

    def copy(self) -> Disk:
        return Disk(dict(self.tags), list(self.order), self.latest)


@dataclass(frozen=True)
class State:
    """A moment of the run: steps taken, how, and the bits of weights and moments as rank 0 saw them."""

    steps: int
    how: Exact
    values: dict[str, torch.Tensor]


def check_truth(state: State) -> None:
    """The state is that of the plain run."""
    _, states = truth()
    for name, value in states[state.steps].items():
        got = state.values[f"module.{name}"]
        close = {"rtol": TOLERANCE, "atol": TOLERANCE * float(value.abs().max()) if value.numel() else 0.0}
        torch.testing.assert_close(got, value, **close, msg=lambda m, n=name: f"{n} after {state.steps} steps: {m}")


# -- a life, in processes of its own ----------------------------------------------------------------------------------------


def engine_of(life: Life, seed: int) -> Any:
    accumulation = 2
    checkpoint: dict[str, Any] = {"async": life.background}
    if life.keep_last is not None:
        checkpoint["keep_last"] = life.keep_last
    made = config(life.stage, checkpoint=checkpoint)
    made["train_micro_batch_size_per_gpu"] = BATCH // life.world // accumulation
    made["optimizer"] = {"type": "AdamW", "params": ADAM}
    made["scheduler"] = {"type": "WarmupLR", "params": WARMUP}
    if life.stage == 3:
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 12
    return build(made, seed, model(seed))


def one_step(engine: Any, rank: int, world: int) -> float:
    """The loss of the global batch that is next. Collective."""
    ((x, y),) = batches(0, 1, BATCH, seed=engine.global_steps)
    count = engine.gradient_accumulation_steps()
    pieces = list(zip(x.chunk(world * count), y.chunk(world * count), strict=True))
    total = torch.zeros(())
    for mine, target in pieces[rank * count : (rank + 1) * count]:
        loss = engine(mine, target)
        engine.backward(loss)
        engine.step()
        total += loss.detach() / count / world
    torch.distributed.all_reduce(total)
    return float(total)


class Player:
    """Does what a life does, on one rank, and keeps the model of the disk."""

    def __init__(self, life: Life, folder: str, disk: Disk, first: bool) -> None:
        self.life, self.folder, self.disk = life, folder, disk
        self.rank, self.world = torch.distributed.get_rank(), life.world
        self.engine = engine_of(life, seed=0 if first else 7)
        self.how: Exact = ()
        # Until the first step the optimizer has no state to compare.
        path, _ = self.engine.load_checkpoint(folder) if not first else (None, None)
        if path is not None:
            self._arrived(disk.newest)

    def _arrived(self, tag: str | None) -> None:
        """After a load: bit for bit what was saved."""
        assert tag is not None
        state = self.disk.tags[tag]
        assert self.engine.global_steps == state.steps, tag
        self.how = state.how
        assert_same(self.state().values, state.values, f"tag {tag}")

    def state(self) -> State:
        fresh = () if self.engine.global_steps else [name for name, _ in self.engine.module.named_parameters()]
        return State(self.engine.global_steps, self.how, by_name(self.engine, fresh=fresh))

    def train(self, op: Op) -> None:
        for _ in range(op.count):
            if self.engine.global_steps < STEPS:
                loss, expected = one_step(self.engine, self.rank, self.world), truth()[0][self.engine.global_steps - 1]
                assert abs(loss - expected) <= TOLERANCE * abs(expected), (loss, expected)
                self.how += (10 * self.life.stage + self.world,)

    def save(self, op: Op) -> None:
        assert op.tag is not None
        state = self.state()
        self.engine.save_checkpoint(self.folder, tag=op.tag, save_latest=op.latest)
        self.disk.saved(op.tag, state, op.latest, self.life.keep_last)

    def load(self, op: Op) -> None:
        tag = op.tag if op.tag is not None else self.disk.newest
        if tag in self.disk.tags:
            self.engine.load_checkpoint(self.folder, tag=op.tag)
            self._arrived(tag)

    def export(self, op: Op) -> None:
        self.engine._saver.settle()
        torch.distributed.barrier()
        if self.disk.newest is not None and self.rank == 0:
            exported = get_fp32_state_dict_from_zero_checkpoint(self.folder, tag=self.disk.newest)
            values = self.disk.tags[self.disk.newest].values
            for name, value in exported.items():
                assert torch.equal(value, values[f"module.{name}"]), name
        torch.distributed.barrier()

    def play(self) -> Disk:
        for op in self.life.ops:
            getattr(self, op.kind)(op)
        self.engine._saver.settle()
        return self.disk


def play(rank: int, world: int, folder: str, out: str, life: Life, disk: Disk, first: bool) -> None:
    """Writes what is to be on the disk to ``out``: before the last save, and after it."""
    player = Player(life, folder, disk, first)
    player.play()
    before = player.disk.copy()
    after = before.copy()
    if life.kill is not None:
        tag, victim, at = life.kill
        after.saved(tag, player.state(), True, life.keep_last)
    if rank == 0:
        torch.save((before, after), out)
    pids: list[int] = [0] * world
    torch.distributed.all_gather_object(pids, os.getpid())
    if life.kill is not None:
        doomed = pids if victim < 0 else [pids[victim % world]]
        mine = rank == (0 if victim < 0 else victim % world)
        with Moments(at, functools.partial(kill_all, doomed) if mine else None):
            player.engine.save_checkpoint(folder, tag=tag)
            if life.background and player.engine.global_steps < STEPS:
                one_step(player.engine, rank, world)
            player.engine.destroy()
    else:
        player.engine.destroy()


def found(rank: int, world: int, folder: str, before: Disk, after: Disk) -> Disk:
    """After a kill: which of the two it is, by loading every tag. It is never anything else."""
    engine = engine_of(Life(2, 1, False, None, (), None), seed=9)
    one = Disk()
    for tag in TAGS:
        allowed = [disk.tags[tag] for disk in (before, after) if tag in disk.tags]
        if not allowed:
            continue
        try:
            engine.load_checkpoint(folder, tag=tag)
        except Exception:
            # Not yet published, or removed by retention.
            assert len(allowed) == 1 and not Path(folder, tag).exists(), tag
            continue
        fresh = () if engine.global_steps else [name for name, _ in engine.module.named_parameters()]
        values = by_name(engine, fresh=fresh)
        same = [s for s in allowed if s.steps == engine.global_steps and all_equal(s.values, values)]
        assert same, f"tag {tag} is neither what it was before the killed save nor what it was to be"
        one.tags[tag] = same[-1]
    one.latest = Path(folder, "latest").read_text() if Path(folder, "latest").exists() else None
    assert one.latest in (before.latest, after.latest)
    one.order = [
        tag for tag in (after.order if one.tags.keys() - before.tags.keys() else before.order) if tag in one.tags
    ]
    last = [tag for tag in after.order[-1:] if one.tags.get(tag) is after.tags[tag]]
    one.order = [tag for tag in one.order if tag not in last] + last
    assert not before.tags or one.newest in one.tags, "what there was is lost"
    path, _ = engine.load_checkpoint(folder) if os.path.isdir(folder) and one.tags else (None, None)
    if path is not None:
        assert_same(
            by_name(engine, fresh=list(dict(engine.module.named_parameters()))), one.tags[str(one.newest)].values
        )
    return one


def all_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def live(folder: Path, history: list[Life]) -> None:
    saved, out, disk = folder / "saved", folder / "disk.pt", Disk()
    saved.mkdir()
    exact: dict[Exact, dict[str, torch.Tensor]] = {}
    for life in history:
        ended = run_scripts(play, life.world, str(saved), str(out), life, disk, not disk.tags, timeout_s=60)
        codes = [one.code for one in ended]
        assert out.exists() and (codes == [0] * life.world or (life.kill is not None and -9 in codes)), ended
        before, after = torch.load(out, weights_only=False)
        out.unlink()
        if codes == [0] * life.world:
            disk = after
            if life.kill is not None or any(op.kind == "save" for op in life.ops):  # cleans up, too
                assert leftovers(saved) == [], history
                assert {p.name for p in saved.iterdir() if p.is_dir()} == set(disk.tags), history
        else:
            disk = run_ranks(found, 1, str(saved), before, after)[0]
        for state in disk.tags.values():
            check_truth(state)
            assert_same(exact.setdefault(state.how, state.values), state.values, f"two histories {state.how}")


def run_history(history: list[Life]) -> None:
    truth()
    with tempfile.TemporaryDirectory(prefix="history-") as folder:
        live(Path(folder), history)


EASY = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@settings(EASY, max_examples=2)
@given(HISTORIES)
def test_any_history_is_the_uninterrupted_run(history: list[Life]) -> None:
    run_history(history)


def test_a_history_with_everything() -> None:
    train, latest = functools.partial(Op, "train"), Op("load")
    run_history(
        [
            Life(2, 2, False, None, (train(2), Op("save", tag="a"), train(1)), ("b", 0, 30)),
            Life(3, 1, True, None, (train(1), Op("save", tag="a"), train(1), latest, Op("export")), ("a", -1, 31)),
            Life(0, 3, True, 1, (train(2), Op("save", tag="c"), train(1), latest, train(2)), ("a", 1, 3)),
            Life(2, 2, False, 2, (train(1), Op("save", tag="b"), Op("export"), Op("load", tag="b")), None),
        ]
    )


@pytest.mark.slow
@settings(EASY, derandomize=False, max_examples=60)
@given(HISTORIES)
def test_many_histories(history: list[Life]) -> None:
    run_history(history)
